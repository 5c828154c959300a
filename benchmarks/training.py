"""A training step of ASIGN beside the same layers in bare torch operations, on the same graph and in the same run.

Run ``OMP_NUM_THREADS=1 python benchmarks/training.py [--spots 5000] [--repeats 15]``. Steps alternate; the ratio of the
medians is printed. Bare: linear maps, attention over tokens and edges by index and scatter, one transformer layer of
torch, squared error, backward and AdamW. Ours adds the loss of correlation, weights of spots and clipped gradients.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from spatial_impute.models._params import AsignParams
from spatial_impute.models.asign._network import (
    N_EDGE_FEATURES,
    N_EDGE_TYPES,
    Edges,
    GraphInputs,
    LabelInputs,
    MSAGNet,
)
from spatial_impute.models.asign._training import Batch, Target, regimes, training_step

if TYPE_CHECKING:
    from collections.abc import Callable

N_GENES, WIDTH_OF_TOKEN, N_NEIGHS = 250, 256, 6  # neighbors of each of the three types


class BareAttention(nn.Module):
    """Attention over edges by index and scatter."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.source, self.target = nn.Linear(width, width), nn.Linear(width, width)
        self.edge = nn.Linear(N_EDGE_FEATURES, width, bias=False)
        self.score = nn.Parameter(torch.randn(heads, width // heads))

    def forward(self, nodes: Tensor, edges: Edges, n: int) -> Tensor:
        """State of the first n spots."""
        source, target = edges.index
        values = self.source(nodes).view(len(nodes), self.heads, -1)
        pairs = values[source] + self.target(nodes[:n]).view(n, self.heads, -1)[target]
        pairs = nn.functional.leaky_relu(pairs + self.edge(edges.features).view(len(source), self.heads, -1), 0.2)
        score = (pairs * self.score).sum(dim=-1)
        score = (score - score.max()).exp()
        total = torch.zeros(n, self.heads).index_add(0, target, score)
        share = nn.functional.dropout(score / total[target].clamp_min(1e-16), self.dropout, self.training)
        return torch.zeros_like(values[:n]).index_add(0, target, values[source] * share[..., None]).reshape(n, -1)


class Bare(nn.Module):
    """The layers of MSAGNet without anything around them."""

    def __init__(self, params: AsignParams) -> None:
        super().__init__()
        w, h, dropout = params.width, params.n_heads, params.dropout
        self.embed = nn.ModuleList([nn.Linear(WIDTH_OF_TOKEN, w) for _ in range(3)])
        self.embed_base = nn.Linear(N_GENES, w)
        self.attend = nn.ModuleList([nn.MultiheadAttention(w, h, dropout, batch_first=True) for _ in range(2)])
        self.norms = nn.ModuleList([nn.LayerNorm(w) for _ in range(2)])
        layers = range(params.n_graph_layers)
        self.graph = nn.ModuleList(
            [nn.ModuleList([BareAttention(w, h, dropout) for _ in range(N_EDGE_TYPES)]) for _ in layers]
        )
        self.combine = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(4 * w, 2 * w), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * w, w))
                for _ in layers
            ]
        )
        self.levels = nn.TransformerEncoderLayer(w, h, 2 * w, dropout, batch_first=True, norm_first=True)
        self.dropout = nn.Dropout(dropout)
        self.correction = nn.Linear(w, N_GENES)
        self.merge = nn.Linear(w + 1, params.n_gene_groups)

    def forward(self, batch: Batch, group: Tensor) -> Tensor:
        x, labels, m = batch.inputs, batch.labels, batch.inputs.n_predicted
        nodes = self.embed[0](x.spot)
        fields = [self.embed[1](x.region), self.embed[2](x.surroundings)]
        for attend, norm, field in zip(self.attend, self.norms, fields, strict=True):
            normed = norm(field)
            nodes = nodes + attend(norm(nodes)[:, None], normed, normed, need_weights=False)[0][:, 0]
        for attentions, combine, n in zip(self.graph, self.combine, x.reach, strict=True):
            found = [attend(nodes, edges.into(n), n) for attend, edges in zip(attentions, x.edges, strict=True)]
            nodes = nodes[:n] + combine(torch.cat([nodes[:n], *found], dim=1))
        own = nodes + self.embed_base(labels.base)
        sequence = torch.stack([own, *(field.mean(dim=1)[:m] for field in fields)], dim=1)
        state = self.dropout(self.levels(sequence).mean(dim=1))
        merge = torch.tanh(self.merge(torch.cat([state, labels.support], dim=1)))[:, group]
        return torch.lerp(labels.base + self.correction(state), labels.propagated, merge)


def main() -> None:
    """Time both and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spots", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    n = options.spots
    ours, bare = steps(n)
    times = []
    for repeat in range(options.repeats + 1):
        start = time.perf_counter()
        ours()
        middle = time.perf_counter()
        bare()
        if repeat:  # the first warms up
            times.append((middle - start, time.perf_counter() - middle))
    own, peer = np.median(times, axis=0)
    ratios = np.divide(*np.transpose(times))
    print(
        f"{n} spots, {N_EDGE_TYPES * n * N_NEIGHS} edges, {AsignParams().width} wide: step {own:.3f} s, bare {peer:.3f} s"
    )
    print(f"ratio {own / peer:.3f} (median of pairs {np.median(ratios):.3f}); bar 1.3")


def steps(n: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """A training step on `n` spots with defaults, ours and the bare one."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    params = regimes(AsignParams())[0]
    target = torch.arange(n).repeat_interleave(N_NEIGHS)
    inputs = GraphInputs(
        spot=torch.randn(n, WIDTH_OF_TOKEN),
        region=torch.randn(n, 2, WIDTH_OF_TOKEN),
        surroundings=torch.randn(n, 6, WIDTH_OF_TOKEN),
        edges=tuple(
            Edges(torch.stack([torch.randint(n, target.shape), target]), torch.rand(len(target), N_EDGE_FEATURES))
            for _ in range(N_EDGE_TYPES)
        ),
        reach=(n, n // 5),
    )
    m = n // 5
    labels = LabelInputs(torch.randn(m, N_GENES), torch.randn(m, N_GENES), torch.rand(m, 1))
    batch = Batch(inputs, labels, Target.of(torch.randn(m, N_GENES)))
    group = torch.arange(N_GENES) % params.n_gene_groups
    network, bare = MSAGNet(WIDTH_OF_TOKEN, group, params), Bare(params)
    adams = [torch.optim.AdamW(part.parameters(), lr=1e-3) for part in (network, bare)]

    def bare_step() -> None:
        adams[1].zero_grad()
        nn.functional.mse_loss(bare(batch, group), batch.target.centred).backward()
        adams[1].step()

    return lambda: training_step(network, adams[0], batch, params), bare_step


if __name__ == "__main__":
    main()
