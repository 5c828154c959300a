"""Where an imputed layer comes from: what JSON and every store of AnnData can hold."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from spatial_impute._keys import Keys

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from anndata import AnnData

    from spatial_impute._stack.record import StackRecord


def provenance(record: StackRecord, table: AnnData, known: np.ndarray) -> dict[str, Any]:
    """What every imputation has in common.

    Parameters
    ----------
    record
        The stack.
    table
        Stack table.
    known
        (n,) rows whose expression was used.

    Returns
    -------
    ``units``, ``encoder``, ``measured_sections``, ``genes``, ``version``, and ``registration``: its ``method``, and
    ``verdict`` and ``residual_um`` per section (where it is known). Numbers, strings, lists and dicts only.
    """
    registration = record.registration or {"method": "", "sections": {}}
    rows = registration["sections"]
    residuals = {name: row["residual_um"] for name, row in rows.items()}
    return {
        "units": units(table),
        "encoder": encoder(table),
        "measured_sections": sorted(table.obs[Keys.SECTION][known].astype(str).unique().tolist()),
        "genes": [str(gene) for gene in table.var_names],
        "registration": {
            "method": registration["method"],
            "verdict": {name: row["verdict"] for name, row in rows.items()},
            "residual_um": {name: float(um) for name, um in residuals.items() if um is not None},
        },
        "version": version("spatial-impute"),
    }


def encoder(table: AnnData) -> str:
    """Encoder of the image features."""
    return str(table.uns.get(Keys.FEATURES, {}).get("encoder", "unknown"))


def require_same_units(found: Iterable[str]) -> None:
    """Raise a ``ValueError`` if expression comes in different units; those that nobody told us go with any."""
    known = sorted({unit for unit in found if unit != "unknown" and not unit.endswith("as given")})
    if len(known) > 1:
        msg = (
            f"Expression must have the same units, found {known}. Run `si.pp.select_genes` with the same `target_sum` and "
            "`log_normalized`."
        )
        raise ValueError(msg)


def units(table: AnnData) -> str:
    """Units of the expression."""
    return str(table.uns.get(Keys.NORMALIZATION, {}).get("units", "unknown"))
