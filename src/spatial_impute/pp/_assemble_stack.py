"""Assemble files and objects into one stack."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from spatialdata import SpatialData

from spatial_impute._graph import typical_spacing
from spatial_impute._image.levels import PIXEL_RANGE
from spatial_impute._keys import Keys
from spatial_impute._settings import logger
from spatial_impute._stack.elements import section_levels, spots_by_section
from spatial_impute._stack.record import Section, StackRecord, require_section_names, save_record
from spatial_impute._stack.table import build_stack_table
from spatial_impute._validation import require_key, require_positive
from spatial_impute.pp._read_section import SectionOptions, is_spatialdata, read_section
from spatial_impute.pp._spots import place_spots

if TYPE_CHECKING:
    from spatial_impute.pp._read_section import SectionInput, SectionParts


_FEW_SPOTS = 20
_WIDEST = 4.0  # width of a spot in distances to its nearest neighbor; cells and their circles overlap less


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
    fullres_image: Mapping[str, str | Path] | None = None,
    bin_size: float | Mapping[str, float] | None = None,
) -> SpatialData:
    """Assemble serial sections into one SpatialData object, the stack.

    Each section becomes a coordinate system in micrometres, named after the section. Images stay lazy. A section whose
    input has a table counts as measured; its counts are copied.

    Parameters
    ----------
    sections
        Section names in their order in the block, with their inputs. An input is an image file (TIFF, OME-TIFF, SVS,
        PNG, JPEG, OME-Zarr); an image as array ((y, x, 3), (c, y, x) or (y, x)), DataArray or DataTree, or a
        ``wsidata.WSIData``; a folder of Space Ranger (Visium, CytAssist, Visium HD), or the AnnData that
        ``scanpy.read_visium`` makes of it, or its h5ad; or a SpatialData object such as ``spatialdata_io.visium``,
        ``visium_hd`` or ``xenium`` return, or its path. If an object holds several sections, give it once for each of
        them, with their `coordinate_system` or `image_key`.
    mpp
        Micrometres per pixel of the images; for SpatialData objects per unit of `coordinate_system` (a full-resolution
        pixel in those of ``spatialdata_io``). One number, or one per section. By default it is read from the metadata
        of the file or folder, or computed from `spot_pitch`.
    z
        Height of each section in um.
    section_spacing
        Distance of consecutive sections in um, instead of `z`.
    reference
        Section to which the others are registered. By default the first measured one, else the middle one.
    spot_pitch
        Centre-to-centre distance of neighboring spots in um (100 for Visium). It sets the pixel size of SpatialData
        objects without `mpp`.
    coordinate_system
        Coordinate system to read from SpatialData objects, one or one per section. By default the only one, or
        ``"global"``.
    image_key
        Image to read from SpatialData objects, one name or one per section. By default the color image with the highest
        resolution.
    shapes_key
        Spots to read from SpatialData objects, one name or one per section. By default the only circles, else the only
        squares of one size, which become circles.
    table_key
        Table to read from SpatialData objects, one name or one per section. By default the only table that annotates
        the spots.
    fullres_image
        For output of Space Ranger: the scan that was its input, per section. It is compared with the small image that
        Space Ranger made of it. Without a scan, the best image in the folder is used, and a warning gives its pixel
        size.
    bin_size
        For folders of Visium HD: edge of the bins in um, one or one per section; 8 by default.

    Returns
    -------
    A new SpatialData object; the inputs do not change. It holds

    `images["{section}_image"]`
        The H&E image, transformed to the coordinate system `section` (um).
    `shapes["{section}_spots"]`
        The spots as circles, if the input has spots.
    `tables["{section}_counts"]`
        The measured table, if the input has one.
    `tables["stack"]`
        One row per spot of all sections: obs ``region``, ``instance_id``, ``section``, ``z``, ``measured``; obsm
        ``spatial`` (um).
    `attrs["spatial_impute"]["stack"]`
        The stack record (JSON).

    Raises
    ------
    ValueError
        For missing or impossible pixel sizes, missing heights, repeated or illegal names, an input given twice, several
        possible elements, pixels that are no brightfield image, or a rotated scan.
    KeyError
        For elements, coordinate systems or bin sizes that do not exist.
    FileNotFoundError
        For missing files, also within a folder of Space Ranger.

    Examples
    --------
    >>> import numpy as np
    >>> import spatial_impute as si
    >>> scans = {name: np.full((300, 400, 3), 230, dtype=np.uint8) for name in ("top", "bottom")}
    >>> sdata = si.pp.assemble_stack(scans, mpp=2.0, section_spacing=10.0)
    >>> sorted(sdata.coordinate_systems)
    ['bottom', 'top']
    """
    inputs = _named_inputs(_by_name(sections), coordinate_system, image_key)
    names = list(inputs)
    heights = _heights(names, _by_name(z), section_spacing)
    given = {
        "mpp": mpp,
        "spot_pitch": spot_pitch,
        "coordinate_system": coordinate_system,
        "image_key": image_key,
        "shapes_key": shapes_key,
        "table_key": table_key,
        "fullres_image": fullres_image,
        "bin_size": bin_size,
    }
    given = {argument: _by_name(value) for argument, value in given.items()}
    for argument, value in given.items():
        for name in value if isinstance(value, Mapping) else ():
            require_key(name, names, where="sections", then=f"`{argument}` names a section that does not exist.")
    sdata = SpatialData()
    records = []
    for name in names:
        options = {argument: _for_section(value, name) for argument, value in given.items()}
        parts = read_section(name, inputs[name], SectionOptions(**options))
        records.append(_add_section(sdata, name, heights[name], parts))
    measured = [record.name for record in records if record.counts is not None]
    if reference is None:
        reference = measured[0] if measured else names[len(names) // 2]
    require_key(reference, names, where="sections")
    record = StackRecord(tuple(records), reference=reference, version=version("spatial-impute"))
    save_record(sdata, record)
    build_stack_table(sdata, record)
    _check_spots(sdata, record)
    return sdata


def _check_spots(sdata: SpatialData, record: StackRecord) -> None:
    """Refuse circles of another unit than their centers, and warn of measured spots that do not lie on the tissue."""
    if Keys.STACK_TABLE not in sdata.tables:
        return
    table = sdata.tables[Keys.STACK_TABLE]
    flags = table.obs[Keys.MEASURED].to_numpy(bool)
    for section, centers, radius, rows in spots_by_section(sdata, record, table):
        _require_separate(section, centers, radius)
        measured = centers[flags[rows]]
        if not len(measured):
            continue
        if len(measured) < _FEW_SPOTS:
            logger.warning(
                "Section %s: only %d spots are measured; results from so few are chance", section.name, len(measured)
            )
        placement = place_spots(section_levels(sdata, section), measured)
        if placement is not None and (sentence := placement.sentence) is not None:
            logger.warning(
                "Section %s: %s; check the positions of the spots, the image and `mpp`", section.name, sentence
            )


def _require_separate(section: Section, centers: np.ndarray, radius: np.ndarray) -> None:
    """Raise a ``ValueError`` if circles are far wider than the distance to their neighbors, or lie on each other."""
    if len(centers) < 2:
        return
    n_places = len(np.unique(centers, axis=0))
    if n_places <= len(centers) / 2:
        msg = (
            f"Section {section.name!r}: its {len(centers)} spots lie at {n_places} places only, as those of several "
            "sections in one table do. Separate them first, e.g. by the column of `obs` that names the section."
        )
        raise ValueError(msg)
    width, distance = 2 * float(np.median(radius)), typical_spacing(centers, np.zeros(len(centers)))
    if width > _WIDEST * distance > 0:
        msg = (
            f"Section {section.name!r}: its spots are {width:.4g} um wide, but lie only {distance:.4g} um apart. "
            f"Expected a radius in the units of the centers; check `shapes[{section.spots!r}]['radius']` of the input, "
            "or `mpp`."
        )
        raise ValueError(msg)


def _add_section(sdata: SpatialData, name: str, z: float, parts: SectionParts) -> Section:
    low, high = PIXEL_RANGE
    if not low <= parts.mpp <= high:
        msg = (
            f"Section {name!r}: pixels of scans and overviews measure {low:g} to {high:g} um, found {parts.mpp:g} um "
            f"(from {parts.mpp_source}). Pass `mpp` in um per pixel, not in nm or mm."
        )
        raise ValueError(msg)
    section = Section(
        name=name,
        z=z,
        mpp=parts.mpp,
        mpp_source=parts.mpp_source,
        image=Keys.image(name),
        spots=None if parts.spots is None else Keys.spots(name),
        counts=None if parts.counts is None else Keys.counts(name),
    )
    sdata.images[section.image] = parts.image
    if parts.spots is not None:
        sdata.shapes[Keys.spots(name)] = parts.spots
    if parts.counts is not None:
        sdata.tables[Keys.counts(name)] = parts.counts
    return section


def _by_name(value: Any) -> Any:
    """Series of pandas as mapping if its index holds names; its order says nothing then."""
    named = isinstance(value, pd.Series) and value.index.dtype.kind not in "iu"
    return value.to_dict() if named else value


def _named_inputs(
    sections: Mapping[str, Any] | Sequence[tuple[str, Any]], *choices: str | Mapping[str, str] | None
) -> dict[str, Any]:
    """Inputs by checked names; names and inputs must differ, but `choices` may take different parts of one object."""
    pairs = list(sections.items() if isinstance(sections, Mapping) else sections)
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        msg = (
            "`sections` needs a name for each input, e.g. `{'s0': ..., 's1': ...}`; found a "
            f"{type(sections).__name__} without names."
        )
        raise ValueError(msg)
    if not pairs:
        msg = "`sections` is empty; expected a mapping of section names to images or SpatialData objects."
        raise ValueError(msg)
    require_section_names([name for name, _ in pairs])
    pairs = [(name, Path(value).expanduser() if isinstance(value, str | Path) else value) for name, value in pairs]
    seen_inputs: dict[object, str] = {}
    for name, value in pairs:
        identity: Any = str(value.resolve()) if isinstance(value, Path) else id(value)
        if is_spatialdata(value):
            identity = (identity, *(_for_section(choice, name) for choice in choices))
        if identity in seen_inputs:
            msg = (
                f"Sections {seen_inputs[identity]!r} and {name!r} are the same input; each section needs its own image "
                "(one SpatialData object may hold several, with different `coordinate_system` or `image_key`). "
                "Separate sections on one slide, e.g. with `spatialdata.bounding_box_query`."
            )
            raise ValueError(msg)
        seen_inputs[identity] = name
    return dict(pairs)


def _heights(names: list[str], z: Any, section_spacing: float | None) -> dict[str, float]:
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
        values = list(z) if isinstance(z, Iterable) else [z]
    try:
        heights = np.asarray(values, dtype=float)
    except (OverflowError, TypeError, ValueError):
        heights = np.array([np.nan])
    if heights.shape != (len(names),) or not np.isfinite(heights).all():
        msg = f"`z` must hold one finite number per section ({len(names)}), found {values!r}."
        raise ValueError(msg)
    steps = np.diff(heights)
    if not ((steps > 0).all() or (steps < 0).all()):
        msg = (
            f"`z` must rise or fall from section to section, found {dict(zip(names, values, strict=True))}: neighbors "
            "in the stack are neighbors in the block. Give the sections in their order in the block."
        )
        raise ValueError(msg)
    return {name: float(value) for name, value in zip(names, values, strict=True)}


def _for_section(value: Any, name: str) -> Any:
    """Value of an argument for one section; mappings have one value per section."""
    return value.get(name) if isinstance(value, Mapping) else value
