"""PixNet: pyramid encoder, convolutional decoder, linear gene head. All of it is local, so that tiles can equal the whole."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spatial_impute.models.asign._graph_inputs import suitable_threads
from spatial_impute.models.pixnet._surroundings import ContextFields, context_cell

if TYPE_CHECKING:
    from spatial_impute.encoders._pyramids import Pyramid

_FIRST_PROBE, _LAST_PROBE = 8, 64  # coarsest cells along the probe of the receptive field
_LARGE_MAP = 257  # rows plus columns; up to 128 torch 2.13 has another kernel, and twice that is on the safe side


@dataclass(frozen=True)
class Stain:
    """How a slide is stained, and how the slides were that the model knows."""

    background: tuple[float, float, float]
    """Colour of its glass in 0-255."""
    factor: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Optical density is multiplied by this, per channel."""

    def apply(self, rgb: Tensor) -> Tensor:
        """(n, 3, y, x) in 0-255 as the slide would look on white glass with the reference's amount of stain."""
        background = rgb.new_tensor(self.background).view(1, 3, 1, 1)
        factor = rgb.new_tensor(self.factor).view(1, 3, 1, 1)
        return (rgb / background).clamp_(1 / 255, 1.0).pow_(factor).mul_(255.0)


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of each cell: like batch norm in evaluation it looks at no neighbours."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(n, width, y, x) to the same."""
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class DoubleConv(nn.Sequential):
    """Two 3x3 convolutions, each with norm and rectifier."""

    def __init__(self, width: int, norm: str) -> None:
        layers = []
        for _ in range(2):
            layers += [
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width) if norm == "batch" else ChannelNorm(width),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*layers)


class Decoder(nn.Module):
    """From the coarsest map to the finest: up by deconvolution, plus the lateral map times a learned scale, two convolutions.

    Shapes
    ------
    maps (n, channels[i], y / strides[i], x / strides[i]), finest first -> (n, width, y / strides[0], x / strides[0])
    """

    def __init__(
        self, strides: tuple[int, ...], channels: tuple[int, ...], width: int, *, norm: str, delta: float
    ) -> None:
        super().__init__()
        self.lateral = nn.ModuleList([nn.Conv2d(c, width, 1) for c in channels])
        factors = [b // a for a, b in pairwise(strides)]
        self.up = nn.ModuleList([nn.ConvTranspose2d(width, width, k, stride=k) for k in factors])
        self.convolve = nn.ModuleList([DoubleConv(width, norm) for _ in factors])
        self.delta = nn.Parameter(torch.full((len(factors),), float(delta)))

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Decode."""
        x = self.lateral[-1](maps[-1])
        for i in reversed(range(len(self.up))):
            x = self.convolve[i](self.up[i](x) + self.delta[i] * self.lateral[i](maps[i]))
        return x


class PixNetNetwork(nn.Module):
    """The network.

    Beside the decoder runs a base: fixed linear combinations of the encoder's maps and of their means and spreads in
    windows around each cell, resized to the finest grid. A linear head on it is ridge regression on image features; the
    decoder starts as a correction of size zero.

    Parameters
    ----------
    pyramid
        Encoder.
    n_genes
        Genes.
    width
        Channels of the decoder.
    n_base
        Channels of the base; 0 leaves it out.
    context
        Edges in px of the windows that the base sees; see :class:`ContextFields`.
    norm
        ``"batch"`` or ``"layer"``.
    delta
        Start of the scales of the lateral maps.
    finest
        Leave out maps of the encoder with a smaller stride than this, as long as two are left.
    rates
        Map is a positive rate, the softplus of the head; else it is the head.

    Shapes
    ------
    rgb (n, 3, y, x) in 0-255, y and x multiples of `multiple` -> :meth:`features` (n, n_base + width, y / stride,
    x / stride) -> :meth:`genes` (n, n_genes, y / stride, x / stride).
    """

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
        self.stride, self.multiple = strides[0], strides[-1]
        self.n_base, self.width, self.rates = n_base, width, rates
        self.decoder = Decoder(strides, channels, width, norm=norm, delta=delta)
        self.context, widths = None, list(channels)
        if n_base and context:
            source = max(range(len(pyramid.strides))[pyramid.context_level], self.first)
            self.context_level = source - self.first
            cell = context_cell(pyramid.strides[source], self.multiple, min(context))
            self.context = ContextFields(pyramid.strides[source], cell, tuple(context))
            widths += [pyramid.channels[source]] * (2 * len(context))
        self.n_levels = sum(widths)
        self.base = nn.ModuleList(
            [nn.Conv2d(c, n_base, 1, bias=i == 0) for i, c in enumerate(widths)] if n_base else []
        )
        self.head = nn.Conv2d(n_base + width, n_genes, 1)
        self.register_buffer("scale", torch.ones(n_genes))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        for parameter in self.base.parameters():
            parameter.requires_grad_(False)  # set by regression, see `fit_base`

    def train(self, mode: bool = True) -> PixNetNetwork:  # noqa: FBT001, FBT002 -- torch's signature
        """Training mode for the decoder; the encoder keeps its published statistics."""
        super().train(mode)
        self.pyramid.eval()
        return self

    def encode(self, rgb: Tensor) -> list[Tensor]:
        """Maps of the encoder that are used, finest first."""
        return self.pyramid(rgb)[self.first :]

    def levels(self, rgb: Tensor, cells: tuple[int, int, int, int] | None = None) -> Tensor:
        """All that the base combines, on the finest grid: (n, n_levels, y, x); only cells (y0, y1, x0, x1) if given."""
        maps = self._base_maps(self.encode(rgb))
        if cells is not None:  # maps that come to some thousand channels are large where nobody needs them
            return torch.cat([_resize_part(m, maps[0].shape[-2] // m.shape[-2], cells) for m in maps], dim=1)
        return torch.cat([_resize(m, maps[0].shape[-2:]) for m in maps], dim=1)

    def base_features(self, maps: list[Tensor]) -> Tensor:
        """Base from the maps of the encoder: (n, n_base, y / stride, x / stride)."""
        # What has cells of one size is added before it is resized, and the rest in place: of maps as large as the finest one,
        # the time goes into getting memory for them.
        by_size: dict[torch.Size, Tensor] = {}
        for project, m in zip(self.base, self._base_maps(maps), strict=True):
            size, part = m.shape[-2:], project(m)
            by_size[size] = by_size[size].add_(part) if size in by_size else part
        total, *coarser = by_size.values()
        for part in coarser:
            total.add_(_resize(part, total.shape[-2:]))
        return total

    def _base_maps(self, maps: list[Tensor]) -> list[Tensor]:
        if self.context is None:
            return maps
        source = maps[self.context_level]
        return [*maps, *self.context(source).split(source.shape[1], dim=1)]

    def combine(self, maps: list[Tensor]) -> Tensor:
        """Base and decoder from the maps of the encoder."""
        parts = [self.decoder(maps)]
        if self.n_base:
            parts.insert(0, self.base_features(maps))
        return torch.cat(parts, dim=1)

    def features(self, rgb: Tensor) -> Tensor:
        """Base and decoder: what the head is linear in."""
        return self.combine(self.encode(rgb))

    def genes(self, features: Tensor) -> Tensor:
        """Map of the genes from that of the features."""
        z = self.head(features)
        return F.softplus(z) * self.scale.view(1, -1, 1, 1) if self.rates else z

    def from_pooled(self, features: Tensor) -> Tensor:
        """Genes of regions from their mean features (n, c): the head is linear, so it may come last."""
        return F.linear(features, self.head.weight[:, :, 0, 0], self.head.bias)

    def correction(self, decoded: Tensor) -> Tensor:
        """Share of the decoder in genes of regions, from its mean features (n, width): what is added to the base."""
        return F.linear(decoded, self.head.weight[:, self.n_base :, 0, 0], self.head.bias)

    def with_genes(self, index: list[int]) -> PixNetNetwork:
        """Copy that predicts some of the genes."""
        other = copy.copy(self)
        other._modules = dict(self._modules)
        other._buffers = dict(self._buffers)
        other.head = nn.Conv2d(self.head.in_channels, len(index), 1).to(self.head.weight)
        other.head.weight = nn.Parameter(self.head.weight.detach()[index], requires_grad=False)
        other.head.bias = nn.Parameter(self.head.bias.detach()[index], requires_grad=False)
        other.scale = self.scale[index]
        return other


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, to a multiple of the size; the same bits whether the map is a tile or a slide.

    torch interpolates small maps with another kernel, which rounds differently: small maps are continued beyond their
    right edge, by the values that interpolation would take there anyway.
    """
    height, width = maps.shape[-2:]
    if (height, width) == size:
        return maps
    factor = size[1] // width
    missing = _LARGE_MAP - sum(size)
    if missing > 0:
        maps = F.pad(maps, (0, -(-missing // factor), 0, 0), mode="replicate")
    resized = F.interpolate(maps, size=(size[0], maps.shape[-1] * factor), mode="bilinear", align_corners=False)
    return resized[..., : size[1]]


def _resize_part(maps: Tensor, factor: int, cells: tuple[int, int, int, int]) -> Tensor:
    """Cells (y0, y1, x0, x1) of the map resized by a factor."""
    y0, y1, x0, x1 = cells
    height, width = maps.shape[-2:]
    # One cell more on each side is what bilinear interpolation reads.
    top, left = max(y0 // factor - 1, 0), max(x0 // factor - 1, 0)
    part = maps[..., top : min(-(-y1 // factor) + 1, height), left : min(-(-x1 // factor) + 1, width)]
    part = _resize(part, (part.shape[-2] * factor, part.shape[-1] * factor))
    top, left = y0 - top * factor, x0 - left * factor
    return part[..., top : top + y1 - y0, left : left + x1 - x0]


def receptive_halo(network: PixNetNetwork) -> int:
    """Pixels of context around a tile on which its cells, and one cell more, can depend.

    Measured, not derived, so that it holds for any encoder: pixels beyond an edge are made NaN, and NaN spreads to all
    that reads them. Both ends of both axes are tried; the result is a multiple of the coarsest stride.

    Raises
    ------
    ValueError
        If NaN spreads everywhere: the network has operations over the whole image.
    """
    probe = copy.deepcopy(network).double().cpu().eval()
    n_cells = _FIRST_PROBE
    while n_cells <= _LAST_PROBE:
        reach = [_reach(probe, n_cells * network.multiple, axis, side) for axis in (2, 3) for side in (0, 1)]
        if None not in reach:
            # The resize to pixels reads one more cell.
            return -(-(max(reach) + network.stride) // network.multiple) * network.multiple
        n_cells *= 2
    msg = (
        f"The encoder {network.pyramid.name!r} reads the whole image (or more than {n_cells * network.multiple // 4} px "
        "around a pixel), so that tiles cannot equal the slide. Use a convolutional encoder without global operations."
    )
    raise ValueError(msg)


def _reach(probe: PixNetNetwork, length: int, axis: int, side: int) -> int | None:
    """Pixels beyond an edge in the middle of a strip that its cells still depend on; None if that is all of them."""
    edge = length // 2
    shape = [1, 3, probe.multiple, probe.multiple]
    shape[axis] = length
    rgb = torch.full(shape, 128.0, dtype=torch.float64)
    rgb.narrow(axis, 0 if side == 0 else edge, edge).fill_(torch.nan)
    with torch.inference_mode(), suitable_threads(0, 0):
        spoiled = probe.features(rgb).isnan().any(dim=1).any(dim=4 - axis)[0]
    clean = (~spoiled).nonzero()[:, 0]
    if not len(clean):
        return None
    cell = edge // probe.stride
    return (int(clean[0]) - cell if side == 0 else cell - int(clean[-1]) - 1) * probe.stride
