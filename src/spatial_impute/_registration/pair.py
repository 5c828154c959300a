"""Registration of one section to another."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from spatial_impute._registration import ants_fits
from spatial_impute._registration.channel import deformation_channel, registration_channel, shrink, working_pixel
from spatial_impute._registration.deform_pair import fit_deformation
from spatial_impute._registration.orientation import orientation_candidates
from spatial_impute._registration.quality import is_sane, same_pose, singular_values, tissue_dice, verdict
from spatial_impute._registration.residual import residual_error
from spatial_impute._registration.score import StructureScore, mutual_information
from spatial_impute._registration.types import PairResult, RegistrationParams, SectionImage

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from spatial_impute._registration.channel import Channel
    from spatial_impute._registration.displacement import DisplacementField

_METHODS = ("rigid", "affine", "syn")
_MAX_AREA_RATIO = 10.0  # serial sections differ by percents; tenfold means a wrong pixel size or a wrong image
_CLEARLY_LOWER = 2.0  # standard errors of the score
_MORE_OVERLAP = 0.01  # Dice: two masks of the same tissue differ by about this much
# Share of mutual information: where the inside says little about the scale it changed by a tenth, with a fold by half.
_SAME_INFORMATION = 0.8
_MIN_WORKING_PIXELS = 100  # tissue of fewer working pixels has no structure to register


def register_pair(
    fixed: SectionImage,
    moving: SectionImage,
    *,
    method: Literal["rigid", "affine", "syn"] = "affine",
    params: RegistrationParams | None = None,
    seed: int = 0,
    initial: NDArray[np.float64] | None = None,
) -> PairResult:
    """Find where the moving section lies on the fixed one.

    Search over all rotations and both faces, refinement of the best distinct candidates by a rigid fit, choice by the
    structure inside the tissue, then (``"affine"``) a fit with stretch and shear that is kept only if it is plausible
    and not clearly worse.

    Parameters
    ----------
    fixed, moving
        Thumbnails of the two sections. Their resolution may differ.
    method
        ``"rigid"`` (rotation, shift, mirror), ``"affine"``, or ``"syn"`` (affine and a smooth deformation, kept only
        if it is plausible and different parts of the tissue ask for the same one).
    params
        Advanced settings.
    seed
        Seed of the optimiser. The same seed gives the same result on the same machine with the same number of threads.
    initial
        Matrix ``(3, 3)`` to start from, moving to fixed, um, instead of the search.

    Returns
    -------
    Matrix from moving to fixed points in um, what was used, and its quality. A poor result is returned, never replaced
    by the identity: look at ``verdict``.
    """
    if method not in _METHODS:
        msg = f"`method` must be one of {_METHODS}, found {method!r}."
        raise ValueError(msg)
    params = RegistrationParams() if params is None else params
    _check_areas(fixed, moving)
    size = working_pixel(fixed, moving, params)
    margin = params.mask_margin + 4 * size  # a rim beyond the fit's own, so that its gradient is defined everywhere
    target, source = (registration_channel(section, size, margin) for section in (fixed, moving))
    _check_pixels(target, source)

    starts = orientation_candidates(target, source, params) if initial is None else [np.asarray(initial, float)]
    fit = partial(ants_fits.fit_linear, mask_margin=params.mask_margin, seed=seed)
    iterations = params.linear_iterations
    # Candidates are told apart by the two coarsest levels, on images of half the size. Only the winner goes on.
    coarse = shrink(target, 2 * size), shrink(source, 2 * size)
    fits = [fit(*coarse, start, "Rigid", iterations=(*iterations[:2], 0)) for start in starts]
    if method != "rigid":  # stretched sections match no fine structure before they are stretched back
        stretched = [fit(*coarse, pose, "Affine", iterations=(*iterations[:2], 0)) for pose in fits]
        fits = [new if is_sane(new, params) else old for new, old in zip(stretched, fits, strict=True)]
    score, best, runner_up = _choose(target, source, fits, params)
    start, matrix, used, notes = starts[best], fits[best], "rigid", []
    if method == "rigid":
        matrix = fit(target, source, matrix, "Rigid", iterations=iterations[2:])
    else:  # to fall back on: the finest level, most of the time of a fit, would change it by 1 to 2 um
        matrix = fit(target, source, _nearest_rigid(matrix, source), "Rigid", iterations=(iterations[2], 0))

    if method != "rigid":
        affine = fit(target, source, fits[best], "Affine", iterations=iterations[1:])
        if not is_sane(affine, params):
            largest, smallest = singular_values(affine)
            notes.append(f"The affine fit stretched by {smallest:.2f} to {largest:.2f}; the rigid fit was kept.")
        else:
            # Six numbers cannot follow the noise of a whole section, and a score inside the tissue does not see the
            # outline. So the affine fit stands unless the score speaks against it by more than its own error.
            if _clearly_lower(score, matrix, affine):
                notes.append("The affine fit scored clearly lower than the rigid fit, which was kept.")
            else:
                matrix, used = affine, "affine"
        # A section of another scale can have its inside in place and its outline further out than the rim of the fit
        # reaches. So another fit first sees as much background as a stretch may cross. Outlines say little if tissue is lost.
        if not params.partial_tissue:
            reach = params.mask_margin + (params.max_scale - 1) * _radius(source)
            outlines = (registration_channel(section, 2 * size, reach) for section in (fixed, moving))
            wide = _nearest_rigid(matrix, source)
            wide = fit(*outlines, wide, "Affine", iterations=(*iterations[:2], 0), mask_margin=reach)
            other = fit(target, source, wide, "Affine", iterations=iterations[1:])
            if is_sane(other, params) and _fits_outline(score, matrix, other):
                matrix, used, notes = other, "affine", []

    start = _start(start) | {"look": score.look}
    quality = start | _quality(score, matrix, None, runner_up)
    field = None
    # A deformation would only make a wrong pose look better.
    if method == "syn" and verdict(quality, params)[0] != "failed":
        fine = working_pixel(fixed, moving, params, side=params.syn_side)
        margin = params.max_displacement + 4 * fine
        channels = (deformation_channel(section, fine, margin) for section in (fixed, moving))
        found = fit_deformation(*channels, matrix, params, seed)
        field = found.field
        if field is None:
            notes.append(found.note)
            quality |= found.quality
        else:
            used, quality = "syn", start | _quality(score, matrix, field, runner_up) | found.quality
    quality["verdict"], reasons = verdict(quality, params)
    quality["reasons"] = reasons + notes
    return PairResult(matrix, used, quality, moving.tissue_box, field)


def _choose(
    fixed: Channel, moving: Channel, fits: list[NDArray[np.float64]], params: RegistrationParams
) -> tuple[StructureScore, int, float]:
    """Best pose; its score, its index, and the score of the best different one.

    Stain and edges each have a favourite. Of two different ones, the pose with more mutual information is taken: it does
    not mind what another stain does to either. Of one and the same, the look that sets it off better scores it.
    """
    options = []
    for look in ("stain", "edges"):
        score = StructureScore(fixed, moving, look)
        scores = [score(pose) if is_sane(pose, params) else -1.0 for pose in fits]
        best = int(np.argmax(scores))
        # Two starts that end in one pose are no alternatives to each other.
        rivals = [value for pose, value in zip(fits, scores, strict=True) if not same_pose(pose, fits[best], moving)]
        options.append((score, best, max(rivals, default=0.0), scores[best]))
    if not same_pose(fits[options[0][1]], fits[options[1][1]], moving):
        chosen = max(options, key=lambda option: mutual_information(fixed, moving, fits[option[1]]))
    else:
        chosen = max(options, key=lambda option: option[3] - max(option[2], 0.0))
    return chosen[:3]


def _clearly_lower(score: StructureScore, before: NDArray[np.float64], after: NDArray[np.float64]) -> bool:
    gain, error = score.gain(before, after)
    return gain < -_CLEARLY_LOWER * error


def _fits_outline(score: StructureScore, before: NDArray[np.float64], after: NDArray[np.float64]) -> bool:
    """Whether the second pose has the outlines better in place, and the inside about as well as the first.

    A fold draws an outline in, but not what lies beside it: squeezed into the outline, that fits nothing any more.
    """
    pair = score.fixed, score.moving
    if tissue_dice(*pair, after) <= tissue_dice(*pair, before) + _MORE_OVERLAP or _clearly_lower(score, before, after):
        return False
    return mutual_information(*pair, after) >= _SAME_INFORMATION * mutual_information(*pair, before)


def _radius(channel: Channel) -> float:
    """From the centre of the tissue to its farthest pixel, um."""
    points = channel.centres()
    return float(np.linalg.norm(points - points.mean(0), axis=1).max())


def _nearest_rigid(matrix: NDArray[np.float64], moving: Channel) -> NDArray[np.float64]:
    """Rotation (and mirror) and shift closest to a matrix on the moving tissue."""
    u, _, vt = np.linalg.svd(matrix[:2, :2])
    centre = moving.centres().mean(0)
    rigid = np.eye(3)
    rigid[:2, :2] = u @ vt
    rigid[:2, 2] = matrix[:2, :2] @ centre + matrix[:2, 2] - rigid[:2, :2] @ centre
    return rigid


def _quality(
    score: StructureScore, matrix: NDArray[np.float64], field: DisplacementField | None, runner_up: float
) -> dict[str, Any]:
    fixed, moving = score.fixed, score.moving
    largest, smallest = singular_values(matrix)
    # Score and margin are those of the matrix: a deformation can make any pose look better.
    value = score(matrix)
    quality = {
        "dice_before": tissue_dice(fixed, moving, np.eye(3)),
        "dice_after": tissue_dice(fixed, moving, matrix, field),
        "correlation_before": score.correlation(np.eye(3))[0],
        "correlation_after": score.correlation(matrix, field)[0],
        "score": value,
        "margin": value - max(runner_up, 0.0),
        "runner_up": runner_up,
        "scale_min": smallest,
        "scale_max": largest,
        "folds": 0.0,
        "working_pixel": float(fixed.size),
    }
    error, n_patches = residual_error(fixed, moving, matrix, field)
    return quality | {"residual_um": error, "residual_patches": n_patches}


def _start(matrix: NDArray[np.float64]) -> dict[str, Any]:
    """Rotation in degrees (0 to 360) and face of the start that won."""
    mirrored = bool(np.linalg.det(matrix[:2, :2]) < 0)
    linear = matrix[:2, :2] @ np.diag([-1.0 if mirrored else 1.0, 1.0])
    angle = float(np.rad2deg(np.arctan2(linear[1, 0], linear[0, 0])) % 360)
    return {"start_rotation_deg": angle, "start_mirrored": mirrored}


def _check_areas(fixed: SectionImage, moving: SectionImage) -> None:
    areas = (fixed.tissue_area, moving.tissue_area)
    if max(areas) > _MAX_AREA_RATIO * min(areas):
        msg = (
            f"The tissues have areas of {areas[0] / 1e6:.3g} and {areas[1] / 1e6:.3g} square mm; serial sections "
            f"should be within a factor of {_MAX_AREA_RATIO:g}. Check the pixel sizes (now {fixed.pixel_size} and "
            f"{moving.pixel_size} um per pixel), and look at the tissue masks."
        )
        raise ValueError(msg)


def _check_pixels(fixed: Channel, moving: Channel) -> None:
    found = min(int(fixed.mask.sum()), int(moving.mask.sum()))
    if found < _MIN_WORKING_PIXELS:
        msg = (
            f"The tissue covers only {found} pixels at the working resolution of {fixed.size:.3g} um; at least "
            f"{_MIN_WORKING_PIXELS} are needed. Give finer thumbnails, or check the tissue mask."
        )
        raise ValueError(msg)
