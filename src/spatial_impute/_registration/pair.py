"""Registration of one section to another."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from spatial_impute._geometry import affine_between, apply_affine
from spatial_impute._registration import ants_fits
from spatial_impute._registration.deform import chessboard
from spatial_impute._registration.orientation import orientation_candidates
from spatial_impute._registration.quality import (
    UNKNOWN_ERROR,
    StructureScore,
    clear_pose,
    disagreement,
    expected_error,
    is_sane,
    mutual_information,
    same_pose,
    singular_values,
    tissue_dice,
    verdict,
)
from spatial_impute._registration.types import (
    PairResult,
    RegistrationParams,
    SectionImage,
    registration_channel,
    shrink,
    working_pixel,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from spatial_impute._registration.types import Channel

Matrix: TypeAlias = "NDArray[np.float64]"

_MAX_AREA_RATIO = 10.0  # serial sections differ by percents; tenfold means a wrong pixel size or a wrong image
_CLEARLY_LOWER = 2.0  # standard errors of the score
_MORE_OVERLAP = 0.01  # Dice: two masks of the same tissue differ by about this much
# Share of mutual information: where the inside says little about the scale it changed by a tenth, with a fold by half.
_SAME_INFORMATION = 0.8
_SQUARE = 10  # pixels of twice the working size: several times the structure, and many of them in a section
_HALF_ITERATIONS = 50
_MOST_POSES = 4  # distinct ones that are stretched and compared
_MIN_WORKING_PIXELS = 100  # tissue of fewer working pixels has no structure to register


def register_pair(
    fixed: SectionImage,
    moving: SectionImage,
    initial: Matrix | None = None,
    *,
    method: Literal["rigid", "affine"] = "affine",
    params: RegistrationParams | None = None,
    seed: int = 0,
) -> PairResult:
    """Find where the moving section lies on the fixed one; the resolution of their thumbnails may differ.

    All rotations and both faces are searched, unless there is an `initial` matrix ``(3, 3)``, moving to fixed, um. The
    best distinct candidates are refined, and the structure inside the tissue decides between them. An affine fit is kept
    only if it is plausible and not clearly worse than the rigid one. A poor result is returned and never replaced by the
    identity; check its ``verdict``.

    `method` is ``"rigid"`` (rotation, shift, mirror) or ``"affine"``. The same `seed` gives the same result on the same
    machine with the same number of threads.
    """
    params = RegistrationParams() if params is None else params
    _check_areas(fixed, moving)
    fitter = _Fitter(fixed, moving, params, seed)
    starts = (
        orientation_candidates(fitter.target, fitter.source, params)
        if initial is None
        else [np.asarray(initial, float)]
    )
    starts, fits = fitter.refine(starts, affine=method != "rigid")
    best, score, runner_up, agreed = _choose(fitter.target, fitter.source, fits, params)
    notes: list[str] = []
    if method == "rigid":
        matrix, used = fitter.finest(fits[best], "Rigid"), "rigid"
    else:
        matrix, used, notes = fitter.affine(fits[best], score)
    start = _start(starts[best]) | {"look": score.look, "looks_agree": agreed}
    halves = fitter.halves(matrix, "Rigid" if used == "rigid" else "Affine")
    quality = start | _quality(score, matrix, runner_up)
    # Patches are matched near the pose: they tell how exact it is, not if it is another one.
    known = clear_pose(quality, params) and verdict(quality, params)[0] != "failed"
    quality |= expected_error(fitter.target, fitter.source, matrix, None, halves) if known else UNKNOWN_ERROR
    quality["verdict"], reasons = verdict(quality, params)
    quality["reasons"] = reasons + notes
    return PairResult(matrix, used, quality, moving.tissue_box)


class _Fitter:
    """Fits of a pair of sections; `target` and `source` are the two at the working resolution."""

    def __init__(self, fixed: SectionImage, moving: SectionImage, params: RegistrationParams, seed: int) -> None:
        self.fixed, self.moving, self.params, self.seed = fixed, moving, params, seed
        size = working_pixel(fixed, moving, params)
        margin = params.mask_margin + 4 * size  # a rim beyond the fit's own, so that its gradient is defined everywhere
        self.target, self.source = (registration_channel(section, size, margin) for section in (fixed, moving))
        _check_pixels(self.target, self.source)

    def _fit(
        self,
        channels: tuple[Channel, Channel],
        start: Matrix,
        kind: Literal["Rigid", "Affine"],
        iterations: tuple[int, ...],
        mask_margin: float | None = None,
    ) -> Matrix:
        if not any(iterations):
            return start
        margin = self.params.mask_margin if mask_margin is None else mask_margin
        options: dict[str, Any] = {"iterations": iterations, "mask_margin": margin, "seed": self.seed}
        return ants_fits.fit_linear(*channels, start, kind, **options)

    def refine(self, starts: list[Matrix], *, affine: bool) -> tuple[list[Matrix], list[Matrix]]:
        """Starts of the distinct coarse fits of all candidates, and the fits; only the winner is fitted further."""
        coarse, iterations = self._coarse()
        found: list[tuple[Matrix, Matrix]] = []
        for start in starts:
            pose = self._fit(coarse, start, "Rigid", iterations)
            if not any(same_pose(pose, other, self.source) for _, other in found):
                found.append((start, pose))
        information = [mutual_information(*coarse, pose) for _, pose in found]
        if max(information) > 0:  # the others could be the best only with a stretch beyond the limits
            found = [found[i] for i in sorted(np.argsort(information)[::-1][:_MOST_POSES])]
        starts, fits = [start for start, _ in found], [pose for _, pose in found]
        if affine:  # stretched sections match no fine structure before they are stretched back
            stretched = [self._fit(coarse, pose, "Affine", iterations) for pose in fits]
            fits = [new if is_sane(new, self.params) else old for new, old in zip(stretched, fits, strict=True)]
        return starts, fits

    def _coarse(self) -> tuple[tuple[Channel, Channel], tuple[int, ...]]:
        """Channels and iterations of the two coarsest levels."""
        two = self.params.linear_iterations[:2]
        for factor, finer in ((4, ()), (2, (0,))):
            pair = shrink(self.target, factor * self.target.size), shrink(self.source, factor * self.target.size)
            if min(int(channel.mask.sum()) for channel in pair) >= _MIN_WORKING_PIXELS:
                return pair, (*two, *finer)
        return (self.target, self.source), (*two, 0, 0)

    def finest(self, start: Matrix, kind: Literal["Rigid", "Affine"]) -> Matrix:
        """Fit down to the finest level."""
        return self._fit((self.target, self.source), start, kind, self.params.linear_iterations[2:])

    def affine(self, start: Matrix, score: StructureScore) -> tuple[Matrix, str, list[str]]:
        """Affine fit, or the rigid one if the affine fit is not plausible; the method used, and remarks."""
        near = _nearest_rigid(start, self.source)
        matrix, used, notes = self.finest(start, "Affine"), "affine", []
        if not is_sane(matrix, self.params):
            largest, smallest = singular_values(matrix)
            notes.append(f"The affine fit stretched by {smallest:.2f} to {largest:.2f}; the rigid fit was kept.")
        elif _clearly_lower(score, near, matrix) and _clearly_lower(score, self.finest(near, "Rigid"), matrix):
            # Six numbers cannot follow the noise of a whole section, and a score inside the tissue does not see the
            # outline. So the affine fit is rejected only if the score is lower by more than its own error.
            notes.append("The affine fit scored clearly lower than the rigid fit, which was kept.")
        if notes:
            matrix, used = self.finest(near, "Rigid"), "rigid"
        if not self.params.partial_tissue:  # outlines say little if tissue is lost
            other = self._outline_fit(matrix)
            if other is not None and is_sane(other, self.params) and _fits_outline(score, matrix, other):
                return other, "affine", []
        return matrix, used, notes

    def _outline_fit(self, matrix: Matrix) -> Matrix | None:
        """Affine fit that first sees as much background as a stretch may cross; None if the outlines fit no better.

        The inside of a section of another scale can be in place while its outline lies outside the rim of the usual fit.
        """
        reach = self.params.mask_margin + (self.params.max_scale - 1) * _radius(self.source)
        coarse, iterations = self._coarse()
        fixed, moving = (registration_channel(section, coarse[0].size, reach) for section in (self.fixed, self.moving))
        wide = self._fit((fixed, moving), _nearest_rigid(matrix, self.source), "Affine", iterations, mask_margin=reach)
        pair = self.target, self.source
        if tissue_dice(*pair, wide) <= tissue_dice(*pair, matrix):
            return None
        return self.finest(wide, "Affine")

    def halves(self, matrix: Matrix, kind: Literal["Rigid", "Affine"]) -> float:
        """Root mean square distance in um between fits to the black and to the white squares of a chessboard."""
        fixed, moving = (shrink(channel, 2 * channel.size) for channel in (self.target, self.source))
        black = chessboard(fixed.mask.shape, _SQUARE)
        views = [replace(fixed, mask=fixed.mask & color) for color in (black, ~black)]
        if min(int(view.mask.sum()) for view in views) < _MIN_WORKING_PIXELS:
            return 0.0
        first, second = (self._fit((view, moving), matrix, kind, (_HALF_ITERATIONS,), 0.0) for view in views)
        return disagreement(first, second, self.source.centres()[::_SQUARE])


def _choose(
    fixed: Channel, moving: Channel, fits: list[Matrix], params: RegistrationParams
) -> tuple[int, StructureScore, float, bool]:
    """Index of the best pose, the score that it was chosen by, the score of the best different pose, and agreement.

    Stain and edges may prefer different poses. Then the pose with the most mutual information is taken, which does not
    depend on the stain. If both prefer the same pose, they agree, and the one with the larger lead gives the score.
    """

    def measured(measure: Callable[[Matrix], float]) -> list[float]:
        return [measure(pose) if is_sane(pose, params) else -1.0 for pose in fits]

    scores = [StructureScore(fixed, moving, look) for look in ("stain", "edges")]
    values = [measured(score) for score in scores]
    best = [int(np.argmax(found)) for found in values]
    agreed = bool(same_pose(fits[best[0]], fits[best[1]], moving))
    if not agreed:
        best = [int(np.argmax(measured(partial(mutual_information, fixed, moving))))] * 2
    options = []
    for score, found, index in zip(scores, values, best, strict=True):
        # Two starts that end in one pose are no alternatives to each other.
        rivals = [value for pose, value in zip(fits, found, strict=True) if not same_pose(pose, fits[index], moving)]
        runner_up = max(rivals, default=0.0)
        options.append((found[index] - max(runner_up, 0.0), index, score, runner_up))
    _, index, score, runner_up = max(options, key=itemgetter(0))
    return index, score, runner_up, agreed


def _clearly_lower(score: StructureScore, before: Matrix, after: Matrix) -> bool:
    gain, error = score.gain(before, after)
    return gain < -_CLEARLY_LOWER * error


def _fits_outline(score: StructureScore, before: Matrix, after: Matrix) -> bool:
    """True if the second pose fits the outlines better, and the inside about as well as the first.

    A fold shortens an outline but not the tissue beside it. If that tissue is squeezed into the outline, it fits nothing.
    """
    pair = score.fixed, score.moving
    if tissue_dice(*pair, after) <= tissue_dice(*pair, before) + _MORE_OVERLAP or _clearly_lower(score, before, after):
        return False
    return mutual_information(*pair, after) >= _SAME_INFORMATION * mutual_information(*pair, before)


def _radius(channel: Channel) -> float:
    """Distance from the centre of the tissue to its farthest pixel, um."""
    points = channel.centres()
    return float(np.linalg.norm(points - points.mean(0), axis=1).max())


def _nearest_rigid(matrix: Matrix, moving: Channel) -> Matrix:
    """Rotation (and mirror) and shift closest to a matrix on the moving tissue."""
    u, _, vt = np.linalg.svd(matrix[:2, :2])
    centre = moving.centres().mean(0)
    return affine_between(u @ vt, centre, apply_affine(centre, matrix))


def _quality(score: StructureScore, matrix: Matrix, runner_up: float) -> dict[str, Any]:
    fixed, moving = score.fixed, score.moving
    largest, smallest = singular_values(matrix)
    value = score(matrix)
    return {
        "dice_before": tissue_dice(fixed, moving, np.eye(3)),
        "dice_after": tissue_dice(fixed, moving, matrix),
        "correlation_before": score.correlation(np.eye(3)),
        "correlation_after": score.correlation(matrix),
        "score": value,
        "margin": value - max(runner_up, 0.0),
        "runner_up": runner_up,
        "scale_min": smallest,
        "scale_max": largest,
        "folds": 0.0,
        "working_pixel": float(fixed.size),
    }


def _start(matrix: Matrix) -> dict[str, Any]:
    """Rotation in degrees (0 to 360) and face of the chosen start."""
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
