"""The table of registered pairs."""

from __future__ import annotations

import numpy as np
import pytest

import spatial_impute as si


def test_sections_placed_by_hand_are_no_pairs(stack):
    si.tl.register_stack(stack, transformations={"s0": np.eye(3), "s2": np.eye(3)})
    table = si.metrics.registration_quality(stack)
    assert table.empty
    assert table.index.names == ["fixed", "moving"]
    assert table[["dice_after", "score", "verdict"]].shape == (0, 3)


def test_columns_are_those_of_a_registered_pair(prepared, stack):
    si.tl.register_stack(stack, transformations={"s0": np.eye(3), "s2": np.eye(3)})
    registered = si.metrics.registration_quality(prepared)
    assert list(si.metrics.registration_quality(stack).columns) == list(registered.columns)


def test_a_stack_that_is_not_registered_says_what_to_call(stack):
    with pytest.raises(KeyError, match=r"not registered. Run `si.tl.register_stack\(sdata\)` first"):
        si.metrics.registration_quality(stack)
