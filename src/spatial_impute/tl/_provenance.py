"""Provenance of imputed layers, and the layers themselves."""

from __future__ import annotations

import hashlib
from copy import deepcopy
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from spatial_impute._keys import Keys
from spatial_impute._settings import logger
from spatial_impute._stack.record import load_record
from spatial_impute._stack.spots import units
from spatial_impute._stack.state import SLOT_WORDS, fingerprint, section_image, spots_fingerprint, table_state
from spatial_impute._stack.table import measured_ids, write_slots

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from anndata import AnnData
    from spatialdata import SpatialData

    from spatial_impute._stack.record import StackRecord
    from spatial_impute.models import AsignModel, AsignPanels, PixNetModel
    from spatial_impute.models._spots import Spots


@dataclass(frozen=True)
class ImputedLayer:
    """Result of an imputation, to be written or returned."""

    key: str
    values: np.ndarray
    origin: dict[str, Any]
    layers: dict[str, np.ndarray] = field(default_factory=dict)
    obs: dict[str, Any] = field(default_factory=dict)
    var: dict[str, np.ndarray] = field(default_factory=dict)

    def write(self, table: AnnData, table_key: str) -> None:
        """Write everything to the stack table, the imputed values also to ``X``."""
        layers = {self.key: self.values, **self.layers}
        uns = {self.key: self.origin, Keys.X_LAYER: self.key}
        write_slots(table, table_key, {"layers": layers, "obs": self.obs, "var": self.var, "uns": uns})

    def to_anndata(self, table: AnnData) -> AnnData:
        """New AnnData with the imputed values in ``X``, and with the coordinates and graphs of the table."""
        from anndata import AnnData

        graphs = {key: table.uns[key] for key in table.uns if key.endswith(Keys.neighbors(""))}
        return AnnData(
            X=self.values,
            layers=self.layers,
            obs=table.obs.assign(**self.obs),
            var=table.var.assign(**self.var),
            obsm={key: table.obsm[key].copy() for key in (Keys.SPATIAL, Keys.SPATIAL_3D)},
            obsp={key: graph.copy() for key, graph in table.obsp.items()},
            uns={**deepcopy(graphs), self.key: self.origin, Keys.X_LAYER: self.key},
        )


def provenance(record: StackRecord, table: AnnData, known: np.ndarray, **used: Any) -> dict[str, Any]:
    """Provenance that every imputation from the (n,) known rows records, in types that every store of AnnData holds.

    `used` names the slots that it read, as for ``table_state``.
    """
    registration = record.registration or {"method": "", "sections": {}}
    rows = registration["sections"]
    errors = {name: row["error_um"] for name, row in rows.items()}
    return {
        "units": units(table),
        "encoder": encoder_name(table),
        "measured_sections": sorted(table.obs[Keys.SECTION][known].astype(str).unique().tolist()),
        Keys.MEASURED_IDS: measured_ids(table),
        Keys.STATE: table_state(table, record, **used),
        "genes": [str(gene) for gene in table.var_names],
        "registration": {
            "method": registration["method"],
            "verdict": {name: row["verdict"] for name, row in rows.items()},
            "error_um": {name: float(um) for name, um in errors.items() if um is not None},
        },
        "version": version("spatial-impute"),
    }


def pixnet_provenance(model: PixNetModel, image_key: str) -> dict[str, Any]:
    """Provenance of a prediction by PixNet."""
    return {
        "model": model.identity,
        "image": image_key,
        "encoder": model.config["encoder"],
        "units": model.config["units"],
        "aggregate": model.config["aggregate"],
        "resolution_um": float(model.config["resolution"]),
        "trained_on": [entry["image"] for entry in model.config["trained_on"]],
        "seed": int(model.config["seed"]),
        "version": version("spatial-impute"),
    }


def encoder_name(table: AnnData) -> str:
    """Encoder of the image features."""
    return str(table.uns.get(Keys.FEATURES, {}).get("encoder", "unknown"))


def feature_settings(table: AnnData) -> dict[str, Any]:
    """Settings of the image features that a model depends on, besides the encoder."""
    found = table.uns.get(Keys.FEATURES, {})
    field = {key: float(um) for key, um in found.get("field_um", {}).items()}
    return {
        "mpp": f"{found.get('mpp', float('nan')):.6g}",  # NaN for features of other tools
        "stain_normalization": str(found.get("stain_normalization", "")),
        "scales": [round(field[key] / field[Keys.X_SPOT], 6) for key in Keys.LEVELS if Keys.X_SPOT in field],
    }


def fitted_state(
    sdata: SpatialData, table: AnnData, *, layer: str, graph_key: str, base_layers: Iterable[str] = ()
) -> dict[str, Any]:
    """Fingerprints of a stack that a model is fitted on, and of its measured sections."""
    record = load_record(sdata)
    slots = table_state(table, record, layer=layer, features=True, graph=graph_key)
    ids, states = measured_ids(table), _section_states(sdata, record, table)
    learned = {name: {**state, "measured": ids[name]} for name, state in states.items() if ids[name]}
    return {**slots, **bases_state(table, record, base_layers), "sections": learned}


def bases_state(table: AnnData, record: StackRecord, base_layers: Iterable[str]) -> dict[str, str]:
    """Fingerprint of the base layers that a model reads; empty without any."""
    layers = [table.layers[name] for name in base_layers]
    return {"bases": spots_fingerprint(table, record, *layers)} if layers else {}


def compare_with_fit(
    sdata: SpatialData, table: AnnData, model: AsignModel | AsignPanels, now: dict[str, str]
) -> list[str]:
    """Warn if a stack that the model was fitted on has changed; return hidden sections that the model has seen.

    `now` are the fingerprints of the slots that the model reads.
    """
    record, ids = load_record(sdata), measured_ids(table)
    hidden = set(table.obs[Keys.SECTION][~table.obs[Keys.MEASURED].to_numpy(bool)].astype(str))
    leaked: list[str] = []
    for stack in model.config["stacks"]:
        seen = sections_seen(sdata, record, table, stack["sections"])
        leaked += [n for n, then in seen.items() if n in hidden and ids[n] != stack["sections"][then]["measured"]]
        slots = [k for k in ("positions", "features", "graph", "measured", "bases") if k in stack]
        changed = [k for k in slots if now.get(k, stack[k]) != stack[k]]
        if seen and changed:
            logger.warning(
                "The model was fitted on this stack before these changed: %s. Fit it again with "
                "`si.tl.fit_asign(sdata)`.",
                ", ".join(SLOT_WORDS[key] for key in changed),
            )
    if leaked:
        logger.warning(
            "The model was fitted on measured spots of the sections %s, which are not measured now. Their imputed "
            "values contain that measurement, so do not score them. Fit a model without them.",
            leaked,
        )
    return leaked


def measured_hash(spots: Spots) -> str:
    """Hash of the measured expression and of the spots that have it."""
    digest = hashlib.sha256(spots.known.tobytes())
    digest.update(np.ascontiguousarray(spots.expression).tobytes())
    return digest.hexdigest()[:16]


def _section_states(sdata: SpatialData, record: StackRecord, table: AnnData) -> dict[str, dict[str, str]]:
    """Fingerprints of image and spots of each section with spots."""
    section = table.obs[Keys.SECTION].astype(str).to_numpy()
    own = np.asarray(table.obsm[Keys.SPATIAL], float) if Keys.SPATIAL in table.obsm else np.zeros((table.n_obs, 2))
    return {
        name: {"image": section_image(sdata, record[name]), "spots": fingerprint(own[section == name])}
        for name in record.names
        if (section == name).any()
    }


def sections_seen(
    sdata: SpatialData, record: StackRecord, table: AnnData, learned: Mapping[str, Mapping[str, str]]
) -> dict[str, str]:
    """Sections of this stack that a model was fitted on: their name, and the name that they had then.

    A section is the same if it has the same image, or the same name and the same spots. Where sections of this stack
    share an image, the spots must be the same as well.
    """
    states, found = _section_states(sdata, record, table), {}
    images = [state["image"] for state in states.values()]
    for name, now in states.items():
        shared = images.count(now["image"]) > 1
        for then, state in learned.items():
            same_image, same_spots = now["image"] == state["image"] != "", now["spots"] == state["spots"]
            if (same_spots and (same_image or then == name)) or (same_image and not shared):
                found[name] = then
    return found
