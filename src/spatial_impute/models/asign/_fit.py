"""Fit of ASIGN: predict hidden blocks of known spots with every method, then set weights and intervals by their errors."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scipy.linalg import cholesky, solve_triangular
from scipy.optimize import nnls

from spatial_impute._scores import pearson_by_gene, predictable_genes, summarise
from spatial_impute.models._spots import Spots, blocks, given
from spatial_impute.models.asign._baselines import METHODS, NEEDS_FEATURES, available_methods, knn, ridge
from spatial_impute.models.asign._cokriging import counting_weights, variance_parts
from spatial_impute.models.asign._graph_inputs import GeneScale
from spatial_impute.models.asign._intervals import (
    held_out_noise,
    held_out_spread,
    held_out_support,
    relative_noise,
    spot_scale,
)
from spatial_impute.models.asign._model import NETWORK, AsignModel
from spatial_impute.models.asign._training import FitSettings, NetworkFit, TrainingSet

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from spatial_impute.models._params import AsignParams
    from spatial_impute.models.asign._training import FitSettings

# The mean is where every blend starts, and the nearest spot is the k-NN with one neighbour.
_NOT_BLENDED = frozenset({"mean", "nearest"})

# From separate weights for each gene (0.01 of the size of its data) to the same weights for all genes.
_STRENGTHS = (0.01, 0.1, 1.0, 10.0, 1e6)
_NEGLIGIBLE = 1e-4  # a weight without a visible effect; the method is not run for it


def fit(stacks: Sequence[Spots], var_names: Sequence[str], settings: FitSettings) -> AsignModel:
    """Fit a model on the known spots of one or several stacks."""
    params, fingerprint = settings.params, {}
    if settings.checkpoint is not None:
        fingerprint = _fingerprint(stacks, var_names, settings)
    data = TrainingSet.from_stacks(stacks, params, settings.seed)
    methods = available_methods(data.stacks[0])
    n_steps = len(methods) * sum(len(folds) for folds in data.folds) + data.n_folds * params.n_steps
    on_step = settings.progress(n_steps)
    held_out = {name: _predict_held_out(data, METHODS[name], on_step) for name in methods}
    for name in data.stacks[0].bases or {}:
        held_out[name] = np.concatenate([given(spots.bases)[name][spots.known] for spots in data.stacks])

    truth = data.truth
    best = min(methods, key=lambda name: np.mean((held_out[name] - truth) ** 2))
    # The residuals of the best baseline are mostly noise, which determines the weight of each spot.
    weight = counting_weights(held_out[best] - truth, np.concatenate([s.counting_noise for s in data.stacks]))
    centre, scale = truth.mean(axis=0), np.maximum(truth.std(axis=0), 1e-3)
    networks = NetworkFit(
        data=data,
        weights=data.by_stack(weight),
        genes=GeneScale(torch.tensor(centre, dtype=torch.float32), torch.tensor(scale, dtype=torch.float32)),
        group=torch.from_numpy(_gene_groups(pearson_by_gene(held_out[best], truth), params.n_gene_groups)),
        settings=settings,
        fingerprint=fingerprint,
        on_step=on_step,
    )
    states, held_out[NETWORK], history = networks.run()

    experts = [name for name in held_out if name not in _NOT_BLENDED]
    deviations = np.stack([(held_out[name] - centre) / scale for name in experts])
    weights, blended = blend_weights(deviations, (truth - centre) / scale, data.fold_of_spot, weight)
    held_out["asign"] = centre + blended * scale
    scores = {name: summarise(predicted, truth, held_out["mean"]) for name, predicted in held_out.items()}
    predictable = predictable_genes(held_out["asign"], truth, data.fold_of_spot)
    return AsignModel(
        params=params,
        var_names=var_names,
        experts=experts,
        n_features=data.n_features,
        networks=states,
        tensors={
            "centre": networks.genes.centre,
            "scale": networks.genes.scale,
            "group": networks.group,
            "weights": torch.tensor(weights, dtype=torch.float32),
            **_interval_tensors(data, held_out["asign"] - truth, held_out["mean"] - truth, params),
        },
        cross_validation=pd.DataFrame(scores).T.rename_axis("method"),
        predictability=pd.Series(pearson_by_gene(held_out["asign"], truth), index=list(var_names)),
        predictable=pd.Series(predictable, index=list(var_names)),
        history=history,
        config=settings.config | {"seed": settings.seed},
    )


def _fingerprint(stacks: Sequence[Spots], var_names: Sequence[str], settings: FitSettings) -> dict[str, Any]:
    """Settings and hashes of the data: two fits with the same fingerprint give the same networks."""
    data, start = hashlib.sha256(), hashlib.sha256()
    for spots in stacks:
        graph = given(spots.graph)
        arrays = [spots.xyz, spots.section, spots.known, spots.expression, given(spots.features), spots.counting_noise]
        arrays += [*given(spots.tokens), graph.data, graph.indices, graph.indptr, given(spots.edge_features)]
        for array in arrays:
            data.update(repr((array.shape, array.dtype.str)).encode())
            data.update(np.ascontiguousarray(array).tobytes())
    for state in settings.start:
        start.update(json.dumps({key: value.tolist() for key, value in state.items()}).encode())
    return {
        "data": data.hexdigest(),
        "params": asdict(settings.params),
        "var_names": list(var_names),
        "config": settings.config,
        "seed": settings.seed,
        "start": start.hexdigest(),
    }


def _predict_held_out(
    data: TrainingSet, method: Callable[[Spots], np.ndarray], on_fold: Callable[[], None]
) -> np.ndarray:
    """(n_known, g) predictions of the known spots of all stacks, each with its fold hidden."""

    def predict(spots: Spots, folds: list[np.ndarray]) -> np.ndarray:
        predicted = np.empty((len(spots.known), spots.expression.shape[1]))
        for fold in folds:
            predicted[fold] = method(spots.hide(fold))[fold]
            on_fold()
        return predicted[spots.known]

    return data.per_stack(predict)


def _gene_groups(r: np.ndarray, n_groups: int) -> np.ndarray:
    """(g,) group of each gene: groups of equal size by the correlation of the best baseline, lowest first."""
    rank = np.argsort(np.argsort(np.nan_to_num(r, nan=-1.0), kind="stable"), kind="stable")
    return (rank * min(n_groups, len(r)) // len(r)).astype(np.int64)


def _interval_tensors(
    data: TrainingSet, residuals: np.ndarray, residuals_of_mean: np.ndarray, params: AsignParams
) -> dict[str, Tensor]:
    """Tensors of a model from which the standard deviations of imputed values are computed."""
    support = data.per_stack(held_out_support)
    noise = data.per_stack(held_out_noise)
    usual_noise = float(noise[np.isfinite(noise)].mean()) if np.isfinite(noise).any() else float("nan")
    # The error of a spot depends on its depth, so residuals are divided by this effect before they are compared.
    parts = np.array([usual_noise, *variance_parts(residuals, relative_noise(noise, usual_noise))])
    size = spot_scale(noise, parts)[:, None]
    known = [np.column_stack([s.section[s.known], blocks(s, params.block_spacings)]) for s in data.stacks]
    n_blocks = sum(len(np.unique(rows, axis=0)) for rows in known)  # of each section separately
    return {
        "noise": torch.tensor(parts, dtype=torch.float64),
        "spread": torch.tensor(held_out_spread(residuals / size, n_blocks), dtype=torch.float32),
        "spread_of_mean": torch.tensor(held_out_spread(residuals_of_mean / size, n_blocks), dtype=torch.float32),
        "usual_support": torch.tensor([float(np.median(support))], dtype=torch.float32),
        "whole_sections": torch.tensor([all(len(np.unique(s.section[s.known])) > 1 for s in data.stacks)]),
    }


def blend_weights(
    predictions: np.ndarray, truth: np.ndarray, folds: np.ndarray, spot_weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Non-negative weights of several predictions for every gene, (g, k), and the blend with weights of the other folds.

    The weights of each gene are shrunk to weights common to all genes. The strength is the best one for held-out folds.
    If a single prediction is better than the best blend there, it is used alone. The sum of weights need not be one: a sum
    below one shrinks to the mean.

    Parameters
    ----------
    predictions, truth
        (k, n, g) and (n, g) as deviations from the mean profile, in units comparable between genes.
    folds, spot_weights
        (n,) fold of each spot, and weight of its squared error (1 by default).
    """
    codes = np.unique(folds)
    w = np.ones(len(truth)) if spot_weights is None else spot_weights
    # Sums of products suffice: (fold, g, k, k) and (fold, g, k).
    gram = np.stack(
        [
            np.einsum("n,kng,lng->gkl", w[folds == c], p, p, optimize=True)
            for c, p in ((c, predictions[:, folds == c]) for c in codes)
        ]
    )
    moment = np.stack(
        [
            np.einsum("n,kng,ng->gk", w[folds == c], predictions[:, folds == c], truth[folds == c], optimize=True)
            for c in codes
        ]
    )

    def error(predicted: np.ndarray) -> float:
        return float(np.mean(w[:, None] * (predicted - truth) ** 2))

    candidates = {}
    for strength in _STRENGTHS:
        blended = np.empty(truth.shape)
        for i, code in enumerate(codes):
            weights = _gene_weights(gram.sum(axis=0) - gram[i], moment.sum(axis=0) - moment[i], strength)
            blended[folds == code] = np.einsum("kng,gk->ng", predictions[:, folds == code], weights)
        candidates[strength] = blended
    strength = min(candidates, key=lambda s: error(candidates[s]))
    best = int(np.argmin([error(p) for p in predictions]))
    if error(candidates[strength]) >= error(predictions[best]):
        return np.tile(np.eye(len(predictions))[best], (truth.shape[1], 1)), predictions[best]
    return _gene_weights(gram.sum(axis=0), moment.sum(axis=0), strength), candidates[strength]


def _gene_weights(gram: np.ndarray, moment: np.ndarray, strength: float) -> np.ndarray:
    """(g, k) weights from the sums of products of each gene, shrunk to the weights for all genes together."""
    common = _solve_nonnegative(gram.sum(axis=0), moment.sum(axis=0))
    k = gram.shape[1]
    ridge = strength * np.trace(gram.mean(axis=0)) / k
    found = np.stack(
        [_solve_nonnegative(g + ridge * np.eye(k), m + ridge * common) for g, m in zip(gram, moment, strict=True)]
    )
    return np.where(found > _NEGLIGIBLE, found, 0.0)


def _solve_nonnegative(gram: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """Non-negative least squares from sums of products."""
    size = np.trace(gram)
    if size <= 0:
        return np.zeros(len(moment))
    # A small ridge, because the matrix is singular if two predictions are equal.
    factor = cholesky(gram + 1e-10 * size * np.eye(len(gram)), lower=False)
    return nnls(factor, solve_triangular(factor, moment, trans="T"))[0]


ASIGN = "asign"
PIXNET = "pixnet"
COLOR = "colour"
IMAGE_KNN = "image_knn"

FROM_IMAGE = ("mean", "ridge", IMAGE_KNN, COLOR, PIXNET)
"""Methods that predict from the image alone, so that they can be fitted on some slides and applied to others."""


def needs_features(method: str) -> bool:
    """True if a method reads the features of spots."""
    return method in {*NEEDS_FEATURES, IMAGE_KNN, ASIGN}


def predict_held_out(
    spots: Spots,
    folds: Sequence[np.ndarray],
    method: str,
    *,
    var_names: Sequence[str],
    settings: FitSettings,
    on_fold: Callable[[], None],
) -> np.ndarray:
    """(n, g) prediction of every fold from the others; NaN for spots in no fold.

    ASIGN is fitted anew for each fold, including all choices that it makes by cross-validation. For ``"colour"`` the
    features of the spots must be their color statistics.
    """
    result = np.full((len(spots.known), spots.expression.shape[1]), np.nan)
    for fold in folds:
        rest = spots.hide(fold)
        if method == ASIGN:
            model = fit([rest], var_names, settings)
            found = model._impute(rest, device=settings.device).expression
        elif method == IMAGE_KNN:
            found = knn(replace(rest, xyz=given(rest.features)))  # neighbours in feature space
        elif method == COLOR:
            found = ridge(rest)
        else:
            found = METHODS[method](rest)
        result[fold] = found[fold]
        on_fold()
    return result


def concatenate(stacks: Sequence[Spots]) -> Spots:
    """Spots of several stacks as one, for methods of :data:`FROM_IMAGE`, which use no coordinates and no graph."""
    if len(stacks) == 1:
        return stacks[0]
    first = np.cumsum([0, *(int(s.section.max()) + 1 for s in stacks[:-1])])
    features = [s.features for s in stacks if s.features is not None]
    totals = [s.total_counts for s in stacks if s.total_counts is not None]
    return Spots(
        xyz=np.concatenate([s.xyz for s in stacks]),
        section=np.concatenate([s.section + n for s, n in zip(stacks, first, strict=True)]),
        known=np.concatenate([s.known for s in stacks]),
        expression=np.concatenate([s.expression for s in stacks]),
        spacing=float(np.median([s.spacing for s in stacks])),
        features=np.concatenate(features) if len(features) == len(stacks) else None,
        total_counts=np.concatenate(totals) if len(totals) == len(stacks) else None,
    )
