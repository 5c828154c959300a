"""What an imputation method gets to see: plain arrays over the spots of one stack."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy import sparse

from spatial_impute._geometry import plane_tiles

_N_REGIONS = 8  # of a large tissue to learn from: enough to meet its different parts


@dataclass(frozen=True)
class Spots:
    """Spots of all sections, of which some are known.

    Expression is held for known spots only: nothing that stands elsewhere can reach a prediction.
    """

    xyz: np.ndarray
    """(n, 3) registered coordinates, um."""
    section: np.ndarray
    """(n,) rank of the section in the stack."""
    known: np.ndarray
    """(n,) bool."""
    expression: np.ndarray
    """(n_known, n_genes) log-normalised, rows in the order of the known spots."""
    spacing: float
    """Typical distance to the nearest spot of the section, um."""
    features: np.ndarray | None = None
    """(n, d) image features, standardised within sections."""
    components: np.ndarray | None = None
    """(n, k) components of them on which registered sections agree."""
    graph: sparse.csr_matrix | None = None
    """(n, n) weights of the 3D graph."""
    tokens: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    """Spot, region and global tokens, (n, t, d) each, standardised within sections."""
    edge_features: np.ndarray | None = None
    """(nnz, n_edge_features), in the order of the entries of `graph`."""
    bases: dict[str, np.ndarray] | None = None
    """(n, n_genes) predictions of other models, of known spots without these and the fold they are hidden with."""
    total_counts: np.ndarray | None = None
    """(n_known,) counts of a spot over all genes, where they are known."""

    @property
    def counting_noise(self) -> np.ndarray:
        """(n_known,) relative variance that counting adds to a spot, of mean 1; all 1 without total counts."""
        if self.total_counts is None or not len(self.total_counts):
            return np.ones(int(self.known.sum()))
        variance = 1.0 / self.total_counts
        return variance / variance.mean()

    def hide(self, rows: np.ndarray) -> Spots:
        """Return the same spots with some known ones made unknown.

        Parameters
        ----------
        rows
            (n,) bool.
        """
        still_known = self.known & ~rows
        kept = still_known[self.known]
        totals = None if self.total_counts is None else self.total_counts[kept]
        return replace(self, known=still_known, expression=self.expression[kept], total_counts=totals)

    def take(self, rows: np.ndarray) -> Spots:
        """Return some of the spots, with the edges among them.

        Parameters
        ----------
        rows
            (m,) positions, ascending.
        """

        def part(values: np.ndarray | None) -> np.ndarray | None:
            return None if values is None else values[rows]

        of_known = np.cumsum(self.known) - 1
        kept = of_known[rows[self.known[rows]]]
        graph, edge_features = self.graph, self.edge_features
        if graph is not None:
            # The number of each edge shows which of them are left.
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


def training_rows(spots: Spots, *, max_known: int, seed: int) -> np.ndarray:
    """(m,) spots of some regions that hold at most `max_known` known spots, with all sections of these regions.

    What a model learns is settled by some thousand spots; the time to learn it should not grow with the tissue. Regions
    rather than single spots, because a spot is predicted from what lies around it.
    """
    if spots.known.sum() <= max_known:
        return np.arange(len(spots.known))
    plane = spots.xyz[:, :2]
    tiles = [inside for inside, _ in plane_tiles(plane, plane[spots.known], size=max_known // _N_REGIONS)]
    chosen = np.random.default_rng(seed).permutation(len(tiles))[:_N_REGIONS]
    return np.sort(np.concatenate([tiles[i] for i in chosen]))


def spatial_folds(spots: Spots, *, n_folds: int, block_spacings: float, seed: int) -> list[np.ndarray]:
    """Split the known spots for cross-validation, so that what is held out lies together.

    With two or more known sections each of them is a fold. In a single one, square blocks are held out, dealt to the
    folds at random.

    Parameters
    ----------
    spots
        The spots.
    n_folds
        Number of folds within a single section.
    block_spacings
        Edge of a block in spot spacings.
    seed
        Seed of the dealing.

    Returns
    -------
    One (n,) bool mask of held-out spots per fold; each known spot is held out once.

    Raises
    ------
    ValueError
        If there are too few known spots to hold any out.
    """
    codes = np.unique(spots.section[spots.known])
    if len(codes) > 1:
        return [spots.known & (spots.section == code) for code in codes]
    return block_folds(spots, n_folds=n_folds, block_spacings=block_spacings, seed=seed)


def block_folds(spots: Spots, *, n_folds: int, block_spacings: float, seed: int) -> list[np.ndarray]:
    """Hold out square blocks of the registered frame, on all known sections alike; see :func:`spatial_folds`."""
    rows = np.flatnonzero(spots.known)
    block = blocks(spots, block_spacings)
    n_blocks = int(block.max(initial=-1)) + 1
    n_folds = min(n_folds, n_blocks)
    if n_folds < 2:
        msg = (
            f"Cross-validation needs at least two blocks of measured spots, found {n_blocks} "
            f"({len(rows)} spots, blocks of {block_spacings * spots.spacing:.0f} um). Measure more spots."
        )
        raise ValueError(msg)
    fold_of_block = np.random.default_rng(seed).permutation(n_blocks) % n_folds
    folds = []
    for fold in range(n_folds):
        held_out = np.zeros(len(spots.known), dtype=bool)
        held_out[rows[fold_of_block[block] == fold]] = True
        folds.append(held_out)
    return folds


def blocks(spots: Spots, block_spacings: float) -> np.ndarray:
    """(n_known,) number of the square block of the registered frame that each known spot lies in."""
    with np.errstate(over="ignore"):  # of blocks without extent: all are one then
        cell = np.floor(spots.xyz[spots.known, :2] / max(block_spacings * spots.spacing, np.finfo(float).tiny))
    return np.unique(cell, axis=0, return_inverse=True)[1].ravel()
