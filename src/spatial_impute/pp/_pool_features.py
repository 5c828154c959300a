"""Features that another tool computed on tiles or spots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import shapely
from scipy.spatial import cKDTree

from spatial_impute._geometry import apply_affine, xy_of
from spatial_impute._keys import Keys
from spatial_impute._settings import logger
from spatial_impute._stack.elements import section_images, section_levels, spot_geometry
from spatial_impute._stack.record import load_record
from spatial_impute._stack.table import stack_table
from spatial_impute._validation import require_finite, require_key, require_unique
from spatial_impute.pp._add_cells import require_on_image
from spatial_impute.pp._extract_features import fields_layout, rows_of_sections, write_features

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

    from spatial_impute._stack.record import Section

_MOST_FAR = 0.5  # of the spots: above it, the positions are those of another image


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

    A field of view is described by the mean and the standard deviation of the tiles whose centre lies in it. If there
    is none, the nearest tile is used. Levels and tokens are those of :func:`extract_features`.

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
        - a row per spot, as array in the order of ``sdata.shapes["{section}_spots"]`` or as data frame by their names.
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
        For features that are not finite, have several widths, or have another number of rows than the spots, and for
        tiles that lie outside the image or far from the spots.

    Examples
    --------
    >>> import numpy as np
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack(extent=1400.0)
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
    if not isinstance(features, Mapping):
        msg = f"`features` must name the section of each entry, e.g. `{{'s0': ...}}`, found {type(features).__name__}."
        raise TypeError(msg)
    sections = [section for section in record.sections if section.spots is not None]
    spots = {section.name: spot_geometry(sdata, section) for section in sections}
    rows = rows_of_sections(table, {section: index for section, (_, _, index) in spots.items()})
    found, places = {}, {}
    for section in sections:
        require_key(section.name, features, where="features", then="Every section with spots needs features.")
        centers, radius, index = spots[section.name]
        given = features[section.name]
        if isinstance(given, pd.DataFrame):
            given = _by_name(given, index.astype(str), section.name)
        values, positions = _tiles(sdata, section, given, centers, features_key=features_key, spatial_key=spatial_key)
        places[section.name] = centers, 2 * float(np.median(radius))
        _require_near(positions, centers, region_scale * places[section.name][1], f"features[{section.name!r}]")
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
    finest = section_levels(sdata, section)[0]
    require_on_image(pixels, finest.shape, f"tiles of {where} lie outside `sdata.images[{section.image!r}]`")
    return values, apply_affine(pixels, finest.to_um)


def _by_name(frame: pd.DataFrame, ids: pd.Index, section: str) -> np.ndarray:
    """Rows of a data frame in the order of the spots."""
    require_unique(frame.index, name=f"The index of `features[{section!r}]`")
    rows = frame.index.astype(str).get_indexer(ids)
    if (rows < 0).any():
        msg = (
            f"`features[{section!r}]` has no row for {int((rows < 0).sum())} of {len(ids)} spots, the first is {ids[rows < 0][0]!r}. "
            "Its index must name the spots; give rows in the order of the spots as an array, `frame.to_numpy()`."
        )
        raise ValueError(msg)
    return frame.to_numpy()[rows]


def _require_near(positions: np.ndarray, centers: np.ndarray, field: float, where: str) -> None:
    """Raise a ``ValueError`` if most spots have no tile near them, and warn if some have none; lengths are in um."""
    spacing = np.median(cKDTree(positions).query(positions, k=[min(2, len(positions))])[0])
    far = cKDTree(positions).query(centers)[0] > max(field, 2 * spacing)
    if far.mean() > _MOST_FAR:
        msg = (
            f"{int(far.sum())} of {len(far)} spots have no tile of {where} near them. The positions must be x and y in pixels of "
            "the full resolution, and the tiles must cover the spots."
        )
        raise ValueError(msg)
    if far.any():
        logger.warning(
            "%d of %d spots have no tile of %s near them and get the nearest one", far.sum(), len(far), where
        )


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
