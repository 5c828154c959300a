"""Cross-validation of baselines and ASIGN on the same held-out spots."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from spatial_impute.models._spots import Spots, given
from spatial_impute.models.asign._baselines import METHODS, NEEDS_FEATURES, knn, ridge
from spatial_impute.models.asign._fit import fit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from spatial_impute.models.asign._training import FitSettings

ASIGN = "asign"
PIXNET = "pixnet"
COLOR = "colour"
IMAGE_KNN = "image_knn"

FROM_IMAGE = ("mean", "ridge", IMAGE_KNN, COLOR, PIXNET)
"""Methods that predict from the image alone, so that they can be fitted on some slides and applied to others."""


def needs_features(method: str) -> bool:
    """True if a method reads the features of spots."""
    return method in {*NEEDS_FEATURES, IMAGE_KNN, ASIGN}


def predict_held_out(
    spots: Spots,
    folds: Sequence[np.ndarray],
    method: str,
    *,
    var_names: Sequence[str],
    settings: FitSettings,
    on_fold: Callable[[], None],
) -> np.ndarray:
    """(n, g) prediction of every fold from the others; NaN for spots in no fold.

    ASIGN is fitted anew for each fold, including all choices that it makes by cross-validation. For ``"colour"`` the
    features of the spots must be their color statistics.
    """
    result = np.full((len(spots.known), spots.expression.shape[1]), np.nan)
    for fold in folds:
        rest = spots.hide(fold)
        if method == ASIGN:
            model = fit([rest], var_names, settings)
            found = model._impute(rest, device=settings.device).expression
        elif method == IMAGE_KNN:
            found = knn(replace(rest, xyz=given(rest.features)))  # neighbours in feature space
        elif method == COLOR:
            found = ridge(rest)
        else:
            found = METHODS[method](rest)
        result[fold] = found[fold]
        on_fold()
    return result


def concatenate(stacks: Sequence[Spots]) -> Spots:
    """Spots of several stacks as one, for methods of :data:`FROM_IMAGE`, which use no coordinates and no graph."""
    if len(stacks) == 1:
        return stacks[0]
    first = np.cumsum([0, *(int(s.section.max()) + 1 for s in stacks[:-1])])
    features = [s.features for s in stacks if s.features is not None]
    totals = [s.total_counts for s in stacks if s.total_counts is not None]
    return Spots(
        xyz=np.concatenate([s.xyz for s in stacks]),
        section=np.concatenate([s.section + n for s, n in zip(stacks, first, strict=True)]),
        known=np.concatenate([s.known for s in stacks]),
        expression=np.concatenate([s.expression for s in stacks]),
        spacing=float(np.median([s.spacing for s in stacks])),
        features=np.concatenate(features) if len(features) == len(stacks) else None,
        total_counts=np.concatenate(totals) if len(totals) == len(stacks) else None,
    )
