"""Blend several predictions by how well they do on held-out spots (stacking)."""

from __future__ import annotations

import numpy as np
from scipy.optimize import nnls


def blend_weights(
    predictions: np.ndarray, truth: np.ndarray, group: np.ndarray, folds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Non-negative weights of several predictions per group of genes.

    A group takes its blend only if it is better than the single best prediction on folds that had no part in choosing
    the weights; otherwise it takes that one alone.

    Parameters
    ----------
    predictions
        (k, n, g) held-out predictions as deviations from the mean profile, in comparable units for all genes.
    truth
        (n, g) in the same units.
    group
        (g,) group of each gene.
    folds
        (n,) fold of each spot.

    Returns
    -------
    weights
        (n_groups, k). They need not add up to one: less than one leans to the mean.
    held_out
        (n, g) the blend of each spot with weights from the other folds.
    """
    n_groups = int(group.max()) + 1
    weights = np.zeros((n_groups, len(predictions)))
    held_out = np.zeros(truth.shape)
    for g in range(n_groups):
        columns = group == g
        p, t = predictions[:, :, columns], truth[:, columns]
        blended = np.empty(t.shape)
        single = np.empty(t.shape)
        for fold in np.unique(folds):
            out = folds == fold
            w = _solve(p[:, ~out], t[~out])
            blended[out] = np.tensordot(w, p[:, out], axes=1)
            single[out] = p[_best(p[:, ~out], t[~out]), out]
        if np.mean((blended - t) ** 2) < np.mean((single - t) ** 2):
            weights[g], held_out[:, columns] = _solve(p, t), blended
        else:
            weights[g, _best(p, t)], held_out[:, columns] = 1.0, single
    return weights, held_out


def _solve(predictions: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return nnls(predictions.reshape(len(predictions), -1).T, truth.ravel())[0]


def _best(predictions: np.ndarray, truth: np.ndarray) -> int:
    return int(np.argmin(((predictions - truth) ** 2).mean(axis=(1, 2))))
