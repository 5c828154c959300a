from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import spatial_impute as si
from spatial_impute import _scores
from spatial_impute._expression import gene_blocks
from spatial_impute._graph import EdgeRules, build_graph
from spatial_impute._scores import HALF_WIDTH, pearson_by_gene
from spatial_impute._settings import logger
from spatial_impute._stack.spots import read_spots
from spatial_impute.models._params import AsignParams
from spatial_impute.models._spots import Spots
from spatial_impute.models.asign import _blend, _ensemble, _predictions
from spatial_impute.models.asign._ensemble import FitSettings, NetworkFit, TrainingSet
from spatial_impute.models.asign._fit import _krige_folds, fit
from spatial_impute.models.asign._graph_inputs import LabelPredictions, nested_predictions, with_components
from spatial_impute.models.asign._training import TrainingRun, regimes, train

SMALL = {"n_steps": 10, "width": 16, "n_heads": 2, "n_folds": 3, "dropout": 0.2}


@pytest.fixture(scope="module")
def spots(small_prepared):
    return with_components(read_spots(small_prepared)[1])


@pytest.fixture(scope="module")
def model(small_prepared):
    return si.tl.fit_asign(small_prepared, model_params=SMALL)


def networks_of(spots, params: AsignParams, base: str = "cokriging") -> NetworkFit:
    data = TrainingSet.from_stacks([spots], params, 0)
    n_genes = spots.expression.shape[1]
    kriged = _krige_folds(data, lambda: None)

    def nested(i: int, k: int) -> LabelPredictions:
        rest, groups = data.rest(i, k)
        graph = data.graphs[i].hide(data.folds[i][k][spots.known])
        return nested_predictions(rest, graph, groups, base, kriged[i][k][:1])

    return NetworkFit(
        name=base,
        data=data,
        single=[],
        nested=nested,
        weights=[np.ones(int(spots.known.sum()))],
        group=torch.zeros(n_genes, dtype=torch.long),
        settings=FitSettings(params, 0, "cpu"),
    )


@pytest.mark.parametrize("base", ["mean", "propagation", "cokriging"])
def test_labels_of_held_out_spots_reach_no_batch(spots, base):
    """Neither as inputs, nor through the base, the propagated labels, or the scale of the genes."""
    params = AsignParams(**SMALL)
    fold = TrainingSet.from_stacks([spots], params, 0).folds[0][0]
    changed = spots.expression.copy()
    changed[fold[spots.known]] = 99.0
    pair = [networks_of(s, params, base)._batches(0) for s in (spots, replace(spots, expression=changed))]
    for before, after in zip(*pair, strict=True):
        assert before.inputs.reach == after.inputs.reach
        for part in ("target", "labels"):
            for name, values in vars(getattr(before, part)).items():
                assert torch.equal(values, getattr(getattr(after, part), name)), name


def test_held_out_and_trained_spots_are_apart(spots):
    params = AsignParams(**SMALL)
    fit = networks_of(spots, params)
    data = fit.data
    for k, fold in enumerate(data.folds[0]):
        rest, groups = data.rest(0, k)
        assert not (rest.known & fold).any()
        assert len(groups) == rest.known.sum()
        assert len(np.unique(groups)) == len(data.folds[0]) - 1
        assert sum(batch.inputs.n_predicted for batch in fit._batches(k)) == rest.known.sum()


def test_networks_of_all_spots_see_each_spot_as_often_as_those_of_the_folds(small_prepared, monkeypatch):
    """The number of steps was chosen on the folds; all spots can be more batches, of which a step sees one."""
    seen = []

    def counted(build, batches, held_out, params, **options):
        seen.append((params.n_steps / len(batches), len(held_out)))
        return train(build, batches, held_out, params, **options)

    _, spots = read_spots(small_prepared)
    monkeypatch.setattr(_ensemble, "_BATCH", int(spots.known.sum()) - 1)  # one batch without a fold, two of all
    monkeypatch.setattr(_ensemble, "train", counted)
    si.tl.fit_asign(small_prepared, model_params=SMALL | {"n_folds": 2, "base": "mean"})
    of_folds, of_all = ([visits for visits, n in seen if bool(n) == is_fold] for is_fold in (True, False))
    assert {*of_folds} == {*of_all} == {SMALL["n_steps"]}


@pytest.mark.parametrize(("n_stacks", "options"), [(1, {"n_folds": 5}), (1, {"n_folds": 2, "base": "mean"}), (2, {})])
def test_progress_of_each_stage_ends_at_its_total(n_stacks, options):
    """There is one candidate for the settings, so nothing is left out."""
    stages = []

    def progress(total, stage):
        stages.append([stage, total, 0])

        def on_step(own=stages[-1]):
            own[2] += 1

        return on_step

    stacks = [random_stack(seed)[0] for seed in range(n_stacks)]
    given = {"dropout": 0.2, "weight_decay": 0.1, "learning_rate": 1e-3, "n_steps": 4, "width": 16}
    params = AsignParams(**given, **options)
    fit(stacks, ["own", "around", "noise"], FitSettings(params, 0, "cpu", progress=progress))
    names = [stage for stage, *_ in stages]
    assert names[0] == "baselines"
    assert names.count("networks") == 1 + (n_stacks > 1)  # stacks without a measured section have networks of their own
    for stage, total, n in stages:
        assert n == total > 0 or (stage == "networks" and n < total)  # no networks of all spots where none are used


def run_of(errors: list[float]) -> TrainingRun:
    return TrainingRun({}, [{"step": i, "loss": 0.0, "held_out_mse": e} for i, e in enumerate(errors)], [])


def test_regime_is_chosen_by_the_error_at_its_end_on_hidden_folds(spots, monkeypatch):
    monkeypatch.setattr(_ensemble, "_FEW", 0)  # all regimes are tried
    fit = networks_of(spots, AsignParams(width=16, n_heads=2, n_folds=3))
    assert len(regimes(fit.settings.params)) == 3
    steady, early, poor = run_of([1.0, 0.9, 0.8]), run_of([1.0, 0.5, 0.9]), run_of([1.0, 1.1])
    assert fit.best_regime({(0, 0): early, (1, 0): steady, (2, 0): poor}, [0]) == 1
    runs = {(0, 0): steady, (0, 1): steady, (1, 0): early, (1, 1): run_of([1.0, 0.5])}
    assert fit.best_regime(runs, [0]) == 0
    assert fit.best_regime(runs, [0, 1]) == 1  # .7 against .8


def test_regime_that_is_worse_on_the_first_fold_is_tried_no_further(spots, monkeypatch):
    monkeypatch.setattr(_ensemble, "_FEW", 0)  # all regimes are tried
    fit = networks_of(spots, AsignParams(width=16, n_heads=2, n_folds=3))
    errors = {"network0-0": 0.8, "network1-0": 0.9, "network0-1": 0.85, "network1-1": 0.1}
    monkeypatch.setattr(NetworkFit, "_batches", lambda *_: [])
    monkeypatch.setattr(NetworkFit, "_held_out", lambda *_: [])
    monkeypatch.setattr(NetworkFit, "_train_or_load", lambda self, name, *_, **__: run_of([1.0, errors[name]]))
    runs = fit.try_regimes()
    assert set(runs) == {(0, 0), (0, 1), (1, 0)}  # nor is a still freer one
    assert fit.best_regime(runs, [0, 1]) == 0


def test_trials_keep_only_the_predictions_that_a_choice_can_need(spots, monkeypatch):
    """With all genes, each of them takes tens of megabytes until the end of the fit."""
    monkeypatch.setattr(_ensemble, "_FEW", 0)  # all regimes are tried
    fit = networks_of(spots, AsignParams(width=16, n_heads=2, n_folds=3))
    errors = {"network0-0": 0.8, "network1-0": 0.85, "network0-1": 0.7, "network1-1": 0.9, "network0-2": 0.95}
    monkeypatch.setattr(NetworkFit, "_batches", lambda *_: [])
    monkeypatch.setattr(NetworkFit, "_held_out", lambda *_: [])

    def trained(self, name, *_, **__):
        return replace(run_of([1.0, errors[name]]), predictions=[torch.zeros(1)])

    monkeypatch.setattr(NetworkFit, "_train_or_load", trained)
    runs = fit.try_regimes()
    assert set(runs) == {(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)}
    # Both folds choose regime 1, and fold 1 alone, which chooses for fold 0, regime 0.
    assert {key for key, run in runs.items() if run.predictions} == {(0, 0), (1, 0), (1, 1)}
    assert [runs[key].errors[1] for key in ((0, 1), (2, 0))] == [0.85, 0.95]  # choices need the errors of all


def test_networks_are_used_only_if_training_helps_on_hidden_folds():
    helps, harms = run_of([1.0, 2.0, 0.9]), run_of([1.0, 0.5, 1.2])
    assert _ensemble._is_useful([helps])
    assert not _ensemble._is_useful([harms])
    assert not _ensemble._is_useful([helps, harms])  # by .1 on average


def test_settings_that_are_given_hold_for_all_regimes():
    assert len(regimes(AsignParams())) == 3
    assert {p.dropout for p in regimes(AsignParams(dropout=0.3))} == {0.3}
    assert len(regimes(AsignParams(dropout=0.3, weight_decay=0.0, learning_rate=1e-3, n_steps=5))) == 1


def test_fit_is_deterministic(small_prepared, model):
    again = si.tl.fit_asign(small_prepared, model_params=SMALL)
    for a, b in zip(model._networks, again._networks, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    np.testing.assert_array_equal(model.weights, again.weights)
    other = si.tl.fit_asign(small_prepared, model_params=SMALL, seed=1)
    assert not torch.equal(model._networks[0]["correction.weight"], other._networks[0]["correction.weight"])


def test_cross_validation_has_all_baselines_beside_the_model(model):
    assert set(model.cross_validation.index) == {
        *("mean", "nearest", "knn", "kernel", "propagation", "ridge", "transfer_ridge", "cokriging"),
        *("cokriging-two-views", "base", "network alone", "without network", "asign"),
    }
    assert model.cross_validation.loc["mean", "skill"] == 0
    errors = model.cross_validation["mse"]
    assert errors["asign"] <= 1.01 * errors.drop("asign").min()
    assert errors["base"] == errors[model.base]
    gain = model.cross_validation.loc["without network", ["gain_low", "gain", "gain_high"]]
    assert gain.is_monotonic_increasing
    r = model.cross_validation["pearson_gene"]
    assert gain["gain"] == pytest.approx(r["asign"] - r["without network"])


def test_impute_keeps_measurements_and_fills_all_others(small_stack, model):
    si.tl.impute_3d(small_stack, model)
    table = small_stack.tables["stack"]
    known = table.obs["measured"].to_numpy()
    np.testing.assert_array_equal(table.layers["asign"][known], table.layers["measured"][known])
    assert np.isfinite(table.layers["asign"]).all()
    support = table.obs["imputation_support"]
    assert (support[known] == 1).all()
    assert support[~known].between(0.01, 0.99).all()
    assert table.var["imputation_r"].between(-1, 1).all()
    assert table.uns["asign"]["measured_sections"] == ["s1"]


def test_impute_without_inplace_writes_nothing(small_stack, model):
    before = set(small_stack.tables["stack"].layers), set(small_stack.tables["stack"].obs)
    result = si.tl.impute_3d(small_stack, model, inplace=False)
    assert (set(small_stack.tables["stack"].layers), set(small_stack.tables["stack"].obs)) == before
    si.tl.impute_3d(small_stack, model)
    np.testing.assert_array_equal(result.X, small_stack.tables["stack"].layers["asign"])


def test_permuting_the_table_permutes_the_result(small_stack, model):
    from spatialdata.models import TableModel

    si.tl.impute_3d(small_stack, model)
    expected = small_stack.tables["stack"].to_df(layer="asign")
    order = np.random.default_rng(0).permutation(small_stack.tables["stack"].n_obs)
    shuffled = small_stack.tables["stack"][order].copy()
    del shuffled.layers["asign"]
    small_stack.tables["stack"] = TableModel.parse(shuffled)
    si.tl.impute_3d(small_stack, model)
    result = small_stack.tables["stack"].to_df(layer="asign")
    np.testing.assert_allclose(
        result.loc[expected.index], expected, atol=0.02
    )  # optimisers stop within their tolerance


def test_save_and_load_give_the_same_prediction(small_stack, model, tmp_path):
    model.save(tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    loaded = si.models.AsignModel.load(tmp_path / "model")
    a = si.tl.impute_3d(small_stack, model, inplace=False)
    b = si.tl.impute_3d(small_stack, loaded, inplace=False)
    np.testing.assert_array_equal(a.X, b.X)
    np.testing.assert_array_equal(a.var["imputation_r"], b.var["imputation_r"])
    assert loaded.params == model.params
    assert loaded.history.shape == model.history.shape
    np.testing.assert_allclose(loaded.cross_validation, model.cross_validation)


def test_a_model_of_expression_without_counts_can_be_loaded(small_stack, tmp_path):
    """Its usual counting noise is not known; everything else is a number."""
    del small_stack.tables["stack"].obs["total_counts"]
    fitted = si.tl.fit_asign(small_stack, model_params=SMALL | {"n_steps": 1})
    fitted.save(tmp_path / "m")
    assert si.models.AsignModel.load(tmp_path / "m").identity == fitted.identity
    fitted._tensors["noise"][1] = torch.nan
    fitted.save(tmp_path / "m", overwrite=True)
    with pytest.raises(ValueError, match=r"'model\.noise' has values that are NaN"):
        si.models.AsignModel.load(tmp_path / "m")


def test_save_refuses_to_replace(model, tmp_path):
    model.save(tmp_path / "model")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        model.save(tmp_path / "model")
    model.save(tmp_path / "model", overwrite=True)


def test_load_refuses_what_is_no_model(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        si.models.AsignModel.load(tmp_path)
    model.save(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())

    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        si.models.AsignModel.load(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"class": "Other"}))
    with pytest.raises(ValueError, match="expected 'AsignModel'"):
        si.models.AsignModel.load(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"n_features": 3}))
    with pytest.raises(ValueError, match="do not fit"):
        si.models.AsignModel.load(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\x80\x04K\x01.")  # a pickle
    with pytest.raises(ValueError, match="damaged"):
        si.models.AsignModel.load(tmp_path / "model")


@pytest.mark.filterwarnings("ignore")
def test_fit_on_several_stacks_and_several_sections(small_prepared, small_two_measured, caplog, monkeypatch):
    both = [copy.deepcopy(small_prepared), copy.deepcopy(small_prepared)]
    model = si.tl.fit_asign(both, model_params=SMALL)
    assert model.config["n_measured_spots"] == [int(both[0].tables["stack"].obs["measured"].sum())] * 2

    sdata = copy.deepcopy(small_two_measured)
    model = si.tl.fit_asign(sdata, model_params=SMALL)
    assert model.config["sections"] == [["s0", "s2"]]
    assert set(model.history["network"]) == {0, 1}  # each measured section is held out once
    assert model._tensors["whole_sections"].item()  # so that it shows how depth is predicted elsewhere
    # Un-measured afterwards, a section is still in the model.
    sdata.tables["stack"].obs.loc[sdata.tables["stack"].obs["section"] == "s2", "measured"] = False
    caplog.clear()
    monkeypatch.setattr(logger, "propagate", True)
    si.tl.impute_3d(sdata, model)
    assert any("['s2'], which are not measured now" in record.getMessage() for record in caplog.records)
    si.tl.impute_3d(sdata, model)
    assert np.isfinite(sdata.tables["stack"].layers["asign"]).all()


def test_unreachable_spots_are_flagged_and_still_imputed(small_stack, model):
    from scipy import sparse

    table = small_stack.tables["stack"]
    lonely = np.flatnonzero(~table.obs["measured"])[:3]
    keep = sparse.diags((~np.isin(np.arange(table.n_obs), lonely)).astype(np.float32))
    for key in list(table.obsp):
        table.obsp[key] = sparse.csr_matrix(keep @ table.obsp[key] @ keep)
    si.tl.impute_3d(small_stack, model)
    assert (table.obs["imputation_support"].iloc[lonely] == 0).all()
    assert np.isfinite(table.layers["asign"][lonely]).all()


def test_fit_refuses_bad_input(small_stack, model):
    table = small_stack.tables["stack"]
    with pytest.raises(TypeError, match="Unknown fields"):
        si.tl.fit_asign(small_stack, model_params={"depth": 3})
    with pytest.raises(ValueError, match="multiple of `n_heads`"):
        si.tl.fit_asign(small_stack, model_params={"width": 10, "n_heads": 4})
    with pytest.raises(ValueError, match="empty sequence"):
        si.tl.fit_asign([])
    measured = table.layers["measured"].copy()
    table.layers["measured"] = np.round(np.expm1(measured))
    with pytest.raises(ValueError, match="raw counts"):
        si.tl.fit_asign(small_stack)
    table.layers["measured"] = measured
    table.uns["features"]["encoder"] = "other"
    with pytest.raises(ValueError, match="encoder"):
        si.tl.impute_3d(small_stack, model)
    del table.obsm["X_spot"]
    with pytest.raises(KeyError, match="extract_features"):
        si.tl.fit_asign(small_stack)


def test_fit_stops_when_the_loss_is_not_finite(spots):
    params = AsignParams(**SMALL)
    broken = replace(spots, tokens=tuple(np.full_like(t, np.nan) for t in spots.tokens))
    with pytest.raises(ValueError, match=r"became nan"):
        fit([broken], ["g"] * spots.expression.shape[1], FitSettings(params, seed=0, device="cpu"))


def test_paper_parameters_are_the_published_ones():
    paper = AsignParams.paper()
    assert (paper.n_graph_layers, paper.n_heads, paper.width) == (3, 8, 1024)


def test_checkpoint_takes_up_what_was_trained(small_prepared, model, tmp_path, monkeypatch):
    from spatial_impute.models.asign import _ensemble

    train, calls = _ensemble.train, []

    def stops_at_the_third(*args, **kwargs):
        calls.append(kwargs["seed"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    monkeypatch.setattr(_ensemble, "train", stops_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        si.tl.fit_asign(small_prepared, model_params=SMALL, checkpoint=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    again = si.tl.fit_asign(small_prepared, model_params=SMALL, checkpoint=tmp_path)
    assert (
        len(calls[3:]) == len(list(tmp_path.glob("*.safetensors"))) - 2
    )  # those that were trained are not trained again
    pd.testing.assert_frame_equal(again.cross_validation, model.cross_validation)

    def same(a, b) -> bool:
        return all(torch.equal(x[key], y[key]) for x, y in zip(a._networks, b._networks, strict=True) for key in x)

    assert same(again, model)
    with pytest.raises(ValueError, match="belongs to another training"):
        si.tl.fit_asign(small_prepared, model_params=SMALL, checkpoint=tmp_path, seed=1)


def test_fine_tuning_starts_from_the_networks_of_a_model(small_prepared, model):
    tuned = si.tl.fit_asign(small_prepared, model_params=SMALL, start_from=model)
    first = tuned.history.query("step == 0 and network == 0")["held_out_mse"].item()
    base = model.history.query("step == 0 and network == 0")["held_out_mse"].item()
    assert first < base
    with pytest.raises(ValueError, match=r"`start_from` must have .*; \['width'\] differ \(model, wanted\)"):
        si.tl.fit_asign(small_prepared, model_params=SMALL | {"width": 128}, start_from=model)


def test_impute_says_what_it_rests_on(small_stack, model):
    si.tl.impute_3d(small_stack, model)
    table = small_stack.tables["stack"]
    source, known = table.obs["imputation_source"], table.obs["measured"].to_numpy()
    assert ((source == "measured") == known).all()
    assert ((source == "image") == (table.obs["imputation_support"] == 0)).all()
    assert table.var["imputable"].dtype == bool
    r = table.var["imputation_r"]
    assert r[table.var["imputable"]].min() > 0


def test_imputation_computes_on_the_device_that_is_requested(small_stack, model, monkeypatch):
    from spatial_impute.models.asign import _graph_inputs

    seen, original = [], _graph_inputs.krige
    monkeypatch.setattr(
        _graph_inputs, "krige", lambda spots, **options: seen.append(spots.device) or original(spots, **options)
    )
    found = si.tl.impute_3d(small_stack, model, device="cpu:0", inplace=False)
    assert seen
    assert set(seen) == {"cpu:0"}
    np.testing.assert_array_equal(found.X, si.tl.impute_3d(small_stack, model, device="cpu", inplace=False).X)


def test_large_stacks_are_learned_from_regions_and_imputed_whole(small_stack, monkeypatch):
    from spatial_impute.models import _spots
    from spatial_impute.models.asign import _cokriging, _ensemble, _network

    known = int(small_stack.tables["stack"].obs["measured"].sum())
    monkeypatch.setattr(_ensemble, "_MAX_KNOWN", 2 * known // 3)
    monkeypatch.setattr(_spots, "_N_REGIONS", 1)
    monkeypatch.setattr(_network, "_SPOTS_AT_A_TIME", 50)
    for name, size in {"_MAX_FIT": 30, "_MAX_EXACT": 40, "_TILE_KNOWN": 20, "_TILE_NEAR": 30}.items():
        monkeypatch.setattr(_cokriging, name, size)
    seen = []
    original = _ensemble.with_components
    monkeypatch.setattr(_ensemble, "with_components", lambda spots: seen.append(spots) or original(spots))
    model = si.tl.fit_asign(small_stack, model_params=SMALL | {"block_spacings": 1.0})
    assert len(seen) == 1
    assert 10 <= seen[0].known.sum() <= 2 * known // 3
    si.tl.impute_3d(small_stack, model)
    table = small_stack.tables["stack"]
    assert np.isfinite(table.layers["asign"]).all()
    assert np.isfinite(table.layers["asign_sd"]).all()
    rows = table.obs["measured"].to_numpy()
    np.testing.assert_allclose(table.layers["asign"][rows], table.layers["measured"][rows], rtol=1e-6)
    assert model.cross_validation.loc["asign", "skill"] > 0


def test_blocks_larger_than_the_regions_to_learn_from_are_refused(small_stack, monkeypatch):
    from spatial_impute.models.asign import _ensemble

    def one_fold(spots, **_options):
        return np.flatnonzero(~spots.known | (np.cumsum(spots.known) == 1))

    monkeypatch.setattr(_ensemble, "training_rows", one_fold)
    with pytest.raises(ValueError, match="Lower `block_spacings`"):
        si.tl.fit_asign(small_stack, model_params=SMALL)


def test_a_model_that_lacks_a_part_is_refused_when_loaded(model, tmp_path):
    """As one saved by a version that did not have it."""
    incomplete = copy.copy(model)
    incomplete._tensors = {key: value for key, value in model._tensors.items() if key != "whole_sections"}
    incomplete.save(tmp_path / "model")
    with pytest.raises(ValueError, match="do not fit their configuration"):
        si.models.AsignModel.load(tmp_path / "model")


@pytest.fixture(scope="module")
def cohort():
    """Three measured stacks, and one that is not measured."""
    stacks = []
    for seed in range(4):
        sdata = si.datasets.synthetic_stack(2, extent=1400.0, n_genes=9, seed=seed, max_rotation=0.0, max_shift=0.0)
        si.tl.register_stack(sdata, transformations={"s0": np.eye(3)})
        si.pp.extract_features(sdata)
        si.tl.build_3d_graph(sdata)
        stacks.append(sdata)
    bare = stacks[-1]
    for key in [key for key in bare.tables if key.endswith("_counts")]:
        del bare.tables[key]
    for section in bare.attrs["spatial_impute"]["stack"]["sections"]:
        section["counts"] = None
    bare.tables["stack"].obs["measured"] = False
    return stacks[:-1], bare


@pytest.fixture(scope="module")
def cohort_model(cohort):
    return si.tl.fit_asign(cohort[0], model_params=SMALL)


def random_stack(seed: int) -> tuple[Spots, np.ndarray]:
    """A section with random features, and genes that are: a feature, its mean over the neighbors, and noise alone."""
    rng = np.random.default_rng(seed)
    row, column = (index.ravel() for index in np.indices((14, 14)))
    xyz = np.column_stack([100.0 * (column + 0.5 * (row % 2)), 86.6 * row, 0.0 * row])
    features = rng.normal(size=(len(xyz), 4))
    section = np.zeros(len(xyz), dtype=int)
    rules = EdgeRules(
        n_neighs=6,
        n_cross_neighs=0,
        max_section_gap=0,
        max_distance=0.0,
        n_similar=0,
        similarity_threshold=0.5,
        similarity_weight=1.0,
        bandwidth=100.0,
    )
    graph = build_graph(xyz, section, np.full(len(xyz), 27.5), None, rules)
    around = sparse.diags(1 / graph.distances.getnnz(axis=1)) @ (graph.distances > 0) @ features
    truth = np.column_stack([features[:, 0], 2.4 * around[:, 1], 0 * features[:, 0]])
    edge = np.ones((graph.weights.nnz, 1))
    spots = Spots(
        xyz=xyz,
        section=section,
        known=np.ones(len(xyz), dtype=bool),
        expression=truth + 0.3 * rng.normal(size=truth.shape),
        spacing=100.0,
        features=features,
        graph=graph.weights,
        tokens=(features[:, None],) * 3,
        edge_features=edge * [0.6, 0.7, 0.0, 0.0, 1.0, 0.0],
        image_profile=np.stack([features.mean(axis=0), features.std(axis=0)]),
    )
    return spots, truth


def test_what_several_stacks_teach_holds_on_another_one():
    """The image of the spot by the base, that of its neighbors by the networks alone; nothing is found in noise."""
    stacks, truths = zip(*(random_stack(seed) for seed in range(4)), strict=True)
    params = AsignParams(width=32, dropout=0.2, weight_decay=0.05, learning_rate=3e-3, n_steps=25, n_folds=2)
    model = fit(stacks[:3], ["own", "around", "noise"], FitSettings(params, 0, "cpu"))
    bare = stacks[3].hide(stacks[3].known)
    found = model._impute(bare, parts=True)
    own, around, _ = pearson_by_gene(found.expression, truths[3])
    assert own > 0.97
    assert around > 0.7
    assert pearson_by_gene(found.parts["without network"], truths[3])[1] < 0.3
    assert model.cohort.predictable[["own", "around"]].all()
    inside = np.abs(found.expression - stacks[3].expression) <= HALF_WIDTH * found.sd
    assert inside.mean() > 0.85


@pytest.mark.filterwarnings("ignore")
def test_a_model_of_several_stacks_predicts_a_stack_without_measurement(cohort, cohort_model, tmp_path):
    bare, model = cohort[1], cohort_model
    scores = model.cohort.cross_validation
    assert list(scores.index) == ["mean", "ridge", "network alone", "asign", "without network", "base"]
    si.pp.select_genes(bare, genes=model.var_names)
    si.tl.impute_3d(bare, model)
    table = bare.tables["stack"]
    assert (table.obs["imputation_support"] == 0).all()
    assert (table.obs["imputation_source"] == "image").all()
    assert np.isfinite(table.layers["asign_sd"]).all()
    np.testing.assert_array_equal(table.var["imputation_r"], model.cohort.predictability)
    model.save(tmp_path / "model")
    again = si.tl.impute_3d(bare, si.models.AsignModel.load(tmp_path / "model"), inplace=False)
    np.testing.assert_array_equal(again.X, table.layers["asign"])


@pytest.mark.filterwarnings("ignore")
def test_images_unlike_those_of_the_training_are_named_and_intervals_widened(cohort, cohort_model, caplog, monkeypatch):
    bare, model = cohort[1], cohort_model
    before = si.tl.impute_3d(bare, model, inplace=False).layers["asign_sd"]
    monkeypatch.setattr(logger, "propagate", True)
    caplog.clear()
    strange = copy.deepcopy(bare)
    strange.tables["stack"].obsm["X_spot"] = strange.tables["stack"].obsm["X_spot"] * 3 + 10
    si.tl.build_3d_graph(strange)
    after = si.tl.impute_3d(strange, model, inplace=False).layers["asign_sd"]
    assert any("another tissue, stain or scanner" in record.getMessage() for record in caplog.records)
    assert (after > 2 * before).all()


def test_a_model_of_one_stack_refuses_a_stack_without_measurement(small_stack, model):
    small_stack.tables["stack"].obs["measured"] = False
    with pytest.raises(ValueError, match="No measured section"):
        si.tl.impute_3d(small_stack, model)


@pytest.mark.parametrize(
    ("genes", "problem"),
    [(slice(None, None, -1), "the order differs"), (slice(1, None), "1 are missing")],
)
def test_genes_must_be_those_of_the_model_in_their_order(small_stack, model, genes, problem):
    small_stack.tables["stack"] = small_stack.tables["stack"][:, genes].copy()
    with pytest.raises(KeyError, match=problem):
        si.tl.impute_3d(small_stack, model)


def test_results_do_not_depend_on_how_many_genes_and_spots_are_computed_at_a_time(small_prepared, model, monkeypatch):
    whole = si.tl.impute_3d(small_prepared, model, parts=True, inplace=False)
    monkeypatch.setattr(gene_blocks, "__defaults__", (3,))
    for module in (_blend, _predictions, _scores):
        monkeypatch.setattr(module, "_MAX_VALUES", 500)
    same = si.tl.fit_asign(small_prepared, model_params=SMALL)
    in_blocks = si.tl.impute_3d(small_prepared, same, parts=True, inplace=False)
    assert set(in_blocks.layers) == set(whole.layers)
    for name, values in whole.layers.items():
        np.testing.assert_allclose(in_blocks.layers[name], values, atol=1e-3, err_msg=name)
    np.testing.assert_allclose(same.predictability, model.predictability, atol=1e-3)
    np.testing.assert_allclose(same.cross_validation, model.cross_validation, atol=1e-3)
