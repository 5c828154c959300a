"""Levels of a TIFF as arrays that can be sliced, its pixel size, and checks of its size."""

from __future__ import annotations

import math
import re
import threading
import weakref
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    import tifffile

_UM_PER_OME_UNIT = {"um": 1.0, "\u00b5m": 1.0, "\u03bcm": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4}
_UM_PER_UNIT = {2: 25_400.0, 3: 10_000.0}  # TIFF ResolutionUnit: inch, centimetre
# A scan of 10 gigapixels has 150,000 chunks of 256 px; an uncompressed TIFF in one strip is one chunk.
_MAX_CHUNKS = 2**22
_MAX_CHUNK_BYTES = 2**32
_SCREEN = 80.0  # um; screen resolutions (72-300 dpi) are defaults of image software, not microscopes


class TiffLevel:
    """One resolution of one series of a TIFF.

    A copy for another process opens the file there. The file is closed with the last use of the level.
    """

    def __init__(self, path: Path, series: int, level: int) -> None:
        from dask.base import tokenize

        self._where = (str(path.resolve()), series, level)
        self.token = f"tiff-{tokenize(self._where, path.stat().st_mtime_ns)}"
        """Name of this level in this state of the file."""
        self._forget()
        array = self._opened()
        self.shape, self.dtype, self.ndim, self.chunks = array.shape, array.dtype, array.ndim, array.chunks

    def _forget(self) -> None:
        self._array: Any = None
        self._lock = threading.Lock()

    def _opened(self) -> Any:
        import tifffile
        import zarr

        with self._lock:
            if self._array is None:
                path, series, level = self._where
                store = tifffile.imread(path, series=series, level=level, aszarr=True)
                self._array = zarr.open(store, mode="r")
                weakref.finalize(self, store.close)
            return self._array

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        return np.asarray(self._opened()[index])

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_array", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


def tiff_levels(path: Path) -> tuple[list[TiffLevel], str, tuple[float, float] | None]:
    """Levels of the largest series of a TIFF (finest first), their axes, and um per pixel (x, y) or None."""
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        series = max(tiff.series, key=lambda s: int(np.prod(s.shape)))
        which, n_levels = tiff.series.index(series), len(series.levels)
        axes, pixel_size = series.axes.replace("S", "C"), _pixel_size(tiff, series.keyframe)
        require_whole(tiff, series)
    levels = [TiffLevel(path, which, level) for level in range(n_levels)]
    for level in levels:
        require_plausible(level, path)
    return levels, axes, pixel_size


def require_whole(tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> None:
    """Raise a ``ValueError`` if the file ends before its pixels: it was cut off, or copied while it was written."""
    size = tiff.filehandle.size
    for level in series.levels:
        page: Any = level.pages[0]
        end = max((o + n for o, n in zip(page.dataoffsets, page.databytecounts, strict=True)), default=0)
        if end > size:
            msg = f"{tiff.filename!r} is truncated: its pixels reach to byte {end}, the file has {size}. Copy it again."
            raise ValueError(msg)


def require_plausible(array: Any, path: Path) -> None:
    """Raise a ``ValueError`` if a chunk or the number of chunks is too large: a few bytes can announce any size."""
    chunk_bytes = math.prod(array.chunks) * array.dtype.itemsize
    n_chunks = math.prod(-(-n // max(c, 1)) for n, c in zip(array.shape, array.chunks, strict=True))
    if chunk_bytes > _MAX_CHUNK_BYTES or n_chunks > _MAX_CHUNKS:
        msg = (
            f"{path.name!r} announces {tuple(array.shape)} values in {n_chunks} chunks of {chunk_bytes / 2**20:.3g} "
            f"MiB each; up to {_MAX_CHUNKS} chunks of {_MAX_CHUNK_BYTES // 2**20} MiB are read. Convert it to a tiled "
            "TIFF or OME-Zarr."
        )
        raise ValueError(msg)


def _pixel_size(tiff: tifffile.TiffFile, page: tifffile.TiffPage) -> tuple[float, float] | None:
    """From OME-XML, Aperio text or the resolution tags, in this order."""
    if tiff.ome_metadata:
        return _ome_pixel_size(tiff.ome_metadata, page)
    if found := re.search(r"MPP\s*=\s*([0-9.]+)", page.description or ""):
        return float(found.group(1)), float(found.group(1))
    unit, tag_x, tag_y = (page.tags.get(key) for key in ("ResolutionUnit", "XResolution", "YResolution"))
    um = None if unit is None else _UM_PER_UNIT.get(int(unit.value))
    if um is None or tag_x is None:
        return None
    fractions = [tag.value for tag in (tag_x, tag_y or tag_x)]
    x, y = (um * denominator / numerator if numerator else np.inf for numerator, denominator in fractions)
    return (x, y) if max(x, y) < _SCREEN else None


def _ome_pixel_size(xml: str, page: tifffile.TiffPage) -> tuple[float, float] | None:
    try:
        pixels = ET.fromstring(xml).findall(".//{*}Pixels")
    except ET.ParseError:
        return None
    # Labels and overviews are other images in the same file, with other pixel sizes.
    size = (str(page.imagewidth), str(page.imagelength))
    own = next((p for p in pixels if (p.get("SizeX"), p.get("SizeY")) == size), None)
    if own is None:
        return None
    found = []
    for axis in "XY":
        value = own.get(f"PhysicalSize{axis}", own.get("PhysicalSizeX"))
        # Micrometres are the default of the format; pixels and reference frames are no lengths.
        factor = _UM_PER_OME_UNIT.get(own.get(f"PhysicalSize{axis}Unit", own.get("PhysicalSizeXUnit", "um")))
        if value is None or factor is None:
            return None
        found.append(float(value) * factor)
    return found[0], found[1]
