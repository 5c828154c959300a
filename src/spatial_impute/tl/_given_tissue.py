"""Tissue of sections as the user gives it: labels or outlines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage as ndi

from spatial_impute._geometry import apply_affine
from spatial_impute._stack import element_affine
from spatial_impute._validation import require_key

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from spatialdata import SpatialData

    from spatial_impute._stack import StackRecord

_SECTION = "{section}"


@dataclass(frozen=True)
class TissueReader:
    """Reads the masks of the sections for which the user gives one."""

    sdata: SpatialData
    keys: dict[str, str]
    """Name of the labels or shapes by section."""

    @classmethod
    def of(cls, sdata: SpatialData, record: StackRecord, tissue_key: str | Mapping[str, str] | None) -> TissueReader:
        """Reader for the argument `tissue_key`, after a check of it."""
        from spatialdata.transformations import get_transformation

        available = {*sdata.labels, *sdata.shapes}
        if isinstance(tissue_key, str) and _SECTION in tissue_key:
            keys = {name: tissue_key.replace(_SECTION, name) for name in record.names}
            found = {name: key for name, key in keys.items() if key in available}
            if not found:
                require_key(keys[record.names[0]], available, where="sdata.labels and sdata.shapes")
            keys = found
        elif tissue_key is None or isinstance(tissue_key, Mapping):
            keys = dict(tissue_key or {})
        else:
            msg = (
                f"`tissue_key` must be a mapping of sections to names of labels or shapes, or a name with {_SECTION!r} "
                f"in it, found {tissue_key!r}."
            )
            raise ValueError(msg)
        for name, key in keys.items():
            require_key(name, record.names, where="the stack's sections")
            require_key(key, available, where="sdata.labels and sdata.shapes")
            if name not in (frames := get_transformation(sdata[key], get_all=True)):
                msg = (
                    f"The tissue {key!r} of section {name!r} must have a transformation to the coordinate system {name!r}, "
                    f"found {sorted(frames)}."
                )
                raise ValueError(msg)
        return cls(sdata, keys)

    def mask(self, name: str, shape: tuple[int, int], to_um: NDArray) -> NDArray[np.bool_] | None:
        """Tissue on a grid of pixels with the affine `to_um` to the section's frame; None if the user gave none."""
        if name not in self.keys:
            return None
        key = self.keys[name]
        element = self.sdata[key]
        pixel_to_element = np.linalg.inv(element_affine(element, name)) @ to_um
        if key in self.sdata.shapes:
            import shapely

            rows, columns = np.indices(shape).reshape(2, -1) + 0.5
            tissue = shapely.union_all(element.geometry.to_numpy())
            shapely.prepare(tissue)
            points = apply_affine(np.column_stack([columns, rows]), pixel_to_element)
            return shapely.contains_xy(tissue, *points.T).reshape(shape)
        labels = np.asarray(_finest(element)) > 0
        # Corner-based (x, y) to centre-based (row, column), on both sides.
        swap = np.array([[0, 1.0, 0.5], [1.0, 0, 0.5], [0, 0, 1]])
        index = np.linalg.inv(swap) @ pixel_to_element @ swap
        return ndi.affine_transform(labels, index[:2, :2], index[:2, 2], output_shape=shape, order=0)


def _finest(element: Any) -> Any:
    """Array of labels, the finest level of a pyramid."""
    from xarray import DataTree

    finest = next(iter(element["scale0"].data_vars.values())) if isinstance(element, DataTree) else element
    return finest.data
