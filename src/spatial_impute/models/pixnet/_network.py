"""Network of PixNet: pyramid encoder, convolutional decoder, linear gene head. All parts are local.

Therefore tiles with enough context give the same values as the whole slide.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spatial_impute.encoders._encoder import autocast
from spatial_impute.encoders._pyramids import Box, coarser, cut, grow, measured_halo, relative, window_mean

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from spatial_impute.encoders._pyramids import Pyramid
    from spatial_impute.models._params import PixNetParams

_CONVOLVED = 2  # cells that two 3x3 convolutions read on each side
# Rows plus columns. torch 2.13 uses another kernel up to 128, and other versions may use it for larger maps.
_LARGE_MAP = 257
# Added to variances before the root, for features of variance 1. Without it, rounding errors, which differ between a
# tile and the slide, would become features where the image does not vary.
_NO_VARIANCE = 1e-3


@dataclass(frozen=True)
class Stain:
    """Stain of a slide, and how to match it to the training slides."""

    background: tuple[float, ...]  # Color of the glass in 0-255
    factor: tuple[float, ...] = (1.0, 1.0, 1.0)  # Factor on the optical density, per channel

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
        self.factors = [b // a for a, b in pairwise(strides)]
        self.up = nn.ModuleList([nn.ConvTranspose2d(width, width, k, stride=k) for k in self.factors])
        self.convolve = nn.ModuleList([DoubleConv(width, norm) for _ in self.factors])
        self.delta = nn.Parameter(torch.full((len(self.factors),), float(delta)))
        # See `standardise_decoder`. Encoders differ in scale by factors of hundreds; small maps would hardly be learned from.
        self.n_channels = channels
        self.register_buffer("mean", torch.zeros(sum(channels)))
        self.register_buffer("spread", torch.ones(()))

    def forward(self, maps: list[Tensor], cells: Box) -> Tensor:
        """Some cells of the finest map. Of every coarser map only what these cells read is computed."""
        size = maps[0].shape[-2] * (2 if self.single else 1), maps[0].shape[-1] * (2 if self.single else 1)
        wanted, grown = cells, []
        for factor in self.factors:
            grown.append(grow(wanted, _CONVOLVED, size))
            wanted, size = coarser(grown[-1], factor), (size[0] // factor, size[1] // factor)
        x, window = self._lateral(maps, len(self.factors), wanted), wanted
        for i in reversed(range(len(self.factors))):
            x = cut(self.up[i](x), relative(grown[i], window, self.factors[i]))
            x = self.convolve[i](x + self.delta[i] * self._lateral(maps, i, grown[i]))
            window = grown[i]
        return cut(x, relative(cells, window))

    def _lateral(self, maps: list[Tensor], level: int, cells: Box) -> Tensor:
        """Some cells of a map, standardised, with the channels of the decoder."""
        if self.single:  # the map is coarse: little is gained if only a part is computed
            return cut(self.lateral[level]((maps[0] - self.mean[:, None, None]) / self.spread), cells)
        mean = self.mean.split(self.n_channels)[level][:, None, None]
        return self.lateral[level]((cut(maps[level], cells) - mean) / self.spread)


def decoder_strides(strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides at which the decoder works, from those of the maps that it reads; finest first."""
    return strides if len(strides) > 1 else (strides[0] // 2, strides[0], 2 * strides[0])


class WindowStatistics(nn.Module):
    """Mean and standard deviation of the features in windows of several sizes around each cell of a coarse grid.

    The tissue within a few hundred um of a spot, and its heterogeneity, are more informative than the receptive field of
    a convolution. As maps on a grid, these statistics can be read for regions of any shape and computed tile by tile.
    Windows are cut at the edge of the image; their edges, in px, are rounded to odd numbers of cells.

    Shapes: (n, c, y / stride, x / stride) -> (n, 2 * len(windows) * c, rows, columns) of `cells` of the coarse grid: for each
    window the means, then the standard deviations.
    """

    def __init__(self, stride: int, cell: int, windows: tuple[float, ...]) -> None:
        super().__init__()
        self.factor = cell // stride
        self.n_cells = tuple(2 * max(0, round((window / cell - 1) / 2)) + 1 for window in windows)
        self.edges = tuple(n * cell for n in self.n_cells)

    def forward(self, maps: Tensor, cells: Box) -> Tensor:
        mean = F.avg_pool2d(maps, self.factor)
        square = F.avg_pool2d(maps**2, self.factor)
        parts = []
        for n in self.n_cells:
            around = grow(cells, n // 2, mean.shape[-2:])
            inner = relative(cells, around)
            centre = cut(window_mean(cut(mean, around), n), inner)
            variance = (cut(window_mean(cut(square, around), n), inner) - centre**2).clamp(min=0)
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
    window statistics, resized to the finest grid. A linear head on it is ridge regression on image features. The head of
    the decoder starts at zero. In each gene, the result is a weighted sum of both.

    `n_base` is the number of channels of the base, 0 for no base; `resolution` the um per pixel of the slides. Maps of the
    encoder with a smaller stride than ``params.finest_stride`` are left out, but two maps are kept. With `rates` the map is a
    positive rate, the softplus of the head; else it is the head.

    Shapes: rgb (n, 3, y, x) in 0-255, y and x multiples of `multiple` -> :meth:`features` (n, n_base + width, y / stride,
    x / stride) -> :meth:`genes` (n, n_genes, y / stride, x / stride).
    """

    scale: Tensor
    precision: str = "float32"  # Or "bfloat16", for encoder and decoder; base, head and sums stay in single precision

    def __init__(
        self,
        pyramid: Pyramid,
        params: PixNetParams,
        *,
        n_genes: int,
        n_base: int,
        rates: bool = False,
        resolution: float = 1.0,
    ) -> None:
        super().__init__()
        self.pyramid = pyramid
        coarse_enough = [i for i, stride in enumerate(pyramid.strides) if stride >= params.finest_stride]
        self.first = max(0, min([*coarse_enough, len(pyramid.strides) - 2]))
        self.strides, self.channels = pyramid.strides[self.first :], pyramid.channels[self.first :]
        strides, channels = self.strides, self.channels
        self.stride, self.multiple = decoder_strides(strides)[0], math.lcm(decoder_strides(strides)[-1], pyramid.window)
        self.magnified = strides[0] // self.stride  # cells of the finest grid along a cell of the finest map
        self.n_base, self.width, self.rates = n_base, params.width, rates
        self.decoder = Decoder(strides, channels, params.width, norm=params.norm, delta=params.delta)
        self.windows: WindowStatistics | None = None
        widths, extents = list(channels), list(strides)
        if n_base and params.context_um:
            context = tuple(window / resolution for window in params.context_um)
            source = max(range(len(pyramid.strides))[pyramid.context_level], self.first)
            self.window_level = source - self.first
            cell = window_cell(pyramid.strides[source], self.multiple, min(context))
            self.windows = WindowStatistics(pyramid.strides[source], cell, context)
            widths += [pyramid.channels[source]] * (2 * len(context))
            extents += [edge for edge in self.windows.edges for _ in range(2)]
        self.n_levels = sum(widths)
        # (n_features,) how far each input of the base sees, px.
        self.extent = np.repeat(np.array(extents, np.float64), widths)
        self.base = nn.ModuleList(
            [nn.Conv2d(c, n_base, 1, bias=i == 0) for i, c in enumerate(widths)] if n_base else []
        )
        self.head = nn.Conv2d(n_base + params.width, n_genes, 1)
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

    def encode(self, rgb: Tensor, window: Box | None = None) -> list[Tensor]:
        """Maps of the encoder that the network uses, finest first; only of a window in px if given."""
        with autocast(rgb.device, self.precision):
            maps = self.pyramid(rgb) if window is None else self.pyramid.within(rgb, window)
        return [m.to(rgb.dtype) for m in maps[self.first :]]

    def decode(self, maps: list[Tensor], cells: Box | None = None) -> Tensor:
        """Features of the decoder from the maps of the encoder: (n, width, y / stride, x / stride), or only some cells."""
        with autocast(maps[0].device, self.precision):
            decoded = self.decoder(maps, cells or self._all_cells(maps))
        return decoded.to(maps[0].dtype)

    def levels(self, maps: list[Tensor], cells: Box | None = None) -> Tensor:
        """Inputs of the base on the finest grid, (n, n_levels, y, x), or only some cells.

        With some thousand channels, maps of all cells would take much memory.
        """
        cells = cells or self._all_cells(maps)
        parts = self._parts(maps, cells)
        return torch.cat([_resize_part(part, factor, cells) for part, factor in parts], dim=1)

    def base_features(self, maps: list[Tensor], cells: Box | None = None) -> Tensor:
        """Base from the maps of the encoder: (n, n_base, y / stride, x / stride), or only some cells."""
        cells = cells or self._all_cells(maps)
        # Maps of the same size are added before they are resized, and sums are in place: for maps as large as the finest
        # one, most of the time is allocation of memory.
        by_factor: dict[int, Tensor] = {}
        for projection, (part, factor) in zip(self.base, self._parts(maps, cells), strict=True):
            projected = projection(part)
            by_factor[factor] = by_factor[factor].add_(projected) if factor in by_factor else projected
        first, *others = (_resize_part(part, factor, cells) for factor, part in by_factor.items())
        for other in others:
            first.add_(other)
        return first

    def _all_cells(self, maps: list[Tensor]) -> Box:
        """All cells of the finest grid."""
        return Box(0, maps[0].shape[-2] * self.magnified, 0, maps[0].shape[-1] * self.magnified)

    def _parts(self, maps: list[Tensor], cells: Box) -> Iterator[tuple[Tensor, int]]:
        """Parts of each input of the base that the cells of the finest grid read, and the number of cells along one of its own."""
        rows, columns = self._all_cells(maps)[1::2]
        for m in maps:
            factor = rows // m.shape[-2]
            yield cut(m, _resize_source(cells, factor, m.shape[-2:])), factor
        if self.windows is not None:
            source = maps[self.window_level]
            factor = rows // source.shape[-2] * self.windows.factor
            read = _resize_source(cells, factor, (rows // factor, columns // factor))
            for part in self.windows(source, read).split(source.shape[1], dim=1):
                yield part, factor

    def combine(self, maps: list[Tensor], cells: Box | None = None) -> Tensor:
        """Base and decoder from the maps of the encoder; only some cells if given."""
        parts = [self.decode(maps, cells)]
        if self.n_base:
            parts.insert(0, self.base_features(maps, cells))
        return torch.cat(parts, dim=1)

    def features(self, rgb: Tensor) -> Tensor:
        """Base and decoder, the inputs of the linear head."""
        return self.combine(self.encode(rgb))

    def predict(self, maps: list[Tensor], cells: Box | None = None) -> Tensor:
        """Map of the genes from the maps of the encoder; only some cells if given."""
        return self.genes(self.combine(maps, cells))

    def genes(self, features: Tensor) -> Tensor:
        """Map of the genes from that of the features."""
        z = self.head(features)
        return F.softplus(z) * self.scale.view(1, -1, 1, 1) if self.rates else z

    @property
    def head_bias(self) -> Tensor:
        return cast("Tensor", self.head.bias)

    def from_pooled(self, features: Tensor) -> Tensor:
        """Genes of regions from their mean features (n, c), or by the decoder alone from its features, which come last.

        The head is linear, so it may be applied last.
        """
        return F.linear(features, self.head.weight[:, -features.shape[1] :, 0, 0], self.head.bias)

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


def _resize_source(cells: Box, factor: int, size: Sequence[int]) -> Box:
    """Cells of a map of this size that bilinear interpolation by a factor reads: one more on each side."""
    return cells if factor == 1 else grow(coarser(cells, factor), 1, size)


def _resize_part(part: Tensor, factor: int, cells: Box) -> Tensor:
    """Some cells of a map resized by a factor, from the `part` of it that :func:`_resize_source` names."""
    if factor == 1:
        return part
    y, x = (max(first // factor - 1, 0) for first in (cells[0], cells[2]))
    resized = _resize(part, (part.shape[-2] * factor, part.shape[-1] * factor))
    return cut(resized, relative(cells, Box(y, y, x, x), factor))


def receptive_halo(network: PixNetNetwork) -> int:
    """Pixels of context around a tile on which its cells, and one more cell, can depend; a multiple of `multiple`."""
    probe = copy.deepcopy(network).double().cpu().eval()
    probe.precision = "float32"  # single and double precision are computed as they are
    reach = measured_halo(
        lambda rgb: [probe.features(rgb)], [network.stride], network.multiple, name=network.pyramid.name
    )
    # The resize to pixels reads one more cell.
    return -(-(reach + network.stride) // network.multiple) * network.multiple
