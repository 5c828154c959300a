"""The whole path on the synthetic stack with its truth, on shuffled data, and on real tissue."""

from __future__ import annotations

import copy

import numpy as np
import pytest

import spatial_impute as si

PROPAGATION = ["mean", "nearest", "knn", "kernel", "propagation"]


@pytest.fixture(scope="module")
def scores(prepared, synthetic):
    """Mean correlation per kind of gene (rows: method), and the imputed table."""
    sdata = copy.deepcopy(prepared)
    for method in [*PROPAGATION, "ridge", "cokriging"]:
        si.tl.impute_baseline(sdata, method)
    si.tl.impute_3d(sdata, si.tl.fit_asign(sdata, model_params={"n_steps": 60}))
    by_gene = si.metrics.evaluate(sdata, synthetic[1], by="gene")
    kind = synthetic[1].var.loc[by_gene.index, "kind"]
    return by_gene.groupby(kind.to_numpy()).mean().T, sdata.tables["stack"], kind


def test_registration_error_is_below_half_a_spot_radius(prepared, synthetic):
    table = prepared.tables["stack"]
    true = synthetic[1][table.obs_names].obsm["spatial_3d"][:, :2]
    error = np.linalg.norm(table.obsm["spatial_3d"][:, :2] - true, axis=1)
    for section in table.obs["section"].unique():
        assert np.median(error[table.obs["section"] == section]) < 25.0


def test_asign_beats_every_propagation_on_texture_genes(scores):
    r = scores[0]["texture"]
    propagated = r[[f"baseline_{m}" for m in PROPAGATION]].max()
    assert r["asign"] > propagated + 0.2
    assert r["asign"] > 0.85


def test_asign_equals_the_best_baseline_within_a_hundredth(scores):
    for kind in ("smooth", "texture"):
        r = scores[0][kind]
        assert r["asign"] >= r.drop("asign").max() - 0.01


def test_noise_genes_are_not_predicted_and_marked(scores):
    r, table, kind = scores
    assert abs(r.loc["asign", "noise"]) < 0.12  # 12 genes on 2 sections: a standard error of 0.02
    trust = table.var["imputation_r"].groupby(kind.to_numpy()).mean()
    assert abs(trust["noise"]) < 0.15
    assert trust["smooth"] > 0.85
    assert trust["texture"] > 0.75


def test_nothing_is_found_in_shuffled_expression(negative_control):
    model = si.tl.fit_asign(negative_control, model_params={"n_steps": 30})
    assert abs(model.predictability.mean()) < 0.1
    assert model.cross_validation.loc["asign", "skill"] < 0.03
    result = si.tl.impute_3d(negative_control, model, inplace=False)
    known = result.obs["measured"].to_numpy()
    # What cannot be predicted is left at the mean.
    assert result.X[~known].std(axis=0).mean() < 0.3 * result.X[known].std(axis=0).mean()


@pytest.mark.slow
def test_her2st_reaches_its_bars(data_dir):
    sdata, truth = si.datasets.her2st("C", measured=["C4"], truth=True)
    si.tl.register_stack(sdata)
    quality = si.metrics.registration_quality(sdata)
    assert (quality["verdict"] == "ok").all()
    assert (quality["dice_after"] > 0.97).all()
    si.pp.extract_features(sdata)
    si.tl.build_3d_graph(sdata)
    for method in PROPAGATION:
        si.tl.impute_baseline(sdata, method)
    si.tl.impute_3d(sdata, si.tl.fit_asign(sdata, model_params={"n_steps": 40}))
    r = si.metrics.evaluate(sdata, truth)["pearson_gene"]
    assert r["baseline_mean"] == 0
    assert r["baseline_kernel"] >= 0.21
    assert r["asign"] > r[[f"baseline_{m}" for m in PROPAGATION]].max() + 0.02
    assert r["asign"] >= 0.275
