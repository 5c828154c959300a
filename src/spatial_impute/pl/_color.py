"""Colors of spots: values of a gene or a column, their scale, and the color bar or legend."""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import fill
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.lines import Line2D

from spatial_impute._keys import Keys
from spatial_impute._stack.table import values_by_spot
from spatial_impute._validation import require_key
from spatial_impute.pl._figure import MISSING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

    from spatial_impute._stack.record import Section

    Limit = float | str | None

# Okabe and Ito: readers with any kind of color blindness can tell them apart.
_CATEGORIES = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#000000")
_LABEL_WIDTH = 24  # characters; a color bar is as long as a panel is high


def resolve_cmap(cmap: str | Colormap) -> Colormap:
    """Color map that shows missing values in light grey."""
    return mpl.colormaps.get_cmap(cmap).with_extremes(bad=MISSING)


def color_limits(values: np.ndarray, vmin: Limit, vmax: Limit) -> Normalize:
    """Color scale from numbers, percentiles like ``"p99"`` (scanpy's convention) or None (the extremes)."""
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
    percentile = default
    if isinstance(limit, str):
        percentile = float(pd.to_numeric(limit[1:], errors="coerce")) if limit.startswith("p") else float("nan")
        if not 0 <= percentile <= 100:
            msg = f'`{name}` must be a number or a percentile from "p0" to "p100", found {limit!r}.'
            raise ValueError(msg)
    elif limit is not None:
        return float(limit)
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
    """Color bar right of `axes` and as long as one of their rows, with pointed ends where values exceed the scale."""
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
    bar.ax.yaxis.label.set_parse_math(False)  # names of genes are no formulas


def limit_per_gene(limit: Limit | Sequence[Limit], genes: Sequence[str], name: str) -> list[Limit]:
    """Color limits of all genes, from one limit for all or one per gene."""
    if limit is None or isinstance(limit, str | int | float | np.number):
        return [limit] * len(genes)
    if len(limit) != len(genes):
        msg = f"`{name}` must be one limit or one per gene ({len(genes)}), found {len(limit)}."
        raise ValueError(msg)
    return list(limit)


@dataclass(frozen=True)
class Coloring:
    """Values of all spots of a table, and the scale that the shown ones set."""

    table: AnnData
    values: np.ndarray  # (n_spots,) numbers, or codes of categories; NaN where there is none
    shown: np.ndarray
    label: str
    norm: Normalize
    cmap: Colormap
    categories: tuple[str, ...] | None = None

    def of_section(self, section: Section, index: pd.Index) -> np.ndarray:
        """(n_spots,) values of the spots of a section."""
        return values_by_spot(self.table, section.name, self.values, index)

    def add_key(self, axes: np.ndarray, n_columns: int, *, n_rows: int | None = None) -> None:
        """Color bar right of `axes`, as long as one of `n_rows` rows, or a legend right of the first row."""
        if self.categories is None:
            n_rows = n_rows or -(-len(axes) // n_columns)
            add_colorbar(axes, self.shown, self.norm, self.cmap, self.label, n_rows=n_rows)
            return
        style: dict[str, Any] = {"marker": "o", "linestyle": "", "markersize": 6, "markeredgewidth": 0}
        present = np.unique(self.shown[np.isfinite(self.shown)]).astype(int)
        axes[n_columns - 1].legend(
            handles=[Line2D([], [], color=self.cmap(i), label=self.categories[i], **style) for i in present],
            title=self.label,
            loc="upper left",
            bbox_to_anchor=(1.0, 1.0),
            frameon=False,
            fontsize="small",
            title_fontsize="small",
            alignment="left",
            handletextpad=0.2,
        )


def layer_values(table: AnnData, genes: Sequence[str], layer: str, *, table_key: str) -> np.ndarray:
    """(n_spots, len(genes)) of a layer; a ``KeyError`` if the layer or a gene does not exist."""
    where = f"sdata.tables[{table_key!r}]"
    then = (
        "Write it with `si.pp.select_genes(sdata)`."
        if layer == Keys.MEASURED
        else "Write one with `si.tl.impute_3d(sdata, model)` or `si.tl.impute_baseline(sdata)`, or pass `layer=`."
    )
    require_key(layer, table.layers, where=f"{where}.layers", then=then)
    for gene in genes:
        then = "Choose the genes of a stack with `si.pp.select_genes(sdata, genes=...)`."
        require_key(gene, table.var_names, where=f"{where}.var_names", then=then)
    values = table[:, list(genes)].layers[layer]
    return np.asarray(values.toarray() if hasattr(values, "toarray") else values, dtype=float)


def units_label(table: AnnData) -> str:
    """Units of the expression, broken into lines that fit beside a panel."""
    return wrap_units(table.uns.get(Keys.NORMALIZATION, {}).get("units"))


def wrap_units(units: str | None) -> str:
    """Units, or that they are unknown, broken into lines that fit beside a panel."""
    return fill("expression, units unknown" if units is None else str(units), _LABEL_WIDTH)


def read_color(
    table: AnnData, color: str, layer: str | None, sections: list[Section], scale: tuple, *, table_key: str
) -> Coloring:
    """Colors by an ``obs`` column, or by a gene, for some sections; a `layer` says that a gene is meant.

    `scale` holds the color map, vmin and vmax.
    """
    shown = table.obs[Keys.SECTION].isin([section.name for section in sections]).to_numpy()

    def by_number(values: np.ndarray, label: str) -> Coloring:
        cmap, vmin, vmax = scale
        norm = color_limits(values[shown], vmin, vmax)
        return Coloring(table, values, values[shown], label, norm, resolve_cmap(cmap))

    if layer is not None or (color not in table.obs and color in table.var_names):
        values = layer_values(table, [color], Keys.MEASURED if layer is None else layer, table_key=table_key)[:, 0]
        return by_number(values, f"{color}\n{units_label(table)}")
    if color not in table.obs:
        msg = (
            f"{color!r} is neither a column nor a gene of `sdata.tables[{table_key!r}]`; columns: "
            f"{sorted(table.obs.columns)}, {table.n_vars} genes, the first are {list(table.var_names[:10])}. "
            "Choose genes with `si.pp.select_genes(sdata, genes=...)`."
        )
        raise KeyError(msg)
    column = table.obs[color]
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
        return by_number(column.to_numpy(dtype=float), color)
    column = pd.Categorical(column)
    codes = np.where(column.codes < 0, np.nan, column.codes)
    names = tuple(map(str, column.categories))
    # scanpy and squidpy keep the palette of a column there.
    kept = table.uns.get(f"{color}_colors", ())
    palette = list(kept if len(kept) >= len(names) else _palette(len(names)))
    norm = Normalize(-0.5, len(palette) - 0.5)
    return Coloring(table, codes, codes[shown], color, norm, ListedColormap(palette), names)


def _palette(n: int) -> tuple[str, ...]:
    if n <= len(_CATEGORIES):
        return _CATEGORIES[:n]
    from scanpy.plotting import palettes

    for palette in (palettes.default_20, palettes.default_28, palettes.default_102):
        if n <= len(palette):
            return tuple(palette[:n])
    return tuple(mpl.colors.to_hex(c) for c in mpl.colormaps["turbo"](np.linspace(0, 1, n)))


def gene_title(table: AnnData, gene: str, layer: str, separator: str = ", ") -> str:
    """Name of the gene, and its held-out correlation if the layer comes from the model that measured it."""
    if "cross_validated_r" not in table.uns.get(layer, {}) or Keys.PREDICTABILITY not in table.var:
        return gene
    r = table.var.loc[gene, Keys.PREDICTABILITY]
    return f"{gene}{separator}r = {r:.2f}" if np.isfinite(r) else f"{gene}{separator}r unknown"
