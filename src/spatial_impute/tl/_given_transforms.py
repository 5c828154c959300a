"""Places and starts of single sections, as the user gives them: matrices, landmarks, sections to skip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from spatial_impute._geometry import apply_affine
from spatial_impute._keys import Keys
from spatial_impute._registration import SectionTransform
from spatial_impute._settings import logger
from spatial_impute._stack import element_affine
from spatial_impute._validation import require_key, require_one_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray
    from spatialdata import SpatialData

    from spatial_impute._stack import StackRecord

    Placement = str | np.ndarray | Sequence | SectionTransform

_MIN_SPREAD = 1e-3  # of the longer extent of the landmarks: thinner clouds fix no second direction


@dataclass(frozen=True)
class PlaceReader:
    """Reads the arguments that give places of sections."""

    sdata: SpatialData
    record: StackRecord
    reference: str
    kind: str
    """``"rigid"`` or ``"affine"``, for landmarks."""
    target: str
    """Common coordinate system."""

    def read(self, places: Mapping[str, Placement] | None, argument: str) -> dict[str, np.ndarray]:
        """Matrices from the frames of the sections to that of the reference."""
        places = {} if places is None else places
        if not isinstance(places, Mapping):
            msg = f"`{argument}` must be a mapping of section names to places, found {type(places).__name__}."
            raise ValueError(msg)
        matrices = {}
        for name, place in places.items():
            require_key(name, self.record.names, where="the stack's sections")
            if name == self.reference:
                msg = f"`{argument}` must not name the reference {name!r}, because the reference does not move."
                raise ValueError(msg)
            try:
                matrices[name] = self._matrix(name, place, argument)
            except ValueError as error:
                msg = f"`{argument}[{name!r}]`: {error}"
                raise ValueError(msg) from error
        return matrices

    def _matrix(self, name: str, place: Placement, argument: str) -> np.ndarray:
        if isinstance(place, str):
            require_one_of(place, {"aligned"}, name=f"{argument}[{name!r}]")
            return self._present_matrix(name)
        if isinstance(place, SectionTransform):
            return check_matrix(place.matrix)
        if not (isinstance(place, list | tuple) and len(place) == 2):
            return check_matrix(place)
        matrix = landmark_matrix(place[0], place[1], self.kind)
        errors = np.linalg.norm(apply_affine(place[0], matrix) - np.asarray(place[1], float), axis=1)
        logger.info("Section %s: the median error of the landmarks is %.1f um", name, np.median(errors))
        return matrix

    def _present_matrix(self, name: str) -> np.ndarray:
        """Present transformation of the section's image to the common frame; the identity if it has none."""
        from spatialdata.transformations import get_transformation

        image = self.sdata.images[self.record[name].image]
        if self.target not in get_transformation(image, get_all=True):
            return np.eye(3)
        return element_affine(image, self.target) @ np.linalg.inv(element_affine(image, name))


def check_skip(
    sdata: SpatialData, record: StackRecord, reference: str, skip: list[str], given: Mapping[str, np.ndarray]
) -> list[str]:
    """Sections to skip, or an error if a skipped section would have no place and needs one."""
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
                f"Section {name!r} is skipped but has spots, which would have no place in the common frame. Give "
                f"its place with `transformations={{{name!r}: ...}}` (a matrix or landmarks), or assemble the stack without it."
            )
            raise ValueError(msg)
    return skip


def landmark_matrix(moving: ArrayLike, fixed: ArrayLike, kind: str) -> NDArray[np.float64]:
    """Least-squares matrix ``(3, 3)`` from landmarks ``(n, 2)``, um, of one section to the same landmarks of another.

    ``kind="rigid"`` gives rotation, shift, and mirror if that fits better; ``"affine"`` needs three landmarks or more. Two
    landmarks always give rotation and shift. Too few landmarks, or landmarks on one line, raise a ``ValueError``.
    """
    moving, fixed = _checked(moving, fixed)
    matrix = np.eye(3)
    centres = moving.mean(axis=0), fixed.mean(axis=0)
    centred = moving - centres[0], fixed - centres[1]
    if kind == "affine" and len(moving) > 2:
        linear = np.linalg.lstsq(centred[0], centred[1], rcond=None)[0].T
    else:
        u, _, vt = np.linalg.svd(centred[0].T @ centred[1])
        linear = (u @ vt).T
        if len(moving) == 2 and np.linalg.det(linear) < 0:  # two points fit both faces; the section lies face up
            linear = (u @ np.diag([1.0, -1.0]) @ vt).T
    matrix[:2, :2] = linear
    matrix[:2, 2] = centres[1] - linear @ centres[0]
    return matrix


def _checked(moving: ArrayLike, fixed: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Landmarks as two arrays (n, 2) that fix a transform."""
    moving, fixed = np.asarray(moving, float), np.asarray(fixed, float)
    if moving.ndim != 2 or moving.shape[-1] != 2 or moving.shape != fixed.shape or len(moving) < 2:
        msg = (
            "Landmarks must be two arrays (n, 2) of x, y in um with the same n >= 2, first in the section, then in the "
            f"reference; found shapes {moving.shape} and {fixed.shape}."
        )
        raise ValueError(msg)
    if not (np.isfinite(moving).all() and np.isfinite(fixed).all()):
        msg = "Landmarks must be finite."
        raise ValueError(msg)
    for points in (moving, fixed):
        spread = np.linalg.svd(points - points.mean(axis=0), compute_uv=False)
        if spread[0] == 0 or (len(points) > 2 and spread[1] < _MIN_SPREAD * spread[0]):
            msg = "Landmarks must not coincide or lie on one line: such landmarks do not determine the placement."
            raise ValueError(msg)
    return moving, fixed


def check_matrix(matrix: ArrayLike) -> NDArray[np.float64]:
    """Invertible affine matrix ``(3, 3)``, or a ``ValueError``."""
    found = np.asarray(matrix, float)
    if (
        found.shape != (3, 3)
        or not np.isfinite(found).all()
        or not np.allclose(found[2], [0, 0, 1])
        or abs(np.linalg.det(found[:2, :2])) < 1e-6
    ):
        msg = f"Expected an invertible (3, 3) affine matrix of x, y in um with last row 0, 0, 1; found {matrix!r}."
        raise ValueError(msg)
    return found
