"""Layers with predictions of other tools, and the layers that ASIGN may blend in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from anndata import AnnData
from scipy import sparse

from spatial_impute._expression import gene_ids
from spatial_impute._keys import Keys
from spatial_impute._scores import pearson_by_gene
from spatial_impute._settings import logger
from spatial_impute._stack.record import load_record
from spatial_impute._stack.state import warn_of_old_layer
from spatial_impute._stack.table import dense_rows, stack_table, uns_record, write_slots
from spatial_impute._validation import name_list, require_key, require_one_of, require_slot_key, require_unique
from spatial_impute.tl._provenance import measured_hash

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spatialdata import SpatialData

    from spatial_impute.models import AsignParams
    from spatial_impute.models._spots import Spots

INDEPENDENT = "independent"
HELD_OUT = "held_out"
_WRITERS = {
    HELD_OUT: "impute_pixnet(sdata, key_added={!r})",
    INDEPENDENT: "add_prediction(sdata, adata, key_added={!r})",
}
_SAME_R = 0.999  # no prediction of a noisy measurement is that good


def add_prediction(
    sdata: SpatialData,
    prediction: AnnData,
    *,
    key_added: str,
    layer: str | None = None,
    table_key: str = Keys.STACK_TABLE,
) -> None:
    """Write expression that another tool predicted from the images to a layer of the stack table.

    Rows are joined by the names of spots, genes by name or by stable id. :func:`fit_asign` can use the layer as a base
    (``base_layers={key_added: "independent"}``), if the model behind it has seen no measured spot of this tissue.

    Parameters
    ----------
    sdata
        Stack.
    prediction
        Predicted expression in any units, with ``obs_names`` as in the stack table (``"{section}_{id}"``). Join several
        sections with :func:`anndata.concat`. Spots and genes may be missing.
    key_added
        Layer to write.
    layer
        Layer of `prediction` to read; ``X`` by default.
    table_key
        Name of the stack table.

    Returns
    -------
    ``None``. Writes to `sdata.tables['stack']`:

    `.layers[key_added]` : :class:`numpy.ndarray` (``float32``)
        (n_spots, n_genes) predictions; NaN for spots and genes that `prediction` does not have. ``X`` follows if it is
        a copy of this layer (``uns["X_layer"]``). The record and ``_sd`` of an earlier layer of that name are dropped.

    Raises
    ------
    KeyError
        If `prediction` shares no spot or no gene with the stack.
    TypeError
        If `prediction` is no AnnData.
    ValueError
        If names are repeated, values are infinite or no real numbers, or `key_added` is taken by another kind of data.

    Examples
    --------
    >>> import numpy as np
    >>> from anndata import AnnData
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack(extent=1400.0)
    >>> table = sdata.tables["stack"]
    >>> found = AnnData(np.ones((table.n_obs, 2)), obs=table.obs[[]])
    >>> found.var_names = [table.var_names[0], "another gene"]
    >>> si.tl.add_prediction(sdata, found, key_added="mine")
    >>> int(np.isfinite(table.layers["mine"]).all(axis=0).sum())
    1
    """
    table = stack_table(sdata, table_key)
    taken = (*Keys.NO_RESULT, Keys.ASIGN, *map(Keys.sd, table.layers), *_other_records(table))
    require_slot_key(key_added, name="key_added", taken=taken)
    if not isinstance(prediction, AnnData):
        msg = f"`prediction` must be an AnnData with a row for each spot, found {type(prediction).__name__}."
        raise TypeError(msg)
    if layer is not None:
        require_key(layer, prediction.layers, where="prediction.layers")
    matrix = prediction.X if layer is None else prediction.layers[layer]
    if matrix is None:
        msg = f"`prediction.X` is empty; name the layer to read with `layer=`, one of {sorted(prediction.layers)}."
        raise ValueError(msg)
    if np.dtype(matrix.dtype).kind not in "buif":
        where = "X" if layer is None else f"layers[{layer!r}]"
        msg = f"`prediction.{where}` must hold real numbers, found {matrix.dtype}. Convert with `.astype('float32')`."
        raise ValueError(msg)
    rows, columns = _rows(table, prediction), _columns(sdata, table, prediction)
    found, genes = np.flatnonzero(rows >= 0), np.flatnonzero(columns >= 0)
    picked = matrix[rows[found]][:, columns[genes]]
    values = np.full(table.shape, np.nan, dtype=np.float32)
    values[np.ix_(found, genes)] = picked.toarray() if sparse.issparse(picked) else picked
    if np.isinf(values).any():
        bad = table.obs_names[np.isinf(values).any(axis=1)][0]
        msg = f"`prediction` holds infinite values, the first at spot {bad!r}. Use NaN where there is no prediction."
        raise ValueError(msg)
    if not np.isfinite(values).any():
        msg = "`prediction` holds no number for the spots and genes of the stack, only NaN. Give predicted expression."
        raise ValueError(msg)
    n_spots, n_genes = table.shape
    logger.info("%r has %d of %d spots and %d of %d genes", key_added, len(found), n_spots, len(genes), n_genes)
    write_slots(table, table_key, {"layers": {key_added: values}})
    # The record of a layer that was there before, and its error.
    table.uns.pop(key_added, None)
    table.layers.pop(Keys.sd(key_added), None)


def _other_records(table: AnnData) -> list[str]:
    """Names in ``uns`` that are no records of layers, such as ``pca`` of scanpy or a graph."""
    records = {key: record for key, record in table.uns.items() if isinstance(record, Mapping)}
    layers = [key for key, record in records.items() if Keys.STATE in record and "params" not in record]
    return sorted(set(table.uns) - {*table.layers, *layers})


def _rows(table: AnnData, prediction: AnnData) -> np.ndarray:
    """(n_spots,) row of the prediction for each spot; -1 for none."""
    require_unique(prediction.obs_names, name="`prediction.obs_names`")
    rows = prediction.obs_names.get_indexer(table.obs_names)
    if (rows < 0).all():
        msg = (
            f"`prediction` shares no spot with the stack: its `obs_names` are like {list(prediction.obs_names[:3])}, "
            f"spots of the stack are named `{{section}}_{{id}}`, like {list(table.obs_names[:3])}. Rename the rows of "
            "one section with `prediction.obs_names = [f'{section}_{i}' for i in prediction.obs_names]`."
        )
        raise KeyError(msg)
    return rows


def _columns(sdata: SpatialData, table: AnnData, prediction: AnnData) -> np.ndarray:
    """(n_genes,) column of the prediction for each gene of the stack, by name, else by id; -1 for none."""
    require_unique(prediction.var_names, name="`prediction.var_names`")
    columns, ids = prediction.var_names.get_indexer(table.var_names), gene_ids(prediction)
    if ids is not None:
        known = _stack_ids(sdata)
        by_id = ids.get_indexer([known.get(gene, gene) for gene in table.var_names])
        columns[np.isin(columns, by_id)] = -1  # of another gene, by its id: an id says more than a name
        columns = np.where(by_id >= 0, by_id, columns)
    if (columns < 0).all():
        msg = (
            f"`prediction` shares no gene with the stack: its `var_names` are like {list(prediction.var_names[:3])}, "
            f"genes of the stack like {list(table.var_names[:3])}. Use the same names, or give both stable ids in "
            "`var['gene_ids']`."
        )
        raise KeyError(msg)
    return columns


def _stack_ids(sdata: SpatialData) -> dict[str, str]:
    """Stable id of each gene, from the tables of counts that have ids."""
    found: dict[str, str] = {}
    for section in load_record(sdata).sections:
        counts = sdata.tables.get(str(section.counts))
        ids = None if counts is None else gene_ids(counts)
        if ids is not None:
            found |= dict(zip(counts.var_names, ids, strict=True))
    return found


def kinds_of_bases(base_layers: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """Kind of each base layer: ``"held_out"`` unless the user says otherwise."""
    if not isinstance(base_layers, Mapping):
        return dict.fromkeys(name_list(base_layers, name="base_layers"), HELD_OUT)
    for name, kind in base_layers.items():
        require_one_of(kind, (HELD_OUT, INDEPENDENT), name=f"base_layers[{name!r}]")
    return dict(base_layers)


def with_bases(sdata: SpatialData, spots: Spots, table: AnnData, kinds: Mapping[str, str]) -> Spots:
    """Spots with the (n, n_genes) predictions of other models in layers of the stack table; warns of old ones.

    Raises a ``ValueError`` if a layer has the name of a method of ASIGN, or values that its kind does not allow.
    """
    from spatial_impute.models.asign._baselines import METHODS
    from spatial_impute.models.asign._model import BASE, NETWORK, WITHOUT

    found = {}
    for name, kind in kinds.items():
        then = f"Write it with `si.tl.{_WRITERS[kind].format(name)}` first."
        require_key(name, table.layers, where="layers of the stack table", then=then)
        if name in {*METHODS, NETWORK, BASE, WITHOUT, Keys.ASIGN, Keys.MEASURED}:
            msg = f"`base_layers` names {name!r}, which ASIGN has already; write the layer under another name."
            raise ValueError(msg)
        if sparse.issparse(table.layers[name]):
            slot = f"table.layers[{name!r}]"
            msg = f"A base layer must be dense; make it so by `{slot} = {slot}.toarray()`."
            raise ValueError(msg)
        warn_of_old_layer(sdata, load_record(sdata), table, name)
        found[name] = dense_rows(table.layers[name])
        _require_values(name, kind, found[name], spots.known)
        if kind == INDEPENDENT:
            _require_independent(name, table, found[name], spots)
    names = frozenset(name for name, kind in kinds.items() if kind == INDEPENDENT)
    return replace(spots, bases=found, independent=names)


def _require_values(name: str, kind: str, values: np.ndarray, known: np.ndarray) -> None:
    """Raise a ``ValueError`` for infinite values, NaN where they are not allowed, and nothing to fit to."""
    bad = np.isinf(values) if kind == INDEPENDENT else ~np.isfinite(values)
    if bad.any():
        allowed = "may be NaN but not infinite" if kind == INDEPENDENT else "must be finite at all spots"
        msg = f"A base layer {allowed}; `layers[{name!r}]` is at {int(bad.any(axis=1).sum())} of {len(values)} spots."
        raise ValueError(msg)
    if not np.isfinite(values).any():
        msg = f"`layers[{name!r}]` holds no value at all. Leave it out of `base_layers`."
        raise ValueError(msg)
    if known.any() and not np.isfinite(values[known]).any():
        msg = (
            f"`layers[{name!r}]` holds no value at the {int(known.sum())} measured spots, so it cannot be compared "
            "with the measurement. Predict these spots as well, or leave it out of `base_layers`."
        )
        raise ValueError(msg)


def _require_independent(name: str, table: AnnData, values: np.ndarray, spots: Spots) -> None:
    """Raise a ``ValueError`` if a layer that was declared independent holds the measurement of this stack."""
    origin = uns_record(table, name)
    not_zero = spots.expression != 0  # zeros may be predicted by chance
    same = np.isclose(values[spots.known], spots.expression, rtol=1e-5)[not_zero].mean() if not_zero.any() else 0.0
    if any(origin.get(Keys.MEASURED_IDS, {}).values()):
        problem = "was predicted from the measurement of this stack"
    elif len(origin.get(Keys.SEEN, ())):
        problem = "comes from a model that was fitted on the measurement of this stack"
    elif same > 0.5:
        problem = f"equals `layers[{Keys.MEASURED!r}]` in {same:.0%} of the values of measured spots"
    elif np.mean(np.nan_to_num(pearson_by_gene(values[spots.known], spots.expression)) > _SAME_R) > 0.5:
        problem = f"follows `layers[{Keys.MEASURED!r}]` at the measured spots, with r above {_SAME_R} in most genes"
    else:
        return
    msg = (
        f"`layers[{name!r}]` is declared {INDEPENDENT!r} in `base_layers`, but it {problem}. Only a model that has "
        "seen no measured spot of this tissue is independent. Leave it out."
    )
    raise ValueError(msg)


def require_same_folds(table: AnnData, spots: Spots, params: AsignParams, *, seed: int) -> None:
    """Raise a ``ValueError`` unless the base layers were predicted without the folds that ASIGN hides.

    Such a layer must come from the present measurement, and each measured spot must be predicted by a model that was
    fitted without the fold of the spot.
    """
    from spatial_impute.models._spots import spatial_folds

    held_out = [name for name in spots.bases or {} if name not in spots.independent]
    if not held_out:
        return
    n_folds, block_spacings = params.n_folds, params.block_spacings
    folds = spatial_folds(spots, n_folds=n_folds, block_spacings=block_spacings, seed=seed)
    expected = np.argmax(np.stack(folds)[:, spots.known], axis=0)
    for name in held_out:
        column, record = Keys.fold(name), uns_record(table, name)
        if column not in table.obs or "measured" not in record:
            msg = (
                f"Nothing says how measured spots were held out from `layers[{name!r}]` (no `obs[{column!r}]`). If its "
                f"model has seen no measured spot of this tissue, say so: `base_layers={{{name!r}: {INDEPENDENT!r}}}`. "
                "Else the layer cannot be used."
            )
            raise ValueError(msg)
        problem = None
        if str(record["measured"]) != measured_hash(spots):
            problem = f"`layers[{name!r}]` was predicted from other measured expression than the present one."
        elif not np.array_equal(table.obs[column].to_numpy()[spots.known], expected):
            used = {key: record.get(key) for key in ("n_folds", "block_spacings", "seed")}
            problem = f"`layers[{name!r}]` was predicted with other folds ({used}) than ASIGN hides."
        if problem is not None:
            msg = (
                f"{problem} Run `si.tl.impute_pixnet(sdata, key_added={name!r}, n_folds={n_folds}, "
                f"block_spacings={block_spacings:g}, seed={seed})`."
            )
            raise ValueError(msg)
