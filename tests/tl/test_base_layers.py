"""Predictions from elsewhere as bases of ASIGN."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
from anndata import AnnData

import spatial_impute as si

PARAMS = {"n_steps": 5, "width": 8, "n_heads": 2, "base": "mean", "n_folds": 3}
R = "pearson_gene"


def waves(shape, xy, seed):
    """Smooth patterns, one for each gene."""
    rng, total = np.random.default_rng(seed), np.zeros(shape)
    for _ in range(6):
        total += np.cos(xy @ rng.normal(size=(2, shape[1])) * 2 * np.pi / 1500 + rng.uniform(0, 6.3, shape[1]))
    return total / total.std(axis=0)


@pytest.fixture(scope="module")
def world(prepared, synthetic):
    """Stack with simulated outside predictions, and how to score a fit with one of them. Shared: never write to it."""
    sdata, truth = copy.deepcopy(prepared), synthetic[1]
    table = sdata.tables["stack"]
    true = truth[table.obs_names, table.var_names].X.toarray().astype(float)
    xy = table.obsm["spatial_3d"][:, :2]
    table.layers["good"] = (3 * (true + waves(true.shape, xy, 1) * true.std(axis=0)) + 5).astype(np.float32)
    table.layers["useless"] = waves(true.shape, xy, 2).astype(np.float32)
    table.layers["opposite"] = (-true).astype(np.float32)

    def fit(**base_layers):
        model = si.tl.fit_asign(sdata, base_layers=base_layers, model_params=PARAMS)
        found = copy.deepcopy(sdata)
        si.tl.impute_3d(found, model, parts=True)
        return model, si.metrics.evaluate(found, truth), found.tables["stack"]

    return SimpleNamespace(sdata=sdata, truth=truth, fit=fit, alone=fit())


def test_a_good_predictor_raises_r(world):
    model, scores, table = world.fit(good="independent")
    assert scores.loc["asign", R] > world.alone[1].loc["asign", R] + 0.1
    assert scores.loc["asign", R] > scores.loc["good", R] + 0.1
    assert model.cross_validation.loc["good", R] > 0.5
    assert scores.loc["asign_good", "mse"] < 0.01 * scores.loc["good", "mse"]  # recalibrated
    assert table.uns["asign"]["base_layers"] == {"good": "independent"}


@pytest.mark.parametrize("name", ["useless", "opposite"])
def test_a_useless_predictor_changes_nothing(world, name):
    model, scores, _ = world.fit(**{name: "independent"})
    assert abs(scores.loc["asign", R] - world.alone[1].loc["asign", R]) < 0.003
    assert abs(model.cross_validation.loc["asign", R] - world.alone[0].cross_validation.loc["asign", R]) < 0.003
    if name == "opposite":
        assert (model.weights[name] == 0).all()
        assert model.cross_validation.loc[name, R] == 0


def test_units_and_offsets_of_sections_do_not_count(world):
    expected = world.fit(good="independent")[2].layers["asign"]
    sdata = world.sdata
    layers, kept = sdata.tables["stack"].layers, sdata.tables["stack"].layers["good"]
    section = sdata.tables["stack"].obs["section"].cat.codes.to_numpy()
    layers["good"] = 7 * kept + np.float32(100) * section[:, None]
    np.testing.assert_allclose(world.fit(good="independent")[2].layers["asign"], expected, atol=2e-3)
    layers["good"] = kept


def test_genes_and_spots_may_be_absent(world, tmp_path):
    sdata = copy.deepcopy(world.sdata)
    table = sdata.tables["stack"]
    ids = [f"ENSG{i:011d}" for i in range(table.n_vars)]
    counts = sdata.tables[next(key for key in sdata.tables if key.endswith("_counts"))]
    counts.var["gene_ids"] = [dict(zip(table.var_names, ids, strict=True)).get(g, g) for g in counts.var_names]
    half = table.n_vars // 2
    given = AnnData(table.layers["good"][3:, :half], obs=table.obs[[]].iloc[3:])
    given.var_names = [f"{i}.2" for i in ids[:half]]
    si.tl.add_prediction(sdata, given, key_added="mine")
    assert np.isnan(table.layers["mine"][:3]).all()
    assert np.isnan(table.layers["mine"][:, half:]).all()
    np.testing.assert_array_equal(table.layers["mine"][3:, :half], given.X)
    model = si.tl.fit_asign(sdata, base_layers={"mine": "independent"}, model_params=PARAMS)
    assert (model.weights["mine"].iloc[half:] == 0).all()
    assert (model.weights["mine"].iloc[:half] > 0).mean() > 0.8
    model.save(tmp_path / "model")
    si.tl.impute_3d(sdata, si.models.AsignModel.load(tmp_path / "model"), measured="denoise")
    assert np.isfinite(table.layers["asign"]).all()
    table.layers["mine"][:3, :half] = 0.0
    assert np.isfinite(si.metrics.evaluate(sdata, world.truth, layers=["mine", "asign"]).loc["mine", R])


def test_cross_validation_compares_it_as_a_method(world):
    table = si.tl.cross_validate(
        world.sdata, ["mean", "asign"], base_layers={"good": "independent"}, n_folds=3, model_params=PARAMS
    )
    assert list(table.index) == ["mean", "asign", "good"]
    assert table.loc["asign", R] > table.loc["good", R] > 0.5
    with pytest.raises(ValueError, match="not declared 'independent'"):
        si.tl.cross_validate(world.sdata, ["mean"], base_layers={"good": "held_out"})


def test_the_measurement_is_never_independent(world):
    sdata = copy.deepcopy(world.sdata)
    table = sdata.tables["stack"]
    si.tl.impute_baseline(sdata, "kernel", key_added="mine")
    with pytest.raises(ValueError, match="was predicted from the measurement of this stack"):
        si.tl.fit_asign(sdata, base_layers={"mine": "independent"})
    table.layers["copy"] = table.layers["mine"]
    with pytest.raises(ValueError, match=r"equals `layers\['measured'\]` in 100%"):
        si.tl.fit_asign(sdata, base_layers={"copy": "independent"})
    with pytest.raises(ValueError, match=r"say so: `base_layers=\{'good': 'independent'\}`"):
        si.tl.fit_asign(sdata, base_layers=["good"])


def test_a_cohort_model_is_a_base_on_another_stack(small_stack, quick_params):
    stacks = [small_stack]
    for seed in (1, 2):
        sdata = si.datasets.synthetic_stack(2, extent=1400.0, n_genes=9, seed=seed, max_rotation=0.0, max_shift=0.0)
        si.tl.register_stack(sdata, transformations={"s0": np.eye(3)})
        si.pp.extract_features(sdata)
        si.tl.build_3d_graph(sdata)
        stacks.append(sdata)
    own = stacks[0]
    table = own.tables["stack"]
    model = si.tl.fit_asign(stacks[1:], model_params=quick_params)
    si.tl.impute_3d(own, model.cohort, key_added="cohort")
    before = table.layers["cohort"].copy()
    table.layers["measured"][table.obs["measured"]] += 1.0  # not read
    si.tl.impute_3d(own, model.cohort, key_added="cohort")
    np.testing.assert_array_equal(table.layers["cohort"], before)
    assert (table.obs["imputation_source"] == "image").all()
    table.layers["measured"][table.obs["measured"]] -= 1.0
    found = si.tl.fit_asign(own, base_layers={"cohort": "independent"}, model_params=quick_params)
    assert "cohort" in found.cross_validation.index
    si.tl.impute_3d(stacks[1], model.cohort, key_added="cohort")  # it has seen this one
    with pytest.raises(ValueError, match="fitted on the measurement of this stack"):
        si.tl.fit_asign(stacks[1], base_layers={"cohort": "independent"}, model_params=quick_params)


def test_add_prediction_takes_numbers_and_keeps_records_of_other_tools(small_stack):
    table = small_stack.tables["stack"]
    words = AnnData(np.full(table.shape, "2.0", object), obs=table.obs[[]], var=table.var[[]])
    with pytest.raises(ValueError, match=r"`prediction.X` must hold real numbers, found object"):
        si.tl.add_prediction(small_stack, words, key_added="mine")
    table.uns["pca"] = {"variance": np.ones(2)}
    numbers = AnnData(np.ones(table.shape), obs=table.obs[[]], var=table.var[[]])
    with pytest.raises(ValueError, match="`key_added='pca'` would write over data"):
        si.tl.add_prediction(small_stack, numbers, key_added="pca")
    assert "pca" in table.uns
    si.tl.impute_baseline(small_stack, "mean", key_added="gone")
    del table.layers["gone"]
    si.tl.add_prediction(small_stack, numbers, key_added="gone")
    assert "gone" not in table.uns  # the record of the layer that was deleted


def test_a_sparse_base_layer_is_refused_in_words(small_prepared):
    from scipy import sparse

    sdata = copy.deepcopy(small_prepared)
    table = sdata.tables["stack"]
    table.layers["mine"] = sparse.csr_matrix(np.random.default_rng(0).random(table.shape))
    with pytest.raises(ValueError, match="A base layer must be dense"):
        si.tl.fit_asign(sdata, base_layers={"mine": "independent"})


@pytest.mark.parametrize("key", ["features", "normalization", "X_layer", "spatialdata_attrs"])
def test_a_prediction_does_not_take_the_name_of_a_record(small_stack, key):
    table = small_stack.tables["stack"]
    with pytest.raises(ValueError, match="write over"):
        si.tl.add_prediction(small_stack, AnnData(np.ones((table.n_obs, 1)), obs=table.obs[[]]), key_added=key)


def test_a_gene_whose_id_is_that_of_another_one_is_not_joined_by_name():
    from spatial_impute.tl import _base_layers as module

    stack, found = AnnData(np.ones((1, 2))), AnnData(np.ones((1, 1)))
    stack.var_names, found.var_names, found.var["gene_ids"] = ["A", "B"], ["B"], ["ENSG1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_stack_ids", lambda _: {"A": "ENSG1", "B": "ENSG2"})
        assert module._columns(None, stack, found).tolist() == [0, -1]


def test_a_rescaled_measurement_is_not_independent(small_stack):
    table = small_stack.tables["stack"]
    leak = AnnData(2 * np.nan_to_num(table.layers["measured"]) + 1, obs=table.obs[[]], var=table.var[[]])
    si.tl.add_prediction(small_stack, leak, key_added="leak")
    with pytest.raises(ValueError, match=r"follows `layers\['measured'\]`"):
        si.tl.fit_asign(small_stack, base_layers={"leak": "independent"})


def test_add_prediction_refuses_what_is_no_prediction_and_names_of_other_slots(small_stack):
    table = small_stack.tables["stack"]
    with pytest.raises(TypeError, match="must be an AnnData"):
        si.tl.add_prediction(small_stack, table.to_df(layer="measured"), key_added="mine")
    table.layers["asign"] = table.layers["measured"].copy()
    with pytest.raises(ValueError, match="would write over data"):
        si.tl.add_prediction(small_stack, table.copy(), key_added="asign_sd")


@pytest.mark.parametrize("key", ["features", "normalization", "X_layer", "spatialdata_attrs"])
def test_no_result_takes_the_name_of_a_record(small_stack, key):
    for write in (si.tl.match_sections, si.tl.impute_pixnet):
        with pytest.raises(ValueError, match="would write over data"):
            write(small_stack, key_added=key)
    assert key in small_stack.tables["stack"].uns or key == "X_layer"


def test_x_follows_the_layer_that_it_shows(small_stack):
    table = small_stack.tables["stack"]
    si.tl.impute_baseline(small_stack, "mean", key_added="mine")
    table.layers["mine_sd"] = table.X.copy()
    given = AnnData(np.full(table.shape, 3.0), obs=table.obs[[]], var=table.var[[]])
    si.tl.add_prediction(small_stack, given, key_added="other")
    assert not (table.X == 3).any()
    si.tl.add_prediction(small_stack, given, key_added="mine")
    assert table.uns["X_layer"] == "mine"
    assert (table.X == 3).all()
    assert "mine_sd" not in table.layers
    assert table.X is not table.layers["mine"]


def test_a_base_layer_without_values_at_measured_spots_is_refused_and_a_changed_one_is_reported(
    world, caplog, monkeypatch
):
    from spatial_impute._settings import logger

    sdata = copy.deepcopy(world.sdata)
    table = sdata.tables["stack"]
    known = table.obs["measured"].to_numpy()
    table.layers["half"] = np.where(known[:, None], np.nan, table.layers["good"])
    with pytest.raises(ValueError, match=rf"`layers\['half'\]` holds no value at the {known.sum()} measured spots"):
        si.tl.fit_asign(sdata, base_layers={"half": "independent"})
    model = si.tl.fit_asign(sdata, base_layers={"good": "independent"}, model_params=PARAMS)
    monkeypatch.setattr(logger, "propagate", True)
    si.tl.impute_3d(sdata, model)
    assert "before these changed" not in caplog.text
    table.layers["good"] = table.layers["good"] * 2
    si.tl.impute_3d(sdata, model)
    assert "fitted on this stack before these changed: base layers" in caplog.text
