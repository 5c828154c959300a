"""MSAGNet, the network of ASIGN :cite:p:`Zhu2025`: three fields of view, a 3D graph, and a learned merge.

Expression is in standard deviations around the mean of the measured spots. The untrained network returns exactly the
base prediction.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch_geometric.nn import GATv2Conv

from spatial_impute._expression import gene_blocks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spatial_impute.models._params import AsignParams

N_EDGE_FEATURES = 6  # Nearness, length, overlap, similarity, 1 within a section, number of sections apart
N_EDGE_TYPES = 3  # Neighbors of the section, spots over or under it, spots of other sections that look alike
N_LEVELS = 3
_SPOTS_AT_A_TIME = 50_000  # some 300 MB at the default width and 18 edges per spot


def to_device(value: Any, device: str) -> Any:
    """Copy of a tensor on a device, or of a list, tuple or dataclass with all tensors in it."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, list | tuple):
        return type(value)(to_device(item, device) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{part.name: to_device(getattr(value, part.name), device) for part in fields(value)})
    return value


@dataclass(frozen=True)
class Edges:
    """Edges of one type, both directions of each; messages flow from the first row of `index` to the second."""

    index: Tensor  # (2, e)
    features: Tensor  # (e, 6)

    def by_target(self) -> Edges:
        """The same edges, ascending by the spot that they lead to."""
        order = torch.argsort(self.index[1], stable=True)
        return Edges(self.index[:, order].contiguous(), self.features[order])

    def into(self, n: int) -> Edges:
        """Edges into the first n spots, of edges that ascend by target."""
        end = int(torch.searchsorted(self.index[1], n))
        return Edges(self.index[:, :end], self.features[:end])


@dataclass(frozen=True)
class GraphInputs:
    """Images and graph of one stack; no expression."""

    spot: Tensor  # (n, d) tokens of the spots
    region: Tensor  # (n, t, d) tokens of the regions
    surroundings: Tensor  # (n, t, d) tokens of the global fields
    edges: tuple[Edges, ...]  # one per type, ascending by target
    reach: tuple[int, ...] = ()
    """Per graph layer, number of first spots whose state it computes: the last ones are the spots to predict, those of the
    layer before are these and their neighbors. Empty for all spots in all layers."""

    def part(self, rows: slice | Tensor) -> GraphInputs:
        """Tokens of some of the spots, without edges."""
        return GraphInputs(self.spot[rows], self.region[rows], self.surroundings[rows], ())

    @property
    def n_predicted(self) -> int:
        """Number of first spots that are predicted."""
        return self.reach[-1] if self.reach else len(self.spot)


@dataclass(frozen=True)
class LabelInputs:
    """Predictions of some spots from the labels of others, standardised; a spot's own label is never part of them."""

    base: Tensor  # (m, g) base prediction, to which the network adds its correction
    propagated: Tensor  # (m, g) labels propagated over the 3D graph
    support: Tensor  # (m, 1) mass of the propagation, 0-1


class LevelAttention(nn.Module):
    """Attention of the spot token over the tokens of its larger fields of view, with residual."""

    def __init__(self, width: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, n_heads, dropout=dropout, batch_first=True)

    def forward(self, spot: Tensor, tokens: Tensor) -> Tensor:
        """Shapes: spot (n, w), tokens (n, t, w) -> (n, w)."""
        tokens = self.norm(tokens)
        found, _ = self.attention(self.norm(spot)[:, None], tokens, tokens, need_weights=False)
        return spot + found[:, 0]


class GraphLayer(nn.Module):
    """Attention over the 3D graph, one per type of edge, and a layer that combines its results with the spot.

    A spot attends to its neighbors of each type separately, so that many neighbors of one type do not take the place of
    the few of another. The combination is not linear: it can learn how a spot and its neighbors act together.
    """

    def __init__(self, width: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.ModuleList(
            [
                GATv2Conv(
                    width,
                    width // n_heads,
                    heads=n_heads,
                    edge_dim=N_EDGE_FEATURES,
                    add_self_loops=False,  # the combination has the spot itself
                    dropout=dropout,
                )
                for _ in range(N_EDGE_TYPES)
            ]
        )
        self.combine = nn.Sequential(
            nn.Linear((1 + N_EDGE_TYPES) * width, 2 * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(2 * width, width),
        )

    def forward(self, nodes: Tensor, edges: Sequence[Edges], n: int | None = None) -> Tensor:
        """State of the first n spots, to which all edges lead; of all by default. Shapes: nodes (m, w) -> (n, w)."""
        own = nodes[:n]
        found = [attend((nodes, own), e.index, e.features) for attend, e in zip(self.attention, edges, strict=True)]
        return own + self.combine(torch.cat([own, *found], dim=1))


class MSAGNet(nn.Module):
    """Multi-level spatial attention graph network with cross-layer imputation.

    `n_features` is the number of features of a token, `group` (n_genes,) the group of each gene to predict. Genes of a group
    share a merge weight.
    """

    group: Tensor

    def __init__(self, n_features: int, group: Tensor, params: AsignParams) -> None:
        super().__init__()
        n_genes, width, n_heads, dropout = len(group), params.width, params.n_heads, params.dropout or 0.0
        self.embed = nn.ModuleList([nn.Linear(n_features, width) for _ in range(N_LEVELS)])
        self.place = nn.Parameter(torch.zeros(N_LEVELS, width))  # embedding of the level
        self.embed_base = nn.Linear(n_genes, width)
        self.to_region = LevelAttention(width, n_heads, dropout)
        self.to_surroundings = LevelAttention(width, n_heads, dropout)
        self.graph = nn.ModuleList([GraphLayer(width, n_heads, dropout) for _ in range(params.n_graph_layers)])
        self.level_graph = nn.ModuleList(
            [
                nn.ModuleList([GraphLayer(width, n_heads, dropout) for _ in self.graph])
                for _ in range(N_LEVELS - 1 if params.level_graph else 0)
            ]
        )
        layer = nn.TransformerEncoderLayer(
            width, n_heads, 2 * width, dropout, batch_first=True, norm_first=True, activation="gelu"
        )
        self.levels = nn.TransformerEncoder(layer, params.n_level_layers, enable_nested_tensor=False)
        self.dropout = nn.Dropout(dropout)
        self.correction = nn.Linear(width, n_genes)
        self.merge = nn.Linear(width + 1, int(group.max()) + 1)
        self.register_buffer("group", group)
        nn.init.normal_(self.place, std=0.02)
        if params.base != "none":
            self.return_to_base()

    def return_to_base(self) -> None:
        """Set both heads to zero, so that the network returns the base."""
        for head in (self.correction, self.merge):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(
        self, x: GraphInputs, labels: LabelInputs, *, levels: bool = False, in_blocks: bool = False
    ) -> Tensor | list[Tensor]:
        """Predict the first m spots of the graph (see ``x.reach``), with `labels` of these -> (m, g).

        The result is ``a * propagated + (1 - a) * (base + correction)``. The merge weight ``a`` depends on the spot, its
        support, and the gene group; 0 is the network, 1 the propagated labels. With `levels` the result is (3, m, g): also
        the corrections that region and global field predict with the same head. With `in_blocks` the result is a list of
        (m, b), some genes each.
        """
        reach = x.reach or (len(x.spot),) * len(self.graph)
        edges = [[part.into(n) for part in x.edges] for n in reach] if x.reach else [x.edges] * len(reach)
        # The states of all edges take most of the memory of a training with a graph of each level. So they are computed once
        # more for the gradient, instead of being kept.
        computed_again = self.training and len(self.level_graph) > 0
        states = []
        for layers, state in self.branches(*self.encode(x)):
            for layer, *inputs in zip(layers, edges, reach, strict=False):
                if computed_again:
                    state = checkpoint(layer, state, *inputs, use_reentrant=False)
                else:
                    state = layer(state, *inputs)
            states.append(state[: x.n_predicted])
        predicted, sequence = self.decode(torch.stack(states, dim=1), labels)
        if in_blocks:
            return predicted
        whole = torch.cat(predicted, dim=1)
        return torch.cat([whole[None], self.correction(sequence[:, 1:]).transpose(0, 1)]) if levels else whole

    def branches(self, nodes: Tensor, fields: Tensor) -> list[tuple[Sequence[nn.Module], Tensor]]:
        """Graph layers and (n, w) state of each level; no layers for levels that do not take part in the graph."""
        layers = [self.graph, *(self.level_graph if len(self.level_graph) else [()] * (N_LEVELS - 1))]
        return list(zip(layers, (nodes, *fields.unbind(dim=1)), strict=True))

    def encode(self, x: GraphInputs) -> tuple[Tensor, Tensor]:
        """State of each spot before the graph, (n, w), and of its larger fields of view, (n, 2, w)."""
        region = self.embed[1](x.region)  # (n, t, w)
        surroundings = self.embed[2](x.surroundings)
        nodes = self.to_surroundings(self.to_region(self.embed[0](x.spot), region), surroundings)
        return nodes, torch.stack([region.mean(dim=1), surroundings.mean(dim=1)], dim=1)

    def decode(self, states: Tensor, labels: LabelInputs) -> tuple[list[Tensor], Tensor]:
        """Prediction (m, b) of some genes each, from the state of each spot and of its larger fields of view, (m, 3, w).

        Also returns these states after the attention between the levels of the same spot.
        """
        own = states[:, 0] + self.embed_base(labels.base)
        sequence = self.levels(torch.cat([own[:, None], states[:, 1:]], dim=1) + self.place)
        state = self.dropout(sequence.mean(dim=1))
        merge = torch.tanh(self.merge(torch.cat([state, labels.support], dim=1)))  # (m, groups)
        # A product with the membership of the genes, because the gradient of an index is slow.
        member = nn.functional.one_hot(self.group, merge.shape[1]).T.to(merge.dtype)
        blocks = list(gene_blocks(len(self.group)))
        sizes = [genes.stop - genes.start for genes in blocks]
        predicted = []
        heads = zip(blocks, self.correction.weight.split(sizes), self.correction.bias.split(sizes), strict=True)
        for genes, weight, bias in heads:
            corrected = labels.base[:, genes] + nn.functional.linear(state, weight, bias)
            predicted.append(torch.lerp(corrected, labels.propagated[:, genes], merge @ member[:, genes]))
        return predicted, sequence


def graph_states(network: MSAGNet, x: GraphInputs) -> Tensor:
    """(n, 3, w) state of all spots and of their larger fields of view after the graph, on the device of the network.

    Spots are processed in parts, so that memory does not grow with the edges of a large stack.
    """
    n, device = len(x.spot), str(network.place.device)
    parts = [slice(start, min(start + _SPOTS_AT_A_TIME, n)) for start in range(0, n, _SPOTS_AT_A_TIME)]
    with torch.inference_mode():
        encoded = [network.encode(to_device(x.part(rows), device)) for rows in parts]
        nodes, fields = (torch.cat(tensors) for tensors in zip(*encoded, strict=True))
        del encoded
        states = []
        for layers, state in network.branches(nodes, fields):
            for layer in layers:
                state = torch.cat([_attend(layer, state, x.edges, rows) for rows in parts])
            states.append(state)
        return torch.stack(states, dim=1)


def decode_states(network: MSAGNet, states: Tensor, labels: LabelInputs) -> Tensor:
    """(m, g) prediction on the CPU of some spots from their states; see :func:`graph_states`."""
    with torch.inference_mode():
        return torch.cat(network.decode(states, to_device(labels, str(states.device)))[0], dim=1).cpu()


def _attend(layer: nn.Module, nodes: Tensor, edges: Sequence[Edges], rows: slice) -> Tensor:
    """Apply the layer to some spots; only these and their neighbors are gathered, these first."""
    bounds = torch.tensor([rows.start, rows.stop])
    parts = [slice(*torch.searchsorted(part.index[1], bounds).tolist()) for part in edges]
    into = [Edges(part.index[:, own], part.features[own]) for part, own in zip(edges, parts, strict=True)]
    own = torch.arange(rows.start, rows.stop)
    sources = torch.unique(torch.cat([part.index[0] for part in into]))
    gathered = torch.cat([own, sources[(sources < rows.start) | (sources >= rows.stop)]])
    position = torch.empty(len(nodes), dtype=torch.long)
    position[gathered] = torch.arange(len(gathered))
    device = str(nodes.device)
    local = to_device([Edges(position[part.index], part.features) for part in into], device)
    return layer(nodes[gathered.to(device)], local, len(own))
