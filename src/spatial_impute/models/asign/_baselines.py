"""Baselines: simple imputation methods to compare a model with. All take :class:`Spots` and return (n, g)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse
from scipy.spatial import cKDTree

from spatial_impute.models._spots import given
from spatial_impute.models.asign._cokriging import cokriging
from spatial_impute.models.asign._propagation import propagate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from spatial_impute.models._spots import Spots

# In spot spacings: from hardly more than the nearest spot to a whole region.
_BANDWIDTHS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
_NEIGHBOURS = (1, 2, 4, 8, 16, 32)
# Ridge penalties in units of the number of known spots, for standardised features.
_PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_HEST_COMPONENTS, _HEST_PENALTY = 256, 100.0
_MAX_GENES = 1000  # genes on which one setting for all of them is chosen
_MAX_RIDGE = 20_000  # known spots that a regression on some thousand features is fitted to
_ROWS_AT_A_TIME = 50_000  # spots to find neighbours for: 160 MB of numbers at the widest
_SAME = 1e-6  # relative difference of numbers that are the same but for rounding
_MAX_TIED = 12  # neighbors at one distance on a lattice
_MAX_NEIGHBOURS = 100  # beyond these the widest kernel has fallen below 1 % on a lattice


def section_mean(spots: Spots) -> np.ndarray:
    """Mean profile of the known spots; all known sections have the same weight."""
    return np.tile(_mean_profile(spots), (len(spots.known), 1))


def nearest(spots: Spots) -> np.ndarray:
    """Values of the nearest known spot in the registered frame."""
    _, found = cKDTree(spots.xyz[spots.known]).query(spots.xyz)
    return spots.expression[found]


def knn(spots: Spots) -> np.ndarray:
    """Mean of the k nearest known spots; k by leave-one-out on the known spots."""
    counts = [k for k in _NEIGHBOURS if k < spots.known.sum()] or [1]

    def predict(values: np.ndarray, distance: np.ndarray, found: np.ndarray, k: int) -> np.ndarray:
        # Spots as far as the k-th one share the places that are left, so that the order of the spots has no effect.
        last = distance[:, k - 1 : k]
        tied = np.abs(distance - last) <= _SAME * last
        nearer = (distance < last) & ~tied
        share = (k - nearer.sum(axis=1)) / tied.sum(axis=1)
        return _weighted_mean(values, found, (nearer + tied * share[:, None]) / k)

    return _by_neighbours(spots, counts, max(counts) + _MAX_TIED, predict)


def kernel(spots: Spots) -> np.ndarray:
    """Mean of the known spots weighted by a Gaussian of distance; bandwidth by leave-one-out on the known spots."""

    def predict(values: np.ndarray, distance: np.ndarray, found: np.ndarray, bandwidth: float) -> np.ndarray:
        exponent = -0.5 * (distance / (bandwidth * spots.spacing)) ** 2
        weight = np.exp(exponent - exponent.max(axis=1, keepdims=True))
        weight /= weight.sum(axis=1, keepdims=True)
        return _weighted_mean(values, found, weight)

    return _by_neighbours(spots, _BANDWIDTHS, _MAX_NEIGHBOURS, predict)


def propagation(spots: Spots) -> np.ndarray:
    """Clamped label propagation on the 3D graph; the section mean for spots that no label reaches."""
    values, mass = propagate(given(spots.graph), spots.known, spots.expression, device=spots.solver_device)
    values[mass == 0] = _mean_profile(spots)
    return values


def ridge(spots: Spots) -> np.ndarray:
    """Ridge regression on image features; penalty by leave-one-out on the known spots."""
    return apply_linear(given(spots.features), *fit_ridge(spots))


def apply_linear(features: np.ndarray, slope: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """(n, g) prediction of a linear model with (d, g) slope and (g,) offset."""
    return features @ slope + offset


def fit_ridge(spots: Spots) -> tuple[np.ndarray, np.ndarray]:
    """Slope (d, g) and offset (g,) of the ridge regression on the image features of the known spots."""
    rows, expression = np.flatnonzero(spots.known), spots.expression
    if len(rows) > _MAX_RIDGE:
        part = np.linspace(0, len(rows) - 1, _MAX_RIDGE).astype(int)
        rows, expression = rows[part], expression[part]
    centre = expression.mean(axis=0)
    known = given(spots.features)[rows].astype(float)
    offset = known.mean(axis=0)
    u, s, vt = np.linalg.svd(known - offset, full_matrices=False)
    target, genes = u.T @ (expression - centre), _some_genes(expression)
    errors, shrinkages = [], []
    for penalty in _PENALTIES:
        shrink = s**2 / (s**2 + penalty * len(known))
        fitted = u @ (shrink[:, None] * target[:, genes])
        leverage = (u**2 * shrink).sum(axis=1) + 1 / len(known)
        residual = ((expression - centre)[:, genes] - fitted) / np.maximum(1 - leverage, 1e-6)[:, None]
        errors.append(float(np.mean(residual**2)))
        shrinkages.append(shrink / np.where(s > 0, s, 1.0))
    slope = vt.T @ (shrinkages[int(np.argmin(errors))][:, None] * target)
    return slope, centre - offset @ slope


def transfer_ridge(spots: Spots) -> np.ndarray:
    """Mean of kernel and ridge after scaling both to the same standard deviation per gene."""
    centre = spots.expression.mean(axis=0)
    result, spreads = np.zeros((), np.float32), []
    for method in (kernel, ridge):
        part = method(spots).astype(np.float32)  # and in place: tables of a large stack take gigabytes
        part -= centre
        spreads.append(np.maximum(part.std(axis=0), 1e-12))
        part /= spreads[-1]
        part += result
        result = part
    result *= np.mean(spreads, axis=0) / 2
    result += centre
    return result


def hest(spots: Spots) -> np.ndarray:
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
        return section_mean(spots)
    penalty = _HEST_PENALTY / (n_components * spots.expression.shape[1])
    steps = StandardScaler(), PCA(n_components, random_state=0), Ridge(alpha=penalty)
    return make_pipeline(*steps).fit(known, spots.expression).predict(features).reshape(len(features), -1)


METHODS: dict[str, Callable[[Spots], np.ndarray]] = {
    "mean": section_mean,
    "nearest": nearest,
    "knn": knn,
    "kernel": kernel,
    "propagation": propagation,
    "ridge": ridge,
    "transfer_ridge": transfer_ridge,
    "cokriging": cokriging,
}
"""Every baseline by name."""

RECIPES: dict[str, Callable[[Spots], np.ndarray]] = {"hest": hest}
"""Recipes of other benchmarks, to compare with; they have no part in the blend."""

NEEDS_FEATURES = frozenset({"ridge", "transfer_ridge", "cokriging", *RECIPES})
NEEDS_GRAPH = frozenset({"propagation"})


def available_methods(spots: Spots) -> list[str]:
    """Names of the baselines that can run on what the spots carry."""
    return [
        name
        for name in METHODS
        if not (name in NEEDS_FEATURES and spots.features is None) and not (name in NEEDS_GRAPH and spots.graph is None)
    ]


def _by_neighbours(
    spots: Spots,
    options: Sequence[float],
    n_neighbours: int,
    predict: Callable[[np.ndarray, np.ndarray, np.ndarray, Any], np.ndarray],
) -> np.ndarray:
    """Predict from the nearest known spots, with the option of lowest leave-one-out error on the known spots."""
    tree = cKDTree(spots.xyz[spots.known])
    n_known = int(spots.known.sum())
    best = options[0]
    if n_known > 1 and len(options) > 1:
        k = min(n_neighbours + 1, n_known)
        distance, found = tree.query(spots.xyz[spots.known], k=k)
        others = found != np.arange(n_known)[:, None]
        others[others.all(axis=1), -1] = False  # spots at the same place can displace the spot itself
        distance, found = (a[others].reshape(n_known, k - 1) for a in (distance, found))
        values = spots.expression[:, _some_genes(spots.expression)]
        errors = [np.mean((predict(values, distance, found, option) - values) ** 2) for option in options]
        best = options[int(np.argmin(errors))]
    ranks = list(range(1, min(n_neighbours, n_known) + 1))
    result = np.empty((len(spots.xyz), spots.expression.shape[1]))
    for start in range(0, len(result), _ROWS_AT_A_TIME):
        rows = slice(start, start + _ROWS_AT_A_TIME)
        distance, found = tree.query(spots.xyz[rows], k=ranks)
        result[rows] = predict(spots.expression, distance, found, best)
    return result


def _some_genes(expression: np.ndarray) -> np.ndarray:
    """(k,) positions of at most 1000 of the genes, from all parts of their order."""
    n_genes = expression.shape[1]
    return np.linspace(0, n_genes - 1, min(n_genes, _MAX_GENES)).astype(int)


def _mean_profile(spots: Spots) -> np.ndarray:
    """(g,) mean of the known spots: mean of each known section, then mean of these."""
    section = spots.section[spots.known]
    return np.mean([spots.expression[section == code].mean(axis=0) for code in np.unique(section)], axis=0)


def _weighted_mean(values: np.ndarray, found: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(n, g) means of `values` rows `found` (n, k) by `weight` (n, k), as one sparse product."""
    n, k = found.shape
    matrix = sparse.csr_matrix((weight.ravel(), found.ravel(), np.arange(n + 1) * k), shape=(n, len(values)))
    return matrix @ values


def recalibrate(spots: Spots, name: str) -> np.ndarray:
    """(n, g) prediction from elsewhere, fitted to the known spots: a line for each gene, with a slope of at least 0.

    It was made without any measurement of the tissue. Each section is centered first, so that stain and scanner do not
    count. The mean profile stands where the prediction is NaN, and for genes of slope 0.
    """
    centred = _centred_by_section(spots, name)
    known = centred[spots.known]
    centred -= _finite_mean(known)
    np.nan_to_num(centred, copy=False)
    return spots.expression.mean(axis=0) + _slope(known, spots.expression) * centred


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
    finite = np.isfinite(values)
    return np.where(finite, values, 0.0).sum(axis=0) / np.maximum(finite.sum(axis=0), 1)


def _slope(known: np.ndarray, expression: np.ndarray) -> np.ndarray:
    """(g,) slope of the expression over the prediction at the known spots, at least 0."""
    finite = np.isfinite(known)
    x = np.where(finite, known - _finite_mean(known), 0.0)
    y = np.where(finite, expression - _finite_mean(np.where(finite, expression, np.nan)), 0.0)
    square, product = (x**2).sum(axis=0), (x * y).sum(axis=0)
    return np.maximum(product, 0.0) / np.where(square > 0, square, 1.0)
