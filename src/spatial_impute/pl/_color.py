"""What colours a spot: a gene of a layer or a column of the table."""

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
from spatial_impute._validation import require_key
from spatial_impute.pl._utils import add_colorbar, color_limits, resolve_cmap

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

# Okabe and Ito: told apart with every kind of colour blindness.
_CATEGORIES = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#000000")
_LABEL_WIDTH = 24  # characters; a colour bar is as long as a panel is high


@dataclass(frozen=True)
class Coloring:
    """Values of spots and how they become colours."""

    values: np.ndarray
    """(n_spots,) numbers, or codes of categories; NaN where there is none."""
    label: str
    categories: tuple[str, ...] | None = None
    palette: tuple[str, ...] = ()
    """Colours of the categories."""

    def scale(
        self, shown: np.ndarray, cmap: str | Colormap, vmin: float | str | None, vmax: float | str | None
    ) -> tuple[Normalize, Colormap]:
        """Colour scale of the `shown` values."""
        if self.categories is None:
            return color_limits(shown, vmin, vmax), resolve_cmap(cmap)
        return Normalize(-0.5, len(self.palette) - 0.5), ListedColormap(list(self.palette))

    def add_key(
        self,
        axes: Sequence[Axes] | np.ndarray,
        n_columns: int,
        shown: np.ndarray,
        norm: Normalize,
        cmap: Colormap,
        *,
        n_rows: int | None = None,
    ) -> None:
        """Colour bar right of `axes`, as long as one of `n_rows` rows, or a legend right of the first row."""
        if self.categories is None:
            add_colorbar(axes, shown, norm, cmap, self.label, n_rows=n_rows or -(-len(axes) // n_columns))
            return
        style: dict[str, Any] = {"marker": "o", "linestyle": "", "markersize": 6, "markeredgewidth": 0}
        present = np.unique(shown[np.isfinite(shown)]).astype(int)
        axes[n_columns - 1].legend(
            handles=[Line2D([], [], color=self.palette[i], label=self.categories[i], **style) for i in present],
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
    """(n_spots, len(genes)) of a layer.

    Raises
    ------
    KeyError
        If the layer or a gene does not exist.
    """
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
    return fill(str(table.uns.get(Keys.NORMALIZATION, {}).get("units", "expression, units unknown")), _LABEL_WIDTH)


def read_color(table: AnnData, color: str, layer: str | None, *, table_key: str) -> Coloring:
    """Values of an ``obs`` column, or of a gene; `layer` says that a gene is meant.

    Raises
    ------
    KeyError
        If there is no such column, gene or layer.
    """
    if layer is not None or (color not in table.obs and color in table.var_names):
        values = layer_values(table, [color], Keys.MEASURED if layer is None else layer, table_key=table_key)[:, 0]
        return Coloring(values, f"{color}\n{units_label(table)}")
    if color not in table.obs:
        msg = (
            f"{color!r} is neither a column nor a gene of `sdata.tables[{table_key!r}]`; columns: "
            f"{sorted(table.obs.columns)}, {table.n_vars} genes, the first are {list(table.var_names[:10])}. "
            "Choose genes with `si.pp.select_genes(sdata, genes=...)`."
        )
        raise KeyError(msg)
    column = table.obs[color]
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
        return Coloring(column.to_numpy(dtype=float), color)
    column = pd.Categorical(column)
    codes = np.where(column.codes < 0, np.nan, column.codes)
    names = tuple(map(str, column.categories))
    # scanpy and squidpy keep the palette of a column there.
    kept = table.uns.get(f"{color}_colors", ())
    return Coloring(codes, color, names, tuple(kept) if len(kept) >= len(names) else _palette(len(names)))


def _palette(n: int) -> tuple[str, ...]:
    if n <= len(_CATEGORIES):
        return _CATEGORIES[:n]
    from scanpy.plotting import palettes

    for palette in (palettes.default_20, palettes.default_28, palettes.default_102):
        if n <= len(palette):
            return tuple(palette[:n])
    return tuple(mpl.colors.to_hex(c) for c in mpl.colormaps["turbo"](np.linspace(0, 1, n)))
