"""Training of one MSAGNet per fold on masked measured spots."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from spatial_impute._io.workers import suitable_threads
from spatial_impute.models._spots import Spots, given, spatial_folds, training_rows
from spatial_impute.models._storage import Checkpoint, load_checkpoint, save_checkpoint, tensors_below
from spatial_impute.models.asign._graph_inputs import GeneScale, graph_inputs, with_components
from spatial_impute.models.asign._network import MSAGNet

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from spatial_impute.models._params import AsignParams
    from spatial_impute.models.asign._network import GraphInputs

_MAX_KNOWN = 5000  # known spots to learn from, a section of Visium; all are used to impute
_MAX_TARGETS = 1000  # hidden spots that a network learns from, one block after the other
_N_CHECKS = 20  # of the held-out spots during a training


@dataclass(frozen=True)
class FitSettings:
    """Settings of a fit."""

    params: AsignParams
    seed: int
    device: str
    config: dict[str, Any] = field(default_factory=dict)  # Provenance to store in the model
    progress: Callable[[int], Callable[[], None]] = lambda _total: lambda: None
    """Takes the number of steps; returns the function to call after each."""
    checkpoint: Path | None = None  # Folder for finished networks
    start: Sequence[dict[str, Tensor]] = ()  # Weights of networks to start from instead of the base


@dataclass(frozen=True)
class TrainingSet:
    """Known spots of one or several stacks, and their folds. All stacks have the same genes and features."""

    stacks: list[Spots]
    folds: list[list[np.ndarray]]  # Per stack and fold (n,) bool, the held-out spots

    @classmethod
    def from_stacks(cls, stacks: Sequence[Spots], params: AsignParams, seed: int) -> TrainingSet:
        """Spots to learn from, with components, and their folds."""
        parts = [_training_part(spots, params, seed) for spots in stacks]
        return cls([with_components(spots) for spots, _ in parts], [folds for _, folds in parts])

    @cached_property
    def truth(self) -> np.ndarray:
        """(n_known, g) expression of the known spots of all stacks."""
        return np.concatenate([spots.expression for spots in self.stacks])

    @cached_property
    def n_features(self) -> int:
        """Features of a token."""
        return given(self.stacks[0].tokens)[0].shape[2]

    @cached_property
    def n_folds(self) -> int:
        """Number of networks to train; a stack with fewer folds uses its last fold again."""
        return max(len(folds) for folds in self.folds)

    @cached_property
    def fold_of_spot(self) -> np.ndarray:
        """(n_known,) fold of each known spot, numbered over all stacks."""
        result, n_before = [], 0
        for spots, folds in zip(self.stacks, self.folds, strict=True):
            result.append(n_before + np.argmax(np.stack(folds)[:, spots.known], axis=0))
            n_before += len(folds)
        return np.concatenate(result)

    def fold(self, k: int) -> list[np.ndarray]:
        """(n,) bool per stack, the spots that network `k` does not see."""
        return [folds[min(k, len(folds) - 1)] for folds in self.folds]

    def by_stack(self, values: np.ndarray) -> list[np.ndarray]:
        """Split values of all known spots by stack."""
        return np.split(values, np.cumsum([int(spots.known.sum()) for spots in self.stacks])[:-1])

    def per_stack(self, function: Callable[[Spots, list[np.ndarray]], np.ndarray]) -> np.ndarray:
        """Values of all known spots from a function of each stack and its folds."""
        return np.concatenate([function(s, f) for s, f in zip(self.stacks, self.folds, strict=True)])


def _training_part(spots: Spots, params: AsignParams, seed: int) -> tuple[Spots, list[np.ndarray]]:
    """Spots to learn from, and their folds: those of the whole stack, because base layers were made without these."""
    folds = _folds(spots, params, seed)
    rows = training_rows(spots, max_known=_MAX_KNOWN, seed=seed)
    within = [fold[rows] for fold in folds if fold[rows].any()]
    if len(rows) == len(spots.known) or len(within) < 2:  # regions smaller than the blocks of a fold
        return spots, folds
    return spots.take(rows), within


def _folds(spots: Spots, params: AsignParams, seed: int) -> list[np.ndarray]:
    return spatial_folds(spots, n_folds=params.n_folds, block_spacings=params.block_spacings, seed=seed)


@dataclass(frozen=True)
class Episode:
    """One masking of one stack: the inputs of the network, and the masked spots that it must predict.

    The labels of these spots, and of all spots held out from training, do not enter the inputs.
    """

    inputs: GraphInputs
    rows: Tensor  # (m,) spots to predict
    expression: Tensor  # (m, g) their expression, standardised
    weight: Tensor  # (m,) weight of each of them in the loss

    def to(self, device: str) -> Episode:
        return Episode(self.inputs.to(device), self.rows.to(device), self.expression.to(device), self.weight.to(device))


def make_episode(
    spots: Spots, masked: np.ndarray, weight: np.ndarray, genes: GeneScale, params: AsignParams
) -> Episode:
    """Hide some known spots, which the network must predict. `weight` is that of all known spots."""
    chosen = masked[spots.known]
    inputs, rows = graph_inputs(spots.hide(masked), genes, params, targets=masked)
    return Episode(
        inputs=inputs,
        rows=torch.from_numpy(np.flatnonzero(masked[rows])),
        expression=genes.standardise(spots.expression[chosen].astype(np.float32)),
        weight=torch.from_numpy(weight[chosen].astype(np.float32)),
    )


def _training_masks(spots: Spots, params: AsignParams, seed: int) -> list[np.ndarray]:
    """Blocks of known spots to hide in training, one per episode, until they have enough spots."""
    folds = _folds(spots, params, seed)
    before = np.cumsum([0, *(fold.sum() for fold in folds)])[:-1]
    return [fold for fold, n in zip(folds, before, strict=True) if n < _MAX_TARGETS]


@dataclass(frozen=True)
class TrainingRun:
    """Result of :func:`train` at every check, from the untrained to the trained network."""

    states: list[dict[str, Tensor]]  # Weights
    history: list[dict[str, Any]]  # Step, training loss, squared error on the held-out spots
    predictions: list[list[Tensor]]  # (m, g) predictions of the spots of each held-out episode

    def to_checkpoint(self) -> Checkpoint:
        """All tensors under one name each."""
        tensors = {f"state{j}.{key}": v for j, state in enumerate(self.states) for key, v in state.items()}
        tensors |= {f"predicted{j}.{i}": p for j, found in enumerate(self.predictions) for i, p in enumerate(found)}
        return Checkpoint(tensors, self.history)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> TrainingRun:
        """Inverse of :meth:`to_checkpoint`."""
        checks = range(len(checkpoint.history))
        predicted = [tensors_below(f"predicted{j}.", checkpoint.tensors) for j in checks]
        return cls(
            states=[tensors_below(f"state{j}.", checkpoint.tensors) for j in checks],
            history=checkpoint.history,
            predictions=[[found[str(i)] for i in range(len(found))] for found in predicted],
        )


def correlation_loss(predicted: Tensor, true: Tensor, weight: Tensor | None = None) -> Tensor:
    """1 - weighted Pearson correlation of each gene across spots, mean over the genes that vary.

    A prediction that varies less than a tenth as much as the truth is divided by that tenth: around a constant prediction
    the correlation is not defined, and its gradient would have no bound.

    Shapes: (m, g), (m, g), (m,) -> scalar. Without `weight` all spots have the same weight.
    """
    weight = torch.ones_like(true[:, 0]) if weight is None else weight
    share = (weight / weight.sum())[:, None]
    p = (predicted - (share * predicted).sum(dim=0)) * share.sqrt()
    t = (true - (share * true).sum(dim=0)) * share.sqrt()
    t_norm = t.norm(dim=0)
    varies = t_norm > 1e-6 * true.abs().amax(dim=0)  # a centred constant is only rounding error
    if not varies.any():
        return predicted.sum() * 0.0
    r = (p * t).sum(dim=0) / (torch.maximum(p.norm(dim=0), 0.1 * t_norm) * t_norm).clamp_min(1e-24)
    return (1.0 - r[varies]).mean()


def train(
    build: Callable[[], MSAGNet],
    episodes: list[Episode],
    held_out: list[Episode],
    params: AsignParams,
    *,
    seed: int,
    device: str = "cpu",
    on_step: Callable[[], None] = lambda: None,
) -> TrainingRun:
    """Train one network on one episode per step, and check it on held-out spots about 20 times.

    In a process group (``torch.distributed``, as started by ``torchrun``) every process takes another episode, gradients
    are averaged, and all processes end with the same network.

    Parameters
    ----------
    build
        Makes the network; called after seeding.
    episodes, held_out
        Episodes to train on, in this order; episodes to check the network on.
    params, seed, device, on_step
        Settings of optimizer and loss; seed of weights and dropout; torch device; called after every step, for progress.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build().to(device)
        rank, n_ranks = 0, 1
        trained: nn.Module = network
        if distributed.is_available() and distributed.is_initialized():
            rank, n_ranks = distributed.get_rank(), distributed.get_world_size()
            trained = DistributedDataParallel(network)
            torch.manual_seed(seed + 7919 * rank)  # another dropout in each process
        optimizer = torch.optim.AdamW(network.parameters(), lr=params.learning_rate, weight_decay=params.weight_decay)
        episodes = [episode.to(device) for episode in episodes]
        held_out = [episode.to(device) for episode in held_out]
        check_every = max(1, params.n_steps // _N_CHECKS)
        run, losses = TrainingRun([], [], []), list[float]()
        for step in range(params.n_steps + 1):
            if step % check_every == 0 or step == params.n_steps:
                loss = sum(losses) / len(losses) if losses else math.nan
                _check(network, held_out, run, step=step, loss=loss)
                losses = []
                if step:
                    _require_finite("error on held-out spots", run.history[-1]["held_out_mse"], step, params)
            if step == params.n_steps:
                break
            # Cosine decay to zero, so that the last steps converge.
            for group in optimizer.param_groups:
                group["lr"] = params.learning_rate * 0.5 * (1 + math.cos(math.pi * step / params.n_steps))
            episode = episodes[(step * n_ranks + rank) % len(episodes)]
            losses.append(training_step(trained, optimizer, episode, params.correlation_weight))
            _require_finite("loss", losses[-1], step + 1, params)
            on_step()
    return run


def _check(network: MSAGNet, held_out: list[Episode], run: TrainingRun, *, step: int, loss: float) -> None:
    """Add the state of the network, and its predictions and errors on held-out spots, to the run."""
    network.eval()
    with torch.inference_mode():
        found = [network(episode.inputs)[episode.rows] for episode in held_out]
    errors = [
        (e.weight[:, None] * (p - e.expression).square()).mean(dim=1) for p, e in zip(found, held_out, strict=True)
    ]
    run.history.append({"step": step, "loss": loss, "held_out_mse": float(torch.cat(errors).mean())})
    run.states.append({key: value.detach().cpu().clone() for key, value in network.state_dict().items()})
    run.predictions.append([p.cpu() for p in found])


def _require_finite(what: str, value: float, step: int, params: AsignParams) -> None:
    if not math.isfinite(value):
        msg = f"The {what} became {value} in step {step}; lower `learning_rate` (now {params.learning_rate:g})."
        raise ValueError(msg)


def training_step(
    network: nn.Module, optimizer: torch.optim.Optimizer, episode: Episode, correlation_weight: float
) -> float:
    """Take one step on one episode; return the loss before it."""
    network.train()
    optimizer.zero_grad()
    predicted = network(episode.inputs)[episode.rows]
    loss = (episode.weight[:, None] * (predicted - episode.expression).square()).mean()
    loss = loss + correlation_weight * correlation_loss(predicted, episode.expression, episode.weight)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


@dataclass(frozen=True)
class NetworkFit:
    """Training of one network per fold."""

    data: TrainingSet
    weights: list[np.ndarray]  # Per stack (n_known,) weight of each known spot in the loss
    genes: GeneScale
    group: Tensor  # (g,) group of each gene
    settings: FitSettings
    fingerprint: dict[str, Any]  # Content that a checkpoint must have been made from
    on_step: Callable[[], None]

    def run(self) -> tuple[list[dict[str, Tensor]], np.ndarray, pd.DataFrame]:
        """Train all networks, and stop them at the step that is best for all of them.

        Return their weights, (n_known, g) predictions of each known spot by the network that did not see it, and the history.
        """
        runs = [self._train_or_load(k) for k in range(self.data.n_folds)]
        best = int(np.argmin(np.mean([[row["held_out_mse"] for row in run.history] for run in runs], axis=0)))
        predicted = []
        for i, (spots, folds) in enumerate(zip(self.data.stacks, self.data.folds, strict=True)):
            full = np.empty((len(spots.known), spots.expression.shape[1]))
            for fold, run in zip(folds, runs, strict=False):
                full[fold] = self.genes.restore(run.predictions[best][i])
            predicted.append(full[spots.known])
        history = [
            pd.DataFrame(run.history).assign(network=k, kept=lambda frame: frame.index == best)
            for k, run in enumerate(runs)
        ]
        states = [run.states[best] for run in runs]
        return states, np.concatenate(predicted), pd.concat(history, ignore_index=True)

    def _train_or_load(self, k: int) -> TrainingRun:
        """Result of network `k`, from the checkpoint folder if it was trained before."""
        folder = self.settings.checkpoint
        path = None if folder is None else folder / f"network{k}.safetensors"
        found = None if path is None else load_checkpoint(path, self.fingerprint)
        if found is not None:
            for _ in range(self.settings.params.n_steps):
                self.on_step()
            return TrainingRun.from_checkpoint(found)
        run = self._train(k)
        if path is not None:
            save_checkpoint(path, run.to_checkpoint(), self.fingerprint)
        return run

    def _train(self, k: int) -> TrainingRun:
        params, seed = self.settings.params, self.settings.seed
        held_out, episodes = [], []
        for spots, fold, weight in zip(self.data.stacks, self.data.fold(k), self.weights, strict=True):
            # The fold is hidden for the checks; blocks of the other spots are hidden one after the other for training.
            rest = spots.hide(fold)
            for mask in _training_masks(rest, params, seed):
                episodes.append(make_episode(rest, mask, weight[~fold[spots.known]], self.genes, params))
            held_out.append(make_episode(spots, fold, weight, self.genes, params))
        n_spots = max(len(spots.known) for spots in self.data.stacks)
        with suitable_threads(n_spots, params.width):
            return train(
                lambda: self._build(k),
                episodes,
                held_out,
                params,
                seed=seed + k,
                device=self.settings.device,
                on_step=self.on_step,
            )

    def _build(self, k: int) -> MSAGNet:
        network = MSAGNet(self.data.n_features, self.group, self.settings.params)
        if start := self.settings.start:
            # The groups of genes are those of the new data.
            network.load_state_dict(start[k % len(start)] | {"group": self.group})
        return network
