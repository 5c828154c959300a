"""Fit ASIGN. The model itself is in ``spatial_impute.models``."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from spatial_impute._io.files import owned_folder
from spatial_impute._keys import Keys
from spatial_impute._settings import logger, progress_steps
from spatial_impute._stack.spots import read_stacks, stack_list, units
from spatial_impute._validation import require_count, require_device, require_folder, resolve_params
from spatial_impute.tl._base_layers import kinds_of_bases, require_same_folds, with_bases
from spatial_impute.tl._provenance import encoder_name, feature_settings, fitted_state

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from anndata import AnnData
    from spatialdata import SpatialData

    from spatial_impute.models import AsignModel, AsignPanels, AsignParams
    from spatial_impute.models._spots import Spots


def fit_asign(
    sdata: SpatialData | Sequence[SpatialData],
    *,
    table_key: str = Keys.STACK_TABLE,
    layer: str = Keys.MEASURED,
    graph_key: str = Keys.SPATIAL_3D,
    base_layers: Sequence[str] | Mapping[str, str] = (),
    model_params: AsignParams | Mapping[str, Any] | None = None,
    start_from: AsignModel | None = None,
    checkpoint: str | Path | None = None,
    device: str | None = None,
    seed: int = 0,
    show_progress_bar: bool | None = None,
) -> AsignModel | AsignPanels:
    """Fit ASIGN :cite:p:`Zhu2025` on the measured spots of one or several stacks.

    Blocks of the measured section (whole sections, if several are measured) are hidden, one fold at a time. Every
    baseline predicts them, and so does a network with attention over three fields of view and over the 3D graph. The
    network starts exactly at its base, the mean or the best baseline. It learns a correction of this base, and the
    weight of the labels that are propagated over the graph. Its settings, the base and the number of steps are chosen
    by the errors on the hidden blocks. Baselines and network are then blended by the non-negative weights that are best
    on the hidden blocks, so that each is used only if it helps. A spot with more counts (``obs["total_counts"]``) is
    more precise and has more weight. Expression of unmeasured spots is never read.

    Parameters
    ----------
    sdata
        Registered stack with features and graph, or several stacks with the same genes.
    table_key
        Name of the stack table.
    layer
        Layer with log-normalised expression.
    graph_key
        Key of the 3D graph: the `key_added` of :func:`~spatial_impute.tl.build_3d_graph`.
    base_layers
        Layers of the stack table with predictions of other models to blend in. With ``["pixnet"]``, the prediction of a
        measured spot must come from a model that was fitted without the fold of the spot, as
        :func:`~spatial_impute.tl.impute_pixnet` does. With ``{"mine": "independent"}`` you declare that the model of
        the layer has seen no measured spot of this tissue, such as a pretrained predictor;
        :func:`~spatial_impute.tl.add_prediction` writes such a layer. Each of its genes is then fitted to the measured
        spots (centered in each section, slope at least 0), without the hidden ones. Values may be in any units, and NaN
        where there is no prediction. All base layers are rows of ``model.cross_validation``, and have no weight unless
        they help.
    model_params
        Advanced settings; see :class:`~spatial_impute.models.AsignParams`.
    start_from
        Model to fine-tune: networks start from those of this model and not at the base. It must have the same genes,
        encoder and size.
    checkpoint
        Directory that keeps each network as soon as it is trained. A later call with the same data and settings
        continues with the other networks.
    device
        Torch device; ``settings.device`` by default.
    seed
        Seed; the same seed gives the same model.
    show_progress_bar
        Show a progress bar; ``settings.show_progress_bar`` by default.

    Returns
    -------
    The fitted model. If sections were measured with different genes, this is an
    :class:`~spatial_impute.models.AsignPanels` with one model for the genes of each panel. ``model.cross_validation``
    has the scores of all baselines, of the network alone and of the blend on the hidden blocks. Nothing is written.

    Raises
    ------
    KeyError
        If features, graph or registration are missing.
    ValueError
        If nothing is measured, values are raw counts, stacks have different genes or units, spots were moved after the
        graph was built, base layers were predicted with other folds than those of ASIGN, or are declared independent
        but hold the measurement, or `start_from` or `checkpoint` do not fit the data and settings.

    Examples
    --------
    >>> import numpy as np
    >>> import spatial_impute as si
    >>> si.settings.show_progress_bar = False
    >>> sdata = si.datasets.synthetic_stack(extent=1400.0)
    >>> si.tl.register_stack(sdata)
    >>> si.pp.extract_features(sdata)
    >>> si.tl.build_3d_graph(sdata)
    >>> model = si.tl.fit_asign(sdata, model_params={"n_steps": 20})
    >>> si.tl.impute_3d(sdata, model)
    >>> bool(np.isfinite(sdata.tables["stack"].layers["asign"]).all())
    True
    >>> si.settings.show_progress_bar = True
    """
    from spatial_impute.models._params import AsignParams
    from spatial_impute.models.asign._ensemble import FitSettings
    from spatial_impute.models.asign._fit import fit
    from spatial_impute.models.asign._panels import AsignPanels

    params = resolve_params(model_params, AsignParams)
    seed, device = require_count(seed, name="seed", least=0), require_device(device)
    folder = None if checkpoint is None else require_folder(checkpoint, name="checkpoint")
    stacks = stack_list(sdata)
    tables, spots = read_stacks(stacks, table_key=table_key, layer=layer, graph_key=graph_key)
    bases = kinds_of_bases(base_layers)
    spots = [with_bases(*parts, bases) for parts in zip(stacks, spots, tables, strict=True)]
    panels, config = _panels_and_config(tables, spots, bases, params, seed=seed)
    config["stacks"] = [
        fitted_state(one, table, layer=layer, graph_key=graph_key, base_layers=bases)
        for one, table in zip(stacks, tables, strict=True)
    ]
    del spots  # in double precision
    start = () if start_from is None else _start_networks(start_from, panels, config["encoder"], params)
    models = []
    with owned_folder(folder, what="The checkpoint"):
        for k, (genes, panel) in enumerate(panels):
            label = f"Fitting ASIGN, genes {k + 1} of {len(panels)}" if len(panels) > 1 else "Fitting ASIGN"
            own_folder = folder
            if folder is not None and len(panels) > 1:
                own_folder = require_folder(folder / f"panel{k}", name="checkpoint")
            with progress_steps(label, show=show_progress_bar) as steps:
                settings = FitSettings(params, seed, device, config, steps, own_folder, start)
                models.append(fit(panel, genes, settings))
    model = AsignPanels(models, list(tables[0].var_names)) if len(models) > 1 else models[0]
    logger.info("Fitted %r", model)
    return model


def _panels_and_config(
    tables: list[AnnData], spots: list[Spots], base_layers: dict[str, str], params: AsignParams, *, seed: int
) -> tuple[list[tuple[list[str], list[Spots]]], dict[str, Any]]:
    """Panels (genes that were measured together, with the spots of each stack), and the provenance of the model."""
    from spatial_impute.models.asign._panels import by_panel

    genes, encoders = list(tables[0].var_names), {encoder_name(table) for table in tables}
    if len(encoders) > 1:
        msg = f"All stacks must have features of the same encoder, found {sorted(encoders)}."
        raise ValueError(msg)
    for table, found in zip(tables, spots, strict=True):
        require_same_folds(table, found, params, seed=seed)
    split = [by_panel(replace(found, expression=found.expression.astype("float32"))) for found in spots]
    if len(split) > 1 and any(len(parts) > 1 for parts in split):
        msg = (
            "Stacks whose sections were measured with different genes are fitted one at a time; use "
            '`si.pp.select_genes(sdata, genes=..., join="inner")` to fit several together.'
        )
        raise ValueError(msg)
    config = {
        "base_layers": base_layers,
        "encoder": encoders.pop(),
        "features": feature_settings(tables[0]),
        "units": units(tables[0]),
        "sections": [sorted(t.obs[Keys.SECTION][s.known].unique()) for t, s in zip(tables, spots, strict=True)],
        "n_measured_spots": [int(s.known.sum()) for s in spots],
        "version": version("spatial-impute"),
    }
    panels = [([genes[i] for i in columns], [part[k][1] for part in split]) for k, (columns, _) in enumerate(split[0])]
    return panels, config


def _start_networks(
    model: AsignModel | AsignPanels, panels: list[tuple[list[str], list[Spots]]], encoder: str, params: AsignParams
) -> list[Any]:
    """Networks of a model, or a ``ValueError`` if they cannot be trained further on these data."""
    from spatial_impute.models.asign._model import AsignModel

    if len(panels) > 1 or not isinstance(model, AsignModel):
        msg = "`start_from` is for sections that were measured with the same genes, and needs an `AsignModel`."
        raise ValueError(msg)
    sizes = ("width", "n_heads", "n_graph_layers", "level_graph", "n_level_layers", "n_gene_groups")
    pairs = {
        "genes": (model.var_names, panels[0][0]),
        "encoder": (model.config["encoder"], encoder),
        **{name: (getattr(model.params, name), getattr(params, name)) for name in sizes},
    }
    different = [name for name, (found, wanted) in pairs.items() if found != wanted]
    if different:
        shown = {name: pairs[name] for name in different if name != "genes"}
        msg = (
            f"`start_from` must have the genes, encoder and size of the new model; {different} differ"
            f"{f' (model, wanted): {shown}' if shown else ''}. Use `si.pp.select_genes(sdata, genes=model.var_names)`, "
            "the same encoder, and `model_params=model.params`."
        )
        raise ValueError(msg)
    return model._networks
