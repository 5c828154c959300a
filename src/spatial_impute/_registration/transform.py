"""Transforms of sections (a matrix and a displacement field on top of it), and images resampled by them.

Images are lazy, one task per chunk of the result. ``spatialdata.transform`` and ``rasterize`` are off by up to a pixel,
and the first makes one chunk of the whole image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
from scipy import ndimage as ndi

from spatial_impute._geometry import apply_affine, scaling, translation

if TYPE_CHECKING:
    import dask.array as da
    from numpy.typing import ArrayLike, NDArray

    from spatial_impute._image.levels import Level

_BORDER = 64  # points along an edge of an image: a deformation may bend the edge
_WHOLE = 1e-6  # px: an edge that is so near to a pixel border lies on it
_MAX_PIXELS = 2**36  # of a result: far more than any slide, so only an absurd pixel size is refused


class PullBack(Protocol):
    """Deformation, as images are sampled through it."""

    def pulled(self, points: ArrayLike) -> NDArray[np.float64]:
        """Points ``(n, 2)`` of the fixed frame, um, moved to where the aligned image is sampled."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class DisplacementField:
    """Displacements in um on a grid in the frame of the fixed section; 0 outside the grid.

    Pixel ``(row, col)`` is centred at ``origin + (col + 0.5, row + 0.5) * size``.
    """

    pull: NDArray[np.float32]
    """``(y, x, 2)`` as ``(dx, dy)``: from a point of the fixed section to the aligned moving one: for images."""
    push: NDArray[np.float32]
    """``(y, x, 2)``: from a point of the moving section, aligned by the matrix, to the fixed one. For points."""
    origin: tuple[float, float]
    """Corner of the grid, um ``(x, y)``."""
    size: float
    """Micrometres per pixel."""

    def pulled(self, points: ArrayLike) -> NDArray[np.float64]:
        """Points ``(n, 2)`` of the fixed frame, um, moved by :attr:`pull`."""
        points = np.asarray(points, float).reshape(-1, 2)
        col, row = ((points - self.origin) / self.size - 0.5).T
        return points + _sample(self.pull, row, col)

    def jacobian(self) -> NDArray[np.float64]:
        """Local change of area ``(y, x)`` of the pull-back; 0 or below where the map folds."""
        (xx, xy), (yx, yy) = (
            [np.gradient(self.pull[..., k].astype(float), self.size, axis=axis) for axis in (1, 0)] for k in (0, 1)
        )
        return (1 + xx) * (1 + yy) - xy * yx


def _sample(field: NDArray, row: NDArray, column: NDArray) -> NDArray[np.float64]:
    """Displacements ``(n, 2)`` at array positions; 0 outside the grid."""
    where = [row, column]
    return np.column_stack(
        [ndi.map_coordinates(field[..., k], where, order=1, mode="constant", output=float) for k in (0, 1)]
    )


@dataclass(frozen=True, slots=True, eq=False)
class SectionTransform:
    """Map of a section to the common frame and back, in um, for points and for images."""

    matrix: NDArray[np.float64]
    """``(3, 3)``: points of the section to the common frame, before the deformation."""
    pull: NDArray[np.float32] | None = None
    """``(y, x, 2)`` as ``(dx, dy)``: from a point of the common frame to the one before the deformation: for images."""
    push: NDArray[np.float32] | None = None
    """``(y, x, 2)``: from a point placed by the matrix to the deformed one: for points."""
    grid: NDArray[np.float64] | None = None
    """``(3, 3)``: from pixel corners ``(x, y)`` of the displacements to the common frame."""

    @classmethod
    def from_field(
        cls, matrix: NDArray[np.float64], field: DisplacementField | None, to_common: NDArray[np.float64]
    ) -> SectionTransform:
        """Transform from a matrix and a field in the fixed frame; `to_common` ``(3, 3)`` maps that frame to the common one."""
        if field is None:
            return cls(np.asarray(matrix, float))
        grid = to_common @ translation(field.origin) @ scaling(field.size)
        turn = to_common[:2, :2].T.astype(np.float32)
        return cls(np.asarray(matrix, float), field.pull @ turn, field.push @ turn, grid)

    @property
    def deforms(self) -> bool:
        """True if the transform has a deformation."""
        return self.grid is not None

    def points(self, points: ArrayLike) -> NDArray[np.float64]:
        """Points ``(n, 2)`` of the section in the common frame."""
        points = np.asarray(points, float).reshape(-1, 2)
        return self._moved(apply_affine(points, self.matrix), self.push)

    def inverse(self, points: ArrayLike) -> NDArray[np.float64]:
        """Points ``(n, 2)`` of the common frame in the section, where its image is sampled."""
        return apply_affine(self.pulled(points), np.linalg.inv(self.matrix))

    def pulled(self, points: ArrayLike) -> NDArray[np.float64]:
        """Points ``(n, 2)`` of the common frame, before the deformation."""
        return self._moved(np.asarray(points, float).reshape(-1, 2), self.pull)

    def _moved(self, points: NDArray[np.float64], displacement: NDArray | None) -> NDArray[np.float64]:
        if displacement is None:
            return points
        x, y = apply_affine(points, np.linalg.inv(cast("NDArray", self.grid))).T
        return points + _sample(displacement, y - 0.5, x - 0.5)


@dataclass(frozen=True, slots=True, eq=False)
class KeptDeformation:
    """Deformation of a section whose place is given, in another frame than the common one."""

    transform: SectionTransform
    to_common: NDArray[np.float64]
    """``(3, 3)``: from that frame to the common one."""

    def pulled(self, points: ArrayLike) -> NDArray[np.float64]:
        """Points ``(n, 2)`` of that frame, before the deformation."""
        points = apply_affine(np.asarray(points, float).reshape(-1, 2), self.to_common)
        return apply_affine(self.transform.pulled(points), np.linalg.inv(self.to_common))


@dataclass(frozen=True)
class PixelGrid:
    """Grid of pixels in the common frame."""

    matrix: NDArray[np.float64]
    """(3, 3) from pixel corners (x, y) to the common frame."""
    shape: tuple[int, int]
    """(height, width) in px."""

    def block(self, y0: int, x0: int, side: int) -> PixelGrid:
        """The part of at most `side` x `side` pixels that begins at row `y0` and column `x0`."""
        shape = (min(side, self.shape[0] - y0), min(side, self.shape[1] - x0))
        return PixelGrid(self.matrix @ translation((x0, y0)), shape)


def output_grid(
    shape: tuple[int, int], to_section: NDArray[np.float64], transform: SectionTransform, pixel_size: float
) -> PixelGrid:
    """Grid of the common frame that holds a whole image of `shape` px; `to_section` maps its pixel corners to um.

    The origin is a multiple of the pixel size, so the grids of different sections fit on each other.
    """
    border = transform.points(apply_affine(_outline(shape), to_section))
    extent = np.ptp(border, axis=0)
    if pixel_size > extent.max():
        msg = (
            f"A `pixel_size` of {pixel_size:g} um is larger than the image, {extent[0]:g} x {extent[1]:g} um; choose a "
            "smaller one."
        )
        raise ValueError(msg)
    with np.errstate(over="ignore"):  # of the smallest floats; refused below
        across = extent / pixel_size
        n_pixels = across.prod()
    if not n_pixels <= _MAX_PIXELS:
        msg = (
            f"A `pixel_size` of {pixel_size:g} um makes an image of {across[0]:.3g} x {across[1]:.3g} pixels; choose a "
            "larger one."
        )
        raise ValueError(msg)
    low = np.floor(border.min(axis=0) / pixel_size + _WHOLE)
    width, height = (np.ceil(border.max(axis=0) / pixel_size - _WHOLE) - low).astype(int)
    return PixelGrid(translation(low * pixel_size) @ scaling(pixel_size), (int(height), int(width)))


def resampled(
    level: Level, transform: SectionTransform, grid: PixelGrid, *, nearest: bool, fill: float, chunk: int
) -> da.Array:
    """Image `level` on `grid` as a lazy array, (c, y, x) or (y, x) like the level; `fill` outside the image.

    With `nearest` (labels) a pixel has the value of the nearest one, else pixels are interpolated.
    """
    import dask
    import dask.array as da

    source = da.asarray(level.data.data)
    flat = source.ndim == 2
    source = source[None] if flat else source
    factor = 1 if nearest else max(1, round(np.sqrt(abs(np.linalg.det(grid.matrix[:2, :2]))) / level.pixel_size))
    to_section = level.to_um
    if factor > 1:  # the grid is coarser than every level: means of blocks instead of every n-th pixel
        factors = {1: min(factor, source.shape[1]), 2: min(factor, source.shape[2])}
        to_section = to_section @ scaling(factors[2], factors[1])
        source = da.coarsen(np.mean, source, factors, trim_excess=True).astype(np.float32)
    warp = dask.delayed(_warp_block, pure=True)
    shared = dask.delayed(transform, traverse=False)
    blank = np.full((), fill, level.data.dtype)

    def block(y0: int, x0: int) -> da.Array:
        part = grid.block(y0, x0, chunk)
        shape = (source.shape[0], *part.shape)
        window = _window(transform, part, to_section, source.shape[1:])
        if window is None:
            return da.full(shape, fill, dtype=blank.dtype, chunks=shape)
        ys, xs = window
        of_window = to_section @ translation((xs.start, ys.start))
        pixels = warp(source[:, ys, xs], shared, part, of_window, blank, nearest=nearest)
        return da.from_delayed(pixels, shape, dtype=blank.dtype)

    height, width = grid.shape
    result = da.block([[block(y0, x0) for x0 in range(0, width, chunk)] for y0 in range(0, height, chunk)])
    return result[0] if flat else result


def _outline(shape: tuple[int, int]) -> NDArray[np.float64]:
    """Points (x, y) along the four edges of an image, px."""
    x, y = (np.linspace(0, length, _BORDER) for length in shape[::-1])
    zero = np.zeros(_BORDER)
    sides = [(x, zero), (x, zero + shape[0]), (zero, y), (zero + shape[1], y)]
    return np.column_stack([np.concatenate(axis) for axis in zip(*sides, strict=True)])


def _window(
    transform: SectionTransform, grid: PixelGrid, to_section: NDArray[np.float64], shape: tuple[int, ...]
) -> tuple[slice, slice] | None:
    """Rows and columns of the source that a block of the grid needs; None if the block lies outside."""
    border = transform.inverse(apply_affine(_outline(grid.shape), grid.matrix))
    pixels = apply_affine(border, np.linalg.inv(to_section))
    # A deformation is continuous and invertible, so the outline bounds the block; between its points it may bend.
    slack = 2 + 0.05 * np.ptp(pixels, axis=0).max() * transform.deforms
    low, high = np.floor(pixels.min(axis=0) - slack).astype(int), np.ceil(pixels.max(axis=0) + slack).astype(int)
    (x0, y0), (x1, y1) = np.maximum(low, 0), np.minimum(high, shape[::-1])
    return (slice(y0, y1), slice(x0, x1)) if x0 < x1 and y0 < y1 else None


def _warp_block(
    source: NDArray,
    transform: SectionTransform,
    grid: PixelGrid,
    to_section: NDArray[np.float64],
    blank: NDArray,
    *,
    nearest: bool,
) -> NDArray:
    """One block (c, y, x) of the result from a window of the source; `blank` () is the value outside, in its type."""
    rows, columns = np.indices(grid.shape).reshape(2, -1) + 0.5
    points = transform.inverse(apply_affine(np.column_stack([columns, rows]), grid.matrix))
    x, y = apply_affine(points, np.linalg.inv(to_section)).T
    height, width = source.shape[1:]
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    result = np.full((source.shape[0], rows.size), blank)
    if nearest:
        result[:, inside] = source[:, y[inside].astype(int), x[inside].astype(int)]
        return result.reshape(-1, *grid.shape)
    where = np.stack([y[inside], x[inside]]) - 0.5
    for channel, values in zip(source, result, strict=True):
        # "nearest": the outer half of the rim pixels has no neighbor to interpolate with.
        sampled = ndi.map_coordinates(channel.astype(np.float32, copy=False), where, order=1, mode="nearest")
        values[inside] = np.round(sampled) if np.issubdtype(blank.dtype, np.integer) else sampled
    return result.reshape(-1, *grid.shape)
