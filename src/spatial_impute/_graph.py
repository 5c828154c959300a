"""Edges of the 3D graph over spots: arrays in, sparse matrices out. Memory grows with the edges, never with N x N."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.spatial import cKDTree

from spatial_impute._geometry import disc_iou

_COLUMNS_AT_A_TIME = 32  # features to hold in double precision


@dataclass(frozen=True)
class SpotGraph:
    """Undirected typed graph over spots; all matrices are (n, n) CSR without diagonal."""

    weights: sparse.csr_matrix
    """Strength of each edge, > 0."""
    distances: sparse.csr_matrix
    """Distance in the registered frame (um), same pattern as `weights`."""
    overlap: sparse.csr_matrix
    """Intersection over union of the discs of two spots on different sections, where above 0."""
    similarity: sparse.csr_matrix
    """Cosine similarity of the images, on the edges that were added for it."""


def typical_spacing(xyz: np.ndarray, section: np.ndarray) -> float:
    """Median distance to the nearest spot of the same section (um).

    Raises
    ------
    ValueError
        If no section has two spots.
    """
    nearest = []
    for code in np.unique(section):
        points = xyz[section == code, :2]
        if len(points) > 1:
            nearest.append(cKDTree(points).query(points, k=2)[0][:, 1])
    if not nearest:
        msg = "No section has more than one spot, so there is no spacing to measure; a graph needs neighbours."
        raise ValueError(msg)
    return float(np.median(np.concatenate(nearest)))


def build_graph(
    xyz: np.ndarray,
    section: np.ndarray,
    radius: np.ndarray,
    features: np.ndarray | None,
    *,
    n_neighs: int,
    n_cross_neighs: int,
    max_section_gap: int,
    max_distance: float,
    n_similar: int,
    similarity_threshold: float,
    similarity_weight: float,
    bandwidth: float,
    misplaced: np.ndarray | None = None,
) -> SpotGraph:
    """Link spots within sections, across sections where they lie over each other, and where they look alike.

    Parameters
    ----------
    xyz
        (n, 3) registered coordinates, um.
    section
        (n,) rank of each spot's section in the stack.
    radius
        (n,) radii, um.
    features
        (n, d) image features for the similarity edges, comparable across sections; None for none.
    n_neighs, n_cross_neighs
        Nearest spots to link in the same section, and in each linked section.
    max_section_gap
        Largest difference of ranks of two linked sections.
    max_distance
        Longest edge across sections, um (similarity edges have no limit).
    n_similar
        Most similar spots to link per linked section, if mutual.
    similarity_threshold
        Cosine from which spots count as similar.
    similarity_weight
        Weight of an edge between spots that look identical, relative to spots at the same place.
    bandwidth
        Standard deviation of the Gaussian that turns distance into weight, um.
    misplaced
        (k, k) standard deviation, along one axis, of the error of the place of one section on another, um, by rank;
        None for sections exactly in place.
    """
    n = len(xyz)
    pairs, alike_pairs, cosines = [], [], []
    # By place, not by row: which of several spots at one distance are linked must not depend on the order of rows.
    by_place = np.lexsort((xyz[:, 1], xyz[:, 0]))
    members = {code: by_place[section[by_place] == code] for code in np.unique(section)}
    trees = {code: cKDTree(xyz[rows, :2]) for code, rows in members.items()}
    for a, rows_a in members.items():
        if len(rows_a) > 1:
            k = min(n_neighs, len(rows_a) - 1)
            found = trees[a].query(xyz[rows_a, :2], k=k + 1)[1]
            others = found != np.arange(len(rows_a))[:, None]
            # The spot itself need not come first, nor come at all, where several lie at one place.
            others &= np.cumsum(others, axis=1) <= k
            pairs.append(_pairs(rows_a, rows_a, found, others))
        for b, rows_b in members.items():
            if not 0 < b - a <= max_section_gap:
                continue
            if n_cross_neighs > 0:
                found = _cross_pairs(
                    xyz, rows_a, rows_b, trees[a], trees[b], k=n_cross_neighs, max_distance=max_distance
                )
                pairs.extend(found)
            pairs.extend(_overlap_pairs(rows_a, rows_b, trees[a], trees[b], radius))
            if features is not None and n_similar > 0:
                ij, cosine = similar_pairs(features, rows_a, rows_b, n_similar, similarity_threshold)
                alike_pairs.append(ij)
                cosines.append(cosine)
    spatial = _unique_pairs(pairs, n)
    alike = np.concatenate(alike_pairs) if alike_pairs else np.empty((0, 2), dtype=np.int64)
    cosine = np.concatenate(cosines) if cosines else np.empty(0)

    step = xyz[spatial[:, 0]] - xyz[spatial[:, 1]]
    cross = section[spatial[:, 0]] != section[spatial[:, 1]]
    in_plane = np.linalg.norm(step[:, :2], axis=1)
    discs = radius[spatial[:, 0]], radius[spatial[:, 1]]
    iou = np.where(cross, disc_iou(in_plane, *discs), 0.0)
    error = np.zeros(len(spatial)) if misplaced is None else misplaced[section[spatial[:, 0]], section[spatial[:, 1]]]
    # The mean of a Gaussian over places with a normal error is a wider and lower Gaussian of the same volume.
    wider = 1 + (error / bandwidth) ** 2
    near = np.exp(-0.5 * (in_plane**2 / wider + step[:, 2] ** 2) / bandwidth**2) / wider
    # So is about that of the overlap. A disc has a variance of a quarter of its squared radius along an axis.
    wider = 1 + 4 * error**2 / np.maximum(discs[0] ** 2 + discs[1] ** 2, 1e-12)
    near += np.where(cross, disc_iou(in_plane / np.sqrt(wider), *discs) / wider, 0.0)
    likeness = similarity_weight * (cosine - similarity_threshold) / (1 - similarity_threshold)
    weights = _symmetric(spatial, np.maximum(near, 1e-12), n) + _symmetric(alike, np.maximum(likeness, 1e-12), n)
    weights = weights.tocsr()
    weights.sort_indices()
    coo = weights.tocoo()
    lengths = np.linalg.norm(xyz[coo.row] - xyz[coo.col], axis=1)
    # The same pattern as the weights, also where two spots coincide (explicit zeros).
    distances = sparse.csr_matrix((lengths.astype(np.float32), weights.indices, weights.indptr), shape=(n, n))
    return SpotGraph(
        weights=weights.astype(np.float32),
        distances=distances,
        overlap=_symmetric(spatial[iou > 0], iou[iou > 0], n).astype(np.float32),
        similarity=_symmetric(alike, cosine, n).astype(np.float32),
    )


def standardise_by_section(features: np.ndarray, section: np.ndarray) -> np.ndarray:
    """Centre and scale features within each section, which removes differences of stain and scanner between them.

    (n, d) to (n, d) ``float32``; features that do not vary on a section become 0 there.
    """
    result = np.empty(features.shape, dtype=np.float32)
    for code in np.unique(section):
        rows = np.flatnonzero(section == code)
        block = features[rows]
        smallest = 1e-6 * (1 + max(float(block.max()), -float(block.min()))) if block.size else 0.0
        for start in range(0, block.shape[1], _COLUMNS_AT_A_TIME):
            columns = block[:, start : start + _COLUMNS_AT_A_TIME].astype(np.float64)
            spread = columns.std(axis=0)
            columns -= columns.mean(axis=0)
            columns /= np.where(spread > smallest, spread, np.inf)
            result[rows, start : start + _COLUMNS_AT_A_TIME] = columns
    return result


def _pairs(rows_a: np.ndarray, rows_b: np.ndarray, found: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """(m, 2) global rows of the kept neighbours `found` (positions in `rows_b`) of each of `rows_a`."""
    source = np.repeat(rows_a, found.shape[1])[keep.ravel()]
    return np.column_stack([source, rows_b[found.ravel()[keep.ravel()]]])


def _cross_pairs(
    xyz: np.ndarray,
    rows_a: np.ndarray,
    rows_b: np.ndarray,
    tree_a: cKDTree,
    tree_b: cKDTree,
    *,
    k: int,
    max_distance: float,
) -> list[np.ndarray]:
    """Nearest spots of each of two sections on the other one, both ways."""
    pairs = []
    for source, target, tree in ((rows_a, rows_b, tree_b), (rows_b, rows_a, tree_a)):
        wanted = list(range(1, min(k, len(target)) + 1))
        length, found = tree.query(xyz[source, :2], k=wanted)
        keep = length <= max_distance
        pairs.append(_pairs(source, target, np.where(keep, found, 0), keep))
    return pairs


def _overlap_pairs(
    rows_a: np.ndarray, rows_b: np.ndarray, tree_a: cKDTree, tree_b: cKDTree, radius: np.ndarray
) -> list[np.ndarray]:
    """Pairs of spots on two sections whose discs overlap."""
    reach = float(radius[rows_a].max() + radius[rows_b].max())
    near = tree_a.sparse_distance_matrix(tree_b, reach, output_type="coo_matrix")
    i, j = rows_a[near.row], rows_b[near.col]
    overlapping = near.data < radius[i] + radius[j]
    # Coinciding centres have distance 0, which a sparse matrix still stores explicitly.
    return [np.column_stack([i, j])[overlapping]]


def _unique_pairs(pairs: list[np.ndarray], n: int) -> np.ndarray:
    """Undirected pairs (i < j), each once, sorted."""
    if not pairs:
        return np.empty((0, 2), dtype=np.int64)
    both = np.sort(np.concatenate(pairs).astype(np.int64), axis=1)
    code = np.unique(both[:, 0] * n + both[:, 1])
    return np.column_stack([code // n, code % n])


def _symmetric(pairs: np.ndarray, values: np.ndarray, n: int) -> sparse.csr_matrix:
    """Symmetric CSR with the value of each pair on both sides."""
    i = np.concatenate([pairs[:, 0], pairs[:, 1]])
    j = np.concatenate([pairs[:, 1], pairs[:, 0]])
    return sparse.csr_matrix((np.concatenate([values, values]), (i, j)), shape=(n, n))


_ROWS_AT_A_TIME = 1024  # rows of the similarity of two sections held in memory
# Pairs of spots compared one by one, some seconds of work. Above, each spot is compared within the cells nearest to it,
# and time grows with N sqrt(N).
_MAX_EXACT_PAIRS = 20_000**2
# Cells that each spot looks into. With 16 of some hundred, 99 of 100 of the exact pairs are found on features with structure.
_CELLS_PER_SPOT = 16
_CELL_SAMPLE = 40_000  # spots that the centres of the cells are fitted to


def similar_pairs(
    features: np.ndarray, rows_a: np.ndarray, rows_b: np.ndarray, k: int, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of spots of two sections that are among each other's k most similar.

    Parameters
    ----------
    features
        (n, d).
    rows_a, rows_b
        Rows of the spots of either section.
    k
        Most similar spots to look at.
    threshold
        Cosine that a pair has to exceed.

    Returns
    -------
    (m, 2) rows and (m,) cosines.
    """
    a, b = _unit_rows(features[rows_a]), _unit_rows(features[rows_b])
    forward, cosine = most_similar(a, b, k)
    backward, _ = most_similar(b, a, k)
    mutual = (backward[forward] == np.arange(len(a))[:, None, None]).any(axis=2)
    keep = mutual & (cosine > threshold)
    source = np.repeat(rows_a, forward.shape[1])[keep.ravel()]
    return np.column_stack([source, rows_b[forward[keep]]]), cosine[keep]


def most_similar(a: np.ndarray, b: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(n_a, k) positions in b and cosines, most similar first; ties go to the lower position.

    Rows are unit vectors. A position stands at most once in a row; where cells hold fewer than k spots, it is repeated
    with a cosine of -inf.
    """
    if len(a) * len(b) <= _MAX_EXACT_PAIRS:
        return _among_all(a, b, k)
    return _among_cells(a, b, k)


def _among_all(a: np.ndarray, b: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    k = min(k, len(b))
    found = np.empty((len(a), k), dtype=np.int64)
    cosine = np.empty((len(a), k))
    for start in range(0, len(a), _ROWS_AT_A_TIME):
        block = a[start : start + _ROWS_AT_A_TIME] @ b.T
        top = _top_k(block, k)
        found[start : start + len(block)] = top
        cosine[start : start + len(block)] = np.take_along_axis(block, top, axis=1)
    return found, cosine


def _among_cells(a: np.ndarray, b: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Sort b into cells around k-means centres; compare each of a with the members of the cells nearest to it."""
    from sklearn.cluster import MiniBatchKMeans

    rng = np.random.default_rng(0)
    sample = b[np.sort(rng.choice(len(b), min(_CELL_SAMPLE, len(b)), replace=False))]
    n_cells = min(int(np.sqrt(len(b))), len(sample))
    means = MiniBatchKMeans(n_cells, n_init=1, batch_size=4096, max_iter=10, random_state=0).fit(sample)
    centres = _unit_rows(means.cluster_centers_)
    home = _among_all(b, centres, 1)[0][:, 0]
    members = np.split(np.argsort(home, kind="stable"), np.cumsum(np.bincount(home, minlength=n_cells))[:-1])
    near = _among_all(a, centres, _CELLS_PER_SPOT)[0]
    n_near = near.shape[1]
    visits = np.argsort(near.ravel(), kind="stable")
    visitors = np.split(visits, np.cumsum(np.bincount(near.ravel(), minlength=n_cells))[:-1])
    found = np.zeros((len(a) * n_near, k), dtype=np.int64)
    cosine = np.full((len(a) * n_near, k), -np.inf, dtype=np.float32)
    for inside, visitor in zip(members, visitors, strict=True):
        if not len(inside):
            continue
        for start in range(0, len(visitor), _ROWS_AT_A_TIME):
            slot = visitor[start : start + _ROWS_AT_A_TIME]
            block = a[slot // n_near] @ b[inside].T
            top = _top_k(block, min(k, len(inside)))
            found[slot, : top.shape[1]] = inside[top]
            cosine[slot, : top.shape[1]] = np.take_along_axis(block, top, axis=1)
    found, cosine = found.reshape(len(a), -1), cosine.reshape(len(a), -1)
    order = np.lexsort((found, -cosine), axis=1)[:, :k]
    return np.take_along_axis(found, order, axis=1), np.take_along_axis(cosine, order, axis=1).astype(float)


def _unit_rows(values: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(values, axis=1, keepdims=True)
    return (values / np.where(norm > 0, norm, 1.0)).astype(np.float32)


def _top_k(block: np.ndarray, k: int) -> np.ndarray:
    """Positions of the k largest per row, in descending order."""
    top = np.sort(np.argpartition(-block, k - 1, axis=1)[:, :k], axis=1)
    order = np.argsort(-np.take_along_axis(block, top, axis=1), axis=1, kind="stable")
    return np.take_along_axis(top, order, axis=1)
