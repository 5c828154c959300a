"""Dense maps and the reading of regions: what they cost, and what survives an interruption.

Run ``python benchmarks/dense_maps.py PART`` with PART one of

``cost``                    processor time against one pass of the bare network over the same pixels
``memory``                  peak memory on slides of 4k and 20k pixels
``regions``                 1,000,000 or more bins, and ``spatialdata.aggregate`` by labels on the same task
``storage``                 files of a stored map of 250 genes, and what drawing one of them reads
``kill``                    kill -9 at 20 random moments while a map is written
``workers``                 two dask worker processes against one: bytes and speed; two processes that know nothing of each
                            other (``undisturbed``, started by it) show what the machine has to give
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import shapely
import torch
from pixnet import synthetic_slide
from torch import nn

import spatial_impute as si


class Octaves(nn.Module):
    """Colour and local contrast: an encoder that costs next to nothing."""

    def __init__(self, strides: tuple[int, ...] = (8, 16, 32)) -> None:
        super().__init__()
        self.strides = strides

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        maps = []
        for k in self.strides:
            mean = nn.functional.avg_pool2d(x, k)
            maps.append(torch.cat([mean, nn.functional.avg_pool2d(x**2, k) - mean**2], dim=1))
        return maps


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=sorted(PARTS))
    parser.add_argument("--pixels", type=int, default=4096, help="edge of the slide of `cost`, `storage` and `workers`")
    parser.add_argument("--largest", type=int, default=20480, help="edge of the larger slide of `memory`")
    parser.add_argument("--rows", type=int, default=0, help="predict only so many rows of tiles in `memory`")
    parser.add_argument("--bin-um", type=float, default=8.0, help="edge of the bins of `regions`")
    parser.add_argument("--tile", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    si.settings.verbosity = "warning"
    si.settings.show_progress_bar = False
    PARTS[options.part](options)


def random_model(n_genes: int, encoder: str | nn.Module, resolution: float) -> si.models.PixNetModel:
    """Model with random decoder and head: what it predicts does not matter for what it costs."""
    from spatial_impute.encoders._pyramids import build_pyramid
    from spatial_impute.models.pixnet._network import PixNetNetwork

    torch.manual_seed(0)
    params = si.models.PixNetParams()
    network = PixNetNetwork(
        build_pyramid(encoder), params, n_genes=n_genes, n_base=params.n_base, resolution=resolution
    )
    nn.init.normal_(network.head.weight, std=0.1)
    genes = [f"g{i}" for i in range(n_genes)]
    return si.models.PixNetModel(
        network.requires_grad_(False),
        params=params,
        var_names=genes,
        history=pd.DataFrame(),
        predictability=pd.Series(0.0, index=genes),
        config={
            "encoder": network.pyramid.name,
            "resolution": resolution,
            "units": "none",
            "aggregate": "mean",
            "stain_density": [0.5, 0.6, 0.3],
            "trained_on": [],
        },
    )


def slide_on_disk(folder: Path, side: int, mpp: float = 1.0) -> object:
    """Square slide in zarr, written chunk by chunk; one section of a stack."""
    import dask.array as da
    from spatialdata import SpatialData, read_zarr
    from spatialdata.models import Image2DModel
    from spatialdata.transformations import Scale

    tile, _ = synthetic_slide(1024 * mpp, mpp, 0)
    n = -(-side // 1024)
    array = da.tile(da.from_array(tile.transpose(2, 0, 1), chunks=(3, 1024, 1024)), (1, n, n))[:, :side, :side]
    image = Image2DModel.parse(
        array.rechunk((3, 1024, 1024)),
        dims=("c", "y", "x"),
        c_coords=["r", "g", "b"],
        transformations={"um": Scale([mpp, mpp], axes=("x", "y"))},
    )
    path = folder / f"slide{side}.zarr"
    SpatialData(images={"he": image}).write(path)
    return read_zarr(path), path


def peak_mib() -> float:
    """Largest resident memory so far, MiB; that of getrusage would count the process this one was started from."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def forget_peak() -> None:
    """Measure the largest resident memory anew from here."""
    Path("/proc/self/clear_refs").write_text("5")


# glibc keeps freed memory up to these sizes, in one arena (those of threads cannot hold blocks of this size).
KEEP_MEMORY = {"MALLOC_ARENA_MAX": 1, "MALLOC_MMAP_THRESHOLD_": 2**30, "MALLOC_TRIM_THRESHOLD_": 2**31}
_LARGEST_PASS = 4096  # px; the network on one larger image takes several GiB
FRAME = {"coordinate_system": "um", "mpp": 1.0}


def one_pass(network: nn.Module, side: int, tile: int) -> float:
    """Processor seconds of the bare network on each pixel of a slide once: pieces without a halo, so their edges are wrong."""
    rgb = torch.rand(1, 3, tile, tile) * 255
    start = time.process_time()
    with torch.inference_mode():
        for _ in range((side // tile) ** 2):
            network.genes(network.features(rgb))
    return time.process_time() - start


def cost(options: argparse.Namespace) -> None:
    """Whole-slide prediction against one pass of the bare network over the same pixels, as large images and in pieces."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        side = options.pixels
        sdata, path = slide_on_disk(folder, side)
        for n_genes in (64, 250):
            model = random_model(n_genes, "tellez-multitask", 1.0)
            _ = model.halo, model.network.pyramid.halo  # measured once per model
            one_pass(model.network, 2048, 1024)
            # Processor time: the machine may be shared. All run on one thread.
            bare = one_pass(model.network, side, 1024)
            forget_peak()
            before = peak_mib()
            start, wall = time.process_time(), time.perf_counter()
            si.tl.predict_dense(
                sdata, "he", model, store=path, key_added=f"map{n_genes}", tissue_only=False, inplace=False, **FRAME
            )
            full, wall = time.process_time() - start, time.perf_counter() - wall
            peak = peak_mib()
            largest = min(side, _LARGEST_PASS)
            whole = one_pass(model.network, side, largest)
            if side == largest:  # the better of two: a short run is noisy
                bare = min(bare, one_pass(model.network, side, 1024))
            print(
                f"{side} px, {n_genes} genes, tellez-multitask: predict_dense {full:.1f} s of processor time ({wall:.1f} s); "
                f"one pass as images of {largest} px {whole:.1f} s (ratio {full / whole:.3f}), in pieces of 1024 px {bare:.1f} s "
                f"(ratio {full / bare:.3f}); peak {peak:.0f} MiB (before: {before:.0f})",
                flush=True,
            )


_WITHIN_ROWS = """
import sys; sys.path.insert(0, "benchmarks")
import dense_maps as p, torch, spatial_impute as si
from spatialdata import read_zarr
torch.set_num_threads(1)
si.settings.verbosity = "warning"; si.settings.show_progress_bar = False
store, shapes = sys.argv[1], sys.argv[2] or None
sdata, model = read_zarr(store), p.random_model(64, p.Octaves(), 1.0)
before = p.peak_mib()
si.tl.predict_dense(
    sdata, "he", model, shapes_key=shapes, store=store, key_added="m", tissue_only=False, inplace=False, **p.FRAME
)
print(f"{before:.0f} {p.peak_mib():.0f}")
"""


def memory(options: argparse.Namespace) -> None:
    """Largest resident memory of `predict_dense` over slides of several sizes, each in a process of its own."""
    import geopandas as gpd
    from spatialdata.models import ShapesModel
    from spatialdata.transformations import Identity

    with tempfile.TemporaryDirectory() as name:
        for side in dict.fromkeys((4096, options.largest)):
            sdata, path = slide_on_disk(Path(name), side)
            n_rows = min(options.rows or side, -(-side // 1024))
            strip = gpd.GeoDataFrame(geometry=[shapely.box(1, 1, side - 2, n_rows * 1024 - 2)])
            sdata.shapes["strip"] = ShapesModel.parse(strip, transformations={"um": Identity()})
            sdata.write_element("strip")
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", _WITHIN_ROWS, str(path), "strip"], capture_output=True, text=True, check=True
            )
            before, after = map(float, done.stdout.split()[-2:])
            print(
                f"{side} px, {n_rows} of {-(-side // 1024)} rows of tiles, 64 genes, cheap encoder: {after - before:.0f} MiB over "
                f"{before:.0f} MiB, {time.perf_counter() - start:.0f} s",
                flush=True,
            )


def regions(options: argparse.Namespace) -> None:
    """Bins of a slide of 8 mm x 250 genes, one million by default, and labels through spatialdata."""
    import geopandas as gpd
    import spatialdata as sd
    from spatialdata.models import Image2DModel, Labels2DModel, ShapesModel
    from spatialdata.transformations import Identity

    from spatial_impute.models.pixnet._network import PixNetNetwork
    from spatial_impute.models.pixnet._region_weights import Polygons
    from spatial_impute.models.pixnet._tiles import region_sums

    side = 8000
    with tempfile.TemporaryDirectory() as name:
        sdata, _ = slide_on_disk(Path(name), side)
        x, y = np.meshgrid(*[np.arange(0, side, options.bin_um)] * 2)
        boxes = shapely.box(x.ravel(), y.ravel(), x.ravel() + options.bin_um, y.ravel() + options.bin_um)
        sdata.shapes["bins"] = ShapesModel.parse(gpd.GeoDataFrame(geometry=boxes), transformations={"um": Identity()})
        model = random_model(250, Octaves(), 1.0)
        features, in_network = PixNetNetwork.features, []

        def timed(self: PixNetNetwork, rgb: torch.Tensor) -> torch.Tensor:
            start = time.process_time()
            found = features(self, rgb)
            in_network.append(time.process_time() - start)
            return found

        PixNetNetwork.features = timed
        del x, y, boxes
        for store in (None, Path(name) / "bins.zarr"):
            if store is None and len(sdata.shapes["bins"]) > 2_000_000:
                continue  # the result alone is larger than memory should be
            in_network.clear()
            forget_peak()
            before, start, wall = peak_mib(), time.process_time(), time.perf_counter()
            table = si.tl.predict_regions(sdata, "bins", model, image_key="he", store=store, inplace=False, **FRAME)
            full, wall, network = time.process_time() - start, time.perf_counter() - wall, sum(in_network)
            print(
                f"{table.n_obs} bins x {table.n_vars} genes, {'in memory' if store is None else 'to disk'}: "
                f"{full - network:.1f} s of processor time beyond the network ({network:.1f} s in its {len(in_network)} tiles; "
                f"{wall:.1f} s by the clock); peak {peak_mib() - before:.0f} MiB over {before:.0f}",
                flush=True,
            )
            del table
            gc.collect()
        PixNetNetwork.features = features
    # The same task for both: sums of 16 channels over 4096 square labels of 16 px on 1024 x 1024 pixels.
    n, k = 1024, 16
    cells = torch.rand(16, n // 8, n // 8)
    from spatial_impute.encoders._pyramids import Box
    from spatial_impute.models.pixnet._region_weights import CellGrid

    pixels = nn.functional.interpolate(cells[None], size=(n, n), mode="bilinear")[0].numpy()
    x, y = np.meshgrid(*[np.arange(0, n, k)] * 2)
    squares = shapely.box(x.ravel(), y.ravel(), x.ravel() + k, y.ravel() + k)
    box = Box(0, n, 0, n)
    polygons = Polygons.from_shapely(squares)
    region_sums(cells, polygons, box, CellGrid(8, n // 8, n // 8), box)
    start = time.process_time()
    ours, _ = region_sums(cells, polygons, box, CellGrid(8, n // 8, n // 8), box)
    ours_s = time.process_time() - start
    labels = (np.arange(n)[:, None] // k) * (n // k) + np.arange(n)[None] // k + 1
    labels[labels == 1] = 0  # spatialdata.aggregate fails without background
    element = Image2DModel.parse(pixels, dims=("c", "y", "x"))
    by = Labels2DModel.parse(labels, dims=("y", "x"))
    start = time.process_time()
    theirs = sd.aggregate(values=element, by=by, agg_func="sum", target_coordinate_system="global")
    theirs_s = time.process_time() - start
    found = np.asarray(
        theirs.tables["table"].X.todense() if hasattr(theirs.tables["table"].X, "todense") else theirs.tables["table"].X
    )
    print(
        f"sums over 4096 squares, 16 channels, processor time: {ours_s:.4f} s, spatialdata.aggregate {theirs_s:.2f} s "
        f"({theirs_s / ours_s:.0f}x); largest relative difference "
        f"{np.abs(found[-len(ours) + 1 :] - ours.numpy()[1:]).max() / np.abs(ours.numpy()).max():.1e}"
    )


def storage(options: argparse.Namespace) -> None:
    """Files of a stored map of 250 genes, and what drawing one of them reads."""
    from spatialdata import read_zarr
    from zarr.storage import LocalStore

    read, get = [], LocalStore.get

    async def counting(self: LocalStore, key: str, *args: object, **kwargs: object) -> object:
        value = await get(self, key, *args, **kwargs)
        if value is not None and "/images/m/" in f"{self.root}/{key}":
            read.append(len(value))
        return value

    with tempfile.TemporaryDirectory() as name:
        sdata, path = slide_on_disk(Path(name), options.pixels)
        si.tl.predict_dense(
            sdata, "he", random_model(250, Octaves(), 1.0), key_added="m", store=path, tissue_only=False, **FRAME
        )
        sizes = [p.stat().st_size for p in (path / "images" / "m").rglob("*") if p.is_file()]
        found = read_zarr(path)
        LocalStore.get = counting
        read.clear()
        si.pl.dense(found, "m", "g7", image_key="he")
        LocalStore.get = get
        print(
            f"{options.pixels} px, 250 genes: {sum(sizes) / 2**20:.0f} MiB in {len(sizes)} files; drawing one gene reads "
            f"{sum(read) / 2**20:.2f} MiB ({sum(read) / sum(sizes):.2%})"
        )


def _write_map(path: Path, key: str, log: Path) -> None:
    """What `kill` kills. Notes each tile before it is computed."""
    from spatialdata import read_zarr

    from spatial_impute.models.pixnet._tiles import DenseJob

    compute = DenseJob.compute

    def noted(self: DenseJob, tile: tuple[int, int]) -> np.ndarray:
        with log.open("a") as file:
            file.write(f"{key} {tile}\n")
        return compute(self, tile)

    DenseJob.compute = noted
    torch.set_num_threads(1)
    sdata, model = read_zarr(path), random_model(8, Octaves(), 1.0)
    log.with_suffix(".begun").touch()
    si.tl.predict_dense(
        sdata, "he", model, key_added=key, store=path, tile_size=256, tissue_only=False, inplace=False, **FRAME
    )


def _look_at_map(path: Path, key: str, expected: Path) -> None:
    """Fail unless the store opens and holds the map whole or not at all; the first whole one is what is expected."""
    from spatialdata import read_zarr

    images = read_zarr(path).images
    if key in images:
        values = images[key].compute(scheduler="synchronous").to_numpy().view(np.uint16)
        if not expected.exists():
            np.save(expected, values)
        elif not np.array_equal(values, np.load(expected)):
            sys.exit(1)
        sys.exit(3)


def kill(options: argparse.Namespace) -> None:
    """Kill -9 at random moments; the store must open, show all or nothing, and the rerun must go on."""
    from multiprocessing import get_context

    # All that opens the store runs in forked processes: this one has no threads that they would miss.
    fork = get_context("fork")

    def run(target: object, *arguments: object) -> int:
        process = fork.Process(target=target, args=arguments)
        process.start()
        process.join()
        return process.exitcode

    rng = np.random.default_rng(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, log, expected = folder / "slide1024.zarr", folder / "tiles.log", folder / "expected.npy"
        run(slide_on_disk, folder, 1024)
        start = time.perf_counter()
        assert run(_write_map, path, "undisturbed", log) == 0
        duration = time.perf_counter() - start
        assert run(_look_at_map, path, "undisturbed", expected) == 3
        log.unlink()
        n_tiles, n_killed, n_complete, n_shown = 16, 0, 0, 0
        while n_killed < 20:
            key = f"map{n_complete}"
            process = fork.Process(target=_write_map, args=(path, key, log))
            begun = log.with_suffix(".begun")
            begun.unlink(missing_ok=True)
            process.start()
            while process.is_alive() and not begun.exists():
                time.sleep(0.002)
            process.join(rng.uniform(0, 0.8 * duration))
            killed = process.is_alive()
            process.kill()
            process.join()
            n_killed += killed
            seen = run(_look_at_map, path, key, expected)
            assert seen in (0, 3), f"after kill {n_killed} the store does not open, or shows a part of the map"
            n_shown += killed and seen == 3
            n_complete += seen == 3
            assert killed or seen == 3
        if seen != 3:
            assert run(_write_map, path, key, log) == 0
            assert run(_look_at_map, path, key, expected) == 3
            n_complete += 1
        computed = len(log.read_text().splitlines())
        staged = (path / ".spatial_impute_staging").exists()
        print(
            f"killed {n_killed} times while {n_complete} maps of {n_tiles} tiles were written; the store opened each time and "
            f"showed no map or a whole one ({n_shown} times killed after it was in place), bytes as undisturbed; "
            f"{computed - n_complete * n_tiles} tiles computed again; remains in the store: {staged}"
        )


def undisturbed(options: argparse.Namespace) -> None:
    """Tiles per second of one process that waits for its start, for :func:`processes`."""
    with tempfile.TemporaryDirectory() as name:
        small, small_path = slide_on_disk(Path(name), 1024)
        sdata, path = slide_on_disk(Path(name), options.pixels)
        model = random_model(64, "tellez-multitask", 1.0)
        arguments = {"tissue_only": False, "inplace": False, **FRAME}
        si.tl.predict_dense(small, "he", model, store=small_path, tile_size=512, **arguments)
        print("ready", flush=True)
        input()
        start = time.perf_counter()
        si.tl.predict_dense(sdata, "he", model, store=path, tile_size=options.tile, **arguments)
        print((-(-options.pixels // options.tile)) ** 2 / (time.perf_counter() - start), flush=True)


def processes(n: int, options: argparse.Namespace) -> float:
    """Tiles per second of `n` processes that have nothing to do with each other: what the machine has to give."""
    command = [sys.executable, __file__, "undisturbed", "--pixels", str(options.pixels), "--tile", str(options.tile)]
    keep = os.environ | {key: str(value) for key, value in KEEP_MEMORY.items()}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": keep}
    running = [subprocess.Popen(command, **pipes) for _ in range(n)]
    for process in running:
        process.stdout.readline()
    for process in running:
        process.stdin.write("\n")
        process.stdin.flush()
    rates = [float(process.communicate()[0]) for process in running]
    return sum(rates)


def workers(options: argparse.Namespace) -> None:
    """Two worker processes against one: bytes, and tiles per second once the workers have loaded the network."""
    import dask
    from distributed import Client, LocalCluster
    from spatialdata import read_zarr

    # As in docs/howto.md: workers that hand memory back after every operation wait for it most of the time.
    dask.config.set({f"distributed.nanny.pre-spawn-environ.{key}": value for key, value in KEEP_MEMORY.items()})
    with tempfile.TemporaryDirectory() as name:
        sdata, path = slide_on_disk(Path(name), options.pixels)
        small, small_path = slide_on_disk(Path(name), 1024)
        model = random_model(64, "tellez-multitask", 1.0)
        arguments = {"tissue_only": False, "tile_size": options.tile, "inplace": False, **FRAME}
        n_tiles = (-(-options.pixels // options.tile)) ** 2

        def rate(key: str) -> float:
            si.tl.predict_dense(small, "he", model, store=small_path, key_added=key, **arguments | {"tile_size": 512})
            start = time.perf_counter()
            si.tl.predict_dense(sdata, "he", model, store=path, key_added=key, **arguments)
            return n_tiles / (time.perf_counter() - start)

        alone, beside = processes(1, options), processes(2, options)
        rates = {"serial": rate("serial")}
        for n in (1, 2):
            with (
                LocalCluster(n_workers=n, threads_per_worker=1, dashboard_address=None) as cluster,
                Client(cluster) as client,
            ):
                client.run(torch.set_num_threads, 1)
                rates[f"workers{n}"] = rate(f"workers{n}")
        bytes_of = {k: read_zarr(path).images[k].compute(scheduler="synchronous").to_numpy().tobytes() for k in rates}
        print(
            f"{n_tiles} tiles, 64 genes, tellez-multitask; bytes equal: {len(set(bytes_of.values())) == 1}; tiles per "
            f"second: this process {rates['serial']:.3f}, one worker {rates['workers1']:.3f}, two {rates['workers2']:.3f}; "
            f"two over one {rates['workers2'] / rates['workers1']:.2f}, over this process "
            f"{rates['workers2'] / rates['serial']:.2f}; of processes that have nothing to do with each other two are "
            f"{beside / alone:.2f} times as fast as one ({alone:.3f})"
        )


PARTS = {
    "cost": cost,
    "memory": memory,
    "regions": regions,
    "storage": storage,
    "undisturbed": undisturbed,
    "kill": kill,
    "workers": workers,
}

if __name__ == "__main__":
    main()
