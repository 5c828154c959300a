"""Scores of baselines and models, predictability of genes, and the training of a model."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from spatial_impute._keys import Keys
from spatial_impute._scores import bootstrap_interval
from spatial_impute._stack.state import warn_if_old
from spatial_impute._stack.table import stack_table
from spatial_impute._validation import require_key
from spatial_impute.pl._figure import INK, document_figure, finish, grid_shape, make_panels, titles_for

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from spatialdata import SpatialData

    from spatial_impute.models import AsignModel, AsignPanels, PixNetModel

_BASELINE, _MODEL, _FAINT = "#0072B2", "#D55E00", "0.75"  # Okabe and Ito
_HEADLINE = "pearson_gene"
_TEXTS = {
    "pearson_gene": "Pearson r per gene, mean",
    "pearson_gene_median": "Pearson r per gene, median",
    "pearson_gene_q1": "Pearson r per gene, first quartile",
    "pearson_gene_positive": "share of genes with r > 0",
    "pearson_spot": "Pearson r per spot",
    "mse": "mean squared error",
    "mae": "mean absolute error",
    "skill": "skill over the mean profile",
}
_LOWER_IS_BETTER = ("mse", "mae")
_N_LABELS = 2  # genes named by default in the panel of genes
_N_ON_LINE = 200  # points of a curve that a name should not cover
_AWAY = range(6, 150, 6)  # distances of a name from its point, in points of the page
_AROUND = np.array([(np.cos(angle), np.sin(angle)) for angle in np.pi / 8 * np.arange(16)])
_CURVES = {
    "loss": ("training loss", "loss"),
    "held_out_mse": ("error on held-out spots", "mean squared error"),
    "held_out_loss": ("loss on held-out regions", "loss"),
    "held_out_r": ("correlation on held-out regions", "Pearson r, mean over genes"),
}
_RUN = "network"  # column of the history: networks of an ensemble
_GENES = "panel"  # column of the history: models of different panels of genes
# Okabe and Ito, without yellow, which is faint as a line.
_LINES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
_PANEL = (3.6, 2.8)  # inches


@document_figure
def metrics(
    sdata: SpatialData,
    scores: pd.DataFrame | None = None,
    *,
    metric: str | Sequence[str] | None = None,
    layer: str = Keys.ASIGN,
    genes: Sequence[str] | None = None,
    show_predictability: bool = True,
    table_key: str = Keys.STACK_TABLE,
    ncols: int = 2,
    ax: Axes | Sequence[Axes] | None = None,
    figsize: tuple[float, float] | None = None,
    title: str | Sequence[str] | None = None,
    save: str | Path | None = None,
    show: bool | None = None,
    return_ax: bool = False,
) -> np.ndarray | None:
    """Scores of baselines and models with their intervals, and the predictability of genes.

    The panels depend on the rows of `scores`:

    - one row per method or layer: a panel per `metric`, the best method on top. The mean correlation has its 95 %
      interval over genes, if the table has one (:func:`~spatial_impute.tl.cross_validate`);
    - one row per layer and section (``by="section"``): the same, with a small mark per section;
    - one row per gene (``by="gene"``): correlations of all genes as small marks, and their mean with the 95 % interval
      by bootstrap over genes.

    The last panel shows ``var["imputation_r"]``, the held-out correlation of each gene, sorted. If `scores` has the
    correlation per gene of `layer`, it shows both against each other.

    Parameters
    ----------
    sdata
        Stack; only the genes of its table are read.
    scores
        Table of :func:`~spatial_impute.tl.cross_validate` or :func:`~spatial_impute.metrics.evaluate`.
    metric
        Columns to show; by default ``"pearson_gene"``, ``"pearson_gene_positive"`` and ``"skill"``. Ignored for scores
        per gene.
    layer
        Layer to highlight, and whose genes the last panel compares.
    genes
        Genes to name in the last panel; by default the best and the worst.
    show_predictability
        Draw the last panel, if the table has ``var["imputation_r"]``.
    table_key
        Name of the stack table in ``sdata.tables``.
    ncols
        Panels per row.
    ax
        Axes to draw on, one per panel, instead of a new figure.
    title
        One title per panel, instead of the default.

    Returns
    -------
    ``None``, or with ``return_ax=True`` an array of :class:`~matplotlib.axes.Axes`, one per panel.

    Raises
    ------
    KeyError
        If a column of the scores or a gene to name does not exist.
    ValueError
        If `scores` and the table hold nothing to draw, or `ax` or `title` do not fit the number of panels.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata, truth = si.datasets.synthetic_stack(extent=1400.0, truth=True)
    >>> si.tl.register_stack(sdata, show_progress_bar=False)
    >>> for method in ("mean", "kernel"):
    ...     si.tl.impute_baseline(sdata, method)
    >>> axes = si.pl.metrics(sdata, si.metrics.evaluate(sdata, truth), metric=["pearson_gene", "mse"], return_ax=True)
    >>> [ax.get_xlabel() for ax in axes]
    ['Pearson r per gene, mean', 'mean squared error']
    """
    if hasattr(sdata, "columns"):
        msg = "`sdata` must be the stack, found a table. The stack comes first: `si.pl.metrics(sdata, scores)`."
        raise TypeError(msg)
    table = stack_table(sdata, table_key)
    warn_if_old(sdata, table, [layer])
    for gene in [] if genes is None else genes:
        require_key(gene, table.var_names, where=f"sdata.tables[{table_key!r}].var_names")
    n_methods, reached = 4, None
    draw: list[Callable[[Axes], None]] = []
    if scores is not None and scores.index.name == "gene":
        draw, n_methods = [partial(_draw_genes_by_method, scores=scores, layer=layer)], scores.shape[1]
        reached = scores[layer].reindex(table.var_names) if layer in scores else None
    elif scores is not None:
        names, n_methods = _metric_names(scores, metric), scores.index.get_level_values(0).nunique()
        draw = [partial(_draw_methods, scores=scores, name=name, layer=layer) for name in names]
    if show_predictability and Keys.PREDICTABILITY in table.var:
        expected = table.var[Keys.PREDICTABILITY]
        draw.append(partial(_draw_predictability, expected=expected, reached=reached, genes=genes))
    if not draw:
        msg = (
            f"Nothing to draw: pass `scores`, or let `si.tl.impute_3d(sdata, model)` write "
            f"`sdata.tables[{table_key!r}].var[{Keys.PREDICTABILITY!r}]` first."
        )
        raise ValueError(msg)
    n_rows, n_columns = grid_shape(len(draw), ncols)
    titles = titles_for(title, [""] * len(draw), "per panel")
    size = figsize or (4.0 * n_columns, n_rows * max(2.8, 0.32 * n_methods + 1.1))
    axes = make_panels(n_rows, n_columns, aspect=1.0, ax=ax, figsize=size, n_panels=len(draw))
    for panel, draw_panel, text in zip(axes, draw, titles, strict=True):
        draw_panel(panel)
        panel.tick_params(labelsize="small")
        panel.spines[["top", "right"]].set_visible(False)
        if text:
            panel.set_title(text, fontsize="medium")
    return finish(axes, ax=ax, save=save, show=show, return_ax=return_ax)


def _metric_names(scores: pd.DataFrame, metric: str | Sequence[str] | None) -> list[str]:
    if metric is None:
        names = [name for name in (_HEADLINE, "pearson_gene_positive", "skill") if name in scores]
        if not names:
            then = "Pass a table of `si.metrics.evaluate`."
            require_key(_HEADLINE, scores.columns, where="scores.columns", then=then)
        return names
    names = [metric] if isinstance(metric, str) else list(metric)
    for name in names:
        require_key(name, scores.columns, where="scores.columns")
    return names


def _order(ax: Axes, values: pd.Series, layer: str, *, higher_is_better: bool = True) -> pd.Series:
    """Sort from the worst (bottom) to the best, and name the rows."""
    values = values.sort_values(ascending=higher_is_better, na_position="first")
    ax.set_yticks(range(len(values)), [str(name).removeprefix(Keys.baseline("")) for name in values.index])
    for label, name in zip(ax.get_yticklabels(), values.index, strict=True):
        label.set(color=_MODEL if name == layer else INK, fontweight="bold" if name == layer else "normal")
    ax.set_ylim(-0.6, len(values) - 0.4)
    return values


def _draw_methods(ax: Axes, scores: pd.DataFrame, name: str, layer: str) -> None:
    by_section = scores.index.nlevels > 1
    column = scores[name].groupby(level=0, sort=False).mean() if by_section else scores[name]
    values = _order(ax, column, layer, higher_is_better=name not in _LOWER_IS_BETTER)
    colors = [_MODEL if method == layer else _BASELINE for method in values.index]
    for y, (method, value) in enumerate(values.items()):
        if by_section:
            each = scores[name].xs(method, level=0)
            ax.scatter(each, np.full(len(each), y), s=12, color=_FAINT, zorder=1)
        elif name == _HEADLINE and {"low", "high"} <= set(scores.columns):
            low, high = scores.loc[method, ["low", "high"]]
            ax.plot([low, high], [y, y], color=colors[y], linewidth=1.5, zorder=1)
        ax.scatter([value], [y], s=36, color=colors[y], zorder=2)
    if name in ("skill", _HEADLINE):
        ax.axvline(0, color=INK, linewidth=0.6, linestyle=":")
    ax.set_xlabel(_TEXTS.get(name, name), fontsize="small")


def _draw_genes_by_method(ax: Axes, scores: pd.DataFrame, layer: str) -> None:
    values = _order(ax, scores.mean(), layer)
    for y, (method, value) in enumerate(values.items()):
        color = _MODEL if method == layer else _BASELINE
        each = scores[method].dropna().to_numpy()
        # Spread by rank, so that marks at the same place can be told apart.
        spread = 0.25 * ((np.arange(len(each)) % 5) / 2 - 1)
        ax.scatter(each, y + spread, s=5, color=_FAINT, zorder=1)
        ax.plot(bootstrap_interval(each), [y, y], color=color, linewidth=2, zorder=2)
        ax.scatter([value], [y], s=36, color=color, zorder=3)
    ax.axvline(0, color=INK, linewidth=0.6, linestyle=":")
    ax.set_xlabel("Pearson r per gene", fontsize="small")


def _draw_predictability(ax: Axes, expected: pd.Series, reached: pd.Series | None, genes: Sequence[str] | None) -> None:
    known = expected.dropna().sort_values(ascending=False)
    named = [*known.index[: _N_LABELS // 2], *known.index[-(_N_LABELS // 2) :]] if genes is None else list(genes)
    if reached is None:
        rank = np.arange(1, len(known) + 1)
        ax.plot(rank, known, color=_MODEL, marker=".", markersize=5, linewidth=0.8)
        ax.set_xlabel("gene, from the most predictable", fontsize="small")
        ax.set_ylabel("expected r (held-out spots)", fontsize="small")
        places = {gene: (rank[k], known.iloc[k]) for k, gene in enumerate(known.index)}
        fine = np.linspace(1, len(known), _N_ON_LINE)
        drawn = np.column_stack([fine, np.interp(fine, rank, known)])
    else:
        ax.scatter(known, reached[known.index], s=14, color=_MODEL)
        ends = [min(known.min(), reached.min(), 0.0), max(known.max(), reached.max())]
        ax.plot(ends, ends, color=INK, linewidth=0.6, linestyle=":")
        ax.set_xlabel("expected r (held-out spots)", fontsize="small")
        ax.set_ylabel("r reached", fontsize="small")
        places = {gene: (known[gene], reached[gene]) for gene in known.index if np.isfinite(reached[gene])}
        drawn = np.array(list(places.values()))
    ax.axhline(0, color=INK, linewidth=0.6, linestyle=":")
    for gene in dict.fromkeys(named):
        if gene in places:
            drawn = np.concatenate([drawn, _name_point(ax, gene, places[gene], drawn)])


def _name_point(ax: Axes, name: str, place: tuple[float, float], drawn: np.ndarray) -> np.ndarray:
    """Write the name as near to the point as it covers none of the `drawn` points and stays inside.

    Returns points of the name, so that the next name does not cover it.
    """
    ax.get_xlim(), ax.get_ylim()  # matplotlib updates the limits only when they are read
    # All in points of the page: places relative to the named one, and the size of the text.
    per_pixel, here = 72 / ax.figure.dpi, ax.transData.transform([place])
    apart = per_pixel * (ax.transData.transform(drawn) - here)
    low, high = per_pixel * (ax.bbox.get_points() - here)
    half = np.array([5.0 * len(name), 8.0]) / 2

    def faults(center: np.ndarray) -> tuple[bool, int]:
        outside = bool((center - half < low).any() or (center + half > high).any())
        return outside, int((np.abs(apart - center) < half + 4).all(axis=1).sum())

    # The nearest of the best.
    center = min((around * (half + away) for away in _AWAY for around in _AROUND), key=faults)
    style: dict[str, Any] = {
        "ha": "center",
        "va": "center",
        "fontsize": "x-small",
        "color": INK,
        "arrowprops": {"arrowstyle": "-", "color": INK, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2},
    }
    text = ax.annotate(name, place, xytext=center, textcoords="offset points", **style)
    text.set_path_effects([withStroke(linewidth=2, foreground="white")])
    written = center + half * [[x, y] for x in (-1, 0, 1) for y in (-1, 1)]
    return ax.transData.inverted().transform(here + written / per_pixel)


@document_figure
def training(
    model: AsignModel | AsignPanels | PixNetModel,
    *,
    ncols: int = 3,
    ax: Axes | Sequence[Axes] | None = None,
    figsize: tuple[float, float] | None = None,
    title: str | Sequence[str] | None = None,
    save: str | Path | None = None,
    show: bool | None = None,
    return_ax: bool = False,
) -> np.ndarray | None:
    """Training loss and held-out error by step; markers show the step that each network kept.

    A dashed vertical line is drawn if all kept the same step. The horizontal dotted line is the error of the base,
    where the network starts. If the kept step is 0, training did not lower the error on the held-out spots, and the
    model predicts with the base alone. If sections were measured with different panels of genes, each panel has plots
    of its own.

    Parameters
    ----------
    model
        Model of :func:`~spatial_impute.tl.fit_asign` (a line per network of the ensemble) or
        :func:`~spatial_impute.tl.fit_pixnet`.
    ncols
        Panels per row.
    ax
        Axes to draw on, one per panel, instead of a new figure.
    title
        One title per panel, instead of the default.

    Returns
    -------
    ``None``, or with ``return_ax=True`` an array of :class:`~matplotlib.axes.Axes`: the loss, then the held-out scores.

    Raises
    ------
    TypeError
        If `model` has no history.
    ValueError
        If the history is empty, or `ax` or `title` do not fit the number of panels.

    Examples
    --------
    >>> import spatial_impute as si
    >>> si.settings.show_progress_bar = False
    >>> sdata = si.datasets.synthetic_stack(extent=1400.0)
    >>> si.tl.register_stack(sdata)
    >>> si.pp.extract_features(sdata)
    >>> si.tl.build_3d_graph(sdata)
    >>> model = si.tl.fit_asign(sdata, model_params={"n_steps": 5})
    >>> axes = si.pl.training(model, return_ax=True)
    >>> [ax.get_title() for ax in axes]
    ['training loss', 'error on held-out spots']
    >>> si.settings.show_progress_bar = True
    """
    history = getattr(model, "history", None)
    if history is None or "step" not in history:
        msg = (
            f"`model` must have a `history`, as those of `si.tl.fit_asign` and `si.tl.fit_pixnet` do; found "
            f"{type(model).__name__}."
        )
        raise TypeError(msg)
    columns = [name for name in _CURVES if name in history and history[name].notna().any()]
    if not columns:
        msg = f"The history of `model` is empty ({len(history)} rows, no values): it was fitted with no training step."
        raise ValueError(msg)
    panels = [(name, k, rows) for k, rows in _groups(history, _GENES) for name in columns]
    heads = [_CURVES[name][0] + ("" if k is None else f", gene panel {k}") for name, k, _ in panels]
    titles = titles_for(title, heads, "per panel")
    n_columns = grid_shape(len(columns), ncols)[1]
    n_rows = -(-len(panels) // n_columns)
    size = figsize or (n_columns * _PANEL[0], n_rows * _PANEL[1])
    axes = make_panels(n_rows, n_columns, aspect=1.0, ax=ax, figsize=size, n_panels=len(panels))
    for panel, (name, _, rows), text in zip(axes, panels, titles, strict=True):
        runs = _groups(rows, _RUN)
        _draw_curve(panel, name, runs)
        panel.set_title(text, fontsize="medium")
    if len(runs) > 1:
        axes[0].legend(title=_RUN, fontsize="small", title_fontsize="small", frameon=False, ncols=2)
    return finish(axes, ax=ax, save=save, show=show, return_ax=return_ax)


def _groups(history: pd.DataFrame, column: str) -> list[tuple[int | None, pd.DataFrame]]:
    return list(history.groupby(column, sort=True)) if column in history else [(None, history)]


def _draw_curve(ax: Axes, name: str, runs: list[tuple[int | None, pd.DataFrame]]) -> None:
    for k, (run, rows) in enumerate(runs):
        color = _LINES[k % len(_LINES)]
        seen = rows[rows[name].notna()]
        ax.plot(seen["step"], seen[name], color=color, linewidth=1.3, marker=".", markersize=4, label=run)
        kept = rows[rows["kept"].astype(bool) & rows[name].notna()]
        ax.plot(kept["step"], kept[name], color=color, marker="o", markersize=6, linestyle="")
        start = seen.loc[seen["step"] == 0, name]
        if name != "loss" and len(start):
            ax.axhline(start.iloc[0], color=color, linewidth=0.8, linestyle=":")
    kept = pd.concat([rows.loc[rows["kept"].astype(bool), "step"] for _, rows in runs])
    if kept.nunique() == 1:  # else the networks stopped at different steps, which the markers show
        ax.axvline(kept.iloc[0], color=INK, linewidth=0.8, linestyle="--")
        ax.text(kept.iloc[0], 1.0, " kept", transform=ax.get_xaxis_transform(), fontsize="x-small", va="top", color=INK)
    last = max(int(rows["step"].max()) for _, rows in runs)
    ax.set_xlim(-0.03 * last, 1.03 * last)
    ax.set_xlabel("step", fontsize="small")
    ax.set_ylabel(_CURVES[name][1], fontsize="small")
    ax.tick_params(labelsize="small")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.spines[["top", "right"]].set_visible(False)
