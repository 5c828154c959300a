"""An image at the resolution a model works at: pixels resampled from its pyramid, any window at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from spatial_impute._geometry import scaling
from spatial_impute._image.chunks import ChunkCache
from spatial_impute._image.levels import best_level, read_thumbnail
from spatial_impute._image.tissue import optical_density, tissue_mask

if TYPE_CHECKING:
    from spatial_impute._image.levels import Level

_SURVEY = 16.0  # um per pixel; tissue and the mean stain need no more
_WHITE = 255.0
_MAX_ENLARGEMENT = 2.0  # a little coarser than the encoder was trained on does little harm


@dataclass(frozen=True)
class WorkingImage:
    """Pixels of a fixed size over an image, axes parallel to those of the image, origin at its corner.

    Which value a pixel has does not depend on the window it is read with.
    """

    level: Level
    """Resolution it is read from."""
    step: tuple[float, float]
    """Pixels of the level per working pixel, y and x."""
    shape: tuple[int, int]
    """(height, width) in working pixels."""
    to_um: np.ndarray
    """(3, 3) affine from working pixel corners to the section frame."""

    cache: ChunkCache = field(default_factory=ChunkCache, compare=False, repr=False)
    """Decoded chunks."""

    def stripe(self, core: int, halo: int) -> int:
        """Working pixels across which windows of `core` and `halo` are to be taken row by row; see the cache."""
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
        if mean_y > 1 or mean_x > 1:
            pixels = pixels.reshape(bottom - top, mean_y, right - left, mean_x, 3).mean(axis=(1, 3))
        pixels = np.ascontiguousarray(pixels.transpose(2, 0, 1))
        pixels = _blend(pixels, rows, top, axis=1)
        return _blend(pixels, columns, left, axis=2)


def _neighbours(where: np.ndarray, step: float, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Source pixels before and after the centres of working pixels, and the weight of the latter."""
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


def working_image(levels: list[Level], resolution: float) -> WorkingImage:
    """Image at `resolution` um per pixel, read from the coarsest level that is fine enough.

    Raises
    ------
    ValueError
        If the image is so coarse that its pixels would have to be invented.
    """
    level = best_level(levels, resolution)
    if level.pixel_size > _MAX_ENLARGEMENT * resolution:
        msg = (
            f"The image has {level.pixel_size:g} um per pixel, the model works at {resolution:g}: what it looks for cannot "
            "be seen. Check `mpp`, use the full-resolution image, or fit at another `resolution` "
            f"(`model_params={{'resolution': {level.pixel_size:g}}}`)."
        )
        raise ValueError(msg)
    size_x, size_y = np.linalg.norm(level.to_um[:2, :2], axis=0)  # um per pixel of the level
    step_y, step_x = (_whole(resolution / size) for size in (size_y, size_x))
    height, width = level.shape
    shape = max(1, int(height / step_y + 1e-6)), max(1, int(width / step_x + 1e-6))
    # Images smaller than a working pixel still have one.
    return WorkingImage(level, (min(step_y, height), min(step_x, width)), shape, level.to_um @ scaling(step_x, step_y))


def _whole(step: float) -> float:
    """Undo rounding: a step that is a whole number but for it reads pixels as they are."""
    return float(round(step)) if abs(step - round(step)) < 1e-6 * step else step


@dataclass(frozen=True)
class Survey:
    """What a model wants to know of a slide as a whole, from a thumbnail: where tissue is, and how it is stained."""

    tissue: np.ndarray
    """(y, x) bool."""
    to_um: np.ndarray
    """(3, 3) affine from its pixel corners to the section frame."""
    background: tuple[float, float, float]
    """Colour of the glass in 0-255."""
    density: tuple[float, float, float]
    """Mean optical density of the tissue in r, g, b."""

    def covers(self, points: np.ndarray) -> np.ndarray:
        """Whether points (n, 2) in um lie on tissue."""
        where = np.linalg.inv(self.to_um)
        x, y = np.floor(points @ where[:2, :2].T + where[:2, 2]).astype(int).T
        height, width = self.tissue.shape
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        found = np.zeros(len(points), bool)
        found[inside] = self.tissue[y[inside], x[inside]]
        return found


def survey(levels: list[Level]) -> Survey:
    """Survey of a slide. A slide without visible tissue counts as tissue throughout."""
    rgb, to_um = read_thumbnail(levels, _SURVEY)
    size_x, size_y = np.linalg.norm(to_um[:2, :2], axis=0)
    mask = tissue_mask(rgb, (size_x, size_y))
    if not mask.any():
        mask = np.ones_like(mask)
    density = optical_density(rgb)
    stained = np.maximum(density[mask].mean(axis=0), 1e-3)
    # What optical_density took for the glass follows from it: rgb = glass * exp(-density).
    glass = np.median((rgb * np.exp(density)).reshape(-1, 3), axis=0)
    return Survey(mask, to_um, tuple(map(float, np.clip(glass, 1, 255))), tuple(map(float, stained)))
