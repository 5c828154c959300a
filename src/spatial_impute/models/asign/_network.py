"""MSAGNet, the network of ASIGN :cite:p:`Zhu2025`: three fields of view, a 3D graph, and a learned merge.

Expression is in standard deviations around the mean of the measured spots. The untrained network returns exactly the
base prediction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch_geometric.nn import GATv2Conv

if TYPE_CHECKING:
    from spatial_impute.models._params import AsignParams

N_EDGE_FEATURES = 6  # Nearness, length, overlap, similarity, 1 within a section, number of sections apart
N_LEVELS = 3
_SPOTS_AT_A_TIME = 50_000  # some 300 MB at the default width and 12 edges per spot


@dataclass(frozen=True)
class GraphInputs:
    """Tensors of one stack."""

    spot: Tensor  # (n, d) tokens of the spots
    region: Tensor  # (n, t, d) tokens of the regions
    surroundings: Tensor  # (n, t, d) tokens of the global fields
    base: Tensor  # (n, g) base prediction, standardised; that of a known spot is made without its own label
    propagated: Tensor  # (n, g) labels propagated over the 3D graph, standardised; known spots have their labels
    support: Tensor  # (n, 1) mass of the propagation, 0-1
    edge_index: Tensor  # (2, e) both directions of every edge
    edge_features: Tensor  # (e, 6)

    def to(self, device: str) -> GraphInputs:
        return GraphInputs(**{key: value.to(device) for key, value in vars(self).items()})

    def part(self, rows: slice) -> GraphInputs:
        """Some of the spots, without edges."""
        own = {key: value[rows] for key, value in vars(self).items() if not key.startswith("edge_")}
        return GraphInputs(**own, edge_index=self.edge_index[:, :0], edge_features=self.edge_features[:0])


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
    """Edge-softmax attention over the 3D graph with edge features and self-loops, with residual."""

    def __init__(self, width: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = GATv2Conv(
            width,
            width // n_heads,
            heads=n_heads,
            edge_dim=N_EDGE_FEATURES,
            add_self_loops=True,
            fill_value=0.0,
            dropout=dropout,
        )

    def forward(self, nodes: Tensor, edge_index: Tensor, edge_features: Tensor) -> Tensor:
        """Shapes: nodes (n, w), edge_index (2, e), edge_features (e, 6) -> (n, w)."""
        return nodes + torch.nn.functional.elu(self.attention(self.norm(nodes), edge_index, edge_features))


class MSAGNet(nn.Module):
    """Multi-level spatial attention graph network with cross-layer imputation.

    `n_features` is the number of features of a token, `group` (n_genes,) the group of each gene to predict. Genes of a group
    share a merge weight.
    """

    group: Tensor

    def __init__(self, n_features: int, group: Tensor, params: AsignParams) -> None:
        super().__init__()
        n_genes, width, n_heads, dropout = len(group), params.width, params.n_heads, params.dropout
        self.embed = nn.ModuleList([nn.Linear(n_features, width) for _ in range(N_LEVELS)])
        self.place = nn.Parameter(torch.zeros(N_LEVELS, width))  # embedding of the level
        self.embed_base = nn.Linear(n_genes, width)
        self.to_region = LevelAttention(width, n_heads, dropout)
        self.to_surroundings = LevelAttention(width, n_heads, dropout)
        self.graph = nn.ModuleList([GraphLayer(width, n_heads, dropout) for _ in range(params.n_graph_layers)])
        layer = nn.TransformerEncoderLayer(
            width, n_heads, 2 * width, dropout, batch_first=True, norm_first=True, activation="gelu"
        )
        self.levels = nn.TransformerEncoder(layer, params.n_level_layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.correction = nn.Linear(width, n_genes)
        self.merge = nn.Linear(width + 1, int(group.max()) + 1)
        self.register_buffer("group", group)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set both heads to zero, so that the network returns the base."""
        nn.init.normal_(self.place, std=0.02)
        for head in (self.correction, self.merge):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, x: GraphInputs) -> Tensor:
        """Predict (n, g).

        The result is ``a * propagated + (1 - a) * (base + correction)``. The merge weight ``a`` depends on the spot, its
        support, and the gene group; 0 is the network, 1 the propagated labels.
        """
        nodes, fields = self.encode(x)
        for layer in self.graph:
            nodes = layer(nodes, x.edge_index, x.edge_features)
        return self.decode(nodes, fields, x)

    def encode(self, x: GraphInputs) -> tuple[Tensor, Tensor]:
        """State of each spot before the graph, (n, w), and of its larger fields of view, (n, 2, w)."""
        spot = self.embed[0](x.spot) + self.embed_base(x.base)
        region = self.embed[1](x.region)  # (n, t, w)
        surroundings = self.embed[2](x.surroundings)
        nodes = self.to_surroundings(self.to_region(spot, region), surroundings)
        return nodes, torch.stack([region.mean(dim=1), surroundings.mean(dim=1)], dim=1)

    def decode(self, nodes: Tensor, fields: Tensor, x: GraphInputs) -> Tensor:
        """Prediction (n, g) from the state of each spot after the graph, (n, w), and of its fields of view, (n, 2, w)."""
        # Attention between the levels of the same spot: (n, 3, w).
        sequence = torch.cat([nodes[:, None], fields], dim=1) + self.place
        state = self.dropout(self.norm(self.levels(sequence).mean(dim=1)))
        merge = torch.tanh(self.merge(torch.cat([state, x.support], dim=1)))[:, self.group]  # (n, g)
        return torch.lerp(x.base + self.correction(state), x.propagated, merge)


def predict(network: MSAGNet, x: GraphInputs, *, device: str) -> Tensor:
    """(n, g) prediction on the CPU, equal to ``network(x)``.

    Spots are processed in parts, so that memory does not grow with the edges of a large stack.
    """
    network = network.eval().to(device)
    n = len(x.spot)
    starts = range(0, max(n, 1), _SPOTS_AT_A_TIME)
    parts = [slice(start, min(start + _SPOTS_AT_A_TIME, n)) for start in starts]
    with torch.inference_mode():
        if len(parts) == 1:
            return network(x.to(device)).cpu()
        encoded = [network.encode(x.part(rows).to(device)) for rows in parts]
        nodes, fields = (torch.cat(tensors) for tensors in zip(*encoded, strict=True))
        del encoded
        # Edges in the order of their targets.
        order = torch.argsort(x.edge_index[1], stable=True)
        edge_index, edge_features = x.edge_index[:, order], x.edge_features[order]
        for layer in network.graph:
            graph_layer = cast("GraphLayer", layer)
            nodes = torch.cat([_attend(graph_layer, nodes, edge_index, edge_features, rows) for rows in parts])
        result = torch.empty_like(x.base)
        for rows in parts:
            result[rows] = network.decode(nodes[rows], fields[rows], x.part(rows).to(device)).cpu()
    return result


def _attend(layer: GraphLayer, nodes: Tensor, edge_index: Tensor, edge_features: Tensor, rows: slice) -> Tensor:
    """Apply the layer to some spots; only these and their neighbours are gathered."""
    first, last = torch.searchsorted(edge_index[1].contiguous(), torch.tensor([rows.start, rows.stop]))
    source, target = edge_index[:, first:last]
    own = torch.arange(rows.start, rows.stop)
    gathered = torch.unique(torch.cat([own, source]))  # sorted
    local = torch.stack([torch.searchsorted(gathered, source), torch.searchsorted(gathered, target)])
    device = nodes.device
    found = layer(nodes[gathered.to(device)], local.to(device), edge_features[first:last].to(device))
    return found[torch.searchsorted(gathered, own).to(device)]
