"""Fit ASIGN and impute with it. The model itself lives in ``spatial_impute.models``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pandas as pd

from spatial_impute._keys import Keys
from spatial_impute._logging import log_added, logger
from spatial_impute._progress import progress
from spatial_impute._stack import load_record
from spatial_impute._validation import (
    require_count,
    require_device,
    require_folder,
    require_model,
    require_slot_key,
    resolve_params,
)
from spatial_impute.tl._provenance import encoder, provenance, units
from spatial_impute.tl._read import read_spots

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from anndata import AnnData
    from spatialdata import SpatialData

    from spatial_impute.models import AsignModel, AsignParams


def fit_asign(
    sdata: SpatialData | Sequence[SpatialData],
    *,
    table_key: str = Keys.STACK_TABLE,
    layer: str = Keys.MEASURED,
    graph_key: str = Keys.SPATIAL_3D,
    model_params: AsignParams | Mapping[str, Any] | None = None,
    checkpoint: str | Path | None = None,
    device: str | None = None,
    seed: int = 0,
    show_progress_bar: bool | None = None,
) -> AsignModel:
    """Fit ASIGN :cite:p:`Zhu2025` on the measured spots of one or several stacks.

    Blocks of the measured section (whole sections, where several are measured) are hidden in turn and predicted by
    every baseline, and by a network with attention over three fields of view and over the 3D graph. The network starts
    exactly at a base, co-kriging on those components of the image features on which registered sections agree, and
    learns a correction of it and how far to follow the labels propagated over the graph. Baselines and networks are
    then blended by non-negative weights that do best on the hidden blocks, so that each is used only as far as it
    helps. Spots count by how precisely they are known (``obs["total_counts"]``). Expression of unmeasured spots is
    never read.

    Parameters
    ----------
    sdata
        Registered stack with features and graph, or several stacks with the same genes.
    table_key, layer, graph_key
        Stack table, layer with log-normalised expression, graph.
    model_params
        Advanced settings; see :class:`~spatial_impute.models.AsignParams`.
    checkpoint
        Directory to keep each network in as soon as it is trained. A call with the same data and settings goes on with
        the others.
    device
        Torch device; ``settings.device`` by default.
    seed
        Seed; same seed, same model.
    show_progress_bar
        ``settings.show_progress_bar`` by default.

    Returns
    -------
    The fitted model. ``model.cross_validation`` has the scores of all baselines, of the network alone and of the blend
    on the hidden blocks. Nothing is written.

    Raises
    ------
    KeyError
        If features, graph or registration are missing.
    ValueError
        If nothing is measured, values are raw counts, stacks have different genes, or `checkpoint` belongs to another
        training.

    Examples
    --------
    >>> import numpy as np
    >>> import spatial_impute as si
    >>> si.settings.show_progress_bar = False
    >>> sdata = si.datasets.synthetic_stack()
    >>> si.tl.register_stack(sdata)
    >>> si.pp.extract_features(sdata)
    >>> si.tl.build_3d_graph(sdata)
    >>> model = si.tl.fit_asign(sdata, model_params={"n_steps": 20})
    >>> si.tl.impute_3d(sdata, model)
    >>> bool(np.isfinite(sdata.tables["stack"].layers["asign"]).all())
    True
    >>> si.settings.show_progress_bar = True
    """
    from spatial_impute.models._fit_asign import fit
    from spatial_impute.models._params import AsignParams

    params = resolve_params(model_params, AsignParams)
    seed, device = require_count(seed, name="seed", least=0), require_device(device)
    folder = None if checkpoint is None else require_folder(checkpoint, name="checkpoint")
    stacks = list(sdata) if isinstance(sdata, Sequence) else [sdata]
    if not stacks:
        msg = "`sdata` is an empty sequence; pass at least one stack."
        raise ValueError(msg)
    read = [read_spots(s, table_key=table_key, layer=layer, graph_key=graph_key) for s in stacks]
    genes = list(read[0][0].var_names)
    encoders = {encoder(table) for table, _ in read}
    for i, (table, _) in enumerate(read):
        if list(table.var_names) != genes:
            msg = (
                f"All stacks must have the same genes in the same order; stack {i} differs from stack 0. "
                "Use `si.pp.select_genes(sdata, genes=...)` on each."
            )
            raise ValueError(msg)
    if len(encoders) > 1:
        msg = f"All stacks must carry features of the same encoder, found {sorted(encoders)}."
        raise ValueError(msg)
    config = {
        "encoder": encoders.pop(),
        "units": units(read[0][0]),
        "sections": [sorted(table.obs[Keys.SECTION][spots.known].unique()) for table, spots in read],
        "n_measured_spots": [int(spots.known.sum()) for _, spots in read],
        "version": version("spatial-impute"),
    }
    with _steps("Fitting ASIGN", show=show_progress_bar) as steps:
        model = fit(
            [spots for _, spots in read],
            genes,
            params,
            config=config,
            seed=seed,
            device=device,
            progress=steps,
            checkpoint=folder,
        )
    logger.info("Fitted %r", model)
    return model


def impute_3d(
    sdata: SpatialData,
    model: AsignModel,
    *,
    table_key: str = Keys.STACK_TABLE,
    layer: str = Keys.MEASURED,
    graph_key: str = Keys.SPATIAL_3D,
    device: str | None = None,
    key_added: str = Keys.ASIGN,
    inplace: bool = True,
) -> AnnData | None:
    """Impute expression at every spot of every section.

    Parameters
    ----------
    sdata
        Registered stack with features and graph; at least one section is measured.
    model
        Model of :func:`~spatial_impute.tl.fit_asign`.
    table_key, layer, graph_key
        Stack table, layer with log-normalised expression, graph.
    device
        Torch device; ``settings.device`` by default.
    key_added
        Layer to write.
    inplace
        Write to the stack table, or return a new AnnData with the result in ``X``.

    Returns
    -------
    ``None``, or an AnnData with ``inplace=False``. Writes to `sdata.tables['stack']`:

    `.layers['asign']` : :class:`numpy.ndarray` (``float32``)
        (n_spots, n_genes) in the units of the model (log1p counts); measured spots keep their measurement.
    `.layers['asign_sd']` : :class:`numpy.ndarray` (``float32``)
        (n_spots, n_genes) standard deviation of what a measurement would show around the imputed value, such that
        intervals of 1.645 of them cover 90 % of held-out spots; wider where support is low, 0 at measured spots.
        Sections that differ in depth or stain from the measured ones are covered less: no held-out block shows that.
    `.obs['imputation_support']` : (``float32``)
        0-1: how much of the measurement reaches the spot over the 3D graph; 1 at measured spots, 0 where none does.
    `.var['imputation_r']` : (``float64``)
        Pearson correlation of each gene on held-out blocks of the measured sections, the trust a gene deserves.
    `.uns['asign']` : :class:`dict`
        Provenance.

    Raises
    ------
    KeyError
        If the stack lacks genes, features, graph or registration.
    ValueError
        If features come from another encoder, or nothing is measured.

    Examples
    --------
    See :func:`~spatial_impute.tl.fit_asign`, whose example ends with this call.
    """
    from spatial_impute.models._asign import AsignModel

    require_model(model, AsignModel, made_by="si.tl.fit_asign(sdata)")
    require_slot_key(key_added, name="key_added", taken=(layer, Keys.MEASURED))
    device = require_device(device)
    record = load_record(sdata)
    table, spots = read_spots(sdata, table_key=table_key, layer=layer, graph_key=graph_key)
    if list(table.var_names) != model.var_names:
        missing = [gene for gene in model.var_names if gene not in table.var_names]
        msg = (
            f"The stack must have the {len(model.var_names)} genes of the model in the same order; "
            f"{len(missing)} are missing, e.g. {missing[:5]}. Use `si.pp.select_genes(sdata, genes=model.var_names)`."
        )
        raise KeyError(msg)
    if encoder(table) != model.config["encoder"]:
        msg = (
            f"The model was fitted on features of encoder {model.config['encoder']!r}, the stack has those of "
            f"{encoder(table)!r}. Run `si.pp.extract_features` with the same encoder."
        )
        raise ValueError(msg)
    result = model._impute(spots, device=device)
    origin = provenance(record, table, spots.known) | {
        "model": model.identity,
        "model_params": asdict(model.params),
        "seed": int(model.config["seed"]),
        "weights": {name: float(w) for name, w in model.weights.mean().items()},
        "cross_validated_r": float(model.cross_validation.loc["asign", "pearson_gene"]),
    }
    predictability = model.predictability.reindex(table.var_names).to_numpy()
    if not inplace:
        from anndata import AnnData

        obs = table.obs.assign(**{Keys.SUPPORT: result.support})
        var = pd.DataFrame({Keys.PREDICTABILITY: predictability}, index=table.var_names)
        obsm = {Keys.SPATIAL: table.obsm[Keys.SPATIAL], Keys.SPATIAL_3D: table.obsm[Keys.SPATIAL_3D]}
        layers = {Keys.sd(key_added): result.sd}
        return AnnData(X=result.expression, layers=layers, obs=obs, var=var, obsm=obsm, uns={key_added: origin})
    table.layers[key_added] = result.expression
    log_added(f"tables[{table_key!r}].layers[{key_added!r}]")
    table.layers[Keys.sd(key_added)] = result.sd
    log_added(f"tables[{table_key!r}].layers[{Keys.sd(key_added)!r}]")
    table.obs[Keys.SUPPORT] = result.support
    log_added(f"tables[{table_key!r}].obs[{Keys.SUPPORT!r}]")
    table.var[Keys.PREDICTABILITY] = predictability
    log_added(f"tables[{table_key!r}].var[{Keys.PREDICTABILITY!r}]")
    table.uns[key_added] = origin
    log_added(f"tables[{table_key!r}].uns[{key_added!r}]")
    return None


@contextmanager
def _steps(label: str, *, show: bool | None) -> Iterator[Callable[[int], Callable[[], None]]]:
    """Progress bar whose length is known only later."""
    bar = progress(None, label, show=show)

    def start(total: int) -> Callable[[], None]:
        bar.reset(total=total)
        return bar.update

    try:
        yield start
    finally:
        bar.close()
