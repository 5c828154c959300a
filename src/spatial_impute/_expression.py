"""Expression values: raw counts and log-normalised values."""

from __future__ import annotations

import numpy as np
from scipy import sparse


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


def require_log_values(values: np.ndarray, *, where: str) -> None:
    """Raise a ``ValueError`` if `values` are raw counts or negative infinities where log values are expected."""
    if looks_like_counts(values):
        found = np.asarray(values)[np.isfinite(values)]
        msg = (
            f"`{where}` must hold log-normalised expression, found raw counts (integers up to {found.max():g}). "
            "Normalise over all genes and take log1p: `si.pp.select_genes(sdata)` does both from the count tables."
        )
        raise ValueError(msg)
