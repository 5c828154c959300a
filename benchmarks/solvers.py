"""The operations of co-kriging and label propagation, in torch and in numpy, scipy or LAPACK.

Run ``OMP_NUM_THREADS=1 python benchmarks/solvers.py [--device cuda]``. Prints milliseconds of processor time (of a GPU: of wall clock) for
matrices as large as those of a tile. They decide which library the package uses for each operation.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from scipy.linalg.lapack import dpotrf, dpotri
from threadpoolctl import threadpool_limits

if TYPE_CHECKING:
    from collections.abc import Callable

N_SPOTS, N_GENES, N_EDGES = 4000, 250, 24  # of a graph: spots, genes, edges of a spot


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    rows = [row for n in (500, 1000, 2000) for row in dense(n, device)] + products(device)
    print(pd.DataFrame(rows, columns=["operation", "size", "numpy, scipy", "torch"]).round(2).to_string(index=False))


def dense(n: int, device: str) -> list[tuple[str, str, float, float]]:
    """Operations on a covariance of n spots."""
    place = np.random.default_rng(0).random((n, 2))
    squared = ((place[:, None] - place) ** 2).sum(axis=2)
    covariance = np.exp(-20 * squared) + np.eye(n)
    triangle = dpotrf(covariance, lower=1)[0]
    of_torch = [torch.as_tensor(np.ascontiguousarray(part), device=device) for part in (squared, covariance, triangle)]
    pairs = {
        "exponential": (lambda: np.exp(-20 * squared), lambda: torch.exp(-20 * of_torch[0])),
        "Cholesky": (lambda: dpotrf(covariance, lower=1), lambda: torch.linalg.cholesky(of_torch[1])),
        "inverse": (lambda: dpotri(triangle, lower=1), lambda: torch.cholesky_inverse(of_torch[2])),
    }
    return [(name, f"{n} x {n}", milliseconds(ours), milliseconds(theirs)) for name, (ours, theirs) in pairs.items()]


def products(device: str) -> list[tuple[str, str, float, float]]:
    """Product of a graph and values of all genes."""
    rng = np.random.default_rng(0)
    row = np.repeat(np.arange(N_SPOTS), N_EDGES)
    column = (row + rng.integers(-60, 60, len(row))) % N_SPOTS
    found = []
    for dtype in (np.float32, np.float64):
        graph = sparse.csr_matrix((rng.random(len(row)).astype(dtype), (row, column)), (N_SPOTS, N_SPOTS))
        graph.sum_duplicates()
        values = rng.normal(size=(N_SPOTS, N_GENES)).astype(dtype)
        parts = [torch.as_tensor(part, device=device) for part in (graph.indptr, graph.indices, graph.data, values)]
        of_torch = torch.sparse_csr_tensor(*parts[:3], size=graph.shape, check_invariants=True)
        ours = milliseconds(lambda graph=graph, values=values: graph @ values)
        theirs = milliseconds(lambda graph=of_torch, values=parts[3]: graph @ values)
        found.append(("sparse product", f"{N_SPOTS} spots, {N_GENES} genes, {np.dtype(dtype)}", ours, theirs))
    return found


@threadpool_limits.wrap(limits=1, user_api="blas")
def milliseconds(operation: Callable[[], object], repeats: int = 10) -> float:
    """Median time of an operation."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    times = []
    for _ in range(repeats + 1):
        start = clock()
        operation()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(clock() - start)
    return 1e3 * float(np.median(times[1:]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
