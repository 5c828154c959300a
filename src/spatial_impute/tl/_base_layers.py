"""Predictions of other models in layers of the stack table, which ASIGN may blend in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from spatial_impute._keys import Keys
from spatial_impute._scores import pearson_by_gene
from spatial_impute._validation import name_list, require_key, require_one_of
from spatial_impute.tl._provenance import measured_hash

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

    from spatial_impute.models import AsignParams
    from spatial_impute.models._spots import Spots

INDEPENDENT = "independent"
HELD_OUT = "held_out"
_WRITERS = {
    HELD_OUT: "impute_pixnet(sdata, key_added={!r})",
    INDEPENDENT: "add_prediction(sdata, adata, key_added={!r})",
}
_SAME_R = 0.999  # no prediction of a noisy measurement is that good


def kinds_of_bases(base_layers: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """Kind of each base layer: ``"held_out"`` unless the user says otherwise."""
    if not isinstance(base_layers, Mapping):
        return dict.fromkeys(name_list(base_layers, name="base_layers"), HELD_OUT)
    for name, kind in base_layers.items():
        require_one_of(kind, (HELD_OUT, INDEPENDENT), name=f"base_layers[{name!r}]")
    return dict(base_layers)


def with_bases(spots: Spots, table: AnnData, kinds: Mapping[str, str]) -> Spots:
    """Spots with the (n, n_genes) predictions of other models in layers of the stack table.

    Raises a ``ValueError`` if a layer has the name of a method of ASIGN, or values that its kind does not allow.
    """
    from spatial_impute.models.asign._baselines import METHODS
    from spatial_impute.models.asign._model import BASE, NETWORK, WITHOUT

    found = {}
    for name, kind in kinds.items():
        then = f"Write it with `si.tl.{_WRITERS[kind].format(name)}` first."
        require_key(name, table.layers, where="layers of the stack table", then=then)
        if name in {*METHODS, NETWORK, BASE, WITHOUT, Keys.ASIGN, Keys.MEASURED}:
            msg = f"`base_layers` names {name!r}, which ASIGN has already; write the layer under another name."
            raise ValueError(msg)
        if sparse.issparse(table.layers[name]):
            msg = (
                f"A base layer must be dense; make it so by `table.layers[{name!r}] = "
                f"table.layers[{name!r}].toarray()`."
            )
            raise ValueError(msg)
        found[name] = np.asarray(table.layers[name], dtype=np.float64)
        _require_values(name, kind, found[name], spots.known)
        if kind == INDEPENDENT:
            _require_independent(name, table, found[name], spots)
    names = frozenset(name for name, kind in kinds.items() if kind == INDEPENDENT)
    return replace(spots, bases=found, independent=names)


def _require_values(name: str, kind: str, values: np.ndarray, known: np.ndarray) -> None:
    """Raise a ``ValueError`` for infinite values, NaN where they are not allowed, and nothing to fit to."""
    bad = np.isinf(values) if kind == INDEPENDENT else ~np.isfinite(values)
    if bad.any():
        allowed = "may be NaN but not infinite" if kind == INDEPENDENT else "must be finite at all spots"
        msg = f"A base layer {allowed}; `layers[{name!r}]` is at {int(bad.any(axis=1).sum())} of {len(values)} spots."
        raise ValueError(msg)
    if not np.isfinite(values).any():
        msg = f"`layers[{name!r}]` holds no value at all. Leave it out of `base_layers`."
        raise ValueError(msg)
    if known.any() and not np.isfinite(values[known]).any():
        msg = (
            f"`layers[{name!r}]` holds no value at the {int(known.sum())} measured spots, so it cannot be compared "
            "with the measurement. Predict these spots as well, or leave it out of `base_layers`."
        )
        raise ValueError(msg)


def _require_independent(name: str, table: AnnData, values: np.ndarray, spots: Spots) -> None:
    """Raise a ``ValueError`` if a layer that was declared independent holds the measurement of this stack."""
    origin = table.uns.get(name, {})
    not_zero = spots.expression != 0  # zeros may be predicted by chance
    same = np.isclose(values[spots.known], spots.expression, rtol=1e-5)[not_zero].mean() if not_zero.any() else 0.0
    if any(origin.get(Keys.MEASURED_IDS, {}).values()):
        problem = "was predicted from the measurement of this stack"
    elif len(origin.get(Keys.SEEN, ())):
        problem = "comes from a model that was fitted on the measurement of this stack"
    elif same > 0.5:
        problem = f"equals `layers[{Keys.MEASURED!r}]` in {same:.0%} of the values of measured spots"
    elif np.mean(np.nan_to_num(pearson_by_gene(values[spots.known], spots.expression)) > _SAME_R) > 0.5:
        problem = f"follows `layers[{Keys.MEASURED!r}]` at the measured spots, with r above {_SAME_R} in most genes"
    else:
        return
    msg = (
        f"`layers[{name!r}]` is declared {INDEPENDENT!r} in `base_layers`, but it {problem}. Only a model that has "
        "seen no measured spot of this tissue is independent. Leave it out."
    )
    raise ValueError(msg)


def require_same_folds(table: AnnData, spots: Spots, params: AsignParams, *, seed: int) -> None:
    """Raise a ``ValueError`` unless the base layers were predicted without the folds that ASIGN hides.

    Such a layer must come from the present measurement, and each measured spot must be predicted by a model that was
    fitted without the fold of the spot.
    """
    from spatial_impute.models._spots import spatial_folds

    held_out = [name for name in spots.bases or {} if name not in spots.independent]
    if not held_out:
        return
    n_folds, block_spacings = params.n_folds, params.block_spacings
    folds = spatial_folds(spots, n_folds=n_folds, block_spacings=block_spacings, seed=seed)
    expected = np.argmax(np.stack(folds)[:, spots.known], axis=0)
    for name in held_out:
        column, record = Keys.fold(name), table.uns.get(name, {})
        if column not in table.obs or "measured" not in record:
            msg = (
                f"Nothing says how measured spots were held out from `layers[{name!r}]` (no `obs[{column!r}]`). If its "
                f"model has seen no measured spot of this tissue, say so: `base_layers={{{name!r}: {INDEPENDENT!r}}}`. "
                "Else the layer cannot be used."
            )
            raise ValueError(msg)
        problem = None
        if str(record["measured"]) != measured_hash(spots):
            problem = f"`layers[{name!r}]` was predicted from other measured expression than the present one."
        elif not np.array_equal(table.obs[column].to_numpy()[spots.known], expected):
            used = {key: record.get(key) for key in ("n_folds", "block_spacings", "seed")}
            problem = f"`layers[{name!r}]` was predicted with other folds ({used}) than ASIGN hides."
        if problem is not None:
            msg = (
                f"{problem} Run `si.tl.impute_pixnet(sdata, key_added={name!r}, n_folds={n_folds}, "
                f"block_spacings={block_spacings:g}, seed={seed})`."
            )
            raise ValueError(msg)
