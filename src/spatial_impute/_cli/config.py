"""The file that describes a run: YAML or TOML in, checked values out. Errors name the key."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spatial_impute._validation import require_positive

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

EXAMPLE = """\
# A run of spatial_impute: python -m spatial_impute run run.yaml
# Paths are relative to this file. Sections stand in the order of the block, the lowest first.
sections:
  s0:
    image: s0.ome.tif # TIFF, OME-TIFF, SVS, PNG, JPEG, OME-Zarr
    mpp: 0.5 # um per pixel; may be left out where the file says it
  s1:
    spaceranger: s1/outs # measured: folder of Space Ranger (Visium, CytAssist, Visium HD)
    fullres_image: s1.tif
  s2:
    image: s2.png # measured: counts with pixel coordinates in obsm["spatial"]
    mpp: 0.5
    counts: s2.h5ad
    spot_diameter: 100 # um
  # s3: {spatialdata: s3.zarr, mpp: 0.5}
section_spacing: 10 # um; or `z` for each section
output: results # folder to write to

# All that follows may be left out; these are the defaults.
# reference: s1 # the first measured section
genes: 250 # how many, or a list of names
encoder: texture
registration: affine # rigid, affine or syn
methods: [mean, nearest, knn, kernel, propagation, ridge, transfer_ridge, cokriging, asign]
cross_validate: true # fits ASIGN once more per fold
# plot_genes: [ERBB2, MDK] # the most predictable ones
# asign: {n_steps: 150} # settings of models.AsignParams
# device: cpu
seed: 0
"""

_SOURCES = ("image", "spaceranger", "spatialdata")
_REGISTRATIONS = ("rigid", "affine", "syn")


class ConfigError(ValueError):
    """Something in the file of a run is wrong; the message names the key."""


@dataclass(frozen=True)
class SectionConfig:
    """Where a section comes from."""

    source: str
    """``"image"``, ``"spaceranger"`` or ``"spatialdata"``."""
    path: Path
    mpp: float | None = None
    z: float | None = None
    fullres_image: Path | None = None
    bin_size: float | None = None
    counts: Path | None = None
    spot_diameter: float | None = None
    image_key: str | None = None
    shapes_key: str | None = None
    table_key: str | None = None
    coordinate_system: str | None = None


@dataclass(frozen=True)
class RunConfig:
    """A run."""

    sections: dict[str, SectionConfig]
    output: Path
    section_spacing: float | None = None
    reference: str | None = None
    genes: int | list[str] = 250
    encoder: str = "texture"
    registration: str = "affine"
    methods: list[str] = field(default_factory=list)
    cross_validate: bool = True
    plot_genes: list[str] | None = None
    asign: dict[str, Any] = field(default_factory=dict)
    device: str | None = None
    seed: int = 0


def read_config(path: str | Path) -> RunConfig:
    """Read and check the file of a run; nothing else is read or written.

    Parameters
    ----------
    path
        ``.yaml``, ``.yml`` or ``.toml``.

    Raises
    ------
    ConfigError
        If the file cannot be read, or a key is missing, unknown, or has a wrong value; the message names the key.
    """
    path = Path(path)
    if not path.is_file():
        msg = f"No file at '{path}'. `python -m spatial_impute run --example` prints one to start from."
        raise ConfigError(msg)
    return check_config(_parse(path), folder=path.resolve().parent)


def _parse(path: Path) -> object:
    suffix = path.suffix.lower()
    if suffix == ".toml":
        import tomllib

        try:
            return tomllib.loads(path.read_text())
        except tomllib.TOMLDecodeError as error:
            msg = f"'{path}' is no valid TOML: {error}"
            raise ConfigError(msg) from error
    if suffix in {".yaml", ".yml"}:
        import yaml

        try:
            _refuse_duplicates(yaml.compose(path.read_text(), Loader=yaml.SafeLoader))
            return yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            msg = f"'{path}' is no valid YAML: {error}"
            raise ConfigError(msg) from error
    msg = f"The file of a run ends in .yaml, .yml or .toml, found '{path.name}'."
    raise ConfigError(msg)


def _refuse_duplicates(node: Any, prefix: str = "") -> None:
    """YAML would keep the last of two equal keys, and a section would be lost without a word."""
    from yaml import MappingNode

    if not isinstance(node, MappingNode):
        return
    seen = set()
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        if name in seen:
            msg = f"The key `{name}` stands twice, the second time in line {key.start_mark.line + 1}."
            raise ConfigError(msg)
        seen.add(name)
        _refuse_duplicates(value, f"{name}.")


def check_config(found: object, *, folder: Path) -> RunConfig:
    """Check what a file holds.

    Parameters
    ----------
    found
        Parsed file.
    folder
        Folder that relative paths start from.

    Raises
    ------
    ConfigError
        If a key is missing, unknown, or has a wrong value.

    Examples
    --------
    >>> check_config({"sections": {"s0": {"image": "a.tif"}}, "outputs": "x"}, folder=Path("."))
    Traceback (most recent call last):
        ...
    spatial_impute._cli.config.ConfigError: Unknown key `outputs`; did you mean `output`?
    """
    if not isinstance(found, dict):
        msg = f"The file must hold keys such as `sections` and `output`, found {type(found).__name__}."
        raise ConfigError(msg)
    _known_keys(found, RunConfig.__dataclass_fields__, "")
    for key in ("sections", "output"):
        if key not in found:
            msg = f"The key `{key}` is missing."
            raise ConfigError(msg)
    given = found["sections"]
    if not isinstance(given, dict) or len(given) < 2:
        msg = f"`sections` must name at least two sections, each with its files; found {_shown(given)}."
        raise ConfigError(msg)
    sections = {str(name): _section(f"sections.{name}", value, folder) for name, value in given.items()}
    _check_heights(sections, found.get("section_spacing"))
    if not any(s.source == "spaceranger" or s.source == "spatialdata" or s.counts for s in sections.values()):
        msg = (
            "`sections`: none of them is measured. Imputation needs one with `spaceranger`, `spatialdata`, or `image` "
            "and `counts`."
        )
        raise ConfigError(msg)
    values: dict[str, Any] = {
        "sections": sections,
        "output": _path("output", found["output"], folder, must_exist=False),
    }
    checks: dict[str, Callable[[str, Any], Any]] = {
        "section_spacing": _positive,
        "reference": lambda key, value: _one_of(key, value, sections),
        "genes": _genes,
        "encoder": _text,
        "registration": lambda key, value: _one_of(key, value, _REGISTRATIONS),
        "methods": _methods,
        "cross_validate": _flag,
        "plot_genes": _names,
        "asign": _asign,
        "device": _text,
        "seed": _whole,
    }
    for key, check in checks.items():
        if found.get(key) is not None:
            values[key] = check(key, found[key])
    values.setdefault("methods", all_methods())
    return RunConfig(**values)


def all_methods() -> list[str]:
    """Names of the baselines and of ASIGN."""
    from spatial_impute.models.asign._baselines import METHODS
    from spatial_impute.models.asign._held_out import ASIGN

    return [*METHODS, ASIGN]


def _section(key: str, found: Any, folder: Path) -> SectionConfig:
    if isinstance(found, str):
        found = {"image": found}
    if not isinstance(found, dict):
        msg = f"`{key}` must hold keys such as `image` and `mpp`, found {_shown(found)}."
        raise ConfigError(msg)
    own = set(SectionConfig.__dataclass_fields__) - {"source", "path"}
    _known_keys(found, {*_SOURCES, *own}, f"{key}.")
    sources = [source for source in _SOURCES if source in found]
    if len(sources) != 1:
        msg = f"`{key}` needs exactly one of {list(_SOURCES)}, found {sources or 'none of them'}."
        raise ConfigError(msg)
    (source,) = sources
    allowed = {
        "image": {"mpp", "z", "counts", "spot_diameter"},
        "spaceranger": {"mpp", "z", "fullres_image", "bin_size"},
        "spatialdata": {"mpp", "z", "image_key", "shapes_key", "table_key", "coordinate_system"},
    }[source]
    for name in found:
        if name != source and name not in allowed:
            msg = f"`{key}.{name}` does not belong to a section with `{source}`, which takes {sorted(allowed)}."
            raise ConfigError(msg)
    if ("counts" in found) != ("spot_diameter" in found):
        msg = f"`{key}`: `counts` and `spot_diameter` (um) belong together, found only one of them."
        raise ConfigError(msg)
    checks: dict[str, Callable[[str, Any], Any]] = {
        "mpp": _positive,
        "z": _number,
        "fullres_image": lambda k, v: _path(k, v, folder),
        "bin_size": _positive,
        "counts": lambda k, v: _path(k, v, folder),
        "spot_diameter": _positive,
    }
    values = {name: checks.get(name, _text)(f"{key}.{name}", found[name]) for name in found if name != source}
    return SectionConfig(source, _path(f"{key}.{source}", found[source], folder), **values)


def _check_heights(sections: Mapping[str, SectionConfig], spacing: object) -> None:
    with_z = [name for name, section in sections.items() if section.z is not None]
    if spacing is not None and with_z:
        msg = f"Give either `section_spacing` or `z` of every section, found both (`sections.{with_z[0]}.z`)."
        raise ConfigError(msg)
    if spacing is None and len(with_z) < len(sections):
        without = next(name for name in sections if name not in with_z)
        msg = f"The heights are missing: give `section_spacing` (um), or `sections.{without}.z` and all others."
        raise ConfigError(msg)


def _known_keys(found: Mapping[str, Any], known: Collection[str], prefix: str) -> None:
    from difflib import get_close_matches

    for key in found:
        if key not in known:
            close = get_close_matches(str(key), known, n=1)
            hint = f"did you mean `{prefix}{close[0]}`?" if close else f"there are {sorted(known)}."
            msg = f"Unknown key `{prefix}{key}`; {hint}"
            raise ConfigError(msg)


def _shown(value: object) -> str:
    return f"{type(value).__name__} {value!r}"


def _wrong(key: str, expected: str, value: object) -> ConfigError:
    return ConfigError(f"`{key}` must be {expected}, found {_shown(value)}.")


def _path(key: str, value: Any, folder: Path, *, must_exist: bool = True) -> Path:
    if not isinstance(value, str) or not value:
        raise _wrong(key, "a path", value)
    path = Path(value).expanduser()
    path = path if path.is_absolute() else folder / path
    if must_exist and not path.exists():
        msg = f"`{key}`: there is nothing at '{path}'."
        raise ConfigError(msg)
    return path


def _positive(key: str, value: Any) -> float:
    if isinstance(value, bool | str):
        raise _wrong(key, "a positive number", value)
    try:
        return require_positive(value, name=key)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(key, "a number", value)
    return float(value)


def _whole(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _wrong(key, "a whole number from 0 on", value)
    return value


def _flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong(key, "true or false", value)
    return value


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise _wrong(key, "a name", value)
    return value


def _one_of(key: str, value: Any, options: Collection[str]) -> str:
    if value not in options:
        raise _wrong(key, f"one of {list(options)}", value)
    return value


def _names(key: str, value: Any) -> list[str]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise _wrong(key, "a list of names", value)
    return names


def _genes(key: str, value: Any) -> int | list[str]:
    if isinstance(value, int) and not isinstance(value, bool):
        return int(_positive(key, value))
    return _names(key, value)


def _methods(key: str, value: Any) -> list[str]:
    return [_one_of(key, name, all_methods()) for name in _names(key, value)]


def _asign(key: str, value: Any) -> dict[str, Any]:
    from spatial_impute._validation import resolve_params
    from spatial_impute.models._params import AsignParams

    if not isinstance(value, dict):
        raise _wrong(key, "settings of AsignParams", value)
    try:
        resolve_params(value, AsignParams)
    except (TypeError, ValueError) as error:
        msg = f"`{key}`: {error}"
        raise ConfigError(msg) from error
    return value
