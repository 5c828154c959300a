"""Resample an image into the common frame, lazily: one task per chunk of the result.

``spatialdata.transform`` and ``rasterize`` are off by up to a pixel, and the former builds one chunk for everything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage as ndi

from spatial_impute._geometry import apply_affine, scaling

if TYPE_CHECKING:
    import dask.array as da
    from numpy.typing import NDArray

    from spatial_impute._image.levels import Level
    from spatial_impute._registration.transform import SectionTransform

_BORDER = 64  # points along an edge: a deformation may bow it
_MAX_PIXELS = 2**36  # of a result: far more than any slide, so that only a nonsensical pixel size is refused


def output_grid(
    shape: tuple[int, int], to_section: NDArray[np.float64], transform: SectionTransform, pixel_size: float
) -> tuple[NDArray[np.float64], tuple[int, int]]:
    """Grid of the common frame that holds all of an image.

    Parameters
    ----------
    shape
        (height, width) of the image in px.
    to_section
        (3, 3) affine of its pixel corners to the section.
    pixel_size
        Pixel size of the grid, um.

    Returns
    -------
    grid
        (3, 3) from pixel corners (x, y) to the common frame; its origin is a multiple of the pixel size, so that grids
        of different sections fit on each other.
    shape
        (height, width) in px.
    """
    border = transform.points(apply_affine(_outline(0, 0, shape[1], shape[0]), to_section))
    extent = np.ptp(border, axis=0)
    if pixel_size > extent.max():
        msg = f"A `pixel_size` of {pixel_size:g} um is larger than the image, {extent[0]:g} x {extent[1]:g} um."
        raise ValueError(msg)
    with np.errstate(over="ignore"):  # of the smallest numbers there are; refused below
        across = extent / pixel_size
        n_pixels = across.prod()
    if not n_pixels <= _MAX_PIXELS:
        msg = f"A `pixel_size` of {pixel_size:g} um makes an image of {across[0]:.3g} x {across[1]:.3g} pixels; choose a larger one."
        raise ValueError(msg)
    low = np.floor(border.min(axis=0) / pixel_size)
    width, height = (np.ceil(border.max(axis=0) / pixel_size) - low).astype(int)
    grid = scaling(pixel_size)
    grid[:2, 2] = low * pixel_size
    return grid, (int(height), int(width))


def resampled(
    level: Level,
    transform: SectionTransform,
    grid: NDArray[np.float64],
    shape: tuple[int, int],
    *,
    nearest: bool,
    fill: float,
    chunk: int,
) -> da.Array:
    """`level` on a grid of the common frame as a lazy array ``(c, y, x)``, or ``(y, x)`` like the level."""
    import dask
    import dask.array as da

    source = da.asarray(level.data.data)
    flat = source.ndim == 2
    source = source[None] if flat else source
    factor = 1 if nearest else max(1, round(np.sqrt(abs(np.linalg.det(grid[:2, :2]))) / level.pixel_size))
    to_section = level.to_um
    if factor > 1:  # no pyramid, or a coarse wish: means of blocks instead of every n-th pixel
        factors = {1: min(factor, source.shape[1]), 2: min(factor, source.shape[2])}
        to_section = to_section @ scaling(factors[2], factors[1])
        source = da.coarsen(np.mean, source, factors, trim_excess=True).astype(np.float32)
    warp = dask.delayed(_warp_block, pure=True)
    shared = dask.delayed(transform, traverse=False)
    rows = []
    for y0 in range(0, shape[0], chunk):
        row = []
        for x0 in range(0, shape[1], chunk):
            size = (min(chunk, shape[0] - y0), min(chunk, shape[1] - x0))
            here = grid @ np.array([[1, 0, x0], [0, 1, y0], [0, 0, 1.0]])
            block_shape = (source.shape[0], *size)
            window = _window(transform, here, size, to_section, source.shape[1:])
            if window is None:
                row.append(da.full(block_shape, fill, dtype=level.data.dtype, chunks=block_shape))
                continue
            ys, xs = window
            local = to_section @ np.array([[1, 0, xs.start], [0, 1, ys.start], [0, 0, 1.0]])
            block = warp(
                source[:, ys, xs],
                shared,
                grid=here,
                size=size,
                to_section=local,
                dtype=level.data.dtype,
                nearest=nearest,
                fill=fill,
            )
            row.append(da.from_delayed(block, block_shape, dtype=level.data.dtype))
        rows.append(row)
    result = da.block(rows)
    return result[0] if flat else result


def _outline(x0: float, y0: float, x1: float, y1: float) -> NDArray[np.float64]:
    """Points along the edges of a box."""
    x, y = np.linspace(x0, x1, _BORDER), np.linspace(y0, y1, _BORDER)
    sides = [(x, np.full(_BORDER, y0)), (x, np.full(_BORDER, y1)), (np.full(_BORDER, x0), y), (np.full(_BORDER, x1), y)]
    return np.column_stack([np.concatenate(axis) for axis in zip(*sides, strict=True)])


def _window(
    transform: SectionTransform,
    grid: NDArray[np.float64],
    size: tuple[int, int],
    to_section: NDArray[np.float64],
    shape: tuple[int, int],
) -> tuple[slice, slice] | None:
    """Rows and columns of the source that a block of the grid needs, or None if it lies outside."""
    border = transform.inverse(apply_affine(_outline(0, 0, size[1], size[0]), grid))
    pixels = apply_affine(border, np.linalg.inv(to_section))
    # A deformation is continuous and invertible, so the outline bounds the block; between its points it may bow.
    slack = 2 + 0.05 * np.ptp(pixels, axis=0).max() * transform.deforms
    low, high = np.floor(pixels.min(axis=0) - slack).astype(int), np.ceil(pixels.max(axis=0) + slack).astype(int)
    (x0, y0), (x1, y1) = np.maximum(low, 0), np.minimum(high, shape[::-1])
    return (slice(y0, y1), slice(x0, x1)) if x0 < x1 and y0 < y1 else None


def _warp_block(
    source: NDArray,
    transform: SectionTransform,
    *,
    grid: NDArray[np.float64],
    size: tuple[int, int],
    to_section: NDArray[np.float64],
    dtype: np.dtype,
    nearest: bool,
    fill: float,
) -> NDArray:
    """One block ``(c, y, x)`` of the result from a window of the source."""
    rows, columns = np.indices(size).reshape(2, -1) + 0.5
    points = transform.inverse(apply_affine(np.column_stack([columns, rows]), grid))
    x, y = apply_affine(points, np.linalg.inv(to_section)).T
    height, width = source.shape[1:]
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    result = np.full((source.shape[0], rows.size), fill, dtype=dtype)
    if nearest:
        result[:, inside] = source[:, y[inside].astype(int), x[inside].astype(int)]
        return result.reshape(-1, *size)
    where = np.stack([y[inside], x[inside]]) - 0.5
    for channel, values in zip(source, result, strict=True):
        # "nearest": the outer half of the rim pixels has no neighbour to interpolate with.
        sampled = ndi.map_coordinates(channel.astype(np.float32, copy=False), where, order=1, mode="nearest")
        values[inside] = np.round(sampled) if np.issubdtype(dtype, np.integer) else sampled
    return result.reshape(-1, *size)
