"""Prediction intervals of imputed values, from the errors of held-out spots."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from spatial_impute._expression import gene_blocks
from spatial_impute._scores import HALF_WIDTH, INTERVAL_LEVEL
from spatial_impute.models.asign._cokriging import krige

if TYPE_CHECKING:
    from spatial_impute.models._spots import Spots


def held_out_spread(residuals: np.ndarray, n_blocks: int) -> np.ndarray:
    """(g,) standard deviation of each gene with which 90 % intervals cover 90 % of new spots.

    Counts are not normally distributed, so the standard deviation is set by the coverage of the interval. `residuals` (n, g)
    are those of held-out spots. Errors of neighbouring spots are correlated, so the sample size is the number of blocks.

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
