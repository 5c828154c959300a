"""Imputed expression on all sections in the common frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from spatial_impute._geometry import linear_scale
from spatial_impute._keys import Keys
from spatial_impute._stack.elements import spot_geometry
from spatial_impute._stack.record import load_record
from spatial_impute._stack.table import stack_table
from spatial_impute._validation import require_finite, require_key, require_positive
from spatial_impute.pl._color import layer_values, units_label
from spatial_impute.pl._utils import (
    INK,
    add_colorbar,
    add_scale_bar,
    check_titles,
    color_limits,
    draw_circles,
    finish,
    frame_panel,
    gene_title,
    label_row,
    limit_per_gene,
    make_panels,
    resolve_cmap,
    section_title,
    sections_in_z,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from spatialdata import SpatialData

    from spatial_impute._stack.record import StackRecord
    from spatial_impute.pl._utils import Limit


_SD_LABEL = "standard deviation"


@dataclass(frozen=True)
class _Row:
    """What one row of panels shows."""

    label: str
    values: np.ndarray
    """(n_spots,) of the whole table."""
    norm: Normalize
    cmap: Colormap
    scale_label: str


def imputed(
    sdata: SpatialData,
    genes: str | Sequence[str],
    *,
    layer: str | Sequence[str] = Keys.ASIGN,
    sections: str | Sequence[str] | None = None,
    show_sd: bool = False,
    show_support: bool = True,
    table_key: str = Keys.STACK_TABLE,
    size: float = 1.0,
    ax: Axes | Sequence[Axes] | None = None,
    figsize: tuple[float, float] | None = None,
    cmap: str | Colormap = "viridis",
    sd_cmap: str | Colormap = "cividis",
    support_cmap: str | Colormap = "magma",
    vmin: Limit | Sequence[Limit] = "p1",
    vmax: Limit | Sequence[Limit] = "p99",
    title: str | Sequence[str] | None = None,
    save: str | Path | None = None,
    show: bool = False,
    return_ax: bool = False,
) -> np.ndarray | None:
    """Expression at the spots of all sections in the common frame: a row per gene, a column per section.

    A gene has one colour scale for all sections and layers. Measured sections are framed, their titles are bold; they show the
    measurement. Beside the name of a gene stands its correlation ``r`` on held-out blocks of the measured sections, if
    `layer` comes from :func:`~spatial_impute.tl.impute_3d`: do not read much into genes where it is low.

    Parameters
    ----------
    sdata
        Registered stack with imputed expression.
    genes
        Gene or genes.
    layer
        Layer of the stack table, or several, one row each: ``["measured", "asign"]`` shows what was measured above what
        was imputed. Spots without a value are grey.
    sections
        Sections to show; all by default.
    show_sd
        Add a row per gene with the standard deviation of a measurement around the imputed value, 0 at measured spots.
    show_support
        Add a row with ``obs["imputation_support"]``, if the table has it: how much of the measurement reaches a spot.
    table_key
        Stack table.
    size
        Factor on the true diameter of the spots.
    ax
        Axes to draw on, row by row, instead of a new figure.
    figsize
        Size of the figure in inches.
    cmap, sd_cmap, support_cmap
        Colour maps of expression, of its standard deviation and of support.
    vmin, vmax
        Colour limits: numbers, percentiles such as ``"p99"`` or ``None`` for the extremes; or one of these per gene.
    title
        One title per section, in place of the default.
    save
        File to save the figure to.
    show
        Call :func:`matplotlib.pyplot.show`.
    return_ax
        Return the axes.

    Returns
    -------
    ``None``, or with ``return_ax=True`` an array (n_rows, n_sections) of :class:`~matplotlib.axes.Axes`: per gene a row
    for each layer and one for the standard deviation, and a last row for the support.

    Raises
    ------
    KeyError
        If the stack is not registered, or a gene, layer or section does not exist, or no layer has a standard deviation.
    ValueError
        If `genes` or `layer` is empty, `ax`, `title`, `vmin` or `vmax` do not fit in number, or colour limits make no sense.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack()
    >>> si.tl.register_stack(sdata, method="rigid", show_progress_bar=False)
    >>> si.tl.impute_baseline(sdata, "kernel")
    >>> axes = si.pl.imputed(sdata, ["smooth_0", "texture_12"], layer="baseline_kernel", return_ax=True)
    >>> axes.shape
    (2, 3)
    """
    record = load_record(sdata)
    wanted = sections_in_z(record, sections)
    titles = check_titles(title, wanted)
    table = stack_table(sdata, table_key)
    where = f"sdata.tables[{table_key!r}]"
    genes = [genes] if isinstance(genes, str) else list(genes)
    if not genes:
        msg = f"`genes` is empty; name some of `{where}.var_names`."
        raise ValueError(msg)
    layers = [layer] if isinstance(layer, str) else list(layer)
    if not layers:
        msg = f"`layer` is empty; name some of {list(table.layers)}."
        raise ValueError(msg)
    values = {name: layer_values(table, genes, name, table_key=table_key) for name in layers}
    deviations = _deviations(table, genes, layers, table_key=table_key) if show_sd else None
    limits = [limit_per_gene(limit, genes, name) for limit, name in ((vmin, "vmin"), (vmax, "vmax"))]
    require_key(Keys.SPATIAL_3D, table.obsm, where=f"{where}.obsm", then="Run `si.tl.register_stack(sdata)` first.")
    xyz = np.asarray(table.obsm[Keys.SPATIAL_3D], dtype=float)
    require_finite(xyz, name=f"{where}.obsm[{Keys.SPATIAL_3D!r}]", row_names=table.obs_names)
    size = require_positive(size, name="size")
    members = {section.name: np.flatnonzero(table.obs[Keys.SECTION] == section.name) for section in wanted}
    shown = np.concatenate(list(members.values()))
    if not shown.size:
        msg = f"`{where}` has no spots on the sections {list(members)}. Lay some with `si.pp.tile_spots(sdata)`."
        raise ValueError(msg)

    units = units_label(table)
    rows = []
    for k, gene in enumerate(genes):
        all_layers = np.concatenate([found[shown, k] for found in values.values()])
        norm = color_limits(all_layers, limits[0][k], limits[1][k])
        for name, found in values.items():
            label = gene_title(table, gene, name, "\n")
            label = label if len(layers) == 1 else f"{label}\n{name}"
            rows.append(_Row(label, found[:, k], norm, resolve_cmap(cmap), units))
        if deviations is not None:
            low_high = color_limits(deviations[shown, k], 0.0, "p99")
            rows.append(_Row(f"{gene}\ndeviation", deviations[:, k], low_high, resolve_cmap(sd_cmap), _SD_LABEL))
    if show_support and Keys.SUPPORT in table.obs:
        support = table.obs[Keys.SUPPORT].to_numpy(dtype=float)
        label = "measurement that\nreaches the spot"
        rows.append(
            _Row("imputation\nsupport", support, color_limits(support, 0.0, 1.0), resolve_cmap(support_cmap), label)
        )

    radius = size * registered_radius(sdata, record, table)
    margin = radius[shown].max() + 0.02 * np.ptp(xyz[shown, :2], axis=0).max()
    low, high = xyz[shown, :2].min(axis=0) - margin, xyz[shown, :2].max(axis=0) + margin
    aspect = (high - low)[1] / (high - low)[0]
    axes = make_panels(len(rows), len(wanted), aspect=aspect, ax=ax, figsize=figsize, margin=(2.2, 0.8))
    axes = axes.reshape(len(rows), len(wanted))
    for i, row in enumerate(rows):
        for panel, index in zip(axes[i], members.values(), strict=True):
            frame_panel(panel, (*low, *high))
            draw_circles(panel, xyz[index, :2], radius[index], values=row.values[index], cmap=row.cmap, norm=row.norm)
            if table.obs[Keys.MEASURED].to_numpy(dtype=bool)[index].any():
                panel.spines[:].set(visible=True, color=INK, linewidth=1.0)
        label_row(axes[i, 0], row.label)
        add_colorbar(axes[i], row.values[shown], row.norm, row.cmap, row.scale_label)
    for i, (panel, (name, index)) in enumerate(zip(axes[0], members.items(), strict=True)):
        measured = bool(table.obs[Keys.MEASURED].to_numpy(dtype=bool)[index].any())
        text = titles[i] if titles else section_title(record[name], measured=measured, separator="\n")
        panel.set_title(text, fontsize="medium", fontweight="bold" if measured else "normal")
    add_scale_bar(axes[-1, 0])
    return finish(axes, save=save, show=show, return_ax=return_ax)


def _deviations(table: AnnData, genes: list[str], layers: list[str], *, table_key: str) -> np.ndarray:
    """(n_spots, n_genes) standard deviation of the first of `layers` that has one."""
    keys = [Keys.sd(name) for name in layers]
    found = next((key for key in keys if key in table.layers), keys[0])
    then = "Only `si.tl.impute_3d` writes one; leave out `show_sd=True` for other layers."
    require_key(found, table.layers, where=f"sdata.tables[{table_key!r}].layers", then=then)
    return layer_values(table, genes, found, table_key=table_key)


def registered_radius(sdata: SpatialData, record: StackRecord, table: AnnData) -> np.ndarray:
    """(n_spots,) radius in the common frame, um, in the order of the table."""
    radius = np.full(table.n_obs, np.nan)
    matrices = (record.registration or {}).get("sections", {})
    for section in record.sections:
        if section.spots is None:
            continue
        _, own, index = spot_geometry(sdata, section)
        rows = (table.obs[Keys.SECTION] == section.name).to_numpy()
        scale = linear_scale(np.asarray(matrices[section.name]["matrix"])) if section.name in matrices else 1.0
        by_id = pd.Series(own * scale, index=index.astype(str))
        radius[rows] = by_id.reindex(table.obs[Keys.INSTANCE].to_numpy()[rows].astype(str)).to_numpy()
    return np.where(np.isfinite(radius), radius, np.nanmedian(radius))
