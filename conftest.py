"""Surroundings of the examples of docstrings: a folder of their own, and no stack made or registered twice."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import joblib
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

_MADE: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def _surroundings_of_an_example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not isinstance(request.node, pytest.DoctestItem):
        return
    monkeypatch.chdir(request.getfixturevalue("tmp_path"))  # some examples write files
    request.getfixturevalue("remembered_stacks")


@pytest.fixture
def remembered_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make and register a synthetic stack once per process, whatever the number of examples and pages that show it."""
    from spatial_impute import datasets
    from spatial_impute._registration import chain

    monkeypatch.setattr(datasets, "synthetic_stack", _remembered(datasets.synthetic_stack))
    monkeypatch.setattr(chain, "register_pair", _remembered(chain.register_pair))


def _remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a memory."""

    def remembered(*args: Any, **options: Any) -> Any:
        key = joblib.hash((function.__name__, args, options))
        if key not in _MADE:
            _MADE[key] = function(*args, **options)
        return copy.deepcopy(_MADE[key])

    return remembered
