"""Mean and spread of image features over square fields of view.

Features are encoded once on a lattice of patches that covers the section, and every field is described by the patches
whose middles lie in it. Sums over a field come from cumulative sums, so that a field costs the same whatever its size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numba
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scipy import sparse

_CHANNELS = 16  # summed at a time: tables of cumulative sums in float64 stay small beside the features themselves
_SAMPLE = 4096  # cells that tell the mean of a feature to a few hundredths of its spread
NO_AREA = 1e-9  # of a cell; below it a field has no known cell, but for rounding


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


def pool_fields(lattice: Lattice, fields: Sequence[tuple[np.ndarray, float]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Mean and standard deviation of the features over square fields, cells weighted by the area they share with them.

    A field without any known cell (beyond the edge of the image) takes the values of the nearest known cell.

    Parameters
    ----------
    lattice
        Features of the section.
    fields
        (n, 2) middles in um and edge length in um, per kind of field.

    Returns
    -------
    Mean and spread, (n, d) float64 each, per kind of field.
    """
    known, n_features = lattice.known, lattice.values.shape[2]
    origin = np.array([lattice.first[1], lattice.first[0]], dtype=float)  # x, y
    boxes, middles, results, weights = [], [], [], []
    shape = (known.shape[0] + 1, known.shape[1] + 1)
    area = np.zeros(shape)
    area[1:, 1:] = known.cumsum(axis=0).cumsum(axis=1)
    for centers, side in fields:
        middle, half = np.asarray(centers) / lattice.step - origin, side / (2 * lattice.step)
        boxes.append(box_weights(shape, middle - half, middle + half))
        weights.append(boxes[-1] @ area.reshape(-1, 1))
        middles.append(middle)
        results.append((np.zeros((len(middle), n_features)), np.zeros((len(middle), n_features))))
    # Squares of values near 0 lose no digits; a sample of the cells tells where the values lie.
    rows, columns = np.nonzero(known)
    some = slice(None, None, max(1, len(rows) // _SAMPLE))
    offset = lattice.values[rows[some], columns[some]].mean(axis=0, dtype=np.float64)
    for start in range(0, n_features, _CHANNELS):
        part = slice(start, start + _CHANNELS)
        sums, squares = np.zeros((2, *shape, len(offset[part])))
        _integrate(lattice.values[..., part], known, offset[part], sums, squares)
        sums, squares = (table.reshape(-1, table.shape[2]) for table in (sums, squares))
        for box, weight, (mean, spread) in zip(boxes, weights, results, strict=True):
            shared = np.where(weight > NO_AREA, weight, 1.0)
            average, square = box @ sums / shared, box @ squares / shared
            variance = square - average**2
            mean[:, part] = average + offset[part]
            spread[:, part] = np.sqrt(np.where(variance > 1e-12 * square, variance, 0.0))
    for middle, weight, (mean, spread) in zip(middles, weights, results, strict=True):
        for row in np.flatnonzero(weight[:, 0] <= NO_AREA):
            y, x = middle[row, ::-1] - 0.5
            nearest = ((rows - y) ** 2 + (columns - x) ** 2).argmin()
            mean[row] = lattice.values[rows[nearest], columns[nearest]]
            spread[row] = 0.0
    return results


@numba.njit(cache=True, nogil=True)
def _integrate(
    values: np.ndarray, known: np.ndarray, offset: np.ndarray, sums: np.ndarray, squares: np.ndarray
) -> None:
    """Integrals from the first corner of the known (rows, columns, d) cells less `offset`, and of their squares.

    `sums` and `squares` are tables of zeros, (rows + 1, columns + 1, d); they are filled in one pass.
    """
    line, line_squares = np.empty(len(offset)), np.empty(len(offset))
    for i in range(known.shape[0]):
        line[:], line_squares[:] = 0.0, 0.0
        for j in range(known.shape[1]):
            if known[i, j]:
                for k in range(len(offset)):
                    value = values[i, j, k] - offset[k]
                    line[k] += value
                    line_squares[k] += value * value
            for k in range(len(offset)):
                sums[i + 1, j + 1, k] = sums[i, j + 1, k] + line[k]
                squares[i + 1, j + 1, k] = squares[i, j + 1, k] + line_squares[k]


def box_weights(shape: tuple[int, ...], low: np.ndarray, high: np.ndarray) -> sparse.csr_matrix:
    """(n, cells of a table) weights that make integrals over boxes out of those from the first corner."""
    from scipy import sparse

    rows, columns = shape[0] - 1, shape[1] - 1
    indices, weights = [], []
    for x, y, sign in ((high, high, 1.0), (low, high, -1.0), (high, low, -1.0), (low, low, 1.0)):
        # The integral from the first corner is bilinear between the corners of a cell.
        across, down = np.clip(x[:, 0], 0, columns), np.clip(y[:, 1], 0, rows)
        column, row = np.minimum(across.astype(np.int64), columns - 1), np.minimum(down.astype(np.int64), rows - 1)
        fx, fy = across - column, down - row
        for step_y, part_y in ((0, 1 - fy), (1, fy)):
            for step_x, part_x in ((0, 1 - fx), (1, fx)):
                indices.append((row + step_y) * (columns + 1) + column + step_x)
                weights.append(sign * part_y * part_x)
    starts = np.arange(len(low) + 1) * len(indices)
    return sparse.csr_matrix(
        (np.stack(weights, axis=1).ravel(), np.stack(indices, axis=1).ravel(), starts),
        shape=(len(low), shape[0] * shape[1]),
    )
