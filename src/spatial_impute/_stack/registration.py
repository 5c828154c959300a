"""Registration of a stack as it is stored: matrices in the record, displacements as image elements."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from spatial_impute._keys import Keys
from spatial_impute._registration.transform import SectionTransform
from spatial_impute._stack.elements import element_affine
from spatial_impute._validation import require_key

if TYPE_CHECKING:
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
