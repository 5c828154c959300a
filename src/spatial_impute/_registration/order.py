"""Check of the order of sections: neighbors in the tissue are more alike than sections further apart."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import norm

from spatial_impute._registration.channel import registration_channel
from spatial_impute._registration.deform import Placed
from spatial_impute._registration.quality import correlations_without, edges_inside, masked_blur

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from spatial_impute._registration.channel import Channel
    from spatial_impute._registration.types import ChainResult, RegistrationParams, SectionImage

_RIM = 100.0  # um around the tissue
_BLUR = 1.0  # pixels of the search, twice the working pixel
_TILE = 20  # pixels: an eighth of the section, larger than the structure that sections share
_FALSE_ALARM = 0.05  # chance of a warning for a stack in order, over all exchanges


class Likeness:
    """Correlation of the sections of a registered stack, with tiles of tissue left out in turn.

    The images are compared as they lie in the common frame, with stain and outline together, and as edges. Nothing is
    fitted: a fit of each pair would take as long as the registration.
    """

    def __init__(
        self, images: Mapping[str, SectionImage], placed: Mapping[str, ChainResult], params: RegistrationParams
    ) -> None:
        boxes = np.array([image.tissue_box for image in images.values()])
        size = float((boxes[:, 2:] - boxes[:, :2]).max()) / params.search_side
        sections = {
            name: Placed(registration_channel(image, size, _RIM), np.asarray(placed[name].matrix, float))
            for name, image in images.items()
        }
        corners = np.array([section.corners() for section in sections.values()])
        low, high = corners[:, 0].min(axis=0) - _RIM, corners[:, 1].max(axis=0) + _RIM
        width, height = np.ceil((high - low) / size).astype(int)
        self._drawn = {name: section.drawn(low, (int(height), int(width))) for name, section in sections.items()}
        row, column = np.indices((int(height), int(width))) // _TILE
        self._tiles = row * (column.max() + 1) + column
        self._found: dict[frozenset[str], NDArray[np.float64]] = {}

    def __call__(self, a: str, b: str) -> NDArray[np.float64]:
        """Likeness of two sections without each tile."""
        key = frozenset((a, b))
        if key not in self._found:
            self._found[key] = self._compare(self._drawn[a], self._drawn[b])
        return self._found[key]

    def _compare(self, a: Channel, b: Channel) -> NDArray[np.float64]:
        tissue = (a.mask | b.mask) & a.visible() & b.visible()
        n = int(self._tiles.max()) + 1
        if not tissue.any():
            return np.zeros(n)
        tiles = self._tiles[tissue]
        pairs = (
            [(c.image * c.mask)[tissue] for c in (a, b)],
            [masked_blur(edges_inside(c), c.mask, _BLUR)[tissue] * c.mask[tissue] for c in (a, b)],
        )
        return np.mean([correlations_without(one, other, tiles, n) for one, other in pairs], axis=0)


def exchanged_sections(names: Sequence[str], likeness: Likeness) -> list[tuple[str, str, float]]:
    """Pairs of neighbors in `names` that fit clearly better if they are exchanged, and the gain in likeness.

    An exchange replaces one or two links of the stack. The gain must exceed its standard error (a jackknife over tiles) so
    far that all exchanges together give a false alarm in one of twenty stacks in order.

    At an end of the stack one link is replaced. An odd section (damaged, another stain) would always fit better outside. So
    the inner section must also be more like the outer one than like the next, by its standard error.
    """
    if len(names) < 3:
        return []
    found, limit = [], norm.isf(_FALSE_ALARM / (len(names) - 1))
    for i, (a, b) in enumerate(pairwise(names)):
        if i == 0:
            third = names[2]
            gain, odd = likeness(a, third) - likeness(b, third), likeness(a, b) - likeness(b, third)
        elif i == len(names) - 2:
            third = names[i - 1]
            gain, odd = likeness(b, third) - likeness(a, third), likeness(a, b) - likeness(a, third)
        else:
            before, after = names[i - 1], names[i + 2]
            gain = likeness(before, b) - likeness(before, a) + likeness(a, after) - likeness(b, after)
            odd = gain
        if _clear(gain, limit) and _clear(odd, 1.0):
            found.append((a, b, float(gain.mean())))
    return found


def _clear(left_out: NDArray[np.float64], limit: float) -> bool:
    """True if a difference, given without each tile, exceeds `limit` standard errors."""
    n = len(left_out)
    error = np.sqrt((n - 1) / n * np.sum((left_out - left_out.mean()) ** 2))
    return bool(left_out.mean() > limit * error)
