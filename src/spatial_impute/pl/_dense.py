"""Windows of a dense map beside the H&E image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from spatial_impute._geometry import apply_affine
from spatial_impute._image.levels import best_level, image_levels, to_rgb
from spatial_impute._keys import Keys
from spatial_impute._stack import answer, element_affine, map_problems
from spatial_impute._validation import require_key
from spatial_impute.pl._color import add_colorbar, color_limits, limit_per_gene, resolve_cmap, wrap_units
from spatial_impute.pl._figure import (
    add_scale_bar,
    document_figure,
    finish,
    frame_panel,
    make_panels,
    names_or_raise,
    show_image,
    show_raster,
    titles_for,
)

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from spatialdata import SpatialData
    from xarray import DataArray

    from spatial_impute.pl._color import Limit

    Window = tuple[float, float, float, float]

_PIXELS = 800  # along the longer side of a panel: sharp at 200 dots per inch
_BAR = 0.8  # inches, width of a color bar with its numbers and units


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
        If the window does not meet the map, or `ax`, `title`, `vmin` or `vmax` do not fit in number.

    Examples
    --------
    >>> import torch
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack()
    >>> class Blur(torch.nn.Module):
    ...     def forward(self, x):
    ...         return [torch.nn.functional.avg_pool2d(x, k) for k in (2, 4)]
    >>> params = {"n_steps": 2, "width": 8, "resolution": 8.0, "crop": 64}
    >>> model = si.tl.fit_pixnet(
    ...     sdata, "s1_image", "s1_spots", encoder=Blur(), model_params=params, show_progress_bar=False
    ... )
    >>> si.tl.predict_dense(sdata, "s0_image", model)
    >>> axes = si.pl.dense(sdata, "s0_image_expression", ["smooth_0", "texture_12"], return_ax=True)
    >>> len(axes)
    3
    """
    genes = names_or_raise(genes, name="genes", there=f"the channels of `sdata.images[{map_key!r}]`")
    require_key(map_key, sdata.images, where="sdata.images", then="Make it with `si.tl.predict_dense(sdata, ...)`.")
    answer(map_problems(sdata, map_key))
    element = sdata.images[map_key]
    for gene in genes:
        require_key(gene, element.coords["c"].to_numpy().tolist(), where=f"channels of sdata.images[{map_key!r}]")
    coordinate_system = _choose_system(element, coordinate_system, f"sdata.images[{map_key!r}]")
    image_key = _source(sdata, map_key) if image_key is None else image_key
    require_key(image_key, sdata.images, where="sdata.images")
    matrix = element_affine(element, coordinate_system)
    x0, x1, y0, y1 = window = _extent(element.sizes, matrix) if window is None else window
    limits = [limit_per_gene(value, genes, name) for name, value in (("vmin", vmin), ("vmax", vmax))]
    titles = titles_for(title, [image_key, *genes], f"for the image and each of the {len(genes)} genes")
    values, to_frame = _read_map(element.sel(c=genes), matrix, window, map_key)
    levels = image_levels(sdata.images[image_key], element_affine(sdata.images[image_key], coordinate_system))
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
    colors, units = resolve_cmap(cmap), _units(sdata, map_key)
    for panel, cells, low, high in zip(axes[1:], values, *limits, strict=True):
        norm = color_limits(cells, low, high)
        show_raster(panel, np.ma.masked_invalid(cells), to_frame, cmap=colors, norm=norm, interpolation="nearest")
        add_colorbar([panel], cells, norm, colors, units)
    add_scale_bar(axes[0])
    return finish(axes, ax=ax, save=save, show=show, return_ax=return_ax)


def _choose_system(element: DataArray, wanted: str | None, where: str) -> str:
    """Coordinate system to draw in: the one that the user names, or the only one."""
    from spatialdata.transformations import get_transformation

    systems = list(get_transformation(element, get_all=True))
    if wanted is None and len(systems) > 1:
        msg = f"`{where}` has the coordinate systems {systems}; choose one with `coordinate_system=`."
        raise ValueError(msg)
    chosen = systems[0] if wanted is None else wanted
    require_key(chosen, systems, where=f"coordinate systems of {where}")
    return chosen


def _entry(sdata: SpatialData, map_key: str) -> dict[str, Any]:
    """Record of a map; empty for a map of another tool."""
    return dict(sdata.attrs.get(Keys.ATTRS, {}).get(Keys.DENSE, {}).get(map_key, {}))


def _units(sdata: SpatialData, map_key: str) -> str:
    """Units of the values of a map, for its color bars."""
    entry = _entry(sdata, map_key)
    if entry.get("features"):
        return "feature of the network"
    units = entry.get("units")
    return wrap_units("counts per µm²" if units == "counts" else units)  # a map of counts holds a density


def _source(sdata: SpatialData, map_key: str) -> str:
    """Image from which a map was predicted."""
    found = _entry(sdata, map_key)
    if not found:
        msg = f"`sdata.attrs` do not name the image from which {map_key!r} was predicted; name it with `image_key=`."
        raise ValueError(msg)
    return found["image"]


def _extent(sizes: Mapping[Hashable, int], matrix: np.ndarray) -> Window:
    """Lowest and highest x, then y, of a raster."""
    corners = apply_affine(np.array([[0, 0], [1, 0], [0, 1], [1, 1]]) * [sizes["x"], sizes["y"]], matrix)
    (x0, y0), (x1, y1) = corners.min(axis=0), corners.max(axis=0)
    return x0, x1, y0, y1


def _read_cells(data: DataArray, matrix: np.ndarray, window: Window) -> tuple[np.ndarray, np.ndarray]:
    """(c, y, x) cells of a raster in a window, thinned to what can be drawn, and their affine to the frame."""
    x0, x1, y0, y1 = window
    corners = apply_affine(np.array([[x0, y0], [x1, y0], [x0, y1], [x1, y1]]), np.linalg.inv(matrix))
    n = np.array([data.sizes["x"], data.sizes["y"]])
    low = np.clip(np.floor(corners.min(axis=0)), 0, n).astype(int)
    high = np.clip(np.ceil(corners.max(axis=0)), 0, n).astype(int)
    step = max(1, int((high - low).max(initial=0) // _PIXELS))
    cells = data.isel(x=slice(low[0], high[0], step), y=slice(low[1], high[1], step)).data
    cells = np.asarray(cells.compute() if hasattr(cells, "compute") else cells)
    # Every k-th cell stands for the k around its centre.
    shift = np.array([[step, 0, low[0]], [0, step, low[1]], [0, 0, 1.0]])
    return cells, matrix @ shift


def _read_map(element: DataArray, matrix: np.ndarray, window: Window, map_key: str) -> tuple[np.ndarray, np.ndarray]:
    cells, to_frame = _read_cells(element, matrix, window)
    if not cells.size:
        x0, x1, y0, y1 = _extent(element.sizes, matrix)
        msg = (
            f"`window` {tuple(round(float(v), 1) for v in window)} does not meet `sdata.images[{map_key!r}]`, which "
            f"covers x {x0:.1f} to {x1:.1f}, y {y0:.1f} to {y1:.1f}."
        )
        raise ValueError(msg)
    return cells.astype(np.float32), to_frame
