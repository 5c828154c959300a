"""What the ecosystem and users' tools read: metadata, workflows, type information."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import spatial_impute as si

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSIONS = ["3.11", "3.12", "3.13"]


@pytest.fixture(scope="module")
def meta():
    text = (ROOT / "docs" / "contributing.md").read_text()
    return yaml.safe_load(re.search(r"^```yaml\n(name: .*?)^```$", text, flags=re.DOTALL | re.MULTILINE).group(1))


def test_meta_yaml_has_what_is_required(meta):
    required = {"name", "description", "project_home", "documentation_home", "install", "license", "tags", "category"}
    assert required | {"primary_category", "language", "contact"} <= set(meta)
    assert "version" not in meta
    assert 1 <= len(meta["tags"]) <= 10
    assert (meta["category"], meta["primary_category"], meta["language"]) == ("ecosystem", "Spatial", "Python")


def test_meta_yaml_agrees_with_the_package(meta):
    assert meta["install"] == {"pypi": PROJECT["name"]}
    assert meta["license"] == PROJECT["license"]
    assert meta["project_home"] == PROJECT["urls"]["Source"]
    assert meta["documentation_home"] == PROJECT["urls"]["Documentation"]


def test_conda_recipe_agrees_with_the_package():
    text = (ROOT / "conda" / "recipe.yaml").read_text()
    recipe = yaml.safe_load(text)
    renamed = {"matplotlib": "matplotlib-base", "torch": "pytorch", "torch-geometric": "pytorch_geometric"}
    wanted = [f"python {PROJECT['requires-python']}"]
    for requirement in PROJECT["dependencies"]:
        name, bound = re.fullmatch(r"([\w-]+)(.*)", requirement).groups()
        wanted.append(f"{renamed.get(name, name)} {bound}".strip())
    assert sorted(recipe["requirements"]["run"]) == sorted(wanted)
    assert recipe["package"]["name"] == PROJECT["name"]
    assert recipe["about"]["license"] == PROJECT["license"]
    assert recipe["about"]["homepage"] == PROJECT["urls"]["Source"]
    # The changelog begins with the version of the recipe, or with changes after it.
    first = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert any(recipe["context"]["version"] in heading for heading in first[:2])


def test_python_versions_agree():
    classifiers = [c.rsplit(" ", 1)[1] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yaml").read_text())
    assert classifiers == workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == VERSIONS
    assert PROJECT["requires-python"] == f">={VERSIONS[0]}"


def test_no_dependency_is_a_url():
    extras = [name for names in PROJECT["optional-dependencies"].values() for name in names]
    assert not [name for name in [*PROJECT["dependencies"], *extras] if "@" in name or "://" in name]


def test_types_are_shipped():
    assert (ROOT / "src" / "spatial_impute" / "py.typed").exists()
    assert "Typing :: Typed" in PROJECT["classifiers"]


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yaml")), ids=lambda p: p.name)
def test_workflows_parse_and_ask_for_no_more_than_they_need(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    assert all("steps" in job for job in workflow["jobs"].values())


def test_every_public_name_is_tested():
    text = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    names = [
        f"{ns}.{name}" for ns in ("datasets", "metrics", "models", "pl", "pp", "tl") for name in getattr(si, ns).__all__
    ]
    assert not [name for name in names if not re.search(rf"\b{name.split('.')[1]}\b", text)]


@pytest.mark.parametrize("params", [si.models.AsignParams, si.models.PixNetParams])
def test_published_parameters_are_there_and_wrong_ones_are_named(params):
    assert params.paper() != params()
    with pytest.raises(ValueError, match=r"`n_steps` must be a whole number of at least [01]"):
        params(n_steps=-1)
