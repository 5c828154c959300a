"""Normalised expression of chosen genes in the stack table."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from spatialdata.models import TableModel

from spatial_impute._expression import (
    log_normalize,
    look_normalized,
    looks_like_counts,
    marked_genes,
    names_by_id,
    require_amounts,
    require_one_base,
    warn_of_linear_values,
)
from spatial_impute._keys import Keys
from spatial_impute._scores import morans_i, nearest_graph
from spatial_impute._settings import log_added, logger
from spatial_impute._stack.elements import rows_of_spots
from spatial_impute._stack.record import load_record
from spatial_impute._stack.table import counts_state, measured_sections, stack_table
from spatial_impute._validation import (
    did_you_mean,
    name_list,
    require_count,
    require_key,
    require_one_of,
    require_positive,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from spatialdata import SpatialData

# Proteins of the ribosome (RPL13A, RPS4X, RPLP0, RPSA), not the kinases of its proteins (RPS6KA1).
_FEW_SPOTS, _SAME_SUM = 10, 1e-3  # sums of log values differ by some per cent
_N_NAMED = 5


def _dispersion(values: Any) -> np.ndarray:
    """Variability compared with genes of the same mean, as ``scanpy.pp.highly_variable_genes`` ranks genes."""
    import scanpy as sc

    found = sc.pp.highly_variable_genes(AnnData(values), flavor="seurat", inplace=False)
    return np.nan_to_num(found["dispersions_norm"].to_numpy(dtype=float), nan=-np.inf)


# Functions of (n, g) log-normalised values and (n, 2) positions in the section to (g,) scores.
_FLAVORS: dict[str, Callable[[Any, np.ndarray], np.ndarray]] = {
    "mean": lambda values, _: np.asarray(values.mean(axis=0)).ravel(),
    "svg": lambda values, xy: morans_i(nearest_graph(xy), values),  # as ``squidpy.gr.spatial_autocorr`` ranks genes
    "hvg": lambda values, _: _dispersion(values),
}


def select_genes(
    sdata: SpatialData,
    *,
    n_top_genes: int = 250,
    flavor: str = "mean",
    genes: Sequence[str] | None = None,
    join: str = "inner",
    layer: str | None = None,
    log_normalized: bool = False,
    target_sum: float = 1e4,
) -> None:
    """Choose genes on the measured sections and write their log-normalised expression to the stack table.

    Counts are divided by the total over **all** genes of the spot, scaled to `target_sum`, and log1p is taken. Genes
    are chosen after that, so that values do not depend on the choice. Unmeasured sections have no influence.

    Parameters
    ----------
    sdata
        Stack with at least one measured section.
    n_top_genes
        Number of genes to choose. Of genes with equal scores, the first in the table is chosen.
    flavor
        Score of a gene, mean over measured sections: ``"mean"`` (log-normalised expression), ``"svg"`` (spatially
        variable: Moran's I among the nearest spots, as in :func:`squidpy.gr.spatial_autocorr`) or ``"hvg"`` (highly
        variable: as in :func:`scanpy.pp.highly_variable_genes`). Genes of high mean have the least counting noise.
        ``"svg"`` chooses genes with a pattern, which are also easier to predict: report the flavor together with every
        score.
    genes
        Names of genes to use instead.
    join
        ``"inner"``: genes that all measured sections have. ``"outer"``: also genes that only some of them have, for
        sections measured with different panels. Their values are NaN on the other sections, and imputed there.
    layer
        Layer of the count tables to read; ``X`` by default.
    log_normalized
        True if the tables already hold log-normalised values, which are used without change.
    target_sum
        Counts per spot after normalisation.

    Returns
    -------
    ``None``. Writes:

    `sdata.tables['stack'].layers['measured']` : :class:`numpy.ndarray` (``float32``)
        (n_spots, n_genes) log1p of counts per `target_sum`; NaN for unmeasured spots, and for genes that a section does
        not have.
    `sdata.tables['stack'].obs['total_counts']` : (``float32``)
        Counts of each measured spot over all genes, NaN for other spots. Not with ``log_normalized=True``.
    `sdata.tables['stack'].obs['measured']` : (``bool``)
        False also for spots whose row was removed from the counts.
    `sdata.tables['stack'].var`
        The chosen genes. Other layers of the table and ``X`` are dropped, since they belong to other genes.
    `sdata.tables['stack'].var['mt']`, `sdata.tables['stack'].var['ribo']` : (``bool``)
        True for a mitochondrial gene (``MT-CO1``), or a gene of a ribosomal protein (``RPL13A``), by its name. Many
        genes with a high mean are of these two kinds.
    `sdata.tables['stack'].uns['normalization']` : :class:`dict`
        Units, `target_sum`, measured sections and version.

    Raises
    ------
    ValueError
        If no section is measured, values are not counts (or are counts, with ``log_normalized=True``), or a measured
        spot has no counts at all.
    KeyError
        For genes that a measured section does not have; with ``join="outer"``, genes that no measured section has.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack(extent=1400.0)
    >>> si.pp.select_genes(sdata, n_top_genes=5)
    >>> sdata.tables["stack"].layers["measured"].shape[1]
    5
    """
    record = load_record(sdata)
    table = stack_table(sdata)
    measured = measured_sections(sdata, record)
    if not measured and genes is None:
        msg = (
            f"No measured section: none of {list(record.names)} has a table of counts. Pass the SpatialData of a "
            "measured section (image, spots and table) to `si.pp.assemble_stack`. To predict this stack with a model "
            "of other stacks, name its genes: `genes=model.var_names`."
        )
        raise ValueError(msg)
    target_sum = require_positive(target_sum, name="target_sum")
    require_one_of(join, ("inner", "outer"), name="join")
    require_one_of(flavor, _FLAVORS, name="flavor")
    n_top_genes = require_count(n_top_genes, name="n_top_genes")
    tables = {}
    for section in measured:
        require_key(str(section.counts), sdata.tables, where="sdata.tables")
        tables[section.name] = _Counts(sdata.tables[section.counts], f"sdata.tables[{section.counts!r}]", layer)
    if log_normalized and layer is None:
        require_one_base({name: counts.table for name, counts in tables.items()})
    values = {
        name: _log_values(counts, log_normalized=log_normalized, target_sum=target_sum)
        for name, counts in tables.items()
    }
    var_names = _gene_names(tables)
    found = {name: _at_spots(table, name, tables[name], values[name]) for name in tables}
    if genes is not None:
        chosen = _given_genes(genes, var_names, join)
    else:
        ranked = _ranked_genes(found, var_names, flavor=flavor, join=join)
        _warn_of_few_common(var_names, len(ranked), n_top_genes)
        chosen = ranked[:n_top_genes]
        _log_housekeeping(chosen)

    expression = np.full((table.n_obs, len(chosen)), np.nan, dtype=np.float32)
    totals = np.full(table.n_obs, np.nan, dtype=np.float32)
    for name, part in found.items():
        columns = var_names[name].get_indexer(chosen)
        picked = part.values[:, columns[columns >= 0]]
        expression[np.ix_(part.rows, columns >= 0)] = picked.toarray() if hasattr(picked, "toarray") else picked
        totals[part.rows] = part.totals
    counted = np.isfinite(totals)

    _write(sdata, table, expression, chosen, counted=counted, totals=None if log_normalized else totals)
    sdata.tables[Keys.STACK_TABLE].uns[Keys.NORMALIZATION] = {
        "units": "log-normalised, as given" if log_normalized else f"log1p of counts per {target_sum:g} (all genes)",
        "target_sum": float("nan") if log_normalized else target_sum,
        "sections": [section.name for section in measured],
        "layer": layer or "",
        Keys.STATE: {section.name: counts_state(sdata.tables[str(section.counts)], layer) for section in measured},
        "version": version("spatial-impute"),
    }
    log_added(f"tables[{Keys.STACK_TABLE!r}].layers[{Keys.MEASURED!r}]")


@dataclass(frozen=True)
class _Counts:
    """Table of one measured section, its name for messages, and the layer to read."""

    table: AnnData
    name: str
    layer: str | None

    @property
    def slot(self) -> str:
        """Slot of the counts, for messages."""
        return ".X" if self.layer is None else f".layers[{self.layer!r}]"

    @property
    def where(self) -> str:
        """Table and slot, for messages."""
        return self.name + self.slot

    @property
    def matrix(self) -> Any:
        """Values of that slot."""
        return self.table.X if self.layer is None else self.table.layers[self.layer]

    @property
    def stored(self) -> np.ndarray:
        """Stored numbers of the matrix, in any shape."""
        return self.matrix.data if sparse.issparse(self.matrix) else np.asarray(self.matrix)

    @property
    def totals(self) -> np.ndarray:
        """(n,) sum of each row."""
        return np.asarray(self.matrix.sum(axis=1, dtype=np.float64)).ravel()

    @property
    def advice(self) -> str:
        """Other place that may hold counts, for messages."""
        taken = f"`{self.name} = {self.name}.raw.to_adata()`"
        return "" if self.table.raw is None else f" If `.raw` holds counts, take them: {taken}."

    def spots(self, rows: np.ndarray) -> np.ndarray:
        """Ids of some spots, for messages."""
        return self.table.obs[Keys.INSTANCE].to_numpy()[rows]


def _log_values(given: _Counts, *, log_normalized: bool, target_sum: float) -> np.ndarray | sparse.csr_matrix:
    """Log-normalised expression of one measured table, after a check of its values."""
    _require_finite_values(given)
    if not log_normalized:
        _require_counts(given)
        return log_normalize(given.matrix, target_sum)
    _require_log_values(given)
    return given.matrix.tocsr() if sparse.issparse(given.matrix) else np.asarray(given.matrix)


def _require_finite_values(given: _Counts) -> None:
    table = given.table
    if given.layer is not None:
        require_key(given.layer, table.layers, where=f"{given.name}.layers")
    elif table.X is None:
        layers = sorted(table.layers)
        advice = f"name the layer that holds them with `layer=`, one of {layers}" if layers else "put them there"
        msg = f"`{given.where}` holds no counts; {advice}.{given.advice}"
        raise ValueError(msg)
    _warn_of_other_features(table, given.name)
    require_amounts(given.stored, where=given.where)
    if not np.isfinite(given.stored).all():
        bad = given.spots(~np.isfinite(np.asarray(abs(given.matrix).sum(axis=1)).ravel()))
        msg = f"`{given.where}` holds NaN or infinite values, the first at spot {bad[0]!r}; remove such spots or genes."
        raise ValueError(msg)


def _require_log_values(given: _Counts) -> None:
    values = given.stored
    if looks_like_counts(values):
        found = f"`{given.where}` holds raw counts (integers up to {values.max():g})"
        msg = f"{found}, but `log_normalized=True` was given."
        raise ValueError(msg)
    warn_of_linear_values(values, where=given.where)
    totals = given.totals
    if len(totals) >= _FEW_SPOTS and totals.std() < _SAME_SUM * totals.mean():
        logger.warning(
            "The rows of `%s` have the same sum (%.4g), so its values were normalised, but no logarithm was taken. Give log values, or "
            "raw counts without `log_normalized=True`",
            given.where,
            totals.mean(),
        )
    if values.size and (values < 0).any():
        logger.warning(
            "`%s` holds values below 0 (down to %.3g), which log-normalised expression has not; if they are z-scores "
            "or residuals, give log values or counts, because genes with equal means and spreads cannot be compared",
            given.where,
            values.min(),
        )


def _require_counts(given: _Counts) -> None:
    values, totals = given.stored, given.totals
    fractions = " with fractions" if (values != np.round(values)).any() else ""
    if fractions or (values < 0).any():
        msg = (
            f"`{given.where}` must hold raw counts (non-negative integers), found {values.min():g} to {values.max():g}"
            f"{fractions}. Name the layer that holds counts with `layer=`, or pass `log_normalized=True`.{given.advice}"
        )
        raise ValueError(msg)
    if (totals == 0).any():
        empty, name = given.spots(totals == 0), given.name
        msg = (
            f"`{given.where}` has {len(empty)} spots without a single count, the first is {empty[0]!r}. Remove them, "
            f"and they are imputed: `table = {name}; {name} = table[np.ravel(table{given.slot}.sum(axis=1)) > 0].copy()`."
        )
        raise ValueError(msg)
    if look_normalized(totals):
        logger.warning(
            "`%s` holds integers whose totals are nearly the same at all spots (about %.4g), so they may be rounded "
            "CPM and no counts; give the raw counts",
            given.where,
            totals.mean(),
        )


@dataclass(frozen=True)
class _Measured:
    """Expression of a measured section at the spots that the stack has."""

    rows: np.ndarray  # (m,) of the stack table
    values: np.ndarray | sparse.csr_matrix  # (m, n_genes) log-normalised
    xy: np.ndarray  # (m, 2) position in the section
    totals: np.ndarray  # (m,) counts of each spot


def _at_spots(table: AnnData, section: str, counts: _Counts, values: np.ndarray | sparse.csr_matrix) -> _Measured:
    row_of = rows_of_spots(table, section, pd.Index(counts.table.obs[Keys.INSTANCE]))
    present = row_of >= 0
    if not present.any():
        msg = (
            f"No row of `sdata.tables[{Keys.STACK_TABLE!r}]` is a spot of `{counts.name}`, whose spots are like "
            f"{str(counts.table.obs[Keys.INSTANCE].iloc[0])!r}. Restore `obs[{Keys.INSTANCE!r}]`, or delete `{counts.name}`."
        )
        raise ValueError(msg)
    rows, xy = row_of[present], np.asarray(table.obsm[Keys.SPATIAL], dtype=float)
    return _Measured(rows, values if present.all() else values[present], xy[rows], counts.totals[present])


def _gene_names(tables: dict[str, _Counts]) -> dict[str, pd.Index]:
    """Names of the genes of each section, joined by stable id where there is one."""
    names = names_by_id({name: counts.table for name, counts in tables.items()})
    changed: dict[str, str] = {}
    for name, counts in tables.items():
        differ = np.flatnonzero(names[name] != counts.table.var_names)
        changed |= {counts.table.var_names[i]: names[name][i] for i in differ[:3]}
    if changed:
        logger.warning(
            "Genes are joined by their ids in `var`, so some have other names than in a table, e.g. %s", changed
        )
    return names


def _warn_of_other_features(table: AnnData, where: str) -> None:
    """Warn if antibodies or control probes count in the total of a spot, and may be chosen as genes."""
    kinds = table.var["feature_types"].value_counts() if "feature_types" in table.var else {}
    others = {str(kind): int(n) for kind, n in dict(kinds).items() if n and kind != "Gene Expression"}
    if others and len(others) < len(kinds):
        logger.warning(
            "%s: features other than genes (%s) count in the total of each spot; keep genes only, with "
            "`table[:, table.var['feature_types'] == 'Gene Expression'].copy()`",
            where,
            others,
        )


def _given_genes(genes: Sequence[str], var_names: dict[str, pd.Index], join: str) -> list[str]:
    """Names of the given genes, after a check that the measured sections have them."""
    wanted = name_list(genes, name="genes", empty="name some genes, or leave it out and set `n_top_genes`.")
    for name, names in var_names.items() if join == "inner" else ():
        missing = [gene for gene in wanted if gene not in names]
        if missing:
            msg = (
                f"{len(missing)} of `genes` are not measured on section {name!r}, e.g. {missing[:5]}."
                f"{did_you_mean(missing[0], names)} Leave them out, "
                "or pass `join='outer'` if sections were measured with different panels."
            )
            raise KeyError(msg)
    lacking = [gene for gene in wanted if var_names and not any(gene in names for names in var_names.values())]
    if lacking:
        msg = f"{len(lacking)} of `genes` are not measured on any section, e.g. {lacking[:5]}."
        raise KeyError(msg)
    return wanted


def _ranked_genes(found: dict[str, _Measured], var_names: dict[str, pd.Index], *, flavor: str, join: str) -> list[str]:
    """Names of the genes, best first: mean score over the sections that have them; the first in the table if equal."""
    counted = pd.Index([]).append([names.unique() for names in var_names.values()]).value_counts(sort=False)
    candidates = counted.index[counted >= (len(var_names) if join == "inner" else 1)]
    if not len(candidates):
        named = {name: list(names[:2]) for name, names in var_names.items()}
        msg = (
            f"The measured sections have no gene in common; they name them like {named}. Rename those of one section "
            "in `sdata.tables`, e.g. from symbols to Ensembl ids."
        )
        raise ValueError(msg)
    scores = np.full((len(found), len(candidates)), np.nan)
    for k, (name, part) in enumerate(found.items()):
        columns = var_names[name].get_indexer(candidates)
        scores[k, columns >= 0] = _FLAVORS[flavor](part.values, part.xy)[columns[columns >= 0]]
    return list(candidates[np.argsort(-np.nanmean(scores, axis=0), kind="stable")])


def _log_housekeeping(genes: list[str]) -> None:
    """Log how many of the chosen genes are mitochondrial or ribosomal, and how to leave them out."""
    marked = marked_genes(genes)
    found = marked.index[marked.any(axis=1)]
    if len(found):
        logger.info(
            "%d of the %d chosen genes are mitochondrial or ribosomal (%s); `var['mt']` and `var['ribo']` mark them, "
            "and `genes=` chooses others",
            len(found),
            len(genes),
            ", ".join(found[:_N_NAMED]) + (", ..." if len(found) > _N_NAMED else ""),
        )


def _warn_of_few_common(var_names: dict[str, pd.Index], n_found: int, n_top_genes: int) -> None:
    """Warn if sections have more genes than they have in common, and fewer than wanted are left."""
    if n_found < n_top_genes and any(len(names) > n_found for names in var_names.values()):
        logger.warning(
            "%d genes are on all measured sections, of %s; check that their names match, or pass `join='outer'`",
            n_found,
            {name: len(names) for name, names in var_names.items()},
        )


def _write(
    sdata: SpatialData,
    old: AnnData,
    expression: np.ndarray,
    genes: list[str],
    *,
    counted: np.ndarray,
    totals: np.ndarray | None,
) -> None:
    """Replace the stack table by one with the chosen genes; obs, obsm, obsp and uns are kept."""
    obs = old.obs.drop(columns=Keys.TOTAL_COUNTS, errors="ignore")
    # Spots may have been removed from the counts since the table was made.
    obs[Keys.MEASURED] = obs[Keys.MEASURED].where(counted, other=False)
    new = AnnData(
        obs=obs if totals is None else obs.assign(**{Keys.TOTAL_COUNTS: totals}),
        var=marked_genes(genes),
        layers={Keys.MEASURED: expression},
        obsm=dict(old.obsm),
        obsp=dict(old.obsp),
        uns={key: value for key, value in old.uns.items() if key != Keys.X_LAYER},
    )
    sdata.tables[Keys.STACK_TABLE] = TableModel.parse(new)
