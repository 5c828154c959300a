from __future__ import annotations

import numpy as np
from scipy import sparse

from spatial_impute.models.asign._shared_components import agreeing_components


def two_sections(n: int = 200, *, seed: int = 0) -> tuple[np.ndarray, sparse.csr_matrix, np.ndarray]:
    """Spots lying over each other; the first feature is the same on both sections, the second is not."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=n)
    features = np.column_stack([np.tile(shared, 2), 1.1 * rng.normal(size=2 * n)])
    link = sparse.diags(np.ones(n), n, shape=(2 * n, 2 * n))
    return features, sparse.csr_matrix(link + link.T), np.repeat([0, 1], n)


def test_components_keep_what_sections_share():
    features, weights, section = two_sections()
    components = agreeing_components(features, weights, section)
    spread = components.std(axis=0)
    follows = [abs(np.corrcoef(c, features[:, 0])[0, 1]) for c in components.T]
    assert max(follows) > 0.95
    assert spread[np.argmax(follows)] > 3 * spread[np.argmin(follows)]


def products(features: np.ndarray, weights: sparse.csr_matrix, section: np.ndarray) -> np.ndarray:
    """Inner products of the components, which do not depend on their signs."""
    components = agreeing_components(features, weights, section)
    return components @ components.T


def test_components_of_one_section_are_the_plain_ones():
    features, weights, section = two_sections()
    centred = features - features.mean(axis=0)
    np.testing.assert_allclose(products(features, weights, np.zeros_like(section)), centred @ centred.T, atol=1e-8)


def test_components_follow_the_order_of_spots():
    features, weights, section = two_sections()
    order = np.random.default_rng(1).permutation(len(features))
    permuted = products(features[order], weights[order][:, order], section[order])
    np.testing.assert_allclose(permuted, products(features, weights, section)[np.ix_(order, order)], atol=1e-8)


def test_variance_of_components_is_multiplied_by_the_agreement():
    """Same, opposite, and half the same on the next section: 1, 0 and the correlation itself."""
    n = 4000
    rng = np.random.default_rng(0)
    one, other, third, fourth = (v / np.sqrt(np.mean(v**2)) for v in rng.normal(size=(4, n)))
    half = 0.5 * third + np.sqrt(0.75) * fourth
    below = np.column_stack([9 * one, 6 * other, 3 * third])
    above = np.column_stack([9 * one, -6 * other, 3 * half])
    link = sparse.diags(np.ones(n), n, shape=(2 * n, 2 * n))
    components = agreeing_components(np.vstack([below, above]), sparse.csr_matrix(link + link.T), np.repeat([0, 1], n))
    np.testing.assert_allclose(components.var(axis=0), [81, 0, 4.5], rtol=0.1, atol=1e-6)


def test_components_of_many_spots_are_fitted_on_some_of_them(monkeypatch):
    """Which ones hardly matters, and the seed decides."""
    from spatial_impute.models.asign import _shared_components

    features, weights, section = two_sections(2000)
    features[:, 0] *= 3
    expected = agreeing_components(features, weights, section)
    monkeypatch.setattr(_shared_components, "_MAX_FITTED", 500)
    found = agreeing_components(features, weights, section)
    assert abs(np.corrcoef(found[:, 0], expected[:, 0])[0, 1]) > 0.99
    np.testing.assert_array_equal(found, agreeing_components(features, weights, section))
    assert not np.array_equal(found, agreeing_components(features, weights, section, seed=1))
    assert found.shape == expected.shape == (4000, 2)


def test_weighted_edges_count_by_their_weight_and_only_between_sections():
    """Edges within a section, however strong, say nothing on agreement."""
    features, weights, section = two_sections()
    n = len(section) // 2
    within = sparse.diags(100.0 * (np.arange(2 * n - 1) != n - 1), 1, shape=(2 * n, 2 * n))
    found = products(features, sparse.csr_matrix(weights + within + within.T), section)
    np.testing.assert_allclose(found, products(features, weights, section), atol=1e-8)
    for factor in (1e-9, 7.0):
        scaled = products(features, weights * factor, section)
        np.testing.assert_allclose(scaled, products(features, weights, section), atol=1e-8)
