"""Stain normalisation: bring the colours of one section to those of another, in optical density.

Both methods come down to an affine map of the three optical densities of a pixel, so they cost one small product per
pixel wherever an image is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spatial_impute._image.tissue import tissue_mask

METHODS = ("reinhard", "macenko")

_MIN_DENSITY = 0.15  # below it a pixel is as good as unstained, and its hue is noise (Macenko et al. 2009)
_ANGLE_PERCENTILE = 1.0  # robust extremes of the hue
_TOP_PERCENTILE = 99.0  # robust maximum of a concentration


@dataclass(frozen=True)
class StainMap:
    """Affine map of optical densities."""

    matrix: np.ndarray
    """(3, 3), acting on row vectors."""
    offset: np.ndarray
    """(3,)"""

    def __call__(self, rgb: np.ndarray) -> np.ndarray:
        """Recolour (..., 3) float32 in 0-255."""
        density = _density(rgb) @ self.matrix.astype(np.float32) + self.offset.astype(np.float32)
        return np.clip(256.0 * np.exp(-density) - 1.0, 0.0, 255.0)


def fit_stain_map(source: np.ndarray, target: np.ndarray, pixel_size: tuple[float, float], *, method: str) -> StainMap:
    """Map that gives the tissue of one section the colours of another.

    Parameters
    ----------
    source, target
        (y, x, 3) thumbnails in 0-255.
    pixel_size
        um per pixel of either.
    method
        ``"reinhard"``: mean and spread of each optical density :cite:p:`Reinhard2001`. ``"macenko"``: directions of the
        two stains, and their strength :cite:p:`Macenko2009`.

    Raises
    ------
    ValueError
        If one of them shows no tissue, or too little of it is stained.
    """
    found = [_tissue_density(rgb, size) for rgb, size in zip((source, target), pixel_size, strict=True)]
    if method == "reinhard":
        (mean, spread), (wanted_mean, wanted_spread) = ((d.mean(axis=0), d.std(axis=0)) for d in found)
        gain = wanted_spread / np.maximum(spread, 1e-6)
        return StainMap(np.diag(gain), wanted_mean - gain * mean)
    (stains, strength), (wanted_stains, wanted_strength) = (_stains(d) for d in found)
    # What the two stains do not explain is kept as it is.
    concentration = np.linalg.pinv(stains)  # (3, 2)
    change = concentration @ (np.diag(wanted_strength / strength) @ wanted_stains - stains)
    return StainMap(np.eye(3) + change, np.zeros(3))


def _density(rgb: np.ndarray) -> np.ndarray:
    """Optical density against a white of 255, so that the map depends on nothing but the pixel."""
    return -np.log((np.asarray(rgb, dtype=np.float32) + 1.0) / 256.0)


def _tissue_density(rgb: np.ndarray, pixel_size: float) -> np.ndarray:
    """(n, 3) optical densities of the tissue."""
    density = _density(rgb)[tissue_mask(rgb, pixel_size)]
    if len(density) < 100 or (density > _MIN_DENSITY).all(axis=1).sum() < 100:
        msg = (
            "Stain normalisation needs stained tissue on both sections, found "
            f"{len(density)} tissue pixels at {pixel_size:.3g} um per pixel. Leave out `stain_normalization`."
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
