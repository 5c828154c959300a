"""An image at the resolution of a model: windows resampled from its pyramid, and an overview of the slide."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from spatial_impute._geometry import apply_affine, scaling
from spatial_impute._image.levels import area_means, best_level, decode, read_thumbnail, read_window, to_rgb
from spatial_impute._image.tissue import optical_density, tissue_mask

if TYPE_CHECKING:
    from spatial_impute._image.levels import Level

_OVERVIEW = 16.0  # um per pixel; fine enough for tissue and for the mean stain
_WHITE = 255.0
_MAX_ENLARGEMENT = 2.0  # an image a little coarser than the training images of the encoder does little harm
_LIMIT = 2**28  # bytes, where windows come in any order: two rows of 2048 px chunks of a slide 20,000 px wide
_STRIPE = 2**26  # bytes, where they come in stripes; a slide of 5,000 px has more, so that larger ones take no more


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
        """Pixels [y0, y1) x [x0, x1) as (y, x, 3) float32 in 0-255."""
        if not hasattr(level.data.data, "chunks"):
            return read_window(level, y0, y1, x0, x1)
        edges_y, edges_x = (np.concatenate([[0], np.cumsum(c)]) for c in level.data.data.chunks[1:])
        first_y, first_x = (np.searchsorted(e, v, "right") - 1 for e, v in ((edges_y, y0), (edges_x, x0)))
        last_y, last_x = np.searchsorted(edges_y, y1, "left"), np.searchsorted(edges_x, x1, "left")
        out = np.empty((level.data.sizes["c"], y1 - y0, x1 - x0), level.data.dtype)
        for i in range(first_y, last_y):
            for j in range(first_x, last_x):
                chunk = self._chunk(level, int(i), int(j))
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
            chunk = decode(level.data.data.blocks[:, i, j])
            self._chunks[i, j] = chunk
            self._bytes += chunk.nbytes
            while self._bytes > self.limit and len(self._chunks) > 1:
                self._bytes -= self._chunks.popitem(last=False)[1].nbytes
            return chunk

    def stripe(self, level: Level, core: int, halo: int) -> int:
        """Set the limit for windows that are read row by row within stripes; returns the width of a stripe in pixels.

        Windows begin `core` pixels of the level apart, and reach `halo` further on each side.
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


@dataclass(frozen=True)
class ResampledImage:
    """Pixels of a fixed size over an image; axes parallel to those of the image, origin at its corner.

    The value of a pixel does not depend on the window in which it is read.
    """

    level: Level
    """Resolution it is read from."""
    step: tuple[float, float]
    """Pixels of the level per resampled pixel, y and x."""
    shape: tuple[int, int]
    """(height, width) in resampled pixels."""
    to_um: np.ndarray
    """(3, 3) affine from resampled pixel corners to the section frame."""

    cache: ChunkCache = field(default_factory=ChunkCache, compare=False, repr=False)
    """Decoded chunks."""

    def stripe(self, core: int, halo: int) -> int:
        """Width of a stripe in resampled pixels for windows of `core` and `halo`; see :meth:`ChunkCache.stripe`."""
        step = max(self.step)
        return int(self.cache.stripe(self.level, math.ceil(core * step), math.ceil(halo * step)) / self.step[1])

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
        rows = _neighbours(np.arange(y0, y1), self.step[0] / mean_y, height // mean_y)
        columns = _neighbours(np.arange(x0, x1), self.step[1] / mean_x, width // mean_x)
        top, bottom, left, right = rows[0][0], rows[1][-1] + 1, columns[0][0], columns[1][-1] + 1
        pixels = self.cache.read(self.level, top * mean_y, bottom * mean_y, left * mean_x, right * mean_x)
        pixels = np.ascontiguousarray(area_means(pixels, mean_y, mean_x).transpose(2, 0, 1))
        pixels = _blend(pixels, rows, top, axis=1)
        return _blend(pixels, columns, left, axis=2)


def _neighbours(where: np.ndarray, step: float, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Source pixels before and after the centres of resampled pixels, and the weight of the latter."""
    u = np.clip((where + 0.5) * step - 0.5, 0, n - 1)
    before = np.floor(u + 1e-9).astype(np.intp)  # a centre on a centre needs one source pixel, not two
    return before, np.minimum(before + 1, n - 1), np.maximum(u - before, 0).astype(np.float32)


def _blend(
    pixels: np.ndarray, neighbours: tuple[np.ndarray, np.ndarray, np.ndarray], first: int, *, axis: int
) -> np.ndarray:
    before, after, weight = neighbours
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

    tissue: np.ndarray
    """(y, x) bool."""
    to_um: np.ndarray
    """(3, 3) affine from its pixel corners to the section frame."""
    background: tuple[float, float, float]
    """Color of the glass in 0-255."""
    density: tuple[float, float, float]
    """Mean optical density of the tissue in r, g, b."""

    def covers(self, points: np.ndarray) -> np.ndarray:
        """(n,) bool: points (n, 2) in um that lie on tissue."""
        x, y = np.floor(apply_affine(points, np.linalg.inv(self.to_um))).astype(int).T
        height, width = self.tissue.shape
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        found = np.zeros(len(points), bool)
        found[inside] = self.tissue[y[inside], x[inside]]
        return found


def slide_overview(levels: list[Level]) -> SlideOverview:
    """Overview of a slide. If no tissue is visible, the whole slide counts as tissue."""
    rgb, to_um = read_thumbnail(levels, _OVERVIEW)
    size_x, size_y = np.linalg.norm(to_um[:2, :2], axis=0)
    mask = tissue_mask(rgb, (size_x, size_y))
    if not mask.any():
        mask = np.ones_like(mask)
    density = optical_density(rgb)
    stained = np.maximum(density[mask].mean(axis=0), 1e-3)
    # The color that optical_density used for the glass: rgb = glass * exp(-density).
    glass = np.median((rgb * np.exp(density)).reshape(-1, 3), axis=0)
    red, green, blue = map(float, np.clip(glass, 1, 255))
    r, g, b = map(float, stained)
    return SlideOverview(mask, to_um, background=(red, green, blue), density=(r, g, b))
