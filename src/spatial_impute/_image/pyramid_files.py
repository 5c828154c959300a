"""Pyramidal OME-TIFF, written strip by strip."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from spatial_impute._io.files import written_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

TILE = 512  # px
_SMALLEST = 1024  # px along the longer side of the coarsest level: a viewer reads it at once
_JPEG_QUALITY = 90


@dataclass(frozen=True)
class Pyramid:
    """An image to write."""

    strip: Callable[[int, int, int], np.ndarray]
    """Level, number of a strip of `TILE` rows and channel of `channels` to its pixels, (rows, x) or (rows, x, c)."""
    shape: tuple[int, ...]
    """Of the finest level, (y, x) or (y, x, c)."""
    dtype: np.dtype
    pixel_size: float
    """um"""
    origin: tuple[float, float]
    """Place (x, y) of the corner of the image, um."""
    name: str
    channels: tuple[str, ...] = ()
    """Names of channels that are no colors, such as dyes; each is a plane of its own, (y, x)."""

    @property
    def n_planes(self) -> int:
        """Number of planes that are written one after the other."""
        return max(1, len(self.channels))

    @property
    def n_levels(self) -> int:
        """Number of levels; each is half as large as the one before it."""
        return 1 + max(0, int(np.ceil(np.log2(max(self.shape[:2]) / _SMALLEST))))

    def level_shape(self, level: int) -> tuple[int, ...]:
        """(y, x) or (y, x, c) of a level."""
        height, width = (-(-n // 2**level) for n in self.shape[:2])
        return (height, width, *self.shape[2:])

    @property
    def n_strips(self) -> int:
        """Number of strips of all levels and planes."""
        return self.n_planes * sum(-(-self.level_shape(level)[0] // TILE) for level in range(self.n_levels))


def write_pyramid(path: Path, image: Pyramid, compression: str, on_strip: Callable[[], Any]) -> None:
    """Write a pyramidal OME-TIFF with one strip in memory. A file that is there is replaced once the new one is whole."""
    import tifffile

    colors = image.shape[2] if len(image.shape) == 3 else 1
    common: dict[str, Any] = {
        "photometric": "rgb" if colors > 2 else "minisblack",
        "planarconfig": "contig" if len(image.shape) == 3 else None,
        "extrasamples": ["unassalpha"] if colors == 4 else None,
        "tile": (TILE, TILE),
        "dtype": image.dtype,
        "compression": compression,
        "compressionargs": {"level": _JPEG_QUALITY} if compression == "jpeg" else None,
        "maxworkers": 1,
    }
    with written_whole(path) as part, tifffile.TiffWriter(part, bigtiff=True, ome=True) as file:
        for level in range(image.n_levels):
            per_cm = 1e4 / (image.pixel_size * 2**level)
            own = {"subfiletype": 1} if level else {"subifds": image.n_levels - 1, "metadata": _metadata(image)}
            shape = (len(image.channels),) * bool(image.channels) + image.level_shape(level)
            tiles = _tiles(image, level, on_strip)
            file.write(tiles, shape=shape, resolution=(per_cm, per_cm), resolutionunit="CENTIMETER", **common, **own)


def _metadata(image: Pyramid) -> dict[str, Any]:
    (x, y), n = image.origin, image.n_planes
    place = {"PositionX": [x] * n, "PositionXUnit": ["µm"] * n, "PositionY": [y] * n, "PositionYUnit": ["µm"] * n}
    named = {"Channel": {"Name": list(image.channels)}} if image.channels else {}
    return {
        "axes": "CYX" if image.channels else "YXS" if len(image.shape) == 3 else "YX",
        "Name": image.name,
        "PhysicalSizeX": image.pixel_size,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": image.pixel_size,
        "PhysicalSizeYUnit": "µm",
        "Plane": place,
        **named,
    }


def _tiles(image: Pyramid, level: int, on_strip: Callable[[], Any]) -> Iterator[np.ndarray]:
    """Tiles of a level, plane by plane and row by row; those at the rim are continued with their last pixels."""
    height, width = image.level_shape(level)[:2]
    for plane, number in product(range(image.n_planes), range(-(-height // TILE))):
        strip = image.strip(level, number, plane)
        rest = [(0, -n % TILE) for n in strip.shape[:2]] + [(0, 0)] * (strip.ndim - 2)
        strip = np.pad(strip, rest, mode="edge")
        for x0 in range(0, width, TILE):
            yield np.ascontiguousarray(strip[:, x0 : x0 + TILE])
        on_strip()
