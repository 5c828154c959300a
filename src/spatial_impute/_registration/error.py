"""Expected error of a registration, from parts of the evidence that do not depend on each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage as ndi

from spatial_impute._registration.quality import pull_back

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from spatial_impute._registration.channel import Channel
    from spatial_impute._registration.transform import DisplacementField
    from spatial_impute._registration.types import ChainResult, PairResult

# All in working pixels, of which a section has about 320 along its longer side.
_HALF = 20  # half side of a patch: an eighth of the section, which holds structure that two sections share
_REACH = 12  # largest shift looked for; larger errors show in the score
_STEP = 20  # from patch to patch
_EDGE = 1.5  # scale of the edges that are compared, so that another stain does not matter
_TISSUE = 0.8  # share of a patch that must be tissue: outlines match, whatever is inside
_PEAK = 4.0  # radius of what belongs to a peak
_LEAD = 0.02  # in correlation, over the best elsewhere: in flat tissue all places fit alike
_NEAR = 4.0  # two matches that differ by less agree
_AGREE = 0.25  # share of patches whose matches agree; unrelated tissue has 0.08, the share of the area within reach
_BLOCK = 40  # patches whose centres lie in one square share pixels
# Mean square distance of a pixel of a patch from its centre, along one axis, over the squared step between patches: shifts
# of neighbors that differ by d mean a bend of this times d squared within a patch.
_WITHIN = ((2 * _HALF + 1) ** 2 - 1) / 12 / _STEP**2
_FEWEST = 3  # squares; fewer say nothing about a section
_MOST = 10.0  # times the mean square of the patches: then they lie in one place, and say little about the rest
_LIMIT = 1.28  # standard errors: nine of ten estimates of a normal distribution lie below
# Root mean square to median and to 90th percentile of the length of a vector with two normal components.
_MEDIAN, _P90 = 0.83, 1.52
NO_ERROR: dict[str, float | int | None] = {"error_um": None, "error_p90_um": None, "error_patches": 0}


def expected_error(
    fixed: Channel,
    moving: Channel,
    matrix: NDArray[np.float64],
    field: DisplacementField | None,
    halves: float,
) -> dict[str, float | int | None]:
    """Error to expect at a point of the tissue: median, 90th percentile, and the number of patches behind it.

    Patches of the registered section are matched to the fixed one by stain and by edges. Each match has an error of its
    own, but the two have little noise in common. So the mean product of the two shifts is the mean square of the shift
    that is really there, however noisy single matches are. A match is the mean over a patch; the bend within it follows
    from the shifts of neighboring patches, by the same products. The error that remains after a fit is a bend. It grows with
    the square of the distance from the centre, so the error at the rim, where no patch lies, is larger in that proportion.
    Two parts are added to the upper limit: the difference between fits to two halves of the tissue (`halves`, root mean
    square in um), and half a working pixel, below which content cannot be placed.

    Returns
    -------
    ``error_um``, ``error_p90_um`` (None if too few patches match, or the two looks do not agree), ``error_patches``.
    """
    moved = pull_back(moving.image, moving, fixed, matrix, field)
    tissue = fixed.mask & (pull_back(moving.mask, moving, fixed, matrix, field) > 0.5)
    edges = [ndi.gaussian_gradient_magnitude(image, _EDGE) for image in (moved, fixed.image)]
    # Another stain may turn dark into pale.
    opposite = tissue.any() and np.cov(moved[tissue], fixed.image[tissue])[0, 1] < 0
    pairs = (-moved if opposite else moved, fixed.image), (edges[0], edges[1])
    centres = _centres(tissue)
    shifts = [[_shift(source, target, *centre) for centre in centres] for source, target in pairs]
    looks = {c: (a, b) for c, a, b in zip(centres, *shifts, strict=True) if a is not None and b is not None}
    agree = [np.hypot(*(a - b)) < _NEAR for a, b in looks.values()]
    square = _upper_square(looks) if agree and np.mean(agree) >= _AGREE else None
    if square is None:
        return NO_ERROR | {"error_patches": len(looks)}
    square = square * _outside(tissue, list(looks)) + 0.25
    error = float(np.sqrt(square * fixed.size**2 + halves**2))
    return {"error_um": _MEDIAN * error, "error_p90_um": _P90 * error, "error_patches": len(looks)}


def section_errors(
    pairs: Mapping[tuple[str, str], PairResult],
    placed: Mapping[str, ChainResult],
    deformed: Mapping[str, dict[str, Any]],
    known: Mapping[str, dict[str, Any]],
) -> dict[str, dict[str, float | None]]:
    """Expected error of each section in the common frame: ``error_um`` and ``error_p90_um``.

    The errors of the pairs on the path are independent, so their squares add up. Two ways through the stack that differ
    by more than that raise the error. `deformed` is the quality of the deformations that are used.
    `known` has the errors of sections with a given place; others of these have none.
    """
    found: dict[str, dict[str, float | None]] = {}

    def error(name: str, key: str, scale: float) -> float | None:
        result = placed[name]
        if len(result.path) < 2 or result.route == "given":
            return known.get(name, {}).get(key, 0.0)
        parent = result.path[1]
        pair = next(pairs[names].quality for names in ((parent, name), (name, parent)) if names in pairs)
        own = pair if pair.get(key) is None else deformed.get(name, pair)  # a deformation does not make a pose certain
        if own is not pair and result.confirmed:  # deformed onto the reference itself
            parent = result.path[-1]
        steps = own.get(key), error(parent, key, scale)
        if steps[0] is None or steps[1] is None:
            return None
        return max(float(np.hypot(steps[0], steps[1])), scale * (result.disagreement or 0.0) / np.sqrt(2))

    for name in placed:
        found[name] = {"error_um": error(name, "error_um", _MEDIAN), "error_p90_um": error(name, "error_p90_um", _P90)}
    return found


def _centres(tissue: NDArray[np.bool_]) -> list[tuple[int, int]]:
    share = ndi.uniform_filter(tissue.astype(np.float32), 2 * _HALF + 1)
    margin = _HALF + _REACH
    grid = (range(margin, n - margin, _STEP) for n in tissue.shape)
    rows, columns = (list(axis) for axis in grid)
    return [(row, column) for row in rows for column in columns if share[row, column] >= _TISSUE]


def _outside(tissue: NDArray[np.bool_], centres: list[tuple[int, int]]) -> float:
    """Mean fourth power of the distance from the centre of the tissue, over the tissue and over the patches; at least 1."""
    points = np.argwhere(tissue)
    fourth = [np.mean(np.sum((p - points.mean(0)) ** 2, axis=1) ** 2) for p in (points, np.asarray(centres))]
    return float(np.clip(fourth[0] / max(fourth[1], 1e-6), 1.0, _MOST))


def _upper_square(looks: dict[tuple[int, int], tuple[NDArray, NDArray]]) -> float | None:
    """Upper limit of the mean square shift of a pixel, from two shifts per patch; None if there are too few squares.

    The limit is that of a jackknife over squares of patches.
    """
    if not looks:
        return None
    squares = np.unique([[row // _BLOCK, column // _BLOCK] for row, column in looks], axis=0, return_inverse=True)[1]
    home = dict(zip(looks, squares.ravel(), strict=True))
    n = int(squares.max()) + 1
    if n < _FEWEST:
        return None
    terms = [[(home[centre], float(a @ b)) for centre, (a, b) in looks.items()]]
    for down, right in ((_STEP, 0), (0, _STEP)):
        pairs = [(c, (c[0] + down, c[1] + right)) for c in looks if (c[0] + down, c[1] + right) in looks]
        apart = [(home[c], [p - q for p, q in zip(looks[other], looks[c], strict=True)]) for c, other in pairs]
        terms.append([(square, _WITHIN * float(a @ b)) for square, (a, b) in apart])
    sums, counts = (
        np.array(
            [np.bincount([s for s, _ in t], [v if k else 1.0 for _, v in t], n) if t else np.zeros(n) for t in terms]
        )
        for k in (1, 0)
    )
    total, *left_out = (
        (s / np.maximum(c, 1)).sum()
        for s, c in [
            (sums.sum(1), counts.sum(1)),
            *zip((sums.sum(1) - sums.T), (counts.sum(1) - counts.T), strict=True),
        ]
    )
    error = np.sqrt((n - 1) / n * np.sum((np.array(left_out) - np.mean(left_out)) ** 2))
    return max(float(total), 0.0) + _LIMIT * float(error)


def _shift(source: NDArray, target: NDArray, row: int, column: int) -> NDArray[np.float64] | None:
    """Shift (rows, columns) at which the patch of `source` fits `target` best; None if it is beyond the reach, or others fit as well."""
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
