"""A slide in tiles: maps of the encoder that tiles share, and the network tile by tile.

The values are those of the whole slide.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from spatial_impute._geometry import apply_affine
from spatial_impute._io.workers import suitable_threads
from spatial_impute.encoders._pyramids import Box, coarser, cut_pixels, grow, relative
from spatial_impute.models.pixnet._region_weights import CellGrid, Regions, Stencil, build_stencil

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor

    from spatial_impute._image.resampling import ResampledImage, SlideOverview
    from spatial_impute.models.pixnet._network import PixNetNetwork, Stain

    Block = tuple[int, int]
    Stage = Callable[[list[Tensor], Box], Tensor]
    """From the maps of the encoder to some cells of a map (1, c, y, x)."""

_LIMIT = 2**28  # bytes: stripes of about 12,000 px for the default encoder and tiles of 1,024 px
_BATCH = 100_000  # regions whose weights are in memory at a time: some 100 MB


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


def forward_tile(
    network: PixNetNetwork, stage: Stage, slide: Slide, tile: tuple[int, int], *, margin: int = 0
) -> tuple[Tensor, CellGrid]:
    """Cells of one core, and up to `margin` cells around it: maps (c, rows, columns) and the place of these cells.

    Device and precision are those of the parameters of the network.
    """
    tiling, stride = slide.tiling, slide.tiling.stride
    window = tiling.window(tile)
    grid = tiling.grid(tile, margin)
    top, left = grid.y0 - window.y0 // stride, grid.x0 - window.x0 // stride
    cells = Box(top, top + grid.rows, left, left + grid.columns)
    # Workers of dask request one thread; two workers with a thread per core each are slower than one worker.
    n_cells = (window.y1 - window.y0) * (window.x1 - window.x0) // stride**2
    with suitable_threads(n_cells, network.head.in_channels):
        maps = slide.encoded.read(network, slide, window)
        return stage(maps, cells)[0], grid


def region_sums(
    maps: Tensor, regions: Regions, core: Box, grid: CellGrid, image: Box, *, squares: bool = False
) -> tuple[Tensor, Tensor]:
    """Sums over regions of the map resized to pixels, (n_regions, c), and their numbers of pixels; differentiable.

    With `squares` the sums are (n_regions, 2 c), the second half from the squared cells.
    """
    stencil = build_stencil(regions, core, grid, image)
    table = maps.flatten(1).T.contiguous()
    sums = sum_cells(table, [stencil])
    if squares:
        sums = torch.cat([sums, sum_cells(table.square(), [stencil])], dim=1)
    return sums, torch.from_numpy(stencil.n_pixels)


def sum_cells(table: Tensor, stencils: Sequence[Stencil]) -> Tensor:
    """Weighted sums over the regions of stencils, (n_regions, c); each stencil reads an equal share of the rows of a table."""
    n_rows = len(table) // len(stencils)
    cells = np.concatenate([s.cells + k * n_rows for k, s in enumerate(stencils)])
    lengths = np.concatenate([np.diff(s.start) for s in stencils])
    index, start = (torch.from_numpy(a).to(table.device) for a in (cells, np.cumsum(lengths) - lengths))
    weights = torch.from_numpy(np.concatenate([s.weights for s in stencils])).to(table)
    return F.embedding_bag(index, table, start, mode="sum", per_sample_weights=weights)


def regions_by_tile(regions: Regions, tiling: Tiling) -> dict[tuple[int, int], np.ndarray]:
    """Rows of the regions that touch each core; only cores that any region touches."""
    bounds = regions.bounds
    rows, columns = tiling.shape
    limit = np.array([columns - 1, rows - 1])
    # A region without a pixel centre is sampled at its own centre, which its bounds contain.
    low = np.floor((bounds[:, :2] - 1) / tiling.core).astype(np.int64)
    high = np.floor((bounds[:, 2:] + 1) / tiling.core).astype(np.int64)
    inside = np.all((high >= 0) & (low <= limit), axis=1, keepdims=True)
    low, high = np.clip(low, 0, limit), np.clip(high, 0, limit)
    size = np.where(inside, high - low + 1, 0)
    count = size.prod(axis=1)
    region = np.repeat(np.arange(len(bounds)), count)
    k = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    width = np.maximum(size[region, 0], 1)
    tile = (low[region, 1] + k // width) * columns + low[region, 0] + k % width
    order = np.argsort(tile, kind="stable")
    tiles, first = np.unique(tile[order], return_index=True)
    parts = np.split(region[order], first[1:])
    return {divmod(int(number), columns): part for number, part in zip(tiles, parts, strict=False)}


def iter_sums(
    network: PixNetNetwork,
    stage: Stage,
    slide: Slide,
    regions: Regions,
    *,
    squares: bool = False,
    on_tile: Callable[[], None] = lambda: None,
) -> Iterator[tuple[np.ndarray, Tensor, np.ndarray]]:
    """Sums over regions without a map of the slide: each tile that regions touch is computed once.

    Yields rows of `regions`, their sums as :func:`region_sums` returns them, and their numbers of pixels, float64. Regions within one
    tile come after this tile, those in several tiles at the end. Regions outside the image come last, with 0 pixels and
    without sums.
    """
    touching = regions_by_tile(regions, slide.tiling)
    n_tiles = np.zeros(len(regions), np.int64)
    for rows in touching.values():
        n_tiles[rows] += 1
    over_several = np.flatnonzero(n_tiles > 1)
    place = np.full(len(regions), -1)
    place[over_several] = np.arange(len(over_several))
    total, count = None, np.zeros(len(over_several))
    for tile in slide.order(touching, network):
        index = touching[tile]
        with torch.inference_mode():
            maps, grid = forward_tile(network, stage, slide, tile, margin=1)
            core, image = slide.tiling.pixels(tile), slide.tiling.image
            for start in range(0, len(index), _BATCH):
                rows = index[start : start + _BATCH]
                sums, n_pixels = region_sums(maps, regions.take(rows), core, grid, image, squares=squares)
                whole = place[rows] < 0
                if not whole.all():
                    if total is None:
                        total = torch.zeros(len(over_several), sums.shape[1], dtype=sums.dtype, device=sums.device)
                    parts = torch.from_numpy(place[rows[~whole]]).to(sums.device)
                    total[parts] += sums[torch.from_numpy(~whole).to(sums.device)]
                    count[place[rows[~whole]]] += n_pixels.numpy()[~whole]
                    sums, n_pixels = sums[torch.from_numpy(whole).to(sums.device)], n_pixels[torch.from_numpy(whole)]
                yield rows[whole], sums, n_pixels.numpy()
            del maps
        on_tile()
    if total is not None:
        yield over_several, total, count
    outside = np.flatnonzero(n_tiles == 0)
    if len(outside):
        yield outside, torch.zeros(len(outside), 0), np.zeros(len(outside))


def read_regions(
    network: PixNetNetwork, stage: Stage, slide: Slide, regions: Regions, n_channels: int, *, squares: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Sums over all regions, (n_regions, n_channels), and their numbers of pixels; see :func:`iter_sums`.

    `n_channels` includes those of `squares`.
    """
    sums, n_pixels = torch.zeros(len(regions), n_channels, dtype=network.head.weight.dtype), np.zeros(len(regions))
    for index, found, count in iter_sums(network, stage, slide, regions, squares=squares):
        if count.any():
            sums[index] = found.cpu()
        n_pixels[index] = count
    return sums.numpy(), n_pixels


@dataclass(frozen=True)
class DenseJob:
    """Computation of a dense map, tile by tile on any worker."""

    network: PixNetNetwork  # With the genes of the map
    slide: Slide
    dtype: str
    features: bool  # Store the features, from which the head computes the genes, instead of the genes
    tissue: SlideOverview | None  # Cells outside the tissue are NaN; None computes all cells
    wanted: frozenset[tuple[int, int]]  # Tiles to compute; the others are NaN
    image: str  # Fingerprint of the image at all its resolutions

    @property
    def n_channels(self) -> int:
        return self.network.head.in_channels if self.features else self.network.head.out_channels

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of the map: the cells that reach into the image."""
        stride = self.tiling.stride
        return -(-self.tiling.height // stride), -(-self.tiling.width // stride)

    @property
    def cell_to_um(self) -> np.ndarray:
        """(3, 3) affine from cell corners to the section frame."""
        return self.slide.image.to_um @ np.diag([self.tiling.stride, self.tiling.stride, 1.0])

    @property
    def chunk(self) -> int:
        """Cells along the edge of a tile."""
        return self.tiling.core // self.tiling.stride

    def tiles(self) -> list[tuple[int, int]]:
        """All tiles, in the order in which chunks of the image are decoded least often."""
        rows, columns = self.tiling.shape
        return self.slide.order(((i, j) for i in range(rows) for j in range(columns)), self.network)

    @property
    def tiling(self) -> Tiling:
        return self.slide.tiling

    def place(self, tile: tuple[int, int]) -> tuple[slice, slice]:
        """Rows and columns of the map that a tile covers."""
        (rows, columns), n = self.cells, self.chunk
        y, x = tile[0] * n, tile[1] * n
        return slice(y, min(y + n, rows)), slice(x, min(x + n, columns))

    def compute(self, tile: tuple[int, int]) -> np.ndarray:
        """(n_channels, rows, columns) of one tile."""
        y, x = self.place(tile)
        shape = (self.n_channels, y.stop - y.start, x.stop - x.start)
        if tile not in self.wanted:
            return np.full(shape, np.nan, self.dtype)
        network = self.network
        stage = network.combine if self.features else network.predict
        with torch.inference_mode():
            maps, _ = forward_tile(network, stage, self.slide, tile)
        values = maps[:, : shape[1], : shape[2]].cpu().numpy()
        if self.tissue is not None:
            cx, cy = np.meshgrid(np.arange(x.start, x.stop) + 0.5, np.arange(y.start, y.stop) + 0.5)
            centers = apply_affine(np.column_stack([cx.ravel(), cy.ravel()]), self.cell_to_um)
            values = np.where(self.tissue.covers(centers).reshape(cx.shape), values, np.nan)
        return values.astype(self.dtype)

    def fingerprint(self, names: list[str]) -> str:
        """Hash of the network, the image, the tiles and the names: equal for equal maps."""
        digest = hashlib.sha256()
        for key, value in self.network.state_dict().items():
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        stain = self.slide.stain
        record = {
            "image": [self.image, list(self.slide.image.shape)],
            "stain": [list(stain.background), list(stain.factor)],
            "tiling": [self.tiling.core, self.tiling.halo, self.tiling.stride],
            "dtype": self.dtype,
            "precision": self.network.precision,
            "features": self.features,
            "wanted": sorted(self.wanted),
            "tissue": None if self.tissue is None else hashlib.sha256(self.tissue.tissue.tobytes()).hexdigest(),
            "names": names,
        }
        digest.update(json.dumps(record, sort_keys=True).encode())
        return digest.hexdigest()


def tissue_tiles(slide: Slide, found: SlideOverview) -> frozenset[tuple[int, int]]:
    """Tiles with at least one pixel of the tissue mask."""
    y, x = np.nonzero(found.tissue)
    # Corners of the pixels of the mask, which are larger than a cell and may lie in several tiles.
    corners = [np.column_stack([x + dx, y + dy]) for dx in (0.01, 0.99) for dy in (0.01, 0.99)]
    points = apply_affine(np.concatenate(corners), slide.image.from_um @ found.to_um)
    tiling = slide.tiling
    inside = np.all((points >= 0) & (points < [tiling.width, tiling.height]), axis=1)
    tiles = np.unique((points[inside] // tiling.core).astype(int), axis=0)
    return frozenset((int(row), int(column)) for column, row in tiles)
