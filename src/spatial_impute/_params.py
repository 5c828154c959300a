"""Classes of settings: frozen dataclasses that pydantic checks, and its errors in plain sentences."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform, get_args, get_origin, get_type_hints

from pydantic import BeforeValidator, ConfigDict, Field, Strict, ValidationError
from pydantic.dataclasses import dataclass

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
            return f"Unknown key `{key}`; " + (
                f"did you mean `{close[0]}`?" if close else f"known keys: {sorted(known)}."
            )
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
