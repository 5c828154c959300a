"""Predictions in layers of the stack table that ASIGN may blend in, and whether they are honest."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from spatial_impute._keys import Keys
from spatial_impute._validation import require_key

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

    from spatial_impute.models._spots import Spots

_FOLDS = ("n_folds", "block_spacings", "seed")


def read_bases(table: AnnData, names: Sequence[str]) -> dict[str, np.ndarray]:
    """(n, n_genes) predictions in layers of the stack table, at all spots.

    Raises
    ------
    KeyError
        If a layer does not exist.
    ValueError
        If one has the name of a method of ASIGN, or is not finite.
    """
    from spatial_impute.models.asign._baselines import METHODS
    from spatial_impute.models.asign._model import NETWORK

    found = {}
    for name in names:
        require_key(
            name, table.layers, where="layers of the stack table", then="Run `si.tl.impute_pixnet(sdata)` first."
        )
        if name in {*METHODS, NETWORK, "asign", Keys.MEASURED}:
            msg = f"`base_layers` names {name!r}, which ASIGN has already; write the layer under another name."
            raise ValueError(msg)
        values = np.asarray(table.layers[name], dtype=np.float64)
        if not np.isfinite(values).all():
            n_bad = int((~np.isfinite(values)).any(axis=1).sum())
            msg = f"`layers[{name!r}]` must be finite at all spots to be a base; it is not at {n_bad} of {len(values)}."
            raise ValueError(msg)
        found[name] = values
    return found


def require_same_folds(
    table: AnnData, spots: Spots, names: Sequence[str], *, n_folds: int, block_spacings: float, seed: int
) -> None:
    """Measured spots must have been predicted without the fold that ASIGN hides with them, from the present measurement.

    Raises
    ------
    ValueError
        If they were not, or nothing says so.
    """
    from spatial_impute.models._spots import spatial_folds

    folds = spatial_folds(spots, n_folds=n_folds, block_spacings=block_spacings, seed=seed)
    expected = np.argmax(np.stack(folds)[:, spots.known], axis=0)
    for name in names:
        column, record = Keys.fold(name), table.uns.get(name, {})
        then = (
            f"Run `si.tl.impute_pixnet(sdata, key_added={name!r}, n_folds={n_folds}, block_spacings={block_spacings:g}, "
            f"seed={seed})`."
        )
        if column not in table.obs or "measured" not in record:
            msg = (
                f"Nothing says how measured spots were held out from `layers[{name!r}]` (no `obs[{column!r}]`). {then}"
            )
            raise ValueError(msg)
        if str(record["measured"]) != measured_hash(spots):
            msg = f"`layers[{name!r}]` was predicted from other measured expression than the present one. {then}"
            raise ValueError(msg)
        if not np.array_equal(table.obs[column].to_numpy()[spots.known], expected):
            used = {key: record.get(key) for key in _FOLDS}
            msg = f"`layers[{name!r}]` was predicted with other folds ({used}) than ASIGN hides. {then}"
            raise ValueError(msg)


def measured_hash(spots: Spots) -> str:
    """What tells the measured expression of a stack from any other."""
    digest = hashlib.sha256(spots.known.tobytes())
    digest.update(np.ascontiguousarray(spots.expression).tobytes())
    return digest.hexdigest()[:16]
