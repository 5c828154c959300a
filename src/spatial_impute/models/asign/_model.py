"""The ASIGN model: baselines and an ensemble of networks, blended by their errors on held-out spots."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spatial_impute._io.workers import suitable_threads
from spatial_impute._settings import logger
from spatial_impute.models._params import AsignParams
from spatial_impute.models._spots import given
from spatial_impute.models._storage import (
    AsignOrigin,
    checked_origin,
    config_errors,
    does_not_fit,
    json_columns,
    load_model,
    require_shapes,
    save_model,
    tensors_below,
)
from spatial_impute.models.asign._baselines import METHODS, recalibrate
from spatial_impute.models.asign._blend import expected_noise, noise_elsewhere, spot_scale, spread_by_support
from spatial_impute.models.asign._graph_inputs import (
    TWO_VIEWS,
    GeneScale,
    LabelPredictions,
    graph_inputs,
    krige_views,
    predict_from_labels,
    with_components,
)
from spatial_impute.models.asign._network import MSAGNet, decode_states, graph_states
from spatial_impute.models.asign._predictions import Linear, Mean, Table, row_blocks

if TYPE_CHECKING:
    from torch import Tensor

    from spatial_impute.models._spots import Spots
    from spatial_impute.models._storage import ModelConfig
    from spatial_impute.models.asign._predictions import Prediction

NETWORK = "network alone"  # Mean over the networks, one of the blended methods
BASE = "base"  # What the networks add their correction to
_FAR = 2.0  # times the largest distance between the stacks that a model was fitted on
_COHORT = "cohort"  # folder within that of a model
WITHOUT = "without network"  # Blend of all other methods


@dataclass
class Imputation:
    """Result for one stack."""

    expression: np.ndarray  # (n, g) log-normalised; measured spots keep their measurement
    sd: np.ndarray  # (n, g) standard deviation of a measurement around the imputed value; 0 at measured spots
    support: np.ndarray  # (n,) 0-1: weight of the measured spots in the propagated labels of a spot
    depth: np.ndarray  # (n,) total counts of the measurement that `sd` refers to; NaN if no counts are known
    parts: dict[str, np.ndarray]  # (n, g) predictions of the parts of the model, if they are wanted


@dataclass(eq=False, repr=False, kw_only=True)
class AsignModel:
    """A fitted model; made by :func:`~spatial_impute.tl.fit_asign` or :meth:`load`.

    Examples
    --------
    >>> import spatial_impute as si
    >>> model = si.tl.fit_asign(sdata)  # doctest: +SKIP
    >>> model.save("model")  # doctest: +SKIP
    >>> model = si.models.AsignModel.load("model")  # doctest: +SKIP
    >>> model.cross_validation.loc[["cokriging", "asign"], ["pearson_gene", "skill"]]  # doctest: +SKIP
    """

    params: AsignParams
    """Settings."""
    base: str
    """Method to whose prediction the networks add their correction; see ``AsignParams.base``."""
    var_names: list[str]
    """Genes."""
    cross_validation: pd.DataFrame
    """Scores on held-out blocks of the measured sections, one row per method: all baselines; ``"base"``, to which the
    networks add their correction; ``"network alone"``, their mean; ``"without network"``, the blend of all other
    methods; and ``"asign"``, the blend with the networks. The weights for a block come from the other blocks.
    ``gain`` is the correlation that ``"asign"`` has over the method of the row, with its 95 % interval over genes."""
    predictability: pd.Series
    """Pearson correlation of each gene on held-out blocks; written as ``var["imputation_r"]``."""
    predictable: pd.Series
    """True for genes that are predicted better than by chance; written as ``var["imputable"]``."""
    history: pd.DataFrame
    """Loss and held-out error of each network by step; ``kept`` marks the step of the model."""
    config: dict[str, Any]
    """Encoder, normalisation and provenance of the training data, and the settings of the optimizer that were chosen."""
    cohort: AsignModel | None = None
    """Part for stacks without a measured spot, if the model was fitted on several stacks; its ``cross_validation`` has the
    scores on stacks that were held out. Else None."""
    _experts: list[str]  # Blended methods
    _n_features: int  # Of a token
    _networks: list[dict[str, Tensor]]  # Weights of each
    _tensors: dict[str, Tensor]  # Weights of the blend, scales of the genes, and numbers of the intervals

    def __repr__(self) -> str:
        r = self.cross_validation.loc["asign", "pearson_gene"]
        return f"AsignModel({len(self.var_names)} genes, {len(self._networks)} networks, held-out r per gene {r:.3f})"

    @cached_property
    def identity(self) -> str:
        """Hash of all numbers of the model; results store it."""
        digest = hashlib.sha256()
        for state in (self._tensors, *self._networks):
            for key, value in sorted(state.items()):
                digest.update(key.encode())
                digest.update(np.ascontiguousarray(value.cpu().numpy()).tobytes())
        return digest.hexdigest()[:12]

    @property
    def weights(self) -> pd.DataFrame:
        """Weight of each blended method (columns) in the prediction of each gene (rows)."""
        return pd.DataFrame(self._tensors["weights"].numpy(), index=self.var_names, columns=self._experts)

    def _impute(
        self, spots: Spots, *, depth: np.ndarray | None = None, device: str = "cpu", parts: bool = False
    ) -> Imputation:
        """Impute the unknown spots of one stack. `depth` (n,) is the total counts that the intervals refer to."""
        if not spots.known.any() and self.cohort is not None:
            return self.cohort._impute(spots, depth=depth, device=device, parts=parts)
        n_features = given(spots.tokens)[0].shape[2]
        if n_features != self._n_features:
            msg = (
                f"The model was fitted on {self._n_features} image features per token, the stack has {n_features}. "
                "Run `si.pp.extract_features` as for the training data."
            )
            raise ValueError(msg)
        expression = spots.expression.astype(np.float32, copy=False)
        spots = replace(with_components(spots), device=device, expression=expression)
        labels = self._labels(spots)
        found, shown = self._blend(spots, labels, parts=parts)
        support = labels.support
        del labels  # a table of all spots and genes is a gigabyte in large stacks
        for values in (found, *shown.values()):
            values[spots.known] = spots.expression
        usual, *spreads = (self._tensors[key].numpy() for key in ("usual_support", "spread", "spread_of_mean"))
        noise = self._expected_noise(spots) if depth is None else 1.0 / depth
        if spots.total_counts is not None:
            noise[spots.known] = 1.0 / spots.total_counts
        size = spot_scale(noise, self._tensors["noise"].numpy()) * self._widening(spots)
        sd = np.empty_like(found)
        for rows in row_blocks(*sd.shape):
            sd[rows] = spread_by_support(support[rows], float(usual[0]), *spreads) * size[rows, None]
        sd[spots.known] = 0.0
        return Imputation(found, sd, support, 1.0 / noise, shown)

    def _labels(self, spots: Spots) -> LabelPredictions:
        """Predictions from the known spots."""
        methods = {self.base, *self._used("weights"), *self._used("weights_without")}
        return predict_from_labels(spots, self.base, krige_views(spots, two=TWO_VIEWS in methods))

    def _used(self, weights: str) -> list[str]:
        """Blended methods that have a weight, without the networks."""
        values = self._tensors[weights].numpy()
        return [name for name, own in zip(self._experts, values.T, strict=False) if own.any() and name != NETWORK]

    def _widening(self, _spots: Spots) -> float:
        """Factor on the intervals of a stack."""
        return 1.0

    def _blend(
        self, spots: Spots, labels: LabelPredictions, *, parts: bool
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(n, g) weighted sum of all predictions, and those of the parts of the model if they are wanted.

        Some spots at a time, because each of the predictions is as large as the result.
        """
        shape = len(spots.known), len(self.var_names)
        shown, used = {}, self._used("weights")
        if parts:
            others = sorted(spots.independent)
            shown = {name: np.empty(shape, np.float32) for name in (BASE, NETWORK, WITHOUT, *others)}
            used += [*self._used("weights_without"), *others]
        result = self._network_prediction(spots, labels)  # the blend takes its place
        experts = {name: self._fit_expert(spots, name, labels) for name in dict.fromkeys(used)}
        for rows in row_blocks(*shape):
            found = {name: part.expression(rows) for name, part in experts.items()} | {NETWORK: result[rows].copy()}
            result[rows] = self._weighted_sum(found, "weights")
            for name, values in shown.items():
                if name == WITHOUT:
                    values[rows] = self._weighted_sum(found, "weights_without")
                else:
                    values[rows] = labels.base.expression(rows) if name == BASE else found[name]
        return result, shown

    def _weighted_sum(self, found: dict[str, np.ndarray], weights: str) -> np.ndarray:
        """(m, g) blend of the predictions of some spots."""
        centre = self._tensors["centre"].numpy()
        total = np.zeros(found[NETWORK].shape, np.float32)
        # The network comes last, and is absent from the blend without it.
        for name, weight in zip(self._experts, self._tensors[weights].numpy().T, strict=False):
            if weight.any():
                part = found[name] - centre
                part *= weight
                total += part
        total += centre
        return total

    def _fit_expert(self, spots: Spots, name: str, labels: LabelPredictions) -> Prediction:
        bases = spots.bases or {}
        if name == self.base:
            return labels.base
        if name in spots.independent:
            return recalibrate(spots, name)
        if name == "cokriging":
            return labels.kriged[0]
        if name == TWO_VIEWS:
            return Mean(labels.kriged)
        if name == "propagation" and (labels.support > 0).all():
            return labels.propagated
        return Table(bases[name]) if name in bases else METHODS[name](spots)

    def _expected_noise(self, spots: Spots) -> np.ndarray:
        """(n,) expected counting noise of a measurement of each spot."""
        noise = expected_noise(spots)
        if self._tensors["whole_sections"].item():
            return noise
        return noise_elsewhere(spots, noise, float(self._tensors["noise"][0]))

    def _network_prediction(self, spots: Spots, labels: LabelPredictions) -> np.ndarray:
        """(n, g) mean over the networks. One after the other, so that the states of one are in memory."""
        inputs, total = graph_inputs(spots, self.params), np.zeros((len(spots.known), len(self.var_names)), np.float32)
        with suitable_threads(len(spots.known), self.params.width):
            centres, scales = self._tensors["network_centre"], self._tensors["network_scale"]
            for centre, scale, weights in zip(centres, scales, self._networks, strict=True):
                genes = GeneScale(centre, scale)
                network = MSAGNet(self._n_features, self._tensors["group"], self.params)
                network.load_state_dict(weights)
                states = graph_states(network.eval().to(spots.device), inputs)
                for rows in row_blocks(*total.shape):
                    total[rows] += genes.restore(decode_states(network, states[rows], labels.inputs(genes, rows)))
        total /= len(self._networks)
        return total

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
            "base": self.base,
            "n_features": self._n_features,
            "n_networks": len(self._networks),
            "cross_validation": json_columns(self.cross_validation.reset_index()),
            "predictability": [None if np.isnan(r) else float(r) for r in self.predictability],
            "predictable": [bool(p) for p in self.predictable],
            "history": json_columns(self.history),
            "config": self.config,
            "cohort": None if self.cohort is None else self.cohort.identity,
        }
        save_model(path, kind=type(self).__name__, config=config, tensors=tensors, overwrite=overwrite)
        if self.cohort is not None:
            self.cohort.save(Path(path) / _COHORT, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | Path) -> AsignModel:
        """Read a model written by :meth:`save`.

        Raises
        ------
        FileNotFoundError
            If a file is missing.
        ValueError
            If the directory holds another class of model, or weights that do not fit the configuration.
        """
        config, tensors = load_model(path, kind=cls.__name__, unknown={"model.noise"})
        with config_errors(path):
            model = cls._from_config(path, config, tensors)
        if config["cohort"] is not None:
            model.cohort = CohortModel.load(Path(path) / _COHORT)
            if model.cohort.identity != config["cohort"]:
                msg = f"saving was interrupted: {_COHORT!r} belongs to another model. Save the model again."
                raise does_not_fit(path, msg)
        return model

    @classmethod
    def _from_config(cls, path: str | Path, config: ModelConfig, tensors: dict[str, Tensor]) -> AsignModel:
        own = tensors_below("model.", tensors)
        params, origin = AsignParams(**config["params"]), checked_origin(config, AsignOrigin)
        n_networks, n_genes = config["n_networks"], len(config["var_names"])
        experts, allowed = config["experts"], {*METHODS, TWO_VIEWS, NETWORK, *origin.get("base_layers", [])}
        if len(set(experts)) != len(experts) or not set(experts) <= allowed or experts[-1:] != [NETWORK]:
            raise does_not_fit(path, f"`experts` must be known methods or base layers, each once; found {experts}.")
        shapes: dict[str, tuple[int, ...]]
        shapes = dict.fromkeys(("centre", "group", "spread", "spread_of_mean"), (n_genes,))
        shapes |= dict.fromkeys(("network_centre", "network_scale"), (n_networks, n_genes))
        shapes |= {"weights": (n_genes, len(experts)), "weights_without": (n_genes, len(experts) - 1)}
        shapes |= {"noise": (3,), "usual_support": (1,), "whole_sections": (1,)}
        found = {key: tuple(own[key].shape) for key in shapes if key in own}
        if found != shapes or not isinstance(n_networks, int) or not 1 <= n_networks <= len(tensors):
            raise does_not_fit(path, f"expected {shapes} for {n_networks!r} networks, found {found}.")
        if not own["noise"][1:].isfinite().all():  # the first, the usual noise, is NaN if the counts were not known
            raise does_not_fit(path, "'model.noise' has values that are NaN or infinite.")
        sizes = (config["n_features"], params.width, params.n_heads, params.n_graph_layers, params.n_level_layers)
        networks = []
        for k in range(n_networks):
            state = tensors_below(f"network{k}.", tensors)
            require_shapes(path, lambda: MSAGNet(config["n_features"], own["group"], params), state, sizes)
            networks.append(state)
        model = cls(
            params=params,
            var_names=config["var_names"],
            _experts=experts,
            base=config["base"],
            _n_features=config["n_features"],
            _networks=networks,
            _tensors=own,
            cross_validation=pd.DataFrame(config["cross_validation"]).set_index("method").astype(float),
            predictability=pd.Series(config["predictability"], index=config["var_names"], dtype=float),
            predictable=pd.Series(config["predictable"], index=config["var_names"], dtype=bool),
            history=pd.DataFrame(config["history"]),
            config=origin,
        )
        repr(model)  # fails if the score is missing
        return model


class CohortModel(AsignModel):
    """Part of an :class:`AsignModel` of several stacks for stacks without a measured spot.

    The base is a ridge regression on the image features of all stacks. Features are standardised within each section, so
    that stain and scanner do not count. Scores and intervals come from stacks that were held out as a whole.
    """

    @classmethod
    def _from_config(cls, path: str | Path, config: ModelConfig, tensors: dict[str, Tensor]) -> AsignModel:
        model = super()._from_config(path, config, tensors)
        missing = {"ridge", "ridge_offset", "profiles", "usual_distance"} - model._tensors.keys()
        if missing:
            raise does_not_fit(path, f"{sorted(missing)} are missing.")
        return model

    def _labels(self, spots: Spots) -> LabelPredictions:
        offset, slope = (self._tensors[key].numpy() for key in ("ridge_offset", "ridge"))
        base = Linear(offset, given(spots.features), slope)
        return LabelPredictions(base, base, np.zeros(len(spots.known)))

    def _widening(self, spots: Spots) -> float:
        """Factor on the intervals of a stack whose images are unlike those of the training; logs a warning."""
        distance = image_distance(given(spots.image_profile), self._tensors["profiles"].numpy())
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


def image_distance(profile: np.ndarray, others: np.ndarray) -> float:
    """Median difference over the features of a stack to the nearest of others, in their spread; (2, d) and (n, 2, d)."""
    differences = np.abs(others[:, 0] - profile[0]) / np.maximum(others[:, 1].mean(axis=0), 1e-12)
    return float(np.median(differences, axis=1).min())
