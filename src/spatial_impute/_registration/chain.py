"""From pairs of neighbours to one frame: compose matrices towards the reference section."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from spatial_impute._registration.quality import disagreement
from spatial_impute._registration.types import PairResult, RegistrationParams

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import ArrayLike, NDArray

_RANK = {"ok": 0, "weak": 1, "failed": 2}
_NAMES = {"direct": "direct one", "sequential": "other one"}


@dataclass(frozen=True, slots=True, eq=False)
class ChainResult:
    """Where one section lies in the frame of the reference."""

    matrix: NDArray[np.float64]
    """``(3, 3)``: points of the section's frame to the reference frame, um."""
    path: tuple[str, ...]
    """Sections from this one to the reference, both included; each step is one pair."""
    route: str
    """``"reference"``, ``"sequential"`` (through the neighbours), ``"direct"`` or ``"given"`` (not registered)."""
    score: float
    """Structure score of the weakest pair on the path."""
    verdict: str
    """``"ok"``, ``"weak"`` or ``"failed"``: the worst pair on the path."""
    disagreement: float | None = None
    """Distance in um to the best other placement, mostly the direct one (root mean square); None without another."""
    confirmed: bool = False
    """Whether a sound registration to the reference itself agrees."""
    reasons: list[str] = field(default_factory=list)
    """What is to be known about this section, one sentence each."""


def chain_to_reference(
    pairs: Mapping[tuple[str, str], PairResult],
    sections: Sequence[str],
    reference: str,
    *,
    given: Mapping[str, NDArray[np.float64]] | None = None,
    params: RegistrationParams | None = None,
) -> dict[str, ChainResult]:
    """Place every section in the frame of the reference by composing pair matrices.

    A section follows its neighbour on the side of the reference. If that pair failed and a pair that jumps over the
    neighbour is given, that one is used. Where there is another pair, mostly the direct one to the reference, the two
    placements are compared: while they agree the chain is kept (its steps are between more similar sections), otherwise
    the one with the better score is. Two sound registrations that contradict each other make the section weak: one of
    them is wrong, perhaps upside down.

    Parameters
    ----------
    pairs
        Registrations by ``(fixed, moving)``. A pair given in the other direction is inverted.
    sections
        Names in the order of the stack, the reference among them.
    reference
        Section whose frame is the common one.
    given
        Matrices of sections whose place is known; they are not looked for in `pairs`.
    params
        ``max_chain_disagreement`` is used.

    Returns
    -------
    One result per section, in the order of `sections`. The reference has the identity.
    """
    params = RegistrationParams() if params is None else params
    sections = list(sections)
    if reference not in sections or len(set(sections)) != len(sections):
        msg = f"`reference` must be one of the sections, which must be unique; found {reference!r} and {sections}."
        raise ValueError(msg)
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


def warp_along_path(
    points: ArrayLike, path: Sequence[str], pairs: Mapping[tuple[str, str], PairResult]
) -> NDArray[np.float64]:
    """Carry points ``(n, 2)``, um, of the first section of `path` to the frame of the last, deformations included."""
    points = np.asarray(points, float).reshape(-1, 2)
    for moving, fixed in pairwise(path):
        if (fixed, moving) in pairs:
            points = pairs[fixed, moving].warp_points(points)
        else:
            points = pairs[moving, fixed].pull_points(points)
    return points


def _place(
    name: str,
    inner: list[str],
    pairs: Mapping[tuple[str, str], PairResult],
    placed: dict[str, ChainResult],
    params: RegistrationParams,
) -> ChainResult:
    options = [_step(name, parent, pairs, placed) for parent in reversed(inner)]
    options = [option for option in options if option is not None]
    if not options:
        msg = (
            f"No registration links section {name!r} to the reference: expected one of "
            f"{[(parent, name) for parent in reversed(inner)]}, found the pairs {sorted(pairs)}. "
            f"Register it to its neighbour {inner[-1]!r}, or leave it out of `sections`."
        )
        raise ValueError(msg)
    # The nearest neighbour whose whole path did not fail; if all failed, the nearest.
    chain = next((option for option in options if option.verdict != "failed"), options[0])
    reasons = list(chain.reasons)
    if chain.path[1] != inner[-1] and chain.route == "sequential":
        reasons.append(f"Bridged: placed by {chain.path[1]!r}, because {inner[-1]!r} gave no usable link.")

    rivals = [option for option in options if option is not chain]
    if not rivals:
        return _with(chain, reasons, None)
    rival = min(rivals, key=_order)
    box = _moving_box(name, pairs)
    distance = disagreement(chain.matrix, rival.matrix, _corners(box)) if box is not None else None
    if distance is None or distance <= params.max_chain_disagreement:
        confirmed = rival.route == "direct" and rival.verdict == "ok" and distance is not None
        return replace(_with(chain, reasons, distance), confirmed=confirmed)
    kinds = "Chained and direct placement" if rival.route == "direct" else f"Placements by {chain.path[1]!r} and "
    kinds += "" if rival.route == "direct" else repr(rival.path[1])
    note = f"{kinds} differ by {distance:.0f} um; "
    if _order(rival) < _order(chain):
        better, note = rival, note + f"the {_NAMES[rival.route]} has the better score and is used."
    else:
        better, note = chain, note + "the chain has the better score and is used."
    notes = [*(reasons if better is chain else rival.reasons), note]
    if chain.verdict == rival.verdict == "ok":
        better = replace(better, verdict="weak")
    return _with(better, notes, distance)


def _order(option: ChainResult) -> tuple[int, float]:
    """Better verdict first, then better score."""
    return _RANK[option.verdict], -option.score


def _step(
    name: str, parent: str, pairs: Mapping[tuple[str, str], PairResult], placed: dict[str, ChainResult]
) -> ChainResult | None:
    """`name` placed through `parent`, or None if they were not registered."""
    if (parent, name) in pairs:
        pair = pairs[parent, name]
        matrix = pair.matrix
    elif (name, parent) in pairs:
        pair = pairs[name, parent]
        matrix = np.linalg.inv(pair.matrix)
    else:
        return None
    before = placed[parent]
    verdict = max(pair.verdict, before.verdict, key=_RANK.__getitem__)
    reasons = [f"Pair {parent!r}, {name!r}: {reason}" for reason in pair.quality.get("reasons", [])]
    if before.verdict != "ok":
        reasons.append(f"Placed through {parent!r}, whose own placement is {before.verdict}.")
    return ChainResult(
        np.asarray(before.matrix, float) @ matrix,
        (name, *before.path),
        "direct" if len(before.path) == 1 else "sequential",
        min(float(pair.quality.get("score", 0.0)), before.score),
        verdict,
        reasons=reasons,
    )


def _with(result: ChainResult, reasons: list[str], distance: float | None) -> ChainResult:
    return replace(result, reasons=reasons, disagreement=distance)


def _moving_box(name: str, pairs: Mapping[tuple[str, str], PairResult]) -> tuple[float, float, float, float] | None:
    """Extent of the section's tissue, known from any pair in which it was the moving one."""
    return next((pair.moving_box for (_, moving), pair in pairs.items() if moving == name), None)


def _corners(box: tuple[float, float, float, float]) -> NDArray[np.float64]:
    x0, y0, x1, y1 = box
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
