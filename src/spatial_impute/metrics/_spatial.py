"""Scores of spatial structure: does a predicted gene look like a tissue, or like its blur?"""

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.spatial import cKDTree

_N_NEIGHS = 6  # of a hexagonal lattice
_WINDOW = 7  # grid cells along a window of SSIM, its usual size


def moran_gap(predicted: np.ndarray, true: np.ndarray, xy: np.ndarray) -> float:
    """Difference in Moran's I of predicted and true genes, mean over the genes that vary.

    Measurements carry noise that predictions do not, so a good prediction is smoother than the truth: some gap above 0
    is right. A gap below 0 says that the prediction is rougher than the tissue.

    Parameters
    ----------
    predicted, true
        (n, g) log-normalised.
    xy
        (n, 2) places of the spots in their section, um.

    Examples
    --------
    >>> x, y = np.meshgrid(np.arange(8.0), np.arange(8.0))
    >>> xy = np.column_stack([x.ravel(), y.ravel()])
    >>> noise = np.random.default_rng(0).normal(size=(64, 1))
    >>> moran_gap(xy[:, :1], noise, xy) > 0.5
    True
    """
    import scanpy as sc

    n = len(xy)
    k = min(_N_NEIGHS, n - 1)
    varies = np.ptp(true, axis=0) > 0
    if k < 1 or not varies.any():
        return float("nan")
    _, found = cKDTree(xy).query(xy, k=k + 1)
    rows = np.repeat(np.arange(n), k)
    # The spot itself need not come first where several lie at one place.
    others = found != np.arange(n)[:, None]
    others &= np.cumsum(others, axis=1) <= k
    graph = sparse.csr_matrix((np.ones(n * k), (rows, found[others])), shape=(n, n))

    def structure(values: np.ndarray) -> np.ndarray:
        """Moran's I of each gene; a constant has no structure to speak of: 0."""
        result = np.zeros(values.shape[1])
        moves = np.ptp(values, axis=0) > 0
        if moves.any():
            result[moves] = sc.metrics.morans_i(graph, np.ascontiguousarray(values[:, moves].T, dtype=float))
        return result

    return float(np.mean(structure(predicted[:, varies]) - structure(true[:, varies])))


def structural_similarity(predicted: np.ndarray, true: np.ndarray, xy: np.ndarray) -> float:
    """Structural similarity (SSIM) of predicted and true genes on the lattice of the spots, mean over the genes that vary.

    Spots are put on a square grid with cells of the size of their spacing; gaps take the mean of the gene, and only
    cells with a spot count. Values are scaled to the range of the true gene.

    Parameters
    ----------
    predicted, true
        (n, g) log-normalised.
    xy
        (n, 2) places of the spots in their section, um.

    Returns
    -------
    Up to 1; NaN on grids of less than 7 x 7 cells.
    """
    from skimage.metrics import structural_similarity as ssim

    varies = np.ptp(true, axis=0) > 0
    if len(xy) < 2 or not varies.any():
        return float("nan")
    spacing = np.median(cKDTree(xy).query(xy, k=2)[0][:, 1])
    cell = np.floor((xy - xy.min(axis=0)) / max(spacing, 1e-12)).astype(int)
    shape = tuple(cell.max(axis=0) + 1)
    if min(shape) < _WINDOW or np.prod(shape, dtype=float) > 100 * len(xy):
        return float("nan")
    low, high = true[:, varies].min(axis=0), true[:, varies].max(axis=0)
    grids = []
    for values in (predicted, true):
        scaled = (values[:, varies] - low) / (high - low)
        total, count = np.zeros((*shape, scaled.shape[1])), np.zeros((*shape, 1))
        np.add.at(total, tuple(cell.T), scaled)
        np.add.at(count, tuple(cell.T), 1.0)
        mean = ((true[:, varies] - low) / (high - low)).mean(axis=0)
        grids.append(np.where(count > 0, total / np.maximum(count, 1), mean))
    _, local = ssim(*grids, channel_axis=-1, data_range=1.0, full=True, win_size=_WINDOW)
    return float(local[count[..., 0] > 0].mean())
