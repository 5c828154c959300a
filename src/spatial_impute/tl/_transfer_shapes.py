"""Carry shapes of one section to the other sections of a registered stack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from spatial_impute._keys import Keys
from spatial_impute._settings import log_added, logger
from spatial_impute._stack import (
    answer,
    element_affine,
    load_record,
    load_transform,
    registration_problems,
    require_element_key,
    require_registration,
    resolve_sections,
    to_frames,
)
from spatial_impute._validation import require_key
from spatial_impute.tl._warp_element import Warp, section_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from spatialdata import SpatialData

    from spatial_impute._registration.transform import SectionTransform


def transfer_shapes(
    sdata: SpatialData,
    key: str,
    *,
    section: str | None = None,
    sections: str | Sequence[str] | None = None,
    key_added: str | None = None,
) -> None:
    """Carry shapes of one section, such as annotations of a pathologist, to other sections, deformations included.

    A place keeps its x and y in the common frame. How far the tissue of two sections is apart there is the expected
    error of the registration (:func:`spatial_impute.metrics.registration_quality`).

    Parameters
    ----------
    sdata
        Stack registered by :func:`register_stack`.
    key
        Shapes: polygons or circles.
    section
        Section of the shapes; by default the one section to which they have a transformation.
    sections
        Sections to carry them to; by default all other registered ones.
    key_added
        Names of the new shapes with the word ``{section}`` in it; ``"{key}_on_{section}"`` by default.

    Returns
    -------
    ``None``. Writes for each section `sdata.shapes['{key}_on_{section}']`: the shapes in the frame of that section
    (um), with their columns and names. Long edges get more vertices to follow a deformation. With the default names,
    shapes of an earlier call are replaced. After a new registration, call this again: the shapes keep their old places.

    Raises
    ------
    KeyError
        If the stack is not registered, the shapes do not exist or belong to no section, or a section is not registered.
    ValueError
        If the shapes belong to several sections and `section` is not given, there is no other section, or a new name is
        taken.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack()
    >>> si.tl.register_stack(sdata, method="rigid", show_progress_bar=False)
    >>> si.pp.segment_tissue(sdata, sections="s1")
    >>> si.tl.transfer_shapes(sdata, "s1_tissue_outline")
    >>> sorted(name for name in sdata.shapes if "_on_" in name)
    ['s1_tissue_outline_on_s0', 's1_tissue_outline_on_s2']
    """
    from spatialdata.transformations import Identity, set_transformation

    record = load_record(sdata)
    rows = require_registration(record)["sections"]
    answer(registration_problems(sdata, record))
    require_key(key, sdata.shapes, where="sdata.shapes")
    section = section_of(sdata.shapes[key], key, record, section)
    names = [name for name in resolve_sections(record, sections) if name in rows or sections is not None]
    wanted = [name for name in names if name != section]
    if not wanted:
        msg = (
            f"{key!r} belongs to section {section!r}, and there is no other section to carry it to. Registered are "
            f"{list(rows)}."
        )
        raise ValueError(msg)
    pattern = Keys.carried(key, "{section}") if key_added is None else key_added
    if not isinstance(pattern, str) or "{section}" not in pattern:
        msg = f"`key_added` must contain the word {{section}}, one name for each section; found {pattern!r}."
        raise ValueError(msg)
    keys = {name: pattern.replace("{section}", name) for name in wanted}
    for new in keys.values():
        ours = [new] if key_added is None else []
        require_element_key(sdata, new, name="key_added", kind="shapes", ours=ours)
    to_section, transform = element_affine(sdata.shapes[key], section), load_transform(sdata, record, section)
    found = {}
    for name in wanted:
        back = load_transform(sdata, record, name)
        found[name] = _Carry(to_section, transform, name, back).shapes(sdata.shapes[key])
    for name, shapes in found.items():
        for system, transformation in to_frames(record, name, Identity()).items():
            set_transformation(shapes, transformation, to_coordinate_system=system)
        sdata.shapes[keys[name]] = shapes
        log_added(f"shapes[{keys[name]!r}]")
    errors = {name: rows[name].get("error_um") for name in [*wanted, section]}
    logger.info("Expected errors of the places, um: %s", {n: e if e is None else round(e) for n, e in errors.items()})


@dataclass(frozen=True)
class _Carry(Warp):
    """From an element of one section to the frame of another one."""

    back: SectionTransform
    """Of the other section."""

    def __call__(self, xy: np.ndarray) -> np.ndarray:
        """(n, 2) coordinates of the element in the frame of the other section, um."""
        return self.back.inverse(super().__call__(xy))

    @property
    def grids(self) -> list[np.ndarray]:
        """Grids of both deformations."""
        return [transform.grid for transform in (self.transform, self.back) if transform.grid is not None]
