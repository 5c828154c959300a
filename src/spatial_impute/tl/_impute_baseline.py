"""Impute with a simple method: the bar that a model has to clear."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from spatial_impute._keys import Keys
from spatial_impute._logging import log_added
from spatial_impute._stack.record import load_record
from spatial_impute._validation import require_one_of, require_slot_key
from spatial_impute.tl._provenance import provenance
from spatial_impute.tl._read_spots import read_spots

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData


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

    Whatever a method has to choose (neighbours, bandwidth, penalty) it chooses by leaving out measured spots.

    Parameters
    ----------
    sdata
        Registered stack.
    method
        ``"mean"`` (mean profile of the measured sections), ``"nearest"``, ``"knn"``, ``"kernel"`` (Gaussian of the
        registered distance), ``"propagation"`` (clamped label propagation on the 3D graph :cite:p:`Zhu2002`),
        ``"ridge"`` (on image features), ``"transfer_ridge"`` (mean of kernel and ridge at the same spread) or ``"cokriging"`` (Gaussian processes over place and image).
    table_key, layer, graph_key
        Stack table, layer with log-normalised expression, graph (for ``"propagation"`` only).
    key_added
        Layer to write, ``"baseline_{method}"`` by default.
    inplace
        Write to the stack table, or return a new AnnData with the result in ``X``.

    Returns
    -------
    ``None``, or an AnnData with ``inplace=False``. Writes:

    `sdata.tables['stack'].layers['baseline_{method}']` : :class:`numpy.ndarray` (``float32``)
        (n_spots, n_genes); measured spots keep their measurement.
    `sdata.tables['stack'].uns['baseline_{method}']` : :class:`dict`
        Provenance.

    Raises
    ------
    KeyError
        If registration, features or graph are missing where needed.
    ValueError
        For an unknown method, if nothing is measured, or values are raw counts.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack()
    >>> si.tl.register_stack(sdata, show_progress_bar=False)
    >>> si.tl.impute_baseline(sdata, "kernel")
    >>> sdata.tables["stack"].layers["baseline_kernel"].shape == sdata.tables["stack"].shape
    True
    """
    from spatial_impute.models.asign._baselines import METHODS, NEEDS_FEATURES, NEEDS_GRAPH
    from spatial_impute.models.asign._panels import by_panel

    require_one_of(method, METHODS, name="method")
    key = Keys.baseline(method) if key_added is None else key_added
    require_slot_key(key, name="key_added", taken=(layer, Keys.MEASURED))
    record = load_record(sdata)
    table, spots = read_spots(
        sdata,
        table_key=table_key,
        layer=layer,
        graph_key=graph_key,
        features=method in NEEDS_FEATURES,
        graph=method in NEEDS_GRAPH,
    )
    values = np.empty(table.shape, dtype=np.float32)
    for columns, panel in by_panel(spots):
        found = METHODS[method](panel)
        found[panel.known] = panel.expression
        values[:, columns] = found
    origin = {"method": method, **provenance(record, table, spots.known)}
    if not inplace:
        from anndata import AnnData

        obsm = {Keys.SPATIAL: table.obsm[Keys.SPATIAL], Keys.SPATIAL_3D: table.obsm[Keys.SPATIAL_3D]}
        return AnnData(X=values, obs=table.obs.copy(), var=table.var.copy(), obsm=obsm, uns={key: origin})
    table.layers[key] = values
    log_added(f"tables[{table_key!r}].layers[{key!r}]")
    table.uns[key] = origin
    log_added(f"tables[{table_key!r}].uns[{key!r}]")
    return None
