"""Tissue masks of the sections as labels and outlines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from spatial_impute._image.levels import read_thumbnail
from spatial_impute._image.tissue import tissue_mask
from spatial_impute._keys import Keys
from spatial_impute._settings import log_added, logger
from spatial_impute._stack.elements import plane_affine, section_images, section_levels, to_frames
from spatial_impute._stack.record import attrs_record, load_record, resolve_sections
from spatial_impute._validation import require_positive

if TYPE_CHECKING:
    from collections.abc import Sequence

    from geopandas import GeoDataFrame
    from spatialdata import SpatialData


def segment_tissue(sdata: SpatialData, *, sections: str | Sequence[str] | None = None, resolution: float = 8.0) -> None:
    """Find the tissue on the H&E image of each section.

    Parameters
    ----------
    sdata
        Stack.
    sections
        Sections to segment; all by default.
    resolution
        Pixel size of the mask in um. The image is read from the nearest finer level of its pyramid.

    Returns
    -------
    ``None``. Writes for each section:

    `sdata.labels['{section}_tissue']`
        1 in tissue, 0 elsewhere, at `resolution`, with a transformation to the section (um).
    `sdata.shapes['{section}_tissue_outline']`
        One polygon per piece of tissue in um, with its ``area`` in um^2.

    Raises
    ------
    ValueError
        If a section shows no tissue. Then nothing is written.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack(extent=1400.0)
    >>> si.pp.segment_tissue(sdata)
    >>> "s0_tissue" in sdata.labels
    True
    """
    from spatialdata.models import Labels2DModel
    from spatialdata.transformations import Identity

    record = load_record(sdata)
    resolution = require_positive(resolution, name="resolution", unit="um per pixel")
    found = {}
    for name in resolve_sections(record, sections):
        image = record[name].image
        rgb, to_um = read_thumbnail(section_levels(sdata, record[name]), resolution)
        mask = tissue_mask(rgb, np.linalg.norm(to_um[:2, :2], axis=0).mean())
        if not mask.any():
            msg = (
                f"No tissue found on `sdata.images[{image!r}]` (section {name!r}); its grey values run from "
                f"{rgb.min():.0f} to {rgb.max():.0f}. Check the image, or make the stack without this section."
            )
            raise ValueError(msg)
        found[name] = (mask, to_um, _outline(mask, to_um, to_frames(record, name, Identity())))
    ours = attrs_record(sdata)
    images = {**ours.get(Keys.TISSUE, {}), **section_images(sdata, record, found)}
    sdata.attrs = {**sdata.attrs, Keys.ATTRS: {**ours, Keys.TISSUE: images}}
    for name, (mask, to_um, outline) in found.items():
        frames = to_frames(record, name, plane_affine(to_um))
        labels = Labels2DModel.parse(mask.astype(np.uint8), dims=("y", "x"), transformations=frames)
        sdata.labels[Keys.tissue(name)] = labels
        log_added(f"labels[{Keys.tissue(name)!r}]")
        sdata.shapes[Keys.tissue_outline(name)] = outline
        log_added(f"shapes[{Keys.tissue_outline(name)!r}]")
        logger.info("Section %s: %.2f mm2 of tissue", name, outline["area"].sum() / 1e6)


def _outline(mask: np.ndarray, to_um: np.ndarray, transformations: dict[str, Any]) -> GeoDataFrame:
    """Polygons around the pieces of a mask, in um, holes kept."""
    import geopandas as gpd
    import shapely
    from shapely.affinity import affine_transform
    from skimage.measure import find_contours
    from spatialdata.models import ShapesModel

    # Contours of the padded mask close at the image border; pixel centre i lies at i + 0.5.
    rings = [ring[:, ::-1] - 0.5 for ring in find_contours(np.pad(mask, 1).astype(float), 0.5) if len(ring) > 3]
    outline = shapely.Polygon()
    for ring in sorted((shapely.Polygon(r).buffer(0) for r in rings), key=lambda p: -p.area):
        outline = outline.symmetric_difference(ring)  # a ring inside another one is a hole
    matrix = [to_um[0, 0], to_um[0, 1], to_um[1, 0], to_um[1, 1], to_um[0, 2], to_um[1, 2]]
    pieces = [p for p in shapely.get_parts(affine_transform(outline, matrix)) if p.area > 0]
    frame = gpd.GeoDataFrame({"area": [p.area for p in pieces]}, geometry=pieces)
    return ShapesModel.parse(frame, transformations=transformations)
