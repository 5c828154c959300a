from __future__ import annotations

import numpy as np
import pytest

from spatial_impute import _graph
from spatial_impute._graph import most_similar, similar_pairs


def unit(values: np.ndarray) -> np.ndarray:
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def tissue() -> tuple[np.ndarray, np.ndarray]:
    """Features of two sections: six hidden variables, seen through noise."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(6, 20))
    return tuple(unit(np.tanh(rng.normal(size=(n, 6)) @ mixing) + 0.4 * rng.normal(size=(n, 20))) for n in (900, 1100))


def test_cells_find_what_a_search_of_all_finds(tissue, monkeypatch):
    a, b = tissue
    exact, _ = most_similar(a, b, 3)
    monkeypatch.setattr(_graph, "_MAX_EXACT_PAIRS", 0)
    found, near = most_similar(a, b, 3)
    share = np.mean([np.isin(e, f).mean() for e, f in zip(exact, found, strict=True)])
    assert share > 0.95
    np.testing.assert_allclose(near, np.einsum("nd,nkd->nk", a, b[found]), atol=1e-5)
    assert (np.diff(near, axis=1) <= 0).all()
    assert all(len(set(row)) == 3 for row in found)
    again, _ = most_similar(a, b, 3)
    np.testing.assert_array_equal(found, again)


def test_cells_searched_all_are_a_search_of_all(tissue, monkeypatch):
    a, b = tissue
    exact, cosine = most_similar(a, b, 4)
    monkeypatch.setattr(_graph, "_MAX_EXACT_PAIRS", 0)
    monkeypatch.setattr(_graph, "_CELLS_PER_SPOT", len(b))
    found, near = most_similar(a, b, 4)
    np.testing.assert_allclose(near, cosine, atol=1e-6)
    assert (found == exact).mean() > 0.999  # but for rounding of ties


def test_pairs_are_mutual_and_similar_with_cells_as_well(tissue, monkeypatch):
    a, b = tissue
    features, rows = np.concatenate([a, b]), np.arange(len(a) + len(b))
    exact, _ = similar_pairs(features, rows[: len(a)], rows[len(a) :], 3, 0.5)
    monkeypatch.setattr(_graph, "_MAX_EXACT_PAIRS", 0)
    pairs, cosine = similar_pairs(features, rows[: len(a)], rows[len(a) :], 3, 0.5)
    assert (cosine > 0.5).all()
    assert (pairs[:, 0] < len(a)).all()
    assert (pairs[:, 1] >= len(a)).all()
    both = {tuple(p) for p in exact} & {tuple(p) for p in pairs}
    assert len(both) > 0.9 * len(exact)


def test_sections_with_fewer_spots_than_neighbors(monkeypatch):
    monkeypatch.setattr(_graph, "_MAX_EXACT_PAIRS", 0)
    a, b = unit(np.random.default_rng(0).normal(size=(5, 4))), unit(np.random.default_rng(1).normal(size=(2, 4)))
    found, cosine = most_similar(a, b, 3)
    assert found.shape == (5, 3)
    assert np.isfinite(cosine[:, :2]).all()
    assert (cosine[:, 2] == -np.inf).all()
