"""The only place that talks to antspyx, and the only one that knows its conventions.

* ITK wants ``[x, y]`` arrays and the position of the first pixel centre; :func:`_image` gives both, so that ITK's physical space
  is the section's corner-based frame in um at any resolution.
* An ITK transform maps points of the fixed image to the moving one, because that is what resampling an image needs. The
  matrices of this package map moving points to fixed ones. The inverse is taken here and nowhere else.
* antsRegistration passes everything by files. They live in a temporary folder that is gone when the call returns.
"""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy import ndimage as ndi

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from spatial_impute._registration._channel import Channel
    from spatial_impute._registration._types import RegistrationParams


def fit_linear(
    fixed: Channel,
    moving: Channel,
    initial: NDArray[np.float64],
    kind: Literal["Rigid", "Affine"],
    params: RegistrationParams,
    seed: int,
) -> NDArray[np.float64]:
    """Refine a linear transform by global correlation inside the (widened) tissue masks.

    Every pixel is a sample: correlation over all pixels has no random part, unlike sampled mutual information.

    Parameters
    ----------
    initial
        Matrix ``(3, 3)`` to start from, moving to fixed, um. A mirrored one stays mirrored.

    Returns
    -------
    Matrix ``(3, 3)``, moving to fixed, um.
    """
    import ants

    # antsRegistration turns about the origin of its coordinates. With the origin far outside the tissue, angle and shift are so
    # entangled that the fit can stop half way or run off; so each image gets its own origin at the centre of its tissue.
    to_fixed, to_moving = _shift(fixed.centres().mean(0)), _shift(moving.centres().mean(0))
    fixed, moving = _centred(fixed, to_fixed), _centred(moving, to_moving)
    initial = np.linalg.inv(to_fixed) @ initial @ to_moving
    with tempfile.TemporaryDirectory(prefix="spatial_impute_") as folder, _random_seed(seed):
        start = str(Path(folder) / "initial.mat")
        _write_matrix(initial, start)
        result = ants.registration(
            _image(fixed, fixed.image),
            _image(moving, moving.image),
            kind,
            initial_transform=[start],
            outprefix=str(Path(folder) / "linear_"),
            mask=_image(fixed, _widen(fixed, params.mask_margin)),
            moving_mask=_image(moving, _widen(moving, params.mask_margin)),
            mask_all_stages=True,
            aff_metric="GC",
            aff_random_sampling_rate=1.0,
            aff_iterations=params.linear_iterations,
            aff_shrink_factors=(8, 4, 2, 1),
            aff_smoothing_sigmas=(3, 2, 1, 0),
        )
        matrix = _read_matrix(result["fwdtransforms"][0])
    return to_fixed @ matrix @ np.linalg.inv(to_moving)


def _shift(offset: NDArray) -> NDArray[np.float64]:
    matrix = np.eye(3)
    matrix[:2, 2] = offset
    return matrix


def _centred(channel: Channel, shift: NDArray) -> Channel:
    """The same channel in coordinates whose origin lies at `shift`."""
    x0, y0 = channel.origin
    return replace(channel, origin=(x0 - shift[0, 2], y0 - shift[1, 2]))


def _image(channel: Channel, array: NDArray) -> Any:
    import ants

    half = 0.5 * channel.size
    origin = (channel.origin[0] + half, channel.origin[1] + half)
    array = np.ascontiguousarray(array.T, dtype=np.float32)
    return ants.from_numpy(array, origin=origin, spacing=(channel.size, channel.size))


def _widen(channel: Channel, margin: float) -> NDArray[np.bool_]:
    return ndi.distance_transform_edt(~channel.mask, sampling=channel.size) <= margin


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
    return np.linalg.inv(itk_matrix(linear, transform.fixed_parameters, transform.parameters[4:6]))


def itk_matrix(linear: NDArray, centre: NDArray, translation: NDArray) -> NDArray[np.float64]:
    """ITK's ``y = A (x - c) + c + t`` as a ``(3, 3)`` matrix."""
    matrix = np.eye(3)
    matrix[:2, :2] = linear
    matrix[:2, 2] = np.asarray(translation) + centre - matrix[:2, :2] @ np.asarray(centre)
    return matrix


@contextmanager
def _random_seed(seed: int) -> Iterator[None]:
    """Give antsRegistration a seed.

    antspyx reads it from a module variable. Its public setter would also reseed NumPy and change the environment for good.
    """
    import ants.config

    before = ants.config._random_seed
    # antsRegistration takes 0 as "use the clock".
    ants.config._random_seed = int(seed) % (2**31 - 1) + 1
    try:
        yield
    finally:
        ants.config._random_seed = before
