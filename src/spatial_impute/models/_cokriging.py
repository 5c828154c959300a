"""Co-kriging: Gaussian processes over place and image for a few components of expression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

if TYPE_CHECKING:
    from spatial_impute.models._spots import Spots

_MAX_KNOWN = 2000  # exact up to here: a Cholesky factor of 32 MB and a few seconds per component
_N_FEATURES = 10  # principal components of the image features; more add noise faster than signal at some 100 spots
_ROWS_AT_A_TIME = 4096


@dataclass(frozen=True)
class _Inputs:
    place: np.ndarray
    """(n, 3) in spot spacings."""
    image: np.ndarray
    """(n, d) principal components of the features, scaled so that a typical squared norm is 1; d may be 0."""

    def __getitem__(self, rows: np.ndarray | slice) -> _Inputs:
        return _Inputs(self.place[rows], self.image[rows])


def cokriging(spots: Spots, *, max_components: int = 20, seed: int = 0) -> np.ndarray:
    """Predict expression from place and image by Gaussian processes on its principal components.

    Each component has a kernel of its own: a Gaussian of the registered distance, a linear kernel of the image
    features and noise, whose sizes maximise the marginal likelihood. A component is used only if it predicts spots that
    are left out significantly better than its mean does (two standard errors), since what is not structure is noise.

    Parameters
    ----------
    spots
        The spots; without features only their place is used.
    max_components
        Components of expression to model at most.
    seed
        Seed of the choice of known spots where there are more than 2000.

    Returns
    -------
    (n, g) expected expression.
    """
    inputs = _inputs(spots)
    rows = np.flatnonzero(spots.known)
    if len(rows) > _MAX_KNOWN:
        keep = np.sort(np.random.default_rng(seed).choice(len(rows), _MAX_KNOWN, replace=False))
    else:
        keep = np.arange(len(rows))
    known = inputs[rows[keep]]
    centre = spots.expression.mean(axis=0)
    centred = spots.expression[keep] - centre
    u, s, vt = np.linalg.svd(centred, full_matrices=False)
    n_components = min(max_components, int((s > 1e-8 * max(s[0], 1e-300)).sum()))
    weights, loadings, parameters = [], [], []
    for c in range(n_components):
        target = u[:, c] * s[c]
        spread = target.std()
        theta = _fit(known, target / spread)
        weight, skill = _solve(known, target / spread, theta)
        if skill > 0:  # not significant otherwise
            weights.append(weight * spread * skill)
            loadings.append(vt[c])
            parameters.append(theta)
    result = np.tile(centre, (len(spots.known), 1))
    for start in range(0, len(result), _ROWS_AT_A_TIME):
        part = slice(start, start + _ROWS_AT_A_TIME)
        for weight, loading, theta in zip(weights, loadings, parameters, strict=True):
            result[part] += np.outer(_kernel(inputs[part], known, theta) @ weight, loading)
    return result


def _inputs(spots: Spots) -> _Inputs:
    if spots.features is None:
        image = np.empty((len(spots.known), 0))
    else:
        centred = spots.features - spots.features.mean(axis=0)
        _values, vectors = np.linalg.eigh(centred.T @ centred)
        image = centred @ vectors[:, ::-1][:, :_N_FEATURES]
        image = image / max(np.sqrt((image**2).sum(axis=1).mean()), 1e-12)
    return _Inputs(spots.xyz / spots.spacing, image)


# Parameters: log variance and log length (spacings) of place, log variance of image, log variance of noise.
_PRIOR_MEAN = np.log([0.3, 1.5, 0.3, 0.5])
_PRIOR_SD = np.array([1.5, 0.7, 1.5, 1.0])


def _kernel(a: _Inputs, b: _Inputs, theta: np.ndarray) -> np.ndarray:
    squared = (a.place**2).sum(axis=1)[:, None] + (b.place**2).sum(axis=1) - 2 * a.place @ b.place.T
    result = np.exp(theta[0] - 0.5 * np.maximum(squared, 0) / np.exp(2 * theta[1]))
    return result + np.exp(theta[2]) * (a.image @ b.image.T)


def _fit(known: _Inputs, target: np.ndarray) -> np.ndarray:
    """Parameters of highest posterior density: marginal likelihood and a broad log-normal prior."""
    if len(target) > 500:  # the likelihood of 500 spots settles four numbers
        part = np.linspace(0, len(target) - 1, 500).astype(int)
        known, target = known[part], target[part]
    squared = ((known.place[:, None] - known.place[None]) ** 2).sum(axis=2)
    linear = known.image @ known.image.T

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        near = np.exp(theta[0] - 0.5 * squared / np.exp(2 * theta[1]))
        alike = np.exp(theta[2]) * linear
        covariance = near + alike
        covariance[np.diag_indices_from(covariance)] += np.exp(theta[3])
        try:
            factor = cho_factor(covariance, lower=True)
        except np.linalg.LinAlgError:
            return 1e10, np.zeros(4)
        alpha = cho_solve(factor, target)
        inverse = cho_solve(factor, np.eye(len(target)))
        pull = inverse - np.outer(alpha, alpha)
        gradient = 0.5 * np.array(
            [
                (pull * near).sum(),
                (pull * near * squared).sum() / np.exp(2 * theta[1]),
                (pull * alike).sum(),
                np.trace(pull) * np.exp(theta[3]),
            ]
        )
        z = (theta - _PRIOR_MEAN) / _PRIOR_SD
        value = 0.5 * target @ alpha + np.log(np.diag(factor[0])).sum() + 0.5 * z @ z
        return float(value), gradient + z / _PRIOR_SD

    return minimize(loss, _PRIOR_MEAN, jac=True, method="L-BFGS-B", options={"maxiter": 60}).x


def _solve(known: _Inputs, target: np.ndarray, theta: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights of the known spots, and how much of the prediction to keep (0-1; 0 if it does not help).

    With each spot left out in turn, the gain in squared error over the mean must exceed two standard errors; the
    prediction is then shrunk by the factor that fits the left-out spots best.
    """
    covariance = _kernel(known, known, theta)
    covariance[np.diag_indices_from(covariance)] += np.exp(theta[3])
    factor = cho_factor(covariance, lower=True)
    weight = cho_solve(factor, target)
    left_out = target - weight / np.diag(cho_solve(factor, np.eye(len(target))))
    gain = target**2 - (target - left_out) ** 2
    if gain.mean() <= 2 * gain.std() / np.sqrt(len(gain)):
        return weight, 0.0
    return weight, float(np.clip(left_out @ target / (left_out @ left_out), 0.0, 1.0))
