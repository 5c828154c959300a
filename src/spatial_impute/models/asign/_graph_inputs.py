"""From spots to the tensors of MSAGNet."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from spatial_impute.models._spots import given
from spatial_impute.models.asign._cokriging import cokriging
from spatial_impute.models.asign._network import GraphInputs
from spatial_impute.models.asign._propagation import propagate

if TYPE_CHECKING:
    from scipy import sparse
    from torch import Tensor

    from spatial_impute.models._params import AsignParams
    from spatial_impute.models._spots import Spots

_MAX_COMPONENTS = 64  # more than some hundred measured spots can resolve
_MAX_FITTED = 20_000  # spots that the principal components are fitted to


@dataclass(frozen=True)
class GeneScale:
    """Standardisation of the genes, fitted to the training spots."""

    centre: Tensor  # (g,) mean
    scale: Tensor  # (g,) standard deviation

    def standardise(self, expression: np.ndarray) -> Tensor:
        """Standard deviations around the mean, float32. Float32 input is changed in place."""
        values = torch.from_numpy(expression.astype(np.float32, copy=False))
        return values.sub_(self.centre).div_(self.scale)

    def restore(self, standardised: Tensor) -> np.ndarray:
        """Expression from standardised values."""
        return (standardised * self.scale + self.centre).numpy()


def graph_inputs(
    spots: Spots,
    genes: GeneScale,
    params: AsignParams,
    *,
    targets: np.ndarray | None = None,
    features_cokriging: np.ndarray | None = None,
) -> tuple[GraphInputs, np.ndarray]:
    """Tensors of one stack, and the (m,) ascending positions of the spots in them.

    Parameters
    ----------
    spots, genes, params
        Spots with features, components, tokens and graph; standardisation of the genes; settings of the network.
    targets
        (n,) bool, spots to predict. Spots outside of their receptive field are left out. All by default.
    features_cokriging
        (n, g) leave-one-out co-kriging with all features, if it has been computed before.
    """
    graph = given(spots.graph)
    coo = graph.tocoo()
    edges = _strongest_edges(graph, params.n_neighs)
    seen = np.ones(len(spots.known), dtype=bool)
    if targets is not None:
        seen, into = _receptive_field(coo.row[edges], coo.col[edges], targets, params.n_graph_layers)
        edges = edges[into]
    rows = np.flatnonzero(seen)

    def standardised(expression: np.ndarray) -> Tensor:
        # In place, here and below: each of these tables takes a gigabyte for a million spots.
        return genes.standardise(expression if seen.all() else expression[rows])

    values, support = propagate(graph, spots.known, spots.expression, dtype=np.float32)
    propagated = standardised(values)
    # The base of known spots must not contain their own labels. Otherwise the unknown spots right above them would see
    # neighbours with much less noise than those in training, whose labels are hidden. Two predictions with different
    # errors are averaged: from all image features, and from the components that sections share.
    base = cokriging(replace(spots, features=spots.components), leave_one_out=True, wanted=seen)
    base += cokriging(spots, leave_one_out=True, wanted=seen) if features_cokriging is None else features_cokriging
    base *= 0.5
    base = standardised(base)
    np.copyto(propagated.numpy(), base.numpy(), where=~np.isfinite(propagated.numpy()))  # not reached by any label
    tokens = [t if targets is None else t[rows] for t in given(spots.tokens)]
    spot, region, surroundings = (torch.from_numpy(np.ascontiguousarray(t, dtype=np.float32)) for t in tokens)
    # Messages flow from column to row.
    position = np.cumsum(seen) - 1
    inputs = GraphInputs(
        spot=spot[:, 0],
        region=region,
        surroundings=surroundings,
        base=base,
        propagated=propagated,
        support=torch.from_numpy(support[rows].astype(np.float32))[:, None],
        edge_index=torch.from_numpy(position[np.stack([coo.col[edges], coo.row[edges]])]),
        edge_features=torch.from_numpy(given(spots.edge_features)[edges].astype(np.float32)),
    )
    return inputs, rows


def _strongest_edges(graph: sparse.csr_matrix, k: int) -> np.ndarray:
    """Positions of the k largest entries of every row."""
    row = np.repeat(np.arange(graph.shape[0]), np.diff(graph.indptr))
    order = np.lexsort((graph.indices, -graph.data, row))
    rank = np.arange(len(row)) - graph.indptr[row[order]]
    return np.sort(order[rank < k])


def _receptive_field(
    row: np.ndarray, col: np.ndarray, targets: np.ndarray, n_layers: int
) -> tuple[np.ndarray, np.ndarray]:
    """Spots within `n_layers` edges of the targets, and the edges (from `col` to `row`) on the paths to them."""
    seen = targets
    into = np.zeros(len(row), dtype=bool)
    for _ in range(n_layers):
        into = seen[row]
        seen = seen.copy()
        seen[col[into]] = True
    return seen, into


def with_components(spots: Spots) -> Spots:
    """Add the shared components of the features, from which the base of the network is predicted."""
    return replace(spots, components=shared_components(given(spots.features), given(spots.graph), spots.section))


def shared_components(
    features: np.ndarray, weights: sparse.csr_matrix, section: np.ndarray, *, seed: int = 0
) -> np.ndarray:
    r"""Principal components (n, k) of the features, scaled by their correlation between neighbouring sections.

    Serial sections show the same tissue twice. Features of the tissue repeat at the same place of the next section;
    stain, focus and the cut of single nuclei do not. The variance of each component is therefore multiplied by its
    correlation across the edges between sections, :math:`\rho = \sum w_{ij} u_i u_j / \sum w_{ij} u_i^2`. Expression is
    not used. Without edges between sections, the components are the plain principal components.

    Parameters
    ----------
    features, weights, section
        (n, d), standardised within sections; (n, n) symmetric weights of the 3D graph; (n,) section of each spot.
    seed
        Seed of the choice of spots and of the randomised decomposition of large stacks.
    """
    from sklearn.utils.extmath import randomized_svd

    n = len(features)
    rows = np.arange(n)
    if n > _MAX_FITTED:
        rows = np.sort(np.random.default_rng(seed).choice(n, _MAX_FITTED, replace=False))
    centre = features[rows].mean(axis=0, dtype=float)
    k = min(_MAX_COMPONENTS, *features[rows].shape)
    _, _, axes = randomized_svd(features[rows] - centre, k, random_state=seed)
    axes = axes.astype(features.dtype)  # avoids a copy of all features in another precision
    components = features @ axes.T
    components -= centre @ axes.T
    coo = weights.tocoo()
    between = section[coo.row] != section[coo.col]
    if not between.any():
        return components
    row, column, weight = coo.row[between], coo.col[between], coo.data[between]
    correlation = np.empty(k)
    for j, u in enumerate(components.T):
        product, square = weight @ (u[row] * u[column]), weight @ (u[row] ** 2)
        correlation[j] = max(product / square, 0.0) if square > 0 else 0.0
    if not correlation.any():
        return components
    components *= np.sqrt(correlation)
    return components
