"""Run a network over an image tile by tile, so that no cell can tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from spatial_impute.encoders._encoder import requested_threads
from spatial_impute.models.asign._graph_inputs import suitable_threads
from spatial_impute.models.pixnet._region_weights import Box, CellGrid, Regions, build_stencil

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor

    from spatial_impute._image.resampling import ResampledImage
    from spatial_impute.models.pixnet._network import PixNetNetwork, Stain


_BATCH = 100_000  # regions whose weights are at hand at a time: some 100 MB


@dataclass(frozen=True)
class Tiling:
    """Cores that partition an image, and the context each is computed with.

    The image is extended once, at its right and lower end and in white, to a multiple of the coarsest cell. Cores begin
    at multiples of it; convolutions pad with zeros at the ends of that extended image only.
    """

    height: int
    width: int
    """Of the image in px."""
    core: int
    """Edge of a core in px, a multiple of `multiple`."""
    halo: int
    """Context in px, a multiple of `multiple`."""
    stride: int
    multiple: int

    @property
    def extended(self) -> tuple[int, int]:
        """Height and width of the extended image."""
        return tuple(-(-n // self.multiple) * self.multiple for n in (self.height, self.width))

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
        """All pixels of the image."""
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
        """A core with its context."""
        box = self.box(tile)
        return Box(
            max(box.y0 - self.halo, 0),
            min(box.y1 + self.halo, self.extended[0]),
            max(box.x0 - self.halo, 0),
            min(box.x1 + self.halo, self.extended[1]),
        )

    def grid(self, tile: tuple[int, int], margin: int) -> CellGrid:
        """Cells of a core and `margin` more on each side where there are any."""
        box, (n_y, n_x), s = self.box(tile), self.cells, self.stride
        y0, x0 = max(box.y0 // s - margin, 0), max(box.x0 // s - margin, 0)
        y1, x1 = min(box.y1 // s + margin, n_y), min(box.x1 // s + margin, n_x)
        return CellGrid(s, n_y, n_x, y0, x0, y1 - y0, x1 - x0)


@dataclass(frozen=True)
class Slide:
    """An image as a network sees it."""

    image: ResampledImage
    stain: Stain
    tiling: Tiling

    def order(self, tiles: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Row by row within stripes, so that decoded chunks are still at hand for the next row."""
        stripe = self.image.stripe(self.tiling.core, self.tiling.halo)
        columns = max(1, stripe // self.tiling.core)
        return sorted(tiles, key=lambda tile: (tile[1] // columns, tile))


def forward_tile(
    network: PixNetNetwork,
    stage: Callable[[Tensor], Tensor],
    slide: Slide,
    tile: tuple[int, int],
    *,
    margin: int = 0,
    in_part: bool = False,
) -> tuple[Tensor, CellGrid]:
    """Cells of one core.

    Parameters
    ----------
    network
        Where parameters live decides on device and precision.
    stage
        From RGB (1, 3, y, x) to maps (1, c, y / stride, x / stride).
    slide
        The slide.
    tile
        Which core.
    margin
        Cells beyond the core.
    in_part
        Whether `stage` takes as second argument the cells (y0, y1, x0, x1) that are wanted of its map, and returns these.

    Returns
    -------
    maps
        (c, rows, columns).
    grid
        Which cells these are.
    """
    image, tiling = slide.image, slide.tiling
    window = tiling.window(tile)
    weight = network.head.weight
    rgb = torch.from_numpy(image.window(window.y0, window.y1, window.x0, window.x1)).to(weight.device, weight.dtype)
    grid = tiling.grid(tile, margin)
    top, left = grid.y0 - window.y0 // tiling.stride, grid.x0 - window.x0 // tiling.stride
    bottom, right = top + grid.window[0], left + grid.window[1]
    # Workers of dask are told to use one thread; two of them with a thread per core each are slower than one alone.
    n_cells = rgb.shape[-1] * rgb.shape[-2] // tiling.stride**2
    with requested_threads(), suitable_threads(n_cells, network.head.in_channels):
        stained = slide.stain.apply(rgb[None])
        if in_part:
            return stage(stained, (top, bottom, left, right))[0], grid
        maps = stage(stained)[0]
    return maps[:, top:bottom, left:right], grid


def bag(
    maps: Tensor, regions: Regions, core: Box, grid: CellGrid, image: Box, *, squares: bool = False
) -> tuple[Tensor, Tensor]:
    """Sums over regions of the map resized to pixels; differentiable.

    Returns
    -------
    sums
        (n_regions, c); with `squares` (n_regions, 2 c), the second half of the squared cells.
    n_pixels
        (n_regions,) float64.
    """
    stencil = build_stencil(regions, core, grid, image)
    table = maps.flatten(1).T.contiguous()
    cells, start = (torch.from_numpy(a).to(maps.device) for a in (stencil.cells, stencil.start[:-1]))
    weights = torch.from_numpy(stencil.weights).to(table)
    sums = F.embedding_bag(cells, table, start, mode="sum", per_sample_weights=weights)
    if squares:
        more = F.embedding_bag(cells, table.square(), start, mode="sum", per_sample_weights=weights)
        sums = torch.cat([sums, more], dim=1)
    return sums, torch.from_numpy(stencil.n_pixels)


class TileIndex:
    """Which regions touch which cores, without a list per tile of all of them.

    Attributes
    ----------
    tiles
        Numbers of the cores that any touch.
    n_tiles
        (n,) how many cores each region touches; 0 outside the image.
    """

    def __init__(self, regions: Regions, tiling: Tiling) -> None:
        bounds = regions.bounds
        rows, columns = tiling.shape
        limit = np.array([columns - 1, rows - 1])
        # A region too small for a pixel centre is sampled where its centre lies, which its bounds contain.
        low = np.floor((bounds[:, :2] - 1) / tiling.core).astype(np.int64)
        high = np.floor((bounds[:, 2:] + 1) / tiling.core).astype(np.int64)
        inside = ((high >= 0) & (low <= limit)).all(axis=1)
        low, high = np.clip(low, 0, limit), np.clip(high, 0, limit)
        size = np.where(inside[:, None], high - low + 1, 0)
        count = size.prod(axis=1)
        region = np.repeat(np.arange(len(bounds)), count)
        k = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        width = np.maximum(size[region, 0], 1)
        tile = (low[region, 1] + k // width) * columns + low[region, 0] + k % width
        order = np.argsort(tile, kind="stable")
        self._region = region[order]
        self.tiles, self._start = np.unique(tile[order], return_index=True)
        self._start = np.append(self._start, len(tile))
        self._columns = columns
        self.n_tiles = count

    def __iter__(self) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
        for k, tile in enumerate(self.tiles):
            yield (
                (int(tile) // self._columns, int(tile) % self._columns),
                self._region[self._start[k] : self._start[k + 1]],
            )

    def __len__(self) -> int:
        return len(self.tiles)


def iter_sums(
    network: PixNetNetwork,
    stage: Callable[[Tensor], Tensor],
    slide: Slide,
    regions: Regions,
    *,
    in_part: bool = False,
    squares: bool = False,
    on_tile: Callable[[], None] = lambda: None,
) -> Iterator[tuple[np.ndarray, Tensor, np.ndarray]]:
    """Sums over regions, tile by tile, without a map: only tiles that regions touch are computed, each once.

    Regions within one tile come as soon as it is done; those that reach over several come at the end.

    Yields
    ------
    index
        Rows of `regions`.
    sums
        (len(index), c), or (len(index), 2 c) with `squares`; see :func:`bag`.
    n_pixels
        (len(index),) float64; 0 for regions outside the image, which come last.
    """
    tiles = TileIndex(regions, slide.tiling)
    over_several = np.flatnonzero(tiles.n_tiles > 1)
    place = np.full(len(regions), -1)
    place[over_several] = np.arange(len(over_several))
    total, count = None, np.zeros(len(over_several))
    weight = network.head.weight
    touching = dict(tiles)
    for tile in slide.order(touching):
        index = touching[tile]
        with torch.inference_mode():
            maps, grid = forward_tile(network, stage, slide, tile, margin=1, in_part=in_part)
            core, image = slide.tiling.pixels(tile), slide.tiling.image
            for start in range(0, len(index), _BATCH):
                rows = index[start : start + _BATCH]
                sums, n_pixels = bag(maps, regions.take(rows), core, grid, image, squares=squares)
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
    outside = np.flatnonzero(tiles.n_tiles == 0)
    if len(outside):
        n_channels = 0 if total is None else total.shape[1]
        yield outside, torch.zeros(len(outside), n_channels, dtype=weight.dtype), np.zeros(len(outside))


def read_regions(
    network: PixNetNetwork,
    stage: Callable[[Tensor], Tensor],
    slide: Slide,
    regions: Regions,
    n_channels: int,
    *,
    in_part: bool = False,
    squares: bool = False,
    on_tile: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Sums over all regions.

    Returns
    -------
    sums
        (n_regions, n_channels) in the precision of the network; `n_channels` counts those of `squares`.
    n_pixels
        (n_regions,) float64; 0 for regions outside the image.
    """
    dtype = torch.empty((), dtype=network.head.weight.dtype).numpy().dtype
    sums, n_pixels = np.zeros((len(regions), n_channels), dtype), np.zeros(len(regions))
    for index, found, count in iter_sums(
        network, stage, slide, regions, in_part=in_part, squares=squares, on_tile=on_tile
    ):
        if found.shape[1]:
            sums[index] = found.cpu().numpy()
        n_pixels[index] = count
    return sums, n_pixels
