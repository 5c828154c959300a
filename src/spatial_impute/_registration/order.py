"""Order of sections, checked or inferred: neighbors in the tissue are more alike than sections further apart."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import norm

from spatial_impute._registration.chain import register_chain
from spatial_impute._registration.channel import registration_channel
from spatial_impute._registration.deform import Placed
from spatial_impute._registration.quality import correlations_without, edges_inside, masked_blur

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from spatial_impute._registration.chain import Pairs, Run, StackTask
    from spatial_impute._registration.channel import Channel
    from spatial_impute._registration.types import ChainResult, RegistrationParams, SectionImage

_RIM = 100.0  # um around the tissue
_BLUR = 1.0  # pixels of the search, twice the working pixel
_TILE = 20  # pixels: an eighth of the section, larger than the structure that sections share
_MOST_STARTS = 8  # orders that are improved step by step
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


def in_inferred_order(task: StackTask, run: Run) -> tuple[StackTask, Pairs]:
    """Stack in the order in which neighbors are most alike, and the registrations to the reference that show it.

    A section that cannot be placed on the reference directly raises a ``ValueError``.
    """
    pairs, placed = register_chain(replace(task, policy="star"), run)
    failed = [name for name, result in placed.items() if result.verdict == "failed"]
    if failed:
        msg = (
            f"`order='infer'` compares the sections on the reference {task.reference!r}, but {failed} could not be placed there. "
            "Give their places (`transformations`) or starts (`initial`), or give the order yourself."
        )
        raise ValueError(msg)
    names = list(task.images)
    likeness = Likeness(task.images, placed, task.params)
    values = np.array([[0.0 if a == b else likeness(a, b).mean() for b in names] for a in names])
    order = most_alike(values)
    return replace(task, images={names[i]: task.images[names[i]] for i in order}), pairs


def most_alike(likeness: NDArray[np.float64]) -> list[int]:
    """Order in which the sum of the likeness ``(n, n)`` of neighbors is largest, in the direction nearer to the present one.

    From each section, the most alike one that is left comes next. The best of these orders are improved by turning parts of
    them round and by moving single sections, until nothing is gained.
    """
    n = len(likeness)

    def total(order: list[int]) -> float:
        return float(likeness[order[:-1], order[1:]].sum())

    starts = sorted((_greedy(likeness, first) for first in range(n)), key=total)[-_MOST_STARTS:]
    for i, order in enumerate(starts):
        while (better := next((o for o in _changed(order) if total(o) > total(order) + 1e-12), None)) is not None:
            order = better
        starts[i] = order
    best = max(starts, key=total)
    return best if np.corrcoef(best, range(n))[0, 1] >= 0 else best[::-1]


def _greedy(likeness: NDArray[np.float64], first: int) -> list[int]:
    order, left = [first], set(range(len(likeness))) - {first}
    while left:
        order.append(max(left, key=lambda i: likeness[order[-1], i]))
        left.remove(order[-1])
    return order


def _changed(order: list[int]) -> Iterator[list[int]]:
    """Orders with one part turned round, or one section moved."""
    for i, j in combinations(range(len(order)), 2):
        part = order[i : j + 1]
        for new in (part[::-1], [*part[1:], part[0]], [part[-1], *part[:-1]]):
            yield [*order[:i], *new, *order[j + 1 :]]


def _clear(left_out: NDArray[np.float64], limit: float) -> bool:
    """True if a difference, given without each tile, exceeds `limit` standard errors."""
    n = len(left_out)
    error = np.sqrt((n - 1) / n * np.sum((left_out - left_out.mean()) ** 2))
    return bool(left_out.mean() > limit * error)
