"""Linear base of PixNet: ridge regression on encoder maps averaged over the training regions, in closed form."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import nn

    from spatial_impute.models.pixnet._network import PixNetNetwork

_PENALTIES = tuple(float(10.0**k) for k in np.arange(-4, 3.01, 0.5))  # per region, of standardised features
_DECAYS = (0.0, 0.5, 1.0, 1.5, 2.0)  # features that see n times as far are scaled down by n to one of these powers
_MAX_REGIONS = 20_000  # a sample of this size is enough for a regression on hundreds of features
_MAX_REGIONS_FOR_DECAY = 2_000  # each decay needs principal components of its own
_SMALLEST_SPREAD = 1e-6
_N_FOLDS = 5  # of the cross-validation


@dataclass(frozen=True)
class BaseChoice:
    """Settings of a base, chosen by held-out blocks."""

    decay: float  # Power of the extent of a feature by which it is scaled down
    penalty: float
    shrinkage: np.ndarray  # (n_patterns,) 0-1: factor on each pattern of genes


@dataclass(frozen=True)
class Base:
    """Linear maps: features -> components -> genes (standardised)."""

    projection: np.ndarray  # (n_features, n_components), acting on raw features
    offset: np.ndarray  # (n_components,) to subtract
    weights: np.ndarray  # (n_components, n_genes)
    intercept: np.ndarray  # (n_genes,)
    choice: BaseChoice

    def components(self, features: np.ndarray) -> np.ndarray:
        """(n, n_components)."""
        return features @ self.projection - self.offset

    def predict(self, features: np.ndarray) -> np.ndarray:
        """(n, n_genes)."""
        return self.components(features) @ self.weights + self.intercept


@dataclass(frozen=True)
class BaseData:
    """Regions that the base is fitted to."""

    features: np.ndarray  # (n, n_features) means over regions
    target: np.ndarray  # (n, n_genes) standardised expression
    slide: np.ndarray  # (n,) slide of each region
    block: np.ndarray  # (n,) block of neighbouring regions; blocks are not split in cross-validation

    def take(self, rows: np.ndarray) -> BaseData:
        return BaseData(self.features[rows], self.target[rows], self.slide[rows], self.block[rows])


def fit_base(
    data: BaseData,
    *,
    n_components: int,
    within: np.ndarray | float = 0.0,
    extent: np.ndarray | float = 1.0,
    choice: BaseChoice | None = None,
    seed: int = 0,
) -> Base:
    """Ridge regression on principal components, with shrinkage of gene patterns, around the mean of each slide.

    The image predicts a few patterns that many noisy genes share: the principal components of the fitted values. Each
    pattern is multiplied by the factor that is best on held-out blocks, which removes weak patterns
    :cite:p:`Breiman1997`. Penalty and factors come from the same cross-validation, or from `choice`.

    Slides differ in level (stain, sequencing depth) for technical reasons. Therefore the regression is within slides.

    Features are scaled by their variation over the cells of the map, to which `within` (n_features,) adds the mean variance
    over the cells of a region. Features of single nuclei average out within a region. Scaled by their small variation over
    regions, they would enter the map at full strength, as noise.

    `extent` (n_features,) is how far each feature sees. Most features are means and spreads over wide windows. Where genes
    depend on the nuclei of a place, they are noise that hides the few fine features; elsewhere they are more informative.
    Held-out blocks choose the power of the extent by which features are scaled down, if that is better by more than chance.
    """
    rng = np.random.default_rng(seed)
    data = _sample(data, _MAX_REGIONS, rng)
    if choice is None:
        few = _sample(data, _MAX_REGIONS_FOR_DECAY, rng)
        decays = _DECAYS if np.ptp(extent) else (0.0,)
        tried = [_choose(few, _project(few, n_components, within, extent, decay)[1], decay, seed) for decay in decays]
        decay = _better_decay({found.decay: error for found, error in tried}, few.block)
    else:
        decay = choice.decay
    projection, t = _project(data, n_components, within, extent, decay)
    if choice is None:
        choice, _ = _choose(data, t, decay, seed)
    weights = _ridge(t, _centre_by(data.target, data.slide), choice.penalty)
    patterns = _patterns(t @ weights)[:, : len(choice.shrinkage)]
    weights = weights @ (patterns * choice.shrinkage[: patterns.shape[1]]) @ patterns.T
    offset = data.features.mean(axis=0) @ projection
    if pad := n_components - projection.shape[1]:
        projection = np.pad(projection, ((0, 0), (0, pad)))
        offset, weights = np.pad(offset, (0, pad)), np.pad(weights, ((0, pad), (0, 0)))
    return Base(projection, offset, weights, data.target.mean(axis=0), choice)


def _sample(data: BaseData, n: int, rng: np.random.Generator) -> BaseData:
    """At most `n` regions, in double precision."""
    if len(data.features) > n:
        data = data.take(np.sort(rng.choice(len(data.features), n, replace=False)))
    return replace(data, features=np.asarray(data.features, np.float64), target=np.asarray(data.target, np.float64))


def _project(
    data: BaseData, n_components: int, within: np.ndarray | float, extent: np.ndarray | float, decay: float
) -> tuple[np.ndarray, np.ndarray]:
    """Principal components of the scaled features: (n_features, rank) that act on raw features, and (n, rank) their values."""
    centred = _centre_by(data.features, data.slide)
    spread = np.sqrt(centred.var(axis=0) + within)
    largest = np.abs(data.features).max(initial=0)
    spread[spread < _SMALLEST_SPREAD * max(1.0, largest)] = np.inf  # constant features have no effect
    spread *= (np.asarray(extent, np.float64) / np.min(extent)) ** decay
    z = centred / spread
    size = np.sqrt(max((z**2).mean(), 1e-300))  # penalties are per unit of variance of the means
    z /= size
    _, s, vt = np.linalg.svd(z, full_matrices=False)
    rank = max(1, min(n_components, int((s > 1e-8 * s.max(initial=1e-300)).sum()), len(z) - 1))
    v = vt[:rank].T
    return v / (size * spread)[:, None], z @ v


def _ridge(t: np.ndarray, y: np.ndarray, penalty: float) -> np.ndarray:
    gram = t.T @ t + penalty * len(t) * np.eye(t.shape[1])
    return np.linalg.solve(gram, t.T @ y)


def _patterns(fitted: np.ndarray) -> np.ndarray:
    """(n_genes, rank) principal directions of fitted values, the strongest first."""
    return np.linalg.svd(fitted, full_matrices=False)[2].T


def _choose(data: BaseData, t: np.ndarray, decay: float, seed: int) -> tuple[BaseChoice, np.ndarray]:
    """Penalty with the lowest error on held-out blocks, and its shrinkage; (n,) errors of the regions, up to a constant each."""
    y = _centre_by(data.target, data.slide)
    names, block = np.unique(data.block, return_inverse=True)
    n_folds = min(_N_FOLDS, len(names))
    n_patterns = min(y.shape[1], *t.shape)
    best = BaseChoice(decay, 1.0, np.ones(n_patterns)), np.full(len(y), np.inf)
    if n_folds < 2:
        return best  # no comparison possible: as much penalty as variance
    fold = (np.random.default_rng(seed).permutation(len(names)) % n_folds)[block]  # the same for all decays
    for penalty in _PENALTIES:
        product, square = np.zeros((len(y), n_patterns)), np.zeros((len(y), n_patterns))
        for k in range(n_folds):
            out = fold == k
            weights = _ridge(t[~out], y[~out], penalty)
            patterns = _patterns(t[~out] @ weights)[:, :n_patterns]
            predicted = t[out] @ weights @ patterns
            n = patterns.shape[1]
            product[out, :n], square[out, :n] = predicted * (y[out] @ patterns), predicted**2
        shrinkage = _decreasing(product.sum(axis=0), square.sum(axis=0))
        error = square @ shrinkage**2 - 2 * product @ shrinkage
        if error.sum() < best[1].sum():
            best = BaseChoice(decay, float(penalty), shrinkage), error
    return best


def _better_decay(errors: dict[float, np.ndarray], block: np.ndarray) -> float:
    """Decay with the lowest error, if the blocks show that it is better than none by more than two standard errors."""
    best = min(errors, key=lambda decay: errors[decay].sum())
    if best == 0.0:
        return best
    _, code = np.unique(block, return_inverse=True)
    gain = np.bincount(code, errors[0.0] - errors[best])
    return best if gain.mean() > 2 * gain.std() / np.sqrt(len(gain)) else 0.0


def _decreasing(product: np.ndarray, square: np.ndarray) -> np.ndarray:
    """Least-squares factors in 0-1 that do not increase from a stronger pattern to a weaker one."""
    from sklearn.isotonic import isotonic_regression

    weight = np.maximum(square, 1e-12 * square.max(initial=1e-12))
    return isotonic_regression(product / weight, sample_weight=weight, y_min=0.0, y_max=1.0, increasing=False)


def _centre_by(values: np.ndarray, group: np.ndarray) -> np.ndarray:
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
        for module in network.base:
            convolution = cast("nn.Conv2d", module)
            stop = start + convolution.in_channels
            convolution.weight.copy_(torch.from_numpy(base.projection[start:stop].T.copy())[:, :, None, None])
            if convolution.bias is not None:  # only the first one has a bias
                convolution.bias.copy_(torch.from_numpy(-base.offset))
            start = stop
        network.head.weight[:, : network.n_base] = torch.from_numpy(base.weights.T.copy())[:, :, None, None]
        network.head_bias.copy_(torch.from_numpy(base.intercept))


def standardise_decoder(network: PixNetNetwork, features: np.ndarray, within: np.ndarray) -> None:
    """Let the decoder read the channels of all maps around 0, with a mean variance of 1 over the cells of the regions.

    All channels are divided by the same number. On a scale of its own, each coarse map and each channel with little
    variation would count as much as those that show the nuclei, and would be learned by heart.
    """
    decoder = network.decoder
    n = len(decoder.mean)  # the maps come first, then their windows
    mean = features[:, :n].mean(axis=0)
    spread = float(np.sqrt((features[:, :n].var(axis=0) + within[:n]).mean()))
    with torch.no_grad():
        decoder.mean.copy_(torch.from_numpy(mean))
        decoder.spread.fill_(max(spread, _SMALLEST_SPREAD * float(np.abs(mean).max())))
