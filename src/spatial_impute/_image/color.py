"""Color of a section: statistics at its spots, and normalization of its stain to that of another section.

Stain normalization is an affine map of the three optical densities of a pixel, for both methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from spatial_impute._geometry import apply_affine
from spatial_impute._image.levels import read_thumbnail
from spatial_impute._image.tissue import optical_density, tissue_mask

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spatial_impute._image.levels import Level

METHODS = ("reinhard", "macenko")

_MIN_DENSITY = 0.15  # the hue of paler pixels is noise (Macenko et al. 2009)
_ANGLE_PERCENTILE = 1.0  # robust extremes of the hue
_TOP_PERCENTILE = 99.0  # robust maximum of a concentration
_PX_PER_SPOT = 12  # nuclei need not be visible, only part of the mean
_FINEST, _COARSEST = 2.0, 8.0  # um per pixel; the thumbnail of a slide has to fit into memory


def color_statistics(levels: Sequence[Level], centers: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Mean and standard deviation of the optical density in r, g and b over the square of each spot, (n, 6)."""
    rgb, to_um = read_thumbnail(levels, float(np.clip(2 * np.median(radius) / _PX_PER_SPOT, _FINEST, _COARSEST)))
    density = optical_density(rgb)
    inverse = np.linalg.inv(to_um)
    # Corners of the squares in pixels; the axes of the image may run either way.
    corners = [apply_affine(centers + sign * radius[:, None], inverse) for sign in (-1, 1)]
    low = np.floor(np.minimum(*corners)).astype(int)
    high = np.ceil(np.maximum(*corners)).astype(int)
    limit = np.array(density.shape[1::-1])
    low = np.clip(low, 0, limit - 1)
    high = np.clip(high, low + 1, limit)
    result = np.empty((len(centers), 6))
    for row, ((x0, y0), (x1, y1)) in enumerate(zip(low, high, strict=True)):
        pixels = density[y0:y1, x0:x1].reshape(-1, 3)
        result[row] = *pixels.mean(axis=0), *pixels.std(axis=0)
    return result


@dataclass(frozen=True)
class StainMap:
    """Affine map of optical densities."""

    matrix: np.ndarray  # (3, 3), acting on row vectors
    offset: np.ndarray  # (3,)

    def __call__(self, rgb: np.ndarray) -> np.ndarray:
        """Recolor (..., 3) float32 in 0-255."""
        density = _density(rgb) @ self.matrix.astype(np.float32) + self.offset.astype(np.float32)
        return np.clip(256.0 * np.exp(-density) - 1.0, 0.0, 255.0)


def fit_stain_map(source: np.ndarray, target: np.ndarray, pixel_size: tuple[float, float], *, method: str) -> StainMap:
    """Map that gives the tissue of one section the colors of another, from their thumbnails (y, x, 3) in 0-255.

    ``"reinhard"``: mean and spread of each optical density :cite:p:`Reinhard2001`. ``"macenko"``: directions of the two
    stains, and their strength :cite:p:`Macenko2009`. Raises a ``ValueError`` without enough stained tissue.
    """
    found = [_tissue_density(rgb, size) for rgb, size in zip((source, target), pixel_size, strict=True)]
    if method == "reinhard":
        (mean, spread), (wanted_mean, wanted_spread) = ((d.mean(axis=0), d.std(axis=0)) for d in found)
        gain = wanted_spread / np.maximum(spread, 1e-6)
        return StainMap(np.diag(gain), wanted_mean - gain * mean)
    (stains, strength), (wanted_stains, wanted_strength) = (_stains(d) for d in found)
    # The part of the color outside the plane of the two stains stays as it is.
    concentration = np.linalg.pinv(stains)  # (3, 2)
    change = concentration @ (np.diag(wanted_strength / strength) @ wanted_stains - stains)
    return StainMap(np.eye(3) + change, np.zeros(3))


def _density(rgb: np.ndarray) -> np.ndarray:
    """Optical density against a white of 255, so that the map depends on the pixel alone."""
    return -np.log((np.asarray(rgb, dtype=np.float32) + 1.0) / 256.0)


def _tissue_density(rgb: np.ndarray, pixel_size: float) -> np.ndarray:
    """(n, 3) optical densities of the tissue."""
    density = _density(rgb)[tissue_mask(rgb, pixel_size)]
    if len(density) < 100 or (density > _MIN_DENSITY).all(axis=1).sum() < 100:
        msg = (
            "Stain normalisation needs stained tissue on both sections, found "
            f"{len(density)} tissue pixels at {pixel_size:.3g} um per pixel. Call without `stain_normalization`."
        )
        raise ValueError(msg)
    return density.astype(np.float64)


def _stains(density: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(2, 3) unit directions of hematoxylin and eosin, and (2,) robust maxima of their concentrations."""
    stained = density[(density > _MIN_DENSITY).all(axis=1)]
    _, vectors = np.linalg.eigh(np.cov(stained.T))
    plane = vectors[:, [2, 1]]
    plane = plane * np.sign(plane.sum(axis=0) + 1e-12)
    angle = np.arctan2(stained @ plane[:, 1], stained @ plane[:, 0])
    extremes = np.percentile(angle, [_ANGLE_PERCENTILE, 100 - _ANGLE_PERCENTILE])
    stains = np.stack([np.cos(extremes), np.sin(extremes)], axis=1) @ plane.T
    stains = stains[np.argsort(-stains[:, 0])]  # hematoxylin is the one that absorbs red
    strength = np.percentile(stained @ np.linalg.pinv(stains), _TOP_PERCENTILE, axis=0)
    return stains, np.maximum(strength, 1e-3)
