from __future__ import annotations

import numpy as np
import pytest

from spatial_impute.metrics._spatial import moran_gap, structural_similarity


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
