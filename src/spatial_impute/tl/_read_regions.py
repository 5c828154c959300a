"""Images, regions and tables of any SpatialData object as the plain arrays that PixNet sees."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from spatial_impute._expression import looks_like_counts
from spatial_impute._geometry import Frame, anisotropy, apply_affine, linear_scale, scaling
from spatial_impute._image.levels import image_levels
from spatial_impute._keys import Keys
from spatial_impute._stack.elements import element_affine
from spatial_impute._stack.record import load_record, require_spatialdata
from spatial_impute._validation import name_list, require_finite, require_key, require_positive
from spatial_impute.models.pixnet._region_weights import Discs, Polygons

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from spatialdata import SpatialData

    from spatial_impute._image.levels import Level
    from spatial_impute.models.pixnet._region_weights import Regions

_FINEST = 1e-3  # um per pixel; two hundred times finer than what a light microscope resolves
_MAX_STRETCH = 1.05  # beyond it circles would become ellipses


def find_frame(
    sdata: SpatialData, image_key: str, shapes_key: str | None, *, coordinate_system: str | None, mpp: float | None
) -> Frame:
    """Coordinate system of an image (and shapes), and its unit.

    Parameters
    ----------
    sdata
        Stack, or any object.
    image_key, shapes_key
        Elements that must be in it.
    coordinate_system
        As the user says; for an image of a stack, its section.
    mpp
        um per unit, as the user says; 1 for a stack.

    Raises
    ------
    KeyError
        If an element or the coordinate system does not exist.
    ValueError
        If coordinate system or unit are not clear.
    """
    from spatialdata.transformations import get_transformation

    require_spatialdata(sdata)
    require_key(image_key, sdata.images, where="sdata.images")
    if shapes_key is not None:
        require_key(shapes_key, sdata.shapes, where="sdata.shapes")
    section = None
    if Keys.STACK in sdata.attrs.get(Keys.ATTRS, {}):
        section = next((s.name for s in load_record(sdata).sections if s.image == image_key), None)
    if coordinate_system is None and section is not None:
        coordinate_system = section
    elements = {f"images[{image_key!r}]": sdata.images[image_key]}
    if shapes_key is not None:
        elements[f"shapes[{shapes_key!r}]"] = sdata.shapes[shapes_key]
    systems = {name: set(get_transformation(element, get_all=True)) for name, element in elements.items()}
    if coordinate_system is None:
        shared = sorted(set.intersection(*systems.values()))
        if len(shared) != 1:
            msg = (
                f"{' and '.join(f'`sdata.{name}`' for name in elements)} share the coordinate systems {shared}; say which "
                "one to use with `coordinate_system=`."
            )
            raise ValueError(msg)
        coordinate_system = shared[0]
    for name, found in systems.items():
        require_key(
            coordinate_system,
            found,
            where=f"coordinate systems of sdata.{name}",
            then="Add one with `spatialdata.transformations.set_transformation`.",
        )
    in_um = section is not None and coordinate_system in (section, Keys.ALIGNED)
    if mpp is None and not in_um:
        msg = (
            f"The unit of coordinate system {coordinate_system!r} is unknown: pass `mpp=` (um per unit; the pixel size of "
            "the full-resolution image where units are its pixels), or use a stack made by `si.pp.assemble_stack`."
        )
        raise ValueError(msg)
    return Frame(coordinate_system, 1.0 if mpp is None else require_positive(mpp, name="mpp", unit="um per unit"))


def read_levels(sdata: SpatialData, image_key: str, frame: Frame) -> list[Level]:
    """Resolutions of an image, finest first, with their maps to um.

    Raises
    ------
    ValueError
        If its pixels are too small to be those of a section.
    """
    element = sdata.images[image_key]
    levels = image_levels(element, scaling(frame.um) @ element_affine(element, frame.name))
    if not levels[0].pixel_size >= _FINEST:
        msg = (
            f"A pixel of `sdata.images[{image_key!r}]` has {levels[0].pixel_size:g} um in {frame.name!r}, less than light "
            "can show; check `mpp` and the transformation of the image."
        )
        raise ValueError(msg)
    return levels


def read_shapes(sdata: SpatialData, shapes_key: str, frame: Frame) -> tuple[Regions, pd.Index]:
    """Circles or polygons in um, and their ids.

    Raises
    ------
    ValueError
        If they are neither, hold NaN, or circles would become ellipses.
    """
    shapes = sdata.shapes[shapes_key]
    matrix = scaling(frame.um) @ element_affine(shapes, frame.name)
    where = f"sdata.shapes[{shapes_key!r}]"
    if not shapes.index.is_unique:
        msg = f"Ids of `{where}` must be unique, but {shapes.index[shapes.index.duplicated()][0]!r} is there more than once."
        raise ValueError(msg)
    kinds = set(shapes.geom_type.unique())
    if kinds == {"Point"} and "radius" in shapes:
        if anisotropy(matrix) > _MAX_STRETCH:
            msg = (
                f"The transformation of `{where}` to {frame.name!r} stretches one axis {anisotropy(matrix):.2f} times more "
                "than the other, so its circles have no radius in um."
            )
            raise ValueError(msg)
        points = np.column_stack([shapes.geometry.x, shapes.geometry.y])
        radius = shapes["radius"].to_numpy(float)
        require_finite(np.column_stack([points, radius]), name=where, row_names=shapes.index)
        if not (radius > 0).all():
            msg = f"Radii of `{where}` must be above 0; the first that is not: {shapes.index[radius <= 0][0]!r}."
            raise ValueError(msg)
        return Discs(apply_affine(points, matrix), radius * linear_scale(matrix)), shapes.index
    if kinds <= {"Polygon", "MultiPolygon"} and not shapes.geometry.is_empty.any():
        regions = Polygons.from_shapely(shapes.geometry.to_numpy())
        require_finite(regions.edges, name=where)
        return regions.moved(matrix), shapes.index
    msg = f"`{where}` must hold circles (points with a `radius` column) or polygons, none empty; found {sorted(kinds)}."
    raise ValueError(msg)


def annotating_table(sdata: SpatialData, shapes_key: str, table_key: str | None) -> str:
    """Name of the table whose rows are these shapes; the stack table where there is one.

    Raises
    ------
    KeyError
        If there is none, or not the one asked for.
    ValueError
        If there are several and none is asked for.
    """
    if table_key is not None:
        require_key(table_key, sdata.tables, where="sdata.tables")
    names = []
    for key, table in sdata.tables.items():
        attrs = table.uns.get("spatialdata_attrs", {})
        region = attrs.get("region")
        if shapes_key in ([region] if isinstance(region, str) else list(region or [])):
            names.append(key)
    if table_key is None and Keys.STACK_TABLE in names:
        table_key = Keys.STACK_TABLE
    if table_key is None and len(names) > 1:
        msg = f"`sdata.shapes[{shapes_key!r}]` has several tables {sorted(names)}; choose with `table_key=`."
        raise ValueError(msg)
    table_key = names[0] if table_key is None and names else table_key
    require_key(str(table_key), names, where=f"tables that annotate sdata.shapes[{shapes_key!r}]")
    return table_key


@dataclass(frozen=True)
class Measured:
    """Measured regions of one element."""

    rows: np.ndarray
    """(n,) positions in the shapes element."""
    values: np.ndarray
    """(n, n_genes) float64."""
    var_names: list[str]
    units: str

    def take(self, kept: np.ndarray) -> Measured:
        """Some of the regions, by (n,) bool."""
        return replace(self, rows=self.rows[kept], values=self.values[kept])


def read_measured(
    sdata: SpatialData,
    shapes_key: str,
    index: pd.Index,
    *,
    table_key: str | None,
    layer: str | None,
    genes: Sequence[str] | None,
    target_sum: float | None,
    counts: bool,
) -> Measured:
    """Expression of the shapes that were measured, joined by id.

    In the stack table ``obs["measured"]`` alone decides which rows are read; of other tables all rows are.

    Raises
    ------
    KeyError
        If table, layer or genes do not exist.
    ValueError
        If nothing is measured, values are not finite, or are counts where log values are expected or the reverse.
    """
    from scipy import sparse

    key = annotating_table(sdata, shapes_key, table_key)
    table = sdata.tables[key]
    attrs = table.uns["spatialdata_attrs"]
    rows = (table.obs[attrs["region_key"]].astype(str) == shapes_key).to_numpy()
    is_stack = Keys.MEASURED in table.obs and key == Keys.STACK_TABLE
    if is_stack:
        rows = rows & table.obs[Keys.MEASURED].to_numpy(bool)
        layer = Keys.MEASURED if layer is None else layer
    where = f"sdata.tables[{key!r}]" + (".X" if layer is None else f".layers[{layer!r}]")
    if layer is not None:
        require_key(layer, table.layers, where=f"sdata.tables[{key!r}].layers", then=_SELECT if is_stack else None)
    matrix = table.X if layer is None else table.layers[layer]
    if matrix is None:
        msg = f"`{where}` is empty; name the layer that holds expression with `layer=`, one of {sorted(table.layers)}."
        raise ValueError(msg)
    place = pd.Index(index.astype(str)).get_indexer(table.obs[attrs["instance_key"]].astype(str))
    rows = rows & (place >= 0)
    if not rows.any():
        msg = (
            f"None of the {len(index)} shapes of `sdata.shapes[{shapes_key!r}]` was measured: no row of "
            f"`sdata.tables[{key!r}]` {'with `obs[measured]` true ' if is_stack else ''}names one of them."
        )
        raise ValueError(msg)
    if pd.Index(place[rows]).has_duplicates:
        repeated = index[place[rows][pd.Index(place[rows]).duplicated()][0]]
        msg = f"Several rows of `sdata.tables[{key!r}]` annotate the shape {repeated!r} of {shapes_key!r}; keep one of them."
        raise ValueError(msg)
    if not table.var_names.is_unique:
        repeated = table.var_names[table.var_names.duplicated()][0]
        msg = f"`sdata.tables[{key!r}].var_names` must be unique, found {repeated!r} twice; `var_names_make_unique()` helps."
        raise ValueError(msg)
    names = [str(g) for g in (table.var_names if genes is None else name_list(genes, name="genes"))]
    if not names:
        msg = "`genes` is empty; name some, or leave it out for all."
        raise ValueError(msg)
    for gene in names:
        require_key(gene, table.var_names, where=f"sdata.tables[{key!r}].var_names")
    values = matrix[np.flatnonzero(rows)]
    values, units = _to_units(values, table, where, target_sum=target_sum, counts=counts)
    values = values[:, table.var_names.get_indexer(names)]
    values = np.asarray(values.toarray() if sparse.issparse(values) else values, dtype=np.float64)
    require_finite(values, name=f"`{where}`", row_names=table.obs_names[rows])
    return Measured(place[rows], values, names, units)


_SELECT = "Write it with `si.pp.select_genes(sdata)`."


def _to_units(
    values: object, table: AnnData, where: str, *, target_sum: float | None, counts: bool
) -> tuple[object, str]:
    """Check what the values are and bring them to what the loss wants."""
    from scipy import sparse

    from spatial_impute._expression import log_normalize

    data = values.data if sparse.issparse(values) else np.asarray(values)
    raw = looks_like_counts(data)
    if counts:
        if not raw:
            msg = f"Losses for counts need raw counts in `{where}`, found other values. Name their layer or table."
            raise ValueError(msg)
        return values, "counts"
    if target_sum is not None:
        target_sum = require_positive(target_sum, name="target_sum")
        if not raw:
            msg = (
                f"`target_sum` normalises raw counts, but `{where}` does not hold counts. Leave it out for log values."
            )
            raise ValueError(msg)
        return log_normalize(values, target_sum), f"log1p of counts per {target_sum:g} (all genes)"
    if raw:
        msg = (
            f"`{where}` holds raw counts (integers up to {data.max():g}); log-normalised expression is expected. Use "
            "`si.pp.select_genes(sdata)` on a stack, pass `target_sum=1e4` to normalise over all genes of the table, or "
            'take a loss for counts (`model_params={"loss": "poisson"}`).'
        )
        raise ValueError(msg)
    return values, str(table.uns.get(Keys.NORMALIZATION, {}).get("units", "as given"))
