"""Stack tables as the plain arrays that the models use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from spatial_impute._expression import require_log_values
from spatial_impute._graph import standardise_by_section, typical_spacing
from spatial_impute._keys import Keys
from spatial_impute._settings import logger, settings
from spatial_impute._stack.record import load_record
from spatial_impute._stack.state import require_current, warn_of_old_layer
from spatial_impute._stack.table import (
    dense_rows,
    measured_mask,
    registered_spots,
    section_ranks,
    stack_table,
    uns_record,
)
from spatial_impute._validation import require_finite, require_key, require_positive
from spatial_impute.models._spots import Spots

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

_EXTRACT = "Run `si.pp.extract_features(sdata)` first."
_BUILD = "Run `si.tl.build_3d_graph(sdata)` first."
_MOVED = 1e-3  # of the bandwidth: lengths are kept as float32, a new registration moves spots by more


def units(table: AnnData) -> str:
    """Units of the expression."""
    return str(uns_record(table, Keys.NORMALIZATION).get("units", "unknown"))


def require_same_units(found: Iterable[str]) -> None:
    """Raise a ``ValueError`` if expression comes in different units. Unknown units fit all others."""
    known = sorted({unit for unit in found if unit != "unknown" and not unit.endswith("as given")})
    if len(known) > 1:
        msg = (
            f"Expression must have the same units, found {known}. Run `si.pp.select_genes` with the same `target_sum` and "
            "`log_normalized`."
        )
        raise ValueError(msg)


def stack_list(sdata: SpatialData | Sequence[SpatialData]) -> list[SpatialData]:
    """One or several stacks as a list that is not empty."""
    stacks = list(sdata) if isinstance(sdata, Sequence) else [sdata]
    if not stacks:
        msg = "`sdata` is an empty sequence; pass at least one stack."
        raise ValueError(msg)
    return stacks


def read_stacks(stacks: list[SpatialData], **slots: Any) -> tuple[list[AnnData], list[Spots]]:
    """Read several stacks with :func:`read_spots`, or raise a ``ValueError`` if they differ in genes or units."""
    read = [read_spots(sdata, **slots) for sdata in stacks]
    tables, spots = [table for table, _ in read], [found for _, found in read]
    for i, table in enumerate(tables):
        if list(table.var_names) != list(tables[0].var_names):
            msg = (
                f"All stacks must have the same genes in the same order; stack {i} differs from stack 0. "
                "Use `si.pp.select_genes(sdata, genes=...)` on each."
            )
            raise ValueError(msg)
    require_same_units(map(units, tables))
    return tables, spots


def read_spots(
    sdata: SpatialData,
    *,
    table_key: str = Keys.STACK_TABLE,
    layer: str = Keys.MEASURED,
    graph_key: str = Keys.SPATIAL_3D,
    features: bool = True,
    graph: bool = True,
    allow_unmeasured: bool = False,
) -> tuple[AnnData, Spots]:
    """Read the stack table, with image features and graph if they are needed.

    Raises a ``KeyError`` that names the function to run if a slot is missing. Raises a ``ValueError`` if nothing is measured
    (unless `allow_unmeasured`), if the values are raw counts or not finite, or if a slot does not belong to what it was
    computed from.
    """
    record, table = load_record(sdata), stack_table(sdata, table_key)
    where = f"sdata.tables[{table_key!r}]"
    known = measured_mask(table, layer=layer, allow_none=allow_unmeasured)
    expression = dense_rows(table.layers[layer], known)
    require_log_values(expression, where=f"{where}.layers[{layer!r}]")
    xyz = registered_spots(table, table_key)
    section = section_ranks(table, record.names)
    require_current(sdata, record, table, features=features, graph=graph_key if graph else None)
    warn_of_old_layer(sdata, record, table, layer)
    tokens = _read_tokens(table, section, where) if features else None
    weights, edge_features = _read_graph(table, section, graph_key, where) if graph else (None, None)
    spots = Spots(
        xyz=xyz,
        section=section,
        known=known,
        expression=expression,
        spacing=typical_spacing(xyz, section),
        features=None if tokens is None else _centred_features(table, tokens),
        image_profile=_image_profile(table) if features else None,
        graph=weights,
        tokens=tokens,
        field_um=_field_um(table),
        edge_features=edge_features,
        total_counts=_read_totals(table, known, where),
        device=settings.device,
    )
    return table, spots


def _field_um(table: AnnData) -> tuple[float, float]:
    """Edges of the regions and global fields of view; 0 if nothing says how large they are."""
    sizes = uns_record(table, Keys.FEATURES, "field_um")
    region, whole = (
        require_positive(sizes[key], name=f"uns[{Keys.FEATURES!r}]['field_um'][{key!r}]") if key in sizes else 0.0
        for key in (Keys.X_REGION, Keys.X_GLOBAL)
    )
    return region, whole


def _image_profile(table: AnnData) -> np.ndarray:
    """(2, d) mean and spread of the features of the spots over all sections, as the encoder gives them."""
    values = np.asarray(table.obsm[Keys.X_SPOT])
    return np.stack([values.mean(axis=0, dtype=float), values.std(axis=0, dtype=float)])


def _read_totals(table: AnnData, known: np.ndarray, where: str) -> np.ndarray | None:
    """(n_known,) total counts, or None if the expression came without them."""
    if Keys.TOTAL_COUNTS not in table.obs:
        return None
    totals = table.obs[Keys.TOTAL_COUNTS].to_numpy(dtype=np.float64)[known]
    missing = np.isnan(totals)
    bad = ~missing & ~(np.isfinite(totals) & (totals > 0))
    if bad.any():
        msg = (
            f"{where}.obs[{Keys.TOTAL_COUNTS!r}] must be positive at measured spots; it is {totals[bad][0]} at "
            f"{table.obs_names[known][bad][0]!r}. Run `si.pp.select_genes(sdata)` again, or delete the column."
        )
        raise ValueError(msg)
    if missing.all():
        return None
    totals[missing] = 1.0 / np.mean(1.0 / totals[~missing])  # as noisy as the others on average
    return totals


def _read_tokens(table: AnnData, section: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of the three levels, (n, t, d) each, standardised within sections."""
    for key in Keys.LEVELS:
        require_key(key, table.obsm, where=f"{where}.obsm", then=_EXTRACT)
        require_finite(np.asarray(table.obsm[key]), name=f"{where}.obsm[{key!r}]", row_names=table.obs_names)
    width = table.obsm[Keys.X_SPOT].shape[1]

    def read(key: str) -> np.ndarray:
        values = np.asarray(table.obsm[key])
        if values.shape[1] % width:
            msg = (
                f"{where}.obsm[{key!r}] must have a multiple of the {width} columns of {Keys.X_SPOT!r}, found "
                f"{values.shape[1]}. {_EXTRACT}"
            )
            raise ValueError(msg)
        return standardise_by_section(values, section).reshape(len(values), -1, width)

    return read(Keys.X_SPOT), read(Keys.X_REGION), read(Keys.X_GLOBAL)


def _centred_features(table: AnnData, tokens: tuple[np.ndarray, ...]) -> np.ndarray:
    """(n, d) features of the fields of view that are centred on the spots; by default the first token of each level."""
    which = uns_record(table, Keys.FEATURES, "field_tokens")
    if Keys.FEATURES not in table.uns and any(t.shape[1] > 1 for t in tokens):
        logger.warning(
            "`uns[%r]` is missing, which says what the columns of the image features are, so only the first token of each level is "
            "used. `anndata.concat` drops it, for example. %s",
            Keys.FEATURES,
            _EXTRACT.replace("first", "again"),
        )
    chosen = [t[:, np.asarray(which.get(key, [0]))] for key, t in zip(Keys.LEVELS, tokens, strict=True)]
    return np.concatenate([t.reshape(len(t), -1) for t in chosen], axis=1)


def _read_graph(table: AnnData, section: np.ndarray, key: str, where: str) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Weights of the 3D graph and the features of its edges, (nnz, 6)."""
    for name in (Keys.connectivities(key), Keys.distances(key), Keys.graph_overlap(key), Keys.graph_similarity(key)):
        require_key(name, table.obsp, where=f"{where}.obsp", then=_BUILD)
    require_key(Keys.neighbors(key), table.uns, where=f"{where}.uns", then=_BUILD)
    # A copy: with another type alone the indices would be those of the table, and sorting them would mix up its weights.
    weights = sparse.csr_matrix(table.obsp[Keys.connectivities(key)], dtype=np.float64, copy=True)
    valid = (weights.data >= 0) & np.isfinite(weights.data)
    if not valid.all():
        bad = weights.tocoo().row[~valid][0]
        msg = (
            f"{where}.obsp[{Keys.connectivities(key)!r}] must hold finite weights of at least 0; the first wrong one is "
            f"in the row of {table.obs_names[bad]!r}. {_BUILD}"
        )
        raise ValueError(msg)
    if weights.nnz == 0:
        msg = f"{where}.obsp[{Keys.connectivities(key)!r}] holds no edge. Run `si.tl.build_3d_graph(sdata)` again."
        raise ValueError(msg)
    weights.sort_indices()
    bandwidth = require_positive(
        uns_record(table, Keys.neighbors(key), "params").get("bandwidth_um"),
        name=f"{where}.uns[{Keys.neighbors(key)!r}]['params']['bandwidth_um']",
    )
    coo = weights.tocoo()
    xyz = np.asarray(table.obsm[Keys.SPATIAL_3D], dtype=np.float64)
    length = np.linalg.norm(xyz[coo.row] - xyz[coo.col], axis=1) / bandwidth
    apart = np.abs(section[coo.row] - section[coo.col])

    def on_edges(name: str) -> np.ndarray:
        return np.asarray(sparse.csr_matrix(table.obsp[name])[coo.row, coo.col]).ravel()

    moved = np.abs(on_edges(Keys.distances(key)) / bandwidth - length) > _MOVED * np.maximum(length, 1)
    if moved.any():
        msg = (
            f"{where}.obsp[{Keys.distances(key)!r}] was made at other coordinates: {int(moved.sum())} of {moved.size} edges "
            f"have another length now, the first at {table.obs_names[coo.row[moved][0]]!r}. After a new registration run "
            "`si.tl.build_3d_graph(sdata)` again."
        )
        raise ValueError(msg)
    edge_features = np.column_stack(
        [
            np.exp(-0.5 * length**2),
            np.log1p(length),
            on_edges(Keys.graph_overlap(key)),
            on_edges(Keys.graph_similarity(key)),
            apart == 0,
            apart,
        ]
    )
    return weights, edge_features
