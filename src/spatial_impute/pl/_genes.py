"""One page per gene, and an overview of many: how far each gene can be believed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import Normalize

from spatial_impute._expression import looks_like_counts
from spatial_impute._keys import Keys
from spatial_impute._scores import noise_ceiling, pearson_by_gene
from spatial_impute._stack.elements import registered_radius
from spatial_impute._stack.record import load_record
from spatial_impute._stack.state import warn_if_old
from spatial_impute._stack.table import registered_spots, stack_table, target_sum_of, uns_record
from spatial_impute._validation import name_list, require_count, require_key
from spatial_impute.pl._color import add_colorbar, color_limits, layer_values, resolve_cmap, units_label
from spatial_impute.pl._figure import (
    INK,
    add_scale_bar,
    document_figure,
    draw_circles,
    finish,
    frame_panel,
    given_axes,
    make_panels,
    rows_by_section,
    sections_in_z,
    show_image,
)
from spatial_impute.pl._overlay import Canvas, images_on_canvas

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from spatialdata import SpatialData

    from spatial_impute._stack.record import Section

_MODEL, _OTHER, _CEILING = "#D55E00", "#0072B2", "0.75"  # Okabe and Ito
_MOST_BARS = 8
_ROW = 0.17  # inches per gene: names can be read
_MOST_NAMES = 80  # genes; of more, every second or third name is written
_SHORT = 4  # letters of a name that stands across
_NOT_BELIEVED = "0.7"


@document_figure
def gene_report(
    sdata: SpatialData,
    gene: str,
    scores: pd.DataFrame | None = None,
    *,
    layer: str = Keys.ASIGN,
    img_alpha: float = 0.35,
    table_key: str = Keys.STACK_TABLE,
    ax: Sequence[Axes] | None = None,
    figsize: tuple[float, float] | None = None,
    cmap: str | Colormap = "viridis",
    save: str | Path | None = None,
    show: bool | None = None,
    return_ax: bool = False,
) -> np.ndarray | None:
    """Answer to "is my gene believable?": its maps, predicted against measured values, and its correlations.

    The four panels are the gene as measured; the same spots as expected from all other spots, or the nearest unmeasured
    section; measured against expected values; and the correlation of each method on held-out spots. A grey area ends at
    the noise ceiling: the highest correlation that any prediction can have with these counts.

    The second and third panel show expected values if the layer holds them: ``si.tl.impute_3d(sdata, model,
    measured="denoise")``. Each of these spots was left out with a fifth of the others, so that its neighbors are known.
    Held-out blocks (``var["imputation_r"]``) are a harder test, and more like the prediction of another section.

    Parameters
    ----------
    sdata
        Registered stack with imputed expression.
    gene
        Gene.
    scores
        Correlation of each gene (rows) by method (columns): a table of :func:`~spatial_impute.tl.cross_validate` or
        :func:`~spatial_impute.metrics.evaluate` with ``by="gene"``.
    layer
        Layer of the stack table.
    img_alpha
        Strength of the H&E images; 0 draws none.
    table_key
        Name of the stack table in ``sdata.tables``.
    ax
        Four axes to draw on, instead of a new figure.
    cmap
        Color map of expression.

    Returns
    -------
    ``None``, or with ``return_ax=True`` an array of four :class:`~matplotlib.axes.Axes`.

    Raises
    ------
    KeyError
        If the stack is not registered, or the gene or layer does not exist.
    ValueError
        If nothing is measured, `scores` has no row of the gene, or `ax` does not hold four axes.

    Examples
    --------
    >>> import spatial_impute as si
    >>> si.settings.show_progress_bar = False
    >>> sdata = si.datasets.synthetic_stack(extent=1400.0)
    >>> si.tl.register_stack(sdata)
    >>> si.pp.extract_features(sdata)
    >>> si.tl.build_3d_graph(sdata)
    >>> model = si.tl.fit_asign(sdata, model_params={"n_steps": 5})
    >>> si.tl.impute_3d(sdata, model, measured="denoise")
    >>> axes = si.pl.gene_report(sdata, "smooth_0", return_ax=True)
    >>> print(axes[0].get_title())
    s1
    as measured
    >>> axes = si.pl.gene_overview(sdata, return_ax=True)
    >>> axes[0].get_images()[0].get_array().shape
    (36, 3)
    >>> si.settings.show_progress_bar = True
    """
    record, table = load_record(sdata), stack_table(sdata, table_key)
    layers = [Keys.MEASURED, layer]
    seen, found = (layer_values(table, [gene], name, table_key=table_key)[:, 0] for name in layers)
    warn_if_old(sdata, table, layers)
    bars = _correlations(table, gene, scores)
    xyz, radius = registered_spots(table, table_key), registered_radius(sdata, record, table)
    known = table.obs[Keys.MEASURED].to_numpy(dtype=bool) & np.isfinite(seen)
    if not known.any():
        msg = f"{gene!r} was not measured on any section, so there is nothing to compare it with."
        raise ValueError(msg)
    code = table.obs[Keys.SECTION].to_numpy()
    counted = table.obs[Keys.SECTION][known].value_counts()
    own = record[str(counted.index[0])]
    expected = uns_record(table, layer).get("measured") == "denoise"
    rows = [np.flatnonzero(known & (code == own.name))] * 2
    heads = [f"{own.name}\nas measured", f"{own.name}, as expected\nfrom the other spots"]
    other = own
    if not expected:
        measured = set(counted.index[counted > 0])
        unmeasured = [section for section in sections_in_z(record, None) if section.name not in measured]
        other = min(unmeasured or [own], key=lambda section: abs(section.z - own.z))
        rows[1], heads[1] = np.flatnonzero(code == other.name), f"{other.name}, imputed\nz = {other.z:g} µm"

    shown = np.concatenate(rows)
    reach = radius[shown].max()
    canvas = Canvas.around(np.concatenate([xyz[shown, :2] - reach, xyz[shown, :2] + reach]))
    aspect = canvas.height / canvas.width
    axes = make_panels(1, 4, aspect=max(aspect, 0.75), ax=ax, figsize=figsize, margin=(1.0, 0.9))
    both, colors = np.concatenate([seen[rows[0]], found[rows[1]]]), resolve_cmap(cmap)
    norm = color_limits(both, "p1", "p99")
    images = images_on_canvas(sdata, record, [own, other], canvas) if img_alpha > 0 else []
    for k, (panel, index, values) in enumerate(zip(axes[:2], rows, (seen, found), strict=True)):
        frame_panel(panel, canvas.limits)
        if images:
            show_image(panel, images[k], canvas.to_um, alpha=img_alpha)
        spots = xyz[index, :2], radius[index]
        draw_circles(panel, *spots, values=values[index], cmap=colors, norm=norm, marked=k == 0)
        panel.set_title(heads[k], fontsize="medium")
    add_colorbar(axes[:2], both, norm, colors, units_label(table))
    add_scale_bar(axes[0])
    _draw_pairs(axes[2], found[rows[0]], seen[rows[0]], expected=expected)
    _draw_correlations(axes[3], bars, _ceiling(sdata, table, own, gene))
    if ax is None:
        axes[0].get_figure(root=True).suptitle(_verdict(table, gene), fontsize="large", parse_math=False)
    return finish(axes, ax=ax, save=save, show=show, return_ax=return_ax)


def _correlations(table: AnnData, gene: str, scores: pd.DataFrame | None) -> dict[str, float]:
    """Held-out correlation of the gene by method, best first."""
    found = {}
    if Keys.PREDICTABILITY in table.var and np.isfinite(table.var.loc[gene, Keys.PREDICTABILITY]):
        found["asign (held out)"] = float(table.var.loc[gene, Keys.PREDICTABILITY])
    if scores is not None:
        if scores.index.name != "gene":
            msg = "`scores` must have a row per gene. Make it so, e.g. with `si.tl.cross_validate(sdata, by='gene')`."
            raise ValueError(msg)
        require_key(gene, scores.index, where="scores.index")
        row = scores.loc[gene].drop("ceiling", errors="ignore").dropna()
        found |= {str(name).removeprefix(Keys.baseline("")): float(r) for name, r in row.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1])[:_MOST_BARS])


def _ceiling(sdata: SpatialData, table: AnnData, section: Section, gene: str) -> float:
    """Noise ceiling of the gene on a section; NaN without its counts."""
    counts = None if section.counts is None else sdata.tables[section.counts]
    layer = str(uns_record(table, Keys.NORMALIZATION).get("layer", ""))
    matrix = None if counts is None else counts.layers.get(layer) if layer else counts.X
    if counts is None or matrix is None or gene not in counts.var_names:
        return float("nan")
    own = matrix[:, counts.var_names.get_loc(gene)]
    own = np.ravel(own.toarray() if hasattr(own, "toarray") else own).astype(float)
    total = np.ravel(matrix.sum(axis=1)).astype(float)
    if not looks_like_counts(own) or not (total > 0).all():
        return float("nan")
    # All other genes are one column: the sum of halves of counts is a half of their sum.
    pair = np.column_stack([own, total - own])
    return float(noise_ceiling(pair, np.array([0]), target_sum=target_sum_of(table))[0])


def _verdict(table: AnnData, gene: str) -> str:
    """One sentence on the gene, from the held-out spots."""
    r = float(table.var.loc[gene, Keys.PREDICTABILITY]) if Keys.PREDICTABILITY in table.var else float("nan")
    if not np.isfinite(r):
        return f"{gene}: nothing was held out, so nothing says whether it can be believed"
    believed = bool(table.var.loc[gene, Keys.PREDICTABLE]) if Keys.PREDICTABLE in table.var else r > 0
    if not believed:
        return f"{gene}: not predicted better than by chance (r = {r:.2f}), do not interpret its map"
    return f"{gene}: predicted with r = {r:.2f} on held-out spots"


def _draw_pairs(ax: Axes, found: np.ndarray, seen: np.ndarray, *, expected: bool) -> None:
    """Measured against expected values."""
    if not expected:
        ax.set_axis_off()
        text = 'for measured against\nexpected values:\nimpute_3d(...,\nmeasured="denoise")'
        ax.text(0.5, 0.5, text, ha="center", va="center", fontsize="small", color=INK, transform=ax.transAxes)
        return
    ax.scatter(found, seen, s=9, color=_OTHER, alpha=0.6, linewidths=0)
    ends = [min(found.min(), seen.min()), max(found.max(), seen.max())]
    ax.plot(ends, ends, color=INK, linewidth=0.6, linestyle=":")
    r = pearson_by_gene(found[:, None], seen[:, None])[0]
    ax.set_title(f"spots left out: r = {r:.2f}", fontsize="medium")
    ax.set_xlabel("expected", fontsize="small")
    ax.set_ylabel("measured", fontsize="small")
    ax.tick_params(labelsize="small")
    ax.spines[["top", "right"]].set_visible(False)


def _draw_correlations(ax: Axes, bars: dict[str, float], ceiling: float) -> None:
    """Correlation by method, best on top, and what noise allows."""
    names = list(bars)[::-1]
    values = [bars[name] for name in names]
    low = min([0.0, *values])
    if np.isfinite(ceiling):
        ax.axvspan(0, ceiling, color=_CEILING, alpha=0.35, linewidth=0)
        place: dict[str, Any] = {"ha": "right", "va": "top", "transform": ax.get_xaxis_transform()}
        ax.text(ceiling, 1.0, f"{ceiling:.2f} ", fontsize="x-small", **place)
    colors = [_MODEL if name.startswith(Keys.ASIGN) else _OTHER for name in names]
    ax.barh(range(len(names)), values, color=colors, height=0.6)
    ax.set_yticks(range(len(names)), names, fontsize="small")
    ax.set(xlim=(low * 1.1, 1.0), ylim=(len(names) - 0.2 - max(len(names) + 0.5, 4), len(names) - 0.2))
    ax.axvline(0, color=INK, linewidth=0.6)
    ax.set_title("r by method\n(grey: up to the noise ceiling)", fontsize="medium")
    ax.tick_params(labelsize="small")
    ax.spines[["top", "right", "left"]].set_visible(False)


@document_figure
def gene_overview(
    sdata: SpatialData,
    genes: Sequence[str] | None = None,
    *,
    layer: str = Keys.ASIGN,
    n_genes: int = 50,
    sections: str | Sequence[str] | None = None,
    table_key: str = Keys.STACK_TABLE,
    ax: Sequence[Axes] | None = None,
    figsize: tuple[float, float] | None = None,
    cmap: str | Colormap = "RdBu_r",
    save: str | Path | None = None,
    show: bool | None = None,
    return_ax: bool = False,
) -> np.ndarray | None:
    """Mean expression of many genes on each section, the most predictable gene on top, with its held-out correlation.

    A color says how far the mean of a section lies from the mean over the sections, in standard deviations of the gene
    between spots. The names of measured sections are bold. If a measured section differs from its neighbors in nearly
    all genes, the reason is probably depth or batch, and not the tissue. Genes with a grey bar are not predicted better
    than by chance.

    Parameters
    ----------
    sdata
        Stack with imputed expression.
    genes
        Genes to show; by default the `n_genes` that are predicted best.
    layer
        Layer of the stack table.
    n_genes
        Number of genes, if `genes` does not name them.
    sections
        Sections to show; all by default.
    table_key
        Name of the stack table in ``sdata.tables``.
    ax
        Two axes to draw on, instead of a new figure.
    cmap
        Color map.

    Returns
    -------
    ``None``, or with ``return_ax=True`` an array of two :class:`~matplotlib.axes.Axes`: the heat map and the bars.

    Raises
    ------
    KeyError
        If a gene, section or layer does not exist, or ``var["imputation_r"]`` is missing.
    ValueError
        If `genes` is empty or `ax` does not hold two axes.

    Examples
    --------
    See :func:`~spatial_impute.pl.gene_report`.
    """
    record, table = load_record(sdata), stack_table(sdata, table_key)
    wanted = sections_in_z(record, sections)
    then = "Run `si.tl.impute_3d(sdata, model)` first."
    require_key(Keys.PREDICTABILITY, table.var, where=f"sdata.tables[{table_key!r}].var", then=then)
    warn_if_old(sdata, table, [layer])
    r = table.var[Keys.PREDICTABILITY]
    if genes is None:
        names = list(r.sort_values(ascending=False, kind="stable").index[: require_count(n_genes, name="n_genes")])
    else:
        names = name_list(genes, name="genes")
        for gene in names:
            require_key(gene, table.var_names, where=f"sdata.tables[{table_key!r}].var_names")
        names = list(r[names].sort_values(ascending=False, kind="stable").index)
    if not names:
        msg = "`genes` is empty; name some, or leave it out."
        raise ValueError(msg)
    values = layer_values(table, names, layer, table_key=table_key)
    rows, measured = rows_by_section(table, wanted)
    used = [k for k, index in enumerate(rows) if len(index)]
    means = np.stack([np.nanmean(values[rows[k]], axis=0) for k in used], axis=1)
    spread = np.maximum(np.nanstd(values[np.concatenate([rows[k] for k in used])], axis=0), 1e-12)
    shift = (means - means.mean(axis=1, keepdims=True)) / spread[:, None]

    if ax is None:
        height = max(2.2, _ROW * min(len(names), _MOST_NAMES) + 1.0)
        figure = plt.figure(figsize=figsize or (3.4 + 0.55 * len(used), height), layout="constrained")
        heat, bars = figure.subplots(1, 2, sharey=True, width_ratios=[0.35 * len(used) + 0.5, 1.2])
    else:
        heat, bars = given_axes(ax, 2, "heat map, bars")
    limit = max(0.2, float(np.nanpercentile(np.abs(shift), 99)))
    norm, colors = Normalize(-limit, limit), resolve_cmap(cmap)
    heat.imshow(shift, cmap=colors, norm=norm, aspect="auto", interpolation="none")
    labels = [wanted[k].name for k in used]
    heat.set_xticks(range(len(used)), labels, rotation=90 if max(map(len, labels)) > _SHORT else 0, fontsize="small")
    heat.set_xlabel("bold: measured", fontsize="small")
    for label, k in zip(heat.get_xticklabels(), used, strict=True):
        label.set_fontweight("bold" if measured[k] else "normal")
    step = -(-len(names) // _MOST_NAMES)
    heat.set_yticks(range(0, len(names), step), names[::step], fontsize="x-small")
    heat.tick_params(length=0)
    heat.spines[:].set_visible(False)
    believed = table.var[Keys.PREDICTABLE].reindex(names) if Keys.PREDICTABLE in table.var else r[names] > 0
    bars.barh(range(len(names)), r[names], color=np.where(believed, _OTHER, _NOT_BELIEVED), height=0.7)
    bars.axvline(0, color=INK, linewidth=0.6)
    grey = "" if np.all(believed) else "\n(grey: not better than chance)"
    bars.set_xlabel(f"r on held-out spots{grey}", fontsize="small")
    bars.tick_params(axis="y", length=0, labelleft=False)
    bars.tick_params(axis="x", labelsize="small")
    bars.spines[["top", "right", "left"]].set_visible(False)
    add_colorbar([bars], shift, norm, colors, "section mean minus mean of all,\nin standard deviations", n_rows=1)
    return finish(np.array([heat, bars], dtype=object), ax=ax, save=save, show=show, return_ax=return_ax)
