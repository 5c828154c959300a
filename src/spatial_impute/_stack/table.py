"""Table of a stack: one row per spot of every section."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from spatialdata.models import TableModel

from spatial_impute._keys import Keys
from spatial_impute._settings import log_added, logger
from spatial_impute._stack.elements import spot_geometry
from spatial_impute._stack.record import attrs_record, require_spatialdata
from spatial_impute._validation import record_at, require_finite, require_key, require_positive, require_unique

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from spatialdata import SpatialData

    from spatial_impute._stack.record import Section, StackRecord


_VALUES = 2**21  # hashed at a time: 16 MB
_COMPARED, _ROUNDED = 32, 1e-3  # spots that are compared with their counts; half precision is below
_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, with mixed bits: a small difference changes many bits


def stack_table(sdata: SpatialData, table_key: str = Keys.STACK_TABLE) -> AnnData:
    """Stack table; an error without it or its columns, or if names are not unique or a row is of an unknown section."""
    require_spatialdata(sdata)
    require_key(table_key, sdata.tables, where="sdata.tables", then="Lay spots with `si.pp.tile_spots(sdata)`.")
    table = sdata.tables[table_key]
    where = f"sdata.tables[{table_key!r}]"
    for slot, keys in {"obs": (Keys.SECTION, Keys.INSTANCE, Keys.MEASURED, Keys.Z), "obsm": (Keys.SPATIAL,)}.items():
        for key in keys:
            then = "Make the table with `si.pp.assemble_stack({...})`."
            require_key(key, getattr(table, slot), where=f"{where}.{slot}", then=then)
    require_unique(table.obs_names, name=f"`{where}.obs_names`")
    require_unique(table.var_names, name=f"`{where}.var_names`")
    _require_known_sections(sdata, table, where)
    _require_own_names(table, where)
    return table


def uns_record(table: AnnData, *keys: str) -> Mapping[str, Any]:
    """Record of this package in ``uns``; empty if there is none."""
    return record_at(table.uns, *keys, where="uns")


def target_sum_of(table: AnnData) -> float:
    """Sum to which the counts of a spot were normalised, for computations on raw counts; 1e4 if nothing says it."""
    found = uns_record(table, Keys.NORMALIZATION).get("target_sum", np.nan)
    if isinstance(found, float) and np.isnan(found):
        return 1e4
    return require_positive(found, name=f"uns[{Keys.NORMALIZATION!r}]['target_sum']")


def is_stack_table(table: AnnData) -> bool:
    """Return True for a table with the columns of a stack table, and without expression outside of its layer."""
    if not {Keys.SECTION, Keys.MEASURED, Keys.INSTANCE} <= set(table.obs):
        return False
    return Keys.MEASURED in table.layers or (table.X is None and not len(table.layers))


def _require_known_sections(sdata: SpatialData, table: AnnData, where: str) -> None:
    """Raise a ``ValueError`` for rows of sections that the stack never had. One that was cut out of it is known."""
    recorded = attrs_record(sdata, Keys.STACK).get("sections", ())
    names = [section["name"] for section in recorded]
    unknown = sorted(set(table.obs[Keys.SECTION].dropna().astype(str)) - set(names)) if names else []
    if unknown:
        msg = (
            f"Rows of `{where}.obs[{Keys.SECTION!r}]` are of the sections {unknown}, which the stack does not have; it has {names}. "
            "Correct the names, or take these rows out."
        )
        raise ValueError(msg)


def spot_names(table: AnnData) -> pd.Index:
    """Names of the spots by section and id, which the rows should have."""
    return pd.Index(table.obs[Keys.SECTION].astype(str) + "_" + table.obs[Keys.INSTANCE].astype(str))


def _require_own_names(table: AnnData, where: str) -> None:
    """Raise a ``ValueError`` if a row has the name of another spot: some joins go by names, others by ids."""
    names = spot_names(table)
    if names.equals(table.obs_names):
        return
    other = table.obs_names.get_indexer(names)
    wrong = np.flatnonzero((other >= 0) & (other != np.arange(table.n_obs)))
    if len(wrong):
        msg = (
            f"Row {wrong[0]} of `{where}` is named {table.obs_names[wrong[0]]!r}, but by `obs[{Keys.SECTION!r}]` and "
            f"`obs[{Keys.INSTANCE!r}]` it is the spot {names[wrong[0]]!r}, the name of another row ({len(wrong)} such rows). Restore "
            "the names or these columns, so that names are '{section}_{id}'."
        )
        raise ValueError(msg)


def measured_ids(table: AnnData) -> dict[str, str]:
    """Hash of the names of the measured spots of each section, to compare two states of a table; empty without any."""
    measured = table.obs[Keys.MEASURED].to_numpy(dtype=bool)
    section = table.obs[Keys.SECTION].astype(str).to_numpy()
    found = {}
    for name in np.unique(section):
        names = sorted(table.obs_names[measured & (section == name)])
        found[str(name)] = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16] if names else ""
    return found


def section_ranks(table: AnnData, names: Sequence[str]) -> np.ndarray:
    """(n,) position in the stack of the section of each row; `names` are the sections in the order of the stack.

    Raises a ``ValueError`` if the column is not categorical, or if its categories stand in another order.
    """
    column = table.obs[Keys.SECTION]
    if not isinstance(column.dtype, pd.CategoricalDtype) or column.isna().any():
        msg = (
            f"`obs[{Keys.SECTION!r}]` must be categorical, in the order of the stack and without missing values; found "
            f"{column.dtype} with {int(column.isna().sum())} missing. Restore it with "
            "`pd.Categorical(values, categories=[...], ordered=True)`."
        )
        raise ValueError(msg)
    known = [name for name in names if name in column.cat.categories]
    if known != [name for name in column.cat.categories if name in names]:
        msg = (
            f"The categories of `obs[{Keys.SECTION!r}]` must stand in the order of the stack, {known}; found "
            f"{list(column.cat.categories)}. Restore it with `obs[{Keys.SECTION!r}].cat.reorder_categories({known})`."
        )
        raise ValueError(msg)
    return column.cat.codes.to_numpy().astype(np.int64)


def fingerprint(*arrays: Any) -> str:
    """Short hash of arrays of equally many rows, taken together; the same in any order of the rows."""
    n = len(arrays[0])
    total, rng = n, np.random.default_rng(0)
    weights = [rng.integers(0, 2**63, int(np.prod(a.shape[1:])), dtype=np.uint64) * 2 + 1 for a in arrays]
    n_rows = max(1, _VALUES // max(1, *(len(weight) for weight in weights)))
    for start in range(0, n, n_rows):
        mixed = np.zeros(min(n_rows, n - start), np.uint64)
        for array, weight in zip(arrays, weights, strict=True):
            part = np.ascontiguousarray(array[start : start + n_rows]).reshape(len(mixed), -1)
            part = part + part.dtype.type(0) if part.dtype.kind == "f" else part.astype(np.int64)  # no -0.0
            words = part.view(f"u{part.dtype.itemsize}").astype(np.uint64, copy=False)
            mixed = (mixed ^ (mixed >> np.uint64(31))) * _MIX + np.einsum("ij,j->i", words, weight)
        mixed = (mixed ^ (mixed >> np.uint64(29))) * _MIX
        total += int((mixed ^ (mixed >> np.uint64(32))).sum(dtype=np.uint64))
    return f"{total % 2**64:016x}"


def counts_state(table: AnnData, layer: str | None) -> str:
    """Fingerprint of a table of counts: the sums of its rows and columns, each with its name."""
    matrix: Any = table.X if layer is None else table.layers[layer]
    ids = table.obs[table.uns["spatialdata_attrs"]["instance_key"]].astype(str)
    sums = (np.round(np.asarray(matrix.sum(axis=axis, dtype=np.float64)).ravel(), 3) for axis in (1, 0))
    return "".join(map(fingerprint, map(hashed, (ids, table.var_names)), sums))


def hashed(names: Any) -> np.ndarray:
    """(n,) int64 hash of each name."""
    return pd.util.hash_array(np.asarray(names, dtype=object)).view(np.int64)


def fits_counts(table: AnnData, section: str, counts: AnnData, layer: str | None, target_sum: float | None) -> bool:
    """Return False if some measured spots of a section have other values than `layer` of the counts gives for them."""
    ids = pd.Index(counts.obs[counts.uns["spatialdata_attrs"]["instance_key"]].astype(str))
    genes = counts.var_names.get_indexer(table.var_names) if counts.var_names.is_unique else np.zeros(0)
    if Keys.MEASURED not in table.layers or not (genes >= 0).any() or not ids.is_unique:
        return True
    rows = np.flatnonzero(((table.obs[Keys.SECTION] == section) & table.obs[Keys.MEASURED]).to_numpy(bool))
    at = ids.get_indexer(table.obs[Keys.INSTANCE].astype(str).iloc[rows])
    joined = np.flatnonzero(at >= 0)
    joined = joined[:: max(1, len(joined) // _COMPARED)]  # spread over the section
    rows, at = rows[joined], at[joined]
    raw = dense_rows((counts.X if layer is None else counts.layers[layer])[at])
    expected = raw if target_sum is None else np.log1p(raw / raw.sum(axis=1, keepdims=True) * target_sum)
    found = dense_rows(table.layers[Keys.MEASURED][rows])
    return np.allclose(found[:, genes >= 0], expected[:, genes[genes >= 0]], rtol=_ROUNDED, atol=_ROUNDED)


def dense_rows(matrix: Any, rows: np.ndarray | None = None) -> np.ndarray:
    """Some rows of a dense, sparse or lazy matrix, all by default, as float64."""
    values = matrix if rows is None else matrix[np.flatnonzero(rows)]
    values = values.compute() if hasattr(values, "compute") else values
    return np.asarray(values.toarray() if hasattr(values, "toarray") else values, dtype=np.float64)


def build_stack_table(sdata: SpatialData, record: StackRecord) -> None:
    """Write a new ``tables["stack"]``: one row per spot of every section, in stack order, without expression."""
    frames, coordinates = [], []
    for section in record.sections:
        if section.spots is None:
            continue
        centers, _, index = spot_geometry(sdata, section)
        frames.append(
            pd.DataFrame(
                {
                    Keys.REGION: section.spots,
                    Keys.INSTANCE: index.to_numpy(),
                    Keys.SECTION: section.name,
                    Keys.Z: section.z,
                    Keys.MEASURED: measured_spots(sdata, section, index),
                },
                index=[f"{section.name}_{i}" for i in index],
            )
        )
        coordinates.append(centers)
    if not frames:
        return
    obs = pd.concat(frames)
    if not obs.index.is_unique:
        repeated = obs.index[obs.index.duplicated()][0]
        msg = (
            f"Two spots of the stack would have the name {repeated!r} (section and id). Rename the sections, or give "
            "the spots of each section unique ids."
        )
        raise ValueError(msg)
    obs[Keys.SECTION] = pd.Categorical(obs[Keys.SECTION], categories=list(record.names), ordered=True)
    obs[Keys.REGION] = pd.Categorical(obs[Keys.REGION])
    table = AnnData(obs=obs, obsm={Keys.SPATIAL: np.concatenate(coordinates)})
    sdata.tables[Keys.STACK_TABLE] = TableModel.parse(
        table, region=list(obs[Keys.REGION].cat.categories), region_key=Keys.REGION, instance_key=Keys.INSTANCE
    )
    log_added(f"tables[{Keys.STACK_TABLE!r}]")


def measured_sections(sdata: SpatialData, record: StackRecord) -> list[Section]:
    """Sections with counts; warns of tables of counts that the stack does not know: their sections would be imputed."""
    for section in record.sections:
        if section.counts is None and Keys.counts(section.name) in sdata.tables:
            logger.warning(
                "`sdata.tables[%r]` was added after the stack was assembled, so section %r counts as unmeasured. Assemble the stack "
                "again with a SpatialData object that holds this table",
                Keys.counts(section.name),
                section.name,
            )
    return [section for section in record.sections if section.counts is not None]


def measured_spots(sdata: SpatialData, section: Section, index: pd.Index) -> np.ndarray:
    """(n,) bool: True for spots with a row in the counts table of the section, joined by instance id."""
    if section.counts is None:
        return np.zeros(len(index), dtype=bool)
    table = sdata.tables[section.counts]
    instance_key = table.uns["spatialdata_attrs"]["instance_key"]
    return np.isin(index.to_numpy().astype(str), table.obs[instance_key].to_numpy().astype(str))


def measured_mask(table: AnnData, *, layer: str = Keys.MEASURED, allow_none: bool = False) -> np.ndarray:
    """(n,) bool: rows whose expression may be used. Only ``obs["measured"]`` decides; values of other rows have no effect.

    Raises a ``KeyError`` if the layer is missing, and a ``ValueError`` if no spot is measured (unless `allow_none`), or a
    measured row is not finite. NaN is allowed for genes that a section did not measure.
    """
    require_key(
        layer,
        table.layers,
        where=f"sdata.tables[{Keys.STACK_TABLE!r}].layers",
        then="Write it with `si.pp.select_genes(sdata)`.",
    )
    flags = table.obs[Keys.MEASURED]
    if flags.dtype != bool:  # Python takes the text "False" for true, so unmeasured spots would count as measured
        msg = (
            f"`obs[{Keys.MEASURED!r}]` must be of type bool, found {flags.dtype} with values like "
            f"{flags.unique()[:3].tolist()!r}. Convert it, e.g. with `.map({{'True': True, 'False': False}}).astype(bool)`."
        )
        raise ValueError(msg)
    measured = flags.to_numpy()
    if not measured.any():
        if allow_none:
            return measured
        msg = (
            f"No measured section: `obs[{Keys.MEASURED!r}]` is False for all {table.n_obs} spots. Imputation needs "
            "at least one section with expression; pass its SpatialData (with a table) to `si.pp.assemble_stack`."
        )
        raise ValueError(msg)
    values = np.asarray(dense_rows(table.layers[layer], measured))
    if np.isfinite(values).all():
        return measured
    # A gene that is not on the panel of a section is NaN at all of its spots.
    section = table.obs[Keys.SECTION].to_numpy()[measured]
    bad = np.isinf(values).any(axis=1) | ~np.isfinite(values).any(axis=1)
    for name in np.unique(section):
        missing = np.isnan(values[section == name])
        bad[section == name] |= (missing != missing[0]).any(axis=1)
    if bad.any():
        first = table.obs_names[measured][bad][0]
        msg = (
            f"Measured rows of `layers[{layer!r}]` must be finite; the first that is not: {first!r}. Run "
            f"`si.pp.select_genes(sdata)` again, or set `obs[{Keys.MEASURED!r}]` to False there."
        )
        raise ValueError(msg)
    nowhere = ~np.isfinite(values).any(axis=0)
    if nowhere.any():
        msg = f"Gene {table.var_names[nowhere][0]!r} of `layers[{layer!r}]` was not measured on any section."
        raise ValueError(msg)
    return measured


def registered_spots(table: AnnData, table_key: str) -> np.ndarray:
    """(n, 3) x, y, z of all spots in the common frame, um; an error if they are missing or not finite."""
    where = f"sdata.tables[{table_key!r}].obsm"
    require_key(Keys.SPATIAL_3D, table.obsm, where=where, then="Run `si.tl.register_stack(sdata)` first.")
    xyz = np.asarray(table.obsm[Keys.SPATIAL_3D], dtype=float)
    if xyz.shape[1:] != (3,):
        msg = (
            f"`{where}[{Keys.SPATIAL_3D!r}]` must have the columns x, y and z in um, found the shape {xyz.shape}. Run "
            "`si.tl.register_stack(sdata)` again."
        )
        raise ValueError(msg)
    require_finite(xyz, name=f"{where}[{Keys.SPATIAL_3D!r}]", row_names=table.obs_names)
    return xyz


def write_slots(table: AnnData, table_key: str, slots: Mapping[str, Mapping[str, Any]]) -> None:
    """Write results to slots of a table (``{"layers": {key: values}, ...}``), also to X if it shows a layer; log each."""
    for slot, results in slots.items():
        for key, values in results.items():
            getattr(table, slot)[key] = values
            log_added(f"tables[{table_key!r}].{slot}[{key!r}]")
    shown = str(table.uns.get(Keys.X_LAYER))
    if shown in slots.get("layers", {}):
        # A copy: scanpy changes X in place (`sc.pp.scale`), and the layer must stay as it is.
        table.X = table.layers[shown].copy()
        log_added(f"tables[{table_key!r}].X")


def values_by_spot(table: AnnData, section: str, values: np.ndarray, index: pd.Index) -> np.ndarray:
    """Values of the spots of a section, joined by instance id; NaN for spots that are not in the table."""
    rows = (table.obs[Keys.SECTION] == section).to_numpy()
    by_id = pd.Series(values[rows], index=table.obs[Keys.INSTANCE].to_numpy()[rows].astype(str))
    return by_id.reindex(index.astype(str)).to_numpy()
