"""Predictions from elsewhere, made without any measurement of the tissue, on the scale of its measurement."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from spatial_impute.models._spots import given

if TYPE_CHECKING:
    from spatial_impute.models._spots import Spots

_SAME = 1e-6  # relative difference of values that are the same but for rounding


def recalibrate(spots: Spots, name: str) -> np.ndarray:
    """(n, g) outside prediction after a linear fit of each gene to the known spots, with a slope of at least 0.

    Each section is centered first, so that stain and scanner do not count. The mean profile stands where the prediction
    is NaN, and for genes of slope 0.
    """
    centred = _centred(spots, name)
    known = centred[spots.known]
    centred -= _mean(known)
    np.nan_to_num(centred, copy=False)
    return spots.expression.mean(axis=0) + _slope(known, spots.expression) * centred


def _centred(spots: Spots, name: str) -> np.ndarray:
    """(n, g) outside prediction minus its mean in each section."""
    values = np.array(given(spots.bases)[name], dtype=np.float64)
    least = _SAME * np.nan_to_num(np.abs(values)).max(axis=0, initial=0.0)
    for code in np.unique(spots.section):
        rows = spots.section == code
        values[rows] -= _mean(values[rows])
    values[np.abs(values) <= least] = 0.0  # rounding errors of constants
    return values


def _mean(values: np.ndarray) -> np.ndarray:
    """(g,) mean of the finite values; 0 if there is none."""
    finite = np.isfinite(values)
    return np.where(finite, values, 0.0).sum(axis=0) / np.maximum(finite.sum(axis=0), 1)


def _slope(known: np.ndarray, expression: np.ndarray) -> np.ndarray:
    """(g,) slope of the expression over the prediction at the known spots, at least 0."""
    finite = np.isfinite(known)
    x = np.where(finite, known - _mean(known), 0.0)
    y = np.where(finite, expression - _mean(np.where(finite, expression, np.nan)), 0.0)
    square, product = (x**2).sum(axis=0), (x * y).sum(axis=0)
    return np.maximum(product, 0.0) / np.where(square > 0, square, 1.0)
