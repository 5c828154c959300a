"""The ASIGN model: baselines and an ensemble of networks, blended by what they achieve on held-out spots."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from spatial_impute.metrics._scores import pearson_by_gene, summarise
from spatial_impute.models._base import load_directory, save_directory
from spatial_impute.models._baselines import METHODS, available_methods
from spatial_impute.models._blend import blend_weights
from spatial_impute.models._msagnet import GraphInputs, MSAGNet
from spatial_impute.models._params import AsignParams
from spatial_impute.models._propagation import propagate
from spatial_impute.models._spots import Spots, spatial_folds
from spatial_impute.models._train import Episode, train

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from scipy import sparse

_NETWORK = "network"
# The mean is where every blend starts, and the nearest spot is the k-NN of one.
_NOT_BLENDED = frozenset({"mean", "nearest"})


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
    cross_validation
        One row per method: scores on held-out blocks of the measured sections. All baselines, the network alone, and
        the blend ``"asign"``, whose weights for a block come from the other blocks.
    predictability
        Pearson correlation on held-out blocks per gene (the later ``var["imputation_r"]``).
    history
        Loss and held-out error of each network by step; ``kept`` marks the step that is used.
    config
        Encoder, normalisation and provenance of the training data.
    """

    def __init__(
        self,
        *,
        params: AsignParams,
        var_names: Sequence[str],
        experts: Sequence[str],
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
        self.cross_validation = cross_validation
        self.predictability = predictability
        self.history = history
        self.config = config
        self._experts = list(experts)
        self._n_features = n_features
        self._networks = networks
        self._tensors = tensors

    def __repr__(self) -> str:
        r = self.cross_validation.loc["asign", "pearson_gene"]
        return f"AsignModel({len(self.var_names)} genes, {len(self._networks)} networks, held-out r per gene {r:.3f})"

    @property
    def weights(self) -> pd.DataFrame:
        """Weight of each blended method (columns) in the prediction of each gene (rows)."""
        return pd.DataFrame(self._tensors["weights"].numpy(), index=self.var_names, columns=self._experts)

    def _impute(self, spots: Spots, *, device: str = "cpu") -> Imputation:
        """Impute the unknown spots of one stack."""
        if spots.tokens is None or spots.tokens[0].shape[2] != self._n_features:
            found = None if spots.tokens is None else spots.tokens[0].shape[2]
            msg = f"The model was fitted on {self._n_features} image features per token, found {found}."
            raise ValueError(msg)
        centre, scale, weights = (self._tensors[key].numpy() for key in ("centre", "scale", "weights"))
        inputs = graph_inputs(spots, self._tensors, self.params.n_neighs)
        deviation = np.zeros((len(spots.known), len(centre)))
        for k, name in enumerate(self._experts):
            if not weights[:, k].any():
                continue
            if name == _NETWORK:
                found = self._network_prediction(inputs, device)
            else:
                found = (METHODS[name](spots) - centre) / scale
            deviation += found * weights[:, k]
        expression = centre + deviation * scale
        expression[spots.known] = spots.expression
        return Imputation(expression.astype(np.float32), inputs.support[:, 0].numpy())

    def _network_prediction(self, inputs: GraphInputs, device: str) -> np.ndarray:
        """(n, g) mean over the networks, standardised."""
        inputs = inputs.to(device)
        total = torch.zeros_like(inputs.propagated)
        for state in self._networks:
            network = build_network(self.params, self._n_features, self._tensors["group"])
            network.load_state_dict(state)
            network.eval().to(device)
            with torch.inference_mode():
                total += network(inputs)
        return (total / len(self._networks)).cpu().numpy()

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
            "experts": self._experts,
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
                build_network(params, config["n_features"], own["group"]).load_state_dict(state)
            except (RuntimeError, KeyError) as error:
                msg = f"The weights in {str(path)!r} do not fit their configuration: {error}"
                raise ValueError(msg) from error
            networks.append(state)
        return cls(
            params=params,
            var_names=config["var_names"],
            experts=config["experts"],
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
    folds = [_folds(s, params, seed) for s in stacks]
    methods = available_methods(stacks[0])
    n_networks = max(len(f) for f in folds)
    step = progress(len(methods) * sum(len(f) for f in folds) + n_networks * params.n_steps)
    truth = np.concatenate([s.expression for s in stacks])
    held_out = {name: _held_out(stacks, folds, METHODS[name], step) for name in methods}
    centre, scale = truth.mean(axis=0), np.maximum(truth.std(axis=0), 1e-3)
    # Genes are grouped by how well the best baseline predicts them.
    best = min(methods, key=lambda name: np.mean((held_out[name] - truth) ** 2))
    group = _gene_groups(pearson_by_gene(held_out[best], truth), params.n_gene_groups)
    tensors = {
        "centre": torch.tensor(centre, dtype=torch.float32),
        "scale": torch.tensor(scale, dtype=torch.float32),
        "group": torch.from_numpy(group),
    }
    networks, held_out[_NETWORK], history = _fit_networks(stacks, folds, params, tensors, seed, device, step)

    experts = [name for name in held_out if name not in _NOT_BLENDED]
    fold_of_spot = _fold_of_spot(stacks, folds)
    deviations = np.stack([(held_out[name] - centre) / scale for name in experts])
    weights, blended = blend_weights(deviations, (truth - centre) / scale, fold_of_spot)
    tensors["weights"] = torch.tensor(weights, dtype=torch.float32)
    held_out["asign"] = centre + blended * scale

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
        history=history,
        config=config | {"seed": seed},
    )


def _fit_networks(
    stacks: list[Spots],
    folds: list[list[np.ndarray]],
    params: AsignParams,
    tensors: dict[str, Tensor],
    seed: int,
    device: str,
    step: Callable[[], None],
) -> tuple[list[dict[str, Tensor]], np.ndarray, pd.DataFrame]:
    """One network per fold, stopped at the epoch that is best for all of them.

    Returns
    -------
    Their weights; the (n_known, g) predictions of each known spot by the network that did not see it; the history.
    """
    n_features = stacks[0].tokens[0].shape[2]
    runs = []
    for k in range(max(len(f) for f in folds)):
        # A stack with fewer folds lends its last one again.
        out = [f[min(k, len(f) - 1)] for f in folds]
        rest = [s.hide(o) for s, o in zip(stacks, out, strict=True)]
        # Hidden for watching, and of the rest one block after the other hidden for training.
        episodes = [_episode(r, mask, tensors, params.n_neighs) for r in rest for mask in _folds(r, params, seed)]
        run = train(
            lambda: build_network(params, n_features, tensors["group"]),
            episodes,
            [_episode(s, o, tensors, params.n_neighs) for s, o in zip(stacks, out, strict=True)],
            n_steps=params.n_steps,
            learning_rate=params.learning_rate,
            weight_decay=params.weight_decay,
            correlation_weight=params.correlation_weight,
            seed=seed + k,
            device=device,
            on_step=step,
        )
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


def _folds(spots: Spots, params: AsignParams, seed: int) -> list[np.ndarray]:
    return spatial_folds(spots, n_folds=params.n_folds, block_spacings=params.block_spacings, seed=seed)


def _episode(spots: Spots, masked: np.ndarray, tensors: dict[str, Tensor], n_neighs: int) -> Episode:
    """Hide some known spots from the network; they are what it has to predict."""
    expression = torch.from_numpy(spots.expression[masked[spots.known]].astype(np.float32))
    return Episode(
        inputs=graph_inputs(spots.hide(masked), tensors, n_neighs),
        rows=torch.from_numpy(np.flatnonzero(masked)),
        expression=(expression - tensors["centre"]) / tensors["scale"],
    )


def graph_inputs(spots: Spots, tensors: dict[str, Tensor], n_neighs: int) -> GraphInputs:
    """Tensors of one stack; expression in standard deviations around the mean of the training spots."""
    values, support = propagate(spots.graph, spots.known, spots.expression)
    propagated = (torch.from_numpy(values.astype(np.float32)) - tensors["centre"]) / tensors["scale"]
    spot, region, surroundings = (torch.from_numpy(t.astype(np.float32)) for t in spots.tokens)
    coo = spots.graph.tocoo()
    strong = _strongest(spots.graph, n_neighs)
    # Messages flow from column to row.
    edge_index = torch.from_numpy(np.stack([coo.col[strong], coo.row[strong]]).astype(np.int64))
    return GraphInputs(
        spot=spot[:, 0],
        region=region,
        surroundings=surroundings,
        propagated=torch.nan_to_num(propagated),  # the mean where nothing arrives
        support=torch.from_numpy(support.astype(np.float32))[:, None],
        edge_index=edge_index,
        edge_features=torch.from_numpy(spots.edge_features[strong].astype(np.float32)),
    )


def _strongest(graph: sparse.csr_matrix, k: int) -> np.ndarray:
    """Positions of the k largest entries of every row."""
    row = np.repeat(np.arange(graph.shape[0]), np.diff(graph.indptr))
    order = np.lexsort((graph.indices, -graph.data, row))
    rank = np.arange(len(row)) - graph.indptr[row[order]]
    return np.sort(order[rank < k])


def build_network(params: AsignParams, n_features: int, group: Tensor) -> MSAGNet:
    """Untrained network of the given size."""
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
