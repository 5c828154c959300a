"""What the plots share: panels in micrometres with y down, circles, colour limits, scale bars, saving."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.colors import Normalize
from matplotlib.font_manager import FontProperties
from matplotlib.transforms import Affine2D
from mpl_toolkits.axes_grid1.anchored_artists import AnchoredSizeBar

from spatial_impute._keys import Keys
from spatial_impute._stack.record import resolve_sections

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.colors import Colormap

    from spatial_impute._stack.record import Section, StackRecord

    Limit = float | str | None

MISSING = "0.85"  # light grey: no value
INK = "0.15"
_FIGURE_WIDTH = 11.0  # inches, the width of a notebook cell
_PANEL_WIDTH = (1.5, 3.0)  # inches, narrowest and widest
_FIGURE_HEIGHT = 10.0  # inches; many rows may exceed it, but with small panels
_SMALL_PANEL = 1.8
_TALLEST_PANEL = 4.5
_MANY_SPOTS = 5000  # a vector file with more circles is slow to open


def sections_in_z(record: StackRecord, sections: str | Sequence[str] | None) -> list[Section]:
    """The wanted sections from the lowest to the highest."""
    return sorted((record[name] for name in resolve_sections(record, sections)), key=lambda section: section.z)


def section_title(section: Section, *, measured: bool, separator: str = ", ") -> str:
    """Name, whether measured, and height of a section."""
    return f"{section.name}{' (measured)' if measured else ''}{separator}z = {section.z:g} µm"


def check_titles(title: str | Sequence[str] | None, sections: list[Section]) -> list[str] | None:
    """One title per section, or None for the default ones."""
    if title is None:
        return None
    titles = [title] if isinstance(title, str) else list(title)
    if len(titles) != len(sections):
        msg = f"`title` must have one entry per section {[s.name for s in sections]}, found {len(titles)}."
        raise ValueError(msg)
    return titles


def limit_per_gene(limit: Limit | Sequence[Limit], genes: Sequence[str], name: str) -> list[Limit]:
    """One colour limit per gene, from one for all or one for each."""
    if limit is None or isinstance(limit, str | int | float | np.number):
        return [limit] * len(genes)
    if len(limit) != len(genes):
        msg = f"`{name}` must be one limit or one per gene ({len(genes)}), found {len(limit)}."
        raise ValueError(msg)
    return list(limit)


def gene_title(table: AnnData, gene: str, layer: str, separator: str = ", ") -> str:
    """Name of the gene, and how well it was predicted if the layer is the one that this was found out for."""
    if "cross_validated_r" not in table.uns.get(layer, {}) or Keys.PREDICTABILITY not in table.var:
        return gene
    r = table.var.loc[gene, Keys.PREDICTABILITY]
    return f"{gene}{separator}r = {r:.2f}" if np.isfinite(r) else f"{gene}{separator}r unknown"


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
    """Axes of a new figure, or the given ones.

    Parameters
    ----------
    n_rows, n_columns
        Grid.
    aspect
        Height over width of a panel.
    ax
        Axes to draw on, row by row.
    figsize
        Size of the new figure in inches.
    n_panels
        How many panels of the grid are used; all by default.
    margin
        Width and height in inches for what stands beside the panels.
    foot
        Height in inches of one more axes under all panels of a new figure; it becomes the last of ``figure.axes``.

    Returns
    -------
    (n_panels,) axes, row by row.
    """
    n_panels = n_rows * n_columns if n_panels is None else n_panels
    if ax is not None:
        axes = np.array([ax], dtype=object) if isinstance(ax, Axes) else np.ravel(np.asarray(ax, dtype=object))
        if len(axes) != n_panels:
            msg = f"`ax` must hold {n_panels} axes ({n_rows} x {n_columns} panels), found {len(axes)}."
            raise ValueError(msg)
        return axes
    if figsize is None:
        width = np.clip((_FIGURE_WIDTH - margin[0]) / n_columns, *_PANEL_WIDTH)
        width = min(width, _TALLEST_PANEL / aspect, max(_SMALL_PANEL, _FIGURE_HEIGHT / (n_rows * aspect)))
        figsize = (n_columns * width + margin[0], n_rows * width * aspect + margin[1] + foot)
    figure = plt.figure(figsize=figsize, layout="constrained")
    heights = [(figsize[1] - foot) / n_rows] * n_rows + ([foot] if foot else [])
    grid = figure.add_gridspec(len(heights), n_columns, height_ratios=heights)
    places = [(row, column) for row in range(n_rows) for column in range(n_columns)][:n_panels]
    axes = np.array([figure.add_subplot(grid[place]) for place in places], dtype=object)
    if foot:
        figure.add_subplot(grid[-1, :])
    return axes


def frame_panel(ax: Axes, limits: tuple[float, float, float, float]) -> None:
    """Show x0, y0, x1, y1 (um) at equal aspect, y down as in images, without ticks and frame."""
    x0, y0, x1, y1 = limits
    ax.set(xlim=(x0, x1), ylim=(y1, y0), aspect="equal", xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def label_row(ax: Axes, text: str, **kwargs: Any) -> None:
    """Write left of a panel, upright."""
    ax.set_ylabel(text, rotation=0, ha="right", va="center", fontsize="medium", linespacing=1.4, **kwargs)


def show_image(ax: Axes, rgb: np.ndarray, to_um: np.ndarray, *, alpha: float = 1.0) -> None:
    """Draw (y, x, 3) in 0-255 through the affine of its pixel corners; `alpha` fades it to white."""
    height, width = rgb.shape[:2]
    faded = np.clip(1 - alpha * (1 - rgb / 255.0), 0, 1)
    limits = ax.get_xlim(), ax.get_ylim()
    ax.imshow(faded, extent=(0, width, height, 0), transform=Affine2D(to_um) + ax.transData, aspect="equal")
    ax.set(xlim=limits[0], ylim=limits[1])  # imshow takes its extent for um


def draw_circles(
    ax: Axes,
    centers: np.ndarray,
    radius: np.ndarray,
    *,
    values: np.ndarray | None = None,
    cmap: Colormap | None = None,
    norm: Normalize | None = None,
    **kwargs: Any,
) -> EllipseCollection:
    """Circles of true size (um), coloured by `values` if given."""
    if values is not None and len(radius) <= _MANY_SPOTS:
        kwargs = {"edgecolors": "0.5", "linewidths": 0.3} | kwargs  # or pale spots would drown in white
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


def resolve_cmap(cmap: str | Colormap) -> Colormap:
    """Colour map that shows missing values in light grey."""
    return mpl.colormaps.get_cmap(cmap).with_extremes(bad=MISSING)


def color_limits(values: np.ndarray, vmin: Limit, vmax: Limit) -> Normalize:
    """Colour scale from numbers, percentiles like ``"p99"`` (scanpy's convention) or None (the extremes)."""
    finite = np.asarray(values, dtype=float)
    finite = finite[np.isfinite(finite)]
    low = _resolve_limit(finite, vmin, name="vmin", default=0.0)
    high = _resolve_limit(finite, vmax, name="vmax", default=100.0)
    if low > high:
        msg = f"`vmin` must not exceed `vmax`, found {low:g} (`vmin={vmin!r}`) and {high:g} (`vmax={vmax!r}`)."
        raise ValueError(msg)
    if low == high:  # a constant gene still needs a scale
        high = low + 1.0
    return Normalize(low, high)


def _resolve_limit(finite: np.ndarray, limit: Limit, *, name: str, default: float) -> float:
    percentile = default if limit is None else None
    if isinstance(limit, str):
        try:
            percentile = float(limit.removeprefix("p")) if limit.startswith("p") else float("nan")
        except ValueError:
            percentile = float("nan")
        if not 0 <= percentile <= 100:
            msg = f'`{name}` must be a number or a percentile from "p0" to "p100", found {limit!r}.'
            raise ValueError(msg)
    if percentile is None:
        return float(limit)  # type: ignore[arg-type]
    return float(np.percentile(finite, percentile)) if finite.size else default / 100


def add_colorbar(
    axes: Sequence[Axes] | np.ndarray,
    values: np.ndarray,
    norm: Normalize,
    cmap: Colormap,
    label: str,
    *,
    n_rows: int = 1,
) -> None:
    """Colour bar right of `axes` and as long as one of their rows, with pointed ends where values exceed the scale."""
    finite = values[np.isfinite(values)]
    low, high = bool((finite < norm.vmin).any()), bool((finite > norm.vmax).any())
    bar = axes[0].figure.colorbar(
        mpl.cm.ScalarMappable(norm, cmap),
        ax=list(axes),
        extend={(False, False): "neither", (True, False): "min", (False, True): "max"}.get((low, high), "both"),
        shrink=0.85 / n_rows,
        anchor=(0.0, 0.5 if n_rows == 1 else 1 - 0.07 / n_rows),
        aspect=14,
        pad=0.015,
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize="small", length=2)
    bar.set_label(label, fontsize="small")


def nice_length(span: float) -> float:
    """Longest of 1, 2, 5 times a power of ten that is no longer than `span`."""
    power = 10.0 ** np.floor(np.log10(span))
    return float(power * max(step for step in (1, 2, 5) if step * power <= span * (1 + 1e-9)))


def add_scale_bar(ax: Axes) -> None:
    """Scale bar (um) under the lower left corner of a panel, where it covers nothing."""
    span = abs(np.diff(ax.get_xlim())[0])
    length = nice_length(span / 3)
    stretch = ax.get_aspect()  # of y against x
    bar = AnchoredSizeBar(
        ax.transData,
        length,
        f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} µm",
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


def finish(axes: np.ndarray, *, save: str | Path | None, show: bool, return_ax: bool) -> np.ndarray | None:
    """Save, show and return as asked for."""
    figure = axes.flat[0].get_figure(root=True)
    if save is not None:
        # 100 dots per inch, the default of matplotlib, are too few for H&E; whoever set another value gets it.
        dpi = mpl.rcParams["savefig.dpi"]
        figure.savefig(save, dpi=200 if dpi == "figure" else dpi, bbox_inches="tight")
    if show:
        plt.show()
    return axes if return_ax else None
