"""Weights that others published: downloaded once, checked by sha256, read without unpickling, loaded whole or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from spatial_impute._io.download import fetch
from spatial_impute._settings import settings

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_FOLDER = "weights"  # below settings.data_dir


@dataclass(frozen=True)
class WeightFile:
    """Where a file of weights is published, and what its bytes must hash to."""

    name: str
    url: str
    sha256: str
    licence: str
    prefixes: tuple[str, ...] = ()
    """Beginnings of the keys that a training framework added, taken off in this order."""


def fetch_weights(file: WeightFile) -> Path:
    """Path of the file in ``settings.data_dir``; downloaded where missing.

    Raises
    ------
    ConnectionError
        If the file cannot be downloaded.
    ValueError
        If the bytes that came do not have the published sha256.
    """
    return fetch(
        file.name, folder=settings.data_dir / _FOLDER, sha256={file.name: file.sha256}, urls={file.name: file.url}
    )


def read_state(path: Path, *, prefixes: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """State dict of a ``.pth``/``.ckpt`` or ``.safetensors`` file, without running anything the file contains.

    Parameters
    ----------
    path
        File that holds a state dict, or a checkpoint with one under ``"state_dict"``.
    prefixes
        Beginnings of the keys to take off, in this order.

    Raises
    ------
    ValueError
        If the file holds something else than a mapping of names to tensors, or needs unpickling to read.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        found: object = load_file(path)
    else:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            if type(error).__name__ != "UnpicklingError":
                raise
            msg = (
                f"{path} holds more than tensors; reading it would run code from the file, so it is refused. "
                "Take a file that stores a plain state dict, best as safetensors."
            )
            raise ValueError(msg) from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        msg = f"{path} must hold a state dict (names to tensors), found {type(found).__name__}."
        raise ValueError(msg)
    state = {}
    for key, value in found.items():
        for prefix in prefixes:
            key = key.removeprefix(prefix)
        state[key] = value
    return state


def load_whole_state(module: nn.Module, state: Mapping[str, Tensor], *, drop: tuple[str, ...], where: str) -> None:
    """Load a state dict that covers every tensor of the module; nothing is left at its random start.

    Parameters
    ----------
    module
        Network to fill.
    state
        Names to tensors.
    drop
        Beginnings of keys that are not wanted, e.g. a classification head.
    where
        What to call the state dict in messages.

    Raises
    ------
    ValueError
        If keys are missing, unknown, or of another shape; all kinds are listed.
    """
    expected = module.state_dict()
    kept = {key: value for key, value in state.items() if not key.startswith(drop)} if drop else dict(state)
    # Counters of batch normalisation: older files lack them, and evaluation never reads them.
    counters = {key for key in expected if key.endswith("num_batches_tracked")}
    missing = sorted(set(expected) - set(kept) - counters)
    unknown = sorted(set(kept) - set(expected))
    reshaped = [
        f"{key} {tuple(kept[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in sorted(set(kept) & set(expected))
        if kept[key].shape != expected[key].shape
    ]
    if missing or unknown or reshaped:
        msg = (
            f"{where} does not fit {type(module).__name__}: {len(missing)} of {len(expected)} tensors missing "
            f"{missing[:5]}, {len(unknown)} unknown {unknown[:5]}, {len(reshaped)} of another shape {reshaped[:5]}. "
            "A partly loaded network would give noise, so nothing was loaded."
        )
        raise ValueError(msg)
    module.load_state_dict({**{key: expected[key] for key in counters}, **kept})
