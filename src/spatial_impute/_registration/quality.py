"""Quality of a pose: overlap of tissues, plausible stretch, residual shifts of patches, and a verdict with reasons."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage as ndi

from spatial_impute._geometry import apply_affine

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from spatial_impute._registration.channel import Channel
    from spatial_impute._registration.transform import DisplacementField
    from spatial_impute._registration.types import RegistrationParams

_MIN_SEEN = 0.5  # see common_tissue
_SAME_POSE = 0.2  # of the radius of the tissue: poses that differ by less are the same


def pull_back(
    image: NDArray, moving: Channel, fixed: Channel, matrix: NDArray, field: DisplacementField | None = None
) -> NDArray[np.float32]:
    """`image` on the grid of `moving`, resampled on that of `fixed` through `matrix` and `field`; 0 outside."""
    image = image.astype(np.float32, copy=False)
    index = moving.to_index() @ np.linalg.inv(matrix)
    if field is None:
        index = index @ np.linalg.inv(fixed.to_index())
        return ndi.affine_transform(image, index[:2, :2], index[:2, 2], output_shape=fixed.image.shape, order=1)
    rows, cols = np.indices(fixed.image.shape).reshape(2, -1)
    points = field.pulled(np.column_stack([cols, rows]) * fixed.size + (np.asarray(fixed.origin) + 0.5 * fixed.size))
    where = index[:2, :2] @ points.T + index[:2, 2:]
    return ndi.map_coordinates(image, where, order=1).reshape(fixed.image.shape)


def common_tissue(
    fixed: Channel, moving: Channel, matrix: NDArray, field: DisplacementField | None = None
) -> tuple[NDArray[np.bool_], float, float]:
    """Common tissue after `matrix`, and the tissue of each section that lies inside the image of the other one.

    Tissue outside the other image is no evidence for or against a pose. But at least half of each tissue counts.
    Otherwise a pose that shows only a corner would look perfect.

    Returns
    -------
    Overlap on the fixed grid ``(y, x)``, and the two areas in pixels of that grid.
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
    difference = (first - second)[:2]
    return float(np.sqrt(np.mean(np.sum((points @ difference[:, :2].T + difference[:, 2]) ** 2, axis=1))))


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


def verdict(quality: dict, params: RegistrationParams) -> tuple[str, list[str]]:
    """``"ok"``, ``"weak"`` or ``"failed"``, with one sentence per reason.

    Each test alone can fail: overlap for symmetric tissue, score for a repeating texture, margin if two starts are both
    wrong.
    """
    reasons: list[str] = []
    failed = False
    if quality["dice_after"] < params.min_dice:
        failed |= quality["dice_after"] < params.failed_dice and not params.partial_tissue
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
    if (quality.get("residual_um") or 0.0) > params.max_residual:
        reasons.append(
            f"Patches still fit better {quality['residual_um']:.0f} um away (expected {params.max_residual:.0f} um)."
        )
    if quality.get("displacement_p99", 0.0) > params.max_displacement:
        reasons.append(f"The deformable fit moves tissue by up to {quality['displacement_p99']:.0f} um.")
    return ("failed" if failed else "weak" if reasons else "ok"), reasons


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
    """Median shift in um at which patches of the registered section fit the fixed one better, and their number.

    Only patches with one clearly best place count. The shift is None if fewer than 10 patches match. It includes the
    noise of the matching (one to several working pixels on serial sections), and finds no error above 12 pixels.
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
    """Shift (rows, columns) at which the patch of `source` fits `target` best; None if other places fit as well."""
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
