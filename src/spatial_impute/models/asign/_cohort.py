"""ASIGN in two dimensions: stacks without a measured spot, predicted from the image and the graph alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from spatial_impute._scores import pearson_by_gene, predictable_genes
from spatial_impute._settings import logger
from spatial_impute.models._spots import Spots, block_folds, concatenate, given
from spatial_impute.models.asign._baselines import apply_linear, fit_ridge
from spatial_impute.models.asign._blend import KnownTruth, cross_validation_table
from spatial_impute.models.asign._ensemble import NetworkFit, TrainingSet
from spatial_impute.models.asign._graph_inputs import LabelPredictions
from spatial_impute.models.asign._intervals import held_out_spread
from spatial_impute.models.asign._model import BASE, NETWORK, WITHOUT, AsignModel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from spatial_impute.models.asign._cokriging import Kriging
from spatial_impute.models.asign._ensemble import FitSettings

_RIDGE = "ridge"
_FAR = 2.0  # times the largest distance between the stacks that the model was fitted on


class CohortModel(AsignModel):
    """Part of an :class:`AsignModel` of several stacks for stacks without a measured spot.

    The base is a ridge regression on the image features of all stacks. Features are standardised within each section, so
    that stain and scanner do not count. Scores and intervals come from stacks that were held out as a whole.
    """

    def _labels(self, spots: Spots) -> tuple[LabelPredictions, list[Kriging]]:
        base = apply_linear(
            given(spots.features), self._tensors["ridge"].numpy(), self._tensors["ridge_offset"].numpy()
        )
        return LabelPredictions(base, base, np.zeros(len(base))), []

    def _widening(self, spots: Spots) -> float:
        """Factor on the intervals of a stack whose images are unlike those of the training; logs a warning."""
        distance = _distance(given(spots.image_profile), self._tensors["profiles"].numpy())
        usual = max(float(self._tensors["usual_distance"]), 1e-12)
        ratio = distance / usual
        if ratio <= _FAR:
            return 1.0
        logger.warning(
            "The image features of this stack are %.1f times as far from those of the training stacks as these are from "
            "each other: another tissue, stain or scanner. Do not trust the predictions without a measured section; their "
            "intervals are widened by this factor.",
            ratio,
        )
        return ratio


def fit_cohort(stacks: Sequence[Spots], var_names: Sequence[str], settings: FitSettings) -> CohortModel:
    """Fit a model for stacks without a measured spot; each stack is held out once."""
    n = len(stacks)
    folds = [
        [s.known if j == i else np.zeros(len(s.known), dtype=bool) for j in range(n)] for i, s in enumerate(stacks)
    ]
    data = TrainingSet(list(stacks), folds, settings.params, settings.seed)
    truth, fold = data.truth, np.repeat(np.arange(n), [int(s.known.sum()) for s in stacks])
    single = [_from_others(stacks, i, {i}) for i in range(n)]
    held_out = {
        "mean": np.concatenate([np.tile(truth[fold != i].mean(axis=0), (int((fold == i).sum()), 1)) for i in range(n)]),
        _RIDGE: np.concatenate([part.base[s.known] for part, s in zip(single, stacks, strict=True)]),
    }

    def nested(i: int, k: int) -> LabelPredictions:
        return _from_others(stacks, i, {i, k}) if n > 2 else _from_blocks(stacks[i], settings)

    group = torch.zeros(len(var_names), dtype=torch.long)
    weights = [np.ones(int(s.known.sum())) for s in stacks]
    fingerprint = {"cohort": True, "n_stacks": n}
    networks = NetworkFit("cohort", data, single, nested, weights, group, settings, fingerprint, lambda: None)
    found = networks.run(networks.try_regimes())
    held_out[NETWORK] = found.held_out
    known = KnownTruth(truth, fold, np.ones(len(truth)))
    blend, held_out["asign"] = known.blend(held_out, [_RIDGE, NETWORK])
    without, held_out[WITHOUT] = known.blend(held_out, [_RIDGE])
    held_out[BASE] = held_out[_RIDGE]
    slope, offset = fit_ridge(concatenate(stacks))
    profiles = np.stack([given(s.image_profile) for s in stacks])
    names = list(var_names)
    return CohortModel(
        params=settings.params,
        var_names=var_names,
        experts=[_RIDGE, NETWORK],
        base=_RIDGE,
        n_features=data.n_features,
        networks=found.states,
        tensors={
            "centre": torch.tensor(truth.mean(axis=0), dtype=torch.float32),
            "network_centre": torch.stack([genes.centre for genes in found.scales]),
            "network_scale": torch.stack([genes.scale for genes in found.scales]),
            "group": group,
            "weights": torch.tensor(blend, dtype=torch.float32),
            "weights_without": torch.tensor(without, dtype=torch.float32),
            "ridge": torch.tensor(slope, dtype=torch.float32),
            "ridge_offset": torch.tensor(offset, dtype=torch.float32),
            "profiles": torch.tensor(profiles, dtype=torch.float32),
            "usual_distance": torch.tensor(_usual_distance(profiles)),
            **_spread(held_out["asign"] - truth, fold),
        },
        cross_validation=cross_validation_table(held_out, truth, fold),
        predictability=pd.Series(pearson_by_gene(held_out["asign"], truth, fold), index=names),
        predictable=pd.Series(predictable_genes(held_out["asign"], truth, fold), index=names),
        history=found.history,
        config=settings.config | {"seed": settings.seed, "regime": found.regime},
    )


def _from_others(stacks: Sequence[Spots], i: int, hidden: set[int]) -> LabelPredictions:
    """Ridge prediction of all spots of stack `i` from the stacks that are not hidden."""
    slope, offset = fit_ridge(concatenate([s for j, s in enumerate(stacks) if j not in hidden]))
    found = apply_linear(given(stacks[i].features), slope, offset).astype(np.float32)
    return LabelPredictions(found, found, np.zeros(len(found)))


def _from_blocks(spots: Spots, settings: FitSettings) -> LabelPredictions:
    """Ridge prediction of each known spot from other blocks of the only stack that is left."""
    params = settings.params
    found = np.zeros((len(spots.known), spots.expression.shape[1]), np.float32)
    blocks = block_folds(spots, n_folds=params.n_folds, block_spacings=params.block_spacings, seed=settings.seed)
    for block in blocks:
        slope, offset = fit_ridge(spots.hide(block))
        found[block] = apply_linear(given(spots.features)[block], slope, offset)
    return LabelPredictions(found, found, np.zeros(len(found)))


def _spread(residuals: np.ndarray, fold: np.ndarray) -> dict[str, Tensor]:
    """Standard deviations from the held-out stack with the largest errors: a new stack may be like that one."""
    by_stack = [held_out_spread(residuals[fold == k], int((fold == k).sum())) for k in np.unique(fold)]
    spread = torch.tensor(np.max(by_stack, axis=0), dtype=torch.float32)
    constants: dict[str, Any] = {"noise": [np.nan, 1.0, 0.0], "usual_support": [1.0], "whole_sections": [True]}
    return {"spread": spread, "spread_of_mean": spread.clone()} | {key: torch.tensor(v) for key, v in constants.items()}


def _distance(profile: np.ndarray, others: np.ndarray) -> float:
    """Median difference over the features of a stack to the nearest of others, in their spread; (2, d) and (n, 2, d)."""
    differences = np.abs(others[:, 0] - profile[0]) / np.maximum(others[:, 1].mean(axis=0), 1e-12)
    return float(np.median(differences, axis=1).min())


def _usual_distance(profiles: np.ndarray) -> float:
    """Largest distance of a training stack to the others."""
    every = np.arange(len(profiles))
    return max(_distance(profiles[i], profiles[every != i]) for i in every)
