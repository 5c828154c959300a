"""The file of a run: YAML or TOML in, checked values out. Errors name the key."""

from __future__ import annotations

import re
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

from spatial_impute._validation import Flag, Natural, Whole, explain, resolve_params, settings_class, shown

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
# log_normalized: true # the counts of all sections are log-normalised values already
encoder: texture
registration: affine # rigid, affine, syn or auto
methods: [mean, nearest, knn, kernel, propagation, ridge, transfer_ridge, cokriging, asign]
cross_validate: false # ASIGN holds out spots itself; true fits it once more per fold, which takes six times as long
# plot_genes: [ERBB2, MDK] # the most predictable ones
# asign: {n_steps: 150} # settings of models.AsignParams
# device: cpu
seed: 0
"""

_SOURCES = ("image", "spaceranger", "spatialdata")
_TAKES = {  # and `mpp` and `z`
    "image": {"counts", "spot_diameter", "counts_layer"},
    "spaceranger": {"fullres_image", "bin_size"},
    "spatialdata": {"spot_pitch", "image_key", "shapes_key", "table_key", "coordinate_system", "counts_layer"},
}
# Keys whose values are text, also where YAML would read a number, a date, or true and false.
_TEXT = {"reference", "encoder", "device", "output", "plot_genes", "methods", *_SOURCES, "fullres_image", "counts"}
_TEXT |= {"counts_layer", "image_key", "shapes_key", "table_key", "coordinate_system"}
_SPOT_SIZES = (1.0, 1000.0)  # um; bins measure 2, spots of early arrays 200
_MOST_NODES = 100_000  # of a file, with aliases written out


class ConfigError(ValueError):
    """The file of a run is wrong; the message names the key."""


def all_methods() -> list[str]:
    """Names of the baselines and of ASIGN."""
    from spatial_impute.models.asign._baselines import METHODS
    from spatial_impute.models.asign._fit import ASIGN

    return [*METHODS, ASIGN]


def _path(value: object, info: ValidationInfo) -> Path:
    """Absolute path; relative ones start from the folder of the file."""
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        msg = f"must be a path, found {shown(value)}."
        raise ValueError(msg)
    path = Path(value).expanduser()
    return path if path.is_absolute() or info.context is None else info.context / path


def _existing(path: Path) -> Path:
    if not path.exists():
        msg = f"There is nothing at '{path}'."
        raise ValueError(msg)
    return path


def _plausible(size: float) -> float:
    low, high = _SPOT_SIZES
    if not low <= size <= high:
        msg = (
            f"must be the size of spots in um, {low:g} to {high:g}, found {size:g}. Convert pixels and millimetres "
            "first."
        )
        raise ValueError(msg)
    return size


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


def _legal_sections(sections: dict[str, Any]) -> dict[str, Any]:
    from spatial_impute._stack.record import require_section_names

    require_section_names(list(sections))
    return sections


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Name = Annotated[str, Field(min_length=1, description="a name")]
Names = Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1, description="a list of names")]
Output = Annotated[Path, BeforeValidator(_path)]
Input = Annotated[Output, AfterValidator(_existing)]
# Unlike settings of models, sizes of sections are not read from text.
Float = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Length = Annotated[Float, Field(gt=0)]
Distance = Annotated[Length, AfterValidator(_plausible)]  # diameter or pitch of spots


@settings_class
class SectionConfig:
    """Files and settings of a section. One of `image`, `spaceranger` and `spatialdata` is given."""

    image: Input | None = None
    spaceranger: Input | None = None
    spatialdata: Input | None = None
    mpp: Length | None = None
    z: Float | None = None
    fullres_image: Input | None = None
    bin_size: Length | None = None
    counts: Input | None = None
    counts_layer: Name | None = None
    spot_diameter: Distance | None = None
    spot_pitch: Distance | None = None
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
        takes = {"mpp", "z"} | _TAKES[self.source]
        others = [name for name in self.__dataclass_fields__ if getattr(self, name) is not None and name not in takes]
        others.remove(self.source)
        if others:
            msg = f"with `{self.source}` does not take `{others[0]}`; it takes {sorted(takes)}."
            raise ValueError(msg)
        if self.counts_layer is not None and self.source == "image" and self.counts is None:
            msg = "takes `counts_layer` only together with `counts`."
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
        AfterValidator(_legal_sections),
        Field(min_length=2, description="two or more sections by name, each with its files"),
    ]
    output: Output
    section_spacing: Length | None = None
    reference: str | None = None
    genes: Annotated[
        Annotated[Whole, Field(gt=0)] | Names,
        Field(description="a positive whole number or a list of names (in quotes, if they look like numbers)"),
    ] = 250
    log_normalized: Flag = False
    encoder: Name = "texture"
    registration: Literal["rigid", "affine", "syn", "auto"] = "affine"
    methods: Annotated[
        list[Annotated[str, AfterValidator(_method)]],
        BeforeValidator(_as_list),
        Field(min_length=1, description="a list of names"),
    ] = Field(default_factory=all_methods)
    cross_validate: Flag | None = None
    plot_genes: Names | None = None
    asign: Annotated[dict[str, Any], AfterValidator(_asign), Field(description="settings of AsignParams")] = Field(
        default_factory=dict
    )
    device: Name | None = None
    workers: Annotated[Whole, Field(gt=0, description="a positive whole number of processes")] | None = None
    seed: Natural = 0

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, found: Any) -> Any:
        """Drop keys without a value, so that they keep their defaults."""
        return {key: value for key, value in found.items() if value is not None} if isinstance(found, dict) else found

    def __post_init__(self) -> None:
        self._require_heights()
        self._require_own_files()
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

    def _require_own_files(self) -> None:
        """Refuse a file that two sections share, a slip of copying; a SpatialData object may hold several images."""
        seen: dict[tuple[Any, ...], str] = {}
        for name, section in self.sections.items():
            for key in ("image", "counts", "spaceranger", "spatialdata", "fullres_image"):
                path = getattr(section, key)
                if path is None:
                    continue
                place = f"sections.{name}.{key}"
                other = seen.setdefault((path.resolve(), section.coordinate_system, section.image_key), place)
                if other != place:
                    msg = f"`{place}` and `{other}` are the same file, '{path}'; each section needs its own."
                    if key == "spatialdata":
                        msg += " If it holds several, name the `coordinate_system` or the `image_key` of each."
                    raise ValueError(msg)


def read_config(path: str | Path) -> RunConfig:
    """Read and check the file of a run (``.yaml``, ``.yml`` or ``.toml``); nothing else is read or written.

    The message of a ``ConfigError`` names the key that is missing, unknown, or has a wrong value.
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
    if suffix not in {".toml", ".yaml", ".yml"}:
        msg = f"The file of a run ends in .yaml, .yml or .toml, found '{path.name}'."
        raise ConfigError(msg)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        msg = f"'{path}' is no text in UTF-8: {error.reason} at byte {error.start}. Save it as UTF-8 in your editor."
        raise ConfigError(msg) from error
    try:
        return tomllib.loads(text) if suffix == ".toml" else _parse_yaml(text)
    except ConfigError:
        raise
    except (tomllib.TOMLDecodeError, yaml.YAMLError, ValueError, RecursionError) as error:
        what = "it is nested too deeply" if isinstance(error, RecursionError) else error
        msg = f"'{path}' is no valid {'TOML' if suffix == '.toml' else 'YAML'}: {what}"
        raise ConfigError(msg) from error


def _parse_yaml(text: str) -> object:
    """Content of a YAML file, with keys and names as they are written: YAML reads `on`, `01` and `1e3` otherwise."""
    import yaml

    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count_nodes(node, {})
        _keep_text(node, "", set())
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _count_nodes(node: Any, known: dict[int, int]) -> int:
    """Nodes below this one with aliases written out; an error if they are too many, or contain themselves."""
    if id(node) in known:
        if known[id(node)] == 0:
            msg = f"The alias in line {node.start_mark.line + 1} contains itself; write its content out."
            raise ConfigError(msg)
        return known[id(node)]
    known[id(node)] = 0  # begun
    inside = node.value if isinstance(node.value, list) else []
    inside = [part for item in inside for part in (item if isinstance(item, tuple) else (item,))]
    known[id(node)] = 1 + sum(_count_nodes(part, known) for part in inside)
    if known[id(node)] > _MOST_NODES:
        msg = (
            f"The aliases of the file stand for more than {_MOST_NODES} values, see line {node.start_mark.line + 1}; "
            "write less out."
        )
        raise ConfigError(msg)
    return known[id(node)]


def _keep_text(node: Any, key: str, done: set[int]) -> None:
    """Make names text, and refuse two equal keys: YAML keeps the last of them, and a section would be lost."""
    from yaml import MappingNode, ScalarNode, SequenceNode

    if isinstance(node, ScalarNode) and key.rpartition(".")[2] in _TEXT and not node.tag.endswith(":null"):
        node.tag = "tag:yaml.org,2002:str"
    if id(node) in done:
        return
    done.add(id(node))
    if isinstance(node, SequenceNode):
        for item in node.value:
            # Genes are many or named: only in a list they are names.
            _keep_text(item, "plot_genes" if key == "genes" else key, done)
    if not isinstance(node, MappingNode):
        return
    seen = set()
    for name, value in node.value:
        full = f"{key}.{name.value}" if key else str(name.value)
        if full in seen:
            msg = f"The key `{full}` stands twice, the second time in line {name.start_mark.line + 1}."
            raise ConfigError(msg)
        seen.add(full)
        if isinstance(name, ScalarNode) and name.tag != "tag:yaml.org,2002:merge":
            name.tag = "tag:yaml.org,2002:str"
        shorthand = key == "sections" and isinstance(value, ScalarNode)  # the path of an image
        _keep_text(value, f"{full}.image" if shorthand else full, done)


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


def in_words_of_file(error: Exception | str, config: RunConfig) -> str:
    """Message of the package in terms of the file of a run: keys for arguments, and no Python calls."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = re.sub(r"`?sections\['([^']+)'\]`?", r"`sections.\1`", text)
    text = re.sub(r"[Ss]ection '([^']+)'", r"`sections.\1`", text)
    signs = {name: rf"[`'.]{re.escape(name)}['`]|[Ss]ection {re.escape(name)}\b" for name in config.sections}
    name = next((name for name, sign in signs.items() if re.search(sign, text)), None)
    if name is not None:
        text = re.sub(rf"[Ss]ection {re.escape(name)}(?![\w-])", f"`sections.{name}`", text)
    where = "sections.*" if name is None else f"sections.{name}"
    text = re.sub(r",? e\.g\. `\w+=[^`]*`", "", text)
    for key in SectionConfig.__dataclass_fields__:
        text = re.sub(rf"`{key}=?(\{{[^`]*)?`", f"`{where}.{key}`", text)
        text = re.sub(rf"`{key}=([^`]+)`", rf"`{where}.{key}: \1`", text)
    calls = re.compile(r"`[^`]*(\bsi\.|\bsdata|spatialdata\.|=|\()[^`]*`|`layer`|Python|SpatialData object")
    said = [part for part in re.split(r"(?<=[.;])\s+(?=[A-Z`'])", text) if not calls.search(part)]
    text = " ".join(said) or text
    return text if name is None or f"sections.{name}" in text else f"`sections.{name}`: {text}"
