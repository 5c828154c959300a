"""Folder for the examples of docstrings, some of which write files."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _own_folder_of_an_example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(request.node, pytest.DoctestItem):
        monkeypatch.chdir(request.getfixturevalue("tmp_path"))
