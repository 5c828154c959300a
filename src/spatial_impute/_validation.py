"""Checks shared by the public functions: each says what was expected, what was found and what to do next."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np

_Params = TypeVar("_Params")  # a dataclass of settings
_MAX_SHOWN = 20  # names listed in a message; a table may have 20,000 genes


def require_key(key: str, available: Iterable[str], *, where: str, then: str | None = None) -> None:
    """Raise a ``KeyError`` that lists what there is and names the next call.

    Parameters
    ----------
    key
        Name that was asked for.
    available
        Names that exist.
    where
        Container as the user would write it, e.g. ``"sdata.images"``.
    then
        What to do about it, a full sentence.
    """
    names = sorted(map(str, available))
    if key in names:
        return
    shown = f"{names}" if len(names) <= _MAX_SHOWN else f"{names[:_MAX_SHOWN]} and {len(names) - _MAX_SHOWN} more"
    msg = f"{key!r} not found in `{where}`; available: {shown}."
    raise KeyError(f"{msg} {then}" if then else msg)


def require_one_of(value: str, options: Collection[str], *, name: str) -> None:
    """Raise a ``ValueError`` unless `value` is one of `options`."""
    if value not in options:
        msg = f"`{name}` must be one of {sorted(options)}, found {value!r}."
        raise ValueError(msg)


def require_positive(value: float | None, *, name: str, unit: str = "") -> float:
    """Return `value` as float, or raise a ``ValueError`` unless it is a finite number above zero."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = float("nan")
    if not np.isfinite(number) or number <= 0:
        msg = f"`{name}` must be a positive number{f' ({unit})' if unit else ''}, found {value!r}."
        raise ValueError(msg)
    return number


def require_finite(values: np.ndarray, *, name: str, row_names: Collection[str] | None = None) -> None:
    """Raise a ``ValueError`` naming the first bad row unless all of `values` are finite."""
    bad = ~np.isfinite(np.asarray(values, dtype=float))
    if not bad.any():
        return
    row = int(np.argwhere(bad.reshape(len(bad), -1).any(axis=1))[0, 0])
    label = f" ({list(row_names)[row]!r})" if row_names is not None else ""
    msg = f"{name} must be finite; found {int(bad.sum())} NaN or infinite values, the first in row {row}{label}."
    raise ValueError(msg)


def looks_like_counts(values: np.ndarray) -> bool:
    """Whether `values` are raw counts: non-negative integers, some above 1 (log values are never all integers)."""
    sample = np.asarray(values)
    sample = sample[np.isfinite(sample)]
    if sample.size == 0:
        return False
    return bool((sample >= 0).all() and (sample == np.round(sample)).all() and (sample > 1).any())


def require_log_values(values: np.ndarray, *, where: str) -> None:
    """Raise a ``ValueError`` if `values` are raw counts or negative infinities where log values are expected."""
    if looks_like_counts(values):
        found = np.asarray(values)[np.isfinite(values)]
        msg = (
            f"`{where}` must hold log-normalised expression, found raw counts (integers up to {found.max():g}). "
            "Normalise over all genes and take log1p: `si.pp.select_genes(sdata)` does both from the count tables."
        )
        raise ValueError(msg)


def resolve_params(params: object, cls: type[_Params]) -> _Params:
    """Return `params` as an instance of the parameter class `cls`.

    Parameters
    ----------
    params
        ``None`` (defaults), an instance of `cls`, or a mapping of its field names.
    cls
        A dataclass that checks itself on creation.

    Raises
    ------
    TypeError
        For anything else, or for unknown field names (all are listed).
    """
    if params is None:
        return cls()
    if isinstance(params, cls):
        return params
    if isinstance(params, Mapping):
        fields: Mapping[str, Any] = cls.__dataclass_fields__  # type: ignore[attr-defined]
        unknown = sorted(set(params) - set(fields))
        if unknown:
            msg = f"Unknown fields {unknown} for {cls.__name__}; available: {sorted(fields)}."
            raise TypeError(msg)
        return cls(**params)
    msg = f"Expected None, a mapping or {cls.__name__}, found {type(params).__name__}."
    raise TypeError(msg)
