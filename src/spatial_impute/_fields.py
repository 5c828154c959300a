"""Mean and spread of image features over square fields of view.

Features are encoded once on a lattice of patches that covers the section, and every field is described by the patches
whose middles lie in it. Sums over a field come from cumulative sums, so that a field costs the same whatever its size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_CHANNELS = 16  # summed at a time: tables of cumulative sums in float64 stay small beside the features themselves


@dataclass(frozen=True)
class Field:
    """A square field of view around a spot."""

    scale: float
    """Edge length in spot diameters."""
    shift: tuple[float, float] = (0.0, 0.0)
    """Middle of the field relative to that of the spot (x, y), in spot diameters."""


@dataclass(frozen=True)
class Lattice:
    """Features on the cells of a regular lattice in the section frame."""

    step: float
    """Edge of a cell in um."""
    first: tuple[int, int]
    """(row, column) of the first cell; cell (0, 0) begins at the origin of the section frame."""
    values: np.ndarray
    """(rows, columns, d) float32 features of the patch in the middle of each cell."""
    known: np.ndarray
    """(rows, columns) bool: cells that were encoded."""


def needed_cells(centers: np.ndarray, side: float, step: float) -> tuple[tuple[int, int], np.ndarray]:
    """Cells that squares of edge `side` around `centers` (um) touch.

    Returns
    -------
    first
        (row, column) of the first cell of the mask.
    mask
        (rows, columns) bool.
    """
    low = np.floor((centers - side / 2) / step).astype(np.int64)[:, ::-1]
    high = np.floor((centers + side / 2) / step).astype(np.int64)[:, ::-1] + 1
    first = low.min(axis=0)
    low, high = low - first, high - first
    # Squares are marked at their corners; cumulative sums fill them.
    marks = np.zeros(high.max(axis=0) + 1, dtype=np.int64)
    for sign, rows, columns in ((1, low, low), (-1, low, high), (-1, high, low), (1, high, high)):
        np.add.at(marks, (rows[:, 0], columns[:, 1]), sign)
    mask = marks.cumsum(axis=0).cumsum(axis=1)[:-1, :-1] > 0
    return (int(first[0]), int(first[1])), mask


def cell_centers(first: tuple[int, int], mask: np.ndarray, step: float) -> np.ndarray:
    """(n, 2) x, y in um of the middles of the marked cells, row by row."""
    rows, columns = np.nonzero(mask)
    return (np.column_stack([columns + first[1], rows + first[0]]) + 0.5) * step


def pool_field(lattice: Lattice, centers: np.ndarray, side: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the features over a square field, cells weighted by the area they share with it.

    A field without any known cell (beyond the edge of the image) takes the values of the nearest known cell.

    Parameters
    ----------
    lattice
        Features of the section.
    centers
        (n, 2) middles of the fields, um.
    side
        Edge length of the field, um.

    Returns
    -------
    mean, spread
        (n, d) float64.
    """
    known = lattice.known
    origin = np.array([lattice.first[1], lattice.first[0]], dtype=float)  # x, y
    low = centers / lattice.step - side / (2 * lattice.step) - origin
    high = centers / lattice.step + side / (2 * lattice.step) - origin
    area = _box_sums(known[..., None].astype(np.float64), low, high)[:, 0]
    covered = area > 1e-9
    mean = np.empty((len(centers), lattice.values.shape[2]))
    spread = np.zeros_like(mean)
    offset = lattice.values[known].mean(axis=0, dtype=np.float64)  # squares of centred values lose no digits
    weight = np.where(covered, area, 1.0)[:, None]
    for start in range(0, lattice.values.shape[2], _CHANNELS):
        part = slice(start, start + _CHANNELS)
        values = np.where(known[..., None], lattice.values[..., part] - offset[part], 0.0)
        average = _box_sums(values, low, high) / weight
        square = _box_sums(values**2, low, high) / weight
        mean[:, part] = average + offset[part]
        variance = square - average**2
        spread[:, part] = np.sqrt(np.where(variance > 1e-12 * square, variance, 0.0))
    if not covered.all():
        cells = np.argwhere(known)
        middle = (low + high)[~covered, ::-1] / 2 - 0.5  # row, column
        nearest = np.array([((cells - m) ** 2).sum(axis=1).argmin() for m in middle])
        mean[~covered] = lattice.values[tuple(cells[nearest].T)]
        spread[~covered] = 0.0
    return mean, spread


def _box_sums(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """(n, d) integrals of a cell-wise constant function (rows, columns, d) over boxes from `low` to `high` (x, y)."""
    table = np.zeros((values.shape[0] + 1, values.shape[1] + 1, values.shape[2]))
    np.cumsum(values, axis=0, out=table[1:, 1:])
    np.cumsum(table[1:, 1:], axis=1, out=table[1:, 1:])

    def corner(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        # The integral from the origin is bilinear between the corners of a cell.
        x, y = np.clip(x, 0, values.shape[1]), np.clip(y, 0, values.shape[0])
        column = np.minimum(x.astype(np.int64), values.shape[1] - 1)
        row = np.minimum(y.astype(np.int64), values.shape[0] - 1)
        fx, fy = (x - column)[:, None], (y - row)[:, None]
        above = table[row, column] * (1 - fx) + table[row, column + 1] * fx
        below = table[row + 1, column] * (1 - fx) + table[row + 1, column + 1] * fx
        return above * (1 - fy) + below * fy

    return (
        corner(high[:, 0], high[:, 1])
        - corner(low[:, 0], high[:, 1])
        - corner(high[:, 0], low[:, 1])
        + corner(low[:, 0], low[:, 1])
    )
