"""Training of the decoder of PixNet by gradient steps on crops, stopped by held-out regions."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, distributed, nn

from spatial_impute._io.workers import rank_and_size
from spatial_impute._settings import logger
from spatial_impute.models._storage import cpu_state, load_checkpoint, save_checkpoint, tensors_below
from spatial_impute.models.pixnet._crops import CropSampler, CropSettings, TrainingSlide, predict_crops
from spatial_impute.models.pixnet._held_out import (
    Evaluation,
    RegionLoss,
    cut_windows,
    evaluate,
    is_confirmed,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from spatial_impute.models._params import PixNetParams
    from spatial_impute.models.pixnet._network import PixNetNetwork

_CHECKPOINT = "state.safetensors"
_T = TypeVar("_T")
_WARM_UP = 0.1  # share of the steps in which the step size rises


@dataclass(frozen=True)
class FitSettings:
    """Settings of a fit."""

    params: PixNetParams
    resolution: float  # um per pixel of the slides
    tile_size: int  # Tile size in px for the pass over the slides
    seed: int
    device: str
    progress: Callable[[int], Callable[[], None]]  # Takes the number of steps; returns the function to call after each
    precision: str = "float32"  # Of encoder and decoder
    checkpoint: Path | None = None  # Directory for the state of the training
    fingerprint: dict[str, Any] = field(default_factory=dict)  # Content that a checkpoint must have been made from


@dataclass
class _TrainingState:
    """Part of a training beside the network and the optimizer."""

    best: dict[str, Tensor]  # Weights at the best check
    best_loss: float = np.inf
    best_step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    def add(self, network: PixNetNetwork, step: int, loss: float, found: Evaluation | None) -> None:
        """Add a check; the network is kept if it is the best so far, and always without held-out regions."""
        held_out = np.nan if found is None else float(found.error.mean())
        kept = found is None or held_out < self.best_loss
        self.history.append(history_row(step, loss, found, kept=kept))
        if kept:
            self.best, self.best_loss, self.best_step = cpu_state(network), held_out, step

    def stagnates(self, params: PixNetParams) -> bool:
        """True if the last checks brought no improvement."""
        waited = self.history[-1]["step"] - self.best_step if self.history else 0
        return waited >= params.patience * params.n_steps_per_check


def train(
    network: PixNetNetwork,
    slides: list[TrainingSlide],
    held_out: list[TrainingSlide],
    settings: FitSettings,
    on_step: Callable[[], None],
) -> tuple[pd.DataFrame, dict[str, Tensor]]:
    """Train the decoder, and the encoder if it has a learning rate, to predict expression without the base.

    Checks are of the best weighted sum of base and decoder; the first one is of the base alone. Return the history, and the
    weights that are best on the held-out regions; those of the start if the best are not confirmed. A loss that is not
    finite, and a checkpoint of another training, raise a ``ValueError``.
    """
    params = settings.params
    crop_settings = CropSettings.of(network, slides + held_out, params)
    loss = RegionLoss(params.loss, network.head.out_channels, params.correlation_weight).to(settings.device)
    optimizer = _make_optimizer(network, loss, params)
    windows = cut_windows(network, held_out, crop_settings, params, seed=settings.seed, device=settings.device)
    head = {f"head.{key}": value for key, value in cpu_state(network.head).items()}
    start = evaluate(network, windows, loss, settings.device, base_alone=network.n_base > 0) if windows else None
    state = _resume(network, optimizer, loss, settings)
    if state is None:
        state = _TrainingState(cpu_state(network))
        if start is not None:
            state.add(network, 0, np.nan, start)
    first = int(state.history[-1]["step"]) + 1 if state.history else 1
    for _ in range(first - 1):
        on_step()
    head_of_base = head["head.weight"][:, : network.n_base].to(settings.device)
    sampler = CropSampler(network, slides, crop_settings, params=params, seed=settings.seed, device=settings.device)
    losses = []
    for step in range(first, params.n_steps + 1):
        if state.stagnates(params):
            break
        _set_rate(optimizer, params, step)
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
        found = of_first_process(evaluate(network, windows, loss, settings.device) if windows else None)
        state.add(network, step, float(np.mean(losses)), found)
        losses = []
        _save_state(network, optimizer, loss, state, settings)
    # Without a base the start is no model, only the mean of each gene.
    if start is not None and network.n_base:
        errors = np.array([row["block_error"] for row in state.history])
        if not is_confirmed(errors, start.half):
            state.best, state.best_step = state.best | head, 0
    history = pd.DataFrame(state.history, columns=["step", "loss", "held_out_loss", "held_out_r", "kept"])
    history["kept"] = history["step"] == state.best_step
    return history, state.best


def _set_rate(optimizer: torch.optim.Optimizer, params: PixNetParams, step: int) -> None:
    """Step size of one step; see `PixNetParams.schedule`."""
    factor = 1.0
    if params.schedule == "cosine":
        warm_up = max(1.0, _WARM_UP * params.n_steps)
        done = max(0.0, step - warm_up) / max(1.0, params.n_steps - warm_up)
        factor = min(1.0, step / warm_up) * (1 + math.cos(math.pi * done)) / 2
    for group in optimizer.param_groups:
        group["lr"] = factor * group["largest_lr"]


def _make_optimizer(network: PixNetNetwork, loss: RegionLoss, params: PixNetParams) -> torch.optim.Adam:
    decoder = [*network.decoder.parameters(), *network.head.parameters(), *loss.parameters()]
    groups: list[dict[str, Any]] = [{"params": decoder, "largest_lr": params.learning_rate}]
    if params.encoder_learning_rate > 0:
        encoder = list(network.pyramid.parameters())
        groups.append({"params": encoder, "largest_lr": params.encoder_learning_rate})
    return torch.optim.Adam(groups, weight_decay=params.weight_decay)


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
    save_checkpoint(settings.checkpoint / _CHECKPOINT, tensors, state.history, settings.fingerprint)


def _resume(
    network: PixNetNetwork, optimizer: torch.optim.Optimizer, loss: RegionLoss, settings: FitSettings
) -> _TrainingState | None:
    """Load an interrupted training; None if there is none."""
    folder = settings.checkpoint
    found = None if folder is None else load_checkpoint(folder / _CHECKPOINT, settings.fingerprint)
    if found is None:
        return None
    tensors, history = found
    network.load_state_dict(tensors_below("network.", tensors))
    loss.load_state_dict(tensors_below("loss.", tensors))
    by_parameter: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors_below("optimizer.", tensors).items():
        index, name = key.split(".")
        by_parameter.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": by_parameter, "param_groups": optimizer.state_dict()["param_groups"]})
    best = max((row for row in history if row["kept"]), key=lambda row: row["step"])
    logger.info("Training continues after step %d", history[-1]["step"])
    return _TrainingState(tensors_below("best.", tensors), best["held_out_loss"], int(best["step"]), history)


def _take_step(
    network: PixNetNetwork, sampler: CropSampler, loss: RegionLoss, optimizer: torch.optim.Optimizer, step: int
) -> float | None:
    """Train on one batch per process; return the loss, or None if no crop holds a region."""
    network.train()
    rank, n_processes = rank_and_size()
    crops, maps = sampler.batch(step * n_processes + rank)
    optimizer.zero_grad()
    value = None
    if crops:
        true = torch.from_numpy(np.concatenate([crop.expression for crop in crops])).float()
        found = loss(predict_crops(network, maps, crops), true.to(sampler.device))
        found.backward()
        value = float(found.detach())
    value = mean_gradient(network, optimizer, value)
    if value is not None:
        optimizer.step()
    return value


def history_row(step: int, loss: float, found: Evaluation | None, *, kept: bool) -> dict[str, Any]:
    """One check, in types that JSON knows; without held-out regions its scores are NaN."""
    finite = np.empty(0) if found is None else found.r[np.isfinite(found.r)]
    return {
        "step": step,
        "loss": loss,
        "held_out_loss": float("nan") if found is None else float(found.error.mean()),
        "held_out_r": float(finite.mean()) if len(finite) else float("nan"),
        "kept": bool(kept),
        "block_error": [] if found is None else found.error.tolist(),
    }


# Processes that train one network together, as `torchrun` starts them.
def of_first_process(value: _T) -> _T:
    """Value that the first process has, so that all take the same decision."""
    if rank_and_size()[1] == 1:
        return value
    shared = [value]
    distributed.broadcast_object_list(shared)
    return shared[0]


def mean_gradient(network: nn.Module, optimizer: torch.optim.Optimizer, loss: float | None) -> float | None:
    """Give all processes the mean gradient, and the mean statistics of batch normalisation; return the mean loss.

    A process without a batch has no loss and does not count. The result is None if no process has one.
    """
    n_processes = rank_and_size()[1]
    if n_processes == 1:
        return loss
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    total = torch.tensor([loss or 0.0, float(loss is not None)], device=weights[0].device)
    distributed.all_reduce(total)
    if not total[1]:
        return None
    for weight in weights:
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        distributed.all_reduce(weight.grad)
        weight.grad /= total[1]
    for statistic in _batch_statistics(network):
        distributed.all_reduce(statistic)
        statistic /= n_processes
    return float(total[0] / total[1])


def _batch_statistics(network: nn.Module) -> Iterator[Tensor]:
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            yield from (buffer for buffer in module.buffers() if buffer.is_floating_point())
