"""Image encoders as pyramids: from an RGB image to feature maps of decreasing resolution, by local operations only.

Below: windows of maps, and how much context around them they need.
"""

from __future__ import annotations

import copy
import math
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from skimage.color import hed_from_rgb
from torch import Tensor, nn
from torch.nn import functional as F

from spatial_impute._io.workers import suitable_threads
from spatial_impute._validation import require_one_of
from spatial_impute.encoders._encoder import ENCODERS, IMAGENET_MEAN, IMAGENET_STD, weights_hash
from spatial_impute.encoders._networks import (
    EFFICIENTNET,
    LITE_MEAN,
    LITE_STD,
    EfficientNetLite2,
    TellezEncoder,
    TellezNetwork,
    build_resnet,
    load_efficientnet,
    load_resnet,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

# Size of a strip of the largest map: it fits in the cache, and allocators reuse blocks of this size.
_STRIP_BYTES = 2**22
_PROBE = 256  # px; edge of the test image for an unknown module
_PROBES = (8, 16, 32, 64)  # coarsest cells along the test image


class Pyramid(nn.Module):
    """Feature maps at several strides, for a network of the given `resolution` (um per pixel) and identity `name`.

    `strides` are pixels per cell, finest first; each divides the next. `context_level` is the map whose means and standard
    deviations over windows describe the surroundings of a place: the deepest map computed from the unreduced image.
    `window` is the edge in px of the windows that it reads one by one, 1 if it reads the whole image; see
    :class:`ModulePyramid`.

    Shapes: (n, 3, y, x) in 0-255, y and x multiples of the last stride -> maps (n, channels[i], y / strides[i],
    x / strides[i]).
    """

    name: str
    strides: tuple[int, ...]
    channels: tuple[int, ...]
    resolution: float
    context_level: int = -1
    window: int = 1

    @cached_property
    def halo(self) -> int:
        """Pixels around a window on which its maps can depend; a multiple of the last stride and of `window`."""
        multiple = math.lcm(self.strides[-1], self.window)
        probe = copy.deepcopy(self).double().cpu().eval()
        return -(-measured_halo(probe, self.strides, multiple, name=self.name) // multiple) * multiple

    def within(self, rgb: Tensor, window: Box) -> list[Tensor]:
        """Maps of a window (in px) of the image; `halo` px around it, or the end of the image, make them exact."""
        return cut_pixels(self(rgb), self.strides, window)


class TexturePyramid(Pyramid):
    """``"texture"``: stain and texture statistics of each cell; needs no weights.

    Hematoxylin, eosin :cite:p:`Ruifrok2001` and luminance, each by its mean, its standard deviation, and the mean and the
    standard deviation of the size of four octaves of detail, from edges of nuclei to groups of them, make 30 numbers.
    """

    name = "texture"
    strides = (4, 8, 16, 32, 64)
    channels = (30,) * 5
    resolution = 1.0
    context_level = 2

    _BLURS = (3, 5, 9, 17)  # px; the difference of two successive blurs is one octave
    stains: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("stains", torch.from_numpy(hed_from_rgb[:, :2].T.copy()).float(), persistent=False)

    def forward(self, rgb: Tensor) -> list[Tensor]:
        density = -(rgb.clamp(min=1.0) / 255.0).log()
        stains = torch.einsum("sc,ncyx->nsyx", self.stains.to(rgb.dtype), density)
        image = torch.cat([stains, density.mean(dim=1, keepdim=True)], dim=1)
        blurs = [image, *(window_mean(image, edge) for edge in self._BLURS)]
        pixels = torch.cat([image, *((a - b).abs() for a, b in pairwise(blurs))], dim=1)
        means, squares, maps = pixels, pixels**2, []
        for i, stride in enumerate(self.strides):
            factor = stride if i == 0 else stride // self.strides[i - 1]
            means, squares = F.avg_pool2d(means, factor), F.avg_pool2d(squares, factor)
            # Without the constant, rounding errors would become features where nothing varies.
            maps.append(torch.cat([means, ((squares - means**2).clamp(min=0) + 1e-6).sqrt()], dim=1))
        return maps


class TellezPyramid(Pyramid):
    """Convolutions of the multitask pathology encoder on the image and on its two-, four- and eightfold reductions.

    The network was trained on patches of 64 um; a cell of its deepest map sees 31 um. The reductions add cells that see
    62, 124 and 248 um, at a third of the cost of the image itself. The published convolutions are not padded. Here they
    are padded alternately after and before their input, so that each cell lies within 2.5 px of the centre of its
    receptive field.
    """

    name = "tellez-multitask"
    strides = (4, 8, 16, 32, 64, 128)
    channels = (128, 128, 128, 128, 128, 128)
    resolution = 1.0
    context_level = 2

    _CONTEXT = 16  # px that the deepest map reads around a window, rounded up to its stride

    def __init__(self, *, pretrained: bool = True) -> None:
        super().__init__()
        self.blocks = (TellezEncoder("cpu").network if pretrained else TellezNetwork()).blocks
        for module in self.blocks.modules():
            if isinstance(module, nn.LeakyReLU):
                module.inplace = True  # saves a copy of the largest maps

    def forward(self, rgb: Tensor) -> list[Tensor]:
        return self.within(rgb, Box(0, rgb.shape[-2], 0, rgb.shape[-1]))

    def within(self, rgb: Tensor, window: Box) -> list[Tensor]:
        reduced, maps = (rgb / 127.5).sub_(1.0), []
        for factor in (1, 2, 4, 8):
            if factor > 1:
                reduced = F.avg_pool2d(reduced, 2)
            # The deepest map needs less than a cell around the window; the context is smaller on a finer image.
            inner = coarser(window, factor)
            around = grow(inner, self._CONTEXT, reduced.shape[-2:])
            found = cut_pixels(self._stack(cut(reduced, around)), (4, 8, 16), relative(inner, around))
            maps += found if factor == 1 else found[-1:]
        return maps

    def _stack(self, x: Tensor) -> list[Tensor]:
        """Maps at the strides 4, 8 and 16. The map of stride 2 shows edges of single nuclei and costs four times more."""
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
    """Feature map of `x`, on a CPU strip by strip: allocating large intermediate maps took longer than the convolutions.

    `run` computes the map of some rows of `x`; its further arguments are 1 at the upper and at the lower end, else 0. A row
    of the map reads `stride` rows of `x`, `above` rows above them, and one row below. Maps have `channels` channels.
    """
    height = x.shape[-2] // stride
    n_rows = height
    if x.device.type == "cpu":
        n_rows = max(1, _STRIP_BYTES // (x.shape[-1] * channels * x.element_size()))
    if n_rows >= height:
        return run(x, 1, 1)
    # Strips of about the same size: torch rounds differently for the rest, if it is small.
    n_rows = -(-height // -(-height // n_rows))
    whole = x.new_empty((len(x), channels, height, x.shape[-1] // stride))
    for top in range(0, height, n_rows):
        bottom = min(top + n_rows, height)
        rows = x[..., max(stride * top - above, 0) : stride * bottom + 1, :]
        whole[..., top:bottom, :] = run(rows, int(top == 0), int(bottom == height))
    return whole


def window_mean(maps: Tensor, n: int) -> Tensor:
    """Mean over `n` x `n` cells around each cell: rows, then columns, which needs 2 n sums instead of n^2."""
    for kernel in ((n, 1), (1, n)):
        maps = F.avg_pool2d(maps, kernel, stride=1, padding=(kernel[0] // 2, kernel[1] // 2), count_include_pad=False)
    return maps


class ModulePyramid(Pyramid):
    """Pyramid from a module of the user or a ResNet, which maps (n, 3, y, x) to a sequence of feature maps.

    `mean` and `std` normalise RGB in 0-1. The default name is that of the class with a hash of the weights. Strides and
    channels are measured on a test image; a module whose strides do not divide each other raises a ``ValueError``.

    With `window`, the module sees windows of this edge in px, one by one: an operation over the whole window, such as
    attention, is then local in the image. A module that returns one map, as vision transformers do, may return it alone.
    """

    resolution = 0.5
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.module = module.eval()
        self.name = f"{type(module).__name__}-{weights_hash(module)}" if name is None else name
        self.window = window or 1
        probe = window or _PROBE
        for key, values in {"mean": mean, "std": std}.items():
            scaled = 255.0 * torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1)
            self.register_buffer(key, scaled, persistent=False)
        parameter = next(module.parameters(), torch.zeros(()))
        with torch.inference_mode():
            maps = self.forward(torch.full((1, 3, probe, probe), 128.0, dtype=parameter.dtype))
        self.strides, self.channels = _layout(maps, self.name, probe)

    def forward(self, rgb: Tensor) -> list[Tensor]:
        run: Callable[[Tensor], Sequence[Tensor]] = getattr(self.module, "pyramid", self.module)
        scaled = (rgb - self.mean.to(rgb.dtype)) / self.std.to(rgb.dtype)
        if self.window == 1:
            return _as_list(run(scaled))
        n, w = (rgb.shape[2] // self.window, rgb.shape[3] // self.window), self.window
        windows = scaled.unflatten(2, (n[0], w)).unflatten(4, (n[1], w)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        maps = _as_list(run(windows))
        # (n * rows * columns, c, y, x) to (n, c, rows * y, columns * x)
        return [m.unflatten(0, (len(rgb), *n)).permute(0, 3, 1, 4, 2, 5).flatten(2, 3).flatten(3, 4) for m in maps]


def _as_list(maps: Tensor | dict[str, Tensor] | Sequence[Tensor]) -> list[Tensor]:
    if isinstance(maps, Tensor):
        return [maps]
    return list(maps.values()) if isinstance(maps, dict) else list(maps)


def _layout(maps: list[Tensor], name: str, probe: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Strides and channels of the maps of the test image."""
    shapes = [tuple(m.shape) for m in maps if isinstance(m, Tensor)]
    strides = tuple(probe // s[-1] for s in shapes if len(s) == 4 and s[-1] > 0)
    exact = all(len(s) == 4 and s[-1] * k == s[-2] * k == probe for s, k in zip(shapes, strides, strict=False))
    nested = all(b % a == 0 and b > a for a, b in pairwise(strides))
    if not strides or len(strides) != len(maps) or not exact or not nested:
        msg = (
            f"The encoder {name!r} must return feature maps (n, channels, y / s, x / s), finest first, at strides s that "
            f"divide each other; for an image of {probe} x {probe} px it returned shapes {shapes}."
        )
        raise ValueError(msg)
    return strides, tuple(s[1] for s in shapes)


def build_pyramid(encoder: str | nn.Module, *, window: int | None = None, pretrained: bool = True) -> Pyramid:
    """Pyramid by name (one of :data:`ENCODERS`), or from a module that expects the normalisation of ImageNet.

    `window` is for modules; see :class:`ModulePyramid`. Without `pretrained` the weights of a named encoder are random, and the caller loads others.
    """
    if isinstance(encoder, Pyramid):
        return encoder
    if isinstance(encoder, nn.Module):
        return ModulePyramid(encoder, window=window)
    if not isinstance(encoder, str):
        msg = f"`encoder` must be one of {list(ENCODERS)} or an nn.Module, found {type(encoder).__name__}."
        raise TypeError(msg)
    require_one_of(encoder, ENCODERS, name="encoder")
    if encoder == TellezPyramid.name:
        return TellezPyramid(pretrained=pretrained)
    if encoder == TexturePyramid.name:
        return TexturePyramid()
    if encoder == EFFICIENTNET:
        lite = load_efficientnet() if pretrained else EfficientNetLite2()
        return ModulePyramid(lite, name=encoder, mean=LITE_MEAN, std=LITE_STD)
    network = load_resnet(encoder) if pretrained else build_resnet(encoder.removeprefix("ciga-"))
    return ModulePyramid(network, name=encoder)


class Box(NamedTuple):
    """Cells of a map, or pixels of an image, [y0, y1) x [x0, x1)."""

    y0: int
    y1: int
    x0: int
    x1: int


def cut(maps: Tensor, cells: Box) -> Tensor:
    """Some cells of a map."""
    return maps[..., cells[0] : cells[1], cells[2] : cells[3]]


def cut_pixels(maps: Iterable[Tensor], strides: Iterable[int], pixels: Box) -> list[Tensor]:
    """Cells of maps of several strides that lie in a window in px; its edges are multiples of the strides."""
    y0, y1, x0, x1 = pixels
    return [cut(m, Box(y0 // s, y1 // s, x0 // s, x1 // s)) for m, s in zip(maps, strides, strict=True)]


def grow(cells: Box, n: int, size: Sequence[int]) -> Box:
    """The cells, and up to `n` more on each side, in a map of this size."""
    y0, y1, x0, x1 = cells
    return Box(max(y0 - n, 0), min(y1 + n, size[0]), max(x0 - n, 0), min(x1 + n, size[1]))


def coarser(cells: Box, factor: int) -> Box:
    """Cells of a map with a larger stride that hold the cells."""
    y0, y1, x0, x1 = cells
    return Box(y0 // factor, -(-y1 // factor), x0 // factor, -(-x1 // factor))


def relative(cells: Box, window: Box, factor: int = 1) -> Box:
    """Cells counted from the corner of a window, whose cells are `factor` times as large."""
    y, x = window[0] * factor, window[2] * factor
    return Box(cells[0] - y, cells[1] - y, cells[2] - x, cells[3] - x)


def measured_halo(run: Callable[[Tensor], list[Tensor]], strides: Sequence[int], multiple: int, *, name: str) -> int:
    """Pixels of context around a window on which its cells can depend; a multiple of the finest stride.

    `run` makes maps at `strides` from an image in double precision whose edges are multiples of `multiple`. The value is
    measured, so that it holds for any encoder: pixels beyond an edge are set to NaN, which spreads to all cells that read
    them. Both ends of both axes are tested. Operations over the whole image raise a ``ValueError``, which names the encoder.
    """
    for n_cells in _PROBES:
        length = n_cells * multiple
        found = [_reach(run, strides, multiple, (length, axis, side)) for axis in (2, 3) for side in (0, 1)]
        reach = [pixels for pixels in found if pixels is not None]
        if len(reach) == len(found):
            return max(reach)
    msg = (
        f"The encoder {name!r} reads the whole image (or more than {_PROBES[-1] * multiple // 2} px "
        "around a pixel), so that tiles cannot equal the slide. Use a convolutional encoder without global operations, "
        "or set `model_params={'encoder_window': 224}`: the edge in px of windows that the encoder reads one by one."
    )
    raise ValueError(msg)


def _reach(
    run: Callable[[Tensor], list[Tensor]], strides: Sequence[int], multiple: int, probe: tuple[int, int, int]
) -> int | None:
    """Pixels beyond an edge in the middle of a strip on which cells depend; None if all cells of a map depend on them.

    `probe` is the length of the strip, its axis, and the side that is not a number.
    """
    length, axis, side = probe
    edge = length // 2
    shape = [1, 3, multiple, multiple]
    shape[axis] = length
    rgb = torch.full(shape, 128.0, dtype=torch.float64)
    rgb.narrow(axis, 0 if side == 0 else edge, edge).fill_(torch.nan)
    with torch.inference_mode(), suitable_threads(0, 0):
        maps = run(rgb)
    reach = 0
    for m, stride in zip(maps, strides, strict=True):
        clean = (~m.isnan().any(dim=1).any(dim=4 - axis)[0]).nonzero()[:, 0]
        if not len(clean):
            return None
        first, last = int(clean[0]) * stride, (int(clean[-1]) + 1) * stride
        reach = max(reach, first - edge if side == 0 else edge - last)
    return reach
