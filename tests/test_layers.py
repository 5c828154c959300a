"""The layers of the package: a file imports files of its own layer or of lower ones, and no two files import each other."""

import ast
from pathlib import Path

import spatial_impute

ROOT = Path(spatial_impute.__file__).parent

# From the ground up. Names are files or folders of the package; a file in a folder belongs to the folder.
LAYERS = [
    {
        "_keys",
        "_settings",
        "_validation",
        "_geometry",
        "_expression",
        "_scores",
        "_graph",
    },
    {"_image", "_io"},
    {"encoders", "_registration"},
    {"models"},
    {"_stack"},
    {"pp", "tl", "metrics"},
    {"pl", "datasets"},
    {"_cli"},
    {"__main__", "__init__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports() -> dict[str, set[str]]:
    """Files of the package that each file imports, also for type checkers only."""
    paths = {module_name(path): path for path in ROOT.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for name, path in paths.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "spatial_impute":
                base = node.module.removeprefix("spatial_impute").removeprefix(".")
                for alias in node.names:
                    full = f"{base}.{alias.name}".removeprefix(".")
                    found[name].add(full if full in paths else base or "__init__")
        found[name].discard(name)
    return found


def room(module: str) -> str:
    return module.split(".")[0] or "__init__"


def test_every_file_has_a_layer():
    assert {room(name) for name in imports()} == set(RANK)


def test_no_file_imports_a_higher_layer():
    upward = [
        f"{name} imports {other}"
        for name, others in imports().items()
        for other in others
        if RANK[room(other)] > RANK[room(name)] and name != "__init__"
    ]
    assert not upward


def test_no_file_imports_private_files_of_another_public_folder():
    public = {"pp", "tl", "pl", "metrics", "datasets"}
    crossing = [
        f"{name} imports {other}"
        for name, others in imports().items()
        for other in others
        if room(other) in public and room(other) != room(name) and "._" in other
    ]
    assert not crossing


def test_no_files_import_each_other():
    graph = {name: others - {"__init__"} for name, others in imports().items()}
    while leaves := [name for name, others in graph.items() if not others & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph  # what is left takes part in a circle, or imports one


def test_only_the_upper_layers_know_spatialdata():
    low = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*.py")
        if RANK[room(module_name(path))] < RANK["_stack"] and "spatialdata" in imported_packages(path)
    }
    assert low == {"_io/stores.py"}  # writes an image element into a store, tile by tile


def imported_packages(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[0] for name in names}
