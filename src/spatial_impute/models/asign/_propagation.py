"""Clamped label propagation on a sparse graph :cite:p:`Zhu2002`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import sparse
from scipy.linalg import cho_factor, cho_solve

from spatial_impute._expression import gene_blocks
from spatial_impute._settings import logger

if TYPE_CHECKING:
    from torch import Tensor

_LEAK = 3.6
_MAX_VALUES = 1_000_000  # solved for at a time: arrays of 8 MB, which stay in the cache
_TOLERANCE = {np.dtype(np.float64): 1e-8, np.dtype(np.float32): 1e-6}  # residual relative to the right-hand side
_MAX_STEPS = 2000  # of conjugate gradients
_NO_MASS = 1e-7  # below this, mass is rounding error


def propagate(
    weights: sparse.csr_matrix,
    known: np.ndarray,
    values: np.ndarray,
    *,
    leak: float = _LEAK,
    dtype: type = np.float64,
    device: str = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    r"""Spread known values over a graph until they converge.

    Each unknown spot takes the weighted mean of its neighbors; known spots keep their values. A share
    :math:`\lambda / (d_i + \lambda)` of every step (:math:`d_i` the weighted degree) is lost, so that values from far
    away or over weak edges count less. Numerator and mass are propagated in the same way and divided at the end:

    .. math:: m_i = \frac{\sum_j w_{ij} m_j}{d_i + \lambda}, \qquad f_i = \frac{\sum_j w_{ij} m_j f_j}{\sum_j w_{ij} m_j}

    With ``leak=0`` this is the harmonic solution. `leak` is :math:`\lambda`, in units of edge weight (1 is an edge to a
    spot at the same place). The default is the weight of six neighbors at a distance of one spacing, so that a mass of
    one half means: measured spots have as much weight as the neighbors on the same section.

    Shapes: (n, n) non-negative weights, (n,) bool, (n_known, g) -> (n, g) values, NaN if no known spot is connected, and
    (n,) mass in 0-1: weight of the known values in a spot, 1 at known spots and 0 if none is connected.

    Examples
    --------
    >>> path = sparse.csr_matrix(np.diag([1.0, 1.0], 1) + np.diag([1.0, 1.0], -1))
    >>> values, mass = propagate(path, np.array([True, False, True]), np.array([[1.0], [3.0]]), leak=0.0)
    >>> float(values[1, 0])
    2.0
    """
    n = len(known)
    known = np.asarray(known, dtype=bool)
    weights = sparse.csr_matrix(weights, dtype=dtype)
    reachable = _reachable(weights, known)
    unknown = np.flatnonzero(reachable & ~known)
    values = np.asarray(values, dtype=dtype)
    result: np.ndarray = np.full((n, values.shape[1]), np.nan, dtype)
    mass = np.zeros(n)
    result[known], mass[known] = values, 1.0
    if not len(unknown) or not values.size:
        return result, mass

    system, degree = _system(weights, unknown, leak)
    # Values are centred, so that rounding errors are relative to their range.
    centre = values.mean(axis=0)
    largest = max((values.max(axis=0) - centre).max(), (centre - values.min(axis=0)).max())
    scale = max(float(largest), float(np.finfo(dtype).tiny))
    from_known = weights[unknown][:, np.flatnonzero(known)]

    def solve(columns: np.ndarray) -> np.ndarray:
        return _conjugate_gradients(system, from_known @ columns, degree, device)

    reached = np.clip(solve(np.ones((len(values), 1), dtype)), np.finfo(dtype).tiny, 1.0)
    mass[unknown] = reached[:, 0]
    # Some genes at a time: the solver holds six arrays as large as its result.
    n_genes = max(1, _MAX_VALUES // len(unknown))
    for start in range(0, values.shape[1], n_genes):
        genes = slice(start, start + n_genes)
        result[unknown, genes] = solve((values[:, genes] - centre[genes]) / scale) / reached * scale + centre[genes]
    return result, mass


@dataclass(frozen=True)
class KnownGraph:
    """Graph between the known spots that propagates among them as the whole graph does.

    All other spots are eliminated from the system of equations. A fit hides dozens of groups of known spots; each then costs
    one small dense solution instead of one for all spots of the stack.
    """

    matrix: np.ndarray  # (n_known, n_known) Schur complement of the system

    @classmethod
    def of(cls, weights: sparse.csr_matrix, known: np.ndarray, *, device: str = "cpu") -> KnownGraph:
        """Eliminate the spots that are not known from a graph; see :func:`propagate`."""
        weights = sparse.csr_matrix(weights, dtype=np.float32)
        rows, others = np.flatnonzero(known), np.flatnonzero(~known)
        matrix = _system(weights, rows, _LEAK)[0].toarray().astype(np.float64)
        if len(others):
            system, degree = _system(weights, others, _LEAK)
            to_known = weights[rows][:, others]
            n_columns = max(1, _MAX_VALUES // len(others))
            for start in range(0, len(rows), n_columns):
                part = slice(start, start + n_columns)
                found = _conjugate_gradients(system, to_known[part].T.toarray(), degree, device)
                matrix[:, part] -= to_known @ found
        return cls((matrix + matrix.T) / 2)

    def hide(self, hidden: np.ndarray) -> KnownGraph:
        """Eliminate some known spots as well; `hidden` is (n_known,) bool."""
        between = self.matrix[np.ix_(hidden, ~hidden)]
        found = cho_solve(cho_factor(self.matrix[np.ix_(hidden, hidden)]), between)
        rest = self.matrix[np.ix_(~hidden, ~hidden)]
        rest -= between.T @ found
        return KnownGraph(rest)

    def propagate(self, hidden: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values (m, g) and mass (m,) of hidden known spots from the values of the others, (n_known - m, g).

        Values are NaN where the mass is zero.
        """
        from_others = -self.matrix[np.ix_(hidden, ~hidden)]
        # Weights are few beside values of all genes.
        weights = cho_solve(cho_factor(self.matrix[np.ix_(hidden, hidden)]), from_others)
        mass = np.clip(weights.sum(axis=1), 0.0, 1.0)
        mass[mass < _NO_MASS] = 0.0
        with np.errstate(divide="ignore", invalid="ignore"):
            weights /= mass[:, None]
        weights[mass == 0] = np.nan
        weights = weights.astype(values.dtype, copy=False)
        found = np.empty((len(weights), values.shape[1]), values.dtype)
        for genes in gene_blocks(values.shape[1]):
            part = values[:, genes]
            centre = part.mean(axis=0)
            found[:, genes] = weights @ (part - centre) + centre
        return found, mass


def _system(weights: sparse.csr_matrix, rows: np.ndarray, leak: float) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Matrix of the equations of some spots, and its diagonal."""
    degree = (np.asarray(weights.sum(axis=1)).ravel()[rows] + leak).astype(weights.dtype)
    return (sparse.diags(degree) - weights[rows][:, rows]).tocsr(), degree


def _conjugate_gradients(
    system: sparse.csr_matrix, source: np.ndarray, diagonal: np.ndarray, device: str
) -> np.ndarray:
    """Solve a symmetric positive definite system for all columns at once, preconditioned by its diagonal."""
    matrix = _on_device(system, device)
    rhs, scale = torch.as_tensor(source, device=device), torch.as_tensor(1.0 / diagonal, device=device)[:, None]
    solution = rhs * scale
    residual = rhs - matrix @ solution
    direction = residual * scale
    rho = (residual * direction).sum(dim=0)
    target = _TOLERANCE[source.dtype] * rhs.norm(dim=0).clamp(min=torch.finfo(rhs.dtype).tiny)
    for _ in range(_MAX_STEPS):
        active = residual.norm(dim=0) > target
        if not active.any():
            return solution.cpu().numpy()
        image = matrix @ direction
        curvature = (direction * image).sum(dim=0)
        step = torch.where(active & (curvature > 0), rho / curvature, 0.0)
        solution.addcmul_(direction, step)
        residual.addcmul_(image, step, value=-1)
        scaled = residual * scale
        following = (residual * scaled).sum(dim=0)
        direction = torch.addcmul(scaled, direction, torch.where(rho > 0, following / rho, 0.0), out=direction)
        rho = following
    logger.warning("Label propagation stopped after %d steps before it converged", _MAX_STEPS)
    return solution.cpu().numpy()


def _on_device(system: sparse.csr_matrix, device: str) -> Tensor:
    """A sparse matrix of torch, which wants the columns of a row in order."""
    system = system.sorted_indices()
    first, column, values = (
        torch.as_tensor(part, device=device) for part in (system.indptr, system.indices, system.data)
    )
    with warnings.catch_warnings():  # the format is new in torch; only a product is used here
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(first, column, values, size=system.shape, check_invariants=True)


def _reachable(weights: sparse.csr_matrix, known: np.ndarray) -> np.ndarray:
    """(n,) bool: spots in a connected component with a known spot."""
    positive = weights.copy()
    positive.data = (positive.data > 0).astype(float)
    positive.eliminate_zeros()
    _, component = sparse.csgraph.connected_components(positive, directed=False)
    return np.isin(component, np.unique(component[known]))
