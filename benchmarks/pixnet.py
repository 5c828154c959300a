"""PixNet: what it reaches on HER2ST and on a synthetic slide, what it costs, and what survives an interruption.

Run ``python benchmarks/pixnet.py PART`` with PART one of

``her2st --measured C4``    per-gene r on the other sections, ridge on the same encoder beside it, and at other sizes
``sizes``                   synthetic slide with known fields: trained on 100 um discs, read at 55, 16 and 8 um
``cost``                    wall time against the bare network on the same tiles, peak memory from 4k to 20k pixels
``regions``                 1,000,000 bins, and ``spatialdata.aggregate`` by labels on the same task
``kill``                    kill -9 at 20 random moments while a map is written
``workers``                 two dask worker processes against one process
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import shapely
import torch
from scipy.spatial import cKDTree
from torch import nn

import spatial_impute as si
from spatial_impute.metrics._scores import pearson_by_gene, summarise


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
    parser.add_argument("--measured", nargs="+", default=["C4"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pixels", type=int, default=4096, help="edge of the slide of `cost` that is timed")
    parser.add_argument("--largest", type=int, default=20480, help="edge of the slide whose memory is looked at")
    parser.add_argument("--side", type=float, default=2000.0, help="edge of the slide of `sizes` in um")
    parser.add_argument("--no-context", action="store_true", help="leave the windows of the base out")
    parser.add_argument("--tile", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    si.settings.verbosity = "warning"
    si.settings.show_progress_bar = False
    PARTS[options.part](options)


def her2st(options: argparse.Namespace) -> None:
    """Train on some sections, predict the spots of the others."""
    start = time.perf_counter()
    sdata, truth = si.datasets.her2st("C", measured=options.measured, truth=True)
    model = si.tl.fit_pixnet(
        sdata,
        [f"{s}_image" for s in options.measured],
        [f"{s}_spots" for s in options.measured],
        model_params={"n_steps": options.steps} | ({"context_um": ()} if options.no_context else {}),
        tile_size=options.tile,
        seed=options.seed,
    )
    print(f"fitted in {time.perf_counter() - start:.0f} s: {model!r}")
    print(model.history.round(4).to_string(index=False), "\n", flush=True)
    # Ridge takes no part in registration; it only reads the features of each spot.
    table = sdata.tables["stack"]
    table.obsm["spatial_3d"] = np.column_stack([table.obsm["spatial"], table.obs["z"]])
    si.pp.extract_features(sdata, "tellez-multitask")
    si.tl.impute_baseline(sdata, "ridge")
    profile = np.nanmean(table.layers["measured"], axis=0)
    rows = []
    for section in [s for s in table.obs["section"].cat.categories if s not in options.measured]:
        spots = f"{section}_spots"
        names = pd.Index([f"{section}_{i}" for i in sdata.shapes[spots].index])
        known = names.isin(truth.obs_names)
        true = truth[names[known], model.var_names].X
        true = np.asarray(true.todense() if hasattr(true, "todense") else true)
        groups = neighbouring_spots(sdata, spots, known)
        sdata.shapes[f"{section}_groups"] = groups
        found = si.tl.predict_regions(
            sdata, f"{section}_groups", model, image_key=f"{section}_image", tile_size=options.tile, inplace=False
        ).X
        ridge = table[names].layers["baseline_ridge"]
        order = np.cumsum(known) - 1
        for n in (1, 2, 4):
            which = groups["n"].to_numpy() == n
            members = np.stack(groups["members"][which].to_numpy())
            mean_true = true[order[members]].mean(axis=1)
            for method, values in (("pixnet", found[which]), ("ridge", ridge[members].mean(axis=1))):
                rows.append({"section": section, "spots": n, "method": method, **summarise(values, mean_true, profile)})
        scores = pd.DataFrame(rows).set_index(["spots", "method", "section"])[["pearson_gene", "mse", "skill"]]
        print(f"{section} after {time.perf_counter() - start:.0f} s", flush=True)
        print(scores.xs(section, level="section").round(4).to_string(), flush=True)
    print("\nMean over sections; regions of n neighbouring spots, ridge averaged over them:")
    print(scores.groupby(level=[0, 1]).mean().round(4).to_string())


def neighbouring_spots(sdata: object, spots: str, known: np.ndarray) -> object:
    """Measured spots, and unions of two and of four neighbouring ones."""
    import geopandas as gpd
    from spatialdata.models import ShapesModel
    from spatialdata.transformations import get_transformation

    shapes = sdata.shapes[spots]
    centers = np.column_stack([shapes.geometry.x, shapes.geometry.y])
    discs = shapely.buffer(shapes.geometry.to_numpy(), shapes["radius"].to_numpy(), quad_segs=32)
    rows = np.flatnonzero(known)
    nearest = rows[cKDTree(centers[rows]).query(centers[rows], k=4)[1]]
    members = [m[:n] for n in (1, 2, 4) for m in nearest]
    frame = gpd.GeoDataFrame(
        {"n": [len(m) for m in members], "members": members},
        geometry=[shapely.MultiPolygon(list(discs[m])) for m in members],
    )
    return ShapesModel.parse(frame, transformations=get_transformation(shapes, get_all=True))


def synthetic_slide(side_um: float, mpp: float, seed: int) -> tuple[np.ndarray, list]:
    """H&E-like image in which the density of nuclei and of eosin vary on scales of 40 and 150 um, and these fields."""
    from scipy.ndimage import gaussian_filter, zoom

    rng = np.random.default_rng(seed)
    n = int(side_um / mpp)
    fields = []
    for length in (40.0, 150.0):
        coarse = max(2, int(side_um / (length / 4)))
        field = gaussian_filter(rng.normal(size=(coarse + 16, coarse + 16)), 4 / 2)[8:-8, 8:-8]
        field = zoom((field - field.mean()) / field.std(), n / coarse, order=1, grid_mode=True, mode="nearest")[:n, :n]
        fields.append(field.astype(np.float32))
    nuclei, eosin = fields
    # Nuclei are dots of 6 um, thrown with a density that follows the field.
    rate = np.exp(0.8 * nuclei) * (mpp**2) / 250.0
    dots = gaussian_filter((rng.random(rate.shape) < rate).astype(np.float32), 2.0 / mpp)
    dots = np.clip(dots * 2 * np.pi * (2.0 / mpp) ** 2, 0, 1)
    pink = 0.35 + 0.12 * eosin + 0.05 * gaussian_filter(rng.normal(size=rate.shape), 1.0)
    density = dots[..., None] * [0.65, 0.70, 0.29] * 1.4 + np.clip(pink, 0, None)[..., None] * [0.07, 0.99, 0.11]
    return (255 * np.exp(-density)).astype(np.uint8), [nuclei, eosin]


def sizes(options: argparse.Namespace) -> None:
    """One model trained on 100 um discs against models trained at the size they are read at, and ridge on patches."""
    import anndata as ad
    import geopandas as gpd
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel, ShapesModel, TableModel
    from spatialdata.transformations import Identity, Scale

    mpp, side = 0.5, options.side
    rng = np.random.default_rng(options.seed)
    mixing = rng.normal(size=(2, 12))
    objects = {}
    for name in ("train", "test"):
        image, fields = synthetic_slide(side, mpp, options.seed + (name == "test"))
        sdata = SpatialData(
            images={
                "he": Image2DModel.parse(
                    image.transpose(2, 0, 1),
                    dims=("c", "y", "x"),
                    c_coords=["r", "g", "b"],
                    transformations={"um": Scale([mpp, mpp], axes=("x", "y"))},
                )
            }
        )
        for diameter in (100.0, 55.0, 16.0, 8.0):
            pitch = max(diameter * 1.1, 40.0)
            x, y = np.meshgrid(*[np.arange(diameter, side - diameter, pitch)] * 2)
            centers = np.column_stack([x.ravel(), y.ravel()])
            key = f"d{diameter:g}"
            frame = gpd.GeoDataFrame(geometry=gpd.points_from_xy(*centers.T))
            frame["radius"] = diameter / 2
            sdata.shapes[key] = ShapesModel.parse(frame, transformations={"um": Identity()})
            r = int(diameter / 2 / mpp)
            disc = np.hypot(*np.mgrid[-r : r + 1, -r : r + 1]) <= r
            rows, columns = (centers[:, ::-1] / mpp).astype(int).T
            values = np.stack(
                [
                    [f[i - r : i + r + 1, j - r : j + r + 1][disc].mean() for i, j in zip(rows, columns, strict=True)]
                    for f in fields
                ],
                axis=1,
            )
            expression = values @ mixing + 0.3 * rng.normal(size=(len(values), 12))
            table = ad.AnnData(
                expression.astype(np.float32),
                obs=pd.DataFrame(
                    {"region": key, "instance_id": np.arange(len(values))}, index=np.arange(len(values)).astype(str)
                ),
            )
            table.layers["true"] = (values @ mixing).astype(np.float32)
            table.obs["region"] = table.obs["region"].astype("category")
            sdata.tables[f"{key}_table"] = TableModel.parse(
                table, region=key, region_key="region", instance_key="instance_id"
            )
        objects[name] = sdata
    frame = {"coordinate_system": "um", "mpp": 1.0}
    params = {"n_steps": options.steps, "finest_stride": 4, "crop": 512, "n_crops": 4, "n_cached_crops": 32}
    models, rows, start = {}, {}, time.perf_counter()
    for key in ("d100", "d55", "d16", "d8"):
        true = objects["test"].tables[f"{key}_table"].layers["true"]
        row = {"ridge on 64 um patches, trained at 100 um": patch_ridge(objects, "d100", key, true)}
        models[key] = si.tl.fit_pixnet(objects["train"], "he", key, model_params=params, seed=options.seed, **frame)
        history = models[key].history
        for trained, column in {"d100": "trained at 100 um", key: "trained at this size"}.items():
            found = si.tl.predict_regions(
                objects["test"], key, models[trained], image_key="he", inplace=False, **frame
            ).X
            row[column] = np.nanmean(pearson_by_gene(found, true))
        rows[key] = row
        text = ", ".join(f"{name} {r:.4f}" for name, r in row.items())
        kept = int(history.loc[history["kept"], "step"].iloc[0])
        print(f"read at {key[1:]} um: {text}; step {kept} kept, {time.perf_counter() - start:.0f} s", flush=True)
    table = pd.DataFrame(rows).T
    table["share"] = table["trained at 100 um"] / table["trained at this size"]
    print(table.round(4).to_string())


def patch_ridge(objects: dict, trained: str, key: str, true: np.ndarray) -> float:
    """Ridge on the features of one patch around each region, whatever its size."""
    from spatial_impute._patches import iter_patches
    from spatial_impute.models._encoders import resolve_encoder
    from spatial_impute.models._pixnet_base import fit_base
    from spatial_impute.tl._regions import Frame, read_levels, read_shapes

    encoder = resolve_encoder("tellez-multitask", patch_px=64, device="cpu")

    def features(sdata: object, shapes: str) -> np.ndarray:
        regions, _ = read_shapes(sdata, shapes, Frame("um", 1.0))
        levels = read_levels(sdata, "he", Frame("um", 1.0))
        out = np.zeros((len(regions), 128), np.float32)
        for index, patches in iter_patches(levels, regions.centers, 64.0, 64):
            out[index] = encoder(patches)
        return out

    x, y = features(objects["train"], trained), objects["train"].tables[f"{trained}_table"].X
    block = np.arange(len(x)) // 20
    base = fit_base(x, y, np.zeros(len(x)), block, n_components=128)
    return float(np.nanmean(pearson_by_gene(base.predict(features(objects["test"], key)), true)))


def random_model(n_genes: int, encoder: str | nn.Module, resolution: float) -> si.models.PixNetModel:
    """Model with random decoder and head: what it predicts does not matter for what it costs."""
    from spatial_impute.models._fit_pixnet import context_px
    from spatial_impute.models._pixnet_network import PixNetNetwork
    from spatial_impute.models._pyramid import build_pyramid

    torch.manual_seed(0)
    params = si.models.PixNetParams()
    network = PixNetNetwork(
        build_pyramid(encoder),
        n_genes=n_genes,
        width=params.width,
        n_base=params.n_base,
        context=context_px(params, resolution),
        norm=params.norm,
        finest=params.finest_stride,
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


FRAME = {"coordinate_system": "um", "mpp": 1.0}


def cost(options: argparse.Namespace) -> None:
    """Whole-slide prediction against the bare network; memory from 4k to 20k pixels."""
    from spatial_impute.models._tiles import Tiling

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        side = options.pixels
        sdata, path = slide_on_disk(folder, side)
        for n_genes in (64, 250):
            model = random_model(n_genes, "tellez-multitask", 1.0)
            network, tiling = model.network, model._tiling((side, side), 1024)
            # Processor time: the machine may be shared. Both run on one thread.
            bare = 0.0
            for tile in np.ndindex(*tiling.shape):
                window = tiling.window(tile)
                rgb = torch.rand(1, 3, window.y1 - window.y0, window.x1 - window.x0) * 255
                start = time.process_time()
                with torch.inference_mode():
                    network.genes(network.features(rgb))
                bare += time.process_time() - start
            before = peak_mib()
            start, wall = time.process_time(), time.perf_counter()
            si.tl.predict_dense(
                sdata, "he", model, store=path, key_added=f"map{n_genes}", tissue_only=False, inplace=False, **FRAME
            )
            full, wall = time.process_time() - start, time.perf_counter() - wall
            print(
                f"{side} px, {n_genes} genes, tellez-multitask: bare network {bare:.1f} s, predict_dense {full:.1f} s of "
                f"processor time ({wall:.1f} s), ratio {full / bare:.3f}; peak {peak_mib():.0f} MiB (before: {before:.0f})",
                flush=True,
            )
        assert isinstance(tiling, Tiling)
        for side in dict.fromkeys((options.pixels, 4096, options.largest)):
            code = (
                "import sys; sys.path.insert(0, 'benchmarks'); import pixnet as p, torch, spatial_impute as si\n"
                "from spatialdata import read_zarr; torch.set_num_threads(1)\n"
                "si.settings.verbosity = 'warning'; si.settings.show_progress_bar = False\n"
                f"sdata = read_zarr({str(folder / f'slide{side}.zarr')!r}); model = p.random_model(64, p.Octaves(), 1.0)\n"
                "before = p.peak_mib()\n"
                f"si.tl.predict_dense(sdata, 'he', model, store={str(folder / f'slide{side}.zarr')!r}, key_added='m', "
                "tissue_only=False, inplace=False, **p.FRAME)\n"
                "print(f'{before:.0f} {p.peak_mib():.0f}')"
            )
            if side != options.pixels:
                slide_on_disk(folder, side)
            start = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            before, after = map(float, done.stdout.split())
            print(
                f"{side} px, 64 genes, cheap encoder: {after - before:.0f} MiB over {before:.0f} MiB, "
                f"{time.perf_counter() - start:.0f} s",
                flush=True,
            )


def regions(options: argparse.Namespace) -> None:
    """One million 8 um bins x 250 genes, and labels through spatialdata."""
    import geopandas as gpd
    import spatialdata as sd
    from spatialdata.models import Image2DModel, Labels2DModel, ShapesModel
    from spatialdata.transformations import Identity

    from spatial_impute.models._stencil import Polygons
    from spatial_impute.models._tiles import Slide, bag, forward_tile

    side = 8000
    with tempfile.TemporaryDirectory() as name:
        sdata, _ = slide_on_disk(Path(name), side)
        x, y = np.meshgrid(*[np.arange(0, side, 8.0)] * 2)
        boxes = shapely.box(x.ravel(), y.ravel(), x.ravel() + 8, y.ravel() + 8)
        sdata.shapes["bins"] = ShapesModel.parse(gpd.GeoDataFrame(geometry=boxes), transformations={"um": Identity()})
        model = random_model(250, Octaves(), 1.0)
        tiling = model._tiling((side, side), 1024)
        before = peak_mib()
        start = time.perf_counter()
        table = si.tl.predict_regions(sdata, "bins", model, image_key="he", inplace=False, **FRAME)
        full = time.perf_counter() - start
        after = peak_mib()
        levels = si.tl._regions.read_levels(sdata, "he", si.tl._regions.Frame("um", 1.0))
        image, stain = model._image(levels), model._stain(si._working.survey(levels))
        slide = Slide(image, stain, tiling)
        network = 0.0
        for tile in np.ndindex(*tiling.shape):
            start = time.perf_counter()
            with torch.inference_mode():
                forward_tile(model.network, model.network.features, slide, tile, margin=1)
            network += time.perf_counter() - start
        print(
            f"{table.n_obs} bins x {table.n_vars} genes: {full:.1f} s, of which {network:.1f} s network and reading; "
            f"peak {after - before:.0f} MiB over {before:.0f}",
            flush=True,
        )
    # The same task for both: sums of 16 channels over 4096 square labels of 16 px on 1024 x 1024 pixels.
    n, k = 1024, 16
    cells = torch.rand(16, n // 8, n // 8)
    from spatial_impute.models._stencil import Box, CellGrid

    pixels = nn.functional.interpolate(cells[None], size=(n, n), mode="bilinear")[0].numpy()
    x, y = np.meshgrid(*[np.arange(0, n, k)] * 2)
    squares = shapely.box(x.ravel(), y.ravel(), x.ravel() + k, y.ravel() + k)
    box = Box(0, n, 0, n)
    polygons = Polygons.from_shapely(squares)
    bag(cells, polygons, box, CellGrid(8, n // 8, n // 8), box)
    start = time.perf_counter()
    ours, _ = bag(cells, polygons, box, CellGrid(8, n // 8, n // 8), box)
    ours_s = time.perf_counter() - start
    labels = (np.arange(n)[:, None] // k) * (n // k) + np.arange(n)[None] // k + 1
    labels[labels == 1] = 0  # spatialdata.aggregate fails without background
    element = Image2DModel.parse(pixels, dims=("c", "y", "x"))
    by = Labels2DModel.parse(labels, dims=("y", "x"))
    start = time.perf_counter()
    theirs = sd.aggregate(values=element, by=by, agg_func="sum", target_coordinate_system="global")
    theirs_s = time.perf_counter() - start
    found = np.asarray(
        theirs.tables["table"].X.todense() if hasattr(theirs.tables["table"].X, "todense") else theirs.tables["table"].X
    )
    print(
        f"sums over 4096 squares, 16 channels: {ours_s:.4f} s, spatialdata.aggregate {theirs_s:.2f} s "
        f"({theirs_s / ours_s:.0f}x); largest relative difference "
        f"{np.abs(found[-len(ours) + 1 :] - ours.numpy()[1:]).max() / np.abs(ours.numpy()).max():.1e}"
    )


def _write_map(store: str) -> None:
    """What `kill` kills."""
    from spatialdata import read_zarr

    sdata = read_zarr(store)
    si.tl.predict_dense(
        sdata,
        "he",
        random_model(8, Octaves(), 1.0),
        store=store,
        tile_size=256,
        tissue_only=False,
        inplace=False,
        **FRAME,
    )


def kill(options: argparse.Namespace) -> None:
    """Kill -9 at random moments; the store must open, show all or nothing, and the rerun must go on."""
    from spatialdata import read_zarr

    if options.store:
        _write_map(options.store)
        return
    rng = np.random.default_rng(options.seed)
    with tempfile.TemporaryDirectory() as name:
        sdata, path = slide_on_disk(Path(name), 4096)
        command = [sys.executable, __file__, "kill", "--store", str(path)]
        staging = path / ".spatial_impute_staging"

        def n_done() -> int:
            return sum(len(list(p.glob("*"))) for p in staging.glob("*/done"))

        expected = si.tl.predict_dense(
            sdata, "he", random_model(8, Octaves(), 1.0), tile_size=256, tissue_only=False, inplace=False, **FRAME
        ).compute(scheduler="synchronous")
        killed, opened, lost = 0, 0, 0
        for _ in range(20):
            before = n_done()
            process = subprocess.Popen(command)
            while process.poll() is None and n_done() == before and not (path / "images" / "he_expression").exists():
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.6))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                killed += 1
            process.wait()
            lost += n_done() < before and not (path / "images" / "he_expression").exists()
            images = read_zarr(path).images
            if "he_expression" in images:
                assert images["he_expression"].compute(scheduler="synchronous").equals(expected.astype(expected.dtype))
            opened += 1
        subprocess.run(command, check=True)
        final = read_zarr(path).images["he_expression"].compute(scheduler="synchronous")
        same = np.array_equal(final.to_numpy().view(np.uint16), expected.to_numpy().view(np.uint16))
        print(f"killed {killed} of 20, opened {opened}, runs that lost finished tiles {lost}, final map equal: {same}")


def workers(options: argparse.Namespace) -> None:
    """Two worker processes, byte for byte."""
    from distributed import Client, LocalCluster
    from spatialdata import read_zarr

    with tempfile.TemporaryDirectory() as name:
        sdata, path = slide_on_disk(Path(name), 1024)
        model = random_model(16, Octaves(), 1.0)
        arguments = {"tissue_only": False, "tile_size": 256, "store": path, "inplace": False, **FRAME}
        start = time.perf_counter()
        si.tl.predict_dense(sdata, "he", model, key_added="serial", **arguments)
        serial = time.perf_counter() - start
        with (
            LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
            Client(cluster) as client,
        ):
            client.run(torch.set_num_threads, 1)
            start = time.perf_counter()
            si.tl.predict_dense(sdata, "he", model, key_added="shared", **arguments)
            shared = time.perf_counter() - start
        a, b = (read_zarr(path).images[k].compute(scheduler="synchronous").to_numpy() for k in ("serial", "shared"))
        print(f"bytes equal: {a.tobytes() == b.tobytes()}; serial {serial:.1f} s, two workers {shared:.1f} s")


PARTS = {
    "her2st": her2st,
    "sizes": sizes,
    "cost": cost,
    "regions": regions,
    "kill": kill,
    "workers": workers,
}

if __name__ == "__main__":
    main()
