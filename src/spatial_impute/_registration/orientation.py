"""Search for the pose of one section on another over all rotations, both faces and all shifts."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import numpy as np
from scipy import fft
from scipy import ndimage as ndi

from spatial_impute._geometry import affine_between, translation
from spatial_impute._registration.quality import disagreement, edges_inside, masked_blur
from spatial_impute._registration.types import shrink

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from spatial_impute._registration.types import Channel, RegistrationParams

_BLUR = 1.5  # search pixels: a step of 10 degrees moves the rim of the tissue by several pixels


def pose(
    angle: float, moving_centre: ArrayLike, fixed_centre: ArrayLike, *, mirrored: bool = False
) -> NDArray[np.float64]:
    """``(3, 3)`` matrix that mirrors (x to -x), rotates by `angle` degrees, and moves one centre onto the other."""
    cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    linear = np.array([[cos, -sin], [sin, cos]]) @ np.diag([-1.0 if mirrored else 1.0, 1.0])
    return affine_between(linear, moving_centre, fixed_centre)


def orientation_candidates(fixed: Channel, moving: Channel, params: RegistrationParams) -> list[NDArray[np.float64]]:
    """Distinct rigid poses of the moving section on the fixed one, most promising first.

    A Fourier transform compares every rotation and mirror image of the moving section with the fixed one at every shift.
    The measure is the correlation inside the tissue plus the overlap of the outlines. Outlines alone cannot distinguish a
    symmetric section from itself turned by 180 degrees. The content is compared as stain and as edges, because another
    stain may turn dark into pale but keeps the edges.

    The result has at most ``params.n_candidates`` matrices ``(3, 3)``, moving to fixed, um: alternately the best peaks of
    stain and of edges, with errors of up to half a step of angle. Two more poses always follow: the section unmoved, and
    the section moved so that the centres of both tissues meet. Most sections have about the right face and rotation.
    """
    size = max(max(fixed.image.shape), max(moving.image.shape)) * fixed.size / params.search_side
    fixed, moving = shrink(fixed, size), shrink(moving, size)
    centre = moving.centres().mean(0)
    rankings = [
        [poses[key] for key in _peaks(scores)[: params.n_candidates]]
        for scores, poses in _search(fixed, moving, centre, params)
    ]
    chosen: list[NDArray] = []
    for i in range(params.n_candidates):
        for ranking in rankings:
            if i < len(ranking) and len(chosen) < params.n_candidates:
                _add(chosen, ranking[i], moving)
    _add(chosen, pose(0.0, centre, fixed.centres().mean(0)), moving)
    _add(chosen, np.eye(3), moving)
    return chosen


def _add(chosen: list[NDArray], candidate: NDArray, moving: Channel) -> None:
    """Append a pose unless it repeats one, up to the precision of the search (3 pixels)."""
    points = moving.centres()[:: max(1, int(moving.mask.sum()) // 500)]
    if all(disagreement(candidate, other, points) > 3 * moving.size for other in chosen):
        chosen.append(candidate)


def _search(
    fixed: Channel, moving: Channel, centre: NDArray, params: RegistrationParams
) -> list[tuple[NDArray, dict[tuple[int, int], NDArray]]]:
    """Score ``(face, angle)`` at the best shift, and the poses, by stain and by edges."""
    fixed_mask, moving_mask = (channel.mask.astype(np.float32) for channel in (fixed, moving))
    contents = list(zip(map(_unit, _contents(fixed)), _contents(moving), strict=True))
    # Every rotation of the moving tissue about its centre fits a square of this half side.
    radius = float(np.linalg.norm(moving.centres() - centre, axis=1).max()) / moving.size
    side = 2 * int(np.ceil(radius)) + 3
    shape = [fft.next_fast_len(n + side, real=True) for n in fixed.image.shape]
    spectra = [np.conj(fft.rfft2(image, shape)) for image in (fixed_mask, *(content for content, _ in contents))]
    # The overlap is relative to the smaller tissue: lost tissue does not lower the score of a torn section.
    area = min(float(fixed_mask.sum()), float(moving_mask.sum()))

    faces = (False, True) if params.allow_mirror else (False,)
    angles = np.arange(params.n_angles) * (360.0 / params.n_angles)
    found: list[tuple[NDArray, dict[tuple[int, int], NDArray]]]
    found = [(np.empty((len(faces), len(angles))), {}) for _ in contents]
    middle = np.array([side, side]) * (0.5 * moving.size)
    for (f, mirrored), (a, angle) in product(enumerate(faces), enumerate(angles)):
        turn = pose(angle, centre, middle, mirrored=mirrored)
        outline = spectra[0] * fft.rfft2(_turned(moving_mask, moving, turn, side) / area, shape)
        for (scores, poses), spectrum, (_, content) in zip(found, spectra[1:], contents, strict=True):
            # Both correlations are linear: one inverse transform does for their sum.
            turned = _unit(_turned(content, moving, turn, side))
            surface = fft.irfft2(spectrum * fft.rfft2(turned, shape) + outline, shape)
            peak = np.unravel_index(np.argmax(surface), surface.shape)
            scores[f, a] = surface[peak]
            # surface[s] = sum_p fixed[p] * turned[p + s]: the turned image has to move by -s.
            shift = [-(p if p < side else p - n) for p, n in zip(peak, shape, strict=True)]
            offset = np.asarray(fixed.origin) + np.array(shift[::-1]) * fixed.size
            poses[f, a] = translation(offset) @ turn
    return found


def _unit(image: NDArray) -> NDArray[np.float32]:
    return image / (np.sqrt(np.sum(image**2)) + 1e-12)


def _contents(channel: Channel) -> list[NDArray[np.float32]]:
    """Stain and strength of edges inside the tissue: zero mean there, zero outside."""
    blurred = [masked_blur(image, channel.mask, _BLUR) for image in (channel.image, edges_inside(channel))]
    return [(image - image[channel.mask].mean()) * channel.mask for image in blurred]


def _turned(image: NDArray, channel: Channel, turn: NDArray, side: int) -> NDArray[np.float32]:
    """`image` of `channel` after the pose `turn`, on a square of `side` pixels that starts at the origin."""
    square = np.array([[0, channel.size, 0.5 * channel.size], [channel.size, 0, 0.5 * channel.size], [0, 0, 1]])
    index = channel.to_index() @ np.linalg.inv(turn) @ square  # (row, col) of the square -> um -> um -> (row, col)
    return ndi.affine_transform(image, index[:2, :2], index[:2, 2], output_shape=(side, side), order=1, cval=0.0)


def _peaks(scores: NDArray) -> list[tuple[int, int]]:
    """Indices ``(face, angle)`` of the local maxima over the circle of angles, best first."""
    higher = (scores >= np.roll(scores, 1, axis=1)) & (scores > np.roll(scores, -1, axis=1))
    higher |= scores == scores.max()  # a flat circle has no local maximum
    order = np.argsort(-scores[higher], kind="stable")
    return [(int(f), int(a)) for f, a in np.argwhere(higher)[order]]
