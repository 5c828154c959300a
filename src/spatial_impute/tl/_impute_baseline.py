"""Impute expression with a simple method."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from spatial_impute._keys import Keys
from spatial_impute._stack import load_record
from spatial_impute._stack.spots import read_spots
from spatial_impute._validation import require_one_of, require_slot_key
from spatial_impute.tl._provenance import ImputedLayer, provenance

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

    Each method but ``"hest"`` chooses its settings (neighbours, bandwidth, penalty) by leaving out measured spots.

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
        figures, and no part of ASIGN).
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
    >>> sdata = si.datasets.synthetic_stack()
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
