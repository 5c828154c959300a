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
from spatial_impute.models.asign._network import N_EDGE_FEATURES, GraphInputs, MSAGNet
from spatial_impute.models.asign._training import Episode, training_step

if TYPE_CHECKING:
    from collections.abc import Callable

N_GENES, WIDTH_OF_TOKEN, N_NEIGHS = 250, 256, 12


class Bare(nn.Module):
    """The layers of MSAGNet without anything around them."""

    def __init__(self, params: AsignParams) -> None:
        super().__init__()
        w, h = params.width, params.n_heads
        self.heads = h
        self.embed = nn.ModuleList([nn.Linear(WIDTH_OF_TOKEN, w) for _ in range(3)])
        self.embed_base = nn.Linear(N_GENES, w)
        self.attend = nn.ModuleList([nn.MultiheadAttention(w, h, params.dropout, batch_first=True) for _ in range(2)])
        self.norms = nn.ModuleList([nn.LayerNorm(w) for _ in range(5)])
        self.source = nn.ModuleList([nn.Linear(w, w) for _ in range(params.n_graph_layers)])
        self.target = nn.ModuleList([nn.Linear(w, w) for _ in range(params.n_graph_layers)])
        self.edge = nn.ModuleList([nn.Linear(N_EDGE_FEATURES, w, bias=False) for _ in range(params.n_graph_layers)])
        self.score = nn.ParameterList([nn.Parameter(torch.randn(h, w // h)) for _ in range(params.n_graph_layers)])
        self.levels = nn.TransformerEncoderLayer(w, h, 2 * w, params.dropout, batch_first=True, norm_first=True)
        self.correction = nn.Linear(w, N_GENES)
        self.merge = nn.Linear(w + 1, params.n_gene_groups)

    def forward(self, x: GraphInputs, group: Tensor) -> Tensor:
        n = len(x.spot)
        loops = torch.arange(n)
        source, target = (torch.cat([index, loops]) for index in x.edge_index)
        edges = torch.cat([x.edge_features, torch.zeros(n, N_EDGE_FEATURES)])
        nodes = self.embed[0](x.spot) + self.embed_base(x.base)
        fields = [self.embed[1](x.region), self.embed[2](x.surroundings)]
        for attend, norm, field in zip(self.attend, self.norms, fields, strict=False):
            field = norm(field)
            nodes = nodes + attend(norm(nodes)[:, None], field, field, need_weights=False)[0][:, 0]
        for k, norm in zip(range(len(self.source)), self.norms[2:], strict=False):
            states = norm(nodes)
            values = self.source[k](states).view(n, self.heads, -1)
            pairs = values[source] + self.target[k](states).view(n, self.heads, -1)[target]
            pairs = nn.functional.leaky_relu(pairs + self.edge[k](edges).view(len(source), self.heads, -1), 0.2)
            score = (pairs * self.score[k]).sum(dim=-1)
            score = (score - score.max()).exp()
            total = torch.zeros(n, self.heads).index_add(0, target, score)
            share = nn.functional.dropout(score / total[target].clamp_min(1e-16), 0.5, self.training)
            found = torch.zeros_like(values).index_add(0, target, values[source] * share[..., None])
            nodes = nodes + nn.functional.elu(found.reshape(n, -1))
        sequence = torch.stack([nodes, *(field.mean(dim=1) for field in fields)], dim=1)
        state = nn.functional.dropout(self.norms[4](self.levels(sequence).mean(dim=1)), 0.5, self.training)
        merge = torch.tanh(self.merge(torch.cat([state, x.support], dim=1)))[:, group]
        return torch.lerp(x.base + self.correction(state), x.propagated, merge)


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
    print(f"{n} spots, {n * N_NEIGHS} edges, {AsignParams().width} wide: step {own:.3f} s, bare {peer:.3f} s")
    print(f"ratio {own / peer:.3f} (median of pairs {np.median(ratios):.3f}); bar 1.3")


def steps(n: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """A training step on `n` spots with defaults, ours and the bare one."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    params = AsignParams()
    inputs = GraphInputs(
        spot=torch.randn(n, WIDTH_OF_TOKEN),
        region=torch.randn(n, 2, WIDTH_OF_TOKEN),
        surroundings=torch.randn(n, 6, WIDTH_OF_TOKEN),
        base=torch.randn(n, N_GENES),
        propagated=torch.randn(n, N_GENES),
        support=torch.rand(n, 1),
        edge_index=torch.stack([torch.randint(n, (n * N_NEIGHS,)), torch.arange(n).repeat_interleave(N_NEIGHS)]),
        edge_features=torch.rand(n * N_NEIGHS, N_EDGE_FEATURES),
    )
    rows = torch.arange(0, n, 5)
    episode = Episode(inputs, rows, torch.randn(len(rows), N_GENES), torch.ones(len(rows)))
    group = torch.arange(N_GENES) % params.n_gene_groups
    network, bare = MSAGNet(WIDTH_OF_TOKEN, group, params), Bare(params)
    adams = [torch.optim.AdamW(part.parameters(), lr=1e-3) for part in (network, bare)]

    def bare_step() -> None:
        adams[1].zero_grad()
        nn.functional.mse_loss(bare(inputs, group)[rows], episode.expression).backward()
        adams[1].step()

    return lambda: training_step(network, adams[0], episode, params.correlation_weight), bare_step


if __name__ == "__main__":
    main()
