"""Agreement of two images in a pose: correlation of structure, and mutual information."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage as ndi

from spatial_impute._registration.channel import inside_only
from spatial_impute._registration.quality import common_tissue, pull_back

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from spatial_impute._registration.channel import Channel
    from spatial_impute._registration.transform import DisplacementField

# Standard deviations in working pixels: texture and regions of a section of about 320 pixels. They follow the working
# grid, not um, because what can be compared between serial sections is structure on the scale of the section.
_STRUCTURE_SCALES = (2.0, 6.0)
_EDGE = 1.0  # working pixels: scale of the edges
_N_BINS = 24  # of the mutual information; thousands of pixels fill their squares
_FULL_OVERLAP = 0.9  # serial sections differ by about this much at their edges; more overlap is no further evidence
_MIN_OVERLAP = 0.05  # share of the smaller tissue below which a correlation would be read off too few pixels
_TILES = 8  # along the longer side, each left out in turn: larger than the structure, and enough of them for an error


class StructureScore:
    """Agreement of structure inside the common tissue, for many poses.

    The score is the mean over scales of the correlation inside the overlap of the masks, times the share of the smaller
    tissue that overlaps. Unlike Dice it uses the content. It can distinguish 0 from 180 degrees, and a section that lost
    half of its tissue can still score well.

    Parameters
    ----------
    look
        ``"stain"``, or ``"edges"`` for the strength of edges. Another stain may turn dark into pale but keeps the edges.
        Between H&E sections, edges often separate right from wrong poses better. In tissue of scattered nuclei edges
        are noise, and the stain is better.
    """

    def __init__(self, fixed: Channel, moving: Channel, look: str = "stain") -> None:
        self.fixed, self.moving, self.look = fixed, moving, look
        seen = (edges_inside(fixed), edges_inside(moving)) if look == "edges" else (fixed.image, moving.image)
        self._fixed, self._moving = (
            [_masked_blur(image, channel.mask, scale) for scale in _STRUCTURE_SCALES]
            for image, channel in zip(seen, (fixed, moving), strict=True)
        )

    def __call__(self, matrix: NDArray[np.float64], field: DisplacementField | None = None) -> float:
        """Score of a pose (moving to fixed, um), -1 to 1."""
        overlap, share = self._overlap(matrix, field)
        correlation = float(np.mean(self._correlations(matrix, overlap, field)))
        return correlation * float(min(1.0, share / _FULL_OVERLAP))

    def gain(self, before: NDArray[np.float64], after: NDArray[np.float64]) -> tuple[float, float]:
        """Score of the second pose minus that of the first, and its standard error by a jackknife over tiles."""
        side = max(1, -(-max(self.fixed.image.shape) // _TILES))
        row, column = np.indices(self.fixed.image.shape) // side
        tiles = row * (column.max() + 1) + column
        left_out, total = [], []
        for matrix in (before, after):
            overlap, share = self._overlap(matrix, None)
            pairs = self._values(matrix, overlap, None)
            scores = [_correlations_without(*pair, tiles[overlap], tiles.max() + 1) for pair in pairs]
            scores = np.mean(scores or np.zeros((1, tiles.max() + 1)), axis=0)
            left_out.append(scores * min(1.0, share / _FULL_OVERLAP))
            total.append(self(matrix))
        used = np.bincount(tiles[self.fixed.mask], minlength=tiles.max() + 1) > 0
        change = (left_out[1] - left_out[0])[used]
        spread = np.sum((change - change.mean()) ** 2) * (len(change) - 1) / len(change)
        return total[1] - total[0], float(np.sqrt(spread))

    def correlation(self, matrix: NDArray[np.float64], field: DisplacementField | None = None) -> tuple[float, float]:
        """Correlation in the common tissue at the finer and the coarser scale; 0 if the tissues do not meet."""
        fine, coarse = self._correlations(matrix, self._overlap(matrix, field)[0], field)
        return fine, coarse

    def _overlap(self, matrix: NDArray, field: DisplacementField | None) -> tuple[NDArray[np.bool_], float]:
        overlap, *areas = common_tissue(self.fixed, self.moving, matrix, field)
        share = float(overlap.sum()) / max(min(areas), 1.0)
        return (overlap, share) if share >= _MIN_OVERLAP else (np.zeros_like(overlap), 0.0)

    def _correlations(
        self, matrix: NDArray, overlap: NDArray[np.bool_], field: DisplacementField | None
    ) -> list[float]:
        return [_correlation(*pair) for pair in self._values(matrix, overlap, field)] or [0.0] * len(_STRUCTURE_SCALES)

    def _values(
        self, matrix: NDArray, overlap: NDArray[np.bool_], field: DisplacementField | None
    ) -> list[tuple[NDArray, NDArray]]:
        """Pixels of the overlap in both sections, for each scale; empty if the tissues do not meet."""
        if not overlap.any():
            return []
        moved = (pull_back(image, self.moving, self.fixed, matrix, field)[overlap] for image in self._moving)
        return [(image[overlap], other) for image, other in zip(self._fixed, moved, strict=True)]


def mutual_information(fixed: Channel, moving: Channel, matrix: NDArray[np.float64]) -> float:
    """Mutual information of the stain in the common tissue, in nats, times the share of the smaller tissue in it."""
    overlap, *areas = common_tissue(fixed, moving, matrix)
    count = int(overlap.sum())
    if count < _MIN_OVERLAP * min(areas) or count < _N_BINS**2:
        return 0.0
    first = _masked_blur(fixed.image, fixed.mask, _STRUCTURE_SCALES[0])[overlap]
    blurred = _masked_blur(moving.image, moving.mask, _STRUCTURE_SCALES[0])
    second = pull_back(blurred, moving, fixed, matrix)[overlap]
    # Bins of equal counts: no outlier sets the scale, and the two marginals carry no information.
    ranks = [
        np.argsort(np.argsort(values, kind="stable"), kind="stable") * _N_BINS // count for values in (first, second)
    ]
    joint = np.bincount(ranks[0] * _N_BINS + ranks[1], minlength=_N_BINS**2).reshape(_N_BINS, _N_BINS) / count
    expected = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    filled = joint > 0
    information = float((joint[filled] * np.log(joint[filled] / expected[filled])).sum())
    return information * min(1.0, count / max(min(areas), 1.0) / _FULL_OVERLAP)


def edges_inside(channel: Channel) -> NDArray[np.float32]:
    """Strength of edges ``(y, x)`` without the outline of the tissue."""
    return ndi.gaussian_gradient_magnitude(inside_only(channel), _EDGE)


def _masked_blur(image: NDArray, mask: NDArray[np.bool_], sigma: float) -> NDArray[np.float32]:
    """Blur that neither takes in background nor fades at the tissue's edge."""
    weight = ndi.gaussian_filter(mask.astype(np.float32), sigma)
    return ndi.gaussian_filter(image * mask, sigma) / np.maximum(weight, 1e-3)


def _correlations_without(first: NDArray, second: NDArray, tiles: NDArray, n_tiles: int) -> NDArray[np.float64]:
    """Correlation over all pixels but those of one tile, for each tile."""
    # About the mean, or differences of large sums would lose the small variances.
    a, b = (np.asarray(values, float) - np.mean(values) for values in (first, second))
    sums = [np.bincount(tiles, product, n_tiles) for product in (np.ones_like(a), a, b, a * a, b * b, a * b)]
    n, x, y, xx, yy, xy = (own.sum() - own for own in sums)
    n = np.maximum(n, 1.0)
    norm = np.sqrt(np.maximum(xx - x * x / n, 0.0) * np.maximum(yy - y * y / n, 0.0))
    return np.where(norm > 1e-12, (xy - x * y / n) / np.maximum(norm, 1e-12), 0.0)


def _correlation(first: NDArray, second: NDArray) -> float:
    first = np.asarray(first, float) - np.mean(first)
    second = np.asarray(second, float) - np.mean(second)
    norm = np.sqrt(np.sum(first**2) * np.sum(second**2))
    return float(np.sum(first * second) / norm) if norm > 1e-12 else 0.0
