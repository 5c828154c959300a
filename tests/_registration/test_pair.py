from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage as ndi

from spatial_impute._geometry import apply_affine
from spatial_impute._registration import PairResult, RegistrationParams, SectionImage, register_pair
from spatial_impute._registration.ants_fits import _read_matrix, _write_matrix, itk_matrix
from spatial_impute._registration.orientation import pose
from spatial_impute._registration.quality import StructureScore, pull_back
from spatial_impute._registration.types import registration_channel

SIZE = 16.0  # um per pixel: a tissue of about 2.5 x 2 mm
SHAPE = (200, 240)
FAST = RegistrationParams(working_side=160, syn_side=160, search_side=80)
MIDDLE = np.array([SHAPE[1], SHAPE[0]]) * SIZE / 2


def tissue_image(shape=SHAPE, *, symmetric=False, seed=0) -> np.ndarray:
    """H&E-like tissue (y, x, 3) in 0..255: smooth texture on two scales inside an asymmetric or an elliptic outline."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]]
    y, x = (y - shape[0] / 2) / (0.33 * shape[0]), (x - shape[1] / 2) / (0.33 * shape[1])
    outline = 1.0 if symmetric else 1 + 0.25 * np.cos(np.arctan2(y, x)) + 0.2 * np.sin(2 * np.arctan2(y, x))
    inside = ndi.gaussian_filter((x**2 + y**2 < outline**2).astype(float), 1)
    texture = sum(ndi.gaussian_filter(rng.normal(size=shape), s) * s for s in (2, 6))
    density = np.clip(0.7 + 0.25 * texture / texture.std(), 0.1, 1.6) * inside
    return 240 * np.exp(-density[..., None] * np.array([0.8, 1.0, 0.5]))


def warped(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """The image after the point map `matrix` (um), on the same frame; glass outside."""
    to_um = np.array([[0, SIZE, SIZE / 2], [SIZE, 0, SIZE / 2], [0, 0, 1]])  # (row, col) -> (x, y)
    index = np.linalg.inv(to_um) @ np.linalg.inv(matrix) @ to_um
    channels = [
        ndi.affine_transform(c, index[:2, :2], index[:2, 2], order=3, cval=240.0, mode="constant")
        for c in np.moveaxis(image, -1, 0)
    ]
    return np.clip(np.stack(channels, -1), 1, 255)


def section(image: np.ndarray) -> SectionImage:
    return SectionImage(image, (SIZE, SIZE))


def residual(matrix: np.ndarray, truth: np.ndarray, moving: SectionImage) -> float:
    """Largest distance in um between found and true place of the tissue's points."""
    rows, cols = np.nonzero(moving.mask)
    points = np.column_stack([(cols + 0.5) * SIZE, (rows + 0.5) * SIZE, np.ones(len(rows))])
    return float(np.linalg.norm(points @ (matrix - truth).T, axis=1).max())


@pytest.fixture(scope="module")
def fixed() -> SectionImage:
    return section(tissue_image())


@pytest.mark.parametrize(
    ("angle", "mirrored", "shift"),
    [(0, False, (130, -90)), (47, False, (0, 0)), (180, False, (-60, 40)), (333, True, (50, 0)), (120, True, (0, 80))],
)
def test_rigid_recovers_rotation_shift_and_mirror(fixed, angle, mirrored, shift):
    truth = pose(angle, MIDDLE, MIDDLE + np.array(shift), mirrored=mirrored)
    moving = section(warped(fixed.rgb, np.linalg.inv(truth)))
    result = register_pair(fixed, moving, method="rigid", params=FAST)
    assert residual(result.matrix, truth, moving) < 5
    assert result.verdict == "ok", result.quality
    assert result.method == "rigid"
    assert result.quality["start_mirrored"] is mirrored
    # The chosen start is the truth up to the step of the search.
    assert abs((result.quality["start_rotation_deg"] - angle + 180) % 360 - 180) <= 10


def test_no_error_is_stated_for_a_pose_that_is_not_clear(fixed):
    """Another section that fits as well in another pose may be wrong by any distance."""
    params = {"working_side": 320, "search_side": 80}
    clear = register_pair(fixed, fixed, method="rigid", params=RegistrationParams(**params))
    unclear = register_pair(fixed, fixed, method="rigid", params=RegistrationParams(**params, min_margin=1.0))
    assert clear.quality["error_um"] < 20
    assert unclear.verdict == "weak"
    assert unclear.quality["error_um"] is None
    assert unclear.quality["error_p90_um"] is None


@pytest.mark.parametrize("angle", [0, 180])
def test_content_decides_where_the_outline_cannot(angle):
    image = tissue_image(symmetric=True, seed=3)
    truth = pose(angle, MIDDLE, MIDDLE)
    moving = section(warped(image, np.linalg.inv(truth)))
    result = register_pair(section(image), moving, method="rigid", params=FAST)
    assert residual(result.matrix, truth, moving) < 5
    assert result.quality["margin"] > FAST.min_margin


def test_affine_recovers_stretch_and_shear(fixed):
    linear = pose(25, MIDDLE, MIDDLE)
    stretch = itk_matrix(np.array([[1.05, 0.03], [0.0, 0.95]]), MIDDLE, np.array([40.0, 20.0]))
    truth = stretch @ linear
    moving = section(warped(fixed.rgb, np.linalg.inv(truth)))
    result = register_pair(fixed, moving, method="affine", params=FAST)
    assert result.method == "affine"
    assert residual(result.matrix, truth, moving) < 6
    expected = np.linalg.svd(truth[:2, :2], compute_uv=False)
    np.testing.assert_allclose([result.quality["scale_max"], result.quality["scale_min"]], expected, atol=0.01)


def test_implausible_affine_falls_back_to_rigid(fixed):
    stretch = itk_matrix(np.diag([1.12, 0.92]), MIDDLE, np.zeros(2))
    moving = section(warped(fixed.rgb, np.linalg.inv(stretch)))
    strict = RegistrationParams(working_side=160, syn_side=160, search_side=80, max_scale=1.05)
    result = register_pair(fixed, moving, method="affine", params=strict)
    assert result.method == "rigid"
    assert any("rigid" in reason for reason in result.quality["reasons"])
    np.testing.assert_allclose(result.quality["scale_max"], 1, atol=1e-6)


@pytest.mark.parametrize(("gain", "expected"), [((-0.03, 0.02), "affine"), ((-0.05, 0.02), "rigid")])
def test_affine_stands_unless_clearly_worse(fixed, monkeypatch, gain, expected):
    monkeypatch.setattr(StructureScore, "gain", lambda *_: gain)
    result = register_pair(fixed, fixed, method="affine", params=FAST)
    assert result.method == expected
    assert any("clearly lower" in reason for reason in result.quality["reasons"]) == (expected == "rigid")


def test_missing_tissue(fixed):
    truth = pose(200, MIDDLE, MIDDLE)
    torn = fixed.rgb.copy()
    torn[:, : SHAPE[1] // 2 - 15] = 240
    moving = section(warped(torn, np.linalg.inv(truth)))
    result = register_pair(fixed, moving, method="rigid", params=FAST)
    # The cut itself lies in the rim that takes part in the fit, which costs a pixel or two.
    assert residual(result.matrix, truth, moving) < 3 * SIZE
    assert result.verdict != "ok"
    assert any("Dice" in reason for reason in result.quality["reasons"])


def test_thumbnails_of_different_resolution(fixed):
    truth = pose(70, MIDDLE, MIDDLE)
    image = warped(fixed.rgb, np.linalg.inv(truth))
    coarse = image.reshape(SHAPE[0] // 2, 2, SHAPE[1], 3).mean(1)  # anisotropic: half as many rows
    result = register_pair(fixed, SectionImage(coarse, (SIZE, 2 * SIZE)), method="rigid", params=FAST)
    assert residual(result.matrix, truth, section(image)) < 5


def test_tissue_cut_by_the_frame(fixed):
    truth = pose(0, MIDDLE, MIDDLE - [SIZE * 60, 0])
    moving = section(np.ascontiguousarray(fixed.rgb[:, 60:]))  # the frame cuts off part of the tissue
    result = register_pair(fixed, moving, method="affine", params=FAST)
    assert residual(result.matrix, np.linalg.inv(truth), moving) < 5
    assert result.quality["dice_after"] > 0.97, "only what both images show counts"


def test_points_and_image_move_together(fixed):
    """Blobs in the moving image, found again in the warped image, lie where their centres are moved to as points."""
    matrix = pose(30, MIDDLE, MIDDLE + np.array([48, -32]), mirrored=True)
    blobs = MIDDLE + np.array([[0, 0], [400, 100], [-300, 200], [100, -350.0]])
    channel = registration_channel(fixed, SIZE, 600.0)
    y, x = np.mgrid[: channel.image.shape[0], : channel.image.shape[1]]
    x, y = channel.origin[0] + (x + 0.5) * SIZE, channel.origin[1] + (y + 0.5) * SIZE
    for blob in blobs:
        image = np.exp(-((x - blob[0]) ** 2 + (y - blob[1]) ** 2) / (2 * (3 * SIZE) ** 2))
        seen = pull_back(image, channel, channel, matrix)
        found = np.array([(seen * x).sum(), (seen * y).sum()]) / seen.sum()
        expected = (matrix @ [*blob, 1])[:2]
        assert np.linalg.norm(found - expected) < 0.2 * SIZE


@pytest.fixture(scope="module")
def deformed(fixed, deformed_pair):
    """The fixed section turned and smoothly deformed (40 um rms), its registration, true places."""
    rng = np.random.default_rng(4)
    bend = np.stack([ndi.gaussian_filter(rng.normal(size=SHAPE), 25) for _ in range(2)], -1)
    bend *= 40 / np.sqrt((bend**2).sum(-1).mean())
    rows, cols = np.indices(SHAPE)
    matrix = pose(25, MIDDLE, MIDDLE)
    source = (np.stack([cols + 0.5, rows + 0.5], -1) * SIZE) @ matrix[:2, :2].T + matrix[:2, 2] + bend
    where = [source[..., 1] / SIZE - 0.5, source[..., 0] / SIZE - 0.5]
    channels = [ndi.map_coordinates(c, where, order=1, cval=240.0) for c in np.moveaxis(fixed.rgb, -1, 0)]
    moving = section(np.stack(channels, -1))
    points = np.column_stack(np.nonzero(moving.mask)[::-1])[::40]
    return *deformed_pair(fixed, moving, FAST), (points + 0.5) * SIZE, source[points[:, 1], points[:, 0]], moving


def test_syn_follows_a_deformation(deformed):
    transform, quality, points, truth, _ = deformed
    assert transform.deforms, quality
    assert quality["folds"] == 0
    linear = apply_affine(points, transform.matrix)
    error = np.linalg.norm(transform.points(points) - truth, axis=1)
    # Over five draws of the bend 1 to 8 um, of 15 to 23 um without the deformation; it depends on which fit is kept.
    assert np.median(error) < 8
    assert np.median(error) < 0.5 * np.median(np.linalg.norm(linear - truth, axis=1))


def test_syn_there_and_back(deformed):
    transform, _, points, _, _ = deformed
    back = transform.inverse(transform.points(points))
    assert np.percentile(np.linalg.norm(back - points, axis=1), 99) < 0.1 * SIZE
    assert transform.points(np.zeros((0, 2))).shape == (0, 2)


def test_syn_adds_nothing_where_nothing_is_deformed(fixed, deformed_pair):
    transform, _ = deformed_pair(fixed, fixed, FAST)
    points = MIDDLE + np.array([[0, 0], [300, 200], [-400, 100.0]])
    assert np.linalg.norm(transform.points(points) - points, axis=1).max() < 3


def test_implausible_deformation_is_discarded(fixed, deformed, deformed_pair):
    strict = RegistrationParams(working_side=160, syn_side=160, search_side=80, jacobian_limits=(0.99, 1.01))
    transform, quality = deformed_pair(fixed, deformed[-1], strict)
    assert not transform.deforms
    assert "deformable" in quality["note"]
    assert "jacobian_min" not in quality


def test_registered_image_and_matrix_agree(fixed):
    truth = pose(140, MIDDLE, MIDDLE)
    moving = section(warped(fixed.rgb, np.linalg.inv(truth)))
    result = register_pair(fixed, moving, method="affine", params=FAST)
    target, source = (registration_channel(s, SIZE, 200.0) for s in (fixed, moving))
    seen = pull_back(source.image, source, target, result.matrix)
    assert np.corrcoef(seen[target.mask], target.image[target.mask])[0, 1] > 0.97


def test_same_seed_same_result_and_json(fixed):
    moving = section(warped(fixed.rgb, pose(15, MIDDLE, MIDDLE)))
    first, second = (register_pair(fixed, moving, method="affine", params=FAST, seed=7) for _ in range(2))
    np.testing.assert_array_equal(first.matrix, second.matrix)
    assert first.quality == second.quality
    assert json.loads(json.dumps(first.quality)) == first.quality
    assert {"dice_before", "dice_after", "correlation_before", "correlation_after", "score", "margin"} <= set(
        first.quality
    )


def test_unrelated_tissue_is_not_ok(fixed):
    other = section(tissue_image(symmetric=True, seed=11))
    assert register_pair(fixed, other, params=FAST).verdict != "ok"


def test_no_files_left_behind(fixed, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    register_pair(fixed, fixed, method="affine", params=FAST)
    assert list(tmp_path.iterdir()) == []


def test_inputs_are_not_changed(fixed):
    before = fixed.rgb.copy(), fixed.mask.copy()
    register_pair(fixed, fixed, method="rigid", params=FAST)
    np.testing.assert_array_equal(fixed.rgb, before[0])
    np.testing.assert_array_equal(fixed.mask, before[1])


def test_itk_centre_form():
    matrix = itk_matrix(np.array([[0.9, 0.1], [-0.1, 0.9]]), np.array([50, 40]), np.array([3, -2]))
    np.testing.assert_allclose(matrix, [[0.9, 0.1, 4], [-0.1, 0.9, 7], [0, 0, 1]])


def test_matrix_survives_the_transform_file(tmp_path):
    matrix = np.array([[0.0, -1.02, 1234.5678], [0.98, 0.05, -87.25], [0, 0, 1]])
    _write_matrix(matrix, str(tmp_path / "a.mat"))
    np.testing.assert_allclose(_read_matrix(str(tmp_path / "a.mat")), matrix, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((100, 100, 3), 230, np.uint8), "No tissue"),
        (np.zeros((100, 100, 3), np.uint8), "No tissue"),
        (np.ones((1, 1, 3)), "at least"),
        (np.full((100, 100, 3), np.nan), "NaN"),
        (np.full((100, 100), "a"), "numeric"),
        (np.zeros((3, 4, 5, 6)), "shape"),
    ],
)
def test_bad_images(image, message):
    with pytest.raises(ValueError, match=message):
        SectionImage(image, (SIZE, SIZE))


@pytest.mark.parametrize("size", [(0.0, 1.0), (np.nan, 1.0), (-1.0, 1.0)])
def test_bad_pixel_size(fixed, size):
    with pytest.raises(ValueError, match="pixel_size"):
        SectionImage(fixed.rgb, size)


def test_wrong_mask(fixed):
    with pytest.raises(ValueError, match="shape"):
        SectionImage(fixed.rgb, (SIZE, SIZE), np.ones((3, 3), bool))
    with pytest.raises(ValueError, match="No tissue"):
        SectionImage(fixed.rgb, (SIZE, SIZE), np.zeros(SHAPE, bool))


def test_pixel_sizes_that_cannot_both_be_right(fixed):
    with pytest.raises(ValueError, match="pixel sizes"):
        register_pair(fixed, SectionImage(fixed.rgb, (10 * SIZE, 10 * SIZE), fixed.mask), params=FAST)


def test_bad_params():
    for bad in (
        {"working_side": 3},
        {"syn_side": 3},
        {"min_score": 2.0},
        {"max_scale": 0.5},
        {"linear_iterations": (1, 2)},
        {"mask_margin": -1},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            RegistrationParams(**bad)


def test_a_result_without_a_verdict_has_failed():
    assert PairResult(np.eye(3), "rigid").verdict == "failed"


def _her2st(name: str) -> SectionImage:
    from PIL import Image

    root = Path(os.environ.get("SPATIAL_IMPUTE_DATA_DIR", Path(__file__).parents[3] / "shared" / "data"))
    files = sorted((root / "her2st" / "ST-imgs" / "C" / name).glob("*.jpg"))
    if not files:
        pytest.skip(f"HER2ST is not in {root}")
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(files[0]) as file:
            width, height = file.size
            file.draft("RGB", (1024, 1024))
            image = np.asarray(file.convert("RGB"))
    finally:
        Image.MAX_IMAGE_PIXELS = before
    return SectionImage(image, (0.688 * width / image.shape[1], 0.688 * height / image.shape[0]))


def test_real_neighbors():
    fixed, moving = _her2st("C4"), _her2st("C5")
    result = register_pair(fixed, moving, method="affine")
    assert result.quality["dice_after"] >= 0.97
    assert result.quality["correlation_after"] > result.quality["correlation_before"] + 0.1
    assert result.verdict == "ok", result.quality


def test_real_section_of_another_scale():
    """Two sections apart and ten per cent smaller: the inside fits about as well unscaled, the outline does not."""
    fixed, moving = _her2st("C4"), _her2st("C6")
    moving = SectionImage(moving.rgb, tuple(0.9 * size for size in moving.pixel_size), moving.mask)
    result = register_pair(fixed, moving, method="affine")
    assert result.quality["dice_after"] >= 0.97
    # Sections of one block: their scale is found, up to the stretch of these two.
    assert 0.9 * result.quality["scale_min"] > 0.93
    assert 0.9 * result.quality["scale_max"] < 1.07
