"""Fit of PixNet: the linear base in closed form, the decoder by gradient steps, and the weights of both."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from spatial_impute._io.workers import suitable_threads
from spatial_impute.models.pixnet._base import Base, BaseData, fit_base, set_base, standardise_decoder
from spatial_impute.models.pixnet._crops import TrainingSlide, held_out_blocks
from spatial_impute.models.pixnet._held_out import Evaluation, RegionLoss, evaluate
from spatial_impute.models.pixnet._network import PixNetNetwork, build_network, receptive_halo
from spatial_impute.models.pixnet._slide import Slide, Tiling
from spatial_impute.models.pixnet._tiles import read_regions
from spatial_impute.models.pixnet._training import FitSettings, crop_settings, held_out_crops, train

if TYPE_CHECKING:
    from spatial_impute.encoders._pyramids import Pyramid
    from spatial_impute.models.pixnet._tiles import Stage

_SOFTPLUS_ONE = math.log(math.e - 1)  # where softplus is 1
_MAX_BASE_REGIONS = 20_000  # per entry; see `fit_base`


@dataclass(frozen=True)
class FittedPixNet:
    """Result of a fit."""

    network: PixNetNetwork  # In evaluation mode; its head gives the units of the expression
    history: pd.DataFrame
    penalty: float  # Penalty of the base
    held_out: pd.Series  # (n_genes,) Pearson correlation on the held-out regions, mean over slides


def fit(slides: list[TrainingSlide], pyramid: Pyramid, var_names: list[str], settings: FitSettings) -> FittedPixNet:
    """Fit the network on regions of one or several slides, of one or several sizes; held-out regions are among them."""
    params, seed = settings.params, settings.seed
    counts = params.loss != "mse+pcc"
    with torch.random.fork_rng(devices=[]):  # the random state of the user does not change
        torch.default_generator.manual_seed(seed)
        network = build_network(
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
        base = LinearBase.fit(network, slides, held_out, settings, halo)
        slides = base.slides
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
    penalty = float("nan") if base is None else base.fitted.choice.penalty
    return FittedPixNet(network, history, penalty, pd.Series(r, index=var_names))


def _evaluate(
    network: PixNetNetwork, watched: list[TrainingSlide], settings: FitSettings, *, base_alone: bool
) -> Evaluation:
    """Evaluate the final network on the held-out regions."""
    loss = RegionLoss(settings.params.loss, network.head.out_channels, settings.params.correlation_weight)
    size = crop_settings(network, watched, settings.params)
    windows = held_out_crops(network, watched, size, replace(settings, seed=0))
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
    slides: list[TrainingSlide]  # The slides with the prediction of the base for held-out regions; NaN for the others

    @classmethod
    def fit(
        cls,
        network: PixNetNetwork,
        slides: list[TrainingSlide],
        held_out: list[np.ndarray],
        settings: FitSettings,
        halo: int,
    ) -> LinearBase:
        """Fit the base on the regions that are not held out, and write it into the network."""
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
        return cls(base, data, within, with_base)

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
