"""Carry any element of a section into the common frame, deformation included."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from spatial_impute._geometry import apply_affine, linear_scale
from spatial_impute._image.levels import best_level, image_levels
from spatial_impute._keys import Keys
from spatial_impute._logging import log_added
from spatial_impute._registration.warp_image import output_grid, resampled
from spatial_impute._stack.elements import element_affine, load_transform, require_element_key, require_registration
from spatial_impute._stack.record import load_record
from spatial_impute._validation import require_key, require_positive

if TYPE_CHECKING:
    from collections.abc import Callable

    import pandas as pd
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData

    from spatial_impute._registration.transform import SectionTransform
    from spatial_impute._stack.record import StackRecord

    Mapping = Callable[[np.ndarray], np.ndarray]

_CHUNK = 2048  # px; also given to pyramids, whose levels spatialdata would otherwise cut into 256 px pieces
_SMALLEST_LEVEL = 256  # px along the longer side of the coarsest level of a pyramid


def warp_element(
    sdata: SpatialData,
    key: str,
    *,
    section: str | None = None,
    key_added: str | None = None,
    pixel_size: float | None = None,
    inplace: bool = True,
) -> Any:
    """Carry an element of a section into the common frame, with the deformation if the section has one.

    :func:`register_stack` gives every element the affine part as a transformation. This function makes a copy whose
    coordinates are final: annotations, cells, transcripts, images and label masks.

    Parameters
    ----------
    sdata
        Stack registered by :func:`register_stack`.
    key
        Points, shapes, image or labels.
    section
        Section the element belongs to; by default the one section to which it has a transformation.
    key_added
        Name of the new element; ``"{key}_aligned"`` by default.
    pixel_size
        Pixel size of a warped image or labels in um; by default that of the element.
    inplace
        Write to `sdata`, or return the element and write nothing.

    Returns
    -------
    ``None``, or the new element with ``inplace=False``. Its only coordinate system is that of the registration
    (``"aligned"``), and vector elements have their coordinates in it (um):

    points
        moved, lazily; other columns stay.
    circles
        moved; the radius follows the local change of area.
    polygons
        moved vertex by vertex, with vertices added along edges that are long for the deformation; made valid.
    images, labels
        resampled from the nearest finer resolution, chunk by chunk when computed: bilinear for images, nearest for
        labels. What lies beyond the image is 0; white for the H&E image of the section.

    Raises
    ------
    KeyError
        If the stack is not registered, or the element does not exist or belongs to no registered section.
    ValueError
        If it belongs to several sections and `section` is not given, or `pixel_size` does not fit.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack()
    >>> si.tl.register_stack(sdata, method="rigid", show_progress_bar=False)
    >>> si.tl.warp_element(sdata, "s0_spots")
    >>> "s0_spots_aligned" in sdata.shapes
    True
    """
    from spatialdata.models import PointsModel, ShapesModel, get_model
    from spatialdata.transformations import get_transformation

    record = load_record(sdata)
    registration = require_registration(record)
    names = [name for _, name, _ in sdata.gen_spatial_elements()]
    require_key(key, names, where="the points, shapes, images and labels of sdata")
    element = sdata[key]
    section = _section_of(element, key, record) if section is None else section
    to_section = _affine_to(element, key, section)
    transform = load_transform(sdata, record, section)
    key_added = Keys.aligned(key) if key_added is None else key_added
    if key_added == key:
        msg = f"`key_added` must differ from {key!r}: the element itself is never overwritten."
        raise ValueError(msg)
    kind = next(kind for kind in ("points", "shapes", "labels", "images") if key in getattr(sdata, kind))
    if inplace:  # an earlier result lies in the common frame alone
        there, common = getattr(sdata, kind), {registration["coordinate_system"]}
        ours = [name for name, old in there.items() if set(get_transformation(old, get_all=True)) == common]
        require_element_key(sdata, key_added, name="key_added", kind=kind, ours=ours)
    target = registration["coordinate_system"]

    model = get_model(element)
    vector = model in (PointsModel, ShapesModel)
    if pixel_size is not None:
        if vector:
            msg = f"`pixel_size` is for images and labels; `{key}` holds {'points' if model is PointsModel else 'shapes'}."
            raise ValueError(msg)
        pixel_size = require_positive(pixel_size, name="pixel_size", unit="um")
    mapping = _mapping(transform, to_section)
    if model is PointsModel:
        new = _warp_points(element, mapping, target)
    elif model is ShapesModel:
        new = _warp_shapes(element, mapping, to_section, transform, target)
    else:
        white = key == record[section].image
        new = _warp_raster(element, transform, to_section, target, model=model, pixel_size=pixel_size, white=white)
    if not inplace:
        return new
    container = getattr(sdata, kind)
    if key_added in container:  # from an earlier registration
        del container[key_added]
    container[key_added] = new
    log_added(f"{kind}[{key_added!r}]")
    return None


def _section_of(element: Any, key: str, record: StackRecord) -> str:
    from spatialdata.transformations import get_transformation

    found = [name for name in record.names if name in get_transformation(element, get_all=True)]
    if len(found) == 1:
        return found[0]
    if not found:
        msg = f"{key!r} has no transformation to a section of the stack {record.names}. Set one, in um."
        raise KeyError(msg)
    msg = f"{key!r} lies in several sections; give `section`, one of {found}."
    raise ValueError(msg)


def _affine_to(element: Any, key: str, section: str) -> np.ndarray:
    from spatialdata.transformations import get_transformation

    require_key(
        section,
        get_transformation(element, get_all=True),
        where=f"the coordinate systems of {key!r}",
        then="Set a transformation of the element to the frame of the section (um).",
    )
    return element_affine(element, section)


def _mapping(transform: SectionTransform, to_section: np.ndarray) -> Mapping:
    """Points of the element to points of the common frame."""
    return lambda points: transform.points(apply_affine(points, to_section))


def _warp_points(points: Any, mapping: Mapping, target: str) -> Any:
    from spatialdata.models import PointsModel
    from spatialdata.transformations import Identity

    def move(frame: pd.DataFrame) -> pd.DataFrame:
        xy = mapping(frame[["x", "y"]].to_numpy(float))
        return frame.assign(x=xy[:, 0], y=xy[:, 1])

    attrs = points.attrs.get("spatialdata_attrs", {})
    moved = points.map_partitions(move, meta=move(points._meta))
    moved.attrs.pop("transform", None)  # inherited from the original, which keeps its own
    known = {key: attrs[key] for key in ("feature_key", "instance_key") if attrs.get(key) is not None}
    return PointsModel.parse(moved, transformations={target: Identity()}, **known)


def _warp_shapes(
    shapes: GeoDataFrame, mapping: Mapping, to_section: np.ndarray, transform: SectionTransform, target: str
) -> GeoDataFrame:
    import shapely
    from spatialdata.models import ShapesModel
    from spatialdata.transformations import Identity

    moved = shapes.copy()
    moved.attrs = {}
    if "radius" in shapes:
        centers = np.column_stack([shapes.geometry.x, shapes.geometry.y])
        radius = shapes["radius"].to_numpy(float)
        moved["geometry"] = shapely.points(mapping(centers))
        moved["radius"] = radius * _local_scale(mapping, centers, radius)
    else:
        geometry = shapes.geometry.to_numpy()
        if transform.grid is not None:
            # Half a grid pixel: between two such vertices the displacement is linear.
            step = 0.5 * linear_scale(transform.grid) / linear_scale(transform.matrix @ to_section)
            geometry = shapely.segmentize(geometry, step)
        geometry = shapely.transform(geometry, mapping)
        invalid = ~shapely.is_valid(geometry)
        geometry[invalid] = [_polygonal(g) for g in geometry[invalid]]
        moved["geometry"] = geometry
    return ShapesModel.parse(moved, transformations={target: Identity()})


def _local_scale(mapping: Mapping, centers: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Square root of the change of area over each circle."""
    x, y = ([mapping(centers + s * radius[:, None] * axis) for s in (1, -1)] for axis in np.eye(2))
    dx, dy = ((ahead - behind) / (2 * radius[:, None]) for ahead, behind in (x, y))
    return np.sqrt(np.abs(dx[:, 0] * dy[:, 1] - dx[:, 1] * dy[:, 0]))


def _polygonal(geometry: Any) -> Any:
    """Valid polygons of a geometry, without the lines and points that repairing may leave."""
    import shapely

    valid = shapely.make_valid(geometry)
    if valid.geom_type in ("Polygon", "MultiPolygon"):
        return valid
    parts = [part for part in shapely.get_parts(valid) if part.geom_type in ("Polygon", "MultiPolygon")]
    return shapely.union_all(parts) if parts else geometry


def _warp_raster(
    element: Any,
    transform: SectionTransform,
    to_section: np.ndarray,
    target: str,
    *,
    model: Any,
    pixel_size: float | None,
    white: bool,
) -> Any:
    from spatialdata.transformations import Affine

    levels = image_levels(element, to_section)
    finest = levels[0]
    pixel_size = finest.pixel_size * linear_scale(transform.matrix) if pixel_size is None else pixel_size
    level = best_level(levels, pixel_size / linear_scale(transform.matrix))
    is_labels = "c" not in level.data.dims
    dtype = level.data.dtype
    fill = np.iinfo(dtype).max if white and np.issubdtype(dtype, np.integer) else int(white)
    grid, shape = output_grid(finest.shape, finest.to_um, transform, pixel_size)
    data = resampled(level, transform, grid, shape, nearest=is_labels, fill=fill, chunk=_CHUNK)
    kwargs: dict[str, Any] = {"transformations": {target: Affine(grid, input_axes=("x", "y"), output_axes=("x", "y"))}}
    if not is_labels:
        kwargs["c_coords"] = list(level.data.coords["c"].to_numpy())
    if hasattr(element, "children"):
        n_levels = max(0, int(np.log2(max(shape) / _SMALLEST_LEVEL)))
        if n_levels:
            chunks = {"y": _CHUNK, "x": _CHUNK} | ({} if is_labels else {"c": data.shape[0]})
            kwargs |= {"scale_factors": [2] * n_levels, "chunks": chunks}
    return model.parse(data, dims=level.data.dims if is_labels else ("c", "y", "x"), **kwargs)
