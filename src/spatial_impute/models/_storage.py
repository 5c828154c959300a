"""Files of models: saved models and states of a training, as safetensors and JSON. Nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from spatial_impute._io.files import owned_folder
from spatial_impute._io.workers import rank_and_size
from spatial_impute._settings import logger

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    import pandas as pd
    from torch import Tensor, nn

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
_FORMAT = 1
_HASH, _ENTRIES = "weights_sha256", "entries_sha256"
_MADE_BY = "spatial_impute"  # in the metadata of weights


def save_model(
    path: str | Path, *, kind: str, config: dict[str, Any], tensors: Mapping[str, Tensor], overwrite: bool
) -> None:
    """Write a model directory; ``FileExistsError`` if there is something at `path` and `overwrite` is False."""
    path = Path(path)
    is_new = not path.exists()
    if not is_new and not overwrite:
        msg = f"{str(path)!r} exists; pass `overwrite=True` to replace the model in it."
        raise FileExistsError(msg)
    if not is_new:
        _require_ours(path)
    weights = save({key: value.contiguous() for key, value in tensors.items()}, {_MADE_BY: version("spatial-impute")})
    header = {"format": _FORMAT, "class": kind, "package_version": version("spatial-impute")}
    content = json.loads(json.dumps(header | config | {_HASH: hashlib.sha256(weights).hexdigest()}))
    text = json.dumps(content | {_ENTRIES: _entry_hashes(content)}, indent=1)
    path.mkdir(parents=True, exist_ok=True)
    try:
        # Killed between the two replacements, the hash shows that the weights do not belong to the configuration.
        with owned_folder(path, what="The model"):
            _replace_files(
                {path / WEIGHTS: weights, path / CONFIG: text.encode()},
                note=f"The model was not saved; the files in {str(path)!r} are as they were before.",
            )
    except BaseException:  # also Ctrl-C
        if is_new and not any(path.iterdir()):
            path.rmdir()
        raise


def _entry_hashes(content: Mapping[str, Any]) -> dict[str, str]:
    """Hash of each entry of a configuration, so that users may add entries of their own to its ``config``."""
    entries = {key: value for key, value in content.items() if key not in ("config", _ENTRIES)}
    entries |= {f"config.{key}": value for key, value in content.get("config", {}).items()}
    return {
        key: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
        for key, value in entries.items()
    }


def _require_ours(path: Path) -> None:
    """Raise a ``FileExistsError`` if files that a model would replace were not written by this package."""
    try:
        if (path / CONFIG).exists():
            config = json.loads((path / CONFIG).read_text())
            ours = isinstance(config, dict) and {"format", "class", "package_version"} <= config.keys()
        elif (path / WEIGHTS).exists():  # saving was interrupted
            with safe_open(path / WEIGHTS, framework="pt") as file:
                ours = _MADE_BY in (file.metadata() or {})
        else:
            ours = path.is_dir()
    except (OSError, ValueError, RecursionError, SafetensorError):
        ours = False
    if not ours:
        msg = f"{str(path)!r} holds files that this package did not write, and they are not replaced. Choose another folder."
        raise FileExistsError(msg)


def _replace_files(contents: Mapping[Path, bytes], *, note: str) -> None:
    """Write new files beside the old ones, then replace these; an error during writing leaves the old ones."""
    fresh = {path: path.with_name(f"{path.name}.new") for path in contents}
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh[path].write_bytes(content)
    except BaseException as error:  # also Ctrl-C
        for file in fresh.values():
            file.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.add_note(note)
        raise
    for path, file in fresh.items():
        file.replace(path)


def load_model(path: str | Path, *, kind: str, unknown: Collection[str] = ()) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Read a model directory. The tensors in `unknown` may hold NaN.

    A missing file raises a ``FileNotFoundError``, other content than a model of this class and format a ``ValueError``.
    """
    path = Path(path)
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            msg = f"No {name} in {str(path)!r}; expected a directory written by `{kind}.save`."
            raise FileNotFoundError(msg)
    try:
        config = json.loads((path / CONFIG).read_text())
    except (RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:  # also thousands of brackets
        msg = f"{str(path / CONFIG)!r} is not valid JSON: {error}. Save the model again."
        raise ValueError(msg) from error
    found = (config.get("class"), config.get("format")) if isinstance(config, dict) else (None, None)
    if found != (kind, _FORMAT):
        msg = f"{str(path)!r} holds class {found[0]!r}, format {found[1]!r}; expected {kind!r}, format {_FORMAT}."
        raise ValueError(msg)
    try:
        tensors = load_file(path / WEIGHTS)
    except SafetensorError as error:
        msg = f"{str(path / WEIGHTS)!r} is damaged: {error}. Save the model again."
        raise ValueError(msg) from error
    with (path / WEIGHTS).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if config.get(_HASH, digest) != digest:
        msg = (
            f"{WEIGHTS} in {str(path)!r} is not the one that {CONFIG} was saved with: saving was interrupted, or a file "
            "was changed. Save the model again."
        )
        raise ValueError(msg)
    names = config.get("var_names")
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names) or len(set(names)) != len(names):
        msg = (
            f"`var_names` in {str(path / CONFIG)!r} must be a list of gene names, all different. Save the model again."
        )
        raise ValueError(msg)
    numbers = {key: value for key, value in tensors.items() if value.is_floating_point() and key not in unknown}
    bad = sorted(key for key, value in numbers.items() if not value.isfinite().all())
    if bad:
        raise does_not_fit(path, f"{bad[0]!r} has values that are NaN or infinite.")
    return ModelConfig(config, path), tensors


class ModelConfig(dict[str, Any]):
    """Content of ``config.json``; the error for a missing key names the file and its keys."""

    def __init__(self, content: dict[str, Any], path: Path) -> None:
        super().__init__(content)
        self.path = path

    def __missing__(self, key: str) -> NoReturn:
        msg = f"{CONFIG} in {str(self.path)!r} lacks {key!r}; it has {sorted(self)}. Was it written by another version?"
        raise ValueError(msg)


class _Origin(BaseModel, strict=True, extra="allow"):
    """Entries that all models have; their types are checked, and their presence where they are used."""

    encoder: str = ""
    units: str = ""
    seed: int = 0


class _SeenSection(BaseModel, strict=True):
    image: str
    spots: str
    measured: str


class _SeenStack(BaseModel, strict=True, extra="allow"):
    sections: dict[str, _SeenSection]


class AsignOrigin(_Origin):
    """Data and settings that an ASIGN model comes from."""

    features: dict[str, Any] = {}
    base_layers: dict[str, str] = {}
    sections: list[list[str]] = []
    stacks: list[_SeenStack] = []


class _SlideState(BaseModel, strict=True, extra="allow"):
    coordinate_system: str
    um: float
    read: dict[str, Any]


class _SeenSlide(BaseModel, strict=True, extra="allow"):
    image: str
    shapes: str
    state: _SlideState


class PixNetOrigin(_Origin):
    """Data and settings that a PixNet model comes from."""

    resolution: float = 1.0
    aggregate: Literal["mean", "sum"] = "mean"
    stain_density: list[float] | None = None
    trained_on: list[_SeenSlide] = []


def checked_origin(config: ModelConfig, kind: type[_Origin]) -> ModelConfig:
    """Data and settings that a model comes from, with the types that they were saved with; else a ``ValueError``."""
    kind.model_validate(config["config"])
    return ModelConfig(config["config"], config.path)


def does_not_fit(path: str | Path, reason: object) -> ValueError:
    """Error for weights that do not belong to the configuration."""
    return ValueError(f"The weights in {str(path)!r} do not fit their configuration: {reason}")


@contextmanager
def config_errors(path: str | Path) -> Iterator[None]:
    """Turn any error from wrong values of a configuration into one that names the model directory.

    Values that fit, but were changed after the model was saved, are an error as well: genes may have exchanged their names.
    """
    try:
        yield
        content = json.loads((Path(path) / CONFIG).read_text())
        now = _entry_hashes(content)
        changed = [key for key, then in content.get(_ENTRIES, {}).items() if now.get(key) != then]
        if changed:
            msg = f"{changed} in {str(Path(path) / CONFIG)!r} was changed after the model was saved. Copy or save the model again."
            raise ValueError(msg)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise does_not_fit(path, error) from error


def require_shapes(
    path: str | Path, build: Callable[[], nn.Module], state: Mapping[str, Tensor], sizes: Iterable[object]
) -> None:
    """Check weights against the network of the configuration before memory is allocated for it.

    `build` makes the network; it is called on torch's meta device, where no memory is allocated. `sizes` are numbers of the
    configuration. Each is the size of a tensor or a number of layers, so none exceeds the number of values in `state`.
    """
    total = sum(tensor.numel() for tensor in state.values())
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= total:
            raise does_not_fit(path, f"found the size {size!r}, but the file holds only {total} numbers.")
    try:
        with torch.device("meta"):
            expected = {key: tuple(value.shape) for key, value in build().state_dict().items()}
    except (RuntimeError, TypeError, ValueError) as error:
        raise does_not_fit(path, error) from error
    found = {key: tuple(value.shape) for key, value in state.items()}
    if expected != found:
        differ = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        first = f"{differ[0]!r} is {found.get(differ[0])}, expected {expected.get(differ[0])}"
        raise does_not_fit(path, f"{len(differ)} of {len(expected)} tensors differ; {first}.")


def tensors_below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors whose names begin with the prefix, named without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def cpu_state(module: nn.Module) -> dict[str, Tensor]:
    """Copy of all weights of a module, on the CPU."""
    return {key: value.detach().cpu().clone() for key, value in module.state_dict().items()}


def json_columns(frame: pd.DataFrame) -> dict[str, list[Any]]:
    """Columns of a table as lists; NaN, which JSON does not know, becomes None."""
    return frame.astype(object).where(frame.notna(), None).to_dict(orient="list")


def save_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], history: list[dict[str, Any]], fingerprint: Mapping[str, Any]
) -> None:
    """Write the state of a training as one file, which an interruption leaves as it was or replaces as a whole.

    `history` has a row for each check of the held-out data. Of several processes with the same state only the first one
    writes.
    """
    if rank_and_size()[0]:
        return
    rows = [{key: None if v != v else v for key, v in row.items()} for row in history]  # NaN is no JSON
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    record = json.dumps({"fingerprint": fingerprint, "history": rows, "tensors_sha256": _tensor_hash(tensors)})
    note = f"Earlier results in {str(path.parent)!r} are unchanged; run the same call again to continue from them."
    _replace_files({path: save(tensors, {"record": record})}, note=note)


def _tensor_hash(tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(save(dict(tensors))).hexdigest()


def load_checkpoint(
    path: Path, fingerprint: Mapping[str, Any]
) -> tuple[dict[str, Tensor], list[dict[str, Any]]] | None:
    """Tensors and history of a training; None if there is no file.

    A file that is damaged or belongs to another training raises a ``ValueError``.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {}).get("record", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 -- no mapping
        digest = _tensor_hash(tensors)
        if record.get("tensors_sha256", digest) != digest:
            msg = "its numbers were changed"
            raise SafetensorError(msg)
    except (SafetensorError, RecursionError, ValueError) as error:
        msg = f"The checkpoint {str(path)!r} is damaged: {error}. Remove it to train again from the start."
        raise ValueError(msg) from error
    found, expected = record.get("fingerprint", {}), json.loads(json.dumps(fingerprint))
    if found != expected:
        differ = sorted(key for key in {*expected, *found} if expected.get(key) != found.get(key))
        msg = (
            f"The checkpoint in {str(path.parent)!r} belongs to another training: {differ} differ. "
            "Remove the directory, or pass another `checkpoint`."
        )
        raise ValueError(msg)
    logger.info("Read checkpoint %s", path)
    history = [{key: float("nan") if v is None else v for key, v in row.items()} for row in record["history"]]
    return tensors, history
