"""Fit PixNet: the linear base in closed form, then the decoder by gradient steps on crops, stopped by held-out regions."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from spatial_impute._logging import logger
from spatial_impute._scores import pearson_by_gene
from spatial_impute.models._checkpoints import load_checkpoint, save_checkpoint
from spatial_impute.models.asign._graph_inputs import suitable_threads
from spatial_impute.models.pixnet._base import fit_base, set_base
from spatial_impute.models.pixnet._crops import (
    Crop,
    TrainingSlide,
    cover,
    crop_size,
    held_out_blocks,
    make_crop,
    random_crop,
)
from spatial_impute.models.pixnet._loss import RegionLoss
from spatial_impute.models.pixnet._network import PixNetNetwork, receptive_halo
from spatial_impute.models.pixnet._tiles import Slide, Tiling, read_regions

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from spatial_impute.encoders._pyramids import Pyramid
    from spatial_impute.models._params import PixNetParams

_SOFTPLUS_ONE = float(np.log(np.e - 1))  # where softplus is 1
_MAX_BASE_REGIONS = 20_000  # per entry; see `fit_base`
_MAX_HELD_OUT_CROPS = 24  # to look at; more would cost longer than the steps between
_MIN_REGIONS = 8  # per batch: a correlation over fewer regions says nothing


@dataclass(frozen=True)
class FittedPixNet:
    """What training leaves."""

    network: PixNetNetwork
    """In evaluation mode; its head speaks in the units of the expression."""
    history: pd.DataFrame
    penalty: float
    """Of the base."""
    held_out: pd.Series
    """(n_genes,) Pearson correlation on the held-out regions, mean over slides."""


def fit(
    slides: list[TrainingSlide],
    pyramid: Pyramid,
    params: PixNetParams,
    *,
    resolution: float,
    var_names: list[str],
    core: int,
    seed: int,
    device: str,
    checkpoint: Path | None,
    fingerprint: dict[str, Any],
    progress: Callable[[int], Callable[[], None]],
) -> FittedPixNet:
    """Fit the network on regions of one or several slides, of one or several sizes.

    Parameters
    ----------
    slides
        Training data; held-out regions are chosen among them.
    pyramid
        Encoder.
    params
        Settings.
    resolution
        um per pixel of the slides.
    var_names
        Genes.
    core
        Tile size in px for the pass over the slides.
    seed
        Seed: same seed, same network.
    device
        Torch device.
    checkpoint
        Directory to save the state of training to, and to take it up from.
    fingerprint
        What a checkpoint must agree with.
    progress
        Given the number of steps to come, returns what to call after each.
    """
    counts = params.loss != "mse+pcc"
    torch.manual_seed(seed)
    network = PixNetNetwork(
        copy.deepcopy(pyramid),
        n_genes=len(var_names),
        width=params.width,
        n_base=0 if counts else params.n_base,
        context=context_px(params, resolution),
        norm=params.norm,
        delta=params.delta,
        finest=params.finest_stride,
        rates=counts,
    ).to(device)
    network.pyramid.requires_grad_(params.encoder_learning_rate > 0)
    tick = progress(params.n_steps)
    out = held_out_blocks(slides, params.held_out_fraction, seed)
    slides, centre, scale = _standardise(slides, counts=counts)
    penalty, refit = float("nan"), None
    if counts:
        with torch.no_grad():
            network.scale.copy_(torch.from_numpy(scale))
            network.head.bias.fill_(_SOFTPLUS_ONE)
    elif params.n_base:
        slides, penalty, refit = _install_base(network, slides, out, core=core, seed=seed)
    train = [s.take(~o) for s, o in zip(slides, out, strict=True)]
    train = [s for s in train if len(s.regions)]
    watched = [s.take(o) for s, o in zip(slides, out, strict=True) if o.any()]
    n_cells = params.n_crops * (params.crop // network.stride) ** 2
    with suitable_threads(n_cells, params.width):
        history, best = _train(
            network,
            train,
            watched,
            params,
            seed=seed,
            device=device,
            checkpoint=checkpoint,
            fingerprint=fingerprint,
            tick=tick,
        )
        network.load_state_dict(best)
        network.eval()
        held_out = _held_out_r(network, watched, params, device) if watched else np.full(len(var_names), np.nan)
    if refit is not None:
        refit()  # the regions held out so far help the base as well; its size is settled
    if not counts:
        _speak_in_units(network, centre, scale)
    network.requires_grad_(False)
    return FittedPixNet(network, history, penalty, pd.Series(held_out, index=var_names))


def _standardise(slides: list[TrainingSlide], *, counts: bool) -> tuple[list[TrainingSlide], np.ndarray, np.ndarray]:
    """Log values to mean 0 and variance 1 per gene; counts stay, and their scale is the mean count per um^2."""
    if counts:
        area = sum(float(_area_um(s).sum()) for s in slides)
        total = np.sum([s.expression.sum(axis=0) for s in slides], axis=0)
        return slides, np.zeros_like(total), np.maximum(total, 1.0) / area
    # Entries count alike, so that millions of bins do not decide for a few hundred spots.
    centre = np.mean([s.expression.mean(axis=0) for s in slides], axis=0)
    scale = np.sqrt(np.mean([((s.expression - centre) ** 2).mean(axis=0) for s in slides], axis=0))
    scale = np.maximum(scale, 1e-3)
    return [replace(s, expression=(s.expression - centre) / scale) for s in slides], centre, scale


def _area_um(slide: TrainingSlide) -> np.ndarray:
    """(n,) areas of regions in um^2."""
    return slide.regions.area * abs(np.linalg.det(slide.image.to_um[:2, :2]))


def _install_base(
    network: PixNetNetwork,
    slides: list[TrainingSlide],
    out: list[np.ndarray],
    *,
    core: int,
    seed: int,
) -> tuple[list[TrainingSlide], float, Callable[[], None]]:
    """Fit the base on the training regions.

    Returns
    -------
    The slides with what the base predicts, its penalty, and what refits it on all regions.
    """
    halo = receptive_halo(network)
    rng = np.random.default_rng(seed)
    features, within, target, image, block, held_out, read = [], [], [], [], [], [], []
    network.eval()

    def means(
        slide: TrainingSlide, stage: Callable[..., Tensor], n_channels: int, **how: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        tiled = Slide(slide.image, slide.stain, make_tiling(network, slide.image.shape, core, halo))
        sums, n_pixels = read_regions(network, stage, tiled, slide.regions, n_channels, **how)
        return sums / np.maximum(n_pixels, 1)[:, None], n_pixels > 0

    for slide, o in zip(slides, out, strict=True):
        rows = np.arange(len(slide.regions))
        if len(rows) > _MAX_BASE_REGIONS:
            rows = np.sort(rng.choice(rows, _MAX_BASE_REGIONS, replace=False))
        found, seen = means(slide.take(rows), network.levels, 2 * network.n_levels, in_part=True, squares=True)
        found, square = np.split(found[seen], 2, axis=1)
        features.append(found)
        within.append(np.maximum(square - found**2, 0))
        target.append(slide.expression[rows][seen])
        image.append(np.full(seen.sum(), slide.slide))
        block.append(slide.block[rows][seen] + 10**12 * slide.slide)
        held_out.append(o[rows][seen])
        read.append(rows[seen])
    arrays = [np.concatenate(a) for a in (features, target, image, block)]
    kept = ~np.concatenate(held_out)
    varied = np.concatenate(within).mean(axis=0)
    base = fit_base(*(a[kept] for a in arrays), n_components=network.n_base, within=varied, seed=seed)
    set_base(network, base)
    with_base = []
    for slide, rows, found in zip(slides, read, features, strict=True):
        if len(rows) == len(slide.regions):
            components = base.components(found)
        else:  # only a sample was read for the regression
            components, _ = means(slide, lambda rgb: network.base_features(network.encode(rgb)), network.n_base)
        with_base.append(replace(slide, base=(components @ base.weights).astype(np.float32)))

    def refit() -> None:
        """Same penalty and the decoder's share untouched: what the decoder adds is refitted around."""
        choice = base.penalty, base.shrinkage
        full = fit_base(*arrays, n_components=network.n_base, within=varied, choice=choice, seed=seed)
        bias = network.head.bias.detach().clone() - torch.from_numpy(base.intercept).to(network.head.bias)
        set_base(network, full)
        with torch.no_grad():
            network.head.bias += bias

    return with_base, base.penalty, refit


def context_px(params: PixNetParams, resolution: float) -> tuple[float, ...]:
    """Windows of the base in px."""
    return tuple(window / resolution for window in params.context_um)


def make_tiling(network: PixNetNetwork, shape: tuple[int, int], core: int, halo: int) -> Tiling:
    """Tiling of an image whose cores are `core` px, rounded up to the network's coarsest cell."""
    multiple = network.multiple
    return Tiling(*shape, -(-core // multiple) * multiple, halo, network.stride, multiple)


def _speak_in_units(network: PixNetNetwork, centre: np.ndarray, scale: np.ndarray) -> None:
    """Fold the standardisation into the head."""
    with torch.no_grad():
        factor = torch.from_numpy(scale).to(network.head.weight)
        network.head.weight.mul_(factor[:, None, None, None])
        network.head.bias.mul_(factor).add_(torch.from_numpy(centre).to(factor))


def predict_crops(network: PixNetNetwork, maps: list[Tensor], drawn: list[tuple[TrainingSlide, Crop]]) -> Tensor:
    """(n_regions, n_genes) of all crops of a batch, from the encoder's maps; the base is that of the whole slide."""
    stencils = [crop.stencil for _, crop in drawn]
    grids = network.genes(network.combine(maps)) if network.rates else network.decoder(maps)
    n, c, height, width = grids.shape
    table = grids.movedim(1, -1).reshape(n * height * width, c)
    cells = np.concatenate([s.cells + k * height * width for k, s in enumerate(stencils)])
    lengths = np.concatenate([np.diff(s.start) for s in stencils])
    start = np.cumsum(lengths) - lengths
    n_pixels = np.concatenate([s.n_pixels for s in stencils])
    sums = F.embedding_bag(
        torch.from_numpy(cells).to(table.device),
        table,
        torch.from_numpy(start).to(table.device),
        mode="sum",
        per_sample_weights=torch.from_numpy(np.concatenate([s.weights for s in stencils])).to(table),
    )
    means = sums / torch.from_numpy(n_pixels).to(table)[:, None]
    if network.rates:
        areas = np.concatenate([_area_um(entry)[crop.rows] for entry, crop in drawn])
        return means * torch.from_numpy(areas).to(table)[:, None]
    correction = network.correction(means)
    if not network.n_base:
        return correction
    base = np.concatenate([entry.base[crop.rows] for entry, crop in drawn])
    return torch.from_numpy(base).to(correction) + correction


@dataclass
class _Watch:
    """Held-out regions of one window, with the maps of the encoder where it does not change."""

    entry: TrainingSlide
    crop: Crop
    owned: np.ndarray
    maps: list[Tensor] | None


def _watch(
    network: PixNetNetwork, entries: list[TrainingSlide], params: PixNetParams, *, size: int, seed: int, device: str
) -> list[_Watch]:
    windows = [(entry, center, rows) for entry in entries for center, rows in cover(entry, size, params.margin)]
    if len(windows) > _MAX_HELD_OUT_CROPS:
        kept = np.random.default_rng(seed).choice(len(windows), _MAX_HELD_OUT_CROPS, replace=False)
        windows = [windows[k] for k in np.sort(kept)]
    found = []
    for entry, center, rows in windows:
        crop = make_crop(entry, center, size, network.stride, margin=params.margin, max_regions=params.max_regions)
        owned = np.isin(crop.rows, rows)
        maps = None
        if params.encoder_learning_rate == 0:
            with torch.no_grad():
                maps = network.encode(crop.rgb[None].to(device))
        found.append(_Watch(entry, crop, owned, maps))
    return found


@dataclass(frozen=True)
class _Seen:
    """What the held-out regions say."""

    loss: float
    r: np.ndarray
    """(n_genes,) per-gene correlation, mean over slides."""
    error: np.ndarray
    """(n_blocks,) mean squared error of each held-out block."""

    def surely_better_than(self, other: _Seen) -> bool:
        """Whether the error fell by more than its standard error over blocks."""
        fell = other.error - self.error
        return len(fell) < 2 or fell.mean() > fell.std(ddof=1) / np.sqrt(len(fell))


def _look(network: PixNetNetwork, watch: list[_Watch], loss: RegionLoss, device: str) -> _Seen:
    """Loss, correlation and error on the held-out regions, by slide and size, then mean."""
    network.eval()
    predicted, true, block = {}, {}, {}
    with torch.no_grad():
        for w in watch:
            maps = network.encode(w.crop.rgb[None].to(device)) if w.maps is None else w.maps
            values = predict_crops(network, maps, [(w.entry, w.crop)])[torch.from_numpy(w.owned).to(device)]
            key = (w.entry.slide, len(w.entry.regions))
            predicted.setdefault(key, []).append(values)
            true.setdefault(key, []).append(w.entry.expression[w.crop.rows][w.owned])
            block.setdefault(key, []).append(w.entry.block[w.crop.rows][w.owned])
        losses, correlations, errors = [], [], []
        for key, values in predicted.items():
            p, t = torch.cat(values), torch.from_numpy(np.concatenate(true[key])).to(values[0])
            losses.append(float(loss(p, t)))
            correlations.append(pearson_by_gene(p.cpu().numpy(), t.cpu().numpy()))
            _, code = np.unique(np.concatenate(block[key]), return_inverse=True)
            error = (p - t).square().mean(dim=1).cpu().numpy()
            errors.append(np.bincount(code, error) / np.bincount(code))
    return _Seen(float(np.mean(losses)), _nanmean(np.stack(correlations)), np.concatenate(errors))


def _nanmean(values: np.ndarray) -> np.ndarray:
    known = np.isfinite(values)
    total = np.where(known, values, 0.0).sum(axis=0)
    return np.where(known.any(axis=0), total / np.maximum(known.sum(axis=0), 1), np.nan)


def _held_out_r(network: PixNetNetwork, watched: list[TrainingSlide], params: PixNetParams, device: str) -> np.ndarray:
    size = crop_size(watched, params.crop, params.margin, network.multiple)
    loss = RegionLoss(params.loss, network.head.out_channels, params.correlation_weight).to(device)
    return _look(network, _watch(network, watched, params, size=size, seed=0, device=device), loss, device).r


def _train(
    network: PixNetNetwork,
    slides: list[TrainingSlide],
    watched: list[TrainingSlide],
    params: PixNetParams,
    *,
    seed: int,
    device: str,
    checkpoint: Path | None,
    fingerprint: dict[str, Any],
    tick: Callable[[], None],
) -> tuple[pd.DataFrame, dict[str, Tensor]]:
    """Gradient steps; returns the history and the best state on the held-out regions."""
    size = crop_size(slides + watched, params.crop, params.margin, network.multiple)
    loss = RegionLoss(params.loss, network.head.out_channels, params.correlation_weight).to(device)
    trained_encoder = params.encoder_learning_rate > 0
    groups = [
        {"params": [*network.decoder.parameters(), *network.head.parameters(), *loss.parameters()]},
    ]
    if trained_encoder:
        groups.append({"params": list(network.pyramid.parameters()), "lr": params.encoder_learning_rate})
    optimizer = torch.optim.Adam(groups, lr=params.learning_rate, weight_decay=params.weight_decay)
    watch = _watch(network, watched, params, size=size, seed=seed, device=device)
    freeze = _frozen_head(network)
    start = _look(network, watch, loss, device) if watch else None

    rows: list[dict[str, float]] = []
    best, best_loss, best_step, first = _state(network), np.inf, 0, 1
    if checkpoint is not None and (found := load_checkpoint(checkpoint, fingerprint)) is not None:
        network.load_state_dict(found.network)
        optimizer.load_state_dict(found.restore_optimizer(optimizer))
        loss.load_state_dict(found.loss)
        rows, best = found.history, found.best
        best_step = int(max((r for r in rows if r["kept"]), key=lambda r: r["step"])["step"])
        best_loss = next(r["held_out_loss"] for r in rows if r["step"] == best_step)
        first = int(rows[-1]["step"]) + 1
        logger.info("Training taken up at step %d", first)
    elif watch:
        best_loss = start.loss
        rows.append(_row(0, np.nan, best_loss, start.r, kept=True))
    for _ in range(first - 1):
        tick()
    source = _Source(network, slides, params, size=size, seed=seed, device=device)
    last_losses = []
    for step in range(first, params.n_steps + 1):
        if watch and (rows[-1]["step"] - best_step) >= params.patience * params.n_steps_per_check:
            break
        value = _step(network, source, loss, optimizer, step)
        freeze()
        tick()
        if value is None:
            continue
        if not np.isfinite(value):
            msg = f"The loss became {value} at step {step}; lower `learning_rate` ({params.learning_rate:g})."
            raise ValueError(msg)
        last_losses.append(value)
        if step % params.n_steps_per_check and step != params.n_steps:
            continue
        held_out_loss, r, kept = np.nan, np.array([np.nan]), True
        if watch:
            seen = _look(network, watch, loss, device)
            held_out_loss, r = seen.loss, seen.r
            # The base is a strong start: what looks better than it by chance is not.
            kept = held_out_loss < best_loss and (not network.n_base or seen.surely_better_than(start))
        if kept:
            best, best_loss, best_step = _state(network), held_out_loss, step
        rows.append(_row(step, float(np.mean(last_losses)), held_out_loss, r, kept=kept))
        last_losses = []
        if checkpoint is not None:
            save_checkpoint(checkpoint, fingerprint, network, optimizer=optimizer, loss=loss, history=rows, best=best)
    history = pd.DataFrame(rows, columns=["step", "loss", "held_out_loss", "held_out_r", "kept"])
    history["kept"] = history["step"] == best_step
    return history, best


@dataclass
class _Drawn:
    """A training crop; with the maps of the encoder in place of the image, where it does not change."""

    entry: TrainingSlide
    crop: Crop
    maps: list[Tensor] | None = None


class _Source:
    """Where batches come from: a pool of encoded crops, or new crops in every step."""

    def __init__(
        self,
        network: PixNetNetwork,
        slides: list[TrainingSlide],
        params: PixNetParams,
        *,
        size: int,
        seed: int,
        device: str,
    ) -> None:
        self.network, self.slides, self.params = network, slides, params
        self.size, self.seed, self.device = size, seed, device
        self.trained = params.encoder_learning_rate > 0
        self.pool: list[_Drawn] = []
        if not self.trained and params.n_steps:
            rng = np.random.default_rng([seed, 0])
            for _ in range(params.n_cached_crops):
                drawn = self._draw(rng)
                if len(drawn.crop.rows):
                    # Half precision: what is lost is far below the noise of augmentation.
                    drawn.maps = [m.half() for m in self._encode([drawn])]
                    drawn.crop = replace(drawn.crop, rgb=drawn.crop.rgb[:, :0, :0])
                    self.pool.append(drawn)

    def _draw(self, rng: np.random.Generator) -> _Drawn:
        p = self.params
        which, crop = random_crop(
            self.slides,
            self.size,
            self.network.stride,
            margin=p.margin,
            max_regions=p.max_regions,
            flips=p.flips,
            stain_jitter=p.stain_jitter,
            rng=rng,
        )
        return _Drawn(self.slides[which], crop)

    def _encode(self, drawn: list[_Drawn]) -> list[Tensor]:
        with torch.set_grad_enabled(self.trained):
            return self.network.encode(torch.stack([d.crop.rgb for d in drawn]).to(self.device))

    def batch(self, step: int) -> tuple[list[_Drawn], list[Tensor]]:
        """Crops of a step and their maps; each step draws from its own generator, so that training can be taken up."""
        rng = np.random.default_rng([self.seed, step])
        if self.pool:
            chosen = rng.choice(len(self.pool), min(self.params.n_crops, len(self.pool)), replace=False)
            drawn = [self.pool[k] for k in chosen]
            return drawn, [torch.cat(maps).float() for maps in zip(*(d.maps for d in drawn), strict=True)]
        drawn = [d for d in (self._draw(rng) for _ in range(self.params.n_crops)) if len(d.crop.rows)]
        return drawn, self._encode(drawn) if drawn else []


def _step(
    network: PixNetNetwork, source: _Source, loss: RegionLoss, optimizer: torch.optim.Optimizer, step: int
) -> float | None:
    """One batch; None if it holds too few regions."""
    network.train()
    drawn, maps = source.batch(step)
    if sum(len(d.crop.rows) for d in drawn) < _MIN_REGIONS:
        return None
    device = source.device
    true = torch.from_numpy(np.concatenate([d.entry.expression[d.crop.rows] for d in drawn])).float().to(device)
    value = loss(predict_crops(network, maps, [(d.entry, d.crop) for d in drawn]), true)
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    return float(value.detach())


def _frozen_head(network: PixNetNetwork) -> Callable[[], None]:
    """Return what puts the head's weights on the base back after a step: gradient steps move the decoder's only."""
    if not network.n_base:
        return lambda: None
    before = network.head.weight.detach()[:, : network.n_base].clone()

    def restore() -> None:
        with torch.no_grad():
            network.head.weight[:, : network.n_base] = before

    return restore


def _state(network: PixNetNetwork) -> dict[str, Tensor]:
    return {key: value.detach().cpu().clone() for key, value in network.state_dict().items()}


def _row(step: int, loss: float, held_out_loss: float, r: np.ndarray, *, kept: bool) -> dict[str, float]:
    known = r[np.isfinite(r)]
    return {
        "step": step,
        "loss": loss,
        "held_out_loss": held_out_loss,
        "held_out_r": float(known.mean()) if len(known) else float("nan"),
        "kept": bool(kept),  # of NumPy, after a step that was better: not JSON, in which a checkpoint keeps it
    }
