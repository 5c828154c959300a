"""Non-negative blend of several predictions by their errors on held-out spots, and the scores of all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spatial_impute._scores import bootstrap_interval, pearson_by_gene, predictable_genes, summarise

if TYPE_CHECKING:
    from collections.abc import Sequence

# From separate weights for each gene (0.01 of the size of its data) to the same weights for all genes.
_STRENGTHS = (0.01, 0.1, 1.0, 10.0, 1e6)
_ROUNDING = 1e-5  # sd of a gene; single precision
_SIGN = 1e-12  # relative size of numbers whose sign is rounding
_CHANCES = 3  # exchanges of all wrong signs that need not lower their number
_MAX_EXCHANGES = 200
_NEGLIGIBLE = 1e-4  # a weight without a visible effect; the method is not run for it


@dataclass(frozen=True)
class KnownTruth:
    """Expression of the known spots, their folds, and their weights."""

    values: np.ndarray  # (n_known, g)
    folds: np.ndarray  # (n_known,)
    weight: np.ndarray  # (n_known,) of each spot
    gated: frozenset[str] = frozenset()  # methods that are used only for genes that they predict better than chance

    def blend(self, held_out: dict[str, np.ndarray], experts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(g, k) weights of the experts, and the blend of their held-out predictions with the weights of other folds."""
        centre, scale = np.empty(self.values.shape), np.empty(self.values.shape)
        for code in np.unique(self.folds):
            own = self.folds == code
            centre[own] = self.values[~own].mean(axis=0)
            scale[own] = np.maximum(self.values[~own].std(axis=0), 1e-3)
        deviations = np.stack([(held_out[name] - centre) / scale for name in experts])
        used = self._used(held_out, experts)
        weights, blended = blend_weights(deviations, (self.values - centre) / scale, self.folds, self.weight, used)
        return weights, centre + blended * scale

    def _used(self, held_out: dict[str, np.ndarray], experts: list[str]) -> np.ndarray:
        """(folds + 1, k, g) genes for which an expert is used: as the other folds say, for each fold; as all say, the last."""
        parts = [*(self.folds != code for code in np.unique(self.folds)), np.ones(len(self.folds), dtype=bool)]
        used = np.ones((len(parts), len(experts), self.values.shape[1]), dtype=bool)
        for k, name in enumerate(experts):
            if name in self.gated:
                used[:, k] = [predictable_genes(held_out[name][p], self.values[p], self.folds[p]) for p in parts]
        return used


def held_out_results(held_out: dict[str, np.ndarray], known: KnownTruth, var_names: Sequence[str]) -> dict[str, Any]:
    """Attributes of a model that come from held-out predictions: scores, and which genes can be predicted."""
    found, truth, folds, names = held_out["asign"], known.values, known.folds, list(var_names)
    return {
        "cross_validation": cross_validation_table(held_out, truth, folds),
        "predictability": pd.Series(pearson_by_gene(found, truth, folds), index=names),
        "predictable": pd.Series(predictable_genes(found, truth, folds), index=names),
    }


def cross_validation_table(held_out: dict[str, np.ndarray], truth: np.ndarray, folds: np.ndarray) -> pd.DataFrame:
    """Scores of every method, and the gain of the blend over it with its 95 % interval over genes."""
    reached = pearson_by_gene(held_out["asign"], truth, folds)
    rows = {}
    for name, predicted in held_out.items():
        rows[name] = summarise(predicted, truth, held_out["mean"], folds)
        gain = reached - np.nan_to_num(pearson_by_gene(predicted, truth, folds))
        gain = gain[np.isfinite(gain)]
        low, high = bootstrap_interval(gain)
        rows[name] |= {"gain": float(gain.mean()) if gain.size else np.nan, "gain_low": low, "gain_high": high}
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
    # A network that returned to the mean differs from it by rounding, which must not get a weight.
    predictions = np.where((np.abs(predictions) < _ROUNDING).all(axis=(1, 2), keepdims=True), 0.0, predictions)
    w = np.ones(len(truth)) if spot_weights is None else spot_weights
    rows = [folds == code for code in np.unique(folds)]
    sums = [_products(predictions[:, own], truth[own], w[own]) for own in rows]
    gram, moment = (np.stack(parts) for parts in zip(*sums, strict=True))  # (fold, g, k, k) and (fold, g, k)

    if used is None:
        used = np.ones((len(rows) + 1, len(predictions), truth.shape[1]), dtype=bool)
    allowed = used.transpose(0, 2, 1)

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
    single = np.eye(len(predictions))
    allowed_alone = range(len(predictions)) if alone is None else alone
    errors = {k: error(np.broadcast_to(single[k], moment.shape)) for k in allowed_alone}
    best = min(errors, key=errors.__getitem__)
    if error(candidates[strength]) >= errors[best]:
        return single[best] * allowed[-1], predictions[best]
    blended = np.empty(truth.shape)
    for own, weights in zip(rows, candidates[strength], strict=True):
        blended[own] = np.einsum("kng,gk->ng", predictions[:, own], weights)
    return solve(gram.sum(axis=0), moment.sum(axis=0), allowed[-1], strength), blended


def _products(predictions: np.ndarray, truth: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted sums over the spots of products of the predictions (g, k, k), and with the truth (g, k)."""
    weighted = predictions.transpose(2, 0, 1) * w  # (g, k, n)
    return weighted @ predictions.transpose(2, 1, 0), (weighted @ truth.T[..., None])[..., 0]


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
    zero = np.ones(moment.shape, dtype=bool)
    solution, gradient = np.zeros(moment.shape), -moment
    fewest, chances = np.full(len(moment), moment.shape[1] + 1), np.full(len(moment), _CHANCES)
    for _ in range(_MAX_EXCHANGES):
        wrong = np.where(zero, gradient, solution) < -_SIGN * np.abs(moment).max(axis=1, keepdims=True)
        n_wrong = wrong.sum(axis=1)
        if not n_wrong.any():
            break
        chances = np.where(n_wrong < fewest, _CHANCES, chances - 1)
        fewest = np.minimum(fewest, n_wrong)
        last = wrong & (np.cumsum(wrong[:, ::-1], axis=1)[:, ::-1] == 1)
        zero ^= np.where((chances < 0)[:, None], last, wrong)
        fixed = zero[:, :, None] | zero[:, None, :]
        solution = np.linalg.solve(np.where(fixed, diagonal, gram), np.where(zero, 0.0, moment)[..., None])[..., 0]
        gradient = (gram @ solution[..., None])[..., 0] - moment
    return np.maximum(solution, 0.0)
