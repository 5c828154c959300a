"""Model directories: ``config.json`` and ``model.safetensors``. Nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import Tensor, nn

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
_FORMAT = 1
_HASH = "weights_sha256"


def save_directory(
    path: str | Path, *, kind: str, config: dict[str, Any], tensors: dict[str, Tensor], overwrite: bool
) -> None:
    """Write a model directory.

    Raises
    ------
    FileExistsError
        If there is something at `path` and `overwrite` is False.
    """
    from safetensors.torch import save

    path = Path(path)
    is_new = not path.exists()
    if not is_new and not overwrite:
        msg = f"{str(path)!r} exists; pass `overwrite=True` to replace the model in it."
        raise FileExistsError(msg)
    weights = save({key: value.contiguous() for key, value in tensors.items()})
    header = {"format": _FORMAT, "class": kind, "package_version": version("spatial-impute")}
    text = json.dumps(header | config | {_HASH: hashlib.sha256(weights).hexdigest()}, indent=1)
    path.mkdir(parents=True, exist_ok=True)
    fresh = {name: path / f"{name}.new" for name in (WEIGHTS, CONFIG)}
    try:
        fresh[WEIGHTS].write_bytes(weights)
        fresh[CONFIG].write_text(text)
    except BaseException as error:  # also Ctrl-C: a model that was there stays as it was
        for file in fresh.values():
            file.unlink(missing_ok=True)
        if is_new:
            path.rmdir()
        if isinstance(error, OSError):
            error.add_note(f"The model was not saved; what was in {str(path)!r} before is unchanged.")
        raise
    # Killed between these two, the hash tells that the weights are not those of the configuration.
    for name, file in fresh.items():
        file.replace(path / name)


def load_directory(path: str | Path, *, kind: str) -> tuple[Config, dict[str, Tensor]]:
    """Read a model directory.

    Raises
    ------
    FileNotFoundError
        If one of the two files is missing.
    ValueError
        If they hold something else than a model of this class and format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            msg = f"No {name} in {str(path)!r}; expected a directory written by `{kind}.save`."
            raise FileNotFoundError(msg)
    try:
        config = json.loads((path / CONFIG).read_text())
    except json.JSONDecodeError as error:
        msg = f"{str(path / CONFIG)!r} is not valid JSON: {error}."
        raise ValueError(msg) from error
    found = (config.get("class"), config.get("format")) if isinstance(config, dict) else (None, None)
    if found != (kind, _FORMAT):
        msg = f"{str(path)!r} holds class {found[0]!r}, format {found[1]!r}; expected {kind!r}, format {_FORMAT}."
        raise ValueError(msg)
    try:
        tensors = load_file(path / WEIGHTS)
    except SafetensorError as error:
        msg = f"{str(path / WEIGHTS)!r} is damaged: {error}."
        raise ValueError(msg) from error
    with (path / WEIGHTS).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if config.get(_HASH, found) != found:
        msg = (
            f"{WEIGHTS} in {str(path)!r} is not the one that {CONFIG} was saved with: saving was interrupted, or a file "
            "was changed. Save the model again."
        )
        raise ValueError(msg)
    return Config(config, path), tensors


class Config(dict):
    """Content of ``config.json``, which says what is missing from it."""

    def __init__(self, content: dict[str, Any], path: Path) -> None:
        super().__init__(content)
        self.path = path

    def __missing__(self, key: str) -> NoReturn:
        msg = f"{CONFIG} in {str(self.path)!r} lacks {key!r}; it has {sorted(self)}. Was it written by another version?"
        raise ValueError(msg)


def does_not_fit(path: str | Path, reason: object) -> ValueError:
    """What to raise for weights that are not those of the configuration."""
    return ValueError(f"The weights in {str(path)!r} do not fit their configuration: {reason}")


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Whatever a configuration is wrong about, say which one it is."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise does_not_fit(path, error) from error


def load_params(cls: type, config: Config) -> Any:
    """Settings of a model, checked by their class."""
    return cls(**config["params"])


def require_shapes(
    path: str | Path, build: Callable[[], nn.Module], state: Mapping[str, Tensor], sizes: Iterable[object]
) -> None:
    """Check the weights against the network of the configuration before memory is taken for it.

    Parameters
    ----------
    path
        Model directory, for messages.
    build
        Makes the network; called on torch's meta device, where nothing is allocated.
    state
        Its weights.
    sizes
        Numbers the configuration gives. Each is the size of some tensor, or counts layers that have some.

    Raises
    ------
    ValueError
        If names or shapes differ.
    """
    import torch

    total = sum(tensor.numel() for tensor in state.values())
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= total:
            raise does_not_fit(path, f"found the size {size!r} where the file holds {total} numbers in all.")
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
