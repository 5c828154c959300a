"""Edges of the 3D graph over spots: arrays in, sparse matrices out. Memory grows with the edges, never with N x N."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy import sparse
from scipy.spatial import cKDTree

from spatial_impute._geometry import disc_iou

_COLUMNS_AT_A_TIME = 32  # features to hold in double precision


@dataclass(frozen=True)
class SpotGraph:
    """Undirected typed graph over spots; all matrices are (n, n) CSR without diagonal."""

    weights: sparse.csr_matrix  # Strength of each edge, > 0
    distances: sparse.csr_matrix  # Distance in the registered frame (um), same pattern as `weights`
    overlap: sparse.csr_matrix  # Intersection over union of the discs of two spots on different sections, where above 0
    similarity: sparse.csr_matrix  # Cosine similarity of the images, on the edges that were added for it


def typical_spacing(xyz: np.ndarray, section: np.ndarray) -> float:
    """Median distance to the nearest spot of the same section (um); a ``ValueError`` if no section has two spots."""
    nearest = []
    for code in np.unique(section):
        points = xyz[section == code, :2]
        if len(points) > 1:
            nearest.append(cKDTree(points).query(points, k=2)[0][:, 1])
    if not nearest:
        msg = "No section has more than one spot, so there is no spacing to measure; a graph needs neighbors."
        raise ValueError(msg)
    return float(np.median(np.concatenate(nearest)))


@dataclass(frozen=True)
class EdgeRules:
    """Rules by which spots are linked and edges get their weights."""

    n_neighs: int  # Nearest spots of the same section to link
    n_cross_neighs: int  # Nearest spots to link on each other section
    max_section_gap: int  # Largest difference of ranks of two linked sections
    max_distance: float  # Longest edge across sections, um; similarity edges have no limit
    n_similar: int  # Most similar spots to link on each other section, if mutual
    similarity_threshold: float  # Cosine from which spots count as similar
    similarity_weight: float  # Weight of an edge between spots that look identical, relative to spots at the same place
    bandwidth: float  # Standard deviation of the Gaussian that turns distance into weight, um


@dataclass(frozen=True)
class _Section:
    """Spots of one section."""

    rows: np.ndarray  # (m,) rows of the spots, ordered by place
    xy: np.ndarray  # (m, 2) um
    tree: cKDTree  # of `xy`


def build_graph(
    xyz: np.ndarray,
    section: np.ndarray,
    radius: np.ndarray,
    features: np.ndarray | None,
    rules: EdgeRules,
    *,
    misplaced: np.ndarray | None = None,
) -> SpotGraph:
    """Link spots within sections, across sections where they lie over each other, and where they look alike.

    `xyz` (n, 3) are registered coordinates and `radius` (n,) radii in um, `section` (n,) ranks in the stack, `features`
    (n, d) image features that are comparable across sections, for the similarity edges. `misplaced` (k, k) is the standard
    deviation, along one axis, of the error of the place of one section on another, um, by rank; None for no error.
    """
    n = len(xyz)
    # By place, not by row: which of several spots at one distance are linked must not depend on the order of rows.
    by_place = np.lexsort((xyz[:, 1], xyz[:, 0]))
    members = {code: by_place[section[by_place] == code] for code in np.unique(section)}
    sections = {code: _Section(rows, xyz[rows, :2], cKDTree(xyz[rows, :2])) for code, rows in members.items()}
    linked = [(a, b) for (i, a), (j, b) in product(sections.items(), repeat=2) if 0 < j - i <= rules.max_section_gap]
    pairs = [_neighbor_pairs(part, rules.n_neighs) for part in sections.values() if len(part.rows) > 1]
    alike, cosine = np.empty((0, 2), dtype=np.int64), np.empty(0)
    for a, b in linked:
        if rules.n_cross_neighs > 0:
            pairs += _cross_pairs(a, b, k=rules.n_cross_neighs, max_distance=rules.max_distance)
        pairs.append(_overlap_pairs(a, b, radius))
        if features is not None and rules.n_similar > 0:
            found, cosines = similar_pairs(features, a.rows, b.rows, rules.n_similar, rules.similarity_threshold)
            alike, cosine = np.concatenate([alike, found]), np.concatenate([cosine, cosines])
    spatial = _unique_pairs(pairs, n)
    apart = section[spatial[:, 0]], section[spatial[:, 1]]
    error = np.zeros(len(spatial)) if misplaced is None else misplaced[apart]
    iou, near = _nearness(xyz, radius, spatial, cross=apart[0] != apart[1], error=error, bandwidth=rules.bandwidth)
    likeness = rules.similarity_weight * (cosine - rules.similarity_threshold) / (1 - rules.similarity_threshold)
    weights = _symmetric(spatial, np.maximum(near, 1e-12), n) + _symmetric(alike, np.maximum(likeness, 1e-12), n)
    weights = weights.tocsr()
    weights.sort_indices()
    return SpotGraph(
        weights=weights.astype(np.float32),
        distances=_lengths(xyz, weights),
        overlap=_symmetric(spatial[iou > 0], iou[iou > 0], n).astype(np.float32),
        similarity=_symmetric(alike, cosine, n).astype(np.float32),
    )


def _nearness(
    xyz: np.ndarray, radius: np.ndarray, pairs: np.ndarray, *, cross: np.ndarray, error: np.ndarray, bandwidth: float
) -> tuple[np.ndarray, np.ndarray]:
    """Overlap of the discs of each pair, and its weight: the mean over the expected error of the place, (m,) each."""
    step = xyz[pairs[:, 0]] - xyz[pairs[:, 1]]
    in_plane = np.linalg.norm(step[:, :2], axis=1)
    discs = radius[pairs[:, 0]], radius[pairs[:, 1]]
    iou = np.where(cross, disc_iou(in_plane, *discs), 0.0)
    # The mean of a Gaussian over places with a normal error is a wider and lower Gaussian of the same volume.
    wider = 1 + (error / bandwidth) ** 2
    near = np.exp(-0.5 * (in_plane**2 / wider + step[:, 2] ** 2) / bandwidth**2) / wider
    # So is about that of the overlap. A disc has a variance of a quarter of its squared radius along an axis.
    wider = 1 + 4 * error**2 / np.maximum(discs[0] ** 2 + discs[1] ** 2, 1e-12)
    near += np.where(cross, disc_iou(in_plane / np.sqrt(wider), *discs) / wider, 0.0)
    return iou, near


def _lengths(xyz: np.ndarray, weights: sparse.csr_matrix) -> sparse.csr_matrix:
    """Length of each edge; the same pattern as the weights, also where two spots coincide (explicit zeros)."""
    coo = weights.tocoo()
    lengths = np.linalg.norm(xyz[coo.row] - xyz[coo.col], axis=1).astype(np.float32)
    return sparse.csr_matrix((lengths, weights.indices, weights.indptr), shape=weights.shape)


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
    """(m, 2) global rows of the kept neighbors `found` (positions in `rows_b`) of each of `rows_a`."""
    source = np.repeat(rows_a, found.shape[1])[keep.ravel()]
    return np.column_stack([source, rows_b[found[keep]]])


def _neighbor_pairs(part: _Section, n_neighs: int) -> np.ndarray:
    """(m, 2) pairs of each spot and its nearest ones in the section."""
    found = nearest_others(part.tree, n_neighs)
    return np.column_stack([np.repeat(part.rows, found.shape[1]), part.rows[found.ravel()]])


def nearest_others(tree: cKDTree, k: int) -> np.ndarray:
    """(n, k) positions of the nearest other points of each point of a tree, or of all others if there are fewer."""
    k = min(k, tree.n - 1)
    found = tree.query(tree.data, k=k + 1)[1]
    others = found != np.arange(tree.n)[:, None]
    # The point itself need not come first, nor come at all, where several lie at one place.
    others &= np.cumsum(others, axis=1) <= k
    return found[others].reshape(tree.n, k)


def _cross_pairs(a: _Section, b: _Section, *, k: int, max_distance: float) -> list[np.ndarray]:
    """Nearest spots of each of two sections on the other one, both ways."""
    pairs = []
    for source, target in ((a, b), (b, a)):
        length, found = target.tree.query(source.xy, k=list(range(1, min(k, len(target.rows)) + 1)))
        keep = length <= max_distance
        pairs.append(_pairs(source.rows, target.rows, found, keep))
    return pairs


def _overlap_pairs(a: _Section, b: _Section, radius: np.ndarray) -> np.ndarray:
    """(m, 2) pairs of spots on two sections whose discs overlap."""
    reach = float(radius[a.rows].max() + radius[b.rows].max())
    near = a.tree.sparse_distance_matrix(b.tree, reach, output_type="coo_matrix")
    i, j = a.rows[near.row], b.rows[near.col]
    # Coinciding centres have distance 0, which a sparse matrix still stores explicitly.
    return np.column_stack([i, j])[near.data < radius[i] + radius[j]]


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
    """Pairs of spots of two sections that are among each other's k most similar: (m, 2) rows and (m,) cosines.

    `features` are (n, d), `rows_a` and `rows_b` the rows of either section; cosines must exceed the threshold.
    """
    a, b = _unit_rows(features[rows_a]), _unit_rows(features[rows_b])
    forward, cosine = most_similar(a, b, k)
    backward, _ = most_similar(b, a, k)
    mutual = (backward[forward] == np.arange(len(a))[:, None, None]).any(axis=2)
    keep = mutual & (cosine > threshold)
    return _pairs(rows_a, rows_b, forward, keep), cosine[keep]


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
