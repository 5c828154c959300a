"""Measured spots in the result: as measured, or as expected from the others."""

from __future__ import annotations

import numpy as np
import pytest

import spatial_impute as si
from spatial_impute._scores import morans_i, nearest_graph


@pytest.fixture(scope="module")
def model(small_prepared, quick_params):
    return si.tl.fit_asign(small_prepared, model_params=quick_params)


@pytest.fixture(scope="module")
def kept(small_prepared, model):
    return si.tl.impute_3d(small_prepared, model, parts=True, inplace=False)


@pytest.fixture(scope="module")
def denoised(small_prepared, model):
    return si.tl.impute_3d(small_prepared, model, measured="denoise", parts=True, inplace=False)


def test_denoise_does_not_depend_on_the_order_of_the_rows(small_stack, model, denoised):
    table = small_stack.tables["stack"]
    small_stack.tables["stack"] = table[np.random.default_rng(0).permutation(table.n_obs)].copy()
    found = si.tl.impute_3d(small_stack, model, measured="denoise", inplace=False)[denoised.obs_names]
    np.testing.assert_allclose(found.X, denoised.X, rtol=0, atol=1e-4)


def test_denoise_changes_measured_spots_alone(kept, denoised):
    known = kept.obs["measured"].to_numpy()
    assert not np.array_equal(kept.X[known], denoised.X[known])
    np.testing.assert_array_equal(kept.X[~known], denoised.X[~known])
    for name in kept.layers:
        np.testing.assert_array_equal(kept.layers[name][~known], denoised.layers[name][~known])
    for column in ("imputation_support", "imputation_depth"):
        np.testing.assert_array_equal(kept.obs[column][~known], denoised.obs[column][~known])
    assert (kept.obs["imputation_source"][known] == "measured").all()
    assert (denoised.obs["imputation_source"][known] == "labels and image").all()
    assert (denoised.layers["asign_sd"][known] > 0).all()
    assert (kept.layers["asign_sd"][known] == 0).all()
    assert denoised.uns["asign"]["measured"] == "denoise"


def test_own_measurement_has_no_part_in_the_denoised_value(small_stack, model, denoised):
    table = small_stack.tables["stack"]
    row = np.flatnonzero(table.obs["measured"])[7]
    table.layers["measured"][row] += 5.0
    again = si.tl.impute_3d(small_stack, model, measured="denoise", inplace=False)
    np.testing.assert_array_equal(again.X[row], denoised.X[row])
    assert not np.array_equal(again.X, denoised.X)  # it has one in those of its neighbors


def test_denoised_section_has_the_pattern_without_the_noise(denoised, kept):
    known = kept.obs["measured"].to_numpy()
    xy = kept.obsm["spatial"][known]
    smooth = [gene for gene in kept.var_names if gene.startswith("smooth")]
    graph = nearest_graph(xy)
    rough, calm = (morans_i(graph, found[known][:, smooth].X.astype(float)) for found in (kept, denoised))
    assert calm.mean() > rough.mean()
    r = [np.corrcoef(kept[known, g].X.ravel(), denoised[known, g].X.ravel())[0, 1] for g in smooth]
    assert np.mean(r) > 0.5


def test_scores_and_fits_read_the_measurement_and_not_the_denoised_values(small_stack, small_prepared, model):
    before = small_stack.tables["stack"].layers["measured"].copy()
    si.tl.impute_3d(small_stack, model, measured="denoise")
    np.testing.assert_array_equal(small_stack.tables["stack"].layers["measured"], before)
    scores = si.tl.cross_validate(small_stack, ["mean", "kernel"])
    plain = si.tl.cross_validate(small_prepared, ["mean", "kernel"])
    np.testing.assert_array_equal(scores["pearson_gene"], plain["pearson_gene"])


def test_unknown_way_is_refused_before_any_work(small_stack, model):
    with pytest.raises(ValueError, match=r"`measured` must be one of .*'denoise'.* found 'smooth'"):
        si.tl.impute_3d(small_stack, model, measured="smooth")
    assert "asign" not in small_stack.tables["stack"].layers
