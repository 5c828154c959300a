"""Mean and standard deviation of image features over square fields of view.

Features are encoded once on a lattice of patches that covers the section. The patches with their centre in a field of
view describe it. Sums over a field come from cumulative sums, so the cost does not depend on the size of the field.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from spatial_impute._settings import compiled

if TYPE_CHECKING:
    from collections.abc import Sequence

_CHANNELS = 16  # summed at a time: tables of cumulative sums in float64 stay small compared with the features
_SAMPLE = 4096  # cells; enough to know the mean of a feature to a few hundredths of its standard deviation
_NO_AREA = 1e-9  # of a cell; rounding error in the area of a field without any encoded cell


@dataclass(frozen=True)
class FieldOfView:
    """A square field of view around a spot."""

    scale: float  # Edge length in spot diameters
    shift: tuple[float, float] = (0.0, 0.0)
    """Centre of the field relative to that of the spot (x, y), in spot diameters."""


@dataclass(frozen=True)
class Lattice:
    """Features on the cells of a regular lattice in the section frame."""

    step: float  # Edge of a cell in um
    first: tuple[int, int]  # (row, column) of the first cell; cell (0, 0) begins at the origin of the section frame
    values: np.ndarray  # (rows, columns, d) float32 features of the patch in the middle of each cell
    known: np.ndarray  # (rows, columns) bool: encoded cells


def needed_cells(centers: np.ndarray, side: float, step: float) -> tuple[tuple[int, int], np.ndarray]:
    """Cells that squares of edge `side` around `centers` (um) touch: (row, column) of the first cell, (rows, columns) bool."""
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
    """(n, 2) x, y in um of the centres of the marked cells, row by row."""
    rows, columns = np.nonzero(mask)
    return (np.column_stack([columns + first[1], rows + first[0]]) + 0.5) * step


def pool_fields(lattice: Lattice, fields: Sequence[tuple[np.ndarray, float]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Mean and standard deviation of features over square fields; a cell counts by the area that it shares with a field.

    A field without any encoded cell (beyond the edge of the image) takes the values of the nearest encoded cell. `fields`
    holds (n, 2) centres and the edge length in um per kind of field; so does the result with (n, d) float64 each.
    """
    known, n_features = lattice.known, lattice.values.shape[2]
    origin = np.array([lattice.first[1], lattice.first[0]], dtype=float)  # x, y
    boxes, middles, results, weights = [], [], [], []
    area = _known_area(known)
    for centers, side in fields:
        middle, half = np.asarray(centers) / lattice.step - origin, side / (2 * lattice.step)
        boxes.append(_box_weights(area.shape, middle - half, middle + half))
        weights.append(boxes[-1] @ area.reshape(-1, 1))
        middles.append(middle)
        results.append((np.zeros((len(middle), n_features)), np.zeros((len(middle), n_features))))
    # Squares of values near 0 lose no digits, so an offset is subtracted: the mean of a sample of the cells.
    rows, columns = np.nonzero(known)
    some = slice(None, None, max(1, len(rows) // _SAMPLE))
    offset = lattice.values[rows[some], columns[some]].mean(axis=0, dtype=np.float64)
    for start in range(0, n_features, _CHANNELS):
        part = slice(start, start + _CHANNELS)
        sums, squares = np.zeros((2, *area.shape, len(offset[part])))
        _integrate(lattice.values[..., part], known, offset[part], sums, squares)
        sums, squares = (table.reshape(-1, table.shape[2]) for table in (sums, squares))
        for box, weight, (mean, spread) in zip(boxes, weights, results, strict=True):
            shared = np.where(weight > _NO_AREA, weight, 1.0)
            average, square = box @ sums / shared, box @ squares / shared
            variance = square - average**2
            mean[:, part] = average + offset[part]
            spread[:, part] = np.sqrt(np.where(variance > 1e-12 * square, variance, 0.0))
    for middle, weight, (mean, spread) in zip(middles, weights, results, strict=True):
        for row in np.flatnonzero(weight[:, 0] <= _NO_AREA):
            y, x = middle[row, ::-1] - 0.5
            nearest = ((rows - y) ** 2 + (columns - x) ** 2).argmin()
            mean[row] = lattice.values[rows[nearest], columns[nearest]]
            spread[row] = 0.0
    return results


@compiled(nogil=True)
def _integrate(
    values: np.ndarray, known: np.ndarray, offset: np.ndarray, sums: np.ndarray, squares: np.ndarray
) -> None:
    """Fill tables with the cumulative sums of the known (rows, columns, d) cells less `offset`, and of their squares.

    `sums` and `squares` are zeros of shape (rows + 1, columns + 1, d).
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


def _known_area(known: np.ndarray) -> np.ndarray:
    """(rows + 1, columns + 1) cumulative sum of the known cells (rows, columns)."""
    return np.pad(known.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0))).astype(float)


def _box_weights(shape: tuple[int, ...], low: np.ndarray, high: np.ndarray) -> sparse.csr_matrix:
    """(n, entries of a table) weights that turn a table of cumulative sums into sums over boxes."""
    rows, columns = shape[0] - 1, shape[1] - 1
    indices, weights = [], []
    for x, y, sign in ((high, high, 1.0), (low, high, -1.0), (high, low, -1.0), (low, low, 1.0)):
        # The cumulative sum is bilinear between the corners of a cell.
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


class StreamingPooler:
    """Pooling during the encoding: each spot is pooled, and rows are dropped, as soon as its rows are complete.

    Blocks of cells may arrive in any order. Memory is small if they arrive roughly from top to bottom, as tiles of an
    image do: only the rows that the fields of a spot touch, and those of a tile, are in memory.

    `step`, `first` and `known` are those of the :class:`Lattice`; cells arrive in squares of `block` cells. `centers` are
    (n, 2) in um; `fields` hold the centre relative to the spot (x, y) and the edge length in um per kind of field.
    """

    def __init__(
        self,
        step: float,
        first: tuple[int, int],
        known: np.ndarray,
        centers: np.ndarray,
        fields: Sequence[tuple[np.ndarray, float]],
        *,
        block: int = 1,
    ) -> None:
        self._step, self._first, self._known, self._block = step, first, known, block
        self._centers, self._fields = centers, fields
        columns = np.arange(0, known.shape[1], block)
        rows = np.arange(0, known.shape[0], block)
        wanted = np.maximum.reduceat(np.maximum.reduceat(known, rows, axis=0), columns, axis=1)
        self.corners = np.argwhere(wanted) * block
        """(m, 2) row and column of the first cell of each block that holds known cells."""
        self._missing = wanted.sum(axis=1)  # blocks that have not arrived, per row of blocks
        self._top, self._end = self._row_spans()
        self._waiting = np.argsort(self._end, kind="stable")
        self._base = 0  # lattice row of the first row in memory
        self._values = np.zeros((0, known.shape[1], 0), dtype=np.float32)
        self._pooled: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, corners: np.ndarray, blocks: np.ndarray) -> None:
        """Take the features of blocks, (n, block, block, d), whose first cells are `corners` (n, 2)."""
        if not self._pooled:
            shape = (len(self._centers), blocks.shape[-1])
            self._pooled = [(np.empty(shape, np.float32), np.empty(shape, np.float32)) for _ in self._fields]
            self._values = np.zeros((0, self._known.shape[1], blocks.shape[-1]), dtype=np.float32)
        for (row, column), block in zip(corners, blocks, strict=True):
            if row + self._block > self._base + len(self._values):
                self._make_room(row)
            into = self._values[row - self._base : row - self._base + self._block, column : column + self._block]
            into[:] = block[: into.shape[0], : into.shape[1]]
            self._missing[row // self._block] -= 1

    def finish(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Mean and standard deviation, (n, d) float32 each, per kind of field; all blocks must have arrived."""
        self._pool_ready()
        return self._pooled

    def _row_spans(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows [top, end) of the lattice that the fields of each spot need."""
        n_rows = len(self._known)
        origin = np.array([self._first[1], self._first[0]], dtype=float)
        top, end = np.full(len(self._centers), n_rows), np.zeros(len(self._centers), dtype=np.int64)
        area = _known_area(self._known)
        cells: np.ndarray | None = None
        for shift, side in self._fields:
            middle, half = (self._centers + shift) / self._step - origin, side / (2 * self._step)
            top = np.minimum(top, np.floor(middle[:, 1] - half).astype(np.int64))
            end = np.maximum(end, np.ceil(middle[:, 1] + half).astype(np.int64))
            weight = _box_weights(area.shape, middle - half, middle + half) @ area.ravel()
            for i in np.flatnonzero(weight <= _NO_AREA):
                # Beyond the image: the field takes the nearest cell, which must not be dropped before.
                cells = np.argwhere(self._known) if cells is None else cells
                row = cells[((cells - (middle[i, ::-1] - 0.5)) ** 2).sum(axis=1).argmin(), 0]
                top[i], end[i] = min(top[i], row), max(end[i], row + 1)
        return np.clip(top, 0, n_rows), np.clip(end, 0, n_rows)

    def _make_room(self, row: int) -> None:
        """Extend the rows in memory to the block that begins at `row`, after dropping rows that nothing needs."""
        # A new row of blocks begins, usually with a new row of tiles, when most spots above are complete.
        self._pool_ready()
        needed = row + self._block - self._base
        if needed > len(self._values):
            # Grows in place, with zeros; a copy would double the memory for a moment.
            self._values.resize((needed, *self._values.shape[1:]), refcheck=False)

    def _pool_ready(self) -> None:
        """Pool the spots whose rows are complete, then drop the rows that no other spot needs."""
        incomplete = np.flatnonzero(self._missing)
        done = min(int(incomplete[0]) * self._block if len(incomplete) else len(self._known), len(self._known))
        n_ready = int(np.searchsorted(self._end[self._waiting], done, side="right"))
        if not n_ready or done <= self._base:
            return
        ready, self._waiting = self._waiting[:n_ready], self._waiting[n_ready:]
        values = self._values[: done - self._base]
        known = self._known[self._base : self._base + len(values)]  # rows below the last known cell are never made
        lattice = Lattice(self._step, (self._first[0] + self._base, self._first[1]), values, known)
        fields = [(self._centers[ready] + shift, side) for shift, side in self._fields]
        for (mean, spread), (new_mean, new_spread) in zip(self._pooled, pool_fields(lattice, fields), strict=True):
            mean[ready], spread[ready] = new_mean, new_spread
        base = min(int(self._top[self._waiting].min()), done) if len(self._waiting) else done
        kept = max(len(self._values) - (base - self._base), 0)
        self._values[:kept] = self._values[len(self._values) - kept :]
        self._values[kept:] = 0.0
        self._base = base
