"""Quality of a registration as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from spatial_impute._stack.elements import require_registration
from spatial_impute._stack.record import load_record

if TYPE_CHECKING:
    from spatialdata import SpatialData


# Columns of the table of a stack in which no pair was registered.
_COLUMNS = [
    "method",
    "start_rotation_deg",
    "start_mirrored",
    "look",
    "looks_agree",
    "dice_before",
    "dice_after",
    "correlation_before",
    "correlation_after",
    "score",
    "margin",
    "runner_up",
    "scale_min",
    "scale_max",
    "folds",
    "working_pixel",
    "error_um",
    "error_p90_um",
    "error_patches",
    "verdict",
    "reasons",
]


def registration_quality(sdata: SpatialData) -> pd.DataFrame:
    """Quality of every registered pair of sections.

    Parameters
    ----------
    sdata
        Stack registered by :func:`~spatial_impute.tl.register_stack`.

    Returns
    -------
    One row per pair (``fixed``, ``moving``): overlap of the tissue (Dice) and correlation of the stain inside it,
    before and after; score of the chosen pose and its lead over the best other pose; the chosen start; the expected
    error (median and 90th percentile at a point, um); share of folds; the verdict (``"ok"``, ``"weak"``, ``"failed"``)
    and its reasons. The table is empty if the user gave the place of every section. Nothing is written.

    Raises
    ------
    KeyError
        If the stack is not registered.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack(extent=1400.0)
    >>> si.tl.register_stack(sdata, show_progress_bar=False)
    >>> list(si.metrics.registration_quality(sdata)["verdict"])
    ['ok', 'ok']
    """
    registration = require_registration(load_record(sdata))
    if not registration["pairs"]:
        none = pd.MultiIndex.from_arrays([[], []], names=["fixed", "moving"])
        return pd.DataFrame(index=none, columns=_COLUMNS)
    return pd.DataFrame(registration["pairs"]).set_index(["fixed", "moving"])
