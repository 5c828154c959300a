"""How precisely each measured spot is known."""

from __future__ import annotations

import numpy as np
from scipy.optimize import nnls


def counting_weights(residuals: np.ndarray, counting: np.ndarray) -> np.ndarray:
    r"""Weight spots by the inverse of their variance, part of which is counting noise.

    The variance of a log-normalised value is :math:`a + b / N` for a spot of :math:`N` counts: what counting adds falls
    with the depth. Both parts are fitted to the mean squared residual of each spot.

    Parameters
    ----------
    residuals
        (n, g) of any prediction that sees no noise, for example the mean.
    counting
        (n,) relative variance of counting, proportional to :math:`1 / N`, of mean 1.

    Returns
    -------
    (n,) weights of mean 1; all 1 where the residuals do not depend on depth.

    Examples
    --------
    >>> counting_weights(np.array([[1.0], [1.0], [2.0], [2.0]]), np.array([0.5, 0.5, 2.0, 2.0])).round(1)
    array([1.6, 1.6, 0.4, 0.4])
    """
    constant, slope = variance_parts(residuals, counting)
    variance = constant + slope * counting
    return 1.0 / variance / np.mean(1.0 / variance)


def variance_parts(residuals: np.ndarray, counting: np.ndarray) -> tuple[float, float]:
    """Constant and slope of the variance of a spot over its counting noise; see :func:`counting_weights`.

    (1, 0) where nothing varies, or where counting alone explains it and some spot has no counting noise.
    """
    scale = np.maximum(residuals.std(axis=0), 1e-12)
    size = np.mean((residuals / scale) ** 2, axis=1)
    constant, slope = nnls(np.column_stack([np.ones(len(size)), counting]), size)[0]
    if not (constant + slope * counting).min() > 0:
        return 1.0, 0.0
    return float(constant), float(slope)
