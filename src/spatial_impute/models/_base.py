"""Model directories: ``config.json`` and ``model.safetensors``. Nothing is ever unpickled."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
_FORMAT = 1


def save_directory(
    path: str | Path, *, kind: str, config: dict[str, Any], tensors: dict[str, Tensor], overwrite: bool
) -> None:
    """Write a model directory.

    Raises
    ------
    FileExistsError
        If there is something at `path` and `overwrite` is False.
    """
    from safetensors.torch import save_file

    path = Path(path)
    if path.exists() and not overwrite:
        msg = f"{str(path)!r} exists; pass `overwrite=True` to replace the model in it."
        raise FileExistsError(msg)
    path.mkdir(parents=True, exist_ok=True)
    header = {"format": _FORMAT, "class": kind, "package_version": version("spatial-impute")}
    text = json.dumps(header | config, indent=1)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path / WEIGHTS)
    (path / CONFIG).write_text(text)


def load_directory(path: str | Path, *, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
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
        return config, load_file(path / WEIGHTS)
    except SafetensorError as error:
        msg = f"{str(path / WEIGHTS)!r} is damaged: {error}."
        raise ValueError(msg) from error
