"""ASIGN in two dimensions: stacks without a measured spot, predicted from the image and the graph alone."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from spatial_impute.models._spots import Spots, block_folds, concatenate, given
from spatial_impute.models.asign._baselines import fit_ridge, ridge_line
from spatial_impute.models.asign._blend import KnownTruth, held_out_results, held_out_spread
from spatial_impute.models.asign._ensemble import FitSettings, NetworkFit, TrainingSet
from spatial_impute.models.asign._graph_inputs import LabelPredictions
from spatial_impute.models.asign._model import BASE, NETWORK, WITHOUT, CohortModel, image_distance
from spatial_impute.models.asign._predictions import Linear, Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_RIDGE = "ridge"


def fit_cohort(stacks: Sequence[Spots], var_names: Sequence[str], settings: FitSettings) -> CohortModel:
    """Fit a model for stacks without a measured spot; each stack is held out once."""
    settings = replace(settings, start=())  # networks of stacks with measured spots have other outputs
    n = len(stacks)
    folds = [
        [s.known if j == i else np.zeros(len(s.known), dtype=bool) for j in range(n)] for i, s in enumerate(stacks)
    ]
    data = TrainingSet(list(stacks), folds, settings.params, settings.seed)
    truth, fold = data.truth, np.repeat(np.arange(n), [int(s.known.sum()) for s in stacks])
    single = [_from_others(stacks, i, {i}) for i in range(n)]
    held_out = {
        "mean": np.concatenate([np.tile(truth[fold != i].mean(axis=0), (int((fold == i).sum()), 1)) for i in range(n)]),
        _RIDGE: np.concatenate([part.base.expression(s.known) for part, s in zip(single, stacks, strict=True)]),
    }

    def nested(i: int, k: int) -> LabelPredictions:
        return _from_others(stacks, i, {i, k}) if n > 2 else _from_blocks(stacks[i], settings)

    group = torch.zeros(len(var_names), dtype=torch.long)
    weights = [np.ones(int(s.known.sum())) for s in stacks]
    networks = NetworkFit("cohort", data, single, nested, weights, group, settings)
    found = networks.run(networks.try_regimes())
    held_out[NETWORK] = found.held_out
    known = KnownTruth(truth, fold, np.ones(len(truth)))
    blend, held_out["asign"] = known.blend(held_out, [_RIDGE, NETWORK])
    without, held_out[WITHOUT] = known.blend(held_out, [_RIDGE])
    scores = {name: known.score(table, held_out["mean"]) for name, table in held_out.items()}
    scores[BASE] = scores[_RIDGE]
    slope, offset = ridge_line(concatenate(stacks))
    profiles = np.stack([given(s.image_profile) for s in stacks])
    largest_distance = max(
        image_distance(profile, np.delete(profiles, i, axis=0)) for i, profile in enumerate(profiles)
    )
    return CohortModel(
        params=settings.params,
        var_names=list(var_names),
        _experts=[_RIDGE, NETWORK],
        base=_RIDGE,
        _n_features=data.n_features,
        _networks=found.states,
        _tensors={
            **found.scales,
            "centre": torch.tensor(truth.mean(axis=0), dtype=torch.float32),
            "group": group,
            "weights": torch.tensor(blend, dtype=torch.float32),
            "weights_without": torch.tensor(without, dtype=torch.float32),
            "ridge": torch.tensor(slope, dtype=torch.float32),
            "ridge_offset": torch.tensor(offset, dtype=torch.float32),
            "profiles": torch.tensor(profiles, dtype=torch.float32),
            "usual_distance": torch.tensor(largest_distance),
            **_spread(held_out["asign"] - truth, fold),
        },
        **held_out_results(scores, held_out["asign"], known, var_names),
        history=found.history,
        config=settings.config | {"seed": settings.seed, "regime": found.regime},
    )


def _from_others(stacks: Sequence[Spots], i: int, hidden: set[int]) -> LabelPredictions:
    """Ridge prediction of all spots of stack `i` from the stacks that are not hidden."""
    slope, offset = ridge_line(concatenate([s for j, s in enumerate(stacks) if j not in hidden]))
    found = Linear(offset, given(stacks[i].features), slope)
    return LabelPredictions(found, found, np.zeros(len(stacks[i].known)))


def _from_blocks(spots: Spots, settings: FitSettings) -> LabelPredictions:
    """Ridge prediction of each known spot from other blocks of the only stack that is left."""
    params = settings.params
    found = np.zeros((len(spots.known), spots.expression.shape[1]), np.float32)
    blocks = block_folds(spots, n_folds=params.n_folds, block_spacings=params.block_spacings, seed=settings.seed)
    for block in blocks:
        found[block] = fit_ridge(spots.hide(block)).expression(block)
    return LabelPredictions(Table(found), Table(found), np.zeros(len(found)))


def _spread(residuals: np.ndarray, fold: np.ndarray) -> dict[str, Tensor]:
    """Standard deviations from the held-out stack with the largest errors: a new stack may be like that one."""
    by_stack = [held_out_spread(residuals[fold == k], int((fold == k).sum())) for k in np.unique(fold)]
    spread = torch.tensor(np.max(by_stack, axis=0), dtype=torch.float32)
    constants: dict[str, Any] = {"noise": [1.0, 1.0, 0.0], "usual_support": [1.0], "whole_sections": [True]}
    return {"spread": spread, "spread_of_mean": spread.clone()} | {key: torch.tensor(v) for key, v in constants.items()}
