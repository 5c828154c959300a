"""Models for sections with different gene panels: one for each set of genes that were measured together."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spatial_impute.models._storage import load_model, save_model
from spatial_impute.models.asign._model import AsignModel, Imputation

if TYPE_CHECKING:
    from spatial_impute.models._params import AsignParams
    from spatial_impute.models._spots import Spots


def by_panel(spots: Spots) -> list[tuple[np.ndarray, Spots]]:
    """Split the genes by the spots that they were measured on: ``expression`` is NaN for genes that are not on a panel.

    For each panel, return the columns of its genes, and the spots with these genes only. Known are the spots that were
    measured with this panel.
    """
    present = np.isfinite(spots.expression)
    if present.all():
        return [(np.arange(present.shape[1]), spots)]
    patterns, panel = np.unique(present, axis=1, return_inverse=True)
    result = []
    for k, measured in enumerate(patterns.T):
        columns = np.flatnonzero(panel.ravel() == k)
        result.append((columns, _with_genes(spots, columns, measured)))
    return sorted(result, key=lambda part: part[0][0])


def _with_genes(spots: Spots, columns: np.ndarray, measured: np.ndarray) -> Spots:
    missing = np.zeros(len(spots.known), dtype=bool)
    missing[np.flatnonzero(spots.known)[~measured]] = True
    part = spots.hide(missing)
    bases = None if part.bases is None else {name: values[:, columns] for name, values in part.bases.items()}
    return replace(part, expression=part.expression[:, columns], bases=bases)


class AsignPanels:
    """Models of several gene panels, used like one :class:`AsignModel`.

    Made by :func:`~spatial_impute.tl.fit_asign` if sections were measured with different panels
    (``si.pp.select_genes(sdata, join="outer")``). Genes that were measured on the same sections share a model, which
    is fitted on these sections.

    Attributes
    ----------
    models
        One :class:`AsignModel` per panel.

    Examples
    --------
    >>> import spatial_impute as si
    >>> si.settings.show_progress_bar = False
    >>> sdata = si.datasets.synthetic_stack(extent=1400.0, measured=["s1", "s2"])
    >>> genes = list(sdata.tables["stack"].var_names)
    >>> sdata.tables["s1_counts"] = sdata.tables["s1_counts"][:, genes[:24]].copy()  # a smaller panel
    >>> si.pp.select_genes(sdata, genes=genes, join="outer")
    >>> si.tl.register_stack(sdata)
    >>> si.pp.extract_features(sdata)
    >>> si.tl.build_3d_graph(sdata)
    >>> si.tl.fit_asign(sdata, model_params={"n_steps": 1})
    AsignPanels(36 genes in 2 panels)
    >>> si.settings.show_progress_bar = True
    """

    def __init__(self, models: list[AsignModel], var_names: list[str]) -> None:
        self.models = models
        self.var_names = list(var_names)

    def __repr__(self) -> str:
        return f"AsignPanels({len(self.var_names)} genes in {len(self.models)} panels)"

    @property
    def params(self) -> AsignParams:
        """Settings."""
        return self.models[0].params

    @property
    def config(self) -> dict[str, Any]:
        """Encoder, normalisation and provenance of the training data."""
        return self.models[0].config

    @property
    def identity(self) -> str:
        """Hash of all numbers of the models; results store it."""
        return hashlib.sha256("".join(model.identity for model in self.models).encode()).hexdigest()[:12]

    @property
    def cross_validation(self) -> pd.DataFrame:
        """Scores per method: mean over the panels, weighted by their number of genes."""
        n_genes = [len(model.var_names) for model in self.models]
        parts = [model.cross_validation * n for model, n in zip(self.models, n_genes, strict=True)]
        return sum(parts[1:], start=parts[0]) / sum(n_genes)

    @property
    def predictability(self) -> pd.Series:
        """Pearson correlation of each gene on held-out blocks."""
        return pd.concat([model.predictability for model in self.models]).reindex(self.var_names)

    @property
    def predictable(self) -> pd.Series:
        """True for genes that are predicted better than by chance."""
        return pd.concat([model.predictable for model in self.models]).reindex(self.var_names)

    @property
    def weights(self) -> pd.DataFrame:
        """Weight of each blended method (columns) in the prediction of each gene (rows)."""
        return pd.concat([model.weights for model in self.models]).reindex(self.var_names).fillna(0.0)

    @property
    def history(self) -> pd.DataFrame:
        """Loss and held-out error of all networks by step."""
        parts = [model.history.assign(panel=k) for k, model in enumerate(self.models)]
        return pd.concat(parts, ignore_index=True)

    def _impute(
        self, spots: Spots, *, depth: np.ndarray | None = None, device: str = "cpu", parts: bool = False
    ) -> Imputation:
        """Impute the unknown spots of one stack, and the genes that were not measured at a known spot."""
        shape = (len(spots.known), len(self.var_names))
        expression, sd = np.empty(shape, np.float32), np.empty(shape, np.float32)
        support, expected = np.zeros(shape[0]), np.zeros(shape[0])
        column_of = pd.Index(self.var_names)
        shown: dict[str, np.ndarray] = {}
        for model in self.models:
            columns = column_of.get_indexer(model.var_names)
            measured = np.isfinite(spots.expression[:, columns]).all(axis=1)
            found = model._impute(_with_genes(spots, columns, measured), depth=depth, device=device, parts=parts)
            expression[:, columns], sd[:, columns] = found.expression, found.sd
            for name, values in found.parts.items():
                shown.setdefault(name, np.empty(shape, np.float32))[:, columns] = values
            support += found.support * len(columns) / shape[1]
            expected += found.depth * len(columns) / shape[1]
        return Imputation(expression, sd, support, expected, shown)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write one directory per panel, and the order of the genes.

        Raises
        ------
        FileExistsError
            If there is something at `path` and `overwrite` is False.
        """
        config = {"var_names": self.var_names, "n_panels": len(self.models)}
        save_model(path, kind=type(self).__name__, config=config, tensors={}, overwrite=overwrite)
        for k, model in enumerate(self.models):
            model.save(Path(path) / f"panel{k}", overwrite=overwrite)

    @classmethod
    def load(cls, path: str | Path) -> AsignPanels:
        """Read models written by :meth:`save`.

        Raises
        ------
        FileNotFoundError
            If a file is missing.
        ValueError
            If the directory holds another class of model.
        """
        config, _ = load_model(path, kind=cls.__name__)
        models = [AsignModel.load(Path(path) / f"panel{k}") for k in range(config["n_panels"])]
        return cls(models, config["var_names"])
