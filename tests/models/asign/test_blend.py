from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import nnls

from spatial_impute.models.asign import _blend
from spatial_impute.models.asign._blend import KnownTruth, blend_weights


@pytest.fixture
def data():
    """Genes 0-9 follow the first prediction, 10-19 the second; the third is noise."""
    rng = np.random.default_rng(0)
    predictions = rng.normal(size=(3, 400, 20))
    truth = np.where(np.arange(20) < 10, predictions[0], predictions[1]) + 0.5 * rng.normal(size=(400, 20))
    return predictions, truth, np.arange(400) % 5


def test_blend_gives_each_gene_what_predicts_it(data):
    weights, held_out = blend_weights(*data)
    assert weights[:10, 0].min() > 0.85
    assert weights[10:, 1].min() > 0.85
    assert weights[:, 2].max() < 0.15
    assert np.mean((held_out - data[1]) ** 2) < 0.3  # the noise alone has 0.25


def test_blend_is_never_negative_and_leans_to_the_mean_on_noise():
    rng = np.random.default_rng(1)
    weights, _ = blend_weights(-rng.normal(size=(2, 300, 8)), rng.normal(size=(300, 8)), np.arange(300) % 5)
    assert weights.min() >= 0
    assert weights.mean() < 0.1


def test_blend_shares_weights_where_genes_are_too_noisy_for_their_own():
    rng = np.random.default_rng(2)
    signal = rng.normal(size=(1, 60, 30))
    truth = 0.3 * signal[0] + 2.0 * rng.normal(size=(60, 30))
    weights, _ = blend_weights(signal, truth, np.arange(60) % 5)
    assert weights.std() < 0.05
    assert weights.mean() == pytest.approx(0.3, abs=0.1)


def test_blend_of_a_spot_never_uses_its_own_fold(data, monkeypatch):
    """The blend of a fold must not change with the truth of that fold (the strength of sharing sees all folds)."""
    monkeypatch.setattr(_blend, "_STRENGTHS", (1.0,))
    predictions, truth, folds = data
    _, before = blend_weights(predictions, truth, folds)
    changed = truth.copy()
    changed[folds == 2] = np.random.default_rng(3).normal(size=changed[folds == 2].shape)
    _, after = blend_weights(predictions, changed, folds)
    np.testing.assert_allclose(after[folds == 2], before[folds == 2], atol=1e-9)  # rounding of the sums
    assert np.abs(after[folds != 2] - before[folds != 2]).max() > 1e-3


def test_a_gated_prediction_is_judged_by_the_other_folds(data):
    """Genes that it does not predict get no weight; the truth of a fold decides nothing for that fold."""
    (first, second, _), truth, folds = data
    held_out, gated = {"own": first, "outside": second}, frozenset({"outside"})
    known = KnownTruth(truth, folds, np.ones(400), gated)
    weights, _ = known.blend(held_out, list(held_out))
    assert weights[10:, 1].min() > 0.5
    assert (weights[:10, 1] == 0).sum() >= 8
    changed = truth.copy()
    changed[folds == 2] = second[folds == 2]  # the outside prediction is exact for all genes in this fold alone
    before, after = (k._used(held_out, list(held_out)) for k in (known, replace(known, values=changed)))
    np.testing.assert_array_equal(after[2], before[2])
    assert (after[3] != before[3]).any()


@pytest.mark.parametrize("case", ["independent", "alike", "equal", "small", "empty"])
def test_weights_are_those_of_non_negative_least_squares(case):
    rng = np.random.default_rng(5)
    predictions = rng.normal(size=(60, 6, 30))
    if case == "alike":
        predictions += 4 * predictions[:, :1]
    elif case == "equal":
        predictions[:, 2] = predictions[:, 1]
    elif case == "small":
        predictions *= 1e-6
    elif case == "empty":
        predictions[7], predictions[:, 3] = 0, 0
    truth = rng.normal(size=(60, 30)) + predictions[:, 0]
    gram, moment = predictions @ predictions.transpose(0, 2, 1), (predictions @ truth[..., None])[..., 0]
    for p, t, found in zip(predictions, truth, _blend._solve_nonnegative(gram, moment), strict=True):
        best, error = nnls(p.T, t)
        assert found.min() >= 0
        assert np.linalg.norm(found @ p - t) == pytest.approx(error, rel=1e-6)
        if case not in {"equal", "empty"}:  # else several solutions are equally good
            np.testing.assert_allclose(found, best, rtol=1e-5, atol=1e-6 * np.abs(best).max())


def test_only_named_predictions_are_used_alone():
    """A slope that differs by fold makes the blend worse than its best part."""
    rng = np.random.default_rng(0)
    folds = np.repeat(np.arange(4), 6)
    good = rng.normal(size=(24, 5))
    truth = good * np.array([0.5, 1.5, 0.6, 1.4])[folds][:, None]
    predictions = np.stack([0.1 * rng.normal(size=good.shape), good])
    weights, blended = blend_weights(predictions, truth, folds)
    np.testing.assert_array_equal(weights, np.tile([0.0, 1.0], (5, 1)))
    np.testing.assert_array_equal(blended, good)
    weights, other = blend_weights(predictions, truth, folds, alone=[0])
    assert weights[:, 1].min() > 0.5
    assert np.abs(other - good).max() > 0.1


def test_blend_gives_no_weight_to_rounding(data):
    predictions, truth, folds = data
    weights, _ = blend_weights(np.concatenate([predictions, 1e-6 * truth[None]]), truth, folds)
    assert (weights[:, 3] == 0).all()


def test_rounding_of_a_network_that_returned_to_the_mean_has_no_correlation():
    truth, folds = np.random.default_rng(0).normal(size=(50, 7)), np.repeat(np.arange(5), 10)
    mean = np.concatenate([np.tile(truth[folds != k].mean(axis=0), (10, 1)) for k in range(5)])
    held_out = {"mean": mean, "opposite": mean - 0.3 * truth, "network": mean + 2e-6 * truth}
    _, blended = KnownTruth(truth, folds, np.ones(50)).blend(held_out, ["opposite", "network"])
    np.testing.assert_array_equal(blended, mean)


def test_blend_survives_identical_and_empty_predictions():
    p = np.random.default_rng(4).normal(size=(1, 50, 3))
    both = np.concatenate([p, p, np.zeros_like(p)])
    weights, _ = blend_weights(both, p[0], np.arange(50) % 5)
    np.testing.assert_allclose(weights[:, :2].sum(axis=1), 1.0, atol=0.02)
    weights, held_out = blend_weights(np.zeros((2, 50, 3)), p[0], np.arange(50) % 5)
    assert np.isfinite(weights).all()
    np.testing.assert_array_equal(held_out, 0)


def test_some_spots_are_blended_as_if_there_were_no_others():
    rng = np.random.default_rng(0)
    truth, folds = rng.normal(size=(90, 4)), np.arange(90) % 3
    held_out = {name: truth + size * rng.normal(size=truth.shape) for name, size in (("good", 1.0), ("bad", 3.0))}
    some = rng.random(90) < 0.6
    known = KnownTruth(truth, folds, rng.uniform(0.5, 2, 90), frozenset({"bad"}))
    alone = KnownTruth(truth[some], folds[some], known.weight[some], known.gated)
    found = known.some(some).blend(held_out, ["good", "bad"])
    expected = alone.blend({name: values[some] for name, values in held_out.items()}, ["good", "bad"])
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
