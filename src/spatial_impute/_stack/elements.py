"""Elements of a section: images, spots and displacements, and their transformations to micrometres."""

from __future__ import annotations

import json
import zlib
from typing import TYPE_CHECKING, Any

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
import xarray as xr
from spatialdata import SpatialData, sanitize_table
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Affine, Identity, Scale, get_transformation
from spatialdata.transformations import Sequence as SequenceOfTransformations

from spatial_impute._geometry import anisotropy, apply_affine, linear_scale, scaling
from spatial_impute._image.brightfield import rgb_order
from spatial_impute._image.levels import Level, image_fingerprint, image_levels
from spatial_impute._keys import Keys
from spatial_impute._settings import logger
from spatial_impute._validation import require_finite, require_key

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from anndata import AnnData
    from geopandas import GeoDataFrame
    from xarray import DataArray, DataTree

    from spatial_impute._registration.transform import SectionTransform
    from spatial_impute._stack.record import Section, StackRecord


_SQUARE_TOLERANCE = 0.05  # bins are squares but for the rounding of their corners to pixels


def element_affine(element: object, coordinate_system: str) -> np.ndarray:
    """(3, 3) affine from the intrinsic frame of an element (pixel corners for images) to a coordinate system."""
    transformation = get_transformation(element, to_coordinate_system=coordinate_system)
    return np.asarray(transformation.to_affine_matrix(("x", "y"), ("x", "y")), dtype=float)


def plane_affine(matrix: Any) -> Affine:
    """SpatialData transformation of a (3, 3) matrix on x and y."""
    return Affine(matrix, input_axes=("x", "y"), output_axes=("x", "y"))


def to_frames(record: StackRecord, name: str, transformation: Any) -> dict[str, Any]:
    """Transformations of a new element of a section: to the frame of the section and, if registered, to the common one."""
    found = {name: transformation}
    registration = record.registration or {"sections": {}}
    if name in registration["sections"]:
        affine = plane_affine(registration["sections"][name]["matrix"])
        found[registration["coordinate_system"]] = SequenceOfTransformations([transformation, affine])
    return found


def _require_frame(element: object, name: str, where: str) -> None:
    require_key(
        name,
        get_transformation(element, get_all=True),
        where=f"coordinate systems of {where}",
        then="Every element of a section needs a transformation to its frame in um: `set_transformation(element, ..., name)`.",
    )


def section_levels(sdata: SpatialData, section: Section) -> list[Level]:
    """Resolutions of the image of a section, finest first, with their maps to um."""
    return brightfield_levels(sdata, section.image, section.name)


def brightfield_levels(sdata: SpatialData, image_key: str, coordinate_system: str, um: float = 1.0) -> list[Level]:
    """Resolutions of an H&E image, finest first, with their maps to um; `um` is the unit of the coordinate system.

    Channels are red, green and blue by their names; a ``ValueError`` if these are names of dyes.
    """
    require_key(image_key, sdata.images, where="sdata.images")
    element, where = sdata.images[image_key], f"sdata.images[{image_key!r}]"
    _require_frame(element, coordinate_system, where)
    try:
        ordered = in_rgb_order(element)
    except ValueError as error:
        msg = f"`{where}`: {error}"
        raise ValueError(msg) from error
    return image_levels(ordered, scaling(um) @ element_affine(element, coordinate_system))


def image_state(sdata: SpatialData, image_key: str, coordinate_system: str) -> str:
    """Fingerprint of an image and of its place in a coordinate system; empty if it is not there."""
    if image_key not in sdata.images:
        return ""
    return image_fingerprint(brightfield_levels(sdata, image_key, coordinate_system))


def section_image(sdata: SpatialData, section: Section) -> str:
    """Fingerprint of the image of a section, with its place; empty if it is not there."""
    return image_state(sdata, section.image, section.name)


def section_images(sdata: SpatialData, record: StackRecord, names: Iterable[str] | None = None) -> dict[str, str]:
    """Fingerprints of the images of sections, of all by default."""
    return {name: section_image(sdata, record[name]) for name in (record.names if names is None else names)}


def spot_geometry(sdata: SpatialData, section: Section) -> tuple[np.ndarray, np.ndarray, pd.Index]:
    """Spots of a section in its own frame: (n, 2) centers and (n,) radius in um, and instance ids.

    Raises a ``ValueError`` if the spots are not circles, or if their transformation turns circles into ellipses.
    """
    require_key(str(section.spots), sdata.shapes, where="sdata.shapes")
    circles = sdata.shapes[section.spots]
    geometry = np.asarray(circles.geometry.array)  # arrays of shapely: the series of geopandas cost more than the work
    if "radius" not in circles or not (shapely.get_type_id(geometry) == shapely.GeometryType.POINT).all():
        msg = f"`sdata.shapes[{section.spots!r}]` must hold circles (points with a `radius` column)."
        raise ValueError(msg)
    _require_frame(circles, section.name, f"sdata.shapes[{section.spots!r}]")
    matrix = element_affine(circles, section.name)
    if anisotropy(matrix) > 1.05:
        msg = (
            f"The transformation of `sdata.shapes[{section.spots!r}]` to {section.name!r} stretches one axis "
            f"{anisotropy(matrix):.2f} times more than the other, so its circles have no radius in um."
        )
        raise ValueError(msg)
    radius = circles["radius"].to_numpy(float)
    values = np.column_stack([shapely.get_x(geometry), shapely.get_y(geometry), radius])
    require_finite(values, name=f"Circles of `sdata.shapes[{section.spots!r}]`", row_names=circles.index)
    centers = apply_affine(values[:, :2], matrix)
    return centers, radius * linear_scale(matrix), circles.index


def require_element_key(sdata: SpatialData, key: Any, *, kind: str, ours: Collection[str]) -> None:
    """Raise a ``ValueError`` unless `key_added` may be the element `key` of a kind (``"images"``, ``"tables"``...).

    `ours` are elements of that kind that are earlier results and may be replaced.
    """
    # SpatialData drops names that begin with a dot when it reads a store.
    legal = isinstance(key, str) and key and all(c.isalnum() or c in "_-." for c in key)
    if not legal or key[0] == "." or key.startswith("__"):
        msg = f"`key_added` must be letters, digits, '_', '-' and '.', and not begin with '.' or '__'; found {key!r}."
        raise ValueError(msg)
    for there in ("images", "labels", "points", "shapes", "tables"):
        for other in getattr(sdata, there):
            if other.lower() == key.lower() and not (there == kind and other == key and other in ours):
                msg = f"`key_added={key!r}` would write over `sdata.{there}[{other!r}]`; choose another name."
                raise ValueError(msg)


def image_element(levels: list[Any], name: str, mpp: float | tuple[float, float]) -> DataArray | DataTree:
    """Image element whose transformation to the section is the scale by `mpp` (x, y); multi-scale if there are levels."""
    channels = {1: ["grey"], 3: ["r", "g", "b"], 4: ["r", "g", "b", "a"]}.get(levels[0].shape[0])
    if channels is None or 0 in levels[0].shape:
        msg = (
            f"Section {name!r}: an H&E image has 1, 3 or 4 channels and at least one pixel; found an array of shape "
            f"{tuple(levels[0].shape)} (c, y, x)."
        )
        raise ValueError(msg)
    if np.dtype(levels[0].dtype).kind not in "buif":
        msg = f"Section {name!r}: pixels must be numbers of type integer or float, found {levels[0].dtype}."
        raise ValueError(msg)
    elements = []
    x, y = mpp if isinstance(mpp, tuple) else (mpp, mpp)
    for level in levels:
        factor = round(levels[0].shape[2] / level.shape[2]) if len(levels) > 1 else 1
        scale = Scale([factor * x, factor * y], axes=("x", "y"))
        elements.append(
            Image2DModel.parse(level, dims=("c", "y", "x"), c_coords=channels, transformations={name: scale})
        )
    if len(elements) == 1:
        return elements[0]
    return xr.DataTree.from_dict({f"scale{i}": xr.Dataset({"image": e}) for i, e in enumerate(elements)})


def in_rgb_order(element: Any) -> Any:
    """Image element with its channels as red, green, blue (and alpha), or one of grey, by their names.

    Raises a ``ValueError`` for channels of other names, such as dyes, for other numbers of channels, and other dimensions.
    """
    if hasattr(element, "children"):
        arrays = {key: next(iter(child.ds.data_vars.values())) for key, child in element.children.items()}
        ordered = {key: in_rgb_order(array) for key, array in arrays.items()}
        if all(ordered[key] is array for key, array in arrays.items()):
            return element
        return xr.DataTree.from_dict({key: xr.Dataset({"image": array}) for key, array in ordered.items()})
    if set(element.dims) != {"c", "y", "x"}:
        msg = (
            f"expected the dimensions c, y and x, found {element.dims} of sizes {element.shape}. Rename them, e.g. "
            "`image.rename({'band': 'c'})`, or select one plane, e.g. `image.isel(z=0)`."
        )
        raise ValueError(msg)
    names = element.coords["c"].to_numpy().tolist() if "c" in element.coords else None
    order = rgb_order(names, element.sizes["c"])
    if element.dtype.kind not in "buif":
        msg = f"Pixels must be numbers of type integer or float, found {element.dtype}."
        raise ValueError(msg)
    return element if order == sorted(order) else element.isel(c=order)


def square_edge(shapes: GeoDataFrame) -> float | None:
    """Edge of squares of one size; None for other shapes."""
    if not len(shapes) or not (shapes.geom_type == "Polygon").all():
        return None
    area, length = shapes.area.to_numpy(), shapes.length.to_numpy()
    edge = float(np.sqrt(np.median(area)))
    # Of all shapes with four corners only a square has this ratio of area and circumference.
    same = np.abs(area / edge**2 - 1) < _SQUARE_TOLERANCE
    square = np.abs(length / (4 * edge) - 1) < _SQUARE_TOLERANCE
    return edge if same.all() and square.all() else None


def are_circles(shapes: GeoDataFrame) -> bool:
    """True for points with a radius; polygons may have a column of that name too."""
    return "radius" in shapes and bool((shapes.geom_type.dropna() == "Point").all())


def as_circles(shapes: GeoDataFrame, key: str, where: str) -> GeoDataFrame:
    """Spots as circles: squares become the circles inscribed in them."""
    if "radius" in shapes:
        lost = ~np.isfinite(shapes.geometry.bounds.to_numpy()).all(axis=1)
        if lost.any():
            msg = (
                f"{int(lost.sum())} of {len(lost)} spots of {where}.shapes[{key!r}] have no place, the first is "
                f"{str(shapes.index[lost][0])!r}. Leave them out of the shapes and of their table."
            )
            raise ValueError(msg)
        return shapes
    edge = square_edge(shapes)
    if edge is None:
        msg = (
            f"{where}.shapes[{key!r}] holds neither circles nor squares of one size; make circles of it with "
            "`spatialdata.to_circles`, or choose others with `shapes_key=`."
        )
        raise ValueError(msg)
    circles = gpd.GeoDataFrame({"radius": np.full(len(shapes), edge / 2)}, geometry=shapes.centroid, index=shapes.index)
    return ShapesModel.parse(circles, transformations=get_transformation(shapes, get_all=True))


def free_names(table: AnnData, where: str) -> None:
    """Rename, with a warning, what SpatialData refuses: odd characters, and columns of the stack in other case."""
    ours = {c: f"{c}_original" for c in table.obs if str(c).lower() in (Keys.REGION, Keys.INSTANCE)}
    # An index must not differ from a column of its name.
    table.obs = table.obs.rename(columns=ours).rename_axis(index=None)
    slots = ("obs", "var", "obsm", "layers")
    before = [str(name) for slot in slots for name in getattr(table, slot)]
    sanitize_table(table)
    after = [str(name) for slot in slots for name in getattr(table, slot)]
    changed = {old: new for old, new in zip(before, after, strict=True) if old != new}
    if renamed := {str(old): new for old, new in ours.items()} | changed:
        logger.warning(
            "%s: names in the table are changed to those that SpatialData and the stack allow: %s", where, renamed
        )


def section_object(
    name: str,
    image: DataArray | DataTree,
    *,
    centers: np.ndarray,
    radius: float,
    ids: Sequence[str],
    table: AnnData | None,
) -> SpatialData:
    """Image, circles (centers and radius in px) and counts of a measured section in the coordinate system ``"global"``."""
    circles = gpd.GeoDataFrame(
        {"radius": np.full(len(centers), radius)},
        geometry=gpd.points_from_xy(centers[:, 0], centers[:, 1]),
        index=pd.Index(ids),
    )
    sdata = SpatialData(
        images={Keys.image(name): image},
        shapes={Keys.spots(name): ShapesModel.parse(circles, transformations={"global": Identity()})},
    )
    if table is not None:
        table.obs[Keys.REGION] = pd.Categorical([Keys.spots(name)] * table.n_obs)
        table.obs[Keys.INSTANCE] = table.obs_names.to_numpy()
        sdata.tables[Keys.counts(name)] = TableModel.parse(
            table, region=Keys.spots(name), region_key=Keys.REGION, instance_key=Keys.INSTANCE
        )
    return sdata


def require_registration(record: StackRecord) -> dict:
    """Registration of the record, or a ``KeyError``."""
    if record.registration is None:
        msg = "The stack is not registered. Run `si.tl.register_stack(sdata)` first."
        raise KeyError(msg)
    return record.registration


def element_frames(element: object) -> dict[str, Any]:
    """Transformations of an element by coordinate system; none for points of `copy.deepcopy`, which loses them."""
    try:
        return get_transformation(element, get_all=True) or {}
    except AssertionError:  # of spatialdata
        return {}


def moved_elements(sdata: SpatialData, record: StackRecord) -> list[str]:
    """Images and spots whose place in the common frame is not that of the registration."""
    found, registration = [], require_registration(record)
    target = registration["coordinate_system"]
    for section in record.sections:
        for kind, key in (("images", section.image), ("shapes", str(section.spots))):
            element = getattr(sdata, kind).get(key)
            frames = {} if element is None else element_frames(element)
            if section.name not in registration["sections"] or not {section.name, target} <= set(frames):
                continue
            placed = np.asarray(registration["sections"][section.name]["matrix"]) @ element_affine(
                element, section.name
            )
            if not np.allclose(placed, element_affine(element, target), rtol=1e-5, atol=1e-3):
                found.append(f"sdata.{kind}[{key!r}]")
    return found


def registration_state(record: StackRecord) -> str:
    """Short hash of the places and qualities of all sections: it tells one registration from another."""
    text = json.dumps(require_registration(record)["sections"], sort_keys=True)
    return f"{zlib.crc32(text.encode()):08x}"


def load_transform(sdata: SpatialData, record: StackRecord, section: str) -> SectionTransform:
    """Transformation of a section to the common frame, or a ``KeyError`` if a part of it is missing."""
    from spatial_impute._registration.transform import SectionTransform

    registration = require_registration(record)
    require_key(
        section,
        registration["sections"],
        where="the registered sections",
        then="Give its place with `si.tl.register_stack(sdata, transformations=...)`.",
    )
    row = registration["sections"][section]
    matrix = np.asarray(row["matrix"], float)
    if not row.get("deformed", False):
        return SectionTransform(matrix)
    elements = []
    for key in (Keys.displacement(section), Keys.displacement_inverse(section)):
        require_key(key, sdata.images, where="sdata.images", then="Run `si.tl.register_stack(sdata)` again.")
        elements.append(sdata.images[key].transpose("c", "y", "x"))
    pull, push = (np.moveaxis(np.asarray(element.data, dtype=np.float32), 0, -1) for element in elements)
    return SectionTransform(matrix, pull, push, element_affine(elements[-1], registration["coordinate_system"]))


def displacement_elements(transform: SectionTransform, section: str, target: str) -> dict[str, DataArray]:
    """Image elements ``c=("dx", "dy")``, float32, um, on their grid in the coordinate system `target`."""
    if not transform.deforms:
        return {}
    fields = {Keys.displacement(section): transform.pull, Keys.displacement_inverse(section): transform.push}
    return {
        key: Image2DModel.parse(
            np.moveaxis(np.asarray(field, np.float32), -1, 0),
            dims=("c", "y", "x"),
            c_coords=["dx", "dy"],
            transformations={target: plane_affine(transform.grid)},
        )
        for key, field in fields.items()
    }


def spots_by_section(
    sdata: SpatialData, record: StackRecord, table: AnnData
) -> Iterator[tuple[Section, np.ndarray, np.ndarray, np.ndarray]]:
    """Sections with spots: their spots that the table holds, as (n, 2) centers, (n,) radius in um, (n,) rows."""
    for section in record.sections:
        if section.spots is not None:
            centers, radius, index = spot_geometry(sdata, section)
            rows = rows_of_spots(table, section.name, index)
            known = rows >= 0
            yield section, centers[known], radius[known], rows[known]


def rows_of_spots(table: AnnData, section: str, index: pd.Index) -> np.ndarray:
    """(n,) row of each spot of a section in the stack table, joined by instance id; -1 for spots that it lacks."""
    rows = np.flatnonzero(np.asarray(table.obs[Keys.SECTION]) == section)
    ids = pd.Index(np.asarray(table.obs[Keys.INSTANCE])[rows]).astype(str)
    if ids.has_duplicates:
        msg = (
            f"`obs[{Keys.INSTANCE!r}]` joins the rows of section {section!r} with its spots and counts, so each id must stand once; "
            f"{ids[ids.duplicated()][0]!r} stands more often. Restore the column, or take the repeated rows out."
        )
        raise ValueError(msg)
    return np.append(rows, -1)[ids.get_indexer(index.astype(str))]


def registered_radius(sdata: SpatialData, record: StackRecord, table: AnnData) -> np.ndarray:
    """(n_spots,) radius in the common frame, um, in the order of the table; the median for spots without a circle."""
    radius = np.full(table.n_obs, np.nan)
    matrices = (record.registration or {}).get("sections", {})
    for section, _, own, rows in spots_by_section(sdata, record, table):
        scale = linear_scale(np.asarray(matrices[section.name]["matrix"])) if section.name in matrices else 1.0
        radius[rows] = own * scale
    return np.where(np.isfinite(radius), radius, np.nanmedian(radius))
