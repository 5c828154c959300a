"""Make one stack out of the files and objects that people have. The only reader of foreign SpatialData objects."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spatial_impute._geometry import linear_scale
from spatial_impute._image_io import open_image
from spatial_impute._keys import Keys
from spatial_impute._logging import logger
from spatial_impute._stack import Section, StackRecord, build_stack_table, element_affine, save_record
from spatial_impute._validation import require_key, require_positive

if TYPE_CHECKING:
    from anndata import AnnData
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData
    from xarray import DataArray, DataTree

    SectionInput = SpatialData | DataArray | DataTree | np.ndarray | str | Path

_LEGAL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def assemble_stack(
    sections: Mapping[str, SectionInput] | Sequence[tuple[str, SectionInput]],
    *,
    mpp: float | Mapping[str, float] | None = None,
    z: Sequence[float] | Mapping[str, float] | None = None,
    section_spacing: float | None = None,
    reference: str | None = None,
    spot_pitch: float | None = None,
    coordinate_system: str | Mapping[str, str] | None = None,
    image_key: str | Mapping[str, str] | None = None,
    shapes_key: str | Mapping[str, str] | None = None,
    table_key: str | Mapping[str, str] | None = None,
) -> SpatialData:
    """Assemble serial sections into one SpatialData object under the data contract of the stack.

    Each section becomes a coordinate system in micrometres, named after the section. Images stay lazy. A section
    whose input carries a table counts as measured; its counts are copied to a table of their own.

    Parameters
    ----------
    sections
        Section names in their order in the block, each with an image file (TIFF, OME-TIFF, SVS, PNG, JPEG, OME-Zarr),
        an image as array ((y, x, 3), (c, y, x) or (y, x)) or DataArray / DataTree, or a SpatialData object such as
        ``spatialdata_io.visium`` returns.
    mpp
        Micrometres per pixel of the images; per unit of `coordinate_system` for SpatialData objects (a full-resolution
        pixel in those of ``spatialdata_io``). One number or one per section. If missing, it is read from the metadata
        of the file or derived from `spot_pitch`.
    z
        Height of each section in um.
    section_spacing
        Distance of consecutive sections in um, instead of `z`.
    reference
        Section whose frame the others are brought to; by default the first measured one, else the middle one.
    spot_pitch
        Centre-to-centre distance of neighbouring spots in um (100 for Visium), from which the pixel size of SpatialData
        objects is derived where `mpp` is missing.
    coordinate_system
        Coordinate system to read from SpatialData objects; may be left out if there is only one, or one ``"global"``.
    image_key, shapes_key, table_key
        Elements to take from SpatialData objects; by default the image of the highest resolution, the only circles
        (if any) and the only table that annotates them. One name, or one per section.

    Returns
    -------
    A new SpatialData object; the inputs are left as they are. It holds

    `images["{section}_image"]`
        The H&E image, transformed to the coordinate system `section` (um).
    `shapes["{section}_spots"]`
        The spots as circles, where the input has some.
    `tables["{section}_counts"]`
        The measured table as it came, where the input has one.
    `tables["stack"]`
        One row per spot of all sections: obs ``section``, ``z``, ``measured``; obsm ``spatial`` (um).
    `attrs["spatial_impute"]["stack"]`
        The stack record (JSON).

    Raises
    ------
    ValueError
        For missing pixel sizes or heights, duplicate or illegal names, the same image given twice, ambiguous elements.
    KeyError
        For elements or coordinate systems that do not exist.

    Examples
    --------
    >>> import numpy as np
    >>> import spatial_impute as si
    >>> scans = {name: np.full((300, 400, 3), 230, dtype=np.uint8) for name in ("top", "bottom")}
    >>> sdata = si.pp.assemble_stack(scans, mpp=2.0, section_spacing=10.0)
    >>> sorted(sdata.coordinate_systems)
    ['bottom', 'top']
    """
    from spatialdata import SpatialData

    inputs = _named_inputs(sections)
    names = list(inputs)
    heights = _heights(names, z, section_spacing)
    for argument, value in {
        "mpp": mpp,
        "coordinate_system": coordinate_system,
        "image_key": image_key,
        "shapes_key": shapes_key,
        "table_key": table_key,
    }.items():
        for name in value if isinstance(value, Mapping) else ():
            require_key(name, names, where="sections", then=f"`{argument}` names a section that is not there.")
    sdata = SpatialData()
    records = []
    for name in names:
        parts = _read_section(
            name,
            inputs[name],
            mpp=_for_section(mpp, name),
            spot_pitch=spot_pitch,
            coordinate_system=_for_section(coordinate_system, name),
            image_key=_for_section(image_key, name),
            shapes_key=_for_section(shapes_key, name),
            table_key=_for_section(table_key, name),
        )
        sdata.images[Keys.image(name)] = parts.image
        if parts.spots is not None:
            sdata.shapes[Keys.spots(name)] = parts.spots
        if parts.counts is not None:
            sdata.tables[Keys.counts(name)] = parts.counts
        records.append(
            Section(
                name=name,
                z=heights[name],
                mpp=parts.mpp,
                mpp_source=parts.mpp_source,
                image=Keys.image(name),
                spots=None if parts.spots is None else Keys.spots(name),
                counts=None if parts.counts is None else Keys.counts(name),
            )
        )
    measured = [record.name for record in records if record.counts is not None]
    if reference is None:
        reference = measured[0] if measured else names[len(names) // 2]
    require_key(reference, names, where="sections")
    record = StackRecord(tuple(records), reference=reference, version=version("spatial-impute"))
    save_record(sdata, record)
    build_stack_table(sdata, record)
    return sdata


@dataclass
class _Parts:
    image: DataArray | DataTree
    mpp: float
    mpp_source: str
    spots: GeoDataFrame | None = None
    counts: AnnData | None = None


def _named_inputs(sections: Mapping[str, Any] | Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Check names and inputs; refuse duplicates of either."""
    pairs = list(sections.items() if isinstance(sections, Mapping) else sections)
    if not pairs:
        msg = "`sections` is empty; expected a mapping of section names to images or SpatialData objects."
        raise ValueError(msg)
    seen_names: set[str] = set()
    seen_inputs: dict[object, str] = {}
    for name, value in pairs:
        if not isinstance(name, str) or not _LEGAL_NAME.fullmatch(name):
            msg = (
                f"Section names are letters, digits, '_', '-' and '.', starting with a letter or digit; found {name!r}."
            )
            raise ValueError(msg)
        if name == Keys.ALIGNED:
            msg = f"{name!r} is the name of the frame that all sections share after registration; rename the section."
            raise ValueError(msg)
        if name.lower() in seen_names:
            msg = f"Duplicate section name {name!r} (SpatialData compares names without regard to case)."
            raise ValueError(msg)
        seen_names.add(name.lower())
        identity = str(Path(value).resolve()) if isinstance(value, str | Path) else id(value)
        if identity in seen_inputs:
            msg = (
                f"Sections {seen_inputs[identity]!r} and {name!r} are the same input; each section needs its own image."
            )
            raise ValueError(msg)
        seen_inputs[identity] = name
    return dict(pairs)


def _heights(names: list[str], z: object, section_spacing: float | None) -> dict[str, float]:
    if (z is None) == (section_spacing is None):
        msg = "Give the heights of the sections: either `z` (um, one per section) or `section_spacing` (um)."
        raise ValueError(msg)
    if z is None:
        spacing = require_positive(section_spacing, name="section_spacing", unit="um")
        return {name: i * spacing for i, name in enumerate(names)}
    if isinstance(z, Mapping):
        for name in names:
            require_key(name, z, where="z")
        values = [z[name] for name in names]
    else:
        values = list(z)
    if len(values) != len(names) or not np.isfinite(np.asarray(values, dtype=float)).all():
        msg = f"`z` must hold one finite number per section ({len(names)}), found {values!r}."
        raise ValueError(msg)
    return {name: float(value) for name, value in zip(names, values, strict=True)}


def _for_section(value: Any, name: str) -> Any:
    """Value for one section of an argument that is a scalar or a mapping of section names."""
    return value.get(name) if isinstance(value, Mapping) else value


def _read_section(name: str, value: SectionInput, **options: Any) -> _Parts:
    from spatialdata import SpatialData

    if isinstance(value, SpatialData):
        return _from_spatialdata(name, value, **options)
    mpp, source = options["mpp"], "argument"
    if isinstance(value, str | Path):
        opened = open_image(value)
        levels = opened.levels
        if mpp is None:
            mpp, source = opened.mpp, "metadata"
    else:
        levels = _array_levels(name, value)
    if mpp is None:
        msg = (
            f"Pixel size of section {name!r} is unknown: its image carries no physical size. "
            f"Pass `mpp=` (um per pixel), e.g. `mpp={{{name!r}: 0.5}}`."
        )
        raise ValueError(msg)
    mpp = require_positive(mpp, name=f"mpp of section {name!r}", unit="um per pixel")
    return _Parts(image_element(levels, name, mpp), mpp, source)


def _array_levels(name: str, value: object) -> list[Any]:
    """(c, y, x) arrays of an image given as ndarray, dask array, DataArray or DataTree; finest first."""
    if hasattr(value, "children") and hasattr(value, "to_dict"):
        return [
            level
            for child in value.children.values()
            for level in _array_levels(name, next(iter(child.ds.data_vars.values())))
        ]
    if hasattr(value, "dims") and hasattr(value, "transpose") and {"y", "x"} <= set(value.dims):
        return [(value if "c" in value.dims else value.expand_dims("c")).transpose("c", "y", "x").data]
    shape = getattr(value, "shape", None)
    if shape is None or len(shape) not in (2, 3):
        msg = (
            f"Section {name!r}: expected a SpatialData, an image path or an image array ((y, x, 3), (c, y, x) or (y, x)), "
            f"found {type(value).__name__}{'' if shape is None else f' of shape {tuple(shape)}'}."
        )
        raise ValueError(msg)
    if len(shape) == 2:
        return [value[None]]
    return [value.transpose(2, 0, 1)] if shape[-1] in (1, 3, 4) and shape[0] not in (1, 3, 4) else [value]


def image_element(levels: list[Any], name: str, mpp: float) -> DataArray | DataTree:
    """Image element whose transformation to the section is the scale by `mpp`; multi-scale if there are levels."""
    import xarray as xr
    from spatialdata.models import Image2DModel
    from spatialdata.transformations import Scale

    channels = {1: ["grey"], 3: ["r", "g", "b"], 4: ["r", "g", "b", "a"]}.get(levels[0].shape[0])
    if channels is None or 0 in levels[0].shape:
        msg = (
            f"Section {name!r}: an H&E image has 1, 3 or 4 channels and at least one pixel; found an array of shape "
            f"{tuple(levels[0].shape)} (c, y, x)."
        )
        raise ValueError(msg)
    elements = []
    for level in levels:
        factor = (round(levels[0].shape[2] / level.shape[2]) if len(levels) > 1 else 1) * mpp
        scale = Scale([factor, factor], axes=("x", "y"))
        elements.append(
            Image2DModel.parse(level, dims=("c", "y", "x"), c_coords=channels, transformations={name: scale})
        )
    if len(elements) == 1:
        return elements[0]
    return xr.DataTree.from_dict({f"scale{i}": xr.Dataset({"image": e}) for i, e in enumerate(elements)})


def _from_spatialdata(
    name: str,
    source: SpatialData,
    *,
    mpp: float | None,
    spot_pitch: float | None,
    coordinate_system: str | None,
    image_key: str | None,
    shapes_key: str | None,
    table_key: str | None,
) -> _Parts:
    """Take image, spots and table of one section out of somebody else's object."""
    where = f"sections[{name!r}]"
    system = _choose_system(source, coordinate_system, where)
    image_key = _choose_image(source, image_key, system, where)
    shapes_key = _choose_circles(source, shapes_key, system, where)
    image = source.images[image_key]
    if mpp is not None:
        mpp_source = "argument"
    elif spot_pitch is not None and shapes_key is not None:
        mpp, mpp_source = _mpp_from_pitch(source.shapes[shapes_key], system, spot_pitch), "spot pitch"
    else:
        msg = (
            f"Pixel size of {where} is unknown. Pass `mpp=` (um per unit of its coordinate system {system!r}) or, for "
            "spots on a regular lattice, `spot_pitch=` (um, 100 for Visium)."
        )
        raise ValueError(msg)
    mpp = require_positive(mpp, name=f"mpp of section {name!r}", unit="um per pixel")
    parts = _Parts(
        image=_moved(image, system, name, mpp),
        mpp=linear_scale(element_affine(image, system)) * mpp,
        mpp_source=mpp_source,
    )
    if shapes_key is not None:
        parts.spots = _moved(source.shapes[shapes_key], system, name, mpp)
        # One table annotates the spots of all sections, so their ids must be of one type; barcodes are strings.
        parts.spots.index = parts.spots.index.astype(str)
        parts.counts = _take_counts(source, shapes_key, table_key, name, where)
    return parts


def _choose_system(source: SpatialData, wanted: str | None, where: str) -> str:
    systems = list(source.coordinate_systems)
    if wanted is not None:
        require_key(wanted, systems, where=f"{where}.coordinate_systems")
        return wanted
    if len(systems) == 1 or "global" in systems:
        return systems[0] if len(systems) == 1 else "global"
    msg = f"{where} has the coordinate systems {systems}; say which one to read with `coordinate_system=`."
    raise ValueError(msg)


def _in_system(element: object, system: str) -> bool:
    from spatialdata.transformations import get_transformation

    return system in get_transformation(element, get_all=True)


def _choose_image(source: SpatialData, wanted: str | None, system: str, where: str) -> str:
    if wanted is not None:
        require_key(wanted, source.images, where=f"{where}.images")
        return wanted
    keys = [key for key, element in source.images.items() if _in_system(element, system)]
    if not keys:
        msg = f"{where} has no image in the coordinate system {system!r}; images: {sorted(source.images)}."
        raise ValueError(msg)
    # The finest image: the fewest units of the coordinate system per pixel.
    best = min(keys, key=lambda key: linear_scale(element_affine(source.images[key], system)))
    if len(keys) > 1:
        logger.info("%s: taking the finest image %r of %s", where, best, sorted(keys))
    return best


def _choose_circles(source: SpatialData, wanted: str | None, system: str, where: str) -> str | None:
    if wanted is not None:
        require_key(wanted, source.shapes, where=f"{where}.shapes")
        return wanted
    keys = [key for key, shape in source.shapes.items() if "radius" in shape and _in_system(shape, system)]
    if len(keys) > 1:
        msg = f"{where} has several circle elements {sorted(keys)}; say which ones are the spots with `shapes_key=`."
        raise ValueError(msg)
    return keys[0] if keys else None


def _mpp_from_pitch(circles: GeoDataFrame, system: str, spot_pitch: float) -> float:
    """Units of the pitch per unit of the coordinate system, from the median distance to the nearest neighbour."""
    from scipy.spatial import cKDTree

    pitch = require_positive(spot_pitch, name="spot_pitch", unit="um")
    if len(circles) < 2:
        msg = f"`spot_pitch` needs at least two spots to compare with, found {len(circles)}; pass `mpp=`."
        raise ValueError(msg)
    centers = np.column_stack([circles.geometry.x, circles.geometry.y])
    nearest = cKDTree(centers).query(centers, k=2)[0][:, 1]
    return pitch / (float(np.median(nearest)) * linear_scale(element_affine(circles, system)))


def _moved(element: Any, system: str, name: str, mpp: float) -> Any:
    """Shallow copy of an element whose only transformation goes to the section's frame in um."""
    from spatialdata.transformations import Scale, Sequence, get_transformation, set_transformation

    to_system = get_transformation(element, to_coordinate_system=system)
    copy = element.copy()
    copy.attrs = dict(copy.attrs)
    to_section = Sequence([to_system, Scale([mpp, mpp], axes=("x", "y"))])
    set_transformation(copy, {name: to_section}, set_all=True)
    return copy


def _take_counts(source: SpatialData, shapes_key: str, table_key: str | None, name: str, where: str) -> AnnData | None:
    """Copy of the rows of the table that annotate the spots, re-labelled for the stack."""
    from spatialdata.models import TableModel

    annotating = {}
    for key, table in source.tables.items():
        attrs = table.uns.get("spatialdata_attrs", {})
        regions = attrs.get("region")
        if shapes_key in ([regions] if isinstance(regions, str) else list(regions or [])):
            annotating[key] = table
    if table_key is not None:
        require_key(table_key, source.tables, where=f"{where}.tables")
        require_key(table_key, annotating, where=f"tables of {where} that annotate {shapes_key!r}")
        annotating = {table_key: annotating[table_key]}
    if not annotating:
        return None
    if len(annotating) > 1:
        msg = f"{where} has several tables {sorted(annotating)} for {shapes_key!r}; choose with `table_key=`."
        raise ValueError(msg)
    table = next(iter(annotating.values()))
    attrs = table.uns["spatialdata_attrs"]
    rows = (table.obs[attrs["region_key"]] == shapes_key).to_numpy()
    counts = table[rows].copy()
    if not counts.var_names.is_unique:
        logger.warning("%s: gene names are not unique; numbering the repeated ones", where)
        counts.var_names_make_unique()
    instance = counts.obs[attrs["instance_key"]].to_numpy().astype(str)
    counts.obs = counts.obs.drop(columns=[attrs["region_key"], attrs["instance_key"]])
    counts.obs[Keys.REGION] = Keys.spots(name)
    counts.obs[Keys.REGION] = counts.obs[Keys.REGION].astype("category")
    counts.obs[Keys.INSTANCE] = pd.array(instance, dtype=object)
    del counts.uns["spatialdata_attrs"]
    return TableModel.parse(counts, region=Keys.spots(name), region_key=Keys.REGION, instance_key=Keys.INSTANCE)
