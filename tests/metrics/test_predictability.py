from __future__ import annotations

import numpy as np
import pytest

import spatial_impute as si


def test_smooth_genes_follow_place_texture_genes_the_image_and_noise_nothing(prepared, truth):
    found = si.metrics.predictability(prepared)
    kind = truth.var["kind"].reindex(found.index)
    by_kind = found.groupby(kind.to_numpy()).mean()
    assert by_kind.loc["smooth", "position"] > 0.5
    assert by_kind.loc["texture", "image"] > by_kind.loc["texture", "position"] + 0.2
    assert by_kind.loc["noise"].abs().max() < 0.15
    assert found.max(axis=1).is_monotonic_decreasing


def test_nothing_is_found_in_shuffled_expression(negative_control):
    found = si.metrics.predictability(negative_control)
    n = int(negative_control.tables["stack"].obs["measured"].sum())
    assert (found.mean().abs() < 2 / np.sqrt(n)).all()


def test_own_value_has_no_part_and_unmeasured_spots_none_either(prepared_stack):
    before = si.metrics.predictability(prepared_stack, n_neighs=1)
    table = prepared_stack.tables["stack"]
    assert (before.loc[[name for name in before.index if name.startswith("noise")]].abs() < 0.4).all(axis=None)
    table.layers["measured"][~table.obs["measured"].to_numpy()] = 7.0
    np.testing.assert_array_equal(si.metrics.predictability(prepared_stack, n_neighs=1), before)


def test_too_many_neighbors_are_refused(small_stack):
    with pytest.raises(ValueError, match="`n_neighs` must be below the number of measured spots"):
        si.metrics.predictability(small_stack, n_neighs=10_000)
    with pytest.raises(ValueError, match="`n_neighs` must be a whole number"):
        si.metrics.predictability(small_stack, n_neighs=0)
