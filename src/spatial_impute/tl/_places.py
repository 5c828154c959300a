"""Places of sections: from a window of napari, as arguments of ``register_stack``, and as written to the object."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import shapely
from scipy import ndimage as ndi
from spatialdata.transformations import Sequence as SequenceOfTransformations
from spatialdata.transformations import get_transformation, remove_transformation, set_transformation

from spatial_impute._geometry import apply_affine, exchanged_axes
from spatial_impute._keys import Keys
from spatial_impute._registration import SectionTransform
from spatial_impute._settings import log_added, logger
from spatial_impute._stack.elements import (
    displacement_elements,
    element_affine,
    element_frames,
    load_transform,
    plane_affine,
    registration_state,
    require_registration,
    spots_by_section,
)
from spatial_impute._stack.record import save_record
from spatial_impute._stack.state import changed_images, from_images, section_images, spots_state
from spatial_impute._stack.table import write_slots
from spatial_impute._validation import require_key, require_one_of

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from numpy.typing import ArrayLike, NDArray
    from spatialdata import SpatialData

    from spatial_impute._stack.record import StackRecord

    Placement = str | np.ndarray | Sequence | SectionTransform

_MIN_SPREAD = 1e-3  # of the longer extent of the landmarks: thinner clouds fix no second direction
_APPROVED = "Approved by a person."
_PAGE = "`si.pl.registration_page(sdata, 'check.html')`"
_SECTION = "{section}"


def read_placement(viewer: Any, section: str) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Read the place of a section from the window of :func:`spatial_impute.pl.place_by_hand`.

    Parameters
    ----------
    viewer
        Viewer of napari, after a section was dragged or landmarks were clicked.
    section
        Name of the section.

    Returns
    -------
    If there are landmarks: two arrays (n, 2), x and y in um, in the section and in the reference. Else the (3, 3)
    matrix from the section to the reference to which the image was dragged (or the reference under it). Pass either to
    ``register_stack(transformations={section: place})``, or to ``initial`` as a start.

    Raises
    ------
    TypeError
        If `viewer` is no viewer.
    KeyError
        If the viewer has no layers of this section.
    ValueError
        If the section and the reference have different numbers of landmarks, or only one each, or `section` is the
        reference.

    Examples
    --------
    See :func:`spatial_impute.pl.place_by_hand`.
    """
    if not hasattr(viewer, "layers"):
        msg = f"`viewer` must be the viewer that `si.pl.place_by_hand` returned, found {viewer!r}."
        raise TypeError(msg)
    layers = {layer.name: layer for layer in viewer.layers}
    there = "Open the viewer with `si.pl.place_by_hand(sdata, section)`."
    require_key(section, layers, where="the layers of the viewer", then=there)
    image = layers[section]
    require_key("reference", image.metadata, where=f"the metadata of the layer {section!r}", then=there)
    reference = image.metadata["reference"]
    if section == reference:
        msg = f"`section` must not be the reference {section!r}, which does not move. Name the section placed on it."
        raise ValueError(msg)
    require_key(reference, layers, where="the layers of the viewer", then=there)
    points = []
    for name in (section, reference):
        require_key(Keys.landmarks(name), layers, where="the layers of the viewer", then=there)
        points.append(np.asarray(layers[Keys.landmarks(name)].data, float).reshape(-1, 2)[:, ::-1])
    in_section, in_reference = points
    if len(in_section) == len(in_reference) == 0:
        # The viewer may have more dimensions. The user may have dragged the reference instead.
        affines = (np.asarray(layer.affine.affine_matrix, float)[-3:, -3:] for layer in (layers[reference], image))
        below, place = map(exchanged_axes, affines)
        return np.linalg.inv(below) @ place
    if len(in_section) != len(in_reference) or len(in_section) < 2:
        msg = (
            f"Expected the same number of landmarks, at least two, in the layers {Keys.landmarks(section)!r} and "
            f"{Keys.landmarks(reference)!r}, in the same order; found {len(in_section)} and {len(in_reference)}. "
            "Click the missing ones, or delete all of them to use the place of the image."
        )
        raise ValueError(msg)
    return in_section, in_reference


@dataclass(frozen=True)
class PlaceReader:
    """Reads the arguments that give places of sections."""

    sdata: SpatialData
    record: StackRecord
    reference: str
    kind: str  # ``"rigid"`` or ``"affine"``, for landmarks
    target: str  # Common coordinate system

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
            image = self.sdata.images[self.record[name].image]
            if self.target not in get_transformation(image, get_all=True):
                return np.eye(3)
            return element_affine(image, self.target) @ np.linalg.inv(element_affine(image, name))
        if isinstance(place, SectionTransform):
            return check_matrix(place.matrix)
        if not (isinstance(place, list | tuple) and len(place) == 2):
            return check_matrix(place)
        matrix = landmark_matrix(place[0], place[1], self.kind)
        if self.kind == "affine" and len(place[0]) == 3:
            logger.info("Section %s: three landmarks always fit exactly; a fourth one shows their error", name)
            return matrix
        errors = np.linalg.norm(apply_affine(place[0], matrix) - np.asarray(place[1], float), axis=1)
        logger.info("Section %s: the median error of the landmarks is %.1f um", name, np.median(errors))
        return matrix


def check_skip(record: StackRecord, reference: str, skip: list[str], given: Mapping[str, np.ndarray]) -> None:
    """Raise an error if a section to skip is the reference, or would have no place and needs one."""
    for name in skip:
        require_key(name, record.names, where="the stack's sections")
        if name == reference:
            msg = f"The reference {reference!r} cannot be skipped; choose another `reference`."
            raise ValueError(msg)
        if name not in given and record[name].spots is not None:
            msg = (
                f"Section {name!r} is skipped but has spots, which would have no place in the common frame. Give it one "
                f"with `transformations={{{name!r}: ...}}` (a matrix or landmarks), or assemble the stack without it."
            )
            raise ValueError(msg)


def landmark_matrix(moving: ArrayLike, fixed: ArrayLike, kind: str) -> NDArray[np.float64]:
    """Least-squares matrix ``(3, 3)`` from landmarks ``(n, 2)``, um, of one section to the same landmarks of another.

    ``kind="rigid"`` gives rotation, shift, and mirror if that fits better; ``"affine"`` needs three landmarks or more.
    Two landmarks always give rotation and shift. Too few landmarks, or landmarks on one line, raise a ``ValueError``.
    """
    moving, fixed = _require_landmarks(moving, fixed)
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


def _require_landmarks(moving: ArrayLike, fixed: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
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
    affine = found.shape == (3, 3) and np.isfinite(found).all() and np.allclose(found[2], [0, 0, 1])
    if not affine or abs(np.linalg.det(found[:2, :2])) < 1e-6:
        msg = f"Expected an invertible (3, 3) affine matrix of x, y in um with last row 0, 0, 1; found {matrix!r}."
        raise ValueError(msg)
    return found


def approved_places(
    sdata: SpatialData, record: StackRecord, path: str | Path | None, reference: str, answered: Collection[str]
) -> tuple[dict[str, SectionTransform], dict[str, dict[str, Any]]]:
    """Places of the sections that the file of a page approves, and their rows in the record.

    The sections that other arguments name are `answered`. Rejected sections that are not raise a ``ValueError``.
    """
    if path is None:
        return {}, {}
    if not isinstance(path, str | Path):
        msg = f"`checked` must be the path of the file that the page of {_PAGE} saves, found {path!r}."
        raise ValueError(msg)
    decisions = _read_decisions(Path(path).expanduser(), registration_state(record))
    if reference != record.reference:
        msg = f"`checked` keeps places on {record.reference!r}, but `reference` is {reference!r}. Use the same one."
        raise ValueError(msg)
    rows, approved, kept, open_ = require_registration(record)["sections"], {}, {}, []
    for name, decision in decisions.items():
        require_key(name, rows, where="the registered sections")
        if name not in record.names:  # the object is a part of the one that was registered
            logger.warning("Section %s of `checked` is gone; the decision on it is left out", name)
        elif decision == "rejected" and name not in answered:
            open_.append(name)
        elif decision == "approved" and name in answered:
            msg = f"Section {name!r} is approved in `checked`, and has a place, a start or a skip as well. Use one of them."
            raise ValueError(msg)
        elif decision == "approved":
            reasons = [reason for reason in rows[name]["reasons"] if reason != _APPROVED]
            kept[name] = rows[name] | {"verdict": "ok", "reasons": [_APPROVED, *reasons]}
            approved[name] = load_transform(sdata, record, name)
    changed = changed_images(sdata, record) if approved else []
    if changed := [name for name in changed if name in {*approved, record.reference}]:
        msg = (
            f"The images of the sections {changed} are not the ones that were registered, so their approval does not "
            "count. Register them without `checked`, and look at the new page."
        )
        raise ValueError(msg)
    if open_:
        msg = (
            f"Sections {open_} are rejected in `checked`; the same fit would find the same place. Give each of them a "
            "start (`initial`) or its place (`transformations`), or leave it out (`skip`)."
        )
        raise ValueError(msg)
    return approved, kept


def _read_decisions(path: Path, state: str) -> dict[str, str]:
    """Decision by section, from a file that belongs to the registration with this `state`."""
    if not path.is_file():
        msg = f"`checked` must be the file that the page of {_PAGE} saves, found nothing at {str(path)!r}."
        raise FileNotFoundError(msg)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        decisions = dict(found["sections"])
        known = set(decisions.values()) <= {"approved", "rejected"}
    except (ValueError, TypeError, KeyError):
        known = False
    if not known:
        msg = f"`checked` must be the file that the page of {_PAGE} saves, found other content in {str(path)!r}."
        raise ValueError(msg)
    if found.get("registration") != state:
        msg = f"The decisions in {str(path)!r} are on another registration. Make the page again: {_PAGE}."
        raise ValueError(msg)
    return decisions


def tissue_keys(sdata: SpatialData, record: StackRecord, tissue_key: str | Mapping[str, str] | None) -> dict[str, str]:
    """Name of the labels or shapes of each section whose tissue the user gives, after a check of the argument."""
    available, where = {*sdata.labels, *sdata.shapes}, "sdata.labels and sdata.shapes"
    if isinstance(tissue_key, str) and _SECTION in tissue_key:
        wanted = {name: tissue_key.replace(_SECTION, name) for name in record.names}
        keys = {name: key for name, key in wanted.items() if key in available}
        if not keys:
            require_key(wanted[record.names[0]], available, where=where)
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
        require_key(key, available, where=where)
        if name not in (frames := get_transformation(sdata[key], get_all=True)):
            msg = (
                f"The tissue {key!r} of section {name!r} must have a transformation to the coordinate system {name!r}, "
                f"found {sorted(frames)}."
            )
            raise ValueError(msg)
    return keys


def given_tissue(sdata: SpatialData, key: str, name: str, shape: tuple[int, int], to_um: NDArray) -> NDArray[np.bool_]:
    """Tissue by the labels or shapes `key`, on a grid of pixels with the affine `to_um` to the section `name`."""
    element = sdata[key]
    to_element = np.linalg.inv(element_affine(element, name)) @ to_um
    if key in sdata.shapes:
        rows, columns = np.indices(shape).reshape(2, -1) + 0.5
        tissue = shapely.union_all(element.geometry.to_numpy())
        shapely.prepare(tissue)
        points = apply_affine(np.column_stack([columns, rows]), to_element)
        return shapely.contains_xy(tissue, *points.T).reshape(shape)
    finest = next(iter(element["scale0"].data_vars.values())) if hasattr(element, "children") else element
    # Corner-based (x, y) to centre-based (row, column), on both sides.
    swap = np.array([[0, 1.0, 0.5], [1.0, 0, 0.5], [0, 0, 1]])
    index = np.linalg.inv(swap) @ to_element @ swap
    labels = np.asarray(finest.data) > 0
    return ndi.affine_transform(labels, index[:2, :2], index[:2, 2], output_shape=shape, order=0)


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
    registration = {**registration, Keys.STATE: _fingerprints(sdata, record, registration)}
    save_record(sdata, replace(record, registration=registration))
    log_added(f"attrs[{Keys.ATTRS!r}][{Keys.STACK!r}]['registration']")


def _fingerprints(sdata: SpatialData, record: StackRecord, registration: dict[str, Any]) -> dict[str, dict[str, str]]:
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
    left = [
        Keys.carried(key, name)
        for key in sdata.shapes
        for name in record.names
        if Keys.carried(key, name) in sdata.shapes
    ]
    ours = {key for name in record.names for key in (Keys.displacement(name), Keys.displacement_inverse(name))}
    for _, name, element in list(sdata.gen_spatial_elements()):
        own = element_frames(element)
        if target in own and name not in ours and not set(own) & set(record.names):
            left.append(name)
        for section in (n for n in record.names if n in own):
            if section in transforms:
                path = SequenceOfTransformations([own[section], plane_affine(transforms[section].matrix)])
                set_transformation(element, path, to_coordinate_system=target)
                logger.debug("Transformation of %r to %r", name, target)
            elif target in own:  # from an earlier registration, in which the section was not skipped
                remove_transformation(element, to_coordinate_system=target)
    if left:
        logger.warning(
            "%s keep their place. If `si.tl.warp_element`, `si.tl.points_3d` or `si.tl.transfer_shapes` made them, make them "
            "again.",
            sorted(left),
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
