"""Cross-validation of baselines and ASIGN on the same held-out spots: pure functions on :class:`Spots`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from spatial_impute.models._spots import Spots
from spatial_impute.models.asign._baselines import METHODS, NEEDS_FEATURES, knn, ridge
from spatial_impute.models.asign._fit import fit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from spatial_impute.models._params import AsignParams

ASIGN = "asign"
PIXNET = "pixnet"
COLOUR = "colour"
IMAGE_KNN = "image_knn"

FROM_IMAGE = ("mean", "ridge", IMAGE_KNN, COLOUR, PIXNET)
"""Methods that need no measured spot nearby: what they learn on some slides they apply to others."""


def needs_features(method: str) -> bool:
    """Whether a method reads the features of spots."""
    return method in {*NEEDS_FEATURES, IMAGE_KNN, ASIGN}


def predict_held_out(
    spots: Spots,
    folds: Sequence[np.ndarray],
    method: str,
    *,
    var_names: Sequence[str],
    params: AsignParams,
    seed: int,
    device: str,
    on_fold: Callable[[], None],
    colour: np.ndarray | None = None,
) -> np.ndarray:
    """Predict every fold from the others.

    ASIGN is fitted anew for each fold, with all that it chooses by hiding further spots of the others.

    Parameters
    ----------
    colour
        (n, d) colour statistics of the spots, for ``"colour"``.

    Returns
    -------
    (n, g); NaN for spots in no fold.
    """
    result = np.full((len(spots.known), spots.expression.shape[1]), np.nan)
    for fold in folds:
        rest = spots.hide(fold)
        if method == ASIGN:
            model = fit([rest], var_names, params, config={}, seed=seed, device=device, progress=_no_progress)
            found = model._impute(rest, device=device).expression
        elif method == IMAGE_KNN:
            found = knn(replace(rest, xyz=rest.features))  # neighbours in what they look like
        elif method == COLOUR:
            found = ridge(replace(rest, features=colour))
        else:
            found = METHODS[method](rest)
        result[fold] = found[fold]
        on_fold()
    return result


def concatenate(stacks: Sequence[Spots]) -> Spots:
    """Spots of several stacks as one, for methods of :data:`FROM_IMAGE`: places and graphs of different stacks do not compare."""
    if len(stacks) == 1:
        return stacks[0]
    first = np.cumsum([0, *(int(s.section.max()) + 1 for s in stacks[:-1])])
    features = None if stacks[0].features is None else np.concatenate([s.features for s in stacks])
    totals = [s.total_counts for s in stacks]
    return Spots(
        xyz=np.concatenate([s.xyz for s in stacks]),
        section=np.concatenate([s.section + n for s, n in zip(stacks, first, strict=True)]),
        known=np.concatenate([s.known for s in stacks]),
        expression=np.concatenate([s.expression for s in stacks]),
        spacing=float(np.median([s.spacing for s in stacks])),
        features=features,
        total_counts=None if any(t is None for t in totals) else np.concatenate(totals),
    )


def _no_progress(_total: int) -> Callable[[], None]:
    return lambda: None
