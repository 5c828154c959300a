"""Registration of a stack as it is stored: matrices in the record, displacements as image elements."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from spatial_impute._geometry import linear_scale
from spatial_impute._keys import Keys
from spatial_impute._registration.transform import SectionTransform
from spatial_impute._stack.elements import element_affine, spot_geometry
from spatial_impute._validation import require_key

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData
    from xarray import DataArray

    from spatial_impute._stack.record import StackRecord

_CHANNELS = ["dx", "dy"]


def require_registration(record: StackRecord) -> dict:
    """Registration of the record.

    Raises
    ------
    KeyError
        If the stack is not registered.
    """
    if record.registration is None:
        msg = "The stack is not registered. Run `si.tl.register_stack(sdata)` first."
        raise KeyError(msg)
    return record.registration


def load_transform(sdata: SpatialData, record: StackRecord, section: str) -> SectionTransform:
    """Read the way of a section into the common frame.

    Raises
    ------
    KeyError
        If the stack is not registered, the section was left out, or its displacement elements are missing.
    """
    registration = require_registration(record)
    require_key(
        section,
        registration["sections"],
        where="the registered sections",
        then="Place it with `si.tl.register_stack(sdata, transformations=...)`.",
    )
    row = registration["sections"][section]
    matrix = np.asarray(row["matrix"], float)
    if not row.get("deformed", False):
        return SectionTransform(matrix)
    fields = []
    for key in (Keys.displacement(section), Keys.displacement_inverse(section)):
        require_key(key, sdata.images, where="sdata.images", then="Run `si.tl.register_stack(sdata)` again.")
        element = sdata.images[key]
        fields.append(np.moveaxis(np.asarray(element.transpose("c", "y", "x").data, dtype=np.float32), 0, -1))
    grid = element_affine(element, registration["coordinate_system"])
    return SectionTransform(matrix, *fields, grid)


def displacement_elements(transform: SectionTransform, section: str, target: str) -> dict[str, DataArray]:
    """Image elements ``c=("dx", "dy")``, float32, um, on their grid in the coordinate system `target`."""
    from spatialdata.models import Image2DModel
    from spatialdata.transformations import Affine

    if not transform.deforms:
        return {}
    fields = {Keys.displacement(section): transform.pull, Keys.displacement_inverse(section): transform.push}
    return {
        key: Image2DModel.parse(
            np.moveaxis(np.asarray(field, np.float32), -1, 0),
            dims=("c", "y", "x"),
            c_coords=_CHANNELS,
            transformations={target: Affine(transform.grid, input_axes=("x", "y"), output_axes=("x", "y"))},
        )
        for key, field in fields.items()
    }


def registered_radius(sdata: SpatialData, record: StackRecord, table: AnnData) -> np.ndarray:
    """(n_spots,) radius in the common frame, um, in the order of the table."""
    radius = np.full(table.n_obs, np.nan)
    matrices = (record.registration or {}).get("sections", {})
    for section in record.sections:
        if section.spots is None:
            continue
        _, own, index = spot_geometry(sdata, section)
        rows = (table.obs[Keys.SECTION] == section.name).to_numpy()
        scale = linear_scale(np.asarray(matrices[section.name]["matrix"])) if section.name in matrices else 1.0
        by_id = pd.Series(own * scale, index=index.astype(str))
        radius[rows] = by_id.reindex(table.obs[Keys.INSTANCE].to_numpy()[rows].astype(str)).to_numpy()
    return np.where(np.isfinite(radius), radius, np.nanmedian(radius))
