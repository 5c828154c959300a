from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import spatial_impute as si
from spatial_impute.models._spots import Spots
from spatial_impute.models.asign._blend import (
    expected_noise,
    held_out_noise,
    held_out_spread,
    noise_elsewhere,
    spot_scale,
    spread_by_support,
)


def test_held_out_spread_covers_what_it_was_set_on():
    residuals = np.random.default_rng(0).exponential(size=(2000, 3)) * [1.0, 2.0, 5.0]
    inside = np.abs(residuals) <= 1.6449 * held_out_spread(residuals, n_blocks=2000)
    np.testing.assert_allclose(inside.mean(axis=0), 0.9, atol=0.01)


def test_intervals_hold_for_the_block_to_come_where_neighbors_are_off_together():
    rng = np.random.default_rng(0)
    n_blocks, size, repeats = 20, 4, 4000
    held_out = 0.8 * rng.normal(size=(n_blocks, 1, repeats)) + 0.6 * rng.normal(size=(n_blocks, size, repeats))
    held_out = held_out.reshape(n_blocks * size, repeats)
    to_come = np.abs(rng.normal(size=repeats))

    def covered(n: int) -> float:
        return float((to_come <= 1.6449 * held_out_spread(held_out, n_blocks=n)).mean())

    assert 0.9 <= covered(n_blocks) <= 0.94
    assert covered(len(held_out)) < 0.9  # as if spots were independent


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
    # Spots right over measured ones are predicted a little better than blocks that are held out.
    assert 0.87 < inside.mean() < 0.97


def test_intervals_are_for_measurements_of_the_depth_that_is_requested(prepared_stack, quick_params):
    model = si.tl.fit_asign(prepared_stack, model_params=quick_params)
    si.tl.impute_3d(prepared_stack, model)
    table = prepared_stack.tables["stack"]
    measured = table.obs["measured"].to_numpy()
    values, sd = table.layers["asign"].copy(), table.layers["asign_sd"].copy()
    expected = table.obs["imputation_depth"].copy()
    counts = table.obs["total_counts"].to_numpy()[measured]
    np.testing.assert_allclose(expected[measured], counts, rtol=1e-6)
    assert (expected[~measured] > counts.min() / 3).all()
    assert (expected[~measured] < counts.max() * 3).all()
    assert table.uns["asign"]["depth"] == "expected"

    model._tensors["noise"][1:] = 0.5  # counting is half of what is off
    half, tenth = (si.tl.impute_3d(prepared_stack, model, depth=n, inplace=False) for n in (500, 100.0))
    assert (half.obs["imputation_depth"].to_numpy()[~measured] == 500).all()
    assert half.uns["asign"]["depth"] == 500
    np.testing.assert_array_equal(half.X, values)
    ratio = spot_scale(np.array([1 / 100, 1 / 500]), model._tensors["noise"].numpy())
    found = tenth.layers["asign_sd"][~measured] / half.layers["asign_sd"][~measured]
    np.testing.assert_allclose(found, ratio[0] / ratio[1], rtol=1e-5)

    model = si.tl.fit_asign(prepared_stack, model_params=quick_params)
    table.obs["hoped"] = expected.where(~measured)  # what measured spots have is known
    si.tl.impute_3d(prepared_stack, model, depth="hoped")
    np.testing.assert_allclose(table.layers["asign_sd"], sd, rtol=1e-5)
    assert table.uns["asign"]["depth"] == "hoped"


def lattice_with_depth() -> Spots:
    """Two sections over each other, the first known; depth falls from left to right by a factor of 20."""
    x, y = (a.ravel() for a in np.meshgrid(np.arange(14.0), np.arange(14.0)))
    plane = np.column_stack([x, y])
    xyz = np.concatenate([np.column_stack([plane + 0.3 * k, np.full(len(x), 0.1 * k)]) for k in (0, 1)])
    depth = 10_000 * np.exp(-xyz[:, 0] / 14 * np.log(20))
    known = np.repeat([True, False], len(x))
    rng = np.random.default_rng(0)
    return Spots(
        xyz=100 * xyz,
        section=np.repeat([0, 1], len(x)),
        known=known,
        expression=rng.normal(size=(len(x), 5)),
        spacing=100.0,
        total_counts=depth[known] * rng.lognormal(sigma=0.2, size=len(x)),
    )


def test_expected_noise_follows_depth_to_spots_without_counts():
    spots = lattice_with_depth()
    true = np.exp(spots.xyz[:, 0] / 1400 * np.log(20)) / 10_000
    found = expected_noise(spots)
    assert np.abs(np.log(found / true))[~spots.known].max() < 0.4
    assert np.isnan(expected_noise(replace(spots, total_counts=None))).all()


def test_depth_is_half_believed_where_no_section_was_held_out(prepared_stack, quick_params):
    spots = lattice_with_depth()
    noise = expected_noise(spots)
    found = noise_elsewhere(spots, noise, 3e-4)
    np.testing.assert_array_equal(found[spots.known], noise[spots.known])
    np.testing.assert_allclose(found[~spots.known], (noise[~spots.known] + 3e-4) / 2)
    partly = noise_elsewhere(replace(spots, known=np.ones(len(noise), dtype=bool)), noise, 3e-4)
    np.testing.assert_array_equal(partly, noise)

    model = si.tl.fit_asign(prepared_stack, model_params=quick_params)  # one measured section
    rows = ~prepared_stack.tables["stack"].obs["measured"].to_numpy()
    halves = 1 / si.tl.impute_3d(prepared_stack, model, inplace=False).obs["imputation_depth"].to_numpy()[rows]
    model._tensors["whole_sections"][:] = True
    whole = 1 / si.tl.impute_3d(prepared_stack, model, inplace=False).obs["imputation_depth"].to_numpy()[rows]
    np.testing.assert_allclose(halves, (whole + float(model._tensors["noise"][0])) / 2, rtol=1e-5)


def test_held_out_noise_does_not_see_the_own_fold():
    spots = lattice_with_depth()
    folds = [spots.known & (spots.xyz[:, 0] < 650), spots.known & (spots.xyz[:, 0] >= 650)]
    totals = spots.total_counts.copy()
    totals[folds[0][spots.known]] *= np.random.default_rng(1).lognormal(size=int(folds[0].sum()))
    before, after = held_out_noise(spots, folds), held_out_noise(replace(spots, total_counts=totals), folds)
    own = folds[0][spots.known]
    np.testing.assert_array_equal(before[own], after[own])
    assert (before[~own] != after[~own]).all()


def test_spot_scale_is_wider_where_counts_are_few():
    scale = spot_scale(np.array([1e-4, 4e-4]), np.array([1e-4, 0.5, 0.5]))
    np.testing.assert_allclose(scale, np.sqrt([1.0, 2.5]))


@pytest.mark.parametrize(("noise", "usual"), [(np.nan, 1e-4), (1e-4, np.nan), (np.nan, np.nan)])
def test_spot_scale_is_the_usual_one_where_depth_is_not_known(noise, usual):
    """A model may be fitted on counts and used on values without them, or the other way round."""
    assert spot_scale(np.array([noise]), np.array([usual, 0.6, 0.4])) == pytest.approx([1.0])
