"""Training curves of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.ticker import MaxNLocator

from spatial_impute.pl._figure import INK, document_figure, finish, grid_shape, make_panels, titles_for

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    import pandas as pd
    from matplotlib.axes import Axes

    from spatial_impute.models import AsignModel, AsignPanels, PixNetModel

_TEXTS = {
    "loss": ("training loss", "loss"),
    "held_out_mse": ("error on held-out blocks", "mean squared error"),
    "held_out_loss": ("loss on held-out regions", "loss"),
    "held_out_r": ("correlation on held-out regions", "Pearson r, mean over genes"),
}
_RUN = "network"  # column of the history: networks of an ensemble
_GENES = "panel"  # column of the history: models of different panels of genes
# Okabe and Ito, without yellow, which is faint as a line.
_LINES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
_PANEL = (3.6, 2.8)  # inches


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
    >>> sdata = si.datasets.synthetic_stack(extent=1400.0, n_genes=9)
    >>> si.tl.register_stack(sdata, method="rigid")
    >>> si.pp.extract_features(sdata)
    >>> si.tl.build_3d_graph(sdata)
    >>> model = si.tl.fit_asign(sdata, model_params={"n_steps": 5})
    >>> axes = si.pl.training(model, return_ax=True)
    >>> [ax.get_title() for ax in axes]
    ['training loss', 'error on held-out blocks']
    >>> si.settings.show_progress_bar = True
    """
    history = getattr(model, "history", None)
    if history is None or "step" not in history:
        msg = (
            f"`model` must have a `history`, as those of `si.tl.fit_asign` and `si.tl.fit_pixnet` do; found "
            f"{type(model).__name__}."
        )
        raise TypeError(msg)
    columns = [name for name in _TEXTS if name in history and history[name].notna().any()]
    if not columns:
        msg = f"The history of `model` is empty ({len(history)} rows, no values): it was fitted with no training step."
        raise ValueError(msg)
    panels = [(name, k, rows) for k, rows in _groups(history, _GENES) for name in columns]
    heads = [_TEXTS[name][0] + ("" if k is None else f", gene panel {k}") for name, k, _ in panels]
    titles = titles_for(title, heads, "per panel")
    n_columns = grid_shape(len(columns), ncols)[1]
    n_rows = -(-len(panels) // n_columns)
    size = figsize or (n_columns * _PANEL[0], n_rows * _PANEL[1])
    axes = make_panels(n_rows, n_columns, aspect=1.0, ax=ax, figsize=size, n_panels=len(panels))
    for panel, (name, _, rows), text in zip(axes, panels, titles, strict=True):
        runs = _groups(rows, _RUN)
        _draw_column(panel, name, runs)
        panel.set_title(text, fontsize="medium")
    if len(runs) > 1:
        axes[0].legend(title=_RUN, fontsize="small", title_fontsize="small", frameon=False, ncols=2)
    return finish(axes, ax=ax, save=save, show=show, return_ax=return_ax)


def _groups(history: pd.DataFrame, column: str) -> list[tuple[int | None, pd.DataFrame]]:
    return list(history.groupby(column, sort=True)) if column in history else [(None, history)]


def _draw_column(ax: Axes, name: str, runs: list[tuple[int | None, pd.DataFrame]]) -> None:
    for k, (run, rows) in enumerate(runs):
        color = _LINES[k % len(_LINES)]
        seen = rows[rows[name].notna()]
        ax.plot(seen["step"], seen[name], color=color, linewidth=1.3, marker=".", markersize=4, label=run)
        kept = rows[rows["kept"].astype(bool) & rows[name].notna()]
        ax.plot(kept["step"], kept[name], color=color, marker="o", markersize=6, linestyle="")
        start = seen.loc[seen["step"] == 0, name]
        if name != "loss" and len(start):
            ax.axhline(start.iloc[0], color=color, linewidth=0.8, linestyle=":")
    import pandas as pd

    kept = pd.concat([rows.loc[rows["kept"].astype(bool), "step"] for _, rows in runs])
    if kept.nunique() == 1:  # else each network has stopped at a step of its own, which its marker shows
        ax.axvline(kept.iloc[0], color=INK, linewidth=0.8, linestyle="--")
        ax.text(kept.iloc[0], 1.0, " kept", transform=ax.get_xaxis_transform(), fontsize="x-small", va="top", color=INK)
    last = max(int(rows["step"].max()) for _, rows in runs)
    ax.set_xlim(-0.03 * last, 1.03 * last)
    ax.set_xlabel("step", fontsize="small")
    ax.set_ylabel(_TEXTS[name][1], fontsize="small")
    ax.tick_params(labelsize="small")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.spines[["top", "right"]].set_visible(False)
