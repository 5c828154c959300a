"""Imputation of other tissues and arrays, and with a section upside down; ASIGN beside its base on each section.

Run ``python benchmarks/other_stacks.py [muscle cytassist olfactory-bulb olfactory-bulb-counts upside-down] [--encoder texture]`` with
``SPATIAL_IMPUTE_DATA_DIR`` at the data.
Of a Visium sample every other spot is measured, and those between them are the second section: another tissue and array
whose expression is known on both, in place without registration. ``olfactory-bulb`` is four sections of a mouse brain, the second one measured.
``upside-down`` is HER2ST with C4 measured and the scan
and spots of C3 turned by half a circle. Prints r per gene of all methods, and ASIGN minus co-kriging.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING

import geopandas as gpd
import numpy as np
import pandas as pd
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel, TableModel

import spatial_impute as si
from spatial_impute._expression import log_normalize

if TYPE_CHECKING:
    from anndata import AnnData

BASELINES = ("mean", "knn", "kernel", "propagation", "ridge", "transfer_ridge", "cokriging")
VISIUM = {"muscle": "muscle_vis5a", "cytassist": "cytassist_2898"}


def main() -> None:
    """Run the stacks named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stacks", nargs="*", default=[*VISIUM, *STACKS])
    parser.add_argument("--encoder", nargs="+", default=["texture"])
    options = parser.parse_args()
    si.settings.verbosity, si.settings.show_progress_bar = "warning", False
    for name in options.stacks:
        sdata, truth = every_other_row(VISIUM[name]) if name in VISIUM else STACKS[name]()
        si.pp.extract_features(sdata, options.encoder)
        si.tl.build_3d_graph(sdata)
        for method in BASELINES:
            si.tl.impute_baseline(sdata, method)
        model = si.tl.fit_asign(sdata)
        si.tl.impute_3d(sdata, model, parts=True)
        table = sdata.tables["stack"]
        print(f"\n{name}: {int(table.obs['measured'].sum())} measured spots of {table.n_obs}, {table.n_vars} genes")
        scores = si.metrics.evaluate(sdata, truth)
        print(scores[["pearson_gene", "pearson_gene_positive", "mse", "skill", "coverage"]].round(4).to_string())
        sections = si.metrics.evaluate(sdata, truth, by="section")["pearson_gene"].unstack()
        print(
            "ASIGN - co-kriging:",
            (sections.loc["asign"] - sections.loc["baseline_cokriging"]).round(4).to_dict(),
            flush=True,
        )


def section(name: str, pixels: np.ndarray, centers: np.ndarray, radius: float, table: AnnData | None) -> SpatialData:
    """One section in pixels, image (c, y, x); circles are named as the rows of `centers`, a frame with x and y."""
    circles = gpd.GeoDataFrame(
        {"radius": radius}, geometry=gpd.points_from_xy(centers["x"], centers["y"]), index=centers.index
    )
    elements = {
        f"{name}_image": Image2DModel.parse(pixels, dims=("c", "y", "x")),
        f"{name}_spots": ShapesModel.parse(circles),
    }
    if table is not None:
        table = table.copy()
        table.uns.clear()
        table.obs = pd.DataFrame({"region": f"{name}_spots", "id": table.obs_names}, index=table.obs_names)
        elements["counts"] = TableModel.parse(table, region=f"{name}_spots", region_key="region", instance_key="id")
    return SpatialData.init_from_elements(elements)


def every_other_row(folder: str) -> tuple[SpatialData, AnnData]:
    """Two sections made of the spots of one Visium sample, and the expression of the second."""
    whole = si.pp.assemble_stack({"all": si.settings.data_dir / "visium" / folder}, z=[0])
    counts = whole.tables["all_counts"]
    counts = counts[:, ~counts.var_names.duplicated()].copy()
    counts.obs_names = counts.obs["instance_id"].astype(str)
    mpp = whole.attrs["spatial_impute"]["stack"]["sections"][0]["mpp"]
    spots = whole.tables["stack"].obs["instance_id"].astype(str)
    centers = pd.DataFrame(whole.tables["stack"].obsm["spatial"] / mpp, columns=["x", "y"], index=spots.to_numpy())
    # Rows of the lattice lie 87 um apart, along one axis or the other.
    across = min(("x", "y"), key=lambda axis: len(np.unique(np.round(centers[axis] * mpp / 25))))
    row = np.round((centers[across] - centers[across].min()) * mpp / (100 * np.sqrt(3) / 2)).astype(int)
    even, odd = centers.index[row % 2 == 0], centers.index[row % 2 == 1]
    pixels = np.asarray(whole.images["all_image"].data)
    radius = 27.5 / mpp  # of a spot of Visium
    sections = {
        "even": section("even", pixels, centers.loc[even], radius, counts[counts.obs_names.isin(even)]),
        "odd": section("odd", pixels.copy(), centers.loc[odd], radius, None),
    }
    sdata = si.pp.assemble_stack(sections, mpp=mpp, section_spacing=10.0)
    si.pp.select_genes(sdata, n_top_genes=250)
    table = sdata.tables["stack"]
    table.obsm["spatial_3d"] = np.column_stack([table.obsm["spatial"], table.obs["z"]])
    truth = counts[counts.obs_names.isin(odd)].copy()
    truth.X = log_normalize(truth.X, 1e4)
    truth.obs["section"] = "odd"
    truth.obs_names = "odd_" + truth.obs_names
    return sdata, truth


def olfactory_bulb(*, by_counts: bool = False) -> tuple[SpatialData, AnnData]:
    """Four registered sections, MOB2 measured, and the expression of all.

    The genes are those of the highest mean log-normalised value, or of the most counts.
    """
    sdata, truth = si.datasets.olfactory_bulb(truth=True)
    if by_counts:
        file = next((si.settings.data_dir / "mob_st4").glob("MOB2.tsv*"))  # of the whole array
        counts = pd.read_csv(file, sep="\t", index_col=0)
        si.pp.select_genes(sdata, genes=list(counts.mean().nlargest(250).index))
    si.tl.register_stack(sdata, on_failure="warn")
    return sdata, truth


def upside_down() -> tuple[SpatialData, AnnData]:
    """HER2ST with C4 measured, registered after C3 was turned by half a circle; and the expression of all."""
    stack, truth = si.datasets.her2st("C", measured=["C4"], truth=True)
    sections, mpp = {}, {}
    for record in stack.attrs["spatial_impute"]["stack"]["sections"]:
        name = record["name"]
        mpp[name] = record["mpp"]
        level = stack.images[f"{name}_image"]
        pixels = (level["scale0"]["image"] if hasattr(level, "children") else level).data
        circles = stack.shapes[f"{name}_spots"]
        centers = pd.DataFrame({"x": circles.geometry.x, "y": circles.geometry.y}, index=circles.index.astype(str))
        if name == "C3":
            centers = pixels.shape[:0:-1] - centers
            pixels = pixels[:, ::-1, ::-1]
        table = stack.tables[f"{name}_counts"] if name == "C4" else None
        if table is not None:
            table = table.copy()
            table.obs_names = table.obs["instance_id"].astype(str)
        sections[name] = section(name, pixels, centers, float(circles["radius"].iloc[0]), table)
    sdata = si.pp.assemble_stack(sections, mpp=mpp, section_spacing=16.0)
    si.pp.select_genes(sdata, n_top_genes=250)
    si.tl.register_stack(sdata)
    return sdata, truth


STACKS = {
    "olfactory-bulb": olfactory_bulb,
    "olfactory-bulb-counts": partial(olfactory_bulb, by_counts=True),
    "upside-down": upside_down,
}

if __name__ == "__main__":
    main()
