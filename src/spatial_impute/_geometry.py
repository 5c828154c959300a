"""Geometry in micrometres: affine maps as 3x3 matrices on (x, y, 1), discs, lattices, and volumes between sections."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
from scipy import ndimage as ndi
from scipy.spatial import cKDTree

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import ArrayLike

_AXES = r"\bx\b|col(umn)?s?\b", r"\by\b|rows?\b"  # in the names of columns
_SAME_STEP = 0.2  # neighbors on a lattice; the next ones are 1.4 times as far, and arrays are printed to some per cent
_MAX_LATTICE = 2**25  # points; bins of 2 um on the whole area of a Visium HD slide are 11 million


@dataclass(frozen=True)
class Frame:
    """Coordinate system that an image and its regions share."""

    name: str
    um: float  # um per unit


def apply_affine(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Map points (n, 2) by a (3, 3) affine matrix that acts on columns (x, y, 1)."""
    points = np.asarray(points, dtype=float)
    return points @ matrix[:2, :2].T + matrix[:2, 2]


def box_after(low: Sequence[float], high: Sequence[float], matrix: np.ndarray) -> np.ndarray:
    """(2, 2) lowest and highest x, y of a box after an affine map."""
    corners = apply_affine(np.array([[x, y] for y in (low[1], high[1]) for x in (low[0], high[0])]), matrix)
    return np.array([corners.min(axis=0), corners.max(axis=0)])


def lies_on(mask: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(n,) bool: points (n, 2), x and y in pixels, that lie on a mask (y, x)."""
    x, y = np.floor(points).astype(np.int64).T
    inside = (x >= 0) & (y >= 0) & (x < mask.shape[1]) & (y < mask.shape[0])
    found = np.zeros(len(points), bool)
    found[inside] = mask[y[inside], x[inside]]
    return found


def xy_of(positions: Any) -> np.ndarray:
    """Return x and y (n, 2) of positions: the columns of a table that are named so, else the first two columns.

    Raises a ``ValueError`` if names of some columns are those of axes, and do not tell which are x and y.

    Examples
    --------
    >>> import pandas as pd
    >>> xy_of(pd.DataFrame({"y": [1.0], "x": [2.0]})).tolist()
    [[2.0, 1.0]]
    """
    # Names such as ``x``, ``X_px``, ``imagerow`` and ``pxl_col_in_fullres``.
    names = [re.sub(r"[^a-z]+", " ", str(name).lower()) for name in getattr(positions, "columns", ())]
    x, y = ([i for i, name in enumerate(names) if re.search(axis, name)] for axis in _AXES)
    if not x and not y:
        return np.asarray(positions, dtype=float)[:, :2]
    if {"x", "y"} <= set(names):
        x, y = [names.index("x")], [names.index("y")]
    if len(x) != 1 or len(y) != 1 or x == y:
        msg = (
            f"The columns of the positions must tell x from y, found {list(positions.columns)}. Give an array with x and y in its "
            "first two columns, or name one column 'x' and one 'y'."
        )
        raise ValueError(msg)
    return positions.iloc[:, [x[0], y[0]]].to_numpy(dtype=float)


def scaling(x: float, y: float | None = None) -> np.ndarray:
    """Matrix that multiplies x and y."""
    return np.diag([x, x if y is None else y, 1.0])


def translation(offset: ArrayLike) -> np.ndarray:
    """Matrix that moves points by an offset (x, y)."""
    matrix = np.eye(3)
    matrix[:2, 2] = offset
    return matrix


def affine_between(linear: ArrayLike, source: ArrayLike, target: ArrayLike) -> np.ndarray:
    """(3, 3) affine with the linear part (2, 2) that moves the point `source` (x, y) to `target`."""
    matrix = np.eye(3)
    matrix[:2, :2] = linear
    matrix[:2, 2] = np.asarray(target, float) - matrix[:2, :2] @ np.asarray(source, float)
    return matrix


def exchanged_axes(matrix: np.ndarray) -> np.ndarray:
    """(3, 3) affine of x, y as one of y, x (napari), and back."""
    return matrix[np.ix_([1, 0, 2], [1, 0, 2])]


def linear_scale(matrix: np.ndarray) -> float:
    """Mean length factor of an affine map, the square root of its absolute determinant."""
    return float(np.sqrt(abs(np.linalg.det(matrix[:2, :2]))))


def anisotropy(matrix: np.ndarray) -> float:
    """Ratio of the largest to the smallest singular value of the linear part (1 for similarities)."""
    values = np.linalg.svd(matrix[:2, :2], compute_uv=False)
    return float(values[0] / values[1]) if values[1] > 0 else float("inf")


def disc_iou(distance: np.ndarray, radius_a: np.ndarray | float, radius_b: np.ndarray | float) -> np.ndarray:
    """Intersection over union of discs, from the distances of their centres and their radii (arrays that broadcast).

    Examples
    --------
    >>> disc_iou(np.array([0.0, 1.0, 2.0]), 1.0, 1.0).round(6)
    array([1.     , 0.24301, 0.     ])
    """
    d, a, b = np.broadcast_arrays(
        np.asarray(distance, dtype=float), np.asarray(radius_a, dtype=float), np.asarray(radius_b, dtype=float)
    )
    small, large = np.minimum(a, b), np.maximum(a, b)
    lens = np.zeros(d.shape)
    inside = d <= large - small
    lens[inside] = np.pi * small[inside] ** 2
    cut = ~inside & (d < a + b)
    dc, ac, bc = d[cut], a[cut], b[cut]
    # Distances from the centres to the chord through the two crossing points.
    to_chord_a = (dc**2 + ac**2 - bc**2) / (2 * dc)
    to_chord_b = dc - to_chord_a
    segment_a = ac**2 * np.arccos(np.clip(to_chord_a / ac, -1, 1))
    segment_b = bc**2 * np.arccos(np.clip(to_chord_b / bc, -1, 1))
    half_chord = np.sqrt(np.clip(ac**2 - to_chord_a**2, 0, None))
    lens[cut] = segment_a + segment_b - dc * half_chord
    return lens / (np.pi * (a**2 + b**2) - lens)


def grid_in_box(x0: float, y0: float, x1: float, y1: float, *, spacing: float, layout: str) -> np.ndarray:
    """Points of a lattice centred in a box, (n, 2) x, y in row-major order.

    Neighbors lie `spacing` apart; `layout` is ``"square"`` or ``"hex"``.
    """
    row_step = spacing * (np.sqrt(3) / 2 if layout == "hex" else 1.0)
    n_rows = int(np.floor((y1 - y0) / row_step)) + 1
    # Rows of a hexagonal lattice are shifted by a quarter of the spacing to either side.
    width = x1 - x0 - (spacing / 2 if layout == "hex" else 0.0)
    n_columns = int(np.floor(max(width, 0.0) / spacing)) + 1
    if n_rows * n_columns > _MAX_LATTICE:
        n = f"{n_columns} x {n_rows}"
        msg = f"A lattice of {n} points {spacing:g} apart does not fit in memory. Take a wider spacing."
        raise ValueError(msg)
    ys = (y0 + y1) / 2 + (np.arange(n_rows) - (n_rows - 1) / 2) * row_step
    xs = (x0 + x1) / 2 + (np.arange(n_columns) - (n_columns - 1) / 2) * spacing
    grid_x, grid_y = np.meshgrid(xs, ys)
    if layout == "hex":
        grid_x = grid_x + np.where(np.arange(n_rows) % 2, spacing / 4, -spacing / 4)[:, None]
    return np.column_stack([grid_x.ravel(), grid_y.ravel()])


def plane_tiles(points: np.ndarray, centres: np.ndarray, *, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Halve the plane along its longer side until no tile holds more than `size` centres, unless they lie at one place.

    Yields positions of the points and of the centres in a tile. The tiles cover the whole plane.

    Examples
    --------
    >>> line = np.column_stack([np.arange(4.0), np.zeros(4)])
    >>> [own.tolist() for _, own in plane_tiles(line, line, size=2)]
    [[0, 1], [2, 3]]
    """
    waiting = [(np.arange(len(points)), np.arange(len(centres)))]
    while waiting:
        inside, own = waiting.pop()
        if len(own) > size:
            axis = int(np.argmax(np.ptp(centres[own], axis=0)))
            cut = np.median(centres[own, axis])
            low, below = centres[own, axis] < cut, points[inside, axis] < cut
            if low.any():
                waiting += [(inside[~below], own[~low]), (inside[below], own[low])]
                continue
        yield inside, own


def lattice_of(points: np.ndarray) -> tuple[float, str] | None:
    """Pitch and layout (``"hex"`` or ``"square"``) of points on a lattice (n, 2); None if they lie on none.

    The pitch is the mean distance of neighbors: positions are whole pixels, so the nearest of them alone is too near, by up
    to 0.7 % on Visium.
    """
    if len(points) < 2:
        return None
    tree = cKDTree(points)
    distance = tree.query(points, k=min(7, len(points)))[0][:, 1:]
    near = np.abs(distance / np.median(distance[:, 0]) - 1) < _SAME_STEP
    if near[:, 0].mean() < 0.5:
        return None
    pitch = float(distance[near].mean())
    # The next neighbors are 1.41 times as far on squares, and 1.73 times on hexagons.
    squares, _, hexagons = np.diff(tree.count_neighbors(tree, np.array([1.27, 1.57, 1.58, 1.88]) * pitch))
    return pitch, "square" if squares > hexagons else "hex"


def polygons_of(geometry: Any) -> Any:
    """Valid polygons of a geometry, without lines and points that the repair may add."""
    valid = shapely.make_valid(geometry)
    if valid.geom_type in ("Polygon", "MultiPolygon"):
        return valid
    parts = [part for part in shapely.get_parts(valid) if part.geom_type in ("Polygon", "MultiPolygon")]
    return shapely.union_all(parts) if parts else geometry


_NEIGHBORS = 6  # of a point in the plane: as many as a spot has on a hexagonal lattice
_BANDWIDTH = 0.5  # of the spot spacing: a smoother kernel would blur what neighboring spots tell apart
# Of the spot spacing. No point inside a square lattice is farther from its spots than 0.71, inside a hexagonal one 0.58.
_REACH = 0.75
_FINEST = 300  # cells along the longer side: more than a panel can show
_CELLS_PER_SPACING = 6  # the outline looks smooth, and the kernel is sampled finely
_LAYERS_PER_GAP = 4  # layers of cells between neighboring sections


@dataclass(frozen=True)
class Volume:
    """Values on a regular grid of cells, in um."""

    values: np.ndarray  # (z, y, x), NaN outside the tissue
    origin: tuple[float, float, float]  # x, y, z of the centre of the first cell
    step: tuple[float, float, float]  # Size of a cell in x, y, z

    @property
    def axes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Centres of the cells along x, y, z."""
        counts = self.values.shape[::-1]
        x, y, z = (o + s * np.arange(n) for o, s, n in zip(self.origin, self.step, counts, strict=True))
        return x, y, z

    @property
    def limits(self) -> tuple[tuple[float, float], ...]:
        """Lowest and highest edge in x, y, z."""
        counts = self.values.shape[::-1]
        return tuple((o - s / 2, o + (n - 0.5) * s) for o, s, n in zip(self.origin, self.step, counts, strict=True))

    def cell(self, axis: int, position: float) -> int:
        """Index of the cell that holds a position (um) along x (0), y (1) or z (2)."""
        n = self.values.shape[2 - axis]
        return int(np.clip(np.round((position - self.origin[axis]) / self.step[axis]), 0, n - 1))

    def slice(self, axis: int, position: float) -> np.ndarray:
        """Plane across x (z, y), y (z, x) or z (y, x) at a position."""
        return np.take(self.values, self.cell(axis, position), axis=2 - axis)


def interpolate_stack(
    points: Sequence[np.ndarray],
    values: Sequence[np.ndarray],
    heights: Sequence[float],
    *,
    spacing: float,
    resolution: float | None = None,
) -> Volume:
    """Interpolate values at the spots of sections to a volume.

    In a section, a Gaussian kernel over the six nearest spots; between sections, linear in z. The outline of the tissue
    between two sections follows from their signed distances, interpolated linearly (shape-based interpolation), so that
    a section that ends does not end in a step. Cells outside are NaN.

    `points` (n, 2) and `values` (n,) of each section are x, y in the common frame, and values, NaN for tissue without a
    value; `heights` increase. `spacing` is the distance of neighboring spots: what lies farther than 0.75 of it from any
    spot is no tissue. `resolution` is the edge of a cell in x and y, a sixth of the spacing by default, or coarser for large
    tissue. All lengths are in um.

    Examples
    --------
    >>> grid = np.stack(np.meshgrid(np.arange(4.0), np.arange(3.0)), axis=-1).reshape(-1, 2)
    >>> volume = interpolate_stack([grid, grid], [np.zeros(12), np.ones(12)], [0.0, 10.0], spacing=1.0)
    >>> volume.values.shape[0], np.nanmean(volume.values, axis=(1, 2)).round(2).tolist()
    (5, [0.0, 0.25, 0.5, 0.75, 1.0])
    """
    everything = np.concatenate(points)
    low, high = everything.min(axis=0) - spacing, everything.max(axis=0) + spacing
    cell = max(spacing / _CELLS_PER_SPACING, (high - low).max() / _FINEST) if resolution is None else resolution
    n_x, n_y = np.maximum(np.ceil((high - low) / cell).astype(int), 1)
    x, y = low[0] + (np.arange(n_x) + 0.5) * cell, low[1] + (np.arange(n_y) + 0.5) * cell
    cells = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    planes, inside = [], []
    for where, what in zip(points, values, strict=True):
        plane, tissue = _plane(where, what, cells, spacing)
        planes.append(plane.reshape(n_y, n_x))
        inside.append(_signed_distance(_without_gaps(tissue.reshape(n_y, n_x), (spacing / cell) ** 2)))
    known = np.asarray(heights, dtype=float)
    step = np.diff(known).min() / _LAYERS_PER_GAP
    z = np.linspace(known[0], known[-1], int(np.round(np.ptp(known) / step)) + 1)
    layers = []
    for height in z:
        above = int(np.clip(np.searchsorted(known, height), 1, len(known) - 1))
        share = (height - known[above - 1]) / (known[above] - known[above - 1])
        layers.append(_between(planes[above - 1 : above + 1], inside[above - 1 : above + 1], float(share)))
    return Volume(np.stack(layers), (x[0], y[0], z[0]), (cell, cell, float(z[1] - z[0])))


def _plane(where: np.ndarray, what: np.ndarray, cells: np.ndarray, spacing: float) -> tuple[np.ndarray, np.ndarray]:
    """(n_cells,) values, NaN where no spot with a value is near; whether the cells are tissue."""
    tissue = cKDTree(where).query(cells, distance_upper_bound=_REACH * spacing)[0] < np.inf
    known = np.isfinite(what)
    plane = np.full(len(cells), np.nan)
    if not known.any():
        return plane, tissue
    k = min(_NEIGHBORS, int(known.sum()))
    distance, index = cKDTree(where[known]).query(cells, k=k)
    distance, index = distance.reshape(-1, k), index.reshape(-1, k)
    near = distance[:, 0] <= spacing  # a little beyond the outline: tissue between sections may reach there
    scaled = (distance[near] ** 2 - distance[near, :1] ** 2) / (2 * (_BANDWIDTH * spacing) ** 2)
    weight = np.exp(-scaled)
    plane[near] = (weight * what[known][index[near]]).sum(axis=1) / weight.sum(axis=1)
    return plane, tissue


def _without_gaps(tissue: np.ndarray, n_cells: float) -> np.ndarray:
    """Fill holes of fewer than `n_cells`: smaller than the place of one spot, they are gaps of an uneven lattice."""
    holes, _ = ndi.label(~tissue)
    small = np.bincount(holes.ravel()) < n_cells
    small[np.unique(np.concatenate([holes[0], holes[-1], holes[:, 0], holes[:, -1]]))] = False
    small[0] = False  # the tissue
    return tissue | small[holes]


def _signed_distance(mask: np.ndarray) -> np.ndarray:
    """Distance to the outline in cells, positive inside."""
    if not mask.any():
        return np.full(mask.shape, -np.inf)
    return np.where(mask, ndi.distance_transform_edt(mask) - 0.5, 0.5 - ndi.distance_transform_edt(~mask))


def _between(planes: list[np.ndarray], inside: list[np.ndarray], share: float) -> np.ndarray:
    """Layer at `share` of the way from the first to the second plane; where one has no value, that of the other."""
    if share in (0.0, 1.0):
        chosen = int(share)
        return np.where(inside[chosen] > 0, planes[chosen], np.nan)
    tissue = (1 - share) * inside[0] + share * inside[1] > 0
    weights = np.stack([np.where(np.isfinite(p), w, 0.0) for p, w in zip(planes, (1 - share, share), strict=True)])
    total = weights.sum(axis=0)
    summed = (weights * np.nan_to_num(np.stack(planes))).sum(axis=0)
    return np.where(tissue & (total > 0), summed / np.where(total > 0, total, 1.0), np.nan)
