"""Spots of all sections as one element of points with x, y and z."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spatial_impute._keys import Keys
from spatial_impute._settings import log_added
from spatial_impute._stack import (
    dense_rows,
    load_record,
    registered_spots,
    require_current,
    require_element_key,
    require_registration,
    stack_table,
    warn_if_old,
)
from spatial_impute._validation import name_list, require_key

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from spatialdata import SpatialData


def points_3d(
    sdata: SpatialData,
    columns: str | Sequence[str] = (),
    *,
    layer: str = Keys.ASIGN,
    key_added: str = Keys.STACK_POINTS,
    inplace: bool = True,
) -> Any:
    """Make points with x, y and z of the spots of all registered sections, for the 3D view of napari and other viewers.

    In SpatialData the height of a section is a number beside its spots (``obs["z"]``), and a viewer shows each section
    as a plane of its own. Points can have three coordinates.

    Parameters
    ----------
    sdata
        Stack registered by :func:`register_stack`.
    columns
        Genes, or columns of ``obs`` of the stack table, that become columns of the points, beside ``section`` and
        ``measured``.
    layer
        Layer of the genes.
    key_added
        Name of the new points.
    inplace
        Write to `sdata`, or return the points and write nothing.

    Returns
    -------
    ``None``, or the points with ``inplace=False``. Writes:

    `sdata.points['stack_points']`
        x, y, z in um in the coordinate system of the registration (``"aligned"``), one point per spot in the order of
        the table, with ``spot`` (its name in the table), ``section``, ``measured`` and the columns that were asked for.

    Raises
    ------
    KeyError
        If the stack is not registered, or a gene, column or layer does not exist.
    ValueError
        If `key_added` is the name of another element, `columns` names ``x``, ``y`` or ``spot``, or spots or images were
        changed after the registration.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack()
    >>> si.tl.register_stack(sdata, method="rigid", show_progress_bar=False)
    >>> si.tl.points_3d(sdata, ["smooth_0"], layer="measured")
    >>> sdata.points["stack_points"].compute()["z"].nunique()
    3
    """
    from spatialdata.models import PointsModel
    from spatialdata.transformations import Identity

    record = load_record(sdata)
    target = require_registration(record)["coordinate_system"]
    table = stack_table(sdata)
    xyz = registered_spots(table, Keys.STACK_TABLE)
    require_current(sdata, record, table, measured=False)
    frame = pd.DataFrame({"x": xyz[:, 0], "y": xyz[:, 1], "z": xyz[:, 2], "spot": table.obs_names.to_numpy(str)})
    for name in (Keys.SECTION, Keys.MEASURED):
        frame[name] = table.obs[name].to_numpy()
    columns = name_list(columns, name="columns")
    if taken := [name for name in columns if name in {"x", "y", "spot"} & {*table.obs, *table.var_names}]:
        msg = (
            f"`columns` names {taken}, which the points have already. Rename these columns or genes in the stack table."
        )
        raise ValueError(msg)
    if any(name in table.var_names for name in columns):
        warn_if_old(sdata, table, [layer])
    for name in columns:
        if name not in {Keys.Z, Keys.SECTION, Keys.MEASURED}:  # which are there
            frame[name] = _column(table, name, layer)
    if inplace:
        require_element_key(sdata, key_added, name="key_added", kind="points", ours=[Keys.STACK_POINTS])
    points = PointsModel.parse(frame, coordinates={axis: axis for axis in "xyz"}, transformations={target: Identity()})
    if not inplace:
        return points
    sdata.points[key_added] = points
    log_added(f"points[{key_added!r}]")
    return None


def _column(table: AnnData, name: str, layer: str) -> np.ndarray | pd.Categorical:
    if name in table.var_names:
        require_key(layer, table.layers, where=f"sdata.tables[{Keys.STACK_TABLE!r}].layers")
        column = table.layers[layer][:, [table.var_names.get_loc(name)]]
        return dense_rows(column, np.ones(table.n_obs, bool)).ravel()
    require_key(name, table.obs, where="the genes and the columns of obs of the stack table")
    return table.obs[name].to_numpy()
