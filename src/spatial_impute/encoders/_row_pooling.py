"""Fields of view pooled while their section is still being encoded, so that only a band of its lattice is in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from spatial_impute.encoders._pooling import NO_AREA, Lattice, box_weights, pool_fields

if TYPE_CHECKING:
    from collections.abc import Sequence


class RollingLattice:
    """Features on the cells of a lattice; spots are described, and rows dropped, as soon as nothing is missing.

    Blocks of cells may come in any order. Memory is small when they come roughly from top to bottom, as tiles of an
    image do: it then holds the rows that the fields of a spot touch, and those of a tile.

    Parameters
    ----------
    step
        Edge of a cell, um.
    first, known
        (row, column) of the first cell; (rows, columns) bool, cells that will be encoded.
    centers
        (n, 2) middles of the spots, um.
    fields
        Per kind of field, its middle relative to the spot (x, y) and its edge length, um.
    block
        Cells along the edge of a block.
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
        self._missing = wanted.sum(axis=1)  # blocks still to come, per row of blocks
        self._top, self._end = self._row_spans()
        self._waiting = np.argsort(self._end, kind="stable")
        self._base = 0  # lattice row of the first row in memory
        self._values: np.ndarray | None = None
        self._pooled: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, corners: np.ndarray, blocks: np.ndarray) -> None:
        """Take the features of blocks, (n, block, block, d), whose first cells are `corners` (n, 2)."""
        if self._values is None:
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
        """Mean and spread, (n, d) float32 each, per kind of field; all blocks must have come."""
        self._pool_ready()
        return self._pooled

    def _row_spans(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows [top, end) of the lattice without which a spot cannot be described."""
        n_rows, n_columns = self._known.shape
        origin = np.array([self._first[1], self._first[0]], dtype=float)
        top, end = np.full(len(self._centers), n_rows), np.zeros(len(self._centers), dtype=np.int64)
        area = np.zeros((n_rows + 1, n_columns + 1))
        area[1:, 1:] = self._known.cumsum(axis=0).cumsum(axis=1)
        cells: np.ndarray | None = None
        for shift, side in self._fields:
            middle, half = (self._centers + shift) / self._step - origin, side / (2 * self._step)
            top = np.minimum(top, np.floor(middle[:, 1] - half).astype(np.int64))
            end = np.maximum(end, np.ceil(middle[:, 1] + half).astype(np.int64))
            weight = box_weights(area.shape, middle - half, middle + half) @ area.ravel()
            for i in np.flatnonzero(weight <= NO_AREA):
                # Beyond the image: the field takes the nearest cell, which must not be dropped before.
                cells = np.argwhere(self._known) if cells is None else cells
                row = cells[((cells - (middle[i, ::-1] - 0.5)) ** 2).sum(axis=1).argmin(), 0]
                top[i], end[i] = min(top[i], row), max(end[i], row + 1)
        return np.clip(top, 0, n_rows), np.clip(end, 0, n_rows)

    def _make_room(self, row: int) -> None:
        """Extend the rows in memory to a block that begins at `row`, after dropping those that are done with."""
        # A new row of blocks begins: mostly that of a new row of tiles, when most of the spots above are complete.
        self._pool_ready()
        needed = row + self._block - self._base
        if needed > len(self._values):
            # Grows in place, with zeros; a copy would double the band for a moment.
            self._values.resize((needed, *self._values.shape[1:]), refcheck=False)

    def _pool_ready(self) -> None:
        incomplete = np.flatnonzero(self._missing)
        done = min(int(incomplete[0]) * self._block if len(incomplete) else len(self._known), len(self._known))
        n_ready = int(np.searchsorted(self._end[self._waiting], done, side="right"))
        if not n_ready or done <= self._base:
            return
        ready, self._waiting = self._waiting[:n_ready], self._waiting[n_ready:]
        known = self._known[self._base : done]
        values = self._values[: done - self._base, :]
        if len(values) < len(known):  # rows without any known cell at the end were never made
            known = known[: len(values)]
        lattice = Lattice(self._step, (self._first[0] + self._base, self._first[1]), values, known)
        fields = [(self._centers[ready] + shift, side) for shift, side in self._fields]
        for (mean, spread), (new_mean, new_spread) in zip(self._pooled, pool_fields(lattice, fields), strict=True):
            mean[ready], spread[ready] = new_mean, new_spread
        base = min(int(self._top[self._waiting].min()), done) if len(self._waiting) else done
        kept = max(len(self._values) - (base - self._base), 0)
        self._values[:kept] = self._values[len(self._values) - kept :]
        self._values[kept:] = 0.0
        self._base = base
