"""Read windows of pyramid images in micrometres, one tile at a time.

Pixel convention: the centre of pixel i lies at i + 0.5, so coordinates are measured from the image corner.
``spatialdata.rasterize`` and ``transform`` are off by up to a pixel here, so windows are computed directly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from spatial_impute._geometry import apply_affine, linear_scale, scaling

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xarray import DataArray, DataTree

_TILE = 2048  # px; a tile of three such channels is 12 MiB, larger than the usual chunk


@dataclass(frozen=True)
class Level:
    """One resolution of an image: lazy (c, y, x) data and its map from pixels to micrometres."""

    data: DataArray
    to_um: np.ndarray
    """(3, 3) affine from pixel corners (x, y) to the section frame (um)."""
    white: float = 255.0
    """Value of full brightness."""

    @property
    def pixel_size(self) -> float:
        """Mean edge length of a pixel in um."""
        return linear_scale(self.to_um)

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) in px."""
        return self.data.sizes["y"], self.data.sizes["x"]


def image_levels(element: DataArray | DataTree, to_um: np.ndarray) -> list[Level]:
    """Resolutions of an image element, finest first.

    Parameters
    ----------
    element
        Single-scale or multi-scale image of spatialdata.
    to_um
        (3, 3) affine from pixel corners of the finest level to the section frame.
    """
    if not hasattr(element, "children"):
        return [Level(element, to_um, _white(element))]
    arrays = [next(iter(child.ds.data_vars.values())) for child in element.children.values()]
    height, width = arrays[0].sizes["y"], arrays[0].sizes["x"]
    levels = []
    white = _white(arrays[-1])
    for array in arrays:
        # Pyramids halve and trim odd sizes, so that the quotient of the sizes is slightly off the true factor.
        factor_x, factor_y = width / array.sizes["x"], height / array.sizes["y"]
        if round(factor_x) == round(factor_y) and abs(factor_x - round(factor_x)) * array.sizes["x"] <= round(factor_x):
            factor_x = factor_y = float(round(factor_x))
        levels.append(Level(array, to_um @ scaling(factor_x, factor_y), white))
    return levels


def _white(array: DataArray) -> float:
    """Value of full brightness: that of the type for integers; floats come in 0-1 or in 0-255."""
    if np.issubdtype(array.dtype, np.integer):
        return float(np.iinfo(array.dtype).max)
    # Decided once for the whole image, on a sample of its pixels: a single window may be dark.
    step = max(1, max(array.sizes["y"], array.sizes["x"]) // 256)
    sample = array.isel(y=slice(None, None, step), x=slice(None, None, step)).data
    sample = np.asarray(sample.compute(scheduler="synchronous") if hasattr(sample, "compute") else sample)
    return 1.0 if np.nanmax(sample, initial=0.0) <= 1.0 else 255.0


def best_level(levels: list[Level], pixel_size: float) -> Level:
    """Coarsest level that is at least as fine as `pixel_size` (um), else the finest there is."""
    fine_enough = [level for level in levels if level.pixel_size <= pixel_size * (1 + 1e-6)]
    return fine_enough[-1] if fine_enough else levels[0]


def to_rgb(array: np.ndarray, white: float) -> np.ndarray:
    """Bring (c, y, x) to (y, x, 3) float32 in 0-255: grey is repeated, alpha is dropped, `white` becomes 255.

    Raises
    ------
    ValueError
        If there are 2 or more than 4 channels: such an image is no H&E scan.
    """
    channels = array.shape[0]
    if channels not in (1, 3, 4):
        msg = f"An H&E image has 1, 3 or 4 channels, found {channels}. Select three channels before assembling."
        raise ValueError(msg)
    rgb = np.repeat(array, 3, axis=0) if channels == 1 else array[:3]
    rgb = np.moveaxis(rgb, 0, -1).astype(np.float32)
    return rgb if white == 255.0 else rgb * np.float32(255.0 / white)


def read_window(level: Level, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
    """Pixels [y0, y1) x [x0, x1) of a level as (y, x, 3) float32 in 0-255."""
    window = level.data.isel(y=slice(y0, y1), x=slice(x0, x1)).data
    if hasattr(window, "compute"):
        # Threads inside DataLoader or distributed workers can deadlock; one window is too small to gain from them.
        window = window.compute(scheduler="synchronous")
    return to_rgb(np.asarray(window), level.white)


def read_thumbnail(levels: list[Level], pixel_size: float) -> tuple[np.ndarray, np.ndarray]:
    """Whole image at a working resolution, read strip by strip from the coarsest level that is fine enough.

    Parameters
    ----------
    levels
        Resolutions of one image.
    pixel_size
        Wanted edge length of a pixel in um.

    Returns
    -------
    rgb
        (y, x, 3) float32 in 0-255, area means of the level's pixels.
    to_um
        (3, 3) affine from its pixel corners to the section frame.
    """
    level = best_level(levels, pixel_size)
    height, width = level.shape
    factor = max(1, min(int(pixel_size / level.pixel_size + 1e-6), height, width))
    rows, columns = height // factor, width // factor
    chunk_rows = level.data.data.chunks[1][0] if hasattr(level.data.data, "chunks") else height
    strip = max(factor, max(chunk_rows, _TILE) // factor * factor)
    strips = []
    for y0 in range(0, rows * factor, strip):
        y1 = min(y0 + strip, rows * factor)
        rgb = read_window(level, y0, y1, 0, columns * factor)
        if factor > 1:
            rgb = rgb.reshape(rgb.shape[0] // factor, factor, columns, factor, 3).mean(axis=(1, 3))
        strips.append(rgb)
    return np.concatenate(strips), level.to_um @ scaling(float(factor))


def iter_patches(
    levels: list[Level], centers: np.ndarray, side: float, n_px: int, *, batch_size: int = 128
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Square patches around points, resampled to a fixed number of pixels.

    Patches are read tile by tile: neighbouring ones share one read, and memory is bounded by a tile with its halo and
    a batch of patches.

    Parameters
    ----------
    levels
        Resolutions of one image.
    centers
        (n, 2) x, y in um in the section frame.
    side
        Edge length of a patch in um; its edges are parallel to the axes of the section frame.
    n_px
        Pixels along an edge of the result.
    batch_size
        Patches made at a time.

    Yields
    ------
    index
        Rows of `centers` in this batch.
    patches
        (len(index), n_px, n_px, 3) float32 in 0-255, bilinear at the pixel centres; the rim is repeated beyond
        the image.
    """
    level = best_level(levels, side / n_px)
    from_um = np.linalg.inv(level.to_um)
    height, width = level.shape
    chunks = level.data.data.chunks[1:] if hasattr(level.data.data, "chunks") else ((height,), (width,))
    tile_y, tile_x = max(_TILE, chunks[0][0]), max(_TILE, chunks[1][0])
    offsets_1d = (np.arange(n_px) + 0.5) / n_px * side - side / 2
    offsets = np.stack(np.meshgrid(offsets_1d, offsets_1d), axis=-1).reshape(-1, 2)
    centers_px = apply_affine(centers, from_um)
    tile = (centers_px[:, 1] // tile_y).astype(int) * (width // tile_x + 2) + (centers_px[:, 0] // tile_x).astype(int)
    for which in np.unique(tile):
        index = np.flatnonzero(tile == which)
        corners = centers[index][:, None, :] + offsets[[0, n_px - 1, -n_px, -1]]
        extent = np.clip(apply_affine(corners.reshape(-1, 2), from_um) - 0.5, 0, [width - 1, height - 1])
        x0, y0 = np.floor(extent.min(axis=0)).astype(int)
        x1, y1 = np.minimum(np.floor(extent.max(axis=0)).astype(int) + 2, [width, height])
        window = read_window(level, y0, y1, x0, x1)
        for start in range(0, len(index), batch_size):
            rows = index[start : start + batch_size]
            where = centers[rows][:, None, :] + offsets  # (n, n_px ** 2, 2)
            pixels = apply_affine(where.reshape(-1, 2), from_um) - 0.5  # to pixel indices
            pixels = np.clip(pixels, 0, [width - 1, height - 1]) - [x0, y0]
            yield rows, _bilinear(window, pixels).reshape(len(rows), n_px, n_px, 3)


def _bilinear(image: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Sample (y, x, 3) at (n, 2) pixel indices x, y."""
    height, width = image.shape[:2]
    x, y = where[:, 0], where[:, 1]
    left = np.minimum(x.astype(np.intp), width - 1)
    top = np.minimum(y.astype(np.intp), height - 1)
    right, bottom = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    fx = (x - left).astype(np.float32)[:, None]
    fy = (y - top).astype(np.float32)[:, None]
    above = image[top, left] * (1 - fx) + image[top, right] * fx
    below = image[bottom, left] * (1 - fx) + image[bottom, right] * fx
    return above * (1 - fy) + below * fy
