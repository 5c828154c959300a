"""Sources of results: short fingerprints, compared before each use.

A function that writes a slot records fingerprints of what it read. A function that uses the slot compares them with what
is there now. A result that would be wrong is refused; one that is merely old is used, with a warning. Fingerprints
depend neither on the order of rows nor on the names of sections, so stacks can be reordered and renamed. Slots of
objects without fingerprints are used as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse

from spatial_impute._keys import Keys
from spatial_impute._settings import logger
from spatial_impute._stack.elements import (
    image_state,
    load_transform,
    moved_elements,
    rows_of_spots,
    section_images,
    spot_geometry,
)
from spatial_impute._stack.record import attrs_record, load_record
from spatial_impute._stack.table import (
    counts_state,
    dense_rows,
    fingerprint,
    fits_counts,
    hashed,
    measured_ids,
    section_ranks,
    target_sum_of,
    uns_record,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from anndata import AnnData
    from spatialdata import SpatialData

    from spatial_impute._stack.record import Section, StackRecord

_DIGITS = 6  # of a position in um
_MOVED = 1e-3  # um; rounding of a store or of another machine is far below
_REGISTER = "Run `si.tl.register_stack(sdata)` again."
SLOT_WORDS = {
    "positions": "registered positions",
    "spots": "positions of spots",
    "measured": "measured expression or names of genes",
    "features": "image features",
    "graph": "3D graph",
    "bases": "base layers",
}


class Problem(NamedTuple):
    """A slot that does not belong to what it was computed from."""

    text: str
    wrong: bool = True  # The result would be wrong, not only old


def spots_fingerprint(table: AnnData, record: StackRecord, *arrays: Any) -> str:
    """Short hash of arrays with a row per spot of the table, each row together with the place of its spot.

    Without the place, two sections whose values are exchanged would have the same hash.
    """
    rank = pd.factorize(section_ranks(table, record.names), sort=True)[0]
    place = np.round(np.asarray(table.obsm.get(Keys.SPATIAL, table.obsm[Keys.SPATIAL_3D]), float), _DIGITS)
    return fingerprint(place, rank, *map(np.asarray, arrays))


def table_state(
    table: AnnData, record: StackRecord, *, layer: str = Keys.MEASURED, features: bool = False, graph: str | None = None
) -> dict[str, str]:
    """Fingerprints of the slots of a stack table that an imputation reads."""
    known = table.obs[Keys.MEASURED].to_numpy(dtype=bool)
    xyz = np.round(np.asarray(table.obsm[Keys.SPATIAL_3D], float), _DIGITS)
    rank = pd.factorize(section_ranks(table, record.names), sort=True)[0]  # numbers of the sections that have rows
    found = {"layer": layer, "positions": fingerprint(xyz, rank), "measured": ""}
    if layer in table.layers:
        # With the names of the genes, in any order: names that are exchanged are another measurement.
        order = np.argsort(np.asarray(table.var_names, dtype=str), kind="stable")
        values = dense_rows(table.layers[layer], known)[:, order]
        found["measured"] = fingerprint(xyz[known], values) + fingerprint(
            np.arange(len(order)), hashed(table.var_names[order])
        )
    if features:
        found["features"] = spots_fingerprint(table, record, *(table.obsm[key] for key in Keys.LEVELS))
    if graph is not None:
        edges = sparse.coo_matrix(table.obsp[Keys.connectivities(graph)])
        found |= {"graph_key": graph, "graph": fingerprint(xyz[edges.row], xyz[edges.col], edges.data)}
    return found


def require_current(
    sdata: SpatialData,
    record: StackRecord,
    table: AnnData,
    *,
    features: bool = False,
    graph: str | None = None,
    measured: bool = True,
) -> None:
    """Raise a ``ValueError`` if slots of a stack table do not belong to what they were computed from; warn if they are old."""
    raise_or_warn(_slot_problems(sdata, record, table, features=features, graph=graph, measured=measured))


def warn_if_old(sdata: SpatialData, table: AnnData, layers: Iterable[str] = (), *, graphs: Iterable[str] = ()) -> None:
    """Warn if layers or graphs of a stack table, or what they were made from, do not belong to the present data."""
    if Keys.STACK not in attrs_record(sdata):
        return
    record = load_record(sdata)
    states = {key: uns_record(table, key, Keys.STATE) for key in layers}
    used = {*graphs, *(str(state["graph_key"]) for state in states.values() if "graph_key" in state)}
    features = any("features" in state for state in states.values())
    features |= any(_rep_of(table, key) in Keys.LEVELS for key in used)
    found = list(_slot_problems(sdata, record, table, features=features, graph=None, measured=True))
    found += [problem for key in sorted(used) for problem in _graph_problems(table, record, key)]
    for key, state in states.items():
        found += _layer_problems(sdata, record, table, key, state)
    warn(found)


def warn_of_old_layer(sdata: SpatialData, record: StackRecord, table: AnnData, key: str) -> None:
    """Warn if a layer that is read as the measurement was made from other data than the present ones."""
    warn(_layer_problems(sdata, record, table, key, uns_record(table, key, Keys.STATE)))


def require_not_measured(sdata: SpatialData, table: AnnData, key: str, sections: Iterable[str]) -> None:
    """Raise a ``ValueError`` if a layer holds measurements of spots of `sections` that count as unmeasured now.

    It does if these spots were measured when it was imputed. If they were when its model was fitted, a warning is logged.
    """
    origin = uns_record(table, key)
    then, now = uns_record(table, key, Keys.MEASURED_IDS), measured_ids(table)
    if Keys.MEASURED_IDS in origin and dict(then) != now:
        changed = [name for name in sections if then.get(name, None) not in ("", now.get(name, ""))]
        if changed:
            msg = (
                f"`layers[{key!r}]` was imputed when other spots of section {changed[0]!r} were measured than now, so it holds "
                f"measurements at spots of sections {changed} that count as unmeasured. Impute the layer again."
            )
            raise ValueError(msg)
    if seen := origin.get(Keys.SEEN, {}):
        images = section_images(sdata, load_record(sdata), sections)
        learned = [name for name in sections if name in seen or images[name] in seen.values()]
        if learned:
            logger.warning(
                "The model of `layers[%r]` was fitted on the measurement of the sections %s, so their scores are too high. Fit a "
                "model without them, and impute again.",
                key,
                learned,
            )


def raise_or_warn(problems: Iterable[Problem]) -> None:
    """Raise a ``ValueError`` for the first slot that would give a wrong result, and warn of old ones."""
    for problem in dict.fromkeys(problems):
        if problem.wrong:
            raise ValueError(problem.text)
        logger.warning("%s", problem.text)


def warn(problems: Iterable[Problem]) -> None:
    """Warn of slots that do not belong to what they were computed from."""
    raise_or_warn(Problem(problem.text, wrong=False) for problem in problems)


def _slot_problems(
    sdata: SpatialData, record: StackRecord, table: AnnData, *, features: bool, graph: str | None, measured: bool
) -> Iterator[Problem]:
    circles = _circles(sdata, record, table)
    yield from (Problem(problem.text, wrong=False) for problem in tissue_problems(sdata, record))
    yield from _position_problems(record, table, circles)
    yield from registration_problems(sdata, record)
    yield from _registered_problems(sdata, record, table)
    if measured:
        yield from measurement_problems(sdata, record, table)
    if features or (graph is not None and _rep_of(table, graph) in Keys.LEVELS):
        yield from _feature_problems(sdata, record, table, circles)
    if graph is not None:
        yield from _graph_problems(table, record, graph)


def _circles(sdata: SpatialData, record: StackRecord, table: AnnData) -> dict[str, tuple[Any, ...]]:
    """Centers, diameter and rows of the spots of each section that the table holds."""
    found = {}
    for section in record.sections:
        if section.spots in sdata.shapes and Keys.INSTANCE in table.obs:
            centers, radius, index = spot_geometry(sdata, section)
            rows = rows_of_spots(table, section.name, index)
            found[section.name] = centers[rows >= 0], 2 * float(np.median(radius)), rows[rows >= 0]
    return found


def _position_problems(record: StackRecord, table: AnnData, circles: Mapping[str, Any]) -> Iterator[Problem]:
    """Spots that were moved, and heights that were changed, after the table was made."""
    if Keys.SPATIAL not in table.obsm:
        return
    own = np.asarray(table.obsm[Keys.SPATIAL], float)
    height = table.obs[Keys.Z].to_numpy(float) if Keys.Z in table.obs else np.full(table.n_obs, np.nan)
    for name, (centers, _, rows) in circles.items():
        moved = np.abs(own[rows, :2] - centers).max(axis=1, initial=0) > _MOVED
        if moved.any():
            yield Problem(
                f"{int(moved.sum())} spots of section {name!r} lie elsewhere in `sdata.shapes[{record[name].spots!r}]` than in "
                f"`obsm[{Keys.SPATIAL!r}]`, the first is {table.obs_names[rows[moved]][0]!r}. {_REGISTER} It reads them anew."
            )
        off = np.abs(height[rows] - record[name].z) > _MOVED
        if off.any():
            yield Problem(
                f"Section {name!r} lies at {height[rows][off][0]:g} um in `obs[{Keys.Z!r}]`, and at {record[name].z:g} um in the "
                f"record of the stack, `sdata.attrs[{Keys.ATTRS!r}][{Keys.STACK!r}]['sections']`. Set both to the same height. {_REGISTER}"
            )


def tissue_problems(sdata: SpatialData, record: StackRecord) -> Iterator[Problem]:
    """Images that changed after their tissue was segmented."""
    recorded = attrs_record(sdata, Keys.TISSUE)
    names = [section.name for section in record.sections if Keys.tissue(section.name) in sdata.labels]
    for name in _changed(recorded, section_images(sdata, record, [n for n in names if n in recorded])):
        yield Problem(
            f"The tissue in `sdata.labels[{Keys.tissue(name)!r}]` was found on another image than the present one of section "
            f"{name!r}. Run `si.pp.segment_tissue(sdata)` again; to lay its spots anew, delete "
            f"`sdata.shapes[{Keys.spots(name)!r}]` and run `si.pp.tile_spots(sdata)`."
        )


def from_images(rows: Mapping[str, Any], record: StackRecord) -> list[str]:
    """Sections whose place comes from their image, not from the user."""
    return [name for name in record.names if name in rows and rows[name]["route"] != "given"]


def changed_images(sdata: SpatialData, record: StackRecord) -> list[str]:
    """Sections of a registered stack whose image is not the one that was registered."""
    registration = record.registration or {"sections": {}}
    recorded = registration.get(Keys.STATE, {}).get("images", {})  # none if all places were given
    names = from_images(registration["sections"], record) if recorded else ()
    return _changed(recorded, section_images(sdata, record, names))


def registration_problems(sdata: SpatialData, record: StackRecord) -> Iterator[Problem]:
    """Images that changed or elements that moved after the registration, and sections that are gone."""
    registration = record.registration
    if registration is None:
        return
    for name in changed_images(sdata, record):
        yield _image_problem(
            sdata, record[name], f"The image of section {name!r} is not the one that was registered. {_REGISTER}"
        )
    for element in moved_elements(sdata, record):
        yield Problem(
            f"`{element}` was moved in {registration['coordinate_system']!r} after the registration, whose place is used. Give your "
            "place as `si.tl.register_stack(sdata, transformations={section: matrix})`.",
            wrong=False,
        )
    gone = sorted(set(registration["sections"]) - set(record.names))
    if gone:
        yield Problem(f"The stack was registered with the sections {gone}, which are gone. {_REGISTER}", wrong=False)


def _image_problem(sdata: SpatialData, section: Section, text: str) -> Problem:
    """Problem of a changed image; an image that was taken out, to save space, makes no result wrong."""
    if section.image in sdata.images:
        return Problem(text)
    return Problem(
        f"`sdata.images[{section.image!r}]` is gone. What was computed from it is used as it is.", wrong=False
    )


def _registered_problems(sdata: SpatialData, record: StackRecord, table: AnnData) -> Iterator[Problem]:
    """Spots that are not where the registration puts them."""
    if not {Keys.SPATIAL, Keys.SPATIAL_3D} <= set(table.obsm.keys()) or record.registration is None:
        return
    own, xyz = np.asarray(table.obsm[Keys.SPATIAL], float), np.asarray(table.obsm[Keys.SPATIAL_3D], float)
    section = table.obs[Keys.SECTION].astype(str).to_numpy()
    for name in record.names:
        rows = np.flatnonzero(section == name)
        if not len(rows) or name not in record.registration["sections"]:
            continue
        placed = load_transform(sdata, record, name).points(own[rows, :2])
        off = np.abs(xyz[rows, :2] - placed).max(axis=1) > _MOVED
        if Keys.Z in table.obs:
            off |= np.abs(xyz[rows, 2] - table.obs[Keys.Z].to_numpy(float)[rows]) > _MOVED
        if off.any():
            recorded = record.registration.get(Keys.STATE, {}).get("spots", {})
            by_hand = recorded.get(name) in (None, spots_state(table, rows))
            reason = (
                "they are used as they are" if by_hand else "spots, heights or transformations were changed after it"
            )
            yield Problem(
                f"`obsm[{Keys.SPATIAL_3D!r}]` of section {name!r} is not where the registration puts its spots, the first is "
                f"{table.obs_names[rows[off]][0]!r}: {reason}. {_REGISTER}",
                wrong=not by_hand,
            )


def spots_state(table: AnnData, rows: np.ndarray) -> str:
    """Fingerprint of the positions of spots in their section, and of their height."""
    return fingerprint(np.asarray(table.obsm[Keys.SPATIAL], float)[rows], table.obs[Keys.Z].to_numpy(float)[rows])


def _changed(recorded: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Sections with another fingerprint than the recorded one. A section that was renamed is known by its fingerprint."""
    known = set(map(str, recorded.values()))
    return [name for name, found in now.items() if found != recorded.get(name, found if found in known else None)]


def _feature_problems(
    sdata: SpatialData, record: StackRecord, table: AnnData, circles: Mapping[str, Any]
) -> Iterator[Problem]:
    """Images and spots that changed after the features were computed."""
    again = "Run `si.pp.extract_features(sdata)` again."
    recorded = uns_record(table, Keys.FEATURES, Keys.STATE)
    if not recorded:
        return
    for name in _changed(recorded, section_images(sdata, record, circles)):
        yield _image_problem(
            sdata,
            record[name],
            f"The image of section {name!r} is not the one that its features were computed from. {again}",
        )
    if Keys.FEATURES_AT not in table.obsm:
        return
    at = np.asarray(table.obsm[Keys.FEATURES_AT], float)
    for name, (centers, diameter, rows) in circles.items():
        moved = np.abs(at[rows, :2] - centers).max(axis=1, initial=0) > _MOVED
        moved |= ~(np.abs(at[rows, 2] - diameter) <= _MOVED)  # also NaN
        if moved.any():
            yield Problem(
                f"{int(moved.sum())} spots of section {name!r} had another place or size when their features were computed, the "
                f"first is {table.obs_names[rows[moved]][0]!r}. {again}"
            )


def map_problems(sdata: SpatialData, key: str) -> Iterator[Problem]:
    """An image that changed after a dense map was predicted from it."""
    entry = attrs_record(sdata, Keys.DENSE, key)
    recorded = attrs_record(sdata, Keys.DENSE, key, Keys.STATE).get("image")
    if recorded is not None and recorded != image_state(sdata, entry["image"], entry["coordinate_system"]):
        yield Problem(
            f"`sdata.images[{key!r}]` was predicted from another image than the present `sdata.images[{entry['image']!r}]`. "
            "Run `si.tl.predict_dense` again.",
            wrong=False,
        )


def graph_state(table: AnnData, record: StackRecord, use_rep: str | None) -> dict[str, Any]:
    """Fingerprints of what a 3D graph is built from."""
    found = table_state(table, record)
    rep = "" if use_rep is None else spots_fingerprint(table, record, table.obsm[use_rep])
    return {"positions": found["positions"], "features": rep, "n_spots": int(table.n_obs)}


def _rep_of(table: AnnData, key: str) -> str | None:
    """Features in ``obsm`` that a graph was built from."""
    return str(uns_record(table, Keys.neighbors(key), "params").get("use_rep", "")) or None


def _graph_problems(table: AnnData, record: StackRecord, key: str) -> Iterator[Problem]:
    """Positions and features that changed after the graph was built."""
    recorded = uns_record(table, Keys.neighbors(key), Keys.STATE)
    if not recorded:
        return
    use_rep = _rep_of(table, key)
    if use_rep is not None and use_rep not in table.obsm:
        return  # the reader of the features says so
    now = graph_state(table, record, use_rep)
    recorded = {**now, **recorded}  # what is not recorded is not compared
    call = "build_3d_graph(sdata)" if key == Keys.SPATIAL_3D else f"build_3d_graph(sdata, key_added={key!r})"
    again = f"After a change of spots, places or features run `si.tl.{call}` again."
    if now["n_spots"] != recorded["n_spots"]:
        yield Problem(
            f"The 3D graph {key!r} was built with {recorded['n_spots']} spots, the table has {now['n_spots']}. {again}",
            wrong=now["n_spots"] > recorded["n_spots"],
        )
        return
    changed = [name for name in ("positions", "features") if now[name] != recorded[name]]
    if changed:
        words = " and ".join(SLOT_WORDS[name] for name in changed)
        yield Problem(f"The 3D graph {key!r} was built from other {words} than the table has now. {again}")


def measurement_problems(sdata: SpatialData, record: StackRecord, table: AnnData) -> Iterator[Problem]:
    """Counts that changed after they were normalised."""
    recorded = uns_record(table, Keys.NORMALIZATION, Keys.STATE)
    layer = str(uns_record(table, Keys.NORMALIZATION).get("layer", "")) or None
    if not recorded:
        return
    now = {}
    for section in record.sections:
        counts = sdata.tables.get(str(section.counts))
        if counts is not None and (counts.X is not None if layer is None else layer in counts.layers):
            now[section.name] = counts_state(counts, layer)
    changed, units = _changed(recorded, now), str(uns_record(table, Keys.NORMALIZATION).get("units", ""))
    for name in changed:
        yield Problem(
            f"`sdata.tables[{record[name].counts!r}]` is not the one that `layers[{Keys.MEASURED!r}]` was made from. Run "
            "`si.pp.select_genes(sdata)` again to use its present counts.",
            wrong=False,
        )
    target_sum = target_sum_of(table) if "log1p" in units else None
    for name in (name for name in now if name not in changed):
        if not fits_counts(table, name, sdata.tables[str(record[name].counts)], layer, target_sum):
            yield Problem(
                f"`layers[{Keys.MEASURED!r}]` holds other values than `sdata.tables[{record[name].counts!r}]` gives for these genes and "
                "spots; it is used as it is. If it was not changed on purpose, run `si.pp.select_genes(sdata)` again.",
                wrong=False,
            )


def _layer_problems(
    sdata: SpatialData, record: StackRecord, table: AnnData, key: str, state: Mapping[str, Any]
) -> Iterator[Problem]:
    """Changes since a layer was imputed."""
    graph = str(state["graph_key"]) if "graph_key" in state else None
    lost = [k for k in Keys.LEVELS if "features" in state and k not in table.obsm]
    lost += [graph] if graph is not None and Keys.connectivities(graph) not in table.obsp else []
    if Keys.SPATIAL_3D not in table.obsm or not state or lost:
        return
    now = table_state(
        table, record, layer=str(state.get("layer", Keys.MEASURED)), features="features" in state, graph=graph
    )
    if "bases" in state:
        bases = [table.layers[str(name)] for name in uns_record(table, key, "base_layers") if name in table.layers]
        now["bases"] = spots_fingerprint(table, record, *bases) if bases else ""
    changed = [
        SLOT_WORDS[name] for name, found in now.items() if name in SLOT_WORDS and found != state.get(name, found)
    ]
    if "images" in state:
        changed += [f"image of section {name!r}" for name in _changed(state["images"], section_images(sdata, record))]
    if changed:
        made, again = ("matched", "Match") if Keys.MATCHED_FROM in table.uns[key] else ("imputed", "Impute")
        yield Problem(
            f"`layers[{key!r}]` was {made} from other {', '.join(changed)} than the table has now. {again} it again.",
            wrong=False,
        )
