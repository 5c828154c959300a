"""Verdicts of a run, in words for readers who write no code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from spatial_impute._keys import Keys
from spatial_impute._stack import load_record

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

GOOD, CARE, BAD = "Good", "Take care", "Do not use"
_N_NAMED = 15  # genes named in a sentence
_PARTS = ("base", "network alone", "without network")  # of the model: rows of its table that are no simple methods


@dataclass(frozen=True)
class Verdict:
    """One finding, and how to take it."""

    level: str
    text: str


def verdicts(sdata: SpatialData, layer: str, scores: pd.DataFrame | None) -> list[Verdict]:
    """Findings of a run on position, genes, method and reach, and what no run can test."""
    table = sdata.tables[Keys.STACK_TABLE]
    found = [*_of_positions(sdata), *_of_method(scores)]
    if Keys.PREDICTABLE in table.var and layer == Keys.ASIGN:
        found.append(_of_genes(table))
    if Keys.SUPPORT in table.obs:
        found += _of_support(table)
    if scores is not None:
        text = "All tests used spots of measured sections. No test shows how good the maps of the other sections are. Expect them to be worse."
        found.append(Verdict(CARE, text))
    return [
        *found,
        Verdict(
            CARE,
            "Imputed values are estimates, not measurements. They are smoother, and neighboring spots are not independent. So do not "
            "test them for differential expression as if they were measured.",
        ),
    ]


def _of_positions(sdata: SpatialData) -> list[Verdict]:
    """Verdict on the places of the sections."""
    registration = load_record(sdata).registration or {}
    by_verdict: dict[str, list[str]] = {}
    for name, row in registration.get("sections", {}).items():
        by_verdict.setdefault(row.get("verdict", "ok"), []).append(name)
    found = []
    if weak := by_verdict.pop("weak", []):
        text = f"The position of {_sections(weak)} is uncertain. Compare the map with the image before you read single spots."
        found.append(Verdict(CARE, text))
    good = by_verdict.pop("ok", [])
    failed = [name for names in by_verdict.values() for name in names]
    if failed:
        found.append(Verdict(BAD, f"The position of {_sections(failed)} was not found. Do not use the maps there."))
    if skipped := list(registration.get("skipped", [])):
        found.append(Verdict(BAD, f"{_sections(skipped).capitalize()} has no place in the stack, and no map."))
    if good and not found:
        found.append(Verdict(GOOD, f"All {len(good)} sections fit on each other."))
    return found


def _of_method(scores: pd.DataFrame | None) -> list[Verdict]:
    """Verdict on the model beside the best simple method."""
    if scores is None:
        text = "Nothing was held out (`cross_validate: false`), so this run does not show how good its result is."
        return [Verdict(CARE, text)]
    if Keys.ASIGN not in scores.index or len(scores) < 2:
        return []
    r = scores["pearson_gene"]
    best = r.drop([Keys.ASIGN, *_PARTS], errors="ignore").idxmax()
    margin = r[Keys.ASIGN] - r[best]
    # Tables of `cross_validate` have the interval in the row of the model, those of a model in the row of the other method.
    row, columns = (
        (best, ["gain_low", "gain_high"]) if "gain_low" in scores else (Keys.ASIGN, ["vs_best_low", "vs_best_high"])
    )
    low, high = scores.loc[row].reindex(columns)
    interval = "" if pd.isna(low) else f", 95 % interval {low:+.3f} to {high:+.3f}"
    if (margin if pd.isna(low) else low) > 0:
        text = f"On hidden spots, the model is better than the best simple method, {best} (r {margin:+.3f}{interval})."
        return [Verdict(GOOD, text)]
    text = (
        f"This run does not show that the model is better than the simple method {best} (r {margin:+.3f}{interval}). Its maps are "
        f"about as good as those of {best}."
    )
    return [Verdict(CARE, text)]


def _of_genes(table: AnnData) -> Verdict:
    """Verdict on the number of genes that can be believed."""
    believed = table.var[Keys.PREDICTABLE].to_numpy(dtype=bool)
    if believed.all():
        return Verdict(GOOD, f"All {len(believed)} genes are predicted better than by chance.")
    poor = list(table.var_names[~believed])
    text = f"{believed.sum()} of {len(believed)} genes are predicted better than by chance. Do not read the maps of the others: {named(poor)}."
    return Verdict(CARE if believed.any() else BAD, text)


def _of_support(table: AnnData) -> list[Verdict]:
    """Verdict on the links of the spots to measured ones."""
    imputed = ~table.obs[Keys.MEASURED].to_numpy(dtype=bool)
    without = imputed & (table.obs[Keys.SUPPORT].to_numpy(dtype=float) <= 0)
    if not without.any():
        return [Verdict(GOOD, "Every spot has measured spots nearby, in its own section or in another one.")]
    where = table.obs[Keys.SECTION][without].value_counts()
    listed = ", ".join(f"{name} {n}" for name, n in where[where > 0].items())
    text = f"{int(without.sum())} spots have no measured spot nearby. Their values come from the image alone (support 0): {listed}."
    return [Verdict(CARE, text)]


def _sections(names: list[str]) -> str:
    return f"section{'s' if len(names) > 1 else ''} {', '.join(names)}"


def named(names: list[str]) -> str:
    """Some of the names in a sentence, whatever signs they hold."""
    more = f" and {len(names) - _N_NAMED} more" if len(names) > _N_NAMED else ""
    shown = (f"`{' '.join(name.replace('`', chr(39)).split())}`" for name in names[:_N_NAMED])
    return f"{', '.join(shown)}{more}"
