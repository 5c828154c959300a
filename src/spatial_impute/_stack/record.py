"""Record of a stack: its sections, their order and their heights, kept as JSON in ``sdata.attrs``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from spatial_impute._keys import Keys
from spatial_impute._validation import name_list, record_at, require_key

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spatialdata import SpatialData


_LEGAL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Section:
    """One tissue section of a stack."""

    name: str  # Name of the section and of its coordinate system (um)
    z: float  # Height in the block, um
    mpp: float  # um per pixel of the full-resolution image
    mpp_source: str  # Source of the pixel size: ``"argument"``, ``"metadata"``, ``"spot pitch"``
    image: str  # Image element
    spots: str | None = None  # Shapes element with the spots; None before :func:`~spatial_impute.pp.tile_spots`
    counts: str | None = None  # Table with the measured expression; None for an unmeasured section


@dataclass(frozen=True)
class StackRecord:
    """Content of ``sdata.attrs["spatial_impute"]["stack"]``."""

    sections: tuple[Section, ...]
    reference: str
    version: str
    registration: dict[str, Any] | None = None
    """Written by :func:`~spatial_impute.tl.register_stack`: method, per-section matrices, quality rows."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the sections, in the order of the stack."""
        return tuple(section.name for section in self.sections)

    def __getitem__(self, name: str) -> Section:
        require_key(name, self.names, where="the stack's sections")
        return self.sections[self.names.index(name)]

    def with_section(self, section: Section) -> StackRecord:
        """Return a copy in which one section is replaced by the given one of the same name."""
        return replace(self, sections=tuple(section if s.name == section.name else s for s in self.sections))

    def in_order(self, names: Sequence[str]) -> StackRecord:
        """Return a copy with the named sections in the order of the names, at the heights of these places; others stay."""
        places = [i for i, section in enumerate(self.sections) if section.name in names]
        sections = list(self.sections)
        for i, name in zip(places, names, strict=True):
            sections[i] = replace(self[name], z=self.sections[i].z)
        return replace(self, sections=tuple(sections))

    def to_json(self) -> dict[str, Any]:
        """Plain dict for ``sdata.attrs``."""
        return {
            "sections": [asdict(section) for section in self.sections],
            "reference": self.reference,
            "version": self.version,
            "registration": self.registration,
        }


def require_section_names(names: Sequence[object]) -> None:
    """Raise a ``ValueError`` unless all names can be names of sections, and of elements of a SpatialData object."""
    seen: set[str] = set()
    for name in names:
        if not isinstance(name, str) or not _LEGAL_NAME.fullmatch(name):
            legal = re.sub(r"[^A-Za-z0-9_.-]+", "_", str(name)).strip("_.-") or "s0"
            msg = (
                "Section names are letters, digits, '_', '-' and '.', starting with a letter or digit; found "
                f"{name!r}. Use {legal!r}, for example."
            )
            raise ValueError(msg)
        if name == Keys.ALIGNED:
            msg = f"{name!r} is the name of the frame that all sections share after registration; rename the section."
            raise ValueError(msg)
        if name.lower() in seen:
            msg = f"Duplicate section name {name!r} (SpatialData compares names without regard to case)."
            raise ValueError(msg)
        seen.add(name.lower())


def require_spatialdata(value: object) -> None:
    """Raise a ``TypeError`` unless `value` is a SpatialData object."""
    if not all(hasattr(value, slot) for slot in ("attrs", "images", "shapes", "tables")):
        msg = (
            f"Expected a SpatialData object, found {type(value).__name__}. Make one with `si.pp.assemble_stack({{...}})`, "
            "or read one with `spatialdata.read_zarr(path)`."
        )
        raise TypeError(msg)


def attrs_record(sdata: SpatialData, *keys: str) -> Mapping[str, Any]:
    """Record of this package in ``sdata.attrs``; empty if there is none."""
    return record_at(sdata.attrs, Keys.ATTRS, *keys, where="sdata.attrs")


def load_record(sdata: SpatialData) -> StackRecord:
    """Read the stack record, or raise a ``KeyError``. It lists the sections that the object holds."""
    require_spatialdata(sdata)
    ours = sdata.attrs.get(Keys.ATTRS, {})
    found = ours.get(Keys.STACK) if isinstance(ours, Mapping) else ours
    if found is None:
        msg = (
            f"No stack in `sdata.attrs[{Keys.ATTRS!r}]`; attrs hold {sorted(map(str, sdata.attrs))}. "
            "Make one with `si.pp.assemble_stack({...})` or `si.datasets.her2st(...)`."
        )
        if any(Keys.image("") in key for key in sdata.images):
            msg += (
                " If this object was made by `spatialdata.concatenate`, which drops attrs, assemble it again: "
                "`si.pp.assemble_stack({name: sdata for name in names}, coordinate_system={name: name for name in names}, "
                "mpp=1.0, z=...)`, where `names` are coordinate systems of its sections in the order of the block."
            )
        raise KeyError(msg)
    try:
        record = _parsed(found)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        msg = (
            f"The record of the stack in `sdata.attrs[{Keys.ATTRS!r}][{Keys.STACK!r}]` was damaged: {error!r}. Take it from the object "
            "as it was before, or assemble the stack again with `si.pp.assemble_stack({...})`."
        )
        raise ValueError(msg) from error
    for section in record.sections:
        if not isinstance(section.z, int | float) or not math.isfinite(section.z):
            msg = (
                f"The height `z` of section {section.name!r} in `sdata.attrs[{Keys.ATTRS!r}][{Keys.STACK!r}]` must be a finite number "
                f"in um, found {section.z!r}. Correct it there and in `obs[{Keys.Z!r}]`."
            )
            raise ValueError(msg)
    # `filter_by_coordinate_system` and `subset` remove sections from an object and do not change its attrs.
    there = tuple(s for s in record.sections if s.image in sdata.images or s.spots in sdata.shapes)
    return replace(record, sections=there)


def _parsed(found: Any) -> StackRecord:
    """Record as it was written; any error for one that was edited to something else."""
    sections = tuple(Section(**section) for section in found["sections"])
    require_section_names([section.name for section in sections])
    registration = found["registration"]
    if registration is not None:
        _ = registration["coordinate_system"]
        for part in ("images", "spots"):
            record_at(registration, Keys.STATE, part, where="registration")
        for name, row in registration["sections"].items():
            _ = row["route"]
            if np.asarray(row["matrix"], dtype=float).shape != (3, 3):
                msg = f"the matrix of section {name!r} is {row['matrix']!r}"
                raise ValueError(msg)
    return StackRecord(sections, found["reference"], found["version"], registration)


def save_record(sdata: SpatialData, record: StackRecord) -> None:
    """Write the stack record and keep all other attrs."""
    # An object that is a part of another one shares its attrs: replace them, do not change them.
    ours = {**attrs_record(sdata), Keys.STACK: record.to_json()}
    sdata.attrs = {**sdata.attrs, Keys.ATTRS: ours}


def resolve_sections(record: StackRecord, sections: str | Sequence[str] | None) -> list[str]:
    """Names of the wanted sections in stack order; all for ``None``."""
    if sections is None:
        return list(record.names)
    wanted = name_list(sections, name="sections")
    for name in wanted:
        require_key(name, record.names, where="the stack's sections")
    return [name for name in record.names if name in wanted]
