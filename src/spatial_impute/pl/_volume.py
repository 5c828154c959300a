"""Slices through the expression in 3D, and an interactive view."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import pyplot as plt

from spatial_impute._geometry import Volume, interpolate_stack
from spatial_impute._graph import typical_spacing
from spatial_impute._keys import Keys
from spatial_impute._stack.record import load_record
from spatial_impute._stack.state import warn_if_old
from spatial_impute._stack.table import registered_spots, stack_table
from spatial_impute._validation import name_list, require_positive
from spatial_impute.pl._color import (
    add_colorbar,
    color_limits,
    gene_title,
    layer_values,
    limit_per_gene,
    resolve_cmap,
    units_label,
)
from spatial_impute.pl._figure import (
    INK,
    add_scale_bar,
    document_figure,
    finish,
    frame_panel,
    given_axes,
    grid_shape,
    resolve_stretch,
    rows_by_section,
    sections_in_z,
    stack_share,
    titles_for,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from plotly.graph_objects import Figure
    from spatialdata import SpatialData

    from spatial_impute._stack.record import Section
    from spatial_impute.pl._color import Limit

    Point = tuple[float, float, float]

_PANELS = 3  # planes per gene
_SHADES = 32  # steps of the color scale of the interactive view
_SLICE_HEIGHT = 0.3  # of the longer side of the tissue: the slices across the stack beside the one in it
_LARGE = 3.3  # inches, the longer side of the tissue


@document_figure
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
    show: bool | None = None,
    return_ax: bool = False,
) -> np.ndarray | Figure | None:
    """Orthogonal slices through the expression in 3D, in the common frame.

    Each gene has one slice along the sections (x, y) and two slices across them (z, y and x, z). Dashed lines mark the
    slices in each other. The names of measured sections are bold. Values are interpolated between the spots of a
    section, and linearly between sections. Cells outside the tissue are empty. Only the sections have predicted values;
    the values between them are an interpolation and not a prediction. Sections without values in `layer` are left out.

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
        Factor on z. The default makes the slices across the stack readable. The figure states the factor.
    interactive
        Return an interactive plotly figure instead: the slices of one gene in 3D, with a slider for z. It needs
        ``pip install "spatial-impute[interactive]"``. `save` then writes one HTML file that works offline.
    table_key
        Name of the stack table in ``sdata.tables``.
    ncols
        Genes per row.
    ax
        Axes to draw on instead of a new figure: three per gene, for (x, y), (z, y) and (x, z).
    cmap
        Color map.
    vmin
        Lower end of the color scale: a number, a percentile such as ``"p1"``, ``None`` for the lowest value, or one of
        these per gene.
    vmax
        Upper end of the color scale, like `vmin`.
    title
        One title per gene, instead of the default.

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
        `title`, `vmin` or `vmax` have the wrong length.
    ImportError
        If ``interactive=True`` and plotly is not installed.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack(extent=1400.0)
    >>> si.tl.register_stack(sdata, show_progress_bar=False)
    >>> si.tl.impute_baseline(sdata, "kernel")
    >>> axes = si.pl.volume(sdata, "smooth_0", layer="baseline_kernel", return_ax=True)
    >>> axes.shape
    (1, 3)
    """
    table = stack_table(sdata, table_key)
    genes = name_list(genes, name="genes", empty=f"name some of `sdata.tables[{table_key!r}].var_names`.")
    if interactive and len(genes) > 1:
        msg = f"`interactive=True` shows one gene, found {len(genes)}: {genes}."
        raise ValueError(msg)
    n_rows, n_columns = grid_shape(len(genes), ncols)
    if resolution is not None:
        resolution = require_positive(resolution, name="resolution", unit="um")
    warn_if_old(sdata, table, [layer])
    values = layer_values(table, genes, layer, table_key=table_key)
    titles = titles_for(title, [gene_title(table, gene, layer) for gene in genes], "per gene")
    limits = list(zip(limit_per_gene(vmin, genes, "vmin"), limit_per_gene(vmax, genes, "vmax"), strict=True))
    xyz = registered_spots(table, table_key)
    used = _Sections.of(table, sections_in_z(load_record(sdata), sections), values, layer)
    spacing = typical_spacing(xyz, table.obs[Keys.SECTION].cat.codes.to_numpy())
    points, heights = [xyz[rows, :2] for rows in used.rows], used.heights
    volumes = [
        interpolate_stack(points, [column[rows] for rows in used.rows], heights, spacing=spacing, resolution=resolution)
        for column in values.T
    ]
    shown = np.concatenate(used.rows)
    middle = (*((xyz[shown, :2].min(axis=0) + xyz[shown, :2].max(axis=0)) / 2), (heights[0] + heights[-1]) / 2)
    place = _slice_position(position, middle, volumes[0])
    (x0, x1), (y0, y1), (z0, z1) = volumes[0].limits
    share = stack_share(len(used.sections)) if interactive else _SLICE_HEIGHT
    stretch = resolve_stretch(z_stretch, max(x1 - x0, y1 - y0), z1 - z0, share=share)
    looks = [
        _Look(place, color_limits(column[shown], *limit), resolve_cmap(cmap), stretch)
        for column, limit in zip(values.T, limits, strict=True)
    ]
    if interactive:
        view = _interactive_view(volumes[0], looks[0], used, titles[0], units_label(table))
        if save is not None:
            view.write_html(save)
        if show:
            view.show()
        return view
    if ax is not None:
        axes = given_axes(ax, _PANELS * len(genes), "three per gene").reshape(-1, _PANELS)
    else:
        axes = _make_axes(volumes[0], stretch, (n_rows, n_columns), len(genes), figsize)
    for panels, found, look, text, column in zip(axes, volumes, looks, titles, values.T, strict=True):
        _draw_slices(panels, found, look, used)
        panels[0].set_title(text, fontsize="medium")
        add_colorbar([panels[1]], column[shown], look.norm, look.cmap, units_label(table))
    return finish(axes, ax=ax, save=save, show=show, return_ax=return_ax)


@dataclass(frozen=True)
class _Sections:
    """Sections with values, in the order of z."""

    sections: list[Section]
    rows: list[np.ndarray]  # Rows of the table of each section
    measured: set[str]

    @property
    def names(self) -> list[str]:
        return [section.name for section in self.sections]

    @property
    def heights(self) -> list[float]:
        return [section.z for section in self.sections]

    @classmethod
    def of(cls, table: AnnData, wanted: list[Section], values: np.ndarray, layer: str) -> _Sections:
        """Sections of `wanted` with values (n_spots, n_genes); raise a ``ValueError`` if they do not make a volume."""
        each = zip(wanted, *rows_by_section(table, wanted), strict=True)
        kept = [(s, rows, measured) for s, rows, measured in each if np.isfinite(values[rows]).any()]
        used = cls([s for s, _, _ in kept], [r for _, r, _ in kept], {s.name for s, _, measured in kept if measured})
        if len(kept) < 2:
            msg = (
                f"A volume needs values on at least two sections; `layers[{layer!r}]` has values on {used.names}. "
                "Impute the others, or draw one section with `si.pl.imputed`."
            )
            raise ValueError(msg)
        if np.min(np.diff(used.heights)) <= 0:
            msg = f"The sections of a volume must have different heights, found z = {used.heights} um."
            raise ValueError(msg)
        return used


@dataclass(frozen=True)
class _Look:
    """Place of the slices of a gene (um), color scale, and factor on z."""

    place: Point
    norm: Normalize
    cmap: Colormap
    stretch: float


def _slice_position(
    position: tuple[float | None, float | None, float | None] | None, middle: tuple[float, ...], found: Volume
) -> Point:
    """Place of the slices (um): from the user, or the middle of the tissue."""
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
    found: Volume, stretch: float, grid: tuple[int, int], n_genes: int, figsize: tuple[float, float] | None
) -> np.ndarray:
    """(n_genes, 3) axes for (x, y), (z, y), (x, z)."""
    (x0, x1), (y0, y1), (z0, z1) = found.limits
    width, height, depth = x1 - x0, y1 - y0, stretch * (z1 - z0)
    n_rows, n_columns = grid
    inch = _LARGE / max(width, height)
    if figsize is None:
        figsize = (n_columns * ((width + depth) * inch + 1.9), n_rows * ((height + depth) * inch + 0.9))
    figure = plt.figure(figsize=figsize, layout="constrained")
    panels = []
    for part in np.ravel(figure.subfigures(n_rows, n_columns, squeeze=False))[:n_genes]:
        cells = part.add_gridspec(2, 2, width_ratios=(width, depth), height_ratios=(height, depth))
        panels.append([part.add_subplot(cells[0, 0]), part.add_subplot(cells[0, 1]), part.add_subplot(cells[1, 0])])
    return np.array(panels, dtype=object)


def _draw_slices(panels: np.ndarray, found: Volume, look: _Look, used: _Sections) -> None:
    x, y, z = look.place
    stretch = look.stretch
    x_limits, y_limits, z_limits = found.limits
    style: dict[str, Any] = {"norm": look.norm, "interpolation": "nearest", "origin": "lower"}
    style["cmap"] = look.cmap.with_extremes(bad=(0, 0, 0, 0))
    line: dict[str, Any] = {"color": INK, "linewidth": 0.7, "linestyle": (0, (4, 3))}
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
    across_y.set_yticks(used.heights, used.names, fontsize="x-small")
    across_x.set_xticks(used.heights, used.names, fontsize="x-small", rotation=90)
    for label in (*across_y.get_yticklabels(), *across_x.get_xticklabels()):
        label.set_fontweight("bold" if label.get_text() in used.measured else "normal")
    # The three panels touch, at any size of the figure.
    for panel, anchor in ((along, "SE"), (across_x, "SW"), (across_y, "NE")):
        panel.set_anchor(anchor)
    factor = "" if stretch == 1 else f", × {stretch:g}"
    across_y.set_ylabel(f"z{factor}", fontsize="small")
    across_x.set_xlabel(f"z{factor}", fontsize="small")
    add_scale_bar(across_y)


def _interactive_view(found: Volume, look: _Look, used: _Sections, title: str, units: str) -> Figure:
    """Slices of a volume in 3D: two upright ones, and one that a slider moves along z."""
    try:
        from plotly import graph_objects as go
    except ImportError as error:
        msg = (
            'The interactive view needs plotly: `pip install "spatial-impute[interactive]"`. '
            "Without it, `si.pl.volume(sdata, gene)` draws slices."
        )
        raise ImportError(msg) from error

    stops = np.linspace(0, 1, _SHADES)
    scale = [[float(s), "rgb({:.0f},{:.0f},{:.0f})".format(*(255 * np.array(look.cmap(s)[:3])))] for s in stops]
    # Shading would change the colors, which are values.
    flat = {"ambient": 1.0, "diffuse": 0.0, "specular": 0.0, "fresnel": 0.0}
    colors = {"colorscale": scale, "cmin": look.norm.vmin, "cmax": look.norm.vmax, "lighting": flat}
    x, y, z = found.axes
    surfaces = [{**_surface(found, axis, look.place[axis]), "showscale": axis == 1} for axis in (0, 1)]
    surfaces[1]["colorbar"] = {"title": {"text": units.replace("\n", "<br>")}}
    start = found.cell(2, look.place[2])
    moving = [{**_surface(found, 2, height), "showscale": False, "visible": k == start} for k, height in enumerate(z)]
    figure = go.Figure([go.Surface(**surface, **colors, connectgaps=False) for surface in [*surfaces, *moving]])
    visible = [[True, True, *(i == k for i in range(len(z)))] for k in range(len(z))]
    steps = [
        {"label": f"{height:g}", "method": "update", "args": [{"visible": seen}]}
        for height, seen in zip(z, visible, strict=True)
    ]
    factor = "" if look.stretch == 1 else f" (z × {look.stretch:g})"
    sides = np.ptp(x), np.ptp(y), look.stretch * np.ptp(z)
    names = [f"{section.name}, {section.z:g} µm" for section in used.sections]
    figure.update_layout(
        title=f"{title.replace(chr(10), ', ')}{factor}",
        scene={
            "xaxis": {"title": "x, µm"},
            "yaxis": {"title": "y, µm", "autorange": "reversed"},
            "zaxis": {"title": "z", "tickvals": used.heights, "ticktext": names},
            "aspectmode": "manual",
            "aspectratio": {axis: float(side / max(sides[:2])) for axis, side in zip("xyz", sides, strict=True)},
        },
        sliders=[{"active": start, "currentvalue": {"prefix": "z = ", "suffix": " µm"}, "steps": steps}],
        margin={"l": 0, "r": 0, "t": 40, "b": 0},
    )
    return figure


def _surface(found: Volume, axis: int, position: float) -> dict[str, Any]:
    """Coordinates and colors of a slice across x (0), y (1) or z (2); nothing outside the tissue."""
    values = found.slice(axis, position)
    places = [np.array([float(position)]) if k == axis else found.axes[k] for k in (2, 1, 0)]
    z, y, x = (np.squeeze(part, axis=2 - axis) for part in np.meshgrid(*places, indexing="ij"))
    # plotly leaves out the points of a surface whose z is missing.
    return {"x": x, "y": y, "z": np.where(np.isfinite(values), z, np.nan), "surfacecolor": values}
