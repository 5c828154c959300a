"""Which pairs of a stack are registered, and in which order."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from spatial_impute._registration.chain import ChainResult, chain_to_reference
from spatial_impute._registration.pair import register_pair

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from spatial_impute._registration.types import PairResult, RegistrationParams, SectionImage

    Run = Callable[[Callable, list[tuple], str], list]
    Pairs = dict[tuple[str, str], PairResult]
    Matrices = Mapping[str, NDArray[np.float64]]


def wanted_pairs(names: Sequence[str], reference: str, policy: str) -> list[tuple[str, str]]:
    """Pairs (fixed, moving) to register: neighbours towards the reference, and each section to the reference."""
    middle = list(names).index(reference)
    pairs = []
    for i, name in enumerate(names):
        if i == middle:
            continue
        neighbour = names[i + 1] if i < middle else names[i - 1]
        if policy != "star" or neighbour == reference:
            pairs.append((neighbour, name))
        if policy != "sequential" and neighbour != reference:
            pairs.append((reference, name))
    return pairs


def register_chain(
    images: Mapping[str, SectionImage],
    reference: str,
    *,
    policy: str,
    method: str,
    given: Matrices,
    initial: Matrices,
    params: RegistrationParams,
    seed: int,
    run: Run,
) -> tuple[Pairs, dict[str, ChainResult]]:
    """Register the pairs that are needed and place every section.

    Parameters
    ----------
    images
        Thumbnails in the order of the stack, the reference among them.
    policy
        ``"auto"``, ``"sequential"`` or ``"star"``.
    given
        Matrices to the frame of the reference, um, of sections whose place is known.
    initial
        Such matrices to start from.
    run
        Calls a function for each tuple of arguments, in parallel or not, and returns the results in order.
    """
    names = list(images)
    pairs: Pairs = {}
    wanted = [pair for pair in wanted_pairs(names, reference, policy) if pair[1] not in given]

    def register(some: list[tuple[str, str]], starts: Sequence[NDArray | None]) -> None:
        fit = partial(_register, method=method, params=params, seed=seed)
        tasks = [(images[f], images[m], start) for (f, m), start in zip(some, starts, strict=True)]
        pairs.update(zip(some, run(fit, tasks, "Registering pairs"), strict=True))

    searched = [pair for pair in wanted if pair[1] not in initial]
    register(searched, [None] * len(searched))
    # A start is given in the frame of the reference. From the reference outwards, each section's neighbour is placed.
    middle = names.index(reference)
    for name in sorted(initial, key=lambda n: abs(names.index(n) - middle)):
        started = [pair for pair in wanted if pair[1] == name]
        poses = _poses(pairs, names, reference, given)
        register(started, [np.linalg.inv(poses[fixed]) @ initial[name] for fixed, _ in started])

    placed = chain_to_reference(pairs, names, reference, given=given, params=params)
    if policy == "star":
        return pairs, placed
    # Where the neighbour gave no sound link (a fold, a tear), the next one may.
    bridges = []
    for i, name in enumerate(names):
        over = i + 2 if i < middle else i - 2
        known = name == reference or name in given or name in initial
        if known or placed[name].verdict == "ok" or abs(i - middle) < 2 or (names[over], name) in pairs:
            continue
        bridges.append((names[over], name))
    if bridges:
        register(bridges, [None] * len(bridges))
        placed = chain_to_reference(pairs, names, reference, given=given, params=params)
    return pairs, placed


def _register(
    fixed: SectionImage, moving: SectionImage, initial: NDArray[np.float64] | None, **kwargs: Any
) -> PairResult:
    return register_pair(fixed, moving, initial=initial, **kwargs)


def _poses(pairs: Pairs, names: Sequence[str], reference: str, given: Matrices) -> dict[str, NDArray[np.float64]]:
    """Matrices to the reference of the sections that can be placed so far."""
    poses = {reference: np.eye(3)} | dict(given)
    middle = list(names).index(reference)
    for side in (names[:middle][::-1], names[middle + 1 :]):
        for name in side:
            # The nearest neighbour comes last in the stack order towards the reference; any placed one will do.
            fixed = next((f for f, m in pairs if m == name and f in poses and pairs[f, m].verdict != "failed"), None)
            fixed = next((f for f, m in pairs if m == name and f in poses), None) if fixed is None else fixed
            if name not in poses and fixed is not None:
                poses[name] = poses[fixed] @ pairs[fixed, name].matrix
    return poses
