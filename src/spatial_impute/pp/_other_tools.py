"""Results of other tools: outlines of cells, and features of tiles or spots."""

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

from spatial_impute._geometry import apply_affine, polygons_of, xy_of
from spatial_impute._io.files import read_text
from spatial_impute._keys import Keys
from spatial_impute._settings import log_added, logger
from spatial_impute._stack import (
    element_affine,
    load_record,
    plane_affine,
    section_images,
    section_levels,
    spot_geometry,
    stack_table,
    to_frames,
)
from spatial_impute._validation import require_finite, require_key, require_slot_key, require_unique
from spatial_impute.pp._extract_features import fields_layout, rows_of_spots, write_features

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData
    from geopandas import GeoDataFrame, GeoSeries
    from shapely import Polygon
    from spatialdata import SpatialData

    from spatial_impute._stack import Section

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
    Annotations of QuPath come in the same way; :func:`~spatial_impute.tl.transfer_shapes` carries them to the other
    sections.

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
    >>> sdata = si.datasets.synthetic_stack()
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
    _require_on_image(found, size, image)
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
    except (ValueError, KeyError, TypeError, AttributeError, ShapelyError) as error:
        msg = f"'{path}' is no GeoJSON file with features: {error!r}."
        raise ValueError(msg) from error
    properties = [feature.get("properties") or {} for feature in features]
    columns = {
        "class": [_class_name(part.get("classification") or {}) for part in properties],
        "name": [str(part.get("name") or "") for part in properties],
        "objectType": [str(part.get("objectType") or "") for part in properties],
    }
    ids = pd.Index([str(i if feature.get("id") is None else feature["id"]) for i, feature in enumerate(features)])
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


def _require_on_image(found: GeoDataFrame, size: tuple[int, int], image: str) -> None:
    """Raise a ``ValueError`` if most outlines lie outside the image."""
    bounds = found.geometry.bounds
    middle = (bounds[["minx", "miny"]].to_numpy() + bounds[["maxx", "maxy"]].to_numpy()) / 2
    outside = ((middle < 0) | (middle > [size[1], size[0]])).any(axis=1)
    if outside.mean() > _MOST_OUTSIDE:
        low, high = middle.min(axis=0), middle.max(axis=0)
        msg = (
            f"{int(outside.sum())} of {len(outside)} outlines lie outside `sdata.images[{image!r}]` ({size[1]} x "
            f"{size[0]} px): they run from ({low[0]:.0f}, {low[1]:.0f}) to ({high[0]:.0f}, {high[1]:.0f}). They must "
            "be in pixels of its full resolution: multiply by the downsampling of the image that they were found on, "
            "or divide um by its `mpp`."
        )
        raise ValueError(msg)


def pool_features(
    sdata: SpatialData,
    features: Mapping[str, AnnData | SpatialData | np.ndarray],
    *,
    name: str = "precomputed",
    features_key: str | None = None,
    spatial_key: str = "spatial",
    region_scale: float = 2.3,
    global_scale: float = 4.6,
) -> None:
    """Pool features that another tool computed on tiles or spots, instead of :func:`extract_features`.

    A field of view is described by the mean and the standard deviation of the tiles whose centre lies in it, else by
    the nearest tile. Levels and tokens are those of :func:`extract_features`.

    Parameters
    ----------
    sdata
        Stack with spots.
    features
        For each section with spots one of

        - a slide of LazySlide (``WSIData``, which is a SpatialData): the table `features_key` holds features, and its
          shapes are the tiles, in pixels of the full resolution;
        - an AnnData with a row per tile: features in ``X``, centres of the tiles in ``obsm[spatial_key]``, in pixels
          (x, y) of the full resolution of the section's image;
        - an array with a row per spot, in the order of ``sdata.shapes["{section}_spots"]``.
    name
        Name of the encoder, for the provenance.
    features_key
        Table of features in SpatialData objects; by default the only table.
    spatial_key
        Slot of the positions in AnnData objects.
    region_scale
        Edge length of the region in spot diameters.
    global_scale
        Edge length of the global surroundings in spot diameters.

    Returns
    -------
    ``None``. Writes the slots of :func:`extract_features`.

    Raises
    ------
    KeyError
        If a section, a table or positions are missing.
    ValueError
        For features that are not finite, have several widths, or have another number of rows than the spots.

    Examples
    --------
    >>> import numpy as np
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack()
    >>> rng = np.random.default_rng(0)
    >>> features = {s: rng.normal(size=(len(sdata.shapes[f"{s}_spots"]), 8)) for s in sdata.coordinate_systems}
    >>> si.pp.pool_features(sdata, features, name="my-encoder")
    >>> sdata.tables["stack"].obsm["X_spot"].shape[1]
    16
    """
    from spatial_impute.encoders._tokens import pool_tiles

    record = load_record(sdata)
    table = stack_table(sdata)
    layout = fields_layout(region_scale, global_scale)
    sections = [section for section in record.sections if section.spots is not None]
    spots = {section.name: spot_geometry(sdata, section) for section in sections}
    rows = rows_of_spots(table, {section: index for section, (_, _, index) in spots.items()})
    found, places = {}, {}
    for section in sections:
        require_key(section.name, features, where="features", then="Every section with spots needs features.")
        centers, radius, _ = spots[section.name]
        values, positions = _tiles(
            sdata, section, features[section.name], centers, features_key=features_key, spatial_key=spatial_key
        )
        places[section.name] = centers, 2 * float(np.median(radius))
        found[section.name] = pool_tiles(positions, values, *places[section.name], layout)
    images = section_images(sdata, record, found)
    provenance = {"encoder": name, "mpp": float("nan"), "stain_normalization": "", "sections": {}, Keys.STATE: images}
    write_features(table, rows, found, layout=layout, places=places, provenance=provenance)


def _tiles(
    sdata: SpatialData, section: Section, given: Any, centers: np.ndarray, *, features_key: str | None, spatial_key: str
) -> tuple[np.ndarray, np.ndarray]:
    """(m, d) features and (m, 2) centres in um of the tiles of a section."""
    where = f"features[{section.name!r}]"
    if hasattr(given, "tables"):
        values, pixels = _from_slide(given, features_key, where)
    elif hasattr(given, "obsm"):
        require_key(spatial_key, given.obsm, where=f"{where}.obsm", then="Name it with `spatial_key=`.")
        values, pixels = _dense(given.X), xy_of(given.obsm[spatial_key])
    else:
        values, pixels = np.asarray(given, dtype=np.float64), None
    if values.ndim != 2 or 0 in values.shape or (pixels is None and len(values) != len(centers)):
        expected = f"({len(centers)}, n_features), a row per spot" if pixels is None else "(n_tiles, n_features)"
        msg = f"{where} must have the shape {expected}, found {values.shape}."
        raise ValueError(msg)
    require_finite(values, name=where)
    if pixels is None:
        return values, centers
    require_finite(pixels, name=f"positions of {where}")
    return values, apply_affine(pixels, section_levels(sdata, section)[0].to_um)


def _from_slide(slide: SpatialData, features_key: str | None, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Features and centres (px) of the tiles of a slide, joined by their ids."""
    if features_key is None and len(slide.tables) == 1:
        features_key = next(iter(slide.tables))
    if features_key is None:
        msg = f"{where} has the tables {sorted(slide.tables)}; name the one with features by `features_key=`."
        raise ValueError(msg)
    require_key(features_key, slide.tables, where=f"{where}.tables")
    table = slide.tables[features_key]
    attrs = table.uns.get("spatialdata_attrs", {})
    require_key("region", attrs, where=f"{where}.tables[{features_key!r}].uns['spatialdata_attrs']")
    region = attrs["region"] if isinstance(attrs["region"], str) else attrs["region"][0]
    require_key(region, slide.shapes, where=f"{where}.shapes")
    shapes = slide.shapes[region]
    order = shapes.index.get_indexer(table.obs[attrs["instance_key"]])
    if (order < 0).any():
        missing = table.obs[attrs["instance_key"]].iloc[int(np.flatnonzero(order < 0)[0])]
        msg = f"{where}: tile {str(missing)!r} of table {features_key!r} is not in `shapes[{region!r}]`."
        raise ValueError(msg)
    centers = shapely.centroid(shapes.geometry.to_numpy()[order])
    return _dense(table.X), np.column_stack([shapely.get_x(centers), shapely.get_y(centers)])


def _dense(values: Any) -> np.ndarray:
    return np.asarray(values.toarray() if hasattr(values, "toarray") else values, dtype=np.float64)
