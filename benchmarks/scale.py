"""Time and peak memory against the number of spots: graph, propagation, fit and imputation of a whole stack.

Run ``python benchmarks/scale.py [--sizes 1000 10000 100000 1000000] [--sections 3] [--genes 250] [--fit]
[--plot scale.png]``; set ``OMP_NUM_THREADS=1``. Sections on a lattice, one of them measured, expression of eight smooth fields that the features
show as well. Every size runs in a process of its own. Seconds are those of the processor. Beside it stands what the published implementation writes for its
three dense tables (19.3 bytes a cell). Without ``--fit`` the model comes from a small stack of the same kind.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

_PITCH = 100.0  # um
_WIDTH = 50  # features of a token
_DENSE_BYTES = 3 * 19.3


def main() -> None:
    """Run all sizes and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--sections", type=int, default=3)
    parser.add_argument("--genes", type=int, default=250)
    parser.add_argument("--fit", action="store_true", help="fit the model on the stack itself")
    parser.add_argument("--plot", type=Path, help="picture to write")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.sections, options.genes, fit=options.fit)))
        return
    rows = []
    for size in options.sizes:
        command = [sys.executable, __file__, "--one", str(size), "--sections", str(options.sections)]
        command += ["--genes", str(options.genes), *(["--fit"] if options.fit else [])]
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(run.stdout.splitlines()[-1]))
        print(pd.DataFrame(rows[-1:]).to_string(index=False), flush=True)
    print()
    print(pd.DataFrame(rows).to_string(index=False))
    if options.plot:
        draw(pd.DataFrame(rows), options.plot)


def measure(n_spots: int, n_sections: int, n_genes: int, *, fit: bool) -> dict[str, float]:
    """Build the graph, fit and impute, with the defaults of the package."""
    times = {}
    start = time.process_time()
    model = None if fit else fitted(stack(1_000, 3, n_genes, {}), n_genes)
    spots = stack(n_spots, n_sections, n_genes, times)
    data = _peak()
    if fit:
        start = time.process_time()
        model = fitted(spots, n_genes)
        times["fit_s"] = time.process_time() - start
    start = time.process_time()
    result = model._impute(spots)
    times["impute_s"] = time.process_time() - start
    if not np.isfinite(result.expression).all():
        msg = "Imputed values are not finite."
        raise SystemExit(msg)
    return {
        "spots": len(spots.xyz),
        "measured": int(spots.known.sum()),
        "edges": spots.graph.nnz,
        **{name: round(seconds, 1) for name, seconds in times.items()},
        "graph_GiB": round(data / 2**30, 2),
        "peak_GiB": round(_peak() / 2**30, 2),
        "dense_tables_GiB": round(_DENSE_BYTES * len(spots.xyz) ** 2 / 2**30, 2),
    }


def fitted(spots, n_genes: int):
    """Fit with the defaults of the package."""
    from spatial_impute.models._params import AsignParams
    from spatial_impute.models.asign._ensemble import FitSettings
    from spatial_impute.models.asign._fit import fit

    genes = [f"g{i}" for i in range(n_genes)]
    return fit([spots], genes, FitSettings(AsignParams(), seed=0, device="cpu"))


def stack(n_spots: int, n_sections: int, n_genes: int, times: dict[str, float]):
    """Spots on a lattice, in sections of the same size, the one in the middle measured; with their graph."""
    from spatial_impute._graph import standardise_by_section
    from spatial_impute.models._spots import Spots

    rng = np.random.default_rng(0)
    side = int(np.ceil(np.sqrt(n_spots / n_sections)))
    column, row = (a.ravel() for a in np.meshgrid(np.arange(side), np.arange(side)))
    plane = _PITCH * np.column_stack([column + 0.5 * (row % 2), row * np.sqrt(3) / 2])
    jitter = rng.uniform(-30, 30, (n_sections, len(plane), 2))
    xyz = np.concatenate([np.column_stack([plane + j, np.full(len(plane), 10.0 * k)]) for k, j in enumerate(jitter)])
    section = np.repeat(np.arange(n_sections), len(plane))
    waves = rng.normal(size=(2, 8)) / (10 * _PITCH)
    fields = np.sin(xyz[:, :2] @ waves + rng.uniform(0, 6, 8)).astype(np.float32)
    tokens = []
    for t in (1, 2, 6):
        noise = rng.standard_normal((len(xyz), t * _WIDTH), dtype=np.float32)
        noise += fields @ rng.normal(size=(8, t * _WIDTH)).astype(np.float32)
        tokens.append(standardise_by_section(noise, section).reshape(len(xyz), t, _WIDTH))
    known = section == n_sections // 2
    expression = fields[known] @ rng.normal(size=(8, n_genes)) / 4 + rng.normal(size=(known.sum(), n_genes))
    expression = expression.astype(np.float32)  # as `tl.fit_asign` and `tl.impute_3d` do
    start = time.process_time()
    graph = default_graph(xyz, section, tokens[0][:, 0])
    times["graph_s"] = time.process_time() - start
    weights = graph.weights.astype(np.float64)
    return Spots(
        xyz=xyz,
        section=section,
        known=known,
        expression=expression,
        spacing=_PITCH,
        features=np.concatenate([t[:, 0] for t in tokens], axis=1),
        graph=weights,
        tokens=tuple(tokens),
        edge_features=rng.random((weights.nnz, 6), dtype=np.float32),
    )


def default_graph(xyz: np.ndarray, section: np.ndarray, features: np.ndarray):
    """3D graph with the defaults of the package."""
    from spatial_impute._graph import EdgeRules, build_graph

    rules = EdgeRules(
        n_neighs=6,
        n_cross_neighs=6,
        max_section_gap=2,
        max_distance=3 * _PITCH,
        n_similar=3,
        similarity_threshold=0.5,
        similarity_weight=1.0,
        bandwidth=_PITCH,
    )
    return build_graph(xyz, section, np.full(len(xyz), 27.5), features, rules)


def draw(table: pd.DataFrame, path: Path) -> None:
    """Time and memory against the number of spots."""
    import matplotlib.pyplot as plt

    fig, (time_of, memory) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for column, label in {"graph_s": "graph", "fit_s": "fit", "impute_s": "imputation"}.items():
        if column in table:
            time_of.loglog(table["spots"], table[column], "o-", label=label)
    memory.loglog(table["spots"], table["peak_GiB"], "o-", label="spatial_impute, whole process")
    memory.loglog(table["spots"], table["dense_tables_GiB"], "s--", label="three dense tables, 19.3 bytes a cell")
    time_of.set(xlabel="spots in the stack", ylabel="processor time (s), one thread")
    memory.set(xlabel="spots in the stack", ylabel="peak memory (GiB)")
    for axes in (time_of, memory):
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    fig.savefig(path, dpi=150)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
