"""From spots to the tensors of MSAGNet, and the network for them."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from spatial_impute.models.asign._cokriging import cokriging
from spatial_impute.models.asign._network import GraphInputs, MSAGNet
from spatial_impute.models.asign._propagation import propagate
from spatial_impute.models.asign._shared_components import agreeing_components

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scipy import sparse
    from torch import Tensor

    from spatial_impute.models._params import AsignParams
    from spatial_impute.models._spots import Spots


# Below this many numbers per layer, threads wait for each other longer than they compute.
_WORTH_THREADS = 500_000


@contextmanager
def suitable_threads(n_spots: int, width: int) -> Iterator[None]:
    """Run small networks on one thread. Other libraries reset the number of threads of torch when they are imported."""
    before = torch.get_num_threads()
    if n_spots * width < _WORTH_THREADS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def with_components(spots: Spots) -> Spots:
    """Add the components of the features on which sections agree: the base of the network is predicted from them."""
    return replace(spots, components=agreeing_components(spots.features, spots.graph, spots.section))


def graph_inputs(
    spots: Spots,
    tensors: dict[str, Tensor],
    params: AsignParams,
    *,
    asked: np.ndarray | None = None,
    by_features: np.ndarray | None = None,
) -> tuple[GraphInputs, np.ndarray]:
    """Tensors of one stack; expression in standard deviations around the mean of the training spots.

    Parameters
    ----------
    spots
        The spots.
    tensors
        Mean, scale and group of the genes.
    params
        Settings of the network that is to read them.
    asked
        (n,) bool, the spots to predict. What the network cannot see from them is left out. All by default.
    by_features
        (n, g) co-kriging of the spots, known ones left out in turn, if it is at hand.

    Returns
    -------
    The tensors, and the (m,) ascending positions of the spots in them.
    """
    coo = spots.graph.tocoo()
    edges = _strongest(spots.graph, params.n_neighs)
    seen = np.ones(len(spots.known), dtype=bool)
    if asked is not None:
        seen, into = _receptive_field(coo.row[edges], coo.col[edges], asked, params.n_graph_layers)
        edges = edges[into]
    rows = np.flatnonzero(seen)

    def standardised(expression: np.ndarray) -> Tensor:
        # In place, here and below: each of these tables takes a gigabyte for a million spots.
        part = expression if seen.all() else expression[rows]
        return torch.from_numpy(part.astype(np.float32, copy=False)).sub_(tensors["centre"]).div_(tensors["scale"])

    values, support = propagate(spots.graph, spots.known, spots.expression, dtype=np.float32)
    propagated = standardised(values)
    # Known spots must not show the network their own labels here: those of other sections, right above a known spot,
    # would find much noisier neighbours than it was trained with. Two views of the image err differently: all its
    # features, and the components on which sections agree.
    base = cokriging(replace(spots, features=spots.components), leave_one_out=True, wanted=seen)
    base += cokriging(spots, leave_one_out=True, wanted=seen) if by_features is None else by_features
    base *= 0.5
    base = standardised(base)
    np.copyto(propagated.numpy(), base.numpy(), where=~np.isfinite(propagated.numpy()))  # where nothing arrives
    tokens = spots.tokens if asked is None else tuple(t[rows] for t in spots.tokens)
    spot, region, surroundings = (torch.from_numpy(np.ascontiguousarray(t, dtype=np.float32)) for t in tokens)
    # Messages flow from column to row.
    position = np.cumsum(seen) - 1
    edge_index = torch.from_numpy(position[np.stack([coo.col[edges], coo.row[edges]])])
    inputs = GraphInputs(
        spot=spot[:, 0],
        region=region,
        surroundings=surroundings,
        base=base,
        propagated=propagated,
        support=torch.from_numpy(support[rows].astype(np.float32))[:, None],
        edge_index=edge_index,
        edge_features=torch.from_numpy(spots.edge_features[edges].astype(np.float32)),
    )
    return inputs, rows


def _receptive_field(
    row: np.ndarray, col: np.ndarray, asked: np.ndarray, n_layers: int
) -> tuple[np.ndarray, np.ndarray]:
    """Spots within `n_layers` edges of those asked for, and the edges (from `col` to `row`) on the way to them."""
    seen = asked
    into = np.zeros(len(row), dtype=bool)
    for _ in range(n_layers):
        into = seen[row]
        seen = seen.copy()
        seen[col[into]] = True
    return seen, into


def build_network(params: AsignParams, n_features: int, group: Tensor) -> MSAGNet:
    """Untrained network of the given size."""
    return MSAGNet(
        n_features,
        len(group),
        group=group,
        width=params.width,
        n_heads=params.n_heads,
        n_graph_layers=params.n_graph_layers,
        n_level_layers=params.n_level_layers,
        dropout=params.dropout,
    )


def _strongest(graph: sparse.csr_matrix, k: int) -> np.ndarray:
    """Positions of the k largest entries of every row."""
    row = np.repeat(np.arange(graph.shape[0]), np.diff(graph.indptr))
    order = np.lexsort((graph.indices, -graph.data, row))
    rank = np.arange(len(row)) - graph.indptr[row[order]]
    return np.sort(order[rank < k])
