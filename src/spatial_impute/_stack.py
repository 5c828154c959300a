"""The stack inside a SpatialData object: its record, its sections and its one table.

A section is a coordinate system in micrometres. The record in ``sdata.attrs`` (JSON only) says which sections there
are, in which order and where in z; everything else hangs on the elements themselves.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spatial_impute._geometry import anisotropy, apply_affine, linear_scale
from spatial_impute._image.levels import Level, image_levels
from spatial_impute._keys import Keys
from spatial_impute._logging import log_added
from spatial_impute._validation import name_list, require_finite, require_key

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from spatialdata import SpatialData


@dataclass(frozen=True)
class Section:
    """One tissue section of a stack."""

    name: str
    """Name of the section and of its coordinate system (um)."""
    z: float
    """Height in the block, um."""
    mpp: float
    """um per pixel of the full-resolution image."""
    mpp_source: str
    """Where the pixel size comes from: ``"argument"``, ``"metadata"``, ``"spot pitch"``."""
    image: str
    """Image element."""
    spots: str | None = None
    """Shapes element with the spots; None until :func:`~spatial_impute.pp.tile_spots` lays some."""
    counts: str | None = None
    """Table with the measured expression; None for an unmeasured section."""


@dataclass(frozen=True)
class StackRecord:
    """What ``sdata.attrs["spatial_impute"]["stack"]`` holds."""

    sections: tuple[Section, ...]
    reference: str
    version: str
    registration: dict[str, Any] | None = None
    """Written by :func:`~spatial_impute.tl.register_stack`: method, per-section matrices, quality rows."""
    names: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(section.name for section in self.sections))

    def __getitem__(self, name: str) -> Section:
        require_key(name, self.names, where="the stack's sections")
        return self.sections[self.names.index(name)]

    def with_section(self, section: Section) -> StackRecord:
        """Return a copy in which one section is replaced by the given one of the same name."""
        return replace(self, sections=tuple(section if s.name == section.name else s for s in self.sections))

    def to_json(self) -> dict[str, Any]:
        """Plain dict for ``sdata.attrs``."""
        return {
            "sections": [asdict(section) for section in self.sections],
            "reference": self.reference,
            "version": self.version,
            "registration": self.registration,
        }


def require_spatialdata(value: object) -> None:
    """Raise a ``TypeError`` unless `value` is a SpatialData object."""
    if not all(hasattr(value, slot) for slot in ("attrs", "images", "shapes", "tables")):
        msg = (
            f"Expected a SpatialData object, found {type(value).__name__}. Make one with `si.pp.assemble_stack({{...}})`, "
            "or read one with `spatialdata.read_zarr(path)`."
        )
        raise TypeError(msg)


def load_record(sdata: SpatialData) -> StackRecord:
    """Read the stack record: the sections that the object holds.

    ``filter_by_coordinate_system`` and ``subset`` take sections out of an object and leave its attrs as they are.

    Raises
    ------
    KeyError
        If the object was not made by :func:`~spatial_impute.pp.assemble_stack`.
    """
    require_spatialdata(sdata)
    found = sdata.attrs.get(Keys.ATTRS, {}).get(Keys.STACK)
    if found is None:
        msg = (
            f"No stack in `sdata.attrs[{Keys.ATTRS!r}]`; attrs hold {sorted(map(str, sdata.attrs))}. "
            "Make one with `si.pp.assemble_stack({...})` or `si.datasets.her2st(...)`."
        )
        raise KeyError(msg)
    sections = [Section(**section) for section in found["sections"]]
    return StackRecord(
        sections=tuple(s for s in sections if s.image in sdata.images or s.spots in sdata.shapes),
        reference=found["reference"],
        version=found["version"],
        registration=found["registration"],
    )


def save_record(sdata: SpatialData, record: StackRecord) -> None:
    """Write the stack record, leaving other attrs alone.

    Objects cut out of another share its attrs, so that these are replaced and not changed.
    """
    ours = {**sdata.attrs.get(Keys.ATTRS, {}), Keys.STACK: record.to_json()}
    sdata.attrs = {**sdata.attrs, Keys.ATTRS: ours}


def resolve_sections(record: StackRecord, sections: str | Sequence[str] | None) -> list[str]:
    """Names of the wanted sections in stack order; all for ``None``."""
    if sections is None:
        return list(record.names)
    wanted = name_list(sections, name="sections")
    for name in wanted:
        require_key(name, record.names, where="the stack's sections")
    return [name for name in record.names if name in wanted]


def stack_table(sdata: SpatialData, table_key: str = Keys.STACK_TABLE) -> AnnData:
    """Return the stack table.

    Raises
    ------
    KeyError
        If there is none, because no section has spots yet, or a column of its contract is missing.
    ValueError
        If names of rows or genes repeat: everything is joined by them.
    """
    require_spatialdata(sdata)
    require_key(table_key, sdata.tables, where="sdata.tables", then="Lay spots with `si.pp.tile_spots(sdata)`.")
    table = sdata.tables[table_key]
    where = f"sdata.tables[{table_key!r}]"
    for column in (Keys.SECTION, Keys.MEASURED):
        require_key(column, table.obs, where=f"{where}.obs", then="Make the table with `si.pp.assemble_stack({...})`.")
    for slot, names in {"obs_names": table.obs_names, "var_names": table.var_names}.items():
        if not names.is_unique:
            msg = f"`{where}.{slot}` must be unique, but {names[names.duplicated()][0]!r} is there more than once."
            raise ValueError(msg)
    return table


def section_ranks(table: AnnData) -> np.ndarray:
    """(n,) place of each row's section in the stack.

    Raises
    ------
    ValueError
        If the column is not the categorical that the stack was made with.
    """
    column = table.obs[Keys.SECTION]
    if not isinstance(column.dtype, pd.CategoricalDtype) or column.isna().any():
        msg = (
            f"`obs[{Keys.SECTION!r}]` must be categorical, in the order of the stack and without missing values; found "
            f"{column.dtype} with {int(column.isna().sum())} missing. Restore it with "
            "`pd.Categorical(values, categories=[...], ordered=True)`."
        )
        raise ValueError(msg)
    return column.cat.codes.to_numpy().astype(np.int64)


def dense_rows(matrix: Any, rows: np.ndarray) -> np.ndarray:
    """Some rows of a dense, sparse or lazy matrix, as float64."""
    values = matrix[np.flatnonzero(rows)]
    values = values.compute() if hasattr(values, "compute") else values
    return np.asarray(values.toarray() if hasattr(values, "toarray") else values, dtype=np.float64)


def element_affine(element: object, coordinate_system: str) -> np.ndarray:
    """(3, 3) affine from the intrinsic frame of an element (pixel corners for images) to a coordinate system."""
    from spatialdata.transformations import get_transformation

    transformation = get_transformation(element, to_coordinate_system=coordinate_system)
    return np.asarray(transformation.to_affine_matrix(("x", "y"), ("x", "y")), dtype=float)


def to_frames(record: StackRecord, name: str, transformation: Any) -> dict[str, Any]:
    """Transformations of a new element of a section: to its frame, and to the common one if there is one."""
    from spatialdata.transformations import Affine, Sequence

    found = {name: transformation}
    registration = record.registration or {"sections": {}}
    if name in registration["sections"]:
        affine = Affine(registration["sections"][name]["matrix"], input_axes=("x", "y"), output_axes=("x", "y"))
        found[registration["coordinate_system"]] = Sequence([transformation, affine])
    return found


def _require_frame(element: object, name: str, where: str) -> None:
    from spatialdata.transformations import get_transformation

    require_key(
        name,
        get_transformation(element, get_all=True),
        where=f"coordinate systems of {where}",
        then="Every element of a section has a transformation to its frame (um): `set_transformation(element, ..., name)`.",
    )


def section_levels(sdata: SpatialData, section: Section) -> list[Level]:
    """Resolutions of the image of a section, finest first, with their maps to um."""
    require_key(section.image, sdata.images, where="sdata.images")
    element = sdata.images[section.image]
    _require_frame(element, section.name, f"sdata.images[{section.image!r}]")
    return image_levels(element, element_affine(element, section.name))


def spot_geometry(sdata: SpatialData, section: Section) -> tuple[np.ndarray, np.ndarray, pd.Index]:
    """Spots of a section in its own frame.

    Returns
    -------
    centers
        (n, 2) x, y in um.
    radius
        (n,) in um.
    index
        Instance ids.

    Raises
    ------
    ValueError
        If the spots are no circles, or their transformation is so anisotropic that circles would become ellipses.
    """
    require_key(str(section.spots), sdata.shapes, where="sdata.shapes")
    circles = sdata.shapes[section.spots]
    if "radius" not in circles or not (circles.geom_type == "Point").all():
        msg = f"`sdata.shapes[{section.spots!r}]` must hold circles (points with a `radius` column)."
        raise ValueError(msg)
    _require_frame(circles, section.name, f"sdata.shapes[{section.spots!r}]")
    matrix = element_affine(circles, section.name)
    if anisotropy(matrix) > 1.05:
        msg = (
            f"The transformation of `sdata.shapes[{section.spots!r}]` to {section.name!r} stretches one axis "
            f"{anisotropy(matrix):.2f} times more than the other, so its circles have no radius in um."
        )
        raise ValueError(msg)
    values = np.column_stack([circles.geometry.x, circles.geometry.y, circles["radius"].to_numpy(float)])
    require_finite(values, name=f"Circles of `sdata.shapes[{section.spots!r}]`", row_names=circles.index)
    centers = apply_affine(values[:, :2], matrix)
    return centers, circles["radius"].to_numpy(float) * linear_scale(matrix), circles.index


def build_stack_table(sdata: SpatialData, record: StackRecord) -> None:
    """Write ``tables["stack"]``: one row per spot of every section, in stack order, without expression yet.

    Columns and slots of an existing stack table are dropped: they belong to other rows.
    """
    from anndata import AnnData
    from spatialdata.models import TableModel

    frames, coordinates = [], []
    for section in record.sections:
        if section.spots is None:
            continue
        centers, _, index = spot_geometry(sdata, section)
        frames.append(
            pd.DataFrame(
                {
                    Keys.REGION: section.spots,
                    Keys.INSTANCE: index.to_numpy(),
                    Keys.SECTION: section.name,
                    Keys.Z: section.z,
                    Keys.MEASURED: measured_spots(sdata, section, index),
                },
                index=[f"{section.name}_{i}" for i in index],
            )
        )
        coordinates.append(centers)
    if not frames:
        return
    obs = pd.concat(frames)
    if not obs.index.is_unique:
        repeated = obs.index[obs.index.duplicated()][0]
        msg = (
            f"Two spots of the stack would both be named {repeated!r} (section, then id): rename the sections, or give "
            "the spots of each section unique ids."
        )
        raise ValueError(msg)
    obs[Keys.SECTION] = pd.Categorical(obs[Keys.SECTION], categories=list(record.names), ordered=True)
    obs[Keys.REGION] = pd.Categorical(obs[Keys.REGION])
    table = AnnData(obs=obs, obsm={Keys.SPATIAL: np.concatenate(coordinates)})
    sdata.tables[Keys.STACK_TABLE] = TableModel.parse(
        table,
        region=list(obs[Keys.REGION].cat.categories),
        region_key=Keys.REGION,
        instance_key=Keys.INSTANCE,
    )
    log_added(f"tables[{Keys.STACK_TABLE!r}]")


def measured_spots(sdata: SpatialData, section: Section, index: pd.Index) -> np.ndarray:
    """(n,) bool: which spots have a row in the section's table of counts (joined by instance id)."""
    if section.counts is None:
        return np.zeros(len(index), dtype=bool)
    table = sdata.tables[section.counts]
    instance_key = table.uns["spatialdata_attrs"]["instance_key"]
    return np.isin(index.to_numpy().astype(str), table.obs[instance_key].to_numpy().astype(str))


def measured_mask(table: AnnData, *, layer: str = Keys.MEASURED) -> np.ndarray:
    """(n,) bool: rows whose expression may be used.

    Only ``obs["measured"]`` decides, never the values: whatever stands in the other rows cannot reach a result.

    Raises
    ------
    KeyError
        If the layer is missing.
    ValueError
        If no spot is measured, or measured rows hold infinities, or NaN other than for genes that are not on the panel
        of a section.
    """
    require_key(
        layer,
        table.layers,
        where=f"sdata.tables[{Keys.STACK_TABLE!r}].layers",
        then="Write it with `si.pp.select_genes(sdata)`.",
    )
    flags = table.obs[Keys.MEASURED]
    if flags.dtype != bool:  # "False" is true to Python, and would let in what was not measured
        msg = (
            f"`obs[{Keys.MEASURED!r}]` must be of type bool, found {flags.dtype} with values like "
            f"{flags.unique()[:3].tolist()!r}. Convert it, e.g. with `.map({{'True': True, 'False': False}}).astype(bool)`."
        )
        raise ValueError(msg)
    measured = flags.to_numpy()
    if not measured.any():
        msg = (
            f"No measured section: `obs[{Keys.MEASURED!r}]` is False for all {table.n_obs} spots. Imputation needs "
            "at least one section with expression; pass its SpatialData (with a table) to `si.pp.assemble_stack`."
        )
        raise ValueError(msg)
    values = np.asarray(dense_rows(table.layers[layer], measured))
    if np.isfinite(values).all():
        return measured
    # A gene that is not on the panel of a section is NaN at all of its spots.
    section = table.obs[Keys.SECTION].to_numpy()[measured]
    bad = np.isinf(values).any(axis=1) | ~np.isfinite(values).any(axis=1)
    for name in np.unique(section):
        missing = np.isnan(values[section == name])
        bad[section == name] |= (missing != missing[0]).any(axis=1)
    if bad.any():
        first = table.obs_names[measured][bad][0]
        msg = (
            f"Measured rows of `layers[{layer!r}]` must be finite; the first that is not: {first!r}. Run "
            f"`si.pp.select_genes(sdata)` again, or set `obs[{Keys.MEASURED!r}]` to False there."
        )
        raise ValueError(msg)
    nowhere = ~np.isfinite(values).any(axis=0)
    if nowhere.any():
        msg = f"Gene {table.var_names[nowhere][0]!r} of `layers[{layer!r}]` was not measured on any section."
        raise ValueError(msg)
    return measured
