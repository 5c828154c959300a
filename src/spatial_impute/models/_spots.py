"""Input of all imputation methods: plain arrays over the spots of one stack."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from scipy import sparse

from spatial_impute._geometry import plane_tiles

if TYPE_CHECKING:
    from collections.abc import Sequence

_N_REGIONS = 8  # of a large tissue to learn from: enough to cover its different parts
_T = TypeVar("_T")


def given(part: _T | None) -> _T:
    """Part of the spots that the calling method needs. The functions that read the stack check that it exists."""
    if part is None:
        raise AssertionError
    return part


@dataclass(frozen=True)
class Spots:
    """Spots of all sections; some of them are known, i.e. measured and not hidden.

    Only the expression of known spots is held, so no other values can leak into a prediction.
    """

    xyz: np.ndarray  # (n, 3) registered coordinates, um
    section: np.ndarray  # (n,) rank of the section in the stack
    known: np.ndarray  # (n,) bool
    expression: np.ndarray  # (n_known, n_genes) log-normalised, rows in the order of the known spots
    spacing: float  # Typical distance to the nearest spot of the section, um
    features: np.ndarray | None = None  # (n, d) image features, standardised within sections
    image_profile: np.ndarray | None = None  # (2, d) mean and spread of the features before they were standardised
    components: np.ndarray | None = None  # (n, k) components of `features` that registered sections share
    graph: sparse.csr_matrix | None = None  # (n, n) weights of the 3D graph
    tokens: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    """Spot, region and global tokens, (n, t, d) each, standardised within sections."""
    field_um: tuple[float, float] = (0.0, 0.0)  # edges of the regions and of the global fields of view
    edge_features: np.ndarray | None = None  # (nnz, n_edge_features), in the order of the entries of `graph`
    bases: dict[str, np.ndarray] | None = None
    """(n, n_genes) predictions of other models; those of a known spot are made without its fold."""
    independent: frozenset[str] = frozenset()
    """Names of the `bases` that saw no spot of this tissue. They are NaN where there is no prediction."""
    total_counts: np.ndarray | None = None  # (n_known,) counts of a spot over all genes, if they are known
    device: str = "cpu"  # torch device that methods compute on

    @property
    def solver_device(self) -> str:
        """Torch device for systems of equations, in double precision, which MPS does not have."""
        return "cpu" if self.device.startswith("mps") else self.device

    @property
    def counting_noise(self) -> np.ndarray:
        """(n_known,) relative variance of counting noise, of mean 1; all 1 without total counts."""
        if self.total_counts is None or not len(self.total_counts):
            return np.ones(int(self.known.sum()))
        variance = 1.0 / self.total_counts
        return variance / variance.mean()

    def hide(self, rows: np.ndarray) -> Spots:
        """Return the same spots without the expression of some known ones; `rows` is (n,) bool."""
        still_known = self.known & ~rows
        kept = still_known[self.known]
        totals = None if self.total_counts is None else self.total_counts[kept]
        return replace(self, known=still_known, expression=self.expression[kept], total_counts=totals)

    def take(self, rows: np.ndarray) -> Spots:
        """Return some of the spots, with the edges among them; `rows` is (m,) ascending positions."""

        def part(values: np.ndarray | None) -> np.ndarray | None:
            return None if values is None else values[rows]

        of_known = np.cumsum(self.known) - 1
        kept = of_known[rows[self.known[rows]]]
        graph, edge_features = self.graph, self.edge_features
        if graph is not None:
            # A matrix of edge numbers shows which edges remain.
            edges = sparse.csr_matrix((np.arange(1, graph.nnz + 1), graph.indices, graph.indptr), shape=graph.shape)
            edges = edges[rows][:, rows]
            edges.sort_indices()
            left = edges.data - 1
            graph = sparse.csr_matrix((graph.data[left], edges.indices, edges.indptr), shape=edges.shape)
            edge_features = None if edge_features is None else edge_features[left]
        return replace(
            self,
            xyz=self.xyz[rows],
            section=self.section[rows],
            known=self.known[rows],
            expression=self.expression[kept],
            features=part(self.features),
            components=part(self.components),
            graph=graph,
            tokens=None if self.tokens is None else tuple(t[rows] for t in self.tokens),
            bases=None if self.bases is None else {name: values[rows] for name, values in self.bases.items()},
            edge_features=edge_features,
            total_counts=None if self.total_counts is None else self.total_counts[kept],
        )


def concatenate(stacks: Sequence[Spots]) -> Spots:
    """Spots of several stacks as one, for methods that use the image alone."""
    if len(stacks) == 1:
        return stacks[0]
    first = np.cumsum([0, *(int(s.section.max()) + 1 for s in stacks[:-1])])
    features = [s.features for s in stacks if s.features is not None]
    totals = [s.total_counts for s in stacks if s.total_counts is not None]
    names = stacks[0].independent
    return Spots(
        xyz=np.concatenate([s.xyz for s in stacks]),
        section=np.concatenate([s.section + n for s, n in zip(stacks, first, strict=True)]),
        known=np.concatenate([s.known for s in stacks]),
        expression=np.concatenate([s.expression for s in stacks]),
        spacing=float(np.median([s.spacing for s in stacks])),
        features=np.concatenate(features) if len(features) == len(stacks) else None,
        bases={name: np.concatenate([given(s.bases)[name] for s in stacks]) for name in names},
        independent=names,
        total_counts=np.concatenate(totals) if len(totals) == len(stacks) else None,
        device=stacks[0].device,
    )


def training_rows(spots: Spots, *, max_known: int, seed: int) -> np.ndarray:
    """(m,) positions of the spots to learn from: all sections of some regions with at most `max_known` known spots.

    Some thousand spots are enough to fit a model, so the time does not grow with the tissue. Regions are chosen instead
    of single spots, because a spot is predicted from its neighbors.
    """
    if spots.known.sum() <= max_known:
        return np.arange(len(spots.known))
    plane = spots.xyz[:, :2]
    tiles = [inside for inside, _ in plane_tiles(plane, plane[spots.known], size=max_known // _N_REGIONS)]
    chosen = np.random.default_rng(seed).permutation(len(tiles))[:_N_REGIONS]
    return np.sort(np.concatenate([tiles[i] for i in chosen]))


def spatial_folds(spots: Spots, *, n_folds: int, block_spacings: float, seed: int) -> list[np.ndarray]:
    """Split the known spots for cross-validation: one (n,) bool mask per fold; each known spot is held out once.

    Neighboring spots are held out together. With two or more known sections, each of them is a fold. In a single section,
    square blocks with edges of `block_spacings` spot spacings are assigned to `n_folds` folds at random. Fewer than two blocks
    of known spots raise a ``ValueError``.
    """
    codes = np.unique(spots.section[spots.known])
    if len(codes) > 1:
        return [spots.known & (spots.section == code) for code in codes]
    return block_folds(spots, n_folds=n_folds, block_spacings=block_spacings, seed=seed)


def block_folds(spots: Spots, *, n_folds: int, block_spacings: float, seed: int) -> list[np.ndarray]:
    """Hold out square blocks of the registered frame, on all known sections alike; see :func:`spatial_folds`."""
    block = blocks(spots, block_spacings)
    n_blocks = int(block.max(initial=-1)) + 1
    n_folds = min(n_folds, n_blocks)
    if n_folds < 2:
        msg = (
            f"Cross-validation needs at least two blocks of measured spots, found {n_blocks} "
            f"({len(block)} spots, blocks of {block_spacings * spots.spacing:.0f} um). Measure more spots."
        )
        raise ValueError(msg)
    fold = np.full(len(spots.known), -1)
    fold[spots.known] = (np.random.default_rng(seed).permutation(n_blocks) % n_folds)[block]
    return [fold == k for k in range(n_folds)]


def blocks(spots: Spots, block_spacings: float) -> np.ndarray:
    """(n_known,) number of the square block that each known spot lies in.

    The grid of blocks belongs to the measured tissue, so that it moves, turns and flips with the frame.
    """
    with np.errstate(over="ignore"):  # spacing 0: all spots are in one block then
        cell = np.floor(_in_own_frame(spots) / max(block_spacings * spots.spacing, np.finfo(float).tiny))
    return np.unique(cell, axis=0, return_inverse=True)[1].ravel()


def _in_own_frame(spots: Spots) -> np.ndarray:
    """(n_known, 2) places of the known spots along two axes of their own: the first points to the longer end of the tissue.

    For tissue that is the same at all ends, the axes come from the depth of the spots, and else from the frame.
    """
    plane = spots.xyz[spots.known, :2]
    plane = plane - plane.mean(axis=0)
    size = np.linalg.norm(plane, axis=1)
    depth = np.zeros(len(plane)) if spots.total_counts is None else spots.total_counts / spots.total_counts.mean() - 1
    for weight in ((size / max(size.mean(), 1e-300)) ** 2, depth):
        first = (weight[:, None] * plane).mean(axis=0)
        length = np.linalg.norm(first)
        if length <= 1e-3 * size.mean():
            continue
        along = plane @ (first / length)
        across = plane @ (np.array([-first[1], first[0]]) / length)
        # The side with more weight along the first axis is the positive one, also in a mirrored frame.
        return np.column_stack([along, across * (1 if (weight * along * across).sum() >= 0 else -1)])
    return plane - plane.min(axis=0)
