from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from scipy import ndimage as ndi

from spatial_impute import _scores
from spatial_impute._scores import moran_gap, pearson_by_gene, pearson_by_spot, structural_similarity, summarise


def example(n: int = 30, g: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    true = rng.gamma(2.0, size=(n, g))
    return 0.6 * true + rng.normal(size=(n, g)), true


def test_pearson_by_gene_equals_scipy_and_numpy():
    predicted, true = example()
    found = pearson_by_gene(predicted, true)
    np.testing.assert_allclose(found, [scipy.stats.pearsonr(p, t)[0] for p, t in zip(predicted.T, true.T, strict=True)])
    np.testing.assert_allclose(found[0], np.corrcoef(predicted[:, 0], true[:, 0])[0, 1])


def test_pearson_by_spot_equals_scipy():
    predicted, true = example()
    expected = [scipy.stats.pearsonr(p, t)[0] for p, t in zip(predicted, true, strict=True)]
    np.testing.assert_allclose(pearson_by_spot(predicted, true), expected)


def test_pearson_by_gene_of_known_rows():
    np.testing.assert_allclose(
        pearson_by_gene(np.array([[1, 1], [2, 2], [3, 3]]), np.array([[2, 3], [4, 2], [6, 1]])), [1, -1]
    )
    np.testing.assert_allclose(pearson_by_gene(np.array([[1], [2], [3], [4]]), np.array([[1], [3], [2], [4]])), [0.8])


def test_pearson_by_gene_does_not_depend_on_scale():
    """No epsilon inside the root: small values correlate as large ones do."""
    small = np.array([[1e-3], [2e-3], [3e-3]])
    np.testing.assert_allclose(pearson_by_gene(small, small), 1.0)
    predicted, true = example()
    np.testing.assert_allclose(pearson_by_gene(1e-5 * predicted, 1e4 * true), pearson_by_gene(predicted, true))


@pytest.mark.parametrize("constant", [0.0, 1 / 3, 1e4 / 3, -7.1])
def test_pearson_by_gene_of_constant_prediction_is_zero(constant):
    _, true = example()
    np.testing.assert_array_equal(pearson_by_gene(np.full_like(true, constant), true), 0)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e3 / 7])
def test_pearson_by_gene_of_constant_truth_is_not_defined(constant):
    predicted, true = example()
    true[:, 2] = constant
    found = pearson_by_gene(predicted, true)
    assert np.isnan(found[2])
    assert np.isfinite(np.delete(found, 2)).all()
    predicted[:, 2] = constant
    assert np.isnan(pearson_by_gene(predicted, true)[2])


def test_pearson_by_gene_of_constant_float32_prediction_is_zero():
    """Written as float32 and read as float64, a constant profile is still constant."""
    _, true = example()
    profile = np.tile(true.mean(axis=0), (len(true), 1)).astype(np.float32)
    np.testing.assert_array_equal(pearson_by_gene(profile, true), 0)


def test_constant_profile_scores_high_per_spot_and_zero_per_gene():
    rng = np.random.default_rng(0)
    level = rng.normal(3, 1.5, 100)
    true = level + 0.3 * rng.normal(size=(50, 100))
    scores = summarise(np.tile(true.mean(axis=0), (50, 1)), true, true.mean(axis=0))
    assert scores["pearson_gene"] == 0
    assert scores["pearson_spot"] > 0.95
    assert scores["skill"] == pytest.approx(0)


def test_summarise_by_hand():
    true = np.array([[1.0, 0.0], [3.0, 1.0], [2.0, 5.0], [4.0, 2.0]])
    predicted = np.array([[1.0, 0.0], [2.0, -1.0], [3.0, -5.0], [4.0, -2.0]])
    scores = summarise(predicted, true, np.zeros(2))
    assert scores["pearson_gene"] == pytest.approx((0.8 - 1) / 2)
    assert scores["pearson_gene_median"] == pytest.approx(-0.1)
    assert scores["pearson_gene_q1"] == pytest.approx(-1 + 0.25 * 1.8)
    assert scores["pearson_gene_positive"] == 0.5
    assert scores["mse"] == pytest.approx((1 + 1 + 4 + 100 + 16) / 8)
    assert scores["mae"] == pytest.approx((1 + 1 + 2 + 10 + 4) / 8)
    assert scores["skill"] == pytest.approx(1 - 122 / (1 + 9 + 4 + 16 + 1 + 25 + 4))
    assert (scores["n_spots"], scores["n_genes"]) == (4, 2)


def test_summarise_leaves_out_genes_without_variation():
    predicted, true = example()
    expected = summarise(predicted[:, 1:], true[:, 1:], np.zeros(7))["pearson_gene"]
    true[:, 0] = 1.0
    scores = summarise(predicted, true, np.zeros(8))
    assert scores["pearson_gene"] == pytest.approx(expected)
    assert scores["n_genes"] == 7


def test_summarise_of_truth_that_never_varies_has_no_correlation():
    scores = summarise(np.ones((3, 2)), np.ones((3, 2)), np.zeros(2))
    assert np.isnan(scores["pearson_gene"])
    assert np.isnan(scores["pearson_spot"])
    assert scores["mse"] == 0
    assert scores["n_genes"] == 0


def test_summarise_of_perfect_prediction():
    _, true = example()
    scores = summarise(true, true, true.mean(axis=0))
    assert scores["pearson_gene"] == pytest.approx(1)
    assert scores["pearson_spot"] == pytest.approx(1)
    assert scores["skill"] == 1
    assert scores["mse"] == scores["mae"] == 0


def test_summarise_of_perfect_reference_does_not_fail():
    true = np.tile([1.0, 2.0], (3, 1))
    scores = summarise(true + 1, true, true[0])
    assert not scores["skill"] > 0


@pytest.fixture
def lattice() -> np.ndarray:
    x, y = np.meshgrid(np.arange(12.0), np.arange(10.0))
    return 100 * np.column_stack([x.ravel(), y.ravel()])


def field(xy: np.ndarray) -> np.ndarray:
    return np.column_stack([np.sin(xy[:, 0] / 250), np.cos(xy[:, 1] / 200)])


def test_moran_gap_tells_smoother_from_rougher(lattice):
    smooth, noise = field(lattice), np.random.default_rng(0).normal(size=(len(lattice), 2))
    assert moran_gap(smooth, smooth, lattice) == pytest.approx(0)
    assert moran_gap(smooth, smooth + noise, lattice) > 0.3
    assert moran_gap(noise, smooth, lattice) < -0.5


def test_moran_gap_takes_a_constant_prediction_as_without_structure(lattice):
    smooth = field(lattice)
    flat = moran_gap(np.zeros_like(smooth), smooth, lattice)
    assert flat == pytest.approx(
        moran_gap(np.random.default_rng(1).normal(size=smooth.shape), smooth, lattice), abs=0.2
    )
    assert np.isnan(moran_gap(smooth, np.ones_like(smooth), lattice))


def test_moran_gap_of_spots_at_one_place(lattice):
    twice = np.repeat(lattice, 2, axis=0)
    assert np.isfinite(moran_gap(field(twice), field(twice) + 1.0, twice))


def test_structural_similarity_ranks_predictions(lattice):
    true = field(lattice)
    rng = np.random.default_rng(0)
    scores = [structural_similarity(true + s * rng.normal(size=true.shape), true, lattice) for s in (0.0, 0.2, 1.0)]
    assert scores[0] == pytest.approx(1)
    assert scores[0] > scores[1] > scores[2]


def test_structural_similarity_of_all_genes_is_that_of_scikit_image(monkeypatch):
    from skimage.metrics import structural_similarity as of_one_gene

    rng, (y, x) = np.random.default_rng(0), np.mgrid[:12, :9]
    true, predicted = (ndi.gaussian_filter(rng.normal(size=(12, 9, 5)), (1, 1, 0)) for _ in range(2))
    low, high = true.min(axis=(0, 1)), true.max(axis=(0, 1))
    grids = [(values - low) / (high - low) for values in (predicted, true)]
    expected = [of_one_gene(*(grid[..., k] for grid in grids), data_range=1.0, full=True)[1].mean() for k in range(5)]
    xy = np.column_stack([y.ravel(), x.ravel()]).astype(float)
    monkeypatch.setattr(_scores, "_GENES_AT_A_TIME", 2)
    found = structural_similarity(predicted.reshape(-1, 5), true.reshape(-1, 5), xy)
    assert found == pytest.approx(np.mean(expected), rel=1e-10)


def test_structural_similarity_does_not_depend_on_place_or_order(lattice):
    true = field(lattice)
    predicted = true + 0.3 * np.random.default_rng(0).normal(size=true.shape)
    order = np.random.default_rng(1).permutation(len(lattice))
    expected = structural_similarity(predicted, true, lattice)
    moved = structural_similarity(predicted[order], true[order], lattice[order] * 3 + 777)
    assert moved == pytest.approx(expected)


def test_structural_similarity_needs_a_grid(lattice):
    few = lattice[:, 0] < 300
    assert np.isnan(structural_similarity(field(lattice)[few], field(lattice)[few], lattice[few]))
    assert np.isnan(structural_similarity(np.ones((1, 2)), np.ones((1, 2)), np.zeros((1, 2))))
