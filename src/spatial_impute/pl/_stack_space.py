"""Sections as a 3D stack of images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from spatial_impute._geometry import apply_affine
from spatial_impute._image.levels import read_thumbnail
from spatial_impute._image.tissue import tissue_mask
from spatial_impute._registration.transform import SectionTransform
from spatial_impute._stack.elements import section_levels, spot_geometry
from spatial_impute._stack.registration import load_transform
from spatial_impute.pl._space import draw_discs, draw_polygons, frame_space, make_space, resolve_stretch, stack_share
from spatial_impute.pl._utils import INK

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from spatialdata import SpatialData

    from spatial_impute._stack.record import Section, StackRecord

_PIXELS = 110  # along the longer side of a section: each is a polygon of its own


def stack_space(
    sdata: SpatialData,
    record: StackRecord,
    sections: list[Section],
    spot_colors: Mapping[str, np.ndarray],
    *,
    resolution: float | None,
    img_alpha: float,
    z_stretch: float | None,
    ax: Axes | Sequence[Axes] | None,
    figsize: tuple[float, float] | None,
) -> np.ndarray:
    """Tissue of every section at its place and height; spots of the sections that `spot_colors` has (n, 4) colours for.

    Sections lie in the common frame if the stack is registered, each in its own frame otherwise.
    """
    axis = make_space(ax, figsize)
    low, high = np.full(2, np.inf), np.full(2, -np.inf)
    for section in sections:
        registered = record.registration is not None and section.name in record.registration["sections"]
        place = load_transform(sdata, record, section.name) if registered else SectionTransform(np.eye(3))
        levels = section_levels(sdata, section)
        longest = max(levels[0].shape) * levels[0].pixel_size
        rgb, to_um = read_thumbnail(levels, resolution or longest / _PIXELS)
        mask = tissue_mask(rgb, tuple(np.linalg.norm(to_um[:2, :2], axis=0)))
        if mask.any():
            corners = _pixel_corners(mask, to_um, place, section.z)
            faces = np.clip(1 - img_alpha * (1 - rgb[mask] / 255.0), 0, 1)
            # Edges in the colour of the face close the seams that antialiasing leaves.
            draw_polygons(axis, corners, facecolors=faces, edgecolors=faces, linewidths=0.3, rasterized=True)
            low, high = np.minimum(low, corners[..., :2].min((0, 1))), np.maximum(high, corners[..., :2].max((0, 1)))
        if section.spots is None:
            continue
        centers, radius, _ = spot_geometry(sdata, section)
        centers = place.points(centers)
        low, high = np.minimum(low, centers.min(axis=0)), np.maximum(high, centers.max(axis=0))
        if section.name in spot_colors:
            xyz = np.column_stack([centers, np.full(len(centers), section.z)])
            draw_discs(axis, xyz, radius, facecolors=spot_colors[section.name], edgecolors="none")
    if not np.isfinite(low).all():
        low, high = np.zeros(2), np.full(2, longest)
    stretch = resolve_stretch(
        z_stretch, (high - low).max(), np.ptp([section.z for section in sections]), share=stack_share(len(sections))
    )
    measured = [section.name for section in sections if section.counts is not None]
    frame_space(axis, np.array([low, high]), sections, measured=measured, stretch=stretch)
    if record.registration is None:
        axis.text2D(0.5, 0.0, "not registered", transform=axis.transAxes, ha="center", fontsize="small", color=INK)
    return np.array([axis], dtype=object)


def _pixel_corners(mask: np.ndarray, to_um: np.ndarray, place: SectionTransform, z: float) -> np.ndarray:
    """(n_pixels, 4, 3) corners of the tissue pixels in the common frame."""
    height, width = mask.shape
    rows, columns = np.indices((height + 1, width + 1)).reshape(2, -1)
    points = place.points(apply_affine(np.column_stack([columns, rows]), to_um)).reshape(height + 1, width + 1, 2)
    y, x = np.nonzero(mask)
    corners = np.stack([points[y, x], points[y, x + 1], points[y + 1, x + 1], points[y + 1, x]], axis=1)
    return np.concatenate([corners, np.full((*corners.shape[:2], 1), z)], axis=-1)
