"""Ranks of genes by their mean, their spatial pattern or their variability on the measured sections."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spatial_impute._scores import morans_i, nearest_graph
from spatial_impute._settings import logger

if TYPE_CHECKING:
    from collections.abc import Callable

_MITOCHONDRIAL = re.compile(r"mt-", re.IGNORECASE)
# Proteins of the ribosome (RPL13A, RPS4X, RPLP0, RPSA), not the kinases of its proteins (RPS6KA1).
_RIBOSOMAL = re.compile(r"rp[sl](a$|p?\d+(?![k\d]))", re.IGNORECASE)
_N_NAMED = 5


def _mean(values: Any, _xy: np.ndarray) -> np.ndarray:
    return np.asarray(values.mean(axis=0)).ravel()


def _moran(values: Any, xy: np.ndarray) -> np.ndarray:
    """Moran's I on the nearest neighbors, as ``squidpy.gr.spatial_autocorr`` ranks genes."""
    return morans_i(nearest_graph(xy), values)


def _dispersion(values: Any, _xy: np.ndarray) -> np.ndarray:
    """Variability compared with genes of the same mean, as ``scanpy.pp.highly_variable_genes`` ranks genes."""
    import scanpy as sc
    from anndata import AnnData

    found = sc.pp.highly_variable_genes(AnnData(values), flavor="seurat", inplace=False)
    return np.nan_to_num(found["dispersions_norm"].to_numpy(dtype=float), nan=-np.inf)


FLAVORS: dict[str, Callable[[Any, np.ndarray], np.ndarray]] = {"mean": _mean, "svg": _moran, "hvg": _dispersion}
"""Functions of (n, g) log-normalised values and (n, 2) positions in the section to (g,) scores."""


def rank_genes(
    values: dict[str, Any], xy: dict[str, np.ndarray], var_names: dict[str, pd.Index], *, flavor: str, join: str
) -> list[str]:
    """Names of the genes, best first: mean score over the sections that have them; the first in the table if equal."""
    counted = pd.Index([]).append([pd.Index(names).unique() for names in var_names.values()]).value_counts(sort=False)
    candidates = counted.index[counted >= (len(var_names) if join == "inner" else 1)]
    if not len(candidates):
        named = {name: list(names[:2]) for name, names in var_names.items()}
        msg = (
            f"The measured sections have no gene in common; they name them like {named}. Rename those of one section "
            "in `sdata.tables`, e.g. from symbols to Ensembl ids."
        )
        raise ValueError(msg)
    scores = np.full((len(values), len(candidates)), np.nan)
    for k, (name, matrix) in enumerate(values.items()):
        columns = var_names[name].get_indexer(candidates)
        scores[k, columns >= 0] = FLAVORS[flavor](matrix, xy[name])[columns[columns >= 0]]
    return list(candidates[np.argsort(-np.nanmean(scores, axis=0), kind="stable")])


def is_mitochondrial(genes: list[str]) -> np.ndarray:
    """(g,) bool: names of genes of the mitochondrion (``MT-CO1``).

    Examples
    --------
    >>> is_mitochondrial(["MT-CO1", "mt-Nd1", "MTOR"])
    array([ True,  True, False])
    """
    return np.array([_MITOCHONDRIAL.match(gene) is not None for gene in genes], dtype=bool)


def is_ribosomal(genes: list[str]) -> np.ndarray:
    """(g,) bool: names of genes of proteins of the ribosome (``RPL13A``).

    Examples
    --------
    >>> is_ribosomal(["RPL13A", "Rps4x", "RPLP0", "RPSA", "RPS6KA1", "MRPL12"])
    array([ True,  True,  True,  True, False, False])
    """
    return np.array([_RIBOSOMAL.match(gene) is not None for gene in genes], dtype=bool)


def name_housekeeping(genes: list[str]) -> None:
    """Log how many of the chosen genes are mitochondrial or ribosomal, and how to leave them out."""
    found = np.array(genes, dtype=object)[is_mitochondrial(genes) | is_ribosomal(genes)]
    if len(found):
        logger.info(
            "%d of the %d chosen genes are mitochondrial or ribosomal (%s); `var['mt']` and `var['ribo']` mark them, and "
            "`genes=` chooses others",
            len(found),
            len(genes),
            ", ".join(found[:_N_NAMED]) + (", ..." if len(found) > _N_NAMED else ""),
        )
