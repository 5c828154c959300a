"""Image encoders as pyramids: from an RGB image to feature maps of falling resolution, by local operations only."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spatial_impute._validation import require_one_of
from spatial_impute.encoders._encoder import IMAGENET_MEAN, IMAGENET_STD, _weights_hash

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Of a strip of the largest map: it stays in the cache, and allocators keep blocks of that size at hand.
_STRIP_BYTES = 2**22
_PROBE = 256  # px; edge of the image on which an unknown module is tried

ENCODERS = ("tellez-multitask", "resnet18", "resnet50", "ciga-resnet18")
"""Pyramids by name."""


class Pyramid(nn.Module):
    """Feature maps at several strides.

    Attributes
    ----------
    name
        Identity, written into models.
    strides
        Pixels per cell, finest first; each divides the next.
    channels
        Channels of the maps.
    resolution
        um per pixel of the images the encoder was made for.
    context_level
        Map whose means and spreads over windows describe the surroundings: the deepest that sees details, not a reduced
        image.

    Shapes
    ------
    (n, 3, y, x) in 0-255, y and x multiples of the last stride -> maps (n, channels[i], y / strides[i], x / strides[i]).
    """

    name: str
    strides: tuple[int, ...]
    channels: tuple[int, ...]
    resolution: float
    context_level: int = -1


class TellezPyramid(Pyramid):
    """Convolutions of the multitask pathology encoder, run on the image and on its two-, four- and eightfold reductions.

    The network was trained on fields of 64 um; its own deepest cells see 31 um. The reductions add cells that see 62,
    124 and 248 um, at a third of the cost of the image itself. The published convolutions are unpadded; here they are padded after and before their input in turn,
    which keeps all cells within 2.5 pixels of the centre of what they see.
    """

    name = "tellez-multitask"
    strides = (4, 8, 16, 32, 64, 128)
    channels = (128, 128, 128, 128, 128, 128)
    resolution = 1.0
    context_level = 2

    def __init__(self, *, pretrained: bool = True) -> None:
        from spatial_impute.encoders._tellez import TellezEncoder, TellezNetwork

        super().__init__()
        self.blocks = (TellezEncoder("cpu").network if pretrained else TellezNetwork()).blocks
        for block in self.blocks:
            block[1].inplace = True  # the largest maps of all: one copy less

    def forward(self, rgb: Tensor) -> list[Tensor]:
        """Maps, finest first."""
        scaled = (rgb / 127.5).sub_(1.0)
        return [*self._stack(scaled), *(self._stack(F.avg_pool2d(scaled, factor))[-1] for factor in (2, 4, 8))]

    def _stack(self, x: Tensor) -> list[Tensor]:
        """Maps at the strides 4, 8 and 16; that of stride 2 holds edges of single nuclei, at four times the cost of 4."""
        first, second, third, fourth = self.blocks

        # Row i of the map at stride 4 reads rows 2 i - 1 to 2 i + 1 at stride 2, and row j of that 2 j to 2 j + 2 of the
        # image. At stride 8, row i reads 2 i to 2 i + 2 at stride 4.
        def finest(rows: Tensor, top: int, bottom: int) -> Tensor:
            return second(F.pad(first(F.pad(rows, (0, 1, 0, bottom))), (1, 0, top, 0)))

        def middle(rows: Tensor, _: int, bottom: int) -> Tensor:
            return third(F.pad(rows, (0, 1, 0, bottom)))

        maps = [_by_strips(finest, x, 4, above=2, channels=self.channels[0])]
        maps.append(_by_strips(middle, maps[0], 2, above=0, channels=self.channels[0]))
        return [*maps, fourth(F.pad(maps[1], (1, 0, 1, 0)))]


def _by_strips(
    run: Callable[[Tensor, int, int], Tensor], x: Tensor, stride: int, *, above: int, channels: int
) -> Tensor:
    """Map of `x` at a stride; on a CPU strip by strip, so that what is between them is never whole.

    Memory of that size comes new from the system each time, which took longer than the convolutions.

    Parameters
    ----------
    run
        Map of some rows of `x`; 1 if they are the topmost, and 1 if they are the lowest ones.
    stride
        Rows of `x` along a row of the map.
    above
        Rows of `x` above those that a row of the map reads; below them it reads one.
    channels
        Of what `run` makes of a row of `x`.
    """
    height = x.shape[-2] // stride
    n_rows = height
    if x.device.type == "cpu":
        n_rows = max(1, _STRIP_BYTES // (x.shape[-1] * channels * x.element_size()))
    if n_rows >= height:
        return run(x, 1, 1)
    whole = None
    for top in range(0, height, n_rows):
        bottom = min(top + n_rows, height)
        rows = x[..., max(stride * top - above, 0) : stride * bottom + 1, :]
        strip = run(rows, int(top == 0), int(bottom == height))
        if whole is None:
            whole = strip.new_empty((*strip.shape[:-2], height, strip.shape[-1]))
        whole[..., top:bottom, :] = strip
    return whole


class ModulePyramid(Pyramid):
    """Pyramid of a module of the user's, or of a ResNet.

    Parameters
    ----------
    module
        Maps (n, 3, y, x), normalised, to a sequence of maps.
    name
        Identity; by default the class and a hash of the weights.
    resolution
        um per pixel it was made for.
    mean, std
        Normalisation of RGB in 0-1.

    Raises
    ------
    ValueError
        If the module returns no maps at strides that divide each other.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str | None = None,
        resolution: float = 0.5,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.module = module.eval()
        self.name = f"{type(module).__name__}-{_weights_hash(module)}" if name is None else name
        self.resolution = float(resolution)
        self.register_buffer("mean", 255.0 * torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255.0 * torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)
        parameter = next(module.parameters(), torch.zeros(()))
        with torch.inference_mode():
            maps = self.forward(torch.full((1, 3, _PROBE, _PROBE), 128.0, dtype=parameter.dtype))
        self.strides, self.channels = _layout(maps, self.name)

    def forward(self, rgb: Tensor) -> list[Tensor]:
        """Maps, finest first."""
        run: Callable[[Tensor], Sequence[Tensor]] = getattr(self.module, "pyramid", self.module)
        maps = run((rgb - self.mean.to(rgb.dtype)) / self.std.to(rgb.dtype))
        return list(maps.values()) if isinstance(maps, dict) else list(maps)


def _layout(maps: list[Tensor], name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Strides and channels of the maps of a probe."""
    shapes = [tuple(m.shape) for m in maps if isinstance(m, Tensor)]
    strides = tuple(_PROBE // s[-1] for s in shapes if len(s) == 4 and s[-1] > 0)
    exact = all(len(s) == 4 and s[-1] * k == s[-2] * k == _PROBE for s, k in zip(shapes, strides, strict=False))
    nested = all(b % a == 0 and b > a for a, b in pairwise(strides))
    if not strides or len(strides) != len(maps) or not exact or not nested:
        msg = (
            f"The encoder {name!r} must return feature maps (n, channels, y / s, x / s), finest first, at strides s that "
            f"divide each other; for an image of {_PROBE} x {_PROBE} px it returned shapes {shapes}."
        )
        raise ValueError(msg)
    return strides, tuple(s[1] for s in shapes)


def build_pyramid(encoder: str | nn.Module, *, pretrained: bool = True) -> Pyramid:
    """Pyramid by name, or of a module.

    Parameters
    ----------
    encoder
        One of :data:`ENCODERS`, a :class:`Pyramid`, or a module that returns maps at ImageNet's normalisation.
    pretrained
        Load the published weights of a named encoder; otherwise they are random, to be overwritten.

    Raises
    ------
    ValueError
        For unknown names and modules that return no pyramid.
    TypeError
        For anything else.
    """
    if isinstance(encoder, Pyramid):
        return encoder
    if isinstance(encoder, nn.Module):
        return ModulePyramid(encoder)
    if not isinstance(encoder, str):
        msg = f"`encoder` must be one of {list(ENCODERS)} or an nn.Module, found {type(encoder).__name__}."
        raise TypeError(msg)
    require_one_of(encoder, ENCODERS, name="encoder")
    if encoder == TellezPyramid.name:
        return TellezPyramid(pretrained=pretrained)
    from spatial_impute.encoders._resnet import build_resnet, load_resnet

    network = load_resnet(encoder) if pretrained else build_resnet(encoder.removeprefix("ciga-"))
    return ModulePyramid(network, name=encoder)
