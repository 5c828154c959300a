from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage as ndi

from spatial_impute._registration.orientation import orientation_candidates, pose
from spatial_impute._registration.types import Channel, RegistrationParams

SIZE = 20.0  # um per pixel


def make_channel(shape=(110, 140), *, symmetric=False, seed=0) -> Channel:
    """Tissue with smooth random texture; if `symmetric`, in an ellipse: only texture tells 0 from 180."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]]
    y, x = (y - shape[0] / 2) / (0.36 * shape[0]), (x - shape[1] / 2) / (0.36 * shape[1])
    mask = x**2 + y**2 < 1
    if not symmetric:
        mask &= ~((x > 0.2) & (y > 0.1))
    texture = ndi.gaussian_filter(rng.normal(size=shape), 4)
    texture = 0.5 + 0.15 * texture / texture.std()
    frame = (shape[1] * SIZE, shape[0] * SIZE)
    return Channel((np.clip(texture, 0.05, 1) * mask).astype(np.float32), mask, (0.0, 0.0), SIZE, frame)


def moved(channel: Channel, matrix: np.ndarray) -> Channel:
    """The channel after `matrix`, on the same grid."""
    index = channel.to_index() @ np.linalg.inv(matrix) @ np.linalg.inv(channel.to_index())
    image, mask = (
        ndi.affine_transform(a.astype(float), index[:2, :2], index[:2, 2], order=1)
        for a in (channel.image, channel.mask)
    )
    return Channel(image.astype(np.float32), mask > 0.5, channel.origin, channel.size, channel.frame)


def rms(channel: Channel, first: np.ndarray, second: np.ndarray) -> float:
    points = np.column_stack([channel.centres(), np.ones(channel.mask.sum())])
    return float(np.sqrt(np.mean(np.sum((points @ (first - second).T) ** 2, axis=1))))


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("angle", [0, 33, 90, 180, 275])
@pytest.mark.parametrize("symmetric", [False, True])
def test_best_candidate_is_near_the_truth(angle, mirrored, symmetric):
    fixed = make_channel(symmetric=symmetric)
    centre = fixed.centres().mean(0)
    truth = pose(angle, centre + np.array([60, -40]), centre, mirrored=mirrored)  # moving -> fixed
    moving = moved(fixed, np.linalg.inv(truth))
    params = RegistrationParams(search_side=120)

    best = orientation_candidates(fixed, moving, params)[0]

    # Half a step of angle (5 degrees) on a tissue of some 700 um radius is 60 um, plus a search pixel of shift.
    assert rms(moving, best, truth) < 90
    assert (np.linalg.det(best[:2, :2]) < 0) == mirrored


def test_candidates_are_distinct_rigid_poses():
    fixed = make_channel()
    params = RegistrationParams(n_candidates=4)
    candidates = orientation_candidates(fixed, fixed, params)
    assert 1 < len(candidates) <= 4
    for i, matrix in enumerate(candidates):
        np.testing.assert_allclose(matrix[:2, :2] @ matrix[:2, :2].T, np.eye(2), atol=1e-12)
        assert all(rms(fixed, matrix, other) > 100 for other in candidates[:i])


def test_mirror_can_be_switched_off():
    fixed = make_channel()
    moving = moved(fixed, pose(0, fixed.centres().mean(0), fixed.centres().mean(0), mirrored=True))
    faces = [
        np.linalg.det(m[:2, :2]) for m in orientation_candidates(fixed, moving, RegistrationParams(allow_mirror=False))
    ]
    assert min(faces) > 0


def test_pose_maps_centre_and_turns_by_the_angle():
    matrix = pose(90, [10.0, 0.0], [3.0, 4.0])
    np.testing.assert_allclose(matrix @ [10, 0, 1], [3, 4, 1])
    np.testing.assert_allclose(matrix @ [11, 0, 1], [3, 5, 1])  # +x goes to +y: one step down in an image
    np.testing.assert_allclose(pose(0, [0.0, 0.0], [0.0, 0.0], mirrored=True) @ [1, 2, 1], [-1, 2, 1])
