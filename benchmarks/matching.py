"""Measured sections of different depth and batch: HER2ST with C3 thinned to a quarter and some of its genes scaled.

Run ``python benchmarks/matching.py`` with ``SPATIAL_IMPUTE_DATA_DIR`` at the data. All five sections are measured. Each is held out
in turn and predicted by co-kriging from the others, as they are and after ``tl.match_sections``. Scores are correlations per gene with
the undisturbed measurement.
"""

from __future__ import annotations

import numpy as np

import spatial_impute as si
from spatial_impute._scores import pearson_by_gene
from spatial_impute._stack.spots import read_spots
from spatial_impute.models.asign._cokriging import krige

SECTIONS = ["C2", "C3", "C4", "C5", "C6"]
N_SCALED, FACTOR, KEPT = 60, 3, 0.25


def main() -> None:
    """Print the scores."""
    si.settings.verbosity = "warning"
    sdata = si.datasets.her2st("C", measured=SECTIONS)
    si.tl.register_stack(sdata, method="rigid", reference="C4", on_failure="warn")
    si.pp.extract_features(sdata)
    truth = sdata.tables["stack"].layers["measured"].copy()
    genes = list(sdata.tables["stack"].var_names)
    for name in ("as measured", "disturbed"):
        if name == "disturbed":
            disturb(sdata, genes)
            si.pp.select_genes(sdata, genes=genes)
        si.tl.match_sections(sdata, choose=False)
        found = {layer: round(held_out_r(sdata, layer, truth), 4) for layer in ("measured", "matched")}
        print(f"{name}: {found}", flush=True)


def disturb(sdata: object, genes: list[str]) -> None:
    """Thin the counts of C3, and multiply those of some genes."""
    rng, table = np.random.default_rng(0), sdata.tables["C3_counts"]
    counts = rng.binomial(table.X.toarray().astype(int), KEPT)
    counts[:, table.var_names.get_indexer(rng.choice(genes, N_SCALED, replace=False))] *= FACTOR
    table.X = counts.astype(np.float32)


def held_out_r(sdata: object, layer: str, truth: np.ndarray) -> float:
    """Mean correlation of the genes within sections that are held out."""
    spots, scores = read_spots(sdata, layer=layer, graph=False)[1], []
    for code in np.unique(spots.section[spots.known]):
        fold = spots.known & (spots.section == code)
        scores.append(pearson_by_gene(krige(spots.hide(fold)).expression(fold), truth[fold]))
    return float(np.nanmean(np.nanmean(scores, axis=0)))


if __name__ == "__main__":
    main()
