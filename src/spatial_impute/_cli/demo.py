"""The demo: from H&E sections and one measured section to imputed expression, with the baselines beside it."""

from __future__ import annotations

import shutil
import time
import warnings
from typing import TYPE_CHECKING

import spatial_impute as si
from spatial_impute._io.workers import local_workers
from spatial_impute._keys import Keys
from spatial_impute._settings import logger

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from anndata import AnnData
    from spatialdata import SpatialData

_BASELINES = ("mean", "nearest", "knn", "kernel", "propagation", "ridge", "cokriging")
_HEADLINE = ["pearson_gene", "pearson_gene_median", "pearson_gene_positive", "mse", "mae", "skill", "pearson_spot"]


def run_demo(output: Path, *, data: str = "auto") -> pd.DataFrame:
    """Run all steps, write figures, data and scores to a folder, and return the scores on the unmeasured sections.

    Parameters
    ----------
    output
        Folder to write to. The files of an earlier demo are replaced.
    data
        ``"her2st"``, ``"synthetic"``, or ``"auto"`` for HER2ST if it is in the cache or can be downloaded.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    start = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    sdata, truth, genes = _load(data)
    with local_workers():
        si.tl.register_stack(sdata)
        si.pp.extract_features(sdata)
        si.tl.build_3d_graph(sdata)
        for method in _BASELINES:
            si.tl.impute_baseline(sdata, method)
        model = si.tl.fit_asign(sdata)
    si.tl.impute_3d(sdata, model)
    scores = si.metrics.evaluate(sdata, truth)

    si.pl.stack(sdata, save=output / "stack.png")
    si.pl.registration(sdata, save=output / "registration.png")
    si.pl.imputed(sdata, genes, save=output / "imputed.png")
    si.pl.volume(sdata, genes, save=output / "volume.png")
    si.pl.graph_3d(sdata, save=output / "graph.png")
    si.pl.metrics(sdata, si.metrics.evaluate(sdata, truth, by="gene"), save=output / "scores.png")
    si.pl.training(model, save=output / "training.png")
    scores.to_csv(output / "scores.csv")
    model.save(output / "asign_model", overwrite=True)
    sdata.tables[Keys.STACK_TABLE].write_h5ad(output / "imputed.h5ad")
    save_stack(sdata, output / "stack.zarr")

    logger.info("Scores on unmeasured sections (mean over sections):\n%s", scores[_HEADLINE].round(3).to_string())
    contents = {
        "stack.png": "the sections and their spots",
        "registration.png": "each section before and after registration",
        "imputed.png": f"measured and imputed {', '.join(genes)}, and the support of every spot if it varies",
        "volume.png": "slices through the stack",
        "graph.png": "edges of the 3D graph",
        "scores.png": "the methods against the measured truth, and the expected r of each gene",
        "training.png": "loss of the networks, and the step that was kept",
        "scores.csv": "scores of the baselines and of ASIGN against the measured truth",
        "imputed.h5ad": "the stack table: layers, coordinates, graph",
        "stack.zarr": "the whole SpatialData object",
        "asign_model": "the fitted model",
    }
    lines = [f"  {output / name}: {what}" for name, what in contents.items()]
    logger.info("Wrote in %.0f s:\n%s", time.perf_counter() - start, "\n".join(lines))
    return scores


def _load(data: str) -> tuple[SpatialData, AnnData, list[str]]:
    """The stack, its truth, and genes to draw."""
    if data in ("auto", "her2st"):
        try:
            sdata, truth = si.datasets.her2st("C", measured=["C4"], truth=True)
        except OSError as error:  # no cache and no network; requests' errors are OSErrors
            if data == "her2st":
                raise
            logger.warning("HER2ST is not available (%s); using the synthetic stack.", error)
        else:
            logger.info("Data: HER2ST, patient C, five sections, C4 measured (files in %s)", si.settings.data_dir)
            genes = [gene for gene in ("ERBB2", "MDK") if gene in sdata.tables[Keys.STACK_TABLE].var_names]
            return sdata, truth, genes or list(sdata.tables[Keys.STACK_TABLE].var_names[:2])
    logger.info("Data: synthetic stack of three sections, the middle one measured")
    sdata, truth = si.datasets.synthetic_stack(truth=True)
    kinds = truth.var["kind"]
    return sdata, truth, [kinds.index[kinds == kind][0] for kind in ("smooth", "texture")]


def save_stack(sdata: SpatialData, store: Path) -> None:
    """Write the object in place of an earlier one at `store`."""
    if store.exists():
        shutil.rmtree(store)
    with warnings.catch_warnings():
        # zarr warns once per chunked array of changes to come in zarr itself.
        warnings.filterwarnings("ignore", message="Consolidated metadata|zarr v3 autosharding")
        sdata.write(store)
