"""Which decoder cells a region reads, and how much of each: exact sums over the pixels of discs and polygons.

The dense map is the decoder's grid resized bilinearly to pixels. Resize and sum over pixels are linear, so that the sum
over a region is a weighted sum of cells; the map itself is never built. Geometry is in working pixels measured from the
image corner, the centre of pixel i lies at i + 0.5, and a pixel belongs to a region if its centre does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

_TINY = 2.0  # px; a larger region cannot miss all pixel centres
_BATCH = 50_000  # polygons taken apart at a time


@dataclass(frozen=True)
class Runs:
    """Pixels of regions as horizontal runs [x0, x1) of row y, in the order of the regions."""

    start: np.ndarray
    """(n_regions + 1,) first run of each region."""
    y: np.ndarray
    x0: np.ndarray
    x1: np.ndarray


@dataclass(frozen=True)
class Stencil:
    """Weights of decoder cells per region; what ``embedding_bag`` takes."""

    cells: np.ndarray
    """(nnz,) int64 cells of the tile, row by row."""
    weights: np.ndarray
    """(nnz,) float64; they sum to `n_pixels` within a region."""
    start: np.ndarray
    """(n_regions + 1,) int64 first entry of each region."""
    n_pixels: np.ndarray
    """(n_regions,) float64 pixels of the region in the box; its area if it is too small to hold a pixel centre."""


@dataclass(frozen=True)
class Box:
    """Pixels [y0, y1) x [x0, x1)."""

    y0: int
    y1: int
    x0: int
    x1: int


@dataclass(frozen=True)
class CellGrid:
    """Decoder cells at hand: a window of the grid of the whole image."""

    stride: int
    """Edge of a cell in px."""
    n_y: int
    n_x: int
    """Cells of the whole image."""
    y0: int = 0
    x0: int = 0
    """First cell of the window."""
    window_y: int | None = None
    window_x: int | None = None
    """Cells of the window; all by default."""

    @property
    def window(self) -> tuple[int, int]:
        """Rows and columns of the window."""
        return (
            self.n_y if self.window_y is None else self.window_y,
            self.n_x if self.window_x is None else self.window_x,
        )


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
        """Some of them."""
        return Discs(self.centers[index], self.radius[index])

    def moved(self, matrix: np.ndarray) -> Discs:
        """Discs after a similarity (3, 3)."""
        scale = np.sqrt(abs(np.linalg.det(matrix[:2, :2])))
        return Discs(self.centers @ matrix[:2, :2].T + matrix[:2, 2], self.radius * scale)

    def runs(self, box: Box) -> Runs:
        """Pixels within a box."""
        arguments = (self.centers, self.radius, box.y0, box.y1, box.x0, box.x1)
        count = _count_disc_rows(*arguments)
        start = np.concatenate([[0], np.cumsum(count)])
        return Runs(start, *_disc_runs(*arguments, start))


class Polygons:
    """Polygons, holes and several parts allowed, as closed rings of edges in px; even-odd rule.

    Parameters
    ----------
    edges
        (m, 4) x, y of the ends of all edges, in the order of the polygons.
    start
        (n + 1,) first edge of each polygon.
    centers
        (n, 2) a point of each polygon, its centroid.
    area
        (n,) px^2.
    """

    def __init__(self, edges: np.ndarray, start: np.ndarray, centers: np.ndarray, area: np.ndarray) -> None:
        self.edges = np.ascontiguousarray(edges, dtype=np.float64).reshape(-1, 4)
        self.start = np.asarray(start, dtype=np.int64)
        self.centers = np.asarray(centers, dtype=np.float64).reshape(-1, 2)
        self.area = np.asarray(area, dtype=np.float64)

    @classmethod
    def from_shapely(cls, geometries: np.ndarray) -> Polygons:
        """From polygons and multi-polygons."""
        geometries = np.asarray(geometries, dtype=object)
        # Parts and rings are objects, each larger than its coordinates: of millions only some are made at a time.
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
        import shapely

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
        first = self.start[:-1]  # each edge begins where another one ends: the first points are all corners
        return np.hstack([np.minimum.reduceat(self.edges[:, :2], first), np.maximum.reduceat(self.edges[:, :2], first)])

    def take(self, index: np.ndarray) -> Polygons:
        """Some of them."""
        index = np.asarray(index)
        index = np.flatnonzero(index) if index.dtype == bool else index
        length = (self.start[1:] - self.start[:-1])[index]
        start = np.concatenate([[0], np.cumsum(length)])
        rows = np.repeat(self.start[:-1][index] - start[:-1], length) + np.arange(start[-1])
        return Polygons(self.edges[rows], start, self.centers[index], self.area[index])

    def moved(self, matrix: np.ndarray) -> Polygons:
        """Polygons after an affine map (3, 3)."""
        linear, offset = matrix[:2, :2].T, matrix[:2, 2]
        edges = np.hstack([self.edges[:, :2] @ linear + offset, self.edges[:, 2:] @ linear + offset])
        area = self.area * abs(np.linalg.det(matrix[:2, :2]))
        return Polygons(edges, self.start, self.centers @ linear + offset, area)

    def runs(self, box: Box) -> Runs:
        """Pixels within a box."""
        arguments = (self.edges, self.start, box.y0, box.y1, box.x0, box.x1)
        count = _count_polygon_runs(*arguments)
        start = np.concatenate([[0], np.cumsum(count)])
        return Runs(start, *_polygon_runs(*arguments, start))


Regions = Discs | Polygons


def build_stencil(regions: Regions, core: Box, grid: CellGrid, image: Box) -> Stencil:
    """Weights of the cells for those pixels of the regions that lie in `core`.

    Cores that partition the image give sums that add up to those over the image. A region too small to hold a pixel
    centre is sampled at its centre by the core that holds it, and weighs its area.

    Parameters
    ----------
    regions
        Discs or polygons.
    core
        Pixels to sum over. The window of cells must reach one cell beyond it, or to the end of the grid.
    grid
        The cells at hand.
    image
        Pixels of the image.
    """
    runs = regions.runs(core)
    rows, columns = grid.window
    cells, weights, start, n_pixels = _stencil(
        runs.start, runs.y, runs.x0, runs.x1, grid.stride, grid.n_y, grid.n_x, grid.y0, grid.x0, rows, columns
    )
    stencil = Stencil(cells, weights, start, n_pixels)
    lonely = (n_pixels == 0) & _tiny(regions, image) & _inside(regions.centers, core)
    return _sample_centers(stencil, regions, lonely, grid) if lonely.any() else stencil


def _tiny(regions: Regions, image: Box) -> np.ndarray:
    """Regions without a pixel centre anywhere in the image."""
    bounds = regions.bounds
    small = ((bounds[:, 2:] - bounds[:, :2]) < _TINY).all(axis=1)
    if small.any():
        which = np.flatnonzero(small)
        small[which] = np.diff(regions.take(which).runs(image).start) == 0
    return small


def _inside(points: np.ndarray, box: Box) -> np.ndarray:
    x, y = points.T
    return (x >= box.x0) & (x < box.x1) & (y >= box.y0) & (y < box.y1)


def _sample_centers(stencil: Stencil, regions: Regions, which: np.ndarray, grid: CellGrid) -> Stencil:
    """Stencil with the bilinear weights of the centres of some regions, which have no entries yet."""
    x0, x1, fx = _neighbours(regions.centers[which, 0], grid.stride, grid.n_x)
    y0, y1, fy = _neighbours(regions.centers[which, 1], grid.stride, grid.n_y)
    columns = grid.window[1]
    area = regions.area[which]
    cells = np.stack([(y - grid.y0) * columns + x - grid.x0 for y in (y0, y1) for x in (x0, x1)], axis=1)
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


def _neighbours(where: np.ndarray, stride: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cells left and right of positions (px), and the weight of the right one."""
    u = np.clip(where / stride - 0.5, 0.0, n - 1.0)
    left = np.floor(u).astype(np.int64)
    return left, np.minimum(left + 1, n - 1), u - left


@njit(cache=True)
def _count_disc_rows(centers, radius, y0, y1, x0, x1):  # noqa: PLR0917
    count = np.zeros(len(radius), np.int64)
    for i in range(len(radius)):
        cx, cy, r = centers[i, 0], centers[i, 1], radius[i]
        for y in range(max(y0, int(np.floor(cy - r - 0.5))), min(y1, int(np.ceil(cy + r - 0.5)) + 1)):
            left, right = _chord(cx, cy, r, y)
            count[i] += min(right, x1) > max(left, x0)
    return count


@njit(cache=True)
def _disc_runs(centers, radius, y0, y1, x0, x1, start):  # noqa: PLR0917
    n = start[-1]
    ys, lefts, rights = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.int64)
    k = 0
    for i in range(len(radius)):
        cx, cy, r = centers[i, 0], centers[i, 1], radius[i]
        for y in range(max(y0, int(np.floor(cy - r - 0.5))), min(y1, int(np.ceil(cy + r - 0.5)) + 1)):
            left, right = _chord(cx, cy, r, y)
            left, right = max(left, x0), min(right, x1)
            if right > left:
                ys[k], lefts[k], rights[k] = y, left, right
                k += 1
    return ys, lefts, rights


@njit(cache=True)
def _chord(cx, cy, r, y):
    """Pixels [left, right) of row y whose centres lie in the disc, by the test itself, not by a rounded root."""
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


@njit(cache=True)
def _crossings(edges, first, last, y, found):
    """Sorted x at which edges cross the centres of row y. Ends are ordered, so that neighbours agree to the bit."""
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


@njit(cache=True)
def _rows_of(edges, first, last, y0, y1):
    low, high = np.inf, -np.inf
    for e in range(first, last):
        low = min(low, edges[e, 1], edges[e, 3])
        high = max(high, edges[e, 1], edges[e, 3])
    if low > high:
        return y0, y0
    return max(y0, int(np.floor(low)) - 1), min(y1, int(np.ceil(high)) + 1)


@njit(cache=True)
def _count_polygon_runs(edges, start, y0, y1, x0, x1):  # noqa: PLR0917
    n_polygons = len(start) - 1
    count = np.zeros(n_polygons, np.int64)
    found = np.empty(max(1, len(edges)))
    for i in range(n_polygons):
        top, bottom = _rows_of(edges, start[i], start[i + 1], y0, y1)
        for y in range(top, bottom):
            n = _crossings(edges, start[i], start[i + 1], y, found)
            for k in range(0, n - 1, 2):
                left = max(x0, int(np.ceil(found[k] - 0.5)))
                right = min(x1, int(np.ceil(found[k + 1] - 0.5)))
                count[i] += right > left
    return count


@njit(cache=True)
def _polygon_runs(edges, start, y0, y1, x0, x1, first_run):  # noqa: PLR0917
    n = first_run[-1]
    ys, lefts, rights = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.int64)
    found = np.empty(max(1, len(edges)))
    j = 0
    for i in range(len(start) - 1):
        top, bottom = _rows_of(edges, start[i], start[i + 1], y0, y1)
        for y in range(top, bottom):
            m = _crossings(edges, start[i], start[i + 1], y, found)
            for k in range(0, m - 1, 2):
                left = max(x0, int(np.ceil(found[k] - 0.5)))
                right = min(x1, int(np.ceil(found[k + 1] - 0.5)))
                if right > left:
                    ys[j], lefts[j], rights[j] = y, left, right
                    j += 1
    return ys, lefts, rights


@njit(cache=True)
def _stencil(start, ys, lefts, rights, stride, n_y, n_x, gy0, gx0, rows, columns):  # noqa: PLR0917
    """Bilinear weights of all pixels of each region, summed per cell; two passes, the first for the size."""
    n_regions = len(start) - 1
    windows = np.zeros((n_regions, 4), np.int64)  # first and last cell row, first and last cell column
    largest, total = 0, 0
    for i in range(n_regions):
        if start[i] == start[i + 1]:
            continue
        top, bottom, west, east = ys[start[i]], ys[start[i]], lefts[start[i]], rights[start[i]] - 1
        for k in range(start[i], start[i + 1]):
            top, bottom = min(top, ys[k]), max(bottom, ys[k])
            west, east = min(west, lefts[k]), max(east, rights[k] - 1)
        windows[i, 0] = _left_cell(top, stride)
        windows[i, 1] = min(_left_cell(bottom, stride) + 1, n_y - 1)
        windows[i, 2] = _left_cell(west, stride)
        windows[i, 3] = min(_left_cell(east, stride) + 1, n_x - 1)
        size = (windows[i, 1] - windows[i, 0] + 1) * (windows[i, 3] - windows[i, 2] + 1)
        largest, total = max(largest, size), total + size
    cells, weights = np.empty(total, np.int64), np.empty(total)
    first, n_pixels = np.zeros(n_regions + 1, np.int64), np.zeros(n_regions)
    dense, across = np.zeros(largest), np.zeros(n_x + 1)
    n = 0
    for i in range(n_regions):
        if start[i] < start[i + 1]:
            top, left = windows[i, 0], windows[i, 2]
            n_rows, n_columns = windows[i, 1] - top + 1, windows[i, 3] - left + 1
            dense[: n_rows * n_columns] = 0.0
            for k in range(start[i], start[i + 1]):
                across[:n_columns] = 0.0
                for x in range(lefts[k], rights[k]):
                    cell, fraction = _cell_and_fraction(x, stride, n_x)
                    across[cell - left] += 1.0 - fraction
                    if fraction > 0:
                        across[cell - left + 1] += fraction
                n_pixels[i] += rights[k] - lefts[k]
                cell, fraction = _cell_and_fraction(ys[k], stride, n_y)
                row = (cell - top) * n_columns
                for c in range(n_columns):
                    dense[row + c] += (1.0 - fraction) * across[c]
                if fraction > 0:
                    for c in range(n_columns):
                        dense[row + n_columns + c] += fraction * across[c]
            for r in range(n_rows):
                for c in range(n_columns):
                    weight = dense[r * n_columns + c]
                    if weight != 0.0:
                        y, x = top + r - gy0, left + c - gx0
                        if y < 0 or y >= rows or x < 0 or x >= columns:
                            raise IndexError("A pixel reads a cell outside the window.")  # noqa: EM101
                        cells[n], weights[n] = y * columns + x, weight
                        n += 1
        first[i + 1] = n
    return cells[:n].copy(), weights[:n].copy(), first, n_pixels


@njit(cache=True)
def _left_cell(p, stride):
    return max(0, int(np.floor((p + 0.5) / stride - 0.5)))


@njit(cache=True)
def _cell_and_fraction(p, stride, n):
    u = min(max((p + 0.5) / stride - 0.5, 0.0), n - 1.0)
    cell = int(np.floor(u))
    return cell, u - cell
