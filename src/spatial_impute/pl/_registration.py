"""Sections on their reference, before and after registration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.patches import Patch

from spatial_impute._geometry import apply_affine, lies_on
from spatial_impute._stack.elements import load_transform, require_registration
from spatial_impute._stack.record import load_record
from spatial_impute._stack.state import registration_problems, warn
from spatial_impute._validation import require_count, require_positive
from spatial_impute.metrics import registration_quality
from spatial_impute.pl._color import add_colorbar, color_limits, resolve_cmap
from spatial_impute.pl._figure import (
    add_scale_bar,
    document_figure,
    finish,
    frame_panel,
    label_row,
    legend_below,
    make_panels,
    nice_length,
    show_image,
    titles_for,
)
from spatial_impute.pl._overlay import Canvas, Drawn, compared_sections, on_reference, overlay, tissue_dice

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from spatialdata import SpatialData

    from spatial_impute._registration.transform import SectionTransform

_COLUMNS = ("before", "after", "checkerboard, after")
_REFERENCE, _MOVED, _BOTH = "#FF00FF", "#00FF00", "0.4"  # readers with color blindness can tell magenta from green
_TABLE = {
    "dice_before": "Dice before",
    "dice_after": "Dice after",
    "correlation_before": "r before",
    "correlation_after": "r after",
    "score": "score",
    "error_um": "error, µm",
    "folds": "folds",
    "verdict": "verdict",
}
_TABLE_ROW, _TABLE_FONT = 0.24, 8.0  # inches, points
_ALARM = "#D55E00"
_GRID_LINES = 18  # along the longer side of a panel
_GRID_STEP = 0.2  # points on a grid line per spacing: the deformation is smooth
_FULL_BEND = 0.7  # of the spacing: how far the largest displacement may be drawn, so that lines rarely cross
_PALE = 0.35  # of the ink of the tissue under the grid


@document_figure
def registration(
    sdata: SpatialData,
    *,
    sections: str | Sequence[str] | None = None,
    resolution: float | None = None,
    n_tiles: int = 8,
    show_table: bool = False,
    ax: Axes | Sequence[Axes] | None = None,
    figsize: tuple[float, float] | None = None,
    title: str | Sequence[str] | None = None,
    save: str | Path | None = None,
    show: bool | None = None,
    return_ax: bool = False,
) -> np.ndarray | None:
    """Overlay of each section on the reference before and after registration, one row per section in the order of z.

    The overlays show the stain of the tissue: the reference is magenta, the section is green, and both together are
    grey. "before" places the two images on each other without registration. The checkerboard alternates the H&E of
    both; its upper left tile shows the reference. Vessels, glands and the outline should continue across tiles. If a
    section is deformed (``method="syn"``), a fourth column shows the deformation as a bent grid. The title states the
    factor by which the bends are enlarged; the color is the true displacement.

    The text beside a row states the verdict, the route to the reference, the overlap of the two tissues (Dice) before
    and after, the expected error (median and 90th percentile at a point), and the structure score of the weakest pair
    on the route. Sections that the registration skipped are not shown.

    Parameters
    ----------
    sdata
        Registered stack.
    sections
        Sections to compare with the reference; all others by default.
    resolution
        Pixel size in um at which the images are read; by default 600 pixels along the longer side.
    n_tiles
        Smallest number of tiles of the checkerboard along the longer side of a panel; their size is a round length.
    show_table
        Add the table of :func:`~spatial_impute.metrics.registration_quality` under the panels: one row per registered
        pair of sections.
    ax
        Axes to draw on, three per section (four if one is deformed), row by row, instead of a new figure.
    title
        One text per row instead of the default.

    Returns
    -------
    ``None``, or with ``return_ax=True`` an array (n_sections, 3 or 4) of :class:`~matplotlib.axes.Axes`. The axes of
    the table come last in the figure, before the color bar.

    Raises
    ------
    KeyError
        If the stack is not registered, or a section does not exist.
    ValueError
        If no section is left to compare, `ax` or `title` do not fit their number, or ``show_table=True`` with `ax`.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack(extent=1400.0)
    >>> si.tl.register_stack(sdata, show_progress_bar=False)
    >>> si.pl.registration(sdata, return_ax=True).shape
    (2, 3)
    """
    record = load_record(sdata)
    rows = require_registration(record)["sections"]
    warn(registration_problems(sdata, record))
    wanted = compared_sections(record, sections, rows)
    transforms = [load_transform(sdata, record, section.name) for section in wanted]
    titles = titles_for(title, [""] * len(wanted), "per section")
    require_count(n_tiles, name="n_tiles", least=2)
    if show_table and ax is not None:
        msg = "`show_table=True` needs a figure of its own; leave out `ax`, or the table."
        raise ValueError(msg)
    if resolution is not None:
        resolution = require_positive(resolution, name="resolution", unit="um per pixel")
    canvas, on_canvas, drawn = on_reference(sdata, record, wanted, resolution)
    deformed = any(transform.deforms for transform in transforms)
    quality = registration_quality(sdata) if show_table else None
    axes = make_panels(
        len(wanted),
        3 + deformed,
        aspect=canvas.height / canvas.width,
        ax=ax,
        figsize=figsize,
        margin=(1.6, 0.7),
        foot=0.0 if quality is None else _TABLE_ROW * (len(quality) + 2),
    ).reshape(-1, 3 + deformed)
    if quality is not None:
        _draw_table(axes[0, 0].get_figure(root=True).axes[-1], quality)
    tile = nice_length(max(canvas.width, canvas.height) / n_tiles)
    for panels, section, (before, after), text in zip(axes, wanted, drawn, titles, strict=True):
        row = rows[section.name]
        _draw_row(panels, canvas, (on_canvas, before, after), tile)
        if title is None:
            text = _describe(section.name, row, tissue_dice(on_canvas, before), tissue_dice(on_canvas, after))
        label_row(panels[0], text, color="black" if row["verdict"] == "ok" else _ALARM)
    if deformed:
        _draw_deformations(axes[:, 3], canvas, [after for _, after in drawn], transforms)
    for panel, head in zip(axes[0], _COLUMNS, strict=False):
        panel.set_title(head, fontsize="medium")
    add_scale_bar(axes[-1, 0])
    colors = {f"{record.reference} (reference)": _REFERENCE, "section": _MOVED, "both": _BOTH}
    handles: list[Artist] = [Patch(color=color, label=label) for label, color in colors.items()]
    legend_below(axes[-1, 1], handles, handlelength=1, handleheight=1, columnspacing=1.0, handletextpad=0.4)
    return finish(axes, ax=ax, save=save, show=show, return_ax=return_ax)


def _draw_table(ax: Axes, quality: pd.DataFrame) -> None:
    """Table of the registered pairs of sections; a verdict other than "ok" is colored."""
    columns = {key: head for key, head in _TABLE.items() if key in quality}
    cells = quality[list(columns)].map(lambda value: f"{value:.2f}" if isinstance(value, float) else str(value))
    if "error_um" in cells:
        cells["error_um"] = quality["error_um"].map("{:.0f}".format, na_action="ignore").fillna("unknown")
    rows = [
        [f"{moving} on {fixed}", *row] for (fixed, moving), row in zip(quality.index, cells.to_numpy(), strict=True)
    ]
    ax.set_axis_off()
    table = ax.table(rows, colLabels=["pair", *columns.values()], loc="center", cellLoc="center", edges="horizontal")
    table.auto_set_font_size(False)
    table.set_fontsize(_TABLE_FONT)
    table.auto_set_column_width(range(len(columns) + 1))
    for (row, column), cell in table.get_celld().items():
        cell.set_linewidth(0.5)
        cell.set_height(1 / (len(rows) + 1))
        if row == 0:
            cell.get_text().set_fontweight("bold")
        elif column == len(columns) and quality["verdict"].iloc[row - 1] != "ok":
            cell.get_text().set_color(_ALARM)


def _describe(name: str, row: dict[str, Any], before: float, after: float) -> str:
    # The path is shown only if it leads over other sections, and in a short form: a long line would narrow the panels.
    path = row["path"] if len(row["path"]) <= 4 else [*row["path"][:2], "…", row["path"][-1]]
    route = row["route"] if len(path) <= 2 else f"{row['route']}:\n" + " → ".join(path)
    median, most = row.get("error_um"), row.get("error_p90_um")
    error = "unknown" if median is None or most is None else f"{median:.0f} µm, 90 %: {most:.0f} µm"
    return (
        f"{name}: {row['verdict']}\n{route}\nDice {before:.2f} → {after:.2f}\nerror {error}\nscore {row['score']:.2f}"
    )


def _draw_deformations(
    panels: np.ndarray, canvas: Canvas, drawn: list[Drawn], transforms: list[SectionTransform]
) -> None:
    """Bent grids over pale tissue, all with one factor and one color scale."""
    spacing = nice_length(max(canvas.width, canvas.height) / _GRID_LINES)
    x0, y0, x1, y1 = canvas.limits
    fine = [np.arange(low, high + spacing, _GRID_STEP * spacing) for low, high in ((x0, x1), (y0, y1))]
    coarse = [np.arange(low, high + spacing, spacing) for low, high in ((x0, x1), (y0, y1))]
    lines = [np.column_stack([np.full(len(fine[1]), x), fine[1]]) for x in coarse[0]]
    lines += [np.column_stack([fine[0], np.full(len(fine[0]), y)]) for y in coarse[1]]
    bends = [_bends(lines, section, transform, canvas) for section, transform in zip(drawn, transforms, strict=True)]
    lengths = np.concatenate([np.hypot(*shift.T) for some in bends for _, shift in some] or [np.ones(1)])
    largest = max(float(lengths.max()), 1e-6)
    factor = max(1.0, nice_length(_FULL_BEND * spacing / largest))
    cmap, norm = resolve_cmap("viridis"), color_limits(lengths, 0.0, None)
    for panel, section, some in zip(panels, drawn, bends, strict=True):
        frame_panel(panel, canvas.limits)
        show_image(panel, 255.0 * (1 - _PALE * np.repeat(section.stain[..., None], 3, axis=2)), canvas.to_um)
        for line, shift in some:
            bent = line + factor * shift
            pieces = LineCollection(list(np.stack([bent[:-1], bent[1:]], axis=1)), cmap=cmap, norm=norm, linewidths=0.8)
            pieces.set_array(np.hypot(*shift.T)[:-1])
            panel.add_collection(pieces, autolim=False)
        if not some:
            panel.text(0.5, 0.5, "affine only", transform=panel.transAxes, ha="center", va="center", fontsize="small")
    head = "deformation" if factor == 1 else f"deformation, × {factor:g}"
    panels[0].set_title(head, fontsize="medium")
    add_colorbar(panels, lengths, norm, cmap, "displacement, µm", n_rows=len(panels))


def _bends(
    lines: list[np.ndarray], section: Drawn, transform: SectionTransform, canvas: Canvas
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pieces of the lines in the tissue, and the displacement (um) of their points."""
    if not transform.deforms:
        return []
    back = np.linalg.inv(transform.matrix)
    result = []
    for line in lines:
        inside = lies_on(section.mask, (line - [canvas.x0, canvas.y0]) // canvas.pixel)
        # Points placed by the matrix alone, and where the deformation takes them.
        shift = transform.points(apply_affine(line, back)) - line
        edges = np.flatnonzero(np.diff(np.r_[False, inside, False]))
        result += [(line[a:b], shift[a:b]) for a, b in edges.reshape(-1, 2) if b - a > 1]
    return result


def _draw_row(panels: np.ndarray, canvas: Canvas, drawn: tuple[Drawn, Drawn, Drawn], tile: float) -> None:
    """Overlays before and after, and the checkerboard after, of (reference, before, after)."""
    reference, before, after = drawn
    pictures = (overlay(reference, before), overlay(reference, after), canvas.checkerboard(reference, after, tile))
    for panel, picture in zip(panels, pictures, strict=False):
        frame_panel(panel, canvas.limits)
        show_image(panel, picture, canvas.to_um)
    # Edges of the tiles, where structures should continue.
    style: dict[str, Any] = {"colors": "black", "linewidths": 0.4, "alpha": 0.35}
    x0, y0, x1, y1 = canvas.limits
    panels[2].vlines(np.arange(x0, x1, tile), y0, y1, **style)
    panels[2].hlines(np.arange(y0, y1, tile), x0, x1, **style)
    panels[2].set(xlim=(x0, x1), ylim=(y1, y0))
