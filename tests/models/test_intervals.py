from __future__ import annotations

import numpy as np

import spatial_impute as si
from spatial_impute.models._intervals import held_out_spread, spread_by_support


def test_held_out_spread_covers_what_it_was_set_on():
    residuals = np.random.default_rng(0).exponential(size=(2000, 3)) * [1.0, 2.0, 5.0]
    inside = np.abs(residuals) <= 1.6449 * held_out_spread(residuals)
    np.testing.assert_allclose(inside.mean(axis=0), 0.9, atol=0.01)


def test_spread_grows_to_that_of_the_mean_where_nothing_arrives():
    found = spread_by_support(np.array([0.0, 0.25, 0.5, 1.0]), 0.5, np.array([1.0]), np.array([2.0]))[:, 0]
    assert (found[0], found[2], found[3]) == (2.0, 1.0, 1.0)
    assert 1.0 < found[1] < 2.0


def test_intervals_cover_unmeasured_sections(prepared_stack, truth, quick_params):
    model = si.tl.fit_asign(prepared_stack, model_params=quick_params)
    si.tl.impute_3d(prepared_stack, model)
    table = prepared_stack.tables["stack"]
    assert (table.layers["asign_sd"][table.obs["measured"]] == 0).all()
    rows = ~table.obs["measured"].to_numpy()
    true = truth[table.obs_names, table.var_names].X.toarray()[rows]
    inside = np.abs(true - table.layers["asign"][rows]) <= 1.645 * table.layers["asign_sd"][rows]
    assert 0.85 < inside.mean() < 0.95
