"""The demo: from H&E sections and one measured section to imputed expression, with the baselines beside it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import spatial_impute as si
from spatial_impute._cli.run import draw, save_stack
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

    The files of an earlier demo are replaced. `data` is ``"her2st"``, ``"synthetic"``, or ``"auto"`` for HER2ST if it
    is in the cache or can be downloaded.
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

    by_gene = si.metrics.evaluate(sdata, truth, by="gene")
    figures = draw(sdata, genes, output, layer=Keys.ASIGN, model=model, scores=by_gene)
    scores.to_csv(output / "scores.csv")
    model.save(output / "asign_model", overwrite=True)
    sdata.tables[Keys.STACK_TABLE].write_h5ad(output / "imputed.h5ad")
    save_stack(sdata, output / "stack.zarr")

    logger.info("Scores on unmeasured sections (mean over sections):\n%s", scores[_HEADLINE].round(3).to_string())
    contents = figures | {
        "scores.png": "the methods against the measured truth, and the expected r of each gene",
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
