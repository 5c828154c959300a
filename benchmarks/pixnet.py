"""PixNet: what it reaches on HER2ST and on a synthetic slide.

Run ``python benchmarks/pixnet.py PART`` with PART one of

``her2st --measured C4``    per-gene r on the other sections, ridge on the same encoder beside it, and at other sizes
``sizes``                   synthetic slide with known fields: trained on 100 um discs, read at 55, 16 and 8 um
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import pandas as pd
import shapely
import torch
from scipy.spatial import cKDTree

import spatial_impute as si
from spatial_impute._scores import pearson_by_gene, summarise


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=sorted(PARTS))
    parser.add_argument("--measured", nargs="+", default=["C4"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--encoder", default="tellez-multitask")
    parser.add_argument("--side", type=float, default=2000.0, help="edge of the slide of `sizes` in um")
    parser.add_argument("--no-context", action="store_true", help="leave the windows of the base out")
    parser.add_argument("--tile", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
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
        encoder=options.encoder,
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
        groups = neighboring_spots(sdata, spots, known)
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
    print("\nMean over sections; regions of n neighboring spots, ridge averaged over them:")
    print(scores.groupby(level=[0, 1]).mean().round(4).to_string())


def neighboring_spots(sdata: object, spots: str, known: np.ndarray) -> object:
    """Measured spots, and unions of two and of four neighboring ones."""
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


def discs_of_sizes(options: argparse.Namespace) -> dict:
    """Two synthetic slides, one to train on and one to test, with discs of four sizes and tables of 12 genes."""
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
    return objects


def sizes(options: argparse.Namespace) -> None:
    """One model trained on 100 um discs against models trained at the size they are read at, and ridge on patches."""
    objects = discs_of_sizes(options)
    frame = {"coordinate_system": "um", "mpp": 1.0}
    params = {"n_steps": options.steps, "finest_stride": 4, "crop": 512, "n_crops": 4, "n_cached_crops": 32}
    models, rows, start = {}, {}, time.perf_counter()
    for key in ("d100", "d55", "d16", "d8"):
        true = objects["test"].tables[f"{key}_table"].layers["true"]
        row = {"ridge on 64 um patches, trained at 100 um": patch_ridge(objects, "d100", key, true)}
        models[key] = si.tl.fit_pixnet(
            objects["train"], "he", key, encoder=options.encoder, model_params=params, seed=options.seed, **frame
        )
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
    from spatial_impute._image.resampling import iter_patches
    from spatial_impute.encoders._encoder import resolve_encoder
    from spatial_impute.models.pixnet._fit import BaseData, fit_base
    from spatial_impute.tl._read_regions import Frame, read_levels, read_shapes

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
    base = fit_base(BaseData(x, y, np.zeros(len(x)), block), n_components=128)
    return float(np.nanmean(pearson_by_gene(base.predict(features(objects["test"], key)), true)))


PARTS = {"her2st": her2st, "sizes": sizes}

if __name__ == "__main__":
    main()
