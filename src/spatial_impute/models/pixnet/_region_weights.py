"""Weights of decoder cells in regions: exact sums over the pixels of discs and polygons.

The dense map is the grid of the decoder, resized bilinearly to pixels. Resize and sum over pixels are linear, so the sum
over a region is a weighted sum of cells, and the map itself is never computed. Coordinates are pixels from the corner of
the image; the centre of pixel i lies at i + 0.5. A pixel belongs to a region if its centre does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import shapely

from spatial_impute._geometry import apply_affine, linear_scale
from spatial_impute._settings import compiled

if TYPE_CHECKING:
    from collections.abc import Callable

    from spatial_impute.encoders._pyramids import Box

_TINY = 2.0  # px; a larger region contains a pixel centre
_BATCH = 50_000  # polygons split into edges at a time


@dataclass(frozen=True)
class Stencil:
    """Weights of decoder cells per region, as arguments of ``embedding_bag``."""

    cells: np.ndarray  # (nnz,) int64 cells of the tile, row by row
    weights: np.ndarray  # (nnz,) float64; they sum to `n_pixels` within a region
    start: np.ndarray  # (n_regions + 1,) int64 first entry of each region
    n_pixels: np.ndarray
    """(n_regions,) float64 pixels of the region in the box; its area if it contains no pixel centre."""


class CellGrid(NamedTuple):
    """Available decoder cells: a window of the grid of the whole image."""

    stride: int  # Edge of a cell in px
    n_y: int
    n_x: int  # Cells of the whole image
    y0: int
    x0: int  # First cell of the window
    rows: int
    columns: int  # Cells of the window

    @classmethod
    def whole(cls, stride: int, n_y: int, n_x: int) -> CellGrid:
        """All cells of an image."""
        return cls(stride, n_y, n_x, 0, 0, n_y, n_x)


class Discs:
    """Discs by centre (n, 2) x, y and radius (n,) in px."""

    def __init__(self, centers: np.ndarray, radius: np.ndarray) -> None:
        self.centers = np.ascontiguousarray(centers, dtype=np.float64).reshape(-1, 2)
        self.radius = np.ascontiguousarray(radius, dtype=np.float64)
        self.area = np.pi * self.radius**2

    def __len__(self) -> int:
        return len(self.radius)

    @property
    def bounds(self) -> np.ndarray:
        """(n, 4) lowest x, y and highest x, y."""
        r = self.radius[:, None]
        return np.hstack([self.centers - r, self.centers + r])

    def take(self, index: np.ndarray) -> Discs:
        return Discs(self.centers[index], self.radius[index])

    def moved(self, matrix: np.ndarray) -> Discs:
        return Discs(apply_affine(self.centers, matrix), self.radius * linear_scale(matrix))

    def runs(self, box: Box) -> tuple[np.ndarray, np.ndarray]:
        return _collect_runs(_disc_runs, self.centers, self.radius, box)


class Polygons:
    """Polygons as closed rings of edges in px, with the even-odd rule; they may have holes and several parts.

    `edges` (m, 4) are x, y of both ends of all edges in the order of the polygons, `start` (n + 1,) the first edge of each
    polygon, `centers` (n, 2) their centroids, and `area` (n,) is in px^2.
    """

    def __init__(self, edges: np.ndarray, start: np.ndarray, centers: np.ndarray, area: np.ndarray) -> None:
        self.edges = np.ascontiguousarray(edges, dtype=np.float64).reshape(-1, 4)
        self.start = np.asarray(start, dtype=np.int64)
        self.centers = np.asarray(centers, dtype=np.float64).reshape(-1, 2)
        self.area = np.asarray(area, dtype=np.float64)

    @classmethod
    def from_shapely(cls, geometries: np.ndarray) -> Polygons:
        geometries = np.asarray(geometries, dtype=object)
        # Parts and rings are objects, each larger than its coordinates. For millions of them, some are made at a time.
        parts = [cls._from_some(geometries[i : i + _BATCH]) for i in range(0, max(len(geometries), 1), _BATCH)]
        first = np.cumsum([0, *(len(p.edges) for p in parts)])
        start = [p.start[:-1] + n for p, n in zip(parts, first, strict=False)]
        return cls(
            np.concatenate([p.edges for p in parts]),
            np.concatenate([*start, first[-1:]]),
            np.concatenate([p.centers for p in parts]),
            np.concatenate([p.area for p in parts]),
        )

    @classmethod
    def _from_some(cls, geometries: np.ndarray) -> Polygons:
        parts, of_polygon = shapely.get_parts(geometries, return_index=True)
        rings, of_part = shapely.get_rings(parts, return_index=True)
        points, of_ring = shapely.get_coordinates(rings, return_index=True)
        joined = of_ring[1:] == of_ring[:-1]  # the last point of a ring repeats its first
        edges = np.hstack([points[:-1], points[1:]])[joined]
        owner = of_polygon[of_part[of_ring[:-1][joined]]]
        start = np.searchsorted(owner, np.arange(len(geometries) + 1))
        centroid = shapely.get_coordinates(shapely.centroid(geometries))
        return cls(edges, start, centroid, shapely.area(geometries))

    def __len__(self) -> int:
        return len(self.start) - 1

    @property
    def bounds(self) -> np.ndarray:
        """(n, 4) lowest x, y and highest x, y."""
        if not len(self):
            return np.zeros((0, 4))
        first = self.start[:-1]  # rings are closed, so the first points of the edges are all corners
        return np.hstack([np.minimum.reduceat(self.edges[:, :2], first), np.maximum.reduceat(self.edges[:, :2], first)])

    def take(self, index: np.ndarray) -> Polygons:
        index = np.asarray(index)
        index = np.flatnonzero(index) if index.dtype == bool else index
        length = (self.start[1:] - self.start[:-1])[index]
        start = np.concatenate([[0], np.cumsum(length)])
        rows = np.repeat(self.start[:-1][index] - start[:-1], length) + np.arange(start[-1])
        return Polygons(self.edges[rows], start, self.centers[index], self.area[index])

    def moved(self, matrix: np.ndarray) -> Polygons:
        edges = np.hstack([apply_affine(self.edges[:, :2], matrix), apply_affine(self.edges[:, 2:], matrix)])
        area = self.area * abs(np.linalg.det(matrix[:2, :2]))
        return Polygons(edges, self.start, apply_affine(self.centers, matrix), area)

    def runs(self, box: Box) -> tuple[np.ndarray, np.ndarray]:
        return _collect_runs(_polygon_runs, self.edges, self.start, box)


Regions = Discs | Polygons


def build_stencil(regions: Regions, core: Box, grid: CellGrid, image: Box) -> Stencil:
    """Weights of the cells for the pixels of the regions that lie in `core`.

    For cores that partition the image, the sums add up to those over the image. A region that contains no pixel centre
    is sampled at its own centre, by the core that contains it, and has its area as weight. The window of `grid` must reach
    one cell beyond the core, or to the end of the grid.
    """
    stencil = Stencil(*_sum_weights(*regions.runs(core), tuple(grid)))
    x, y = regions.centers.T
    inside = (x >= core.x0) & (x < core.x1) & (y >= core.y0) & (y < core.y1)
    lonely = (stencil.n_pixels == 0) & inside & _tiny(regions, image)
    return _sample_centers(stencil, regions, lonely, grid) if lonely.any() else stencil


def _tiny(regions: Regions, image: Box) -> np.ndarray:
    """Regions without a pixel centre anywhere in the image."""
    bounds = regions.bounds
    small = ((bounds[:, 2:] - bounds[:, :2]) < _TINY).all(axis=1)
    if small.any():
        which = np.flatnonzero(small)
        small[which] = np.diff(regions.take(which).runs(image)[0]) == 0
    return small


def _sample_centers(stencil: Stencil, regions: Regions, which: np.ndarray, grid: CellGrid) -> Stencil:
    """Add the bilinear weights of the centres of some regions, which have no entries yet."""
    x0, x1, fx = _neighbors(regions.centers[which, 0], grid.stride, grid.n_x)
    y0, y1, fy = _neighbors(regions.centers[which, 1], grid.stride, grid.n_y)
    area = regions.area[which]
    cells = np.stack([(y - grid.y0) * grid.columns + x - grid.x0 for y in (y0, y1) for x in (x0, x1)], axis=1)
    weights = np.stack([wy * wx * area for wy in (1 - fy, fy) for wx in (1 - fx, fx)], axis=1)
    length = np.diff(stencil.start)
    place = np.repeat(stencil.start[:-1][which], 4)
    length[which] = 4
    n_pixels = stencil.n_pixels.copy()
    n_pixels[which] = area
    return Stencil(
        np.insert(stencil.cells, place, cells.ravel()),
        np.insert(stencil.weights, place, weights.ravel()),
        np.concatenate([[0], np.cumsum(length)]),
        n_pixels,
    )


def _neighbors(where: np.ndarray, stride: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cells before and after positions (px), and the weight of the latter."""
    u = np.clip(where / stride - 0.5, 0.0, n - 1.0)
    left = np.floor(u).astype(np.int64)
    return left, np.minimum(left + 1, n - 1), u - left


def _collect_runs(
    find: Callable[..., np.ndarray], geometry: np.ndarray, sizes: np.ndarray, box: Box
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of the regions in a box: the first run of each region, (n_regions + 1,), and y, x0, x1 of the runs, (n_runs, 3).

    A run is the pixels [x0, x1) of row y. The first pass counts the runs, the second one writes them.
    """
    limits = tuple(box)
    count = find(geometry, sizes, limits, np.empty((0, 3), np.int64))
    start = np.concatenate([[0], np.cumsum(count)])
    pixels = np.empty((start[-1], 3), np.int64)
    find(geometry, sizes, limits, pixels)
    return start, pixels


@compiled()
def _disc_runs(centers, radius, limits, runs):
    """Write the runs of each disc, up to the size of `runs`; return their number per disc."""
    y0, y1, x0, x1 = limits
    count = np.zeros(len(radius), np.int64)
    n = 0
    for i in range(len(radius)):
        cx, cy, r = centers[i, 0], centers[i, 1], radius[i]
        for y in range(max(y0, int(np.floor(cy - r - 0.5))), min(y1, int(np.ceil(cy + r - 0.5)) + 1)):
            left, right = _chord(cx, cy, r, y)
            n = _add_run(runs, n, y, max(left, x0), min(right, x1))
        count[i] = n
    count[1:] -= count[:-1].copy()
    return count


@compiled()
def _polygon_runs(edges, start, limits, runs):
    """Write the runs of each polygon, up to the size of `runs`; return their number per polygon."""
    y0, y1, x0, x1 = limits
    count = np.zeros(len(start) - 1, np.int64)
    found = np.empty(max(1, len(edges)))
    n = 0
    for i in range(len(start) - 1):
        top, bottom = _rows_of(edges, start[i], start[i + 1], y0, y1)
        for y in range(top, bottom):
            m = _crossings(edges, start[i], start[i + 1], y, found)
            for k in range(0, m - 1, 2):
                left, right = int(np.ceil(found[k] - 0.5)), int(np.ceil(found[k + 1] - 0.5))
                n = _add_run(runs, n, y, max(x0, left), min(x1, right))
        count[i] = n
    count[1:] -= count[:-1].copy()
    return count


@compiled()
def _add_run(runs, n, y, left, right):
    """Write run number `n`, unless it is empty or there is no room; return the number of runs."""
    if right <= left:
        return n
    if n < len(runs):
        runs[n, 0], runs[n, 1], runs[n, 2] = y, left, right
    return n + 1


@compiled()
def _chord(cx, cy, r, y):
    """Pixels [left, right) of row y with their centre in the disc, by an exact test instead of a rounded root."""
    dy = (y + 0.5) - cy
    rest = r * r - dy * dy
    half = np.sqrt(rest) if rest > 0 else 0.0
    left = int(np.ceil(cx - half - 0.5)) - 1
    right = int(np.floor(cx + half - 0.5)) + 2
    while left < right and (left + 0.5 - cx) ** 2 + dy * dy > r * r:
        left += 1
    while right > left and (right - 0.5 - cx) ** 2 + dy * dy > r * r:
        right -= 1
    return left, right


@compiled()
def _crossings(edges, first, last, y, found):
    """Write the sorted x at which edges cross the centres of row y; return their number.

    Ends of edges are ordered, so that neighboring polygons get equal values.
    """
    n = 0
    level = y + 0.5
    for e in range(first, last):
        xa, ya, xb, yb = edges[e, 0], edges[e, 1], edges[e, 2], edges[e, 3]
        if ya > yb or (ya == yb and xa > xb):
            xa, ya, xb, yb = xb, yb, xa, ya
        if ya <= level < yb:
            x = xa + (level - ya) / (yb - ya) * (xb - xa)
            k = n
            while k > 0 and found[k - 1] > x:
                found[k] = found[k - 1]
                k -= 1
            found[k] = x
            n += 1
    return n


@compiled()
def _rows_of(edges, first, last, y0, y1):
    low, high = np.inf, -np.inf
    for e in range(first, last):
        low = min(low, edges[e, 1], edges[e, 3])
        high = max(high, edges[e, 1], edges[e, 3])
    if low > high:
        return y0, y0
    return max(y0, int(np.floor(low)) - 1), min(y1, int(np.ceil(high)) + 1)


@compiled()
def _sum_weights(start, runs, grid):
    """Bilinear weights of all pixels of each region, summed per cell."""
    stride, n_y, n_x, grid_y, grid_x, rows, columns = grid
    windows = _cell_windows(start, runs, stride, n_y, n_x)
    largest, total = 0, 0
    for i in range(len(windows)):
        size = windows[i, 2] * windows[i, 3]
        largest, total = max(largest, size), total + size
    cells, weights = np.empty(total, np.int64), np.empty(total)
    first, n_pixels = np.zeros(len(start), np.int64), np.zeros(len(start) - 1)
    dense, across = np.zeros(largest), np.zeros(n_x + 1)
    n = 0
    for i in range(len(windows)):
        top, left, n_rows, n_columns = windows[i, 0], windows[i, 1], windows[i, 2], windows[i, 3]
        dense[: n_rows * n_columns] = 0.0
        for k in range(start[i], start[i + 1]):
            y, x0, x1 = runs[k, 0], runs[k, 1], runs[k, 2]
            _add_row_weights(dense, across, y, x0, x1, top, left, n_columns, stride, n_y, n_x)
            n_pixels[i] += x1 - x0
        for r in range(n_rows):
            for c in range(n_columns):
                weight = dense[r * n_columns + c]
                if weight != 0.0:
                    y, x = top + r - grid_y, left + c - grid_x
                    if y < 0 or y >= rows or x < 0 or x >= columns:
                        raise IndexError("A pixel reads a cell outside the window.")  # noqa: EM101
                    cells[n], weights[n] = y * columns + x, weight
                    n += 1
        first[i + 1] = n
    return cells[:n].copy(), weights[:n].copy(), first, n_pixels


@compiled()
def _cell_windows(start, runs, stride, n_y, n_x):
    """(n_regions, 4) cells that the pixels of each region read: first row, first column, rows and columns."""
    windows = np.zeros((len(start) - 1, 4), np.int64)
    for i in range(len(windows)):
        if start[i] == start[i + 1]:
            continue
        k = start[i]
        top, bottom, west, east = runs[k, 0], runs[k, 0], runs[k, 1], runs[k, 2] - 1
        for k in range(start[i], start[i + 1]):
            top, bottom = min(top, runs[k, 0]), max(bottom, runs[k, 0])
            west, east = min(west, runs[k, 1]), max(east, runs[k, 2] - 1)
        windows[i, 0], windows[i, 1] = _left_cell(top, stride), _left_cell(west, stride)
        windows[i, 2] = min(_left_cell(bottom, stride) + 1, n_y - 1) - windows[i, 0] + 1
        windows[i, 3] = min(_left_cell(east, stride) + 1, n_x - 1) - windows[i, 1] + 1
    return windows


@compiled()
def _add_row_weights(dense, across, y, x0, x1, top, left, n_columns, stride, n_y, n_x):  # noqa: PLR0917
    """Add the weights of the pixels [x0, x1) of row y to the cells of a window. Scalars: slices cost half the time."""
    across[:n_columns] = 0.0
    for x in range(x0, x1):
        cell, fraction = _cell_and_fraction(x, stride, n_x)
        across[cell - left] += 1.0 - fraction
        if fraction > 0:
            across[cell - left + 1] += fraction
    cell, fraction = _cell_and_fraction(y, stride, n_y)
    row = (cell - top) * n_columns
    for c in range(n_columns):
        dense[row + c] += (1.0 - fraction) * across[c]
    if fraction > 0:
        for c in range(n_columns):
            dense[row + n_columns + c] += fraction * across[c]


@compiled()
def _left_cell(p, stride):
    return max(0, int(np.floor((p + 0.5) / stride - 0.5)))


@compiled()
def _cell_and_fraction(p, stride, n):
    u = min(max((p + 0.5) / stride - 0.5, 0.0), n - 1.0)
    cell = int(np.floor(u))
    return cell, u - cell
