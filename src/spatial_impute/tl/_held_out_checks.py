"""Whether what is held out can also be seen in what a method learns from."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from spatial_impute._logging import logger
from spatial_impute._stack.elements import section_levels
from spatial_impute._stack.record import load_record

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd
    from spatialdata import SpatialData

_OVERLAP = 0.98  # of the sum of two radii: spots that touch do not overlap, but for rounding


def warn_of_shared_groups(folds: Sequence[np.ndarray], known: np.ndarray, group: pd.Series) -> list[str]:
    """Warn if measured spots of one group (patient, block of tissue) are both held out and learned from."""
    shared = set()
    for fold in folds:
        shared |= set(group[fold]) & set(group[known & ~fold])
    if shared:
        logger.warning(
            "Folds share %d of the groups of %r, e.g. %s: the scores are those of further tissue of known groups, not of "
            'new ones. Use `split="group"` for these.',
            len(shared),
            group.name,
            sorted(map(str, shared))[:3],
        )
    return sorted(map(str, shared))


def warn_of_overlapping_spots(
    folds: Sequence[np.ndarray], known: np.ndarray, section: np.ndarray, centers: np.ndarray, radius: np.ndarray
) -> int:
    """Warn if held-out spots share tissue with spots that are learned from.

    Parameters
    ----------
    folds
        (n,) bool each.
    known
        (n,) measured spots.
    section
        (n,) section of each spot.
    centers
        (n, 2) in the frame of the section, um.
    radius
        (n,) um.

    Returns
    -------
    How many held-out spots.
    """
    from scipy.spatial import cKDTree

    found = np.zeros(len(known), bool)
    for fold in folds:
        for code in np.unique(section[fold]):
            here = section == code
            held, rest = np.flatnonzero(fold & here), np.flatnonzero(known & ~fold & here)
            if not len(rest):
                continue
            reach = radius[held].max() + radius[rest].max()
            pairs = cKDTree(centers[held]).query_ball_tree(cKDTree(centers[rest]), reach)
            for spot, near in zip(held, pairs, strict=True):
                apart = np.linalg.norm(centers[rest[near]] - centers[spot], axis=1)
                found[spot] |= bool((apart < _OVERLAP * (radius[rest[near]] + radius[spot])).any())
    if found.any():
        logger.warning(
            "%d of %d held-out spots overlap spots that methods learn from: the scores are too high. Hold out whole "
            'sections (`split="section"`), or thin out the spots.',
            int(found.sum()),
            int(np.any(folds, axis=0).sum()),
        )
    return int(found.sum())


def warn_of_equal_images(
    objects: Sequence[SpatialData],
    sections: Mapping[int, tuple[int, str]],
    folds: Sequence[np.ndarray],
    spots: np.ndarray,
) -> list[tuple[str, str]]:
    """Warn if two sections have one and the same image and are not held out together.

    Parameters
    ----------
    objects
        Stacks.
    sections
        Object and name of each section code.
    folds
        (n,) bool each.
    spots
        (n,) section code of each measured spot, -1 of others.
    """
    from spatial_impute.encoders._feature_cache import image_identity

    codes = np.unique(spots[spots >= 0])
    identity = {}
    for code in codes:
        sdata, name = objects[sections[code][0]], sections[code][1]
        identity[code] = image_identity(section_levels(sdata, load_record(sdata)[name]), across_sessions=True)
    apart = {code: tuple(bool(np.any(fold & (spots == code))) for fold in folds) for code in codes}
    equal = [
        (sections[a][1], sections[b][1])
        for a, b in combinations(codes, 2)
        if identity[a] == identity[b] and (apart[a] != apart[b] or sum(apart[a]) > 1)
    ]
    for a, b in equal:
        logger.warning(
            "Sections %r and %r have the same image and are not held out together: the scores are too high. Leave one out.",
            a,
            b,
        )
    return equal
