"""Outlines of cells that other tools found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from shapely.errors import ShapelyError
from shapely.geometry import shape
from shapely.geometry.base import BaseGeometry
from spatialdata.models import ShapesModel
from spatialdata.transformations import Identity, get_transformation

from spatial_impute._geometry import polygons_of
from spatial_impute._io.files import read_text
from spatial_impute._keys import Keys
from spatial_impute._settings import log_added, logger
from spatial_impute._stack.elements import element_affine, plane_affine, section_levels, to_frames
from spatial_impute._stack.record import load_record
from spatial_impute._validation import require_key, require_slot_key, require_unique

if TYPE_CHECKING:
    from collections.abc import Sequence

    from geopandas import GeoDataFrame, GeoSeries
    from shapely import Polygon
    from spatialdata import SpatialData


_LEAST_WITH_AREA = 0.5  # of the objects: with fewer polygons, it is a file of something else
_MOST_OUTSIDE = 0.5  # of the outlines: above it, the pixels are those of another image


def add_cells(
    sdata: SpatialData,
    section: str,
    cells: str | Path | GeoDataFrame | GeoSeries | Sequence[Polygon] | np.ndarray,
    *,
    key_added: str | None = None,
) -> None:
    """Add the outlines of cells, nuclei or superpixels to a section, to predict the expression of each.

    Other tools find them: QuPath, StarDist, InstanSeg, Cellpose, LazySlide. Then
    ``si.tl.predict_regions(sdata, "s1_cells", model, image_key="s1_image")`` makes a table with one row for each.
    It adds annotations of QuPath as well; :func:`~spatial_impute.tl.transfer_shapes` carries them to the other sections.

    Parameters
    ----------
    sdata
        Stack.
    section
        Section on whose image the cells were found.
    cells
        Outlines in pixels of the full-resolution image of the section: a GeoJSON file, such as an export of QuPath; a
        :class:`geopandas.GeoDataFrame`, GeoSeries or list of polygons; or labels (y, x) of the size of that image, 0
        for none. Shapes of a SpatialData object with a transformation to the coordinate system `section` are placed by
        it.
    key_added
        Shapes to write; ``"{section}_cells"`` by default.

    Returns
    -------
    ``None``. Writes `sdata.shapes['{section}_cells']`: the polygons, with the columns of a data frame, or ``class``,
    ``name`` and ``objectType`` from a GeoJSON file; measurements in the file are not read. Objects without an area
    (points, lines, empty ones) are left out, with a warning. Shapes of the section with this name are replaced.

    Raises
    ------
    KeyError
        If the section does not exist.
    FileNotFoundError
        If there is no such file.
    TypeError
        If `cells` is none of these, such as a mask of True and False.
    ValueError
        If most objects have no area, most polygons lie outside the image, labels have another size than the image or
        are negative, shapes lie in another coordinate system, the file is no GeoJSON, or `key_added` names shapes of
        another section.

    Examples
    --------
    >>> import geopandas as gpd
    >>> from shapely.geometry import Point
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack(extent=1400.0)
    >>> cells = gpd.GeoDataFrame(geometry=[Point(200, 200).buffer(2), Point(220, 200).buffer(3)])
    >>> si.pp.add_cells(sdata, "s1", cells)
    >>> len(sdata.shapes["s1_cells"])
    2
    """
    record = load_record(sdata)
    require_key(section, record.names, where="the stack's sections")
    key = f"{section}_cells" if key_added is None else key_added
    outlines = map(Keys.tissue_outline, record.names)
    others = [*sdata.images, *sdata.labels, *sdata.points, *sdata.tables, *outlines]
    require_slot_key(key, name="key_added", taken=[str(one.spots) for one in record.sections] + others)
    _require_own_shapes(sdata, key, section)
    image = record[section].image
    size = section_levels(sdata, record[section])[0].shape
    to_um = element_affine(sdata.images[image], section)
    found = _with_area(_outlines(cells, size))
    if (own := _own_place(cells, section)) is not None:
        (a, b, x), (d, e, y), _ = np.linalg.inv(to_um) @ own
        found = found.set_geometry(found.geometry.affine_transform([a, b, d, e, x, y]))
    bounds = found.geometry.bounds
    middle = (bounds[["minx", "miny"]].to_numpy() + bounds[["maxx", "maxy"]].to_numpy()) / 2
    require_on_image(middle, size, f"outlines lie outside `sdata.images[{image!r}]`")
    sdata.shapes[key] = ShapesModel.parse(found, transformations=to_frames(record, section, plane_affine(to_um)))
    log_added(f"shapes[{key!r}]")


def _require_own_shapes(sdata: SpatialData, key: str, section: str) -> None:
    """Raise a ``ValueError`` if shapes that would be replaced lie in another section: they are no earlier result."""
    if key in sdata.shapes and section not in (places := get_transformation(sdata.shapes[key], get_all=True)):
        msg = (
            f"`key_added={key!r}` would write over `sdata.shapes[{key!r}]`, which lies in {sorted(places)} and not in "
            f"section {section!r}. Choose another name."
        )
        raise ValueError(msg)


def _own_place(cells: Any, section: str) -> np.ndarray | None:
    """Matrix to the frame of the section of shapes that have one; None for plain outlines, which are in pixels."""
    places = getattr(cells, "attrs", {}).get("transform") or {}
    if section in places:
        return element_affine(cells, section)
    if all(place == Identity() for place in places.values()):
        return None
    msg = (
        f"`cells` is placed in the coordinate systems {sorted(places)}, expected {section!r}. Set a transformation to "
        "it with `spatialdata.transformations.set_transformation`, or give the outlines alone, in pixels: "
        "`cells.geometry.to_numpy()`."
    )
    raise ValueError(msg)


def _outlines(cells: Any, size: tuple[int, int]) -> GeoDataFrame:
    """Outlines in pixels, with unique names."""
    if isinstance(cells, str | Path):
        found = _read_geojson(Path(cells).expanduser())
    elif isinstance(cells, gpd.GeoDataFrame):
        found = gpd.GeoDataFrame(cells.drop(columns=cells.geometry.name), geometry=cells.geometry.to_numpy())
    elif isinstance(cells, gpd.GeoSeries):
        found = gpd.GeoDataFrame(geometry=cells.to_numpy(), index=cells.index)
    elif getattr(cells, "ndim", 0) == 2 and np.dtype(cells.dtype).kind in "iu":
        found = _from_labels(cells, size)
    elif isinstance(cells, list | tuple | np.ndarray) and all(c is None or isinstance(c, BaseGeometry) for c in cells):
        found = gpd.GeoDataFrame(geometry=list(cells))
    else:
        kind = f" of {cells.dtype} and shape {cells.shape}" if hasattr(cells, "dtype") else ""
        msg = (
            "`cells` must be a GeoJSON file, a GeoDataFrame, a GeoSeries or list of polygons, or labels as whole "
            f"numbers (y, x), found {type(cells).__name__}{kind}. Number the cells of a mask with "
            "`skimage.measure.label(mask)`; make labels of another type whole with `labels.astype(int)`."
        )
        raise TypeError(msg)
    found = found.set_geometry(found.geometry.force_2d())
    found.attrs = {}  # the place of a shapes element is applied by itself
    require_unique(found.index, name="The index of `cells`")
    return found


def _read_geojson(path: Path) -> GeoDataFrame:
    """Outlines of a GeoJSON file; QuPath writes a list of features, or a collection of them."""
    if not path.is_file():
        msg = f"`cells` must be a GeoJSON file, found none at {str(path)!r}."
        raise FileNotFoundError(msg)
    try:
        content = json.loads(read_text(path))
        features = _features(content)
        geometry = [shape(feature["geometry"]) if feature["geometry"] else None for feature in features]
        properties = [feature.get("properties") or {} for feature in features]
        columns = {
            "class": [_class_name(part.get("classification") or {}) for part in properties],
            "name": [str(part.get("name") or "") for part in properties],
            "objectType": [str(part.get("objectType") or "") for part in properties],
        }
    except (ValueError, KeyError, TypeError, AttributeError, ShapelyError) as error:
        msg = f"'{path}' is no GeoJSON file with features: {error!r}."
        raise ValueError(msg) from error
    ids = pd.Index([str(i if feature.get("id") is None else feature["id"]) for i, feature in enumerate(features)])
    if not ids.is_unique:  # early versions of QuPath write the type of the object there
        logger.warning("%s: the ids of its objects are repeated, so they are numbered", path)
        ids = pd.RangeIndex(len(features)).astype(str)
    return gpd.GeoDataFrame({key: v for key, v in columns.items() if any(v)}, geometry=geometry, index=ids)


def _features(content: Any) -> list[dict[str, Any]]:
    """Features of a collection, of a list, or a single one or its geometry alone."""
    if not isinstance(content, dict):
        return list(content)
    if "features" in content:
        return list(content["features"])
    return [content if "geometry" in content else {"geometry": content}]


def _class_name(found: Any) -> str:
    """Name of a class; QuPath lists the names of a class within a class."""
    if isinstance(found, str):
        return found
    return str(found.get("name") or ": ".join(found.get("names", ())))


def _from_labels(labels: Any, size: tuple[int, int]) -> GeoDataFrame:
    """Outlines of labels along the edges of their pixels, so that areas are exact."""
    if tuple(labels.shape) != tuple(size):
        msg = f"Labels must have the size of the full-resolution image, {size[0]} x {size[1]} (y, x), found {labels.shape}."
        raise ValueError(msg)
    values = np.asarray(labels)
    if values.min(initial=0) < 0:
        msg = (
            f"Labels must be 0 where there is no cell, and positive in cells, found {values.min()}. If that is the "
            "background, add 1 to labels that begin with 0, or take `np.maximum(labels, 0)`."
        )
        raise ValueError(msg)
    first = np.ones(values.shape, dtype=bool)  # of a run of equal labels in a row
    first[:, 1:] = values[:, 1:] != values[:, :-1]
    y, x = np.nonzero(first)
    label = values[y, x]
    end = np.append(x[1:], 0)
    end[end == 0] = size[1]  # the next run begins the next row
    boxes = shapely.box(x, y, end, y + 1)[label != 0]
    found = gpd.GeoDataFrame({"label": label[label != 0].astype(str)}, geometry=boxes).dissolve("label", sort=False)
    return gpd.GeoDataFrame(geometry=found.geometry.to_numpy(), index=pd.Index(found.index.to_numpy()))


def _with_area(found: GeoDataFrame) -> GeoDataFrame:
    """Polygons with an area, repaired where they cross themselves."""
    if not len(found):
        msg = "`cells` holds no object. Give at least one outline."
        raise ValueError(msg)
    odd = found.geometry.notna() & (~found.geometry.is_valid | (found.geometry.geom_type == "GeometryCollection"))
    if odd.any():
        parts = [polygons_of(one) if is_odd else one for one, is_odd in zip(found.geometry, odd, strict=True)]
        found = found.set_geometry(gpd.GeoSeries(parts, index=found.index))
    kept = found.geometry.geom_type.isin(["Polygon", "MultiPolygon"]) & (found.geometry.area > 0)
    if not kept.mean() >= _LEAST_WITH_AREA:
        kinds = found.geometry[~kept].geom_type.fillna("none").value_counts().to_dict()
        msg = (
            f"{int((~kept).sum())} of {len(kept)} objects in `cells` are no polygon with an area, by type {kinds}. "
            "Give outlines; make polygons of circles with `spatialdata.to_polygons`."
        )
        raise ValueError(msg)
    if not kept.all():
        logger.warning("%d of %d objects have no area and are left out", int((~kept).sum()), len(kept))
    return found[kept]


def require_on_image(middle: np.ndarray, size: tuple[int, int], what: str) -> None:
    """Raise a ``ValueError`` if most of the points (n, 2), in px, lie outside the image."""
    outside = np.any((middle < 0) | (middle > [size[1], size[0]]), axis=1)
    if outside.mean() > _MOST_OUTSIDE:
        low, high = middle.min(axis=0), middle.max(axis=0)
        msg = (
            f"{int(outside.sum())} of {len(outside)} {what} ({size[1]} x {size[0]} px): they run from ({low[0]:.0f}, "
            f"{low[1]:.0f}) to ({high[0]:.0f}, {high[1]:.0f}). They must be in pixels of its full resolution: multiply "
            "by the downsampling of the image that they were found on, or divide um by its `mpp`."
        )
        raise ValueError(msg)
