"""What stands in the rows of spots that were not measured must not reach any output, not by one bit."""

from __future__ import annotations

import copy

import numpy as np
import pytest

import spatial_impute as si

FILLS = ["nan", "zero", "noise", "counts", "inf", "copied"]
BASELINES = ["cokriging", "kernel", "knn", "mean", "nearest", "propagation", "ridge"]


def fill(sdata, how: str):
    """Copy of a stack with other values in the rows that were not measured."""
    sdata = copy.deepcopy(sdata)
    table = sdata.tables["stack"]
    rows = ~table.obs["measured"].to_numpy()
    shape = (rows.sum(), table.n_vars)
    rng = np.random.default_rng(7)
    measured = table.layers["measured"][~rows]
    values = {
        "nan": lambda: np.full(shape, np.nan),
        "zero": lambda: np.zeros(shape),
        "noise": lambda: rng.normal(3, 5, shape),
        "counts": lambda: rng.poisson(100, shape),
        "inf": lambda: np.full(shape, np.inf),
        "copied": lambda: measured[rng.integers(0, len(measured), len(table))[rows]],
    }[how]()
    table.layers["measured"][rows] = values
    return sdata


def identical(a: np.ndarray, b: np.ndarray) -> bool:
    """Bit for bit, NaN included."""
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def fitted(sdata, params):
    model = si.tl.fit_asign(sdata, model_params=params, seed=0)
    si.tl.impute_3d(sdata, model)
    return model, sdata.tables["stack"]


@pytest.fixture(scope="module")
def clean(small_prepared, quick_params):
    """Outputs with NaN where nothing was measured."""
    sdata = fill(small_prepared, "nan")
    for method in BASELINES:
        si.tl.impute_baseline(sdata, method)
    return fitted(sdata, quick_params)


def test_fill_changes_what_it_should(small_prepared):
    table = small_prepared.tables["stack"]
    known = table.obs["measured"].to_numpy()
    assert 0 < known.sum() < len(known)
    for how in FILLS[1:]:
        values = fill(small_prepared, how).tables["stack"].layers["measured"]
        assert identical(values[known], table.layers["measured"][known])
        assert not np.isnan(values[~known]).any()


@pytest.mark.parametrize("how", FILLS)
def test_build_3d_graph_never_sees_expression(small_prepared, how):
    sdata = fill(small_prepared, how)
    si.tl.build_3d_graph(sdata)
    for key, expected in small_prepared.tables["stack"].obsp.items():
        found = sdata.tables["stack"].obsp[key]
        assert identical(found.data, expected.data)
        assert identical(found.indices, expected.indices)
        assert identical(found.indptr, expected.indptr)


@pytest.mark.parametrize("how", FILLS)
@pytest.mark.parametrize("method", BASELINES)
def test_impute_baseline_never_sees_unmeasured_rows(small_prepared, clean, method, how):
    sdata = fill(small_prepared, how)
    si.tl.impute_baseline(sdata, method)
    key = f"baseline_{method}"
    assert identical(sdata.tables["stack"].layers[key], clean[1].layers[key])


@pytest.mark.parametrize("how", ["zero", "noise", "inf"])
def test_fit_asign_never_sees_unmeasured_rows(small_prepared, clean, quick_params, how):
    expected, table = clean
    model, found = fitted(fill(small_prepared, how), quick_params)
    assert identical(found.layers["asign"], table.layers["asign"])
    assert identical(found.obs["imputation_support"].to_numpy(), table.obs["imputation_support"].to_numpy())
    assert identical(found.var["imputation_r"].to_numpy(), table.var["imputation_r"].to_numpy())
    assert identical(model.predictability.to_numpy(), expected.predictability.to_numpy())
    assert identical(model.cross_validation.to_numpy(float), expected.cross_validation.to_numpy(float))
    assert identical(model.history.to_numpy(float), expected.history.to_numpy(float))


@pytest.mark.parametrize("how", FILLS[1:])
def test_impute_3d_never_sees_unmeasured_rows(small_prepared, clean, how):
    """The same model on a stack with something else in those rows."""
    model, table = clean
    result = si.tl.impute_3d(fill(small_prepared, how), model, inplace=False)
    assert identical(result.X, table.layers["asign"])
    assert identical(result.obs["imputation_support"].to_numpy(), table.obs["imputation_support"].to_numpy())


def test_a_change_of_measured_rows_does_reach_the_output(small_prepared, clean, quick_params):
    """So that the tests above cannot pass for the wrong reason."""
    sdata = copy.deepcopy(small_prepared)
    table = sdata.tables["stack"]
    rows = np.flatnonzero(table.obs["measured"])
    table.layers["measured"][rows[0]] += 0.5
    for method in BASELINES:
        si.tl.impute_baseline(sdata, method)
        assert not identical(table.layers[f"baseline_{method}"], clean[1].layers[f"baseline_{method}"]), method
    _, found = fitted(sdata, quick_params)
    assert not identical(found.layers["asign"], clean[1].layers["asign"])


def test_fit_asign_is_deterministic(small_prepared, clean, quick_params):
    _, found = fitted(copy.deepcopy(small_prepared), quick_params)
    assert identical(found.layers["asign"], clean[1].layers["asign"])


def test_held_out_block_cannot_see_itself(small_prepared, quick_params):
    """Scores of cross-validation do not know the spots they score: noise that depends on nothing scores about 0."""
    sdata = copy.deepcopy(small_prepared)
    table = sdata.tables["stack"]
    rows = np.flatnonzero(table.obs["measured"])
    table.layers["measured"][rows] = np.random.default_rng(0).normal(2, 1, (len(rows), table.n_vars))
    model = si.tl.fit_asign(sdata, model_params=quick_params)
    assert model.cross_validation["skill"].max() < 0.1
    assert abs(model.predictability.mean()) < 0.25
