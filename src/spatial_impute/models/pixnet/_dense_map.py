"""One tile of the dense map after the other: what to compute, and the function that computes it anywhere."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from spatial_impute.models.pixnet._tiles import Slide, forward_tile

if TYPE_CHECKING:
    from spatial_impute._image.resampling import ResampledImage, SlideOverview
    from spatial_impute.models.pixnet._network import PixNetNetwork, Stain
    from spatial_impute.models.pixnet._tiles import Tiling


@dataclass(frozen=True)
class DenseJob:
    """A dense map to be computed; small but for the network and, where it is in memory, the image."""

    network: PixNetNetwork
    """With the genes that are wanted."""
    image: ResampledImage
    stain: Stain
    tiling: Tiling
    dtype: str
    features: bool
    """Store the features, from which genes follow by the head, in place of the genes."""
    tissue: SlideOverview | None
    """Cells off the tissue are left NaN; None computes all."""
    wanted: frozenset[tuple[int, int]]
    """Tiles to compute; the others are NaN."""

    @property
    def n_channels(self) -> int:
        """Channels of the map."""
        return self.network.head.in_channels if self.features else self.network.head.out_channels

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of the map: the cells that reach into the image."""
        stride = self.tiling.stride
        return -(-self.tiling.height // stride), -(-self.tiling.width // stride)

    @property
    def cell_to_um(self) -> np.ndarray:
        """(3, 3) affine from cell corners to the section frame."""
        return self.image.to_um @ np.diag([self.tiling.stride, self.tiling.stride, 1.0])

    @property
    def chunk(self) -> int:
        """Cells along the edge of a tile."""
        return self.tiling.core // self.tiling.stride

    def tiles(self) -> list[tuple[int, int]]:
        """All tiles, in the order in which chunks of the image are decoded least often."""
        rows, columns = self.tiling.shape
        return self._slide.order((i, j) for i in range(rows) for j in range(columns))

    @property
    def _slide(self) -> Slide:
        return Slide(self.image, self.stain, self.tiling)

    def place(self, tile: tuple[int, int]) -> tuple[slice, slice]:
        """Where the cells of a tile lie in the map."""
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
        stage = network.features if self.features else lambda rgb: network.genes(network.features(rgb))
        with torch.inference_mode():
            maps, _ = forward_tile(network, stage, self._slide, tile)
        values = maps[:, : shape[1], : shape[2]].cpu().numpy()
        if self.tissue is not None:
            values = np.where(self._on_tissue(y, x), values, np.nan)
        return values.astype(self.dtype)

    def _on_tissue(self, y: slice, x: slice) -> np.ndarray:
        cx, cy = np.meshgrid(np.arange(x.start, x.stop) + 0.5, np.arange(y.start, y.stop) + 0.5)
        matrix = self.cell_to_um
        points = np.column_stack([cx.ravel(), cy.ravel()]) @ matrix[:2, :2].T + matrix[:2, 2]
        return self.tissue.covers(points).reshape(cx.shape)

    def fingerprint(self, names: list[str]) -> str:
        """Same for the same map: network, image, tiles and names decide."""
        digest = hashlib.sha256()
        for key, value in self.network.state_dict().items():
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        level = self.image.level
        record = {
            "image": [list(level.shape), level.to_um.tolist(), str(level.data.dtype), list(self.image.shape)],
            "sample": _sample_hash(self.image),
            "stain": [list(self.stain.background), list(self.stain.factor)],
            "tiling": [self.tiling.core, self.tiling.halo, self.tiling.stride],
            "dtype": self.dtype,
            "features": self.features,
            "wanted": sorted(self.wanted),
            "tissue": None if self.tissue is None else hashlib.sha256(self.tissue.tissue.tobytes()).hexdigest(),
            "names": names,
        }
        digest.update(json.dumps(record, sort_keys=True).encode())
        return digest.hexdigest()


def _sample_hash(image: ResampledImage) -> str:
    """Hash of a window in the middle: cheap, and enough to tell slides apart."""
    y, x = (n // 2 for n in image.shape)
    return hashlib.sha256(image.window(y - 32, y + 32, x - 32, x + 32).tobytes()).hexdigest()


def tissue_tiles(tiling: Tiling, image: ResampledImage, found: SlideOverview) -> frozenset[tuple[int, int]]:
    """Tiles that hold at least one pixel of the tissue mask."""
    y, x = np.nonzero(found.tissue)
    to_px = image.from_um @ found.to_um
    # Corners of the mask's pixels, which are larger than a cell and may straddle tiles.
    corners = [np.column_stack([x + dx, y + dy]) for dx in (0.01, 0.99) for dy in (0.01, 0.99)]
    points = np.concatenate(corners) @ to_px[:2, :2].T + to_px[:2, 2]
    inside = (points >= 0).all(axis=1) & (points < [tiling.width, tiling.height]).all(axis=1)
    tiles = np.unique((points[inside] // tiling.core).astype(int), axis=0)
    return frozenset((int(row), int(column)) for column, row in tiles)
