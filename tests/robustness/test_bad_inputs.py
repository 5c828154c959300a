"""Every odd input gets a named answer before any work, and leaves the object as it was."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from bad_inputs import table
from bad_inputs.cases import CASES

import spatial_impute as si

PAGE = Path(__file__).parents[2] / "docs" / "bad_inputs.md"

# What costs time or writes; none of it may begin before the input has been checked.
WORK = [
    "spatial_impute.models.asign._fit.fit",
    "spatial_impute.models.pixnet._fit.fit",
    "spatial_impute.models.asign._model.AsignModel._impute",
    "spatial_impute.models.pixnet._model.PixNetModel._read_regions",
    "spatial_impute.models.pixnet._tiles.DenseJob.compute",
    "spatial_impute.encoders._tokens.section_tokens",
    "spatial_impute.models.asign._fit.predict_held_out",
    "spatial_impute.tl._build_3d_graph.build_graph",
    "spatial_impute.tl._register_stack.register_chain",
]


def forbid_work(monkeypatch):
    def begun(*args, **kwargs):
        pytest.fail("the work began before the input was checked")

    for place in WORK:
        importlib.import_module(place.rsplit(".", 2 if place.rsplit(".", 2)[-2][0].isupper() else 1)[0])
        monkeypatch.setattr(place, begun)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.function} {c.given}".replace(" ", "-"))
def test_bad_input(case, world, fingerprint):
    case.change(world)
    if case.error is None:
        found = case.call(world)
        assert case.check(world, found)
        return
    if not case.while_working:
        forbid_work(world.patch)
    before = fingerprint(world.sdata)
    with pytest.raises(case.error, match=re.escape(case.says)) as caught:
        case.call(world)
    assert type(caught.value) is case.error
    assert fingerprint(world.sdata) == before


def test_cases_cover_every_public_function():
    """Plots are tested with the plots."""
    named = {case.function for case in CASES}
    public = {f"{ns}.{f}" for ns in ("pp", "tl", "metrics", "datasets") for f in getattr(si, ns).__all__}
    assert public <= named
    assert len(CASES) >= 60
    assert len({(case.function, case.given) for case in CASES}) == len(CASES)


def test_page_shows_the_list():
    page = PAGE.read_text()
    assert table(CASES) in page, "run `python tests/robustness/bad_inputs/write.py`"
