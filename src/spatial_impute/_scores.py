"""Scores of predicted against true expression: pure functions on (spots, genes) arrays."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

INTERVAL_LEVEL = 0.9  # of the intervals that standard deviations stand for
HALF_WIDTH = NormalDist().inv_cdf(0.5 + INTERVAL_LEVEL / 2)  # of such an interval, in standard deviations


def pearson_by_gene(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Pearson correlation across spots, one value per gene.

    A prediction without any variation says nothing about where a gene is high and scores 0. A gene whose truth does
    not vary cannot be scored: NaN.

    Parameters
    ----------
    predicted, true
        (n_spots, n_genes).

    Examples
    --------
    >>> true = np.array([[1.0, 5.0], [2.0, 5.0], [4.0, 5.0]])
    >>> pearson_by_gene(np.array([[1.0, 1.0], [2.0, 2.0], [4.0, 3.0]]), true)
    array([ 1., nan])
    >>> pearson_by_gene(np.ones((3, 2)), true)
    array([ 0., nan])
    """
    p = np.asarray(predicted, dtype=float)
    t = np.asarray(true, dtype=float)
    p_centred, t_centred = p - p.mean(axis=0), t - t.mean(axis=0)
    p_norm, t_norm = np.linalg.norm(p_centred, axis=0), np.linalg.norm(t_centred, axis=0)
    # What centring leaves of a constant is rounding error, proportional to its size.
    p_flat = p_norm <= 1e-6 * np.sqrt(len(p)) * np.abs(p).max(axis=0, initial=0)
    t_flat = t_norm <= 1e-6 * np.sqrt(len(t)) * np.abs(t).max(axis=0, initial=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        r = (p_centred * t_centred).sum(axis=0) / (p_norm * t_norm)
    r[p_flat] = 0.0
    r[t_flat] = np.nan
    return r


def pearson_by_spot(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Pearson correlation across genes, one value per spot. High for any guess of the mean profile."""
    return pearson_by_gene(np.asarray(predicted).T, np.asarray(true).T)


def bootstrap_interval(
    values: np.ndarray, *, level: float = 0.95, n_draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Interval of the mean of values, by drawing them with replacement; NaN are left out.

    Parameters
    ----------
    values
        (n,) one per gene.
    level
        Share of draws within the interval.
    n_draws, seed
        Of the bootstrap.

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
    draws = np.random.default_rng(seed).integers(0, values.size, (n_draws, values.size))
    low, high = np.quantile(values[draws].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def interval_coverage(predicted: np.ndarray, sd: np.ndarray, true: np.ndarray) -> float:
    """Share of the truth within 90 % intervals, 1.645 standard deviations to either side.

    Parameters
    ----------
    predicted, sd, true
        (n_spots, n_genes).

    Examples
    --------
    >>> interval_coverage(np.zeros((2, 2)), np.ones((2, 2)), np.array([[0.0, 1.6], [-1.6, 1.7]]))
    0.75
    """
    return float(np.mean(np.abs(predicted - true) <= HALF_WIDTH * sd))


def predictable_genes(predicted: np.ndarray, true: np.ndarray, folds: np.ndarray) -> np.ndarray:
    r"""Whether a gene is predicted better than by chance within folds.

    Each fold is centred by itself, so that a level which only differs between folds does not count. Of `n` spots in
    `k` folds, a gene without any relation exceeds :math:`2 / \sqrt{n - k}` in two of a hundred cases.

    Parameters
    ----------
    predicted, true
        (n_spots, n_genes) held-out predictions and measurements.
    folds
        (n_spots,) fold of each spot.

    Returns
    -------
    (n_genes,) bool.

    Examples
    --------
    >>> true = np.random.default_rng(0).normal(size=(100, 2))
    >>> predicted = np.column_stack([true[:, 0], np.random.default_rng(1).normal(size=100)])
    >>> predictable_genes(predicted, true, np.arange(100) % 5)
    array([ True, False])
    """
    codes, fold = np.unique(folds, return_inverse=True)
    n_of = np.bincount(fold)[:, None]

    def centred(values: np.ndarray) -> np.ndarray:
        sums = np.zeros((len(codes), values.shape[1]))
        np.add.at(sums, fold, values)
        return values - (sums / n_of)[fold]

    r = np.nan_to_num(pearson_by_gene(centred(predicted), centred(true)))
    return r > 2 / np.sqrt(max(len(folds) - len(codes), 1))


def summarise(predicted: np.ndarray, true: np.ndarray, reference_profile: np.ndarray) -> dict[str, float]:
    """Score one set of spots.

    Parameters
    ----------
    predicted, true
        (n_spots, n_genes) log-normalised expression.
    reference_profile
        (n_genes,) or (n_spots, n_genes) mean of the measured spots, the prediction without any spatial knowledge.

    Returns
    -------
    ``pearson_gene`` and its ``_median``, ``_q1`` and ``_positive`` share; ``pearson_spot``; ``mse``; ``mae``; ``skill``
    = 1 - mse / mse of the reference profile; numbers of spots and of genes that could be scored.
    """
    p, t = np.asarray(predicted, dtype=float), np.asarray(true, dtype=float)
    r = pearson_by_gene(p, t)
    scored = r[np.isfinite(r)]
    by_spot = pearson_by_spot(p, t)
    mse = float(np.mean((p - t) ** 2))
    reference_mse = float(np.mean((reference_profile - t) ** 2))
    nothing = float("nan")
    return {
        "pearson_gene": float(scored.mean()) if scored.size else nothing,
        "pearson_gene_median": float(np.median(scored)) if scored.size else nothing,
        "pearson_gene_q1": float(np.quantile(scored, 0.25)) if scored.size else nothing,
        "pearson_gene_positive": float((scored > 0).mean()) if scored.size else nothing,
        "pearson_spot": float(np.nanmean(by_spot)) if np.isfinite(by_spot).any() else nothing,
        "mse": mse,
        "mae": float(np.mean(np.abs(p - t))),
        "skill": 1 - mse / reference_mse if reference_mse > 0 else nothing,
        "n_spots": len(t),
        "n_genes": int(scored.size),
    }
