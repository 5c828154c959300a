"""Windows of a dense map beside the H&E image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.transforms import Affine2D

from spatial_impute._geometry import apply_affine
from spatial_impute._image.levels import best_level, image_levels, to_rgb
from spatial_impute._keys import Keys
from spatial_impute._stack.elements import element_affine
from spatial_impute._validation import require_key
from spatial_impute.pl._utils import (
    add_colorbar,
    add_scale_bar,
    color_limits,
    finish,
    frame_panel,
    limit_per_gene,
    make_panels,
    resolve_cmap,
    show_image,
)

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from spatialdata import SpatialData
    from xarray import DataArray

    from spatial_impute.pl._utils import Limit

_PIXELS = 800  # along the longer side of a panel: sharp at 200 dots per inch


def dense(
    sdata: SpatialData,
    map_key: str,
    genes: str | Sequence[str],
    *,
    image_key: str | None = None,
    window: tuple[float, float, float, float] | None = None,
    coordinate_system: str | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    figsize: tuple[float, float] | None = None,
    cmap: str | Colormap = "viridis",
    vmin: Limit | Sequence[Limit] = "p1",
    vmax: Limit | Sequence[Limit] = "p99",
    title: str | Sequence[str] | None = None,
    save: str | Path | None = None,
    show: bool = False,
    return_ax: bool = False,
) -> np.ndarray | None:
    """Dense map of genes beside the H&E image, whole or in a window.

    Only the genes and cells that are drawn are read, as many as the figure can show; of a lazy map only those tiles are
    computed.

    Parameters
    ----------
    sdata
        Object with map and image.
    map_key
        Map of :func:`~spatial_impute.tl.predict_dense`.
    genes
        Gene or genes; one panel each.
    image_key
        Image to show first; by default that the map was predicted from.
    window
        Lowest x, highest x, lowest y and highest y to show, in units of the coordinate system (um for a stack).
    coordinate_system
        Frame to draw in; by default the only one the map has.
    ax
        Axes to draw on, image first, instead of a new figure.
    figsize
        Size of the figure in inches.
    cmap
        Colour map.
    vmin, vmax
        Colour limits: numbers, percentiles such as ``"p99"`` or ``None`` for the extremes; or one of these per gene.
    title
        One title per panel, in place of the default.
    save
        File to save the figure to.
    show
        Call :func:`matplotlib.pyplot.show`.
    return_ax
        Return the axes.

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
    from spatialdata.transformations import get_transformation

    require_key(map_key, sdata.images, where="sdata.images", then="Make it with `si.tl.predict_dense(sdata, ...)`.")
    element = sdata.images[map_key]
    genes = [genes] if isinstance(genes, str) else list(genes)
    if not genes:
        msg = f"`genes` is empty; name at least one channel of `sdata.images[{map_key!r}]`."
        raise ValueError(msg)
    for gene in genes:
        require_key(gene, element.coords["c"].to_numpy().tolist(), where=f"channels of sdata.images[{map_key!r}]")
    systems = list(get_transformation(element, get_all=True))
    if coordinate_system is None and len(systems) > 1:
        msg = f"`sdata.images[{map_key!r}]` has the coordinate systems {systems}; choose one with `coordinate_system=`."
        raise ValueError(msg)
    coordinate_system = systems[0] if coordinate_system is None else coordinate_system
    require_key(coordinate_system, systems, where=f"coordinate systems of sdata.images[{map_key!r}]")
    image_key = _source(sdata, map_key) if image_key is None else image_key
    require_key(image_key, sdata.images, where="sdata.images")
    matrix = element_affine(element, coordinate_system)
    x0, x1, y0, y1 = _extent(element.sizes, matrix) if window is None else window
    limits = [limit_per_gene(value, genes, name) for name, value in (("vmin", vmin), ("vmax", vmax))]
    titles = [image_key, *genes] if title is None else ([title] if isinstance(title, str) else list(title))
    if len(titles) != len(genes) + 1:
        msg = f"`title` must have one entry for the image and each of the {len(genes)} genes, found {len(titles)}."
        raise ValueError(msg)
    values, to_frame = _read_map(element.sel(c=genes), matrix, (x0, x1, y0, y1), map_key)
    levels = image_levels(sdata.images[image_key], element_affine(sdata.images[image_key], coordinate_system))
    level = best_level(levels, max(x1 - x0, y1 - y0) / _PIXELS)

    axes = make_panels(1, len(genes) + 1, aspect=(y1 - y0) / (x1 - x0), ax=ax, figsize=figsize, margin=(1.2, 0.6))
    for panel, text in zip(axes, titles, strict=True):
        frame_panel(panel, (x0, y0, x1, y1))
        panel.set_title(text, fontsize="medium")
    rgb, rgb_to_frame = _read_cells(level.data, level.to_um, (x0, x1, y0, y1))
    if rgb.size:
        show_image(axes[0], to_rgb(rgb, level.white), rgb_to_frame)
    colors = resolve_cmap(cmap)
    for k, panel in enumerate(axes[1:]):
        norm = color_limits(values[k], limits[0][k], limits[1][k])
        _show_map(panel, values[k], to_frame, colors, norm)
        add_colorbar([panel], values[k], norm, colors, "")
    add_scale_bar(axes[0])
    return finish(axes, save=save, show=show, return_ax=return_ax)


def _source(sdata: SpatialData, map_key: str) -> str:
    """Image that a map was predicted from."""
    found = sdata.attrs.get(Keys.ATTRS, {}).get(Keys.DENSE, {}).get(map_key)
    if found is None:
        msg = f"`sdata.attrs` do not say which image {map_key!r} was predicted from; name it with `image_key=`."
        raise ValueError(msg)
    return found["image"]


def _extent(sizes: Mapping[Hashable, int], matrix: np.ndarray) -> tuple[float, float, float, float]:
    """Lowest and highest x, then y, of a raster."""
    corners = apply_affine(np.array([[0, 0], [1, 0], [0, 1], [1, 1]]) * [sizes["x"], sizes["y"]], matrix)
    (x0, y0), (x1, y1) = corners.min(axis=0), corners.max(axis=0)
    return x0, x1, y0, y1


def _read_cells(
    data: DataArray, matrix: np.ndarray, window: tuple[float, float, float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """(c, y, x) cells of a raster that a window meets, every k-th where there are more than can be drawn."""
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


def _read_map(
    element: DataArray, matrix: np.ndarray, window: tuple[float, float, float, float], map_key: str
) -> tuple[np.ndarray, np.ndarray]:
    cells, to_frame = _read_cells(element, matrix, window)
    if not cells.size:
        x0, x1, y0, y1 = _extent(element.sizes, matrix)
        msg = (
            f"`window` {tuple(round(float(v), 1) for v in window)} does not meet `sdata.images[{map_key!r}]`, which covers "
            f"x {x0:.1f} to {x1:.1f}, y {y0:.1f} to {y1:.1f}."
        )
        raise ValueError(msg)
    return cells.astype(np.float32), to_frame


def _show_map(ax: Axes, values: np.ndarray, to_frame: np.ndarray, cmap: Colormap, norm: Normalize) -> None:
    height, width = values.shape
    limits = ax.get_xlim(), ax.get_ylim()
    ax.imshow(
        np.ma.masked_invalid(values),
        extent=(0, width, height, 0),
        transform=Affine2D(to_frame) + ax.transData,
        cmap=cmap,
        norm=norm,
        interpolation="nearest",
        aspect="equal",
    )
    ax.set(xlim=limits[0], ylim=limits[1])
