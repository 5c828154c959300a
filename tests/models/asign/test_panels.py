"""Sections measured with different gene panels."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import spatial_impute as si
from spatial_impute._stack.spots import read_spots
from spatial_impute.models.asign._panels import by_panel

SMALL = {"n_steps": 5, "width": 8, "n_heads": 2, "n_folds": 2}


@pytest.fixture(scope="module")
def two_panels(small_two_measured):
    """Sections s0 and s2 are measured; s0 lacks the last three of nine genes, s2 the first three."""
    sdata = copy.deepcopy(small_two_measured)
    genes = list(sdata.tables["stack"].var_names)
    for name, own in {"s0": genes[:6], "s2": genes[3:]}.items():
        sdata.tables[f"{name}_counts"] = sdata.tables[f"{name}_counts"][:, own].copy()
    si.pp.select_genes(sdata, genes=genes, join="outer")
    return sdata


@pytest.fixture(scope="module")
def model(two_panels):
    return si.tl.fit_asign(two_panels, model_params=SMALL)


def test_select_genes_takes_those_of_any_panel_with_outer(two_panels):
    table = two_panels.tables["stack"]
    present = pd.DataFrame(np.isfinite(table.layers["measured"])).groupby(table.obs["section"].to_numpy()).all()
    assert present.loc["s0"].tolist() == [True] * 6 + [False] * 3
    assert present.loc["s2"].tolist() == [False] * 3 + [True] * 6
    again = copy.deepcopy(two_panels)
    si.pp.select_genes(again, n_top_genes=100, join="outer")
    assert set(again.tables["stack"].var_names) == set(table.var_names)
    si.pp.select_genes(again, n_top_genes=100)
    assert set(again.tables["stack"].var_names) == set(table.var_names[3:6])
    with pytest.raises(KeyError, match=r"3 of `genes` are not measured on section 's0'.*pass `join="):
        si.pp.select_genes(again, genes=list(table.var_names))
    with pytest.raises(KeyError, match="1 of `genes` are not measured on any section"):
        si.pp.select_genes(again, genes=["nothing"], join="outer")


def test_by_panel_gives_each_gene_the_spots_that_have_it(two_panels):
    spots = read_spots(two_panels)[1]
    parts = by_panel(spots)
    assert [columns.tolist() for columns, _ in parts] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert [sorted(set(part.section[part.known])) for _, part in parts] == [[0], [0, 2], [2]]
    assert all(np.isfinite(part.expression).all() for _, part in parts)
    whole = replace(spots, expression=np.nan_to_num(spots.expression))
    assert len(by_panel(whole)) == 1


def test_genes_are_imputed_on_sections_that_lack_them(two_panels, model):
    sdata = copy.deepcopy(two_panels)
    si.tl.impute_3d(sdata, model)
    si.tl.impute_baseline(sdata, "kernel")
    table = sdata.tables["stack"]
    measured = table.layers["measured"]
    there = np.isfinite(measured)
    for key in ("asign", "baseline_kernel"):
        assert np.isfinite(table.layers[key]).all()
        np.testing.assert_array_equal(table.layers[key][there], measured[there])
    assert (table.layers["asign_sd"][there] == 0).all()
    assert (table.layers["asign_sd"][~there] > 0).all()


def test_a_panel_learns_from_its_own_sections_only(two_panels, model):
    """The genes of s0 alone come out the same if s2 was never measured."""
    sdata = copy.deepcopy(two_panels)
    genes = list(sdata.tables["stack"].var_names[:3])
    del sdata.tables["s2_counts"]
    alone = model.models[0]
    result = alone._impute(by_panel(read_spots(sdata)[1])[0][1])
    whole = si.tl.impute_3d(two_panels, model, inplace=False)
    np.testing.assert_array_equal(whole[:, genes].X, result.expression)
    assert alone.var_names == genes


def test_panels_report_like_one_model(model, tmp_path):
    assert list(model.predictability.index) == model.var_names == list(model.weights.index)
    n = [len(m.var_names) for m in model.models]
    expected = np.average([m.cross_validation.loc["asign", "mse"] for m in model.models], weights=n)
    assert model.cross_validation.loc["asign", "mse"] == pytest.approx(expected)
    assert set(model.history["panel"]) == {0, 1, 2}
    model.save(tmp_path / "m")
    again = si.models.AsignPanels.load(tmp_path / "m")
    pd.testing.assert_series_equal(again.predictability, model.predictability, check_names=False)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        model.save(tmp_path / "m")
    with pytest.raises(ValueError, match=r"holds class 'AsignPanels'.*expected 'AsignModel'"):
        si.models.AsignModel.load(tmp_path / "m")


def test_different_panels_are_refused_where_they_make_no_sense(two_panels, model):
    with pytest.raises(ValueError, match="Sections were measured with different genes"):
        si.tl.cross_validate(two_panels, ["mean"])
    with pytest.raises(ValueError, match="fitted one at a time"):
        si.tl.fit_asign([two_panels, two_panels], model_params=SMALL)
    with pytest.raises(ValueError, match="`start_from` is for sections that were measured with the same genes"):
        si.tl.fit_asign(two_panels, model_params=SMALL, start_from=model.models[0])


def test_single_missing_values_are_no_panel(two_panels):
    sdata = copy.deepcopy(two_panels)
    table = sdata.tables["stack"]
    row = np.flatnonzero(table.obs["measured"])[2]
    table.layers["measured"][row, 4] = np.nan
    with pytest.raises(ValueError, match=f"must be finite; the first that is not: '{table.obs_names[row]}'"):
        si.tl.impute_baseline(sdata, "mean")
