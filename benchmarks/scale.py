"""Time and peak memory of the 3D graph and of label propagation against the number of spots.

Run ``python benchmarks/scale.py [--sizes 1000 10000 100000 1000000] [--genes 250]``; set ``OMP_NUM_THREADS=1``. Three
sections on a hexagonal lattice, the middle one measured, random features. Every size runs in a process of its own. Beside
it stands what the published implementation writes for its three dense tables (19.3 bytes a cell).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np
import pandas as pd

_PITCH = 100.0  # um
_DENSE_BYTES = 3 * 19.3


def main() -> None:
    """Run all sizes and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--genes", type=int, default=250)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.genes)))
        return
    rows = []
    for size in options.sizes:
        command = [sys.executable, __file__, "--one", str(size), "--genes", str(options.genes)]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(pd.DataFrame(rows[-1:]).to_string(index=False), flush=True)
    print()
    print(pd.DataFrame(rows).to_string(index=False))


def measure(n_spots: int, n_genes: int) -> dict[str, float]:
    """Build the graph and propagate, with the defaults of the package."""
    from spatial_impute._graph import build_graph
    from spatial_impute.models._propagation import propagate

    rng = np.random.default_rng(0)
    side = int(np.ceil(np.sqrt(n_spots / 3)))
    column, row = (a.ravel() for a in np.meshgrid(np.arange(side), np.arange(side)))
    plane = _PITCH * np.column_stack([column + 0.5 * (row % 2), row * np.sqrt(3) / 2])
    sections = [np.column_stack([plane + rng.uniform(-30, 30, 2), np.full(len(plane), 10.0 * k)]) for k in range(3)]
    xyz, section = np.concatenate(sections), np.repeat([0, 1, 2], len(plane))
    features = rng.normal(size=(len(xyz), 50)).astype(np.float32)
    expression = rng.normal(size=(len(plane), n_genes)).astype(np.float32)
    before = _peak()
    start = time.perf_counter()
    graph = build_graph(
        xyz,
        section,
        np.full(len(xyz), 27.5),
        features,
        n_neighs=6,
        n_cross_neighs=6,
        max_section_gap=2,
        max_distance=3 * _PITCH,
        n_similar=3,
        similarity_threshold=0.5,
        similarity_weight=1.0,
        bandwidth=_PITCH,
    )
    built = time.perf_counter()
    propagate(graph.weights, section == 1, expression)
    done = time.perf_counter()
    return {
        "spots": len(xyz),
        "edges": graph.weights.nnz,
        "graph_s": round(built - start, 2),
        "propagation_s": round(done - built, 2),
        "peak_GiB": round(_peak() / 2**30, 2),
        "data_GiB": round(before / 2**30, 2),
        "dense_tables_GiB": round(_DENSE_BYTES * len(xyz) ** 2 / 2**30, 2),
    }


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
