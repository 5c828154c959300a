"""The tutorials: they name what exists, were run to the end, stay small, and their code runs on smaller tissue."""

from __future__ import annotations

import ast
import base64
import importlib.util
import io
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

import spatial_impute as si
from spatial_impute._stack.record import load_record

DOCS = Path(__file__).parents[1] / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
MAX_BYTES = 500_000  # of one file: the limit of the pre-commit hook
MAX_BYTES_TOGETHER = 3_000_000


def cells_of(path: Path, kind: str) -> list[tuple[str, dict]]:
    cells = json.loads(path.read_text())["cells"]
    return [("".join(cell["source"]), cell) for cell in cells if cell["cell_type"] == kind]


def each(function):
    return pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)(function)


def test_tutorials_are_listed():
    listed = re.findall(r"^notebooks/(\w+)$", (DOCS / "tutorials.md").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == [path.stem for path in NOTEBOOKS]
    assert len(NOTEBOOKS) >= 6


def test_outputs_stay_small():
    sizes = {path.name: path.stat().st_size for path in NOTEBOOKS}
    assert not {name: size for name, size in sizes.items() if size > MAX_BYTES}
    assert sum(sizes.values()) < MAX_BYTES_TOGETHER


@each
def test_notebook_was_run_from_start_to_end(path):
    counts = [cell["execution_count"] for _, cell in cells_of(path, "code")]
    assert counts == list(range(1, len(counts) + 1))
    outputs = [output for _, cell in cells_of(path, "code") for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs) or path.stem == "scaling"


@each
def test_notebook_names_what_exists(path):
    """`si.x.y` in code and prose, pages and functions in references; Python in the prose compiles."""
    code = "\n".join(source for source, _ in cells_of(path, "code"))
    prose = "\n".join(source for source, _ in cells_of(path, "markdown"))
    ast.parse(code)
    for block in re.findall(r"```python\n(.*?)```", prose, flags=re.DOTALL):
        ast.parse(block)
    for namespace, name in set(re.findall(r"\bsi\.(pp|tl|pl|metrics|datasets|models)\.(\w+)", code + prose)):
        assert name in getattr(si, namespace).__all__, f"si.{namespace}.{name}"
    for target in re.findall(r"\{doc\}`([\w./]+)`", prose):
        page = path.parent / target
        assert page.with_suffix(".md").exists() or page.with_suffix(".ipynb").exists(), target


def keep_quick(monkeypatch, quick_params, quick_search):
    """The same functions, on less tissue and with fewer steps, whatever the notebook asks for."""
    import dask.distributed

    make, register, fit_asign = si.datasets.synthetic_stack, si.tl.register_stack, si.tl.fit_asign
    fit_pixnet, cluster = si.tl.fit_pixnet, dask.distributed.LocalCluster
    search = quick_search | {"n_angles": 12, "n_candidates": 1, "linear_iterations": (50, 30, 0, 0)}

    def no_network(*args, **kwargs):
        msg = "no network in tests"
        raise OSError(msg)

    def one_section(sdata, **kwargs):
        record = load_record(sdata)
        others = [name for name in record.names if name != record.reference]
        register(
            sdata,
            method="rigid",
            policy="star",
            on_failure="warn",
            transformations={name: np.eye(3) for name in others[:-1]},
            registration_params=search,
        )

    def pixnet(*args, model_params, **kwargs):
        steps = 2 if "checkpoint" in kwargs else 0  # 0: the linear base alone, which leaves nothing to take up
        return fit_pixnet(*args, model_params={**model_params, "n_steps": steps, "n_cached_crops": 4}, **kwargs)

    monkeypatch.setattr(si.datasets, "her2st", no_network)
    monkeypatch.setattr(
        si.datasets, "synthetic_stack", lambda *args, **kwargs: make(*args, **kwargs | {"extent": 1400.0})
    )
    monkeypatch.setattr(si.tl, "register_stack", one_section)
    monkeypatch.setattr(
        si.tl, "fit_asign", lambda sdata, **kwargs: fit_asign(sdata, **kwargs | {"model_params": quick_params})
    )
    monkeypatch.setattr(si.tl, "fit_pixnet", pixnet)
    # Workers in this process: others would take longer to start than everything else takes.
    monkeypatch.setattr(dask.distributed, "LocalCluster", lambda **kwargs: cluster(**kwargs, processes=False))


@pytest.mark.filterwarnings("ignore")
@each
def test_notebook_runs(path, quick_params, quick_search, remembered_stacks, monkeypatch, tmp_path):
    """All code cells in order in one namespace. `make notebooks` runs them as they are."""
    keep_quick(monkeypatch, quick_params, quick_search)
    monkeypatch.chdir(tmp_path)
    space = {"__name__": "__main__"}
    try:
        for i, (source, _) in enumerate(cells_of(path, "code")):
            exec(compile(source, f"{path.name}, code cell {i + 1}", "exec"), space)
    finally:
        plt.close("all")
        si.settings.verbosity = "warning"  # as for all tests
    if path.stem == "own_data":
        assert space["same"].all()
    if path.stem == "scaling":
        assert np.nanmax(space["difference"]) < 1e-4
        assert len(space["before"]) == 3
        assert space["before"] == space["after"]  # nothing was encoded again
    if path.stem == "downstream":
        noise = space["kind"] == "noise"
        assert space["imputed"]["I"][noise].mean() > space["real"]["I"][noise].mean() + 0.2
    assert list(tmp_path.iterdir()) == []


def test_what_is_kept_of_a_run_is_what_a_reader_sees():
    """Remarks of libraries, times and versions go; a figure keeps its size and, nearly, its colours."""
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("nbclient")
    spec = importlib.util.spec_from_file_location("run_notebooks", DOCS.parent / "scripts" / "run_notebooks.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    ramp = np.zeros((60, 256, 4), dtype=np.uint8)
    ramp[..., :3] = (255 * plt.get_cmap("viridis")(np.arange(256))[:, :3]).astype(np.uint8)
    ramp[:10] = 255  # paper, beside many pale colours
    ramp[10:20, :, :3] = np.random.default_rng(0).integers(240, 255, (10, 256, 3))
    ramp[:, :, 3] = 255
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, "PNG")
    outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="a remark"),
        nbformat.v4.new_output("stream", name="stdout", text="a result"),
        nbformat.v4.new_output(
            "display_data", data={"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": "<Figure>"}
        ),
    ]
    cell = nbformat.v4.new_code_cell("1", outputs=outputs, metadata={"execution": {"iopub.execute_input": "now"}})
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"language_info": {"name": "python", "version": "3.1"}})
    script.tidy(notebook)
    assert [output.get("name") for output in cell.outputs] == ["stdout", None]
    assert cell.metadata == {}
    assert notebook.metadata["language_info"] == {"name": "python"}
    assert set(cell.outputs[1]["data"]) == {"image/png"}
    kept = Image.open(io.BytesIO(base64.b64decode(cell.outputs[1]["data"]["image/png"])))
    assert kept.mode == "P"
    difference = np.asarray(kept.convert("RGB")).astype(int) - ramp[..., :3]
    assert difference.shape == (60, 256, 3)
    assert abs(difference).max() <= 20
    assert not difference[:10].any()  # paper stays white
