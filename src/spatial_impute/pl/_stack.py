"""Sections of a stack side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from spatial_impute._geometry import apply_affine
from spatial_impute._image.levels import read_thumbnail
from spatial_impute._image.tissue import tissue_mask
from spatial_impute._keys import Keys
from spatial_impute._stack.elements import section_levels, spot_geometry
from spatial_impute._stack.record import load_record
from spatial_impute._stack.table import stack_table
from spatial_impute._validation import require_one_of, require_positive
from spatial_impute.pl._color import read_color
from spatial_impute.pl._stack_space import stack_space
from spatial_impute.pl._utils import (
    INK,
    add_scale_bar,
    check_titles,
    draw_circles,
    finish,
    frame_panel,
    make_panels,
    section_title,
    sections_in_z,
    show_image,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from spatialdata import SpatialData

    from spatial_impute._stack.record import Section

_PIXELS = 1000  # along the longer side of an image; tissue fills half of it or more
_MASK_PIXELS = 500  # enough to find where the tissue is
_MARGIN = 0.05  # of the extent of the tissue
_ONE_ROW, _COLUMNS = 5, 4
_LONG_TITLE = 2.4  # inches that the default title takes on one line


def stack(
    sdata: SpatialData,
    *,
    sections: str | Sequence[str] | None = None,
    projection: str = "2d",
    color: str | None = None,
    layer: str | None = None,
    table_key: str = Keys.STACK_TABLE,
    resolution: float | None = None,
    img_alpha: float | None = None,
    crop: bool = True,
    z_stretch: float | None = None,
    ncols: int | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    figsize: tuple[float, float] | None = None,
    cmap: str | Colormap = "viridis",
    vmin: float | str | None = None,
    vmax: float | str | None = None,
    title: str | Sequence[str] | None = None,
    save: str | Path | None = None,
    show: bool = False,
    return_ax: bool = False,
) -> np.ndarray | None:
    """Sections side by side in the order of z, or as a 3D stack of images.

    Side by side, each section is in its own frame and all have the same scale. In 3D they lie at their height in the
    common frame, if the stack is registered; spots are drawn with `color` only.

    Parameters
    ----------
    sdata
        Stack.
    sections
        Sections to show; all by default.
    projection
        ``"2d"`` or ``"3d"``.
    color
        Column of ``obs`` or a gene of the stack table. Spots without a value are drawn as outlines, as all are without
        `color`. Spots have their true diameter.
    layer
        Layer for a gene, ``"measured"`` by default.
    table_key
        Stack table.
    resolution
        Pixel size in um at which the images are read; by default 1000 pixels along the longer side, 110 in 3D.
    img_alpha
        Strength of the image, 0-1; 1 by default, 0.5 with `color`.
    crop
        Show tissue and spots only, not the whole image. In 3D there is always only the tissue.
    z_stretch
        In 3D, factor on z; by default such that sections stand clear of each other. It is written into the figure.
    ncols
        Panels per row; by default one row for up to five sections, else four.
    ax
        Axes to draw on, one per section or one 3D axes, instead of a new figure.
    figsize
        Size of the figure in inches.
    cmap
        Colour map for numbers.
    vmin, vmax
        Colour limits: numbers, or percentiles such as ``"p99"``.
    title
        One title per section, in place of the default; in 3D one for the figure.
    save
        File to save the figure to.
    show
        Call :func:`matplotlib.pyplot.show`.
    return_ax
        Return the axes.

    Returns
    -------
    ``None``, or with ``return_ax=True`` an array of :class:`~matplotlib.axes.Axes`, one per section or the one in 3D.

    Raises
    ------
    KeyError
        If there is no stack, or a section, column, gene or layer does not exist.
    ValueError
        If `ax` or `title` do not fit the number of sections, or colour limits make no sense.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack()
    >>> axes = si.pl.stack(sdata, color="smooth_0", return_ax=True)
    >>> [ax.get_title() for ax in axes]
    ['s0, z = 0 µm', 's1 (measured), z = 20 µm', 's2, z = 40 µm']
    """
    record = load_record(sdata)
    wanted = sections_in_z(record, sections)
    require_one_of(projection, ("2d", "3d"), name="projection")
    titles = check_titles(title, wanted) if projection == "2d" else None
    table = None if color is None else stack_table(sdata, table_key)
    coloring = None if color is None else read_color(table, color, layer, table_key=table_key)
    if ncols is not None and int(ncols) < 1:
        msg = f"`ncols` must be at least 1, found {ncols!r}."
        raise ValueError(msg)
    if resolution is not None:
        resolution = require_positive(resolution, name="resolution", unit="um per pixel")
    shown = np.empty(0)
    if coloring is not None and table is not None:
        shown = coloring.values[table.obs[Keys.SECTION].isin([section.name for section in wanted]).to_numpy()]
        norm, colors = coloring.scale(shown, cmap, vmin, vmax)
    strength = img_alpha if img_alpha is not None else 1.0 if coloring is None else 0.5
    if projection == "3d":
        spot_colors: dict[str, np.ndarray] = {}
        for section in wanted:
            if coloring is not None and table is not None and section.spots is not None:
                values = _values_of(table, section.name, coloring.values, spot_geometry(sdata, section)[2])
                spot_colors[section.name] = colors(norm(np.ma.masked_invalid(values)))
        axes = stack_space(
            sdata,
            record,
            wanted,
            spot_colors,
            resolution=resolution,
            img_alpha=strength,
            z_stretch=z_stretch,
            ax=ax,
            figsize=figsize,
        )
        if title is not None:
            axes[0].set_title(str(title), fontsize="medium")
        if coloring is not None:
            coloring.add_key(axes, 1, shown, norm, colors, n_rows=2)
        return finish(axes, save=save, show=show, return_ax=return_ax)

    thumbnails, frames, boxes = [], [], []
    for section in wanted:
        levels = section_levels(sdata, section)
        longest = max(levels[0].shape) * levels[0].pixel_size
        thumbnails.append(read_thumbnail(levels, resolution or longest / _PIXELS))
        frames.append(_frame(*thumbnails[-1]))
        boxes.append(_content(sdata, section, *thumbnails[-1]) if crop else frames[-1])
    span = np.max([np.ptp(box, axis=0) for box in boxes], axis=0)  # the same for all: one scale
    n_columns = min(int(ncols or (len(wanted) if len(wanted) <= _ONE_ROW else _COLUMNS)), len(wanted))
    n_rows = -(-len(wanted) // n_columns)
    axes = make_panels(
        n_rows,
        n_columns,
        aspect=span[1] / span[0],
        ax=ax,
        figsize=figsize,
        n_panels=len(wanted),
        margin=(0.2 if color is None else 1.2, 0.5 * n_rows),
    )
    wide = axes[0].get_figure(root=True).get_figwidth() / n_columns > _LONG_TITLE
    for i, (panel, section) in enumerate(zip(axes, wanted, strict=True)):
        # Stay inside the image where it is large enough.
        room = np.maximum(np.ptp(frames[i], axis=0) - span, 0) / 2
        middle = frames[i].mean(axis=0) + np.clip(boxes[i].mean(axis=0) - frames[i].mean(axis=0), -room, room)
        frame_panel(panel, (*(middle - span / 2), *(middle + span / 2)))
        show_image(panel, *thumbnails[i], alpha=strength)
        if section.spots is not None:
            centers, radius, index = spot_geometry(sdata, section)
            values = np.full(len(radius), np.nan)
            if coloring is not None and table is not None:
                values = _values_of(table, section.name, coloring.values, index)
            known = np.isfinite(values)
            if not known.all():
                draw_circles(panel, centers[~known], radius[~known], facecolors="none", edgecolors=INK, linewidths=0.4)
            if known.any():
                draw_circles(panel, centers[known], radius[known], values=values[known], cmap=colors, norm=norm)
        measured = section.counts is not None
        panel.set_title(
            titles[i] if titles else section_title(section, measured=measured, separator=", " if wide else "\n"),
            fontsize="medium",
            fontweight="bold" if measured else "normal",
        )
    add_scale_bar(axes[(n_rows - 1) * n_columns])
    if coloring is not None:
        coloring.add_key(axes, n_columns, shown, norm, colors)
    return finish(axes, save=save, show=show, return_ax=return_ax)


def _frame(rgb: np.ndarray, to_um: np.ndarray) -> np.ndarray:
    """(2, 2) lowest and highest x, y of the image, um."""
    height, width = rgb.shape[:2]
    corners = apply_affine(np.array([[0, 0], [width, 0], [width, height], [0, height]]), to_um)
    return np.array([corners.min(axis=0), corners.max(axis=0)])


def _content(sdata: SpatialData, section: Section, rgb: np.ndarray, to_um: np.ndarray) -> np.ndarray:
    """(2, 2) lowest and highest x, y of tissue and spots with a margin, um; of the image if there are none."""
    step = max(1, max(rgb.shape[:2]) // _MASK_PIXELS)
    mask = tissue_mask(rgb[::step, ::step], tuple(step * np.linalg.norm(to_um[:2, :2], axis=0)))
    y, x = np.nonzero(mask)
    points = [apply_affine(np.column_stack([x, y]) * step + 0.5, to_um)]
    if section.spots is not None:
        centers, radius, _ = spot_geometry(sdata, section)
        points += [centers - radius[:, None], centers + radius[:, None]]
    points = np.concatenate(points)
    if not len(points):
        return _frame(rgb, to_um)
    low, high = points.min(axis=0), points.max(axis=0)
    margin = _MARGIN * (high - low).max()
    return np.array([low - margin, high + margin])


def _values_of(table: AnnData, section: str, values: np.ndarray, index: pd.Index) -> np.ndarray:
    """Values of the spots of a section, joined by instance id; NaN for spots that the table lacks."""
    rows = (table.obs[Keys.SECTION] == section).to_numpy()
    by_id = pd.Series(values[rows], index=table.obs[Keys.INSTANCE].to_numpy()[rows].astype(str))
    return by_id.reindex(index.astype(str)).to_numpy()
