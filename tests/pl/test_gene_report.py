from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

import spatial_impute as si
from spatial_impute._scores import noise_ceiling


@pytest.fixture
def report(plot_stack):
    """Draws the page of a gene and returns its axes."""
    return lambda gene, *args, **kwargs: si.pl.gene_report(plot_stack, gene, *args, return_ax=True, **kwargs)


def test_report_says_in_words_whether_to_believe(report, plot_stack):
    table = plot_stack.tables["stack"]
    table.var["imputable"] = table.var["imputation_r"] > 0.3
    best, worst = table.var_names[0], table.var_names[-1]
    try:
        assert report(best)[0].figure.get_suptitle() == f"{best}: predicted with r = 0.90 on held-out spots"
        assert "do not interpret its map" in report(worst)[0].figure.get_suptitle()
    finally:
        del table.var["imputable"]


def test_report_ceiling_is_that_of_all_counts(report, plot_stack):
    counts = plot_stack.tables["s1_counts"]
    gene = "noise_24"
    expected = noise_ceiling(counts.X, np.array([counts.var_names.get_loc(gene)]), target_sum=1e4, n_draws=40)[0]
    (text,) = [t.get_text() for t in report(gene)[3].texts]
    assert float(text) == pytest.approx(expected, abs=0.02)


def test_report_scatter_needs_values_that_own_measurements_have_no_part_in(report, plot_stack):
    table = plot_stack.tables["stack"]
    assert not report("smooth_0")[2].collections  # the layer repeats the measurement: r would be 1
    known = table.obs["measured"].to_numpy()
    shift = np.random.default_rng(0).normal(size=table.shape)
    table.layers["expected"] = table.layers["asign"] + shift
    table.uns["expected"] = {"measured": "denoise"}
    try:
        axes = report("smooth_0", layer="expected")
    finally:
        del table.layers["expected"], table.uns["expected"]
    drawn = np.asarray(axes[2].collections[0].get_offsets())
    seen = table[known, "smooth_0"].layers["measured"].ravel()
    np.testing.assert_allclose(drawn[:, 1], seen)
    r = np.corrcoef(drawn.T)[0, 1]
    assert axes[2].get_title() == f"spots left out: r = {r:.2f}"
    assert axes[1].get_title() == "s1, as expected\nfrom the other spots"


def test_report_bars_are_the_scores_best_on_top(report):
    scores = pd.DataFrame({"baseline_kernel": [0.2], "ridge": [0.4]}, index=pd.Index(["smooth_0"], name="gene"))
    axes = report("smooth_0", scores)
    assert [label.get_text() for label in axes[3].get_yticklabels()] == ["kernel", "ridge", "asign (held out)"]
    np.testing.assert_allclose([bar.get_width() for bar in axes[3].patches[-3:]], [0.2, 0.4, 0.9])
    with pytest.raises(ValueError, match="by='gene'"):
        report("smooth_0", scores.T)
    with pytest.raises(KeyError, match=r"'texture_12' not found in .scores\.index"):
        report("texture_12", scores)


def test_report_of_unknown_gene(report):
    with pytest.raises(KeyError, match="'TP53' not found"):
        report("TP53")


def test_overview_sorts_genes_and_names_sections(plot_stack):
    table = plot_stack.tables["stack"]
    heat, bars = si.pl.gene_overview(plot_stack, ["noise_24", "smooth_0", "texture_12"], return_ax=True)
    assert [label.get_text() for label in heat.get_yticklabels()] == ["smooth_0", "texture_12", "noise_24"]
    assert [label.get_fontweight() for label in heat.get_xticklabels()] == ["normal", "bold", "normal"]
    np.testing.assert_allclose(
        [bar.get_width() for bar in bars.patches], table.var["imputation_r"][["smooth_0", "texture_12", "noise_24"]]
    )
    shown = np.asarray(heat.images[0].get_array())
    values = table[:, "smooth_0"].layers["asign"].ravel()
    means = np.array([values[(table.obs["section"] == name).to_numpy()].mean() for name in ("s0", "s1", "s2")])
    np.testing.assert_allclose(shown[0], (means - means.mean()) / values.std(), atol=1e-5)


def test_overview_of_the_best_genes_and_its_errors(plot_stack):
    heat, _ = si.pl.gene_overview(plot_stack, n_genes=4, return_ax=True)
    assert [label.get_text() for label in heat.get_yticklabels()] == list(plot_stack.tables["stack"].var_names[:4])
    with pytest.raises(KeyError, match="'TP53' not found"):
        si.pl.gene_overview(plot_stack, ["TP53"])
    with pytest.raises(ValueError, match="`genes` is empty"):
        si.pl.gene_overview(plot_stack, [])
    with pytest.raises(ValueError, match="`ax` must hold 2 axes"):
        si.pl.gene_overview(plot_stack, ax=plt.figure().add_subplot())
    kept = plot_stack.tables["stack"].var.pop("imputation_r")
    try:
        with pytest.raises(KeyError, match=r"'imputation_r' not found.*impute_3d"):
            si.pl.gene_overview(plot_stack)
    finally:
        plot_stack.tables["stack"].var["imputation_r"] = kept
