"""Results of held-out spots: the non-negative blend of several predictions, the scores of all, prediction intervals."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from spatial_impute._expression import gene_blocks
from spatial_impute._scores import (
    HALF_WIDTH,
    INTERVAL_LEVEL,
    bootstrap_interval,
    pearson_by_gene,
    predictable_genes,
    summarise,
)
from spatial_impute.models.asign._cokriging import krige
from spatial_impute.models.asign._predictions import ALL, row_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from spatial_impute.models._spots import Spots

# From separate weights for each gene (0.01 of the size of its data) to the same weights for all genes.
_STRENGTHS = (0.01, 0.1, 1.0, 10.0, 1e6)
_ROUNDING = 1e-5  # sd of a gene; single precision
_SIGN = 1e-12  # relative size of numbers whose sign is rounding
_CHANCES = 3  # exchanges of all wrong signs that need not lower their number
_MAX_EXCHANGES = 200
_MAX_VALUES = 2_000_000  # of all predictions of some genes: 16 MB
_NEGLIGIBLE = 1e-4  # a weight without a visible effect; the method is not run for it


@dataclass(frozen=True)
class KnownTruth:
    """Expression of the known spots, their folds, and their weights."""

    values: np.ndarray  # (n_known, g)
    folds: np.ndarray  # (n_known,)
    weight: np.ndarray  # (n_known,) of each spot
    gated: frozenset[str] = frozenset()  # methods that are used only for genes that they predict better than chance
    rows: np.ndarray | None = None  # of these spots in the tables of held-out predictions; all by default

    def some(self, rows: np.ndarray) -> KnownTruth:
        """Some of the spots, from a (n_known,) mask; tables of predictions are read, and not copied."""
        return KnownTruth(self.values[rows], self.folds[rows], self.weight[rows], self.gated, np.flatnonzero(rows))

    def blend(self, held_out: dict[str, np.ndarray], experts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(g, k) weights of the experts, and the blend of their held-out predictions with the weights of other folds."""
        fold = np.unique(self.folds, return_inverse=True)[1]
        centre, scale = self._without_fold(fold)

        def deviations(genes: slice) -> tuple[np.ndarray, np.ndarray]:
            own_centre, own_scale = centre[:, genes][fold], scale[:, genes][fold]
            predictions = np.stack([(self._own(held_out[name], genes) - own_centre) / own_scale for name in experts])
            return predictions, (self.values[:, genes] - own_centre) / own_scale

        used = self._used(held_out, experts)
        weights, blended = _blend_blocks(deviations, self.folds, self.weight, used, dtype=self.values.dtype)
        for rows in row_blocks(*blended.shape):
            blended[rows] *= scale[fold[rows]]
            blended[rows] += centre[fold[rows]]
        return weights, blended

    def score(self, held_out: np.ndarray, mean: np.ndarray) -> Score:
        """Score of the held-out predictions of a method beside those of the mean profile, (n_known, g) both."""
        r = pearson_by_gene(held_out, self.values, self.folds)
        return Score(r, summarise(held_out, self.values, mean, r=r))

    def _own(self, table: np.ndarray, genes: slice = ALL) -> np.ndarray:
        """Rows of the spots in a table of held-out predictions."""
        return table[:, genes] if self.rows is None else table[:, genes][self.rows]

    def _without_fold(self, fold: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(folds, g) mean and standard deviation of the spots that are not in a fold."""
        centre, scale = np.empty((2, fold.max() + 1, self.values.shape[1]))
        for genes in gene_blocks(self.values.shape[1]):
            values = self.values[:, genes].astype(float)
            for k in range(len(centre)):
                centre[k, genes], scale[k, genes] = values[fold != k].mean(axis=0), values[fold != k].std(axis=0)
        return centre, np.maximum(scale, 1e-3)

    def _used(self, held_out: dict[str, np.ndarray], experts: list[str]) -> np.ndarray:
        """(folds + 1, k, g) genes for which an expert is used: as the other folds say, for each fold; as all say, the last."""
        parts = [*(self.folds != code for code in np.unique(self.folds)), np.ones(len(self.folds), dtype=bool)]
        used = np.ones((len(parts), len(experts), self.values.shape[1]), dtype=bool)
        for k, name in enumerate(experts):
            if name in self.gated:
                found = self._own(held_out[name])
                used[:, k] = [predictable_genes(found[p], self.values[p], self.folds[p]) for p in parts]
        return used


class Score(NamedTuple):
    """Scores of held-out predictions, kept where the predictions of all genes would take too much memory."""

    r: np.ndarray  # (g,)
    summary: dict[str, float]


def held_out_results(
    scores: dict[str, Score], asign: np.ndarray, known: KnownTruth, var_names: Sequence[str]
) -> dict[str, Any]:
    """Attributes of a model that come from held-out predictions: scores, and which genes can be predicted."""
    names = list(var_names)
    return {
        "cross_validation": _cross_validation_table(scores),
        "predictability": pd.Series(scores["asign"].r, index=names),
        "predictable": pd.Series(predictable_genes(asign, known.values, known.folds), index=names),
    }


def _cross_validation_table(scores: dict[str, Score]) -> pd.DataFrame:
    """Scores of every method, and the gain of the blend over it with its 95 % interval over genes."""
    rows = {}
    for name, score in scores.items():
        gain = scores["asign"].r - np.nan_to_num(score.r)
        gain = gain[np.isfinite(gain)]
        low, high = bootstrap_interval(gain)
        mean = float(gain.mean()) if gain.size else np.nan
        rows[name] = score.summary | {"gain": mean, "gain_low": low, "gain_high": high}
    return pd.DataFrame(rows).T.rename_axis("method")


def blend_weights(
    predictions: np.ndarray,
    truth: np.ndarray,
    folds: np.ndarray,
    spot_weights: np.ndarray | None = None,
    used: np.ndarray | None = None,
    *,
    alone: Sequence[int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Non-negative weights of several predictions for every gene, (g, k), and the blend with weights of the other folds.

    The weights of each gene are shrunk to weights common to all genes. The strength is the best one for held-out folds.
    If a single prediction is better than the best blend there, it is used alone. The sum of weights need not be one: a sum
    below one shrinks to the mean.

    `predictions` (k, n, g) and `truth` (n, g) are deviations from the mean profile, in units comparable between genes.
    `folds` and `spot_weights` (n,) are the fold of each spot and the weight of its squared error. `used` (folds + 1, k, g)
    is False where a prediction gets no weight: in each fold, and in the weights from all folds. `alone` are the positions
    of the predictions that may be used alone; all by default.
    """
    w = np.ones(len(truth)) if spot_weights is None else spot_weights
    if used is None:
        used = np.ones((len(np.unique(folds)) + 1, len(predictions), truth.shape[1]), dtype=bool)
    return _blend_blocks(
        lambda genes: (predictions[:, :, genes], truth[:, genes]), folds, w, used, dtype=truth.dtype, alone=alone
    )


def _blend_blocks(
    read: Callable[[slice], tuple[np.ndarray, np.ndarray]],
    folds: np.ndarray,
    spot_weights: np.ndarray,
    used: np.ndarray,
    *,
    dtype: np.dtype,
    alone: Sequence[int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Weights and blend, see :func:`blend_weights`; the blend has the type `dtype`.

    `read` gives the predictions (k, n, b) and the truth (n, b) of some genes: all of them together take gigabytes.
    """
    _, k, n_genes = used.shape
    blocks = list(gene_blocks(n_genes, max(1, _MAX_VALUES // (k * len(folds)))))
    rows = [folds == code for code in np.unique(folds)]
    gram, moment, largest = np.empty((len(rows), n_genes, k, k)), np.empty((len(rows), n_genes, k)), np.zeros(k)
    for genes in blocks:
        predictions, truth = read(genes)
        largest = np.maximum(largest, np.abs(predictions).max(axis=(1, 2)))
        for f, own in enumerate(rows):
            gram[f, genes], moment[f, genes] = _products(predictions[:, own], truth[own], spot_weights[own])
    # A prediction that differs from the mean by rounding, such as a network that returned to it, counts as the mean:
    # rounding must get neither a weight nor a correlation.
    rounding = largest < _ROUNDING
    moment[..., rounding] = 0.0
    gram[..., rounding], gram[..., rounding, :] = 0.0, 0.0
    of_folds, weights = _choose_weights(gram, moment, used.transpose(0, 2, 1), alone)
    blended = np.empty((len(folds), n_genes), dtype)
    for genes in blocks:
        predictions, _ = read(genes)
        for own, part in zip(rows, of_folds[:, genes], strict=True):
            blended[own, genes] = np.einsum("kng,gk->ng", predictions[:, own], part * ~rounding)
    return weights, blended


def _choose_weights(
    gram: np.ndarray, moment: np.ndarray, allowed: np.ndarray, alone: Sequence[int] | None
) -> tuple[np.ndarray, np.ndarray]:
    """(folds, g, k) weights without each fold, and (g, k) weights from all folds, from their sums of products."""

    def solve(gram: np.ndarray, moment: np.ndarray, own: np.ndarray, strength: float) -> np.ndarray:
        return _gene_weights(gram * own[:, :, None] * own[:, None], moment * own, strength) * own

    def without_fold(strength: float) -> np.ndarray:
        """(fold, g, k) weights from all other folds."""
        others = zip(gram.sum(axis=0) - gram, moment.sum(axis=0) - moment, allowed[:-1], strict=True)
        return np.stack([solve(*products, strength) for products in others])

    def error(weights: np.ndarray) -> float:
        """Squared error, less that of the mean, which is the same for all weights."""
        return float(np.einsum("fgk,fgkl,fgl", weights, gram, weights, optimize=True) - 2 * np.sum(weights * moment))

    candidates = {strength: without_fold(strength) for strength in _STRENGTHS}
    strength = min(candidates, key=lambda s: error(candidates[s]))
    single = np.eye(moment.shape[2])
    allowed_alone = range(len(single)) if alone is None else alone
    errors = {k: error(np.broadcast_to(single[k], moment.shape)) for k in allowed_alone}
    best = min(errors, key=errors.__getitem__)
    if error(candidates[strength]) >= errors[best]:
        return np.broadcast_to(single[best], moment.shape), single[best] * allowed[-1]
    return candidates[strength], solve(gram.sum(axis=0), moment.sum(axis=0), allowed[-1], strength)


def _products(predictions: np.ndarray, truth: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted sums over the spots of products of the predictions (g, k, k), and with the truth (g, k)."""
    by_gene = np.ascontiguousarray(predictions.transpose(2, 0, 1))  # (g, k, n)
    weighted = by_gene * w
    return weighted @ by_gene.transpose(0, 2, 1), (weighted @ np.ascontiguousarray(truth.T)[..., None])[..., 0]


def _gene_weights(gram: np.ndarray, moment: np.ndarray, strength: float) -> np.ndarray:
    """(g, k) weights from the sums of products of each gene, shrunk to the weights for all genes together."""
    common = _solve_nonnegative(gram.sum(axis=0)[None], moment.sum(axis=0)[None])
    k = gram.shape[1]
    ridge = strength * np.trace(gram.mean(axis=0)) / k
    found = _solve_nonnegative(gram + ridge * np.eye(k), moment + ridge * common)
    return np.where(found > _NEGLIGIBLE, found, 0.0)


def _solve_nonnegative(gram: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """(g, k) solutions of non-negative least squares from (g, k, k) and (g, k) sums of products.

    Block principal pivoting :cite:p:`Kim2011`, for all genes at once: which unknowns are zero is corrected until solution
    and gradient have the right sign. If a step does not lower the number of wrong signs for some time, one of them at a time
    is corrected, which always ends.
    """
    size = np.trace(gram, axis1=1, axis2=2)[:, None, None]
    diagonal = np.eye(gram.shape[1], dtype=bool)
    # A small ridge, because the matrix is singular if two predictions are equal.
    gram = gram + np.where(size > 0, 1e-10 * size, 1.0) * diagonal
    least = -_SIGN * np.abs(moment).max(axis=1, keepdims=True)
    zero = np.ones(moment.shape, dtype=bool)
    solution, gradient = np.zeros(moment.shape), -moment
    fewest, chances = np.full(len(moment), moment.shape[1] + 1), np.full(len(moment), _CHANCES)
    left = np.arange(len(moment))  # genes with a wrong sign
    for _ in range(_MAX_EXCHANGES):
        wrong = np.where(zero[left], gradient[left], solution[left]) < least[left]
        n_wrong = wrong.sum(axis=1)
        left, wrong, n_wrong = left[n_wrong > 0], wrong[n_wrong > 0], n_wrong[n_wrong > 0]
        if not len(left):
            break
        chances[left] = np.where(n_wrong < fewest[left], _CHANCES, chances[left] - 1)
        fewest[left] = np.minimum(fewest[left], n_wrong)
        last = wrong & (np.cumsum(wrong[:, ::-1], axis=1)[:, ::-1] == 1)
        zero[left] ^= np.where((chances[left] < 0)[:, None], last, wrong)
        own, own_gram, own_moment = zero[left], gram[left], moment[left]
        fixed = own[:, :, None] | own[:, None, :]
        found = np.linalg.solve(np.where(fixed, diagonal, own_gram), np.where(own, 0.0, own_moment)[..., None])
        solution[left], gradient[left] = found[..., 0], (own_gram @ found)[..., 0] - own_moment
    return np.maximum(solution, 0.0)


def held_out_spread(residuals: np.ndarray, n_blocks: int) -> np.ndarray:
    """(g,) standard deviation of each gene with which 90 % intervals cover 90 % of new spots.

    Counts are not normally distributed, so the standard deviation is set by the coverage of the interval. `residuals` (n, g)
    are those of held-out spots. Errors of neighboring spots are correlated, so the sample size is the number of blocks.

    Examples
    --------
    >>> spread = held_out_spread(np.random.default_rng(0).normal(size=(10_000, 1)), n_blocks=10_000)
    >>> round(float(spread[0]), 1)
    1.0
    """
    # A new block is one more: of n held-out blocks, the interval must cover 0.9 (n + 1).
    level = min(1.0, INTERVAL_LEVEL * (n_blocks + 1) / n_blocks)
    blocks = gene_blocks(residuals.shape[1])
    return np.concatenate([np.quantile(np.abs(residuals[:, genes].T), level, axis=1) for genes in blocks]) / HALF_WIDTH


def expected_noise(spots: Spots) -> np.ndarray:
    """(n,) expected counting noise of each spot, 1 / counts, by co-kriging of the known spots.

    Depth depends on the tissue and on the image. NaN if the counts of the known spots are not known.
    """
    if spots.total_counts is None or not spots.known.any():
        return np.full(len(spots.known), np.nan)
    log_noise = -np.log(spots.total_counts)[:, None]
    return np.exp(krige(replace(spots, expression=log_noise, total_counts=None)).expression()[:, 0])


def noise_elsewhere(spots: Spots, noise: np.ndarray, usual: float) -> np.ndarray:
    """(n,) expected counting noise if only one section shows how depth varies.

    On the measured section, held-out blocks show how well depth is predicted. On another section depth may depend on
    place and image in the same way, or on the processing of that section, in which case the usual noise is expected. One
    section cannot distinguish these cases, so the variance is the mean of both.
    """
    measured = np.isin(spots.section, np.unique(spots.section[spots.known]))
    return np.where(measured, noise, (noise + usual) / 2)


def held_out_noise(spots: Spots, folds: list[np.ndarray]) -> np.ndarray:
    """(n_known,) :func:`expected_noise` of each known spot while its fold is hidden."""
    noise = np.full(len(spots.known), np.nan)
    for fold in folds:
        noise[fold] = expected_noise(spots.hide(fold))[fold]
    return noise[spots.known]


def spot_scale(noise: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """(n,) standard deviation of the error of each spot, relative to the usual one, from its expected counting noise.

    `parts` are the usual counting noise, the constant part of the variance, and the part proportional to the noise.
    """
    usual, constant, slope = parts
    return np.sqrt(constant + slope * relative_noise(noise, usual))


def relative_noise(noise: np.ndarray, usual: float) -> np.ndarray:
    """Counting noise in units of the usual one; 1 where one of them is not known."""
    relative = noise / usual
    return np.where(np.isfinite(relative), relative, 1.0)


def spread_by_support(
    support: np.ndarray, usual_support: float, spread: np.ndarray, spread_of_mean: np.ndarray
) -> np.ndarray:
    """(n, g) standard deviation of the error: that of the model for the usual support, that of the mean profile for none.

    `spread` and `spread_of_mean` (g,) are those of the model and of the mean profile on held-out spots.
    """
    share = np.clip(support / max(usual_support, 1e-12), 0.0, 1.0)[:, None]
    worst = np.maximum(spread, spread_of_mean) ** 2
    variance = (1 - share) * (worst - spread**2)
    variance += spread**2
    return np.sqrt(variance, out=variance)
