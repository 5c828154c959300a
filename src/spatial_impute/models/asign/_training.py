"""Training of one MSAGNet on spots whose labels are hidden from its inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from spatial_impute._expression import gene_blocks
from spatial_impute._io.workers import rank_and_size
from spatial_impute.models._storage import cpu_state, tensors_below
from spatial_impute.models.asign._network import to_device

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from spatial_impute.models._params import AsignParams
    from spatial_impute.models.asign._network import GraphInputs, LabelInputs, MSAGNet

_N_CHECKS = 10  # of the held-out spots during a training, to show how it went

# From cautious, for spots that show little beyond the base, to free: dropout, weight decay, learning rate, steps.
_REGIMES: dict[str, dict[str, Any]] = {
    "cautious": {"dropout": 0.5, "weight_decay": 0.5, "learning_rate": 3e-3, "n_steps": 60},
    "moderate": {"dropout": 0.3, "weight_decay": 0.5, "learning_rate": 5e-3, "n_steps": 200},
    "free": {"dropout": 0.2, "weight_decay": 0.1, "learning_rate": 5e-3, "n_steps": 250},
}
REGIME_SETTINGS = tuple(_REGIMES["free"])


def regimes(params: AsignParams) -> list[AsignParams]:
    """Candidates for the settings of the optimizer that the user has not set."""
    own = {name: value for name in REGIME_SETTINGS if (value := getattr(params, name)) is not None}
    candidates = [replace(params, **(regime | own)) for regime in _REGIMES.values()]
    return [c for i, c in enumerate(candidates) if c not in candidates[:i]]


@dataclass(frozen=True)
class Target:
    """Values that a network should predict, in the form that both losses need."""

    weight: Tensor  # (m,) of each spot in the losses
    centred: Tensor  # (m, g) values around the weighted mean of their gene
    mean: Tensor  # (g,)
    variance: Tensor  # (g,)
    varies: Tensor  # (g,) bool

    @classmethod
    def of(cls, true: Tensor, weight: Tensor | None = None) -> Target:
        """Shapes: (m, g), (m,). Without `weight` all spots have the same weight."""
        weight = torch.ones_like(true[:, 0]) if weight is None else weight
        share = weight / weight.sum()
        mean = share @ true
        centred = true - mean
        variance = share @ centred.square()
        largest = true.abs().amax(dim=0)
        return cls(weight, centred, mean, variance, variance.sqrt() > 1e-6 * largest)  # else only rounding errors

    def errors(self, predicted: Tensor) -> Tensor:
        """(m,) weighted squared error of each spot, mean over the genes."""
        parts = [
            (predicted[:, genes] - self.mean[genes] - self.centred[:, genes]).square().sum(dim=1)
            for genes in gene_blocks(len(self.mean))
        ]
        return self.weight * sum(parts, start=torch.zeros_like(self.weight)) / len(self.mean)

    def losses(self, predicted: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Weighted squared error, and 1 - weighted Pearson correlation across the spots, means over the genes.

        Both follow from three sums over the spots, so that all genes of a tissue take few operations. A prediction that varies
        less than a tenth as much as the truth is divided by that tenth: around a constant prediction the correlation is
        not defined, and its gradient would have no bound. `predicted` may be blocks of genes.
        """
        blocks = [predicted] if isinstance(predicted, Tensor) else predicted
        truth = self.centred.split([block.shape[1] for block in blocks], dim=1)
        share, sums = self.weight / self.weight.sum(), []
        for block, centred in zip(blocks, truth, strict=True):
            sums.append(torch.stack([share @ block, share @ block.square(), share @ (block * centred)]))
        mean, square, product = torch.cat(sums, dim=1)
        error = square - 2 * (product + self.mean * mean) + self.variance + self.mean.square()
        squared = self.weight.mean() * error.mean()
        if not self.varies.any():
            return squared, mean.sum() * 0.0
        variance, least = (square - mean.square())[self.varies], self.variance[self.varies]
        r = product[self.varies] / (torch.maximum(variance, 0.01 * least).sqrt() * least.sqrt())
        return squared, (1.0 - r).mean()


@dataclass(frozen=True)
class Batch:
    """The first m spots of a graph, to predict them, with inputs that do not contain their labels."""

    inputs: GraphInputs
    labels: LabelInputs  # (m, ...) predictions from the labels of other spots
    target: Target  # standardised expression
    fields: Tensor | None = None  # (2, m, g) mean of expression - base over the region and the global field of each

    def loss(self, network: nn.Module, params: AsignParams) -> Tensor:
        """Squared error and correlation of the spots, and correlations of their larger fields of view."""
        levels = self.fields is not None
        found = network(self.inputs, self.labels, levels=levels, in_blocks=not levels)
        squared, correlation = self.target.losses(found[0] if levels else found)
        loss = squared + params.correlation_weight * correlation
        if self.fields is None:
            return loss
        for level, field in zip(found[1:], self.fields, strict=True):
            loss = loss + params.auxiliary_weight * correlation_loss(level, field, self.target.weight)
            own = self.target.losses(self.labels.base + level)[1]
            loss = loss + params.consistency_weight * own
        return loss


@dataclass(frozen=True)
class TrainingRun:
    """Result of :func:`train`."""

    state: dict[str, Tensor]  # weights after the last step
    history: list[dict[str, Any]]  # per check: step, training loss, squared error on the held-out spots
    predictions: list[Tensor]  # per held-out batch: (m, g) after the last step

    @property
    def errors(self) -> tuple[float, float]:
        """Squared error on the held-out spots before the first step, and after the last one."""
        return self.history[0]["held_out_mse"], self.history[-1]["held_out_mse"]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors under one name each, for a checkpoint."""
        tensors = {f"state.{key}": v for key, v in self.state.items()}
        return tensors | {f"predicted.{i}": p for i, p in enumerate(self.predictions)}

    @classmethod
    def from_checkpoint(cls, tensors: dict[str, Tensor], history: list[dict[str, Any]]) -> TrainingRun:
        """The run that was saved; the inverse of :attr:`tensors`."""
        found = tensors_below("predicted.", tensors)
        return cls(tensors_below("state.", tensors), history, [found[str(i)] for i in range(len(found))])


def correlation_loss(predicted: Tensor, true: Tensor, weight: Tensor | None = None) -> Tensor:
    """1 - weighted Pearson correlation of each gene across spots, mean over the genes that vary; see :class:`Target`.

    Shapes: (m, g), (m, g), (m,) -> scalar. Without `weight` all spots have the same weight.
    """
    return Target.of(true, weight).losses(predicted)[1]


def train(
    build: Callable[[], MSAGNet],
    batches: list[Batch],
    held_out: list[Batch],
    params: AsignParams,
    *,
    seed: int,
    device: str = "cpu",
    on_step: Callable[[], None] = lambda: None,
) -> TrainingRun:
    """Train one network on one batch per step, to the end of the schedule of the learning rate.

    `build` makes the network, after seeding. Held-out spots, if there are any, are predicted about ten times. In a process
    group (``torch.distributed``, as started by ``torchrun``) every process takes another batch, gradients are averaged, and
    all processes end with the same network.
    """
    n_steps, peak = params.n_steps or 0, params.learning_rate or 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build().to(device)
        rank, n_ranks = rank_and_size()
        trained: nn.Module = network
        if n_ranks > 1:
            trained = DistributedDataParallel(network)
            torch.manual_seed(seed + 7919 * rank)  # another dropout in each process
        optimizer = _optimizer(network, params)
        batches, held_out = (to_device(part, device) for part in (batches, held_out))
        history: list[dict[str, Any]] = []
        losses: list[float] = []
        predictions: list[Tensor] = []
        for step in range(n_steps + 1):
            if held_out and (step % max(1, n_steps // _N_CHECKS) == 0 or step == n_steps):
                predictions, error = _check(network, held_out)
                _require_finite("error on held-out spots", error, step, params)
                loss = sum(losses) / len(losses) if losses else math.nan
                history.append({"step": step, "loss": loss, "held_out_mse": error})
                losses = []
            if step == n_steps:
                break
            for group in optimizer.param_groups:
                group["lr"] = peak * _decay(step / n_steps, params)
            batch = batches[(step * n_ranks + rank) % len(batches)]
            losses.append(training_step(trained, optimizer, batch, params))
            _require_finite("loss", losses[-1], step + 1, params)
            on_step()
    return TrainingRun(cpu_state(network), history, predictions)


def _check(network: MSAGNet, held_out: list[Batch]) -> tuple[list[Tensor], float]:
    """Predictions of the held-out batches on the CPU, and their weighted squared error."""
    network.eval()
    with torch.inference_mode():
        found = [network(batch.inputs, batch.labels) for batch in held_out]
    errors = [batch.target.errors(p) for p, batch in zip(found, held_out, strict=True)]
    return [p.cpu() for p in found], float(torch.cat(errors).mean())


def _require_finite(what: str, value: float, step: int, params: AsignParams) -> None:
    if not math.isfinite(value):
        msg = f"The {what} became {value} in step {step}; lower `learning_rate` (now {params.learning_rate:g})."
        raise ValueError(msg)


def _optimizer(network: nn.Module, params: AsignParams) -> torch.optim.Optimizer:
    weights, rate, decay = network.parameters(), params.learning_rate or 0.0, params.weight_decay or 0.0
    if params.optimizer == "sgd":
        return torch.optim.SGD(weights, lr=rate, momentum=0.9, weight_decay=decay)
    return torch.optim.AdamW(weights, lr=rate, weight_decay=decay)


def _decay(done: float, params: AsignParams) -> float:
    """Factor on the learning rate after the share `done` of all steps; it ends at zero, so that the last steps converge."""
    return (1 - done) ** 0.9 if params.optimizer == "sgd" else 0.5 * (1 + math.cos(math.pi * done))


def training_step(network: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, params: AsignParams) -> float:
    """Take one step on one batch; return the loss before it."""
    network.train()
    optimizer.zero_grad()
    loss = batch.loss(network, params)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())
