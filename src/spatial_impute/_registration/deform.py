"""Deformations of sections, kept only if different parts of the tissue agree on them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage as ndi
from scipy.stats import sem

from spatial_impute._geometry import apply_affine
from spatial_impute._registration import ants_fits
from spatial_impute._registration.quality import (
    expected_error,
    field_quality,
    jackknife_error,
    pull_back,
    square_tiles,
    tissue_dice,
)
from spatial_impute._registration.types import RIM, SOFT_EDGE, Channel, contrast, deformation_channel, working_pixel

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from spatial_impute._registration.transform import DisplacementField, PullBack
    from spatial_impute._registration.types import ChainResult, RegistrationParams, SectionImage

_BLOCK = 20  # pixels: several times the smoothing of the fit, so that the rim of a block says little about its middle
_MIN_BLOCKS = 8  # of each color; smaller tissue gets smaller blocks
_CORE = 2  # windows of the fit: so far from the rim of a block, no pixel of its windows was seen
_MIN_SHARE = 0.25  # of a core that must be tissue to count
_PATCH = 2  # blocks a side: displacements are smooth, so that those of neighboring blocks are not independent
_CLEAR = 2.0  # standard errors
# Times the smoothing by information alone. Contrast pulls harder: as soft, it changed areas by up to 2.4. The stiffer one
# is for where twice as stiff still leaves the limits, two of twelve fits on HER2ST.
_STIFFER = (4.0, 2.0)


@dataclass(frozen=True, slots=True, eq=False)
class Deformation:
    """Outcome of a deformable fit."""

    field: DisplacementField | None
    """None if no deformation is kept; then `note` says why."""
    note: str
    quality: dict[str, Any]
    """Folds, change of area and displacements of the field. Agreement of the two halves of the tissue, and gain of local
    correlation on hidden blocks, both with standard errors."""


def fit_deformation(
    fixed: Channel,
    moving: Channel,
    matrix: NDArray[np.float64],
    params: RegistrationParams,
    seed: int,
    *,
    certain: bool = False,
) -> Deformation:
    """Deform on top of `matrix` (moving to fixed, um), as softly as the tissue allows.

    More freedom always fits the pixels better, but on serial sections it soon follows noise, because no two sections
    show the same cells. So the tissue is cut into blocks like a checkerboard. Each of two trial fits sees the blocks of
    one color.

    The first fit is stiff and uses mutual information alone. It is kept if both trials move the same places in the same
    direction: noise differs between them. A comparison of the images on hidden blocks would be too weak for that,
    because distant sections share little content. If the trials do not agree, trials that also use contrast get a second
    chance, because mutual information in half of the tissue misses some known bends. A fit is discarded if hidden blocks
    fit clearly worse with it than without it, or with `certain` if they do not fit clearly better.

    Fits that also use local correlation, from stiff to soft, follow finer structure. Each one is kept only if hidden
    blocks correlate better than with the fit before it, by two standard errors.

    The chosen fit is then repeated on all tissue. Contrast is used there beside mutual information, which alone finds a
    tenth to a half of a bend. Contrast is left out if it clearly differs between the two stains.
    """
    fixed, moving = _common_view(fixed, moving, matrix)
    black, labels = _blocks(fixed, params)
    fit = partial(ants_fits.fit_deformable, moving=moving, matrix=matrix, params=params, seed=seed)

    def trials(smoothing: tuple[float, float], look: ants_fits.Look) -> list[DisplacementField]:
        views = (_without(fixed, hidden) for hidden in (black, ~black))
        return [fit(view, smoothing=smoothing, look=look) for view in views]

    def unseen(compare: Callable[[DisplacementField], NDArray], fits: list[DisplacementField]) -> NDArray:
        """Result of `compare` for each fit in the blocks that the fit has not seen."""
        return np.where(black, compare(fits[0]), compare(fits[1]))

    def correlation(field: DisplacementField | None) -> NDArray:
        return _local_correlation(fixed, moving, matrix, field, params)

    def agreement(fits: list[DisplacementField]) -> tuple[float, float]:
        return _agreement(fits[0].pull, fits[1].pull, fixed.mask, _PATCH * _block_side(fixed))

    stiff: tuple[tuple[float, float], ants_fits.Look] = (params.syn_smoothing[0], "information")
    first = trials(*stiff)
    standing_out = contrast(fixed), contrast(moving)
    product = unseen(lambda field: standing_out[0] * pull_back(standing_out[1], moving, fixed, matrix, field), first)
    common, error = _gain(product, labels)
    by_contrast = contrast_fits(params) if common > -_CLEAR * error else []
    evidence = agreement(first)
    if by_contrast and not _clear(evidence):
        first = trials(*by_contrast[0])
        evidence = agreement(first)
    before, best = correlation(None), unseen(correlation, first)
    gained = _gain(best - before, labels)
    quality = {"agreement": evidence[0], "agreement_error": evidence[1]}
    quality |= {"heldout_gain": gained[0], "heldout_error": gained[1], "halves_um": _apart(first, fixed.mask)}
    if not _clear(evidence):
        note = "Different parts of the tissue did not agree on a deformation; it was discarded."
        return Deformation(None, note, quality)
    if _clear((-gained[0], gained[1])):
        note = "The deformation of one part of the tissue made others fit worse; it was discarded."
        return Deformation(None, note, quality)
    if certain and not _clear(gained):
        note = (
            "Hidden tissue did not fit clearly better with a deformation; it was discarded (`method='syn'` keeps it)."
        )
        return Deformation(None, note, quality)

    kept = [stiff, *by_contrast]
    for smoothing in params.syn_smoothing:
        if not _clear(gained):
            break
        softer = trials(smoothing, "correlation")
        after = unseen(correlation, softer)
        gained = _gain(after - best, labels)
        if _clear(gained):
            best = after
            kept.append((smoothing, "correlation"))
            quality["halves_um"] = _apart(softer, fixed.mask)
            quality |= dict(zip(("heldout_gain", "heldout_error"), _gain(best - before, labels), strict=True))

    for smoothing, look in kept[::-1]:  # to stiffer ones, if need be
        field = fit(fixed, smoothing=smoothing, look=look)
        found = field_quality(field, fixed.mask)
        low, high = params.jacobian_limits
        if found["folds"] == 0 and found["jacobian_min"] >= low and found["jacobian_max"] <= high:
            used = {"syn_smoothing": list(smoothing), "syn_look": look}
            return Deformation(field, "", found | quality | used)
    limits = f"{found['jacobian_min']:.2f} to {found['jacobian_max']:.2f}"
    return Deformation(None, f"The deformable fit changed local areas by {limits}; it was discarded.", quality)


def _apart(fits: list[DisplacementField], mask: NDArray[np.bool_]) -> float:
    """Root mean square distance in um between two displacements in tissue."""
    return float(np.sqrt(np.mean(np.sum((fits[0].pull[mask].astype(float) - fits[1].pull[mask]) ** 2, axis=1))))


def _clear(estimate: tuple[float, float]) -> bool:
    """True if an estimate is above zero by two of its standard errors."""
    return estimate[0] > _CLEAR * estimate[1]


def contrast_fits(params: RegistrationParams) -> list[tuple[tuple[float, float], ants_fits.Look]]:
    """Smoothing and look of the fits to all tissue in which contrast takes part, from stiff to soft."""
    flow, total = params.syn_smoothing[0]
    return [((factor * flow, factor * total), "contrast") for factor in _STIFFER]


def _common_view(fixed: Channel, moving: Channel, matrix: NDArray[np.float64]) -> tuple[Channel, Channel]:
    """Both images near the tissue of either section, and background elsewhere.

    Fiducials, haze and ink do not move with the tissue. Fading each image around its own mask alone would cut edges where
    the two masks differ.
    """
    views = []
    for own, other, way in ((fixed, moving, matrix), (moving, fixed, np.linalg.inv(matrix))):
        tissue = ndi.binary_fill_holes(own.mask | (pull_back(other.mask, other, own, way) > 0.5))
        near = ndi.distance_transform_edt(~tissue, sampling=own.size) <= RIM
        views.append(replace(own, image=own.image * ndi.gaussian_filter(near.astype(np.float32), SOFT_EDGE)))
    return views[0], views[1]


def _block_side(channel: Channel) -> int:
    return max(6, min(_BLOCK, round(np.sqrt(channel.mask.sum() / (2 * _MIN_BLOCKS)))))


def chessboard(shape: tuple[int, ...], side: int) -> NDArray[np.bool_]:
    """Black squares ``(y, x)`` of `side` pixels."""
    row, column = np.indices(shape) // side
    return (row + column) % 2 == 1


def _blocks(channel: Channel, params: RegistrationParams) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Blocks of one color ``(y, x)``, and the number of the block for pixels in the core of its tissue (0 elsewhere)."""
    side = _block_side(channel)
    black = chessboard(channel.image.shape, side)
    core = max(1, min(_CORE * ants_fits.correlation_window(channel, params), side // 3))
    inner = ndi.binary_erosion(black, iterations=core) | ndi.binary_erosion(~black, iterations=core)
    labels = np.where(inner & channel.mask, square_tiles(black.shape, side) + 1, 0)
    size = np.bincount(labels.ravel())
    return black, np.where(size[labels] >= _MIN_SHARE * (side - 2 * core) ** 2, labels, 0)


def _without(channel: Channel, hidden: NDArray[np.bool_]) -> Channel:
    """Channel with some blocks hidden.

    A mask alone does not hide them: the windows of the fit and the coarse levels of its pyramid cross the borders of the
    blocks. So the blocks are also filled from their surroundings.
    """
    seen = channel.visible() & ~hidden
    blur = 0.15 * _BLOCK  # narrow enough to continue the rim of a block without an edge, wide enough for its middle
    weight = ndi.gaussian_filter(seen.astype(np.float32), blur)
    likely = ndi.gaussian_filter(np.where(seen, channel.image, 0.0), blur) / np.maximum(weight, 1e-6)
    return replace(channel, image=np.where(seen, channel.image, likely).astype(np.float32), seen=seen)


def _agreement(first: NDArray, second: NDArray, mask: NDArray[np.bool_], side: int) -> tuple[float, float]:
    """Agreement of two displacement fields ``(y, x, 2)`` in tissue, and its standard error.

    The agreement is the mean scalar product over the mean square: 1 for equal fields, 0 for unrelated ones. The error is
    a jackknife over square patches of `side` pixels.
    """
    patches = square_tiles(mask.shape, side)[mask]
    first, second = (field[mask].astype(float) for field in (first, second))
    common = np.bincount(patches, (first * second).sum(-1))
    size = np.bincount(patches, 0.5 * (first**2 + second**2).sum(-1))
    left_out = (common.sum() - common) / np.maximum(size.sum() - size, 1e-12)
    left_out = left_out[np.bincount(patches) > 0]
    return float(common.sum() / max(size.sum(), 1e-12)), jackknife_error(left_out)


def _gain(difference: NDArray, labels: NDArray[np.int64]) -> tuple[float, float]:
    """Mean over blocks, and its standard error."""
    blocks = np.unique(labels[labels > 0])
    if len(blocks) < 2:
        return 0.0, 0.0
    means = ndi.mean(difference, labels, blocks)
    return float(np.mean(means)), float(sem(means))


def _local_correlation(
    fixed: Channel,
    moving: Channel,
    matrix: NDArray[np.float64],
    field: DisplacementField | None,
    params: RegistrationParams,
) -> NDArray[np.float32]:
    """Squared correlation ``(y, x)`` in a window around each pixel, which the fit maximises."""
    sigma = 0.5 * ants_fits.correlation_window(fixed, params)
    moved = pull_back(moving.image, moving, fixed, matrix, field)

    def mean(image: NDArray) -> NDArray:
        return ndi.gaussian_filter(image, sigma)

    first, second = mean(fixed.image), mean(moved)
    variances = (mean(fixed.image**2) - first**2) * (mean(moved**2) - second**2)
    return (mean(fixed.image * moved) - first * second) ** 2 / np.maximum(variances, 1e-8)


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """One section in the common frame."""

    channel: Channel
    """In the section's own frame."""
    matrix: NDArray[np.float64]
    field: PullBack | None = None

    def drawn(self, origin: NDArray[np.float64], shape: tuple[int, int]) -> Channel:
        """The section on a grid of the common frame."""
        own = self.channel
        grid = Channel(np.zeros(shape, np.float32), np.zeros(shape, bool), tuple(origin), own.size, (0.0, 0.0))
        points = grid.centres(np.ones(shape, bool))
        points = points if self.field is None else self.field.pulled(points)
        seen = own.in_frame(apply_affine(points, np.linalg.inv(self.matrix))).reshape(shape)
        image, mask = (pull_back(a, own, grid, self.matrix, self.field) for a in (own.image, own.mask))
        return replace(grid, image=image, mask=(mask > 0.5) & seen, seen=seen)

    def corners(self) -> NDArray[np.float64]:
        """Lowest and highest x, y of the tissue, um."""
        points = apply_affine(self.channel.centres(), self.matrix)
        return np.array([points.min(axis=0), points.max(axis=0)])


def deform_stack(
    images: Mapping[str, SectionImage],
    placed: Mapping[str, ChainResult],
    reference: str,
    *,
    params: RegistrationParams,
    seed: int,
    run: Callable[[Callable, list[tuple], str], list],
    certain: bool = False,
    kept: Mapping[str, PullBack] | None = None,
) -> dict[str, tuple[DisplacementField | None, dict[str, Any]]]:
    """One deformation per section on top of its matrix, onto the reference or onto its placed neighbor.

    A section is deformed onto the reference itself if a direct registration confirms its place. Otherwise it is deformed
    onto the next section on its path. On HER2ST, the expression of C6 agreed worse after deformation onto the deformed C5
    (0.126) than without deformation (0.145), and better after deformation onto C4 (0.150).

    Every field acts in the frame of the reference and is smoothed as a whole. Composed fields of pairs would add up their
    errors (measured: two to five times the drift of the matrices).

    Failed and given sections, and those without a thumbnail, are not deformed; others may be deformed onto given ones, and
    follow their `kept` deformations, in the frame of the reference. `run` calls a function for each tuple of arguments,
    and returns the results in order. With `certain` a deformation is kept only if hidden tissue fits clearly better with
    it. The result has a field (None if none is kept) and the quality of every section that was tried.
    """
    size = max(working_pixel(i, images[reference], params, side=params.syn_side) for i in images.values())
    kept = {} if kept is None else kept
    margin = _margin(size, params)
    sections = {
        name: Placed(deformation_channel(image, size, margin), np.asarray(placed[name].matrix, float), kept.get(name))
        for name, image in images.items()
    }
    done = {name: own for name, own in sections.items() if placed[name].route in ("reference", "given")}
    todo = [name for name in sections if name not in done and placed[name].verdict != "failed"]
    found: dict[str, tuple[DisplacementField | None, dict[str, Any]]] = {}
    while ready := [name for name in todo if _target(placed[name], reference) in done]:  # the rest: through failed ones
        tasks = [(done[_target(placed[name], reference)], sections[name], params, seed) for name in ready]
        found |= zip(ready, run(partial(deform_onto, certain=certain), tasks, "Deforming sections"), strict=True)
        done |= {name: replace(sections[name], field=found[name][0]) for name in ready}
        todo = [name for name in todo if name not in done]
    return found


def _target(result: ChainResult, reference: str) -> str:
    """Section onto which another one is deformed."""
    return reference if result.confirmed else result.path[1]


def deform_onto(
    target: Placed, source: Placed, params: RegistrationParams, seed: int, *, certain: bool = False
) -> tuple[DisplacementField | None, dict[str, Any]]:
    """Field that brings `source` onto `target`, both in the common frame (None if it is not kept), and its quality."""
    size = target.channel.size
    corners, margin = np.array([target.corners(), source.corners()]), _margin(size, params)
    low, high = corners[:, 0].min(axis=0) - margin, corners[:, 1].max(axis=0) + margin
    # On the target's own lattice: then a section that does not move is not blurred by resampling.
    own = np.asarray(target.channel.origin)
    origin = own + np.floor((low - own) / size) * size
    width, height = np.ceil((high - origin) / size).astype(int)
    fixed = target.drawn(origin, (int(height), int(width)))
    deformation = fit_deformation(fixed, source.channel, source.matrix, params, seed, certain=certain)
    field = deformation.field
    quality: dict[str, Any] = {
        "dice_after": tissue_dice(fixed, source.channel, source.matrix, field),
        "note": deformation.note,
    }
    if field is not None:
        quality |= expected_error(fixed, source.channel, source.matrix, field, deformation.quality["halves_um"])
    return field, quality | deformation.quality


def _margin(size: float, params: RegistrationParams) -> float:
    return params.max_displacement + 4 * size
