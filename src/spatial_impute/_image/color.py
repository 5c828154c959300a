"""Colour of the pixels of spots: what can be told without looking at any structure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from spatial_impute._geometry import apply_affine
from spatial_impute._image.levels import read_thumbnail
from spatial_impute._image.tissue import optical_density

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spatial_impute._image.levels import Level

_PIXELS = 12  # across a spot: nuclei do not have to be seen, only counted in
_FINEST, _COARSEST = 2.0, 8.0  # um per pixel; the thumbnail of a slide has to fit into memory


def colour_statistics(levels: Sequence[Level], centers: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Mean and standard deviation of the optical density in r, g and b over the square of each spot, (n, 6)."""
    rgb, to_um = read_thumbnail(list(levels), float(np.clip(2 * np.median(radius) / _PIXELS, _FINEST, _COARSEST)))
    density = optical_density(rgb)
    inverse = np.linalg.inv(to_um)
    # Corners of squares in pixels, whichever way the axes of the image run.
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
