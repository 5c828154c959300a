"""Baselines: simple imputation methods to compare a model with. All are fitted to :class:`Spots`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.spatial import cKDTree

from spatial_impute.models._spots import given
from spatial_impute.models.asign._cokriging import krige
from spatial_impute.models.asign._predictions import Linear, Mean, Neighbors, Rescaled, Table, spread, weighted_mean
from spatial_impute.models.asign._propagation import propagate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from spatial_impute.models._spots import Spots
    from spatial_impute.models.asign._predictions import Prediction

# In spot spacings: from hardly more than the nearest spot to a whole region.
_BANDWIDTHS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
_NEIGHBORS = (1, 2, 4, 8, 16, 32)
# Ridge penalties in units of the number of known spots, for standardised features.
_PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_HEST_COMPONENTS, _HEST_PENALTY = 256, 100.0
_MAX_GENES = 1000  # genes on which one setting for all of them is chosen
_MAX_RIDGE = 20_000  # known spots that a regression on some thousand features is fitted to
_SAME = 1e-6  # relative difference of numbers that are the same but for rounding
_MAX_TIED = 12  # neighbors at one distance on a lattice
_MAX_NEIGHBORS = 100  # beyond these the widest kernel has fallen below 1 % on a lattice


def fit_mean(spots: Spots) -> Linear:
    """Mean profile of the known spots; all known sections have the same weight."""
    centre = mean_profile(spots)
    return Linear(centre, np.empty((len(spots.known), 0), centre.dtype), np.empty((0, len(centre)), centre.dtype))


def fit_nearest(spots: Spots) -> Neighbors:
    """Values of the nearest known spot in the registered frame."""
    return Neighbors(cKDTree(spots.xyz[spots.known]), spots.xyz, spots.expression, 1, np.ones_like)


def fit_knn(spots: Spots) -> Neighbors:
    """Mean of the k nearest known spots; k by leave-one-out on the known spots."""
    counts = [k for k in _NEIGHBORS if k < spots.known.sum()] or [1]

    def weights(distance: np.ndarray, k: int) -> np.ndarray:
        # Spots at the distance of the k-th one share its weight, so that the order of the spots has no effect.
        last = distance[:, k - 1 : k]
        tied = np.abs(distance - last) <= _SAME * last
        nearer = (distance < last) & ~tied
        share = (k - nearer.sum(axis=1)) / tied.sum(axis=1)
        return (nearer + tied * share[:, None]) / k

    return _best_neighbors(spots, counts, max(counts) + _MAX_TIED, weights)


def fit_kernel(spots: Spots) -> Neighbors:
    """Mean of the known spots weighted by a Gaussian of distance; bandwidth by leave-one-out on the known spots."""

    def weights(distance: np.ndarray, bandwidth: float) -> np.ndarray:
        exponent = -0.5 * (distance / (bandwidth * spots.spacing)) ** 2
        weight = np.exp(exponent - exponent.max(axis=1, keepdims=True))
        return weight / weight.sum(axis=1, keepdims=True)

    return _best_neighbors(spots, _BANDWIDTHS, _MAX_NEIGHBORS, weights)


def fit_propagation(spots: Spots) -> Table:
    """Clamped label propagation on the 3D graph; the section mean for spots that no label reaches."""
    values, mass = propagate(given(spots.graph), spots.known, spots.expression, device=spots.solver_device)
    values[mass == 0] = mean_profile(spots)
    return Table(values)


def fit_ridge(spots: Spots) -> Linear:
    """Ridge regression on image features; penalty by leave-one-out on the known spots."""
    slope, offset = ridge_line(spots)
    return Linear(offset, given(spots.features), slope)


def ridge_line(spots: Spots) -> tuple[np.ndarray, np.ndarray]:
    """Slope (d, g) and offset (g,) of the ridge regression on the image features of the known spots."""
    rows, expression = np.flatnonzero(spots.known), spots.expression
    if len(rows) > _MAX_RIDGE:
        part = np.linspace(0, len(rows) - 1, _MAX_RIDGE).astype(int)
        rows, expression = rows[part], expression[part]
    centre = expression.mean(axis=0)
    known = given(spots.features)[rows].astype(float)
    offset = known.mean(axis=0)
    u, s, vt = np.linalg.svd(known - offset, full_matrices=False)
    target, genes = u.T.astype(expression.dtype) @ (expression - centre), _some_genes(expression)
    some = (expression[:, genes] - centre[genes]).astype(float)
    errors, shrinkages = [], []
    for penalty in _PENALTIES:
        shrink = s**2 / (s**2 + penalty * len(known))
        fitted = u @ (shrink[:, None] * target[:, genes])
        leverage = (u**2 * shrink).sum(axis=1) + 1 / len(known)
        residual = (some - fitted) / np.maximum(1 - leverage, 1e-6)[:, None]
        errors.append(float(np.mean(residual**2)))
        shrinkages.append(shrink / np.where(s > 0, s, 1.0))
    slope = (vt.T * shrinkages[int(np.argmin(errors))]).astype(expression.dtype) @ target
    return slope, centre - offset.astype(expression.dtype) @ slope


def fit_transfer_ridge(spots: Spots) -> Mean:
    """Mean of kernel and ridge after scaling both to the same standard deviation per gene."""
    centre = spots.expression.mean(axis=0)
    parts: list[Prediction] = [fit_kernel(spots), fit_ridge(spots)]
    spreads = [np.maximum(spread(part, centre, len(spots.known)), 1e-12) for part in parts]
    factors = [(np.mean(spreads, axis=0) / own).astype(centre.dtype) for own in spreads]
    return Mean([Rescaled(part, centre, factor) for part, factor in zip(parts, factors, strict=True)])


def fit_hest(spots: Spots) -> Prediction:
    """Regression from image features as HEST-Bench scores encoders: standardised, 256 principal components, ridge.

    Its penalty is fixed, 100 / (components x genes), and is not chosen on the tissue.
    """
    from sklearn.decomposition import PCA
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features = given(spots.features)
    known = features[spots.known]
    n_components = min(_HEST_COMPONENTS, len(known) - 1, known.shape[1])
    if n_components < 1:
        return fit_mean(spots)
    penalty = _HEST_PENALTY / (n_components * spots.expression.shape[1])
    steps = StandardScaler(), PCA(n_components, random_state=0), Ridge(alpha=penalty)
    found = make_pipeline(*steps).fit(known, spots.expression).predict(features)
    return Table(found.reshape(len(features), -1))


METHODS: dict[str, Callable[[Spots], Prediction]] = {
    "mean": fit_mean,
    "nearest": fit_nearest,
    "knn": fit_knn,
    "kernel": fit_kernel,
    "propagation": fit_propagation,
    "ridge": fit_ridge,
    "transfer_ridge": fit_transfer_ridge,
    "cokriging": krige,
}
"""Every baseline by name: its fit to the known spots."""

RECIPES: dict[str, Callable[[Spots], Prediction]] = {"hest": fit_hest}
"""Recipes of other benchmarks, to compare with; they have no part in the blend."""

NEEDS_FEATURES = frozenset({"ridge", "transfer_ridge", "cokriging", *RECIPES})
NEEDS_GRAPH = frozenset({"propagation"})


def _best_neighbors(
    spots: Spots,
    options: Sequence[float],
    n_neighbors: int,
    weights: Callable[[np.ndarray, Any], np.ndarray],
) -> Neighbors:
    """Mean of the nearest known spots, with the option of lowest leave-one-out error on the known spots."""
    tree = cKDTree(spots.xyz[spots.known])
    n_known = int(spots.known.sum())
    best = options[0]
    if n_known > 1 and len(options) > 1:
        k = min(n_neighbors + 1, n_known)
        distance, found = tree.query(spots.xyz[spots.known], k=k)
        others = found != np.arange(n_known)[:, None]
        others[others.all(axis=1), -1] = False  # spots at the same place can displace the spot itself
        distance, found = (a[others].reshape(n_known, k - 1) for a in (distance, found))
        values = spots.expression[:, _some_genes(spots.expression)].astype(float)
        errors = [np.mean((weighted_mean(values, found, weights(distance, o)) - values) ** 2) for o in options]
        best = options[int(np.argmin(errors))]
    n_used = min(n_neighbors, n_known)
    return Neighbors(tree, spots.xyz, spots.expression, n_used, lambda distance: weights(distance, best))


def _some_genes(expression: np.ndarray) -> np.ndarray:
    """(k,) positions of at most 1000 of the genes, from all parts of their order."""
    n_genes = expression.shape[1]
    return np.linspace(0, n_genes - 1, min(n_genes, _MAX_GENES)).astype(int)


def mean_profile(spots: Spots) -> np.ndarray:
    """(g,) mean of the known spots: mean of each known section, then mean of these."""
    section, codes = spots.section[spots.known], np.unique(spots.section[spots.known])
    if len(codes) == 1:
        return spots.expression.mean(axis=0)
    return np.mean([spots.expression[section == code].mean(axis=0) for code in codes], axis=0)


def recalibrate(spots: Spots, name: str) -> Table:
    """Prediction from elsewhere, fitted to the known spots: a line for each gene, with a slope of at least 0.

    It was made without any measurement of the tissue. Each section is centered first, so that stain and scanner do not
    count. The mean profile stands where the prediction is NaN, and for genes of slope 0.
    """
    centred = _centred_by_section(spots, name)
    known = centred[spots.known]
    centred -= _finite_mean(known)
    np.nan_to_num(centred, copy=False)
    return Table(spots.expression.mean(axis=0) + _slope(known, spots.expression) * centred)


def _centred_by_section(spots: Spots, name: str) -> np.ndarray:
    """(n, g) prediction from elsewhere minus its mean in each section."""
    values = np.array(given(spots.bases)[name], dtype=np.float64)
    least = _SAME * np.nan_to_num(np.abs(values)).max(axis=0, initial=0.0)
    for code in np.unique(spots.section):
        rows = spots.section == code
        values[rows] -= _finite_mean(values[rows])
    values[np.abs(values) <= least] = 0.0  # rounding errors of constants
    return values


def _finite_mean(values: np.ndarray) -> np.ndarray:
    """(g,) mean of the finite values; 0 if there is none."""
    return np.ma.masked_invalid(values).mean(axis=0).filled(0.0)


def _slope(known: np.ndarray, expression: np.ndarray) -> np.ndarray:
    """(g,) slope of the expression over the prediction at the known spots, at least 0."""
    finite = np.isfinite(known)
    x = np.where(finite, known - _finite_mean(known), 0.0)
    y = np.where(finite, expression - _finite_mean(np.where(finite, expression, np.nan)), 0.0)
    square, product = (x**2).sum(axis=0), (x * y).sum(axis=0)
    return np.maximum(product, 0.0) / np.where(square > 0, square, 1.0)
