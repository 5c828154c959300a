"""Training of the decoder of PixNet by gradient steps on crops, stopped by held-out regions."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spatial_impute._scores import pearson_by_gene
from spatial_impute._settings import logger
from spatial_impute.models._spots import given
from spatial_impute.models._storage import Checkpoint, load_checkpoint, save_checkpoint, tensors_below
from spatial_impute.models.asign._training import correlation_loss
from spatial_impute.models.pixnet._crops import (
    Crop,
    CropSettings,
    TrainingSlide,
    cover,
    crop_size,
    make_crop,
    random_crop,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from spatial_impute.models._params import PixNetParams
    from spatial_impute.models.pixnet._network import PixNetNetwork

_CHECKPOINT = "state.safetensors"
_MAX_HELD_OUT_CROPS = 24  # more would take longer than the steps between two checks
_MIN_REGIONS = 8  # per batch: the correlation of fewer regions has no meaning
_SMALLEST_RATE = 1e-8  # counts; keeps the logarithm finite


@dataclass(frozen=True)
class FitSettings:
    """Settings of a fit."""

    params: PixNetParams
    resolution: float  # um per pixel of the slides
    tile_size: int  # Tile size in px for the pass over the slides
    seed: int
    device: str
    progress: Callable[[int], Callable[[], None]]  # Takes the number of steps; returns the function to call after each
    checkpoint: Path | None = None  # Directory for the state of the training
    fingerprint: dict[str, Any] = field(default_factory=dict)  # Content that a checkpoint must have been made from


class RegionLoss(nn.Module):
    """Loss of predicted regions (n, n_genes): ``"mse+pcc"`` (squared error and correlation), ``"poisson"``, or ``"nb"``.

    For counts `predicted` is the expected count; the negative binomial learns a dispersion for each gene.
    """

    def __init__(self, kind: str, n_genes: int, correlation_weight: float) -> None:
        super().__init__()
        self.kind, self.correlation_weight = kind, correlation_weight
        self.log_dispersion = nn.Parameter(torch.zeros(n_genes)) if kind == "nb" else None

    def forward(self, predicted: Tensor, true: Tensor) -> Tensor:
        """Mean over regions and genes."""
        if self.kind == "mse+pcc":
            return (predicted - true).square().mean() + self.correlation_weight * correlation_loss(predicted, true)
        rate = predicted.clamp_min(_SMALLEST_RATE)
        if self.log_dispersion is None:
            return (rate - true * rate.log()).mean()
        total = self.log_dispersion.exp()  # number of failures r: variance is rate + rate^2 / r
        likelihood = (
            torch.lgamma(true + total)
            - torch.lgamma(total)
            - torch.lgamma(true + 1)
            + total * (total.log() - (total + rate).log())
            + true * (rate.log() - (total + rate).log())
        )
        return -likelihood.mean()


def predict_crops(network: PixNetNetwork, maps: list[Tensor], crops: list[Crop]) -> Tensor:
    """(n_regions, n_genes) of all crops of a batch, from the maps of the encoder and the base of the whole slides."""
    stencils = [crop.stencil for crop in crops]
    grids = network.genes(network.combine(maps)) if network.rates else network.decoder(maps)
    n, c, height, width = grids.shape
    table = grids.movedim(1, -1).reshape(n * height * width, c)
    cells = np.concatenate([s.cells + k * height * width for k, s in enumerate(stencils)])
    lengths = np.concatenate([np.diff(s.start) for s in stencils])
    n_pixels = np.concatenate([s.n_pixels for s in stencils])
    sums = F.embedding_bag(
        torch.from_numpy(cells).to(table.device),
        table,
        torch.from_numpy(np.cumsum(lengths) - lengths).to(table.device),
        mode="sum",
        per_sample_weights=torch.from_numpy(np.concatenate([s.weights for s in stencils])).to(table),
    )
    means = sums / torch.from_numpy(n_pixels).to(table)[:, None]
    if network.rates:
        areas = np.concatenate([crop.slide.area_um2[crop.rows] for crop in crops])
        return means * torch.from_numpy(areas).to(table)[:, None]
    correction = network.correction(means)
    if not network.n_base:
        return correction
    base = np.concatenate([given(crop.slide.base)[crop.rows] for crop in crops])
    return torch.from_numpy(base).to(correction) + correction


@dataclass(frozen=True)
class HeldOutCrop:
    """Held-out regions of one window."""

    crop: Crop
    owned: np.ndarray  # (n_rows,) bool: regions that are evaluated in this window and in no other
    maps: list[Tensor] | None  # Maps of the encoder, if it is not trained


def held_out_crops(network: PixNetNetwork, slides: list[TrainingSlide], settings: FitSettings) -> list[HeldOutCrop]:
    """Windows that cover the held-out regions; a sample if there are many."""
    return _cut_windows(network, slides, settings, crop_settings(network, slides, settings.params))


def crop_settings(network: PixNetNetwork, slides: list[TrainingSlide], params: PixNetParams) -> CropSettings:
    """Settings of crops that are large enough for the regions of these slides."""
    size = crop_size(slides, params.crop, params.margin, network.multiple)
    return CropSettings(size, network.stride, params.margin, params.max_regions)


def _cut_windows(
    network: PixNetNetwork, slides: list[TrainingSlide], settings: FitSettings, size: CropSettings
) -> list[HeldOutCrop]:
    windows = [(slide, *window) for slide in slides for window in cover(slide, size.size, size.margin)]
    if len(windows) > _MAX_HELD_OUT_CROPS:
        kept = np.random.default_rng(settings.seed).choice(len(windows), _MAX_HELD_OUT_CROPS, replace=False)
        windows = [windows[k] for k in np.sort(kept)]
    found = []
    for slide, center, rows in windows:
        crop = make_crop(slide, center, size)
        maps = None
        if settings.params.encoder_learning_rate == 0:
            with torch.no_grad():
                maps = network.encode(crop.rgb[None].to(settings.device))
        found.append(HeldOutCrop(crop, np.isin(crop.rows, rows), maps))
    return found


@dataclass(frozen=True)
class Evaluation:
    """Errors on the held-out regions."""

    loss: float
    r: np.ndarray  # (n_genes,) correlation of each gene, mean over slides
    block_error: np.ndarray  # (n_blocks,) mean squared error of each held-out block

    def significantly_better_than(self, other: Evaluation) -> bool:
        """True if the error is lower by more than its standard error over blocks."""
        gain = other.block_error - self.block_error
        return len(gain) < 2 or gain.mean() > gain.std(ddof=1) / np.sqrt(len(gain))


def evaluate(network: PixNetNetwork, windows: list[HeldOutCrop], loss: RegionLoss, device: str) -> Evaluation:
    """Loss, correlation and error on the held-out regions: mean over slides and sizes of regions."""
    network.eval()
    groups: dict[tuple[int, int], list[tuple[Tensor, np.ndarray, np.ndarray]]] = {}
    losses, correlations, errors = [], [], []
    with torch.no_grad():
        for window in windows:
            crop, owned = window.crop, window.owned
            maps = network.encode(crop.rgb[None].to(device)) if window.maps is None else window.maps
            values = predict_crops(network, maps, [crop])[torch.from_numpy(owned).to(device)]
            group = groups.setdefault((crop.slide.slide, len(crop.slide.regions)), [])
            group.append((values, crop.expression[owned], crop.slide.block[crop.rows][owned]))
        for parts in groups.values():
            predicted, true, block = zip(*parts, strict=True)
            p = torch.cat(predicted)
            t = torch.from_numpy(np.concatenate(true)).to(p)
            losses.append(float(loss(p, t)))
            correlations.append(pearson_by_gene(p.cpu().numpy(), t.cpu().numpy()))
            code = np.unique(np.concatenate(block), return_inverse=True)[1]
            error = (p - t).square().mean(dim=1).cpu().numpy()
            errors.append(np.bincount(code, error) / np.bincount(code))
    return Evaluation(float(np.mean(losses)), _mean_of_finite(np.stack(correlations)), np.concatenate(errors))


def _mean_of_finite(values: np.ndarray) -> np.ndarray:
    """Mean over rows without NaN; NaN for columns without any number."""
    known = np.isfinite(values)
    total = np.where(known, values, 0.0).sum(axis=0)
    return np.where(known.any(axis=0), total / np.maximum(known.sum(axis=0), 1), np.nan)


@dataclass
class _TrainingState:
    """Part of a training beside the network and the optimizer."""

    best: dict[str, Tensor]  # Weights at the best check
    best_loss: float = np.inf
    best_step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    def add(self, network: PixNetNetwork, row: dict[str, Any]) -> None:
        """Add a check; if it is kept, the network is the best so far."""
        self.history.append(row)
        if row["kept"]:
            self.best, self.best_loss, self.best_step = _cpu_state(network), row["held_out_loss"], row["step"]

    def stagnates(self, params: PixNetParams) -> bool:
        """True if the last checks brought no improvement."""
        waited = self.history[-1]["step"] - self.best_step if self.history else 0
        return waited >= params.patience * params.n_steps_per_check


@dataclass(frozen=True)
class _HeldOutChecks:
    """Checks of the network on held-out regions, compared with its start."""

    windows: list[HeldOutCrop]
    loss: RegionLoss
    device: str
    start: Evaluation | None  # Of the untrained network; None if there are no held-out regions

    def check(self, network: PixNetNetwork, step: int, loss: float, best_loss: float) -> dict[str, Any]:
        """Row of the history; without held-out regions every check is kept."""
        if self.start is None:
            return history_row(step, loss, np.nan, np.array([np.nan]), kept=True)
        found = evaluate(network, self.windows, self.loss, self.device)
        # The base is a strong start; small random improvements over it are not kept.
        kept = found.loss < best_loss and (not network.n_base or found.significantly_better_than(self.start))
        return history_row(step, loss, found.loss, found.r, kept=kept)


def train(
    network: PixNetNetwork,
    slides: list[TrainingSlide],
    held_out: list[TrainingSlide],
    settings: FitSettings,
    on_step: Callable[[], None],
) -> tuple[pd.DataFrame, dict[str, Tensor]]:
    """Train the decoder, and the encoder if it has a learning rate.

    Return the history, and the best weights on the held-out regions. A loss that is not finite, and a checkpoint of another
    training, raise a ``ValueError``.
    """
    params = settings.params
    size = crop_settings(network, slides + held_out, params)
    loss = RegionLoss(params.loss, network.head.out_channels, params.correlation_weight).to(settings.device)
    optimizer = _make_optimizer(network, loss, params)
    windows = _cut_windows(network, held_out, settings, size)
    head_of_base = network.head.weight.detach()[:, : network.n_base].clone()
    start = evaluate(network, windows, loss, settings.device) if windows else None
    checks = _HeldOutChecks(windows, loss, settings.device, start)
    state = _resume(network, optimizer, loss, settings)
    if state is None:
        state = _TrainingState(_cpu_state(network))
        if start is not None:
            state.add(network, history_row(0, np.nan, start.loss, start.r, kept=True))
    first = int(state.history[-1]["step"]) + 1 if state.history else 1
    for _ in range(first - 1):
        on_step()
    sampler = CropSampler(network, slides, size, settings)
    losses = []
    for step in range(first, params.n_steps + 1):
        if state.stagnates(params):
            break
        value = _take_step(network, sampler, loss, optimizer, step)
        with torch.no_grad():
            network.head.weight[:, : network.n_base] = head_of_base  # only the weights of the decoder are trained
        on_step()
        if value is None:
            continue
        if not np.isfinite(value):
            msg = f"The loss became {value} at step {step}; lower `learning_rate` ({params.learning_rate:g})."
            raise ValueError(msg)
        losses.append(value)
        if step % params.n_steps_per_check and step != params.n_steps:
            continue
        state.add(network, checks.check(network, step, float(np.mean(losses)), state.best_loss))
        losses = []
        _save_state(network, optimizer, loss, state, settings)
    history = pd.DataFrame(state.history, columns=["step", "loss", "held_out_loss", "held_out_r", "kept"])
    history["kept"] = history["step"] == state.best_step
    return history, state.best


def _make_optimizer(network: PixNetNetwork, loss: RegionLoss, params: PixNetParams) -> torch.optim.Adam:
    decoder = [*network.decoder.parameters(), *network.head.parameters(), *loss.parameters()]
    groups: list[dict[str, Any]] = [{"params": decoder}]
    if params.encoder_learning_rate > 0:
        groups.append({"params": list(network.pyramid.parameters()), "lr": params.encoder_learning_rate})
    return torch.optim.Adam(groups, lr=params.learning_rate, weight_decay=params.weight_decay)


def _save_state(
    network: PixNetNetwork,
    optimizer: torch.optim.Optimizer,
    loss: RegionLoss,
    state: _TrainingState,
    settings: FitSettings,
) -> None:
    """Write all that a training needs to continue, if there is a directory for it."""
    if settings.checkpoint is None:
        return
    parts = {"network": network.state_dict(), "best": state.best, "loss": loss.state_dict()}
    parts |= {f"optimizer.{index}": values for index, values in optimizer.state_dict()["state"].items()}
    tensors = {f"{prefix}.{key}": value for prefix, part in parts.items() for key, value in part.items()}
    save_checkpoint(settings.checkpoint / _CHECKPOINT, Checkpoint(tensors, state.history), settings.fingerprint)


def _resume(
    network: PixNetNetwork, optimizer: torch.optim.Optimizer, loss: RegionLoss, settings: FitSettings
) -> _TrainingState | None:
    """Load an interrupted training; None if there is none."""
    folder = settings.checkpoint
    found = None if folder is None else load_checkpoint(folder / _CHECKPOINT, settings.fingerprint)
    if found is None:
        return None
    network.load_state_dict(tensors_below("network.", found.tensors))
    loss.load_state_dict(tensors_below("loss.", found.tensors))
    by_parameter: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors_below("optimizer.", found.tensors).items():
        index, name = key.split(".")
        by_parameter.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": by_parameter, "param_groups": optimizer.state_dict()["param_groups"]})
    best = max((row for row in found.history if row["kept"]), key=lambda row: row["step"])
    logger.info("Training continues after step %d", found.history[-1]["step"])
    return _TrainingState(
        tensors_below("best.", found.tensors), best["held_out_loss"], int(best["step"]), found.history
    )


class CropSampler:
    """Batches of crops: from a pool of encoded crops, or new crops in every step if the encoder is trained."""

    def __init__(
        self, network: PixNetNetwork, slides: list[TrainingSlide], size: CropSettings, settings: FitSettings
    ) -> None:
        self.network, self.slides, self.size, self.settings = network, slides, size, settings
        self.encoder_trained = settings.params.encoder_learning_rate > 0
        self.pool: list[tuple[Crop, list[Tensor]]] = []
        if not self.encoder_trained and settings.params.n_steps:
            rng = np.random.default_rng([settings.seed, 0])
            for _ in range(settings.params.n_cached_crops):
                crop = self._draw(rng)
                if len(crop.rows):
                    # Half precision: the rounding error is much smaller than the noise of augmentation.
                    maps = [m.half() for m in self._encode([crop])]
                    self.pool.append((replace(crop, rgb=crop.rgb[:, :0, :0]), maps))

    def _draw(self, rng: np.random.Generator) -> Crop:
        params = self.settings.params
        return random_crop(self.slides, self.size, flips=params.flips, stain_jitter=params.stain_jitter, rng=rng)

    def _encode(self, crops: list[Crop]) -> list[Tensor]:
        with torch.set_grad_enabled(self.encoder_trained):
            return self.network.encode(torch.stack([crop.rgb for crop in crops]).to(self.settings.device))

    def batch(self, step: int) -> tuple[list[Crop], list[Tensor]]:
        """Crops of a step and their maps. Each step has its own random generator, so that a training can be resumed."""
        rng = np.random.default_rng([self.settings.seed, step])
        n_crops = self.settings.params.n_crops
        if self.pool:
            chosen = rng.choice(len(self.pool), min(n_crops, len(self.pool)), replace=False)
            levels = zip(*(self.pool[k][1] for k in chosen), strict=True)
            return [self.pool[k][0] for k in chosen], [torch.cat(level).float() for level in levels]
        crops = [crop for crop in (self._draw(rng) for _ in range(n_crops)) if len(crop.rows)]
        return crops, self._encode(crops) if crops else []


def _take_step(
    network: PixNetNetwork, sampler: CropSampler, loss: RegionLoss, optimizer: torch.optim.Optimizer, step: int
) -> float | None:
    """Train on one batch; return its loss, or None if it has too few regions."""
    network.train()
    crops, maps = sampler.batch(step)
    if sum(len(crop.rows) for crop in crops) < _MIN_REGIONS:
        return None
    true = torch.from_numpy(np.concatenate([crop.expression for crop in crops])).float()
    value = loss(predict_crops(network, maps, crops), true.to(sampler.settings.device))
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    return float(value.detach())


def _cpu_state(network: PixNetNetwork) -> dict[str, Tensor]:
    return {key: value.detach().cpu().clone() for key, value in network.state_dict().items()}


def history_row(step: int, loss: float, held_out_loss: float, r: np.ndarray, *, kept: bool) -> dict[str, Any]:
    """One check, in types that JSON knows."""
    finite = r[np.isfinite(r)]
    return {
        "step": step,
        "loss": loss,
        "held_out_loss": held_out_loss,
        "held_out_r": float(finite.mean()) if len(finite) else float("nan"),
        "kept": bool(kept),
    }
