"""Sections of a stack side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from spatial_impute._geometry import apply_affine, box_after
from spatial_impute._image.tissue import tissue_mask
from spatial_impute._keys import Keys
from spatial_impute._registration.transform import SectionTransform
from spatial_impute._stack.elements import load_transform, section_levels, spot_geometry
from spatial_impute._stack.record import load_record
from spatial_impute._stack.state import warn_if_old
from spatial_impute._stack.table import stack_table
from spatial_impute._validation import require_one_of, require_positive
from spatial_impute.pl._color import read_color
from spatial_impute.pl._figure import (
    INK,
    add_scale_bar,
    document_figure,
    draw_circles,
    draw_discs,
    draw_polygons,
    finish,
    frame_panel,
    frame_space,
    grid_shape,
    make_panels,
    make_space,
    resolve_stretch,
    section_title,
    sections_in_z,
    show_image,
    stack_share,
    titles_for,
)
from spatial_impute.pl._overlay import read_picture

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from mpl_toolkits.mplot3d import Axes3D
    from spatialdata import SpatialData

    from spatial_impute._stack.record import Section, StackRecord
    from spatial_impute.pl._color import Coloring

_PIXELS = 1000  # 2D: along the longer side of an image; tissue fills half of it or more
_PIXELS_3D = 110  # along the longer side of a section: each pixel is a polygon
_MASK_PIXELS = 500  # enough to find where the tissue is
_MARGIN = 0.05  # of the extent of the tissue
_ONE_ROW, _COLUMNS = 5, 4
_LONG_TITLE = 2.4  # inches that the default title takes on one line


@document_figure
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
    show: bool | None = None,
    return_ax: bool = False,
) -> np.ndarray | None:
    """Sections side by side in the order of z, or as a 3D stack of images.

    Side by side, each section is drawn in its own frame, all at the same scale. In 3D, each section lies at its height,
    in the common frame if the stack is registered. Spots in 3D are drawn only if `color` is given.

    Parameters
    ----------
    sdata
        Stack.
    sections
        Sections to show; all by default.
    projection
        ``"2d"`` or ``"3d"``.
    color
        Column of ``obs`` or gene of the stack table. A spot without a value is drawn as an outline. Spots have their
        true diameter.
    layer
        Layer of the gene; ``"measured"`` by default.
    table_key
        Name of the stack table in ``sdata.tables``.
    resolution
        Pixel size in um at which the images are read; by default 1000 pixels along the longer side, 110 in 3D.
    img_alpha
        Strength of the image, 0-1; 1 by default, 0.5 with `color`.
    crop
        Show only tissue and spots, not the whole image. The 3D view always shows only the tissue.
    z_stretch
        Factor on z in 3D. The default separates the sections. The figure states the factor.
    ncols
        Panels per row; by default one row for up to five sections, else four.
    ax
        Axes to draw on, one per section or one 3D axes, instead of a new figure.
    cmap
        Color map for numbers.
    vmin
        Lower end of the color scale: a number, or a percentile such as ``"p1"``.
    vmax
        Upper end of the color scale: a number, or a percentile such as ``"p99"``.
    title
        One title per section instead of the default; in 3D one title for the figure.

    Returns
    -------
    ``None``, or with ``return_ax=True`` an array of :class:`~matplotlib.axes.Axes`, one per section or the one in 3D.

    Raises
    ------
    KeyError
        If there is no stack, or a section, column, gene or layer does not exist.
    ValueError
        If `ax` or `title` do not fit the number of sections, or `vmin` exceeds `vmax`.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack(extent=1400.0)
    >>> axes = si.pl.stack(sdata, color="smooth_0", return_ax=True)
    >>> [ax.get_title() for ax in axes]
    ['s0, z = 0 µm', 's1 (measured), z = 20 µm', 's2, z = 40 µm']
    """
    record = load_record(sdata)
    wanted = sections_in_z(record, sections)
    require_one_of(projection, ("2d", "3d"), name="projection")
    resolution = None if resolution is None else require_positive(resolution, name="resolution", unit="um per pixel")
    paint = None
    if color is not None:
        table = stack_table(sdata, table_key)
        of_asign = color in (Keys.SUPPORT, Keys.SOURCE, Keys.DEPTH)
        warn_if_old(sdata, table, [Keys.ASIGN if of_asign and layer is None else layer or Keys.MEASURED])
        paint = read_color(table, color, layer, wanted, (cmap, vmin, vmax), table_key=table_key)
    strength = img_alpha if img_alpha is not None else (1.0 if paint is None else 0.5)
    if projection == "3d":
        slabs = _read_slabs(sdata, record, wanted, resolution)
        axes = _draw_3d(make_space(ax, figsize), slabs, strength, z_stretch, paint)
        _label_3d(axes, title, registered=record.registration is not None, paint=paint)
        return finish(axes, ax=ax, save=save, show=show, return_ax=return_ax)

    default = len(wanted) if len(wanted) <= _ONE_ROW else _COLUMNS
    n_rows, n_columns = grid_shape(len(wanted), default if ncols is None else ncols)
    titles = titles_for(title, [""] * len(wanted), "per section")
    panels = [_read_panel(sdata, section, resolution, crop=crop) for section in wanted]
    span = np.max([np.ptp(panel.box, axis=0) for panel in panels], axis=0)  # the same for all: one scale
    margin = (0.2 if color is None else 1.2, 0.5 * n_rows)
    axes = make_panels(
        n_rows, n_columns, aspect=span[1] / span[0], ax=ax, figsize=figsize, n_panels=len(wanted), margin=margin
    )
    wide = axes[0].get_figure(root=True).get_figwidth() / n_columns > _LONG_TITLE
    for axis, panel, text in zip(axes, panels, titles, strict=True):
        _draw_panel(axis, panel, span, strength, paint)
        measured = panel.section.counts is not None
        if title is None:
            text = section_title(panel.section, measured=measured, separator=", " if wide else "\n")
        axis.set_title(text, fontsize="medium", fontweight="bold" if measured else "normal")
    add_scale_bar(axes[(n_rows - 1) * n_columns])
    if paint is not None:
        paint.add_key(axes, n_columns)
    return finish(axes, ax=ax, save=save, show=show, return_ax=return_ax)


@dataclass(frozen=True)
class _Spots:
    """Spots of a section in the frame of the plot, um."""

    centers: np.ndarray
    radius: np.ndarray
    index: pd.Index


@dataclass(frozen=True)
class _Panel:
    """Image and spots of one section in its own frame."""

    section: Section
    rgb: np.ndarray
    to_um: np.ndarray
    spots: _Spots | None
    image_box: np.ndarray  # (2, 2) lowest and highest x, y of the image, um
    box: np.ndarray  # (2, 2) lowest and highest x, y to show, um


def _read_panel(sdata: SpatialData, section: Section, resolution: float | None, *, crop: bool) -> _Panel:
    rgb, to_um = read_picture(section_levels(sdata, section), resolution, _PIXELS)
    image_box = box_after((0, 0), rgb.shape[1::-1], to_um)
    spots = None if section.spots is None else _Spots(*spot_geometry(sdata, section))
    box = _content_box(rgb, to_um, spots) if crop else image_box
    return _Panel(section, rgb, to_um, spots, image_box, image_box if box is None else box)


def _box(points: np.ndarray) -> np.ndarray:
    return np.array([points.min(axis=0), points.max(axis=0)])


def _content_box(rgb: np.ndarray, to_um: np.ndarray, spots: _Spots | None) -> np.ndarray | None:
    """(2, 2) lowest and highest x, y of tissue and spots with a margin, um; None if there are none."""
    step = max(1, max(rgb.shape[:2]) // _MASK_PIXELS)
    y, x = np.nonzero(tissue_mask(rgb[::step, ::step], step * np.linalg.norm(to_um[:2, :2], axis=0)))
    points = [apply_affine(np.column_stack([x, y]) * step + 0.5, to_um)]
    if spots is not None:
        points += [spots.centers - spots.radius[:, None], spots.centers + spots.radius[:, None]]
    found = np.concatenate(points)
    if not len(found):
        return None
    box = _box(found)
    margin = _MARGIN * np.ptp(box, axis=0).max()
    return box + np.array([[-margin], [margin]])


def _draw_panel(ax: Axes, panel: _Panel, span: np.ndarray, strength: float, paint: Coloring | None) -> None:
    # Stay inside the image where it is large enough.
    room = np.maximum(np.ptp(panel.image_box, axis=0) - span, 0) / 2
    center = panel.image_box.mean(axis=0)
    middle = center + np.clip(panel.box.mean(axis=0) - center, -room, room)
    frame_panel(ax, (*(middle - span / 2), *(middle + span / 2)))
    show_image(ax, panel.rgb, panel.to_um, alpha=strength)
    if panel.spots is None:
        return
    centers, radius = panel.spots.centers, panel.spots.radius
    values = np.full(len(radius), np.nan) if paint is None else paint.of_section(panel.section, panel.spots.index)
    known = np.isfinite(values)
    if not known.all():
        draw_circles(ax, centers[~known], radius[~known], facecolors="none", edgecolors=INK, linewidths=0.4)
    if paint is not None and known.any():
        draw_circles(ax, centers[known], radius[known], values=values[known], cmap=paint.cmap, norm=paint.norm)


@dataclass(frozen=True)
class _Slab:
    """Tissue pixels and spots of one section in the frame of the 3D plot, um."""

    section: Section
    corners: np.ndarray  # (n_pixels, 4, 3) corners of the tissue pixels
    rgb: np.ndarray  # (n_pixels, 3) in 0-255
    spots: _Spots | None
    length: float  # Longer side of the image, um


def _read_slabs(
    sdata: SpatialData, record: StackRecord, sections: list[Section], resolution: float | None
) -> list[_Slab]:
    """Sections in the common frame if the stack is registered, else each in its own frame."""
    slabs = []
    registered = (record.registration or {}).get("sections", {})
    for section in sections:
        place = SectionTransform(np.eye(3))
        if section.name in registered:
            place = load_transform(sdata, record, section.name)
        levels = section_levels(sdata, section)
        rgb, to_um = read_picture(levels, resolution, _PIXELS_3D)
        mask = tissue_mask(rgb, np.linalg.norm(to_um[:2, :2], axis=0))
        spots = None
        if section.spots is not None:
            centers, radius, index = spot_geometry(sdata, section)
            spots = _Spots(place.points(centers), radius, index)
        length = max(levels[0].shape) * levels[0].pixel_size
        slabs.append(_Slab(section, _pixel_corners(mask, to_um, place, section.z), rgb[mask], spots, length))
    return slabs


def _pixel_corners(mask: np.ndarray, to_um: np.ndarray, place: SectionTransform, z: float) -> np.ndarray:
    """(n_pixels, 4, 3) corners of the tissue pixels in the common frame."""
    height, width = mask.shape
    rows, columns = np.indices((height + 1, width + 1)).reshape(2, -1)
    points = place.points(apply_affine(np.column_stack([columns, rows]), to_um)).reshape(height + 1, width + 1, 2)
    y, x = np.nonzero(mask)
    corners = np.stack([points[y, x], points[y, x + 1], points[y + 1, x + 1], points[y + 1, x]], axis=1)
    return np.concatenate([corners, np.full((*corners.shape[:2], 1), z)], axis=-1)


def _draw_3d(
    ax: Axes3D, slabs: list[_Slab], strength: float, z_stretch: float | None, paint: Coloring | None
) -> np.ndarray:
    """Draw the tissue of every section, and the spots if they have colors."""
    points = [np.empty((0, 2))]
    for slab in slabs:
        if len(slab.corners):
            faces = np.clip(1 - strength * (1 - slab.rgb / 255.0), 0, 1)
            # Edges in the color of the face close the seams between pixels.
            draw_polygons(ax, slab.corners, facecolors=faces, edgecolors=faces, linewidths=0.3, rasterized=True)
            points.append(slab.corners[..., :2].reshape(-1, 2))
        if slab.spots is None:
            continue
        points.append(slab.spots.centers)
        if paint is not None:
            values = np.ma.masked_invalid(paint.of_section(slab.section, slab.spots.index))
            xyz = np.column_stack([slab.spots.centers, np.full(len(values), slab.section.z)])
            draw_discs(ax, xyz, slab.spots.radius, facecolors=paint.cmap(paint.norm(values)), edgecolors="none")
    found = np.concatenate(points)
    box = _box(found) if len(found) else np.array([[0.0, 0.0], [slabs[-1].length] * 2])
    sections = [slab.section for slab in slabs]
    height = float(np.ptp([section.z for section in sections]))
    stretch = resolve_stretch(z_stretch, np.ptp(box, axis=0).max(), height, share=stack_share(len(sections)))
    measured = [section.name for section in sections if section.counts is not None]
    frame_space(ax, box, sections, measured=measured, stretch=stretch)
    return np.array([ax], dtype=object)


def _label_3d(axes: np.ndarray, title: str | Sequence[str] | None, *, registered: bool, paint: Coloring | None) -> None:
    if not registered:
        style = {"ha": "center", "fontsize": "small", "color": INK}
        axes[0].text2D(0.5, 0.0, "not registered", transform=axes[0].transAxes, **style)
    if title is not None:
        axes[0].set_title(str(title), fontsize="medium")
    if paint is not None:
        paint.add_key(axes, 1, n_rows=2)
