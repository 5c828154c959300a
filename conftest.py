"""Surroundings of the examples of docstrings: a folder of their own, and no image registered twice."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import joblib
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

_REGISTERED: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def _surroundings_of_an_example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not isinstance(request.node, pytest.DoctestItem):
        return
    from spatial_impute._registration import chain

    monkeypatch.chdir(request.getfixturevalue("tmp_path"))  # some examples write files
    monkeypatch.setattr(chain, "register_pair", _remembered(chain.register_pair))


def _remembered(register_pair: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a memory: nearly all examples register the same synthetic stack, which takes most of their time."""

    def remembered(*args: Any, **options: Any) -> Any:
        key = joblib.hash((args, options))
        if key not in _REGISTERED:
            _REGISTERED[key] = register_pair(*args, **options)
        return copy.deepcopy(_REGISTERED[key])

    return remembered
