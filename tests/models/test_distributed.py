"""Training in several processes, without a GPU."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys

import torch
from torch import distributed
from spatial_impute.models import AsignParams
from spatial_impute.models.asign._network import N_EDGE_FEATURES, N_EDGE_TYPES, Edges, GraphInputs, LabelInputs, MSAGNet
from spatial_impute.models.asign._training import Batch, Target, train

N, D, G = 10, 4, 3

PARAMS = AsignParams(
    width=8, n_heads=2, n_graph_layers=1, n_level_layers=1, dropout=0.0,
    n_steps=1, learning_rate=1e-2, weight_decay=0.0, correlation_weight=0.5,
)

def build():
    net = MSAGNet(D, torch.zeros(G, dtype=torch.long), PARAMS)
    torch.nn.init.normal_(net.correction.weight, std=0.5)
    return net

def batch(k):
    torch.manual_seed(k)
    ring, m = torch.arange(N), 4 + 2 * k
    edges = Edges(torch.stack([ring.roll(1), ring]), torch.rand(N, N_EDGE_FEATURES))
    fields = torch.randn(N, 2, D), torch.randn(N, 2, D)
    x = GraphInputs(torch.randn(N, D), *fields, (edges,) * N_EDGE_TYPES, reach=(m,))
    labels = LabelInputs(torch.randn(m, G), torch.randn(m, G), torch.rand(m, 1))
    return Batch(x, labels, Target.of(torch.randn(m, G)))

def run():
    return train(build, [batch(0), batch(1)], [], PARAMS, seed=0).state

if __name__ == "__main__":
    # What one step on the mean of both gradients gives.
    torch.manual_seed(0)
    net = build()
    for k in (0, 1):
        batch(k).loss(net, PARAMS).div(2).backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.0).step()

    distributed.init_process_group("gloo")
    state = run()
    for name, expected in net.state_dict().items():
        torch.testing.assert_close(state[name], expected, rtol=1e-3, atol=1e-5)
    sys.stdout.write(f"same in process {distributed.get_rank()}\\n")  # in one piece, two processes write
    distributed.destroy_process_group()
"""


def test_two_processes_train_one_network(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert "same in process 0" in done.stdout
    assert "same in process 1" in done.stdout
