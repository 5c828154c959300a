"""Offset and scale of each gene on each measured section, from the places that all measured sections share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse
from scipy.spatial import cKDTree

if TYPE_CHECKING:
    from spatial_impute.models._spots import Spots

_REACH = 1.5  # spot spacings: a section covers a place if it has a spot that near
_WIDTH = 1.0  # spot spacings; of the kernel that smooths a section, so that counting noise has less weight
_CUT = 3.0  # widths of the kernel
_BLOCK = 2.0  # spot spacings; of blocks that are left out to see how sure an estimate is
_LEAST_BLOCKS = 5
_MOST_RATIO = 4.0  # of spreads


@dataclass(frozen=True)
class Match:
    """Result of :func:`match_sections`; rows are the measured sections in ascending order."""

    expression: np.ndarray  # (n_known, g)
    shift: np.ndarray  # (s, g) what a section is above the others, without a linear trend along z
    ratio: np.ndarray  # (s, g) spread of a section over that of the others
    n_places: int  # that all sections share


def match_sections(spots: Spots) -> Match:
    """Bring the measured sections to a common offset and scale of each gene.

    All sections are smoothed and read at the places that all of them cover. A straight line along z through their means
    is kept, so that a real gradient stays; what a section lies off this line (Theil-Sen, so that one odd section does not
    tilt it) is its shift. Estimates are shrunk by their standard error: blocks of places are left out in turn. Raises a
    ``ValueError`` if sections share too few places.
    """
    known = np.flatnonzero(spots.known)
    section, plane = spots.section[known], spots.xyz[known, :2]
    codes = np.unique(section)
    z = np.array([np.median(spots.xyz[known[section == code], 2]) for code in codes])
    trees = [cKDTree(plane[section == code]) for code in codes]
    shared = np.all([tree.query(plane)[0] <= _REACH * spots.spacing for tree in trees], axis=0)
    places = plane[shared]
    block = np.unique(
        np.floor((places - places.min(axis=0, initial=np.inf)) / (_BLOCK * spots.spacing)), axis=0, return_inverse=True
    )[1].ravel()
    n_blocks = int(block.max(initial=-1)) + 1
    if n_blocks < _LEAST_BLOCKS:
        msg = (
            f"The measured sections share only {len(places)} places ({n_blocks} blocks of {_BLOCK:g} spot spacings, at least "
            f"{_LEAST_BLOCKS} are needed), so their offsets cannot be distinguished from differences of the tissue."
        )
        raise ValueError(msg)
    fields = [
        _smooth(tree, spots.expression[section == code], places, _WIDTH * spots.spacing)
        for tree, code in zip(trees, codes, strict=True)
    ]
    # Sums by block suffice to leave out each of them: (blocks,) places, (blocks, s, g) values and squares.
    members = np.eye(n_blocks)[block]
    values = np.stack([members.T @ f for f in fields], axis=1)
    squares = np.stack([members.T @ f**2 for f in fields], axis=1)
    sums = members.sum(axis=0), values, squares
    whole = [part.sum(axis=0) for part in sums]
    everything = _estimate(*whole, z=z)
    left = [
        _estimate(*(total - part[k] for total, part in zip(whole, sums, strict=True)), z=z) for k in range(n_blocks)
    ]
    shift, log_ratio = (_shrink(whole, np.stack([part[i] for part in left])) for i, whole in enumerate(everything[:2]))
    ratio = np.exp(np.clip(log_ratio, -np.log(_MOST_RATIO), np.log(_MOST_RATIO)))
    row = np.searchsorted(codes, section)
    centre = everything[2][row]
    return Match((spots.expression - centre) / ratio[row] + centre - shift[row], shift, ratio, len(places))


def _smooth(tree: cKDTree, values: np.ndarray, places: np.ndarray, width: float) -> np.ndarray:
    """(n_places, g) mean of the spots of a section, weighted by a Gaussian of distance."""
    near = cKDTree(places).sparse_distance_matrix(tree, _CUT * width, output_type="coo_matrix")
    weight = np.exp(-0.5 * (near.data / width) ** 2)
    matrix = sparse.csr_matrix((weight, (near.row, near.col)), shape=near.shape)
    return (matrix @ values) / np.asarray(matrix.sum(axis=1))


def _estimate(
    count: np.ndarray, first: np.ndarray, second: np.ndarray, *, z: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(s, g) shift, log ratio of spreads, and mean of each section, from sums over places."""
    mean = first / count
    spread = 0.5 * np.log(np.maximum(second / count - mean**2, 1e-12))
    later, earlier = np.triu_indices(len(z), k=1)[::-1]
    slope = np.median((mean[later] - mean[earlier]) / (z[later] - z[earlier])[:, None], axis=0)
    line = mean - slope * z[:, None]
    return line - np.median(line, axis=0), spread - np.median(spread, axis=0), mean


def _shrink(whole: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Estimates times the share of their square that is not error; `left` (k, s, g) are those without a block each."""
    k = len(left)
    error = (k - 1) / k * ((left - left.mean(axis=0)) ** 2).sum(axis=0)
    return whole * np.maximum(1 - error / np.maximum(whole**2, 1e-300), 0.0)
