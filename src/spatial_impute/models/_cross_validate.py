"""Cross-validation of baselines and ASIGN on the same held-out spots: pure functions on :class:`Spots`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from spatial_impute.models._baselines import METHODS
from spatial_impute.models._fit_asign import fit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from spatial_impute.models._params import AsignParams
    from spatial_impute.models._spots import Spots

ASIGN = "asign"


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
) -> np.ndarray:
    """Predict every fold from the others.

    ASIGN is fitted anew for each fold, with all that it chooses by hiding further spots of the others.

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
        else:
            found = METHODS[method](rest)
        result[fold] = found[fold]
        on_fold()
    return result


def _no_progress(_total: int) -> Callable[[], None]:
    return lambda: None
