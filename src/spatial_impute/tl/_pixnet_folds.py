"""PixNet at the spots of stacks, every measured spot by a model that has not seen it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from spatial_impute._keys import Keys
from spatial_impute._stack.record import load_record
from spatial_impute.tl._fit_pixnet import fit_pairs
from spatial_impute.tl._read_regions import find_frame, read_levels, read_shapes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from anndata import AnnData
    from spatialdata import SpatialData

    from spatial_impute.encoders._pyramids import Pyramid
    from spatial_impute.models._params import PixNetParams
    from spatial_impute.models.pixnet._model import PixNetModel


@dataclass(frozen=True)
class SectionSpots:
    """Image and spots of one section, and where these stand among the spots of all stacks."""

    sdata: SpatialData
    image: str
    shapes: str
    rows: np.ndarray
    """(n_shapes,) position of each shape."""


@dataclass(frozen=True)
class PixNetSetup:
    """How PixNet is to be fitted."""

    pyramid: Pyramid
    params: PixNetParams
    table_key: str
    layer: str
    tile_size: int
    device: str
    seed: int


def read_sections(sdata: SpatialData, table: AnnData, first: int = 0) -> list[SectionSpots]:
    """Sections with spots, whose rows are counted from `first`."""
    found = []
    for section in load_record(sdata).sections:
        if section.spots is None:
            continue
        ids = sdata.shapes[section.spots].index.astype(str)
        rows = np.flatnonzero(table.obs[Keys.REGION].astype(str) == section.spots)
        place = ids.get_indexer(table.obs[Keys.INSTANCE].astype(str).iloc[rows])
        positions = np.full(len(ids), -1)
        positions[place[place >= 0]] = first + rows[place >= 0]
        found.append(SectionSpots(sdata, section.image, section.spots, positions))
    return found


def fit_on(sections: Sequence[SectionSpots], rows: np.ndarray, setup: PixNetSetup) -> PixNetModel:
    """Fit on the spots at these positions, (n,) bool."""
    return fit_pairs(
        [(s.sdata, s.image, s.shapes, setup.table_key) for s in sections],
        setup.pyramid,
        setup.params,
        layer=setup.layer,
        tile_size=setup.tile_size,
        device=setup.device,
        seed=setup.seed,
        steps=lambda _total: lambda: None,
        known=[(s.rows >= 0) & rows[s.rows] for s in sections],
    )


def predict_spots(
    sections: Sequence[SectionSpots], rows: np.ndarray, model: PixNetModel, setup: PixNetSetup
) -> np.ndarray:
    """(n, n_genes) values at the spots at these positions, (n,) bool; NaN elsewhere and off the images."""
    from spatial_impute._image.resampling import slide_overview

    result = np.full((len(rows), len(model.var_names)), np.nan)
    model.network.to(setup.device)
    for section in sections:
        wanted = np.flatnonzero((section.rows >= 0) & rows[section.rows])
        if not len(wanted):
            continue
        frame = find_frame(section.sdata, section.image, section.shapes, coordinate_system=None, mpp=None)
        regions, _ = read_shapes(section.sdata, section.shapes, frame)
        levels = read_levels(section.sdata, section.image, frame)
        image, stain = model._image(levels), model._stain(slide_overview(levels))
        in_px = regions.take(wanted).moved(image.from_um)
        index = model.gene_index(None)
        result[section.rows[wanted]] = model._read_regions(image, stain, in_px, index, core=setup.tile_size).expression
    return result


def predict_held_out(
    sections: Sequence[SectionSpots],
    known: np.ndarray,
    folds: Sequence[np.ndarray],
    setup: PixNetSetup,
    on_fold: Callable[[], None],
) -> np.ndarray:
    """(n, n_genes) each fold by a model fitted on the known spots of the others; NaN for spots in no fold."""
    result = np.empty((0, 0))
    for fold in folds:
        model = fit_on(sections, known & ~fold, setup)
        found = predict_spots(sections, fold, model, setup)
        result = result if result.size else found
        result[fold] = found[fold]
        on_fold()
    return result
