"""Expression between the spots and between the sections: arrays in, one volume out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage as ndi
from scipy.spatial import cKDTree

if TYPE_CHECKING:
    from collections.abc import Sequence

_NEIGHBOURS = 6  # of a point in the plane: as many as a spot has on a hexagonal lattice
_BANDWIDTH = 0.5  # of the spot spacing: a smoother kernel would blur what neighbouring spots tell apart
# Of the spot spacing. No point inside a square lattice is farther from its spots than 0.71, inside a hexagonal one 0.58.
_REACH = 0.75
_FINEST = 300  # cells along the longer side: more than a panel can show
_CELLS_PER_SPACING = 6  # the outline looks smooth, and the kernel is sampled finely
_LAYERS_PER_GAP = 4  # layers of cells between neighbouring sections


@dataclass(frozen=True)
class Volume:
    """Values on a regular grid of cells, in um."""

    values: np.ndarray  # (z, y, x), NaN outside the tissue
    origin: tuple[float, float, float]  # x, y, z of the centre of the first cell
    step: tuple[float, float, float]  # Size of a cell in x, y, z

    @property
    def axes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Centres of the cells along x, y, z."""
        x, y, z = (
            o + s * np.arange(n) for o, s, n in zip(self.origin, self.step, self.values.shape[::-1], strict=True)
        )
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
    value; `heights` increase. `spacing` is the distance of neighbouring spots: what lies farther than 0.75 of it from any
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
    k = min(_NEIGHBOURS, int(known.sum()))
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
