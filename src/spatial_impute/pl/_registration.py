"""Sections on their reference, before and after registration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.patches import Patch

from spatial_impute._stack import load_record, section_levels
from spatial_impute._validation import require_positive
from spatial_impute.pl._canvas import Canvas, overlay, read_scan, tissue_dice
from spatial_impute.pl._utils import (
    add_scale_bar,
    check_titles,
    finish,
    frame_panel,
    label_row,
    make_panels,
    nice_length,
    sections_in_z,
    show_image,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from spatialdata import SpatialData

_COLUMNS = ("before", "after", "checkerboard, after")
_REFERENCE, _MOVED, _BOTH = "#FF00FF", "#00FF00", "0.4"  # magenta and green, told apart by the colour-blind
_ALARM = "#D55E00"


def registration(
    sdata: SpatialData,
    *,
    sections: str | Sequence[str] | None = None,
    resolution: float | None = None,
    n_tiles: int = 8,
    ax: Axes | Sequence[Axes] | None = None,
    figsize: tuple[float, float] | None = None,
    title: str | Sequence[str] | None = None,
    save: str | Path | None = None,
    show: bool = False,
    return_ax: bool = False,
) -> np.ndarray | None:
    """How well sections lie on the reference: one row per section, in the order of z.

    The overlays show the stain inside the tissue, the reference in magenta and the section in green on white, so that
    what agrees is grey. "before" lays the frames of the two images on each other as they are. The checkerboard
    alternates the H&E of both; its upper left tile is of the reference. Vessels, glands and the outline should run on
    across tiles.

    The text beside a row tells the route to the reference, the verdict, the overlap of the two tissues as drawn (Dice)
    before and after, and the structure score of the weakest pair on the route.

    Parameters
    ----------
    sdata
        Registered stack.
    sections
        Sections to compare with the reference; all others by default.
    resolution
        Pixel size in um at which the images are read; by default 600 pixels along the longer side.
    n_tiles
        Tiles of the checkerboard along the longer side of a panel, at least; their size is a round length.
    ax
        Axes to draw on, three per section, row by row, instead of a new figure.
    figsize
        Size of the figure in inches.
    title
        One text per row, in place of the default.
    save
        File to save the figure to.
    show
        Call :func:`matplotlib.pyplot.show`.
    return_ax
        Return the axes.

    Returns
    -------
    ``None``, or with ``return_ax=True`` an array (n_sections, 3) of :class:`~matplotlib.axes.Axes`.

    Raises
    ------
    KeyError
        If the stack is not registered, or a section does not exist.
    ValueError
        If no section is left to compare, or `ax` or `title` do not fit their number.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack()
    >>> si.tl.register_stack(sdata, method="rigid", show_progress_bar=False)
    >>> si.pl.registration(sdata, return_ax=True).shape
    (2, 3)
    """
    record = load_record(sdata)
    if record.registration is None:
        msg = "The stack is not registered. Run `si.tl.register_stack(sdata)` first."
        raise KeyError(msg)
    reference = record[record.reference]
    wanted = [section for section in sections_in_z(record, sections) if section.name != reference.name]
    if not wanted:
        msg = (
            f"Nothing to compare with the reference {reference.name!r}; `sections` must name others of {record.names}."
        )
        raise ValueError(msg)
    titles = check_titles(title, wanted)
    if resolution is not None:
        require_positive(resolution, name="resolution", unit="um per pixel")
    if int(n_tiles) < 2:
        msg = f"`n_tiles` must be at least 2, found {n_tiles!r}."
        raise ValueError(msg)
    rows = record.registration["sections"]

    fixed = read_scan(section_levels(sdata, reference), resolution)
    moving = {section.name: read_scan(section_levels(sdata, section), resolution) for section in wanted}
    matrices = {name: np.asarray(rows[name]["matrix"], dtype=float) for name in moving}
    poses = [(fixed, np.eye(3))] + [(moving[n], m) for n in moving for m in (np.eye(3), matrices[n])]
    canvas = Canvas.around(np.concatenate([scan.tissue_corners(matrix) for scan, matrix in poses]))
    tile = nice_length(max(canvas.width, canvas.height) / n_tiles)

    axes = make_panels(
        len(wanted), 3, aspect=canvas.height / canvas.width, ax=ax, figsize=figsize, margin=(1.6, 0.7)
    ).reshape(-1, 3)
    on_canvas = canvas.draw(fixed, np.eye(3))
    for i, section in enumerate(wanted):
        before = canvas.draw(moving[section.name], np.eye(3))
        after = canvas.draw(moving[section.name], matrices[section.name])
        pictures = [
            overlay(on_canvas, before),
            overlay(on_canvas, after),
            canvas.checkerboard(on_canvas, after, tile),
        ]
        for panel, picture in zip(axes[i], pictures, strict=True):
            frame_panel(panel, canvas.limits)
            show_image(panel, picture, canvas.to_um)
        _draw_tiles(axes[i, 2], canvas, tile)
        row = rows[section.name]
        text = (
            titles[i]
            if titles
            else _describe(section.name, row, tissue_dice(on_canvas, before), tissue_dice(on_canvas, after))
        )
        label_row(axes[i, 0], text, color="black" if row["verdict"] == "ok" else _ALARM)
    for panel, head in zip(axes[0], _COLUMNS, strict=True):
        panel.set_title(head, fontsize="medium")
    add_scale_bar(axes[-1, 0])
    _add_legend(axes[-1, 1], reference.name)
    return finish(axes, save=save, show=show, return_ax=return_ax)


def _describe(name: str, row: dict[str, Any], before: float, after: float) -> str:
    # The path is worth a line only if it leads over other sections; a long one would push the panels aside.
    path = row["path"] if len(row["path"]) <= 4 else [*row["path"][:2], "…", row["path"][-1]]
    route = row["route"] if len(path) <= 2 else f"{row['route']}:\n" + " → ".join(path)
    return f"{name}: {row['verdict']}\n{route}\nDice {before:.2f} → {after:.2f}\nscore {row['score']:.2f}"


def _draw_tiles(ax: Axes, canvas: Canvas, tile: float) -> None:
    """Edges of the tiles: that is where to look."""
    style = {"colors": "black", "linewidths": 0.4, "alpha": 0.35}
    x0, y0, x1, y1 = canvas.limits
    ax.vlines(np.arange(x0, x1, tile), y0, y1, **style)
    ax.hlines(np.arange(y0, y1, tile), x0, x1, **style)
    ax.set(xlim=(x0, x1), ylim=(y1, y0))


def _add_legend(ax: Axes, reference: str) -> None:
    colors = {f"{reference} (reference)": _REFERENCE, "section": _MOVED, "both": _BOTH}
    ax.legend(
        handles=[Patch(color=color, label=label) for label, color in colors.items()],
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        ncols=3,
        frameon=False,
        fontsize="small",
        handlelength=1,
        handleheight=1,
        columnspacing=1.0,
        handletextpad=0.4,
    )
