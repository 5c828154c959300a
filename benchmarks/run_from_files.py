"""A run of the command line from files: one Visium section and three copies of its image, warped in known ways.

Run ``python benchmarks/run_from_files.py FOLDER [--held-out 0.5]`` with ``SPATIAL_IMPUTE_DATA_DIR`` at the data. Writes the images
and ``run.yaml`` to the folder, starts ``python -m spatial_impute run``, and prints its time, the verdicts and the held-out scores. The
copies are turned by 170 degrees; mirrored and turned by 20 degrees; bent, with larger pixels.

With ``--held-out``, this share of the counts (drawn molecule by molecule) is put aside before the run. The maps of the copies are then
read at the places of the measured spots and compared with the counts that were put aside. These have noise of their own.
"""

from __future__ import annotations

import argparse
import gzip
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from PIL import Image
from scipy.interpolate import LinearNDInterpolator
from scipy.io import mmwrite
from scipy.ndimage import gaussian_filter, map_coordinates

import spatial_impute as si
from spatial_impute._expression import log_normalize
from spatial_impute._scores import noise_ceiling, pearson_by_gene

if TYPE_CHECKING:
    from anndata import AnnData

SPOT_UM = 65.0  # what Space Ranger calls the diameter of a spot of Visium
COPIES = {
    "turned": {"angle": 170.0},
    "mirrored": {"angle": 20.0, "mirror": True},
    "elastic": {"bend": 4.0, "factor": 1.25},
}


def main() -> None:
    """Make the files, run, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--held-out", type=float, default=0.0, help="share of the counts to put aside, 0 to 1")
    parser.add_argument("--methods", nargs="+", help="of the run; all by default")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    sample, aside = si.settings.data_dir / "visium" / "muscle_vis5a", None
    if options.held_out:
        sample, aside = hold_out(sample, folder / "thinned", options.held_out)
    shape = make_files(sample, folder, options.methods)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "spatial_impute", "run", "run.yaml"], cwd=folder, check=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{time.perf_counter() - start:.0f} s, {used.ru_utime + used.ru_stime:.0f} s of processor time")
    print(pd.read_csv(folder / "results" / "registration.csv", index_col=[0, 1])[["verdict", "score"]])
    print(pd.read_csv(folder / "results" / "scores.csv", index_col=0)[["pearson_gene", "mse", "skill"]].round(3))
    if aside is not None:
        print("\nMean r per gene with the counts that were put aside, over the measured spots:")
        print(held_out_scores(folder / "results", aside, shape).round(3).to_string())


def hold_out(sample: Path, folder: Path, share: float) -> tuple[Path, AnnData]:
    """Write a folder of Space Ranger with a part of the counts, and return it with the other part."""
    counts = sc.read_10x_h5(next(sample.glob("*filtered_feature_bc_matrix.h5")))
    counts.X = counts.X.tocsr().astype(np.int64)
    aside, kept = counts.copy(), counts.copy()
    repeated = counts.var_names.duplicated(keep=False)  # the run names these genes by their ids
    aside.var_names = np.where(repeated, counts.var["gene_ids"], counts.var_names)
    aside.X.data = np.random.default_rng(0).binomial(counts.X.data, share)
    kept.X.data = counts.X.data - aside.X.data
    matrix = folder / "filtered_feature_bc_matrix"
    matrix.mkdir(parents=True, exist_ok=True)
    shutil.copytree(sample / "spatial", folder / "spatial", dirs_exist_ok=True, copy_function=shutil.copyfile)
    with gzip.open(matrix / "matrix.mtx.gz", "wb") as file:
        mmwrite(file, kept.X.T.tocoo())
    features = kept.var[["gene_ids"]].assign(name=kept.var_names, kind="Gene Expression")
    features.to_csv(matrix / "features.tsv.gz", sep="\t", header=False, index=False)
    kept.obs[[]].to_csv(matrix / "barcodes.tsv.gz", sep="\t", header=False)
    return folder, aside


def make_files(sample: Path, folder: Path, methods: list[str] | None) -> tuple[int, int]:
    """Warped copies of the low-resolution image of a Space Ranger folder, and the file of the run; the size of the image."""
    factors = json.loads((sample / "spatial" / "scalefactors_json.json").read_text())
    mpp = SPOT_UM / factors["spot_diameter_fullres"] / factors["tissue_lowres_scalef"]
    rgb = np.asarray(Image.open(sample / "spatial" / "tissue_lowres_image.png").convert("RGB")).astype(float)
    lines = ["sections:", f"  muscle: {{spaceranger: {sample}}}"]
    for name, how in COPIES.items():
        places = warp(rgb.shape[:2], **how).transpose(2, 0, 1)
        channels = [map_coordinates(rgb[..., k], places, order=1, mode="nearest") for k in range(3)]
        Image.fromarray(np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8)).save(folder / f"{name}.png")
        lines.append(f"  {name}: {{image: {name}.png, mpp: {mpp * how.get('factor', 1.0):.4f}}}")
    lines += ["section_spacing: 10", "output: results", "genes: 250"]
    lines += [f"methods: [{', '.join(methods)}]"] if methods else []
    (folder / "run.yaml").write_text("\n".join([*lines, ""]))
    return rgb.shape[:2]


def warp(
    shape: tuple[int, int], *, angle: float = 0.0, mirror: bool = False, bend: float = 0.0, factor: float = 1.0
) -> np.ndarray:
    """Place (row, column) in an image for each pixel of a copy (y, x, 2): turned around the center by `angle` degrees, mirrored,
    bent by `bend` px, with pixels `factor` times as large.
    """
    half = np.array(shape) / 2
    height, width = np.ceil(2 * half / factor).astype(int)
    places = np.stack(np.mgrid[:height, :width], axis=-1) * factor - half
    if mirror:
        places = places * [1, -1]
    cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    places = places @ np.array([[cos, sin], [-sin, cos]]) + half
    noise = np.random.default_rng(2).normal(size=(height, width, 2))
    field = gaussian_filter(noise, (60 / factor, 60 / factor, 0))
    return places + bend * field / field.std()


def held_out_scores(results: Path, aside: AnnData, shape: tuple[int, int]) -> pd.DataFrame:
    """Mean r per gene of each layer on each copy with the counts that were put aside, and what can be expected of it."""
    table = ad.read_h5ad(results / "imputed.h5ad")
    mpp = pixel_sizes(results)
    muscle = table[(table.obs["section"] == "muscle") & table.obs["measured"]]
    wanted = muscle.obsm["spatial"] / mpp["muscle"]
    truth = aside[muscle.obs["instance_id"].astype(str)]
    true = log_normalize(truth.X, 1e4)[:, aside.var_names.get_indexer(table.var_names)].toarray()
    layers = [key for key in table.layers if key == "asign" or key.startswith("baseline_")]
    rows: dict[str, dict[str, float]] = {key: {} for key in layers}
    for name, how in COPIES.items():
        copy = table[table.obs["section"] == name]
        pixels = (copy.obsm["spatial"] / mpp[name])[:, ::-1] - 0.5  # row and column
        places = warp(shape, **how)
        origin = np.column_stack([map_coordinates(places[..., k], pixels.T, order=1) for k in (1, 0)]) + 0.5
        for key in layers:
            read = LinearNDInterpolator(origin, copy.layers[key])(wanted)
            inside = np.isfinite(read).all(axis=1)
            rows[key][name] = float(np.nanmean(pearson_by_gene(read[inside], true[inside])))
    rows["the measured half itself"] = {"muscle": float(np.nanmean(pearson_by_gene(muscle.layers["measured"], true)))}
    columns = aside.var_names.get_indexer(table.var_names)
    ceiling = noise_ceiling(truth.X, columns, target_sum=1e4, n_draws=3)
    rows["noiseless values, at most"] = {"muscle": float(np.nanmean(ceiling))}
    return pd.DataFrame(rows).T


def pixel_sizes(results: Path) -> dict[str, float]:
    """Pixel size of each section of a run."""
    import spatialdata as sd

    stack = sd.read_zarr(results / "stack.zarr").attrs["spatial_impute"]["stack"]
    return {section["name"]: section["mpp"] for section in stack["sections"]}


if __name__ == "__main__":
    main()
