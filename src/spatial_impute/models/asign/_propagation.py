"""Clamped label propagation on a sparse graph :cite:p:`Zhu2002`."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from spatial_impute._settings import logger

_MAX_VALUES = 20_000_000  # solved for at a time: 160 MB an array


def propagate(
    weights: sparse.csr_matrix,
    known: np.ndarray,
    values: np.ndarray,
    *,
    leak: float = 3.6,
    tolerance: float = 1e-8,
    max_iterations: int = 2000,
    dtype: type = np.float64,
) -> tuple[np.ndarray, np.ndarray]:
    r"""Spread known values over a graph until they converge.

    Each unknown spot takes the weighted mean of its neighbours; known spots keep their values. A share
    :math:`\lambda / (d_i + \lambda)` of every step (:math:`d_i` the weighted degree) is lost, so that values from far
    away or over weak edges count less. Numerator and mass are propagated in the same way and divided at the end:

    .. math:: m_i = \frac{\sum_j w_{ij} m_j}{d_i + \lambda}, \qquad f_i = \frac{\sum_j w_{ij} m_j f_j}{\sum_j w_{ij} m_j}

    With ``leak=0`` this is the harmonic solution.

    Parameters
    ----------
    weights, known, values
        (n, n) non-negative weights; (n,) bool; (n_known, g).
    leak
        :math:`\lambda`, in units of edge weight (1 is an edge to a spot at the same place). The default is the weight of
        six neighbours at a distance of one spacing, so that a mass of one half means: measured spots have as much weight
        as the neighbours on the same section.
    tolerance, max_iterations
        Residual, relative to the right-hand side, at which to stop; maximum number of conjugate gradient steps per gene.
    dtype
        Precision of the returned values; the computation has double precision.

    Returns
    -------
    values
        (n, g); known rows as given, NaN if no known spot is connected.
    mass
        (n,) in 0-1: weight of the known values in a spot. 1 at known spots, 0 if no known spot is connected.

    Examples
    --------
    >>> path = sparse.csr_matrix(np.diag([1.0, 1.0], 1) + np.diag([1.0, 1.0], -1))
    >>> values, mass = propagate(path, np.array([True, False, True]), np.array([[1.0], [3.0]]), leak=0.0)
    >>> float(values[1, 0])
    2.0
    """
    n = len(known)
    known = np.asarray(known, dtype=bool)
    weights = sparse.csr_matrix(weights, dtype=np.float64)
    reachable = _reachable(weights, known)
    unknown = np.flatnonzero(reachable & ~known)
    values = np.asarray(values, dtype=np.float64)
    result: np.ndarray = np.full((n, values.shape[1]), np.nan, dtype)
    mass = np.zeros(n)
    result[known], mass[known] = values, 1.0
    if not len(unknown) or not values.size:
        return result, mass

    degree = np.asarray(weights.sum(axis=1)).ravel()[unknown] + leak
    system = sparse.diags(degree) - weights[unknown][:, unknown]
    # Values are centred, so that rounding errors and the tolerance are relative to their range.
    centre = values.mean(axis=0)
    scale = max(float(np.abs(values - centre).max()), 1e-300)
    system, from_known = system.tocsr(), weights[unknown][:, np.flatnonzero(known)]

    def solve(columns: np.ndarray) -> np.ndarray:
        return _conjugate_gradients(system, from_known @ columns, degree, tolerance, max_iterations)

    reached = np.clip(solve(np.ones((len(values), 1))), np.finfo(float).tiny, 1.0)
    mass[unknown] = reached[:, 0]
    # Some genes at a time: the solver holds six arrays as large as its result.
    n_genes = max(1, _MAX_VALUES // len(unknown))
    for start in range(0, values.shape[1], n_genes):
        genes = slice(start, start + n_genes)
        result[unknown, genes] = solve((values[:, genes] - centre[genes]) / scale) / reached * scale + centre[genes]
    return result, mass


def _conjugate_gradients(
    system: sparse.csr_matrix, source: np.ndarray, diagonal: np.ndarray, tolerance: float, max_iterations: int
) -> np.ndarray:
    """Solve a symmetric positive definite system for all columns at once, preconditioned by its diagonal."""
    solution = source / diagonal[:, None]
    residual = source - system @ solution
    direction = residual / diagonal[:, None]
    rho = (residual * direction).sum(axis=0)
    target = tolerance * np.maximum(np.linalg.norm(source, axis=0), np.finfo(float).tiny)
    for _ in range(max_iterations):
        active = np.linalg.norm(residual, axis=0) > target
        if not active.any():
            return solution
        image = system @ direction
        curvature = (direction * image).sum(axis=0)
        step = np.where(active & (curvature > 0), rho / np.where(curvature > 0, curvature, 1.0), 0.0)
        solution += step * direction
        residual -= step * image
        scaled = residual / diagonal[:, None]
        following = (residual * scaled).sum(axis=0)
        direction = scaled + np.where(rho > 0, following / np.where(rho > 0, rho, 1.0), 0.0) * direction
        rho = following
    logger.warning("Label propagation stopped after %d steps before it converged", max_iterations)
    return solution


def _reachable(weights: sparse.csr_matrix, known: np.ndarray) -> np.ndarray:
    """(n,) bool: spots in a connected component with a known spot."""
    positive = weights.copy()
    positive.data = (positive.data > 0).astype(float)
    positive.eliminate_zeros()
    _, component = sparse.csgraph.connected_components(positive, directed=False)
    return np.isin(component, np.unique(component[known]))
