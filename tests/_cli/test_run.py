"""A run from files on disk to a folder with data, figures and a report."""

from __future__ import annotations

import json
import re
import time
from functools import partial

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
from spatial_impute._cli.report import BAD, CARE, GOOD, Results, to_html, to_markdown, verdicts
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
workers: 1
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
def done(inputs, quick_search):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(si.tl, "register_stack", partial(si.tl.register_stack, registration_params=quick_search))
        assert main(["run", str(inputs / "run.yaml")]) == 0
    return inputs / "out"


def test_run_leaves_data_tables_figures_and_model(done):
    figures = ["genes", "graph", "imputed", "registration", "scores", "stack", "training", "volume"]
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
    assert {"mean", "kernel", "asign", "network alone", "without network"} <= set(scores.index)  # held out by the model
    assert {"pearson_gene", "gain", "gain_low", "gain_high"} <= set(scores.columns)
    assert set(pd.read_csv(done / "genes.csv", index_col=0).index) == set(table.var_names)
    assert len(pd.read_csv(done / "registration.csv")) >= 2
    record = json.loads((done / "run.json").read_text())
    assert record["config"]["registration"] == "rigid"
    assert record["version"] == si.__version__


def test_report_begins_with_verdicts_then_genes_then_maps(done):
    markdown = (done / "report.md").read_text()
    heads = re.findall(r"^## (.*)$", markdown, flags=re.MULTILINE)
    assert heads[:4] == ["In short", "Which genes to believe", "Maps", "What the words mean"]
    assert heads[4:] == [
        "How it was made",
        "Registration",
        "Baselines and model on held-out spots",
        "Graph and training",
        "Settings",
    ]
    before_maps, maps, _ = re.split(r"^## (?:Maps|What the words mean)$", markdown, flags=re.MULTILINE)
    assert "Imputed values are estimates, not measurements" in before_maps
    assert re.findall(r"figures/(\w+)\.png", before_maps) == ["genes"]
    assert re.findall(r"figures/(\w+)\.png", maps) == ["imputed", "volume"]
    scores = pd.read_csv(done / "scores.csv", index_col=0)
    assert f"| kernel | {scores.loc['kernel', 'pearson_gene']:.3g} |" in markdown
    genes = pd.read_csv(done / "genes.csv", index_col=0)
    first = genes.index[0]
    assert genes["imputation_r"].is_monotonic_decreasing
    row = re.search(rf"^\| {first} \| (\S+) \| (\d+) \| (yes|no) \|$", markdown, flags=re.MULTILINE)
    assert float(row[1]) == pytest.approx(genes["imputation_r"].iloc[0], abs=0.01)
    assert float(row[2]) == pytest.approx(100 * max(genes["imputation_r"].iloc[0], 0) ** 2, abs=0.6)
    assert row[3] == ("yes" if genes["imputable"].iloc[0] else "no")
    for figure in re.findall(r"\]\((figures/.*?)\)", markdown):
        assert (done / figure).exists()
    page = (done / "report.html").read_text()
    assert page.count("<img ") == len(list((done / "figures").iterdir()))
    assert 'src="figures' not in page  # one file that can be passed on
    assert page.count("<table>") == 4


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
    assert plot_genes(sdata, None) == list(table.var_names[:4])


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


def test_positions_in_a_table_are_read_by_the_names_of_its_columns(inputs, tmp_path):
    table = ad.read_h5ad(inputs / "middle.h5ad")
    wanted = table.obsm["spatial"]
    table.obsm["spatial"] = pd.DataFrame(wanted[:, ::-1], columns=["y", "x"], index=table.obs_names)
    table.write_h5ad(tmp_path / "named.h5ad")
    (inputs / "named.yaml").write_text(RUN.replace("middle.h5ad", str(tmp_path / "named.h5ad")))
    stack = assemble(read_config(inputs / "named.yaml")).tables["stack"]
    middle = stack[stack.obs["section"] == "middle"]
    np.testing.assert_allclose(middle.obsm["spatial"], 4.0 * wanted, rtol=1e-6)


@pytest.mark.parametrize("place", ["layer", "raw", "spatialdata"])
def test_counts_may_lie_in_a_layer_or_in_raw(inputs, tmp_path, place):
    expected = assemble(read_config(inputs / "run.yaml")).tables["stack"].layers["measured"]
    table = ad.read_h5ad(inputs / "middle.h5ad")
    logged = ad.AnnData(np.log1p(table.X.toarray()), obs=table.obs, var=table.var, obsm=table.obsm)
    logged.layers["umi"], logged.raw = table.X, table
    logged.write_h5ad(tmp_path / "log.h5ad")
    key = "umi" if place == "layer" else "raw"
    text = RUN.replace("middle.h5ad", str(tmp_path / "log.h5ad")).replace(
        "spot_diameter", f"counts_layer: {key}, spot_diameter"
    )
    if place == "spatialdata":
        source = si.datasets.synthetic_stack(3, extent=1400.0, n_genes=9)
        counts = source.tables["s1_counts"]
        counts.layers["umi"], counts.X = counts.X.copy(), counts.X.log1p()
        one = sd.SpatialData(
            images={"he": source.images["s1_image"]},
            shapes={"s1_spots": source.shapes["s1_spots"]},
            tables={"t": counts},
        )
        one.write(tmp_path / "one.zarr")
        text = re.sub(
            "middle: .*",
            f"middle: {{spatialdata: {tmp_path}/one.zarr, coordinate_system: s1, mpp: 1.0, counts_layer: umi}}",
            RUN,
        )
    (inputs / f"{place}.yaml").write_text(text)
    found = assemble(read_config(inputs / f"{place}.yaml")).tables["stack"]
    np.testing.assert_allclose(found.layers["measured"], expected, rtol=1e-6)


def test_log_values_are_taken_as_they_are_if_the_file_says_so(inputs, tmp_path):
    expected = assemble(read_config(inputs / "run.yaml")).tables["stack"].layers["measured"]
    table = ad.read_h5ad(inputs / "middle.h5ad")
    counts = table.X.toarray()
    table.X = np.log1p(1e4 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))
    table.write_h5ad(tmp_path / "log.h5ad")
    text = RUN.replace("middle.h5ad", str(tmp_path / "log.h5ad"))
    for name, content in (
        ("bare", text),
        ("log", text + "log_normalized: true\n"),
        ("wrong", RUN + "log_normalized: true\n"),
    ):
        (inputs / f"{name}.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"`sections\.middle\.counts`: raw counts are needed.*`log_normalized: true`"):
        assemble(read_config(inputs / "bare.yaml"))
    found = assemble(read_config(inputs / "log.yaml")).tables["stack"].layers["measured"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    with pytest.raises(ValueError, match="raw counts"):
        assemble(read_config(inputs / "wrong.yaml"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("bottom.png, mpp: 4.0", "bottom.png", r"Pass `sections\.bottom\.mpp` \(um per pixel\)"),
        ("bottom.png, mpp: 4.0", "bottom.png, mpp: 4000.0", r"`sections\.bottom`: .*found 4000 um"),
        ("image: bottom.png", "image: bad.png", r"bad\.png.*neither PNG nor JPEG"),
        ("image: bottom.png", "image: bad.czi", r"bad\.czi.*bfconvert"),
        ("texture_3, texture_4", "texture_3, nope", r"1 of `genes` are not measured on `sections.middle`"),
        ("registration: rigid", "encoder: MahmoodLab/UNI2-h", r"'timm:hf-hub:MahmoodLab/UNI2-h'"),
        ("registration: rigid", "encoder: Texture", r"Did you mean 'texture'"),
        ("registration: rigid", "device: cuda:99", r"cuda:99' cannot be used here"),
        ("counts: middle.h5ad", "counts: bad.png", r"`sections\.middle\.counts`: .* cannot be read as h5ad"),
        (
            "spot_diameter",
            "counts_layer: umi, spot_diameter",
            r"`sections\.middle\.counts_layer`: there is no layer 'umi'",
        ),
        ("output: out", "output: bad.png", r"bad\.png' is a file; give a folder"),
    ],
)
def test_what_the_check_passes_starts_and_messages_speak_of_the_file(inputs, capsys, old, new, message):
    for name in ("bad.png", "bad.czi"):
        (inputs / name).write_bytes(b"x")
    (inputs / "check.yaml").write_text(RUN.replace(old, new))
    assert main(["run", str(inputs / "check.yaml"), "--check"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, said), said
    assert not re.search(r"\bsi\.|sdata|`\w+=`|Traceback", said), said


def test_the_check_lists_all_faults(inputs, capsys):
    text = RUN.replace("image: top.tif, mpp: 4.0", "image: top.tif").replace("bottom.png, mpp: 4.0", "bottom.png")
    text = text.replace("registration: rigid", "encoder: Texture\ndevice: cuda:99")
    (inputs / "faults.yaml").write_text(text)
    assert main(["run", str(inputs / "faults.yaml"), "--check"]) == 2
    said = capsys.readouterr().err.splitlines()
    wanted = ["Did you mean 'texture'", "cuda:99", r"sections\.top\.mpp", r"sections\.bottom\.mpp"]
    assert len(said) == len(wanted)
    for line, message in zip(said, wanted, strict=True):
        assert line.startswith("error: ")
        assert re.search(message, line), line


def test_warnings_speak_of_the_file(inputs, monkeypatch, caplog):
    from spatial_impute._cli import run as module

    monkeypatch.setattr(module.logger, "propagate", True)

    def check(config):
        module.logger.warning("Section %s: `mpp=%g` differs. Run `si.pp.assemble_stack`.", "top", 4.0)

    monkeypatch.setattr(module, "check", check)
    assert main(["run", str(inputs / "run.yaml"), "--check"]) == 0
    assert set(caplog.messages) == {"`sections.top`: `sections.top.mpp: 4` differs."}


def test_the_check_writes_nothing(inputs, capsys):
    (inputs / "ok.yaml").write_text(RUN.replace("output: out", "output: nowhere"))
    assert main(["run", str(inputs / "ok.yaml"), "--check"]) == 0
    assert "3 sections, output to" in capsys.readouterr().out
    assert not (inputs / "nowhere").exists()


def test_long_steps_write_lines_to_the_log(monkeypatch, caplog):
    from spatial_impute import _settings

    monkeypatch.setattr(_settings, "_LOG_EVERY", 0.05)
    monkeypatch.setattr(_settings.logger, "propagate", True)
    monkeypatch.setattr(si.settings, "_log_progress", True)
    caplog.set_level("INFO", "spatial_impute")
    for _ in _settings.progress(range(8), "Patches"):
        time.sleep(0.02)
    assert re.search("Patches: [345] of 8 after", caplog.text)
    assert "Patches: 8 of 8 after" in caplog.text
    assert "\r" not in caplog.text


def test_run_refuses_a_folder_of_others(inputs, tmp_path, capsys):
    (tmp_path / "thesis.tex").touch()
    assert main(["run", str(inputs / "run.yaml"), "--output", str(tmp_path)]) == 2
    assert "holds files that no run has written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_demo_refuses_a_folder_of_others(tmp_path, capsys):
    (tmp_path / "stack.zarr").mkdir()  # of the user; a demo writes one of this name
    assert main(["demo", "--data", "synthetic", "--output", str(tmp_path)]) == 2
    assert "holds files that no run has written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["stack.zarr"]


@pytest.mark.parametrize("more", [[], ["--check"]])
def test_run_refuses_to_replace_its_own_input(inputs, tmp_path, capsys, more):
    """The result of a run as the input of the next one: images are lazy, and would be deleted before they are read."""
    store = tmp_path / "out" / "stack.zarr"
    store.mkdir(parents=True)
    (tmp_path / "out" / "run.json").touch()
    (inputs / "again.yaml").write_text(RUN.replace("image: top.tif", f"spatialdata: {store}"))
    assert main(["run", str(inputs / "again.yaml"), "--output", str(tmp_path / "out"), *more]) == 2
    assert f"`sections.top.spatialdata`: '{store}' lies in the output of this run" in capsys.readouterr().err
    assert store.exists()


@pytest.fixture
def results(small_stack):
    table = small_stack.tables["stack"]
    table.var["imputation_r"] = np.linspace(-0.2, 0.6, table.n_vars)
    table.var["imputable"] = table.var["imputation_r"] > 0.15
    table.obs["imputation_support"] = np.where(table.obs["measured"], 1.0, 0.5)
    scores = pd.DataFrame(
        {"pearson_gene": [0.3, 0.4], "vs_best_low": [0.0, -0.1], "vs_best_high": [0.0, 0.2]}, index=["ridge", "asign"]
    )
    return Results(small_stack, scores, si.metrics.registration_quality(small_stack), "asign", {}, {})


def said(results) -> dict[str, str]:
    """Text of all verdicts by level."""
    found = verdicts(results.sdata, results.layer, results.scores)
    return {level: "\n".join(v.text for v in found if v.level == level) for level in (GOOD, CARE, BAD)}


def test_verdicts_tell_what_this_run_shows(results):
    text = said(results)
    assert "This run does not show that the model is better than the simple method ridge (r +0.100" in text[CARE]
    assert "5 of 9 genes are predicted better than by chance" in text[CARE]
    assert "All 3 sections fit on each other" in text[GOOD]
    assert "Every spot has measured spots nearby" in text[GOOD]
    assert not text[BAD]
    results.sdata.tables["stack"].obs.loc["s0_0", "imputation_support"] = 0.0
    assert (
        "1 spots have no measured spot nearby. Their values come from the image alone (support 0): s0 1."
        in said(results)[CARE]
    )
    results.scores.loc["asign", "vs_best_low"] = 0.05
    assert "better than the best simple method, ridge" in said(results)[GOOD]
    assert "All tests used spots of measured sections" in said(results)[CARE]
    results.scores = None
    assert "Nothing was held out" in said(results)[CARE]
    assert "All tests" not in said(results)[CARE]
    results.sdata.tables["stack"].var["imputable"] = False
    assert "0 of 9 genes are predicted better than by chance" in said(results)[BAD]


def test_verdicts_name_uncertain_sections(results):
    record = results.sdata.attrs["spatial_impute"]["stack"]["registration"]
    record["sections"]["s0"]["verdict"] = "weak"
    record["sections"]["s1"]["verdict"] = "failed"
    record["skipped"] = ["s2"]
    text = said(results)
    assert "The position of section s0 is uncertain" in text[CARE]
    assert "The position of section s1 was not found" in text[BAD]
    assert "Section s2 has no place in the stack" in text[BAD]
    assert "fit on each other" not in text[GOOD]


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
    assert to_markdown(blocks).splitlines()[-2:] == [r"| 1.23 | \<i> |", "|  |  |"]


def test_demo_leaves_what_it_names(small_stack, quick_params, tmp_path, monkeypatch):
    from spatial_impute import __main__ as demo

    truth = si.datasets.synthetic_stack(3, extent=1400.0, n_genes=9, truth=True)[1]
    fit = si.tl.fit_asign
    monkeypatch.setattr(demo, "_demo_stack", lambda data: (small_stack, truth, ["smooth_0", "texture_3"]))
    monkeypatch.setattr(si.tl, "register_stack", lambda sdata: None)  # it is registered
    monkeypatch.setattr(si.tl, "fit_asign", lambda sdata: fit(sdata, model_params=quick_params))
    said = []
    monkeypatch.setattr(demo.logger, "info", lambda text, *args: said.append(text % args))
    assert main(["demo", "--output", str(tmp_path / "out")]) == 0
    named = re.findall(rf"{tmp_path}/out/([\w.]+):", said[-1])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(named)
    assert {"stack.png", "volume.png", "graph.png", "training.png", "scores.png", "scores.csv"} <= set(named)
    assert "asign" in pd.read_csv(tmp_path / "out" / "scores.csv", index_col=0).index


def test_rectangular_pixels_and_spots_off_the_tissue_are_those_of_the_files(inputs, tmp_path, caplog, monkeypatch):
    """As without a file of a run: both sizes of a pixel are kept, and `in_tissue` says which spots are measured."""
    monkeypatch.setattr("spatial_impute._settings.logger.propagate", True)
    pixels = np.asarray(Image.open(inputs / "middle.png"))[..., :3]
    tifffile.imwrite(tmp_path / "middle.tif", pixels, photometric="rgb", resolution=(5000, 2500), resolutionunit=3)
    table = ad.read_h5ad(inputs / "middle.h5ad")
    table.obs["in_tissue"] = np.arange(table.n_obs) % 2
    table.write_h5ad(tmp_path / "middle.h5ad")
    text = RUN.replace("top.tif", f"{inputs}/top.tif").replace("bottom.png", f"{inputs}/bottom.png")
    (tmp_path / "run.yaml").write_text(text.replace("middle.png, mpp: 4.0", "middle.tif"))
    stack = assemble(read_config(tmp_path / "run.yaml")).tables["stack"]
    found = stack[stack.obs["section"] == "middle"]
    assert found.obs["instance_id"].tolist() == table.obs_names[1::2].tolist()
    np.testing.assert_allclose(found.obsm["spatial"], table.obsm["spatial"][1::2] * [2.0, 4.0])
    (tmp_path / "run.yaml").write_text(text.replace("middle.png, mpp: 4.0", "middle.tif, mpp: 4.0"))
    assemble(read_config(tmp_path / "run.yaml"))
    assert "Section middle: `mpp=4` differs from 2 x 4 in its file" in caplog.text
