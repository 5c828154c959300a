"""Blend several predictions by how well they do on held-out spots (stacking)."""

from __future__ import annotations

import numpy as np
from scipy.linalg import cholesky, solve_triangular
from scipy.optimize import nnls

# From weights of every gene's own (0.01 of the size of its data) to the same weights for all genes.
_STRENGTHS = (0.01, 0.1, 1.0, 10.0, 1e6)


_NEGLIGIBLE = 1e-4  # a weight that changes nothing to be seen; the method need not be run for it


def blend_weights(
    predictions: np.ndarray, truth: np.ndarray, folds: np.ndarray, spot_weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Non-negative weights of several predictions for every gene.

    The weights of a gene are drawn to weights common to all genes, as strongly as is best for folds that had no part
    in them. If even the best blend is worse there than a single prediction, that one is taken alone.

    Parameters
    ----------
    predictions
        (k, n, g) held-out predictions as deviations from the mean profile, in units comparable between genes.
    truth
        (n, g) in the same units.
    folds
        (n,) fold of each spot.
    spot_weights
        (n,) weight of the squared error of each spot; 1 by default.

    Returns
    -------
    weights
        (g, k). They need not add up to one: less than one leans to the mean.
    held_out
        (n, g) the blend of each spot with weights from the other folds.
    """
    codes = np.unique(folds)
    w = np.ones(len(truth)) if spot_weights is None else spot_weights
    # Sums of products suffice: (fold, g, k, k) and (fold, g, k).
    gram = np.stack(
        [
            np.einsum("n,kng,lng->gkl", w[folds == c], p, p, optimize=True)
            for c, p in ((c, predictions[:, folds == c]) for c in codes)
        ]
    )
    moment = np.stack(
        [
            np.einsum("n,kng,ng->gk", w[folds == c], predictions[:, folds == c], truth[folds == c], optimize=True)
            for c in codes
        ]
    )

    def error(predicted: np.ndarray) -> float:
        return float(np.mean(w[:, None] * (predicted - truth) ** 2))

    candidates = {}
    for strength in _STRENGTHS:
        blended = np.empty(truth.shape)
        for i, code in enumerate(codes):
            weights = _weights(gram.sum(axis=0) - gram[i], moment.sum(axis=0) - moment[i], strength)
            blended[folds == code] = np.einsum("kng,gk->ng", predictions[:, folds == code], weights)
        candidates[strength] = blended
    strength = min(candidates, key=lambda s: error(candidates[s]))
    best = int(np.argmin([error(p) for p in predictions]))
    if error(candidates[strength]) >= error(predictions[best]):
        return np.tile(np.eye(len(predictions))[best], (truth.shape[1], 1)), predictions[best]
    return _weights(gram.sum(axis=0), moment.sum(axis=0), strength), candidates[strength]


def _weights(gram: np.ndarray, moment: np.ndarray, strength: float) -> np.ndarray:
    """(g, k) weights from the sums of products of each gene, drawn to the weights that suit all genes together."""
    common = _solve(gram.sum(axis=0), moment.sum(axis=0))
    k = gram.shape[1]
    ridge = strength * np.trace(gram.mean(axis=0)) / k
    found = np.stack([_solve(g + ridge * np.eye(k), m + ridge * common) for g, m in zip(gram, moment, strict=True)])
    return np.where(found > _NEGLIGIBLE, found, 0.0)


def _solve(gram: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """Non-negative least squares from sums of products."""
    size = np.trace(gram)
    if size <= 0:
        return np.zeros(len(moment))
    # A touch of ridge keeps the factor well defined where two predictions are the same.
    factor = cholesky(gram + 1e-10 * size * np.eye(len(gram)), lower=False)
    return nnls(factor, solve_triangular(factor, moment, trans="T"))[0]
