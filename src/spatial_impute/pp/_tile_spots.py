"""Lay virtual spots on sections that have none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from spatial_impute._geometry import apply_affine, grid_in_box
from spatial_impute._keys import Keys
from spatial_impute._logging import log_added
from spatial_impute._stack.elements import element_affine, spot_geometry, to_frames
from spatial_impute._stack.record import load_record, resolve_sections, save_record
from spatial_impute._stack.table import build_stack_table
from spatial_impute._validation import require_key, require_one_of, require_positive

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spatialdata import SpatialData

    from spatial_impute._stack.record import Section, StackRecord


_POINTS_AT_A_TIME = 2**18  # lattice points, each sampled 48 times: some 400 MB


def tile_spots(
    sdata: SpatialData,
    *,
    sections: str | Sequence[str] | None = None,
    spot_diameter: float | None = None,
    spacing: float | None = None,
    layout: str = "hex",
    min_tissue_fraction: float = 0.5,
) -> None:
    """Lay a grid of virtual spots over the tissue of sections without spots.

    Parameters
    ----------
    sdata
        Stack whose wanted sections were segmented by :func:`~spatial_impute.pp.segment_tissue`.
    sections
        Sections to lay spots on; by default all that have none.
    spot_diameter, spacing
        Diameter and centre-to-centre distance in um. By default those of the measured section.
    layout
        ``"hex"`` (Visium) or ``"square"`` (ST arrays, Visium HD).
    min_tissue_fraction
        Share of a spot's area that must be tissue.

    Returns
    -------
    ``None``. Writes:

    `sdata.shapes['{section}_spots']`
        Circles in um.
    `sdata.tables['stack']`
        Built anew with rows for the new spots. Expression, features and graphs must be made afterwards.

    Raises
    ------
    KeyError
        If a section has no tissue labels.
    ValueError
        If a section has spots already, or sizes are neither given nor found on a measured section.

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
    import geopandas as gpd
    from spatialdata.models import ShapesModel
    from spatialdata.transformations import Identity

    record = load_record(sdata)
    require_one_of(layout, {"hex", "square"}, name="layout")
    if not isinstance(min_tissue_fraction, int | float | np.number) or not 0 <= min_tissue_fraction <= 1:
        msg = f"`min_tissue_fraction` must lie between 0 and 1, found {min_tissue_fraction!r}."
        raise ValueError(msg)
    bare = [s.name for s in record.sections if s.spots is None or (s.counts is None and s.spots not in sdata.shapes)]
    wanted = bare if sections is None else resolve_sections(record, sections)
    for name in wanted:
        if name not in bare:
            msg = (
                f"Section {name!r} has spots already (`sdata.shapes[{record[name].spots!r}]`). To lay others on a section "
                f"that was not measured, delete them first: `del sdata.shapes[{record[name].spots!r}]`."
            )
            raise ValueError(msg)
        require_key(
            Keys.tissue(name), sdata.labels, where="sdata.labels", then="Run `si.pp.segment_tissue(sdata)` first."
        )
    if not wanted:
        return
    diameter, spacing = _sizes(sdata, record, spot_diameter, spacing)
    centers = {}
    for name in wanted:
        labels = sdata.labels[Keys.tissue(name)]
        mask = np.asarray(labels.data) > 0
        centers[name] = _grid_on_tissue(
            mask,
            element_affine(labels, name),
            spacing=spacing,
            radius=diameter / 2,
            layout=layout,
            min_fraction=min_tissue_fraction,
        )
        if not len(centers[name]):
            msg = (
                f"No spot of diameter {diameter:g} um lies on the tissue of section {name!r} "
                f"(at least {min_tissue_fraction:.0%} of its area). Lower `min_tissue_fraction` or `spot_diameter`."
            )
            raise ValueError(msg)
    for name, points in centers.items():
        # Ids are strings, as barcodes are: one table cannot join both strings and numbers.
        frame = gpd.GeoDataFrame(
            {"radius": np.full(len(points), diameter / 2)},
            geometry=gpd.points_from_xy(*points.T),
            index=[str(i) for i in range(len(points))],
        )
        sdata.shapes[Keys.spots(name)] = ShapesModel.parse(frame, transformations=to_frames(record, name, Identity()))
        log_added(f"shapes[{Keys.spots(name)!r}]")
        record = record.with_section(_with_spots(record, name))
    save_record(sdata, record)
    build_stack_table(sdata, record)


def _with_spots(record: StackRecord, name: str) -> Section:
    from dataclasses import replace

    return replace(record[name], spots=Keys.spots(name))


def _sizes(
    sdata: SpatialData, record: StackRecord, spot_diameter: float | None, spacing: float | None
) -> tuple[float, float]:
    """Diameter and spacing in um: as given, else those of the first measured section."""
    from scipy.spatial import cKDTree

    if spot_diameter is None or spacing is None:
        measured = [section for section in record.sections if section.counts is not None]
        if not measured:
            msg = "Give `spot_diameter` and `spacing` (um): the stack has no measured section to take them from."
            raise ValueError(msg)
        centers, radius, _ = spot_geometry(sdata, measured[0])
        spot_diameter = 2 * float(np.median(radius)) if spot_diameter is None else spot_diameter
        if spacing is None:
            if len(centers) < 2:
                msg = f"Give `spacing` (um): section {measured[0].name!r} has only one spot to take it from."
                raise ValueError(msg)
            spacing = float(np.median(cKDTree(centers).query(centers, k=2)[0][:, 1]))
    return (
        require_positive(spot_diameter, name="spot_diameter", unit="um"),
        require_positive(spacing, name="spacing", unit="um"),
    )


def _grid_on_tissue(
    mask: np.ndarray, to_um: np.ndarray, *, spacing: float, radius: float, layout: str, min_fraction: float
) -> np.ndarray:
    """Lattice points in um whose discs lie on tissue by at least the given fraction of their area."""
    rows, columns = np.nonzero(mask)
    corners = apply_affine(np.column_stack([columns, rows]) + 0.5, to_um)
    (x0, y0), (x1, y1) = corners.min(axis=0), corners.max(axis=0)
    grid = grid_in_box(x0, y0, x1, y1, spacing=spacing, layout=layout)
    # Rings of equal area, sampled evenly: the mean over the points estimates the covered share of the disc.
    rings = np.sqrt((np.arange(4) + 0.5) / 4)
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    disc = radius * np.array([(r * np.cos(a), r * np.sin(a)) for r in rings for a in angles])
    from_um = np.linalg.inv(to_um)
    kept = [np.empty((0, 2))]
    for start in range(0, len(grid), _POINTS_AT_A_TIME):
        points = grid[start : start + _POINTS_AT_A_TIME]
        pixels = apply_affine((points[:, None] + disc).reshape(-1, 2), from_um)
        column, row = np.floor(pixels).astype(int).T
        inside = (column >= 0) & (row >= 0) & (column < mask.shape[1]) & (row < mask.shape[0])
        covered = np.zeros(len(pixels))
        covered[inside] = mask[row[inside], column[inside]]
        kept.append(points[covered.reshape(len(points), -1).mean(axis=1) >= min_fraction])
    return np.concatenate(kept)
