"""Impute expression at every spot: with a fitted ASIGN model, or with a simple method."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spatial_impute._keys import Keys
from spatial_impute._stack.elements import section_images
from spatial_impute._stack.record import load_record
from spatial_impute._stack.spots import read_spots, require_same_units, units
from spatial_impute._stack.table import stack_table
from spatial_impute._validation import (
    require_device,
    require_key,
    require_model,
    require_one_of,
    require_positive,
    require_slot_key,
)
from spatial_impute.tl._base_layers import kinds_of_bases, with_bases
from spatial_impute.tl._provenance import (
    ImputedLayer,
    bases_state,
    compare_with_fit,
    encoder_name,
    feature_settings,
    provenance,
)

_N_LEFT_OUT = 5  # parts of the measured spots: a spot is expected from four fifths of the others

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

    from spatial_impute.models import AsignModel, AsignPanels
    from spatial_impute.models._spots import Spots
    from spatial_impute.models.asign._model import Imputation


def impute_3d(
    sdata: SpatialData,
    model: AsignModel | AsignPanels = None,  # type: ignore[assignment]  # without one, an error says how to make it
    *,
    table_key: str = Keys.STACK_TABLE,
    layer: str = Keys.MEASURED,
    graph_key: str = Keys.SPATIAL_3D,
    depth: float | str | None = None,
    measured: str = "keep",
    parts: bool = False,
    device: str | None = None,
    key_added: str = Keys.ASIGN,
    inplace: bool = True,
) -> AnnData | None:
    """Impute expression at every spot of every section.

    Parameters
    ----------
    sdata
        Registered stack with features and graph and at least one measured section. A model of several stacks also
        predicts a stack without one, from the image and the graph alone: expect much less there, as
        ``model.cohort.cross_validation`` shows. Features are standardised within each section.
    model
        Model of :func:`~spatial_impute.tl.fit_asign`. ``model.cohort`` alone reads no measured spot of this stack, also
        if there are some; its layer can be a base of another fit (``base_layers={"cohort": "independent"}``).
    table_key
        Name of the stack table.
    layer
        Layer with log-normalised expression.
    graph_key
        Key of the 3D graph: the `key_added` of :func:`~spatial_impute.tl.build_3d_graph`.
    depth
        Total counts (all genes) of the measurement that ``layers['asign_sd']`` describes: a number, or a column of
        ``obs``. By default the expected total counts of each spot, predicted from ``obs['total_counts']`` of the
        measured spots. The imputed values do not depend on it.
    measured
        Values of measured spots in the result. ``"keep"``: the measurement, with its counting noise. ``"denoise"``: the
        expression that the model expects there from the other measured spots and the image, without the measurement of
        the spot itself; the networks and weights of the model have seen it when they were fitted. All sections of a map
        or a volume then look alike: :func:`~spatial_impute.pl.volume` shows no rough slice at a measured section. A
        fifth of the measured spots is left out at a time, so that this takes six times as long. ``layers['measured']``
        keeps the measurement, which is used for all fits and scores.
    parts
        Also write what the parts of the model predict, to compare them with
        :func:`~spatial_impute.metrics.evaluate`: the base, the networks alone, and the blend without the networks.
    device
        Torch device; ``settings.device`` by default.
    key_added
        Layer to write.
    inplace
        Write to the stack table, or return a new AnnData with the result in ``X``, and with the columns, coordinates
        and graphs of the table.

    Returns
    -------
    ``None``, or an AnnData with ``inplace=False``. Writes to `sdata.tables['stack']`:

    `.layers['asign']` : :class:`numpy.ndarray` (``float32``)
        (n_spots, n_genes) in the units of the model (log1p counts). Measured spots keep their measurement, unless
        `measured` says otherwise.
    `.layers['asign_sd']` : :class:`numpy.ndarray` (``float32``)
        (n_spots, n_genes) standard deviation of a measurement around the imputed value. Intervals of 1.645 standard
        deviations to either side cover 90 % of held-out spots. They are wider where the support is low, and 0 at spots
        that keep their measurement. On sections with another depth or stain than the measured ones they cover less; no
        held-out block can show that.
    `.X`, `.uns['X_layer']`
        A copy of the layer, and its name, for functions of scanpy and squidpy without ``layer``.
    `.layers['asign_base']`, `.layers['asign_network_alone']`, `.layers['asign_without_network']` : (``float32``)
        (n_spots, n_genes) with ``parts=True``.
    `.obs['imputation_depth']` : (``float32``)
        Total counts of the measurement that ``asign_sd`` describes; NaN if ``obs['total_counts']`` is not known.
    `.obs['imputation_support']` : (``float32``)
        0-1: how well the 3D graph links the spot to measured spots. 1 at spots that keep their measurement, 0 at
        spots without a path to a measured one.
    `.obs['imputation_source']` : :class:`~pandas.Categorical`
        Source of the values: ``"measured"``; ``"labels and image"`` if the graph links the spot to measured
        spots; ``"image"`` if it does not.
    `.var['imputation_r']` : (``float64``)
        Pearson correlation of each gene on held-out blocks of the measured sections. It says how far to trust the gene.
    `.var['imputable']` : (``bool``)
        True if this correlation is better than chance. Other genes are imputed close to their mean; do not interpret
        their pattern.
    `.uns['asign']` : :class:`dict`
        Provenance.

    Raises
    ------
    KeyError
        If the stack lacks genes, features, graph, registration, or a base layer of the model.
    ValueError
        If features come from another encoder, expression has other units, spots were moved after the graph was built,
        nothing is measured, `measured` is unknown, or `depth` is not positive or is given without total counts.

    Examples
    --------
    See :func:`~spatial_impute.tl.fit_asign`, whose example ends with this call.
    """
    from spatial_impute.models import AsignModel, AsignPanels

    require_model(model, (AsignModel, AsignPanels), made_by="si.tl.fit_asign(sdata)")
    require_slot_key(key_added, name="key_added", taken=(layer, *Keys.NO_RESULT))
    require_one_of(measured, ("keep", "denoise"), name="measured")
    device = require_device(device)
    table, spots, model, origin = _read_stack(sdata, model, table_key=table_key, layer=layer, graph_key=graph_key)
    wanted = _wanted_depth(depth, table, spots, where=f"sdata.tables[{table_key!r}].obs")
    found, kept = model._impute(spots, depth=wanted, device=device, parts=parts), spots.known
    if measured == "denoise" and kept.sum() > 1:  # a single spot has no other to be expected from
        _leave_out(model, spots, found, depth=wanted, device=device)
        kept = np.zeros_like(kept)
    origin["measured"] = measured
    origin["depth"] = "expected" if depth is None else depth if isinstance(depth, str) else float(depth)
    result = _as_layer(key_added, found, kept, model, origin)
    target = stack_table(sdata, table_key)
    if not inplace:
        return result.to_anndata(target)
    result.write(target, table_key)
    return None


def impute_baseline(
    sdata: SpatialData,
    method: str = "kernel",
    *,
    table_key: str = Keys.STACK_TABLE,
    layer: str = Keys.MEASURED,
    graph_key: str = Keys.SPATIAL_3D,
    key_added: str | None = None,
    inplace: bool = True,
) -> AnnData | None:
    """Impute expression at every spot with a simple method.

    Each method but ``"hest"`` chooses its settings (neighbors, bandwidth, penalty) by leaving out measured spots.

    Parameters
    ----------
    sdata
        Registered stack.
    method
        ``"mean"`` (mean profile of the measured sections), ``"nearest"`` (nearest measured spot), ``"knn"`` (mean of
        the nearest measured spots), ``"kernel"`` (Gaussian kernel on the registered distance), ``"propagation"``
        (clamped label propagation on the 3D graph :cite:p:`Zhu2002`), ``"ridge"`` (ridge regression on image features),
        ``"transfer_ridge"`` (mean of kernel and ridge at the same spread), ``"cokriging"`` (Gaussian processes on
        position and image features) or ``"hest"`` (the recipe by which HEST-Bench scores encoders: standardised image
        features, 256 principal components, ridge regression with a fixed penalty; for comparison with published
        figures; ASIGN does not use it).
    table_key
        Name of the stack table.
    layer
        Layer with log-normalised expression.
    graph_key
        Key of the 3D graph; only ``"propagation"`` uses it.
    key_added
        Layer to write; ``"baseline_{method}"`` by default.
    inplace
        Write to the stack table, or return a new AnnData with the result in ``X``, and with the columns, coordinates
        and graphs of the table.

    Returns
    -------
    ``None``, or an AnnData with ``inplace=False``. Writes:

    `sdata.tables['stack'].layers['baseline_{method}']` : :class:`numpy.ndarray` (``float32``)
        (n_spots, n_genes) log1p counts. Measured spots keep their measurement.
    `sdata.tables['stack'].X`, `sdata.tables['stack'].uns['X_layer']`
        A copy of the layer, and its name, for functions of scanpy and squidpy without ``layer``.
    `sdata.tables['stack'].uns['baseline_{method}']` : :class:`dict`
        Provenance.

    Raises
    ------
    KeyError
        If registration, features or graph are missing and the method needs them.
    ValueError
        If the method is unknown, nothing is measured, or values are raw counts.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack(extent=1400.0)
    >>> si.tl.register_stack(sdata, show_progress_bar=False)
    >>> si.tl.impute_baseline(sdata, "kernel")
    >>> sdata.tables["stack"].layers["baseline_kernel"].shape == sdata.tables["stack"].shape
    True
    """
    from spatial_impute.models.asign._baselines import METHODS, NEEDS_FEATURES, NEEDS_GRAPH, RECIPES
    from spatial_impute.models.asign._panels import by_panel

    methods = {**METHODS, **RECIPES}
    require_one_of(method, methods, name="method")
    key = Keys.baseline(method) if key_added is None else key_added
    require_slot_key(key, name="key_added", taken=(layer, *Keys.NO_RESULT))
    record = load_record(sdata)
    features, graph = method in NEEDS_FEATURES, method in NEEDS_GRAPH
    table, spots = read_spots(
        sdata, table_key=table_key, layer=layer, graph_key=graph_key, features=features, graph=graph
    )
    values = np.empty(table.shape, dtype=np.float32)
    for columns, panel in by_panel(spots):
        found = methods[method](panel).expression()
        found[panel.known] = panel.expression
        values[:, columns] = found
    used = {"layer": layer, "features": features, "graph": graph_key if graph else None}
    result = ImputedLayer(key, values, {"method": method, **provenance(record, table, spots.known, **used)})
    if not inplace:
        return result.to_anndata(table)
    result.write(table, table_key)
    return None


def _read_stack(
    sdata: SpatialData, model: AsignModel | AsignPanels, *, table_key: str, layer: str, graph_key: str
) -> tuple[AnnData, Spots, AsignModel | AsignPanels, dict[str, Any]]:
    """Table, spots, model and provenance, after a comparison with those of the fit.

    The model is the part of it that predicts a stack without a measured spot, if there is none.
    """
    from spatial_impute.models.asign._model import CohortModel

    record = load_record(sdata)
    cohort = model if isinstance(model, CohortModel) else getattr(model, "cohort", None)
    table, spots = read_spots(
        sdata, table_key=table_key, layer=layer, graph_key=graph_key, allow_unmeasured=cohort is not None
    )
    if model is cohort:
        table, spots = _without_measurement(table), replace(spots.hide(spots.known), total_counts=None)
    elif cohort is not None and not spots.known.any():
        model = cohort
    _require_fit(table, model)
    base_layers = kinds_of_bases(model.config["base_layers"])
    spots = with_bases(sdata, spots, table, base_layers)
    origin = provenance(record, table, spots.known, layer=layer, features=True, graph=graph_key)
    if base_layers:
        origin["base_layers"] = base_layers
        origin[Keys.STATE] |= bases_state(table, record, base_layers)
    if not spots.known.any():
        del origin[Keys.STATE]["measured"]  # not read: a later measurement does not make the result old
    if seen := compare_with_fit(sdata, table, model, origin[Keys.STATE]):
        origin[Keys.SEEN] = section_images(sdata, record, seen)
    spots = replace(spots, expression=spots.expression.astype(np.float32))  # half the memory; results have this type
    return table, spots, model, origin


def _as_layer(
    key: str, found: Imputation, kept: np.ndarray, model: AsignModel | AsignPanels, origin: dict[str, Any]
) -> ImputedLayer:
    """Result with everything to write beside it; the (n,) `kept` spots have their measurement."""
    sources = np.where(kept, 0, np.where(found.support > 0, 1, 2))
    parts = {Keys.part(key, name.replace(" ", "_")): part.astype(np.float32) for name, part in found.parts.items()}
    of_model = {
        "model": model.identity,
        "model_params": asdict(model.params),
        "seed": int(model.config["seed"]),
        "weights": {name: float(w) for name, w in model.weights.mean().items()},
        "cross_validated_r": float(model.cross_validation.loc["asign", "pearson_gene"]),
    }
    return ImputedLayer(
        key,
        found.expression,
        origin | of_model,
        layers={Keys.sd(key): found.sd, **parts},
        obs={
            Keys.SUPPORT: found.support,
            Keys.SOURCE: pd.Categorical.from_codes(sources, ["measured", "labels and image", "image"]),
            Keys.DEPTH: found.depth.astype(np.float32),
        },
        var={
            Keys.PREDICTABILITY: model.predictability.reindex(model.var_names).to_numpy(),
            Keys.PREDICTABLE: model.predictable.reindex(model.var_names).to_numpy(dtype=bool),
        },
    )


def _without_measurement(table: AnnData) -> AnnData:
    """Table with the same slots in which no spot counts as measured."""
    from anndata import AnnData

    slots = {name: dict(getattr(table, name)) for name in ("layers", "obsm", "obsp", "uns")}
    return AnnData(obs=table.obs.assign(**{Keys.MEASURED: False}), var=table.var, **slots)


def _leave_out(
    model: AsignModel | AsignPanels, spots: Spots, found: Imputation, *, depth: np.ndarray | None, device: str
) -> None:
    """Replace the results of measured spots by those from the other spots, in place.

    Spots that are left out together are drawn at random, so most of their neighbors stay: an imputed spot of the next
    section has measured spots around it as well. They are drawn in the order of their places, not of the rows of the
    table.
    """
    rows = np.flatnonzero(spots.known)
    rows = rows[np.lexsort(np.round(spots.xyz[rows], 3).T)]
    fold = np.random.default_rng(0).permutation(len(rows)) % _N_LEFT_OUT
    for k in range(_N_LEFT_OUT):
        hidden = np.zeros(len(spots.known), dtype=bool)
        hidden[rows[fold == k]] = True
        if not hidden.any() or not (spots.known & ~hidden).any():
            continue
        left = model._impute(spots.hide(hidden), depth=depth, device=device, parts=bool(found.parts))
        for name in ("expression", "sd", "support", "depth"):
            getattr(found, name)[hidden] = getattr(left, name)[hidden]
        for name, values in found.parts.items():
            values[hidden] = left.parts[name][hidden]


def _require_fit(table: AnnData, model: AsignModel | AsignPanels) -> None:
    """Raise unless the table has the genes, features and units of the model."""
    if list(table.var_names) != model.var_names:
        missing = [gene for gene in model.var_names if gene not in table.var_names]
        further = table.n_vars - len(model.var_names) + len(missing)
        problem = f"{further} further genes are in the stack" if further else "the order differs"
        problem = f"{len(missing)} are missing, e.g. {missing[:5]}" if missing else problem
        msg = (
            f"The stack must have the {len(model.var_names)} genes of the model in the same order; {problem}. "
            "Use `si.pp.select_genes(sdata, genes=model.var_names)`."
        )
        raise KeyError(msg)
    if encoder_name(table) != model.config["encoder"]:
        msg = (
            f"The model was fitted on features of encoder {model.config['encoder']!r}, the stack has those of "
            f"{encoder_name(table)!r}. Run `si.pp.extract_features` with the same encoder."
        )
        raise ValueError(msg)
    wanted, found = model.config["features"], feature_settings(table)
    if wanted != found:
        differ = {key: (wanted[key], found[key]) for key in found if wanted[key] != found[key]}
        msg = (
            f"The model was fitted on features with other settings (model, stack): {differ}. Run "
            "`si.pp.extract_features` as for the model."
        )
        raise ValueError(msg)
    require_same_units((model.config["units"], units(table)))


def _wanted_depth(depth: float | str | None, table: AnnData, spots: Spots, *, where: str) -> np.ndarray | None:
    """(n,) total counts of the measurement that intervals describe, or None for the expected ones."""
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
            f"{table.obs_names[row]!r}. Fill the column, or pass a number as `depth`."
        )
        raise ValueError(msg)
    values[spots.known] = spots.total_counts
    return values
