"""Co-kriging: Gaussian processes over place and image features for the principal components of expression."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.linalg import cho_solve, cholesky, eigh
from scipy.linalg.lapack import dpotrf, dpotri, get_lapack_funcs
from scipy.optimize import minimize, nnls
from threadpoolctl import threadpool_limits

from spatial_impute._expression import gene_blocks
from spatial_impute._geometry import plane_tiles
from spatial_impute._io.workers import torch_threads
from spatial_impute.models.asign._predictions import Linear, row_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from spatial_impute.models._spots import Spots

_MAX_EXACT = 2000  # known spots solved for at once: a Cholesky factor of 32 MB and a second per component
_MAX_COMPONENTS = 20  # of expression
_MAX_FIT = 500  # spots whose likelihood is maximised; enough for six parameters
# More known spots are solved for tile by tile: near spots determine the effect of place, random spots that of the image.
_TILE_KNOWN = 500
_TILE_NEAR = 750
_TILE_ANYWHERE = 250
_ROWS_AT_A_TIME = 4096


# Torch computes the kernels, on any device: its exponentials take less than half the time of those of numpy. LAPACK solves
# the systems of equations, which are small: its factors and inverses take a half to a quarter of the time of torch on a CPU.
@dataclass(frozen=True)
class _Inputs:
    place: Tensor  # (n, 3) in spot spacings
    image: Tensor  # (n, d) features, centred and scaled so that the mean squared norm of all spots is 1; d may be 0

    def __getitem__(self, rows: np.ndarray) -> _Inputs:
        return _Inputs(self.place[rows], self.image[rows])


class _AllInputs:
    """Inputs of all spots, computed for some of them at a time."""

    def __init__(self, spots: Spots) -> None:
        self.place = spots.xyz / spots.spacing
        self.device = spots.solver_device
        self._features = np.empty((len(spots.known), 0)) if spots.features is None else spots.features
        self._centre = self._features.mean(axis=0, dtype=float)
        parts = range(0, len(self.place), _ROWS_AT_A_TIME)
        squares = sum(((self._features[i : i + _ROWS_AT_A_TIME] - self._centre) ** 2).sum() for i in parts)
        self._size = max(np.sqrt(squares / max(len(self.place), 1)), 1e-12)

    def of(self, rows: np.ndarray, origin: np.ndarray | None = None) -> _Inputs:
        """Inputs of some spots; with an origin, their place is relative to it, and values are in single precision."""
        place, image = self.place[rows], (self._features[rows] - self._centre) / self._size
        precision = torch.float64
        if origin is not None:
            place, precision = place - origin, torch.float32
        return _Inputs(*(torch.as_tensor(part, dtype=precision, device=self.device) for part in (place, image)))


@dataclass(frozen=True)
class Axes:
    """Principal components of the expression of known spots. They do not depend on the image, so all views share them."""

    centre: np.ndarray  # (g,) mean profile
    loadings: np.ndarray  # (k, g) unit vectors
    projected: np.ndarray  # (n_known, k) components of the known spots
    weight: np.ndarray  # of each spot of the sample that the components were fitted to

    @classmethod
    @threadpool_limits.wrap(limits=1, user_api="blas")
    def of(cls, spots: Spots) -> Axes:
        """Mean profile, and components of the deviations from it, weighted by the noise of the spots."""
        keep = _sample_of_known(spots)
        values = spots.expression[keep].astype(float)
        centre = values.mean(axis=0)
        values -= centre
        # Weighted, because spots with few counts show noise instead of structure.
        weight = counting_weights(values, spots.counting_noise[keep])
        shift = np.average(values, axis=0, weights=weight)
        centre += shift
        values -= shift
        values *= np.sqrt(weight)[:, None]
        loadings = _principal_axes(values)
        projected = np.empty((len(spots.expression), len(loadings)))
        for rows in row_blocks(*spots.expression.shape):
            projected[rows] = (spots.expression[rows] - centre) @ loadings.T
        return cls(centre, loadings, projected, weight)


def _sample_of_known(spots: Spots) -> np.ndarray:
    """Positions among the known spots of those that parameters are fitted to."""
    return _sample(int(spots.known.sum()), _MAX_EXACT, np.random.default_rng(0))


# On matrices of this size, threads wait for each other longer than they compute. On a shared machine they made it 25
# times slower.
@threadpool_limits.wrap(limits=1, user_api="blas")
@torch_threads(1)
def krige(spots: Spots, *, left_out: np.ndarray | None = None, axes: Axes | None = None) -> Linear:
    """Predict expression from place and image by Gaussian processes on its principal components.

    The kernel of each component is the sum of a Gaussian of the registered distance, a linear and a Gaussian kernel of
    the image features, and noise. One part of the noise is the same for all spots; the other decreases with the total
    counts of a spot, as counting noise does. The parameters maximise the marginal likelihood. A component is used only
    if it predicts left-out spots significantly better than its mean does (by two standard errors).

    Without features only the place of spots is used. `left_out` is the (n_known,) group of each known spot: each is then
    predicted from the known spots of the other groups; components and parameters still come from all of them. `axes` are
    those of the spots, if they are known already.
    """
    inputs, axes = _AllInputs(spots), axes or Axes.of(spots)
    rows, keep = np.flatnonzero(spots.known), _sample_of_known(spots)
    sample = inputs.of(rows[keep])
    components = _fit_components(sample, axes, axes.projected[keep], spots.counting_noise[keep])
    # Single precision halves the time and the memory of the result, and is enough within a tile.
    in_tiles = len(rows) > _MAX_EXACT
    precision = np.float32 if in_tiles else np.float64
    used = [c.axis for c in components]
    standardised = axes.projected[:, used] / [c.spread for c in components]
    effects = axes.loadings[used] * np.reshape([c.spread * c.skill for c in components], (-1, 1))
    scores = np.zeros((len(spots.known), len(components)), precision)
    kernels = _Kernels(sample)
    for inside, others, own in _tiles(inputs.place, rows) if components else ():
        near = np.concatenate([others, own])
        origin = inputs.place[rows[own]].mean(axis=0) if in_tiles else None
        known, counting = kernels.around(inputs.of(rows[near], origin)), spots.counting_noise[near]
        distances = known.distances(known.known)
        groups = None if left_out is None else left_out[near]
        solved = [
            _solve(known.covariance(*distances, c.theta), target, _noise_variance(c.theta, counting), groups)
            for c, target in zip(components, standardised[near].T, strict=True)
        ]
        duals = np.stack([dual for dual, _ in solved], axis=1)
        for start in range(0, len(inside), _ROWS_AT_A_TIME):
            part = inside[start : start + _ROWS_AT_A_TIME]
            scores[part] = known.predict(inputs.of(part, origin), [c.theta for c in components], duals)
        if left_out is not None:
            scores[rows[own]] = np.stack([found[len(others) :] for _, found in solved], axis=1)
    return Linear(axes.centre.astype(precision), scores, effects.astype(precision))


@dataclass(frozen=True)
class _Component:
    axis: int  # Position among the axes
    spread: float  # Standard deviation of the component
    theta: np.ndarray  # Logarithms of the parameters of its kernel
    skill: float  # Factor on its prediction, 0-1


def _fit_components(known: _Inputs, axes: Axes, projected: np.ndarray, counting: np.ndarray) -> list[_Component]:
    """The principal components that can be predicted; `projected` (n, k) and `counting` (n,) are those of the sample."""
    kernels, posterior = _Kernels(known), _Posterior(known, counting)
    distances = kernels.distances(known)
    components = []
    for k, target in enumerate(projected.T):
        spread = float(np.sqrt(np.average(target**2, weights=axes.weight)))
        theta = posterior.mode(target / spread)
        noise = _noise_variance(theta, counting)
        alone = np.arange(len(target))
        _, left_out = _solve(kernels.covariance(*distances, theta), target / spread, noise, alone)
        skill = _skill(target / spread, left_out, noise)
        if skill > 0:
            components.append(_Component(k, spread, theta, skill))
    return components


def _principal_axes(values: np.ndarray) -> np.ndarray:
    """(k, g) first right singular vectors of (m, g) values, without those of singular values near zero.

    They come from the products of the shorter side: with thousands of genes this is ten times faster than all of them.
    """
    m, g = values.shape
    products = values @ values.T if m <= g else values.T @ values
    size = len(products)
    squares, vectors = eigh(products, subset_by_index=[max(size - _MAX_COMPONENTS, 0), size - 1])
    order = np.argsort(-squares)
    order = order[squares[order] > 1e-12 * max(squares.max(), 1e-300)]
    axes = vectors[:, order].T
    if m <= g:
        axes = axes @ values
        axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    return axes


def _tiles(place: np.ndarray, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Split the plane into tiles with few known spots.

    Yields the spots of a tile, and two sets of positions in `rows` (the known spots): further spots to predict from (the
    nearest to the tile, then random ones), and those in the tile.
    """
    if len(rows) <= _MAX_EXACT:
        yield np.arange(len(place)), np.arange(0), np.arange(len(rows))
        return
    rng = np.random.default_rng(0)
    known = place[rows, :2]
    for inside, own in plane_tiles(place[:, :2], known, size=_TILE_KNOWN):
        outside = np.setdiff1d(np.arange(len(rows)), own, assume_unique=True)
        low, high = known[own].min(axis=0), known[own].max(axis=0)
        gap = np.maximum(np.maximum(low - known[outside], known[outside] - high), 0.0)
        order = np.argsort((gap**2).sum(axis=1), kind="stable")
        n_near = max(_TILE_NEAR - len(own), 0)
        anywhere = order[n_near:][_sample(len(order) - n_near, _TILE_ANYWHERE, rng)]
        yield inside, np.concatenate([outside[order[:n_near]], outside[anywhere]]), own


def _sample(n: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Sorted positions of at most `size` of n."""
    if n <= size:
        return np.arange(max(n, 0))
    return np.sort(rng.choice(n, size, replace=False))


# Logarithms of: variance and length (spacings) of place, variance of the linear and of the Gaussian kernel of the
# image, variance of the noise of all spots and of counting noise. For standardised targets the variances add up to
# about one; the standard deviations let each of them be 20 times smaller or larger.
_PRIOR_MEAN = np.log([0.3, 1.5, 0.15, 0.15, 0.25, 0.25])
_PRIOR_SD = np.array([1.5, 0.7, 1.5, 1.5, 1.5, 1.5])


def _noise_variance(theta: np.ndarray, counting: np.ndarray) -> np.ndarray:
    return np.exp(theta[4]) + np.exp(theta[5]) * counting


class _Kernels:
    """Covariance between any spots and the known ones."""

    def __init__(self, known: _Inputs, image_scale: float | None = None) -> None:
        self.known = known
        if image_scale is None:
            squared = _squared_distances(known.image, known.image).cpu().numpy()
            off_diagonal = squared[np.triu_indices(len(squared), 1)]
            # The median distance is the usual length where features have many dimensions.
            image_scale = max(float(np.median(off_diagonal)) if len(off_diagonal) else 1.0, 1e-12)
        self.image_scale = image_scale

    def around(self, known: _Inputs) -> _Kernels:
        """Return the same kernels between other known spots."""
        return _Kernels(known, self.image_scale)

    def distances(self, spots: _Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Squared distance of place, product of images, Gaussian kernel of images; (n, n_known) each."""
        linear = spots.image @ self.known.image.T
        return _squared_distances(spots.place, self.known.place), linear, self._image_kernel(spots)

    def _image_kernel(self, spots: _Inputs) -> Tensor:
        return _squared_distances(spots.image, self.known.image).mul_(-0.5 / self.image_scale).exp_()

    def predict(self, spots: _Inputs, thetas: list[np.ndarray], weights: np.ndarray) -> np.ndarray:
        """(n, k) covariance with the known spots times `weights` (n_known, k), for kernels with the parameters `thetas`.

        Kernels that the parameters only scale are computed once for all of them.
        """
        duals = torch.as_tensor(weights).to(spots.place)
        linear_size, gaussian_size = torch.as_tensor(np.exp([theta[2:4] for theta in thetas]).T).to(duals)
        result = self._image_kernel(spots) @ (duals * gaussian_size)
        result += spots.image @ (self.known.image.T @ (duals * linear_size))
        squared = _squared_distances(spots.place, self.known.place)
        near = torch.empty_like(squared)
        for k, theta in enumerate(thetas):
            torch.mul(squared, -0.5 / math.exp(2 * theta[1]), out=near).exp_()
            result[:, k] += math.exp(theta[0]) * (near @ duals[:, k])
        return result.cpu().numpy()

    @staticmethod
    def covariance(squared: Tensor, linear: Tensor, gaussian: Tensor, theta: np.ndarray) -> np.ndarray:
        size, length, linear_size, gaussian_size = (float(number) for number in theta[:4])
        result = (squared * (-0.5 / math.exp(2 * length))).add_(size).exp_()
        result.add_(linear, alpha=math.exp(linear_size))
        return result.add_(gaussian, alpha=math.exp(gaussian_size)).cpu().numpy()


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    result = torch.addmm((b**2).sum(dim=1), a, b.T, alpha=-2)
    result += (a**2).sum(dim=1)[:, None]
    return result.clamp_(min=0.0)


class _Posterior:
    """Density of the parameters of a kernel: marginal likelihood of a target, and a broad log-normal prior."""

    def __init__(self, known: _Inputs, counting: np.ndarray) -> None:
        self.rows = np.arange(len(counting))
        if len(counting) > _MAX_FIT:
            self.rows = np.linspace(0, len(counting) - 1, _MAX_FIT).astype(int)
        part = known[self.rows]
        self._squared, *by_image = (kernel.cpu().numpy() for kernel in _Kernels(part).distances(part))
        self._images = np.stack([kernel.ravel() for kernel in by_image])
        self._counting = counting[self.rows]
        # Arrays of the computation: to ask for new ones in each of its hundreds of steps would take as long as the rest.
        self._near, self._work, self._covariance = np.empty((3, *self._squared.shape))

    def mode(self, target: np.ndarray) -> np.ndarray:
        """Parameters of highest density for the (n_known,) target."""
        # A line search may try values so large that exponentials overflow; four standard deviations hold all likely ones.
        bounds = np.column_stack([_PRIOR_MEAN - 4 * _PRIOR_SD, _PRIOR_MEAN + 4 * _PRIOR_SD])
        options = {"maxiter": 60}
        part = target[self.rows]
        return minimize(self._loss, _PRIOR_MEAN, part, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x

    def _loss(self, theta: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray]:
        """Negative logarithm of the density, and its gradient."""
        near, work, covariance = self._near, self._work, self._covariance
        size, length = math.exp(theta[0]), math.exp(2 * theta[1])
        of_images = np.exp(theta[2:4])
        np.exp(np.multiply(self._squared, -0.5 / length, out=near), out=near)
        np.dot(of_images, self._images, out=covariance.reshape(-1))
        covariance += np.multiply(near, size, out=work)
        covariance[np.diag_indices_from(covariance)] += _noise_variance(theta, self._counting)
        triangle, failed = dpotrf(covariance.T, lower=1, overwrite_a=1)
        if failed:
            return 1e10, np.zeros(len(theta))
        alpha = cho_solve((triangle, True), target, check_finite=False)
        value = 0.5 * target @ alpha + np.log(np.diag(triangle)).sum()
        # dpotri inverts in a third of the time of solving for the identity, and fills one half: here the upper one.
        inverse = dpotri(triangle, lower=1, overwrite_c=1)[0].T
        own = np.diag(inverse).copy()
        inverse[np.diag_indices_from(inverse)] *= 0.5
        np.multiply(near, self._squared, out=work)
        traces = [2 * np.vdot(inverse, near), 2 * np.vdot(inverse, work), *(2 * self._images @ inverse.reshape(-1))]
        images = self._images.reshape(2, *near.shape)
        squares = [alpha @ (kernel @ alpha) for kernel in (near, work, *images)]
        pull = np.subtract(traces, squares) * [size, size / length, *of_images]
        noise = own - alpha**2
        by_noise = [noise.sum() * math.exp(theta[4]), noise @ self._counting * math.exp(theta[5])]
        z = (theta - _PRIOR_MEAN) / _PRIOR_SD
        return float(value + 0.5 * z @ z), 0.5 * np.array([*pull, *by_noise]) + z / _PRIOR_SD


def _solve(
    covariance: np.ndarray, target: np.ndarray, noise: np.ndarray, groups: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the known spots, and the prediction of each from those of other groups, (n,) each.

    The covariance is overwritten. Without groups the second array is empty.
    """
    covariance[np.diag_indices_from(covariance)] += noise
    triangle = cholesky(covariance, lower=True, overwrite_a=True)
    dual = cho_solve((triangle, True), target.astype(triangle.dtype))
    if groups is None:
        return dual, np.empty(0)
    (trtri,) = get_lapack_funcs(("trtri",), (triangle,))
    inverse, _ = trtri(triangle, lower=1)
    codes, group = np.unique(groups, return_inverse=True)
    if len(codes) == len(target):  # each spot alone: only the diagonal of the inverse covariance
        return dual, target - dual / np.einsum("ij,ij->j", inverse, inverse)
    left_out = np.empty(len(target))
    for k in range(len(codes)):
        own = np.flatnonzero(group == k)
        columns = inverse[own[0] :, own]  # above them the triangle is empty
        left_out[own] = target[own] - np.linalg.solve(columns.T @ columns, dual[own])
    return dual, left_out


def _skill(target: np.ndarray, left_out: np.ndarray, noise: np.ndarray) -> float:
    """Factor on the prediction, 0-1; 0 if the prediction is not better than the mean.

    The gain in squared error of leave-one-out predictions over the mean must exceed two standard errors. The factor then
    minimises their error. Spots are weighted by the inverse of their noise.
    """
    gain = (target**2 - (target - left_out) ** 2) / noise
    if gain.mean() <= 2 * gain.std() / np.sqrt(len(gain)):
        return 0.0
    skill = (left_out / noise) @ target / ((left_out / noise) @ left_out)
    return float(np.clip(skill, 0.0, 1.0))


def counting_weights(residuals: np.ndarray, counting: np.ndarray) -> np.ndarray:
    """(n,) weights of spots, of mean 1: the inverse of their variance, part of which is counting noise.

    The variance of a log-normalised value is :math:`a + b / N` for a spot of :math:`N` counts. Both parts are fitted to the
    mean squared residual of each spot; all weights are 1 if the residuals do not depend on depth. `residuals` (n, g) are those
    of any prediction that does not contain the noise, e.g. the mean; `counting` (n,) is proportional to :math:`1 / N`, of
    mean 1.

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

    (1, 0) if nothing varies, or if counting alone explains the variance and some spot has no counting noise.
    """
    size = np.zeros(len(residuals))
    for genes in gene_blocks(residuals.shape[1]):
        part = residuals[:, genes]
        size += ((part / np.maximum(part.std(axis=0, dtype=float), 1e-12)) ** 2).sum(axis=1)
    size /= residuals.shape[1]
    constant, slope = nnls(np.column_stack([np.ones(len(size)), counting]), size)[0]
    if not (constant + slope * counting).min() > 0:
        return 1.0, 0.0
    return float(constant), float(slope)
