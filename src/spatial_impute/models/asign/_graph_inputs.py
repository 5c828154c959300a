"""From spots to the tensors of MSAGNet."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import sparse
from scipy.spatial import cKDTree

from spatial_impute._expression import gene_blocks
from spatial_impute.models._spots import given
from spatial_impute.models.asign._baselines import fit_mean
from spatial_impute.models.asign._cokriging import Axes, krige
from spatial_impute.models.asign._network import Edges, GraphInputs, LabelInputs
from spatial_impute.models.asign._predictions import Mean, Table
from spatial_impute.models.asign._propagation import propagate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from spatial_impute.models._params import AsignParams
    from spatial_impute.models._spots import Spots
    from spatial_impute.models.asign._predictions import Linear, Prediction
    from spatial_impute.models.asign._propagation import KnownGraph

TWO_VIEWS = "cokriging-two-views"
"""Mean of co-kriging with all image features, and with those that sections share."""

_MAX_COMPONENTS = 64  # more than some hundred measured spots can resolve
_MAX_FITTED = 20_000  # spots that the principal components are fitted to
_SAME = 1e-6  # relative difference of weights that are the same but for rounding
_LEAST_SCALE = 1e-3  # genes that do not vary are not divided by zero


@dataclass(frozen=True)
class GeneScale:
    """Standardisation of the genes, fitted to the training spots."""

    centre: Tensor  # (g,) mean
    scale: Tensor  # (g,) standard deviation

    @classmethod
    def of(cls, expression: np.ndarray, rows: np.ndarray | slice = slice(None)) -> GeneScale:
        """Mean and standard deviation of the (n, g) expression of training spots, or of some of its rows."""
        centre, scale = torch.empty((2, expression.shape[1]))
        for genes in gene_blocks(expression.shape[1]):
            part = expression[:, genes][rows]
            centre[genes] = torch.from_numpy(part.mean(axis=0))
            scale[genes] = torch.from_numpy(part.std(axis=0)).clamp(min=_LEAST_SCALE)
        return cls(centre, scale)

    def standardise(self, expression: np.ndarray) -> Tensor:
        """Standard deviations around the mean, float32."""
        return torch.from_numpy(expression.astype(np.float32)).sub_(self.centre).div_(self.scale)

    def restore(self, standardised: Tensor) -> np.ndarray:
        """Expression from standardised values."""
        return (standardised * self.scale + self.centre).numpy()


def graph_inputs(spots: Spots, params: AsignParams, *, targets: np.ndarray | None = None) -> GraphInputs:
    """Images and graph of one stack as tensors.

    With `targets` (n,) bool, these spots come first, in their order. Then come the spots that reach them through the
    layers of the network; all others are left out.
    """
    graph = given(spots.graph)
    coo, features = graph.tocoo(), given(spots.edge_features)
    edges = [_strongest_edges(graph, kind, params.n_neighs) for kind in _edge_types(features)]
    rows = np.arange(len(spots.known))
    reach: tuple[int, ...] = ()
    if targets is not None:
        used = np.concatenate(edges)
        rows, reach = _receptive_field(coo.row[used], coo.col[used], targets, params.n_graph_layers)
    position = np.full(len(spots.known), -1)
    position[rows] = np.arange(len(rows))
    spot, region, surroundings = (torch.from_numpy(np.asarray(t, np.float32)[rows]) for t in given(spots.tokens))
    parts = []
    for positions in edges:
        index = position[np.stack([coo.col[positions], coo.row[positions]])]  # messages flow from column to row
        inside = (index >= 0).all(axis=0)
        weights = torch.from_numpy(features[positions[inside]].astype(np.float32))
        parts.append(Edges(torch.from_numpy(index[:, inside]), weights).by_target())
    return GraphInputs(spot[:, 0], region, surroundings, tuple(parts), reach)


@dataclass(frozen=True)
class LabelPredictions:
    """Expression of spots as the labels of other spots predict it: base, and propagation over the 3D graph."""

    base: Prediction
    propagated: Prediction
    support: np.ndarray  # (n,) mass of the propagation, 0-1
    kriged: Sequence[Linear] = ()  # Co-krigings, see `krige_views`; the base can be made of them

    def inputs(self, genes: GeneScale, rows: np.ndarray | slice = slice(None)) -> LabelInputs:
        """Tensors for some spots."""
        support = torch.from_numpy(self.support[rows].astype(np.float32))[:, None]
        base, propagated = (genes.standardise(part.expression(rows)) for part in (self.base, self.propagated))
        return LabelInputs(base, propagated, support)


def predict_from_labels(spots: Spots, base: str, kriged: Sequence[Linear]) -> LabelPredictions:
    """Predict all spots from the known ones; `kriged` are those of :func:`krige_views`."""
    graph = given(spots.graph)
    propagated, support = propagate(graph, spots.known, spots.expression, dtype=np.float32, device=spots.solver_device)
    return _with_base(spots, base, kriged, propagated, support)


def nested_predictions(
    rest: Spots, graph: KnownGraph, groups: np.ndarray, base: str, kriged: Sequence[Linear]
) -> LabelPredictions:
    """Predict the known spots, each of them without its group; all others have no support.

    `graph` is that between the known spots; `groups` (n_known,) are those that `kriged` has left out.
    """
    n, n_genes = len(rest.known), rest.expression.shape[1]
    propagated, support = np.zeros((n, n_genes), np.float32), np.zeros(n)
    for code in np.unique(groups):
        hidden, own = np.flatnonzero(rest.known)[groups == code], groups == code
        propagated[hidden], support[hidden] = graph.propagate(own, rest.expression[~own])
    return _with_base(rest, base, kriged, propagated, support)


def _with_base(
    spots: Spots, base: str, kriged: Sequence[Linear], propagated: np.ndarray, support: np.ndarray
) -> LabelPredictions:
    """Base, and propagated labels; the base takes the place of labels that do not arrive."""
    found: Prediction = fit_mean(spots)
    if base in ("cokriging", TWO_VIEWS):
        found = Mean(kriged if base == TWO_VIEWS else kriged[:1])
    unreached = np.flatnonzero((support == 0) & ~np.isfinite(propagated[:, 0]))
    propagated[unreached] = found.expression(unreached)
    labels = Table(propagated)
    return LabelPredictions(labels if base == "propagation" else found, labels, support, kriged)


def krige_views(spots: Spots, *, two: bool, left_out: np.ndarray | None = None) -> list[Linear]:
    """Co-kriging with all image features and, of `two` views, also with the components that sections share."""
    views = [spots]
    if two:
        views.append(replace(spots, features=spots.components))
    axes = Axes.of(spots)
    return [krige(view, left_out=left_out, axes=axes) for view in views]


def _edge_types(features: np.ndarray) -> list[np.ndarray]:
    """(e,) bool for each type of edge: within the section, across sections by place, and by similar images."""
    _, _, overlap, similarity, within, _ = features.T
    return [within > 0, (within == 0) & ((similarity == 0) | (overlap > 0)), similarity > 0]


def _strongest_edges(graph: sparse.csr_matrix, kind: np.ndarray, k: int) -> np.ndarray:
    """Positions of the k largest entries of every row among the edges of one type, and of those equal to the last, ascending.

    On a lattice many edges are equal. Which of them come first must not depend on the order of the spots.
    """
    positions = np.flatnonzero(kind)
    row = np.repeat(np.arange(graph.shape[0]), np.diff(graph.indptr))[positions]
    weight = graph.data[positions]
    order = np.lexsort((-weight, row))
    first = np.searchsorted(row, row)  # rows ascend, before and after the sort
    last = order[np.minimum(first + k, np.searchsorted(row, row, side="right")) - 1]  # the k-th of each row
    return positions[weight >= weight[last] * (1 - _SAME)]


def _receptive_field(
    row: np.ndarray, col: np.ndarray, targets: np.ndarray, n_layers: int
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Spots within `n_layers` edges (from `col` to `row`) of the targets, nearest first, and the reach of each layer."""
    order, seen, reach = [np.flatnonzero(targets)], targets.copy(), []
    for _ in range(n_layers):
        reach.append(int(seen.sum()))
        new = np.unique(col[seen[row]])
        new = new[~seen[new]]
        order.append(new)
        seen[new] = True
    return np.concatenate(order), tuple(reach[::-1])


def field_means(spots: Spots, values: np.ndarray, rows: np.ndarray, seen: np.ndarray, edge: float) -> np.ndarray:
    """(m, g) mean of (n_known, g) values over the `seen` spots of the section in a square around each of some rows.

    `edge` is that of the square in um; `seen` (n,) is a mask of known spots.
    """
    result = np.zeros((len(rows), values.shape[1]), np.float32)
    of_known = np.cumsum(spots.known) - 1
    for code in np.unique(spots.section[rows]):
        own = np.flatnonzero(spots.section[rows] == code)
        inside = np.flatnonzero(seen & (spots.section == code))
        tree = cKDTree(spots.xyz[inside, :2])
        near = tree.query_ball_point(spots.xyz[rows[own], :2], max(edge, 1e-9) / 2, p=np.inf)
        lengths = np.array([len(found) for found in near])
        columns = np.concatenate([np.asarray(found, dtype=int) for found in near])
        starts = np.concatenate([[0], np.cumsum(lengths)])
        weights = np.repeat(1 / np.maximum(lengths, 1), lengths)
        mean = sparse.csr_matrix((weights, columns, starts), shape=(len(own), len(inside)))
        result[own] = mean @ values[of_known[inside]]
    return result


def with_components(spots: Spots) -> Spots:
    """Add the shared components of the features, from which the base of the network is predicted."""
    return replace(spots, components=shared_components(given(spots.features), given(spots.graph), spots.section))


def shared_components(features: np.ndarray, weights: sparse.csr_matrix, section: np.ndarray) -> np.ndarray:
    r"""Principal components (n, k) of the features, scaled by their correlation between neighboring sections.

    Serial sections show the same tissue twice. Features of the tissue repeat at the same place of the next section;
    stain, focus and the cut of single nuclei do not. The variance of each component is therefore multiplied by its
    correlation across the edges between sections, :math:`\rho = \sum w_{ij} u_i u_j / \sum w_{ij} u_i^2`. Expression is
    not used. Without edges between sections, the components are the plain principal components.

    `features` (n, d) are standardised within sections, `weights` (n, n) those of the 3D graph.
    """
    from sklearn.utils.extmath import randomized_svd

    n = len(features)
    rows = np.arange(n)
    if n > _MAX_FITTED:
        rows = np.sort(np.random.default_rng(0).choice(n, _MAX_FITTED, replace=False))
    centre = features[rows].mean(axis=0, dtype=float)
    k = min(_MAX_COMPONENTS, *features[rows].shape)
    _, _, axes = randomized_svd(features[rows] - centre, k, random_state=0)
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
