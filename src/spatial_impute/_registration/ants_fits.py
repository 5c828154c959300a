"""Calls of antspyx, and its conventions.

* ITK wants ``[x, y]`` arrays and the position of the first pixel centre; :func:`_image` gives both, so that ITK's
  physical space is the frame of the section in um, up to a shift, at any resolution.
* An ITK transform maps points of the fixed image to the moving one, because that is what resampling an image needs.
  The matrices of this package map moving points to fixed ones. The inverse is taken here and nowhere else.
* antsRegistration passes everything by files. They live in a temporary folder that is gone when the call returns.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy import ndimage as ndi

from spatial_impute._geometry import affine_between, translation
from spatial_impute._registration.transform import DisplacementField
from spatial_impute._registration.types import contrast

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from spatial_impute._registration.types import Channel, RegistrationParams

Look = Literal["information", "contrast", "correlation"]

_THREADS = "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"
# Pixels per iteration. Smoothing of the total field reduces each step, and so limits the displacement of a fit: ten pixels
# (bends of 200 um on HER2ST) for the first one, a few for those that follow finer structure.
_SYN_STEP, _SYN_STEP_FINE = 0.5, 0.2
_SYN_BINS = 32  # of mutual information, as in the linear fits
_MAX_WINDOW = 4  # pixels, half side: the time of a local correlation grows with the area of its window


def fit_linear(
    fixed: Channel,
    moving: Channel,
    initial: NDArray[np.float64],
    kind: Literal["Rigid", "Affine"],
    *,
    iterations: tuple[int, ...],
    mask_margin: float,
    seed: int,
) -> NDArray[np.float64]:
    """Refine a linear transform by mutual information inside the (widened) tissue masks.

    Mutual information works across stains. Every pixel is a sample, so the result has no random part. Start and result
    are matrices ``(3, 3)``, moving to fixed, um; a mirrored start stays mirrored. `iterations` has one number per level,
    each twice as fine as the one before; the last one is the grid of the channels. `mask_margin` is the width in um of
    the rim of background that takes part.
    """
    levels = tuple(range(len(iterations)))[::-1]
    options: dict[str, Any] = {
        "mask_all_stages": True,
        "aff_metric": "mattes",
        "aff_random_sampling_rate": 1.0,
        "aff_iterations": tuple(iterations),
        "aff_shrink_factors": tuple(2**level for level in levels),
        "aff_smoothing_sigmas": levels,
    }
    with _controlled(seed), _fitted(fixed, moving, initial, kind, margin=mask_margin, **options) as (forward, _):
        matrix = _read_matrix(forward[0])
    return _from_centre(fixed) @ matrix @ np.linalg.inv(_from_centre(moving))


def fit_deformable(
    fixed: Channel,
    moving: Channel,
    matrix: NDArray[np.float64],
    *,
    smoothing: tuple[float, float],
    look: Look,
    params: RegistrationParams,
    seed: int,
) -> DisplacementField:
    """Diffeomorphic fit (SyN) on top of `matrix` (moving to fixed, um), which does not change.

    The measure is mutual information, alone or in equal parts with a second one. Mutual information works across stains.
    Squared differences of contrast follow structure that differs from its surroundings, in proportion to its strength.
    Local correlation also follows small and pale structure, but it follows patterns of the slide as well. `smoothing`
    is that of the update and of the total field, in working pixels.
    """
    import ants

    flow, total = smoothing
    options: dict[str, Any] = {
        "margin": params.max_displacement,
        "syn_metric": "mattes",
        "syn_sampling": _SYN_BINS,
        "reg_iterations": params.syn_iterations,
        "flow_sigma": flow,
        "total_sigma": total,
        "grad_step": _SYN_STEP_FINE if look == "correlation" else _SYN_STEP,
    }
    if look == "contrast":
        pair = _image(fixed, contrast(fixed)), _image(moving, contrast(moving))
        options["multivariate_extras"] = [("MeanSquares", *pair, 1.0, 1)]  # the last number is not used
    elif look == "correlation":
        pair = _image(fixed, fixed.image), _image(moving, moving.image)
        options["multivariate_extras"] = [("CC", *pair, 1.0, correlation_window(fixed, params))]
    with _controlled(seed), _fitted(fixed, moving, matrix, "SyNOnly", **options) as (forward, inverse):
        # Forward is [warp, matrix] (pull-back of images), inverse is [matrix, inverse warp] (points).
        fields = [ants.image_read(path).numpy() for path in (forward[0], inverse[-1])]
    pull, push = (np.ascontiguousarray(field.transpose(1, 0, 2), np.float32) for field in fields)
    return DisplacementField(pull, push, fixed.origin, fixed.size)


def correlation_window(channel: Channel, params: RegistrationParams) -> int:
    """Half side in pixels of the window in which the deformable fit correlates."""
    return min(_MAX_WINDOW, max(2, round(params.syn_radius / channel.size)))


def itk_matrix(linear: NDArray, centre: NDArray, offset: NDArray) -> NDArray[np.float64]:
    """ITK's ``y = A (x - c) + c + t`` as a ``(3, 3)`` matrix."""
    return affine_between(linear, centre, np.asarray(offset, float) + centre)


@contextmanager
def _fitted(
    fixed: Channel, moving: Channel, initial: NDArray[np.float64], kind: str, *, margin: float, **options: Any
) -> Iterator[tuple[list[str], list[str]]]:
    """Files of the forward and of the inverse transforms of a fit; they are gone after the ``with`` block.

    `initial` ``(3, 3)`` maps moving to fixed, um; the masks are `margin` um wider than the tissue. The transforms act on
    coordinates from the centres of the tissues, see :func:`_from_centre`.
    """
    import ants

    with tempfile.TemporaryDirectory(prefix="spatial_impute_") as folder:
        start = str(Path(folder) / "initial.mat")
        _write_matrix(np.linalg.inv(_from_centre(fixed)) @ initial @ _from_centre(moving), start)
        result = ants.registration(
            _image(fixed, fixed.image),
            _image(moving, moving.image),
            kind,
            initial_transform=[start],
            outprefix=str(Path(folder) / "fit_"),
            mask=_image(fixed, _widen(fixed, margin)),
            moving_mask=_image(moving, _widen(moving, margin)),
            **options,
        )
        yield result["fwdtransforms"], result["invtransforms"]


def _from_centre(channel: Channel) -> NDArray[np.float64]:
    """Translation from coordinates with their origin at the centre of the tissue to the frame of the section.

    antsRegistration turns about the origin of its coordinates. With the origin far outside the tissue, angle and shift
    depend so much on each other that a fit can stop too early or diverge (seen: 70 um and 1.5 mm on real sections).
    """
    return translation(channel.centres().mean(0))


def _image(channel: Channel, array: NDArray) -> Any:
    """`array` on the grid of `channel` as an ANTs image, in coordinates with their origin at the centre of the tissue."""
    import ants

    corner = np.asarray(channel.origin) - _from_centre(channel)[:2, 2]
    return ants.from_numpy(
        np.ascontiguousarray(array.T, dtype=np.float32),
        origin=tuple(float(c) for c in corner + 0.5 * channel.size),
        spacing=(channel.size, channel.size),
    )


def _widen(channel: Channel, margin: float) -> NDArray[np.bool_]:
    """Tissue and a rim of background inside the image."""
    return channel.visible() & (ndi.distance_transform_edt(~channel.mask, sampling=channel.size) <= margin)


def _write_matrix(matrix: NDArray[np.float64], path: str) -> None:
    import ants

    pull_back = np.linalg.inv(matrix)
    transform = ants.create_ants_transform(
        "AffineTransform", precision="double", dimension=2, matrix=pull_back[:2, :2], translation=pull_back[:2, 2]
    )
    ants.write_transform(transform, path)


def _read_matrix(path: str) -> NDArray[np.float64]:
    import ants

    transform = ants.read_transform(path)
    linear = np.asarray(transform.parameters[:4], float).reshape(2, 2)
    matrix = itk_matrix(linear, transform.fixed_parameters, transform.parameters[4:6])
    return np.asarray(np.linalg.inv(matrix), float)


@contextmanager
def _controlled(seed: int) -> Iterator[None]:
    """Give antsRegistration a seed and one thread.

    antspyx reads the seed from a module variable; its public setter would also reseed NumPy and change the environment.
    ITK reads the number of threads from the environment at its first use in a process and never again. With several,
    mutual information is summed in another order each time and the result moves; so it is one, unless the variable is
    set. Stacks are faster by registering several pairs at a time instead.
    """
    import ants.config

    before, threads = ants.config._random_seed, os.environ.get(_THREADS)
    # antsRegistration takes 0 as "use the clock".
    ants.config._random_seed = int(seed) % (2**31 - 1) + 1
    os.environ.setdefault(_THREADS, "1")
    try:
        yield
    finally:
        ants.config._random_seed = before
        if threads is None:
            os.environ.pop(_THREADS, None)
