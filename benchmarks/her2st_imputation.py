"""Imputation on HER2ST: one measured section, the others as truth; every baseline beside ASIGN.

Run ``python benchmarks/her2st_imputation.py [--encoder texture|tellez-multitask ...] [--measured C4]``. Prints a
table, and the paired interval over genes of ASIGN minus each baseline. Everything is chosen on the measured section.

``--protocol asign`` scores as the ASIGN paper does: the first section is measured, 250 genes are normalised among
themselves, ln((c + 1) / sum(c + 1)). With ``--patients all`` it does so for each of the eight patients, as the paper did, and prints
the means over patients. Without ``--images``, only patient C has images (none with ``--no-images``): the sections of the others
are drawn and registered by their shape, and only methods without features run. ``--constant`` scores nothing but the mean of the first
section, in less than a minute, with the 250 genes of each patient and with those of the most counts over all 36 sections. ``--paper`` fits
the network of the publication instead of ours. Published, with images: ASIGN 0.363 (MSE), 0.473 (MAE),
0.693 (Pearson per spot); HiFusion 0.285, 0.421, 0.749.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

import spatial_impute as si
from spatial_impute._scores import bootstrap_interval

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from spatialdata import SpatialData

BASELINES = ("mean", "nearest", "knn", "kernel", "propagation", "ridge", "transfer_ridge", "cokriging")
PATIENTS = "ABCDEFGH"
COLUMNS = ["pearson_gene", "pearson_gene_median", "pearson_gene_q1", "pearson_gene_positive", "mse", "mae", "skill"]


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", nargs="+", default=["texture"])
    parser.add_argument("--measured", nargs="+", help="C4 by default; C2, the first, for the protocol of ASIGN")
    parser.add_argument("--protocol", choices=["package", "asign"], default="package")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patients", nargs="+", help="all, or some of A to H, for the protocol of ASIGN")
    parser.add_argument("--no-images", action="store_true", help="coordinates only, for patient C as well")
    parser.add_argument("--paper", action="store_true", help="the network of the publication, `AsignParams.paper()`")
    parser.add_argument("--constant", action="store_true", help="the mean of the first section of all patients alone")
    parser.add_argument(
        "--images", help="folder ST-imgs of the repository of the study, with the images of all patients"
    )
    options = parser.parse_args()
    if options.constant:
        constant()
        return
    if options.patients:
        every_patient(PATIENTS if options.patients == ["all"] else options.patients, options)
        return
    start = time.perf_counter()
    si.settings.verbosity = "warning"
    measured = options.measured or (["C2"] if options.protocol == "asign" else ["C4"])
    sdata, truth = si.datasets.her2st("C", measured=measured, truth=True)
    if options.protocol == "asign":
        truth = as_published(sdata, truth)
    si.tl.register_stack(sdata)
    si.pp.extract_features(sdata, options.encoder)
    si.tl.build_3d_graph(sdata)
    for method in BASELINES:
        si.tl.impute_baseline(sdata, method)
    model = si.tl.fit_asign(sdata, model_params=network(options), seed=options.seed)
    si.tl.impute_3d(sdata, model, parts=True)
    scores = si.metrics.evaluate(sdata, truth)
    genes = si.metrics.evaluate(sdata, truth, by="gene")
    sections = si.metrics.evaluate(sdata, truth, by="section")["pearson_gene"].unstack()

    print(
        f"Measured: {measured}; protocol: {options.protocol}; encoder: {options.encoder}; {time.perf_counter() - start:.0f} s\n"
    )
    print(scores[[*COLUMNS, "pearson_spot"]].round(3).to_string(), "\n")
    pooled = si.metrics.evaluate(sdata, truth, by="pooled")
    print("All sections pooled, and spatial structure within sections:\n")
    print(pooled[["pearson_gene", "low", "high", "mse"]].join(scores[["moran_gap", "ssim"]]).round(3).to_string(), "\n")
    print("Per-gene r by section:\n")
    print(sections.round(3).to_string(), "\n")
    print("ASIGN minus baseline, per-gene r, mean and 95 % interval over genes:\n")
    print(paired_intervals(genes).round(4).to_string(), "\n")
    if options.protocol == "package":  # the values of the paper are no log counts, so their depth is not known
        print("Share of truth within 90 % intervals:\n")
        print(coverage(sdata, truth, model).round(3).to_string(), "\n")
    print("Blend weights:", model.weights.mean().round(2).to_dict())
    trust = genes["asign"].corr(model.predictability, method="spearman")
    print(f"imputation_r: mean {model.predictability.mean():.3f}; Spearman with the reached r {trust:.2f}")
    quick = si.metrics.predictability(sdata).assign(best=lambda table: table.max(axis=1))
    print(
        "metrics.predictability: Spearman with the reached r",
        quick.corrwith(genes["asign"], method="spearman").round(2).to_dict(),
    )


def network(options: argparse.Namespace) -> si.models.AsignParams:
    """Ours, or that of the publication."""
    return si.models.AsignParams.paper() if options.paper else si.models.AsignParams()


def every_patient(patients: Sequence[str], options: argparse.Namespace) -> None:
    """Print the scores of the protocol of ASIGN for each patient, and their means."""
    si.settings.verbosity = "error"
    found = {}
    for patient in patients:
        images = options.images or (patient == "C" and not options.no_images)
        first = "C2" if patient == "C" and images else f"{patient}1"
        sdata, truth = si.datasets.her2st(patient, measured=[first], images=images, truth=True)
        truth = as_published(sdata, truth)
        si.tl.register_stack(sdata, on_failure="warn")
        methods = BASELINES if images else ("mean", "nearest", "knn", "kernel", "propagation")
        if images:
            si.pp.extract_features(sdata, options.encoder)
        si.tl.build_3d_graph(sdata, use_rep="X_spot" if images else None)
        for method in methods:
            si.tl.impute_baseline(sdata, method)
        if images:
            model = si.tl.fit_asign(sdata, model_params=network(options), seed=options.seed)
            si.tl.impute_3d(sdata, model)
        found[patient] = si.metrics.evaluate(sdata, truth)[["mse", "mae", "pearson_spot", "pearson_gene"]]
        print(f"Patient {patient}, {first} measured, {'with images' if images else 'coordinates only'}:")
        print(found[patient].round(3).to_string(), "\n", flush=True)
    shared = set.intersection(*(set(table.index) for table in found.values()))
    print(f"Mean over {len(found)} patients, of the methods that run on all:")
    print(pd.concat(found).loc[lambda t: t.index.get_level_values(1).isin(shared)].groupby(level=1).mean().round(3))


def constant() -> None:
    """Print the scores of the mean of the first section in the protocol of ASIGN, with two choices of genes."""
    si.settings.verbosity = "error"
    truths = {p: si.datasets.her2st(p, measured=[f"{p}1"], images=False, truth=True)[1] for p in PATIENTS}
    totals = pd.concat([pd.Series(np.ravel(t.layers["counts"].sum(axis=0)), t.var_names) for t in truths.values()])
    most = list(totals.groupby(level=0).sum().nlargest(250).index)
    for without in ((), ("C1",)):
        rows = {}
        for patient, truth in truths.items():
            own = truth[truth.obs["section"] == next(s for s in truth.obs["section"].unique() if s not in without)]
            highest = truth.var_names[np.argsort(-np.ravel(own.X.mean(axis=0)), kind="stable")[:250]]
            for genes, names in {"of the patient": highest, "of all sections": most}.items():
                rows[genes, patient] = constant_scores(truth, names, without)
        table = pd.DataFrame(rows, index=["mse", "mae", "pearson_spot"]).T
        print(f"Mean of the first section{f' without {without[0]}' if without else ''}:\n{table.round(3).to_string()}")
        print(table.groupby(level=0, sort=False).mean().round(4).to_string(), "\n", flush=True)


def constant_scores(truth: AnnData, genes: Sequence[str], without: Sequence[str]) -> list[float]:
    """MSE, MAE and r per spot of the mean of the first section on the others, mean over sections."""
    counts = pd.DataFrame.sparse.from_spmatrix(truth.layers["counts"], truth.obs_names, truth.var_names)
    counts = counts.reindex(columns=genes, fill_value=0).to_numpy(float) + 1
    values = np.log(counts / counts.sum(axis=1, keepdims=True))
    section = truth.obs["section"].astype(str).to_numpy()
    first, *others = [name for name in dict.fromkeys(section) if name not in without]
    profile, scores = values[section == first].mean(axis=0), []
    for name in others:
        error = values[section == name] - profile
        r = [np.corrcoef(spot, profile)[0, 1] for spot in values[section == name]]
        scores.append([(error**2).mean(), abs(error).mean(), np.nanmean(r)])
    return list(np.mean(scores, axis=0))


def as_published(sdata: SpatialData, truth: AnnData) -> AnnData:
    """Put the measured sections and the truth into the units of the paper; returns the truth."""
    genes = list(sdata.tables["stack"].var_names)
    counts = truth[:, genes].layers["counts"].toarray() + 1.0
    truth = truth[:, genes].copy()
    truth.X = np.log(counts / counts.sum(axis=1, keepdims=True))
    for key in [key for key in sdata.tables if key.endswith("_counts")]:
        table = sdata.tables[key]
        names = [f"{key.removesuffix('_counts')}_{i}" for i in table.obs["instance_id"]]
        sdata.tables[key] = table[:, genes].copy()
        sdata.tables[key].X = truth[names].X
    si.pp.select_genes(sdata, genes=genes, log_normalized=True)
    return truth


def coverage(sdata: SpatialData, truth: AnnData, model: si.models.AsignModel) -> pd.DataFrame:
    """Share of true values within 90 % intervals, by unmeasured section.

    For measurements of the depth that is expected, and with what no one knows beforehand, the depth of each spot.
    """
    table = sdata.tables["stack"]
    counts = pd.Series(np.asarray(truth.layers["counts"].sum(axis=1)).ravel(), index=truth.obs_names)
    table.obs["true_depth"] = counts.reindex(table.obs_names).fillna(counts.median())  # a few spots have no counts
    found = {"in 90 % intervals": si.metrics.evaluate(sdata, truth, layers="asign", by="section")["coverage"]}
    si.tl.impute_3d(sdata, model, depth="true_depth")
    found["at the true depth"] = si.metrics.evaluate(sdata, truth, layers="asign", by="section")["coverage"]
    found = pd.DataFrame(found).droplevel("layer")
    section = table.obs["section"].astype(str).reindex(counts.index)
    return found.assign(**{"median counts": counts.groupby(section).median()})


def paired_intervals(genes: pd.DataFrame) -> pd.DataFrame:
    """Mean difference in correlation to each baseline, with its 95 % interval over genes."""
    rows = {}
    for method in genes.columns.drop("asign"):
        difference = (genes["asign"] - genes[method]).to_numpy()
        low, high = bootstrap_interval(difference)
        rows[method] = {"difference": np.nanmean(difference), "low": low, "high": high}
    return pd.DataFrame(rows).T


if __name__ == "__main__":
    main()
