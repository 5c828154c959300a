"""Multitask pathology encoder of Tellez et al. 2020, in torch, with its published weights."""

from __future__ import annotations

import h5py
import numpy as np
import torch
from torch import Tensor, nn

from spatial_impute.encoders._weights import WeightFile, fetch_weights, load_whole_state

_FILE = WeightFile(
    name="encoder_multitask-4.h5",
    url=(
        "https://raw.githubusercontent.com/davidtellez/neural-image-compression/"
        "2f2e9ca71c53d97c415dede7c1afe91434bc4550/models/encoders_patches_pathology/encoder_multitask-4.h5"
    ),
    sha256="714684a5aacbc4b2dc3718db5e91f4222ffbcdaa7df81d6daa31a006a9a1da0b",
    licence="MIT",
)
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

    def pyramid(self, patches: Tensor) -> list[Tensor]:
        """Maps of the four blocks at the strides 2, 4, 8 and 16; the convolutions are not padded."""
        maps = []
        for block in self.blocks:
            patches = block(patches)
            maps.append(patches)
        return maps

    def forward(self, patches: Tensor) -> Tensor:
        """Encode patches; the published dense layer flattens by row, column, channel."""
        return self.encoded(self.pyramid(patches)[-1].permute(0, 2, 3, 1).flatten(1))

    def slide(self, windows: Tensor) -> Tensor:
        """Encode every patch of (n, 3, y, x) at a step of 16 px: (n, rows, columns, 128).

        The dense layer on a map of 3 x 3 is a convolution, so the result equals that of single patches.
        """
        kernel = self.encoded.weight.reshape(_WIDTH, 3, 3, _WIDTH).permute(0, 3, 1, 2)
        return nn.functional.conv2d(self.pyramid(windows)[-1], kernel, self.encoded.bias).permute(0, 2, 3, 1)


class TellezEncoder:
    """``"tellez-multitask"``: histopathology encoder trained at 1 um per pixel :cite:p:`Tellez2020`; 128 features.

    The weights (2.4 MB) are downloaded once and checked by sha256.
    """

    name = "tellez-multitask"
    identity = f"tellez-multitask-{_FILE.sha256[:12]}"
    mpp = 1.0
    patch_px = 64
    step_px = 2**_N_BLOCKS

    def __init__(self, device: str) -> None:
        self.device = device
        network = TellezNetwork()
        with h5py.File(fetch_weights(_FILE), "r") as file:
            load_whole_state(network, _read_weights(file["model_weights"]), drop=(), where=_FILE.name)
        self.network = network.eval().to(device)

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        """Encode (n, 64, 64, 3) in 0-255 as (n, 128)."""
        with torch.inference_mode():
            return self.network(self._scaled(patches)).cpu().numpy()

    def slide(self, windows: np.ndarray) -> np.ndarray:
        """Encode every patch of (n, y, x, 3) in 0-255 at a step of 16 px: (n, rows, columns, 128)."""
        tensor = self._scaled(windows)
        # On the CPU window by window: the maps of several windows do not fit into its cache, which doubles the time.
        parts = tensor.split(1 if self.device == "cpu" else len(tensor))
        with torch.inference_mode():
            return torch.cat([self.network.slide(part) for part in parts]).cpu().numpy()

    def _scaled(self, patches: np.ndarray) -> Tensor:
        scaled = np.asarray(patches, dtype=np.float32).transpose(0, 3, 1, 2) / 127.5 - 1.0
        return torch.from_numpy(np.ascontiguousarray(scaled)).to(self.device)


def _read_weights(group: h5py.Group) -> dict[str, Tensor]:
    """State dict from the arrays of the Keras file, whose kernels are (y, x, in, out)."""

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
    state["encoded.weight"] = array("encoded", "kernel").T
    state["encoded.bias"] = array("encoded", "bias")
    return {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in state.items()}
