"""Expression in 3D: orthogonal slices through the stack, and an interactive view."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from spatial_impute._graph import typical_spacing
from spatial_impute._keys import Keys
from spatial_impute._stack.record import load_record
from spatial_impute._stack.table import stack_table
from spatial_impute._validation import require_finite, require_key, require_positive
from spatial_impute.pl._color import layer_values, units_label
from spatial_impute.pl._space import resolve_stretch, stack_share
from spatial_impute.pl._utils import (
    INK,
    add_colorbar,
    add_scale_bar,
    color_limits,
    finish,
    frame_panel,
    gene_title,
    limit_per_gene,
    resolve_cmap,
    sections_in_z,
)
from spatial_impute.pl._voxels import Volume, interpolate_stack

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.colors import Colormap, Normalize
    from plotly.graph_objects import Figure
    from spatialdata import SpatialData

    from spatial_impute._stack.record import Section
    from spatial_impute.pl._utils import Limit

_PANELS = 3  # planes per gene
_SLICE_HEIGHT = 0.3  # of the longer side of the tissue: the slices across the stack beside the one in it
_LARGE = 3.3  # inches, the longer side of the tissue


def volume(
    sdata: SpatialData,
    genes: str | Sequence[str],
    *,
    layer: str = Keys.ASIGN,
    sections: str | Sequence[str] | None = None,
    position: tuple[float | None, float | None, float | None] | None = None,
    resolution: float | None = None,
    z_stretch: float | None = None,
    interactive: bool = False,
    table_key: str = Keys.STACK_TABLE,
    ncols: int = 2,
    ax: Axes | Sequence[Axes] | None = None,
    figsize: tuple[float, float] | None = None,
    cmap: str | Colormap = "viridis",
    vmin: Limit | Sequence[Limit] = "p1",
    vmax: Limit | Sequence[Limit] = "p99",
    title: str | Sequence[str] | None = None,
    save: str | Path | None = None,
    show: bool = False,
    return_ax: bool = False,
) -> np.ndarray | Figure | None:
    """Expression interpolated in 3D: orthogonal slices through the stack in the common frame.

    Per gene a slice along the sections (x, y) and two across them (z, y and x, z), whose places are marked in each
    other; measured sections are bold. Values are interpolated between the spots of a section and linearly between sections; nothing is shown
    outside the tissue. Only the sections, marked as ticks, carry values: what lies between them is drawn for the eye
    and is no prediction. Sections on which `layer` has no value are passed over.

    Parameters
    ----------
    sdata
        Registered stack with imputed expression.
    genes
        Gene or genes.
    layer
        Layer of the stack table.
    sections
        Sections to use; all by default, at least two with values.
    position
        x, y and z (um, common frame) of the slices; ``None`` for the middle of the tissue.
    resolution
        Edge of a cell in x and y in um; by default a sixth of the spot spacing.
    z_stretch
        Factor on z, which is written into the figure; by default such that the slices across can be read.
    interactive
        Return an interactive view made with plotly instead: the slices in 3D, with a slider for z. Needs
        ``pip install "spatial-impute[interactive]"``. One gene only; `save` writes HTML that needs nothing else.
    table_key
        Stack table.
    ncols
        Genes per row.
    ax
        Axes to draw on instead of a new figure: three per gene, for (x, y), (z, y) and (x, z).
    figsize
        Size of the figure in inches.
    cmap
        Colour map.
    vmin, vmax
        Colour limits: numbers, percentiles such as ``"p99"`` of the spots, or ``None`` for the extremes; or one of
        these per gene.
    title
        One title per gene, in place of the default.
    save
        File to save the figure to.
    show
        Call :func:`matplotlib.pyplot.show`, or open the interactive view.
    return_ax
        Return the axes.

    Returns
    -------
    ``None``, or with ``return_ax=True`` an array (n_genes, 3) of :class:`~matplotlib.axes.Axes`. With
    ``interactive=True`` a plotly figure.

    Raises
    ------
    KeyError
        If the stack is not registered, or a gene, layer or section does not exist.
    ValueError
        If fewer than two sections have values, two have the same height, a slice lies outside the tissue, or `ax`,
        `title`, `vmin` or `vmax` do not fit in number.
    ImportError
        If ``interactive=True`` and plotly is not installed.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack(extent=1400.0, n_genes=9)
    >>> si.tl.register_stack(sdata, method="rigid", show_progress_bar=False)
    >>> si.tl.impute_baseline(sdata, "kernel")
    >>> axes = si.pl.volume(sdata, "smooth_0", layer="baseline_kernel", return_ax=True)
    >>> axes.shape
    (1, 3)
    """
    genes = [genes] if isinstance(genes, str) else list(genes)
    table = stack_table(sdata, table_key)
    where = f"sdata.tables[{table_key!r}]"
    if not genes:
        msg = f"`genes` is empty; name some of `{where}.var_names`."
        raise ValueError(msg)
    if interactive and len(genes) > 1:
        msg = f"`interactive=True` shows one gene, found {len(genes)}: {genes}."
        raise ValueError(msg)
    if int(ncols) < 1:
        msg = f"`ncols` must be at least 1, found {ncols!r}."
        raise ValueError(msg)
    if resolution is not None:
        resolution = require_positive(resolution, name="resolution", unit="um")
    values = layer_values(table, genes, layer, table_key=table_key)
    titles = [gene_title(table, gene, layer) for gene in genes] if title is None else title
    titles = [titles] if isinstance(titles, str) else list(titles)
    if len(titles) != len(genes):
        msg = f"`title` must have one entry per gene ({len(genes)}), found {len(titles)}."
        raise ValueError(msg)
    limits = list(zip(limit_per_gene(vmin, genes, "vmin"), limit_per_gene(vmax, genes, "vmax"), strict=True))
    require_key(Keys.SPATIAL_3D, table.obsm, where=f"{where}.obsm", then="Run `si.tl.register_stack(sdata)` first.")
    xyz = np.asarray(table.obsm[Keys.SPATIAL_3D], dtype=float)
    require_finite(xyz, name=f"{where}.obsm[{Keys.SPATIAL_3D!r}]", row_names=table.obs_names)
    used = _sections_with_values(table, sections_in_z(load_record(sdata), sections), values, layer)
    spacing = typical_spacing(xyz, table.obs[Keys.SECTION].cat.codes.to_numpy())
    heights = [section.z for section, _ in used]
    volumes = [
        interpolate_stack(
            [xyz[rows, :2] for _, rows in used],
            [values[rows, k] for _, rows in used],
            heights,
            spacing=spacing,
            resolution=resolution,
        )
        for k in range(len(genes))
    ]
    rows = np.concatenate([index for _, index in used])
    middle = (*((xyz[rows, :2].min(axis=0) + xyz[rows, :2].max(axis=0)) / 2), (heights[0] + heights[-1]) / 2)
    place = _place(position, middle, volumes[0])
    norms = [color_limits(values[rows, k], *limits[k]) for k in range(len(genes))]
    colors = resolve_cmap(cmap)
    (x0, x1), (y0, y1), (z0, z1) = volumes[0].limits
    if interactive:
        from spatial_impute.pl._volume_view import volume_view

        stretch = resolve_stretch(z_stretch, max(x1 - x0, y1 - y0), z1 - z0, share=stack_share(len(used)))
        view = volume_view(
            volumes[0],
            place,
            norm=norms[0],
            cmap=colors,
            stretch=stretch,
            heights={s.name: s.z for s, _ in used},
            title=titles[0],
            units=units_label(table),
        )
        if save is not None:
            view.write_html(save)
        if show:
            view.show()
        return view
    stretch = resolve_stretch(z_stretch, max(x1 - x0, y1 - y0), z1 - z0, share=_SLICE_HEIGHT)
    axes = _make_axes(volumes[0], stretch, n_genes=len(genes), ncols=int(ncols), ax=ax, figsize=figsize)
    measured = _measured(table, used)
    for k, panels in enumerate(axes):
        _draw_slices(
            panels, volumes[k], place, norm=norms[k], cmap=colors, stretch=stretch, used=used, measured=measured
        )
        panels[0].set_title(titles[k], fontsize="medium")
        add_colorbar([panels[1]], values[rows, k], norms[k], colors, units_label(table))
    return finish(axes, save=save, show=show, return_ax=return_ax)


def _sections_with_values(
    table: AnnData, wanted: list[Section], values: np.ndarray, layer: str
) -> list[tuple[Section, np.ndarray]]:
    """Sections and their rows, in the order of z."""
    used = []
    for section in wanted:
        rows = np.flatnonzero(table.obs[Keys.SECTION] == section.name)
        if rows.size and np.isfinite(values[rows]).any():
            used.append((section, rows))
    if len(used) < 2:
        msg = (
            f"A volume needs values on at least two sections; `layers[{layer!r}]` has some on "
            f"{[section.name for section, _ in used]}. Impute the others, or draw one section with `si.pl.imputed`."
        )
        raise ValueError(msg)
    heights = [section.z for section, _ in used]
    if np.min(np.diff(heights)) <= 0:
        msg = f"The sections of a volume must have different heights, found z = {heights} um."
        raise ValueError(msg)
    return used


def _measured(table: AnnData, used: list[tuple[Section, np.ndarray]]) -> set[str]:
    flags = table.obs[Keys.MEASURED].to_numpy(dtype=bool)
    return {section.name for section, rows in used if flags[rows].any()}


def _place(
    position: tuple[float | None, float | None, float | None] | None, middle: tuple[float, ...], found: Volume
) -> tuple[float, float, float]:
    """Where the slices are."""
    given = (None, None, None) if position is None else tuple(position)
    if len(given) != 3:
        msg = f"`position` must hold x, y and z (um, or None for the middle), found {position!r}."
        raise ValueError(msg)
    x, y, z = (float(m if p is None else p) for p, m in zip(given, middle, strict=True))
    for value, (low, high), name in zip((x, y, z), found.limits, "xyz", strict=True):
        if not low <= value <= high:
            msg = f"`position`: {name} = {value:g} um lies outside the stack, which goes from {low:g} to {high:g} um."
            raise ValueError(msg)
    return x, y, z


def _make_axes(
    found: Volume,
    stretch: float,
    *,
    n_genes: int,
    ncols: int,
    ax: Axes | Sequence[Axes] | None,
    figsize: tuple[float, float] | None,
) -> np.ndarray:
    """(n_genes, 3) axes for (x, y), (z, y), (x, z)."""
    if ax is not None:
        axes = np.array([ax], dtype=object) if isinstance(ax, Axes) else np.ravel(np.asarray(ax, dtype=object))
        if len(axes) != _PANELS * n_genes:
            msg = f"`ax` must hold {_PANELS * n_genes} axes, three per gene, found {len(axes)}."
            raise ValueError(msg)
        return axes.reshape(n_genes, _PANELS)
    (x0, x1), (y0, y1), (z0, z1) = found.limits
    width, height, depth = x1 - x0, y1 - y0, stretch * (z1 - z0)
    n_columns = min(ncols, n_genes)
    n_rows = -(-n_genes // n_columns)
    inch = _LARGE / max(width, height)
    if figsize is None:
        figsize = (n_columns * ((width + depth) * inch + 1.9), n_rows * ((height + depth) * inch + 0.9))
    figure = plt.figure(figsize=figsize, layout="constrained")
    parts = np.ravel(figure.subfigures(n_rows, n_columns, squeeze=False))
    panels = []
    for part in parts[:n_genes]:
        grid = part.add_gridspec(2, 2, width_ratios=(width, depth), height_ratios=(height, depth))
        panels.append([part.add_subplot(grid[0, 0]), part.add_subplot(grid[0, 1]), part.add_subplot(grid[1, 0])])
    return np.array(panels, dtype=object)


def _draw_slices(
    panels: np.ndarray,
    found: Volume,
    place: tuple[float, float, float],
    *,
    norm: Normalize,
    cmap: Colormap,
    stretch: float,
    used: list[tuple[Section, np.ndarray]],
    measured: set[str],
) -> None:
    x, y, z = place
    x_limits, y_limits, z_limits = found.limits
    style = {"cmap": cmap.with_extremes(bad=(0, 0, 0, 0)), "norm": norm, "interpolation": "nearest", "origin": "lower"}
    line = {"color": INK, "linewidth": 0.7, "linestyle": (0, (4, 3))}
    along, across_x, across_y = panels
    along.imshow(found.slice(2, z), extent=(*x_limits, *y_limits), **style)
    frame_panel(along, (x_limits[0], y_limits[0], x_limits[1], y_limits[1]))
    along.axvline(x, **line)
    along.axhline(y, **line)
    along.text(0.01, 0.99, f"z = {z:g} µm", transform=along.transAxes, va="top", fontsize="small")
    across_x.imshow(found.slice(0, x).T, extent=(*z_limits, *y_limits), **style)
    frame_panel(across_x, (z_limits[0], y_limits[0], z_limits[1], y_limits[1]))
    across_x.set(aspect=1 / stretch, title="")
    across_x.axvline(z, **line)
    across_y.imshow(found.slice(1, y), extent=(*x_limits, *z_limits), **style)
    frame_panel(across_y, (x_limits[0], z_limits[0], x_limits[1], z_limits[1]))
    across_y.set(aspect=stretch)
    across_y.axhline(z, **line)
    names, heights = [s.name for s, _ in used], [s.z for s, _ in used]
    across_y.set_yticks(heights, names, fontsize="x-small")
    across_x.set_xticks(heights, names, fontsize="x-small", rotation=90)
    for labels in (across_y.get_yticklabels(), across_x.get_xticklabels()):
        for label in labels:
            label.set_fontweight("bold" if label.get_text() in measured else "normal")
    # The three share edges, whatever the figure leaves them of room.
    for panel, anchor in ((along, "SE"), (across_x, "SW"), (across_y, "NE")):
        panel.set_anchor(anchor)
    factor = "" if stretch == 1 else f", × {stretch:g}"
    across_y.set_ylabel(f"z{factor}", fontsize="small")
    across_x.set_xlabel(f"z{factor}", fontsize="small")
    add_scale_bar(across_y)
