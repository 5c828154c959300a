"""Fit ASIGN and impute with it. The model itself lives in ``spatial_impute.models``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spatial_impute._keys import Keys
from spatial_impute._logging import log_added, logger
from spatial_impute._params import resolve_params
from spatial_impute._settings import progress
from spatial_impute._stack.record import load_record
from spatial_impute._validation import (
    require_count,
    require_device,
    require_folder,
    require_key,
    require_model,
    require_positive,
    require_slot_key,
)
from spatial_impute.tl._base_layers import read_bases, require_same_folds
from spatial_impute.tl._provenance import encoder, provenance, require_same_units, units
from spatial_impute.tl._read_spots import read_spots

if TYPE_CHECKING:
    from collections.abc import Iterator
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
    base_layers: Sequence[str] = (),
    model_params: AsignParams | Mapping[str, Any] | None = None,
    start_from: AsignModel | None = None,
    checkpoint: str | Path | None = None,
    device: str | None = None,
    seed: int = 0,
    show_progress_bar: bool | None = None,
) -> AsignModel | AsignPanels:
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
    base_layers
        Layers of the stack table with predictions that may be blended in, such as ``"pixnet"`` of
        :func:`~spatial_impute.tl.impute_pixnet`: at measured spots without the fold that is hidden with them.
    model_params
        Advanced settings; see :class:`~spatial_impute.models.AsignParams`.
    start_from
        Model to fine-tune: networks start from its own instead of at the base. It must have the same genes, encoder
        and size.
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
    The fitted model; :class:`~spatial_impute.models.AsignPanels` where sections were measured with different genes,
    with one model for the genes of each panel. ``model.cross_validation`` has the scores of all baselines, of the network alone and of the blend
    on the hidden blocks. Nothing is written.

    Raises
    ------
    KeyError
        If features, graph or registration are missing.
    ValueError
        If nothing is measured, values are raw counts, stacks have different genes or units, spots were moved since the
        graph was built, base layers were predicted with other folds than those that are hidden, or `start_from` or
        `checkpoint` belong to another training.

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
    from spatial_impute.models._params import AsignParams
    from spatial_impute.models.asign._fit import fit
    from spatial_impute.models.asign._panels import AsignPanels, by_panel
    from spatial_impute.models.asign._training import FitSettings

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
    require_same_units(units(table) for table, _ in read)
    names = list(base_layers)
    read = [(table, replace(spots, bases=read_bases(table, names))) for table, spots in read]
    for table, spots in read:
        require_same_folds(table, spots, names, n_folds=params.n_folds, block_spacings=params.block_spacings, seed=seed)
    panels = [by_panel(spots) for _, spots in read]
    several = len(panels[0]) > 1
    found_encoder = encoders.pop()
    if start_from is not None:
        if several or isinstance(start_from, AsignPanels):
            msg = "`start_from` is for sections that were measured with the same genes, and needs an `AsignModel`."
            raise ValueError(msg)
        _require_same_kind(start_from, genes, found_encoder, params)
    config = {
        "base_layers": names,
        "encoder": found_encoder,
        "units": units(read[0][0]),
        "sections": [sorted(table.obs[Keys.SECTION][spots.known].unique()) for table, spots in read],
        "n_measured_spots": [int(spots.known.sum()) for _, spots in read],
        "version": version("spatial-impute"),
    }
    if len(panels) > 1 and any(len(parts) > 1 for parts in panels):
        msg = (
            "Stacks whose sections were measured with different genes are fitted one at a time; use "
            '`si.pp.select_genes(sdata, genes=..., join="inner")` to fit several together.'
        )
        raise ValueError(msg)

    def panel_folder(k: int) -> Path | None:
        return folder if folder is None or not several else require_folder(folder / f"panel{k}", name="checkpoint")

    models = []
    for k, (columns, _) in enumerate(panels[0]):
        label = f"Fitting ASIGN, genes {k + 1} of {len(panels[0])}" if several else "Fitting ASIGN"
        with _steps(label, show=show_progress_bar) as steps:
            fitted = fit(
                [parts[k][1] for parts in panels],
                [genes[i] for i in columns],
                FitSettings(
                    params=params,
                    seed=seed,
                    device=device,
                    config=config,
                    progress=steps,
                    checkpoint=panel_folder(k),
                    start=() if start_from is None else start_from._networks,
                ),
            )
        models.append(fitted)
    model = AsignPanels(models, genes) if several else models[0]
    logger.info("Fitted %r", model)
    return model


def impute_3d(
    sdata: SpatialData,
    model: AsignModel | AsignPanels,
    *,
    table_key: str = Keys.STACK_TABLE,
    layer: str = Keys.MEASURED,
    graph_key: str = Keys.SPATIAL_3D,
    depth: float | str | None = None,
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
    depth
        Total counts (all genes) of the measurements that ``layers['asign_sd']`` is for: a number, or a column of
        ``obs``. By default what each spot is expected to have, predicted from ``obs['total_counts']`` of the measured
        ones. Imputed values do not depend on it.
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
    `.obs['imputation_depth']` : (``float32``)
        Total counts of the measurement that ``asign_sd`` is for; NaN where ``obs['total_counts']`` is not known.
    `.obs['imputation_support']` : (``float32``)
        0-1: how much of the measurement reaches the spot over the 3D graph; 1 at measured spots, 0 where none does.
    `.obs['imputation_source']` : :class:`~pandas.Categorical`
        Why the support is what it is: ``"measured"``, ``"labels and image"`` where measured spots are linked to the
        spot over the graph, ``"image"`` where none is.
    `.var['imputation_r']` : (``float64``)
        Pearson correlation of each gene on held-out blocks of the measured sections, the trust a gene deserves.
    `.var['imputable']` : (``bool``)
        Whether that is better than chance. Genes for which it is not are imputed close to their mean; do not interpret
        their pattern.
    `.uns['asign']` : :class:`dict`
        Provenance.

    Raises
    ------
    KeyError
        If the stack lacks genes, features, graph, registration, or a base layer of the model.
    ValueError
        If features come from another encoder, expression has other units, spots were moved since the graph was built,
        nothing is measured, or `depth` is not positive or asked for without total counts.

    Examples
    --------
    See :func:`~spatial_impute.tl.fit_asign`, whose example ends with this call.
    """
    from spatial_impute.models import AsignModel, AsignPanels

    require_model(model, (AsignModel, AsignPanels), made_by="si.tl.fit_asign(sdata)")
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
    require_same_units((model.config.get("units", "unknown"), units(table)))
    spots = replace(spots, bases=read_bases(table, model.config.get("base_layers", ())))
    wanted = _wanted_depth(depth, table, spots, where=f"sdata.tables[{table_key!r}].obs")
    result = model._impute(spots, depth=wanted, device=device)
    origin = provenance(record, table, spots.known) | {
        "model": model.identity,
        "model_params": asdict(model.params),
        "seed": int(model.config["seed"]),
        "weights": {name: float(w) for name, w in model.weights.mean().items()},
        "cross_validated_r": float(model.cross_validation.loc["asign", "pearson_gene"]),
        "depth": "expected" if depth is None else depth if isinstance(depth, str) else float(depth),
    }
    obs = {
        Keys.SUPPORT: result.support,
        Keys.SOURCE: _source(spots.known, result.support),
        Keys.DEPTH: result.depth.astype(np.float32),
    }
    var = {
        Keys.PREDICTABILITY: model.predictability.reindex(table.var_names).to_numpy(),
        Keys.PREDICTABLE: model.predictable.reindex(table.var_names).to_numpy(dtype=bool),
    }
    if not inplace:
        from anndata import AnnData

        obsm = {Keys.SPATIAL: table.obsm[Keys.SPATIAL], Keys.SPATIAL_3D: table.obsm[Keys.SPATIAL_3D]}
        return AnnData(
            X=result.expression,
            layers={Keys.sd(key_added): result.sd},
            obs=table.obs.assign(**obs),
            var=pd.DataFrame(var, index=table.var_names),
            obsm=obsm,
            uns={key_added: origin},
        )
    where = f"tables[{table_key!r}]"
    for key, values in {key_added: result.expression, Keys.sd(key_added): result.sd}.items():
        table.layers[key] = values
        log_added(f"{where}.layers[{key!r}]")
    for key, values in obs.items():
        table.obs[key] = values
        log_added(f"{where}.obs[{key!r}]")
    for key, values in var.items():
        table.var[key] = values
        log_added(f"{where}.var[{key!r}]")
    table.uns[key_added] = origin
    log_added(f"{where}.uns[{key_added!r}]")
    return None


def _wanted_depth(depth: float | str | None, table: AnnData, spots: Spots, *, where: str) -> np.ndarray | None:
    """(n,) total counts that intervals are wanted for, or None for the expected ones."""
    if depth is None:
        return None
    if spots.total_counts is None:
        msg = (
            f"`depth` needs total counts of the measured spots, found none in {where}[{Keys.TOTAL_COUNTS!r}]. "
            "Run `si.pp.select_genes(sdata)` on raw counts, or leave out `depth`."
        )
        raise ValueError(msg)
    if not isinstance(depth, str):
        return np.full(table.n_obs, require_positive(depth, name="depth", unit="total counts"))
    require_key(depth, table.obs, where=where)
    values = pd.to_numeric(table.obs[depth], errors="coerce").to_numpy(dtype=np.float64, copy=True)
    bad = ~spots.known & ~(np.isfinite(values) & (values > 0))
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        msg = (
            f"{where}[{depth!r}] must be positive at all unmeasured spots; it is {table.obs[depth].iloc[row]} at "
            f"{table.obs_names[row]!r}. Fill it, or pass a number as `depth`."
        )
        raise ValueError(msg)
    values[spots.known] = spots.total_counts
    return values


def _source(known: np.ndarray, support: np.ndarray) -> pd.Categorical:
    """What each spot was imputed from."""
    codes = np.where(known, 0, np.where(support > 0, 1, 2))
    return pd.Categorical.from_codes(codes, ["measured", "labels and image", "image"])


def _require_same_kind(model: AsignModel, genes: list[str], encoder: str, params: AsignParams) -> None:
    """Raise a ``ValueError`` unless the networks of a model can be trained further on these data."""
    names = ("width", "n_heads", "n_graph_layers", "n_level_layers", "n_gene_groups")
    pairs = {
        "genes": (model.var_names, genes),
        "encoder": (model.config["encoder"], encoder),
        **{name: (getattr(model.params, name), getattr(params, name)) for name in names},
    }
    different = [name for name, (of_model, wanted) in pairs.items() if of_model != wanted]
    if different:
        found = {name: pairs[name] for name in different if name != "genes"}
        msg = (
            f"`start_from` must have the genes, encoder and size of the new model; {different} differ"
            f"{f' (model, wanted): {found}' if found else ''}. Use `si.pp.select_genes(sdata, genes=model.var_names)`, "
            "the same encoder, and `model_params=model.params`."
        )
        raise ValueError(msg)


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
