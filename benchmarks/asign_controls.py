"""Controls of ASIGN: spots with random features, and genes of which only some methods can know the answer.

Run ``python benchmarks/asign_controls.py [neighbors shuffled large noise refit] [--seed 0] [--draws 40]``.

``neighbors``  three sections of 18 x 18 spots, the first and the last measured; genes that are a feature of the spot, the mean of a
               feature over the neighbors in the section, and products of these; and genes of noise alone
``shuffled``   the same, with the measured spots in random order: nothing can be learned
``large``      one measured section of 4,000 spots and one that is not; genes that are linear in the features, or not
``noise``      draws of 150 genes of noise on two sections, one measured: share of genes called imputable (mean and its standard error
               over the draws), and mean held-out r of each method
``refit``      mean held-out r of a fit (``model.cross_validation``) beside that of fits that never saw the fold
               (``tl.cross_validate``): on ``--draws`` stacks of noise, and on HER2ST with C4 measured, where its files are

Otherwise each line gives r per gene of a method against the noise-free values on the section that is not measured, by kind of gene.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import TYPE_CHECKING

import anndata as ad
import geopandas as gpd
import numpy as np
import pandas as pd
from scipy.spatial import cKDTree
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel, TableModel

import spatial_impute as si
from spatial_impute._scores import pearson_by_gene

if TYPE_CHECKING:
    from numpy.random import Generator

SPACING, MPP, NOISE, N_FEATURES = 100.0, 20.0, 0.5, 8  # um, um per px, sd of the measurement in sd of the gene
METHODS = ("knn", "ridge", "cokriging")


def main() -> None:
    """Run the parts named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["neighbors", "shuffled", "large"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=40)
    options = parser.parse_args()
    si.settings.verbosity, si.settings.show_progress_bar = "error", False
    for part in options.parts:
        if part == "noise":
            print(f"\nnoise, {options.draws} draws\n{score_noise(options.draws).round(4).to_string()}", flush=True)
            continue
        if part == "refit":
            for seed in range(options.draws):
                print(f"\nnoise, draw {seed}\n{compare_refit(noise_stack(seed, 150)).round(4).to_string()}", flush=True)
            print(f"\nHER2ST, C4 measured\n{compare_refit(her2st()).round(4).to_string()}", flush=True)
            continue
        start = time.perf_counter()
        side = 64 if part == "large" else 18
        names, measured = (["a", "b"], ["a"]) if part == "large" else (["a", "b", "c"], ["a", "c"])
        sdata, truth, kinds = control_stack(names, measured, side, options.seed, shuffled=part == "shuffled")
        scores = score_methods(sdata, truth, kinds)
        print(f"\n{part}, seed {options.seed}, {time.perf_counter() - start:.0f} s")
        print(scores.round(3).to_string(), flush=True)


def control_stack(
    names: list[str], measured: list[str], side: int, seed: int, *, shuffled: bool = False
) -> tuple[SpatialData, np.ndarray, np.ndarray]:
    """Stack with features and graph, the noise-free values (n, g) of all spots, and the kind of each gene."""
    rng = np.random.default_rng(seed)
    centers = lattice(side)
    near = cKDTree(centers).query(centers, k=7)[1][:, 1:]
    features = rng.normal(size=(len(names), len(centers), N_FEATURES))
    around = features[:, near].mean(axis=2)
    values, kinds = genes_of(features.reshape(-1, N_FEATURES), around.reshape(-1, N_FEATURES), rng)
    noisy = (values + NOISE * rng.normal(size=values.shape)).reshape(len(names), len(centers), -1)
    if shuffled:
        noisy = rng.permuted(noisy, axis=1)
    return with_graph(names, measured, centers, noisy, features), values, kinds


def with_graph(
    names: list[str], measured: list[str], centers: np.ndarray, noisy: np.ndarray, features: np.ndarray
) -> SpatialData:
    """Stack with features (s, n, d) and graph; the values (s, n, g) of the measured sections are given."""
    noisy = noisy - noisy.min()  # log values are not negative
    n_genes, side = noisy.shape[2], math.isqrt(len(centers))
    sections = {
        name: section(name, centers, noisy[k] if name in measured else None, side) for k, name in enumerate(names)
    }
    sdata = si.pp.assemble_stack(sections, mpp=MPP, section_spacing=16.0)
    si.pp.select_genes(sdata, n_top_genes=n_genes, genes=[f"g{j}" for j in range(n_genes)], log_normalized=True)
    table = sdata.tables["stack"]
    table.obsm["spatial_3d"] = np.column_stack([table.obsm["spatial"], table.obs["z"]])
    for key in ("X_spot", "X_region", "X_global"):
        table.obsm[key] = features.reshape(-1, N_FEATURES).astype(np.float32)
    si.tl.build_3d_graph(sdata)
    return sdata


def lattice(side: int) -> np.ndarray:
    """(n, 2) centers of the spots of a section, um."""
    row, column = (index.ravel() for index in np.indices((side, side)))
    return SPACING * np.column_stack([column + 0.5 * (row % 2) + 1, row * np.sqrt(0.75) + 1])


def score_noise(n_draws: int, n_genes: int = 150, side: int = 18) -> pd.DataFrame:
    """Mean and standard error over the draws of the share of imputable genes and of the held-out r of each method."""
    rows = []
    for seed in range(n_draws):
        model = si.tl.fit_asign(noise_stack(seed, n_genes, side))
        rows.append({"imputable": model.predictable.mean(), **model.cross_validation["pearson_gene"]})
    return pd.DataFrame(rows).agg(["mean", "sem"]).T


def noise_stack(seed: int, n_genes: int, side: int = 18) -> SpatialData:
    """Two sections, one measured, with genes and features that are independent noise."""
    rng, centers = np.random.default_rng(seed), lattice(side)
    noise = rng.normal(size=(2, len(centers), n_genes))
    return with_graph(["a", "b"], ["a"], centers, noise, rng.normal(size=(2, len(centers), N_FEATURES)))


def her2st() -> SpatialData:
    """HER2ST with C4 measured, ready to fit."""
    sdata = si.datasets.her2st("C", measured=["C4"])
    si.tl.register_stack(sdata)
    si.pp.extract_features(sdata)
    si.tl.build_3d_graph(sdata)
    return sdata


def compare_refit(sdata: SpatialData) -> pd.DataFrame:
    """Mean held-out r of each method by one fit, and by fits without each fold."""
    fitted = si.tl.fit_asign(sdata).cross_validation["pearson_gene"]
    refitted = si.tl.cross_validate(sdata, ["mean", *METHODS, "asign"], split="block")["pearson_gene"]
    table = pd.DataFrame({"fitted": fitted, "refitted": refitted}).dropna()
    return table.assign(difference=table["fitted"] - table["refitted"])


def genes_of(own: np.ndarray, around: np.ndarray, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """(n, g) standardised values and (g,) kinds: four genes of each kind, and four that are 0."""
    values, kinds = [], []
    for _ in range(4):
        i, j = rng.choice(N_FEATURES, 2, replace=False)
        for kind, gene in {
            "own": own[:, i],
            "neighbors": around[:, i],
            "own x neighbors": own[:, i] * around[:, j],
            "own x own": own[:, i] * own[:, j],
        }.items():
            values.append((gene - gene.mean()) / gene.std())
            kinds.append(kind)
    values += [np.zeros(len(own))] * 4
    return np.column_stack(values), np.array([*kinds, *["noise"] * 4])


def section(name: str, centers: np.ndarray, values: np.ndarray | None, side: int) -> SpatialData:
    """A section whose image is empty; everything is in pixels."""
    size = int((side + 2) * SPACING / MPP)
    ids = [f"{i}" for i in range(len(centers))]
    points = gpd.points_from_xy(*(centers.T / MPP))
    elements = {
        f"{name}_image": Image2DModel.parse(np.full((3, size, size), 200, np.uint8), dims=("c", "y", "x")),
        f"{name}_spots": ShapesModel.parse(gpd.GeoDataFrame({"radius": 27.5 / MPP}, geometry=points, index=ids)),
    }
    if values is not None:
        obs = pd.DataFrame({"region": pd.Categorical([f"{name}_spots"] * len(ids)), "id": ids}, index=ids)
        var = pd.DataFrame(index=[f"g{j}" for j in range(values.shape[1])])
        table = ad.AnnData(values, obs, var)
        elements["counts"] = TableModel.parse(table, region=f"{name}_spots", region_key="region", instance_key="id")
    return SpatialData.init_from_elements(elements)


def score_methods(sdata: SpatialData, truth: np.ndarray, kinds: np.ndarray) -> pd.DataFrame:
    """Mean r over the genes of each kind (columns) of each method and part of the model (rows)."""
    for method in METHODS:
        si.tl.impute_baseline(sdata, method)
    model = si.tl.fit_asign(sdata)
    si.tl.impute_3d(sdata, model, parts=True)
    kept = model.history[model.history["kept"]]["step"].unique().tolist()
    print(f"base {model.base}, step {kept}, {model.config['regime']}")
    table = sdata.tables["stack"]
    rows = ~table.obs["measured"].to_numpy()
    reference = np.where(kinds == "noise", np.random.default_rng(9).normal(size=truth.shape), truth)
    layers = [key for key in table.layers if key not in {"measured", "asign_sd"}]
    scores = {key: pearson_by_gene(np.asarray(table.layers[key])[rows], reference[rows]) for key in layers}
    return pd.DataFrame({key: pd.Series(r).groupby(kinds, sort=False).mean() for key, r in scores.items()}).T


if __name__ == "__main__":
    main()
