"""Spots that a cross-validation holds out, and warnings where their scores would be too high."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from spatial_impute._settings import logger
from spatial_impute._stack import load_record, section_levels, spots_by_section
from spatial_impute.tl._impute_pixnet import section_spots

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd
    from anndata import AnnData
    from spatialdata import SpatialData

    from spatial_impute._stack import Section
    from spatial_impute.models._spots import Spots
    from spatial_impute.tl._impute_pixnet import SectionSpots

_OVERLAP = 0.98  # of the sum of two radii: spots that touch do not overlap, except for rounding


@dataclass(frozen=True)
class HeldOut:
    """Spots of all stacks, and the masks of the spots that are held out together."""

    stacks: list[SpatialData]
    tables: list[AnnData]
    by_stack: list[Spots]
    spots: Spots
    """Of all stacks, as the methods need them that use the image alone."""
    folds: list[np.ndarray]
    table_key: str
    layer: str

    def without(self, fold: np.ndarray) -> list[Spots]:
        """Stacks whose spots of the fold are hidden."""
        ends = np.cumsum([len(spots.known) for spots in self.by_stack])[:-1]
        return [spots.hide(own) for spots, own in zip(self.by_stack, np.split(fold, ends), strict=True)]

    @property
    def genes(self) -> list[str]:
        return list(self.tables[0].var_names)

    @property
    def truth(self) -> np.ndarray:
        """(n, n_genes); NaN where nothing was measured."""
        truth = np.full((len(self.spots.known), self.spots.expression.shape[1]), np.nan)
        truth[self.spots.known] = self.spots.expression
        return truth

    @property
    def first_rows(self) -> list[int]:
        """Position of the first spot of each stack."""
        return np.cumsum([0, *(table.n_obs for table in self.tables[:-1])]).tolist()

    @property
    def fold_of_spot(self) -> np.ndarray:
        """(n,) fold of each spot; -1 for spots in no fold."""
        inside = np.stack(self.folds)
        return np.where(inside.any(axis=0), inside.argmax(axis=0), -1)

    def sections(self) -> Iterator[tuple[SpatialData, Section, np.ndarray, np.ndarray, np.ndarray]]:
        """Stack and section, (n, 2) centers and (n,) radius of its spots in its frame, um, and their (n,) positions."""
        for sdata, table, first in zip(self.stacks, self.tables, self.first_rows, strict=True):
            for section, centers, radius, rows in spots_by_section(sdata, load_record(sdata), table):
                yield sdata, section, centers, radius, first + rows

    def pixnet_sections(self) -> list[SectionSpots]:
        """Sections with spots, as PixNet reads them."""
        options = {"table_key": self.table_key, "layer": self.layer}
        each = zip(self.stacks, self.tables, self.first_rows, strict=True)
        return [s for sdata, table, first in each for s in section_spots(sdata, table, first=first, **options)]

    def parts(self) -> list[np.ndarray]:
        """(n,) mask of the measured spots of each section."""
        section, known = self.spots.section, self.spots.known
        return [known & (section == code) for code in np.unique(section[known])]


def warn_of_shared_groups(data: HeldOut, group: pd.Series) -> None:
    """Warn if measured spots of one group (patient, block of tissue) are both held out and learned from."""
    shared = set()
    for fold in data.folds:
        shared |= set(group[fold]) & set(group[data.spots.known & ~fold])
    if shared:
        logger.warning(
            "Folds share %d of the groups of %r, e.g. %s: the scores are for more tissue of known groups, not for new "
            'groups. Use `split="group"` for new groups.',
            len(shared),
            group.name,
            sorted(map(str, shared))[:3],
        )


def warn_of_overlapping_spots(data: HeldOut) -> None:
    """Warn if held-out spots share tissue with spots that are learned from."""
    from scipy.spatial import cKDTree

    known = data.spots.known
    found = np.zeros(len(known), bool)
    for _, _, centers, radius, rows in data.sections():
        for fold in data.folds:
            held, rest = np.flatnonzero(fold[rows]), np.flatnonzero((known & ~fold)[rows])
            if not len(held) or not len(rest):
                continue
            reach = radius[held].max() + radius[rest].max()
            pairs = cKDTree(centers[held]).query_ball_tree(cKDTree(centers[rest]), reach)
            for spot, near in zip(held, pairs, strict=True):
                distance = np.linalg.norm(centers[rest[near]] - centers[spot], axis=1)
                found[rows[spot]] |= bool((distance < _OVERLAP * (radius[rest[near]] + radius[spot])).any())
    if found.any():
        logger.warning(
            "%d of %d held-out spots overlap spots that methods learn from: the scores are too high. Hold out whole "
            'sections (`split="section"`), or remove some of the spots.',
            int(found.sum()),
            int(np.any(data.folds, axis=0).sum()),
        )


def warn_of_equal_images(data: HeldOut) -> None:
    """Warn if two measured sections have the same image and are not held out together."""
    from spatial_impute._image.levels import image_fingerprint

    names, identity, apart = [], [], []
    for sdata, section, _, _, rows in data.sections():
        if data.spots.known[rows].any():
            names.append(section.name)
            identity.append(image_fingerprint(section_levels(sdata, section)))
            apart.append(tuple(bool((fold & data.spots.known)[rows].any()) for fold in data.folds))
    for a, b in combinations(range(len(names)), 2):
        if identity[a] == identity[b] and (apart[a] != apart[b] or sum(apart[a]) > 1):
            logger.warning(
                "Sections %r and %r have the same image and are not held out together: the scores are too high. Remove "
                "one of them.",
                names[a],
                names[b],
            )
