"""A run from files on disk to a folder with data, figures and a report."""

from __future__ import annotations

import json
import re

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
import tifffile
from PIL import Image
from scipy import sparse

import spatial_impute as si
from spatial_impute.__main__ import main
from spatial_impute._cli.config import ConfigError, read_config
from spatial_impute._cli.report import Results, cautions, to_html, to_markdown
from spatial_impute._cli.run import assemble, plot_genes

RUN = """
sections:
  top: {image: top.tif, mpp: 4.0}
  middle: {image: middle.png, mpp: 4.0, counts: middle.h5ad, spot_diameter: 100}
  bottom: {image: bottom.png, mpp: 4.0}
section_spacing: 20
output: out
genes: [smooth_0, smooth_1, texture_3, texture_4, noise_6, noise_7]
registration: rigid
methods: [mean, kernel, asign]
plot_genes: [texture_3, TP53]
asign: {n_steps: 5, width: 8, n_heads: 2, n_folds: 2}
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Three scans; counts of the middle one with the pixel coordinates of its spots."""
    folder = tmp_path_factory.mktemp("inputs")
    sdata = si.datasets.synthetic_stack(3, extent=1400.0, n_genes=9)
    for section, name in zip(["s0", "s1", "s2"], ["top.tif", "middle.png", "bottom.png"], strict=True):
        rgb = np.asarray(sdata.images[f"{section}_image"].transpose("y", "x", "c").data).astype(np.uint8)
        if name.endswith("tif"):
            tifffile.imwrite(folder / name, rgb)
        else:
            Image.fromarray(rgb).save(folder / name)
    counts = sdata.tables["s1_counts"]
    circles = sdata.shapes["s1_spots"].loc[counts.obs["instance_id"]]
    pixels = np.column_stack([circles.geometry.x, circles.geometry.y])
    ad.AnnData(
        X=counts.X,
        obs=pd.DataFrame(index=list(counts.obs["instance_id"])),
        var=counts.var[[]],
        obsm={"spatial": pixels},
    ).write_h5ad(folder / "middle.h5ad")
    (folder / "run.yaml").write_text(RUN)
    return folder


@pytest.fixture(scope="module")
def done(inputs):
    assert main(["run", str(inputs / "run.yaml")]) == 0
    return inputs / "out"


def test_run_leaves_data_tables_figures_and_model(done):
    figures = ["graph", "imputed", "registration", "scores", "stack", "training", "volume"]
    assert sorted(path.stem for path in (done / "figures").iterdir()) == figures
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (done / "figures").iterdir())
    table = ad.read_h5ad(done / "imputed.h5ad")
    assert {"measured", "baseline_mean", "baseline_kernel", "asign", "asign_sd"} <= set(table.layers)
    assert np.isfinite(table.layers["asign"]).all()
    assert set(table.obs["section"]) == {"top", "middle", "bottom"}
    assert set(table.obs["section"][table.obs["measured"]]) == {"middle"}
    back = sd.read_zarr(done / "stack.zarr")
    np.testing.assert_array_equal(back.tables["stack"].layers["asign"], table.layers["asign"])
    assert si.models.AsignModel.load(done / "asign_model").var_names == list(table.var_names)
    scores = pd.read_csv(done / "scores.csv", index_col=0)
    assert list(scores.index) == ["mean", "kernel", "asign"]
    assert {"pearson_gene", "low", "high"} <= set(scores.columns)
    assert set(pd.read_csv(done / "genes.csv", index_col=0).index) == set(table.var_names)
    assert len(pd.read_csv(done / "registration.csv")) >= 2
    record = json.loads((done / "run.json").read_text())
    assert record["config"]["registration"] == "rigid"
    assert record["version"] == si.__version__


def test_report_has_the_scores_and_what_not_to_trust(done):
    markdown = (done / "report.md").read_text()
    heads = re.findall(r"^## (.*)$", markdown, flags=re.MULTILINE)
    assert heads[0] == "What not to trust"
    assert {"Sections", "Registration", "Baselines and model on held-out spots", "Settings"} <= set(heads)
    scores = pd.read_csv(done / "scores.csv", index_col=0)
    assert f"| kernel | {scores.loc['kernel', 'pearson_gene']:.3g} |" in markdown
    assert "Imputed values are no measurements" in markdown
    for figure in re.findall(r"\]\((figures/.*?)\)", markdown):
        assert (done / figure).exists()
    page = (done / "report.html").read_text()
    assert page.count("<img ") == len(list((done / "figures").iterdir()))
    assert 'src="figures' not in page  # one file that can be passed on
    assert page.count("<table>") == markdown.count("| --- |\n") or "<table>" in page


def test_spots_lie_where_their_pixels_are(inputs):
    sdata = assemble(read_config(inputs / "run.yaml"))
    table = sdata.tables["stack"]
    middle = table[table.obs["section"] == "middle"]
    pixels = ad.read_h5ad(inputs / "middle.h5ad").obsm["spatial"]
    np.testing.assert_allclose(middle.obsm["spatial"], 4.0 * pixels, rtol=1e-6)
    np.testing.assert_allclose(sdata.shapes["middle_spots"]["radius"] * 4.0, 50.0)
    # Virtual spots elsewhere, as large and as far apart.
    assert (table.obs["section"] == "top").sum() > 20
    assert not table.obs["measured"][table.obs["section"] == "top"].any()
    assert plot_genes(sdata, ["texture_3", "TP53"]) == ["texture_3"]
    assert plot_genes(sdata, None) == list(table.var_names[:2])


def test_spots_without_counts_are_not_measured(inputs, tmp_path):
    table = ad.read_h5ad(inputs / "middle.h5ad")
    table.X = sparse.csr_matrix(table.X)
    table.X[[2, 5]] = 0
    table.write_h5ad(tmp_path / "empty.h5ad")
    (inputs / "empty.yaml").write_text(RUN.replace("middle.h5ad", str(tmp_path / "empty.h5ad")))
    stack = assemble(read_config(inputs / "empty.yaml")).tables["stack"]
    middle = stack[stack.obs["section"] == "middle"].obs
    assert list(middle.index[~middle["measured"]]) == [f"middle_{i}" for i in table.obs_names[[2, 5]]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.obsm.pop("spatial"), r"sections\.middle\.counts.*obsm\['spatial'\]"),
        (lambda t: t.obsm["spatial"].__imul__(10.0), r"sections\.middle\.counts.*lie outside the image of 350 x 350"),
    ],
)
def test_counts_must_lie_on_the_image(inputs, tmp_path, change, message):
    table = ad.read_h5ad(inputs / "middle.h5ad")
    change(table)
    table.write_h5ad(tmp_path / "wrong.h5ad")
    (inputs / "wrong.yaml").write_text(RUN.replace("middle.h5ad", str(tmp_path / "wrong.h5ad")))
    with pytest.raises(ConfigError, match=message):
        assemble(read_config(inputs / "wrong.yaml"))


def test_run_refuses_a_folder_of_others(inputs, tmp_path, capsys):
    (tmp_path / "thesis.tex").touch()
    assert main(["run", str(inputs / "run.yaml"), "--output", str(tmp_path)]) == 2
    assert "holds files that no run has written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.fixture
def results(small_stack):
    table = small_stack.tables["stack"]
    table.var["imputation_r"] = np.linspace(-0.2, 0.6, table.n_vars)
    table.obs["imputation_support"] = np.where(table.obs["measured"], 1.0, 0.5)
    scores = pd.DataFrame(
        {"pearson_gene": [0.3, 0.4], "vs_best_low": [0.0, -0.1], "vs_best_high": [0.0, 0.2]}, index=["ridge", "asign"]
    )
    return Results(small_stack, scores, si.metrics.registration_quality(small_stack), "asign", {}, {})


def test_cautions_tell_what_this_run_shows(results):
    text = "\n".join(cautions(results))
    assert "This run does not show that ASIGN is better than ridge" in text
    assert re.search(r"of 9 genes were not predictable \(r <= 0\)", text)
    assert "support 0" not in text
    assert "left out" not in text
    results.sdata.tables["stack"].obs.loc["s0_0", "imputation_support"] = 0.0
    assert "1 spots have no path in the graph to a measured spot (support 0): s0 1." in "\n".join(cautions(results))
    results.scores.loc["asign", "vs_best_low"] = 0.05
    assert "does not show that ASIGN" not in "\n".join(cautions(results))
    results.scores = None
    assert "Nothing was held out" in "\n".join(cautions(results))


def test_cautions_name_weak_sections(results):
    record = results.sdata.attrs["spatial_impute"]["stack"]["registration"]
    record["sections"]["s0"]["verdict"] = "weak"
    record["skipped"] = ["s2"]
    text = "\n".join(cautions(results))
    assert "Sections whose registration is not certain: s0 (weak)" in text
    assert "left out of the registration: s2" in text


def test_html_escapes_and_markdown_leaves_missing_values_empty(tmp_path):
    blocks = [
        ("h1", "A & B"),
        ("p", "see `x<y`"),
        ("table", pd.DataFrame({"a": [1.23456, np.nan], "b": ["<i>", None]})),
    ]
    page = to_html(blocks, tmp_path)
    assert "<h1>A &amp; B</h1>" in page
    assert "<code>x&lt;y</code>" in page
    assert "&lt;i&gt;" in page
    assert to_markdown(blocks).splitlines()[-2:] == ["| 1.23 | <i> |", "|  |  |"]


def test_demo_leaves_what_it_names(small_stack, quick_params, tmp_path, monkeypatch):
    from spatial_impute._cli import demo

    truth = si.datasets.synthetic_stack(3, extent=1400.0, n_genes=9, truth=True)[1]
    fit = si.tl.fit_asign
    monkeypatch.setattr(demo, "_load", lambda data: (small_stack, truth, ["smooth_0", "texture_3"]))
    monkeypatch.setattr(si.tl, "register_stack", lambda sdata: None)  # it is registered
    monkeypatch.setattr(si.tl, "fit_asign", lambda sdata: fit(sdata, model_params=quick_params))
    said = []
    monkeypatch.setattr(demo.logger, "info", lambda text, *args: said.append(text % args))
    assert main(["demo", "--output", str(tmp_path / "out")]) == 0
    named = re.findall(rf"{tmp_path}/out/([\w.]+):", said[-1])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(named)
    assert {"stack.png", "volume.png", "graph.png", "training.png", "scores.png", "scores.csv"} <= set(named)
    assert "asign" in pd.read_csv(tmp_path / "out" / "scores.csv", index_col=0).index
