"""Every public object says what it takes, gives, writes and refuses, with units, shapes and an example."""

from __future__ import annotations

import ast
import builtins
import inspect
import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

import spatial_impute as si

NAMESPACES = ["datasets", "metrics", "models", "pl", "pp", "tl"]
PUBLIC = [(ns, name, getattr(getattr(si, ns), name)) for ns in NAMESPACES for name in getattr(si, ns).__all__]
FUNCTIONS = [pytest.param(f, id=f"{ns}.{name}") for ns, name, f in PUBLIC if inspect.isfunction(f)]
CLASSES = [pytest.param(c, id=f"{ns}.{name}") for ns, name, c in PUBLIC if inspect.isclass(c)]
DATA_MODEL = Path(__file__).parents[1] / "docs" / "data_model.md"
SECTIONS = ["Parameters", "Returns", "Raises", "Examples"]
# Parameters that hold a length, an area or a pixel size.
LENGTHS = (
    r"(mpp|.*_um|.*spacing|z|.*diameter|.*radius|spot_pitch|extent|max_shift|elastic_amplitude|.*_amplitude|resolution)"
)


def sections(doc: str) -> dict[str, str]:
    """Title and text of each numpydoc section."""
    parts = re.split(r"^(\w[\w ]*)\n-{3,}\n", doc, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def written_by() -> dict[str, list[str]]:
    """Function to the keys that the data model says it writes."""
    rows = [line.split("|") for line in DATA_MODEL.read_text().splitlines() if line.startswith("| {func}")]
    found = {}
    for _, functions, _, writes, _ in rows:
        for function in re.findall(r"spatial_impute\.(\w+\.\w+)`", functions):
            found[function] = re.findall(
                r"`(?:obs|var|obsm|obsp|uns|layers|images|labels|tables)\[\"([^\"]+)\"\]`", writes
            )
    return found


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_have_all_sections_in_order(function):
    found = [title for title in sections(inspect.getdoc(function)) if title in SECTIONS]
    assert found == SECTIONS


@pytest.mark.parametrize("function", FUNCTIONS)
def test_errors_are_named_and_explained(function):
    named = re.findall(r"^(\w+)\n    +\S", sections(inspect.getdoc(function))["Raises"], flags=re.MULTILINE)
    assert named
    assert all(issubclass(getattr(builtins, name), Exception) for name in named)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_examples_can_be_run_or_point_to_one(function):
    text = sections(inspect.getdoc(function))["Examples"]
    assert ">>> import spatial_impute as si" in text or re.search(r"See :func:`[\w~.]+`", text)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_lengths_have_units(function):
    text = sections(inspect.getdoc(function))["Parameters"]
    for names, about in re.findall(r"^(\w[\w, ]*)\n((?:(?:    .*)?\n?)+)", text, flags=re.MULTILINE):
        if any(re.fullmatch(LENGTHS, name) for name in names.split(", ")):
            assert re.search(r"\bum\b|\bmicromet", about, flags=re.IGNORECASE), names


@pytest.mark.parametrize(("function", "keys"), [pytest.param(*item, id=item[0]) for item in written_by().items()])
def test_keys_of_the_data_model_are_in_the_docstring(function, keys):
    namespace, name = function.split(".")
    text = inspect.getdoc(getattr(getattr(si, namespace), name))
    for key in keys:
        assert re.sub(r"^\{(section|image|shapes|key)\}_", "", key) in text, f"{function} writes {key}"


@pytest.mark.parametrize("cls", CLASSES)
def test_classes_have_an_example_and_documented_fields(cls):
    assert "Examples\n--------" in inspect.getdoc(cls)
    if is_dataclass(cls):
        source = inspect.getsource(cls)
        for name in (field.name for field in fields(cls) if not field.name.startswith("_")):
            assert re.search(rf'^    {name}: .*\n    """', source, flags=re.MULTILINE), name


def test_summaries_are_noun_phrases_or_imperatives():
    """No docstring of the package begins with a question word."""
    asking = []
    for path in Path(si.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                first = (ast.get_docstring(node) or "").split(" ")[0]
                if first in {"What", "Whether", "How", "Where", "Which", "Who", "When"}:
                    asking.append(f"{path.name}: {getattr(node, 'name', 'module')}")
    assert not asking
