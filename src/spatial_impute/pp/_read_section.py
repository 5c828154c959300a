"""Read one section from an image, a folder of Space Ranger, or a SpatialData object of another tool."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
from anndata import AnnData, read_h5ad
from anndata.io import read_zarr
from spatialdata import SpatialData
from spatialdata.models import TableModel
from spatialdata.transformations import Scale, Sequence, get_transformation, set_transformation

from spatial_impute._expression import genes_only, require_unique_genes
from spatial_impute._geometry import linear_scale
from spatial_impute._image.levels import pixel_edges
from spatial_impute._image.reading import open_image, open_slide
from spatial_impute._io.files import how_to_unpack
from spatial_impute._io.stores import is_zarr, zarr_attributes
from spatial_impute._keys import Keys
from spatial_impute._settings import logger
from spatial_impute._stack.elements import (
    as_circles,
    element_affine,
    free_names,
    image_element,
    in_rgb_order,
    square_edge,
)
from spatial_impute._stack.table import is_stack_table
from spatial_impute._validation import require_key, require_positive
from spatial_impute.pp._read_spaceranger import (
    SCALEFACTORS,
    find_spaceranger,
    mpp_from_pitch,
    read_legacy,
    read_spaceranger,
    warn_of_other_pixels,
)
from spatial_impute.pp._spots import checked_column

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from xarray import DataArray, DataTree

    SectionInput: TypeAlias = SpatialData | AnnData | DataArray | DataTree | np.ndarray | str | Path


_FEW_GENES = 4  # named in a message


@dataclass(frozen=True)
class SectionOptions:
    """Arguments of ``assemble_stack`` for one section."""

    mpp: float | None = None
    spot_pitch: float | None = None
    coordinate_system: str | None = None
    image_key: str | None = None
    shapes_key: str | None = None
    table_key: str | None = None
    fullres_image: str | Path | None = None
    bin_size: float | None = None


@dataclass
class SectionParts:
    """Elements of one section in its own frame, and the pixel size of its image."""

    image: DataArray | DataTree
    mpp: float
    mpp_source: str
    spots: GeoDataFrame | None = None
    counts: AnnData | None = None


def read_section(name: str, value: SectionInput, options: SectionOptions) -> SectionParts:
    """Read one section from a file, a folder, an array or an object."""
    if isinstance(value, str | Path) and Path(value).is_dir() and not is_zarr(Path(value)):
        return _from_spaceranger(name, Path(value), options)
    if isinstance(value, AnnData) or _is_anndata_file(value):
        return _from_anndata(name, value, options)
    if options.fullres_image is not None:
        msg = (
            f"`fullres_image` of section {name!r} belongs to a folder of Space Ranger, or to what `scanpy.read_visium` "
            f"returns; found {type(value).__name__}."
        )
        raise ValueError(msg)
    if is_spatialdata(value) and not _is_slide(value):
        sdata = value if isinstance(value, SpatialData) else SpatialData.read(Path(str(value)).resolve())
        return _from_spatialdata(name, sdata, options)
    return _from_image(name, value, options.mpp)


def _is_slide(value: object) -> bool:
    """Return True for a ``wsidata.WSIData``: its images hold a thumbnail only, its reader has the slide."""
    return hasattr(value, "reader") and hasattr(value, "properties")


def _from_anndata(name: str, value: Any, options: SectionOptions) -> SectionParts:
    where = f"sections[{name!r}]"
    if isinstance(value, str | Path):
        if not Path(value).exists():
            msg = f"{where}: no file at {str(value)!r}."
            raise FileNotFoundError(msg)
        try:
            value = read_zarr(value) if Path(value).is_dir() else read_h5ad(value)
        except Exception as error:  # h5py and zarr raise errors of all kinds
            msg = f"{where}: '{value}' cannot be read as AnnData: {error}. Copy it again."
            raise ValueError(msg) from error
    return _from_sample(name, *read_legacy(value, where, fullres_image=options.fullres_image), options)


def _from_image(name: str, value: SectionInput, mpp: float | None) -> SectionParts:
    known = None
    if isinstance(value, str | Path) or _is_slide(value):
        opened = open_image(value) if isinstance(value, str | Path) else open_slide(value)
        levels, known = opened.levels, opened.pixel_size
    else:
        levels = _array_levels(name, value)
    sizes = pixel_edges(name, known, mpp)
    if sizes is None:
        msg = (
            f"Pixel size of section {name!r} is unknown: its image carries no physical size. "
            f"Pass `mpp=` (um per pixel), e.g. `mpp={{{name!r}: 0.5}}`."
        )
        raise ValueError(msg)
    x, y = sizes
    source = "metadata" if mpp is None else "argument"
    return SectionParts(image_element(levels, name, (x, y)), float(np.sqrt(x * y)), source)


def _from_spaceranger(name: str, path: Path, options: SectionOptions) -> SectionParts:
    folder = find_spaceranger(path, options.bin_size)
    if folder is None:
        found = sorted(entry.name for entry in path.iterdir())
        msg = (
            f"Section {name!r}: {path} is no folder of Space Ranger, 'spatial/{SCALEFACTORS}' is missing (it holds "
            f"{found[:8]}). Give the folder with 'spatial' or 'binned_outputs' in it, the path of an image, or a "
            f"SpatialData object.{how_to_unpack(path)}"
        )
        raise FileNotFoundError(msg)
    try:
        sdata, mpp, source = read_spaceranger(folder, fullres_image=options.fullres_image, bin_size=options.bin_size)
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # readers of tables raise errors of all kinds
        if type(error) is ValueError and str(folder) in str(error):  # the message names the folder
            raise
        msg = f"Section {name!r}: {folder} cannot be read as output of Space Ranger: {error!r}. Copy its files again."
        raise ValueError(msg) from error
    return _from_sample(name, sdata, mpp, source, options)


def _from_sample(name: str, sdata: SpatialData, mpp: float, source: str, options: SectionOptions) -> SectionParts:
    """Section of one sample in ``"global"``, with its own pixel size unless the user gave one."""
    if options.mpp is not None or options.spot_pitch is not None:
        warn_of_other_pixels(name, sdata, mpp, given=options.mpp, spot_pitch=options.spot_pitch)
        return _from_spatialdata(name, sdata, options)
    return replace(_from_spatialdata(name, sdata, replace(options, mpp=mpp)), mpp_source=source)


def is_spatialdata(value: object) -> bool:
    """Return True for a SpatialData object or the folder of one."""
    if not isinstance(value, str | Path):
        return isinstance(value, SpatialData)
    path = Path(value)
    if not path.is_dir() or not is_zarr(path):
        return False
    attrs = zarr_attributes(path)
    # Images within a store have these attributes too.
    return "spatialdata_attrs" in attrs and not {"ome", "multiscales"} & set(attrs)


def _is_anndata_file(value: object) -> bool:
    """Return True for the path of an h5ad, or of the zarr of an AnnData."""
    if not isinstance(value, str | Path):
        return False
    path = Path(value)
    if not path.is_dir() or not is_zarr(path):
        return path.suffix.lower() == ".h5ad"
    return zarr_attributes(path).get("encoding-type") == "anndata"


def _array_levels(name: str, value: Any) -> list[Any]:
    """(c, y, x) arrays of an image given as array, DataArray or DataTree; finest first."""
    if hasattr(value, "children") and hasattr(value, "to_dict"):
        scales = [next(iter(child.ds.data_vars.values())) for child in value.children.values()]
        return [level for scale in scales for level in _array_levels(name, scale)]
    if np.ma.is_masked(value):
        msg = (
            f"Section {name!r}: {np.ma.count_masked(value)} values of its array are masked. Fill them, with glass: "
            "`image.filled(255)`."
        )
        raise ValueError(msg)
    if hasattr(value, "dims") and hasattr(value, "transpose"):
        image = value.expand_dims("c") if set(value.dims) == {"y", "x"} else value
        return [_as_rgb(image, name).transpose("c", "y", "x").data]
    is_array = hasattr(value, "astype") and hasattr(value, "dtype")  # unlike tensors of torch and tables of pandas
    shape = tuple(getattr(value, "shape", ()))
    if len(shape) == 2 and is_array:
        return [value[None]]
    if len(shape) == 3 and is_array:
        return [value.transpose(2, 0, 1) if shape[-1] in (1, 3, 4) and shape[0] not in (1, 3, 4) else value]
    msg = (
        f"Section {name!r}: expected a SpatialData, an image path or an image array ((y, x, 3), (c, y, x) or (y, x)), "
        f"found {type(value).__name__}{f' of shape {shape}' if hasattr(value, 'shape') else ''}. Make a NumPy array of "
        "other arrays, e.g. `tensor.numpy()`."
    )
    raise ValueError(msg)


def _as_rgb(image: Any, where: str) -> Any:
    try:
        return in_rgb_order(image)
    except ValueError as error:
        msg = f"Section {where!r}: {error}"
        raise ValueError(msg) from error


def _from_spatialdata(name: str, source: SpatialData, options: SectionOptions) -> SectionParts:
    where = f"sections[{name!r}]"
    system = _choose_system(source, options.coordinate_system, where)
    image_key = _choose_image(source, options.image_key, system, where)
    # SpatialData takes no element whose pixels were loaded, unless they are chunks again.
    image = _as_rgb(source.images[image_key], f"{name}, image {image_key}").chunk({})
    shapes_key = _choose_spots(source, options.shapes_key, system, where)
    circles = None if shapes_key is None else as_circles(source.shapes[shapes_key], shapes_key, where)
    if options.mpp is not None:
        mpp, mpp_source = options.mpp, "argument"
    elif options.spot_pitch is not None and circles is not None:
        mpp, mpp_source = mpp_from_pitch(circles, system, options.spot_pitch), "spot pitch"
    else:
        msg = (
            f"Pixel size of {where} is unknown. Pass `mpp=` (um per unit of its coordinate system {system!r}) or, for "
            "spots on a regular lattice, `spot_pitch=` (um, 100 for Visium)."
        )
        raise ValueError(msg)
    mpp = require_positive(mpp, name=f"mpp of section {name!r}", unit="um per pixel")
    parts = SectionParts(
        _in_section_frame(image, system, name, mpp), linear_scale(element_affine(image, system)) * mpp, mpp_source
    )
    counts = None
    if shapes_key is not None:
        parts.spots = _in_section_frame(circles, system, name, mpp)
        # One table annotates the spots of all sections, so their ids must have one type; barcodes are strings.
        parts.spots.index = parts.spots.index.astype(str)
        counts = _take_counts(source, shapes_key, options.table_key, name, where)
    if counts is not None:
        return _under_tissue(parts, parts.spots, counts, where)
    _refuse_unjoined_tables(source, system, where, chosen=options.shapes_key)
    return parts


def _under_tissue(parts: SectionParts, spots: GeoDataFrame, counts: AnnData, where: str) -> SectionParts:
    """Section without the spots that `in_tissue` says lie off the tissue: in a raw matrix they hold stray counts."""
    flags = counts.obs.get(Keys.IN_TISSUE)
    on = np.ones(counts.n_obs, bool) if flags is None else checked_column(flags, where).to_numpy()
    if on.all():
        return replace(parts, spots=spots, counts=counts)
    if not on.any():
        msg = f"{where}: no spot with counts lies under tissue: `in_tissue` of all is 0."
        raise ValueError(msg)
    logger.warning(
        "%s: %d of %d spots with counts lie off the tissue (in_tissue = 0, as in a raw matrix); they are left out",
        where,
        int((~on).sum()),
        len(on),
    )
    return replace(parts, spots=spots[~spots.index.isin(counts.obs[Keys.INSTANCE][~on])], counts=counts[on].copy())


def _refuse_unjoined_tables(source: SpatialData, system: str, where: str, *, chosen: str | None) -> None:
    """Raise a ``ValueError`` if a table cannot be joined to spots: a measured section must not become unmeasured.

    If the user has `chosen` the spots, only warn.
    """
    lost = {
        key: _regions(table)
        for key, table in _count_tables(source).items()
        if table.n_obs and not _is_of_another_section(source, _regions(table), system)
    }
    if not lost:
        return
    if chosen is not None:
        logger.warning(
            "%s: no table annotates %r, so the section is not measured; tables annotate %s", where, chosen, lost
        )
        return
    here = sorted(key for key, shape in source.shapes.items() if _in_system(shape, system))
    msg = (
        f"{where} holds tables, but none of them annotates its spots. Expected a table that annotates circles, or "
        f"squares of one size, in the coordinate system {system!r}, which has the shapes {here}; found tables that "
        f"annotate {lost}. Name the right elements with `shapes_key=`, `table_key=` and `coordinate_system=`, or let "
        "the table annotate the spots with `spatialdata.models.TableModel.parse(table, region=..., region_key=..., "
        "instance_key=...)`. If the section is not measured, remove the tables from the object first."
    )
    raise ValueError(msg)


def _is_of_another_section(source: SpatialData, regions: list[str], system: str) -> bool:
    """True if a table annotates shapes that lie with an image in another coordinate system, and not in this one."""
    if not regions or not all(region in source.shapes for region in regions):
        return False
    with_image = {name for image in source.images.values() for name in get_transformation(image, get_all=True)}
    systems = [set(get_transformation(source.shapes[region], get_all=True)) for region in regions]
    return all(system not in own and own & with_image for own in systems)


def _choose_system(source: SpatialData, wanted: str | None, where: str) -> str:
    systems = list(source.coordinate_systems)
    if wanted is not None:
        require_key(wanted, systems, where=f"{where}.coordinate_systems")
        return wanted
    if len(systems) == 1 or "global" in systems:
        return systems[0] if len(systems) == 1 else "global"
    # Readers of Visium HD add the frames of the small images.
    full = [system for system in systems if "downscaled_" not in system]
    if len(full) == 1:
        return full[0]
    msg = f"{where} has the coordinate systems {systems}; choose one with `coordinate_system=`."
    raise ValueError(msg)


def _in_system(element: object, system: str) -> bool:
    return system in get_transformation(element, get_all=True)


def _choose_image(source: SpatialData, wanted: str | None, system: str, where: str) -> str:
    if wanted is not None:
        require_key(wanted, source.images, where=f"{where}.images")
        return wanted
    keys = [key for key, element in source.images.items() if _in_system(element, system)]
    if not keys:
        msg = f"{where} has no image in the coordinate system {system!r}; images: {sorted(source.images)}."
        raise ValueError(msg)
    # Color images first (fluorescence has other numbers of channels), then the fewest units per pixel.
    color = [key for key in keys if _is_color(source.images[key])] or keys
    best = min(color, key=lambda key: linear_scale(element_affine(source.images[key], system)))
    if len(keys) > 1:
        logger.info("%s: using the finest image %r of %s", where, best, sorted(keys))
    return best


def _is_color(image: DataArray | DataTree) -> bool:
    try:
        ordered = in_rgb_order(image)
    except ValueError:
        return False
    array = next(iter(ordered["scale0"].ds.data_vars.values())) if hasattr(ordered, "children") else ordered
    return int(array.sizes["c"]) >= 3


def _choose_spots(source: SpatialData, wanted: str | None, system: str, where: str) -> str | None:
    """Name of the spots: the only circles, else the only annotated squares (bins of Visium HD)."""
    if wanted is not None:
        require_key(wanted, source.shapes, where=f"{where}.shapes")
        return wanted
    here = [key for key, shape in source.shapes.items() if _in_system(shape, system)]
    circles = [key for key in here if "radius" in source.shapes[key]]
    annotated = {key for table in source.tables.values() for key in _regions(table)}
    keys = circles or [key for key in here if key in annotated and square_edge(source.shapes[key]) is not None]
    if len(keys) > 1:
        kind = "circle" if circles else "bin"
        msg = f"{where} has several {kind} elements {sorted(keys)}; choose the spots with `shapes_key=`."
        raise ValueError(msg)
    return keys[0] if keys else None


def _count_tables(source: SpatialData) -> dict[str, AnnData]:
    """Tables that may hold counts: the table of an earlier stack holds what was made of them."""
    return {key: table for key, table in source.tables.items() if not is_stack_table(table)}


def _regions(table: AnnData) -> list[str]:
    regions = table.uns.get("spatialdata_attrs", {}).get("region")
    return [regions] if isinstance(regions, str) else list(regions or [])


def _in_section_frame(element: Any, system: str, name: str, mpp: float) -> Any:
    """Shallow copy of an element whose only transformation goes to the section's frame in um."""
    to_system = get_transformation(element, to_coordinate_system=system)
    copy = element.copy()
    copy.attrs = dict(copy.attrs)
    to_section = Sequence([to_system, Scale([mpp, mpp], axes=("x", "y"))])
    set_transformation(copy, {name: to_section}, set_all=True)
    return copy


def _require_joining(instance: np.ndarray, index: pd.Index, where: str, shapes_key: str) -> None:
    """Every spot has one row of the table at most, and some have one."""
    known = np.isin(instance, index)
    if not known.any() and len(instance):
        msg = (
            f"{where}: no row of its table names one of the {len(index)} spots of `shapes[{shapes_key!r}]`; rows name "
            f"e.g. {instance[:3].tolist()}, spots are named e.g. {list(index[:3])}. Use the names of spots as instance ids."
        )
        raise ValueError(msg)
    repeated = pd.Index(instance).duplicated()
    if repeated.any():
        msg = f"{where}: several rows of its table annotate the same spot {str(instance[repeated][0])!r}; keep one."
        raise ValueError(msg)
    if not known.all():
        logger.warning(
            "%s: %d of %d rows of its table have no spot and are left out, e.g. %r",
            where,
            int((~known).sum()),
            len(known),
            str(instance[~known][0]),
        )


def _take_counts(source: SpatialData, shapes_key: str, table_key: str | None, name: str, where: str) -> AnnData | None:
    """Copy of the table rows that annotate the spots, with the region and ids of the stack."""
    annotating = {key: table for key, table in _count_tables(source).items() if shapes_key in _regions(table)}
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
    with warnings.catch_warnings():  # logged below
        warnings.filterwarnings("ignore", "Variable names are not unique")
        counts = genes_only(table[rows].to_memory() if table.isbacked else table[rows].copy(), where)
    if renamed := require_unique_genes(counts, where):
        few = dict(list(renamed.items())[:_FEW_GENES])
        logger.warning("%s: %d genes that share a name are named by their id, e.g. %s", where, len(renamed), few)
    instance = counts.obs[attrs["instance_key"]].to_numpy().astype(str)
    _require_joining(instance, source.shapes[shapes_key].index.astype(str), where, shapes_key)
    counts.obs = counts.obs.drop(columns=[attrs["region_key"], attrs["instance_key"]])
    free_names(counts, where)
    counts.obs[Keys.REGION] = Keys.spots(name)
    counts.obs[Keys.REGION] = counts.obs[Keys.REGION].astype("category")
    counts.obs[Keys.INSTANCE] = pd.array(instance, dtype=object)
    del counts.uns["spatialdata_attrs"]
    return TableModel.parse(counts, region=Keys.spots(name), region_key=Keys.REGION, instance_key=Keys.INSTANCE)
