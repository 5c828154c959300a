"""PixNet at the spots of a stack, and as a base of ASIGN."""

from __future__ import annotations

import copy

import numpy as np
import pytest

import spatial_impute as si
from spatial_impute._keys import Keys
from spatial_impute._scores import pearson_by_gene

FOLDS = {"n_folds": 2}


@pytest.fixture(scope="module")
def with_base(small_prepared, octaves, pixnet_params):
    """Small stack with the predictions of PixNet, on the folds of a quick ASIGN. Shared: never write to it."""
    sdata = copy.deepcopy(small_prepared)
    si.tl.impute_pixnet(sdata, encoder=octaves, model_params=pixnet_params | {"n_steps": 0}, **FOLDS)
    return sdata


def impute(sdata, octaves, pixnet_params):
    si.tl.impute_pixnet(sdata, encoder=octaves, model_params=pixnet_params | {"n_steps": 0}, **FOLDS)
    return sdata.tables["stack"].layers["pixnet"]


def test_unmeasured_spots_are_those_of_the_model_of_all_measured(with_base, octaves, pixnet_params):
    table = with_base.tables["stack"]
    model = si.tl.fit_pixnet(
        with_base, "s1_image", "s1_spots", encoder=octaves, model_params=pixnet_params | {"n_steps": 0}
    )
    found = si.tl.predict_regions(with_base, "s2_spots", model, inplace=False)
    rows = [f"s2_{i}" for i in found.obs["instance_id"]]
    np.testing.assert_array_equal(table[rows].layers["pixnet"], found.X)
    np.testing.assert_array_equal(table.X, table.layers["pixnet"])
    assert table.uns["X_layer"] == "pixnet"
    known = table.obs["measured"].to_numpy(bool)
    fold = table.obs["pixnet_fold"].to_numpy()
    assert set(fold[known]) == {0, 1}
    assert set(fold[~known]) == {-1}
    seen = si.tl.predict_regions(with_base, "s1_spots", model, inplace=False)
    rows = [f"s1_{i}" for i in seen.obs["instance_id"]]
    assert not np.allclose(table[rows].layers["pixnet"], seen.X, atol=1e-3)  # those models had not seen them


def test_no_spot_is_predicted_by_a_model_that_saw_it(small_stack, with_base, octaves, pixnet_params):
    """Another expression in one fold changes what is predicted everywhere but there."""
    expected = with_base.tables["stack"]
    rows = np.flatnonzero(expected.obs["pixnet_fold"] == 0)
    small_stack.tables["stack"].layers["measured"][rows] *= np.random.default_rng(0).uniform(0.5, 2, (len(rows), 1))
    found = impute(small_stack, octaves, pixnet_params)
    same = (found == expected.layers["pixnet"]).all(axis=1)
    assert same[rows].all()
    assert not same[np.setdiff1d(np.arange(len(same)), rows)].any()


@pytest.mark.parametrize("how", ["zero", "inf"])
def test_impute_pixnet_never_sees_unmeasured_rows(small_stack, with_base, octaves, pixnet_params, how):
    table = small_stack.tables["stack"]
    table.layers["measured"][~table.obs["measured"].to_numpy(bool)] = {"zero": 0.0, "inf": np.inf}[how]
    np.testing.assert_array_equal(
        impute(small_stack, octaves, pixnet_params), with_base.tables["stack"].layers["pixnet"]
    )


def test_asign_takes_pixnet_up_as_a_base(with_base, quick_params, tmp_path):
    sdata = copy.deepcopy(with_base)
    model = si.tl.fit_asign(sdata, base_layers=["pixnet"], model_params=quick_params)
    assert "pixnet" in model.weights
    assert "pixnet" in model.cross_validation.index
    known = sdata.tables["stack"].obs["measured"].to_numpy(bool)
    table = sdata.tables["stack"][known]
    folds = table.obs["pixnet_fold"].to_numpy()
    scores = pearson_by_gene(table.layers["pixnet"], table.layers["measured"], folds)
    assert model.cross_validation.loc["pixnet", "pearson_gene"] == pytest.approx(np.nanmean(scores), abs=1e-6)
    model.save(tmp_path / "model")
    si.tl.impute_3d(sdata, si.models.AsignModel.load(tmp_path / "model"))
    layers = sdata.tables["stack"].layers
    expected = layers["asign"].copy()
    layers["pixnet"] = layers["pixnet"] + 1.0
    si.tl.impute_3d(sdata, model)
    change = (layers["asign"] - expected)[~known].mean(axis=0)
    np.testing.assert_allclose(change, model.weights["pixnet"], atol=1e-4)
    del layers["pixnet"]
    with pytest.raises(KeyError, match="impute_pixnet"):
        si.tl.impute_3d(sdata, model)


def test_a_base_of_another_image_is_reported(with_base, quick_params, caplog, monkeypatch):
    monkeypatch.setattr("spatial_impute._settings.logger.propagate", True)
    sdata = copy.deepcopy(with_base)
    states = sdata.tables["stack"].uns["pixnet"]["state"]
    states["images"] = {**states["images"], "s0": "0123456789abcdef"}
    model = si.tl.fit_asign(sdata, base_layers=["pixnet"], model_params=quick_params)
    said = "`layers['pixnet']` was imputed from other image of section 's0' than the table has now"
    assert said in caplog.text
    caplog.clear()
    si.tl.impute_3d(sdata, model)
    assert said in caplog.text


def test_asign_without_bases_is_what_it_was(with_base, small_prepared, quick_params):
    a, b = (si.tl.fit_asign(s, model_params=quick_params).weights for s in (with_base, small_prepared))
    np.testing.assert_array_equal(a, b)


def test_bases_must_be_held_out_as_asign_hides(with_base, quick_params):
    sdata = copy.deepcopy(with_base)
    table = sdata.tables["stack"]

    def fit(name="pixnet", **params):
        si.tl.fit_asign(sdata, base_layers=[name], model_params=quick_params | params)

    with pytest.raises(ValueError, match=r"other folds .* than ASIGN hides. Run `si.tl.impute_pixnet.*n_folds=3"):
        fit(n_folds=3)
    table.layers["mine"] = table.layers["pixnet"]
    with pytest.raises(ValueError, match="Nothing says how measured spots were held out"):
        fit("mine")
    with pytest.raises(KeyError, match=r"`si\.tl\.impute_pixnet"):
        fit("yours")
    table.layers["ridge"] = table.layers["pixnet"]
    with pytest.raises(ValueError, match="'ridge', which ASIGN has already"):
        fit("ridge")
    table.layers["measured"][np.flatnonzero(table.obs["measured"])[0]] += 0.5
    with pytest.raises(ValueError, match="other measured expression than the present one"):
        fit()


def test_impute_pixnet_refuses_counts(small_stack, octaves):
    with pytest.raises(ValueError, match="for counts"):
        si.tl.impute_pixnet(small_stack, encoder=octaves, model_params={"loss": "poisson"})
    assert Keys.PIXNET not in small_stack.tables["stack"].layers
