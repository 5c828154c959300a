"""Encoders: from square H&E patches to feature vectors. Protocol, registry by name, and the encoder without weights."""

from __future__ import annotations

import hashlib
import importlib
import itertools
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import numpy as np
from scipy.ndimage import gaussian_filter
from skimage.color import rgb2hed

from spatial_impute._io.workers import available_threads
from spatial_impute._validation import did_you_mean, require_device, require_one_of, require_positive

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager
    from types import ModuleType

    import torch

    _Loaded = tuple[torch.nn.Module, int | None, tuple[float, ...], tuple[float, ...]]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
ENCODERS = ("texture", "tellez-multitask", "efficientnet-lite2", "resnet18", "resnet50", "ciga-resnet18")
DEFAULT_PATCH_PX = 224  # networks for photographs, and most pathology networks, were trained on patches of this size
DEFAULT_MPP = 0.5  # 20x, the usual magnification of pathology encoders
PRECISIONS = ("float32", "bfloat16")
# Errors of huggingface_hub for models whose licence must be accepted, or that need an account
_ACCESS_ERRORS = {"GatedRepoError", "RepositoryNotFoundError", "LocalTokenNotFoundError"}
_ACCESS_WORDS = ("gated", "401", "403", "restricted", "authenticated")


@runtime_checkable
class Encoder(Protocol):
    """Interface of the encoders that :func:`~spatial_impute.pp.extract_features` takes.

    Two further members are optional. With ``step_px`` (int), ``slide(windows)`` encodes all patches of (n, y, x, 3)
    windows at that step, as (n, rows, columns, n_features). For networks with unpadded convolutions this costs far less
    than encoding patch by patch and gives the same result. With ``identity`` (str), results are kept and reused.

    Examples
    --------
    >>> import spatial_impute as si
    >>> class MeanColor:
    ...     name, mpp, patch_px = "mean-color", 2.0, 32
    ...
    ...     def __call__(self, patches):
    ...         return patches.mean(axis=(1, 2))
    >>> isinstance(MeanColor(), si.models.Encoder)
    True
    """

    name: str
    """Name written into the provenance of the features."""
    mpp: float
    """um per pixel of the patches."""
    patch_px: int
    """Edge length of the patches, in px."""

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        """Encode (n, patch_px, patch_px, 3) float32 in 0-255 as (n, n_features) float32.

        Colors are those of the scan. The encoder normalises them in the same way as in its training.
        """
        ...


class ModuleEncoder:
    """Encoder from any ``torch.nn.Module`` that maps (n, 3, y, x) to (n, n_features) or (n, n_features, y, x).

    `mean` and `std` normalise the input in 0-1. The default name is that of the class with a hash of its weights.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        patch_px: int,
        mpp: float,
        device: str,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        name: str | None = None,
        precision: str = "float32",
    ) -> None:
        self.module = module.eval().to(device)
        self.patch_px, self.mpp, self.device, self.precision = patch_px, mpp, device, precision
        self._mean, self._std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
        weights = weights_hash(module)
        self.name = f"{type(module).__name__}-{weights}" if name is None else name
        self.identity = f"{self.name}-{weights}-{precision}-{tuple(mean)}-{tuple(std)}"

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        """Encode (n, y, x, 3) in 0-255; feature maps are averaged over the patch."""
        import torch

        scaled = (np.asarray(patches, dtype=np.float32) / 255.0 - self._mean) / self._std
        tensor = torch.from_numpy(np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))).to(self.device)
        with torch.inference_mode(), autocast(tensor.device, self.precision):
            features = self.module(tensor)
        if features.ndim == 4:
            features = features.mean(dim=(2, 3))
        return features.float().cpu().numpy()


class CallableEncoder:
    """Encoder from any function of patches (n, y, x, 3) float32 in 0-255 that returns (n, n_features)."""

    # No `identity`: the content of a function is not known, so its results are never reused.

    def __init__(self, function: Callable[[np.ndarray], np.ndarray], *, patch_px: int, mpp: float) -> None:
        self.function = function
        self.patch_px, self.mpp = patch_px, mpp
        self.name = getattr(function, "__name__", type(function).__name__)

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        """Encode (n, y, x, 3) in 0-255."""
        return np.asarray(self.function(patches), dtype=np.float32)


class TextureEncoder:
    """``"texture"``: stain and texture statistics of a patch; needs no weights and no training.

    Hematoxylin, eosin :cite:p:`Ruifrok2001` and luminance are each described by mean, standard deviation, 10th and
    90th percentile, the energy of three octaves of detail, and the mean gradient. The correlation of the two stains is
    added, which makes 25 numbers. At 2 um per pixel a nucleus is 3 to 5 px wide. The octaves show nuclei, their spacing,
    and small groups.
    """

    name = "texture"
    identity = "texture-2"  # must change whenever the numbers change
    mpp = 2.0
    patch_px = 32

    _SCALES = (1.0, 2.0, 4.0)  # px; the difference of two successive blurs is one octave
    _BLOCK = 32  # patches at a time: their arrays stay in the cache of a core, so that threads do not wait for memory

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        """Encode (n, y, x, 3) in 0-255 as (n, 25)."""
        blocks = np.array_split(patches, max(1, len(patches) // self._BLOCK))
        with ThreadPoolExecutor(min(available_threads(), len(blocks))) as pool:
            return np.concatenate(list(pool.map(self._encode, blocks)))

    def _encode(self, patches: np.ndarray) -> np.ndarray:
        scaled = np.clip(np.asarray(patches, dtype=np.float32), 0, 255) / 255.0
        stains = rgb2hed(scaled)
        # (n, 3, y, x): sums over a patch then run over contiguous memory.
        channels = np.stack([stains[..., 0], stains[..., 1], scaled.mean(axis=-1)], axis=1).astype(np.float32)
        blurs = [channels] + [gaussian_filter(channels, (0, 0, s, s), mode="nearest") for s in self._SCALES]
        gradient = np.hypot(np.diff(blurs[1], axis=2)[..., 1:], np.diff(blurs[1], axis=3)[:, :, 1:])
        flat = channels.reshape(*channels.shape[:2], -1)  # (n, 3, pixels)
        low, high = np.percentile(flat, [10, 90], axis=2)
        centred = flat - flat.mean(axis=2, keepdims=True)
        spread = centred.std(axis=2)
        covariance = (centred[:, 0] * centred[:, 1]).mean(axis=1)
        correlation = covariance / np.maximum(spread[:, 0] * spread[:, 1], 1e-8)
        octaves = [(a - b).reshape(flat.shape).std(axis=2) for a, b in itertools.pairwise(blurs)]
        parts = [flat.mean(axis=2), spread, low, high, *octaves, gradient.mean(axis=(2, 3)), correlation[:, None]]
        return np.concatenate(parts, axis=1).astype(np.float32)


def resolve_encoder(
    encoder: object,
    *,
    patch_px: int | None = None,
    mpp: float | None = None,
    device: str | None = None,
    precision: str = "float32",
    params: Mapping[str, Any] | None = None,
) -> Encoder:
    """Turn the `encoder` argument of a public function (name, module, callable, or an encoder) into an :class:`Encoder`.

    `patch_px` and `mpp` are by default those of the encoder, or 224 and 0.5. `device` and `precision` are for modules,
    `params` for the library that makes a ``"timm:"`` or ``"transformers:"`` encoder.
    """
    require_one_of(precision, PRECISIONS, name="precision")
    if mpp is not None:
        mpp = require_positive(mpp, name="mpp", unit="um per pixel")
    if patch_px is not None and (patch_px != int(patch_px) or patch_px < 1):
        msg = f"`patch_px` must be a whole number of pixels above 0, found {patch_px!r}."
        raise ValueError(msg)

    def from_module(module: torch.nn.Module, own_px: int | None = None, **options: Any) -> ModuleEncoder:
        options |= {"patch_px": patch_px or own_px or DEFAULT_PATCH_PX, "mpp": mpp or DEFAULT_MPP}
        return ModuleEncoder(module, device=require_device(device), precision=precision, **options)

    found = _by_name(encoder, device, params or {}, from_module) if isinstance(encoder, str) else encoder
    if isinstance(found, Encoder):
        return _require_own_size(found, patch_px, mpp)
    if hasattr(found, "state_dict") and hasattr(found, "forward"):  # an nn.Module, without importing torch
        return from_module(cast("torch.nn.Module", found))
    if callable(found):
        return CallableEncoder(found, patch_px=patch_px or DEFAULT_PATCH_PX, mpp=mpp or DEFAULT_MPP)
    msg = f"`encoder` must be a name, a callable or an nn.Module, found {type(encoder).__name__}."
    raise TypeError(msg)


def _by_name(
    name: str, device: str | None, params: Mapping[str, Any], from_module: Callable[..., ModuleEncoder]
) -> Encoder:
    require_encoder_name(name)
    if name == TextureEncoder.name:
        return TextureEncoder()
    from spatial_impute.encoders._networks import LITE_MEAN, LITE_STD, TellezEncoder, load_efficientnet, load_resnet

    if name == "tellez-multitask":
        return TellezEncoder(require_device(device))
    if name in ("ciga-resnet18", "resnet18", "resnet50"):
        return from_module(load_resnet(name), name=name)
    if name == "efficientnet-lite2":
        return from_module(load_efficientnet(), name=name, mean=LITE_MEAN, std=LITE_STD)
    library, _, model = name.partition(":")
    load = _load_timm if library == "timm" else _load_transformers  # `require_encoder_name` lets no other name pass
    module, own_px, mean, std = load(model, dict(params))
    return from_module(module, own_px, name=name, mean=mean, std=std)


def _load_timm(name: str, params: dict[str, Any]) -> _Loaded:
    """Pretrained timm model without its head, edge of its input in px, mean and standard deviation of its normalisation.

    `name` may be ``hf-hub:owner/model``.
    """
    timm = _require_library("timm", name)
    try:
        module = timm.create_model(name, pretrained=True, **{"num_classes": 0, **params})
    except Exception as error:
        _explain_access(error, name)
        raise
    config = timm.data.resolve_model_data_config(module)
    return module, int(config["input_size"][-1]), tuple(config["mean"]), tuple(config["std"])


def _load_transformers(name: str, params: dict[str, Any]) -> _Loaded:
    """As :func:`_load_timm`, for a transformers vision model ``owner/model``; from safetensors only."""
    import torch

    from spatial_impute.encoders._networks import ClassToken

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


def require_encoder_name(name: str) -> None:
    """Raise a ``ValueError`` unless this is the name of an encoder; nothing is loaded."""
    library, _, model = name.partition(":")
    if name in ENCODERS or (library in ("timm", "transformers") and model):
        return
    hint = (
        f" Did you mean 'timm:hf-hub:{name}' or 'transformers:{name}'?" if "/" in name else did_you_mean(name, ENCODERS)
    )
    msg = (
        f"Unknown encoder {name!r}; available by name: {sorted(ENCODERS)}, and 'timm:NAME' and 'transformers:NAME'.{hint} Or pass a "
        "callable or nn.Module."
    )
    raise ValueError(msg)


def _require_own_size(encoder: Encoder, patch_px: int | None, mpp: float | None) -> Encoder:
    """Refuse sizes that differ from the fixed sizes of an encoder."""
    for argument, value in {"patch_px": patch_px, "mpp": mpp}.items():
        own = getattr(encoder, argument)
        if value is not None and value != own:
            msg = f"Encoder {encoder.name!r} takes `{argument}={own}`, found {value!r}; leave the argument out."
            raise ValueError(msg)
    return encoder


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Context in which layers compute in this precision, one of :data:`PRECISIONS`."""
    import torch

    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bfloat16" else nullcontext()


def weights_hash(module: torch.nn.Module) -> str:
    """Hash of all weights of a module, 12 characters."""
    digest = hashlib.sha256()
    for key, tensor in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(np.ascontiguousarray(tensor.detach().cpu().float().numpy()).tobytes())
    return digest.hexdigest()[:12]
