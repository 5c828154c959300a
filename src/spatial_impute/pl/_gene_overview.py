"""Overview of many genes: expression by section, sorted by how far each gene can be believed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import Normalize

from spatial_impute._keys import Keys
from spatial_impute._stack import load_record, stack_table, warn_if_old
from spatial_impute._validation import name_list, require_count, require_key
from spatial_impute.pl._color import add_colorbar, layer_values, resolve_cmap
from spatial_impute.pl._figure import INK, document_figure, finish, given_axes, sections_in_z

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from spatialdata import SpatialData

_ROW = 0.17  # inches per gene: names can be read
_MOST_NAMES = 80  # genes; of more, every second or third name is written
_SHORT = 4  # letters of a name that stands across
_BELIEVED, _NOT = "#0072B2", "0.7"  # Okabe and Ito


@document_figure
def gene_overview(
    sdata: SpatialData,
    genes: Sequence[str] | None = None,
    *,
    layer: str = Keys.ASIGN,
    n_genes: int = 50,
    sections: str | Sequence[str] | None = None,
    table_key: str = Keys.STACK_TABLE,
    ax: Sequence[Axes] | None = None,
    figsize: tuple[float, float] | None = None,
    cmap: str | Colormap = "RdBu_r",
    save: str | Path | None = None,
    show: bool | None = None,
    return_ax: bool = False,
) -> np.ndarray | None:
    """Mean expression of many genes on each section, the most predictable gene on top, with its held-out correlation.

    A color says how far the mean of a section lies from the mean over the sections, in standard deviations of the gene
    between spots. The names of measured sections are bold. A measured section that differs from its neighbors in nearly
    all genes points to depth or batch, and not to the tissue. Genes with a grey bar are not predicted better than by
    chance.

    Parameters
    ----------
    sdata
        Stack with imputed expression.
    genes
        Genes to show; by default the `n_genes` that are predicted best.
    layer
        Layer of the stack table.
    n_genes
        Number of genes, if `genes` does not name them.
    sections
        Sections to show; all by default.
    table_key
        Name of the stack table in ``sdata.tables``.
    ax
        Two axes to draw on, instead of a new figure.
    cmap
        Color map.

    Returns
    -------
    ``None``, or with ``return_ax=True`` an array of two :class:`~matplotlib.axes.Axes`: the heat map and the bars.

    Raises
    ------
    KeyError
        If a gene, section or layer does not exist, or ``var["imputation_r"]`` is missing.
    ValueError
        If `genes` is empty or `ax` does not hold two axes.

    Examples
    --------
    See :func:`~spatial_impute.pl.gene_report`.
    """
    record, table = load_record(sdata), stack_table(sdata, table_key)
    wanted = sections_in_z(record, sections)
    then = "Run `si.tl.impute_3d(sdata, model)` first."
    require_key(Keys.PREDICTABILITY, table.var, where=f"sdata.tables[{table_key!r}].var", then=then)
    warn_if_old(sdata, table, [layer])
    r = table.var[Keys.PREDICTABILITY]
    if genes is None:
        names = list(r.sort_values(ascending=False, kind="stable").index[: require_count(n_genes, name="n_genes")])
    else:
        names = name_list(genes, name="genes")
        for gene in names:
            require_key(gene, table.var_names, where=f"sdata.tables[{table_key!r}].var_names")
        names = list(r[names].sort_values(ascending=False, kind="stable").index)
    if not names:
        msg = "`genes` is empty; name some, or leave it out."
        raise ValueError(msg)
    values = layer_values(table, names, layer, table_key=table_key)
    rows = [np.flatnonzero(table.obs[Keys.SECTION] == section.name) for section in wanted]
    used = [k for k, index in enumerate(rows) if len(index)]
    means = np.stack([np.nanmean(values[rows[k]], axis=0) for k in used], axis=1)
    spread = np.maximum(np.nanstd(values[np.concatenate([rows[k] for k in used])], axis=0), 1e-12)
    shift = (means - means.mean(axis=1, keepdims=True)) / spread[:, None]

    if ax is None:
        height = max(2.2, _ROW * min(len(names), _MOST_NAMES) + 1.0)
        figure = plt.figure(figsize=figsize or (3.4 + 0.55 * len(used), height), layout="constrained")
        heat, bars = figure.subplots(1, 2, sharey=True, width_ratios=[0.35 * len(used) + 0.5, 1.2])
    else:
        heat, bars = given_axes(ax, 2, "heat map, bars")
    limit = max(0.2, float(np.nanpercentile(np.abs(shift), 99)))
    norm, colors = Normalize(-limit, limit), resolve_cmap(cmap)
    heat.imshow(shift, cmap=colors, norm=norm, aspect="auto", interpolation="none")
    labels = [wanted[k].name for k in used]
    heat.set_xticks(range(len(used)), labels, rotation=90 if max(map(len, labels)) > _SHORT else 0, fontsize="small")
    heat.set_xlabel("bold: measured", fontsize="small")
    flags = table.obs[Keys.MEASURED].to_numpy(dtype=bool)
    for label, k in zip(heat.get_xticklabels(), used, strict=True):
        label.set_fontweight("bold" if flags[rows[k]].any() else "normal")
    step = -(-len(names) // _MOST_NAMES)
    heat.set_yticks(range(0, len(names), step), names[::step], fontsize="x-small")
    heat.tick_params(length=0)
    heat.spines[:].set_visible(False)
    believed = table.var[Keys.PREDICTABLE].reindex(names) if Keys.PREDICTABLE in table.var else r[names] > 0
    bars.barh(range(len(names)), r[names], color=np.where(believed, _BELIEVED, _NOT), height=0.7)
    bars.axvline(0, color=INK, linewidth=0.6)
    grey = "" if np.all(believed) else "\n(grey: not better than chance)"
    bars.set_xlabel(f"r on held-out blocks{grey}", fontsize="small")
    bars.tick_params(axis="y", length=0, labelleft=False)
    bars.tick_params(axis="x", labelsize="small")
    bars.spines[["top", "right", "left"]].set_visible(False)
    add_colorbar([bars], shift, norm, colors, "section mean minus mean of all,\nin standard deviations", n_rows=1)
    return finish(np.array([heat, bars], dtype=object), ax=ax, save=save, show=show, return_ax=return_ax)
