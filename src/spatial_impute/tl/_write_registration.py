"""Write a registration to the stack: transformations, displacements, coordinates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from spatial_impute._keys import Keys
from spatial_impute._logging import log_added, logger

if TYPE_CHECKING:
    from spatialdata import SpatialData

    from spatial_impute._registration import SectionTransform
    from spatial_impute._stack.record import StackRecord


def write_transformations(
    sdata: SpatialData, record: StackRecord, transforms: dict[str, SectionTransform], target: str
) -> None:
    from spatialdata.transformations import (
        Affine,
        Sequence,
        get_transformation,
        remove_transformation,
        set_transformation,
    )

    warped = []
    ours = {key for name in record.names for key in (Keys.displacement(name), Keys.displacement_inverse(name))}
    for _, name, element in list(sdata.gen_spatial_elements()):
        own = get_transformation(element, get_all=True)
        if target in own and name not in ours and not set(own) & set(record.names):
            warped.append(name)
        for section in record.names:
            if section in own and section in transforms:
                affine = Affine(transforms[section].matrix, input_axes=("x", "y"), output_axes=("x", "y"))
                set_transformation(element, Sequence([own[section], affine]), to_coordinate_system=target)
                logger.debug("Transformation of %r to %r", name, target)
            elif section in own and target in own:  # left over from a registration in which it was not skipped
                remove_transformation(element, to_coordinate_system=target)
    if warped:
        logger.warning(
            "%s are in %r and in no section, and stay where they were; if `si.tl.warp_element` made them, make them again",
            sorted(warped),
            target,
        )


def write_displacements(sdata: SpatialData, record: StackRecord, elements: dict[str, Any]) -> None:
    """Write the new displacements, and take away those of an earlier registration."""
    for name in record.names:
        for key in (Keys.displacement(name), Keys.displacement_inverse(name)):
            if key in sdata.images:
                del sdata.images[key]
    for key, element in elements.items():
        sdata.images[key] = element
        log_added(f"images[{key!r}]")


def registered_coordinates(
    sdata: SpatialData, record: StackRecord, transforms: dict[str, SectionTransform]
) -> np.ndarray | None:
    """(n_spots, 3) registered coordinates of all spots in the stack table; None if there is no table."""
    if Keys.STACK_TABLE not in sdata.tables:
        return None
    table = sdata.tables[Keys.STACK_TABLE]
    xyz = np.column_stack([table.obsm[Keys.SPATIAL], table.obs[Keys.Z].to_numpy(float)])
    for name, transform in transforms.items():
        rows = (table.obs[Keys.SECTION] == name).to_numpy()
        xyz[rows, :2] = transform.points(xyz[rows, :2])
    return xyz
