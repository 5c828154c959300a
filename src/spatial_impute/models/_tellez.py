"""Multitask pathology encoder of Tellez et al. 2020, rebuilt in torch from its published weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from spatial_impute._settings import settings

if TYPE_CHECKING:
    import h5py

_FILE = "encoder_multitask-4.h5"
_URL = (
    "https://raw.githubusercontent.com/davidtellez/neural-image-compression/"
    f"2f2e9ca71c53d97c415dede7c1afe91434bc4550/models/encoders_patches_pathology/{_FILE}"
)
_SHA256 = "714684a5aacbc4b2dc3718db5e91f4222ffbcdaa7df81d6daa31a006a9a1da0b"
_WIDTH = 128
_N_BLOCKS = 4


class TellezNetwork(nn.Module):
    """Four strided convolutions and a dense layer: (n, 3, 64, 64) in -1 to 1 -> (n, 128)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Conv2d(3 if i == 0 else _WIDTH, _WIDTH, 3, stride=2),
                    nn.LeakyReLU(0.2),
                    nn.BatchNorm2d(_WIDTH, eps=1e-3),
                )
                for i in range(_N_BLOCKS)
            ]
        )
        self.encoded = nn.Linear(3 * 3 * _WIDTH, _WIDTH)

    def forward(self, patches: Tensor) -> Tensor:
        """Encode patches; the published dense layer flattens by row, column, channel."""
        for block in self.blocks:
            patches = block(patches)
        return self.encoded(patches.permute(0, 2, 3, 1).flatten(1))


class TellezEncoder:
    """``"tellez-multitask"``: histopathology encoder trained at 1 um per pixel :cite:p:`Tellez2020`; 128 features.

    The weights (2.4 MB) are downloaded once and checked by sha256.
    """

    name = "tellez-multitask"
    patch_px = 64

    def __init__(self, device: str) -> None:
        import h5py

        self.device = device
        network = TellezNetwork()
        with h5py.File(_fetch(), "r") as file:
            network.load_state_dict(_read_weights(file["model_weights"]))
        self.network = network.eval().to(device)

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        """Encode (n, 64, 64, 3) in 0-255 as (n, 128)."""
        scaled = np.asarray(patches, dtype=np.float32).transpose(0, 3, 1, 2) / 127.5 - 1.0
        with torch.inference_mode():
            return self.network(torch.from_numpy(np.ascontiguousarray(scaled)).to(self.device)).cpu().numpy()


def _fetch() -> Path:
    import pooch

    cache = pooch.create(
        path=settings.data_dir / "weights", base_url="", registry={_FILE: f"sha256:{_SHA256}"}, urls={_FILE: _URL}
    )
    return Path(cache.fetch(_FILE, progressbar=settings.show_progress_bar))


def _read_weights(group: h5py.Group) -> dict[str, Tensor]:
    """State dict from the arrays of the Keras file; kernels there are (y, x, in, out)."""

    def array(layer: str, name: str) -> np.ndarray:
        return np.asarray(group[layer][layer][f"{name}:0"])

    state = {}
    for i in range(_N_BLOCKS):
        convolution, norm = f"conv2d_{i + 1}", f"batch_normalization_{i + 1}"
        state[f"blocks.{i}.0.weight"] = array(convolution, "kernel").transpose(3, 2, 0, 1)
        state[f"blocks.{i}.0.bias"] = array(convolution, "bias")
        state[f"blocks.{i}.2.weight"] = array(norm, "gamma")
        state[f"blocks.{i}.2.bias"] = array(norm, "beta")
        state[f"blocks.{i}.2.running_mean"] = array(norm, "moving_mean")
        state[f"blocks.{i}.2.running_var"] = array(norm, "moving_variance")
        state[f"blocks.{i}.2.num_batches_tracked"] = np.zeros((), dtype=np.int64)
    state["encoded.weight"] = array("encoded", "kernel").T
    state["encoded.bias"] = array("encoded", "bias")
    return {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in state.items()}
