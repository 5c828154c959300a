"""Expression values: raw counts and log-normalised values."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

from spatial_impute._keys import Keys
from spatial_impute._settings import logger

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anndata import AnnData

GENE_COLUMNS = (
    "gene_ids",
    "gene_id",
    "ensembl_id",
    "ensembl",
    "feature_id",
    "feature_ids",
    "gene_ids-0",
    "feature_types",
)
"""Columns of ``var`` that say what a gene is."""
_IDS = GENE_COLUMNS[:-1]
_MITOCHONDRIAL = re.compile(r"mt-", re.IGNORECASE)
_RIBOSOMAL = re.compile(r"rp[sl](a$|p?\d+(?![k\d]))", re.IGNORECASE)
# Of some thousand spots: arrays that stay in the cache, and that the allocator keeps for the next ones.
_GENES_AT_A_TIME = 1024
_LARGEST_LOG = 25.0  # log2 of a million is 20


def gene_blocks(n_genes: int, size: int = _GENES_AT_A_TIME) -> Iterator[slice]:
    """Columns of consecutive genes, for computations on some genes at a time.

    Memory then does not grow with the genes. It also saves time: arrays above 32 MB are given back to the system after each use.
    """
    for start in range(0, n_genes, size):
        yield slice(start, min(start + size, n_genes))


def gene_ids(table: AnnData) -> pd.Index | None:
    """Stable ids of the genes (Ensembl, without version), from ``var`` or the names; None if there are none, or not unique."""
    column = next((column for column in _IDS if column in table.var), None)
    ids = pd.Index(table.var_names if column is None else table.var[column].astype(str))
    ids = ids.str.replace(r"^(ENS\w+)\.\d+$", r"\1", regex=True)
    if column is None and not ids.str.fullmatch(r"ENS[A-Z]*G\d+").all():
        return None
    return ids if ids.is_unique else None


def names_by_id(tables: dict[str, AnnData]) -> dict[str, pd.Index]:
    """Names of the genes of several tables, such that equal names are equal genes.

    Where all tables have stable ids, a gene has the name of the first table that holds it, and genes that share a name
    have their ids as names. Other tables keep their names.
    """
    ids = {key: gene_ids(table) for key, table in tables.items()}
    if len(tables) < 2 or any(found is None for found in ids.values()):
        return {key: table.var_names for key, table in tables.items()}
    names: dict[str, str] = {}
    for key, table in tables.items():
        for gene, name in zip(ids[key], table.var_names, strict=True):  # type: ignore[arg-type]
            names.setdefault(gene, name)
    named = pd.Series(names)
    named[named.duplicated(keep=False)] = named.index[named.duplicated(keep=False)]
    return {key: pd.Index(named[found].to_numpy()) for key, found in ids.items()}


def look_normalized(totals: np.ndarray) -> bool:
    """Return True if totals of raw counts are more alike than chance allows: they were scaled to one total and rounded."""
    return len(totals) >= 10 and float(np.var(totals)) < 0.5 * float(np.mean(totals))


def require_unique_genes(table: AnnData, where: str) -> dict[str, str]:
    """Give genes that share a name their stable id as name; the new names. A number would depend on their order.

    Raises a ``ValueError`` if a gene has no name, or if names are repeated and there are no ids.
    """
    nameless = [not (isinstance(name, str) and name.strip()) for name in table.var_names]
    if any(nameless):
        msg = (
            f"{where}: {sum(nameless)} genes of its table have no name (`var_names` are NaN or empty), the first in column "
            f"{nameless.index(True)}. Name them or take them out."
        )
        raise ValueError(msg)
    repeated = table.var_names.duplicated(keep=False)
    if not repeated.any():
        return {}
    ids = gene_ids(table)
    if ids is None or pd.Index(np.where(repeated, ids, table.var_names)).has_duplicates:
        msg = (
            f"{where}: the gene name {table.var_names[repeated][0]!r} occurs more than once, and `var` has no column of stable "
            f"ids ({list(_IDS[:4])}) to tell the genes apart. Add one, or sum or rename these genes first."
        )
        raise ValueError(msg)
    renamed = dict(zip(ids[repeated], table.var_names[repeated].astype(str), strict=True))
    table.var_names = np.where(repeated, ids, table.var_names)
    return renamed


def marked_genes(genes: list[str]) -> pd.DataFrame:
    """Table of genes that marks those of the mitochondrion and those of proteins of the ribosome.

    Examples
    --------
    >>> marked_genes(["MT-CO1", "mt-Nd1", "MTOR"])["mt"].tolist()
    [True, True, False]
    >>> marked_genes(["RPL13A", "Rps4x", "RPLP0", "RPSA", "RPS6KA1", "MRPL12"])["ribo"].tolist()
    [True, True, True, True, False, False]
    """
    names = pd.Index(genes, dtype=str)
    marks = {Keys.MITOCHONDRIAL: names.str.match(_MITOCHONDRIAL), Keys.RIBOSOMAL: names.str.match(_RIBOSOMAL)}
    return pd.DataFrame(marks, index=names)


def genes_only(table: AnnData, where: str) -> AnnData:
    """Table without antibodies and other features that ``var['feature_types']`` tells from genes: they would count as expression."""
    if "feature_types" not in table.var:
        return table
    kinds = table.var["feature_types"].astype(str)
    others = (kinds != "Gene Expression").to_numpy()
    if others.all() or not others.any():
        return table
    logger.warning("%s: features that are no genes are left out: %s", where, kinds[others].value_counts().to_dict())
    return table[:, ~others].copy()


def log_normalize(counts: np.ndarray | sparse.spmatrix, target_sum: float) -> np.ndarray | sparse.csr_matrix:
    """Log1p of counts per `target_sum`; rows are spots, totals run over all columns. Sparse stays sparse."""
    import scanpy as sc
    from anndata import AnnData

    values = AnnData(
        sparse.csr_matrix(counts, dtype=np.float64) if sparse.issparse(counts) else np.array(counts, float)
    )
    sc.pp.normalize_total(values, target_sum=target_sum)
    sc.pp.log1p(values)
    return values.X


def looks_like_counts(values: np.ndarray) -> bool:
    """Return True for raw counts: non-negative integers, some above 1 (log values are never all integers)."""
    sample = np.asarray(values)
    sample = sample[np.isfinite(sample)]
    if sample.size == 0:
        return False
    return bool((sample >= 0).all() and (sample == np.round(sample)).all() and (sample > 1).any())


def require_amounts(values: np.ndarray, *, where: str) -> None:
    """Raise a ``ValueError`` if `values` are True and False where expression is expected."""
    if np.asarray(values).dtype == bool:
        msg = (
            f"`{where}` holds True and False, which say if a gene was seen and not how often. Give the raw counts; if another "
            "layer holds them, name it with `layer=`."
        )
        raise ValueError(msg)


def require_one_base(tables: dict[str, AnnData]) -> None:
    """Raise a ``ValueError`` if the tables say that their logarithms, in ``X``, have different bases."""
    marks = {name: table.uns["log1p"] for name, table in tables.items() if "log1p" in table.uns}
    bases = {name: float(mark.get("base") or np.e) for name, mark in marks.items()}
    if len({round(base, 3) for base in bases.values()}) > 1:
        msg = (
            f"The logarithms of the sections have different bases by `uns['log1p']` of their tables: {bases}. Give all of them "
            "natural logarithms: multiply those of base b by `np.log(b)`, and remove the mark."
        )
        raise ValueError(msg)


def require_log_values(values: np.ndarray, *, where: str) -> None:
    """Raise a ``ValueError`` if `values` are raw counts or negative infinities where log values are expected."""
    if looks_like_counts(values):
        found = np.asarray(values)[np.isfinite(values)]
        msg = (
            f"`{where}` must hold log-normalised expression, found raw counts (integers up to {found.max():g}). "
            "Normalise over all genes and take log1p: `si.pp.select_genes(sdata)` does both from the count tables."
        )
        raise ValueError(msg)
    warn_of_linear_values(values, where=where)


def warn_of_linear_values(values: np.ndarray, *, where: str) -> None:
    """Warn of values that are too large for logarithms of amounts, such as counts per million."""
    largest = float(np.nanmax(values, initial=0.0, where=np.isfinite(values)))
    if largest > _LARGEST_LOG:
        logger.warning(
            "`%s` holds values up to %.4g; logarithms of counts per million are below %g. Take the logarithm of normalised counts, or "
            "the genes with the largest values decide everything",
            where,
            largest,
            _LARGEST_LOG,
        )
