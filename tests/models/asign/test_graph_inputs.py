from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse

from spatial_impute.models._params import AsignParams
from spatial_impute.models._spots import Spots
from spatial_impute.models.asign import _graph_inputs
from spatial_impute.models.asign._graph_inputs import build_network, graph_inputs, with_components

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
        edge_features=rng.random((graph.nnz, 6)),
    )
    return with_components(spots)


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return {"centre": torch.zeros(N_GENES), "scale": torch.ones(N_GENES), "group": torch.arange(N_GENES) % 2}


@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_what_the_network_cannot_see_is_left_out_and_changes_nothing(spots, tensors, n_layers):
    params = AsignParams(width=16, n_graph_layers=n_layers, n_neighs=3)
    asked = np.isin(np.arange(N), [7, 8, 40])
    whole, everything = graph_inputs(spots, tensors, params)
    part, rows = graph_inputs(spots, tensors, params, asked=asked)
    assert len(everything) == N
    assert len(rows) < N
    assert part.edge_index.shape[1] < whole.edge_index.shape[1]
    torch.manual_seed(0)
    network = build_network(params, N_FEATURES, tensors["group"]).eval()
    for parameter in network.parameters():  # the heads start at zero
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.inference_mode():
        expected = network(whole)[np.flatnonzero(asked)]
        found = network(part)[np.flatnonzero(asked[rows])]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_receptive_field_is_no_smaller_than_it_must_be(spots, tensors):
    """A spot at its rim changes what is asked for."""
    params = AsignParams(width=16, n_graph_layers=2, n_neighs=3)
    asked = np.arange(N) == 40
    _, rows = graph_inputs(spots, tensors, params, asked=asked)
    torch.manual_seed(1)
    network = build_network(params, N_FEATURES, tensors["group"]).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)

    def predict(changed: int | None) -> torch.Tensor:
        spot_tokens = spots.tokens[0].copy()
        if changed is not None:
            spot_tokens[changed] += 3.0
        own = replace(spots, tokens=(spot_tokens, *spots.tokens[1:]))
        inputs, _ = graph_inputs(own, tensors, params)
        with torch.inference_mode():
            return network(inputs)[40]

    before = predict(None)
    reacts = {i for i in range(N) if not torch.allclose(predict(i), before, atol=1e-6)}
    assert reacts == set(rows.tolist())


def test_only_spots_that_are_seen_are_predicted_by_the_base(spots, tensors, monkeypatch):
    asked = np.arange(N) == 40
    wanted = []
    original = _graph_inputs.cokriging
    monkeypatch.setattr(_graph_inputs, "cokriging", lambda s, **k: wanted.append(k["wanted"]) or original(s, **k))
    _, rows = graph_inputs(spots, tensors, AsignParams(width=16, n_neighs=3), asked=asked)
    assert len(wanted) == 2
    for chosen in wanted:
        np.testing.assert_array_equal(np.flatnonzero(chosen), rows)
