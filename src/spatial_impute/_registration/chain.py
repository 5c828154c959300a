"""Registration of a stack: pairs to fit, their chain to the reference, and the order of the sections."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, pairwise, product
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy.stats import norm

from spatial_impute._registration.deform import Placed
from spatial_impute._registration.pair import register_pair
from spatial_impute._registration.quality import (
    correlations_without,
    disagreement,
    edges_inside,
    jackknife_error,
    masked_blur,
    square_tiles,
    tissue_dice,
)
from spatial_impute._registration.types import (
    ChainResult,
    PairResult,
    RegistrationParams,
    SectionImage,
    registration_channel,
    working_pixel,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from spatial_impute._registration.types import Channel

    Run = Callable[[Callable, list[tuple], str], list]
    Pairs = dict[tuple[str, str], PairResult]
    Matrices = Mapping[str, NDArray[np.float64]]

_RANK = {"ok": 0, "weak": 1, "failed": 2}


def chain_to_reference(
    pairs: Mapping[tuple[str, str], PairResult],
    sections: Sequence[str],
    reference: str,
    *,
    given: Mapping[str, NDArray[np.float64]] | None = None,
    params: RegistrationParams | None = None,
) -> dict[str, ChainResult]:
    """Place every section in the frame of the reference by composing pair matrices.

    A section is placed through its neighbor on the side of the reference. If that pair failed, a pair that jumps over
    the neighbor is used. If there is another pair, mostly the direct one to the reference, the two placements are
    compared. If they agree, the chain is kept, because its steps are between more similar sections. Otherwise the
    placement with the better score is used. If two sound registrations disagree, one of them is wrong, perhaps upside
    down; the section is then weak.

    `pairs` are registrations by ``(fixed, moving)``, at least one of each section to one that is nearer to the reference.
    `sections` are names in the order of the stack, the reference among them. Sections with a `given` matrix are not
    looked for in `pairs`. The reference has the identity.
    """
    params = RegistrationParams() if params is None else params
    sections = list(sections)
    given = {} if given is None else given
    placed = {reference: ChainResult(np.eye(3), (reference,), "reference", 1.0, "ok")}
    middle = sections.index(reference)
    for side in (sections[:middle][::-1], sections[middle + 1 :]):
        inner = [reference]  # sections already placed on this side, nearest to the next one last
        for name in side:
            if name in given:
                matrix = np.asarray(given[name], float)
                placed[name] = ChainResult(matrix, (name, reference), "given", 1.0, "ok")
            else:
                placed[name] = _place(name, inner, pairs, placed, params)
            inner.append(name)
    return {name: placed[name] for name in sections}


def _place(
    name: str,
    inner: list[str],
    pairs: Mapping[tuple[str, str], PairResult],
    placed: dict[str, ChainResult],
    params: RegistrationParams,
) -> ChainResult:
    """Place a section through the sections `inner` that are placed already."""
    parents = [parent for parent in reversed(inner) if (parent, name) in pairs]
    chain, rivals = _split([_step(name, pairs[parent, name], placed[parent]) for parent in parents], inner[-1])
    if not rivals:
        return chain
    rival = min(rivals, key=_order)
    box = pairs[parents[0], name].moving_box
    distance = disagreement(chain.matrix, rival.matrix, np.array(list(product(box[::2], box[1::2]))))
    if distance <= params.max_chain_disagreement:
        return replace(chain, disagreement=distance, confirmed=rival.route == "direct" and rival.verdict == "ok")
    return _better(chain, rival, distance)


def _split(options: list[ChainResult], neighbor: str) -> tuple[ChainResult, list[ChainResult]]:
    """Placement by the nearest section whose path did not fail (else by the nearest), and the other placements."""
    k = next((k for k, option in enumerate(options) if option.verdict != "failed"), 0)
    chain, rivals = options[k], options[:k] + options[k + 1 :]
    if chain.path[1] != neighbor and chain.route == "sequential":
        note = f"Bridged: placed by {chain.path[1]!r}, because {neighbor!r} gave no usable link."
        chain = replace(chain, reasons=[*chain.reasons, note])
    return chain, rivals


def _better(chain: ChainResult, rival: ChainResult, distance: float) -> ChainResult:
    """Better one of two placements that disagree; weak if both look sound, because one of them is wrong."""
    if rival.route == "direct":
        kinds, other = "Chained and direct placement", "direct one"
    else:
        kinds, other = f"Placements by {chain.path[1]!r} and {rival.path[1]!r}", "other one"
    better = min(chain, rival, key=_order)
    which = "chain" if better is chain else other
    note = f"{kinds} differ by {distance:.0f} um; the {which} has the better score and is used."
    verdict = "weak" if chain.verdict == rival.verdict == "ok" else better.verdict
    return replace(better, verdict=verdict, reasons=[*better.reasons, note], disagreement=distance)


def _order(option: ChainResult) -> tuple[int, float]:
    """Better verdict first, then better score."""
    return _RANK[option.verdict], -option.score


def _step(name: str, pair: PairResult, before: ChainResult) -> ChainResult:
    """Section placed through another one, which is placed `before`, by their registration."""
    parent = before.path[0]
    verdict = max(pair.verdict, before.verdict, key=_RANK.__getitem__)
    reasons = [f"Pair {parent!r}, {name!r}: {reason}" for reason in pair.quality.get("reasons", [])]
    if before.verdict != "ok":
        reasons.append(f"Placed through {parent!r}, whose own placement is {before.verdict}.")
    return ChainResult(
        np.asarray(before.matrix, float) @ pair.matrix,
        (name, *before.path),
        "direct" if len(before.path) == 1 else "sequential",
        min(float(pair.quality.get("score", 0.0)), before.score),
        verdict,
        reasons=reasons,
    )


def wanted_pairs(names: Sequence[str], reference: str, policy: str) -> list[tuple[str, str]]:
    """Pairs (fixed, moving) to register: neighbors towards the reference, and each section to the reference."""
    middle = list(names).index(reference)
    pairs = []
    for i, name in enumerate(names):
        if i == middle:
            continue
        neighbor = names[i + 1] if i < middle else names[i - 1]
        if policy != "star" or neighbor == reference:
            pairs.append((neighbor, name))
        if policy != "sequential" and neighbor != reference:
            pairs.append((reference, name))
    return pairs


@dataclass(frozen=True)
class StackTask:
    """A stack of sections to be registered."""

    images: Mapping[str, SectionImage]
    """Thumbnails in the order of the stack, the reference among them."""
    reference: str
    policy: str
    """``"auto"``, ``"sequential"`` or ``"star"``."""
    method: Literal["rigid", "affine"]
    given: Matrices
    """Matrices to the frame of the reference, um, of sections with a known place."""
    initial: Matrices
    """Matrices to the frame of the reference, um, to start from."""
    params: RegistrationParams
    seed: int


def register_chain(task: StackTask, run: Run, known: Pairs | None = None) -> tuple[Pairs, dict[str, ChainResult]]:
    """Register the pairs of a stack and place every section.

    Pairs that are `known` are not registered again. `run` calls a function for each tuple of arguments, in parallel or not,
    and returns the results in order.
    """
    names, middle = list(task.images), list(task.images).index(task.reference)
    wanted = [pair for pair in wanted_pairs(names, task.reference, task.policy) if pair[1] not in task.given]
    pairs: Pairs = {pair: known[pair] for pair in wanted if pair in known} if known else {}
    wanted = [pair for pair in wanted if pair not in pairs]

    def register(some: list[tuple[str, str]], starts: Sequence[NDArray | None]) -> None:
        fit = partial(register_pair, method=task.method, params=task.params, seed=task.seed)
        tasks = [(task.images[f], task.images[m], start) for (f, m), start in zip(some, starts, strict=True)]
        pairs.update(zip(some, run(fit, tasks, "Registering pairs"), strict=True))

    def place() -> dict[str, ChainResult]:
        return chain_to_reference(pairs, names, task.reference, given=task.given, params=task.params)

    searched = [pair for pair in wanted if pair[1] not in task.initial]
    register(searched, [None] * len(searched))
    # A start is given in the frame of the reference. From the reference outwards, each section's neighbor is placed.
    for name in sorted(task.initial, key=lambda n: abs(names.index(n) - middle)):
        started = [pair for pair in wanted if pair[1] == name]
        poses = _poses(pairs, names, task.reference, task.given)
        register(started, [np.linalg.inv(poses[fixed]) @ task.initial[name] for fixed, _ in started])
    placed = place()
    bridges = [] if task.policy == "star" else _bridges(task, pairs, placed)
    if bridges:
        register(bridges, [None] * len(bridges))
        placed = place()
    return pairs, placed | _given_places(task, placed)


def _given_places(task: StackTask, placed: Mapping[str, ChainResult]) -> dict[str, ChainResult]:
    """Sections with a given place; weak if their tissue lies beside that of the next section towards the reference.

    The usual cause is a matrix in pixels, or one of the opposite direction. The place itself is never changed.
    """
    names, middle, found = list(task.images), list(task.images).index(task.reference), {}
    for i, name in enumerate(names):
        if name not in task.given or i == middle:
            continue
        inner = names[i + 1 if i < middle else i - 1]
        inner = task.reference if placed[inner].verdict == "failed" else inner
        size = working_pixel(task.images[inner], task.images[name], task.params, side=task.params.search_side)
        fixed, moving = (registration_channel(task.images[n], size, _RIM) for n in (inner, name))
        overlap = tissue_dice(fixed, moving, np.linalg.inv(placed[inner].matrix) @ placed[name].matrix)
        found[name] = placed[name]
        if overlap < task.params.failed_dice and not task.params.partial_tissue:
            reason = (
                f"The place is given, but the tissue there overlaps that of {inner!r} by a Dice of {overlap:.2f} only (expected "
                f"{task.params.min_dice:.2f}). Check that the matrix is in um, and leads from {name!r} to {task.reference!r}."
            )
            found[name] = replace(placed[name], verdict="weak", reasons=[reason])
    return found


def _bridges(task: StackTask, pairs: Pairs, placed: dict[str, ChainResult]) -> list[tuple[str, str]]:
    """Pairs that jump over a neighbor without a sound link (a fold, a tear)."""
    names, middle = list(task.images), list(task.images).index(task.reference)
    bridges = []
    for i, name in enumerate(names):
        if abs(i - middle) < 2 or name in task.given or name in task.initial or placed[name].verdict == "ok":
            continue
        over = names[i + 2 if i < middle else i - 2]
        if (over, name) not in pairs:
            bridges.append((over, name))
    return bridges


def _poses(pairs: Pairs, names: Sequence[str], reference: str, given: Matrices) -> dict[str, NDArray[np.float64]]:
    """Matrices to the reference of the sections that can be placed so far."""
    poses: dict[str, NDArray[np.float64]] = {reference: np.eye(3), **given}
    middle = list(names).index(reference)
    for name in (*names[:middle][::-1], *names[middle + 1 :]):
        links = [fixed for fixed, moving in pairs if moving == name and fixed in poses]
        if links and name not in poses:
            fixed = min(links, key=lambda link: pairs[link, name].verdict == "failed")  # a sound one, if there is one
            poses[name] = poses[fixed] @ pairs[fixed, name].matrix
    return poses


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
        self._tiles = square_tiles((int(height), int(width)), _TILE)
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
    the inner section must also be more like the outer one than like the next, by its standard error. A section with less
    noise would always fit better inside. So the sections without the outer one must be clearly more alike the nearer they are.
    """
    if len(names) < 3:
        return []
    found, limit = [], norm.isf(_FALSE_ALARM / (len(names) - 1))
    at_ends = {0: names, len(names) - 2: names[::-1]}
    for i, (a, b) in enumerate(pairwise(names)):
        if i in at_ends:
            gain = _gain_at_end(at_ends[i], likeness, limit)
        else:
            before, after = names[i - 1], names[i + 2]
            gain = likeness(before, b) - likeness(before, a) + likeness(a, after) - likeness(b, after)
        if gain is not None and _clear(gain, limit):
            found.append((a, b, float(gain.mean())))
    return found


def _gain_at_end(names: Sequence[str], likeness: Likeness, limit: float) -> NDArray[np.float64] | None:
    """Gain if the first two sections are exchanged, without each tile; None if their images alone may explain it."""
    outer, inner, third = names[:3]
    if not _clear(likeness(outer, inner) - likeness(inner, third), 1.0):
        return None
    if len(rest := names[1:]) > 2:
        near = [likeness(a, b) for a, b in pairwise(rest)]
        far = [likeness(a, b) for a, b in zip(rest, rest[2:], strict=False)]
        if not _clear(np.mean(near, axis=0) - np.mean(far, axis=0), limit):
            return None
    return likeness(outer, third) - likeness(inner, third)


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

    From each section, the most alike one that is left comes next. The best of these orders are improved by reversing
    parts of them and by moving single sections, as long as the sum increases.
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
    """Orders with one part reversed, or one section moved."""
    for i, j in combinations(range(len(order)), 2):
        part = order[i : j + 1]
        for new in (part[::-1], [*part[1:], part[0]], [part[-1], *part[:-1]]):
            yield [*order[:i], *new, *order[j + 1 :]]


def _clear(left_out: NDArray[np.float64], limit: float) -> bool:
    """True if a difference, given without each tile, exceeds `limit` standard errors."""
    return bool(left_out.mean() > limit * jackknife_error(left_out))
