"""Co-kriging: Gaussian processes over place and image for a few components of expression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

from spatial_impute.models._noise import counting_weights

if TYPE_CHECKING:
    from spatial_impute.models._spots import Spots

_MAX_KNOWN = 2000  # exact up to here: a Cholesky factor of 32 MB and a few seconds per component
_MAX_FIT = 500  # the likelihood of 500 spots settles six numbers
_ROWS_AT_A_TIME = 4096


@dataclass(frozen=True)
class _Inputs:
    place: np.ndarray
    """(n, 3) in spot spacings."""
    image: np.ndarray
    """(n, d) features, centred and scaled so that the mean squared norm is 1; d may be 0."""

    def __getitem__(self, rows: np.ndarray | slice) -> _Inputs:
        return _Inputs(self.place[rows], self.image[rows])


def cokriging(spots: Spots, *, max_components: int = 20, leave_one_out: bool = False, seed: int = 0) -> np.ndarray:
    """Predict expression from place and image by Gaussian processes on its principal components.

    Each component has a kernel of its own: a Gaussian of the registered distance, a linear and a Gaussian kernel of the
    image features, and noise in two parts, one the same for all spots and one that falls with the total counts of a
    spot, as counting noise does. Their sizes maximise the marginal likelihood. A component is used only if it predicts
    spots that are left out significantly better than its mean does (two standard errors), since what is not structure
    is noise.

    Parameters
    ----------
    spots
        The spots; without features only their place is used.
    max_components
        Components of expression to model at most.
    leave_one_out
        Predict each known spot from the other known ones instead of from all.
    seed
        Seed of the choice of known spots where there are more than 2000.

    Returns
    -------
    (n, g) expected expression.
    """
    inputs = _inputs(spots)
    rows = np.flatnonzero(spots.known)
    keep = np.arange(len(rows))
    if len(rows) > _MAX_KNOWN:
        keep = np.sort(np.random.default_rng(seed).choice(len(rows), _MAX_KNOWN, replace=False))
    known, expression, counting = inputs[rows[keep]], spots.expression[keep], spots.counting_noise[keep]
    weight = counting_weights(expression - expression.mean(axis=0), counting)
    centre = np.average(expression, axis=0, weights=weight)
    centred = expression - centre
    # Components of the spots that are known well: noise of few counts is not structure.
    _, s, vt = np.linalg.svd(np.sqrt(weight)[:, None] * centred, full_matrices=False)
    n_components = min(max_components, int((s > 1e-8 * max(s[0], 1e-300)).sum()))
    kernels = _Kernels(known)
    used = []
    for loading in vt[:n_components]:
        target = centred @ loading
        spread = np.sqrt(np.average(target**2, weights=weight))
        theta = _fit(known, target / spread, counting)
        dual, left_out, skill = _solve(kernels(known, theta), target / spread, _noise(theta, counting))
        if skill > 0:  # not significant otherwise
            used.append((loading * (spread * skill), dual, theta, left_out))
    result = np.tile(centre, (len(spots.known), 1))
    for start in range(0, len(result) if used else 0, _ROWS_AT_A_TIME):
        part = slice(start, start + _ROWS_AT_A_TIME)
        distances = kernels.distances(inputs[part])
        for loading, dual, theta, _ in used:
            result[part] += np.outer(kernels.covariance(*distances, theta) @ dual, loading)
    if leave_one_out:
        result[rows[keep]] = centre + sum(np.outer(left_out, loading) for loading, _, _, left_out in used)
    return result


def _inputs(spots: Spots) -> _Inputs:
    if spots.features is None:
        image = np.empty((len(spots.known), 0))
    else:
        image = spots.features - spots.features.mean(axis=0)
        image = image / max(np.sqrt((image**2).sum(axis=1).mean()), 1e-12)
    return _Inputs(spots.xyz / spots.spacing, image)


# Logarithms of: variance and length (spacings) of place, variance of the linear and of the Gaussian kernel of the
# image, variance of the noise of all spots and of counting noise. For standardised targets the variances add up to
# about one; the standard deviations let each of them be 20 times smaller or larger.
_PRIOR_MEAN = np.log([0.3, 1.5, 0.15, 0.15, 0.25, 0.25])
_PRIOR_SD = np.array([1.5, 0.7, 1.5, 1.5, 1.5, 1.5])


def _noise(theta: np.ndarray, counting: np.ndarray) -> np.ndarray:
    return np.exp(theta[4]) + np.exp(theta[5]) * counting


class _Kernels:
    """Covariance between any spots and the known ones."""

    def __init__(self, known: _Inputs) -> None:
        self.known = known
        squared = _squared_distances(known.image, known.image)
        off_diagonal = squared[np.triu_indices(len(squared), 1)]
        # The median distance is the usual length where features have many dimensions.
        self.image_scale = max(float(np.median(off_diagonal)) if len(off_diagonal) else 1.0, 1e-12)

    def __call__(self, spots: _Inputs, theta: np.ndarray) -> np.ndarray:
        return self.covariance(*self.distances(spots), theta)

    def distances(self, spots: _Inputs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Squared distance of place, product of images, Gaussian kernel of images; (n, n_known) each."""
        alike = np.exp(-0.5 * _squared_distances(spots.image, self.known.image) / self.image_scale)
        return _squared_distances(spots.place, self.known.place), spots.image @ self.known.image.T, alike

    @staticmethod
    def covariance(squared: np.ndarray, linear: np.ndarray, alike: np.ndarray, theta: np.ndarray) -> np.ndarray:
        near = np.exp(theta[0] - 0.5 * squared / np.exp(2 * theta[1]))
        return near + np.exp(theta[2]) * linear + np.exp(theta[3]) * alike


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.maximum((a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T, 0.0)


def _fit(known: _Inputs, target: np.ndarray, counting: np.ndarray) -> np.ndarray:
    """Parameters of highest posterior density: marginal likelihood and a broad log-normal prior."""
    if len(target) > _MAX_FIT:
        part = np.linspace(0, len(target) - 1, _MAX_FIT).astype(int)
        known, target, counting = known[part], target[part], counting[part]
    squared, linear, alike = _Kernels(known).distances(known)
    identity = np.eye(len(target))

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        near = np.exp(theta[0] - 0.5 * squared / np.exp(2 * theta[1]))
        by_image = [np.exp(theta[2]) * linear, np.exp(theta[3]) * alike]
        covariance = near + by_image[0] + by_image[1]
        covariance[np.diag_indices_from(covariance)] += _noise(theta, counting)
        try:
            factor = cho_factor(covariance, lower=True)
        except np.linalg.LinAlgError:
            return 1e10, np.zeros(len(theta))
        alpha = cho_solve(factor, target)
        pull = cho_solve(factor, identity) - np.outer(alpha, alpha)
        gradient = 0.5 * np.array(
            [
                (pull * near).sum(),
                (pull * near * squared).sum() / np.exp(2 * theta[1]),
                (pull * by_image[0]).sum(),
                (pull * by_image[1]).sum(),
                np.trace(pull) * np.exp(theta[4]),
                (np.diag(pull) * counting).sum() * np.exp(theta[5]),
            ]
        )
        z = (theta - _PRIOR_MEAN) / _PRIOR_SD
        value = 0.5 * target @ alpha + np.log(np.diag(factor[0])).sum() + 0.5 * z @ z
        return float(value), gradient + z / _PRIOR_SD

    # A line search may step far out, where exponentials overflow; four standard deviations leave out nothing likely.
    bounds = np.column_stack([_PRIOR_MEAN - 4 * _PRIOR_SD, _PRIOR_MEAN + 4 * _PRIOR_SD])
    options = {"maxiter": 60}
    return minimize(loss, _PRIOR_MEAN, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x


def _solve(covariance: np.ndarray, target: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Weights of the known spots, their predictions without themselves, and how much of the prediction to keep (0-1; 0 if it does not help).

    With each spot left out in turn, the gain in squared error over the mean must exceed two standard errors; the
    prediction is then shrunk by the factor that fits the left-out spots best. Spots count by the inverse of their noise.
    """
    factor = cho_factor(covariance + np.diag(noise), lower=True)
    dual = cho_solve(factor, target)
    left_out = target - dual / np.diag(cho_solve(factor, np.eye(len(target))))
    gain = (target**2 - (target - left_out) ** 2) / noise
    if gain.mean() <= 2 * gain.std() / np.sqrt(len(gain)):
        return dual, left_out, 0.0
    skill = (left_out / noise) @ target / ((left_out / noise) @ left_out)
    return dual, left_out, float(np.clip(skill, 0.0, 1.0))
