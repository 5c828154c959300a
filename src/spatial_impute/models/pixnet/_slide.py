"""A slide in tiles, and the maps of the encoder that its tiles share."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from spatial_impute.encoders._pyramids import Box, coarser, cut_pixels, grow, relative
from spatial_impute.models.pixnet._region_weights import CellGrid

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from spatial_impute._image.resampling import ResampledImage
    from spatial_impute.models.pixnet._network import PixNetNetwork, Stain

    Block = tuple[int, int]

_LIMIT = 2**28  # bytes: stripes of about 12,000 px for the default encoder and tiles of 1,024 px


@dataclass(frozen=True)
class Tiling:
    """Partition of an image into cores, each of which is computed with context around it.

    The image is extended in white, at its right and lower end, to a multiple of the coarsest cell. Cores begin at
    multiples of it; convolutions are padded with zeros at the ends of the extended image only.
    """

    height: int
    width: int  # Size of the image in px
    core: int  # Edge of a core in px, a multiple of `multiple`
    halo: int  # Context in px, a multiple of `multiple`
    stride: int
    multiple: int

    @classmethod
    def of_network(cls, network: PixNetNetwork, shape: tuple[int, int], core: int, halo: int) -> Tiling:
        """Tiling of an image; `core` px are rounded up to the coarsest cell of the network."""
        multiple = network.multiple
        return cls(*shape, -(-core // multiple) * multiple, halo, network.stride, multiple)

    @property
    def extended(self) -> tuple[int, int]:
        """Height and width of the extended image."""
        return -(-self.height // self.multiple) * self.multiple, -(-self.width // self.multiple) * self.multiple

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of decoder cells of the extended image."""
        return self.extended[0] // self.stride, self.extended[1] // self.stride

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of cores."""
        return -(-self.height // self.core), -(-self.width // self.core)

    @property
    def image(self) -> Box:
        return Box(0, self.height, 0, self.width)

    def box(self, tile: tuple[int, int]) -> Box:
        """Pixels of a core within the extended image."""
        y, x = tile[0] * self.core, tile[1] * self.core
        return Box(y, min(y + self.core, self.extended[0]), x, min(x + self.core, self.extended[1]))

    def pixels(self, tile: tuple[int, int]) -> Box:
        """Pixels of a core that lie in the image."""
        box = self.box(tile)
        return Box(box.y0, min(box.y1, self.height), box.x0, min(box.x1, self.width))

    def window(self, tile: tuple[int, int]) -> Box:
        """Pixels of a core and its context."""
        return grow(self.box(tile), self.halo, self.extended)

    def grid(self, tile: tuple[int, int], margin: int) -> CellGrid:
        """Cells of a core, and up to `margin` more on each side."""
        y0, y1, x0, x1 = grow(coarser(self.box(tile), self.stride), margin, self.cells)
        return CellGrid(self.stride, *self.cells, y0, x0, y1 - y0, x1 - x0)


class EncodedMaps:
    """Maps of the encoder in blocks, made when they are needed; the least recently used ones are dropped.

    The encoder takes most of the time and needs little context; decoder and windows of the base need wide context and take
    little time. A tile finds here what its neighbors have encoded. A thread waits for the blocks that another one makes.
    A copy for another process starts empty.
    """

    def __init__(self) -> None:
        self._blocks: OrderedDict[Block, Future[list[Tensor]]] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[EncodedMaps], tuple[()]]:
        return EncodedMaps, ()

    def read(self, network: PixNetNetwork, slide: Slide, window: Box) -> list[Tensor]:
        """Maps of the window (in px) of a tile."""
        edge = _edge(slide.tiling)
        rows, columns = (range(window[i] // edge, -(-window[i + 1] // edge)) for i in (0, 2))
        wanted = [(i, j) for i in rows for j in columns]
        with self._lock:
            missing = {key: Future[list[torch.Tensor]]() for key in wanted if key not in self._blocks}
            self._blocks.update(missing)
            found = {key: self._blocks[key] for key in wanted}  # stay if another thread drops them
            for key in wanted:
                self._blocks.move_to_end(key)
            while len(self._blocks) > max(_n_blocks(network, slide.tiling), len(wanted)):
                self._blocks.popitem(last=False)
        if missing:
            self._fill(missing, network, slide)
        lines = [_joined([found[i, j].result() for j in columns], dim=-1) for i in rows]
        return _joined(lines, dim=-2)

    def _fill(self, missing: dict[Block, Future[list[Tensor]]], network: PixNetNetwork, slide: Slide) -> None:
        """Encode the rectangle of the missing blocks, in one piece."""
        edge, (height, width) = _edge(slide.tiling), slide.tiling.extended
        boxes = {
            (i, j): Box(i * edge, min((i + 1) * edge, height), j * edge, min((j + 1) * edge, width)) for i, j in missing
        }
        y0, y1, x0, x1 = zip(*boxes.values(), strict=True)
        whole = Box(min(y0), max(y1), min(x0), max(x1))
        try:
            around = grow(whole, network.pyramid.halo, (height, width))
            maps = network.encode(slide.rgb(around, network), relative(whole, around))
            for key, box in boxes.items():
                block = cut_pixels(maps, network.strides, relative(box, whole))
                missing[key].set_result([m.clone() for m in block])
        except BaseException as error:
            with self._lock:
                for key, future in missing.items():
                    if not future.done():
                        future.set_exception(error)
                        self._blocks.pop(key, None)
            raise


@dataclass(frozen=True)
class Slide:
    """An image with its stain and tiling."""

    image: ResampledImage
    stain: Stain
    tiling: Tiling

    encoded: EncodedMaps = field(default_factory=EncodedMaps, compare=False, repr=False)
    """Maps of the encoder that tiles share; of one network."""

    def order(self, tiles: Iterable[tuple[int, int]], network: PixNetNetwork) -> list[tuple[int, int]]:
        """Tiles row by row within stripes, so that the next row finds decoded chunks and encoded maps."""
        core, halo = self.tiling.core, self.tiling.halo
        image = self.image.stripe(core, network.pyramid.halo, halo) // core
        columns = max(1, min(image, _columns_of_stripe(network, self.tiling)))
        return sorted(tiles, key=lambda tile: (tile[1] // columns, tile))

    def rgb(self, window: Box, network: PixNetNetwork) -> Tensor:
        """Pixels of a window with the stain of the training slides: (1, 3, y, x), on the device of the network."""
        weight = network.head.weight
        return self.stain.apply(torch.from_numpy(self.image.window(*window)).to(weight.device, weight.dtype)[None])


def _columns_of_stripe(network: PixNetNetwork, tiling: Tiling) -> int:
    """Columns of tiles whose maps are kept until the next row of tiles reads them."""
    edge = _edge(tiling)
    n_rows, around = (tiling.core + 2 * tiling.halo) // edge, 2 * tiling.halo // edge
    return max(1, (_n_blocks(network, tiling) // n_rows - around) * edge // tiling.core)


def _edge(tiling: Tiling) -> int:
    """Edge of a block in px: windows of tiles begin and end at multiples of it."""
    return math.gcd(tiling.core, tiling.halo)


def _n_blocks(network: PixNetNetwork, tiling: Tiling) -> int:
    """Number of blocks that are kept."""
    per_pixel = sum(c / s**2 for c, s in zip(network.channels, network.strides, strict=True))
    return int(_LIMIT / (per_pixel * network.head.weight.element_size() * _edge(tiling) ** 2))


def _joined(parts: list[list[Tensor]], *, dim: int) -> list[Tensor]:
    """Lists of maps, side by side."""
    return [torch.cat(maps, dim=dim) for maps in zip(*parts, strict=True)] if len(parts) > 1 else parts[0]
