from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import spatial_impute as si
from spatial_impute._settings import logger
from spatial_impute.models._params import AsignParams
from spatial_impute.models.asign._fit import fit
from spatial_impute.models.asign._graph_inputs import GeneScale, with_components
from spatial_impute.models.asign._training import FitSettings, _folds, make_episode
from spatial_impute.tl._read_spots import read_spots

SMALL = {"n_steps": 10, "width": 16, "n_heads": 2, "n_folds": 3}


@pytest.fixture(scope="module")
def spots(small_prepared):
    return with_components(read_spots(small_prepared)[1])


@pytest.fixture(scope="module")
def model(small_prepared):
    return si.tl.fit_asign(small_prepared, model_params=SMALL)


def test_labels_of_held_out_spots_reach_no_input(spots):
    """Neither directly nor through the propagated labels of their neighbours."""
    params = AsignParams(**SMALL)
    fold = _folds(spots, params, 0)[0]
    changed = spots.expression.copy()
    changed[fold[spots.known]] = 99.0
    n_genes = spots.expression.shape[1]
    genes = GeneScale(torch.zeros(n_genes), torch.ones(n_genes))
    for mask_of in (lambda s: fold, lambda s: _folds(s.hide(fold), params, 0)[0]):
        episodes = []
        for s in (spots, replace(spots, expression=changed)):
            mask = mask_of(s)
            source = s if mask is fold else s.hide(fold)
            episodes.append(make_episode(source, mask, np.ones(source.known.sum()), genes, params))
        for name, a in vars(episodes[0].inputs).items():
            assert torch.equal(a, getattr(episodes[1].inputs, name)), name


def test_held_out_and_trained_spots_are_apart(spots):
    params = AsignParams(**SMALL)
    for fold in _folds(spots, params, 0):
        inner = _folds(spots.hide(fold), params, 0)
        covered = np.sum(inner, axis=0)
        assert not (covered.astype(bool) & fold).any()
        np.testing.assert_array_equal(covered, (spots.known & ~fold).astype(int))


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
        *("network", "asign"),
    }
    assert model.cross_validation.loc["mean", "skill"] == 0
    errors = model.cross_validation["mse"]
    assert errors["asign"] <= errors.drop("asign").min()


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
def test_fit_on_several_stacks_and_several_sections(small_prepared, caplog, monkeypatch):
    both = [copy.deepcopy(small_prepared), copy.deepcopy(small_prepared)]
    model = si.tl.fit_asign(both, model_params=SMALL)
    assert model.config["n_measured_spots"] == [int(both[0].tables["stack"].obs["measured"].sum())] * 2

    sdata = si.datasets.synthetic_stack(3, extent=1400.0, n_genes=9, measured=["s0", "s2"])
    si.tl.register_stack(sdata, method="rigid", on_failure="warn")  # the fit is tested here, not the pose
    si.pp.extract_features(sdata)
    si.tl.build_3d_graph(sdata)
    model = si.tl.fit_asign(sdata, model_params=SMALL)
    assert model.config["sections"] == [["s0", "s2"]]
    assert len(model._networks) == 2  # each measured section is held out once
    assert model._tensors["whole_sections"].item()  # so that it shows how depth is predicted elsewhere
    # Un-measured afterwards, a section is still in the model.
    sdata.tables["stack"].obs.loc[sdata.tables["stack"].obs["section"] == "s2", "measured"] = False
    caplog.clear()
    monkeypatch.setattr(logger, "propagate", True)
    si.tl.impute_3d(sdata, model)
    assert any("['s2'], which are not measured here" in record.getMessage() for record in caplog.records)
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
    with pytest.raises(ValueError, match=r"loss became nan|finite"):
        fit([broken], ["g"] * spots.expression.shape[1], FitSettings(params, seed=0, device="cpu"))


def test_paper_parameters_are_the_published_ones():
    paper = AsignParams.paper()
    assert (paper.n_graph_layers, paper.n_heads, paper.width) == (3, 8, 1024)


def test_checkpoint_takes_up_what_was_trained(small_prepared, model, tmp_path, monkeypatch):
    from spatial_impute.models.asign import _training

    train, calls = _training.train, []

    def stops_at_the_third(*args, **kwargs):
        calls.append(kwargs["seed"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    monkeypatch.setattr(_training, "train", stops_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        si.tl.fit_asign(small_prepared, model_params=SMALL, checkpoint=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["network0.safetensors", "network1.safetensors"]
    again = si.tl.fit_asign(small_prepared, model_params=SMALL, checkpoint=tmp_path)
    assert calls[3:] == [2]
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
    kept = model.history.query("kept and network == 0")["held_out_mse"].item()
    assert first == pytest.approx(kept, rel=1e-4)
    assert base >= kept
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


def test_large_stacks_are_learned_from_regions_and_imputed_whole(small_stack, monkeypatch):
    from spatial_impute.models import _spots
    from spatial_impute.models.asign import _cokriging, _network, _training

    known = int(small_stack.tables["stack"].obs["measured"].sum())
    monkeypatch.setattr(_training, "_MAX_KNOWN", 2 * known // 3)
    monkeypatch.setattr(_spots, "_N_REGIONS", 1)
    monkeypatch.setattr(_network, "_SPOTS_AT_A_TIME", 50)
    for name, size in {"_MAX_FIT": 30, "_MAX_EXACT": 40, "_TILE_KNOWN": 20, "_TILE_NEAR": 30}.items():
        monkeypatch.setattr(_cokriging, name, size)
    seen = []
    original = _training.with_components
    monkeypatch.setattr(_training, "with_components", lambda spots: seen.append(spots) or original(spots))
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


def test_a_model_that_lacks_a_part_is_refused_when_loaded(model, tmp_path):
    """As one saved by a version that did not have it."""
    incomplete = copy.copy(model)
    incomplete._tensors = {key: value for key, value in model._tensors.items() if key != "whole_sections"}
    incomplete.save(tmp_path / "model")
    with pytest.raises(ValueError, match="do not fit their configuration"):
        si.models.AsignModel.load(tmp_path / "model")
