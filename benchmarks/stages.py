"""Time and peak memory of every stage against the number of spots, each beside the bare operation in the same process.

Run ``OMP_NUM_THREADS=1 python benchmarks/stages.py [--sizes 1000 10000] [--stages graph ...] [--plot stages.png]``.
Stages and what stands beside them:

``graph``        neighbors in and across sections, similar spots: the same searches by scipy and scikit-learn
``propagation``  label propagation of 250 genes: as many sparse products as it took steps
``training``     a step of the network: the same layers in bare torch operations
``features``     features of all levels from a slide on disk: the encoder on patches from memory
``dense``        a map of 64 genes, 400 px a spot: the network on the same tiles with the same context
``aggregation``  sums of 16 channels over squares of 16 px: ``spatialdata.aggregate`` by labels

Times are of the processor, so that other jobs on the machine matter less. Memory is the peak of a process that runs the
stage alone, over what it held before.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import dask.array as da
import dense_maps
import features
import numpy as np
import pandas as pd
import scale
import shapely
import torch
import training
from spatialdata import aggregate
from spatialdata.models import Image2DModel, Labels2DModel

import spatial_impute as si
from spatial_impute._stack.elements import image_element
from spatial_impute.encoders._encoder import resolve_encoder
from spatial_impute.encoders._pyramids import Box
from spatial_impute.models.asign import _propagation
from spatial_impute.models.pixnet._region_weights import CellGrid, Polygons
from spatial_impute.models.pixnet._tiles import region_sums

Stage = tuple[Callable[[], object], Callable[[], Callable[[], object]]]  # itself; what prepares what stands beside it

_PITCH = 100.0  # um
_REPEATS = 5
_LONG = 20.0  # seconds, of a stage and of what stands beside it; longer ones run once


def main() -> None:
    """Run all stages at all sizes, print a table and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--plot", type=Path, help="picture to write")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        stage, size, how = options.one
        print(json.dumps(measure(stage, int(size), how)))
        return
    rows = []
    for stage in options.stages:
        for size in options.sizes:
            row = {"stage": stage, "spots": size}
            for how in ("time", "memory"):  # what stands beside a stage needs memory as well
                command = [sys.executable, __file__, "--one", stage, str(size), how]
                run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                row |= json.loads(run.stdout.splitlines()[-1])
            rows.append(row)
            print(pd.DataFrame([row]).round(2).to_string(index=False, header=len(rows) == 1), flush=True)
    print("\n" + pd.DataFrame(rows).round(2).to_string(index=False))
    if options.plot:
        draw(pd.DataFrame(rows), options.plot)


def measure(stage: str, size: int, how: str) -> dict[str, float]:
    """Seconds of a stage and of what stands beside it, or its memory."""
    torch.set_num_threads(1)
    si.settings.verbosity, si.settings.show_progress_bar = "warning", False
    with tempfile.TemporaryDirectory() as folder:
        run, prepare = STAGES[stage](size, Path(folder))
        if how == "memory":
            dense_maps.forget_peak()
            before = dense_maps.peak_mib()
            run()
            return {"peak_MiB": dense_maps.peak_mib() - before}
        times = [seconds(run)]
        peer = prepare()
        besides = [seconds(peer)]
        while times[0] + besides[0] < _LONG and len(times) < _REPEATS:  # in turn, as other jobs disturb short runs
            times.append(seconds(run))
            besides.append(seconds(peer))
    ours, beside = float(np.median(times)), float(np.median(besides))
    return {"seconds": ours, "beside": beside, "ratio": ours / beside}


def seconds(function: Callable[[], object]) -> float:
    """Processor seconds of a call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def lattice(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places (n, 3), sections (n,) and features (n, 50) of three sections."""
    rng = np.random.default_rng(0)
    side = int(np.ceil(np.sqrt(size / 3)))
    plane = _PITCH * np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2)[: -(-size // 3)]
    jitter = rng.uniform(-30, 30, (3, len(plane), 2))
    xyz = np.concatenate([np.column_stack([plane + j, np.full(len(plane), 10.0 * k)]) for k, j in enumerate(jitter)])
    return xyz, np.repeat(np.arange(3), len(plane)), rng.standard_normal((len(xyz), 50), dtype=np.float32)


def graph(size: int, folder: Path) -> Stage:
    """Graph of three sections, and the bare searches."""
    from scipy.spatial import cKDTree
    from sklearn.neighbors import NearestNeighbors

    xyz, section, found = lattice(size)

    def beside() -> None:
        for a, b in itertools.product(range(3), repeat=2):
            cKDTree(xyz[section == a]).query(xyz[section == b], k=7 if a == b else 6)
            if a != b:
                search = NearestNeighbors(n_neighbors=3, metric="cosine", algorithm="brute")
                search.fit(found[section == a]).kneighbors(found[section == b])

    return lambda: scale.default_graph(xyz, section, found), lambda: beside


def propagation(size: int, folder: Path) -> Stage:
    """Propagation of 250 genes from the middle section, and as many sparse products as it took."""
    xyz, section, found = lattice(size)
    weights = scale.default_graph(xyz, section, found).weights.astype(np.float64)
    known = section == 1
    values = np.random.default_rng(0).normal(size=(int(known.sum()), 250))
    widths: list[int] = []
    solve = _propagation._conjugate_gradients

    class Counted:
        def __init__(self, system: object) -> None:
            self.system = system

        def __matmul__(self, columns: np.ndarray) -> np.ndarray:
            widths.append(columns.shape[1])
            return self.system @ columns

    def run() -> None:
        _propagation._conjugate_gradients = lambda system, *rest: solve(Counted(system), *rest)
        _propagation.propagate(weights, known, values)

    def prepare() -> Callable[[], object]:
        system = weights[~known][:, ~known]
        columns = {width: np.random.default_rng(0).normal(size=(system.shape[0], width)) for width in set(widths)}
        of_one_run = list(widths)
        return lambda: [system @ columns[width] for width in of_one_run]

    return run, prepare


def train(size: int, folder: Path) -> Stage:
    """A step of the network and one of bare layers; the first of each warms up."""
    ours, bare = training.steps(size)
    ours()

    def prepare() -> Callable[[], object]:
        bare()
        return bare

    return ours, prepare


def extraction(size: int, folder: Path) -> Stage:
    """Features of the spots of one slide on disk, and the encoder on the same patches."""
    side = -(-(2 * int(np.ceil(np.sqrt(size))) * 100 + 2000) // 8) * 8
    fine = np.random.default_rng(0).integers(60, 255, (3, side, side), dtype=np.uint8)
    levels = []
    for k in (1, 2, 4, 8):
        da.to_zarr(da.from_array(np.ascontiguousarray(fine[:, ::k, ::k]), (3, 2048, 2048)), str(folder / str(k)))
        levels.append(da.from_zarr(str(folder / str(k))))
    del fine
    image, encoder = image_element(levels, "global", 1.0), resolve_encoder("texture", device="cpu")

    def extract(encoder: object) -> None:
        si.pp.extract_features(features.slide_with_spots(side, size, image), encoder)

    def prepare() -> Callable[[], object]:
        recorded = features.Recorded(encoder)
        extract(recorded)
        return lambda: features.bare(encoder, recorded.given)

    return lambda: extract(encoder), prepare


def dense(size: int, folder: Path) -> Stage:
    """A map of 64 genes of a slide on disk, and the network on its tiles."""
    side = 20 * int(np.ceil(np.sqrt(size)))
    sdata, path = dense_maps.slide_on_disk(folder, side)
    model = dense_maps.random_model(64, "tellez-multitask", 1.0)

    def beside() -> None:
        tiling = model._tiling((side, side), 1024)
        for tile in np.ndindex(*tiling.shape):
            window = tiling.window(tile)
            rgb = torch.rand(1, 3, window.y1 - window.y0, window.x1 - window.x0) * 255
            with torch.inference_mode():
                model.network.genes(model.network.features(rgb))

    options = {"tissue_only": False, "inplace": False, "store": path, **dense_maps.FRAME}
    maps = (f"map{i}" for i in itertools.count())
    return lambda: si.tl.predict_dense(sdata, "he", model, key_added=next(maps), **options), lambda: beside


def aggregation(size: int, folder: Path) -> Stage:
    """Sums over squares of a map, and the same through labels."""
    k, n_channels = 16, 16
    edge = int(np.ceil(np.sqrt(size)))
    side = k * edge
    cells = torch.rand(n_channels, side // 8, side // 8)
    x, y = np.meshgrid(*[np.arange(0, side, k)] * 2)
    squares = Polygons.from_shapely(shapely.box(x.ravel(), y.ravel(), x.ravel() + k, y.ravel() + k))
    box = Box(0, side, 0, side)
    grid = CellGrid(8, side // 8, side // 8)

    def prepare() -> Callable[[], object]:
        pixels = torch.nn.functional.interpolate(cells[None], size=(side, side), mode="bilinear")[0].numpy()
        labels = np.repeat(np.repeat(np.arange(edge**2).reshape(edge, edge), k, axis=0), k, axis=1)  # 0 is background
        values = Image2DModel.parse(pixels, dims=("c", "y", "x"))
        by = Labels2DModel.parse(labels, dims=("y", "x"))
        return lambda: aggregate(values=values, by=by, agg_func="sum", target_coordinate_system="global")

    return lambda: region_sums(cells, squares, box, grid, box), prepare


def draw(table: pd.DataFrame, path: Path) -> None:
    """Seconds and memory against the number of spots, a panel each per stage."""
    import matplotlib.pyplot as plt

    stages = table["stage"].unique()
    fig, axes = plt.subplots(2, len(stages), figsize=(2.6 * len(stages), 5), sharex="col", squeeze=False)
    for column, stage in zip(axes.T, stages, strict=True):
        rows = table[table["stage"] == stage]
        column[0].loglog(rows["spots"], rows["seconds"], "o-", label="spatial_impute")
        column[0].loglog(rows["spots"], rows["beside"], "s--", label="bare")
        column[1].loglog(rows["spots"], rows["peak_MiB"], "o-")
        column[0].set(title=stage)
        column[1].set(xlabel="spots")
    axes[0, 0].set(ylabel="seconds")
    axes[1, 0].set(ylabel="peak memory (MiB)")
    axes[0, 0].legend()
    fig.savefig(path, dpi=120, bbox_inches="tight")


STAGES: dict[str, Callable[[int, Path], Stage]] = {
    "graph": graph,
    "propagation": propagation,
    "training": train,
    "features": extraction,
    "dense": dense,
    "aggregation": aggregation,
}

if __name__ == "__main__":
    main()
