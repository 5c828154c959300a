"""Residual networks of He et al. 2016 with the parameter names of torchvision, and published weights for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from spatial_impute.encoders._weights import WeightFile, fetch_weights, load_whole_state, read_state

if TYPE_CHECKING:
    from collections.abc import Sequence

STRIDES = (4, 8, 16, 32)  # Pixels of the input per cell of the four maps of a pyramid

_STEM_WIDTH = 64
_BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}

WEIGHTS = {
    "resnet18": WeightFile(
        name="resnet18-f37072fd.pth",
        url="https://download.pytorch.org/models/resnet18-f37072fd.pth",
        sha256="f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec",
        licence="BSD-3-Clause",
    ),
    "resnet50": WeightFile(
        name="resnet50-0676ba61.pth",
        url="https://download.pytorch.org/models/resnet50-0676ba61.pth",
        sha256="0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a",
        licence="BSD-3-Clause",
    ),
    "ciga-resnet18": WeightFile(
        name="pytorchnative_tenpercent_resnet18.ckpt",
        url=(
            "https://github.com/ozanciga/self-supervised-histopathology/releases/download/nativetenpercent/"
            "pytorchnative_tenpercent_resnet18.ckpt"
        ),
        sha256="ae652d1a586c1be11b8ed7f4033094a98ac9c620e43a28998c6c86d248e750ab",
        licence="MIT",
        prefixes=("model.", "resnet."),
    ),
}


class _Block(nn.Module):
    """Convolutions with a shortcut: two 3x3, or a bottleneck of 1x1, 3x3 and 1x1 with four times the width at its end."""

    def __init__(self, in_width: int, width: int, *, stride: int, bottleneck: bool) -> None:
        super().__init__()
        out_width = width * (4 if bottleneck else 1)
        self.conv1 = nn.Conv2d(
            in_width,
            width,
            1 if bottleneck else 3,
            stride=1 if bottleneck else stride,
            padding=0 if bottleneck else 1,
            bias=False,
        )
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

    strides: tuple[int, int, int, int] = STRIDES

    def __init__(self, layers: Sequence[int], *, bottleneck: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, _STEM_WIDTH, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM_WIDTH)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.widths = tuple(_STEM_WIDTH * 2**i * (4 if bottleneck else 1) for i in range(4))
        in_widths = (_STEM_WIDTH, *self.widths[:3])
        for i, n_blocks in enumerate(layers):
            blocks = [
                _Block(
                    in_widths[i] if j == 0 else self.widths[i],
                    _STEM_WIDTH * 2**i,
                    stride=2 if j == 0 and i > 0 else 1,
                    bottleneck=bottleneck,
                )
                for j in range(n_blocks)
            ]
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random weights of He et al., which keep the variance through the rectified layers."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()

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
    return ResNet(_BLOCKS[architecture], bottleneck=architecture == "resnet50")


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
