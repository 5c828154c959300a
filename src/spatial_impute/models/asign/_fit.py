"""Fit ASIGN: hide blocks of known spots in turn, train on the rest, blend by what is reached on the hidden ones."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from spatial_impute._scores import pearson_by_gene, predictable_genes, summarise
from spatial_impute.models._spots import Spots, blocks, spatial_folds, training_rows
from spatial_impute.models.asign._baselines import METHODS, available_methods
from spatial_impute.models.asign._blend import blend_weights
from spatial_impute.models.asign._counting_noise import counting_weights, variance_parts
from spatial_impute.models.asign._finished_networks import FinishedNetworks, fit_fingerprint
from spatial_impute.models.asign._graph_inputs import build_network, graph_inputs, suitable_threads, with_components
from spatial_impute.models.asign._intervals import (
    held_out_noise,
    held_out_spread,
    held_out_support,
    relative_noise,
    spot_scale,
)
from spatial_impute.models.asign._model import NETWORK, AsignModel
from spatial_impute.models.asign._training import Episode, train

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from spatial_impute.models._params import AsignParams
    from spatial_impute.models.asign._network import MSAGNet

# The mean is where every blend starts, and the nearest spot is the k-NN of one.
_NOT_BLENDED = frozenset({"mean", "nearest"})
_MAX_KNOWN = 5000  # known spots to learn from, a section of Visium; all are used to impute
_MAX_TARGETS = 1000  # hidden spots that a network learns from, one block after the other


def fit(
    stacks: list[Spots],
    var_names: Sequence[str],
    params: AsignParams,
    *,
    config: dict[str, Any],
    seed: int,
    device: str,
    progress: Callable[[int], Callable[[], None]],
    checkpoint: Path | None = None,
    start: list[dict[str, Tensor]] | None = None,
) -> AsignModel:
    """Fit a model on the known spots of one or several stacks.

    Parameters
    ----------
    stacks
        Spots of each stack; all with the same genes and features.
    var_names
        Genes.
    params
        Settings.
    config
        Provenance to keep in the model.
    seed
        Seed.
    device
        Torch device.
    progress
        Given the number of steps to come, returns what to call after each.
    checkpoint
        Folder that keeps the networks that are finished.
    start
        Weights of networks to start from instead of the base.
    """
    finished = None
    if checkpoint is not None:
        given = {"params": asdict(params), "var_names": list(var_names), "config": config, "seed": seed}
        given["start"] = [{key: value.tolist() for key, value in state.items()} for state in start or []]
        finished = FinishedNetworks(checkpoint, fit_fingerprint(stacks, given))
    parts = [_training_part(s, params, seed) for s in stacks]
    stacks, folds = [with_components(spots) for spots, _ in parts], [own for _, own in parts]
    methods = available_methods(stacks[0])
    n_networks = max(len(f) for f in folds)
    step = progress(len(methods) * sum(len(f) for f in folds) + n_networks * params.n_steps)
    truth = np.concatenate([s.expression for s in stacks])
    held_out = {name: _held_out(stacks, folds, METHODS[name], step) for name in methods}
    for name in stacks[0].bases or {}:
        held_out[name] = np.concatenate([s.bases[name][s.known] for s in stacks])
    centre, scale = truth.mean(axis=0), np.maximum(truth.std(axis=0), 1e-3)
    # Genes are grouped by how well the best baseline predicts them.
    best = min(methods, key=lambda name: np.mean((held_out[name] - truth) ** 2))
    group = _gene_groups(pearson_by_gene(held_out[best], truth), params.n_gene_groups)
    # What is left after the best baseline is mostly noise, which tells how much each spot is worth.
    weight = counting_weights(held_out[best] - truth, np.concatenate([s.counting_noise for s in stacks]))
    weights_of = np.split(weight, np.cumsum([int(s.known.sum()) for s in stacks])[:-1])
    tensors = {
        "centre": torch.tensor(centre, dtype=torch.float32),
        "scale": torch.tensor(scale, dtype=torch.float32),
        "group": torch.from_numpy(group),
    }
    networks, held_out[NETWORK], history = _fit_networks(
        stacks,
        weights_of,
        folds,
        params,
        tensors,
        seed=seed,
        device=device,
        step=step,
        finished=finished,
        start=start,
    )

    experts = [name for name in held_out if name not in _NOT_BLENDED]
    fold_of_spot = _fold_of_spot(stacks, folds)
    deviations = np.stack([(held_out[name] - centre) / scale for name in experts])
    weights, blended = blend_weights(deviations, (truth - centre) / scale, fold_of_spot, weight)
    tensors["weights"] = torch.tensor(weights, dtype=torch.float32)
    held_out["asign"] = centre + blended * scale
    support = np.concatenate([held_out_support(s, f) for s, f in zip(stacks, folds, strict=True)])
    # How far a spot may be off depends on its depth: residuals are compared after that is taken out.
    noise = np.concatenate([held_out_noise(s, f) for s, f in zip(stacks, folds, strict=True)])
    usual_noise = float(noise[np.isfinite(noise)].mean()) if np.isfinite(noise).any() else float("nan")
    parts = variance_parts(held_out["asign"] - truth, relative_noise(noise, usual_noise))
    tensors["noise"] = torch.tensor([usual_noise, *parts], dtype=torch.float64)
    size = spot_scale(noise, tensors["noise"].numpy())[:, None]
    n_blocks = sum(_n_blocks(s, params) for s in stacks)
    tensors |= {
        "spread": torch.tensor(held_out_spread((held_out["asign"] - truth) / size, n_blocks), dtype=torch.float32),
        "spread_of_mean": torch.tensor(
            held_out_spread((held_out["mean"] - truth) / size, n_blocks), dtype=torch.float32
        ),
        "usual_support": torch.tensor([float(np.median(support))], dtype=torch.float32),
        "whole_sections": torch.tensor([all(len(np.unique(s.section[s.known])) > 1 for s in stacks)]),
    }

    scores = {name: summarise(predicted, truth, held_out["mean"]) for name, predicted in held_out.items()}
    return AsignModel(
        params=params,
        var_names=var_names,
        experts=experts,
        n_features=stacks[0].tokens[0].shape[2],
        networks=networks,
        tensors=tensors,
        cross_validation=pd.DataFrame(scores).T.rename_axis("method"),
        predictability=pd.Series(pearson_by_gene(held_out["asign"], truth), index=list(var_names)),
        predictable=pd.Series(predictable_genes(held_out["asign"], truth, fold_of_spot), index=list(var_names)),
        history=history,
        config=config | {"seed": seed},
    )


def _fit_networks(
    stacks: list[Spots],
    weights: list[np.ndarray],
    folds: list[list[np.ndarray]],
    params: AsignParams,
    tensors: dict[str, Tensor],
    *,
    seed: int,
    device: str,
    step: Callable[[], None],
    finished: FinishedNetworks | None,
    start: list[dict[str, Tensor]] | None,
) -> tuple[list[dict[str, Tensor]], np.ndarray, pd.DataFrame]:
    """One network per fold, stopped at the step that is best for all of them.

    Returns
    -------
    Their weights; the (n_known, g) predictions of each known spot by the network that did not see it; the history.
    """
    n_features = stacks[0].tokens[0].shape[2]

    def build(k: int) -> MSAGNet:
        network = build_network(params, n_features, tensors["group"])
        if start:
            # Which genes belong together was found on these data.
            network.load_state_dict(start[k % len(start)] | {"group": tensors["group"]})
        return network

    runs = []
    for k in range(max(len(f) for f in folds)):
        if finished is not None and (kept := finished.load(k)) is not None:
            runs.append(kept)
            for _ in range(params.n_steps):
                step()
            continue
        # A stack with fewer folds lends its last one again.
        out = [f[min(k, len(f) - 1)] for f in folds]
        rest = [s.hide(o) for s, o in zip(stacks, out, strict=True)]
        # Hidden for watching, and of the rest one block after the other hidden for training.
        episodes = [
            _episode(r, mask, w[~o[s.known]], tensors, params)
            for s, r, o, w in zip(stacks, rest, out, weights, strict=True)
            for mask in _masks(r, params, seed)
        ]
        with suitable_threads(max(len(s.known) for s in stacks), params.width):
            run = train(
                lambda k=k: build(k),
                episodes,
                [_episode(s, o, w, tensors, params) for s, o, w in zip(stacks, out, weights, strict=True)],
                n_steps=params.n_steps,
                learning_rate=params.learning_rate,
                weight_decay=params.weight_decay,
                correlation_weight=params.correlation_weight,
                seed=seed + k,
                device=device,
                on_step=step,
            )
        if finished is not None:
            finished.save(k, run)
        runs.append(run)
    best = int(np.argmin(np.mean([[row["held_out_mse"] for row in rows] for _, rows, _ in runs], axis=0)))
    predicted = []
    for i, spots in enumerate(stacks):
        full = np.empty((len(spots.known), spots.expression.shape[1]))
        for k, fold in enumerate(folds[i]):
            full[fold] = (runs[k][2][best][i] * tensors["scale"] + tensors["centre"]).numpy()
        predicted.append(full[spots.known])
    history = [
        pd.DataFrame(rows).assign(network=k, kept=lambda frame: frame.index == best)
        for k, (_, rows, _) in enumerate(runs)
    ]
    return [states[best] for states, _, _ in runs], np.concatenate(predicted), pd.concat(history, ignore_index=True)


def _training_part(spots: Spots, params: AsignParams, seed: int) -> tuple[Spots, list[np.ndarray]]:
    """Spots to learn from, and their folds: those of the whole stack, which other models may have been fitted without."""
    folds = _folds(spots, params, seed)
    rows = training_rows(spots, max_known=_MAX_KNOWN, seed=seed)
    within = [fold[rows] for fold in folds if fold[rows].any()]
    if len(rows) == len(spots.known) or len(within) < 2:  # regions smaller than the blocks of a fold
        return spots, folds
    return spots.take(rows), within


def _n_blocks(spots: Spots, params: AsignParams) -> int:
    """Blocks with known spots, those of each section for itself."""
    known = np.column_stack([spots.section[spots.known], blocks(spots, params.block_spacings)])
    return len(np.unique(known, axis=0))


def _folds(spots: Spots, params: AsignParams, seed: int) -> list[np.ndarray]:
    return spatial_folds(spots, n_folds=params.n_folds, block_spacings=params.block_spacings, seed=seed)


def _masks(spots: Spots, params: AsignParams, seed: int) -> list[np.ndarray]:
    """Blocks of known spots to hide for training, one after the other; as many as make up enough spots."""
    folds = _folds(spots, params, seed)
    before = np.cumsum([0, *(fold.sum() for fold in folds)])[:-1]
    return [fold for fold, n in zip(folds, before, strict=True) if n < _MAX_TARGETS]


def _episode(
    spots: Spots, masked: np.ndarray, weight: np.ndarray, tensors: dict[str, Tensor], params: AsignParams
) -> Episode:
    """Hide some known spots from the network; they are what it has to predict. `weight` is that of the known spots."""
    chosen = masked[spots.known]
    expression = torch.from_numpy(spots.expression[chosen].astype(np.float32))
    inputs, rows = graph_inputs(spots.hide(masked), tensors, params, asked=masked)
    return Episode(
        inputs=inputs,
        rows=torch.from_numpy(np.flatnonzero(masked[rows])),
        expression=(expression - tensors["centre"]) / tensors["scale"],
        weight=torch.from_numpy(weight[chosen].astype(np.float32)),
    )


def _held_out(
    stacks: list[Spots], folds: list[list[np.ndarray]], method: Callable[[Spots], np.ndarray], step: Callable[[], None]
) -> np.ndarray:
    """(n_known, g) predictions of the known spots of all stacks, each with its fold hidden."""
    result = []
    for spots, own in zip(stacks, folds, strict=True):
        predicted = np.empty((len(spots.known), spots.expression.shape[1]))
        for fold in own:
            predicted[fold] = method(spots.hide(fold))[fold]
            step()
        result.append(predicted[spots.known])
    return np.concatenate(result)


def _fold_of_spot(stacks: list[Spots], folds: list[list[np.ndarray]]) -> np.ndarray:
    """(n_known,) fold of each known spot, numbered over all stacks."""
    result, n_before = [], 0
    for spots, own in zip(stacks, folds, strict=True):
        result.append(n_before + np.argmax(np.stack(own)[:, spots.known], axis=0))
        n_before += len(own)
    return np.concatenate(result)


def _gene_groups(r: np.ndarray, n_groups: int) -> np.ndarray:
    """(g,) group of each gene: equal shares by how well it is predicted, worst first."""
    rank = np.argsort(np.argsort(np.nan_to_num(r, nan=-1.0), kind="stable"), kind="stable")
    return (rank * min(n_groups, len(r)) // len(r)).astype(np.int64)
