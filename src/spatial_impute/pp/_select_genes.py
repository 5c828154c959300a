"""Normalised expression of chosen genes in the stack table."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from spatial_impute._expression import log_normalize, look_normalized, looks_like_counts, names_by_id
from spatial_impute._keys import Keys
from spatial_impute._settings import log_added, logger
from spatial_impute._stack import counts_state, load_record, stack_table
from spatial_impute._validation import name_list, require_count, require_key, require_one_of, require_positive

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from spatialdata import SpatialData


def select_genes(
    sdata: SpatialData,
    *,
    n_top_genes: int = 250,
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
        Number of genes with the highest mean log-normalised expression (mean over measured sections). Of genes with
        equal means, the first in the table is chosen.
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
        The chosen genes. Other layers of the table are dropped, since they belong to other genes.
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
    >>> sdata = si.datasets.synthetic_stack()
    >>> si.pp.select_genes(sdata, n_top_genes=5)
    >>> sdata.tables["stack"].layers["measured"].shape[1]
    5
    """
    record = load_record(sdata)
    table = stack_table(sdata)
    measured = [section for section in record.sections if section.counts is not None]
    if not measured and genes is None:
        msg = (
            f"No measured section: none of {list(record.names)} has a table of counts. Pass the SpatialData of a "
            "measured section (image, spots and table) to `si.pp.assemble_stack`. To predict this stack with a model of "
            "other stacks, name its genes: `genes=model.var_names`."
        )
        raise ValueError(msg)
    target_sum = require_positive(target_sum, name="target_sum")
    require_one_of(join, ("inner", "outer"), name="join")
    tables = {}
    for section in measured:
        require_key(str(section.counts), sdata.tables, where="sdata.tables")
        tables[section.name] = _Counts(sdata.tables[section.counts], f"sdata.tables[{section.counts!r}]", layer)
    values = {
        name: _log_values(counts, log_normalized=log_normalized, target_sum=target_sum)
        for name, counts in tables.items()
    }
    var_names = _gene_names(tables)
    if genes is not None:
        chosen = _given_genes(genes, var_names, join)
    else:
        chosen = _top_genes(values, var_names, require_count(n_top_genes, name="n_top_genes"), join)

    expression = np.full((table.n_obs, len(chosen)), np.nan, dtype=np.float32)
    totals = np.full(table.n_obs, np.nan, dtype=np.float32)
    counted = np.zeros(table.n_obs, dtype=bool)
    row_of = pd.Series(np.arange(table.n_obs), index=table.obs_names)
    for name, counts in tables.items():
        columns = var_names[name].get_indexer(chosen)
        names = [f"{name}_{i}" for i in counts.table.obs[Keys.INSTANCE]]
        present = np.isin(names, row_of.index)  # a count row without a spot has no place in the stack
        rows = row_of[np.asarray(names)[present]].to_numpy()
        counted[rows] = True
        has = columns >= 0
        picked = values[name][np.flatnonzero(present)][:, columns[has]]
        expression[np.ix_(rows, has)] = picked.toarray() if hasattr(picked, "toarray") else picked
        totals[rows] = np.asarray(counts.matrix.sum(axis=1)).ravel()[np.flatnonzero(present)]

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
    def matrix(self) -> Any:
        """Values of that slot."""
        return self.table.X if self.layer is None else self.table.layers[self.layer]


def _log_values(given: _Counts, *, log_normalized: bool, target_sum: float) -> np.ndarray | sparse.csr_matrix:
    """Log-normalised expression of one measured table, after a check of its values."""
    table, where = given.table, given.name + given.slot
    if given.layer is not None:
        require_key(given.layer, table.layers, where=f"{given.name}.layers")
    elif table.X is None:
        msg = f"`{where}` is empty; name the layer that holds the counts with `layer=`, one of {sorted(table.layers)}."
        raise ValueError(msg)
    _warn_of_other_features(table, given.name)
    matrix = given.matrix
    data = matrix.data if sparse.issparse(matrix) else np.asarray(matrix)
    if not np.isfinite(data).all():
        rows = np.asarray(abs(matrix).sum(axis=1)).ravel()
        bad = table.obs[Keys.INSTANCE].to_numpy()[~np.isfinite(rows)]
        msg = (
            f"`{where}` holds NaN or infinite values, the first at spot {bad[0]!r}; remove those spots or genes first."
        )
        raise ValueError(msg)
    counts = looks_like_counts(data)
    if log_normalized:
        if counts:
            msg = f"`{where}` holds raw counts (integers up to {data.max():g}), but `log_normalized=True` was given."
            raise ValueError(msg)
        if data.size and (data < 0).any():
            logger.warning(
                "`%s` holds values below 0 (down to %.3g), which log-normalised expression has not; if they are z-scores or "
                "residuals, give log values or counts, because genes with equal means and spreads cannot be compared",
                where,
                data.min(),
            )
        return matrix.tocsr() if sparse.issparse(matrix) else np.asarray(matrix)
    if data.size and ((data < 0).any() or (data != np.round(data)).any()):
        msg = (
            f"`{where}` must hold raw counts (non-negative integers), found {data.min():g} to {data.max():g} with "
            "fractions. Name the layer that holds counts with `layer=`, or pass `log_normalized=True`."
        )
        raise ValueError(msg)
    totals = np.asarray(matrix.sum(axis=1)).ravel()
    if (totals == 0).any():
        empty = table.obs[Keys.INSTANCE].to_numpy()[totals == 0]
        name = given.name
        msg = (
            f"`{where}` has {len(empty)} spots without a single count, the first is {empty[0]!r}. Remove them, and "
            f"they are imputed: `table = {name}; {name} = table[np.ravel(table{given.slot}.sum(axis=1)) > 0].copy()`."
        )
        raise ValueError(msg)
    if look_normalized(totals):
        logger.warning(
            "`%s` holds integers whose totals are nearly the same at all spots (about %.4g), so they may be rounded CPM and no "
            "counts; give the raw counts",
            where,
            totals.mean(),
        )
    return log_normalize(matrix, target_sum)


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
    wanted = name_list(genes, name="genes")
    if not wanted:
        msg = "`genes` is empty; name some genes, or leave it out and set `n_top_genes`."
        raise ValueError(msg)
    for name, names in var_names.items() if join == "inner" else ():
        missing = [gene for gene in wanted if gene not in names]
        if missing:
            msg = (
                f"{len(missing)} of `genes` are not measured on section {name!r}, e.g. {missing[:5]}. Leave them out, "
                "or pass `join='outer'` if sections were measured with different panels."
            )
            raise KeyError(msg)
    lacking = [gene for gene in wanted if var_names and not any(gene in names for names in var_names.values())]
    if lacking:
        msg = f"{len(lacking)} of `genes` are not measured on any section, e.g. {lacking[:5]}."
        raise KeyError(msg)
    return wanted


def _top_genes(
    values: dict[str, np.ndarray | sparse.csr_matrix], var_names: dict[str, pd.Index], n_top_genes: int, join: str
) -> list[str]:
    """Names of the genes with the highest means on the sections that have them."""
    counted = pd.Index([]).append([pd.Index(names).unique() for names in var_names.values()]).value_counts(sort=False)
    candidates = counted.index[counted >= (len(var_names) if join == "inner" else 1)]
    if not len(candidates):
        named = {name: list(names[:2]) for name, names in var_names.items()}
        msg = (
            f"The measured sections have no gene in common; they name them like {named}. Rename those of one section "
            "in `sdata.tables`, e.g. from symbols to Ensembl ids."
        )
        raise ValueError(msg)
    if len(candidates) < n_top_genes and any(len(names) > len(candidates) for names in var_names.values()):
        logger.warning(
            "%d genes are on all measured sections, of %s; check that their names match, or pass `join='outer'`",
            len(candidates),
            {name: len(names) for name, names in var_names.items()},
        )
    means = np.full((len(values), len(candidates)), np.nan)
    for k, (name, matrix) in enumerate(values.items()):
        columns = var_names[name].get_indexer(candidates)
        means[k, columns >= 0] = np.asarray(matrix.mean(axis=0)).ravel()[columns[columns >= 0]]
    order = np.argsort(-np.nanmean(means, axis=0), kind="stable")[:n_top_genes]
    return list(candidates[order])


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
    from anndata import AnnData
    from spatialdata.models import TableModel

    obs = old.obs.drop(columns=Keys.TOTAL_COUNTS, errors="ignore")
    # Spots may have been removed from the counts since the table was made.
    obs[Keys.MEASURED] = obs[Keys.MEASURED].where(counted, other=False)
    new = AnnData(
        obs=obs if totals is None else obs.assign(**{Keys.TOTAL_COUNTS: totals}),
        var=pd.DataFrame(index=pd.Index(genes, dtype=str)),
        layers={Keys.MEASURED: expression},
        obsm=dict(old.obsm),
        obsp=dict(old.obsp),
        uns=dict(old.uns),
    )
    sdata.tables[Keys.STACK_TABLE] = TableModel.parse(new)
