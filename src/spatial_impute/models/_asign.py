"""The ASIGN model: a base prediction and the ensemble of networks that corrects it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from spatial_impute.metrics._scores import pearson_by_gene, summarise
from spatial_impute.models._base import load_directory, save_directory
from spatial_impute.models._baselines import METHODS, available_methods, section_mean
from spatial_impute.models._msagnet import GraphInputs, MSAGNet
from spatial_impute.models._params import AsignParams
from spatial_impute.models._propagation import propagate
from spatial_impute.models._spots import Spots, spatial_folds
from spatial_impute.models._train import Target, train


@dataclass
class Imputation:
    """Result for one stack."""

    expression: np.ndarray
    """(n, g) log-normalised; measured spots keep their measurement."""
    support: np.ndarray
    """(n,) 0-1: how much of the measurement reaches a spot over the graph."""


class AsignModel:
    """A fitted model; made by :func:`~spatial_impute.tl.fit_asign` or :meth:`load`.

    Attributes
    ----------
    params
        Settings.
    var_names
        Genes.
    base
        Name of the baseline that is corrected.
    cross_validation
        One row per method: scores on held-out blocks of the measured sections, the baselines beside ``"asign"``.
    predictability
        Pearson correlation on held-out blocks per gene (the later ``var["imputation_r"]``).
    history
        Loss and held-out error of each network by epoch.
    config
        Encoder, normalisation and provenance of the training data.
    """

    def __init__(
        self,
        *,
        params: AsignParams,
        var_names: Sequence[str],
        base: str,
        n_features: int,
        networks: list[dict[str, Tensor]],
        tensors: dict[str, Tensor],
        cross_validation: pd.DataFrame,
        predictability: pd.Series,
        history: pd.DataFrame,
        config: dict[str, Any],
    ) -> None:
        self.params = params
        self.var_names = list(var_names)
        self.base = base
        self.cross_validation = cross_validation
        self.predictability = predictability
        self.history = history
        self.config = config
        self._n_features = n_features
        self._networks = networks
        self._tensors = tensors

    def __repr__(self) -> str:
        r = self.cross_validation.loc["asign", "pearson_gene"]
        return (
            f"AsignModel({len(self.var_names)} genes, base={self.base!r}, {len(self._networks)} networks, "
            f"held-out r per gene {r:.3f})"
        )

    def impute(self, spots: Spots, *, device: str = "cpu") -> Imputation:
        """Impute the unknown spots of one stack."""
        if spots.tokens is None or spots.tokens[0].shape[2] != self._n_features:
            found = None if spots.tokens is None else spots.tokens[0].shape[2]
            msg = f"The model was fitted on {self._n_features} image features per token, found {found}."
            raise ValueError(msg)
        prepared = _prepare(spots, self.base, self._folds(spots))
        scaled = _scaled_inputs(spots, prepared, self._tensors).to(device)
        correction = torch.zeros_like(scaled.base)
        for state in self._networks:
            network = _build(self.params, self._n_features, self._tensors["group"])
            network.load_state_dict(state)
            network.eval().to(device)
            with torch.inference_mode():
                correction += (network(scaled) - scaled.base) / len(self._networks)
        shrunk = correction.cpu() * self._tensors["shrinkage"][self._tensors["group"]] * self._tensors["scale"]
        expression = prepared.base + shrunk.numpy().astype(np.float64)
        expression[spots.known] = spots.expression
        return Imputation(expression.astype(np.float32), prepared.full_support.astype(np.float32))

    def _folds(self, spots: Spots) -> list[np.ndarray]:
        return spatial_folds(
            spots, n_folds=self.params.n_folds, block_spacings=self.params.block_spacings, seed=self.config["seed"]
        )

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write ``config.json`` and ``model.safetensors`` into a directory.

        Raises
        ------
        FileExistsError
            If there is something at `path` and `overwrite` is False.
        """
        tensors = {f"model.{key}": value for key, value in self._tensors.items()}
        for k, state in enumerate(self._networks):
            tensors |= {f"network{k}.{key}": value for key, value in state.items()}
        config = {
            "params": asdict(self.params),
            "var_names": self.var_names,
            "base": self.base,
            "n_features": self._n_features,
            "n_networks": len(self._networks),
            "cross_validation": self.cross_validation.reset_index().to_dict(orient="list"),
            "predictability": [None if np.isnan(r) else float(r) for r in self.predictability],
            "history": self.history.astype(object).where(self.history.notna(), None).to_dict(orient="list"),
            "config": self.config,
        }
        save_directory(path, kind=type(self).__name__, config=config, tensors=tensors, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | Path) -> AsignModel:
        """Read a model written by :meth:`save`.

        Raises
        ------
        FileNotFoundError
            If a file is missing.
        ValueError
            If the directory holds something else, or weights that do not fit the configuration.
        """
        config, tensors = load_directory(path, kind=cls.__name__)
        own = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
        params = AsignParams(**config["params"])
        networks = []
        for k in range(config["n_networks"]):
            prefix = f"network{k}."
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            try:
                _build(params, config["n_features"], own["group"]).load_state_dict(state)
            except (RuntimeError, KeyError) as error:
                msg = f"The weights in {str(path)!r} do not fit their configuration: {error}"
                raise ValueError(msg) from error
            networks.append(state)
        return cls(
            params=params,
            var_names=config["var_names"],
            base=config["base"],
            n_features=config["n_features"],
            networks=networks,
            tensors=own,
            cross_validation=pd.DataFrame(config["cross_validation"]).set_index("method"),
            predictability=pd.Series(config["predictability"], index=config["var_names"], dtype=float),
            history=pd.DataFrame(config["history"]),
            config=config["config"],
        )


def fit(
    stacks: list[Spots],
    var_names: Sequence[str],
    params: AsignParams,
    *,
    config: dict[str, Any],
    seed: int,
    device: str,
    progress: Callable[[int], Callable[[], None]],
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
    """
    folds = [
        spatial_folds(s, n_folds=params.n_folds, block_spacings=params.block_spacings, seed=seed) for s in stacks
    ]
    methods = available_methods(stacks[0])
    n_fits = max(len(f) for f in folds)
    step = progress(len(methods) * sum(len(f) for f in folds) + n_fits * params.n_epochs)
    held_out = {name: _held_out_predictions(stacks, folds, METHODS[name], step) for name in methods}
    known = [s.known for s in stacks]
    truth = np.concatenate([s.expression for s in stacks])
    profile = _held_out_predictions(stacks, folds, section_mean, lambda: None)

    def errors(name: str) -> float:
        predicted = np.concatenate([p[k] for p, k in zip(held_out[name], known, strict=True)])
        return float(np.mean((predicted - truth) ** 2))

    base = min(methods, key=errors) if params.base == "auto" else params.base
    base_known = np.concatenate([p[k] for p, k in zip(held_out[base], known, strict=True)])
    tensors = {
        "centre": torch.tensor(truth.mean(axis=0), dtype=torch.float32),
        "scale": torch.tensor(np.maximum(truth.std(axis=0), 1e-3), dtype=torch.float32),
        "group": _gene_groups(pearson_by_gene(base_known, truth), params.n_gene_groups),
    }
    prepared = [_prepare(s, base, f) for s, f in zip(stacks, folds, strict=True)]
    inputs = [_scaled_inputs(s, p, tensors) for s, p in zip(stacks, prepared, strict=True)]
    n_features = stacks[0].tokens[0].shape[2]

    runs = []
    for k in range(n_fits):
        # A stack with fewer folds lends its last one again.
        out = [f[min(k, len(f) - 1)] for f in folds]
        runs.append(
            train(
                lambda: _build(params, n_features, tensors["group"]),
                inputs,
                [_target(s, s.known & ~o, tensors) for s, o in zip(stacks, out, strict=True)],
                [_target(s, o, tensors) for s, o in zip(stacks, out, strict=True)],
                n_epochs=params.n_epochs,
                learning_rate=params.learning_rate,
                weight_decay=params.weight_decay,
                correlation_weight=params.correlation_weight,
                seed=seed + k,
                device=device,
                on_epoch=step,
            )
        )
    best = int(np.argmin(np.mean([[row["held_out_mse"] for row in history] for _, history, _ in runs], axis=0)))
    corrected = [p.base.copy() for p in prepared]
    for k, (_, _, predictions) in enumerate(runs):
        for i, found in enumerate(predictions[best]):
            if k < len(folds[i]):
                scaled = found * tensors["scale"] + tensors["centre"]
                corrected[i][folds[i][k]] = scaled.numpy()
    correction = np.concatenate([c[k] - p.base[k] for c, p, k in zip(corrected, prepared, known, strict=True)])
    tensors["shrinkage"] = _shrinkage(correction, truth - base_known, tensors)
    group = tensors["group"].numpy()
    asign_known = base_known + correction * tensors["shrinkage"].numpy()[group]

    reference = np.concatenate([p[k] for p, k in zip(profile, known, strict=True)])
    rows = {
        name: summarise(np.concatenate([p[k] for p, k in zip(held_out[name], known, strict=True)]), truth, reference)
        for name in methods
    }
    rows["asign"] = summarise(asign_known, truth, reference)
    history = pd.concat(
        [pd.DataFrame(rows_).assign(network=k) for k, (_, rows_, _) in enumerate(runs)], ignore_index=True
    )
    return AsignModel(
        params=params,
        var_names=var_names,
        base=base,
        n_features=n_features,
        networks=[states[best] for states, _, _ in runs],
        tensors=tensors,
        cross_validation=pd.DataFrame(rows).T.rename_axis("method"),
        predictability=pd.Series(pearson_by_gene(asign_known, truth), index=list(var_names)),
        history=history,
        config=config | {"seed": seed, "epoch": int(runs[0][1][best]["epoch"])},
    )


@dataclass(frozen=True)
class _Prepared:
    """Base and propagation of one stack; known spots are predicted with their own block hidden."""

    base: np.ndarray
    propagated: np.ndarray
    support: np.ndarray
    full_support: np.ndarray
    """Support with all known spots in place, 1 at these."""


def _prepare(spots: Spots, base: str, folds: list[np.ndarray]) -> _Prepared:
    predicted = METHODS[base](spots)
    propagated, support = propagate(spots.graph, spots.known, spots.expression)
    full_support = support.copy()
    for fold in folds:
        hidden = spots.hide(fold)
        predicted[fold] = METHODS[base](hidden)[fold]
        values, mass = propagate(hidden.graph, hidden.known, hidden.expression)
        propagated[fold], support[fold] = values[fold], mass[fold]
    # Where nothing arrives there is nothing to merge.
    propagated = np.where(np.isfinite(propagated), propagated, predicted)
    return _Prepared(predicted, propagated, support, full_support)


def _held_out_predictions(
    stacks: list[Spots], folds: list[list[np.ndarray]], method: Callable[[Spots], np.ndarray], step: Callable[[], None]
) -> list[np.ndarray]:
    """(n, g) per stack, filled for the known spots, each predicted with its fold hidden."""
    result = []
    for spots, own in zip(stacks, folds, strict=True):
        predicted = np.full((len(spots.known), spots.expression.shape[1]), np.nan)
        for fold in own:
            predicted[fold] = method(spots.hide(fold))[fold]
            step()
        result.append(predicted)
    return result


def _scaled_inputs(spots: Spots, prepared: _Prepared, tensors: dict[str, Tensor]) -> GraphInputs:
    """Tensors of one stack; expression in standard deviations of the training spots."""

    def scaled(values: np.ndarray) -> Tensor:
        return (torch.from_numpy(values.astype(np.float32)) - tensors["centre"]) / tensors["scale"]

    spot, region, surroundings = (torch.from_numpy(t.astype(np.float32)) for t in spots.tokens)
    coo = spots.graph.tocoo()
    # Messages flow from column to row.
    edge_index = torch.from_numpy(np.stack([coo.col, coo.row]).astype(np.int64))
    return GraphInputs(
        spot=spot[:, 0],
        region=region,
        surroundings=surroundings,
        base=scaled(prepared.base),
        propagated=scaled(prepared.propagated),
        support=torch.from_numpy(prepared.support.astype(np.float32))[:, None],
        edge_index=edge_index,
        edge_features=torch.from_numpy(spots.edge_features.astype(np.float32)),
    )


def _build(params: AsignParams, n_features: int, group: Tensor) -> MSAGNet:
    return MSAGNet(
        n_features,
        len(group),
        group=group,
        width=params.width,
        n_heads=params.n_heads,
        n_graph_layers=params.n_graph_layers,
        n_level_layers=params.n_level_layers,
        dropout=params.dropout,
    )


def _target(spots: Spots, rows: np.ndarray, tensors: dict[str, Tensor]) -> Target:
    expression = torch.from_numpy(spots.expression[rows[spots.known]].astype(np.float32))
    return Target(
        rows=torch.from_numpy(np.flatnonzero(rows)), expression=(expression - tensors["centre"]) / tensors["scale"]
    )


def _gene_groups(r: np.ndarray, n_groups: int) -> Tensor:
    """(g,) group of each gene: equal shares by how well the base predicts it."""
    rank = np.argsort(np.argsort(np.nan_to_num(r, nan=-1.0), kind="stable"), kind="stable")
    return torch.from_numpy((rank * min(n_groups, len(r)) // len(r)).astype(np.int64))


def _shrinkage(correction: np.ndarray, residual: np.ndarray, tensors: dict[str, Tensor]) -> Tensor:
    """(n_groups,) share of the correction to keep: what fits held-out spots best, 0 unless it helps significantly."""
    group = tensors["group"].numpy()
    scale = tensors["scale"].numpy()
    result = np.zeros(group.max() + 1)
    for g in range(len(result)):
        c = correction[:, group == g] / scale[group == g]
        r = residual[:, group == g] / scale[group == g]
        size = float((c**2).sum())
        if size == 0:
            continue
        share = float(np.clip((c * r).sum() / size, 0.0, 1.0))
        gain = (r**2 - (r - share * c) ** 2).mean(axis=1)  # per spot
        if gain.mean() > 2 * gain.std() / np.sqrt(len(gain)):
            result[g] = share
    return torch.tensor(result, dtype=torch.float32)
