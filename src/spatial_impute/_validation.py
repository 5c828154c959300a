"""Checks of arguments. The messages say what was expected, what was found and what to do next."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

_MOST = 2**32 - 1  # largest seed of NumPy and torch
_MAX_SHOWN = 20  # names listed in a message; a table may have 20,000 genes


def did_you_mean(name: object, names: Iterable[str]) -> str:
    """Sentence that names the closest of `names`, with a space before it; empty if none is close."""
    by_lower = {str(other).lower(): str(other) for other in names}
    close = get_close_matches(str(name).lower(), by_lower, n=1)
    return f" Did you mean {by_lower[close[0]]!r}?" if close else ""


def require_key(key: str, available: Iterable[str], *, where: str, then: str | None = None) -> None:
    """Raise a ``KeyError`` that lists the available names, unless `key` is one of them.

    `where` is the container as the user writes it (``"sdata.images"``), `then` a sentence that says what to do next.
    """
    names = sorted(map(str, available))
    if key in names:
        return
    shown = f"{names}" if len(names) <= _MAX_SHOWN else f"{names[:_MAX_SHOWN]} and {len(names) - _MAX_SHOWN} more"
    msg = f"{key!r} not found in `{where}`; available: {shown}.{did_you_mean(key, names)}"
    raise KeyError(f"{msg} {then}" if then else msg)


def require_one_of(value: str, options: Collection[str], *, name: str) -> None:
    """Raise a ``ValueError`` unless `value` is one of `options`."""
    if not isinstance(value, str) or value not in options:
        msg = f"`{name}` must be one of {sorted(options)}, found {value!r}.{did_you_mean(value, options)}"
        raise ValueError(msg)


def name_list(value: object, *, name: str) -> list[str]:
    """Return names (one, several, or ``None`` for no name) as a list without repeats; else raise a ``ValueError``."""
    if value is None:
        return []
    names = [value] if isinstance(value, str) else value
    names = list(names) if isinstance(names, Iterable) else [None]
    if not all(isinstance(n, str) for n in names):
        msg = f"`{name}` must be a name or a sequence of names, found {value!r}."
        raise ValueError(msg)
    return list(dict.fromkeys(names))


def require_positive(value: float | None, *, name: str, unit: str = "") -> float:
    """Return `value` as float, or raise a ``ValueError`` unless it is a finite number above zero."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (OverflowError, TypeError, ValueError):
        number = float("nan")
    if not np.isfinite(number) or number <= 0 or isinstance(value, bool):
        msg = f"`{name}` must be a positive number{f' ({unit})' if unit else ''}, found {value!r}."
        raise ValueError(msg)
    return number


def require_count(value: Any, *, name: str, least: int = 1) -> int:
    """Return `value` as int, or raise a ``ValueError`` unless it is a whole number from `least` to 2^32 - 1."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    whole = whole or (isinstance(value, float | np.floating) and float(value).is_integer())
    if not whole or not least <= value <= _MOST:
        msg = f"`{name}` must be a whole number of at least {least}, found {value!r}."
        raise ValueError(msg)
    return int(value)


def require_device(device: str | None) -> str:
    """Return the torch device, ``settings.device`` by default; raise a ``ValueError`` if this machine cannot use it."""
    import torch

    from spatial_impute._settings import settings

    device = settings.device if device is None else device
    try:
        torch.empty(1, device=device)
    except (AssertionError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        msg = f"Torch device {device!r} cannot be used here: {str(error).splitlines()[0]} Pass `device='cpu'`."
        raise ValueError(msg) from error
    return str(device)


def require_folder(path: str | Path, *, name: str) -> Path:
    """Make the folder `path` if it is missing; raise a ``ValueError`` if it cannot be written to."""
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        msg = f"`{name}` must be a folder that can be written to, found {str(folder)!r}: {error}."
        raise ValueError(msg) from error
    return folder


def require_model(model: object, classes: type | tuple[type, ...], *, made_by: str) -> None:
    """Raise a ``TypeError`` unless `model` is of one of the classes."""
    if not isinstance(model, classes):
        names = [cls.__name__ for cls in (classes if isinstance(classes, tuple) else (classes,))]
        msg = f"`model` must be of class {' or '.join(names)}, found {type(model).__name__}. Make one with `{made_by}`."
        raise TypeError(msg)


def require_slot_key(key: object, *, name: str, taken: Collection[str] = ()) -> None:
    """Raise a ``ValueError`` unless a result may be written under `key`, the value of the argument `name`.

    A store can hold names without a slash; names in `taken` belong to other data.
    """
    if not isinstance(key, str) or not key or "/" in key:
        msg = f"`{name}` must be a name without '/', found {key!r}."
        raise ValueError(msg)
    if key in taken:
        msg = f"`{name}={key!r}` would write over data that is not a result of this function. Choose another name."
        raise ValueError(msg)


def require_unique(names: Any, *, name: str) -> None:
    """Raise a ``ValueError`` if an index of pandas holds a name twice; `name` says in words what it holds."""
    if not names.is_unique:
        msg = f"{name} must be unique, but {names[names.duplicated()][0]!r} occurs more than once."
        raise ValueError(msg)


def require_finite(values: np.ndarray, *, name: str, row_names: Collection[str] | None = None) -> None:
    """Raise a ``ValueError`` that names the first bad row unless all `values` are finite."""
    bad = ~np.isfinite(np.asarray(values, dtype=float))
    if not bad.any():
        return
    row = int(np.argwhere(bad.reshape(len(bad), -1).any(axis=1))[0, 0])
    label = f" ({list(row_names)[row]!r})" if row_names is not None else ""
    msg = f"{name} must be finite; found {int(bad.sum())} NaN or infinite values, the first in row {row}{label}."
    raise ValueError(msg)
