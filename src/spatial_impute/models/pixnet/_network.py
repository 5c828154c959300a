"""Network of PixNet: pyramid encoder, convolutional decoder, linear gene head. All parts are local.

Therefore tiles with enough context give the same values as the whole slide.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spatial_impute._io.workers import suitable_threads
from spatial_impute.encoders._encoder import autocast
from spatial_impute.encoders._pyramids import window_mean

if TYPE_CHECKING:
    from spatial_impute.encoders._pyramids import Pyramid
    from spatial_impute.models._params import PixNetParams

_FIRST_PROBE, _LAST_PROBE = 8, 64  # coarsest cells along the test image for the receptive field
_LARGE_MAP = 257  # rows plus columns; up to 128 torch 2.13 has another kernel, and twice that is on the safe side
# Added to variances before the root, for features of variance 1. Without it, rounding errors, which differ between a
# tile and the slide, would become features where the image does not vary.
_NO_VARIANCE = 1e-3

Cells = tuple[int, int, int, int]  # Cells [y0, y1) x [x0, x1) of a map


@dataclass(frozen=True)
class Stain:
    """Stain of a slide, and how to match it to the training slides."""

    background: tuple[float, float, float]  # Color of the glass in 0-255
    factor: tuple[float, float, float] = (1.0, 1.0, 1.0)  # Factor on the optical density, per channel

    def apply(self, rgb: Tensor) -> Tensor:
        """(n, 3, y, x) in 0-255 on white glass, with the amount of stain of the training slides."""
        background = rgb.new_tensor(self.background).view(1, 3, 1, 1)
        factor = rgb.new_tensor(self.factor).view(1, 3, 1, 1)
        return (rgb / background).clamp_(1 / 255, 1.0).pow_(factor).mul_(255.0)


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of each cell; like batch norm in evaluation it does not read other cells."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(n, width, y, x) to the same."""
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class DoubleConv(nn.Sequential):
    """Two 3x3 convolutions, each with norm and rectifier."""

    def __init__(self, width: int, norm: str) -> None:
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width) if norm == "batch" else ChannelNorm(width),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*layers)


class Decoder(nn.Module):
    """From the coarsest map to the finest: deconvolution, plus the lateral map times a learned scale, two convolutions.

    Shapes: maps (n, channels[i], y / strides[i], x / strides[i]), finest first -> (n, width, y / strides[0], x / strides[0]).
    An encoder with one map at the stride s is read as a simple feature pyramid :cite:p:`Li2022`: convolutions bring its map
    to the strides s / 2, s and 2 s, and the result has the stride s / 2.
    """

    mean: Tensor
    spread: Tensor

    def __init__(
        self, strides: tuple[int, ...], channels: tuple[int, ...], width: int, *, norm: str, delta: float
    ) -> None:
        super().__init__()
        self.lateral = nn.ModuleList([nn.Conv2d(c, width, 1) for c in channels])
        self.single = len(strides) == 1
        if self.single:
            (c,) = channels
            up, down = nn.ConvTranspose2d(c, width, 2, stride=2), nn.Conv2d(c, width, 2, stride=2)
            self.lateral = nn.ModuleList([up, self.lateral[0], down])
            strides = decoder_strides(strides)
        factors = [b // a for a, b in pairwise(strides)]
        self.up = nn.ModuleList([nn.ConvTranspose2d(width, width, k, stride=k) for k in factors])
        self.convolve = nn.ModuleList([DoubleConv(width, norm) for _ in factors])
        self.delta = nn.Parameter(torch.full((len(factors),), float(delta)))
        # See `standardise_decoder`. Encoders differ in scale by factors of hundreds; small maps would hardly be learned from.
        self.n_channels = channels
        self.register_buffer("mean", torch.zeros(sum(channels)))
        self.register_buffer("spread", torch.ones(()))

    def forward(self, maps: list[Tensor]) -> Tensor:
        means = self.mean[:, None, None].split(self.n_channels)
        maps = [(m - mean) / self.spread for m, mean in zip(maps, means, strict=True)]
        if self.single:
            maps = maps * len(self.lateral)
        x = self.lateral[-1](maps[-1])
        for i in reversed(range(len(self.up))):
            x = self.convolve[i](self.up[i](x) + self.delta[i] * self.lateral[i](maps[i]))
        return x


def decoder_strides(strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides at which the decoder works, from those of the maps that it reads; finest first."""
    return strides if len(strides) > 1 else (strides[0] // 2, strides[0], 2 * strides[0])


class WindowStatistics(nn.Module):
    """Mean and standard deviation of the features in windows of several sizes around each cell of a coarse grid.

    The tissue within a few hundred um of a spot, and its heterogeneity, are more informative than the receptive field of
    a convolution. As maps on a grid, these statistics can be read for regions of any shape and computed tile by tile.
    Windows are cut at the edge of the image; their edges, in px, are rounded to odd numbers of cells.

    Shapes: (n, c, y / stride, x / stride) -> (n, 2 * len(windows) * c, y / cell, x / cell): for each window the means, then
    the standard deviations.
    """

    def __init__(self, stride: int, cell: int, windows: tuple[float, ...]) -> None:
        super().__init__()
        self.factor = cell // stride
        self.n_cells = tuple(2 * max(0, round((window / cell - 1) / 2)) + 1 for window in windows)

    def forward(self, maps: Tensor) -> Tensor:
        mean = F.avg_pool2d(maps, self.factor)
        square = F.avg_pool2d(maps**2, self.factor)
        parts = []
        for n in self.n_cells:
            centre = window_mean(mean, n)
            variance = (window_mean(square, n) - centre**2).clamp(min=0)
            parts += [centre, (variance + _NO_VARIANCE).sqrt()]
        return torch.cat(parts, dim=1)


def window_cell(stride: int, multiple: int, smallest: float) -> int:
    """Cell of :class:`WindowStatistics` in px: the largest that divides `multiple`, a third of the smallest window."""
    cell = stride
    while multiple % (2 * cell) == 0 and 2 * cell * 3 <= smallest:
        cell *= 2
    return cell


class PixNetNetwork(nn.Module):
    """Network of PixNet.

    In parallel to the decoder there is a linear base: fixed linear combinations of the maps of the encoder, and of their
    window statistics, resized to the finest grid. A linear head on it is ridge regression on image features. The decoder
    is a correction of this base and starts at zero.

    Parameters
    ----------
    pyramid
        Encoder.
    n_genes, width, n_base
        Number of genes, channels of the decoder, channels of the base (0 for no base).
    context
        Edges in px of the windows of the base; see :class:`WindowStatistics`.
    norm, delta
        ``"batch"`` or ``"layer"``; initial scale of the lateral maps.
    finest
        Leave out maps of the encoder with a smaller stride, but keep at least two maps.
    rates
        The map is a positive rate, the softplus of the head; else it is the head.

    Shapes
    ------
    rgb (n, 3, y, x) in 0-255, y and x multiples of `multiple` -> :meth:`features` (n, n_base + width, y / stride,
    x / stride) -> :meth:`genes` (n, n_genes, y / stride, x / stride).
    """

    scale: Tensor
    precision: str = "float32"  # Or "bfloat16", for encoder and decoder; base, head and sums stay in single precision

    def __init__(
        self,
        pyramid: Pyramid,
        *,
        n_genes: int,
        width: int,
        n_base: int,
        context: tuple[float, ...] = (),
        norm: str = "batch",
        delta: float = 1.0,
        finest: int = 1,
        rates: bool = False,
    ) -> None:
        super().__init__()
        self.pyramid = pyramid
        coarse_enough = [i for i, stride in enumerate(pyramid.strides) if stride >= finest]
        self.first = max(0, min([*coarse_enough, len(pyramid.strides) - 2]))
        strides, channels = pyramid.strides[self.first :], pyramid.channels[self.first :]
        self.stride, self.multiple = decoder_strides(strides)[0], math.lcm(decoder_strides(strides)[-1], pyramid.window)
        self.magnified = strides[0] // self.stride  # cells of the finest grid along a cell of the finest map
        self.n_base, self.width, self.rates = n_base, width, rates
        self.decoder = Decoder(strides, channels, width, norm=norm, delta=delta)
        self.windows: WindowStatistics | None = None
        widths = list(channels)
        if n_base and context:
            source = max(range(len(pyramid.strides))[pyramid.context_level], self.first)
            self.window_level = source - self.first
            cell = window_cell(pyramid.strides[source], self.multiple, min(context))
            self.windows = WindowStatistics(pyramid.strides[source], cell, tuple(context))
            widths += [pyramid.channels[source]] * (2 * len(context))
        self.n_levels = sum(widths)
        self.base = nn.ModuleList(
            [nn.Conv2d(c, n_base, 1, bias=i == 0) for i, c in enumerate(widths)] if n_base else []
        )
        self.head = nn.Conv2d(n_base + width, n_genes, 1)
        self.register_buffer("scale", torch.ones(n_genes))
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)
        for parameter in self.base.parameters():
            parameter.requires_grad_(False)  # set by regression, see `fit_base`

    def train(self, mode: bool = True) -> PixNetNetwork:  # noqa: FBT001, FBT002 -- torch's signature
        """Set the training mode of the decoder; the encoder keeps its published statistics."""
        super().train(mode)
        self.pyramid.eval()
        return self

    def encode(self, rgb: Tensor) -> list[Tensor]:
        """Maps of the encoder that the network uses, finest first."""
        with autocast(rgb.device, self.precision):
            maps = self.pyramid(rgb)[self.first :]
        return [m.to(rgb.dtype) for m in maps]

    def decode(self, maps: list[Tensor]) -> Tensor:
        """Features of the decoder: (n, width, y / stride, x / stride)."""
        with autocast(maps[0].device, self.precision):
            decoded = self.decoder(maps)
        return decoded.to(maps[0].dtype)

    def levels(self, rgb: Tensor, cells: Cells | None = None) -> Tensor:
        """Inputs of the base on the finest grid, (n, n_levels, y, x); only some cells if given."""
        maps = self._base_maps(self.encode(rgb))
        size = self._grid(maps[0])
        if cells is not None:  # with some thousand channels, maps of all cells would take much memory
            return torch.cat([_resize_part(m, size[0] // m.shape[-2], cells) for m in maps], dim=1)
        return torch.cat([_resize(m, size) for m in maps], dim=1)

    def base_features(self, maps: list[Tensor]) -> Tensor:
        """Base from the maps of the encoder: (n, n_base, y / stride, x / stride)."""
        # Maps of the same size are added before they are resized, and sums are in place: for maps as large as the finest
        # one, most of the time is allocation of memory.
        by_size: dict[torch.Size, Tensor] = {}
        for projection, m in zip(self.base, self._base_maps(maps), strict=True):
            size, part = m.shape[-2:], projection(m)
            by_size[size] = by_size[size].add_(part) if size in by_size else part
        first, *coarser = by_size.values()
        grid = self._grid(first)
        total = _resize(first, grid)
        for part in coarser:
            total.add_(_resize(part, grid))
        return total

    def _grid(self, finest: Tensor) -> tuple[int, int]:
        """Rows and columns of the finest grid."""
        return finest.shape[-2] * self.magnified, finest.shape[-1] * self.magnified

    def _base_maps(self, maps: list[Tensor]) -> list[Tensor]:
        if self.windows is None:
            return maps
        source = maps[self.window_level]
        return [*maps, *self.windows(source).split(source.shape[1], dim=1)]

    def combine(self, maps: list[Tensor]) -> Tensor:
        """Base and decoder from the maps of the encoder."""
        parts = [self.decode(maps)]
        if self.n_base:
            parts.insert(0, self.base_features(maps))
        return torch.cat(parts, dim=1)

    def features(self, rgb: Tensor) -> Tensor:
        """Base and decoder, the inputs of the linear head."""
        return self.combine(self.encode(rgb))

    def genes(self, features: Tensor) -> Tensor:
        """Map of the genes from that of the features."""
        z = self.head(features)
        return F.softplus(z) * self.scale.view(1, -1, 1, 1) if self.rates else z

    @property
    def head_bias(self) -> Tensor:
        return cast("Tensor", self.head.bias)

    def from_pooled(self, features: Tensor) -> Tensor:
        """Genes of regions from their mean features (n, c); the head is linear, so it may be applied last."""
        return F.linear(features, self.head.weight[:, :, 0, 0], self.head.bias)

    def correction(self, decoded: Tensor) -> Tensor:
        """Correction of the base in regions, (n, n_genes), from the mean of their decoder features (n, width)."""
        return F.linear(decoded, self.head.weight[:, self.n_base :, 0, 0], self.head.bias)

    def with_genes(self, index: list[int]) -> PixNetNetwork:
        """Copy that predicts some of the genes."""
        other = copy.copy(self)
        other._modules = dict(self._modules)
        other._buffers = dict(self._buffers)
        other.head = nn.Conv2d(self.head.in_channels, len(index), 1).to(self.head.weight)
        other.head.weight = nn.Parameter(self.head.weight.detach()[index], requires_grad=False)
        other.head.bias = nn.Parameter(self.head_bias.detach()[index], requires_grad=False)
        other.scale = self.scale[index]
        return other


def build_network(
    pyramid: Pyramid, params: PixNetParams, *, n_genes: int, n_base: int, rates: bool, resolution: float
) -> PixNetNetwork:
    """Untrained network of the given settings for slides of `resolution` um per pixel."""
    return PixNetNetwork(
        pyramid,
        n_genes=n_genes,
        width=params.width,
        n_base=n_base,
        context=tuple(window / resolution for window in params.context_um),
        norm=params.norm,
        delta=params.delta,
        finest=params.finest_stride,
        rates=rates,
    )


def _resize(maps: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """Bilinear resize to a multiple of the size; the same bits for a tile and for a slide.

    torch interpolates small maps with another kernel, which rounds differently. Small maps are therefore extended at
    their right edge, by the values that interpolation assumes there.
    """
    height, width = maps.shape[-2:]
    if (height, width) == tuple(size):
        return maps
    factor = size[1] // width
    missing = _LARGE_MAP - sum(size)
    if missing > 0:
        maps = F.pad(maps, (0, -(-missing // factor), 0, 0), mode="replicate")
    resized = F.interpolate(maps, size=(size[0], maps.shape[-1] * factor), mode="bilinear", align_corners=False)
    return resized[..., : size[1]]


def _resize_part(maps: Tensor, factor: int, cells: Cells) -> Tensor:
    """Some cells of the map resized by a factor."""
    y0, y1, x0, x1 = cells
    height, width = maps.shape[-2:]
    # Bilinear interpolation reads one more cell on each side.
    top, left = max(y0 // factor - 1, 0), max(x0 // factor - 1, 0)
    part = maps[..., top : min(-(-y1 // factor) + 1, height), left : min(-(-x1 // factor) + 1, width)]
    part = _resize(part, (part.shape[-2] * factor, part.shape[-1] * factor))
    top, left = y0 - top * factor, x0 - left * factor
    return part[..., top : top + y1 - y0, left : left + x1 - x0]


def receptive_halo(network: PixNetNetwork) -> int:
    """Pixels of context around a tile on which its cells, and one more cell, can depend; a multiple of `multiple`.

    The value is measured, so that it holds for any encoder: pixels beyond an edge are set to NaN, which spreads to all
    cells that read them. Both ends of both axes are tested. A network with operations over the whole image raises a
    ``ValueError``.
    """
    probe = copy.deepcopy(network).double().cpu().eval()
    probe.precision = "float32"  # single and double precision are computed as they are
    n_cells = _FIRST_PROBE
    while n_cells <= _LAST_PROBE:
        found = [_reach(probe, n_cells * network.multiple, axis, side) for axis in (2, 3) for side in (0, 1)]
        reach = [pixels for pixels in found if pixels is not None]
        if len(reach) == len(found):
            # The resize to pixels reads one more cell.
            return -(-(max(reach) + network.stride) // network.multiple) * network.multiple
        n_cells *= 2
    msg = (
        f"The encoder {network.pyramid.name!r} reads the whole image (or more than {n_cells * network.multiple // 4} px "
        "around a pixel), so that tiles cannot equal the slide. Use a convolutional encoder without global operations, "
        "or set `model_params={'encoder_window': 224}`: the edge in px of windows that the encoder reads one by one."
    )
    raise ValueError(msg)


def _reach(probe: PixNetNetwork, length: int, axis: int, side: int) -> int | None:
    """Pixels beyond an edge in the middle of a strip on which cells depend; None if all cells depend on them."""
    edge = length // 2
    shape = [1, 3, probe.multiple, probe.multiple]
    shape[axis] = length
    rgb = torch.full(shape, 128.0, dtype=torch.float64)
    rgb.narrow(axis, 0 if side == 0 else edge, edge).fill_(torch.nan)
    with torch.inference_mode(), suitable_threads(0, 0):
        affected = probe.features(rgb).isnan().any(dim=1).any(dim=4 - axis)[0]
    clean = (~affected).nonzero()[:, 0]
    if not len(clean):
        return None
    cell = edge // probe.stride
    return (int(clean[0]) - cell if side == 0 else cell - int(clean[-1]) - 1) * probe.stride
