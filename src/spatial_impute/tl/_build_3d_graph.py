"""Build the 3D graph of a stack. The edges are computed in ``spatial_impute._graph``."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from spatial_impute._graph import EdgeRules, build_graph, standardise_by_section, typical_spacing
from spatial_impute._keys import Keys
from spatial_impute._settings import logger
from spatial_impute._stack.elements import spots_by_section
from spatial_impute._stack.record import load_record
from spatial_impute._stack.state import graph_state, require_current
from spatial_impute._stack.table import registered_spots, section_ranks, stack_table, write_slots
from spatial_impute._validation import require_count, require_finite, require_key, require_positive, require_slot_key

if TYPE_CHECKING:
    from anndata import AnnData
    from scipy import sparse
    from spatialdata import SpatialData

    from spatial_impute._stack.record import StackRecord


_LENGTHS = ("max_distance", "bandwidth")
_MEDIAN_ERROR = float(np.sqrt(2 * np.log(2)))  # median length of a vector with two standard normal components


class Graph3DResult(NamedTuple):
    """Result of :func:`build_3d_graph` with ``inplace=False``, in the form of squidpy's result."""

    connectivities: sparse.csr_matrix
    distances: sparse.csr_matrix


def build_3d_graph(
    sdata: SpatialData,
    *,
    table_key: str = Keys.STACK_TABLE,
    use_rep: str | None = Keys.X_SPOT,
    n_neighs: int = 6,
    n_cross_neighs: int = 6,
    max_section_gap: int = 2,
    max_distance: float | None = None,
    n_similar: int = 3,
    similarity_threshold: float = 0.5,
    similarity_weight: float = 1.0,
    key_added: str = Keys.SPATIAL_3D,
    inplace: bool = True,
) -> Graph3DResult | None:
    """Build a sparse 3D graph over the spots of all sections, after ASIGN :cite:p:`Zhu2025`.

    A spot is linked to its neighbors in the section, to the spots over or under it in nearby sections, and to spots
    there with similar image features. The weight of an edge is the Gaussian of its registered distance plus the overlap
    (IoU) of the two discs, or the similarity. Across sections, both are means over all places that are possible with
    the expected error of the registration. This makes the Gaussian wider and lower, so a badly placed section relies
    less on the others. Expression is not used.

    Parameters
    ----------
    sdata
        Registered stack.
    table_key
        Name of the stack table.
    use_rep
        Features in ``obsm`` for the similarity edges; ``None`` for a graph of distances only.
    n_neighs
        Number of neighbors in the section of the spot.
    n_cross_neighs
        Number of neighbors in each nearby section.
    max_section_gap
        Largest number of steps in the stack between two linked sections.
    max_distance
        Longest spatial edge across sections in um; three spot spacings by default.
    n_similar
        Number of similar spots per nearby section. Two spots are linked if each is among the most similar spots of the
        other.
    similarity_threshold
        Cosine of the features (standardised within sections) above which spots count as similar.
    similarity_weight
        Weight of an edge between spots with identical features. Spots at the same place have a weight of up to 2. ASIGN
        weighs overlap and similarity equally.
    key_added
        Prefix of the written keys.
    inplace
        Write to the table, or return the graph and write nothing.

    Returns
    -------
    ``None``, or a :class:`Graph3DResult` with ``inplace=False``. Writes to `sdata.tables['stack']`:

    `.obsp['spatial_3d_connectivities']`, `.obsp['spatial_3d_distances']` : :class:`scipy.sparse.csr_matrix` (``float32``)
        Weights and lengths (um) of the same edges; symmetric, no diagonal.
    `.obsp['spatial_3d_overlap']`, `.obsp['spatial_3d_similarity']` : :class:`scipy.sparse.csr_matrix` (``float32``)
        IoU of overlapping spots, cosine on similarity edges.
    `.uns['spatial_3d_neighbors']` : :class:`dict`
        Keys and parameters, as squidpy writes them.

    Raises
    ------
    KeyError
        If the stack is not registered, or `use_rep` is missing.
    ValueError
        If a parameter is out of its range, or coordinates are not finite.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack(extent=1400.0)
    >>> si.tl.register_stack(sdata, show_progress_bar=False)
    >>> si.tl.build_3d_graph(sdata, use_rep=None)
    >>> sdata.tables["stack"].obsp["spatial_3d_connectivities"].nnz > 0
    True
    """
    record = load_record(sdata)
    table = stack_table(sdata, table_key)
    where = f"sdata.tables[{table_key!r}].obsm"
    xyz = registered_spots(table, table_key)
    if use_rep is not None:
        require_key(
            use_rep, table.obsm, where=where, then="Run `si.pp.extract_features(sdata)` first, or pass `use_rep=None`."
        )
        require_finite(np.asarray(table.obsm[use_rep]), name=f"{where}[{use_rep!r}]", row_names=table.obs_names)
    require_slot_key(key_added, name="key_added")
    if not isinstance(similarity_threshold, int | float | np.number) or not -1 <= similarity_threshold < 1:
        msg = f"`similarity_threshold` is a cosine and must lie in [-1, 1), found {similarity_threshold!r}."
        raise ValueError(msg)
    section = section_ranks(table, record.names)
    spacing = typical_spacing(xyz, section)
    longest = 3 * spacing if max_distance is None else require_positive(max_distance, name="max_distance", unit="um")
    rules = EdgeRules(
        n_neighs=require_count(n_neighs, name="n_neighs"),
        n_cross_neighs=require_count(n_cross_neighs, name="n_cross_neighs", least=0),
        max_section_gap=require_count(max_section_gap, name="max_section_gap"),
        max_distance=longest,
        n_similar=require_count(n_similar, name="n_similar", least=0),
        similarity_threshold=float(similarity_threshold),
        similarity_weight=similarity_weight and require_positive(similarity_weight, name="similarity_weight"),
        bandwidth=spacing,
    )
    require_current(sdata, record, table, features=use_rep in Keys.LEVELS, measured=False)
    features = None if use_rep is None else standardise_by_section(np.asarray(table.obsm[use_rep]), section)
    graph = build_graph(xyz, section, _radii(sdata, record, table), features, rules, misplaced=_misplaced(record))
    lonely = int((np.diff(graph.weights.indptr) == 0).sum())
    if lonely:
        logger.warning("%d of %d spots have no neighbor in the 3D graph", lonely, table.n_obs)
    if not inplace:
        return Graph3DResult(graph.weights, graph.distances)
    slots = {
        Keys.connectivities(key_added): graph.weights,
        Keys.distances(key_added): graph.distances,
        Keys.graph_overlap(key_added): graph.overlap,
        Keys.graph_similarity(key_added): graph.similarity,
    }
    params = {f"{name}_um" if name in _LENGTHS else name: value for name, value in asdict(rules).items()}
    parameters = {
        "version": version("spatial-impute"),
        "connectivities_key": Keys.connectivities(key_added),
        "distances_key": Keys.distances(key_added),
        "params": params | {"use_rep": "" if use_rep is None else use_rep},
        Keys.STATE: graph_state(table, record, use_rep),
    }
    write_slots(table, table_key, {"obsp": slots, "uns": {Keys.neighbors(key_added): parameters}})
    return None


def _misplaced(record: StackRecord) -> np.ndarray:
    """(k, k) standard deviation along one axis, in um, of the error of one section on another.

    Squared errors add up along the path of a section to the reference. What two paths share does not move the two
    sections against each other. A section of unknown error gets the largest error of the stack.
    """
    rows = (record.registration or {}).get("sections", {})
    errors = {name: row.get("error_um") for name, row in rows.items()}
    largest = max((error for error in errors.values() if error is not None), default=0.0)
    square = {name: (largest if error is None else error) ** 2 for name, error in errors.items()}
    misplaced = np.zeros((len(record.names),) * 2)
    for i, j in combinations(range(len(record.names)), 2):
        a, b = record.names[i], record.names[j]
        if a in rows and b in rows:
            shared = next((name for name in rows[a]["path"] if name in rows[b]["path"]), record.reference)
            apart = square[a] + square[b] - 2 * square.get(shared, 0.0)
            misplaced[i, j] = misplaced[j, i] = np.sqrt(max(apart, 0.0)) / _MEDIAN_ERROR
    return misplaced


def _radii(sdata: SpatialData, record: StackRecord, table: AnnData) -> np.ndarray:
    """(n,) radius of the spot of every row in um."""
    radius = np.full(table.n_obs, np.nan)
    for _, _, found, rows in spots_by_section(sdata, record, table):
        radius[rows] = found
    missing = np.isnan(radius)
    if missing.any():
        msg = (
            f"{int(missing.sum())} rows of the stack table have no circle in `sdata.shapes`, the first is "
            f"{table.obs_names[missing][0]!r}. Remove spots from both, or from neither."
        )
        raise ValueError(msg)
    return radius
