from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

import spatial_impute as si


def model_with(**columns):
    return SimpleNamespace(history=pd.DataFrame(columns))


@pytest.fixture
def asign_like():
    rows = [(s, np.nan if s == 0 else 1 / s, 1.0 + 0.1 * k - 0.01 * s, k, s == 20) for k in (0, 1) for s in (0, 10, 20)]
    return SimpleNamespace(history=pd.DataFrame(rows, columns=["step", "loss", "held_out_mse", "network", "kept"]))


def test_training_has_a_line_per_network_and_marks_the_kept_step(asign_like, tmp_path):
    axes = si.pl.training(asign_like, save=tmp_path / "t.png", return_ax=True)
    assert [ax.get_title() for ax in axes] == ["training loss", "error on held-out spots"]
    for ax in axes:
        assert ax.get_xlabel() == "step"
        vertical = [line for line in ax.lines if list(line.get_xdata()) == [20, 20]]
        assert len(vertical) == 1
    drawn = [line for line in axes[1].lines if len(line.get_xdata()) == 3]
    assert len(drawn) == 2
    np.testing.assert_allclose(drawn[0].get_ydata(), [1.0, 0.9, 0.8])
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["0", "1"]
    assert (tmp_path / "t.png").exists()


def test_training_of_several_gene_panels_has_plots_for_each(asign_like):
    other = asign_like.history.assign(loss=lambda rows: rows["loss"] + 5, panel=1)
    both = SimpleNamespace(history=pd.concat([asign_like.history.assign(panel=0), other], ignore_index=True))
    axes = si.pl.training(both, return_ax=True)
    assert [ax.get_title() for ax in axes[::2]] == ["training loss, gene panel 0", "training loss, gene panel 1"]
    first, second = (axes[i].lines[0].get_ydata() for i in (0, 2))
    np.testing.assert_allclose(second, first + 5)


def test_training_of_pixnet_shows_what_was_held_out():
    model = model_with(
        step=[0, 5, 10],
        loss=[2.0, 1.0, 0.9],
        held_out_loss=[2.0, 1.5, 1.6],
        held_out_r=[0.0, 0.2, 0.1],
        kept=[False, True, False],
    )
    axes = si.pl.training(model, return_ax=True)
    assert [ax.get_title() for ax in axes] == [
        "training loss",
        "loss on held-out regions",
        "correlation on held-out regions",
    ]
    assert axes[0].get_legend() is None


def test_training_without_held_out_regions_shows_the_loss():
    model = model_with(step=[0, 5], loss=[2.0, 1.0], held_out_loss=[np.nan] * 2, held_out_r=[np.nan] * 2, kept=[0, 1])
    assert len(si.pl.training(model, return_ax=True)) == 1


@pytest.mark.parametrize(
    ("model", "kwargs", "error", "message"),
    [
        (SimpleNamespace(), {}, TypeError, "must have a `history`"),
        (model_with(step=[], loss=[], kept=[]), {}, ValueError, "history of `model` is empty"),
        (model_with(step=[0], loss=[1.0], kept=[True]), {"title": ["a", "b"]}, ValueError, "one entry per panel"),
        (
            model_with(step=[0], loss=[1.0], kept=[True]),
            {"ncols": 0},
            ValueError,
            "`ncols` must be a whole number of at least 1",
        ),
    ],
)
def test_training_says_what_is_wrong(model, kwargs, error, message):
    with pytest.raises(error, match=message):
        si.pl.training(model, **kwargs)


@pytest.fixture
def cross_validated():
    return pd.DataFrame(
        {
            "pearson_gene": [0.0, 0.3, 0.4],
            "pearson_gene_positive": [0.0, 0.8, 0.9],
            "mse": [1.0, 0.9, 0.7],
            "skill": [0.0, 0.1, 0.3],
            "low": [0.0, 0.2, 0.35],
            "high": [0.0, 0.4, 0.45],
        },
        index=pd.Index(["mean", "kernel", "asign"], name="method"),
    )


def test_metrics_sorts_methods_and_draws_intervals(plot_stack, cross_validated):
    axes = si.pl.metrics(plot_stack, cross_validated, metric=["pearson_gene", "mse"], return_ax=True)
    assert len(axes) == 3  # the last one has the genes
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["mean", "kernel", "asign"]
    assert [label.get_text() for label in axes[1].get_yticklabels()] == ["mean", "kernel", "asign"]  # lower is better
    intervals = [tuple(line.get_xdata()) for line in axes[0].lines if len(set(line.get_ydata())) == 1]
    assert intervals == [(0.0, 0.0), (0.2, 0.4), (0.35, 0.45)]
    assert [tuple(points.get_offsets()[0]) for points in axes[0].collections] == [(0, 0), (0.3, 1), (0.4, 2)]
    assert [label.get_fontweight() for label in axes[0].get_yticklabels()] == ["normal", "normal", "bold"]
    assert axes[1].get_xlabel() == "mean squared error"


def test_metrics_by_section_has_a_mark_per_section(plot_stack, truth):
    scores = si.metrics.evaluate(plot_stack, truth, by="section")
    (ax,) = si.pl.metrics(plot_stack, scores, metric="skill", show_predictability=False, return_ax=True)
    by_section = [c for c in ax.collections if len(c.get_offsets()) == 2]
    assert len(by_section) == 2  # layers
    marks = np.sort(by_section[-1].get_offsets()[:, 0])
    np.testing.assert_allclose(marks, np.sort(scores.xs("baseline_kernel")["skill"]))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["kernel", "asign"] or [
        label.get_text() for label in ax.get_yticklabels()
    ] == ["asign", "kernel"]


def test_metrics_by_gene_compares_expected_with_reached(plot_stack, truth):
    scores = si.metrics.evaluate(plot_stack, truth, by="gene")
    axes = si.pl.metrics(plot_stack, scores, genes=["smooth_0"], return_ax=True)
    assert len(axes) == 2
    points = axes[1].collections[0].get_offsets()
    expected = plot_stack.tables["stack"].var["imputation_r"].sort_values(ascending=False)
    np.testing.assert_allclose(points[:, 0], expected)
    np.testing.assert_allclose(points[:, 1], scores["asign"][expected.index])
    assert [text.get_text() for text in axes[1].texts] == ["smooth_0"]
    assert axes[1].get_ylabel() == "r reached"


def test_metrics_without_scores_ranks_the_genes(plot_stack):
    (ax,) = si.pl.metrics(plot_stack, return_ax=True)
    drawn = ax.lines[0].get_ydata()
    assert len(drawn) == plot_stack.tables["stack"].n_vars
    assert (np.diff(drawn) <= 0).all()
    assert len(ax.texts) == 2


@pytest.mark.parametrize("n_genes", [None, 6])
def test_names_of_genes_stay_in_the_panel_and_cover_nothing(plot_stack, n_genes):
    stack = copy.deepcopy(plot_stack)
    var = stack.tables["stack"].var
    var["imputation_r"] = np.linspace(0.98, 0.0, len(var))  # a curve from one corner of the panel to the other
    (ax,) = si.pl.metrics(stack, genes=None if n_genes is None else list(var.index[:n_genes]), return_ax=True)
    ax.figure.canvas.draw()
    points = ax.transData.transform(ax.lines[0].get_xydata())
    boxes = [Text.get_window_extent(text) for text in ax.texts]  # without the line to the point
    assert len(boxes) == (n_genes or 2)
    for k, box in enumerate(boxes):
        assert ax.bbox.x0 <= box.x0 < box.x1 <= ax.bbox.x1
        assert ax.bbox.y0 <= box.y0 < box.y1 <= ax.bbox.y1
        assert box.count_contains(points) == 0
        assert box.count_overlaps(boxes[:k]) == 0


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"show_predictability": False}, ValueError, "Nothing to draw: pass `scores`"),
        ({"genes": ["TP53"]}, KeyError, "'TP53' not found"),
        ({"title": ["a", "b"]}, ValueError, "one entry per panel"),
        ({"ncols": 0}, ValueError, "`ncols` must be a whole number of at least 1"),
    ],
)
def test_metrics_says_what_is_wrong(plot_stack, kwargs, error, message):
    with pytest.raises(error, match=message):
        si.pl.metrics(plot_stack, **kwargs)


def test_metrics_names_an_unknown_score(plot_stack, cross_validated):
    with pytest.raises(KeyError, match=r"'auc' not found in `scores\.columns`"):
        si.pl.metrics(plot_stack, cross_validated, metric="auc")
    with pytest.raises(KeyError, match=r"si\.metrics\.evaluate"):
        si.pl.metrics(plot_stack, cross_validated[["low"]])
