"""MSAGNet, the network of ASIGN :cite:p:`Zhu2025`: three fields of view, a 3D graph, and a learned merge.

Expression is in standard deviations around the mean of the measured spots. The network starts exactly at the base
prediction it is given.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch_geometric.nn import GATv2Conv

N_EDGE_FEATURES = 6
"""Nearness, length, overlap, similarity, whether on one section, sections apart."""
N_LEVELS = 3


@dataclass(frozen=True)
class GraphInputs:
    """Tensors of one stack."""

    spot: Tensor
    """(n, d) tokens of the spots."""
    region: Tensor
    """(n, t, d) tokens of the regions."""
    surroundings: Tensor
    """(n, t, d) tokens of the global fields."""
    base: Tensor
    """(n, g) prediction to start from, standardised; that of a known spot does not see its own label."""
    propagated: Tensor
    """(n, g) labels propagated over the 3D graph, standardised; the labels themselves at known spots."""
    support: Tensor
    """(n, 1) mass of the propagation, 0-1."""
    edge_index: Tensor
    """(2, e) both directions of every edge."""
    edge_features: Tensor
    """(e, 6)."""

    def to(self, device: str) -> GraphInputs:
        """Move all tensors."""
        return GraphInputs(**{key: value.to(device) for key, value in vars(self).items()})

    def part(self, rows: slice) -> GraphInputs:
        """Some of the spots, without edges."""
        own = {key: value[rows] for key, value in vars(self).items() if not key.startswith("edge_")}
        return GraphInputs(**own, edge_index=self.edge_index[:, :0], edge_features=self.edge_features[:0])


class LevelAttention(nn.Module):
    """Spot token attending over the tokens of its larger fields of view, with residual."""

    def __init__(self, width: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, n_heads, dropout=dropout, batch_first=True)

    def forward(self, spot: Tensor, context: Tensor) -> Tensor:
        """Shapes: spot (n, w), context (n, t, w) -> (n, w)."""
        context = self.norm(context)
        found, _ = self.attention(self.norm(spot)[:, None], context, context, need_weights=False)
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

    Parameters
    ----------
    n_features
        Features of a token.
    n_genes
        Genes to predict.
    n_groups
        Groups of genes that share a merge weight.
    group
        (n_genes,) group of each gene.
    width, n_heads, n_graph_layers, n_level_layers, dropout
        Size of the network.
    """

    def __init__(
        self,
        n_features: int,
        n_genes: int,
        *,
        group: Tensor,
        width: int,
        n_heads: int,
        n_graph_layers: int,
        n_level_layers: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.embed = nn.ModuleList([nn.Linear(n_features, width) for _ in range(N_LEVELS)])
        self.place = nn.Parameter(torch.zeros(N_LEVELS, width))  # tells the levels apart
        self.embed_base = nn.Linear(n_genes, width)
        self.to_region = LevelAttention(width, n_heads, dropout)
        self.to_surroundings = LevelAttention(width, n_heads, dropout)
        self.graph = nn.ModuleList([GraphLayer(width, n_heads, dropout) for _ in range(n_graph_layers)])
        layer = nn.TransformerEncoderLayer(
            width, n_heads, 2 * width, dropout, batch_first=True, norm_first=True, activation="gelu"
        )
        self.levels = nn.TransformerEncoder(layer, n_level_layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.correction = nn.Linear(width, n_genes)
        self.merge = nn.Linear(width + 1, int(group.max()) + 1)
        self.register_buffer("group", group)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start exactly at the base: both heads give zero."""
        nn.init.normal_(self.place, std=0.02)
        for head in (self.correction, self.merge):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, x: GraphInputs) -> Tensor:
        """Predict (n, g).

        The result is ``a * propagated + (1 - a) * (base + correction)``. The merge weight ``a`` of a spot and gene group
        sees the spot's support; 0 is the network, 1 the propagated labels.
        """
        nodes, context = self.read(x)
        for layer in self.graph:
            nodes = layer(nodes, x.edge_index, x.edge_features)
        return self.decide(nodes, context, x)

    def read(self, x: GraphInputs) -> tuple[Tensor, Tensor]:
        """What each spot sees by itself: (n, w) state for the graph, (n, 2, w) its larger fields of view."""
        spot = self.embed[0](x.spot) + self.embed_base(x.base)
        region = self.embed[1](x.region)  # (n, t, w)
        surroundings = self.embed[2](x.surroundings)
        nodes = self.to_surroundings(self.to_region(spot, region), surroundings)
        return nodes, torch.stack([region.mean(dim=1), surroundings.mean(dim=1)], dim=1)

    def decide(self, nodes: Tensor, context: Tensor, x: GraphInputs) -> Tensor:
        """Prediction of each spot from its state after the graph and its larger fields of view; (n, g)."""
        # The levels of the same spot talk to each other: (n, 3, w).
        sequence = torch.cat([nodes[:, None], context], dim=1) + self.place
        state = self.dropout(self.norm(self.levels(sequence).mean(dim=1)))
        merge = torch.tanh(self.merge(torch.cat([state, x.support], dim=1)))[:, self.group]  # (n, g)
        return torch.lerp(x.base + self.correction(state), x.propagated, merge)
