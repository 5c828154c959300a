"""Published weights: downloaded once and checked by sha256, or loaded by timm and transformers. Never unpickled."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from spatial_impute._io.files import fetch
from spatial_impute._settings import settings

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import ModuleType

_FOLDER = "weights"  # below settings.data_dir
# Errors of huggingface_hub for models whose licence must be accepted, or that need an account
_ACCESS_ERRORS = {"GatedRepoError", "RepositoryNotFoundError", "LocalTokenNotFoundError"}
_ACCESS_WORDS = ("gated", "401", "403", "restricted", "authenticated")

_Pretrained = tuple[nn.Module, int | None, tuple[float, ...], tuple[float, ...]]
"""Module, edge of its input in px, mean and standard deviation of its normalisation."""


@dataclass(frozen=True)
class WeightFile:
    """Published file of weights: its address, and the hash that its bytes must have."""

    name: str
    url: str
    sha256: str
    licence: str
    prefixes: tuple[str, ...] = ()  # Prefixes that a training framework added to the keys, removed in this order


def fetch_weights(file: WeightFile) -> Path:
    """Path of the file in ``settings.data_dir``; downloaded if missing, and refused if its sha256 is not the published one."""
    return fetch(
        file.name, folder=settings.data_dir / _FOLDER, sha256={file.name: file.sha256}, urls={file.name: file.url}
    )


def read_state(path: Path, *, prefixes: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Read the state dict of a ``.pth``, ``.ckpt`` or ``.safetensors`` file without running any code of the file.

    A checkpoint has it under ``"state_dict"``. `prefixes` are removed from the keys, in this order. A file that does not hold
    a mapping of names to tensors, or needs unpickling, raises a ``ValueError``.
    """
    if path.suffix == ".safetensors":
        found: object = load_file(path)
    else:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            if type(error).__name__ != "UnpicklingError":
                raise
            msg = (
                f"{path} holds more than tensors; reading it would run code from the file, so it is refused. "
                "Use a file with a plain state dict, preferably safetensors."
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
    """Load a state dict that must cover every tensor of the module.

    Keys that begin with `drop`, e.g. a classification head, are left out; `where` names the state dict in messages. Missing
    and unknown keys, and those of another shape, raise a ``ValueError``.
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


class ClassToken(nn.Module):
    """First (class) token of a transformers vision model, or the feature map of a convolutional one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(n, 3, y, x) to (n, n_features), or to (n, n_features, y, x), which the encoder averages."""
        tokens = self.model(pixel_values=pixel_values).last_hidden_state
        return tokens if tokens.ndim == 4 else tokens[:, 0]


def load_timm(name: str, params: dict[str, Any]) -> _Pretrained:
    """Load a pretrained timm model without its head; `name` may be ``hf-hub:owner/model``."""
    timm = _require_library("timm", name)
    try:
        module = timm.create_model(name, pretrained=True, **{"num_classes": 0, **params})
    except Exception as error:
        _explain_access(error, name)
        raise
    config = timm.data.resolve_model_data_config(module)
    return module, int(config["input_size"][-1]), tuple(config["mean"]), tuple(config["std"])


def load_transformers(name: str, params: dict[str, Any]) -> _Pretrained:
    """Load a pretrained transformers vision model ``owner/model``, from safetensors only."""
    transformers = _require_library("transformers", name)
    try:
        # Other formats of weights are pickles, which can run code.
        model = transformers.AutoModel.from_pretrained(
            name, **{"use_safetensors": True, "torch_dtype": torch.float32, **params}
        )
        processor = transformers.AutoImageProcessor.from_pretrained(name)
    except Exception as error:
        _explain_access(error, name)
        raise
    size = getattr(processor, "crop_size", None) or getattr(processor, "size", None) or {}
    edge = size.get("height") or size.get("shortest_edge")
    return ClassToken(model), edge, tuple(processor.image_mean), tuple(processor.image_std)


def _require_library(library: str, model: str) -> ModuleType:
    try:
        return importlib.import_module(library)
    except ImportError as error:
        msg = (
            f"Encoder '{library}:{model}' needs {library}, which is not installed. "
            "Run `pip install 'spatial-impute[encoders]'`, or use 'tellez-multitask' or 'texture', which need nothing."
        )
        raise ImportError(msg) from error


def _explain_access(error: Exception, name: str) -> None:
    """Raise a ``PermissionError`` with instructions if the model is gated; else return."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    denied = any(
        type(cause).__name__ in _ACCESS_ERRORS
        or (type(cause).__name__ in {"HfHubHTTPError", "OSError"} and any(w in str(cause) for w in _ACCESS_WORDS))
        for cause in causes
    )
    if denied:
        repository = name.removeprefix("hf-hub:").removeprefix("hf_hub:")
        msg = (
            f"Access to the weights of {name!r} was denied: the model is gated or does not exist. Accept its licence at "
            f"https://huggingface.co/{repository}, then run `hf auth login`, or set the variable HF_TOKEN."
        )
        raise PermissionError(msg) from error
