"""Every promise of the docs has tests, and they exist."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from promises import PROMISES, table

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("test", sorted({test for promise in PROMISES for test in promise.tests}))
def test_tests_of_promises_exist(test):
    file, name = test.split("::")
    functions = [node for node in ast.parse((TESTS / file).read_text()).body if isinstance(node, ast.FunctionDef)]
    assert name in {function.name for function in functions}


def test_page_shows_the_promises():
    page = (TESTS.parent / "docs" / "tested.md").read_text()
    assert table(PROMISES) in page, "run `python tests/robustness/bad_inputs/write.py`"
