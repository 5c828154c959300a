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
    assert {"verdict", "reasons"} <= set(table.columns)


def test_a_stack_that_is_not_registered_says_what_to_call(stack):
    with pytest.raises(KeyError, match=r"not registered. Run `si.tl.register_stack\(sdata\)` first"):
        si.metrics.registration_quality(stack)
