"""The deformable part of a registration, kept only where different parts of the tissue ask for the same one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage as ndi

from spatial_impute._registration import ants_fits
from spatial_impute._registration.channel import RIM, SOFT_EDGE, contrast
from spatial_impute._registration.quality import field_quality, pull_back

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from spatial_impute._registration.channel import Channel
    from spatial_impute._registration.displacement import DisplacementField
    from spatial_impute._registration.types import RegistrationParams

_BLOCK = 20  # pixels: several times the smoothing of the fit, so that a block is no more than guessed from its rim
_MIN_BLOCKS = 8  # of each colour; smaller tissue gets smaller blocks
_CORE = 2  # windows of the fit: so far from the rim of a block, no pixel of its windows was seen
_MIN_SHARE = 0.25  # of a core that must be tissue to count
_PATCH = 2  # blocks a side: displacements are smooth, so that those of neighbouring blocks are not independent
_CLEAR = 2.0  # standard errors
# Times the smoothing by information alone. Contrast pulls harder: as soft, it changed areas by up to 2.4. The stiffer one
# is for where twice as stiff still leaves the limits, two of twelve fits on HER2ST.
_STIFFER = (4.0, 2.0)


@dataclass(frozen=True, slots=True, eq=False)
class Deformation:
    """Outcome of a deformable fit."""

    field: DisplacementField | None
    """None if there is no deformation worth having; then `note` says why."""
    note: str
    quality: dict[str, Any]
    """Of the field: folds, change of area, displacements. And the evidence: how far the two halves of the tissue agree,
    and the gain of local correlation on held-out blocks, both with standard errors."""


def fit_deformation(
    fixed: Channel, moving: Channel, matrix: NDArray[np.float64], params: RegistrationParams, seed: int
) -> Deformation:
    """Deform on top of `matrix` (moving to fixed, um), as softly as the tissue allows.

    More freedom always fits the pixels better, and on serial sections soon by following noise: no two of them show the
    same cells. So the tissue is cut into blocks like a checkerboard, and trial fits see the blocks of one colour each.

    The first fit is stiff and by mutual information alone. It is kept if the two trials move the same places in the
    same direction: what is noise in one of them is not in the other. Images could be compared instead, on the blocks
    that were not seen. But the better place of a section two further on hardly shows in them, because what is compared
    is mostly what the sections do not share. Where these trials do not agree, those of a fit that also looks at contrast
    may: mutual information in half of the tissue misses some of the known bends. What makes the blocks that were not
    seen fit clearly worse than no deformation is discarded all the same: sections that lie well need none.

    Fits that also look at local correlation, from stiff to soft, follow finer structure. They are tried only where there
    is some: where the blocks that were not seen correlate better by two standard errors than without the fit before. And
    each has to be better than the one before by as much.

    What is chosen is then fitted to all tissue. There contrast takes part beside mutual information, which alone finds
    that there is a bend, but a tenth to a half of it. Two stains that clearly differ in what stands out are an exception.
    """
    fixed, moving = _common_view(fixed, moving, matrix)
    black, labels = _blocks(fixed, params)

    def trials(smoothing: tuple[float, float], look: ants_fits.Look) -> list[DisplacementField]:
        views = [_without(fixed, hidden) for hidden in (black, ~black)]
        options = {"smoothing": smoothing, "look": look, "params": params, "seed": seed}
        return [ants_fits.fit_deformable(view, moving, matrix, **options) for view in views]

    def unseen(compare: Callable[[DisplacementField], NDArray], fits: list[DisplacementField]) -> NDArray:
        """Of each fit, what `compare` finds in the blocks that it has not seen."""
        return np.where(black, *(compare(fit) for fit in fits))

    def correlation(fit: DisplacementField | None) -> NDArray:
        return _local_correlation(fixed, moving, matrix, fit, params)

    def agreement(fits: list[DisplacementField]) -> tuple[float, float]:
        return _agreement(*(fit.pull for fit in fits), fixed.mask, _PATCH * _block_side(fixed))

    stiff: tuple[tuple[float, float], ants_fits.Look] = (params.syn_smoothing[0], "information")
    first = trials(*stiff)
    standing_out = contrast(fixed), contrast(moving)
    product = unseen(lambda fit: standing_out[0] * pull_back(standing_out[1], moving, fixed, matrix, fit), first)
    common, error = _gain(product, labels)
    by_contrast = contrast_fits(params) if common > -_CLEAR * error else []
    evidence = agreement(first)
    if by_contrast and not _clear(evidence):
        first = trials(*by_contrast[0])
        evidence = agreement(first)
    before, best = correlation(None), unseen(correlation, first)
    gained = _gain(best - before, labels)
    quality = dict(zip(("agreement", "agreement_error"), evidence, strict=True))
    quality |= dict(zip(("heldout_gain", "heldout_error"), gained, strict=True))
    if not _clear(evidence):
        note = "Different parts of the tissue did not ask for the same deformation; it was discarded."
        return Deformation(None, note, quality)
    if _clear((-gained[0], gained[1])):
        note = "The deformation of one part of the tissue made others fit worse; it was discarded."
        return Deformation(None, note, quality)

    kept = [stiff, *by_contrast]
    for smoothing in params.syn_smoothing:
        if not _clear(gained):
            break
        after = unseen(correlation, trials(smoothing, "correlation"))
        gained = _gain(after - best, labels)
        if _clear(gained):
            best = after
            kept.append((smoothing, "correlation"))
            quality |= dict(zip(("heldout_gain", "heldout_error"), _gain(best - before, labels), strict=True))

    for smoothing, look in kept[::-1]:  # to stiffer ones, if need be
        field = ants_fits.fit_deformable(
            fixed, moving, matrix, smoothing=smoothing, look=look, params=params, seed=seed
        )
        found = field_quality(field, fixed.mask)
        low, high = params.jacobian_limits
        if found["folds"] == 0 and found["jacobian_min"] >= low and found["jacobian_max"] <= high:
            used = {"syn_smoothing": list(smoothing), "syn_look": look}
            return Deformation(field, "", found | quality | used)
    limits = f"{found['jacobian_min']:.2f} to {found['jacobian_max']:.2f}"
    return Deformation(None, f"The deformable fit changed local areas by {limits}; it was discarded.", quality)


def _clear(estimate: tuple[float, float]) -> bool:
    """Whether an estimate is above zero by two of its standard errors."""
    return estimate[0] > _CLEAR * estimate[1]


def contrast_fits(params: RegistrationParams) -> list[tuple[tuple[float, float], ants_fits.Look]]:
    """Smoothing and look of the fits to all tissue in which contrast takes part, from stiff to soft."""
    flow, total = params.syn_smoothing[0]
    return [((factor * flow, factor * total), "contrast") for factor in _STIFFER]


def _common_view(fixed: Channel, moving: Channel, matrix: NDArray[np.float64]) -> tuple[Channel, Channel]:
    """Both images near the tissue of either, glass elsewhere.

    Fiducials, haze and ink on the glass move with other things than the tissue. But fading each image round its own mask
    would cut edges into what the masks do not agree on.
    """
    views = []
    for own, other, way in ((fixed, moving, matrix), (moving, fixed, np.linalg.inv(matrix))):
        tissue = ndi.binary_fill_holes(own.mask | (pull_back(other.mask, other, own, way) > 0.5))
        near = ndi.distance_transform_edt(~tissue, sampling=own.size) <= RIM
        views.append(replace(own, image=own.image * ndi.gaussian_filter(near.astype(np.float32), SOFT_EDGE)))
    return views[0], views[1]


def _block_side(channel: Channel) -> int:
    return max(6, min(_BLOCK, round(np.sqrt(channel.mask.sum() / (2 * _MIN_BLOCKS)))))


def _blocks(channel: Channel, params: RegistrationParams) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Blocks of one colour ``(y, x)``, and the number of the block for pixels in the core of its tissue (0 elsewhere)."""
    side = _block_side(channel)
    row, column = np.indices(channel.image.shape) // side
    black = (row + column) % 2 == 1
    core = max(1, min(_CORE * ants_fits.correlation_window(channel, params), side // 3))
    inner = np.zeros_like(black)
    for colour in (black, ~black):
        inner |= ndi.binary_erosion(colour, iterations=core)
    labels = np.where(inner & channel.mask, row * (column.max() + 1) + column + 1, 0)
    size = np.bincount(labels.ravel())
    return black, np.where(size[labels] >= _MIN_SHARE * (side - 2 * core) ** 2, labels, 0)


def _without(channel: Channel, hidden: NDArray[np.bool_]) -> Channel:
    """The channel as if nothing were known of some blocks.

    A mask alone does not hide them: the windows in which the fit correlates, and the coarse levels of its pyramid, reach
    over the rims of the blocks. So they are also filled with what their surroundings make likely.
    """
    seen = channel.visible() & ~hidden
    blur = 0.15 * _BLOCK  # narrow enough to go on from the rim of a block without an edge, and reaches its middle
    weight = ndi.gaussian_filter(seen.astype(np.float32), blur)
    likely = ndi.gaussian_filter(np.where(seen, channel.image, 0.0), blur) / np.maximum(weight, 1e-6)
    return replace(channel, image=np.where(seen, channel.image, likely).astype(np.float32), seen=seen)


def _agreement(first: NDArray, second: NDArray, mask: NDArray[np.bool_], side: int) -> tuple[float, float]:
    """How much of two displacement fields ``(y, x, 2)`` they have in common in tissue, and its standard error.

    Their mean scalar product over their mean square: 1 if they are equal, 0 if they have nothing to do with each other.
    The error is that of the jackknife over square patches of `side` pixels.
    """
    row, column = np.indices(mask.shape) // side
    patches = (row * (column.max() + 1) + column)[mask]
    first, second = (field[mask].astype(float) for field in (first, second))
    common = np.bincount(patches, (first * second).sum(-1))
    size = np.bincount(patches, 0.5 * (first**2 + second**2).sum(-1))
    left_out = (common.sum() - common) / np.maximum(size.sum() - size, 1e-12)
    left_out = left_out[np.bincount(patches) > 0]
    spread = np.sum((left_out - left_out.mean()) ** 2) * (len(left_out) - 1) / len(left_out)
    return float(common.sum() / max(size.sum(), 1e-12)), float(np.sqrt(spread))


def _gain(difference: NDArray, labels: NDArray[np.int64]) -> tuple[float, float]:
    """Mean over blocks, and its standard error."""
    blocks = np.setdiff1d(np.unique(labels), [0])
    if len(blocks) < 2:
        return 0.0, 0.0
    means = ndi.mean(difference, labels, blocks)
    return float(np.mean(means)), float(np.std(means, ddof=1) / np.sqrt(len(blocks)))


def _local_correlation(
    fixed: Channel,
    moving: Channel,
    matrix: NDArray[np.float64],
    field: DisplacementField | None,
    params: RegistrationParams,
) -> NDArray[np.float32]:
    """Squared correlation ``(y, x)`` in a window around each pixel: what the fit maximises where it sees."""
    sigma = 0.5 * ants_fits.correlation_window(fixed, params)
    moved = pull_back(moving.image, moving, fixed, matrix, field)

    def mean(image: NDArray) -> NDArray:
        return ndi.gaussian_filter(image, sigma)

    first, second = mean(fixed.image), mean(moved)
    variances = (mean(fixed.image**2) - first**2) * (mean(moved**2) - second**2)
    return (mean(fixed.image * moved) - first * second) ** 2 / np.maximum(variances, 1e-8)
