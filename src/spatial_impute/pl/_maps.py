"""Maps of expression: at the spots of all sections, and dense beside the H&E image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from spatialdata.transformations import get_transformation

from spatial_impute._geometry import box_after
from spatial_impute._image.levels import best_level, to_rgb
from spatial_impute._keys import Keys
from spatial_impute._stack.elements import brightfield_levels, element_affine, registered_radius
from spatial_impute._stack.record import attrs_record, load_record
from spatial_impute._stack.state import map_problems, raise_or_warn, warn_if_old
from spatial_impute._stack.table import registered_spots, stack_table, uns_record
from spatial_impute._validation import name_list, require_key, require_positive
from spatial_impute.pl._color import (
    add_colorbar,
    color_limits,
    gene_title,
    layer_values,
    limit_per_gene,
    resolve_cmap,
    units_label,
    wrap_units,
)
from spatial_impute.pl._figure import (
    INK,
    add_scale_bar,
    document_figure,
    draw_circles,
    finish,
    frame_panel,
    label_row,
    make_panels,
    rows_by_section,
    section_title,
    sections_in_z,
    show_image,
    show_raster,
    titles_for,
)
from spatial_impute.pl._overlay import Canvas, images_on_canvas

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from spatialdata import SpatialData
    from xarray import DataArray

    from spatial_impute.pl._color import Limit

    Window = tuple[float, float, float, float]

_VARIES = 0.2  # of the support: smaller differences cannot be told apart on the scale from 0 to 1
_PIXELS = 800  # along the longer side of a panel: sharp at 200 dots per inch
_BAR = 0.8  # inches, width of a color bar with its numbers and units


@dataclass(frozen=True)
class _Row:
    """Values of one row of panels, and their scale."""

    label: str
    values: np.ndarray  # (n_spots,) of the whole table
    norm: Normalize
    cmap: Colormap
    scale_label: str
    shows_measurement: bool = False  # Measured spots show their measurement


@document_figure
def imputed(
    sdata: SpatialData,
    genes: str | Sequence[str],
    *,
    layer: str | Sequence[str] = Keys.ASIGN,
    sections: str | Sequence[str] | None = None,
    show_sd: bool = False,
    show_support: bool = True,
    img_alpha: float = 0.35,
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
    show: bool | None = None,
    return_ax: bool = False,
) -> np.ndarray | None:
    """Expression at the spots of all sections, on their faint H&E images: a row per gene, a column per section.

    A gene has one color scale for all sections and layers. Measured sections have a frame and a bold title. Spots that
    show a measurement have a dark edge, imputed spots have none. If `layer` comes from
    :func:`~spatial_impute.tl.impute_3d`, the label of a gene states its correlation ``r`` on held-out blocks of the
    measured sections. Do not trust the map of a gene with a low ``r``.

    Parameters
    ----------
    sdata
        Registered stack with imputed expression.
    genes
        Gene or genes.
    layer
        Layer of the stack table, or several, one row each: ``["measured", "asign"]`` shows the measurement above the
        imputation. Spots without a value are grey.
    sections
        Sections to show; all by default.
    show_sd
        Add a row per gene with the standard deviation of a measurement around the imputed value, 0 at measured spots.
    show_support
        Add a row with ``obs["imputation_support"]``, the strength of the links from a spot to measured spots, if the
        table has it and it differs by more than 0.2 between the imputed spots that are shown.
    img_alpha
        Strength of the H&E images in the common frame; 0 draws none, and is faster.
    table_key
        Name of the stack table in ``sdata.tables``.
    size
        Factor on the true diameter of the spots.
    ax
        Axes to draw on, row by row, instead of a new figure.
    cmap
        Color map of expression.
    sd_cmap
        Color map of the standard deviation.
    support_cmap
        Color map of the support.
    vmin
        Lower end of the color scale: a number, a percentile such as ``"p1"``, ``None`` for the lowest value, or one of
        these per gene.
    vmax
        Upper end of the color scale, like `vmin`.
    title
        One title per section, instead of the default.

    Returns
    -------
    ``None``, or with ``return_ax=True`` an array (n_rows, n_sections) of :class:`~matplotlib.axes.Axes`: per gene a row
    for each layer and one for the standard deviation, and a last row for the support.

    Raises
    ------
    KeyError
        If the stack is not registered, or a gene, layer or section does not exist, or no layer has a standard
        deviation.
    ValueError
        If `genes` or `layer` is empty, `ax`, `title`, `vmin` or `vmax` have the wrong length, or `vmin` exceeds `vmax`.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack(extent=1400.0)
    >>> si.tl.register_stack(sdata, show_progress_bar=False)
    >>> si.tl.impute_baseline(sdata, "kernel")
    >>> axes = si.pl.imputed(sdata, ["smooth_0", "texture_12"], layer="baseline_kernel", return_ax=True)
    >>> axes.shape
    (2, 3)
    """
    record = load_record(sdata)
    wanted = sections_in_z(record, sections)
    table = stack_table(sdata, table_key)
    where = f"sdata.tables[{table_key!r}]"
    genes = name_list(genes, name="genes", empty=f"name some of `{where}.var_names`.")
    layers = name_list(layer, name="layer", empty=f"name some of {list(table.layers)}.")
    warn_if_old(sdata, table, layers)
    flags = table.obs[Keys.MEASURED].to_numpy(dtype=bool)
    members, measured = rows_by_section(table, wanted)
    heads = [section_title(s, measured=m, separator="\n") for s, m in zip(wanted, measured, strict=True)]
    titles = titles_for(title, heads, "per section")
    scales = [limit_per_gene(limit, genes, name) for limit, name in ((vmin, "vmin"), (vmax, "vmax"))]
    shown = np.concatenate(members)
    by_gene = _rows_by_gene(table, genes, layers, shown, scales=scales, cmap=cmap, table_key=table_key)
    if show_sd:
        deviations = _deviations(table, genes, layers, table_key=table_key)
        for gene, found, own in zip(genes, deviations.T, by_gene, strict=True):
            norm, label = color_limits(found[shown], 0.0, "p99"), f"{gene}\ndeviation"
            own.append(_Row(label, found, norm, resolve_cmap(sd_cmap), "standard deviation"))
    rows = [row for own in by_gene for row in own]
    xyz = registered_spots(table, table_key)
    radius = require_positive(size, name="size") * registered_radius(sdata, record, table)
    if not shown.size:
        names = [section.name for section in wanted]
        msg = f"`{where}` has no spots on the sections {names}. Lay some with `si.pp.tile_spots(sdata)`."
        raise ValueError(msg)
    if show_support and Keys.SUPPORT in table.obs:
        support, hidden = table.obs[Keys.SUPPORT].to_numpy(dtype=float), shown[~flags[shown]]
        if hidden.size and np.ptp(support[hidden]) > _VARIES:
            norm, label = color_limits(support, 0.0, 1.0), "strength of links to\nmeasured spots"
            rows.append(_Row("imputation\nsupport", support, norm, resolve_cmap(support_cmap), label))

    canvas = Canvas.around(np.concatenate([xyz[shown, :2] - radius[shown].max(), xyz[shown, :2] + radius[shown].max()]))
    images = images_on_canvas(sdata, record, wanted, canvas) if img_alpha > 0 else []
    aspect = canvas.height / canvas.width
    axes = make_panels(len(rows), len(wanted), aspect=aspect, ax=ax, figsize=figsize, margin=(2.2, 0.8))
    axes = axes.reshape(len(rows), len(wanted))
    for panels, row in zip(axes, rows, strict=True):
        for k, (panel, index) in enumerate(zip(panels, members, strict=True)):
            frame_panel(panel, canvas.limits)
            if images:
                show_image(panel, images[k], canvas.to_um, alpha=img_alpha)
            own = flags[index] & row.shows_measurement
            for part, marked in ((index[~own], False), (index[own], True)):
                if not len(part):
                    continue
                color = {"values": row.values[part], "cmap": row.cmap, "norm": row.norm, "marked": marked}
                draw_circles(panel, xyz[part, :2], radius[part], **color)
            if measured[k]:
                panel.spines[:].set(visible=True, color=INK, linewidth=1.5)
        label_row(panels[0], row.label)
        add_colorbar(panels, row.values[shown], row.norm, row.cmap, row.scale_label)
    for panel, text, bold in zip(axes[0], titles, measured, strict=True):
        panel.set_title(text, fontsize="medium", fontweight="bold" if bold else "normal")
    add_scale_bar(axes[-1, 0])
    return finish(axes, ax=ax, save=save, show=show, return_ax=return_ax)


def _rows_by_gene(
    table: AnnData,
    genes: list[str],
    layers: list[str],
    shown: np.ndarray,
    *,
    scales: list[list[Limit]],
    cmap: str | Colormap,
    table_key: str,
) -> list[list[_Row]]:
    """Rows of each gene, one per layer; the layers of a gene share a scale, set by the spots `shown`."""
    values = {name: layer_values(table, genes, name, table_key=table_key) for name in layers}
    by_gene = []
    for k, (gene, low, high) in enumerate(zip(genes, *scales, strict=True)):
        norm = color_limits(np.concatenate([found[shown, k] for found in values.values()]), low, high)
        rows = []
        for name, found in values.items():
            label = gene_title(table, gene, name, "\n") + ("" if len(layers) == 1 else f"\n{name}")
            kept = name == Keys.MEASURED or uns_record(table, name).get("measured", "keep") == "keep"
            rows.append(_Row(label, found[:, k], norm, resolve_cmap(cmap), units_label(table), kept))
        by_gene.append(rows)
    return by_gene


def _deviations(table: AnnData, genes: list[str], layers: list[str], *, table_key: str) -> np.ndarray:
    """(n_spots, n_genes) standard deviation of the first of `layers` that has one."""
    keys = [Keys.sd(name) for name in layers]
    found = next((key for key in keys if key in table.layers), keys[0])
    then = "Only `si.tl.impute_3d` writes one. For other layers leave out `show_sd=True`."
    require_key(found, table.layers, where=f"sdata.tables[{table_key!r}].layers", then=then)
    return layer_values(table, genes, found, table_key=table_key)


@document_figure
def dense(
    sdata: SpatialData,
    map_key: str,
    genes: str | Sequence[str],
    *,
    image_key: str | None = None,
    window: Window | None = None,
    coordinate_system: str | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    figsize: tuple[float, float] | None = None,
    cmap: str | Colormap = "viridis",
    vmin: Limit | Sequence[Limit] = "p1",
    vmax: Limit | Sequence[Limit] = "p99",
    title: str | Sequence[str] | None = None,
    save: str | Path | None = None,
    show: bool | None = None,
    return_ax: bool = False,
) -> np.ndarray | None:
    """Dense map of genes beside the H&E image, whole or in a window.

    Only the genes and cells that the figure can show are read. A lazy map is computed only in the tiles that are shown.

    Parameters
    ----------
    sdata
        Object with the map and the image.
    map_key
        Map of :func:`~spatial_impute.tl.predict_dense`.
    genes
        Gene or genes; one panel each.
    image_key
        Image to show first; by default the image from which the map was predicted.
    window
        Lowest x, highest x, lowest y and highest y to show, in units of the coordinate system (um for a stack).
    coordinate_system
        Coordinate system to draw in. Needed only if the map has several.
    ax
        Axes to draw on, image first, instead of a new figure.
    cmap
        Color map.
    vmin
        Lower end of the color scale: a number, a percentile such as ``"p1"``, ``None`` for the lowest value, or one of
        these per gene.
    vmax
        Upper end of the color scale, like `vmin`.
    title
        One title per panel, instead of the default.

    Returns
    -------
    ``None``, or with ``return_ax=True`` an array of :class:`~matplotlib.axes.Axes`: the image, then the genes.

    Raises
    ------
    KeyError
        If map, image, genes or coordinate system do not exist.
    ValueError
        If the window does not meet the map, or `ax`, `title`, `vmin` or `vmax` have the wrong length.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack(extent=1400.0)
    >>> params = {"n_steps": 2, "width": 8, "resolution": 8.0, "crop": 64}
    >>> model = si.tl.fit_pixnet(sdata, "s1_image", "s1_spots", model_params=params, show_progress_bar=False)
    >>> si.tl.predict_dense(sdata, "s0_image", model)
    >>> axes = si.pl.dense(sdata, "s0_image_expression", ["smooth_0", "texture_12"], return_ax=True)
    >>> len(axes)
    3
    """
    genes = name_list(genes, name="genes", empty=f"name some of the channels of `sdata.images[{map_key!r}]`.")
    require_key(map_key, sdata.images, where="sdata.images", then="Make it with `si.tl.predict_dense(sdata, ...)`.")
    raise_or_warn(map_problems(sdata, map_key))
    element = sdata.images[map_key]
    for gene in genes:
        require_key(gene, element.coords["c"].to_numpy().tolist(), where=f"channels of sdata.images[{map_key!r}]")
    # Empty for a map of another tool.
    entry = attrs_record(sdata, Keys.DENSE, map_key)
    if coordinate_system is None:  # a registration adds the common frame
        coordinate_system = entry.get("coordinate_system")
    coordinate_system = _choose_system(element, coordinate_system, f"sdata.images[{map_key!r}]")
    if image_key is None and not entry:
        msg = f"`sdata.attrs` do not name the image from which {map_key!r} was predicted; name it with `image_key=`."
        raise ValueError(msg)
    image_key = entry["image"] if image_key is None else image_key
    require_key(image_key, sdata.images, where="sdata.images")
    matrix = element_affine(element, coordinate_system)
    (left, top), (right, bottom) = box_after((0, 0), (element.sizes["x"], element.sizes["y"]), matrix)
    x0, x1, y0, y1 = window = (left, right, top, bottom) if window is None else window
    limits = [limit_per_gene(value, genes, name) for name, value in (("vmin", vmin), ("vmax", vmax))]
    titles = titles_for(title, [image_key, *genes], f"for the image and each of the {len(genes)} genes")
    values, to_frame = _read_cells(element.sel(c=genes), matrix, window)
    if not values.size:
        msg = (
            f"`window` {tuple(round(float(v), 1) for v in window)} does not meet `sdata.images[{map_key!r}]`, which "
            f"covers x {left:.1f} to {right:.1f}, y {top:.1f} to {bottom:.1f}."
        )
        raise ValueError(msg)
    values = values.astype(np.float32)
    levels = brightfield_levels(sdata, image_key, coordinate_system)
    level = best_level(levels, max(x1 - x0, y1 - y0) / _PIXELS)

    axes = make_panels(
        1, len(genes) + 1, aspect=(y1 - y0) / (x1 - x0), ax=ax, figsize=figsize, margin=(_BAR * len(genes), 0.6)
    )
    for panel, text in zip(axes, titles, strict=True):
        frame_panel(panel, (x0, y0, x1, y1))
        panel.set_title(text, fontsize="medium")
    rgb, rgb_to_frame = _read_cells(level.data, level.to_um, window)
    if rgb.size:
        show_image(axes[0], to_rgb(rgb, level), rgb_to_frame)
    colors, units = resolve_cmap(cmap), _units(entry)
    for panel, cells, low, high in zip(axes[1:], values, *limits, strict=True):
        norm = color_limits(cells, low, high)
        show_raster(panel, np.ma.masked_invalid(cells), to_frame, cmap=colors, norm=norm, interpolation="nearest")
        add_colorbar([panel], cells, norm, colors, units)
    add_scale_bar(axes[0])
    return finish(axes, ax=ax, save=save, show=show, return_ax=return_ax)


def _choose_system(element: DataArray, wanted: str | None, where: str) -> str:
    """Coordinate system to draw in: the one that the user names, or the only one."""
    systems = list(get_transformation(element, get_all=True))
    if wanted is None and len(systems) > 1:
        msg = f"`{where}` has the coordinate systems {systems}; choose one with `coordinate_system=`."
        raise ValueError(msg)
    chosen = systems[0] if wanted is None else wanted
    require_key(chosen, systems, where=f"coordinate systems of {where}")
    return chosen


def _units(entry: Mapping[str, Any]) -> str:
    """Units of the values of a map, for its color bars."""
    if entry.get("features"):
        return "feature of the network"
    units = entry.get("units")
    return wrap_units("counts per µm²" if units == "counts" else units)  # a map of counts holds a density


def _read_cells(data: DataArray, matrix: np.ndarray, window: Window) -> tuple[np.ndarray, np.ndarray]:
    """(c, y, x) cells of a raster in a window, thinned to what can be drawn, and their affine to the frame."""
    x0, x1, y0, y1 = window
    first, last = box_after((x0, y0), (x1, y1), np.linalg.inv(matrix))
    n = np.array([data.sizes["x"], data.sizes["y"]])
    low, high = np.clip(np.floor(first), 0, n).astype(int), np.clip(np.ceil(last), 0, n).astype(int)
    step = max(1, int((high - low).max(initial=0) // _PIXELS))
    cells = data.isel(x=slice(low[0], high[0], step), y=slice(low[1], high[1], step)).data
    cells = np.asarray(cells.compute() if hasattr(cells, "compute") else cells)
    # Every k-th cell stands for the k around its centre.
    shift = np.array([[step, 0, low[0]], [0, step, low[1]], [0, 0, 1.0]])
    return cells, matrix @ shift
