"""Square patches of an image, resampled to a fixed pixel size; each chunk of the file is decoded at most twice."""

from __future__ import annotations

from collections import OrderedDict
from math import lcm
from typing import TYPE_CHECKING

import numba
import numpy as np

from spatial_impute._geometry import apply_affine, scaling
from spatial_impute._image.levels import best_level, require_colors, stored_pixels, whole_factor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spatial_impute._image.levels import Level

_TILE = 1024  # px; a tile of three such channels is 3 MiB, and no smaller than the usual chunk
# A patch belongs to the tile of its upper left corner, and tiles are walked row by row: that tile and those to the
# right and below are in use. Every tile is then read for its own row and for the one above, and no more.
_TILES_KEPT = 4


def iter_patches(
    levels: list[Level], centers: np.ndarray, side: float, n_px: int, *, batch_size: int = 128
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Square patches of `n_px` pixels and `side` um around points (n, 2) in um, in batches of up to `batch_size`.

    Edges are parallel to the axes of the section frame. Patches are read tile by tile from the coarsest level that is
    fine enough; a level much finer than that is averaged by whole pixels first. Memory is bounded by a few tiles and a
    batch.

    Yields
    ------
    index
        Rows of `centers` in this batch.
    patches
        (len(index), n_px, n_px, 3) float32 in 0-255, bilinear at the pixel centres; the rim is repeated beyond the
        image.
    """
    if not len(centers):
        return
    source = _Tiles(best_level(levels, side / n_px), side / n_px)
    # Index of a source pixel = matrix @ (um, 1); the centre of pixel i lies at i + 0.5.
    matrix = np.linalg.inv(source.to_um)
    step = matrix[:2, :2] * (side / n_px)
    half = (n_px - 1) / 2
    first = apply_affine(centers, matrix) - 0.5 - step @ [half, half]  # the patch's pixel (0, 0)
    spans = np.array([[0, 0], [n_px - 1, 0], [0, n_px - 1], [n_px - 1, n_px - 1]]) @ step.T
    limit = np.array([source.width - 1, source.height - 1], dtype=float)
    low = np.floor(np.clip(first + spans.min(axis=0), 0, limit)).astype(np.int64)
    high = np.minimum(np.floor(np.clip(first + spans.max(axis=0), 0, limit)) + 2, limit + 1).astype(np.int64)
    tile = low // source.edge
    order = np.lexsort((tile[:, 0], tile[:, 1]))
    starts = np.flatnonzero(np.r_[True, np.any(np.diff(tile[order], axis=0), axis=1)])
    for index in np.split(order, starts[1:]):
        (x0, y0), (x1, y1) = low[index].min(axis=0), high[index].max(axis=0)
        window = source.window(y0, y1, x0, x1)
        for start in range(0, len(index), batch_size):
            rows = index[start : start + batch_size]
            patches = np.empty((len(rows), n_px, n_px, 3), dtype=np.float32)
            origin = np.array([x0, y0], dtype=float)
            _sample(window, first[rows] - origin, step, np.stack([-origin, limit - origin]), patches)
            if source.white != 255.0:
                patches *= np.float32(255.0 / source.white)
            yield rows, patches


class _Tiles:
    """Tiles of one level, averaged over whole pixels where it is far too fine; the latest ones are kept."""

    def __init__(self, level: Level, pixel_size: float) -> None:
        height, width = level.shape
        self._level = level
        self.white = level.white
        # Without the means, samples would skip pixels of the level: noise and false texture.
        self._factor = whole_factor(level, pixel_size)
        self.to_um = level.to_um @ scaling(float(self._factor))
        self.height, self.width = height // self._factor, width // self._factor
        chunks = level.data.data.chunks[1:] if hasattr(level.data.data, "chunks") else ((height,), (width,))
        chunk = max(min(chunks[0][0], height), min(chunks[1][0], width))
        if not hasattr(level.data.data, "chunks"):
            chunk = 1  # an array in memory can be cut anywhere
        edge = lcm(chunk, self._factor)
        self.edge = edge * max(1, _TILE // edge) // self._factor
        """Edge of a tile in averaged px: as many whole chunks as make `_TILE` px of the level, and whole averages."""
        self._kept: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def window(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        """Pixels [y0, y1) x [x0, x1) as (3 or 1, y, x)."""
        rows, columns = range(y0 // self.edge, -(-y1 // self.edge)), range(x0 // self.edge, -(-x1 // self.edge))
        parts = [[self._tile(row, column) for column in columns] for row in rows]
        left = columns[0] * self.edge
        cut = []
        for row, line in zip(rows, parts, strict=True):
            low, high = max(y0 - row * self.edge, 0), y1 - row * self.edge
            cut.append(np.concatenate([part[:, low:high] for part in line], axis=2)[:, :, x0 - left : x1 - left])
        # Always contiguous: another memory layout would be compiled for once more, which takes seconds.
        return np.ascontiguousarray(cut[0]) if len(cut) == 1 else np.concatenate(cut, axis=1)

    def _tile(self, row: int, column: int) -> np.ndarray:
        key = (row, column)
        if key not in self._kept:
            while len(self._kept) >= _TILES_KEPT:
                self._kept.popitem(last=False)
            self._kept[key] = self._read(row, column)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _read(self, row: int, column: int) -> np.ndarray:
        f = self._factor
        y0, x0 = row * self.edge, column * self.edge
        y1, x1 = min(y0 + self.edge, self.height), min(x0 + self.edge, self.width)
        data = require_colors(stored_pixels(self._level, y0 * f, y1 * f, x0 * f, x1 * f), self.white)
        if f == 1:
            return np.ascontiguousarray(data)
        averaged = np.empty((len(data), y1 - y0, x1 - x0), dtype=np.float32)
        _average(data, averaged)
        return averaged


@numba.njit(cache=True, nogil=True)
def _average(image: np.ndarray, out: np.ndarray) -> None:
    """Means of square blocks of (c, y, x); the size of `out` fixes the size of a block."""
    factor = image.shape[1] // out.shape[1]
    weight = np.float32(1.0 / factor**2)
    for c in range(out.shape[0]):
        for i in range(out.shape[1]):
            for j in range(out.shape[2]):
                out[c, i, j] = 0.0
            for k in range(i * factor, (i + 1) * factor):
                for j in range(out.shape[2]):
                    total = np.float32(0)
                    for m in range(j * factor, (j + 1) * factor):
                        total += np.float32(image[c, k, m])
                    out[c, i, j] += total * weight


@numba.njit(cache=True, nogil=True)
def _sample(window: np.ndarray, first: np.ndarray, step: np.ndarray, bounds: np.ndarray, out: np.ndarray) -> None:
    """Bilinear samples of `window` (c, y, x) for patches whose pixel (0, 0) is `first`; beyond `bounds` the rim."""
    n_px = out.shape[1]
    bottom_most, right_most = window.shape[1] - 1, window.shape[2] - 1
    one = np.float32(1)
    upright = step[0, 1] == 0.0 and step[1, 0] == 0.0  # then a row of pixels lies on two rows of the window
    lefts, parts = np.empty(n_px, np.int64), np.empty(n_px, np.float32)
    for n in range(out.shape[0]):
        if upright:
            for j in range(n_px):
                x = min(max(first[n, 0] + step[0, 0] * j, bounds[0, 0]), bounds[1, 0])
                lefts[j] = int(x)
                parts[j] = np.float32(x - lefts[j])
            for i in range(n_px):
                y = min(max(first[n, 1] + step[1, 1] * i, bounds[0, 1]), bounds[1, 1])
                top = int(y)
                bottom, fy = min(top + 1, bottom_most), np.float32(y - top)
                for k in range(3):
                    source = k if window.shape[0] > 1 else 0
                    upper, lower = window[source, top], window[source, bottom]
                    for j in range(n_px):
                        left = lefts[j]
                        right, fx = min(left + 1, right_most), parts[j]
                        above = upper[left] * (one - fx) + upper[right] * fx
                        below = lower[left] * (one - fx) + lower[right] * fx
                        out[n, i, j, k] = above * (one - fy) + below * fy
            continue
        for i in range(n_px):
            for j in range(n_px):
                x = first[n, 0] + step[0, 0] * j + step[0, 1] * i
                y = first[n, 1] + step[1, 0] * j + step[1, 1] * i
                x = min(max(x, bounds[0, 0]), bounds[1, 0])
                y = min(max(y, bounds[0, 1]), bounds[1, 1])
                left, top = int(x), int(y)
                right, bottom = min(left + 1, right_most), min(top + 1, bottom_most)
                fx, fy = np.float32(x - left), np.float32(y - top)
                for k in range(3):
                    source = k if window.shape[0] > 1 else 0
                    above = window[source, top, left] * (one - fx) + window[source, top, right] * fx
                    below = window[source, bottom, left] * (one - fx) + window[source, bottom, right] * fx
                    out[n, i, j, k] = above * (one - fy) + below * fy
