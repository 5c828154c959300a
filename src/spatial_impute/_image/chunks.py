"""Decoded chunks of an image, kept while neighbouring windows ask for them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np

from spatial_impute._image.levels import read_window, to_rgb

if TYPE_CHECKING:
    from spatial_impute._image.levels import Level

_LIMIT = 2**28  # bytes, where windows come in any order: two rows of 2048 px chunks of a slide 20,000 px wide
_STRIPE = 2**26  # bytes, where they come in stripes; a slide of 5,000 px has more, so that larger ones take no more


class ChunkCache:
    """Least recently used chunks of one resolution of an image.

    Windows that are taken in stripes (see :meth:`stripe`) then decode each chunk at most twice, and keep no more for a
    wider slide. A copy for another process starts empty.
    """

    def __init__(self, limit: int = _LIMIT) -> None:
        self.limit = limit
        self._forget()

    def _forget(self) -> None:
        self._chunks: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"limit": self.limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.limit = state["limit"]
        self._forget()

    def read(self, level: Level, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        """Pixels [y0, y1) x [x0, x1) as (y, x, 3) float32 in 0-255."""
        if not hasattr(level.data.data, "chunks"):
            return read_window(level, y0, y1, x0, x1)
        edges_y, edges_x = (np.concatenate([[0], np.cumsum(c)]) for c in level.data.data.chunks[1:])
        out = None
        for i in range(np.searchsorted(edges_y, y0, "right") - 1, np.searchsorted(edges_y, y1, "left")):
            for j in range(np.searchsorted(edges_x, x0, "right") - 1, np.searchsorted(edges_x, x1, "left")):
                chunk = self._chunk(level, int(i), int(j))
                if out is None:
                    out = np.empty((chunk.shape[0], y1 - y0, x1 - x0), chunk.dtype)
                top, bottom = max(y0, edges_y[i]), min(y1, edges_y[i + 1])
                left, right = max(x0, edges_x[j]), min(x1, edges_x[j + 1])
                out[:, top - y0 : bottom - y0, left - x0 : right - x0] = chunk[
                    :, top - edges_y[i] : bottom - edges_y[i], left - edges_x[j] : right - edges_x[j]
                ]
        return to_rgb(out, level.white)

    def _chunk(self, level: Level, i: int, j: int) -> np.ndarray:
        with self._lock:  # two threads must not decode the same chunk
            if (i, j) in self._chunks:
                self._chunks.move_to_end((i, j))
                return self._chunks[i, j]
            # Threads of dask inside those of a worker can deadlock.
            chunk = np.asarray(level.data.data.blocks[:, i, j].compute(scheduler="synchronous"))
            self._chunks[i, j] = chunk
            self._bytes += chunk.nbytes
            while self._bytes > self.limit and len(self._chunks) > 1:
                self._bytes -= self._chunks.popitem(last=False)[1].nbytes
            return chunk

    def stripe(self, level: Level, core: int, halo: int) -> int:
        """Keep what is needed to take windows row by row, in stripes.

        Parameters
        ----------
        level
            Resolution that is read.
        core, halo
            Windows begin `core` pixels of the level apart, and reach `halo` further on each side.

        Returns
        -------
        Pixels of the level across which windows may be taken row by row.
        """
        chunks = getattr(level.data.data, "chunks", None)
        if chunks is None:
            return level.shape[1]
        height, width = max(chunks[1]), max(chunks[2])
        window = core + 2 * halo
        n_rows = -(-window // height) + 1
        per_column = n_rows * height * level.data.sizes["c"] * level.data.dtype.itemsize
        around = 2 * halo + 2 * width  # windows reach out of the stripe, and end anywhere in a chunk
        least = window + width  # or a chunk would lie in three stripes
        self.limit = max(_STRIPE, per_column * (least + around))
        return self.limit // per_column - around
