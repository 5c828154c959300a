"""Encoders: from square H&E patches to feature vectors."""

from __future__ import annotations

import hashlib
import itertools
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


@runtime_checkable
class Encoder(Protocol):
    """What :func:`~spatial_impute.pp.extract_features` asks of an encoder."""

    name: str
    """Identity written into the provenance of the features."""
    patch_px: int
    """Edge length of the patches it takes, in px."""

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        """Encode (n, patch_px, patch_px, 3) float32 in 0-255 as (n, n_features) float32."""
        ...


class TextureEncoder:
    """Stain and texture statistics of a patch; needs no weights and no training.

    Hematoxylin, eosin :cite:p:`Ruifrok2001` and luminance are each described by mean, standard deviation, 10th and
    90th percentile, the energy of three octaves of detail, and the mean gradient; added is the correlation of the two
    stains. 25 numbers in all.
    """

    name = "texture"
    patch_px = 64

    _SCALES = (1.0, 2.0, 4.0)  # px; differences of neighbouring blurs are one octave each

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        """Encode (n, y, x, 3) in 0-255 as (n, 25)."""
        from scipy.ndimage import gaussian_filter
        from skimage.color import rgb2hed

        scaled = np.clip(np.asarray(patches, dtype=np.float32), 0, 255) / 255.0
        stains = rgb2hed(scaled)
        # (n, 3, y, x): sums over a patch then run over contiguous memory.
        channels = np.stack([stains[..., 0], stains[..., 1], scaled.mean(axis=-1)], axis=1).astype(np.float32)
        blurs = [channels] + [gaussian_filter(channels, (0, 0, s, s), mode="nearest") for s in self._SCALES]
        gradient = np.hypot(np.diff(blurs[1], axis=2)[..., 1:], np.diff(blurs[1], axis=3)[:, :, 1:])
        flat = channels.reshape(*channels.shape[:2], -1)  # (n, 3, pixels)
        low, high = np.percentile(flat[..., ::4], [10, 90], axis=2)  # every fourth pixel: 1024 of them settle it
        centred = flat - flat.mean(axis=2, keepdims=True)
        spread = centred.std(axis=2)
        together = (centred[:, 0] * centred[:, 1]).mean(axis=1)
        bands = [(a - b).reshape(flat.shape).std(axis=2) for a, b in itertools.pairwise(blurs)]
        return np.concatenate(
            [
                flat.mean(axis=2),
                spread,
                low,
                high,
                *bands,
                gradient.mean(axis=(2, 3)),
                (together / np.maximum(spread[:, 0] * spread[:, 1], 1e-8))[:, None],
            ],
            axis=1,
        ).astype(np.float32)


class ModuleEncoder:
    """Any ``torch.nn.Module`` that maps (n, 3, y, x) to (n, n_features) or (n, n_features, y, x).

    Parameters
    ----------
    module
        The network; it is put into evaluation mode.
    patch_px
        Edge length of its input in px.
    device
        Torch device.
    mean, std
        Normalisation of the input in 0-1, by default that of ImageNet.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        patch_px: int,
        device: str,
        mean: tuple[float, float, float] = _IMAGENET_MEAN,
        std: tuple[float, float, float] = _IMAGENET_STD,
    ) -> None:
        self.module = module.eval().to(device)
        self.patch_px = patch_px
        self.device = device
        self._mean, self._std = np.float32(mean), np.float32(std)
        self.name = f"{type(module).__name__}-{_weights_hash(module)}"

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        """Encode (n, y, x, 3) in 0-255; feature maps are averaged over the patch."""
        import torch

        scaled = (np.asarray(patches, dtype=np.float32) / 255.0 - self._mean) / self._std
        with torch.inference_mode():
            tensor = torch.from_numpy(np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))).to(self.device)
            features = self.module(tensor).float()
        if features.ndim == 4:
            features = features.mean(dim=(2, 3))
        return features.cpu().numpy()


class CallableEncoder:
    """Any function of patches (n, y, x, 3) float32 in 0-255 that returns (n, n_features)."""

    def __init__(self, function: Callable[[np.ndarray], np.ndarray], *, patch_px: int) -> None:
        self.function = function
        self.patch_px = patch_px
        self.name = getattr(function, "__name__", type(function).__name__)

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        """Encode (n, y, x, 3) in 0-255."""
        return np.asarray(self.function(patches), dtype=np.float32)


def resolve_encoder(encoder: object, *, patch_px: int, device: str | None) -> Encoder:
    """Turn the `encoder` argument of a public function into an :class:`Encoder`.

    Raises
    ------
    ValueError
        For unknown names.
    TypeError
        For what is neither a name, a module nor a callable.
    """
    if isinstance(encoder, str):
        if encoder == TextureEncoder.name:
            return TextureEncoder()
        if encoder == "tellez-multitask":
            from spatial_impute._settings import settings
            from spatial_impute.models._tellez import TellezEncoder

            return TellezEncoder(device or settings.device)
        msg = (
            f"Unknown encoder {encoder!r}; available by name: ['tellez-multitask', 'texture']. "
            "Or pass a callable or nn.Module."
        )
        raise ValueError(msg)
    if isinstance(encoder, Encoder):
        return encoder
    if hasattr(encoder, "state_dict") and hasattr(encoder, "forward"):  # an nn.Module, without importing torch
        from spatial_impute._settings import settings

        return ModuleEncoder(encoder, patch_px=patch_px, device=device or settings.device)
    if callable(encoder):
        return CallableEncoder(encoder, patch_px=patch_px)
    msg = f"`encoder` must be a name, a callable or an nn.Module, found {type(encoder).__name__}."
    raise TypeError(msg)


def _weights_hash(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for key, tensor in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(np.ascontiguousarray(tensor.detach().cpu().float().numpy()).tobytes())
    return digest.hexdigest()[:12]
