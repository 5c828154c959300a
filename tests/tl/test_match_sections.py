"""Matched sections in the stack table."""

from __future__ import annotations

import copy

import numpy as np
import pytest

import spatial_impute as si


@pytest.fixture(scope="module")
def stack(quick_search):
    """Four measured sections; the second lies higher in half of the genes. Shared: never write to its table."""
    sdata = si.datasets.synthetic_stack(5, measured=["s0", "s1", "s2", "s4"], extent=1400.0, n_genes=9)
    si.tl.register_stack(sdata, method="rigid", registration_params=quick_search)
    table = sdata.tables["stack"]
    own = (table.obs["section"] == "s1").to_numpy() & table.obs["measured"].to_numpy()
    table.layers["measured"][np.ix_(own, np.arange(0, 9, 2))] += 1.5
    si.tl.match_sections(sdata)
    return sdata


def test_matching_is_used_where_it_predicts_held_out_sections_better(stack):
    table = stack.tables["stack"]
    record = table.uns["matched"]
    assert record["used"]
    assert record["r_matched"] > record["r_as_measured"]
    assert record["sections"] == ["s0", "s1", "s2", "s4"]
    shift = table.varm["matched_shift"]
    assert shift.shape == (9, 4)
    assert (shift[::2, 1] > 0.8).all()
    assert np.abs(shift[1::2, 1]).max() < 0.5
    known = table.obs["measured"].to_numpy()
    assert np.isfinite(table.layers["matched"][known]).all()
    assert np.isnan(table.layers["matched"][~known]).all()


def test_matched_sections_can_be_imputed_from_and_are_not_scored(stack, tmp_path):
    si.tl.impute_baseline(stack, "kernel", layer="matched")
    table = stack.tables["stack"]
    known = table.obs["measured"].to_numpy()
    np.testing.assert_allclose(table.layers["baseline_kernel"][known], table.layers["matched"][known], rtol=1e-6)
    table.copy().write_h5ad(tmp_path / "t.h5ad")
    truth = si.datasets.synthetic_stack(5, measured=["s0", "s1", "s2", "s4"], extent=1400.0, n_genes=9, truth=True)[1]
    assert list(si.metrics.evaluate(stack, truth).index) == ["baseline_kernel"]


def test_a_match_of_an_earlier_measurement_is_reported(stack, caplog, monkeypatch):
    from spatial_impute._settings import logger

    sdata = copy.deepcopy(stack)
    monkeypatch.setattr(logger, "propagate", True)
    si.tl.impute_baseline(sdata, "mean", layer="matched")
    assert "Match it again" not in caplog.text
    sdata.tables["stack"].layers["measured"] *= 2
    si.tl.impute_baseline(sdata, "mean", layer="matched")
    assert (
        "`layers['matched']` was matched from other measured expression or names of genes than the table has now. Match it again."
        in caplog.text
    )


def test_sections_that_agree_may_stay_as_they_are(stack, monkeypatch):
    from spatial_impute.tl import _match_sections

    found = iter([0.5, 0.4])
    monkeypatch.setattr(_match_sections, "_held_out_r", lambda spots, prepare: next(found))
    si.tl.match_sections(stack, key_added="again")
    table = stack.tables["stack"]
    assert not table.uns["again"]["used"]
    np.testing.assert_array_equal(
        table.layers["again"][table.obs["measured"]], table.layers["measured"][table.obs["measured"]]
    )


def test_a_held_out_section_has_no_part_in_the_match_that_it_judges(stack, monkeypatch):
    from spatial_impute.models.asign._baselines import METHODS
    from spatial_impute.models.asign._predictions import Table
    from spatial_impute.tl import _match_sections

    original, matched, predicted = _match_sections.match_measured, [], []

    def match(spots):
        matched.append(set(spots.section[spots.known]))
        return original(spots)

    def kernel(spots):
        predicted.append(set(spots.section[spots.known]))
        return Table(np.random.default_rng(0).normal(size=(len(spots.known), spots.expression.shape[1])))

    monkeypatch.setattr(_match_sections, "match_measured", match)
    monkeypatch.setitem(METHODS, "kernel", kernel)
    monkeypatch.setitem(METHODS, "cokriging", kernel)
    si.tl.match_sections(stack, key_added="again")
    everything = {0, 1, 2, 4}
    assert matched == [everything, *(everything - {code} for code in sorted(everything))]
    assert predicted[-4:] == matched[1:]


def test_two_sections_stay_as_they_are(small_two_measured, caplog, monkeypatch):
    from spatial_impute._settings import logger

    sdata = copy.deepcopy(small_two_measured)
    monkeypatch.setattr(logger, "propagate", True)
    si.tl.match_sections(sdata)
    record = sdata.tables["stack"].uns["matched"]
    assert not record["used"]
    assert record["r_matched"] == record["r_as_measured"]
    assert "cannot show whether matching helps, so they keep their values" in caplog.text
