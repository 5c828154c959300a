"""Encoders: from square H&E patches to feature vectors."""

from __future__ import annotations

import hashlib
import os
import sys
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from spatial_impute._validation import require_device, require_one_of, require_positive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import torch

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DEFAULT_PATCH_PX = 224  # what networks for photographs, and most pathology networks, were trained on
DEFAULT_MPP = 0.5  # 20x, the usual magnification of pathology encoders
PRECISIONS = ("float32", "bfloat16")


@runtime_checkable
class Encoder(Protocol):
    """What :func:`~spatial_impute.pp.extract_features` asks of an encoder.

    Two further members are optional. With ``step_px`` (int), ``slide(windows)`` encodes all patches of
    (n, y, x, 3) windows at that step, as (n, rows, columns, n_features): for networks of unpadded convolutions it costs
    far less than patch by patch and gives the same. With ``identity`` (str), results are kept and reused.

    Examples
    --------
    >>> import spatial_impute as si
    >>> class Colour:
    ...     name, mpp, patch_px, dense = "colour", 2.0, 32, False
    ...
    ...     def __call__(self, patches):
    ...         return patches.mean(axis=(1, 2))
    >>> isinstance(Colour(), si.models.Encoder)
    True
    """

    name: str
    """Name written into the provenance of the features."""
    mpp: float
    """um per pixel of the patches."""
    patch_px: int
    """Edge length of the patches, in px."""
    dense: bool
    """Whether ``pyramid`` gives maps of features: (n, y, x, 3) in 0-255 to a list of (n, channels, y, x)."""

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        """Encode (n, patch_px, patch_px, 3) float32 in 0-255 as (n, n_features) float32.

        Colours come as they are in the scan; the encoder normalises them as it was trained.
        """
        ...


class ModuleEncoder:
    """Any ``torch.nn.Module`` that maps (n, 3, y, x) to (n, n_features) or (n, n_features, y, x).

    Parameters
    ----------
    module
        The network; it is put into evaluation mode.
    patch_px, mpp
        Edge length of its input in px, and um per pixel.
    device
        Torch device.
    mean, std
        Normalisation of the input in 0-1, by default that of ImageNet.
    name
        Name; by default that of the class with a hash of its weights.
    precision
        ``"float32"`` or ``"bfloat16"`` (mixed precision).
    """

    step_px = None

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
        self._mean, self._std = np.float32(mean), np.float32(std)
        weights = _weights_hash(module)
        self.name = f"{type(module).__name__}-{weights}" if name is None else name
        self.identity = f"{self.name}-{weights}-{precision}-{tuple(mean)}-{tuple(std)}"
        self.dense = hasattr(module, "pyramid")

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        """Encode (n, y, x, 3) in 0-255; feature maps are averaged over the patch."""
        features = self._run(self.module, patches)
        if features.ndim == 4:
            features = features.mean(dim=(2, 3))
        return features.float().cpu().numpy()

    def pyramid(self, patches: np.ndarray) -> list[np.ndarray]:
        """Maps (n, channels, y, x) of (n, y, x, 3) in 0-255, finest first; for modules that have such a method."""
        return [level.float().cpu().numpy() for level in self._run(self.module.pyramid, patches)]

    def _run(self, function: Callable[[torch.Tensor], Any], patches: np.ndarray) -> Any:
        import torch

        scaled = (np.asarray(patches, dtype=np.float32) / 255.0 - self._mean) / self._std
        tensor = torch.from_numpy(np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))).to(self.device)
        mixed = torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16)
        with torch.inference_mode(), mixed if self.precision == "bfloat16" else nullcontext():
            return function(tensor)


class CallableEncoder:
    """Any function of patches (n, y, x, 3) float32 in 0-255 that returns (n, n_features)."""

    dense = False
    step_px = None

    def __init__(self, function: Callable[[np.ndarray], np.ndarray], *, patch_px: int, mpp: float) -> None:
        self.function = function
        self.patch_px, self.mpp = patch_px, mpp
        self.name = getattr(function, "__name__", type(function).__name__)
        # What a function does cannot be told from outside, so nothing of it is reused.

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        """Encode (n, y, x, 3) in 0-255."""
        return np.asarray(self.function(patches), dtype=np.float32)


def resolve_encoder(
    encoder: object,
    *,
    patch_px: int | None = None,
    mpp: float | None = None,
    device: str | None = None,
    precision: str = "float32",
    params: Mapping[str, Any] | None = None,
) -> Encoder:
    """Turn the `encoder` argument of a public function into an :class:`Encoder`.

    Parameters
    ----------
    encoder
        Name, module, callable, or an encoder.
    patch_px, mpp
        Size of the patches in px, um per pixel; those of the encoder by default, 224 and 0.5 where it has none.
    device
        Torch device; ``settings.device`` by default.
    precision
        Of modules, ``"float32"`` or ``"bfloat16"``.
    params
        Further arguments for the library that makes a ``"timm:"`` or ``"transformers:"`` encoder.

    Raises
    ------
    ValueError
        For unknown names.
    TypeError
        For what is neither a name, a module nor a callable.
    ImportError
        If the library of a ``"timm:"`` or ``"transformers:"`` encoder is not installed.
    """
    require_one_of(precision, PRECISIONS, name="precision")
    if mpp is not None:
        mpp = require_positive(mpp, name="mpp", unit="um per pixel")
    if patch_px is not None and (patch_px != int(patch_px) or patch_px < 1):
        msg = f"`patch_px` must be a whole number of pixels above 0, found {patch_px!r}."
        raise ValueError(msg)
    sizes = {"patch_px": patch_px or DEFAULT_PATCH_PX, "mpp": mpp or DEFAULT_MPP}
    if isinstance(encoder, str):
        return _by_name(encoder, patch_px=patch_px, mpp=mpp, device=device, precision=precision, params=params)
    if isinstance(encoder, Encoder):
        return _require_own_size(encoder, patch_px, mpp)
    if hasattr(encoder, "state_dict") and hasattr(encoder, "forward"):  # an nn.Module, without importing torch
        return ModuleEncoder(encoder, device=_device(device), precision=precision, **sizes)
    if callable(encoder):
        return CallableEncoder(encoder, **sizes)
    msg = f"`encoder` must be a name, a callable or an nn.Module, found {type(encoder).__name__}."
    raise TypeError(msg)


@contextmanager
def requested_threads() -> Iterator[None]:
    """Run torch on as many threads as ``OMP_NUM_THREADS`` asks for: other libraries reset that when imported.

    On a shared machine, more threads than cores that are free wait for each other and take ten times as long.
    """
    torch, wanted = sys.modules.get("torch"), os.environ.get("OMP_NUM_THREADS", "")
    if torch is None or not wanted.isdigit() or wanted == "0":
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(int(wanted))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _by_name(
    name: str,
    *,
    patch_px: int | None,
    mpp: float | None,
    device: str | None,
    precision: str,
    params: Mapping[str, Any] | None,
) -> Encoder:
    from spatial_impute.encoders._texture import TextureEncoder

    sizes = {"patch_px": patch_px or DEFAULT_PATCH_PX, "mpp": mpp or DEFAULT_MPP}
    if name == TextureEncoder.name:
        return _require_own_size(TextureEncoder(), patch_px, mpp)
    if name == "tellez-multitask":
        from spatial_impute.encoders._tellez import TellezEncoder

        return _require_own_size(TellezEncoder(_device(device)), patch_px, mpp)
    if name in ("ciga-resnet18", "resnet18", "resnet50"):
        from spatial_impute.encoders._resnet import load_resnet

        return ModuleEncoder(load_resnet(name), name=name, device=_device(device), precision=precision, **sizes)
    library, _, model = name.partition(":")
    if library in ("timm", "transformers") and model:
        from spatial_impute.encoders._zoo import load_timm, load_transformers

        load = load_timm if library == "timm" else load_transformers
        module, own_px, mean, std = load(model, dict(params or {}))
        sizes["patch_px"] = patch_px or own_px or DEFAULT_PATCH_PX
        return ModuleEncoder(
            module, name=name, mean=mean, std=std, device=_device(device), precision=precision, **sizes
        )
    msg = (
        f"Unknown encoder {name!r}; available by name: ['ciga-resnet18', 'resnet18', 'resnet50', 'tellez-multitask', "
        "'texture'], and 'timm:NAME' and 'transformers:NAME'. Or pass a callable or nn.Module."
    )
    raise ValueError(msg)


def _require_own_size(encoder: Encoder, patch_px: int | None, mpp: float | None) -> Encoder:
    """Refuse sizes that differ from those an encoder comes with."""
    for argument, value in {"patch_px": patch_px, "mpp": mpp}.items():
        own = getattr(encoder, argument)
        if value is not None and value != own:
            msg = f"Encoder {encoder.name!r} takes `{argument}={own}`, found {value!r}; leave the argument out."
            raise ValueError(msg)
    return encoder


def _device(device: str | None) -> str:
    return require_device(device)


def _weights_hash(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for key, tensor in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(np.ascontiguousarray(tensor.detach().cpu().float().numpy()).tobytes())
    return digest.hexdigest()[:12]
