"""How far imputed values may be off, from what held-out spots were off."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from spatial_impute._scores import HALF_WIDTH, INTERVAL_LEVEL
from spatial_impute.models.asign._cokriging import cokriging
from spatial_impute.models.asign._propagation import propagate

if TYPE_CHECKING:
    from spatial_impute.models._spots import Spots


def held_out_spread(residuals: np.ndarray, n_blocks: int) -> np.ndarray:
    """Standard deviation of each gene with which 90 % intervals cover 90 % of spots to come.

    Counts are not normal, so the spread is set by the interval that it is there for.

    Parameters
    ----------
    residuals
        (n, g) prediction minus measurement of held-out spots.
    n_blocks
        Blocks that they were held out in. Neighbours are off together, so blocks are what there are n of.

    Returns
    -------
    (g,).

    Examples
    --------
    >>> spread = held_out_spread(np.random.default_rng(0).normal(size=(10_000, 1)), n_blocks=10_000)
    >>> round(float(spread[0]), 1)
    1.0
    """
    # The block to come is one more: of n held-out blocks, the interval must take in 0.9 (n + 1).
    level = min(1.0, INTERVAL_LEVEL * (n_blocks + 1) / n_blocks)
    return np.quantile(np.abs(residuals), level, axis=0) / HALF_WIDTH


def expected_noise(spots: Spots) -> np.ndarray:
    """(n,) counting noise that a measurement of each spot would have, 1 / counts, by co-kriging of the known spots.

    Depth follows the tissue: dense and sparse regions, and what stands over them on another section. NaN where the
    counts of the known spots are not known.
    """
    if spots.total_counts is None:
        return np.full(len(spots.known), np.nan)
    log_noise = -np.log(spots.total_counts)[:, None]
    return np.exp(cokriging(replace(spots, expression=log_noise, total_counts=None))[:, 0])


def noise_elsewhere(spots: Spots, noise: np.ndarray, usual: float) -> np.ndarray:
    """(n,) counting noise to expect where one section alone tells how depth varies.

    On the measured section held-out blocks have shown how well depth is predicted. On another one it may follow place
    and image as well, or come from how that section was processed, in which case nothing is known of it and a spot has
    the usual noise. One section cannot tell which, so the variance is the mean of both.
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
    """How far each spot may be off, relative to others.

    Parameters
    ----------
    noise
        (n,) expected counting noise.
    parts
        Usual counting noise, constant part of the variance, part in proportion to the noise.

    Returns
    -------
    (n,) standard deviations.
    """
    usual, constant, slope = parts
    return np.sqrt(constant + slope * relative_noise(noise, usual))


def relative_noise(noise: np.ndarray, usual: float) -> np.ndarray:
    """Counting noise in units of the usual one; 1 where either is not known, as for values without counts."""
    relative = noise / usual
    return np.where(np.isfinite(relative), relative, 1.0)


def held_out_support(spots: Spots, folds: list[np.ndarray]) -> np.ndarray:
    """(n_known,) support of each known spot while its fold is hidden."""
    support = np.zeros(len(spots.known))
    for fold in folds:
        known = spots.known & ~fold
        _, mass = propagate(spots.graph, known, np.ones((int(known.sum()), 1)))
        support[fold] = mass[fold]
    return support[spots.known]


def spread_by_support(
    support: np.ndarray, usual_support: float, spread: np.ndarray, spread_of_mean: np.ndarray
) -> np.ndarray:
    """Spread at every spot: that of held-out spots where support is like theirs, growing to that of the mean.

    Parameters
    ----------
    support
        (n,) 0-1.
    usual_support
        Typical support of held-out spots.
    spread, spread_of_mean
        (g,) of the model and of the mean profile on held-out spots.

    Returns
    -------
    (n, g); the mean profile is where a spot without any support ends.
    """
    share = np.clip(support / max(usual_support, 1e-12), 0.0, 1.0)[:, None]
    worst = np.maximum(spread, spread_of_mean) ** 2
    variance = (1 - share) * (worst - spread**2)
    variance += spread**2
    return np.sqrt(variance, out=variance)
