from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse

from spatial_impute.models._params import AsignParams
from spatial_impute.models._spots import Spots
from spatial_impute.models.asign import _graph_inputs
from spatial_impute.models.asign._baselines import fit_knn
from spatial_impute.models.asign._graph_inputs import graph_inputs, shared_components, with_components
from spatial_impute.models.asign._network import LabelInputs, MSAGNet

N, N_GENES, N_FEATURES = 60, 5, 4


@pytest.fixture(scope="module")
def spots() -> Spots:
    """Two sections of 30 spots in a row each, with edges along the rows, between them, and two far ones."""
    rng = np.random.default_rng(0)
    x = np.tile(np.arange(N // 2, dtype=float), 2)
    section = np.repeat([0, 1], N // 2)
    ends = [(i, i + 1) for i in range(N - 1) if section[i] == section[i + 1]]
    ends += [(i, i + N // 2) for i in range(N // 2)] + [(0, N - 1), (5, N - 10)]
    i, j = np.array(ends).T
    graph = sparse.coo_matrix((rng.uniform(0.5, 1.0, len(i)), (i, j)), (N, N))
    graph = sparse.csr_matrix(graph + graph.T)
    tokens = tuple(rng.normal(size=(N, t, N_FEATURES)) for t in (1, 2, 3))
    known = section == 0
    spots = Spots(
        xyz=np.column_stack([100 * x, rng.uniform(0, 300, N), 10.0 * section]),
        section=section,
        known=known,
        expression=np.sin(x[known, None] / 4 + np.arange(N_GENES)) + 0.1 * rng.normal(size=(N // 2, N_GENES)),
        spacing=100.0,
        features=tokens[0][:, 0],
        graph=graph,
        tokens=tokens,
        edge_features=edge_features(graph, section, rng),
    )
    return with_components(spots)


def edge_features(graph: sparse.csr_matrix, section: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A third of the edges between sections are of similar images."""
    coo = graph.tocoo()
    within = section[coo.row] == section[coo.col]
    similar = ~within & ((coo.row + coo.col) % 3 == 0)
    random = rng.random((graph.nnz, 3))
    return np.column_stack([random[:, :2], 0.0 * within, similar * random[:, 2], within, ~within])


def labels() -> LabelInputs:
    torch.manual_seed(5)
    return LabelInputs(torch.randn(N, N_GENES), torch.randn(N, N_GENES), torch.rand(N, 1))


def network_of(params: AsignParams) -> MSAGNet:
    """Network whose heads are not zero, as after some training."""
    network = MSAGNet(N_FEATURES, torch.arange(N_GENES) % 2, params).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_what_the_network_cannot_see_is_left_out_and_changes_nothing(spots, n_layers):
    params = AsignParams(width=16, n_graph_layers=n_layers, n_neighs=3)
    targets = np.isin(np.arange(N), [7, 8, 40])
    whole, part = graph_inputs(spots, params), graph_inputs(spots, params, targets=targets)
    assert len(whole.spot) == N
    assert len(part.spot) < N
    assert part.n_predicted == 3
    assert sum(e.index.shape[1] for e in part.edges) < sum(e.index.shape[1] for e in whole.edges)
    torch.manual_seed(0)
    network = network_of(params)
    with torch.inference_mode():
        expected = network(whole, labels())[targets]
        found = network(part, LabelInputs(*(values[targets] for values in vars(labels()).values())))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_receptive_field_is_no_smaller_than_it_must_be(spots):
    """A spot at its rim changes the prediction of the targets."""
    params = AsignParams(width=16, n_graph_layers=2, n_neighs=3)
    targets = np.arange(N) == 40
    part = graph_inputs(spots, params, targets=targets)
    own = spots.tokens[0][:, 0].astype(np.float32)
    rows = {int(np.flatnonzero((own == token).all(axis=1))[0]) for token in part.spot.numpy()}
    torch.manual_seed(1)
    network = network_of(params)

    def predict(changed: int | None) -> torch.Tensor:
        spot_tokens = spots.tokens[0].copy()
        if changed is not None:
            spot_tokens[changed] += 3.0
        inputs = graph_inputs(replace(spots, tokens=(spot_tokens, *spots.tokens[1:])), params)
        with torch.inference_mode():
            return network(inputs, labels())[40]

    before = predict(None)
    reacts = {i for i in range(N) if not torch.allclose(predict(i), before, atol=1e-6)}
    assert reacts == rows


def test_each_type_of_edge_has_its_own_share(spots):
    """The strongest edges of each type, although others may be stronger."""
    inputs = graph_inputs(spots, AsignParams(width=16, n_neighs=1))
    graph, (overlap, similarity, within) = spots.graph.tocoo(), spots.edge_features.T[2:5]
    kinds = [within > 0, (within == 0) & ((similarity == 0) | (overlap > 0)), similarity > 0]
    for edges, kind in zip(inputs.edges, kinds, strict=True):
        source, target = edges.index.numpy()
        assert len(np.unique(target)) == len(target) == len(np.unique(graph.row[kind]))
        for j, i in zip(source, target, strict=True):
            own = kind & (graph.row == i)
            assert spots.graph[i, j] == graph.data[own].max()


def test_order_of_the_spots_of_a_lattice_changes_nothing():
    """Many neighbors are equally far away; which of them come first in the table must not matter."""
    rng = np.random.default_rng(0)
    columns, rows = (index.ravel() * 100.0 for index in np.indices((7, 7)))
    xyz, section, known = np.column_stack([columns, rows, 0 * rows]), np.zeros(49, int), rng.random(49) < 0.7
    values, order = rng.normal(size=(49, 3)), rng.permutation(49)
    distance = np.linalg.norm(xyz[:, None] - xyz, axis=2)
    weights = np.where((distance > 0) & (distance < 150), np.exp(-distance / 100), 0.0)

    def spots_in(order: np.ndarray) -> Spots:
        graph = sparse.csr_matrix(weights[np.ix_(order, order)])
        own = known[order]
        within = np.tile([0.0, 0.0, 0.0, 0.0, 1.0, 0.0], (graph.nnz, 1))
        tokens = tuple(np.zeros((49, n, 2)) for n in (1, 2, 6))
        return Spots(
            xyz=xyz[order],
            section=section,
            known=own,
            expression=values[order][own],
            spacing=100.0,
            graph=graph,
            edge_features=within,
            tokens=tokens,
        )

    one, other = spots_in(np.arange(49)), spots_in(order)
    np.testing.assert_allclose(fit_knn(other).expression(), fit_knn(one).expression()[order], rtol=0, atol=1e-12)
    pairs = []
    for spots, names in ((one, np.arange(49)), (other, order)):
        index = graph_inputs(spots, AsignParams(n_neighs=6)).edges[0].index.numpy()
        pairs.append({tuple(pair) for pair in names[index].T})
    assert pairs[0] == pairs[1]
    assert len(pairs[0]) == np.count_nonzero(weights)  # the four diagonal ones are equal: all eight


# Shared components


def two_sections(n: int = 200, *, seed: int = 0) -> tuple[np.ndarray, sparse.csr_matrix, np.ndarray]:
    """Spots lying over each other; the first feature is the same on both sections, the second is not."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=n)
    features = np.column_stack([np.tile(shared, 2), 1.1 * rng.normal(size=2 * n)])
    link = sparse.diags(np.ones(n), n, shape=(2 * n, 2 * n))
    return features, sparse.csr_matrix(link + link.T), np.repeat([0, 1], n)


def test_components_keep_what_sections_share():
    features, weights, section = two_sections()
    components = shared_components(features, weights, section)
    spread = components.std(axis=0)
    follows = [abs(np.corrcoef(c, features[:, 0])[0, 1]) for c in components.T]
    assert max(follows) > 0.95
    assert spread[np.argmax(follows)] > 3 * spread[np.argmin(follows)]


def products(features: np.ndarray, weights: sparse.csr_matrix, section: np.ndarray) -> np.ndarray:
    """Inner products of the components, which do not depend on their signs."""
    components = shared_components(features, weights, section)
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


def test_variance_of_components_is_multiplied_by_the_correlation():
    """Same, opposite, and half the same on the next section: 1, 0 and the correlation itself."""
    n = 4000
    rng = np.random.default_rng(0)
    one, other, third, fourth = (v / np.sqrt(np.mean(v**2)) for v in rng.normal(size=(4, n)))
    half = 0.5 * third + np.sqrt(0.75) * fourth
    below = np.column_stack([9 * one, 6 * other, 3 * third])
    above = np.column_stack([9 * one, -6 * other, 3 * half])
    link = sparse.diags(np.ones(n), n, shape=(2 * n, 2 * n))
    components = shared_components(np.vstack([below, above]), sparse.csr_matrix(link + link.T), np.repeat([0, 1], n))
    np.testing.assert_allclose(components.var(axis=0), [81, 0, 4.5], rtol=0.1, atol=1e-6)


def test_components_of_many_spots_are_fitted_on_some_of_them(monkeypatch):
    """It hardly matters which ones, and they are the same each time."""
    features, weights, section = two_sections(2000)
    features[:, 0] *= 3
    expected = shared_components(features, weights, section)
    monkeypatch.setattr(_graph_inputs, "_MAX_FITTED", 500)
    found = shared_components(features, weights, section)
    assert abs(np.corrcoef(found[:, 0], expected[:, 0])[0, 1]) > 0.99
    np.testing.assert_array_equal(found, shared_components(features, weights, section))
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
