"""3D axes of a stack: x and y to scale, z stretched so that thin stacks can be seen, lengths in um."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import pyplot as plt
from mpl_toolkits.mplot3d import Axes3D
from mpl_toolkits.mplot3d.art3d import Poly3DCollection

from spatial_impute._validation import require_positive
from spatial_impute.pl._figure import INK, nice_length

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from spatial_impute._stack import Section

_FIGURE = (7.5, 5.5)  # inches
_GAP = 0.32  # between sections, of the longer side of the tissue, which at this elevation looks that high
_TALLEST = 1.4
_CORNERS = 12  # of the polygon that stands for a spot
_LABEL_ROOM = 0.4  # of the length of the tissue, for the names beside it
_VIEW = {"elev": 20.0, "azim": -65.0}


def nice_stretch(length: float, height: float, share: float) -> float:
    """Factor on z, with one digit and never below 1, that makes a stack about `share` as high as it is long.

    Examples
    --------
    >>> nice_stretch(2400.0, 60.0, 0.5)
    20.0
    >>> nice_stretch(1000.0, 2000.0, 0.5)
    1.0
    """
    return max(1.0, float(f"{share * length / height:.0e}")) if height > 0 else 1.0


def resolve_stretch(value: float | None, length: float, height: float, *, share: float) -> float:
    """Given factor on z, or a nice one.

    Raises
    ------
    ValueError
        If `value` is not a positive number.
    """
    return nice_stretch(length, height, share) if value is None else require_positive(value, name="z_stretch")


def stack_share(n_sections: int) -> float:
    """Height of a stack over its length at which sections stand clear of each other, if there are not too many."""
    return min(_GAP * (n_sections - 1), _TALLEST)


def make_space(ax: Axes | Sequence[Axes] | None, figsize: tuple[float, float] | None) -> Axes3D:
    """3D axes of a new figure, or the given ones.

    Raises
    ------
    ValueError
        If `ax` is not one 3D axes.
    """
    if ax is not None:
        if not isinstance(ax, Axes3D):
            msg = (
                f"`ax` must be one 3D axes, found {type(ax).__name__}; make it with "
                '`plt.figure().add_subplot(projection="3d", computed_zorder=False)`.'
            )
            raise ValueError(msg)
        return ax
    figure = plt.figure(figsize=figsize or _FIGURE, layout="constrained")
    # Parts are drawn in the order in which they are added: sections from below.
    return figure.add_subplot(projection="3d", computed_zorder=False)


def frame_space(
    ax: Axes3D, box: np.ndarray, sections: Sequence[Section], *, measured: Sequence[str], stretch: float
) -> None:
    """Limits in um (y runs as in the images), sections named at their heights, scale bar along the front edge.

    Parameters
    ----------
    ax
        Axes.
    box
        (2, 2) lowest and highest x, y.
    sections
        Sections shown, in the order of z.
    measured
        Names of those that were measured.
    stretch
        Factor on z.
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
        text = f"{section.name}{' (measured)' if bold else ''}\nz = {section.z:g} µm"
        weight = "bold" if bold else "normal"
        ax.text(beside, low[1], section.z, text, fontsize="small", fontweight=weight, va="center", ha="left")
    length = nice_length((high - low)[0] / 3)
    ax.plot([low[0], low[0] + length], [high[1]] * 2, [bottom] * 2, color=INK, linewidth=2.5, solid_capstyle="butt")
    text = f"\n{length / 1000:g} mm" if length >= 1000 else f"\n{length:g} µm"
    stretched = "" if stretch == 1 else f", z × {stretch:g}"
    ax.text(low[0], high[1], bottom, f"{text}{stretched}", fontsize="small", color=INK, va="top", ha="left")


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
