"""Virtual spots for sections without spots."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from spatial_impute._geometry import apply_affine, grid_in_box, lattice_of
from spatial_impute._graph import typical_spacing
from spatial_impute._keys import Keys
from spatial_impute._settings import log_added
from spatial_impute._stack import (
    answer,
    build_stack_table,
    element_affine,
    load_record,
    resolve_sections,
    save_record,
    spot_geometry,
    tissue_problems,
    to_frames,
)
from spatial_impute._validation import require_key, require_one_of, require_positive

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spatialdata import SpatialData

    from spatial_impute._stack import StackRecord


_POINTS_AT_A_TIME = 2**18  # lattice points, each sampled 48 times: some 400 MB


def tile_spots(
    sdata: SpatialData,
    *,
    sections: str | Sequence[str] | None = None,
    spot_diameter: float | None = None,
    spacing: float | None = None,
    layout: str | None = None,
    min_tissue_fraction: float = 0.5,
) -> None:
    """Lay a grid of virtual spots over the tissue of sections without spots.

    Parameters
    ----------
    sdata
        Stack with tissue masks from :func:`~spatial_impute.pp.segment_tissue`.
    sections
        Names of the sections; by default all without spots.
    spot_diameter
        Diameter of a spot in um. By default that of the first measured section.
    spacing
        Centre-to-centre distance of the spots in um. By default that of the first measured section.
    layout
        ``"hex"`` (Visium) or ``"square"`` (ST arrays, Visium HD). By default that of the first measured section.
    min_tissue_fraction
        Share of a spot's area that must be tissue.

    Returns
    -------
    ``None``. Writes:

    `sdata.shapes['{section}_spots']`
        Circles in um.
    `sdata.tables['stack']`
        Built again with rows for the new spots. Make expression, features and graphs afterwards.

    Raises
    ------
    KeyError
        If a section has no tissue labels.
    ValueError
        If a section already has spots, or sizes are neither given nor known from a measured section.

    Examples
    --------
    >>> import numpy as np
    >>> import spatial_impute as si
    >>> image = np.full((400, 400, 3), 240, dtype=np.uint8)
    >>> image[100:300, 100:300] = [180, 90, 150]
    >>> sdata = si.pp.assemble_stack({"s0": image}, mpp=5.0, z=[0.0])
    >>> si.pp.segment_tissue(sdata)
    >>> si.pp.tile_spots(sdata, spot_diameter=55, spacing=100)
    >>> sdata.tables["stack"].n_obs > 80
    True
    """
    record = load_record(sdata)
    if layout is not None:
        require_one_of(layout, {"hex", "square"}, name="layout")
    if not isinstance(min_tissue_fraction, int | float | np.number) or not 0 <= min_tissue_fraction <= 1:
        msg = f"`min_tissue_fraction` must lie between 0 and 1, found {min_tissue_fraction!r}."
        raise ValueError(msg)
    wanted = _sections_without_spots(sdata, record, sections)
    if not wanted:
        return
    answer(tissue_problems(sdata, record))
    lattice = _lattice(sdata, record, (spot_diameter, spacing, layout), min_tissue_fraction)
    centers = {name: _grid_on_tissue(sdata, name, lattice) for name in wanted}
    for name, points in centers.items():
        record = _write_spots(sdata, record, name, points, 2 * lattice.radius)
    save_record(sdata, record)
    build_stack_table(sdata, record)


@dataclass(frozen=True)
class _Lattice:
    """Lattice of virtual spots; lengths in um."""

    spacing: float
    radius: float
    layout: str
    min_fraction: float


def _sections_without_spots(sdata: SpatialData, record: StackRecord, sections: str | Sequence[str] | None) -> list[str]:
    """Names of the wanted sections, all segmented and without spots."""
    bare = [s.name for s in record.sections if s.spots is None or (s.counts is None and s.spots not in sdata.shapes)]
    wanted = bare if sections is None else resolve_sections(record, sections)
    for name in wanted:
        if name not in bare:
            msg = (
                f"Section {name!r} has spots already (`sdata.shapes[{record[name].spots!r}]`). To lay other spots on a "
                f"section that was not measured, delete them first: `del sdata.shapes[{record[name].spots!r}]`."
            )
            raise ValueError(msg)
        require_key(
            Keys.tissue(name), sdata.labels, where="sdata.labels", then="Run `si.pp.segment_tissue(sdata)` first."
        )
    return wanted


def _write_spots(
    sdata: SpatialData, record: StackRecord, name: str, points: np.ndarray, diameter: float
) -> StackRecord:
    """Write the spots of a section and return the record with them."""
    import geopandas as gpd
    from spatialdata.models import ShapesModel
    from spatialdata.transformations import Identity

    # Ids are strings like barcodes: one table cannot join both strings and numbers.
    frame = gpd.GeoDataFrame(
        {"radius": np.full(len(points), diameter / 2)},
        geometry=gpd.points_from_xy(*points.T),
        index=[str(i) for i in range(len(points))],
    )
    sdata.shapes[Keys.spots(name)] = ShapesModel.parse(frame, transformations=to_frames(record, name, Identity()))
    log_added(f"shapes[{Keys.spots(name)!r}]")
    return record.with_section(replace(record[name], spots=Keys.spots(name)))


def _lattice(
    sdata: SpatialData, record: StackRecord, given: tuple[float | None, float | None, str | None], min_fraction: float
) -> _Lattice:
    """Lattice of the given diameter, spacing and layout; what is None is that of the first measured section."""
    diameter, spacing, layout = given
    measured = [section for section in record.sections if section.counts is not None]
    if not measured and (diameter is None or spacing is None):
        msg = "Give `spot_diameter` and `spacing` (um): the stack has no measured section with known sizes."
        raise ValueError(msg)
    if measured and None in given:
        centers, radius, _ = spot_geometry(sdata, measured[0])
        diameter = 2 * float(np.median(radius)) if diameter is None else diameter
        found = lattice_of(centers)
        layout = found[1] if layout is None and found is not None else layout
        if spacing is None:
            if len(centers) < 2:
                msg = f"Give `spacing` (um): section {measured[0].name!r} has only one spot."
                raise ValueError(msg)
            spacing = typical_spacing(centers, np.zeros(len(centers))) if found is None else found[0]
    return _Lattice(
        require_positive(spacing, name="spacing", unit="um"),
        require_positive(diameter, name="spot_diameter", unit="um") / 2,
        layout or "hex",
        min_fraction,
    )


def _grid_on_tissue(sdata: SpatialData, name: str, lattice: _Lattice) -> np.ndarray:
    """Lattice points in um whose discs lie on the tissue of a section by at least the given share of their area."""
    labels = sdata.labels[Keys.tissue(name)]
    mask, to_um = np.asarray(labels.data) > 0, element_affine(labels, name)
    rows, columns = np.nonzero(mask)
    corners = apply_affine(np.column_stack([columns, rows]) + 0.5, to_um)
    grid = grid_in_box(*corners.min(axis=0), *corners.max(axis=0), spacing=lattice.spacing, layout=lattice.layout)
    # Rings of equal area, sampled evenly: the mean over the points estimates the share of the disc on tissue.
    rings = np.sqrt((np.arange(4) + 0.5) / 4)
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    disc = lattice.radius * np.array([(r * np.cos(a), r * np.sin(a)) for r in rings for a in angles])
    from_um = np.linalg.inv(to_um)
    kept = [np.empty((0, 2))]
    for start in range(0, len(grid), _POINTS_AT_A_TIME):
        points = grid[start : start + _POINTS_AT_A_TIME]
        pixels = apply_affine((points[:, None] + disc).reshape(-1, 2), from_um)
        column, row = np.floor(pixels).astype(int).T
        inside = (column >= 0) & (row >= 0) & (column < mask.shape[1]) & (row < mask.shape[0])
        covered = np.zeros(len(pixels))
        covered[inside] = mask[row[inside], column[inside]]
        kept.append(points[covered.reshape(len(points), -1).mean(axis=1) >= lattice.min_fraction])
    found = np.concatenate(kept)
    if not len(found):
        msg = (
            f"No spot of diameter {2 * lattice.radius:g} um lies on the tissue of section {name!r} "
            f"(at least {lattice.min_fraction:.0%} of its area). Lower `min_tissue_fraction` or `spot_diameter`."
        )
        raise ValueError(msg)
    return found
