"""Training crops of PixNet: windows of slides with the regions that lie wholly inside, flipped, turned and re-stained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from spatial_impute.models.pixnet._region_weights import Box, CellGrid, Regions, Stencil, build_stencil

if TYPE_CHECKING:
    from spatial_impute._image.resampling import ResampledImage
    from spatial_impute.models.pixnet._network import Stain

_N_BLOCKS = 30  # of a slide: some to hold out in different places, each of several spots


@dataclass(frozen=True)
class TrainingSlide:
    """Regions of one size on one image, with their expression."""

    image: ResampledImage
    stain: Stain
    regions: Regions
    """In working pixels."""
    expression: np.ndarray
    """(n, n_genes) log values or counts."""
    slide: int
    """Image they lie on: regions of several sizes may share one."""
    block: np.ndarray
    """(n,) block of neighbouring regions, the same over all sizes of a slide."""
    base: np.ndarray | None = None
    """(n, n_genes) what the base predicts from the whole slide: it looks further than a crop reaches."""

    def take(self, rows: np.ndarray) -> TrainingSlide:
        """Some of the regions."""
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        return replace(
            self,
            regions=self.regions.take(rows),
            expression=self.expression[rows],
            block=self.block[rows],
            base=None if self.base is None else self.base[rows],
        )


def assign_blocks(centers_um: np.ndarray, origin: np.ndarray, extent: np.ndarray) -> np.ndarray:
    """Number square blocks, about thirty over the extent of the regions of a slide.

    Parameters
    ----------
    centers_um
        (n, 2) of the regions to number.
    origin, extent
        (2,) lower corner and size of what all regions of the slide cover, um.
    """
    edge = max(float(np.sqrt(np.prod(np.maximum(extent, 1e-9)) / _N_BLOCKS)), float(extent.max()) / _N_BLOCKS, 1e-6)
    cell = np.floor((centers_um - origin) / edge).astype(np.int64)
    return cell[:, 1] * 100_000 + cell[:, 0]


def held_out_blocks(slides: list[TrainingSlide], fraction: float, seed: int) -> list[np.ndarray]:
    """(n,) bool per entry: regions kept from training, whole blocks of each slide."""
    rng = np.random.default_rng(seed)
    chosen = {}
    for slide in sorted({s.slide for s in slides}):
        names = np.unique(np.concatenate([s.block for s in slides if s.slide == slide]))
        if len(names) > 1:
            n_held_out = min(max(1, round(fraction * len(names))), len(names) - 1)
            chosen[slide] = rng.choice(names, n_held_out, replace=False)
        else:
            chosen[slide] = names[:0]
    return [np.isin(s.block, chosen[s.slide]) for s in slides]


@dataclass(frozen=True)
class Crop:
    """One window ready for the network."""

    rgb: torch.Tensor
    """(3, size, size) in 0-255, stain applied."""
    stencil: Stencil
    rows: np.ndarray
    """Regions of the entry that it holds."""


def crop_size(slides: list[TrainingSlide], wanted: int, margin: int, multiple: int) -> int:
    """Edge of the crops in px: as wanted, or large enough for the largest region."""
    largest = max(float((s.regions.bounds[:, 2:] - s.regions.bounds[:, :2]).max()) for s in slides)
    return -(-max(wanted, int(np.ceil(largest)) + 2 * margin + 2) // multiple) * multiple


def make_crop(
    entry: TrainingSlide,
    center: np.ndarray,
    size: int,
    stride: int,
    *,
    margin: int,
    max_regions: int,
    turn: int = 0,
    stain: Stain | None = None,
    rng: np.random.Generator | None = None,
) -> Crop:
    """Cut a window around a point.

    Parameters
    ----------
    entry
        Slide and regions.
    center
        (2,) x, y in working px.
    size
        Edge in px.
    stride
        Edge of a decoder cell.
    margin
        Regions must keep this distance (px) from the edge.
    max_regions
        Most regions; a sample of more.
    turn
        0-7: quarter turns, and from 4 on a flip before them.
    stain
        In place of that of the slide.
    rng
        Draws the sample.
    """
    x0, y0 = np.floor(center - size / 2).astype(int)
    bounds = entry.regions.bounds - [x0, y0, x0, y0]
    rows = np.flatnonzero((bounds >= margin).all(axis=1) & (bounds <= size - margin).all(axis=1))
    if len(rows) > max_regions:
        rows = np.sort((rng or np.random.default_rng(0)).choice(rows, max_regions, replace=False))
    window = torch.from_numpy(entry.image.window(y0, y0 + size, x0, x0 + size))
    rgb = (stain or entry.stain).apply(window[None])[0]
    matrix = np.array([[1.0, 0, -x0], [0, 1, -y0], [0, 0, 1]])
    if turn >= 4:
        rgb = rgb.flip(-1)
        matrix = np.array([[-1.0, 0, size], [0, 1, 0], [0, 0, 1]]) @ matrix
    for _ in range(turn % 4):
        rgb = torch.rot90(rgb, 1, (-2, -1))  # (x, y) -> (y, size - x)
        matrix = np.array([[0.0, 1, 0], [-1, 0, size], [0, 0, 1]]) @ matrix
    box = Box(0, size, 0, size)
    n_cells = size // stride
    stencil = build_stencil(entry.regions.take(rows).moved(matrix), box, CellGrid(stride, n_cells, n_cells), box)
    return Crop(rgb.contiguous(), stencil, rows)


def random_crop(
    slides: list[TrainingSlide],
    size: int,
    stride: int,
    *,
    margin: int,
    max_regions: int,
    flips: bool,
    stain_jitter: float,
    rng: np.random.Generator,
) -> tuple[int, Crop]:
    """Crop around a random region of a random entry; entries count alike, however many regions they have."""
    which = int(rng.integers(len(slides)))
    entry = slides[which]
    center = entry.regions.centers[rng.integers(len(entry.regions))]
    extent = entry.regions.bounds
    room = max(0.0, (size - float((extent[:, 2:] - extent[:, :2]).max())) / 2 - margin)
    center = center + rng.uniform(-room, room, 2) * 0.9  # the region itself stays inside
    turn = int(rng.integers(8)) if flips else 0
    jitter = np.exp(stain_jitter * (rng.normal(size=3) + rng.normal())) if stain_jitter else np.ones(3)
    stain = replace(entry.stain, factor=tuple(float(f) for f in np.asarray(entry.stain.factor) * jitter))
    return which, make_crop(
        entry, center, size, stride, margin=margin, max_regions=max_regions, turn=turn, stain=stain, rng=rng
    )


def cover(entry: TrainingSlide, size: int, margin: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Centres of windows that together hold every region once, and the regions each answers for."""
    bounds = entry.regions.bounds
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
