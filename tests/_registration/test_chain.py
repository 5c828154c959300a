from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from spatial_impute._registration import (
    ChainResult,
    DisplacementField,
    KeptDeformation,
    PairResult,
    RegistrationParams,
    SectionImage,
    SectionTransform,
    chain_to_reference,
    deform_stack,
)
from spatial_impute._registration.orientation import pose

NAMES = ["a", "b", "c", "d"]


def pair(matrix, *, verdict="ok", score=0.5) -> PairResult:
    quality = {"verdict": verdict, "score": score, "reasons": [] if verdict == "ok" else ["It looked wrong."]}
    return PairResult(np.asarray(matrix, float), "affine", quality, (0.0, 0.0, 1000.0, 800.0))


def shift(x: float, y: float = 0.0) -> np.ndarray:
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1.0]])


@pytest.fixture
def truth():
    """Matrix of every section to the frame of 'b'."""
    return {
        "a": pose(20, [0, 0], [5, 7]),
        "b": np.eye(3),
        "c": pose(-70, [10, 0], [0, 3], mirrored=True),
        "d": pose(180, [1, 2], [300, 40]) @ np.diag([1.02, 0.97, 1]),
    }


def between(truth, fixed, moving):
    return np.linalg.inv(truth[fixed]) @ truth[moving]


def test_quarter_turn_by_hand():
    matrix = np.array([[0, -1, 10], [1, 0, 0], [0, 0, 1.0]])
    placed = chain_to_reference({("b", "a"): pair(matrix)}, ["a", "b"], "b")
    np.testing.assert_allclose(placed["a"].matrix @ [1, 2, 1], [8, 1, 1])
    np.testing.assert_allclose(np.linalg.inv(placed["a"].matrix) @ [8, 1, 1], [1, 2, 1])
    np.testing.assert_array_equal(placed["b"].matrix, np.eye(3))
    assert placed["b"].route == "reference"
    assert placed["b"].path == ("b",)


def test_matrices_compose_towards_the_reference(truth):
    pairs = {("b", "a"): pair(between(truth, "b", "a")), ("b", "c"): pair(between(truth, "b", "c"))}
    pairs["c", "d"] = pair(between(truth, "c", "d"))
    placed = chain_to_reference(pairs, NAMES, "b")
    assert list(placed) == NAMES
    for name in NAMES:
        np.testing.assert_allclose(placed[name].matrix, truth[name], atol=1e-9)
    assert placed["d"].path == ("d", "c", "b")
    assert placed["d"].route == "sequential"
    assert placed["c"].route == "direct"


def test_chain_is_kept_while_direct_agrees():
    pairs = {("a", "b"): pair(shift(10)), ("b", "c"): pair(shift(10)), ("a", "c"): pair(shift(40), score=0.9)}
    placed = chain_to_reference(pairs, ["a", "b", "c"], "a")["c"]
    assert placed.route == "sequential"
    assert placed.disagreement == pytest.approx(20)
    assert placed.reasons == []
    assert placed.confirmed


@pytest.mark.parametrize("direct", [None, pair(shift(40), verdict="weak"), pair(shift(400), score=0.1)])
def test_only_a_sound_direct_pair_that_agrees_confirms(direct):
    pairs = {("a", "b"): pair(shift(10)), ("b", "c"): pair(shift(10))}
    placed = chain_to_reference(pairs if direct is None else pairs | {("a", "c"): direct}, ["a", "b", "c"], "a")
    assert not any(result.confirmed for result in placed.values())


@pytest.mark.parametrize("confirmed", [True, False])
def test_confirmed_sections_are_deformed_onto_the_reference(confirmed):
    """A deformation that follows that of a neighbor adds its error."""
    glass = np.full((60, 60, 3), 240.0)
    glass[15:45, 12:40] = 120
    images = dict.fromkeys("abc", SectionImage(glass, (20.0, 20.0)))
    placed = {
        "a": ChainResult(np.eye(3), ("a",), "reference", 1.0, "ok"),
        "b": ChainResult(shift(10), ("b", "a"), "direct", 1.0, "ok"),
        "c": ChainResult(shift(20), ("c", "b", "a"), "sequential", 1.0, "ok", confirmed=confirmed),
    }
    targets = {}

    def run(function, tasks, label):
        targets.update({source.matrix[0, 2]: target.matrix[0, 2] for target, source, *_ in tasks})
        return [(None, {})] * len(tasks)

    deform_stack(images, placed, "a", params=RegistrationParams(), seed=0, run=run)
    assert targets == {10: 0, 20: 0 if confirmed else 10}


def test_a_section_follows_the_deformation_of_a_given_neighbor():
    """A target whose place and deformation are given is drawn with both."""
    glass = np.full((60, 60, 3), 240.0)
    glass[15:45, 12:40] = 120
    images = dict.fromkeys("abc", SectionImage(glass, (20.0, 20.0)))
    placed = {
        "a": ChainResult(np.eye(3), ("a",), "reference", 1.0, "ok"),
        "b": ChainResult(np.eye(3), ("b", "a"), "given", 1.0, "ok"),
        "c": ChainResult(np.eye(3), ("c", "b", "a"), "sequential", 1.0, "ok"),
    }
    # In the common frame 100 um to the right; the frame of the thumbnails is turned by a quarter against it.
    pull = np.zeros((80, 80, 2), np.float32)
    pull[..., 0] = -100
    to_common = np.array([[0, -1, 1200], [1, 0, 0], [0, 0, 1.0]])
    grid = np.array([[20, 0, -200], [0, 20, -200], [0, 0, 1.0]])
    kept = {"b": KeptDeformation(SectionTransform(np.eye(3), pull, -pull, grid), to_common)}
    found = {}

    def run(function, tasks, label):
        found["target"] = tasks[0][0]
        return [(None, {})] * len(tasks)

    deform_stack(images, placed, "a", params=RegistrationParams(), seed=0, run=run, kept=kept)
    masks = [replace(found["target"], field=field).drawn(np.zeros(2), (80, 80)).mask for field in (kept["b"], None)]
    assert found["target"].field is kept["b"]
    middles = [np.argwhere(mask).mean(axis=0) * found["target"].channel.size for mask in masks]
    # 100 um along x of the common frame are 100 um up in the thumbnails.
    np.testing.assert_allclose(middles[0] - middles[1], [-100, 0], atol=6)


@pytest.mark.parametrize(("score", "route", "x"), [(0.9, "direct", 400), (0.1, "sequential", 20)])
def test_better_score_wins_when_they_disagree(score, route, x):
    pairs = {("a", "b"): pair(shift(10)), ("b", "c"): pair(shift(10)), ("a", "c"): pair(shift(400), score=score)}
    placed = chain_to_reference(pairs, ["a", "b", "c"], "a")["c"]
    assert placed.route == route
    assert placed.matrix[0, 2] == x
    assert placed.disagreement == pytest.approx(380)
    assert any("380 um" in reason for reason in placed.reasons)


def test_weak_direct_loses_against_sound_chain():
    pairs = {("a", "b"): pair(shift(10), score=0.4), ("b", "c"): pair(shift(10), score=0.4)}
    pairs["a", "c"] = pair(shift(400), verdict="weak", score=0.9)
    assert chain_to_reference(pairs, ["a", "b", "c"], "a")["c"].route == "sequential"


def test_failed_section_is_bridged():
    pairs = {
        ("a", "b"): pair(shift(10)),
        ("b", "c"): pair(shift(999), verdict="failed", score=0.1),
        ("c", "d"): pair(shift(5)),
        ("b", "d"): pair(shift(30)),
    }
    placed = chain_to_reference(pairs, NAMES, "a")
    assert placed["c"].verdict == "failed"
    assert placed["c"].reasons
    assert placed["d"].verdict == "ok"
    assert placed["d"].path == ("d", "b", "a")
    assert placed["d"].matrix[0, 2] == 40
    assert any("Bridged" in reason for reason in placed["d"].reasons)


def test_failure_is_inherited_without_a_bridge():
    pairs = {("a", "b"): pair(shift(10), verdict="failed"), ("b", "c"): pair(shift(10))}
    placed = chain_to_reference(pairs, ["a", "b", "c"], "a")
    assert placed["c"].verdict == "failed"
    assert any("'b'" in reason for reason in placed["c"].reasons)


def test_score_and_verdict_are_those_of_the_weakest_link():
    pairs = {("a", "b"): pair(shift(1), score=0.3, verdict="weak"), ("b", "c"): pair(shift(1), score=0.8)}
    placed = chain_to_reference(pairs, ["a", "b", "c"], "a")["c"]
    assert (placed.score, placed.verdict) == (0.3, "weak")


def test_points_follow_deformations():
    push = np.zeros((10, 10, 2), np.float32)
    push[..., 0] = 7
    field = DisplacementField(-push, push, (0.0, 0.0), 10.0)
    transform = SectionTransform.from_field(shift(10), field, np.eye(3))
    np.testing.assert_allclose(transform.points([[30, 40], [500, 40]]), [[47, 40], [510, 40]])  # outside: matrix only


def test_single_section():
    assert list(chain_to_reference({}, ["a"], "a")) == ["a"]
