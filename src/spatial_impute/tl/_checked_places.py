"""Sections that a person approved or rejected on the page of a registration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from spatial_impute._settings import logger
from spatial_impute._stack import changed_images, load_transform, registration_state, require_registration
from spatial_impute._validation import require_key

if TYPE_CHECKING:
    from collections.abc import Collection

    from spatialdata import SpatialData

    from spatial_impute._registration import SectionTransform
    from spatial_impute._stack import StackRecord

_APPROVED = "Approved by a person."
_PAGE = "`si.pl.registration_page(sdata, 'check.html')`"


class Approved(NamedTuple):
    """Place of a section that is kept."""

    transform: SectionTransform
    row: dict[str, Any]
    """Row of the section in the record."""


def approved_places(
    sdata: SpatialData, record: StackRecord, path: str | Path | None, reference: str, answered: Collection[str]
) -> dict[str, Approved]:
    """Places that the file of a page approves; an error for rejected sections that are not `answered` by another argument."""
    if path is None:
        return {}
    if not isinstance(path, str | Path):
        msg = f"`checked` must be the path of the file that the page of {_PAGE} saves, found {path!r}."
        raise ValueError(msg)
    decisions = _decisions(Path(path).expanduser(), registration_state(record))
    if reference != record.reference:
        msg = f"`checked` keeps places on the reference {record.reference!r}, but `reference` is {reference!r}. Use the same one."
        raise ValueError(msg)
    rows, approved, open_ = require_registration(record)["sections"], {}, []
    for name, decision in decisions.items():
        require_key(name, rows, where="the registered sections")
        if name not in record.names:  # the object is a part of the one that was registered
            logger.warning("Section %s of `checked` is gone; the decision on it is left out", name)
        elif decision == "rejected" and name not in answered:
            open_.append(name)
        elif decision == "approved" and name in answered:
            msg = f"Section {name!r} is approved in `checked`, and has a place, a start or a skip as well. Use one of them."
            raise ValueError(msg)
        elif decision == "approved":
            reasons = [reason for reason in rows[name]["reasons"] if reason != _APPROVED]
            row = rows[name] | {"verdict": "ok", "reasons": [_APPROVED, *reasons]}
            approved[name] = Approved(load_transform(sdata, record, name), row)
    changed = (
        [name for name in changed_images(sdata, record) if name in {*approved, record.reference}] if approved else []
    )
    if changed:
        msg = (
            f"The images of the sections {changed} are not the ones that were registered, so their approval does not count. "
            "Register them without `checked`, and look at the new page."
        )
        raise ValueError(msg)
    if open_:
        msg = (
            f"Sections {open_} are rejected in `checked`; the same fit would find the same place. Give each of them a start "
            "(`initial`) or its place (`transformations`), or leave it out (`skip`)."
        )
        raise ValueError(msg)
    return approved


def _decisions(path: Path, state: str) -> dict[str, str]:
    """Decision by section, from a file that belongs to the registration with this `state`."""
    if not path.is_file():
        msg = f"`checked` must be the file that the page of {_PAGE} saves, found nothing at {str(path)!r}."
        raise FileNotFoundError(msg)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        decisions = dict(found["sections"])
        known = set(decisions.values()) <= {"approved", "rejected"}
    except (ValueError, TypeError, KeyError):
        known = False
    if not known:
        msg = f"`checked` must be the file that the page of {_PAGE} saves, found other content in {str(path)!r}."
        raise ValueError(msg)
    if found.get("registration") != state:
        msg = f"The decisions in {str(path)!r} are on another registration than the present one. Make the page again: {_PAGE}."
        raise ValueError(msg)
    return decisions
