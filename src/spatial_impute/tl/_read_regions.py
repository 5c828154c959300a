"""Images, regions and tables of any SpatialData object as the plain arrays that PixNet uses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse
from spatialdata.transformations import get_transformation

from spatial_impute._expression import log_normalize, looks_like_counts, require_amounts
from spatial_impute._geometry import Frame, anisotropy, apply_affine, linear_scale, scaling
from spatial_impute._image.levels import image_levels
from spatial_impute._keys import Keys
from spatial_impute._settings import logger
from spatial_impute._stack.elements import element_affine
from spatial_impute._stack.record import load_record, require_spatialdata
from spatial_impute._stack.state import fingerprint, image_state, measurement_problems, warn
from spatial_impute._validation import name_list, require_finite, require_key, require_positive, require_unique
from spatial_impute.models.pixnet._region_weights import Discs, Polygons

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from spatialdata import SpatialData

    from spatial_impute._image.levels import Level
    from spatial_impute._stack.record import Section
    from spatial_impute.models import PixNetModel
    from spatial_impute.models.pixnet._region_weights import Regions

_FINEST = 1e-3  # um per pixel; two hundred times finer than what a light microscope resolves
_MAX_STRETCH = 1.05  # beyond it circles would become ellipses


@dataclass(frozen=True)
class ExpressionChoice:
    """Expression to read, as the user gave it."""

    layer: str | None = None
    genes: Sequence[str] | None = None
    target_sum: float | None = None
    counts: bool = False  # Raw counts are needed, not log values


def find_frame(
    sdata: SpatialData,
    image_key: str,
    shapes_key: str | None,
    coordinate_system: str | None = None,
    mpp: float | None = None,
) -> Frame:
    """Coordinate system of an image (and shapes), and its unit; by default those of the stack.

    Raises a ``ValueError`` if one of them is not clear.
    """
    require_spatialdata(sdata)
    require_key(image_key, sdata.images, where="sdata.images")
    elements = {f"images[{image_key!r}]": sdata.images[image_key]}
    if shapes_key is not None:
        require_key(shapes_key, sdata.shapes, where="sdata.shapes")
        elements[f"shapes[{shapes_key!r}]"] = sdata.shapes[shapes_key]
    section = next((s.name for s in stack_sections(sdata) if s.image == image_key), None)
    systems = {name: set(get_transformation(element, get_all=True)) for name, element in elements.items()}
    name = section if coordinate_system is None else coordinate_system
    if name is None:
        shared = sorted(set.intersection(*systems.values()))
        if len(shared) != 1:
            msg = (
                f"{' and '.join(f'`sdata.{element}`' for element in systems)} share the coordinate systems {shared}; "
                "choose one with `coordinate_system=`."
            )
            raise ValueError(msg)
        name = shared[0]
    for element, found in systems.items():
        then = "Add one with `spatialdata.transformations.set_transformation`."
        require_key(name, found, where=f"coordinate systems of sdata.{element}", then=then)
    if mpp is not None:
        return Frame(name, require_positive(mpp, name="mpp", unit="um per unit"))
    if section is None or name not in (section, Keys.ALIGNED):
        msg = (
            f"The unit of coordinate system {name!r} is unknown. Pass `mpp=` (um per unit; if a unit is a pixel of the "
            "full-resolution image, its pixel size), or use a stack made by `si.pp.assemble_stack`."
        )
        raise ValueError(msg)
    return Frame(name, 1.0)


def stack_sections(sdata: SpatialData) -> tuple[Section, ...]:
    """Sections of the stack; none for an object that is not a stack."""
    return load_record(sdata).sections if Keys.STACK in sdata.attrs.get(Keys.ATTRS, {}) else ()


def dense_maps(sdata: SpatialData) -> dict[str, Any]:
    """Records of the dense maps that :func:`~spatial_impute.tl.predict_dense` wrote to this object."""
    return sdata.attrs.get(Keys.ATTRS, {}).get(Keys.DENSE, {})


def read_levels(sdata: SpatialData, image_key: str, frame: Frame) -> list[Level]:
    """Resolutions of an image, finest first, with their maps to um; a ``ValueError`` for impossibly small pixels."""
    element = sdata.images[image_key]
    levels = image_levels(element, scaling(frame.um) @ element_affine(element, frame.name))
    if not levels[0].pixel_size >= _FINEST:
        msg = (
            f"A pixel of `sdata.images[{image_key!r}]` has {levels[0].pixel_size:g} um in {frame.name!r}, less than "
            "light can show. Check `mpp` and the transformation of the image."
        )
        raise ValueError(msg)
    return levels


def read_shapes(sdata: SpatialData, shapes_key: str, frame: Frame) -> tuple[Regions, pd.Index]:
    """Circles or polygons in um, and their ids; a ``ValueError`` for other shapes or values that are not finite."""
    shapes = sdata.shapes[shapes_key]
    matrix = scaling(frame.um) @ element_affine(shapes, frame.name)
    where = f"sdata.shapes[{shapes_key!r}]"
    require_unique(shapes.index, name=f"Ids of `{where}`")
    kinds = set(shapes.geom_type.unique())
    if kinds == {"Point"} and "radius" in shapes:
        if anisotropy(matrix) > _MAX_STRETCH:
            msg = (
                f"The transformation of `{where}` to {frame.name!r} stretches one axis {anisotropy(matrix):.2f} times "
                "more than the other, so its circles have no radius in um."
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
    """Name of the table whose rows are these shapes; by default the stack table, or the only table.

    Raises a ``KeyError`` if there is no such table, a ``ValueError`` if there are several and `table_key` is None.
    """
    if table_key is not None:
        require_key(table_key, sdata.tables, where="sdata.tables")
    names = []
    for key, table in sdata.tables.items():
        region = table.uns.get("spatialdata_attrs", {}).get("region")
        if shapes_key in ([region] if isinstance(region, str) else list(region or [])):
            names.append(key)
    if table_key is None and Keys.STACK_TABLE in names:
        return Keys.STACK_TABLE
    if table_key is None and len(names) > 1:
        msg = f"`sdata.shapes[{shapes_key!r}]` has several tables {sorted(names)}; choose one with `table_key=`."
        raise ValueError(msg)
    table_key = names[0] if table_key is None and names else table_key
    require_key(str(table_key), names, where=f"tables that annotate sdata.shapes[{shapes_key!r}]")
    return str(table_key)


@dataclass(frozen=True)
class Measured:
    """Measured regions of one element."""

    rows: np.ndarray  # (n,) positions in the shapes element
    values: np.ndarray  # (n, n_genes) float64
    var_names: list[str]
    units: str

    def take(self, chosen: np.ndarray) -> Measured:
        """Some of the regions, by an (n,) bool mask."""
        return replace(self, rows=self.rows[chosen], values=self.values[chosen])


def read_measured(
    sdata: SpatialData, shapes_key: str, index: pd.Index, table_key: str | None, choice: ExpressionChoice
) -> Measured:
    """Expression of the measured shapes, joined by id.

    Rows of the stack table are read if ``obs["measured"]`` is True, rows of other tables always. Raises a
    ``ValueError`` if nothing is measured, or values are not finite, or not of the wanted kind (counts or log values).
    """
    key = annotating_table(sdata, shapes_key, table_key)
    table, where = sdata.tables[key], f"sdata.tables[{key!r}]"
    is_stack = Keys.MEASURED in table.obs and key == Keys.STACK_TABLE
    layer = Keys.MEASURED if is_stack and choice.layer is None else choice.layer
    if is_stack and layer == Keys.MEASURED and Keys.STACK in sdata.attrs.get(Keys.ATTRS, {}):
        warn(measurement_problems(sdata, load_record(sdata), table))
    if layer is not None:
        then = "Write it with `si.pp.select_genes(sdata)`." if is_stack else None
        require_key(layer, table.layers, where=f"{where}.layers", then=then)
    slot = where + (".X" if layer is None else f".layers[{layer!r}]")
    matrix = table.X if layer is None else table.layers[layer]
    if matrix is None:
        msg = f"`{slot}` is empty; name the layer that holds expression with `layer=`, one of {sorted(table.layers)}."
        raise ValueError(msg)
    rows, place = _measured_rows(table, shapes_key, index, where, is_stack=is_stack)
    columns = _columns(table, choice.genes, where)
    values, units = _to_units(matrix[np.flatnonzero(rows)], table, slot, choice)
    values = values[:, columns]
    values = np.asarray(values.toarray() if sparse.issparse(values) else values, dtype=np.float64)
    require_finite(values, name=f"`{slot}`", row_names=table.obs_names[rows])
    return Measured(place, values, [str(gene) for gene in table.var_names[columns]], units)


def _measured_rows(
    table: AnnData, shapes_key: str, index: pd.Index, where: str, *, is_stack: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Mask of the rows of the table that are measured shapes, and the positions of these shapes."""
    attrs = table.uns["spatialdata_attrs"]
    rows = (table.obs[attrs["region_key"]].astype(str) == shapes_key).to_numpy()
    if is_stack:
        rows = rows & table.obs[Keys.MEASURED].to_numpy(bool)
    place = pd.Index(index.astype(str)).get_indexer(table.obs[attrs["instance_key"]].astype(str))
    rows = rows & (place >= 0)
    if not rows.any():
        msg = (
            f"None of the {len(index)} shapes of `sdata.shapes[{shapes_key!r}]` was measured: no row of "
            f"`{where}` {'with `obs[measured]` true ' if is_stack else ''}names one of them."
        )
        raise ValueError(msg)
    repeated = pd.Index(place[rows]).duplicated()
    if repeated.any():
        shape = index[place[rows][repeated][0]]
        msg = f"Several rows of `{where}` annotate the shape {shape!r} of {shapes_key!r}; keep one of them."
        raise ValueError(msg)
    return rows, place[rows]


def _columns(table: AnnData, genes: Sequence[str] | None, where: str) -> np.ndarray:
    """Columns of the genes to read; by default all."""
    if not table.var_names.is_unique:
        repeated = table.var_names[table.var_names.duplicated()][0]
        msg = f"`{where}.var_names` must be unique, found {repeated!r} twice; `var_names_make_unique()` helps."
        raise ValueError(msg)
    names = list(table.var_names) if genes is None else name_list(genes, name="genes")
    if not names:
        msg = "`genes` is empty; name some, or leave it out for all."
        raise ValueError(msg)
    for gene in names:
        require_key(gene, table.var_names, where=f"{where}.var_names")
    return table.var_names.get_indexer(names)


def _to_units(values: Any, table: AnnData, where: str, choice: ExpressionChoice) -> tuple[Any, str]:
    """Values in the units that the loss needs, and the name of these units."""
    data = values.data if sparse.issparse(values) else np.asarray(values)
    require_amounts(data, where=where)
    raw = looks_like_counts(data)
    if choice.counts:
        if not raw:
            msg = f"Losses for counts need raw counts, found other values in `{where}`. Name the layer or table with counts."
            raise ValueError(msg)
        return values, "counts"
    if choice.target_sum is not None:
        target_sum = require_positive(choice.target_sum, name="target_sum")
        if not raw:
            msg = f"`target_sum` normalises raw counts, but `{where}` does not hold counts. Omit it for log values."
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


def slide_state(
    sdata: SpatialData, image_key: str, frame: Frame, regions: Regions, measured: Measured
) -> dict[str, Any]:
    """Fingerprints of an image, of all its regions, and of the expression of those that were measured."""
    return {
        "coordinate_system": frame.name,
        "um": float(frame.um),
        "image": image_state(sdata, image_key, frame.name),
        "shapes": fingerprint(regions.centers, regions.area),
        "measured": fingerprint(regions.centers[measured.rows], measured.values),
    }


def warn_of_changed_slides(sdata: SpatialData, model: PixNetModel) -> None:
    """Warn if a slide that the model was fitted on is in this object, and has changed since."""
    for entry in model.config["trained_on"]:
        if entry["image"] not in sdata.images or entry["shapes"] not in sdata.shapes:
            continue
        then = entry[Keys.STATE]
        read = dict(then["read"])
        frame = Frame(then["coordinate_system"], then["um"])
        try:
            regions, index = read_shapes(sdata, entry["shapes"], frame)
            table_key = read.pop("table_key")
            measured = read_measured(
                sdata, entry["shapes"], index, table_key, ExpressionChoice(**{**read, "genes": model.var_names})
            )
            now = slide_state(sdata, entry["image"], frame, regions, measured)
        except (KeyError, ValueError) as error:
            logger.warning(
                "What the model was fitted on, %r and %r, cannot be compared with the present data: %s",
                entry["image"],
                entry["shapes"],
                error,
            )
            continue
        changed = [key for key in ("image", "shapes", "measured") if now[key] != then[key]]
        # Another slide may have elements of the same names, and spots on the same grid.
        another_slide = {"image", "measured"} <= set(changed)
        if changed and not another_slide:
            logger.warning(
                "The model was fitted on %r and %r before their %s changed. Fit it again with `si.tl.fit_pixnet`.",
                entry["image"],
                entry["shapes"],
                ", ".join(changed),
            )
