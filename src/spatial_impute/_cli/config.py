"""The file of a run: YAML or TOML in, checked values out. Errors name the key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from spatial_impute._params import Flag, Natural, Whole, explain, resolve_params, settings_class, shown

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
_TAKES = {
    "image": {"mpp", "z", "counts", "spot_diameter"},
    "spaceranger": {"mpp", "z", "fullres_image", "bin_size"},
    "spatialdata": {"mpp", "z", "image_key", "shapes_key", "table_key", "coordinate_system"},
}


class ConfigError(ValueError):
    """The file of a run is wrong; the message names the key."""


def all_methods() -> list[str]:
    """Names of the baselines and of ASIGN."""
    from spatial_impute.models.asign._baselines import METHODS
    from spatial_impute.models.asign._fit import ASIGN

    return [*METHODS, ASIGN]


def _path(value: object, info: ValidationInfo) -> Path:
    """Absolute path; relative ones start from the folder of the file."""
    if not isinstance(value, str | Path) or not str(value):
        msg = f"must be a path, found {shown(value)}."
        raise ValueError(msg)
    path = Path(value).expanduser()
    return path if path.is_absolute() or info.context is None else info.context / path


def _existing(path: Path) -> Path:
    if not path.exists():
        msg = f"There is nothing at '{path}'."
        raise ValueError(msg)
    return path


def _method(name: str) -> str:
    if name not in all_methods():
        msg = f"must be one of {all_methods()}, found {shown(name)}."
        raise ValueError(msg)
    return name


def _asign(value: dict[str, Any]) -> dict[str, Any]:
    from spatial_impute.models._params import AsignParams

    try:
        resolve_params(value, AsignParams)
    except TypeError as error:
        raise ValueError(str(error)) from error
    return value


def _section_names(found: Any) -> Any:
    if not isinstance(found, dict):
        return found
    for name in found:
        if isinstance(name, bool):
            msg = (
                f"has a section named {name!r}: YAML reads `on`, `off`, `yes` and `no` as true and false. Put quotes "
                "around it."
            )
            raise ValueError(msg)
    return {str(name): value for name, value in found.items()}


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Name = Annotated[str, Field(min_length=1, description="a name")]
Names = Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1, description="a list of names")]
Output = Annotated[Path, BeforeValidator(_path)]
Input = Annotated[Output, AfterValidator(_existing)]
# Unlike settings of models, sizes of sections are not read from text.
Float = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Length = Annotated[Float, Field(gt=0)]


@settings_class
class SectionConfig:
    """Files of a section, and what they do not say. One of `image`, `spaceranger` and `spatialdata` is given."""

    image: Input | None = None
    spaceranger: Input | None = None
    spatialdata: Input | None = None
    mpp: Length | None = None
    z: Float | None = None
    fullres_image: Input | None = None
    bin_size: Length | None = None
    counts: Input | None = None
    spot_diameter: Length | None = None
    image_key: Name | None = None
    shapes_key: Name | None = None
    table_key: Name | None = None
    coordinate_system: Name | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, found: Any) -> Any:
        return {"image": found} if isinstance(found, str) else found

    def __post_init__(self) -> None:
        sources = [source for source in _SOURCES if getattr(self, source) is not None]
        if len(sources) != 1:
            msg = f"needs exactly one of {list(_SOURCES)}, found {sources or 'none of them'}."
            raise ValueError(msg)
        takes = _TAKES[self.source]
        others = [name for name in self.__dataclass_fields__ if getattr(self, name) is not None and name not in takes]
        others.remove(self.source)
        if others:
            msg = f"with `{self.source}` does not take `{others[0]}`; it takes {sorted(takes)}."
            raise ValueError(msg)
        if (self.counts is None) != (self.spot_diameter is None):
            msg = "needs `counts` and `spot_diameter` (um) together, found only one of them."
            raise ValueError(msg)

    @property
    def source(self) -> str:
        """``"image"``, ``"spaceranger"`` or ``"spatialdata"``."""
        return next(source for source in _SOURCES if getattr(self, source) is not None)

    @property
    def path(self) -> Path:
        """File or folder of the source."""
        return getattr(self, self.source)

    @property
    def measured(self) -> bool:
        """True if the files hold expression."""
        return self.source != "image" or self.counts is not None


@settings_class
class RunConfig:
    """A run."""

    sections: Annotated[
        dict[str, SectionConfig],
        BeforeValidator(_section_names),
        Field(min_length=2, description="two or more sections by name, each with its files"),
    ]
    output: Output
    section_spacing: Length | None = None
    reference: str | None = None
    genes: Annotated[
        Annotated[Whole, Field(gt=0)] | Names, Field(description="a positive whole number or a list of names")
    ] = 250
    encoder: Name = "texture"
    registration: Literal["rigid", "affine", "syn"] = "affine"
    methods: Annotated[
        list[Annotated[str, AfterValidator(_method)]],
        BeforeValidator(_as_list),
        Field(min_length=1, description="a list of names"),
    ] = Field(default_factory=all_methods)
    cross_validate: Flag = True
    plot_genes: Names | None = None
    asign: Annotated[dict[str, Any], AfterValidator(_asign), Field(description="settings of AsignParams")] = Field(
        default_factory=dict
    )
    device: Name | None = None
    seed: Natural = 0

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, found: Any) -> Any:
        """Keys without a value keep their defaults."""
        return {key: value for key, value in found.items() if value is not None} if isinstance(found, dict) else found

    def __post_init__(self) -> None:
        self._require_heights()
        if not any(section.measured for section in self.sections.values()):
            msg = (
                "`sections`: none of them is measured. Imputation needs one with `spaceranger`, `spatialdata`, or "
                "`image` and `counts`."
            )
            raise ValueError(msg)
        if self.reference is not None and self.reference not in self.sections:
            msg = f"`reference` must be one of {list(self.sections)}, found {shown(self.reference)}."
            raise ValueError(msg)

    def _require_heights(self) -> None:
        without = [name for name, section in self.sections.items() if section.z is None]
        if self.section_spacing is None and without:
            msg = f"The heights are missing: give `section_spacing` (um), or `sections.{without[0]}.z` and all others."
            raise ValueError(msg)
        if self.section_spacing is not None and len(without) < len(self.sections):
            name = next(name for name in self.sections if name not in without)
            msg = f"Give either `section_spacing` or `z` of every section, found both (`sections.{name}.z`)."
            raise ValueError(msg)


def read_config(path: str | Path) -> RunConfig:
    """Read and check the file of a run (``.yaml``, ``.yml`` or ``.toml``); nothing else is read or written.

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
    import tomllib

    import yaml

    suffix = path.suffix.lower()
    try:
        if suffix == ".toml":
            return tomllib.loads(path.read_text())
        if suffix in {".yaml", ".yml"}:
            _refuse_duplicates(yaml.compose(path.read_text(), Loader=yaml.SafeLoader))
            return yaml.safe_load(path.read_text())
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        msg = f"'{path}' is no valid {'TOML' if suffix == '.toml' else 'YAML'}: {error}"
        raise ConfigError(msg) from error
    msg = f"The file of a run ends in .yaml, .yml or .toml, found '{path.name}'."
    raise ConfigError(msg)


def _refuse_duplicates(node: Any, prefix: str = "") -> None:
    """Refuse two equal keys: YAML keeps the last of them, and a section would be lost without a word."""
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
    """Check the content of a file; relative paths start from `folder`.

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
    try:
        return TypeAdapter(RunConfig).validate_python(found, context=folder)
    except ValidationError as error:
        raise ConfigError(explain(error, RunConfig)) from error
