"""Spots of two sections that look alike. Exact for sections of some ten thousand spots, by cells beyond."""

from __future__ import annotations

import numpy as np

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
