"""The base of PixNet: ridge regression on encoder maps averaged over the training regions, in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from spatial_impute.models.pixnet._network import PixNetNetwork

_PENALTIES = tuple(10.0**k for k in np.arange(-4, 3.01, 0.5))  # per region, of standardised features
_MAX_REGIONS = 20_000  # of millions of bins a sample settles a regression on hundreds of features
_SMALLEST_SPREAD = 1e-6


@dataclass(frozen=True)
class Base:
    """Linear maps: features -> components -> genes (standardised)."""

    projection: np.ndarray
    """(n_features, n_components), acting on raw features."""
    offset: np.ndarray
    """(n_components,) to subtract."""
    weights: np.ndarray
    """(n_components, n_genes)."""
    intercept: np.ndarray
    """(n_genes,)."""
    penalty: float
    shrinkage: np.ndarray
    """(n_patterns,) 0-1: how far each pattern of genes that follows the image could be trusted on held-out blocks."""

    def components(self, features: np.ndarray) -> np.ndarray:
        """(n, n_components)."""
        return features @ self.projection - self.offset

    def predict(self, features: np.ndarray) -> np.ndarray:
        """(n, n_genes)."""
        return self.components(features) @ self.weights + self.intercept


def fit_base(
    features: np.ndarray,
    target: np.ndarray,
    slide: np.ndarray,
    block: np.ndarray,
    *,
    n_components: int,
    within: np.ndarray | float = 0.0,
    choice: tuple[float, np.ndarray] | None = None,
    n_folds: int = 5,
    seed: int = 0,
) -> Base:
    """Ridge regression on principal components with shrunken patterns of genes, slide by slide about its own mean.

    What the image tells of hundreds of noisy genes is a few patterns that they share: the principal components of the
    fitted values. Each is shrunken by what it is worth on held-out blocks, which multiplies the weak ones by zero
    :cite:p:`Breiman1997`. Penalty and shrinkage come from the same cross-validation.

    Slides differ in level (stain, depth of sequencing) for reasons that are not in the tissue; what is learned is how
    expression follows the image within a slide.

    Features are penalised by their spread over the cells of the map, not by that over regions. Those of single nuclei
    average out within a region: what is left of them is small, and a regression that first brought it to the size of the
    others would write their full strength into the map, where it is noise.

    Parameters
    ----------
    features
        (n, n_features) means over regions.
    target
        (n, n_genes) standardised expression.
    slide
        (n,) slide of each region.
    block
        (n,) block of neighbouring regions; blocks stay together when the penalty is chosen.
    n_components
        Most components kept.
    within
        (n_features,) mean variance of the features over the cells of a region.
    choice
        Penalty per region, and shrinkage; chosen by cross-validation over blocks by default.
    n_folds
        Of that cross-validation.
    seed
        Seed of the folds, and of the sample of regions where there are very many.
    """
    rng = np.random.default_rng(seed)
    if len(features) > _MAX_REGIONS:
        kept = np.sort(rng.choice(len(features), _MAX_REGIONS, replace=False))
        features, target, slide, block = features[kept], target[kept], slide[kept], block[kept]
    x = np.asarray(features, dtype=np.float64)
    y = np.asarray(target, dtype=np.float64)
    x_centred, y_centred = centre_by(x, slide), centre_by(y, slide)
    spread = np.sqrt(x_centred.var(axis=0) + within)
    spread[spread < _SMALLEST_SPREAD * max(1.0, np.abs(x).max(initial=0))] = np.inf  # constant features say nothing
    z = x_centred / spread
    spread *= np.sqrt(max((z**2).mean(), 1e-300))  # penalties are per unit of variance of the means
    z = x_centred / spread
    _, s, vt = np.linalg.svd(z, full_matrices=False)
    rank = max(1, min(n_components, int((s > 1e-8 * s.max(initial=1e-300)).sum()), len(z) - 1))
    v = vt[:rank].T
    t = z @ v
    penalty, shrinkage = choice or _choose(t, y_centred, block, n_folds, rng)
    weights = _ridge(t, y_centred, penalty)
    patterns = _patterns(t @ weights)[:, : len(shrinkage)]
    weights = weights @ (patterns * shrinkage[: patterns.shape[1]]) @ patterns.T
    projection = v / spread[:, None]
    offset = x.mean(axis=0) @ projection
    if rank < n_components:
        pad = n_components - rank
        projection = np.pad(projection, ((0, 0), (0, pad)))
        offset, weights = np.pad(offset, (0, pad)), np.pad(weights, ((0, pad), (0, 0)))
    return Base(projection, offset, weights, y.mean(axis=0), penalty, shrinkage)


def _ridge(t: np.ndarray, y: np.ndarray, penalty: float) -> np.ndarray:
    gram = t.T @ t + penalty * len(t) * np.eye(t.shape[1])
    return np.linalg.solve(gram, t.T @ y)


def _patterns(fitted: np.ndarray) -> np.ndarray:
    """(n_genes, rank) principal directions of fitted values, the strongest first."""
    return np.linalg.svd(fitted, full_matrices=False)[2].T


def _choose(
    t: np.ndarray, y: np.ndarray, block: np.ndarray, n_folds: int, rng: np.random.Generator
) -> tuple[float, np.ndarray]:
    """Penalty with the lowest error on held-out blocks, and the shrinkage that goes with it."""
    names, block = np.unique(block, return_inverse=True)
    n_folds = min(n_folds, len(names))
    n_patterns = min(y.shape[1], *t.shape)
    if n_folds < 2:
        return 1.0, np.ones(n_patterns)  # nothing to compare on: as much penalty as variance
    fold = (rng.permutation(len(names)) % n_folds)[block]
    best, best_error = None, np.inf
    for penalty in _PENALTIES:
        product, square = np.zeros(n_patterns), np.zeros(n_patterns)
        for k in range(n_folds):
            out = fold == k
            weights = _ridge(t[~out], y[~out], penalty)
            patterns = _patterns(t[~out] @ weights)
            predicted, true = t[out] @ weights @ patterns, y[out] @ patterns
            n = min(n_patterns, patterns.shape[1])
            product[:n] += (predicted * true).sum(axis=0)[:n]
            square[:n] += (predicted**2).sum(axis=0)[:n]
        shrinkage = _decreasing(product, square)
        error = float((shrinkage**2 * square - 2 * shrinkage * product).sum())  # up to a constant
        if error < best_error:
            best, best_error = (penalty, shrinkage), error
    return best


def _decreasing(product: np.ndarray, square: np.ndarray) -> np.ndarray:
    """Least-squares factors in 0-1 that do not grow from a stronger pattern to a weaker one."""
    from sklearn.isotonic import isotonic_regression

    weight = np.maximum(square, 1e-12 * square.max(initial=1e-12))
    return isotonic_regression(product / weight, sample_weight=weight, y_min=0.0, y_max=1.0, increasing=False)


def centre_by(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Subtract the mean of each group of rows."""
    _, code = np.unique(group, return_inverse=True)
    count = np.bincount(code)
    total = np.zeros((len(count), values.shape[1]))
    np.add.at(total, code, values)
    return values - (total / count[:, None])[code]


def set_base(network: PixNetNetwork, base: Base) -> None:
    """Write a base into the network: its projection into the 1x1 convolutions, its weights into the head."""
    start = 0
    with torch.no_grad():
        for i, convolution in enumerate(network.base):
            stop = start + convolution.in_channels
            weight = torch.from_numpy(base.projection[start:stop].T.copy())[:, :, None, None]
            convolution.weight.copy_(weight)
            if i == 0:
                convolution.bias.copy_(torch.from_numpy(-base.offset))
            start = stop
        network.head.weight[:, : network.n_base] = torch.from_numpy(base.weights.T.copy())[:, :, None, None]
        network.head.bias.copy_(torch.from_numpy(base.intercept))
