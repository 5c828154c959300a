from __future__ import annotations

import numpy as np
from scipy import sparse

from spatial_impute.models._agreement import agreeing_components


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
