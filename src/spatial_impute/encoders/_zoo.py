"""Encoders of timm and transformers: loaded with their own normalisation, or a message that says what is missing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from types import ModuleType

# huggingface_hub's errors for models whose licence must be accepted, or that need an account
_ACCESS_ERRORS = {"GatedRepoError", "RepositoryNotFoundError", "LocalTokenNotFoundError"}
_ACCESS_WORDS = ("gated", "401", "403", "restricted", "authenticated")

_Loaded = tuple[nn.Module, int | None, tuple[float, ...], tuple[float, ...]]


class ClassToken(nn.Module):
    """Summary of a transformers vision model: its pooled output, or the class token where it has none."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(n, 3, y, x) to (n, n_features)."""
        tokens = self.model(pixel_values=pixel_values).last_hidden_state
        # Convolutional models give maps (n, c, y, x), which are averaged later.
        return tokens if tokens.ndim == 4 else tokens[:, 0]


def load_timm(name: str, params: dict[str, Any]) -> _Loaded:
    """Load a pretrained timm model without its head.

    Parameters
    ----------
    name
        Name in timm, or ``hf-hub:owner/model``.
    params
        Further arguments of ``timm.create_model``.

    Returns
    -------
    Module, edge of its input in px, mean and standard deviation of its normalisation.
    """
    timm = _require_library("timm", name)
    try:
        module = timm.create_model(name, pretrained=True, **{"num_classes": 0, **params})
    except Exception as error:
        _explain_access(error, name)
        raise
    config = timm.data.resolve_model_data_config(module)
    return module, int(config["input_size"][-1]), tuple(config["mean"]), tuple(config["std"])


def load_transformers(name: str, params: dict[str, Any]) -> _Loaded:
    """Load a pretrained transformers vision model, from safetensors only.

    Parameters
    ----------
    name
        ``owner/model``.
    params
        Further arguments of ``AutoModel.from_pretrained``.

    Returns
    -------
    Module, edge of its input in px, mean and standard deviation of its normalisation.
    """
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
            "Run `pip install 'spatial-impute[encoders]'`, or take 'tellez-multitask' or 'texture', which need nothing."
        )
        raise ImportError(msg) from error


def _explain_access(error: Exception, name: str) -> None:
    """Raise a ``PermissionError`` with the way out if the model is gated; else return."""
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
