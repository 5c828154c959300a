"""Parts of all figures: panels in micrometres with y down, 3D axes, images, circles, scale bars, saving."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.font_manager import FontProperties
from matplotlib.transforms import Affine2D
from mpl_toolkits.axes_grid1.anchored_artists import AnchoredSizeBar
from mpl_toolkits.mplot3d import Axes3D
from mpl_toolkits.mplot3d.art3d import Poly3DCollection

from spatial_impute._keys import Keys
from spatial_impute._stack.record import resolve_sections
from spatial_impute._validation import require_count, require_positive

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.artist import Artist
    from matplotlib.colors import Colormap, Normalize

    from spatial_impute._stack.record import Section, StackRecord

_P = ParamSpec("_P")
_R = TypeVar("_R")

MISSING = "0.85"  # light grey: no value
INK = "0.15"
_FIGURE_WIDTH = 11.0  # inches, the width of a notebook cell
_PANEL_WIDTH = (1.5, 3.0)  # inches, narrowest and widest
_FIGURE_HEIGHT = 10.0  # inches; many rows may exceed it, but with small panels
_SMALL_PANEL = 1.8
_TALLEST_PANEL = 4.5
_MANY_SPOTS = 5000  # a vector file with more circles is slow to open
_SPACE_FIGURE = (7.5, 5.5)  # inches
_GAP = 0.32  # between sections in 3D, of the longer side of the tissue, which at this elevation looks that high
_TALLEST = 1.4
_CORNERS = 12  # of the polygon that stands for a spot in 3D
_LABEL_ROOM = 0.4  # of the length of the tissue, for the names beside it in 3D
_VIEW = {"elev": 20.0, "azim": -65.0}


def sections_in_z(record: StackRecord, sections: str | Sequence[str] | None) -> list[Section]:
    """Wanted sections from the lowest to the highest."""
    return sorted((record[name] for name in resolve_sections(record, sections)), key=lambda section: section.z)


def rows_by_section(table: AnnData, sections: Sequence[Section]) -> tuple[list[np.ndarray], list[bool]]:
    """Rows of the spots of each section, and flags of the sections with measured spots."""
    rows = [np.flatnonzero(table.obs[Keys.SECTION] == section.name) for section in sections]
    flags = table.obs[Keys.MEASURED].to_numpy(dtype=bool)
    return rows, [bool(flags[index].any()) for index in rows]


def section_title(section: Section, *, measured: bool, separator: str = ", ") -> str:
    """Name and height of a section; says if it was measured."""
    return f"{section.name}{' (measured)' if measured else ''}{separator}z = {section.z:g} µm"


def titles_for(title: str | Sequence[str] | None, default: Sequence[str], of: str) -> list[str]:
    """Titles from the user, one per panel, or the default ones; `of` says what there is one title for."""
    if title is None:
        return list(default)
    titles = [title] if isinstance(title, str) else list(title)
    if len(titles) != len(default):
        msg = f"`title` must have one entry {of} ({len(default)}), found {len(titles)}."
        raise ValueError(msg)
    return titles


def grid_shape(n_panels: int, n_columns: int) -> tuple[int, int]:
    """Rows and columns of a grid with at most `n_columns` columns."""
    n_columns = min(require_count(n_columns, name="ncols"), n_panels)
    return -(-n_panels // n_columns), n_columns


def given_axes(ax: Axes | Sequence[Axes], n_panels: int, layout: str) -> np.ndarray:
    """Axes from the user as a flat array of `n_panels`; `layout` describes them in the error."""
    axes = np.array([ax], dtype=object) if isinstance(ax, Axes) else np.ravel(np.asarray(ax, dtype=object))
    if len(axes) != n_panels:
        msg = f"`ax` must hold {n_panels} axes ({layout}), found {len(axes)}."
        raise ValueError(msg)
    return axes


def make_panels(
    n_rows: int,
    n_columns: int,
    *,
    aspect: float,
    ax: Axes | Sequence[Axes] | None,
    figsize: tuple[float, float] | None,
    n_panels: int | None = None,
    margin: tuple[float, float] = (0.2, 0.6),
    foot: float = 0.0,
) -> np.ndarray:
    """Axes of a new figure, or the axes from the user, as an array (n_panels,), row by row.

    `aspect` is the height of a panel over its width, `margin` the width and height (inches) for what stands beside the
    panels. The first `n_panels` panels of the grid are used, all by default. `foot` is the height (inches) of one more
    axes under all panels of a new figure; it becomes the last of ``figure.axes``.
    """
    n_panels = n_rows * n_columns if n_panels is None else n_panels
    if ax is not None:
        return given_axes(ax, n_panels, f"{n_rows} x {n_columns} panels")
    if figsize is None:
        width = np.clip((_FIGURE_WIDTH - margin[0]) / n_columns, *_PANEL_WIDTH)
        width = min(width, _TALLEST_PANEL / aspect, max(_SMALL_PANEL, _FIGURE_HEIGHT / (n_rows * aspect)))
        figsize = (n_columns * width + margin[0], n_rows * width * aspect + margin[1] + foot)
    figure = plt.figure(figsize=figsize, layout="constrained")
    heights = [(figsize[1] - foot) / n_rows] * n_rows + ([foot] if foot else [])
    grid = figure.add_gridspec(len(heights), n_columns, height_ratios=heights)
    axes = [figure.add_subplot(grid[divmod(k, n_columns)]) for k in range(n_panels)]
    if foot:
        figure.add_subplot(grid[-1, :])
    return np.array(axes, dtype=object)


def frame_panel(ax: Axes, limits: tuple[float, float, float, float]) -> None:
    """Show x0, y0, x1, y1 (um) at equal aspect, y down as in images, without ticks and frame."""
    x0, y0, x1, y1 = limits
    ax.set(xlim=(x0, x1), ylim=(y1, y0), aspect="equal", xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def label_row(ax: Axes, text: str, **kwargs: Any) -> None:
    """Write left of a panel, upright."""
    ax.set_ylabel(text, rotation=0, ha="right", va="center", fontsize="medium", linespacing=1.4, **kwargs)


def show_raster(ax: Axes, raster: np.ndarray, to_um: np.ndarray, **kwargs: Any) -> None:
    """Draw a raster (y, x) or (y, x, 3) through the affine of its pixel corners."""
    height, width = raster.shape[:2]
    limits = ax.get_xlim(), ax.get_ylim()
    place: dict[str, Any] = {"extent": (0, width, height, 0), "transform": Affine2D(to_um) + ax.transData}
    ax.imshow(raster, aspect="equal", **place, **kwargs)
    ax.set(xlim=limits[0], ylim=limits[1])  # imshow takes its extent for um


def show_image(ax: Axes, rgb: np.ndarray, to_um: np.ndarray, *, alpha: float = 1.0) -> None:
    """Draw (y, x, 3) in 0-255 through the affine of its pixel corners; `alpha` fades it to white."""
    show_raster(ax, np.clip(1 - alpha * (1 - rgb / 255.0), 0, 1), to_um)


def draw_circles(
    ax: Axes,
    centers: np.ndarray,
    radius: np.ndarray,
    *,
    values: np.ndarray | None = None,
    cmap: Colormap | None = None,
    norm: Normalize | None = None,
    marked: bool = False,
    **kwargs: Any,
) -> EllipseCollection:
    """Circles of true size (um), colored by `values`; `marked` ones have a dark edge."""
    if values is not None and len(radius) <= _MANY_SPOTS:
        edge = {"edgecolors": INK, "linewidths": 0.6} if marked else {"edgecolors": "0.5", "linewidths": 0.3}
        kwargs = edge | kwargs  # without an edge, pale spots would not be visible on white
    circles = EllipseCollection(
        2 * radius,
        2 * radius,
        np.zeros(len(radius)),
        units="xy",
        offsets=centers,
        offset_transform=ax.transData,
        rasterized=len(radius) > _MANY_SPOTS,
        **kwargs,
    )
    if values is not None:
        circles.set(array=np.ma.masked_invalid(np.asarray(values, dtype=float)), cmap=cmap, norm=norm)
    ax.add_collection(circles, autolim=False)
    return circles


def nice_length(span: float) -> float:
    """Longest of 1, 2, 5 times a power of ten that is no longer than `span`."""
    power = 10.0 ** np.floor(np.log10(span))
    return float(power * max(step for step in (1, 2, 5) if step * power <= span * (1 + 1e-9)))


def _in_units(length: float) -> str:
    return f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} µm"


def add_scale_bar(ax: Axes) -> None:
    """Scale bar (um) under the lower left corner of a panel, where it covers nothing."""
    span = abs(np.diff(ax.get_xlim())[0])
    length = nice_length(span / 3)
    stretch = ax.get_aspect()  # of y against x
    bar = AnchoredSizeBar(
        ax.transData,
        length,
        _in_units(length),
        loc="upper left",
        bbox_to_anchor=(0.0, -0.01),
        bbox_transform=ax.transAxes,
        size_vertical=span / 150 / (1.0 if isinstance(stretch, str) else stretch),
        pad=0.1,
        borderpad=0.0,
        sep=3,
        frameon=False,
        color=INK,
        fontproperties=FontProperties(size="small"),
    )
    ax.add_artist(bar)


def legend_below(ax: Axes, handles: list[Artist], *, y: float = 0.0, n_columns: int = 3, **kwargs: Any) -> None:
    """Legend without a frame under a panel."""
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, y), "ncols": n_columns}
    ax.legend(handles=handles, frameon=False, fontsize="small", **place, **kwargs)


def resolve_stretch(value: float | None, length: float, height: float, *, share: float) -> float:
    """Factor on z: the given one, or one that makes a stack about `share` as high as it is long.

    The latter has one digit and is never below 1.

    Examples
    --------
    >>> resolve_stretch(None, 2400.0, 60.0, share=0.5)
    20.0
    >>> resolve_stretch(None, 1000.0, 2000.0, share=0.5)
    1.0
    """
    if value is not None:
        return require_positive(value, name="z_stretch")
    return max(1.0, float(f"{share * length / height:.0e}")) if height > 0 else 1.0


def stack_share(n_sections: int) -> float:
    """Height of a stack over its length at which sections stand clear of each other, if there are not too many."""
    return min(_GAP * (n_sections - 1), _TALLEST)


def make_space(ax: Axes | Sequence[Axes] | None, figsize: tuple[float, float] | None) -> Axes3D:
    """3D axes of a new figure, or the given ones; a ``ValueError`` if these are no 3D axes."""
    if ax is not None:
        if not isinstance(ax, Axes3D):
            msg = (
                f"`ax` must be one 3D axes, found {type(ax).__name__}; make it with "
                '`plt.figure().add_subplot(projection="3d", computed_zorder=False)`.'
            )
            raise ValueError(msg)
        return ax
    figure = plt.figure(figsize=figsize or _SPACE_FIGURE, layout="constrained")
    # Parts are drawn in the order in which they are added: sections from below.
    return figure.add_subplot(projection="3d", computed_zorder=False)


def frame_space(
    ax: Axes3D, box: np.ndarray, sections: Sequence[Section], *, measured: Sequence[str], stretch: float
) -> None:
    """Limits in um (y runs as in the images), sections named at their heights, scale bar along the front edge.

    `box` is (2, 2), the lowest and highest x, y. The `sections` stand in the order of z, `measured` names those that
    were measured. `stretch` is the factor on z.
    """
    low, high = box
    room = _LABEL_ROOM * (high - low)[0]
    heights = np.array([section.z for section in sections])
    margin = 0.05 * (high - low).max() / stretch
    bottom, top = heights.min() - margin, heights.max() + margin
    ax.set(xlim=(low[0], high[0] + room), ylim=(high[1], low[1]), zlim=(bottom, top))
    ax.set_box_aspect(((high - low)[0] + room, (high - low)[1], stretch * (top - bottom)), zoom=1.15)
    ax.view_init(**_VIEW)
    # An axis that is switched off would not count for the layout, and the names would be cut.
    ax.set(xticks=[], yticks=[], zticks=[])
    ax.grid(visible=False)
    for axis in (ax.xaxis, ax.yaxis, ax.zaxis):
        axis.pane.set_visible(False)
        axis.line.set_color("none")
    beside = high[0] + 0.03 * (high - low)[0]
    for section in sections:
        bold = section.name in measured
        text, weight = section_title(section, measured=bold, separator="\n"), "bold" if bold else "normal"
        ax.text(beside, low[1], section.z, text, fontsize="small", fontweight=weight, va="center", ha="left")
    length = nice_length((high - low)[0] / 3)
    ax.plot([low[0], low[0] + length], [high[1]] * 2, [bottom] * 2, color=INK, linewidth=2.5, solid_capstyle="butt")
    text = f"\n{_in_units(length)}{'' if stretch == 1 else f', z × {stretch:g}'}"
    ax.text(low[0], high[1], bottom, text, fontsize="small", color=INK, va="top", ha="left")


def draw_discs(ax: Axes3D, xyz: np.ndarray, radius: np.ndarray, **kwargs: Any) -> Poly3DCollection:
    """Spots of true size (um) lying in their section."""
    angle = np.linspace(0, 2 * np.pi, _CORNERS, endpoint=False)
    rim = np.column_stack([np.cos(angle), np.sin(angle), np.zeros(_CORNERS)])
    return draw_polygons(ax, xyz[:, None] + radius[:, None, None] * rim, **kwargs)


def draw_polygons(ax: Axes3D, corners: np.ndarray, **kwargs: Any) -> Poly3DCollection:
    """Polygons (n, k, 3) in um."""
    polygons = Poly3DCollection(list(corners), **kwargs)
    ax.add_collection3d(polygons, autolim=False)
    return polygons


def plain_text(ax: Axes) -> None:
    """Show the texts of axes as they are: a name of a gene may hold signs that Matplotlib reads as a formula."""
    legend = ax.get_legend()
    texts = [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts, *([] if legend is None else legend.get_texts())]
    texts += [label for axis in (ax.xaxis, ax.yaxis) for label in axis.get_ticklabels()] if ax.axison else []
    for text in texts:
        if "mathdefault" not in text.get_text():  # a number of a logarithmic axis
            text.set_parse_math(False)


def finish(
    axes: np.ndarray, *, ax: Axes | Sequence[Axes] | None, save: str | Path | None, show: bool | None, return_ax: bool
) -> np.ndarray | None:
    """Save and show the figure, and return its axes, each if the user wants it."""
    figure = axes.flat[0].get_figure(root=True)
    for panel in axes.flat:
        plain_text(panel)
    if save is not None:
        # The default of matplotlib, 100 dots per inch, is too coarse for H&E. A value that the user set is kept.
        dpi = mpl.rcParams["savefig.dpi"]
        figure.savefig(save, dpi=200 if dpi == "figure" else dpi, bbox_inches="tight")
    if show or (show is None and ax is None and save is None and not return_ax):
        plt.show()
    return axes if return_ax else None


_TAIL = """    figsize
        Size of the figure in inches.
    save
        File to save the figure to.
    show
        Call :func:`matplotlib.pyplot.show`. By default yes, unless the figure is saved, drawn on your `ax`, or its axes
        are returned.
    return_ax
        Return the axes.

    Returns
"""


def document_figure(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Add the parameters that all plots share to the end of the parameters in a docstring."""
    function.__doc__ = (function.__doc__ or "").replace("\n    Returns\n", _TAIL, 1)
    return function
