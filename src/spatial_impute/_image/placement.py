"""The eight ways in which a picture, or the spots on it, can be turned and mirrored, and which of them fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from skimage.transform import resize

from spatial_impute._geometry import apply_affine, lies_on, linear_scale
from spatial_impute._image.levels import best_level, read_thumbnail
from spatial_impute._image.tissue import tissue_mask

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spatial_impute._image.levels import Level

AS_IT_IS = "as it is"
# Rows of the matrix on (x, y), then the shift in widths and heights of the image that is reached.
_TURNS = {
    AS_IT_IS: ((1, 0), (0, 1), (0, 0)),
    "mirrored left to right": ((-1, 0), (0, 1), (1, 0)),
    "mirrored top to bottom": ((1, 0), (0, -1), (0, 1)),
    "turned by 180 degrees": ((-1, 0), (0, -1), (1, 1)),
    "with x and y exchanged": ((0, 1), (1, 0), (0, 0)),
    "turned by 90 degrees clockwise": ((0, -1), (1, 0), (1, 0)),
    "turned by 90 degrees counterclockwise": ((0, 1), (-1, 0), (0, 1)),
    "with x and y exchanged, then turned by 180 degrees": ((0, -1), (-1, 0), (1, 1)),
}
_FINEST, _MOST_PX = 16.0, 512  # um per pixel and px along the longer side of the mask: spots are far larger
_MOST_DECODED = 2**30  # px; more of them take minutes to decode
_FEWEST = 10  # spots; fewer lie anywhere by chance
_SMALL = 96  # px along the longer side of two pictures that are compared


@dataclass(frozen=True)
class Placement:
    """Share of spots on tissue as they are, and in the best of the other placements."""

    share: float
    best: str
    best_share: float

    @property
    def sentence(self) -> str | None:
        """Description of the fault, or None: most spots lie on tissue, and no other placement is much better."""
        better = self.best_share >= max(0.7, self.share + 0.2)
        if self.share >= 0.5 and not better:
            return None
        text = f"only {self.share:.0%} of the measured spots lie on tissue"
        if better:
            return f"{text}, but {self.best_share:.0%} would lie on it {self.best}"
        return f"{text}, and no turn or mirror places them much better"


def turned_points(points: np.ndarray, turn: str, size: tuple[float, float]) -> np.ndarray:
    """Points (n, 2) as x, y of a picture, after a turn of it that reaches a picture of this width and height."""
    x, y, shift = (np.array(row, float) for row in _TURNS[turn])
    return points @ np.stack([x, y], axis=1) + shift * size


def turned_picture(picture: np.ndarray, turn: str) -> np.ndarray:
    """Picture (y, x, ...) after a turn."""
    (from_x, _from_y), _, shift = _TURNS[turn]
    picture = picture if from_x else picture.swapaxes(0, 1)
    axes = [axis for axis, flip in zip((1, 0), shift, strict=True) if flip]
    return np.flip(picture, axes) if axes else picture


def place_spots(levels: Sequence[Level], centers: np.ndarray) -> Placement | None:
    """Compare spots (um) with the tissue of their own image, or with all of it if none is seen; None for too few spots."""
    height, width = levels[0].shape
    resolution = max(_FINEST, levels[0].pixel_size * max(height, width) / _MOST_PX)
    if len(centers) < _FEWEST or np.prod(best_level(levels, resolution).shape, dtype=float) > _MOST_DECODED:
        return None
    rgb, to_um = read_thumbnail(levels, resolution)
    mask = tissue_mask(rgb, linear_scale(to_um))
    mask = mask if mask.any() else np.ones_like(mask)
    points, size = apply_affine(centers, np.linalg.inv(to_um)), (mask.shape[1], mask.shape[0])
    shares = {turn: float(lies_on(mask, turned_points(points, turn, size)).mean()) for turn in _TURNS}
    own = shares.pop(AS_IT_IS)
    best = max(shares, key=lambda turn: shares[turn])
    return Placement(own, best, shares[best])


def compare_pictures(picture: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """Correlation of a grey picture (y, x) with another one, for each turn that gives it the same shape."""
    scale = min(1.0, _SMALL / max(wanted.shape))
    shape = [max(2, round(n * scale)) for n in wanted.shape]
    small = resize(wanted.astype(float), shape, anti_aliasing=True).ravel()
    found = {}
    for turn in _TURNS:
        turned = turned_picture(picture, turn)
        if abs(np.log(turned.shape[0] / turned.shape[1] * shape[1] / shape[0])) < 2.0 / min(shape):
            other = resize(turned.astype(float), shape, anti_aliasing=True).ravel()
            flat = min(small.std(), other.std()) < 1e-6
            found[turn] = 0.0 if flat else float(np.corrcoef(small, other)[0, 1])
    return found
