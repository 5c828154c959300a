"""The networks of a fit: one per fold to choose how to train and to measure the result, and those that predict."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
import torch

from spatial_impute._geometry import plane_tiles
from spatial_impute._io.workers import active_client, run_on_workers, suitable_threads
from spatial_impute.models._spots import Spots, block_folds, given, spatial_folds, training_rows
from spatial_impute.models._storage import cpu_state, load_checkpoint, save_checkpoint
from spatial_impute.models.asign._graph_inputs import (
    GeneScale,
    LabelPredictions,
    field_means,
    graph_inputs,
    with_components,
)
from spatial_impute.models.asign._network import MSAGNet
from spatial_impute.models.asign._propagation import KnownGraph
from spatial_impute.models.asign._training import REGIME_SETTINGS, Batch, Target, TrainingRun, regimes, train

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from spatial_impute.models._params import AsignParams

_MAX_KNOWN = 5000  # known spots to learn from, a section of Visium; all are used to impute
_BATCH = 500  # spots to predict in one step; larger batches take longer and learn hardly more
N_TRIALS = 2  # folds on which all regimes are tried
_N_NETWORKS = 5  # that predict together; one per fold, or with fewer folds networks trained on all spots
_N_REFITS = 4
_ONE_TRAINING = Lock()  # random state and threads of torch belong to the process, and workers may be threads of it
_FEW = 150  # known spots, below which the choice between regimes would be chance


def _no_step() -> None:
    """Progress of a fit on a worker."""


def _no_progress(_total: int, _stage: str) -> Callable[[], None]:
    return _no_step


@dataclass(frozen=True)
class FitSettings:
    """Settings of a fit."""

    params: AsignParams
    seed: int
    device: str
    config: dict[str, Any] = field(default_factory=dict)  # Provenance to store in the model
    progress: Callable[[int, str], Callable[[], None]] = _no_progress
    """Takes the number of steps of a stage, and its name; returns the function to call after each step."""
    checkpoint: Path | None = None  # Folder for finished networks
    start: Sequence[dict[str, Tensor]] = ()  # Weights of networks to start from instead of the base
    fingerprint: dict[str, Any] = field(default_factory=dict)  # Content that a checkpoint must have been made from


@dataclass(frozen=True)
class TrainingSet:
    """Known spots of one or several stacks, and their folds. All stacks have the same genes and features."""

    stacks: list[Spots]
    folds: list[list[np.ndarray]]  # Per stack and fold (n,) bool, the held-out spots
    params: AsignParams
    seed: int

    @classmethod
    def from_stacks(cls, stacks: Sequence[Spots], params: AsignParams, seed: int) -> TrainingSet:
        """Spots to learn from, with components, and their folds."""
        parts = [_training_part(spots, params, seed) for spots in stacks]
        return cls([with_components(spots) for spots, _ in parts], [folds for _, folds in parts], params, seed)

    @cached_property
    def truth(self) -> np.ndarray:
        """(n_known, g) expression of the known spots of all stacks."""
        first, *others = (spots.expression for spots in self.stacks)
        return np.concatenate([first, *others]) if others else first

    @cached_property
    def graphs(self) -> list[KnownGraph]:
        """Graph between the known spots of each stack."""
        return [KnownGraph.of(given(spots.graph), spots.known, device=spots.solver_device) for spots in self.stacks]

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

    def scale(self, k: int | None = None) -> GeneScale:
        """Scale of the genes on the known spots outside of a fold; on all of them by default."""
        if k is None:
            return GeneScale.of(self.truth)
        hidden = [fold[spots.known] for spots, fold in zip(self.stacks, self.fold(k), strict=True)]
        return GeneScale.of(self.truth, ~np.concatenate(hidden))

    def rest(self, i: int, k: int) -> tuple[Spots, np.ndarray]:
        """Stack without one of its folds, and the (n_known,) group of each known spot that is left.

        The groups are the other folds; if there is only one, its blocks.
        """
        spots, folds = self.stacks[i], self.folds[i]
        rest = spots.hide(folds[k])
        others = [fold for j, fold in enumerate(folds) if j != k]
        if len(others) < 2:
            others = block_folds(rest, **_blocks(self.params, self.seed))
        return rest, np.argmax(np.stack(others)[:, rest.known], axis=0)

    def by_stack(self, values: np.ndarray) -> list[np.ndarray]:
        """Split values of all known spots by stack."""
        return np.split(values, np.cumsum([int(spots.known.sum()) for spots in self.stacks])[:-1])


def _blocks(params: AsignParams, seed: int) -> dict[str, Any]:
    """Settings of the folds."""
    return {"n_folds": params.n_folds, "block_spacings": params.block_spacings, "seed": seed}


def _training_part(spots: Spots, params: AsignParams, seed: int) -> tuple[Spots, list[np.ndarray]]:
    """Spots to learn from, and their folds: those of the whole stack, because base layers were made without these."""
    folds = spatial_folds(spots, **_blocks(params, seed))
    rows = training_rows(spots, max_known=_MAX_KNOWN, seed=seed)
    if len(rows) == len(spots.known):
        return spots, folds
    within = [fold[rows] for fold in folds if fold[rows].any()]
    if len(within) < 2:  # all spots instead would take memory with the square of their number
        msg = (
            f"Blocks of `block_spacings={params.block_spacings:g}` are larger than the regions that the model learns from (at "
            f"most {_MAX_KNOWN} measured spots together). Lower `block_spacings`; the default is 2."
        )
        raise ValueError(msg)
    return spots.take(rows), within


@dataclass(frozen=True)
class Ensemble:
    """Result of :meth:`NetworkFit.run`."""

    states: list[dict[str, Tensor]]  # weights of the networks that predict
    scales: dict[str, Tensor]  # (k, g) each: scales of the genes of these networks, as the model stores them
    held_out: np.ndarray  # (n_known, g) prediction of each known spot without its fold, choices included
    history: pd.DataFrame
    regime: dict[str, Any]  # settings of the optimizer that were chosen


Runs: TypeAlias = dict[tuple[int, int], TrainingRun]
"""Training by regime and hidden fold."""


@dataclass(frozen=True)
class NetworkFit:
    """Training of the networks.

    Each fold is hidden from one network. The regime (see :func:`regimes`), which includes the number of steps, is chosen by
    the error on hidden folds, and so is whether the networks are used at all. The prediction of a fold that is scored comes
    from the choice that the other folds make. Networks are compared at the end of their schedule, where the learning rate is
    zero: earlier states vary from step to step, and their means over several networks are not better.
    """

    name: str  # for the files of a checkpoint
    data: TrainingSet
    single: list[LabelPredictions]  # per stack, all spots: each known spot predicted with its fold hidden
    nested: Callable[[int, int], LabelPredictions]
    """The same for a stack and a fold that is hidden from all predictions: those of the spots outside of it."""
    weights: list[np.ndarray]  # Per stack (n_known,) weight of each known spot in the loss
    group: Tensor  # (g,) group of each gene
    settings: FitSettings
    on_step: Callable[[], None] = _no_step

    @property
    def trials(self) -> range:
        """Folds on which everything is tried."""
        return range(min(N_TRIALS, self.data.n_folds))

    def try_regimes(self, only: int | None = None) -> Runs:
        """Train a network with every regime on the trial folds, until a freer one is worse; or with one of them only.

        A regime that is worse than another one on the first fold is not tried on the others. Only the errors are kept of
        runs that are not needed any more: weights and predictions take much memory if all genes of a tissue are predicted.
        """
        tried = [self.candidates[r] for r in range(len(self.candidates)) if only in (None, r)]
        stage = self._stage("choice of settings", len(self.trials) * sum(given(params.n_steps) for params in tried))
        runs: Runs = {}
        for r in range(len(self.candidates)):
            if only not in (None, r):
                continue
            if only is None and r > 1 and self.best_regime(runs, self.trials) < r - 1:
                break
            for k, run in stage._train_each(r, self.trials):
                runs[r, k] = run
                if self.best_regime(runs, [k]) != r:
                    break
        needed = {(self._regime_without(k, runs), k) for k in self.trials}
        needed |= {(self.best_regime(runs, self.trials), k) for k in self.trials}
        return {key: run if key in needed else replace(run, state={}, predictions=[]) for key, run in runs.items()}

    def run(self, runs: Runs) -> Ensemble:
        """Train all networks with the best regime of the trials, and predict the hidden folds."""
        chosen, folds = self.best_regime(runs, self.trials), range(self.data.n_folds)
        params, runs = self.candidates[chosen], dict(runs)
        left = [k for k in folds if (chosen, k) not in runs]
        n_steps = len(left) * given(params.n_steps) + self.n_refits * self._refit_steps(params)
        stage = self._stage("networks", n_steps)
        runs |= {(chosen, k): run for k, run in stage._train_each(chosen, left)}
        own = [runs[chosen, k] for k in folds]
        useful = _is_useful(own)
        kept = -1 if useful else 0
        history = [pd.DataFrame(run.history).assign(network=k, kept=False) for k, run in enumerate(own)]
        for rows in history:
            rows.loc[rows.index[kept], "kept"] = True
        states, genes = stage._final(own, params) if useful else self._base(own[0], params)
        scales = {
            "network_centre": torch.stack([scale.centre for scale in genes]),
            "network_scale": torch.stack([scale.scale for scale in genes]),
        }
        regime = {name: getattr(params, name) for name in REGIME_SETTINGS}
        return Ensemble(states, scales, self.held_out(runs, folds), pd.concat(history, ignore_index=True), regime)

    def held_out(self, runs: Runs, folds: Iterable[int]) -> np.ndarray:
        """(n_known, g) prediction of the spots of some folds, with the choices of the others; NaN elsewhere."""
        predicted = np.full(self.data.truth.shape, np.nan, np.float32)
        of_stack = self.data.by_stack(predicted)
        for k in folds:
            regime = self._regime_without(k, runs)
            others = [run for (r, j), run in runs.items() if r == regime and j != k]
            found, scale = runs[regime, k].predictions, self.data.scale(k)
            useful = _is_useful(others or [runs[regime, k]])
            seen = [i for i, fold in enumerate(self.data.fold(k)) if fold.any()]
            for i, part in zip(seen, found, strict=True):
                if k < len(self.data.folds[i]):  # else its last fold, which another network predicts
                    fold = self.data.folds[i][k]
                    found_here = scale.restore(part) if useful else self.single[i].base.expression(fold)
                    of_stack[i][fold[self.data.stacks[i].known]] = found_here
        return predicted

    @cached_property
    def candidates(self) -> list[AsignParams]:
        """The regimes to choose from; with few known spots to learn from only the most cautious one."""
        found = regimes(self.settings.params)
        return found if len(self.data.truth) >= _FEW else found[:1]

    @property
    def n_refits(self) -> int:
        """Number of networks to train on all known spots: some if there are fewer folds than networks that predict."""
        return 0 if self.data.n_folds >= _N_NETWORKS else _N_REFITS

    def best_regime(self, runs: Runs, folds: Sequence[int]) -> int:
        """Position of the regime with the lowest error on some of the trial folds."""
        errors = [
            float(np.mean([runs[r, k].errors[1] for k in folds])) if all((r, k) in runs for k in folds) else np.inf
            for r in range(len(self.candidates))
        ]
        return int(np.argmin(errors))

    def _regime_without(self, k: int, runs: Runs) -> int:
        """Position of the regime that the trial folds other than `k` choose; that of all, if it was not tried on `k`."""
        regime = self.best_regime(runs, [t for t in self.trials if t != k] or self.trials)
        return regime if (regime, k) in runs else self.best_regime(runs, self.trials)

    def _base(self, run: TrainingRun, params: AsignParams) -> tuple[list[dict[str, Tensor]], list[GeneScale]]:
        """Network that returns the base."""
        network = MSAGNet(self.data.n_features, self.group, params)
        network.load_state_dict(run.state)
        network.return_to_base()
        return [cpu_state(network)], [self.data.scale()]

    def _final(self, runs: list[TrainingRun], params: AsignParams) -> tuple[list[dict[str, Tensor]], list[GeneScale]]:
        """Networks that predict, and the scale of their genes."""
        if not self.n_refits:
            return [run.state for run in runs], [self.data.scale(k) for k in range(len(runs))]
        params, batches = replace(params, n_steps=self._refit_steps(params)), self._batches(None)
        refits = [
            self._train_or_load(f"refit{j}", j, params, batches, [], n_before=len(runs)) for j in range(self.n_refits)
        ]
        return [run.state for run in refits], [self.data.scale()] * len(refits)

    def _refit_steps(self, params: AsignParams) -> int:
        """Steps of a network of all spots: more batches than with a fold hidden, so more steps to see each spot as often."""
        return round(given(params.n_steps) * len(self._targets(None)) / len(self._targets(0)))

    def _stage(self, name: str, n_steps: int) -> NetworkFit:
        """The same training, with progress of its own."""
        return replace(self, on_step=self.settings.progress(n_steps, name))

    def _train_each(self, r: int, folds: Sequence[int]) -> Iterator[tuple[int, TrainingRun]]:
        """Fold and network of each fold with one regime: one after the other, or together on the workers of a dask client."""
        client = active_client()
        if client is None:
            for k in folds:
                yield k, self._train_fold(r, k)
            return
        # The progress bar stays here: it advances by a whole network.
        alone = replace(self, on_step=_no_step, settings=replace(self.settings, progress=_no_progress))
        done = partial(self._skip_steps, self.candidates[r])
        tasks = [(alone, r, k) for k in folds]
        yield from zip(folds, run_on_workers(client, NetworkFit._train_fold, tasks, on_done=done), strict=True)

    def _train_fold(self, r: int, k: int) -> TrainingRun:
        """Network of one regime and fold, in this process or on a worker.

        Its batches are not kept for the next regime: with all genes they take a gigabyte, and little time.
        """
        return self._train_or_load(f"network{k}-{r}", k, self.candidates[r], self._batches(k), self._held_out(k))

    def _skip_steps(self, params: AsignParams) -> None:
        """Advance the progress by a network that was trained elsewhere."""
        for _ in range(given(params.n_steps)):
            self.on_step()

    def _train_or_load(
        self, name: str, k: int, params: AsignParams, batches: list[Batch], held_out: list[Batch], *, n_before: int = 0
    ) -> TrainingRun:
        """Result of a network, from the checkpoint folder if it was trained before."""
        folder = self.settings.checkpoint
        path = None if folder is None else folder / f"{self.name}-{name}.safetensors"
        found = None if path is None else load_checkpoint(path, self.settings.fingerprint)
        if found is not None:
            self._skip_steps(params)
            return TrainingRun.from_checkpoint(*found)
        n_spots = max(len(spots.known) for spots in self.data.stacks)
        with _ONE_TRAINING, suitable_threads(n_spots, params.width):
            run = train(
                lambda: self._build(k, params),
                batches,
                held_out,
                params,
                seed=self.settings.seed + n_before + k,
                device=self.settings.device,
                on_step=self.on_step,
            )
        if path is not None:
            save_checkpoint(path, run.tensors, run.history, self.settings.fingerprint)
        return run

    def _build(self, k: int, params: AsignParams) -> MSAGNet:
        network = MSAGNet(self.data.n_features, self.group, params)
        if start := self.settings.start:
            # The groups of genes are those of the new data.
            network.load_state_dict(start[k % len(start)] | {"group": self.group})
        return network

    def _batches(self, k: int | None) -> list[Batch]:
        """Batches of all spots that network `k` sees; of all known ones for None."""
        genes, targets = self.data.scale(k), self._targets(k)
        labels = {i: self.single[i] if k is None else self.nested(i, k) for i in {i for i, _ in targets}}
        return [self._batch(i, rows, labels[i], genes, self._seen(i, k)) for i, rows in targets]

    def _targets(self, k: int | None) -> list[tuple[int, np.ndarray]]:
        """Stack and spots of each batch of network `k`."""
        result = []
        for i, spots in enumerate(self.data.stacks):
            targets = np.flatnonzero(self._seen(i, k))
            plane = spots.xyz[targets, :2]
            tiles = plane_tiles(plane, plane, size=_BATCH) if len(targets) else ()
            result += [(i, np.sort(targets[own])) for _, own in tiles]
        return result

    def _seen(self, i: int, k: int | None) -> np.ndarray:
        """(n,) bool: known spots of a stack that network `k` sees; all of them for None."""
        known = self.data.stacks[i].known
        return known if k is None else known & ~self.data.fold(k)[i]

    def _held_out(self, k: int) -> list[Batch]:
        """The spots that network `k` does not see, one batch for each stack that has any."""
        genes = self.data.scale(k)
        folds = [np.flatnonzero(fold) for fold in self.data.fold(k)]
        return [self._batch(i, rows, self.single[i], genes) for i, rows in enumerate(folds) if len(rows)]

    def _batch(
        self, i: int, rows: np.ndarray, labels: LabelPredictions, genes: GeneScale, seen: np.ndarray | None = None
    ) -> Batch:
        """Some spots of a stack. The (n,) `seen` spots give the labels of the larger fields of view in training."""
        spots = self.data.stacks[i]
        targets = np.zeros(len(spots.known), dtype=bool)
        targets[rows] = True
        params = self.settings.params
        of_known = targets[spots.known]
        fields = None
        if seen is not None and (params.auxiliary_weight or params.consistency_weight):
            lacking = (
                genes.standardise(spots.expression) - genes.standardise(labels.base.expression(spots.known))
            ).numpy()
            means = [field_means(spots, lacking, rows, seen, edge) for edge in spots.field_um]
            fields = torch.from_numpy(np.stack(means))
        return Batch(
            inputs=graph_inputs(spots, params, targets=targets),
            fields=fields,
            labels=labels.inputs(genes, rows),
            target=Target.of(
                genes.standardise(spots.expression[of_known]),
                torch.from_numpy(self.weights[i][of_known].astype(np.float32)),
            ),
        )


def _is_useful(runs: list[TrainingRun]) -> bool:
    """True if training has lowered the error on the held-out spots."""
    before, after = np.mean([run.errors for run in runs], axis=0)
    return bool(after < before)
