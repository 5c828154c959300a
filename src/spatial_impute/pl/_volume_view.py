"""The interactive view of a volume, made with plotly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.colors import Colormap, Normalize
    from plotly.graph_objects import Figure

    from spatial_impute.pl._voxels import Volume

_SHADES = 32  # steps of the colour scale


def volume_view(
    found: Volume,
    place: tuple[float, float, float],
    *,
    norm: Normalize,
    cmap: Colormap,
    stretch: float,
    heights: Mapping[str, float],
    title: str,
    units: str,
) -> Figure:
    """Slices of a volume in 3D: two that stand, and one that a slider moves along z.

    Parameters
    ----------
    found
        Volume.
    place
        x, y, z of the slices at the start, um.
    norm, cmap
        Colour scale.
    stretch
        Factor on z.
    heights
        Height of each section, named on the z axis.
    title, units
        Texts.

    Raises
    ------
    ImportError
        If plotly is not installed.
    """
    try:
        from plotly import graph_objects as go
    except ImportError as error:
        msg = (
            'The interactive view needs plotly: `pip install "spatial-impute[interactive]"`. '
            "Without it, `si.pl.volume(sdata, gene)` draws slices."
        )
        raise ImportError(msg) from error

    stops = np.linspace(0, 1, _SHADES)
    scale = [[float(s), "rgb({:.0f},{:.0f},{:.0f})".format(*(255 * np.array(cmap(s)[:3])))] for s in stops]
    # Shading would change the colours, which are values.
    flat = {"ambient": 1.0, "diffuse": 0.0, "specular": 0.0, "fresnel": 0.0}
    colors = {"colorscale": scale, "cmin": norm.vmin, "cmax": norm.vmax, "lighting": flat}
    x, y, z = found.axes
    surfaces = [
        {**plane(found, 0, place[0]), "showscale": False},
        {**plane(found, 1, place[1]), "showscale": True, "colorbar": {"title": {"text": units.replace("\n", "<br>")}}},
    ]
    start = found.cell(2, place[2])
    moving = [{**plane(found, 2, height), "showscale": False, "visible": k == start} for k, height in enumerate(z)]
    figure = go.Figure([go.Surface(**surface, **colors, connectgaps=False) for surface in [*surfaces, *moving]])
    steps = [
        {
            "label": f"{height:g}",
            "method": "update",
            "args": [{"visible": [True, True, *(i == k for i in range(len(z)))]}],
        }
        for k, height in enumerate(z)
    ]
    factor = "" if stretch == 1 else f" (z × {stretch:g})"
    longest = max(np.ptp(x), np.ptp(y))
    figure.update_layout(
        title=f"{title.replace(chr(10), ', ')}{factor}",
        scene={
            "xaxis": {"title": "x, µm"},
            "yaxis": {"title": "y, µm", "autorange": "reversed"},
            "zaxis": {
                "title": "z",
                "tickvals": list(heights.values()),
                "ticktext": [f"{name}, {height:g} µm" for name, height in heights.items()],
            },
            "aspectmode": "manual",
            "aspectratio": {
                "x": float(np.ptp(x) / longest),
                "y": float(np.ptp(y) / longest),
                "z": float(stretch * np.ptp(z) / longest),
            },
        },
        sliders=[{"active": start, "currentvalue": {"prefix": "z = ", "suffix": " µm"}, "steps": steps}],
        margin={"l": 0, "r": 0, "t": 40, "b": 0},
    )
    return figure


def plane(found: Volume, axis: int, position: float) -> dict[str, Any]:
    """Coordinates and colours of a slice across x (0), y (1) or z (2); nothing outside the tissue."""
    values = found.slice(axis, position)
    others = [found.axes[k] for k in (2, 1, 0) if k != axis]  # rows, columns of the slice
    rows, columns = np.meshgrid(*others, indexing="ij")
    here = np.full(values.shape, float(position))
    order = {0: (here, columns, rows), 1: (columns, here, rows), 2: (columns, rows, here)}[axis]
    # plotly leaves out the points of a surface whose z is missing.
    x, y, z = (order[0], order[1], np.where(np.isfinite(values), order[2], np.nan))
    return {"x": x, "y": y, "z": z, "surfacecolor": values}
