"""Fit of PixNet: the linear base in closed form, the decoder by gradient steps, and the weights of both."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, cast

import numpy as np
import pandas as pd
import torch

from spatial_impute._io.workers import suitable_threads
from spatial_impute.models.pixnet._crops import CropSettings, TrainingSlide, held_out_blocks
from spatial_impute.models.pixnet._held_out import Evaluation, RegionLoss, cut_windows, evaluate
from spatial_impute.models.pixnet._network import PixNetNetwork, receptive_halo
from spatial_impute.models.pixnet._tiles import Slide, Tiling, read_regions
from spatial_impute.models.pixnet._training import FitSettings, train

if TYPE_CHECKING:
    from torch import nn

    from spatial_impute.encoders._pyramids import Pyramid
    from spatial_impute.models.pixnet._tiles import Stage

_SOFTPLUS_ONE = math.log(math.e - 1)  # where softplus is 1
_MAX_BASE_REGIONS = 20_000  # per entry; see `fit_base`


@dataclass(frozen=True)
class FittedPixNet:
    """Result of a fit."""

    network: PixNetNetwork  # In evaluation mode; its head gives the units of the expression
    history: pd.DataFrame
    penalty: float | None  # Penalty of the base, if there is one
    held_out: pd.Series  # (n_genes,) Pearson correlation on the held-out regions, mean over slides


def fit(slides: list[TrainingSlide], pyramid: Pyramid, var_names: list[str], settings: FitSettings) -> FittedPixNet:
    """Fit the network on regions of one or several slides, of one or several sizes; held-out regions are among them."""
    params, seed = settings.params, settings.seed
    counts = params.loss != "mse+pcc"
    with torch.random.fork_rng(devices=[]):  # the random state of the user does not change
        torch.default_generator.manual_seed(seed)
        network = PixNetNetwork(
            copy.deepcopy(pyramid),
            params,
            n_genes=len(var_names),
            n_base=0 if counts else params.n_base,
            rates=counts,
            resolution=settings.resolution,
        ).to(settings.device)
    network.precision = settings.precision
    halo = receptive_halo(network)  # refuses an encoder that cannot be read tile by tile, before anything is trained
    network.pyramid.requires_grad_(params.encoder_learning_rate > 0)
    on_step = settings.progress(params.n_steps)
    held_out = held_out_blocks(slides, params.held_out_fraction, seed)
    slides, centre, scale = _standardise(slides, counts=counts)
    base: LinearBase | None = None
    if counts:
        with torch.no_grad():
            network.scale.copy_(torch.from_numpy(scale))
            network.head_bias.fill_(_SOFTPLUS_ONE)
    elif params.n_base:
        base, slides = LinearBase.fit(network, slides, held_out, settings, halo)
    training = [s.take(~rows) for s, rows in zip(slides, held_out, strict=True)]
    training = [s for s in training if len(s.regions)]
    watched = [s.take(rows) for s, rows in zip(slides, held_out, strict=True) if rows.any()]
    if base is not None and not watched:  # nothing can show that a decoder helps
        settings = replace(settings, params=replace(params, n_steps=0))
    r, weights = np.full(len(var_names), np.nan), None
    with suitable_threads(params.n_crops * (params.crop // network.stride) ** 2, params.width):
        history, best = train(network, training, watched, settings, on_step)
        network.load_state_dict(best)
        network.eval()
        if watched:
            kept = int(history.loc[history["kept"], "step"].iloc[0])
            found = _evaluate(network, watched, settings, base_alone=base is not None and kept == 0)
            r, weights = found.r, found.weights
    if base is not None:
        base.finish(network, weights, settings)
    if not counts:
        _fold_scale_into_head(network, centre, scale)
    network.requires_grad_(False)
    network.precision = "float32"  # of a prediction: its caller chooses
    penalty = None if base is None else base.fitted.choice.penalty
    return FittedPixNet(network, history, penalty, pd.Series(r, index=var_names))


def _evaluate(
    network: PixNetNetwork, watched: list[TrainingSlide], settings: FitSettings, *, base_alone: bool
) -> Evaluation:
    """Evaluate the final network on the held-out regions."""
    loss = RegionLoss(settings.params.loss, network.head.out_channels, settings.params.correlation_weight)
    crop_settings = CropSettings.of(network, watched, settings.params)
    windows = cut_windows(network, watched, crop_settings, settings.params, seed=0, device=settings.device)
    return evaluate(network, windows, loss.to(settings.device), settings.device, base_alone=base_alone)


def _standardise(slides: list[TrainingSlide], *, counts: bool) -> tuple[list[TrainingSlide], np.ndarray, np.ndarray]:
    """Log values to mean 0 and variance 1 per gene; counts do not change, and their scale is the mean count per um^2."""
    if counts:
        area = sum(float(s.area_um2.sum()) for s in slides)
        total = np.sum([s.expression.sum(axis=0) for s in slides], axis=0)
        return slides, np.zeros_like(total), np.maximum(total, 1.0) / area
    # All entries have the same weight, so that millions of bins do not outweigh a few hundred spots.
    centre = np.mean([s.expression.mean(axis=0) for s in slides], axis=0)
    scale = np.sqrt(np.mean([((s.expression - centre) ** 2).mean(axis=0) for s in slides], axis=0))
    scale = np.maximum(scale, 1e-3)
    return [replace(s, expression=(s.expression - centre) / scale) for s in slides], centre, scale


@dataclass(frozen=True)
class LinearBase:
    """Base of a network, fitted to the training regions of all slides."""

    fitted: Base
    data: BaseData  # All regions that were read, including held-out ones
    within: np.ndarray  # (n_features,) mean variance of the features over the cells of a region

    @classmethod
    def fit(
        cls,
        network: PixNetNetwork,
        slides: list[TrainingSlide],
        held_out: list[np.ndarray],
        settings: FitSettings,
        halo: int,
    ) -> tuple[LinearBase, list[TrainingSlide]]:
        """Fit the base on the regions that are not held out, and write it into the network.

        Also returns the slides with its prediction for the held-out regions; NaN for the others.
        """
        rng = np.random.default_rng(settings.seed)
        network.eval()

        def region_means(
            slide: TrainingSlide, stage: Stage, n_channels: int, *, squares: bool = False
        ) -> tuple[np.ndarray, np.ndarray]:
            tiling = Tiling.of_network(network, slide.image.shape, settings.tile_size, halo)
            tiled = Slide(slide.image, slide.stain, tiling)
            sums, n_pixels = read_regions(network, stage, tiled, slide.regions, n_channels, squares=squares)
            return sums / np.maximum(n_pixels, 1)[:, None], n_pixels > 0

        parts, variances, trained, read = [], [], [], []
        for slide, out in zip(slides, held_out, strict=True):
            rows = np.arange(len(slide.regions))
            if len(rows) > _MAX_BASE_REGIONS:
                rows = np.sort(rng.choice(rows, _MAX_BASE_REGIONS, replace=False))
            means, seen = region_means(slide.take(rows), network.levels, 2 * network.n_levels, squares=True)
            mean, square = np.split(means[seen], 2, axis=1)
            rows = rows[seen]
            block = slide.block[rows] + 10**12 * slide.slide
            parts.append(BaseData(mean, slide.expression[rows], np.full(len(rows), slide.slide), block))
            variances.append(np.maximum(square - mean**2, 0))
            trained.append(~out[rows])
            read.append(rows)
        data = BaseData(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(BaseData)))
        within = np.concatenate(variances).mean(axis=0)
        training = data.take(np.concatenate(trained))
        extent = network.extent
        base = fit_base(training, n_components=network.n_base, within=within, extent=extent, seed=settings.seed)
        set_base(network, base)
        standardise_decoder(network, training.features, within)
        with_base = []
        for slide, rows, part, out in zip(slides, read, parts, held_out, strict=True):
            if len(rows) == len(slide.regions):
                components = base.components(part.features[out])
            else:  # only a sample was read for the regression
                components, _ = region_means(slide.take(out), network.base_features, network.n_base)
            found = np.full(slide.expression.shape, np.nan, np.float32)
            found[out] = components @ base.weights + base.intercept
            with_base.append(replace(slide, base=found))
        return cls(base, data, within), with_base

    def finish(self, network: PixNetNetwork, weights: np.ndarray | None, settings: FitSettings) -> None:
        """Fit the base to all regions with the same settings, and write its weighted sum with the decoder into the head.

        `weights` (n_genes, 2) are those of base and decoder; None is the base alone.
        """
        full = fit_base(
            self.data,
            n_components=network.n_base,
            within=self.within,
            extent=network.extent,
            choice=self.fitted.choice,
            seed=settings.seed,
        )
        if weights is None:
            weights = np.tile([1.0, 0.0], (len(full.intercept), 1))
        of_base, of_decoder = (torch.from_numpy(part.copy()).to(network.head.weight) for part in weights.T)
        bias_of_decoder = network.head_bias.detach().clone()
        set_base(network, full)
        with torch.no_grad():
            network.head.weight[:, : network.n_base].mul_(of_base[:, None, None, None])
            network.head.weight[:, network.n_base :].mul_(of_decoder[:, None, None, None])
            network.head_bias.mul_(of_base).add_(of_decoder * bias_of_decoder)


def _fold_scale_into_head(network: PixNetNetwork, centre: np.ndarray, scale: np.ndarray) -> None:
    """Change the head from standardised values to the units of the expression."""
    with torch.no_grad():
        factor = torch.from_numpy(scale).to(network.head.weight)
        network.head.weight.mul_(factor[:, None, None, None])
        network.head_bias.mul_(factor).add_(torch.from_numpy(centre).to(factor))


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
    block: np.ndarray  # (n,) block of neighboring regions; blocks are not split in cross-validation

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

    All channels are divided by the same number. With a scale for each, coarse maps and channels with little variation
    would count as much as those that show the nuclei, and the decoder would overfit to them.
    """
    decoder = network.decoder
    n = len(decoder.mean)  # the maps come first, then their windows
    mean = features[:, :n].mean(axis=0)
    spread = float(np.sqrt((features[:, :n].var(axis=0) + within[:n]).mean()))
    with torch.no_grad():
        decoder.mean.copy_(torch.from_numpy(mean))
        decoder.spread.fill_(max(spread, _SMALLEST_SPREAD * float(np.abs(mean).max())))
