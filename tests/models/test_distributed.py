"""Training in several processes, without a GPU."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

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


FITS = """
import sys
from pathlib import Path

import spatialdata as sd
import torch
from torch import distributed

import spatial_impute as si
from spatial_impute.models.pixnet._training import mean_gradient

if __name__ == "__main__":
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()

    # The mean of the gradients of the processes that have a batch; the second one has none.
    layer = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    if rank == 0:
        (3 * layer.weight).sum().backward()
    assert mean_gradient(layer, optimizer, 2.0 if rank == 0 else None) == 2.0
    assert layer.weight.grad.item() == 3.0
    assert mean_gradient(layer, optimizer, None) is None

    sdata = sd.read_zarr("stack.zarr")
    asign = si.tl.fit_asign(
        sdata, model_params={"n_steps": 3, "width": 8, "n_heads": 2, "n_folds": 2}, checkpoint=Path("asign")
    )
    pixnet = si.tl.fit_pixnet(
        sdata, "s1_image", "s1_spots", checkpoint=Path("pixnet"),
        model_params={"n_steps": 4, "n_steps_per_check": 2, "width": 8, "n_base": 8, "resolution": 8.0, "crop": 64,
                      "margin": 8, "n_cached_crops": 4},
    )
    found = [None, None]
    distributed.all_gather_object(found, (asign.identity, pixnet.identity, pixnet.history.to_json()))
    assert found[0] == found[1], found
    sys.stdout.write(f"same in process {rank}\\n")
    distributed.destroy_process_group()
"""


def run_two(script: Path) -> None:
    """Run a script in two processes, which must both end with the same."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=script.parent)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert "same in process 0" in done.stdout
    assert "same in process 1" in done.stdout


def test_two_processes_train_one_network(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    run_two(script)


def test_two_processes_fit_the_same_models_and_one_writes(small_stack, tmp_path):
    small_stack.write(tmp_path / "stack.zarr")
    script = tmp_path / "fits.py"
    script.write_text(FITS)
    run_two(script)
    assert list((tmp_path / "asign").glob("*.safetensors"))
    assert list((tmp_path / "pixnet").glob("*.safetensors"))
