"""How far off is the result: match patches of the registered images and see how far they still have to move."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage as ndi

from spatial_impute._registration.quality import pull_back

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from spatial_impute._registration.channel import Channel
    from spatial_impute._registration.displacement import DisplacementField

# All in working pixels, of which a section has about 320 along its longer side.
_HALF = 20  # half side of a patch: an eighth of the section, which holds structure that two sections share
_REACH = 12  # largest shift looked for; larger errors show in the score
_STEP = 12  # from patch to patch
_EDGE = 1.5  # scale of the edges that are compared, so that another stain does not matter
_TISSUE = 0.8  # share of a patch that must be tissue: outlines match, whatever is inside
_PEAK = 4.0  # radius of what belongs to a peak
_LEAD = 0.1  # in correlation, of the best match over the best elsewhere
_MIN_PATCHES = 10  # fewer say nothing about a section


def residual_error(
    fixed: Channel, moving: Channel, matrix: NDArray[np.float64], field: DisplacementField | None = None
) -> tuple[float | None, int]:
    """Median shift in um by which patches of the registered section fit the fixed one better, and their number.

    Only patches count that match one place clearly better than any other. An estimate: it includes the noise of the
    matching (one to several working pixels on serial sections), and sees no error beyond 12 pixels.

    Returns
    -------
    Shift and number of patches; the shift is None if fewer than 10 patches match.
    """
    first = ndi.gaussian_gradient_magnitude(fixed.image, _EDGE)
    second = ndi.gaussian_gradient_magnitude(pull_back(moving.image, moving, fixed, matrix, field), _EDGE)
    tissue = fixed.mask & (pull_back(moving.mask, moving, fixed, matrix, field) > 0.5)
    share = ndi.uniform_filter(tissue.astype(np.float32), 2 * _HALF + 1)
    margin = _HALF + _REACH
    shifts = [
        _shift(second, first, row, column)
        for row in range(margin, first.shape[0] - margin, _STEP)
        for column in range(margin, first.shape[1] - margin, _STEP)
        if share[row, column] >= _TISSUE
    ]
    lengths = [float(np.hypot(*shift)) for shift in shifts if shift is not None]
    if len(lengths) < _MIN_PATCHES:
        return None, len(lengths)
    return float(np.median(lengths)) * fixed.size, len(lengths)


def _shift(source: NDArray, target: NDArray, row: int, column: int) -> NDArray[np.float64] | None:
    """Shift (rows, columns) at which the patch of `source` fits `target` best; None if it fits elsewhere as well."""
    from skimage.feature import match_template

    patch = source[row - _HALF : row + _HALF + 1, column - _HALF : column + _HALF + 1]
    reach = _HALF + _REACH
    window = target[row - reach : row + reach + 1, column - reach : column + reach + 1]
    if np.ptp(patch) == 0 or np.ptp(window) == 0:
        return None
    surface = match_template(window, patch)
    peak = np.array(np.unravel_index(np.argmax(surface), surface.shape))
    if (peak == 0).any() or (peak == 2 * _REACH).any():
        return None
    away = np.hypot(*(np.indices(surface.shape) - peak[:, None, None])) > _PEAK
    if surface[tuple(peak)] - surface[away].max() < _LEAD:
        return None
    return peak + [_vertex(surface, peak, axis) for axis in (0, 1)] - float(_REACH)


def _vertex(surface: NDArray, peak: NDArray, axis: int) -> float:
    """Offset of the maximum of the parabola through a peak and its two neighbours."""
    step = np.eye(2, dtype=int)[axis]
    low, here, high = (float(surface[tuple(peak + k * step)]) for k in (-1, 0, 1))
    curvature = low - 2 * here + high
    return 0.5 * (low - high) / curvature if curvature < 0 else 0.0
