"""Bring the prediction of another tool into the stack table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from spatial_impute._expression import gene_ids
from spatial_impute._keys import Keys
from spatial_impute._settings import logger
from spatial_impute._stack import load_record, stack_table, write_slots
from spatial_impute._validation import require_key, require_slot_key, require_unique

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData


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
    >>> sdata = si.datasets.synthetic_stack()
    >>> table = sdata.tables["stack"]
    >>> found = AnnData(np.ones((table.n_obs, 2)), obs=table.obs[[]])
    >>> found.var_names = [table.var_names[0], "another gene"]
    >>> si.tl.add_prediction(sdata, found, key_added="mine")
    >>> int(np.isfinite(table.layers["mine"]).all(axis=0).sum())
    1
    """
    from anndata import AnnData

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
        msg = (
            f"`prediction.{where}` must hold real numbers, found {matrix.dtype}. Make it so with `.astype('float32')`."
        )
        raise ValueError(msg)
    rows, columns = _rows(table, prediction), _columns(sdata, table, prediction)
    found, genes = np.flatnonzero(rows >= 0), np.flatnonzero(columns >= 0)
    picked = matrix[rows[found]][:, columns[genes]]
    values = np.full(table.shape, np.nan, dtype=np.float32)
    values[np.ix_(found, genes)] = picked.toarray() if sparse.issparse(picked) else picked
    if np.isinf(values).any():
        bad = table.obs_names[np.isinf(values).any(axis=1)][0]
        msg = (
            f"`prediction` holds infinite values, the first at spot {bad!r}. Set them to NaN if there is no prediction."
        )
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
