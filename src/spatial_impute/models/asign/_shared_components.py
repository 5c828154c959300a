"""Components of image features on which registered sections agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scipy import sparse

_MAX_COMPONENTS = 64  # more than some hundred measured spots can tell apart
_MAX_FITTED = 20_000  # spots whose principal components stand for those of all


def agreeing_components(
    features: np.ndarray, weights: sparse.csr_matrix, section: np.ndarray, *, seed: int = 0
) -> np.ndarray:
    r"""Principal components of the features, scaled by how well neighbouring sections agree on them.

    Serial sections show the same tissue twice. What a feature says about the tissue is found again at the same place of
    the next section; stain, focus and the cut of single nuclei are not. The variance of each component is therefore
    multiplied by its correlation across the edges between sections, :math:`\rho = \sum w_{ij} u_i u_j / \sum w_{ij}
    u_i^2`. Expression plays no part.

    Parameters
    ----------
    features
        (n, d), standardised within sections.
    weights
        (n, n) weights of the 3D graph, symmetric.
    section
        (n,) section of each spot.
    seed
        Seed of the choice of spots and of the randomised decomposition of large stacks.

    Returns
    -------
    (n, k) components; without edges between sections they are the plain principal components.
    """
    from sklearn.utils.extmath import randomized_svd

    n = len(features)
    rows = np.arange(n)
    if n > _MAX_FITTED:
        rows = np.sort(np.random.default_rng(seed).choice(n, _MAX_FITTED, replace=False))
    centre = features[rows].mean(axis=0, dtype=float)
    k = min(_MAX_COMPONENTS, *features[rows].shape)
    _, _, axes = randomized_svd(features[rows] - centre, k, random_state=seed)
    axes = axes.astype(features.dtype)  # without a copy of all features in another precision
    components = features @ axes.T
    components -= centre @ axes.T
    coo = weights.tocoo()
    between = section[coo.row] != section[coo.col]
    if not between.any():
        return components
    row, column, weight = coo.row[between], coo.col[between], coo.data[between]
    agreement = np.empty(k)
    for j, u in enumerate(components.T):
        alike, size = weight @ (u[row] * u[column]), weight @ (u[row] ** 2)
        agreement[j] = max(alike / size, 0.0) if size > 0 else 0.0
    if not agreement.any():
        return components
    components *= np.sqrt(agreement)
    return components
