"""The documentation tells the truth: its code runs, its names exist, its keys are those that are written."""

from __future__ import annotations

import ast
import copy
import functools
import importlib
import importlib.util
import re
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import spatial_impute as si
from spatial_impute._keys import Keys

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DATA_MODEL = ROOT / "docs" / "data_model.md"
PAGES = [README, *sorted(p for p in (ROOT / "docs").rglob("*.md") if not {"_build", "generated"} & set(p.parts))]
NEEDS_OWN = "# needs your own"  # files or display: such a block is compiled only
TABLED = ["datasets", "metrics", "pl", "pp", "tl"]  # what the data model says for each function

# The README shows real tissue, which takes a download and minutes. The code runs on synthetic tissue all the same.
STAND_INS = {
    'si.datasets.her2st("C", measured=["C4"], truth=True)': "si.datasets.synthetic_stack(truth=True)",
    'reference="C4"': 'reference="s1"',
    '["ERBB2", "MDK"]': '["smooth_0", "texture_12"]',
}


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """Line and code of every ```python block of a page."""
    text = page.read_text()
    fences = re.finditer(r"^( *)```python\n(.*?)^\1```$", text, flags=re.DOTALL | re.MULTILINE)
    return [(text[: m.start(2)].count("\n") + 1, textwrap.dedent(m.group(2))) for m in fences]


def blocks_of(pages: list[Path]) -> list:
    return [
        pytest.param(page, line, code, id=f"{page.name}:{line}") for page in pages for line, code in python_blocks(page)
    ]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def run(page: Path, blocks: list[tuple[int, str]], space: dict) -> None:
    """Run blocks one after the other; lines in a traceback are those of the page."""
    for line, code in blocks:
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), space)


@pytest.fixture
def quick(monkeypatch, quick_params, quick_search, remembered_stacks):
    """The same functions, on less tissue and with fewer steps, whatever the page asks for."""
    register, fit, fit_pixnet = si.tl.register_stack, si.tl.fit_asign, si.tl.fit_pixnet
    few = {"n_steps": 1, "n_cached_crops": 2, "n_crops": 2}
    search = quick_search | {"n_angles": 12, "n_candidates": 1, "linear_iterations": (50, 30, 0, 0)}
    small = functools.partial(si.datasets.synthetic_stack, extent=1400.0)
    monkeypatch.setattr(si.datasets, "synthetic_stack", small)
    n_folds = quick_params["n_folds"]  # a base must have the folds of ASIGN
    monkeypatch.setattr(si.tl, "impute_pixnet", functools.partial(si.tl.impute_pixnet, n_folds=n_folds))
    monkeypatch.setattr(
        si.tl,
        "register_stack",
        lambda sdata, **kwargs: register(sdata, registration_params=search, **kwargs | {"method": "rigid"}),
    )
    monkeypatch.setattr(
        si.tl, "fit_asign", lambda sdata, **kwargs: fit(sdata, **kwargs | {"model_params": quick_params})
    )
    monkeypatch.setattr(
        si.tl,
        "fit_pixnet",
        lambda *args, model_params=None, **kwargs: fit_pixnet(
            *args, model_params={**(model_params or {}), **few}, **kwargs
        ),
    )
    yield
    plt.close("all")


def test_pages_are_found():
    assert {"README.md", "data_model.md", "concepts.md", "benchmarks.md", "api.md"} <= {page.name for page in PAGES}
    assert len(python_blocks(README)) >= 3


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_python_fence_is_found(page):
    assert len(re.findall(r"^\s*```+\s*python\b", page.read_text(), flags=re.MULTILINE)) == len(python_blocks(page))


@pytest.mark.parametrize(("page", "line", "code"), blocks_of(PAGES))
def test_blocks_compile(page, line, code):
    ast.parse("\n" * (line - 1) + code, filename=str(page))


def test_readme_runs(quick, tmp_path, monkeypatch):
    """All blocks in order in one namespace, as a reader would run them."""
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(README)
    for shown, stand_in in STAND_INS.items():
        assert sum(code.count(shown) for _, code in blocks) == 1, f"README shows another call than {shown}"
        blocks = [(line, code.replace(shown, stand_in)) for line, code in blocks]
    space = {}
    run(README, blocks, space)
    table = space["sdata"].tables["stack"]
    slots = {("layers", "asign"), ("obs", "imputation_support"), ("var", "imputation_r"), ("obsm", "spatial_3d")}
    assert all(key in getattr(table, slot) for slot, key in slots)
    assert plt.get_fignums()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("page", [p for p in PAGES if p != README and python_blocks(p)], ids=name)
def test_pages_run(page, quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = [block for block in python_blocks(page) if not block[1].startswith(NEEDS_OWN)]
    if not blocks:
        pytest.skip("all blocks need what only the reader has")
    if any("datasets.her2st" in code for _, code in blocks):
        pytest.skip("shows real tissue, which takes minutes; compiled only")
    run(page, blocks, {})


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_names_exist(page):
    """`si.x.y` and `spatial_impute.x.y`, in code as in text and references."""
    for path in re.findall(r"(?<![\w./])(?:si|spatial_impute)((?:\.[A-Za-z_]\w*)+)", page.read_text()):
        found = si
        for part in path[1:].split("."):
            if not hasattr(found, part):
                try:
                    importlib.import_module(f"{found.__name__}.{part}")
                except (ImportError, AttributeError):
                    pytest.fail(f"{page.name} names `spatial_impute{path}`, which does not exist")
            found = getattr(found, part)


def documented_keys() -> set[tuple[str, str]]:
    """(slot, key) of everything that the data model writes as slot["key"]."""
    return set(
        re.findall(
            r"\b(obs|var|obsm|obsp|uns|layers|images|shapes|labels|tables)\[\"([^\"]+)\"\]", DATA_MODEL.read_text()
        )
    )


def test_data_model_names_every_key():
    keys = {key for _, key in documented_keys()}
    of_section = [Keys.image, Keys.spots, Keys.counts, Keys.tissue, Keys.tissue_outline]
    of_graph = [Keys.connectivities, Keys.distances, Keys.neighbors, Keys.graph_overlap, Keys.graph_similarity]
    expected = {f("{section}") for f in of_section} | {f(Keys.SPATIAL_3D) for f in of_graph}
    expected |= {Keys.baseline("{method}"), Keys.SPATIAL, Keys.SPATIAL_3D, *Keys.LEVELS, Keys.FEATURES}
    expected |= {Keys.NORMALIZATION, Keys.ASIGN, Keys.SUPPORT, Keys.PREDICTABILITY, Keys.MEASURED, Keys.Z}
    expected |= {Keys.REGION, Keys.INSTANCE, Keys.SECTION, Keys.STACK_TABLE}
    assert expected <= keys
    text = DATA_MODEL.read_text()
    assert f'attrs["{Keys.ATTRS}"]["{Keys.STACK}"]' in text
    assert f'"{Keys.ALIGNED}"' in text


def test_data_model_and_result_agree(small_stack, quick_params):
    """Every slot that the whole path writes is on the page, and every slot on the page is written."""
    sdata = copy.deepcopy(small_stack)
    si.pp.segment_tissue(sdata)
    si.tl.impute_baseline(sdata, "kernel")
    si.tl.impute_3d(sdata, si.tl.fit_asign(sdata, model_params=quick_params))
    table = sdata.tables["stack"]
    written = {(slot, key) for slot in ("images", "shapes", "labels", "tables") for key in getattr(sdata, slot)}
    written = {(slot, re.sub(r"^s\d_", "{section}_", key)) for slot, key in written}
    for slot in ("obs", "var", "obsm", "obsp", "uns", "layers"):
        written |= {(slot, re.sub("kernel$", "{method}", key)) for key in getattr(table, slot)}
    written.discard(("uns", "spatialdata_attrs"))  # spatialdata's own
    optional = {key for key in documented_keys() if "displacement" in key[1] or key[1].endswith("_aligned")}
    optional |= {key for key in documented_keys() if key[1].endswith("_expression")}  # dense maps, test_dense.py
    optional |= {("obs", Keys.N_PIXELS), ("uns", Keys.PIXNET)}
    optional |= {
        ("shapes", "{section}_cells"),
        ("shapes", "{key}_on_{section}"),
        ("layers", "matched"),
        ("uns", "matched"),
    }  # test_add_cells.py, test_transfer_shapes.py, test_match_sections.py
    optional |= {("layers", Keys.PIXNET), ("obs", Keys.fold(Keys.PIXNET))}  # test_impute_pixnet.py
    assert documented_keys() - optional == written
    text = DATA_MODEL.read_text()
    record = sdata.attrs["spatial_impute"]["stack"]
    for keys in (record, record["sections"][0], record["registration"], record["registration"]["sections"]["s0"]):
        assert not [key for key in keys if key not in record["registration"]["sections"] and f"`{key}`" not in text]
    for uns in ("normalization", "features", "spatial_3d_neighbors", "asign"):
        assert not [key for key in table.uns[uns] if f"`{key}`" not in text]


def test_data_model_has_a_row_for_every_function():
    rows = [line for line in DATA_MODEL.read_text().splitlines() if line.startswith("| {func}")]
    listed = re.findall(r"spatial_impute\.(\w+)\.(\w+)`", "".join(row.split("|")[1] for row in rows))
    assert sorted(listed) == sorted((ns, f) for ns in TABLED for f in getattr(si, ns).__all__)


def test_concepts_explain_every_score(small_prepared):
    sdata = copy.deepcopy(small_prepared)
    si.tl.impute_baseline(sdata, "mean")
    truth = si.datasets.synthetic_stack(3, extent=1400.0, n_genes=9, truth=True)[1]
    text = (ROOT / "docs" / "concepts.md").read_text()
    assert not [column for column in si.metrics.evaluate(sdata, truth).columns if f"`{column}`" not in text]


def test_every_page_is_in_a_toctree():
    text = "\n".join(page.read_text() for page in PAGES)
    trees = re.findall(r"```\{toctree\}\n(.*?)```", text, flags=re.DOTALL)
    listed = {line.strip() for tree in trees for line in tree.splitlines() if line.strip()}
    pages = {p.relative_to(ROOT / "docs").with_suffix("").as_posix() for p in PAGES if p != README} - {"index"}
    assert pages <= listed


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_figures_and_files_that_pages_link_exist(page):
    text = re.sub(r"```(?!\{).*?```", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"!?\[[^\]]*\]\(([^)\s#]+)[^)]*\)|```\{(?:figure|image)\} (\S+)", text)
    for target in {a or b for a, b in links}:
        drawn = target.startswith("_static/gallery/")  # by docs/gallery_figures.py, when the pages are built
        assert "://" in target or drawn or (page.parent / target).exists(), f"{page.name} links {target}"


def test_the_gallery_draws_only_figures_of_code_that_runs():
    """A screenshot of another program, below code that needs a screen, is not drawn over."""
    spec = importlib.util.spec_from_file_location("gallery_figures", ROOT / "docs" / "gallery_figures.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = (ROOT / "docs" / "gallery.md").read_text()
    figures = {content for kind, content in script.parts(text) if kind == "figure"}
    drawn = {content for kind, content in script.drawn_parts(text) if kind == "figure"}
    assert figures - drawn == {"_static/napari.png"}
    assert all(content.startswith("_static/gallery/") for content in drawn)


def test_read_the_docs_can_build_what_make_docs_builds():
    """The hosted build installs one extra and reads one configuration: all it needs must be in them."""
    import tomllib

    import yaml

    config = yaml.safe_load((ROOT / ".readthedocs.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    install = config["python"]["install"][0]
    assert install["path"] == "."
    assert install["extra_requirements"] == ["docs"]
    required = "\n".join(project["optional-dependencies"]["docs"])
    conf = (ROOT / config["sphinx"]["configuration"]).read_text()
    extensions = ast.literal_eval(re.search(r"^extensions = (\[.*?\])", conf, flags=re.DOTALL | re.MULTILINE).group(1))
    theme = re.search(r'^html_theme = "(\w+)"', conf, flags=re.MULTILINE).group(1)
    for extension in [*extensions, theme]:
        if not extension.startswith("sphinx.ext."):
            assert re.sub(r"[._]", "-", extension) in required
    floor = tuple(int(n) for n in re.search(r"(\d+)\.(\d+)", project["requires-python"]).groups())
    assert tuple(int(n) for n in config["build"]["tools"]["python"].split(".")) >= floor


def test_citation_names_the_papers_of_the_methods():
    import yaml

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "license", "repository-code"} <= set(citation)
    urls = {reference["url"] for reference in citation["references"]}
    bibliography = (ROOT / "docs" / "references.bib").read_text()
    for key in ("Zhu2025", "Zhang2025"):
        url = re.search(rf"\{{{key},.*?url\s*= \{{(.*?)\}}", bibliography, flags=re.DOTALL).group(1)
        assert url in urls
