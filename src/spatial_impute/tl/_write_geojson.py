"""Write shapes of a section as GeoJSON in pixels of its image, as QuPath reads it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spatial_impute._geometry import apply_affine
from spatial_impute._io.files import file_to_write, written_whole
from spatial_impute._settings import logger
from spatial_impute._stack import are_circles, element_affine, load_record
from spatial_impute._validation import require_key
from spatial_impute.tl._warp_element import section_of

if TYPE_CHECKING:
    from pathlib import Path

    from geopandas import GeoDataFrame
    from spatialdata import SpatialData

_CORNERS = 8  # of a quarter of a circle: its area is right to 0.6 %
_DECIMALS = 2  # of a pixel


def write_geojson(
    sdata: SpatialData, key: str, path: str | Path, *, section: str | None = None, overwrite: bool = False
) -> None:
    """Write polygons or circles of a section as GeoJSON for QuPath, in pixels of its full-resolution image.

    Parameters
    ----------
    sdata
        Stack.
    key
        Shapes. The columns ``class``, ``name`` and ``objectType`` become class, name and type of the objects of QuPath,
        columns of numbers their measurements (1 and 0 for True and False). Other columns are left out, as are empty
        polygons.
    path
        File to write (``.geojson`` or ``.json``).
    section
        Section of the shapes; by default the one section to which they have a transformation.
    overwrite
        Replace a file that is there.

    Returns
    -------
    ``None``. Writes the file. :func:`~spatial_impute.pp.add_cells` reads it.

    Raises
    ------
    KeyError
        If the shapes do not exist or belong to no section.
    FileExistsError
        If there is a file at `path` and `overwrite` is False.
    FileNotFoundError
        If the folder of `path` does not exist.
    ValueError
        If the shapes belong to several sections and `section` is not given, or `path` has another end.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack()
    >>> si.pp.segment_tissue(sdata, sections="s1")
    >>> si.tl.write_geojson(sdata, "s1_tissue_outline", "s1.geojson")
    >>> si.pp.add_cells(sdata, "s1", "s1.geojson", key_added="s1_again")
    """
    record = load_record(sdata)
    path = file_to_write(path, ends=(".geojson", ".json"), overwrite=overwrite)
    require_key(key, sdata.shapes, where="sdata.shapes")
    shapes = sdata.shapes[key]
    section = section_of(shapes, key, record, section)
    image = record[section].image
    require_key(image, sdata.images, where="sdata.images", then="The file has pixels of the image of the section.")
    to_pixels = np.linalg.inv(element_affine(sdata.images[image], section))
    features = _features(shapes, to_pixels @ element_affine(shapes, section))
    with written_whole(path) as part:
        part.write_text(json.dumps({"type": "FeatureCollection", "features": features}), encoding="utf-8")
    logger.info("Wrote %d objects in pixels of %r to %s", len(features), image, path)


def _features(shapes: GeoDataFrame, to_pixels: np.ndarray) -> list[dict[str, Any]]:
    import shapely

    shapes = shapes[~(shapes.geometry.is_empty | shapes.geometry.isna())]
    geometry = shapes.geometry.to_numpy()
    columns = pd.DataFrame(shapes.drop(columns=shapes.geometry.name))
    if are_circles(shapes):
        geometry = shapely.buffer(geometry, columns.pop("radius").to_numpy(float), quad_segs=_CORNERS)
    geometry = shapely.transform(geometry, lambda xy: apply_affine(xy, to_pixels).round(_DECIMALS))
    rows = columns.to_dict("records") if columns.columns.size else [{}] * len(columns)
    return [
        {"type": "Feature", "id": str(name), "geometry": shapely.geometry.mapping(one), "properties": _properties(row)}
        for name, one, row in zip(shapes.index, geometry, rows, strict=True)
    ]


def _properties(row: dict[Any, Any]) -> dict[str, Any]:
    """Properties as QuPath names them."""
    known = {key: "" if pd.isna(row.get(key, "")) else str(row.get(key, "")) for key in ("class", "name", "objectType")}
    numbers = {
        str(key): float(value)
        for key, value in row.items()
        if key not in known and isinstance(value, int | float | np.number) and np.isfinite(value)
    }
    found: dict[str, Any] = {"objectType": known["objectType"] or "annotation"}
    found |= {"classification": {"name": known["class"]}} if known["class"] else {}
    found |= {"name": known["name"]} if known["name"] else {}
    return found | ({"measurements": numbers} if numbers else {})
