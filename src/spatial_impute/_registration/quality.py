"""Quality of a registration: agreement of structure, verdict, and the error to expect at a point."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage as ndi
from scipy.stats import rankdata

from spatial_impute._geometry import apply_affine
from spatial_impute._registration.types import inside_only

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from spatial_impute._registration.transform import DisplacementField, PullBack
    from spatial_impute._registration.types import ChainResult, Channel, PairResult, RegistrationParams

_MIN_SEEN = 0.5  # see common_tissue
_SAME_POSE = 0.2  # of the radius of the tissue: poses that differ by less are the same


def pull_back(
    image: NDArray, moving: Channel, fixed: Channel, matrix: NDArray, field: PullBack | None = None
) -> NDArray[np.float32]:
    """`image` on the grid of `moving`, resampled on that of `fixed` through `matrix` and `field`; 0 outside."""
    image = image.astype(np.float32, copy=False)
    index = moving.to_index() @ np.linalg.inv(matrix)
    if field is None:
        index = index @ np.linalg.inv(fixed.to_index())
        return ndi.affine_transform(image, index[:2, :2], index[:2, 2], output_shape=fixed.image.shape, order=1)
    points = field.pulled(fixed.centres(np.ones(fixed.image.shape, bool)))
    where = index[:2, :2] @ points.T + index[:2, 2:]
    return ndi.map_coordinates(image, where, order=1).reshape(fixed.image.shape)


def common_tissue(
    fixed: Channel, moving: Channel, matrix: NDArray, field: DisplacementField | None = None
) -> tuple[NDArray[np.bool_], float, float]:
    """Common tissue after `matrix`, and the tissue of each section that lies inside the image of the other one.

    The overlap is on the fixed grid ``(y, x)``, the two areas are in pixels of that grid. Tissue outside the other image
    is no evidence for or against a pose. But at least half of each tissue counts. Otherwise a pose that shows only a
    corner would look perfect.
    """
    moved = pull_back(moving.mask, moving, fixed, matrix, field) > 0.5
    areas = []
    for channel, other, mapping in ((fixed, moving, np.linalg.inv(matrix)), (moving, fixed, matrix)):
        points = channel.centres()
        seen = other.in_frame(apply_affine(points, mapping))
        areas.append(max(float(seen.sum()), _MIN_SEEN * len(points)))
    scale = abs(np.linalg.det(matrix[:2, :2])) * (moving.size / fixed.size) ** 2
    return fixed.mask & moved, areas[0], areas[1] * float(scale)


def tissue_dice(fixed: Channel, moving: Channel, matrix: NDArray, field: DisplacementField | None = None) -> float:
    """Dice coefficient of the two tissues after `matrix` and `field`, where both images show something."""
    overlap, fixed_area, moving_area = common_tissue(fixed, moving, matrix, field)
    return dice(float(overlap.sum()), fixed_area, moving_area)


def dice(overlap: float, first: float, second: float) -> float:
    """Dice coefficient from the area of an overlap and the areas of both masks; 0 without any area."""
    total = first + second
    return min(1.0, 2.0 * overlap / total) if total else 0.0


def same_pose(first: NDArray[np.float64], second: NDArray[np.float64], moving: Channel) -> bool:
    """True if two matrices put the moving tissue in almost the same place."""
    points = moving.centres()[:: max(1, int(moving.mask.sum()) // 500)]
    radius = np.sqrt(np.mean(np.sum((points - points.mean(0)) ** 2, axis=1)))
    return disagreement(first, second, points) < _SAME_POSE * radius


def disagreement(first: NDArray[np.float64], second: NDArray[np.float64], points: NDArray[np.float64]) -> float:
    """Root mean square distance in um between `points` ``(n, 2)`` moved by one matrix and by the other."""
    return float(np.sqrt(np.mean(np.sum(apply_affine(points, first - second) ** 2, axis=1))))


def singular_values(matrix: NDArray[np.float64]) -> tuple[float, float]:
    """Largest and smallest stretch of a linear map."""
    values = np.linalg.svd(matrix[:2, :2], compute_uv=False)
    return float(values[0]), float(values[1])


def is_sane(matrix: NDArray[np.float64], params: RegistrationParams) -> bool:
    """True if a matrix stretches no more than a serial section can."""
    largest, smallest = singular_values(matrix)
    return bool(np.isfinite(matrix).all()) and largest <= params.max_scale and smallest >= 1 / params.max_scale


def field_quality(field: DisplacementField, mask: NDArray[np.bool_]) -> dict[str, float]:
    """Folds, change of area and size of the displacements in tissue."""
    jacobian = field.jacobian()[mask]
    lengths = np.linalg.norm(field.pull[mask].astype(float), axis=1)
    return {
        "folds": float(np.mean(jacobian <= 0)),
        "jacobian_min": float(jacobian.min()),
        "jacobian_max": float(jacobian.max()),
        "displacement_median": float(np.median(lengths)),
        "displacement_p99": float(np.percentile(lengths, 99)),
    }


def clear_pose(quality: dict, params: RegistrationParams) -> bool:
    """True if structure agrees, and more than in any other pose."""
    return bool(quality["score"] >= params.min_score and quality["margin"] >= params.min_margin)


def verdict(quality: dict, params: RegistrationParams) -> tuple[str, list[str]]:
    """``"ok"``, ``"weak"`` or ``"failed"``, with one sentence per reason.

    Each test alone can fail: overlap for symmetric tissue, score for a repeating texture, margin if two starts are both
    wrong. A low overlap is no failure if stain and edges both find this pose by a clear lead: then a mask is wrong, or
    tissue is missing.
    """
    reasons: list[str] = []
    found = clear_pose(quality, params) and quality.get("looks_agree", False)
    failed = False
    if quality["dice_after"] < params.min_dice:
        failed |= quality["dice_after"] < params.failed_dice and not (params.partial_tissue or found)
        reasons.append(
            f"The tissues overlap by a Dice of {quality['dice_after']:.2f} (expected {params.min_dice:.2f})."
        )
    if quality["score"] < params.min_score:
        failed |= quality["score"] < 0.5 * params.min_score
        reasons.append(f"The structure score is {quality['score']:.2f} (expected {params.min_score:.2f}).")
    if quality["margin"] < params.min_margin:
        reasons.append(
            f"Another pose scores almost as well: margin {quality['margin']:.2f} (expected {params.min_margin:.2f})."
        )
    if max(quality["scale_max"], 1 / max(quality["scale_min"], 1e-12)) > params.max_scale:
        failed = True
        reasons.append(f"The fit stretches by {quality['scale_min']:.2f} to {quality['scale_max']:.2f}.")
    if (quality.get("error_um") or 0.0) > params.max_error:
        reasons.append(f"The expected error is {quality['error_um']:.0f} um (at most {params.max_error:.0f} um).")
    return ("failed" if failed else "weak" if reasons else "ok"), reasons


# Standard deviations in working pixels: texture and regions of a section of about 320 pixels. They follow the working
# grid, not um, because serial sections share structure on the scale of the section.
_STRUCTURE_SCALES = (2.0, 6.0)
_EDGE = 1.0  # working pixels: scale of the edges
_N_BINS = 24  # of the mutual information; thousands of pixels fill their squares
_FULL_OVERLAP = 0.9  # serial sections differ by about this much at their edges; more overlap is no further evidence
_MIN_OVERLAP = 0.05  # share of the smaller tissue below which a correlation would rest on too few pixels
_TILES = 8  # along the longer side, each left out in turn: larger than the structure, and enough of them for an error


class StructureScore:
    """Agreement of structure inside the common tissue, for many poses.

    The score is the mean over scales of the correlation inside the overlap of the masks, times the share of the smaller
    tissue that overlaps. Unlike Dice it uses the content. It can distinguish 0 from 180 degrees, and a section that lost
    half of its tissue can still score well.

    `look` is ``"stain"``, or ``"edges"`` for the strength of edges. Another stain may turn dark into pale but keeps the
    edges. Between H&E sections, edges often separate right from wrong poses better. In tissue of scattered nuclei edges
    are noise, and the stain is better.
    """

    def __init__(self, fixed: Channel, moving: Channel, look: str = "stain") -> None:
        self.fixed, self.moving, self.look = fixed, moving, look
        seen = (edges_inside(fixed), edges_inside(moving)) if look == "edges" else (fixed.image, moving.image)
        self._fixed, self._moving = (
            [masked_blur(image, channel.mask, scale) for scale in _STRUCTURE_SCALES]
            for image, channel in zip(seen, (fixed, moving), strict=True)
        )

    def __call__(self, matrix: NDArray[np.float64]) -> float:
        """Score of a pose (moving to fixed, um), -1 to 1."""
        overlap, share = self._overlap(matrix)
        correlation = float(np.mean(self._correlations(matrix, overlap)))
        return correlation * float(min(1.0, share / _FULL_OVERLAP))

    def gain(self, before: NDArray[np.float64], after: NDArray[np.float64]) -> tuple[float, float]:
        """Score of the second pose minus that of the first, and its standard error by a jackknife over tiles."""
        tiles = square_tiles(self.fixed.image.shape, max(1, -(-max(self.fixed.image.shape) // _TILES)))
        left_out, total = [], []
        for matrix in (before, after):
            overlap, share = self._overlap(matrix)
            pairs = self._values(matrix, overlap)
            scores = [correlations_without(*pair, tiles[overlap], tiles.max() + 1) for pair in pairs]
            scores = np.mean(scores or np.zeros((1, tiles.max() + 1)), axis=0)
            left_out.append(scores * min(1.0, share / _FULL_OVERLAP))
            total.append(self(matrix))
        used = np.bincount(tiles[self.fixed.mask], minlength=tiles.max() + 1) > 0
        return total[1] - total[0], jackknife_error((left_out[1] - left_out[0])[used])

    def correlation(self, matrix: NDArray[np.float64]) -> float:
        """Correlation in the common tissue at the finer scale; 0 if the tissues do not meet."""
        return self._correlations(matrix, self._overlap(matrix)[0])[0]

    def _overlap(self, matrix: NDArray) -> tuple[NDArray[np.bool_], float]:
        overlap, *areas = common_tissue(self.fixed, self.moving, matrix)
        share = float(overlap.sum()) / max(min(areas), 1.0)
        return (overlap, share) if share >= _MIN_OVERLAP else (np.zeros_like(overlap), 0.0)

    def _correlations(self, matrix: NDArray, overlap: NDArray[np.bool_]) -> list[float]:
        return [_correlation(*pair) for pair in self._values(matrix, overlap)] or [0.0] * len(_STRUCTURE_SCALES)

    def _values(self, matrix: NDArray, overlap: NDArray[np.bool_]) -> list[tuple[NDArray, NDArray]]:
        """Pixels of the overlap in both sections, for each scale; empty if the tissues do not meet."""
        if not overlap.any():
            return []
        moved = (pull_back(image, self.moving, self.fixed, matrix)[overlap] for image in self._moving)
        return [(image[overlap], other) for image, other in zip(self._fixed, moved, strict=True)]


def mutual_information(fixed: Channel, moving: Channel, matrix: NDArray[np.float64]) -> float:
    """Mutual information of the stain in the common tissue, in nats, times the share of the smaller tissue in it."""
    from sklearn.metrics import mutual_info_score

    overlap, *areas = common_tissue(fixed, moving, matrix)
    count = int(overlap.sum())
    if count < _MIN_OVERLAP * min(areas) or count < _N_BINS**2:
        return 0.0
    first = masked_blur(fixed.image, fixed.mask, _STRUCTURE_SCALES[0])[overlap]
    blurred = masked_blur(moving.image, moving.mask, _STRUCTURE_SCALES[0])
    second = pull_back(blurred, moving, fixed, matrix)[overlap]
    # Bins of equal counts: no outlier sets the scale, and the two marginals carry no information.
    a, b = ((rankdata(values, method="ordinal").astype(int) - 1) * _N_BINS // count for values in (first, second))
    joint = np.bincount(a * _N_BINS + b, minlength=_N_BINS**2).reshape(_N_BINS, _N_BINS)
    information = float(mutual_info_score(None, None, contingency=joint))
    return information * min(1.0, count / max(min(areas), 1.0) / _FULL_OVERLAP)


def edges_inside(channel: Channel) -> NDArray[np.float32]:
    """Strength of edges ``(y, x)`` without the outline of the tissue."""
    return ndi.gaussian_gradient_magnitude(inside_only(channel), _EDGE)


def masked_blur(image: NDArray, mask: NDArray[np.bool_], sigma: float) -> NDArray[np.float32]:
    """Blur that neither takes in background nor fades at the tissue's edge."""
    weight = ndi.gaussian_filter(mask.astype(np.float32), sigma)
    return ndi.gaussian_filter(image * mask, sigma) / np.maximum(weight, 1e-3)


def square_tiles(shape: tuple[int, ...], side: int) -> NDArray[np.int64]:
    """Number ``(y, x)`` of the square of `side` pixels in which each pixel lies."""
    row, column = np.indices(shape) // side
    return row * (column.max() + 1) + column


def jackknife_error(left_out: NDArray[np.float64]) -> float:
    """Standard error of an estimate, from its values without each of the parts."""
    return float(np.sqrt(len(left_out) - 1) * np.std(left_out))


def correlations_without(first: NDArray, second: NDArray, tiles: NDArray, n_tiles: int) -> NDArray[np.float64]:
    """Correlation over all pixels but those of one tile, for each tile."""
    # About the mean, or differences of large sums would lose the small variances.
    a, b = (np.asarray(values, float) - np.mean(values) for values in (first, second))
    sums = [np.bincount(tiles, product, n_tiles) for product in (np.ones_like(a), a, b, a * a, b * b, a * b)]
    n, x, y, xx, yy, xy = (own.sum() - own for own in sums)
    n = np.maximum(n, 1.0)
    norm = np.sqrt(np.maximum(xx - x * x / n, 0.0) * np.maximum(yy - y * y / n, 0.0))
    return np.where(norm > 1e-12, (xy - x * y / n) / np.maximum(norm, 1e-12), 0.0)


def _correlation(first: NDArray, second: NDArray) -> float:
    first = np.asarray(first, float) - np.mean(first)
    second = np.asarray(second, float) - np.mean(second)
    norm = np.sqrt(np.sum(first**2) * np.sum(second**2))
    return float(np.sum(first * second) / norm) if norm > 1e-12 else 0.0


# All in working pixels, of which a section has about 320 along its longer side.
_HALF = 20  # half side of a patch: an eighth of the section, which holds structure that two sections share
_REACH = 12  # largest shift looked for; larger errors show in the score
_STEP = 20  # from patch to patch
_MATCHED_EDGE = 1.5  # scale of the edges that are compared, so that another stain does not matter
_TISSUE = 0.8  # share of a patch that must be tissue: outlines match, whatever is inside
_PEAK = 4.0  # radius of a peak
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
UNKNOWN_ERROR: dict[str, float | int | None] = {"error_um": None, "error_p90_um": None, "error_patches": 0}


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
    square in um), and half a working pixel, below which content cannot be placed. ``error_um`` and ``error_p90_um`` are
    None if too few patches match, or the two looks do not agree.
    """
    moved = pull_back(moving.image, moving, fixed, matrix, field)
    tissue = fixed.mask & (pull_back(moving.mask, moving, fixed, matrix, field) > 0.5)
    edges = [ndi.gaussian_gradient_magnitude(image, _MATCHED_EDGE) for image in (moved, fixed.image)]
    # Another stain may turn dark into pale.
    opposite = tissue.any() and np.cov(moved[tissue], fixed.image[tissue])[0, 1] < 0
    pairs = (-moved if opposite else moved, fixed.image), (edges[0], edges[1])
    centres = _centres(tissue)
    shifts = [[_shift(source, target, *centre) for centre in centres] for source, target in pairs]
    looks = {c: (a, b) for c, a, b in zip(centres, *shifts, strict=True) if a is not None and b is not None}
    agree = [np.hypot(*(a - b)) < _NEAR for a, b in looks.values()]
    square = _upper_square(looks) if agree and np.mean(agree) >= _AGREE else None
    if square is None:
        return UNKNOWN_ERROR | {"error_patches": len(looks)}
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
        pair = pairs[parent, name].quality
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
    rows, columns = (range(margin, n - margin, _STEP) for n in tissue.shape)
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
    home = np.unique(np.array(list(looks)) // _BLOCK, axis=0, return_inverse=True)[1].ravel()
    n_squares = int(home.max()) + 1
    if n_squares < _FEWEST:
        return None
    place = {centre: i for i, centre in enumerate(looks)}
    shifts = np.array(list(looks.values()))  # (patches, looks, 2)
    terms = [(home, shifts.prod(axis=1).sum(axis=1))]
    for down, right in ((_STEP, 0), (0, _STEP)):
        near = [(i, place.get((row + down, column + right))) for (row, column), i in place.items()]
        own, other = np.array([pair for pair in near if pair[1] is not None], int).reshape(-1, 2).T
        terms.append((home[own], _WITHIN * (shifts[other] - shifts[own]).prod(axis=1).sum(axis=1)))
    sums = np.array([np.bincount(square, products, n_squares) for square, products in terms])
    counts = np.array([np.bincount(square, minlength=n_squares) for square, _ in terms])
    total, n = sums.sum(axis=1, keepdims=True), counts.sum(axis=1, keepdims=True)
    left_out = ((total - sums) / np.maximum(n - counts, 1)).sum(axis=0)
    return max(float((total / np.maximum(n, 1)).sum()), 0.0) + _LIMIT * jackknife_error(left_out)


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
    """Offset of the maximum of the parabola through a peak and its two neighbors."""
    step = np.eye(2, dtype=int)[axis]
    low, here, high = (float(surface[tuple(peak + k * step)]) for k in (-1, 0, 1))
    curvature = low - 2 * here + high
    return 0.5 * (low - high) / curvature if curvature < 0 else 0.0
