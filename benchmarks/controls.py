"""Controls: synthetic tissue with genes of which the answer is known, to see that each network learns what it should.

Run ``python benchmarks/controls.py pixnet PART ...`` with PART among

``kinds``       linear genes, products and exclusive-ors of two nuclear features, at 55 um from two slides of 400 discs
``sizes``       trained at 100 um, at 16 um, and at both; read at 100, 55, 16, 8 and 2 um
``seeds``       the decoder against its base on a new slide, in ten draws of slides; some of them with ``--draws 1 2 3``
``encoders``    the same task with several encoders

Each line gives r per gene against the noise-free values on a slide that no training saw.
"""

from __future__ import annotations

import argparse
import json
import time

import anndata as ad
import geopandas as gpd
import numpy as np
import pandas as pd
import torch
from scipy.ndimage import gaussian_filter
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Identity, Scale

import spatial_impute as si
from spatial_impute._scores import pearson_by_gene

FRAME = {"coordinate_system": "um", "mpp": 1.0}
HEMATOXYLIN, EOSIN = np.array([0.65, 0.70, 0.29]), np.array([0.07, 0.99, 0.11])
KINDS = np.repeat(["linear", "product", "exclusive or"], 4)
_LENGTH_UM = 30.0  # sd of the kernel that smooths the fields
_CELL_UM = 4.0  # sd of the spread of the expression of a cell around its nucleus
_NOISE = 0.5  # sd of the measurement in sd of the gene


def nuclear_slide(side: int, mpp: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """H&E-like image (y, x, 3) of side x side um, and the map of 12 genes (12, side, side), one value per um.

    Nuclei differ in size and in how dark they are; the two features vary on their own across the tissue. Each cell expresses
    four genes linear in the two features of its nucleus, four with their product, four with their exclusive-or.
    """
    rng = np.random.default_rng(seed)
    centers = rng.uniform(0, side, (side * side // 200, 2))
    features = []
    for _ in range(2):
        field = gaussian_filter(rng.normal(size=(side, side)), _LENGTH_UM, mode="reflect")
        features.append(field[tuple(centers.astype(int).T)] / field.std())
    size, dark = features
    pixels = round(side / mpp)
    density = np.zeros((pixels, pixels))
    radius = 3.2 * np.exp(0.25 * size + 0.05 * rng.normal(size=len(centers)))
    depth = 0.9 * np.exp(0.35 * dark + 0.05 * rng.normal(size=len(centers)))
    for (y, x), r, d in zip(centers / mpp, radius / mpp, depth, strict=True):
        reach = int(r) + 2
        top, left = max(int(y) - reach, 0), max(int(x) - reach, 0)
        rows, columns = np.ogrid[top : min(int(y) + reach + 1, pixels), left : min(int(x) + reach + 1, pixels)]
        disc = d * np.clip(r + 0.5 - np.hypot(rows + 0.5 - y, columns + 0.5 - x), 0, 1)
        part = density[rows[0, 0] : rows[-1, 0] + 1, columns[0, 0] : columns[0, -1] + 1]
        np.maximum(part, disc, out=part)
    stroma = 0.3 + 0.1 * gaussian_filter(rng.normal(size=density.shape), 1.0)
    optical = density[..., None] * HEMATOXYLIN + stroma.clip(min=0)[..., None] * EOSIN
    maps = np.zeros((len(KINDS), side, side))
    maps[(slice(None), *centers.astype(int).T)] = gene_values(size, dark)
    maps = gaussian_filter(maps, (0, _CELL_UM, _CELL_UM), mode="constant")
    return (255 * np.exp(-optical)).astype(np.uint8), maps


def gene_values(size: np.ndarray, dark: np.ndarray) -> np.ndarray:
    """(12, n): four linear genes, four products, four exclusive-ors, with other signs and shares."""
    product, either = size * dark, np.where((size > 0) != (dark > 0), 1.0, -1.0)
    linear = [size, dark, (size + dark) / 2**0.5, (size - dark) / 2**0.5]
    others = [[f, -f, f + 0.3 * size, f - 0.3 * dark] for f in (product, either)]
    return np.stack([*linear, *others[0], *others[1]])


def discs(side: int, diameter: float, n_most: int, rng: np.random.Generator) -> np.ndarray:
    """(n, 2) centres of discs on a grid, um; a sample if there are more than wanted."""
    line = np.arange(diameter / 2 + 2, side - diameter / 2 - 2, max(diameter * 1.1, 20.0))
    centers = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)
    return centers[np.sort(rng.choice(len(centers), min(n_most, len(centers)), replace=False))]


def control_slide(diameters: tuple[float, ...], *, seed: int, side: int, n_most: int, mpp: float) -> SpatialData:
    """Slide with discs ``d{diameter}`` and tables; ``layers["true"]`` is free of noise."""
    image, maps = nuclear_slide(side, mpp, seed)
    rng = np.random.default_rng([seed, 1])
    element = Image2DModel.parse(
        image.transpose(2, 0, 1),
        dims=("c", "y", "x"),
        c_coords=["r", "g", "b"],
        transformations={"um": Scale([mpp, mpp], axes=("x", "y"))},
    )
    sdata = SpatialData(images={"he": element})
    for diameter in diameters:
        key, centers = f"d{diameter:g}", discs(side, diameter, n_most, rng)
        frame = gpd.GeoDataFrame(
            {"radius": diameter / 2}, index=range(len(centers)), geometry=gpd.points_from_xy(*centers.T)
        )
        sdata.shapes[key] = ShapesModel.parse(frame, transformations={"um": Identity()})
        reach = np.arange(-int(diameter / 2), int(diameter / 2) + 1)
        dy, dx = np.nonzero(np.hypot(reach[:, None], reach) <= diameter / 2)
        rows, columns = (centers[:, ::-1, None].astype(int) + (np.stack([dy, dx]) + reach[0])[None]).swapaxes(0, 1)
        true = maps[:, rows, columns].mean(axis=2).T
        true = ((true - true.mean(axis=0)) / true.std(axis=0)).astype(np.float32)
        table = ad.AnnData(
            true + _NOISE * rng.normal(size=true.shape).astype(np.float32),
            obs=pd.DataFrame(
                {"region": pd.Categorical([key] * len(true)), "instance_id": np.arange(len(true))},
                index=[str(i) for i in range(len(true))],
            ),
            var=pd.DataFrame({"kind": KINDS}, index=[f"{kind} {i}" for i, kind in enumerate(KINDS)]),
            layers={"true": true},
        )
        sdata.tables[f"{key}_table"] = TableModel.parse(
            table, region=key, region_key="region", instance_key="instance_id"
        )
    return sdata


def fit(slides: list[SpatialData], keys: list[str], options: argparse.Namespace) -> si.models.PixNetModel:
    """Fit to all slides at all sizes; ``model.without_training`` is the base alone."""
    pairs = [(slide, key) for slide in slides for key in keys]
    arguments = ([slide for slide, _ in pairs], "he", [key for _, key in pairs])
    settings = {
        "table_key": [f"{key}_table" for _, key in pairs],
        "encoder": options.encoder,
        "seed": options.seed,
        **FRAME,
    }
    start = time.process_time()
    model = si.tl.fit_pixnet(*arguments, model_params=options.params, **settings)
    model.seconds = time.process_time() - start
    model.without_training = si.tl.fit_pixnet(*arguments, model_params=options.params | {"n_steps": 0}, **settings)
    return model


def scores(model: si.models.PixNetModel, slide: SpatialData, key: str) -> pd.Series:
    """R of each kind of genes against the noise-free values."""
    found = si.tl.predict_regions(slide, key, model, image_key="he", inplace=False, **FRAME)
    r = pearson_by_gene(np.asarray(found.X), slide.tables[f"{key}_table"].layers["true"])
    return pd.Series(r, index=KINDS).groupby(level=0, sort=False).mean()


def kept_step(model: si.models.PixNetModel) -> int:
    """Step of the kept state."""
    return int(model.history.loc[model.history["kept"], "step"].iloc[0])


def beside_base(model: si.models.PixNetModel, slide: SpatialData, key: str) -> pd.DataFrame:
    """Scores of a model and of its base."""
    return pd.DataFrame({"base": scores(model.without_training, slide, key), "pixnet": scores(model, slide, key)})


def slides_of(options: argparse.Namespace, diameters: tuple[float, ...], **kwargs: int) -> list[SpatialData]:
    """Two slides to train on, one to test on."""
    settings = {"side": 1290, "n_most": 400, "seed": options.seed} | kwargs
    seed = settings.pop("seed")
    return [control_slide(diameters, seed=10 * seed + k, mpp=options.mpp, **settings) for k in range(3)]


def kinds(options: argparse.Namespace) -> None:
    """Linear genes, products and exclusive-ors at 55 um from 2 x 400 discs."""
    *train, test = slides_of(options, (55.0,))
    model = fit(train, ["d55"], options)
    print(f"55 um from 2 x 400 discs, {model.config['encoder']}: step {kept_step(model)} kept, {model.seconds:.0f} s")
    print(beside_base(model, test, "d55").round(3).to_string(), flush=True)
    if options.history:
        print(model.history.round(4).to_string())


def sizes(options: argparse.Namespace) -> None:
    """Trained at 100 um, at 16 um, at both; read at five sizes."""
    read_at = (100.0, 55.0, 16.0, 8.0, 2.0)
    *train, test = slides_of(options, read_at)
    rows = {}
    for keys in (["d100"], ["d16"], ["d100", "d16"]):
        model = fit(train, keys, options)
        for diameter in read_at:
            found = beside_base(model, test, f"d{diameter:g}")
            for kind, row in found.iterrows():
                rows["+".join(keys), kind, diameter] = row["pixnet"]
            rows["+".join(keys), "mean of the base", diameter] = found["base"].mean()
            rows["+".join(keys), "mean", diameter] = found["pixnet"].mean()
        table = pd.Series(rows).unstack()[list(read_at)]
        print(f"{keys}: step {kept_step(model)} kept, {model.seconds:.0f} s", flush=True)
        print(table.loc["+".join(keys)].round(3).to_string(), flush=True)


def seeds(options: argparse.Namespace) -> None:
    """The decoder against its base on a new slide: draws of small slides, where training has little to learn from."""
    worst = 0.0
    for seed in options.draws:
        *train, test = slides_of(options, (55.0,), side=700, n_most=100, seed=100 + seed)
        model = fit(train, ["d55"], options)
        found = beside_base(model, test, "d55")
        gain = found["pixnet"] - found["base"]
        worst = min(worst, gain.min())
        text = ", ".join(f"{kind} {found['base'][kind]:.3f} -> {found['pixnet'][kind]:.3f}" for kind in found.index)
        print(f"seed {seed}: step {kept_step(model)} kept, {model.seconds:.0f} s; {text}", flush=True)
    print(f"largest loss against the base of any kind of gene: {-worst:.3f}")


def encoders(options: argparse.Namespace) -> None:
    """Encoders on the task of `kinds`; ``"resnet18"`` with random weights."""
    from spatial_impute.encoders._networks import build_resnet

    *train, test = slides_of(options, (55.0,))
    torch.manual_seed(0)
    random = build_resnet("resnet18")
    named = {name: name for name in ("texture", "tellez-multitask", "efficientnet-lite2")}
    for name, encoder in (named | {"resnet18, random weights": random}).items():
        options.encoder = encoder
        options.params = {"resolution": 1.0}
        model = fit(train, ["d55"], options)
        print(f"{name}: step {kept_step(model)} kept, {model.seconds:.0f} s")
        print(beside_base(model, test, "d55").round(3).T.to_string(), flush=True)


PARTS = {"kinds": kinds, "sizes": sizes, "seeds": seeds, "encoders": encoders}


def main() -> None:
    """Run the controls of one method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    methods = parser.add_subparsers(dest="method", required=True)
    pixnet = methods.add_parser("pixnet", help="controls of PixNet")
    pixnet.add_argument("parts", nargs="+", choices=PARTS)
    pixnet.add_argument("--encoder", default="tellez-multitask")
    pixnet.add_argument("--mpp", type=float, default=1.0, help="um per pixel of the slides")
    pixnet.add_argument("--params", type=json.loads, default={}, help="PixNetParams as JSON")
    pixnet.add_argument("--history", action="store_true", help="print the training")
    pixnet.add_argument("--seed", type=int, default=0)
    pixnet.add_argument("--draws", type=int, nargs="+", default=range(10), help="draws of `seeds`")
    options = parser.parse_args()
    torch.set_num_threads(1)
    si.settings.verbosity = "warning"
    si.settings.show_progress_bar = False
    for part in options.parts:
        PARTS[part](options)


if __name__ == "__main__":
    main()
