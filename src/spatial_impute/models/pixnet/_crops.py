"""Training crops of PixNet: windows of slides with their regions, flipped, rotated, and with another stain."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from spatial_impute._io.workers import rank_and_size
from spatial_impute.encoders._pyramids import Box
from spatial_impute.models.pixnet._region_weights import CellGrid, Regions, Stencil, build_stencil
from spatial_impute.models.pixnet._tiles import sum_cells

if TYPE_CHECKING:
    from torch import Tensor

    from spatial_impute._image.resampling import ResampledImage
    from spatial_impute.models._params import PixNetParams
    from spatial_impute.models.pixnet._network import PixNetNetwork, Stain

_MIN_REGIONS = 24  # per batch, from more crops where regions are sparse: the correlation of few regions is noise
_N_BLOCKS = 30  # per slide: enough to hold out several, each with several spots


@dataclass(frozen=True)
class TrainingSlide:
    """Regions of one size on one image, with their expression."""

    image: ResampledImage
    stain: Stain
    regions: Regions  # In pixels of the image
    expression: np.ndarray  # (n, n_genes) log values or counts
    slide: int  # Number of the image; regions of several sizes may share one
    block: np.ndarray  # (n,) block of neighboring regions, common to all sizes of regions on a slide
    base: np.ndarray | None = None
    """(n, n_genes) prediction of the base, read on the whole slide because its windows are larger than a crop."""

    @property
    def area_um2(self) -> np.ndarray:
        """(n,) areas of the regions in um^2."""
        return self.regions.area * abs(np.linalg.det(self.image.to_um[:2, :2]))

    def take(self, rows: np.ndarray) -> TrainingSlide:
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        return replace(
            self,
            regions=self.regions.take(rows),
            expression=self.expression[rows],
            block=self.block[rows],
            base=None if self.base is None else self.base[rows],
        )


def assign_blocks(centers_um: np.ndarray, origin: np.ndarray, extent: np.ndarray) -> np.ndarray:
    """(n,) number of the square block of each region; about thirty blocks cover the regions of a slide.

    `origin` and `extent` (2,) are the lower corner and the size of the area of all regions of the slide, um.
    """
    edge = max(float(np.sqrt(np.prod(np.maximum(extent, 1e-9)) / _N_BLOCKS)), float(extent.max()) / _N_BLOCKS, 1e-6)
    cell = np.floor((centers_um - origin) / edge).astype(np.int64)
    return cell[:, 1] * 100_000 + cell[:, 0]


def held_out_blocks(slides: list[TrainingSlide], fraction: float, seed: int) -> list[np.ndarray]:
    """Held-out regions, (n,) bool per entry: whole blocks of each slide."""
    rng = np.random.default_rng(seed)
    chosen = {}
    for slide in sorted({s.slide for s in slides}):
        names = np.unique(np.concatenate([s.block for s in slides if s.slide == slide]))
        if len(names) > 1:
            n_held_out = min(max(4, round(fraction * len(names))), len(names) // 2)  # two choose, two confirm
            chosen[slide] = rng.choice(names, n_held_out, replace=False)
        else:
            chosen[slide] = names[:0]
    return [np.isin(s.block, chosen[s.slide]) for s in slides]


@dataclass(frozen=True)
class CropSettings:
    """Size of the crops, and which regions they hold."""

    size: int  # Edge in px
    stride: int  # Edge of a decoder cell in px
    margin: int  # Regions nearer than this (px) to the edge of a crop are left out
    max_regions: int  # Largest number of regions; a random sample if there are more

    @classmethod
    def of(cls, network: PixNetNetwork, slides: list[TrainingSlide], params: PixNetParams) -> CropSettings:
        """Crops of the size that was set, or larger if the largest region of the slides needs it."""
        largest = max(float((s.regions.bounds[:, 2:] - s.regions.bounds[:, :2]).max()) for s in slides)
        needed = max(params.crop, int(np.ceil(largest)) + 2 * params.margin + 2)
        return cls(-(-needed // network.multiple) * network.multiple, network.stride, params.margin, params.max_regions)


@dataclass(frozen=True)
class Crop:
    """One window, ready for the network."""

    slide: TrainingSlide
    rgb: torch.Tensor  # (3, size, size) in 0-255, stain applied
    stencil: Stencil
    rows: np.ndarray  # Regions of the slide that it holds

    @property
    def expression(self) -> np.ndarray:
        """(n_rows, n_genes)."""
        return self.slide.expression[self.rows]


def make_crop(
    slide: TrainingSlide,
    center: np.ndarray,
    settings: CropSettings,
    *,
    turn: int = 0,
    stain: Stain | None = None,
    rng: np.random.Generator | None = None,
) -> Crop:
    """Cut a window around a point (x, y) in px.

    `turn` is the number of quarter turns, from 4 on after a flip. `stain` replaces that of the slide. `rng` draws the sample
    of regions if there are too many.
    """
    size, margin = settings.size, settings.margin
    x0, y0 = np.floor(center - size / 2).astype(int)
    bounds = slide.regions.bounds - [x0, y0, x0, y0]
    rows = np.flatnonzero((bounds >= margin).all(axis=1) & (bounds <= size - margin).all(axis=1))
    if len(rows) > settings.max_regions:
        rows = np.sort((rng or np.random.default_rng(0)).choice(rows, settings.max_regions, replace=False))
    window = torch.from_numpy(slide.image.window(y0, y0 + size, x0, x0 + size))
    rgb = (stain or slide.stain).apply(window[None])[0]
    matrix = np.array([[1.0, 0, -x0], [0, 1, -y0], [0, 0, 1]])
    if turn >= 4:
        rgb = rgb.flip(-1)
        matrix = np.array([[-1.0, 0, size], [0, 1, 0], [0, 0, 1]]) @ matrix
    for _ in range(turn % 4):
        rgb = torch.rot90(rgb, 1, (-2, -1))  # (x, y) -> (y, size - x)
        matrix = np.array([[0.0, 1, 0], [-1, 0, size], [0, 0, 1]]) @ matrix
    box = Box(0, size, 0, size)
    n_cells = size // settings.stride
    grid = CellGrid.whole(settings.stride, n_cells, n_cells)
    stencil = build_stencil(slide.regions.take(rows).moved(matrix), box, grid, box)
    return Crop(slide, rgb.contiguous(), stencil, rows)


def random_crop(
    slides: list[TrainingSlide], settings: CropSettings, *, flips: bool, stain_jitter: float, rng: np.random.Generator
) -> Crop:
    """Crop around a random region of a random entry; all entries have the same probability."""
    slide = slides[int(rng.integers(len(slides)))]
    center = slide.regions.centers[rng.integers(len(slide.regions))]
    extent = slide.regions.bounds
    room = max(0.0, (settings.size - float((extent[:, 2:] - extent[:, :2]).max())) / 2 - settings.margin)
    center = center + rng.uniform(-room, room, 2) * 0.9  # the region itself stays inside
    center = np.clip(center, *_inner_centers(slide, settings))
    turn = int(rng.integers(8)) if flips else 0
    jitter = np.exp(stain_jitter * (rng.normal(size=3) + rng.normal())) if stain_jitter else np.ones(3)
    stain = replace(slide.stain, factor=tuple(map(float, np.asarray(slide.stain.factor) * jitter)))
    return make_crop(slide, center, settings, turn=turn, stain=stain, rng=rng)


def _inner_centers(slide: TrainingSlide, settings: CropSettings) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest centre (x, y) of a crop that leaves the image by no more than the margin: more holds no region."""
    height, width = slide.image.shape
    low = np.full(2, settings.size / 2 - settings.margin)
    high = np.array([width, height]) - low
    middle = (low + high) / 2
    return np.minimum(low, middle), np.maximum(high, middle)


def cover(slide: TrainingSlide, size: int, margin: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Windows that together hold every region: the centre of each, and the regions assigned to it."""
    bounds = slide.regions.bounds
    left = np.ones(len(bounds), bool)
    room = size - 2 * margin - 1  # windows begin at whole pixels
    windows = []
    while left.any():
        first = bounds[np.flatnonzero(left)[np.argmin(bounds[left][:, 1])]]
        row = left & (bounds[:, 3] <= first[1] + room)
        x = bounds[row, 0].min()
        rows = np.flatnonzero(row & (bounds[:, 2] <= x + room))
        windows.append((np.array([x, first[1]]) - margin + size / 2, rows))
        left[rows] = False
    return windows


def predict_crops(network: PixNetNetwork, maps: list[Tensor], crops: list[Crop]) -> Tensor:
    """(n_regions, n_genes) prediction of the regions of some crops by the decoder, from the maps of the encoder."""
    stencils = [crop.stencil for crop in crops]
    grids = network.genes(network.combine(maps)) if network.rates else network.decode(maps)
    table = grids.movedim(1, -1).flatten(0, 2)
    n_pixels = np.concatenate([s.n_pixels for s in stencils])
    means = sum_cells(table, stencils) / torch.from_numpy(n_pixels).to(table)[:, None]
    if network.rates:
        areas = np.concatenate([crop.slide.area_um2[crop.rows] for crop in crops])
        return means * torch.from_numpy(areas).to(table)[:, None]
    return network.from_pooled(means)


class CropSampler:
    """Batches of crops: from a pool of encoded crops, or new crops in every step if the encoder is trained."""

    def __init__(
        self,
        network: PixNetNetwork,
        slides: list[TrainingSlide],
        settings: CropSettings,
        *,
        params: PixNetParams,
        seed: int,
        device: str,
    ) -> None:
        self.network, self.slides, self.settings = network, slides, settings
        self.params, self.seed, self.device = params, seed, device
        self.encoder_trained = params.encoder_learning_rate > 0
        self.pool: list[tuple[Crop, list[Tensor]]] = []
        if not self.encoder_trained and params.n_steps:
            rank, n_processes = rank_and_size()
            rng = np.random.default_rng([seed, 0, rank] if rank else [seed, 0])
            for _ in range(-(-params.n_cached_crops // n_processes)):
                crop = self._draw(rng)
                if len(crop.rows):
                    # Half precision: the rounding error is much smaller than the noise of augmentation.
                    maps = [m.half() for m in self._encode([crop])]
                    self.pool.append((replace(crop, rgb=crop.rgb[:, :0, :0]), maps))

    def _draw(self, rng: np.random.Generator) -> Crop:
        flips, jitter = self.params.flips, self.params.stain_jitter
        return random_crop(self.slides, self.settings, flips=flips, stain_jitter=jitter, rng=rng)

    def _encode(self, crops: list[Crop]) -> list[Tensor]:
        with torch.set_grad_enabled(self.encoder_trained):
            return self.network.encode(torch.stack([crop.rgb for crop in crops]).to(self.device))

    def batch(self, step: int) -> tuple[list[Crop], list[Tensor]]:
        """Crops of a step and their maps. Each step has its own random generator, so that a training can be resumed."""
        rng = np.random.default_rng([self.seed, step])
        n_crops = self.params.n_crops
        if self.pool:
            order = rng.permutation(len(self.pool))
            n_regions = np.cumsum([len(self.pool[k][0].rows) for k in order])
            chosen = order[: max(n_crops, int(np.searchsorted(n_regions, _MIN_REGIONS)) + 1)]
            levels = zip(*(self.pool[k][1] for k in chosen), strict=True)
            return [self.pool[k][0] for k in chosen], [torch.cat(level).float() for level in levels]
        crops: list[Crop] = []
        for k in range(_MIN_REGIONS * n_crops):
            if k >= n_crops and sum(len(crop.rows) for crop in crops) >= _MIN_REGIONS:
                break
            crops.append(self._draw(rng))
        crops = [crop for crop in crops if len(crop.rows)]
        return crops, self._encode(crops) if crops else []
