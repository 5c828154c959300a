"""What the user says about single sections: where they lie, where to start, which ones to skip."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from spatial_impute._keys import Keys
from spatial_impute._logging import logger
from spatial_impute._registration.user_transforms import check_matrix, landmark_matrix
from spatial_impute._stack.elements import element_affine
from spatial_impute._validation import require_key, require_one_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spatialdata import SpatialData

    from spatial_impute._stack.record import StackRecord

    Placement = str | np.ndarray | Sequence


def read_placements(
    sdata: SpatialData,
    record: StackRecord,
    reference: str,
    found: Mapping[str, Placement],
    *,
    argument: str,
    kind: str,
    target: str,
) -> dict[str, np.ndarray]:
    """Matrices from the frames of sections to that of the reference, from what the user gave."""
    if not isinstance(found, Mapping):
        msg = f"`{argument}` must be a mapping of section names to places, found {type(found).__name__}."
        raise ValueError(msg)
    matrices = {}
    for name, value in found.items():
        require_key(name, record.names, where="the stack's sections")
        if name == reference:
            msg = f"`{argument}` must not name the reference {reference!r}: it stays where it is."
            raise ValueError(msg)
        try:
            if isinstance(value, str):
                require_one_of(value, {"aligned"}, name=f"{argument}[{name!r}]")
                matrices[name] = _present_matrix(sdata, record, name, target)
            elif isinstance(value, list | tuple) and len(value) == 2:
                matrices[name] = landmark_matrix(*value, kind)
                errors = np.linalg.norm(_moved(value[0], matrices[name]) - np.asarray(value[1], float), axis=1)
                logger.info("Section %s: landmarks lie %.1f um off (median)", name, np.median(errors))
            else:
                matrices[name] = check_matrix(value)
        except ValueError as error:
            msg = f"`{argument}[{name!r}]`: {error}"
            raise ValueError(msg) from error
    return matrices


def _moved(points: Any, matrix: np.ndarray) -> np.ndarray:
    return np.asarray(points, float) @ matrix[:2, :2].T + matrix[:2, 2]


def _present_matrix(sdata: SpatialData, record: StackRecord, name: str, target: str) -> np.ndarray:
    """Where the section's image lies in `target` now; the identity if it has no transformation to it."""
    from spatialdata.transformations import get_transformation

    image = sdata.images[record[name].image]
    if target not in get_transformation(image, get_all=True):
        return np.eye(3)
    return element_affine(image, target) @ np.linalg.inv(element_affine(image, name))


def check_skip(
    sdata: SpatialData, record: StackRecord, reference: str, skip: list[str], given: Mapping[str, np.ndarray]
) -> list[str]:
    for name in skip:
        require_key(name, record.names, where="the stack's sections")
        if name == reference:
            msg = f"The reference {reference!r} cannot be skipped; choose another `reference`."
            raise ValueError(msg)
        in_table = False
        if Keys.STACK_TABLE in sdata.tables:
            in_table = bool((sdata.tables[Keys.STACK_TABLE].obs[Keys.SECTION] == name).any())
        if name not in given and (in_table or record[name].spots is not None):
            msg = (
                f"Section {name!r} is skipped but has spots, which would have no place in the common frame. Place it "
                f"with `transformations={{{name!r}: ...}}` (a matrix or landmarks), or assemble the stack without it."
            )
            raise ValueError(msg)
    return skip
