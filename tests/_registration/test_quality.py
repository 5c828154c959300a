from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage as ndi

from spatial_impute._registration.orientation import pose
from spatial_impute._registration.quality import (
    StructureScore,
    disagreement,
    field_quality,
    is_sane,
    pull_back,
    same_pose,
    singular_values,
    tissue_dice,
    verdict,
)
from spatial_impute._registration.transform import DisplacementField, SectionTransform
from spatial_impute._registration.types import Channel, RegistrationParams, shrink

PARAMS = RegistrationParams()
GOOD = {"dice_after": 0.98, "score": 0.6, "margin": 0.3, "scale_min": 0.98, "scale_max": 1.02}


def disc(shape=(80, 80), radius=25, *, size=10.0, centre=None, frame=(1e6, 1e6), seed=0) -> Channel:
    rng = np.random.default_rng(seed)
    cy, cx = (shape[0] / 2, shape[1] / 2) if centre is None else centre
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    mask = (y - cy) ** 2 + (x - cx) ** 2 < radius**2
    image = ndi.gaussian_filter(rng.normal(size=shape), 3).astype(np.float32)
    return Channel((0.5 + image / image.std() * 0.1) * mask, mask, (0.0, 0.0), size, frame)


def shift(x, y=0.0):
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1.0]])


def test_dice_of_two_discs_matches_geometry():
    channel = disc(shape=(400, 400), radius=100, size=2.0)
    r, d = 200.0, 100.0
    common = 2 * r**2 * np.arccos(d / (2 * r)) - d / 2 * np.sqrt(4 * r**2 - d**2)
    assert tissue_dice(channel, channel, shift(d)) == pytest.approx(common / (np.pi * r**2), abs=0.01)
    assert tissue_dice(channel, channel, np.eye(3)) == 1
    assert tissue_dice(channel, channel, shift(500)) == 0


def test_dice_ignores_what_the_other_image_does_not_show():
    whole = disc(frame=(800.0, 800.0))
    half = Channel(whole.image[:, 40:], whole.mask[:, 40:], (0.0, 0.0), whole.size, (400.0, 800.0))
    assert tissue_dice(whole, half, shift(400)) == pytest.approx(1, abs=0.02)
    assert tissue_dice(whole, half, shift(400 + 250)) < 0.7


def test_score_is_highest_at_the_truth_and_sees_content():
    channel = disc()
    score = StructureScore(channel, channel)
    assert score(np.eye(3)) == pytest.approx(1, abs=1e-4)
    assert score.correlation(np.eye(3)) == pytest.approx(1, abs=1e-4)
    turned = pose(180, [400, 400], [400, 400])  # same outline, other content
    assert tissue_dice(channel, channel, turned) > 0.97
    assert score(turned) < 0.4
    assert score(shift(2000)) == 0


def test_score_counts_missing_overlap():
    channel = disc()
    score = StructureScore(channel, channel)
    assert 0 < score(np.eye(3)) - score(shift(20)) < 1


def test_gain_of_a_pose_and_its_error_from_left_out_tiles():
    fixed = disc()
    noise = disc(seed=1).image
    moving = replace(fixed, image=(0.6 * fixed.image + 0.4 * noise).astype(np.float32))
    score = StructureScore(fixed, moving)
    poses = shift(60.0), np.eye(3)
    gain, error = score.gain(*poses)
    assert gain == pytest.approx(score(poses[1]) - score(poses[0]))
    row, column = np.indices(fixed.image.shape) // 10  # 8 tiles a side
    tiles = row * 8 + column
    changes = []
    for tile in np.unique(tiles[fixed.mask]):
        scores = []
        for matrix in poses:
            overlap, share = score._overlap(matrix)
            kept = tiles[overlap] != tile
            pairs = score._values(matrix, overlap)
            scores.append(np.mean([np.corrcoef(a[kept], b[kept])[0, 1] for a, b in pairs]) * min(1, share / 0.9))
        changes.append(scores[1] - scores[0])
    n = len(changes)
    assert error == pytest.approx(np.sqrt((n - 1) * np.var(changes)), rel=1e-4)
    assert gain > 2 * error
    nearby, error = score.gain(np.eye(3), shift(2.0))  # a fifth of a pixel
    assert abs(nearby) < 2 * error
    assert score.gain(shift(2000), shift(3000)) == (0, 0)  # tissues that do not meet


def test_constant_tissue_scores_zero():
    channel = disc()
    flat = Channel(channel.mask.astype(np.float32), channel.mask, channel.origin, channel.size, channel.frame)
    assert StructureScore(flat, flat)(np.eye(3)) == pytest.approx(0, abs=1e-6)


def test_disagreement_by_hand():
    points = np.array([[0.0, 0.0], [10.0, 5.0]])
    assert disagreement(np.eye(3), shift(3, 4), points) == pytest.approx(5)
    assert disagreement(np.eye(3), np.diag([1.1, 1, 1]), np.array([[100.0, 0.0]])) == pytest.approx(10)


def test_same_pose():
    channel = disc()
    assert same_pose(np.eye(3), shift(5), channel)
    assert not same_pose(np.eye(3), shift(200), channel)
    assert not same_pose(np.eye(3), pose(0, [400, 400], [400, 400], mirrored=True), channel)


def test_singular_values_and_sanity():
    matrix = pose(33, [0, 0], [9, 9], mirrored=True) @ np.diag([1.1, 0.9, 1])
    assert singular_values(matrix) == pytest.approx((1.1, 0.9))
    assert is_sane(matrix, PARAMS)
    assert not is_sane(np.diag([1.3, 1, 1]), PARAMS)
    assert not is_sane(np.diag([1, 0.8, 1]), PARAMS)


def test_good_pair_is_ok():
    assert verdict(GOOD, PARAMS) == ("ok", [])


@pytest.mark.parametrize(
    ("change", "expected", "word"),
    [
        ({"dice_after": 0.85}, "weak", "Dice"),
        ({"dice_after": 0.7}, "failed", "Dice"),
        ({"score": 0.3}, "weak", "score"),
        ({"score": 0.1}, "failed", "score"),
        ({"margin": 0.01}, "weak", "margin"),
        ({"error_um": 200.0}, "weak", "error"),
        ({"scale_max": 1.3}, "failed", "stretches"),
        ({"scale_min": 0.7}, "failed", "stretches"),
    ],
)
def test_every_reason_counts(change, expected, word):
    found, reasons = verdict(GOOD | change, PARAMS)
    assert found == expected
    assert len(reasons) == 1
    assert word in reasons[0]


def test_low_overlap_is_no_failure_where_stain_and_edges_agree():
    lost = GOOD | {"dice_after": 0.6, "looks_agree": True}
    assert verdict(lost, PARAMS)[0] == "weak"
    assert verdict(lost | {"looks_agree": False}, PARAMS)[0] == "failed"
    assert verdict(lost | {"margin": 0.05}, PARAMS)[0] == "failed"
    assert verdict(lost | {"score": 0.3}, PARAMS)[0] == "failed"


def test_partial_tissue_is_weak_not_failed():
    assert verdict(GOOD | {"dice_after": 0.6}, RegistrationParams(partial_tissue=True))[0] == "weak"


def test_field_quality_by_hand():
    x = np.broadcast_to(np.arange(30), (20, 30))
    pull = np.stack([0.1 * x * 10.0, np.zeros(x.shape)], -1).astype(np.float32)  # stretches x by 1.1
    field = DisplacementField(pull, -pull, (0.0, 0.0), 10.0)
    found = field_quality(field, np.ones(x.shape, bool))
    assert found["folds"] == 0
    assert found["jacobian_min"] == pytest.approx(1.1)
    assert found["jacobian_max"] == pytest.approx(1.1)
    folded = DisplacementField(-11 * pull, pull, (0.0, 0.0), 10.0)
    assert field_quality(folded, np.ones(x.shape, bool))["folds"] == 1


def test_constant_field_is_a_shift():
    channel = disc()
    pull = np.broadcast_to(np.float32([-30, 20]), (*channel.image.shape, 2))  # moves the image 30 um right and 20 up
    field = DisplacementField(pull, -pull, channel.origin, channel.size)
    moved = pull_back(channel.image, channel, channel, np.eye(3), field)
    np.testing.assert_allclose(moved[10:60, 10:60], channel.image[12:62, 7:57], atol=1e-5)
    placed = SectionTransform.from_field(np.eye(3), field, np.eye(3)).points([[400, 400]])
    np.testing.assert_allclose(placed, [[430, 380]])
    np.testing.assert_allclose(field.pulled([[430, 380]]), [[400, 400]])


def test_pull_back_moves_by_the_matrix():
    channel = disc()
    moved = pull_back(channel.image, channel, channel, shift(30, -20))  # 3 pixels right, 2 up
    np.testing.assert_allclose(moved[10:60, 10:60], channel.image[12:62, 7:57], atol=1e-5)


def test_shrink_keeps_positions():
    channel = disc(shape=(80, 90))
    small = shrink(channel, 40.0)
    assert small.size == 40
    np.testing.assert_allclose(small.centres().mean(0), channel.centres().mean(0), atol=5)
    assert shrink(channel, 3.0) is channel
