"""Levels of a TIFF as arrays to be sliced, and the pixel size that its metadata give."""

from __future__ import annotations

import re
import threading
import weakref
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import numpy as np

from spatial_impute._image.limits import require_plausible, require_whole

if TYPE_CHECKING:
    from pathlib import Path

    import tifffile

_UM_PER_OME_UNIT = {"um": 1.0, "\u00b5m": 1.0, "\u03bcm": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4}
_UM_PER_UNIT = {2: 25_400.0, 3: 10_000.0}  # TIFF ResolutionUnit: inch, centimetre
_SCREEN = 80.0  # um; screen resolutions (72-300 dpi) are defaults of image software, not microscopes


class TiffLevel:
    """One resolution of one series of a TIFF.

    A copy for another process opens the file there; it is closed when nothing uses the level any more.
    """

    def __init__(self, path: Path, series: int, level: int) -> None:
        from dask.base import tokenize

        self._where = (str(path.resolve()), series, level)
        self.token = f"tiff-{tokenize(self._where, path.stat().st_mtime_ns)}"
        """Name that tells this level, and this state of the file, from any other."""
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
    """Levels of the largest series of a TIFF, finest first; their axes; um per pixel (x, y), None if not known."""
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


def _pixel_size(tiff: tifffile.TiffFile, page: tifffile.TiffPage) -> tuple[float, float] | None:
    """From OME-XML, Aperio text or the resolution tags, in this order."""
    if tiff.ome_metadata:
        return _ome_pixel_size(tiff.ome_metadata, page)
    if found := re.search(r"MPP\s*=\s*([0-9.]+)", page.description or ""):
        return float(found.group(1)), float(found.group(1))
    unit = page.tags.get("ResolutionUnit")
    resolution = [page.tags.get(key) for key in ("XResolution", "YResolution")]
    if unit is None or int(unit.value) not in _UM_PER_UNIT or resolution[0] is None:
        return None
    sizes = []
    for tag in resolution:
        numerator, denominator = (resolution[0] if tag is None else tag).value
        sizes.append(_UM_PER_UNIT[int(unit.value)] * denominator / numerator if numerator else np.inf)
    return (sizes[0], sizes[1]) if max(sizes) < _SCREEN else None


def _ome_pixel_size(xml: str, page: tifffile.TiffPage) -> tuple[float, float] | None:
    try:
        pixels = ET.fromstring(xml).findall(".//{*}Pixels")
    except ET.ParseError:
        return None
    # Labels and overviews are images of their own in the same file, with pixel sizes of their own.
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
