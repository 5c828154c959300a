"""Fitted predictions of expression, computed for some spots at a time: a table of all spots and genes takes gigabytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from scipy.spatial import cKDTree

_MAX_VALUES = 4_000_000  # of a block of spots: 16 MB; arrays above 32 MB are given back to the system after each use
_ROWS_AT_A_TIME = 50_000  # spots to find neighbors for: 160 MB of numbers at the widest

Rows: TypeAlias = np.ndarray | slice
ALL = slice(None)


class Prediction(Protocol):
    """A method after its fit."""

    def expression(self, rows: Rows = ALL) -> np.ndarray:
        """(m, g) of some spots, of all by default."""


@dataclass(frozen=True)
class Linear:
    """``centre + scores @ effects``."""

    centre: np.ndarray  # (g,) expression where all scores are 0
    scores: np.ndarray  # (n, k), e.g. expected components or image features
    effects: np.ndarray  # (k, g) expression of a score of 1

    def expression(self, rows: Rows = ALL) -> np.ndarray:
        found = self.scores[rows] @ self.effects
        found += self.centre
        return found


@dataclass(frozen=True)
class Neighbors:
    """Weighted mean of the nearest known spots."""

    tree: cKDTree  # of the known spots
    xyz: np.ndarray  # (n, 3)
    values: np.ndarray  # (n_known, g)
    n_neighbors: int
    weights: Callable[[np.ndarray], np.ndarray]  # (m, k) of neighbors from their ascending distances; sums are 1

    def expression(self, rows: Rows = ALL) -> np.ndarray:
        xyz, ranks = self.xyz[rows], list(range(1, self.n_neighbors + 1))
        result = np.empty((len(xyz), self.values.shape[1]), self.values.dtype)
        for start in range(0, len(xyz), _ROWS_AT_A_TIME):
            part = slice(start, start + _ROWS_AT_A_TIME)
            distance, found = self.tree.query(xyz[part], k=ranks)
            result[part] = weighted_mean(self.values, found, self.weights(distance))
        return result


@dataclass(frozen=True)
class Table:
    """Values that exist already."""

    values: np.ndarray  # (n, g)

    def expression(self, rows: Rows = ALL) -> np.ndarray:
        return self.values[rows]


@dataclass(frozen=True)
class OfKnown:
    """Values of the known spots; the others have none."""

    values: np.ndarray  # (n_known, g)
    known: np.ndarray  # (n,) bool

    def expression(self, rows: Rows = ALL) -> np.ndarray:
        """(m, g) of some known spots."""
        position = np.cumsum(self.known) - 1
        return self.values[position[rows]]


@dataclass(frozen=True)
class Rescaled:
    """Prediction whose distance from a profile is multiplied by a factor for each gene."""

    part: Prediction
    centre: np.ndarray  # (g,)
    factor: np.ndarray  # (g,)

    def expression(self, rows: Rows = ALL) -> np.ndarray:
        found = self.part.expression(rows) - self.centre  # not in place: a table gives its own values
        found *= self.factor
        found += self.centre
        return found


@dataclass(frozen=True)
class Mean:
    """Mean of several predictions."""

    parts: Sequence[Prediction]

    def expression(self, rows: Rows = ALL) -> np.ndarray:
        first, *others = self.parts
        found = first.expression(rows).copy()
        for part in others:
            found += part.expression(rows)
        found /= len(self.parts)
        return found


def row_blocks(n: int, n_genes: int) -> Iterator[slice]:
    """Consecutive spots, so many that their expression is a few megabytes."""
    size = max(1, _MAX_VALUES // max(n_genes, 1))
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def spread(prediction: Prediction, centre: np.ndarray, n: int) -> np.ndarray:
    """(g,) standard deviation over n spots of a prediction that is about the (g,) `centre`."""
    total, squares = np.zeros(len(centre)), np.zeros(len(centre))
    for rows in row_blocks(n, len(centre)):
        part = prediction.expression(rows) - centre
        total += part.sum(axis=0, dtype=float)
        squares += np.einsum("ng,ng->g", part, part)
    return np.sqrt(np.maximum(squares / n - (total / n) ** 2, 0.0))


def weighted_mean(values: Any, found: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(n, g) means of `values` rows `found` (n, k) by `weight` (n, k), as one sparse product."""
    n, k = found.shape
    weight = weight.ravel().astype(values.dtype, copy=False)
    return sparse.csr_matrix((weight, found.ravel(), np.arange(n + 1) * k), shape=(n, len(values))) @ values
