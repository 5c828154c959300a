"""Fit of ASIGN: predict hidden blocks of known spots with every method, then set weights and intervals by their errors."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from spatial_impute._io.workers import run_tasks
from spatial_impute._scores import pearson_by_gene
from spatial_impute.models._spots import Spots, blocks, given
from spatial_impute.models.asign._baselines import (
    METHODS,
    NEEDS_FEATURES,
    RECIPES,
    mean_profile,
    recalibrate,
)
from spatial_impute.models.asign._blend import (
    KnownTruth,
    held_out_noise,
    held_out_results,
    held_out_spread,
    relative_noise,
    spot_scale,
)
from spatial_impute.models.asign._cohort import fit_cohort
from spatial_impute.models.asign._cokriging import counting_weights, variance_parts
from spatial_impute.models.asign._ensemble import (
    FitSettings,
    NetworkFit,
    TrainingSet,
)
from spatial_impute.models.asign._graph_inputs import TWO_VIEWS, LabelPredictions, krige_views, nested_predictions
from spatial_impute.models.asign._model import BASE, NETWORK, WITHOUT, AsignModel
from spatial_impute.models.asign._predictions import Mean, OfKnown, row_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from spatial_impute.models._params import AsignParams
    from spatial_impute.models.asign._ensemble import Runs
    from spatial_impute.models.asign._predictions import Linear, Prediction

# The mean is where every blend starts, and the nearest spot is the k-NN with one neighbor.
_NOT_BLENDED = frozenset({"mean", "nearest"})

# What the network can add its correction to.
BASES = ("mean", "propagation", "cokriging", TWO_VIEWS)


def fit(stacks: Sequence[Spots], var_names: Sequence[str], settings: FitSettings) -> AsignModel:
    """Fit a model on the known spots of one or several stacks."""
    params = settings.params
    stacks = [
        replace(spots, device=settings.device, expression=spots.expression.astype(np.float32, copy=False))
        for spots in stacks
    ]
    data = TrainingSet.from_stacks(stacks, params, settings.seed)
    n_folds = sum(map(len, data.folds))
    on_fold = settings.progress(len(METHODS) * n_folds, "baselines")
    found = _HeldOut.by_baselines(data, on_fold)
    group = torch.from_numpy(_gene_groups(found.best_r, params.n_gene_groups))
    if settings.checkpoint is not None:
        settings = replace(settings, fingerprint=_fingerprint(stacks, var_names, settings))
    tried: dict[str, tuple[NetworkFit, Runs]] = {}
    regime = None
    for name in _bases(params, found.error):
        networks = found.networks(name, group, settings)
        tried[name] = networks, networks.try_regimes(regime)
        regime = networks.best_regime(tried[name][1], networks.trials)  # the first base chooses for the other
    base = _better_base({name: _trial_errors(*parts, found) for name, parts in tried.items()})
    networks, runs = tried[base]
    del tried  # each run has predictions of all genes, and all of them together take a gigabyte
    ensemble = networks.run(runs)
    del networks, runs

    known, mean = found.known, found.rows["mean"]
    weights_without, without = known.blend(found.rows, found.blended)
    score_without = known.score(without, mean)
    del without  # before the next table of all genes
    experts, rows = [*found.blended, NETWORK], found.rows | {NETWORK: ensemble.held_out}
    weights, asign = known.blend(rows, experts)
    scores = {name: known.score(table, mean) for name, table in (rows | {"asign": asign}).items()}
    scores |= {WITHOUT: score_without, BASE: scores["mean" if base == "none" else base]}
    support = found.support
    del rows, found  # the tables of the other methods
    return AsignModel(
        params=params,
        var_names=list(var_names),
        _experts=experts,
        base=base,
        _n_features=data.n_features,
        _networks=ensemble.states,
        _tensors={
            **ensemble.scales,
            "centre": torch.tensor(known.values.mean(axis=0), dtype=torch.float32),
            "group": group,
            "weights": torch.tensor(weights, dtype=torch.float32),
            "weights_without": torch.tensor(weights_without, dtype=torch.float32),
            **_interval_tensors(data, asign - known.values, mean - known.values, support, params),
        },
        **held_out_results(scores, asign, known, var_names),
        history=ensemble.history,
        config=settings.config | {"seed": settings.seed, "regime": ensemble.regime},
        cohort=fit_cohort(stacks, var_names, settings) if len(stacks) > 1 else None,
    )


@dataclass(frozen=True)
class _HeldOut:
    """Predictions of the known spots by the baselines, each spot with its fold hidden."""

    data: TrainingSet
    known: KnownTruth
    rows: dict[str, np.ndarray]  # by method: (n_known, g)
    error: dict[str, float]  # mean squared error of the baselines
    kriged: list[list[list[Linear]]]  # per stack and hidden fold
    support: np.ndarray  # (n_known,) mass of the propagation

    @classmethod
    def by_baselines(cls, data: TrainingSet, on_fold: Callable[[], None]) -> _HeldOut:
        """Predict all folds with all baselines, and take those of base layers."""
        truth = data.truth
        propagated, support = _propagate_held_out(data, on_fold)
        others = {name: method for name, method in METHODS.items() if name not in ("propagation", "cokriging")}
        found = {"propagation": propagated} | _predict_held_out(data, others, on_fold)
        rows = {name: found[name] for name in METHODS if name in found}
        kriged = _krige_folds(data, on_fold)
        rows |= _held_out_kriging(data, kriged)
        error = {name: _squared_error(found, truth) for name, found in rows.items()}
        # The residuals of the best baseline are mostly noise, which determines the weight of each spot.
        best = rows[min(error, key=error.__getitem__)]
        weight = counting_weights(best - truth, np.concatenate([s.counting_noise for s in data.stacks]))
        known = KnownTruth(truth, data.fold_of_spot, weight, data.stacks[0].independent)
        return cls(data, known, rows | _base_layers(data), error, kriged, support)

    @property
    def best_r(self) -> np.ndarray:
        """(g,) correlation of each gene by the best baseline."""
        best = self.rows[min(self.error, key=self.error.__getitem__)]
        return pearson_by_gene(best, self.known.values, self.known.folds)

    @property
    def blended(self) -> list[str]:
        """Methods that take part in the blend, without the networks."""
        return [name for name in self.rows if name not in _NOT_BLENDED]

    def networks(self, base: str, group: Tensor, settings: FitSettings) -> NetworkFit:
        """Networks that start at a base."""
        data = self.data
        parts = self.rows["mean" if base == "none" else base], self.rows["propagation"], self.support

        def nested(i: int, k: int) -> LabelPredictions:
            k = min(k, len(data.folds[i]) - 1)
            rest, groups = data.rest(i, k)
            graph = data.graphs[i].hide(data.folds[i][k][data.stacks[i].known])
            return nested_predictions(rest, graph, groups, base, self.kriged[i][k])

        return NetworkFit(
            name=base,
            data=data,
            single=[_at_known(*part) for part in zip(data.stacks, *map(data.by_stack, parts), strict=True)],
            nested=nested,
            weights=data.by_stack(self.known.weight),
            group=group,
            settings=settings,
        )


def _bases(params: AsignParams, error: dict[str, float]) -> list[str]:
    """Bases to try: the mean, from which a network learns most that the baselines do not know, and the best of these."""
    if params.base != "auto":
        return [params.base if params.base in error or params.base == "none" else "cokriging"]
    return list(dict.fromkeys(["mean", min((name for name in BASES if name in error), key=error.__getitem__)]))


def _trial_errors(networks: NetworkFit, runs: Runs, held_out: _HeldOut) -> np.ndarray:
    """(m,) squared error of the blend of the networks with other methods at the spots of the trial folds."""
    found, known = networks.held_out(runs, networks.trials), held_out.known
    rows = {name: held_out.rows[name] for name in held_out.blended} | {NETWORK: found}
    part = known.some(np.isfinite(found[:, 0]))
    _, blended = part.blend(rows, list(rows))
    return part.weight * np.mean((blended - part.values) ** 2, axis=1)


def _better_base(errors: dict[str, np.ndarray]) -> str:
    """The first base, unless another one has lower errors by more than two standard errors.

    The first is the mean. The blend contains the other base in any case, and networks that do not start there make other
    errors than it does.
    """
    first, *others = errors
    for name in others:
        gain = errors[first] - errors[name]
        if gain.mean() > 2 * gain.std() / np.sqrt(len(gain)):
            return name
    return first


def _base_layers(data: TrainingSet) -> dict[str, np.ndarray]:
    """(n_known, g) held-out predictions by base layers."""
    rows: dict[str, np.ndarray] = {}
    independent = data.stacks[0].independent
    for name in data.stacks[0].bases or {}:
        if name in independent:
            rows |= _predict_held_out(data, {name: partial(recalibrate, name=name)}, lambda: None)
        else:
            rows[name] = np.concatenate([given(spots.bases)[name][spots.known] for spots in data.stacks])
    return rows


def _propagate_held_out(data: TrainingSet, on_fold: Callable[[], None]) -> tuple[np.ndarray, np.ndarray]:
    """(n_known, g) propagated labels, and (n_known,) mass, of all known spots, each with its fold hidden."""
    values, support = np.zeros(data.truth.shape, np.float32), np.zeros(len(data.truth))
    parts = zip(data.stacks, data.folds, data.graphs, data.by_stack(values), data.by_stack(support), strict=True)
    for spots, folds, graph, found, mass in parts:
        for fold in folds:
            hidden, rest = fold[spots.known], spots.hide(fold)
            found[hidden], mass[hidden] = graph.propagate(hidden, rest.expression)
            unreached = hidden & (mass == 0)
            found[unreached] = mean_profile(rest)
            on_fold()
    return values, support


def _krige_folds(data: TrainingSet, on_fold: Callable[[], None]) -> list[list[list[Linear]]]:
    """Per stack and hidden fold: co-kriging with all image features and, of several sections, with those they share."""
    tasks = [(data, i, k) for i, folds in enumerate(data.folds) for k in range(len(folds))]
    found = iter(run_tasks(_krige_fold, tasks, on_fold))
    return [[next(found) for _ in folds] for folds in data.folds]


def _krige_fold(data: TrainingSet, i: int, k: int) -> list[Linear]:
    rest, groups = data.rest(i, k)
    return krige_views(rest, two=len(np.unique(rest.section)) > 1, left_out=groups)


def _held_out_kriging(data: TrainingSet, kriged: list[list[list[Linear]]]) -> dict[str, np.ndarray]:
    """(n_known, g) held-out predictions by co-kriging, and by both views of it where all stacks have them."""
    n_views = min(len(views) for parts in kriged for views in parts)
    rows = {name: np.empty(data.truth.shape, np.float32) for name in ("cokriging", TWO_VIEWS)[:n_views]}
    for n, found in enumerate(rows.values(), start=1):
        for spots, folds, parts, own in zip(data.stacks, data.folds, kriged, data.by_stack(found), strict=True):
            for fold, views in zip(folds, parts, strict=True):
                own[fold[spots.known]] = Mean(views[:n]).expression(fold)
    return rows


def _at_known(spots: Spots, base: np.ndarray, propagated: np.ndarray, support: np.ndarray) -> LabelPredictions:
    """Predictions of the known spots; the others have no support."""
    of_all = np.zeros(len(spots.known))
    of_all[spots.known] = support
    return LabelPredictions(OfKnown(base, spots.known), OfKnown(propagated, spots.known), of_all)


def _fingerprint(stacks: Sequence[Spots], var_names: Sequence[str], settings: FitSettings) -> dict[str, Any]:
    """Settings and hashes of the data: two fits with the same fingerprint give the same networks."""
    data, start = hashlib.sha256(), hashlib.sha256()
    for spots in stacks:
        graph = given(spots.graph)
        arrays = [spots.xyz, spots.section, spots.known, spots.expression, given(spots.features), spots.counting_noise]
        arrays += [np.array(spots.field_um), *given(spots.tokens), graph.data, graph.indices, graph.indptr]
        for array in (*arrays, given(spots.edge_features)):
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
    data: TrainingSet, fits: dict[str, Callable[[Spots], Prediction]], on_fold: Callable[[], None]
) -> dict[str, np.ndarray]:
    """(n_known, g) predictions of the known spots of all stacks by several methods, each spot with its fold hidden."""
    rows = {name: np.empty(data.truth.shape, np.float32) for name in fits}
    of_stack = {name: data.by_stack(values) for name, values in rows.items()}
    for i, (spots, folds) in enumerate(zip(data.stacks, data.folds, strict=True)):
        for fold in folds:
            rest, own = spots.hide(fold), fold[spots.known]
            for name, method in fits.items():
                of_stack[name][i][own] = method(rest).expression(fold)
                on_fold()
    return rows


def _squared_error(found: np.ndarray, truth: np.ndarray) -> float:
    """Mean squared error."""
    parts = [((found[rows] - truth[rows]) ** 2).sum(dtype=float) for rows in row_blocks(*truth.shape)]
    return float(np.sum(parts)) / truth.size


def _gene_groups(r: np.ndarray, n_groups: int) -> np.ndarray:
    """(g,) group of each gene: groups of equal size by the correlation of the best baseline, lowest first."""
    rank = np.argsort(np.argsort(np.nan_to_num(r, nan=-1.0), kind="stable"), kind="stable")
    return (rank * min(n_groups, len(r)) // len(r)).astype(np.int64)


def _interval_tensors(
    data: TrainingSet, residuals: np.ndarray, residuals_of_mean: np.ndarray, support: np.ndarray, params: AsignParams
) -> dict[str, Tensor]:
    """Tensors of a model from which the standard deviations of imputed values are computed."""
    noise = np.concatenate([held_out_noise(s, folds) for s, folds in zip(data.stacks, data.folds, strict=True)])
    usual_noise = float(noise[np.isfinite(noise)].mean()) if np.isfinite(noise).any() else float("nan")
    # The error of a spot depends on its depth, so residuals are divided by this effect before they are compared.
    parts = np.array([usual_noise, *variance_parts(residuals, relative_noise(noise, usual_noise))])
    size = spot_scale(noise, parts)[:, None].astype(np.float32)
    known = [np.column_stack([s.section[s.known], blocks(s, params.block_spacings)]) for s in data.stacks]
    n_blocks = sum(len(np.unique(rows, axis=0)) for rows in known)  # of each section separately
    return {
        "noise": torch.tensor(parts, dtype=torch.float64),
        "spread": torch.tensor(held_out_spread(residuals / size, n_blocks), dtype=torch.float32),
        "spread_of_mean": torch.tensor(held_out_spread(residuals_of_mean / size, n_blocks), dtype=torch.float32),
        "usual_support": torch.tensor([float(np.median(support))], dtype=torch.float32),
        "whole_sections": torch.tensor([all(len(np.unique(s.section[s.known])) > 1 for s in data.stacks)]),
    }


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
            found = METHODS["knn"](replace(rest, xyz=given(rest.features))).expression()  # neighbors in feature space
        elif method == COLOR:
            found = METHODS["ridge"](rest).expression()
        elif method in rest.independent:
            found = recalibrate(rest, method).expression()
        else:
            found = {**METHODS, **RECIPES}[method](rest).expression()
        result[fold] = found[fold]
        on_fold()
    return result
