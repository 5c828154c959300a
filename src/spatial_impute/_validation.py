"""Checks of arguments, and classes of settings. Messages say what was expected, what was found and what to do next."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import tempfile
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform, get_args, get_origin, get_type_hints

import numpy as np
from pydantic import BeforeValidator, ConfigDict, Field, Strict, ValidationError
from pydantic.dataclasses import dataclass

_MOST = 2**32 - 1  # largest seed of NumPy and torch
_MAX_CHARACTERS = 80  # of a value in a message
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
    names = list(map(str, available))
    if key in names:
        return
    names.sort()
    shown = f"{names}" if len(names) <= _MAX_SHOWN else f"{names[:_MAX_SHOWN]} and {len(names) - _MAX_SHOWN} more"
    msg = f"{key!r} not found in `{where}`; available: {shown}.{did_you_mean(key, names)}"
    raise KeyError(f"{msg} {then}" if then else msg)


def record_at(holder: Mapping[str, Any], *keys: str, where: str) -> Mapping[str, Any]:
    """Record of this package below some keys; empty if there is none, and a ``ValueError`` if another object is in its place."""
    found: Any = holder
    for key in keys:
        where, found = f"{where}[{key!r}]", found.get(key, {})
        if not isinstance(found, Mapping):
            msg = (
                f"`{where}` must hold the record that this package writes, found {shown(found)[:_MAX_CHARACTERS]}. Take it from the "
                "object as it was before, or delete it and run the function again that wrote it."
            )
            raise ValueError(msg)
    return found


def require_one_of(value: str, options: Collection[str], *, name: str) -> None:
    """Raise a ``ValueError`` unless `value` is one of `options`."""
    if not isinstance(value, str) or value not in options:
        msg = f"`{name}` must be one of {sorted(options)}, found {value!r}.{did_you_mean(value, options)}"
        raise ValueError(msg)


def name_list(value: object, *, name: str, empty: str | None = None) -> list[str]:
    """Return names (one, several, or ``None`` for no name) as a list without repeats; else raise a ``ValueError``.

    `empty` says what to do next if there must be a name and there is none.
    """
    names = [] if value is None else [value] if isinstance(value, str) else value
    names = list(names) if isinstance(names, Iterable) else [None]
    if not all(isinstance(n, str) for n in names):
        msg = f"`{name}` must be a name or a sequence of names, found {value!r}."
        raise ValueError(msg)
    if empty is not None and not names:
        msg = f"`{name}` is empty; {empty}"
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


_Settings = TypeVar("_Settings")

_BOUNDS = {"ge": "of at least", "gt": "above", "le": "at most", "lt": "below"}
_NOUNS = {bool: "true or false", float: "a number", int: "a whole number", str: "a name"}


def _refuse_bool(value: object) -> object:
    if isinstance(value, bool):
        msg = f"must be a number, found {shown(value)}."
        raise ValueError(msg)
    return value


Flag = Annotated[bool, Strict()]
Whole = Annotated[int, Strict()]
Count = Annotated[Whole, Field(ge=1)]
Natural = Annotated[Whole, Field(ge=0)]
Number = Annotated[float, BeforeValidator(_refuse_bool), Field(allow_inf_nan=False)]  # YAML reads 1e-3 as text
Positive = Annotated[Number, Field(gt=0)]
Share = Annotated[Number, Field(ge=0, le=1)]


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, Field))
def settings_class(cls: type[_Settings]) -> type[_Settings]:
    """Make a frozen dataclass whose fields are checked against their annotations.

    A wrong value raises a ``ValueError``, an unknown field a ``TypeError``. ``dataclasses.asdict`` and ``replace``
    work.
    """
    made: Any = dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid"))(cls)
    validated = made.__init__

    @functools.wraps(validated)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        unknown = sorted(set(kwargs) - set(made.__pydantic_fields__))
        if unknown:
            msg = f"Unknown fields {unknown} for {made.__name__}; available: {sorted(made.__pydantic_fields__)}."
            raise TypeError(msg)
        try:
            validated(self, *args, **kwargs)
        except ValidationError as error:
            raise ValueError(explain(error, made)) from None

    made.__init__ = checked
    # Signatures and docs show plain types, without the bounds.
    made.__annotations__ = plain = get_type_hints(made)
    signature = inspect.signature(made)
    parameters = [p.replace(annotation=plain[name]) for name, p in signature.parameters.items()]
    made.__signature__ = signature.replace(parameters=parameters)
    for field in dataclasses.fields(made):
        field.type = plain[field.name]
    return made


def resolve_params(params: object, cls: type[_Settings]) -> _Settings:
    """Return settings of the class `cls` from ``None`` (the defaults), an instance, or a mapping of field names."""
    if params is None:
        return cls()
    if isinstance(params, cls):
        return params
    if isinstance(params, Mapping):
        return cls(**{str(name): value for name, value in params.items()})
    msg = f"Expected None, a mapping or {cls.__name__}, found {type(params).__name__}."
    raise TypeError(msg)


def explain(error: ValidationError, cls: type) -> str:
    """Say in one sentence which key is wrong, what was expected and what was found.

    Validators raise a ``ValueError`` with the end of a sentence that begins with the key ("must be ..."), or with a
    sentence of its own.
    """
    errors = error.errors(include_url=False)
    first = next((found for found in errors if found["type"] == "unexpected_keyword_argument"), errors[0])
    key, known, field = _locate(cls, first["loc"])
    match first["type"]:
        case "unexpected_keyword_argument":
            name = str(first["loc"][-1])
            close = [key.removesuffix(name) + other for other in get_close_matches(name, known, n=1)]
            advice = f"did you mean `{close[0]}`?" if close else f"known keys: {sorted(known)}."
            return f"Unknown key `{key}`; {advice}"
        case "missing" if len(first["loc"]) == key.count(".") + 1:
            return f"The key `{key}` is missing."
        case "value_error":
            text = str(first["ctx"]["error"])
            return text if not key else f"`{key}` {text}" if text[0].islower() else f"`{key}`: {text}"
        case "dataclass_type":
            return f"`{key}` must hold keys, some of {sorted(known)}; found {shown(first['input'])}."
    return f"`{key}` must be {_expected(field)}, found {shown(first['input'])}."


def shown(value: object) -> str:
    """Type and value, for a message."""
    return f"{type(value).__name__} {value!r}"


def _locate(cls: type, place: tuple[int | str, ...]) -> tuple[str, list[str], Any]:
    """Dotted key of a place in the settings, fields of the innermost class on the way, and the field there."""
    keys: list[str] = []
    known: list[str] = []
    field: Any = None
    inside: Any = cls
    for part in place:
        if hasattr(inside, "__pydantic_fields__"):
            known = list(inside.__pydantic_fields__)
            name = known[part] if isinstance(part, int) else part
            field = inside.__pydantic_fields__.get(name)
            inside = None if field is None else field.annotation
        elif get_origin(inside) is dict:
            name, inside, field = str(part), get_args(inside)[1], None
        else:
            break  # an item of a list, or an alternative of a union
        keys.append(name)
    if hasattr(inside, "__pydantic_fields__"):
        known = list(inside.__pydantic_fields__)
    return ".".join(keys), known, field


def _expected(field: Any) -> str:
    """Description of a field, or what its type and its bounds say."""
    if field.description:
        return field.description
    if get_origin(field.annotation) is Literal:
        return f"one of {sorted(get_args(field.annotation))}"
    parts = [part for item in (field.annotation, *field.metadata) for part in _parts(item)]
    noun = next(_NOUNS[part] for part in parts if isinstance(part, type) and part in _NOUNS)
    bounds = {name: getattr(part, name) for part in parts for name in _BOUNDS if hasattr(part, name)}
    if bounds.get("gt") == 0:
        noun = noun.replace("a ", "a positive ")
        del bounds["gt"]
    limits = [f"{word} {bounds[name]}" for name, word in _BOUNDS.items() if name in bounds]
    return " ".join([noun, " and ".join(limits)]).strip()


def _parts(annotation: Any) -> list[Any]:
    """Types and bounds within an annotation such as ``Annotated[float, Field(gt=0)] | None``."""
    inner = get_args(annotation) or getattr(annotation, "metadata", ())
    return [part for item in inner for part in _parts(item)] or [annotation]
