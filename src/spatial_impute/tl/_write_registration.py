"""Write a registration: transformations, displacements, registered coordinates and the record."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spatial_impute._keys import Keys
from spatial_impute._settings import log_added, logger
from spatial_impute._stack import (
    displacement_elements,
    from_images,
    plane_affine,
    save_record,
    section_images,
    spots_by_section,
    spots_state,
    write_slots,
)

if TYPE_CHECKING:
    from spatialdata import SpatialData

    from spatial_impute._registration import SectionTransform
    from spatial_impute._stack import StackRecord


def write_registration(
    sdata: SpatialData, record: StackRecord, transforms: dict[str, SectionTransform], registration: dict[str, Any]
) -> None:
    """Write the transforms of the sections, and the record with the registration (JSON).

    `record` has the reference of this registration.
    """
    target = registration["coordinate_system"]
    elements: dict[str, Any] = {}
    for name, transform in transforms.items():
        elements |= displacement_elements(transform, name, target)
    slots = _coordinates(sdata, record, transforms, inferred=registration["order"] == "infer")
    _write_transformations(sdata, record, transforms, target)
    for name in record.names:  # also those of an earlier registration
        for key in (Keys.displacement(name), Keys.displacement_inverse(name)):
            if key in sdata.images:
                del sdata.images[key]
    for key, element in elements.items():
        sdata.images[key] = element
        log_added(f"images[{key!r}]")
    if slots:
        write_slots(sdata.tables[Keys.STACK_TABLE], Keys.STACK_TABLE, slots)
    registration = {**registration, Keys.STATE: _state(sdata, record, registration)}
    save_record(sdata, replace(record, registration=registration))
    log_added(f"attrs[{Keys.ATTRS!r}][{Keys.STACK!r}]['registration']")


def _state(sdata: SpatialData, record: StackRecord, registration: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Fingerprints of the images and spots that were registered."""
    sections, pairs = registration["sections"], registration["pairs"]
    images = section_images(sdata, record, from_images(sections, record)) if pairs else {}
    spots = {}
    if Keys.STACK_TABLE in sdata.tables:
        table = sdata.tables[Keys.STACK_TABLE]
        section = table.obs[Keys.SECTION].astype(str).to_numpy()
        spots = {name: spots_state(table, section == name) for name in sections if (section == name).any()}
    return {"images": images, "spots": spots}


def _write_transformations(
    sdata: SpatialData, record: StackRecord, transforms: dict[str, SectionTransform], target: str
) -> None:
    from spatialdata.transformations import Sequence, get_transformation, remove_transformation, set_transformation

    left = []
    ours = {key for name in record.names for key in (Keys.displacement(name), Keys.displacement_inverse(name))}
    for _, name, element in list(sdata.gen_spatial_elements()):
        own = get_transformation(element, get_all=True)
        if target in own and name not in ours and not set(own) & set(record.names):
            left.append(name)
        for section in (n for n in record.names if n in own):
            if section in transforms:
                affine = plane_affine(transforms[section].matrix)
                set_transformation(element, Sequence([own[section], affine]), to_coordinate_system=target)
                logger.debug("Transformation of %r to %r", name, target)
            elif target in own:  # from an earlier registration, in which the section was not skipped
                remove_transformation(element, to_coordinate_system=target)
    if left:
        logger.warning(
            "%s are in %r and in no section, and stay where they were. If `si.tl.warp_element` or `si.tl.points_3d` "
            "made them, make them again.",
            sorted(left),
            target,
        )


def _coordinates(
    sdata: SpatialData, record: StackRecord, transforms: dict[str, SectionTransform], *, inferred: bool
) -> dict[str, dict[str, Any]]:
    """Slots of the stack table: registered coordinates; positions if circles were moved; heights if `inferred`."""
    if Keys.STACK_TABLE not in sdata.tables:
        return {}
    table = sdata.tables[Keys.STACK_TABLE]
    own, obsm, obs = np.array(table.obsm[Keys.SPATIAL], float), {}, {}
    for section, centers, _, rows in spots_by_section(sdata, record, table):
        if not np.allclose(own[rows, :2], centers, atol=1e-6):
            logger.warning("Spots of section %s were moved; their positions are read anew", section.name)
            own[rows, :2] = centers
            obsm[Keys.SPATIAL] = own
    names, z = table.obs[Keys.SECTION], table.obs[Keys.Z].to_numpy(float)
    if inferred:
        z = np.array([record[name].z for name in names])
        obs = {Keys.SECTION: pd.Categorical(names.astype(str), list(record.names), ordered=True), Keys.Z: z}
    xyz = np.column_stack([own[:, :2], z])
    for name, transform in transforms.items():
        rows = np.flatnonzero(names == name)
        xyz[rows, :2] = transform.points(own[rows, :2])
    return {"obs": obs, "obsm": {**obsm, Keys.SPATIAL_3D: xyz}}
