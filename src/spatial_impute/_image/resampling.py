"""An image at the resolution of a model: windows resampled from its pyramid, and an overview of the slide."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from math import lcm
from typing import TYPE_CHECKING, Any

import numpy as np

from spatial_impute._geometry import apply_affine, lies_on, scaling
from spatial_impute._image.levels import (
    area_means,
    best_level,
    decode,
    read_thumbnail,
    require_colors,
    stored_pixels,
    to_rgb,
    whole_factor,
)
from spatial_impute._image.tissue import optical_density, tissue_mask
from spatial_impute._settings import compiled

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spatial_impute._image.levels import Level

_COLORED = 0.85  # the palest channel of glass is at least this share of the brightest
_OVERVIEW = 16.0  # um per pixel; fine enough for tissue and for the mean stain
_WHITE = 255.0
_MAX_ENLARGEMENT = 2.0  # an image a little coarser than the training images of the encoder does little harm
_LIMIT = 2**28  # bytes, where windows come in any order: two rows of 2048 px chunks of a slide 20,000 px wide
_STRIPE = 2**27  # bytes, where they come in stripes; larger slides take no more


class ChunkCache:
    """Cache of the decoded chunks of one resolution of an image; the least recently used ones are dropped.

    Windows in stripes (see :meth:`stripe`) decode each chunk at most twice, in memory that does not grow with the
    slide. A copy for another process starts empty.
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
        """Pixels [y0, y1) x [x0, x1) as they are stored, (c, y, x)."""
        if not hasattr(level.data.data, "chunks"):
            return stored_pixels(level, y0, y1, x0, x1)
        edges_y, edges_x = (np.concatenate([[0], np.cumsum(c)]) for c in level.data.data.chunks[1:])
        first_y, first_x = (np.searchsorted(e, v, "right") - 1 for e, v in ((edges_y, y0), (edges_x, x0)))
        last_y, last_x = np.searchsorted(edges_y, y1, "left"), np.searchsorted(edges_x, x1, "left")
        out = decode(np.empty((level.data.sizes["c"], y1 - y0, x1 - x0), level.data.dtype))
        for i in range(first_y, last_y):
            for j in range(first_x, last_x):
                chunk = self._chunk(level, int(i), int(j))
                top, bottom = max(y0, edges_y[i]), min(y1, edges_y[i + 1])
                left, right = max(x0, edges_x[j]), min(x1, edges_x[j + 1])
                out[:, top - y0 : bottom - y0, left - x0 : right - x0] = chunk[
                    :, top - edges_y[i] : bottom - edges_y[i], left - edges_x[j] : right - edges_x[j]
                ]
        return out

    def _chunk(self, level: Level, i: int, j: int) -> np.ndarray:
        with self._lock:  # two threads must not decode the same chunk
            if (i, j) in self._chunks:
                self._chunks.move_to_end((i, j))
                return self._chunks[i, j]
            chunk = decode(level.data.data.blocks[:, i, j])
            self._chunks[i, j] = chunk
            self._bytes += chunk.nbytes
            while self._bytes > self.limit and len(self._chunks) > 1:
                self._bytes -= self._chunks.popitem(last=False)[1].nbytes
            return chunk

    def stripe(self, level: Level, core: int, halo: int, beyond: int) -> int:
        """Set the limit for windows that are read row by row within stripes; returns the width of a stripe in pixels.

        Windows begin `core` pixels of the level apart, and reach `halo` further on each side; those at the borders of a
        stripe `beyond` more.
        """
        chunks = getattr(level.data.data, "chunks", None)
        if chunks is None:
            return level.shape[1]
        height, width = max(chunks[1]), max(chunks[2])
        window = core + 2 * halo
        n_rows = -(-window // height) + 1
        per_column = n_rows * height * level.data.sizes["c"] * level.data.dtype.itemsize
        around = 2 * (halo + beyond) + 2 * width  # windows reach out of the stripe, and end anywhere in a chunk
        least = window + width  # or a chunk would lie in three stripes
        self.limit = max(_STRIPE, per_column * (least + around))
        return self.limit // per_column - around


@dataclass(frozen=True)
class ResampledImage:
    """Pixels of a fixed size over an image; axes parallel to those of the image, origin at its corner.

    The value of a pixel does not depend on the window in which it is read.
    """

    level: Level  # Resolution it is read from
    step: tuple[float, float]  # Pixels of the level per resampled pixel, y and x
    shape: tuple[int, int]  # (height, width) in resampled pixels
    to_um: np.ndarray  # (3, 3) affine from resampled pixel corners to the section frame

    cache: ChunkCache = field(default_factory=ChunkCache, compare=False, repr=False)  # Decoded chunks

    def stripe(self, core: int, halo: int, beyond: int) -> int:
        """Width of a stripe, all in resampled pixels; see :meth:`ChunkCache.stripe`."""
        sizes = (math.ceil(n * max(self.step)) for n in (core, halo, beyond))
        return int(self.cache.stripe(self.level, *sizes) / self.step[1])

    @property
    def from_um(self) -> np.ndarray:
        """Inverse of `to_um`."""
        return np.linalg.inv(self.to_um)

    def window(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        """Pixels [y0, y1) x [x0, x1) as (3, y, x) float32 in 0-255; white beyond the image."""
        out = np.full((3, y1 - y0, x1 - x0), _WHITE, np.float32)
        top, bottom = max(y0, 0), min(y1, self.shape[0])
        left, right = max(x0, 0), min(x1, self.shape[1])
        if top < bottom and left < right:
            out[:, top - y0 : bottom - y0, left - x0 : right - x0] = self._read(top, bottom, left, right)
        return out

    def _read(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        height, width = self.level.shape
        mean_y, mean_x = (max(1, int(s + 1e-6)) for s in self.step)  # whole pixels are averaged, the rest is bilinear
        rows = _neighbors(np.arange(y0, y1), self.step[0] / mean_y, height // mean_y)
        columns = _neighbors(np.arange(x0, x1), self.step[1] / mean_x, width // mean_x)
        top, bottom, left, right = rows[0][0], rows[1][-1] + 1, columns[0][0], columns[1][-1] + 1
        stored = self.cache.read(self.level, top * mean_y, bottom * mean_y, left * mean_x, right * mean_x)
        means = area_means(to_rgb(stored, self.level), mean_y, mean_x)
        pixels = np.ascontiguousarray(means.transpose(2, 0, 1))
        pixels = _blend(pixels, rows, top, axis=1)
        return _blend(pixels, columns, left, axis=2)


def _neighbors(where: np.ndarray, step: float, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Source pixels before and after the centres of resampled pixels, and the weight of the latter."""
    u = np.clip((where + 0.5) * step - 0.5, 0, n - 1)
    before = np.floor(u + 1e-9).astype(np.intp)  # a centre on a centre needs one source pixel, not two
    return before, np.minimum(before + 1, n - 1), np.maximum(u - before, 0).astype(np.float32)


def _blend(
    pixels: np.ndarray, neighbors: tuple[np.ndarray, np.ndarray, np.ndarray], first: int, *, axis: int
) -> np.ndarray:
    before, after, weight = neighbors
    if not weight.any():
        start = before[0] - first
        if np.array_equal(before, np.arange(before[0], before[0] + len(before))):  # a slice costs no copy
            return pixels[:, start : start + len(before)] if axis == 1 else pixels[:, :, start : start + len(before)]
        return pixels.take(before - first, axis=axis)
    weight = weight[:, None] if axis == 1 else weight
    low = pixels.take(before - first, axis=axis)
    return low + (pixels.take(after - first, axis=axis) - low) * weight


def resampled_image(levels: list[Level], resolution: float) -> ResampledImage:
    """Image at `resolution` um per pixel, read from the coarsest level that is fine enough.

    Raises a ``ValueError`` if the image is much coarser than that.
    """
    level = best_level(levels, resolution)
    if level.pixel_size > _MAX_ENLARGEMENT * resolution:
        msg = (
            f"The image has {level.pixel_size:g} um per pixel, but the model works at {resolution:g}: the details it "
            "needs are not in the image. Check `mpp`, use the full-resolution image, or fit at another `resolution` "
            f"(`model_params={{'resolution': {level.pixel_size:g}}}`)."
        )
        raise ValueError(msg)
    size_x, size_y = np.linalg.norm(level.to_um[:2, :2], axis=0)  # um per pixel of the level
    step_y, step_x = (_whole(resolution / size) for size in (size_y, size_x))
    height, width = level.shape
    shape = max(1, int(height / step_y + 1e-6)), max(1, int(width / step_x + 1e-6))
    # An image smaller than a resampled pixel still has one.
    return ResampledImage(
        level, (min(step_y, height), min(step_x, width)), shape, level.to_um @ scaling(step_x, step_y)
    )


def _whole(step: float) -> float:
    """Undo rounding errors: a step that is a whole number reads pixels as they are."""
    return float(round(step)) if abs(step - round(step)) < 1e-6 * step else step


@dataclass(frozen=True)
class SlideOverview:
    """Tissue and stain of a whole slide, from a thumbnail."""

    tissue: np.ndarray  # (y, x) bool
    to_um: np.ndarray  # (3, 3) affine from its pixel corners to the section frame
    background: tuple[float, ...]  # Color of the glass in 0-255
    density: tuple[float, ...]  # Mean optical density of the tissue in r, g, b

    def covers(self, points: np.ndarray) -> np.ndarray:
        """(n,) bool: points (n, 2) in um that lie on tissue."""
        return lies_on(self.tissue, apply_affine(points, np.linalg.inv(self.to_um)))


def slide_overview(levels: list[Level]) -> SlideOverview:
    """Overview of a slide. If no tissue is visible, the whole slide counts as tissue.

    Where tissue fills the image, its palest places would be taken for glass. They are colored, glass is not: white is then the
    color of the glass. Else only what is darker than these places would count as stain, and the stain of such slides could
    not be compared.
    """
    rgb, to_um = read_thumbnail(levels, _OVERVIEW)
    mask = tissue_mask(rgb, np.linalg.norm(to_um[:2, :2], axis=0))
    if not mask.any():
        mask = np.ones_like(mask)
    density = optical_density(rgb)
    # The color that optical_density used for the glass: rgb = glass * exp(-density).
    glass = np.median((rgb * np.exp(density)).reshape(-1, 3), axis=0)
    if glass.min() < _COLORED * glass.max():
        glass = np.full(3, _WHITE)
        density = -np.log(np.maximum(rgb, 1.0) / _WHITE)
    stained = np.maximum(density[mask].mean(axis=0), 1e-3)
    return SlideOverview(mask, to_um, tuple(map(float, np.clip(glass, 1, 255))), tuple(map(float, stained)))


_TILE = 1024  # px; a tile of three such channels is 3 MiB, and no smaller than the usual chunk
# A patch belongs to the tile of its upper left corner, and tiles are walked row by row: that tile and those to the
# right and below are in use. Every tile is then read for its own row and for the one above, and no more.
_TILES_KEPT = 4


def iter_patches(
    levels: list[Level], centers: np.ndarray, side: float, n_px: int, *, batch_size: int = 128
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Square patches of `n_px` pixels and `side` um around points (n, 2) in um, in batches of up to `batch_size`.

    Yields rows of `centers`, and their patches (m, n_px, n_px, 3), float32 in 0-255, bilinear at the pixel centres; the rim
    is repeated beyond the image. Edges are parallel to the axes of the section frame. Patches are read tile by tile from
    the coarsest level that is fine enough; a level much finer than that is averaged by whole pixels first. Memory is
    bounded by a few tiles and a batch.
    """
    if not len(centers):
        return
    source = _AveragedLevel(best_level(levels, side / n_px), side / n_px)
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


class _AveragedLevel:
    """Windows of one level, averaged over whole pixels where it is far too fine; the latest chunks are kept."""

    def __init__(self, level: Level, pixel_size: float) -> None:
        height, width = level.shape
        self._level = level
        self.white = level.white
        # Without the means, samples would skip pixels of the level: noise and false texture.
        self._factor = whole_factor(level, pixel_size)
        self.to_um = level.to_um @ scaling(float(self._factor))
        self.height, self.width = height // self._factor, width // self._factor
        chunks = getattr(level.data.data, "chunks", ((), (1,), (1,)))  # an array in memory can be cut anywhere
        edge = lcm(max(min(chunks[1][0], height), min(chunks[2][0], width)), self._factor)
        edge *= max(1, _TILE // edge)
        self.edge = edge // self._factor
        """Edge of a tile in averaged px: as many whole chunks as make `_TILE` px of the level, and whole averages."""
        self._cache = ChunkCache(_TILES_KEPT * edge**2 * level.data.sizes["c"] * level.data.dtype.itemsize)

    def window(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        """Pixels [y0, y1) x [x0, x1) as (3 or 1, y, x)."""
        f = self._factor
        data = require_colors(self._cache.read(self._level, y0 * f, y1 * f, x0 * f, x1 * f), self._level)
        if f == 1:
            # Always contiguous: another memory layout would be compiled for once more, which takes seconds.
            return np.ascontiguousarray(data)
        averaged = np.empty((len(data), y1 - y0, x1 - x0), dtype=np.float32)
        _average(data, averaged)
        return averaged


@compiled(nogil=True)
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


@compiled(nogil=True)
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
