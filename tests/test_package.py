from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import spatial_impute as si
from spatial_impute._keys import Keys

NAMESPACES = ["datasets", "metrics", "models", "pl", "pp", "tl"]
SOURCE = Path(si.__file__).parent
SOURCE_FILES = sorted(SOURCE.rglob("*.py"))
HEAVY = ["anndata", "ants", "matplotlib", "scanpy", "spatialdata", "squidpy", "torch", "torch_geometric"]


def public_names() -> list[tuple[str, str]]:
    return [(ns, name) for ns in NAMESPACES for name in getattr(getattr(si, ns), "__all__", [])]


def public_objects(kind) -> list:
    found = [(ns, name, getattr(getattr(si, ns), name)) for ns, name in public_names()]
    return [pytest.param(ns, obj, id=f"{ns}.{name}") for ns, name, obj in found if kind(obj)]


def run_fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def documented_parameters(doc: str) -> set[str]:
    block = re.search(r"^Parameters\n-+\n(.*?)(?=^\w[\w ]*\n-+\n|\Z)", doc, flags=re.DOTALL | re.MULTILINE)
    if block is None:
        return set()
    heads = re.findall(r"^(\w+(?:, \w+)*)(?: : .*)?$", block.group(1), flags=re.MULTILINE)
    return {name for head in heads for name in head.split(", ")}


def docstring_nodes(tree: ast.AST) -> set[int]:
    """Ids of the constants that are docstrings (also those below attributes)."""
    return {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }


def test_import_loads_nothing_heavy():
    code = f"import sys, json, spatial_impute; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    assert json.loads(run_fresh(code)) == []


def test_import_of_namespace_on_first_use():
    code = "import sys, spatial_impute as si; before = 'spatial_impute.pp' in sys.modules; si.pp; print(before)"
    code += "; print('spatial_impute.pp' in sys.modules); print('torch' in sys.modules)"
    assert run_fresh(code).split() == ["False", "True", "False"]


def test_import_configures_no_foreign_logger_or_warning():
    code = "import logging, warnings; f = list(warnings.filters); import spatial_impute"
    code += "; print(logging.getLogger().handlers == [], warnings.filters == f)"
    assert run_fresh(code).split() == ["True", "True"]


def test_dir_lists_namespaces():
    assert dir(si) == sorted([*NAMESPACES, "settings", "__version__"])


def test_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert si.__version__ == version("spatial-impute")
    assert re.match(r"\d+\.\d+", si.__version__)


def test_unknown_attribute_raises():
    with pytest.raises(AttributeError, match="'spatial_impute' has no attribute 'nope'"):
        si.nope  # noqa: B018


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_all_is_sorted_and_complete(namespace):
    module = importlib.import_module(f"spatial_impute.{namespace}")
    assert module.__all__ == sorted(set(module.__all__))
    assert module.__doc__
    for name in module.__all__:
        assert callable(getattr(module, name))
    imported = {
        name
        for name, obj in vars(module).items()
        if not name.startswith("_") and (inspect.isfunction(obj) or inspect.isclass(obj))
    }
    assert imported == set(module.__all__)


@pytest.mark.parametrize(("namespace", "function"), public_objects(inspect.isfunction))
def test_functions_are_documented(namespace, function):
    doc = inspect.getdoc(function)
    assert doc
    names = set(inspect.signature(function).parameters)
    assert documented_parameters(doc) == names
    assert re.search(r"^Returns\n-+$", doc, flags=re.MULTILINE)
    assert re.search(r"^Examples\n-+$", doc, flags=re.MULTILINE)


@pytest.mark.parametrize(("namespace", "cls"), public_objects(inspect.isclass))
def test_classes_and_their_methods_are_documented(namespace, cls):
    assert inspect.getdoc(cls)
    for name, member in inspect.getmembers(cls, callable):
        if not name.startswith("_") and name in vars(cls):
            assert inspect.getdoc(member), f"{cls.__name__}.{name}"


@pytest.mark.parametrize(("namespace", "function"), public_objects(inspect.isfunction))
def test_signatures_follow_the_convention(namespace, function):
    parameters = list(inspect.signature(function).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    assert len(positional) <= 3
    assert not [p for p in parameters if p.kind is p.VAR_POSITIONAL]
    assert all(p.annotation is not p.empty for p in parameters)
    if namespace in {"pp", "tl", "pl", "metrics"} and function.__name__ not in {
        "assemble_stack",
        "read_placement",
        "read_transformation",
        "training",
    }:
        assert positional[0].name == "sdata"
        assert positional[0].default is inspect.Parameter.empty
    # True and False say nothing at the place of call.
    assert not [p.name for p in positional if isinstance(p.default, bool)]


def test_api_page_lists_exactly_the_public_names():
    page = (SOURCE.parents[1] / "docs" / "api.md").read_text()
    listed = re.findall(r"^\s+(\w+)\.(\w+)$", page, flags=re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(listed) == set(public_names())


@pytest.mark.parametrize("path", SOURCE_FILES, ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_source_unpickles_and_evaluates_nothing(path):
    unsafe_modules = {"pickle", "cloudpickle", "dill", "shelve", "marshal"}
    unsafe_calls = {
        "torch.load",
        "torch.save",
        "pd.read_pickle",
        "joblib.load",
        "joblib.dump",
        "yaml.load",
        "eval",
        "exec",
    }
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not unsafe_modules & {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in unsafe_modules
        if isinstance(node, ast.Call):
            # torch reads tensors and nothing else when told so; the weights that others publish come as such files.
            safe = "weights_only=True" in [ast.unparse(keyword) for keyword in node.keywords]
            assert ast.unparse(node.func) not in unsafe_calls or (ast.unparse(node.func) == "torch.load" and safe)
            assert "allow_pickle" not in {keyword.arg for keyword in node.keywords}


@pytest.mark.parametrize("path", SOURCE_FILES, ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_source_takes_key_names_from_keys(path):
    """Names no sentence would hold never stand as a literal; the others not as a key of a slot."""
    if path.name == "_keys.py":
        pytest.skip("the one place where they stand")
    values = {value for name, value in vars(Keys).items() if name.isupper() and isinstance(value, str)}
    telling = {value for value in values - {Keys.ATTRS} if "_" in value}
    assert {"spatial_3d", "X_spot", "instance_id", "imputation_r"} <= telling
    slots = {"obs", "var", "obsm", "varm", "obsp", "varp", "layers", "uns"}
    tree = ast.parse(path.read_text())
    docstrings = docstring_nodes(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            assert node.value not in telling, f"line {node.lineno}"
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else None
            assert not (owner in slots and node.slice.value in values), f"line {node.lineno}"


def test_source_prints_nothing_and_swallows_nothing():
    for path in SOURCE_FILES:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        blocks = [n for n in nodes if isinstance(n, ast.With) and "catch_warnings" in ast.unparse(n.items[0])]
        for_a_block = {id(n) for block in blocks for n in ast.walk(block)}
        for node in nodes:
            assert not (isinstance(node, ast.ExceptHandler) and node.type is None), path
            if path.name != "__main__.py" and isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"print", "logging.basicConfig"}, path
                # Filters of warnings are the user's, except for as long as a block runs.
                assert "warnings." not in called or "filter" not in called or id(node) in for_a_block, (path, called)


def test_settings_data_dir_prefers_value_over_environment(monkeypatch, tmp_path):
    from spatial_impute._settings import Settings

    settings = Settings()
    monkeypatch.setenv("SPATIAL_IMPUTE_DATA_DIR", str(tmp_path / "env"))
    assert settings.data_dir == tmp_path / "env"
    settings.data_dir = tmp_path / "own"
    assert settings.data_dir == tmp_path / "own"
    settings.data_dir = None
    monkeypatch.delenv("SPATIAL_IMPUTE_DATA_DIR")
    assert settings.data_dir.name == "spatial_impute"


def test_settings_verbosity_rejects_unknown_level():
    before = si.settings.verbosity
    with pytest.raises(ValueError, match=r"`verbosity` must be one of \['error', .*found 'loud'"):
        si.settings.verbosity = "loud"
    assert si.settings.verbosity == before


@pytest.mark.parametrize(("number", "name"), list(enumerate(["error", "warning", "info", "info", "debug"])))
def test_settings_verbosity_takes_the_numbers_of_scanpy(number, name):
    before = si.settings.verbosity
    try:
        si.settings.verbosity = number
        assert si.settings.verbosity == name
        for wrong in (5, -1, True, 1.5, [1]):
            with pytest.raises(ValueError, match=r"or 0 to 4, found"):
                si.settings.verbosity = wrong
    finally:
        si.settings.verbosity = before
