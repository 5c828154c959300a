"""Scores of predicted against true expression: pure functions on (spots, genes) arrays."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np
from scipy import ndimage as ndi
from scipy import sparse
from scipy.spatial import cKDTree

from spatial_impute._expression import gene_blocks, log_normalize
from spatial_impute._graph import nearest_others

INTERVAL_LEVEL = 0.9  # of the intervals that standard deviations stand for
HALF_WIDTH = NormalDist().inv_cdf(0.5 + INTERVAL_LEVEL / 2)  # of such an interval, in standard deviations
_N_DRAWS, _INSIDE = 1000, [(1 - 0.95) / 2, (1 + 0.95) / 2]  # of the bootstrap
_N_NEIGHS = 6  # of a hexagonal lattice
_GENES_AT_A_TIME = 512
_MAX_VALUES = 1_000_000  # scored at a time: arrays of 8 MB
_WINDOW = 7  # grid cells along a window of SSIM, its usual size


def pearson_by_gene(predicted: np.ndarray, true: np.ndarray, folds: np.ndarray | None = None) -> np.ndarray:
    """Pearson correlation across spots, one value per gene, of (n_spots, n_genes) arrays.

    A constant prediction scores 0. A gene with a constant truth cannot be scored: NaN. Predictions of different (n_spots,)
    folds come from different training spots: both arrays are then centred within each fold, so that only differences
    within folds count.

    Examples
    --------
    >>> true = np.array([[1.0, 5.0], [2.0, 5.0], [4.0, 5.0]])
    >>> pearson_by_gene(np.array([[1.0, 1.0], [2.0, 2.0], [4.0, 3.0]]), true)
    array([ 1., nan])
    >>> pearson_by_gene(np.ones((3, 2)), true)
    array([ 0., nan])
    """
    p, t = np.asarray(predicted), np.asarray(true)
    blocks = gene_blocks(p.shape[1], max(1, _MAX_VALUES // max(len(p), 1)))
    return np.concatenate([_pearson(p[:, genes], t[:, genes], folds) for genes in blocks] or [np.empty(0)])


def _pearson(predicted: np.ndarray, true: np.ndarray, folds: np.ndarray | None) -> np.ndarray:
    """:func:`pearson_by_gene` of some genes."""
    p, t = predicted.astype(float), true.astype(float)
    p_centred, t_centred = _centred(p, folds), _centred(t, folds)
    p_norm, t_norm = np.linalg.norm(p_centred, axis=0), np.linalg.norm(t_centred, axis=0)
    # Centring a constant gives a rounding error that is proportional to its size.
    p_flat = p_norm <= 1e-6 * np.sqrt(len(p)) * np.abs(p).max(axis=0, initial=0)
    t_flat = t_norm <= 1e-6 * np.sqrt(len(t)) * np.abs(t).max(axis=0, initial=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        r = (p_centred * t_centred).sum(axis=0) / (p_norm * t_norm)
    r[p_flat] = 0.0
    r[t_flat] = np.nan
    return r


def _centred(values: np.ndarray, folds: np.ndarray | None) -> np.ndarray:
    """Values minus their mean, of each fold if there are any."""
    if folds is None:
        return values - values.mean(axis=0)
    codes, fold = np.unique(folds, return_inverse=True)
    return values - np.stack([values[fold == k].mean(axis=0) for k in range(len(codes))])[fold]


def pearson_by_spot(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Pearson correlation across genes, one value per spot. The mean profile alone already scores high."""
    return pearson_by_gene(np.asarray(predicted).T, np.asarray(true).T)


def bootstrap_interval(values: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of (n,) values. NaN are ignored.

    Examples
    --------
    >>> low, high = bootstrap_interval(np.arange(100.0))
    >>> bool(low < 49.5 < high)
    True
    """
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values)]
    if not values.size:
        return float("nan"), float("nan")
    rng, size = np.random.default_rng(seed), values.size
    means = [values[rng.integers(0, size, size)].mean() for _ in range(_N_DRAWS)]
    low, high = np.quantile(means, _INSIDE)
    return float(low), float(high)


def interval_coverage(predicted: np.ndarray, sd: np.ndarray, true: np.ndarray) -> float:
    """Share of the truth inside 90 % intervals: 1.645 standard deviations to either side of the prediction.

    Examples
    --------
    >>> interval_coverage(np.zeros((2, 2)), np.ones((2, 2)), np.array([[0.0, 1.6], [-1.6, 1.7]]))
    0.75
    """
    return float(np.mean(np.abs(predicted - true) <= HALF_WIDTH * sd))


def noise_ceiling(counts: Any, columns: np.ndarray, *, target_sum: float, n_draws: int = 10) -> np.ndarray:
    r"""Highest correlation of each gene that any prediction can expect to have with a measurement of these counts.

    Each count is split at random into two halves, as if the spots had been measured twice at half the depth. From the
    correlation `r` of the log-normalised halves follows the reliability of the whole, :math:`2r / (1 + r)`
    (Spearman-Brown). The correlation of the noiseless expression with the measurement is its square root.

    `counts` are (n_spots, n_all_genes), totals run over all columns; `columns` are those of the genes. The mean `r` of
    `n_draws` splits is used. The result is (n_genes,) in 0-1, NaN for genes that do not vary in a half.
    """
    rng, found = np.random.default_rng(0), []
    whole = np.asarray(counts.toarray() if sparse.issparse(counts) else counts).astype(np.int64)
    for _ in range(n_draws):
        half = rng.binomial(whole, 0.5)
        first, second = (log_normalize(part, target_sum)[:, columns] for part in (half, whole - half))
        found.append(np.where(np.ptp(first, axis=0) > 0, pearson_by_gene(first, second), np.nan))
    r = np.clip(np.mean(found, axis=0), 0.0, 1.0)
    return np.sqrt(2 * r / (1 + r))


def predictable_genes(predicted: np.ndarray, true: np.ndarray, folds: np.ndarray) -> np.ndarray:
    r"""(n_genes,) bool: genes whose held-out prediction is better than chance within the (n_spots,) folds.

    Each fold is centred separately, so that a difference between folds does not count. With `n` spots in `k` folds, the
    correlation with unrelated values has a standard deviation of :math:`1 / \sqrt{n - k}`. Spots on both sides of a border
    between folds predict each other, which raises the variance to at most twice this value. A gene must exceed two standard
    deviations of this largest variance: genes of noise do so in about two of a hundred cases.

    Examples
    --------
    >>> true = np.random.default_rng(0).normal(size=(100, 2))
    >>> predicted = np.column_stack([true[:, 0], np.random.default_rng(1).normal(size=100)])
    >>> predictable_genes(predicted, true, np.arange(100) % 5)
    array([ True, False])
    """
    r = np.nan_to_num(pearson_by_gene(predicted, true, folds))
    return r > 2 * np.sqrt(2 / max(len(folds) - len(np.unique(folds)), 1))


def summarise(
    predicted: np.ndarray,
    true: np.ndarray,
    reference_profile: np.ndarray,
    folds: np.ndarray | None = None,
    *,
    r: np.ndarray | None = None,
) -> dict[str, float]:
    """Scores of predicted against true (n_spots, n_genes) expression; see :func:`spatial_impute.metrics.evaluate`.

    `reference_profile`, (n_genes,) or (n_spots, n_genes), is the mean of the measured spots: the prediction without spatial
    information. `folds` (n_spots,) are as in :func:`pearson_by_gene`, whose result can be given as `r`.
    """
    p, t = np.asarray(predicted), np.asarray(true)
    r = pearson_by_gene(p, t, folds) if r is None else r
    scored = r[np.isfinite(r)]
    by_spot = pearson_by_spot(p, t)
    mse, mae = _mean_errors(p, t)
    reference_mse, _ = _mean_errors(np.broadcast_to(reference_profile, t.shape), t)
    nan = float("nan")
    return {
        "pearson_gene": float(scored.mean()) if scored.size else nan,
        "pearson_gene_median": float(np.median(scored)) if scored.size else nan,
        "pearson_gene_q1": float(np.quantile(scored, 0.25)) if scored.size else nan,
        "pearson_gene_positive": float((scored > 0).mean()) if scored.size else nan,
        "pearson_spot": float(np.nanmean(by_spot)) if np.isfinite(by_spot).any() else nan,
        "mse": mse,
        "mae": mae,
        "skill": 1 - mse / reference_mse if reference_mse > 0 else nan,
        "n_spots": len(t),
        "n_genes": int(scored.size),
    }


def _mean_errors(predicted: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """Mean squared and mean absolute error."""
    squared, absolute = 0.0, 0.0
    for genes in gene_blocks(true.shape[1], max(1, _MAX_VALUES // max(len(true), 1))):
        error = np.subtract(predicted[:, genes], true[:, genes], dtype=float)
        squared += float(np.vdot(error, error))
        absolute += float(np.abs(error).sum())
    n = true.size or np.nan
    return squared / n, absolute / n


def moran_gap(predicted: np.ndarray, true: np.ndarray, xy: np.ndarray) -> float:
    """Moran's I of the prediction minus that of the truth, mean over the genes that vary.

    A measurement has noise and a prediction has none, so a small gap above 0 is normal. Below 0 the prediction is rougher
    than the tissue. `xy` are the (n, 2) positions of the spots, um.

    Examples
    --------
    >>> x, y = np.meshgrid(np.arange(8.0), np.arange(8.0))
    >>> xy = np.column_stack([x.ravel(), y.ravel()])
    >>> noise = np.random.default_rng(0).normal(size=(64, 1))
    >>> moran_gap(xy[:, :1], noise, xy) > 0.5
    True
    """
    varies = np.ptp(true, axis=0) > 0
    if len(xy) < 2 or not varies.any():
        return float("nan")
    graph = nearest_graph(xy)
    return float(np.mean(morans_i(graph, predicted[:, varies]) - morans_i(graph, true[:, varies])))


def nearest_graph(xy: np.ndarray) -> sparse.csr_matrix:
    """(n, n) links from each of (n, 2) positions to its six nearest."""
    found = nearest_others(cKDTree(xy), _N_NEIGHS)
    n, k = found.shape
    return sparse.csr_matrix((np.ones(n * k), (np.repeat(np.arange(n), k), found.ravel())), shape=(n, n))


def morans_i(graph: sparse.csr_matrix, values: Any) -> np.ndarray:
    """(g,) Moran's I of (n, g) dense or sparse values on a graph; 0 for constant genes."""
    import scanpy as sc

    n, n_genes = values.shape
    result = np.zeros(n_genes)
    if n < 2:
        return result
    low, high = (
        np.asarray(end.toarray() if sparse.issparse(end) else end).ravel() for end in (values.min(0), values.max(0))
    )
    moves = high > low
    if moves.any():
        by_gene = values[:, moves].T.astype(float)
        by_gene = by_gene.tocsr() if sparse.issparse(by_gene) else np.ascontiguousarray(by_gene)
        result[moves] = sc.metrics.morans_i(graph, by_gene)
    return result


def structural_similarity(predicted: np.ndarray, true: np.ndarray, xy: np.ndarray) -> float:
    """Structural similarity (SSIM, up to 1) of prediction and truth on a grid, mean over the genes that vary.

    Each spot goes into a cell of a square grid whose cell size is the spot spacing. Empty cells get the mean of the gene
    and are not scored. Values are scaled to the range of the true gene. NaN for grids below 7 x 7 cells.
    """
    varies = np.ptp(true, axis=0) > 0
    if len(xy) < 2 or not varies.any():
        return float("nan")
    spacing = np.median(cKDTree(xy).query(xy, k=2)[0][:, 1])
    cell = np.floor((xy - xy.min(axis=0)) / max(spacing, 1e-12)).astype(int)
    shape = tuple(cell.max(axis=0) + 1)
    if min(shape) < _WINDOW or np.prod(shape, dtype=float) > 100 * len(xy):
        return float("nan")
    count = np.zeros((*shape, 1))
    np.add.at(count, tuple(cell.T), 1.0)
    found = []
    for genes in np.array_split(np.flatnonzero(varies), -(-varies.sum() // _GENES_AT_A_TIME)):
        low, high = true[:, genes].min(axis=0), true[:, genes].max(axis=0)
        scaled = [(values[:, genes] - low) / (high - low) for values in (predicted, true)]
        grids = []
        for values in scaled:
            total = np.zeros((*shape, len(genes)))
            np.add.at(total, tuple(cell.T), values)
            grids.append(np.where(count > 0, total / np.maximum(count, 1), scaled[1].mean(axis=0)))
        found.append(_local_similarity(*grids)[count[..., 0] > 0].mean(axis=0))
    return float(np.concatenate(found).mean())


def _local_similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(y, x, g) SSIM around each cell, for values in 0-1.

    ``skimage.metrics.structural_similarity`` has the same values; it takes the genes one by one, and several times as long.
    """

    def mean(values: np.ndarray) -> np.ndarray:
        return ndi.uniform_filter(values, (_WINDOW, _WINDOW, 1))

    unbiased = _WINDOW**2 / (_WINDOW**2 - 1)
    mean_a, mean_b = mean(a), mean(b)
    variances = unbiased * (mean(a * a) - mean_a**2 + mean(b * b) - mean_b**2)
    covariance = unbiased * (mean(a * b) - mean_a * mean_b)
    small_mean, small_variance = 0.01**2, 0.03**2  # the constants of SSIM
    likeness = (2 * mean_a * mean_b + small_mean) * (2 * covariance + small_variance)
    return likeness / ((mean_a**2 + mean_b**2 + small_mean) * (variances + small_variance))
