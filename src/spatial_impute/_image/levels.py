"""Pyramid images in micrometres: windows of their levels, tile by tile, and sizes of pixels as files state them.

Pixel convention: the centre of pixel i lies at i + 0.5, so coordinates are measured from the image corner.
``spatialdata.rasterize`` and ``transform`` are off by up to a pixel here, so windows are computed directly.
"""

from __future__ import annotations

import hashlib
import math
import re
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from xml.etree import ElementTree as ET

import numpy as np

from spatial_impute._geometry import linear_scale, scaling
from spatial_impute._settings import logger
from spatial_impute._validation import require_positive

if TYPE_CHECKING:
    from collections.abc import Sequence

    import tifffile
    from xarray import DataArray, DataTree

_MAX_THUMBNAIL = 2**28  # px that are held in memory at once: 3 GiB as float32 RGB
_TILE = 2048  # px; a tile of three such channels is 12 MiB, larger than the usual chunk
_DEPTHS = tuple(float(2**bits - 1) for bits in (8, 10, 12, 14, 16, 32))
_OVERSHOOT = 1.1  # resampled images pass full brightness a little
_FEW = 0.001  # share of the pixels; hot pixels and dust are fewer
_RINGING = 0.05  # share of the pixels that a sharpening resize may leave a little below zero
_WHOLE = 2**24  # px; of a larger level a fingerprint takes windows
_WINDOWS, _WINDOW = 8, 64  # per axis, and their edge in px
_KEPT = 1000
_FINGERPRINTS: dict[int, tuple[weakref.ref[Any], bytes]] = {}  # of lazy arrays that were read in this session


@dataclass(frozen=True)
class Level:
    """One resolution of an image: lazy (c, y, x) data and its map from pixels to micrometres."""

    data: DataArray
    to_um: np.ndarray  # (3, 3) affine from pixel corners (x, y) to the section frame (um)
    white: float = 255.0  # Value of full brightness
    opaque: float = 255.0  # Value of alpha where nothing shines through

    @property
    def pixel_size(self) -> float:
        """Mean edge length of a pixel in um."""
        return linear_scale(self.to_um)

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) in px."""
        return self.data.sizes["y"], self.data.sizes["x"]


def image_levels(element: DataArray | DataTree, to_um: np.ndarray) -> list[Level]:
    """Resolutions of a single-scale or multi-scale image element of spatialdata, finest first.

    `to_um` is the (3, 3) affine from pixel corners of the finest level to the section frame.
    """
    if not hasattr(element, "children"):
        array = cast("DataArray", element)
        return [Level(array, to_um, *_full(array))]
    arrays = scales_of(cast("DataTree", element))
    height, width = arrays[0].sizes["y"], arrays[0].sizes["x"]
    levels = []
    full = _full(arrays[-1])
    for array in arrays:
        # Pyramids halve and trim odd sizes, so that the quotient of the sizes is slightly off the true factor.
        factor_x, factor_y = width / array.sizes["x"], height / array.sizes["y"]
        if round(factor_x) == round(factor_y) and abs(factor_x - round(factor_x)) * array.sizes["x"] <= round(factor_x):
            factor_x = factor_y = float(round(factor_x))
        levels.append(Level(array, to_um @ scaling(factor_x, factor_y), *full))
    return levels


def scales_of(element: DataTree) -> list[DataArray]:
    """Arrays of a multi-scale image, finest first whatever their order."""
    arrays = [next(iter(child.ds.data_vars.values())) for child in element.children.values()]
    return sorted(arrays, key=lambda array: -array.sizes["x"])


def _full(array: DataArray) -> tuple[float, float]:
    """Values of full brightness and of opaque alpha for the bits in use: 8 or 12 bits come in wider types and as floats.

    Glass is bright. So an image that stays below a quarter of a range was not scanned in that range. Padding and hot
    pixels pass it: they are few, or they all have the largest value of the type.
    """
    whole = np.issubdtype(array.dtype, np.integer)
    most = float(np.iinfo(array.dtype).max) if whole else np.inf
    if array.dtype == np.uint8:
        return most, most
    # Decided once for the whole image, on a sample of its pixels: a single window may be dark.
    step = max(1, max(array.sizes["y"], array.sizes["x"]) // 256)
    sample = decode(array.isel(y=slice(None, None, step), x=slice(None, None, step)).data)
    opaque = 1.0
    if len(sample) == 4:
        opaque = _depth(float(np.nanmax(sample[3], initial=0.0)), most)
        sample = sample[:3, sample[3] > 0]
    negative = float((sample < 0).mean())
    if negative > _RINGING:
        msg = (
            f"{negative:.0%} of the pixels of the image are negative: it was standardised for a network, and its colors are lost. "
            "Give pixels from 0 for black to 1, 255 or 65535 for white."
        )
        raise ValueError(msg)
    values = sample[np.isfinite(sample) & (sample > 0)]
    scanned = values[values < most]
    if scanned.size <= _FEW * values.size:  # all of it is black, or as bright as can be
        return (most if whole else 1.0), opaque
    return _depth(float(np.quantile(scanned.astype(np.float64), 1 - _FEW)) / _OVERSHOOT, most), opaque


def _depth(brightest: float, most: float) -> float:
    """Largest value of the narrowest range that `brightest` fits into."""
    if most == np.inf and brightest <= 1.0:
        return 1.0
    return next((depth for depth in _DEPTHS if brightest <= depth < most), brightest if most == np.inf else most)


def image_fingerprint(levels: Sequence[Level]) -> str:
    """Short hash that identifies an image by its resolutions, their place, and the pixels of the coarsest one.

    Of a coarsest level with more than 16 million pixels, 64 windows are read. A lazy array is read once per session.
    """
    digest = hashlib.sha256()
    for level in levels:
        digest.update(repr((level.shape, str(level.data.dtype), level.to_um.round(9).tolist())).encode())
    graph = getattr(levels[-1].data.data, "dask", None)
    kept, found = _FINGERPRINTS.get(id(graph), (None, b""))
    if graph is None or kept is None or kept() is not graph:
        found = _pixel_hash(levels[-1])
    if graph is not None:
        _FINGERPRINTS[id(graph)] = weakref.ref(graph), found
        if len(_FINGERPRINTS) > _KEPT:
            del _FINGERPRINTS[next(iter(_FINGERPRINTS))]
    digest.update(found)
    return digest.hexdigest()[:16]


def _pixel_hash(level: Level) -> bytes:
    """Hash of the pixels of a level, or of windows spread over it."""
    height, width = level.shape
    data = level.data.transpose("c", "y", "x").data
    if height * width > _WHOLE:
        starts = ([round(i * (n - _WINDOW) / (_WINDOWS - 1)) for i in range(_WINDOWS)] for n in (height, width))
        rows, columns = (np.ravel([np.arange(s, s + _WINDOW) for s in of_axis]) for of_axis in starts)
        data = data[:, rows][:, :, columns]  # one computation: a file in one chunk is decoded once
    return hashlib.sha256(np.ascontiguousarray(decode(data)).tobytes()).digest()


def best_level(levels: Sequence[Level], pixel_size: float) -> Level:
    """Coarsest level that is at least as fine as `pixel_size` (um), else the finest there is."""
    fine_enough = [level for level in levels if level.pixel_size <= pixel_size * (1 + 1e-6)]
    return fine_enough[-1] if fine_enough else levels[0]


def require_colors(array: np.ndarray, level: Level) -> np.ndarray:
    """Color channels of (c, y, x) in front of white glass, at most white; alpha is straight.

    Glass that was erased in an image editor is transparent, and usually black below. Pixels beyond a warped image are
    NaN. Raises a ``ValueError`` for 2 or more than 4 channels: such an image is no H&E scan.
    """
    if array.shape[0] not in (1, 3, 4):
        msg = f"An H&E image has 1, 3 or 4 channels, found {array.shape[0]}. Select three channels before assembling."
        raise ValueError(msg)
    colors, white = array[:3], array.dtype.type(level.white)
    if level.white < (np.iinfo(array.dtype).max if array.dtype.kind in "iu" else np.inf):
        colors = np.minimum(colors, white)  # hot pixels and padding of other bits
    if array.shape[0] == 4 and (array[3] < level.opaque).any():
        share = np.clip(array[3] / np.float32(level.opaque), 0, 1)
        mixed = level.white + (colors - np.float32(level.white)) * share
        colors = (np.rint(mixed) if array.dtype.kind in "iu" else mixed).astype(array.dtype)
        if array.dtype.kind == "f":
            colors = np.where(array[3] > 0, colors, white)  # NaN may stand below
    if array.dtype.kind == "f" and np.isnan(colors).any():
        colors = np.where(np.isnan(colors).any(axis=0), white, colors)
    return colors


def to_rgb(array: np.ndarray, level: Level) -> np.ndarray:
    """Convert (c, y, x) to (y, x, 3) float32 in 0-255; grey is repeated, white and transparent pixels become 255."""
    colors = require_colors(array, level)
    rgb = np.repeat(colors, 3, axis=0) if len(colors) == 1 else colors
    rgb = np.moveaxis(rgb, 0, -1).astype(np.float32)
    return rgb if level.white == 255.0 else rgb * np.float32(255.0 / level.white)


def decode(data: Any) -> np.ndarray:
    """Pixels of a lazy array or of one in memory. Compiled loops know no half precision: it becomes single precision."""
    if hasattr(data, "compute"):
        # Threads of dask inside those of a data loader or a worker can deadlock; one window is too small to gain from
        # them.
        data = data.compute(scheduler="synchronous")
    found = np.asarray(data)
    return found.astype(np.float32) if found.dtype == np.float16 else found


def stored_pixels(level: Level, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
    """Pixels [y0, y1) x [x0, x1) of a level as they are stored, (c, y, x)."""
    return decode(level.data.isel(y=slice(y0, y1), x=slice(x0, x1)).data)


def whole_factor(level: Level, pixel_size: float) -> int:
    """Pixels of a level along the edge of a pixel of `pixel_size` um, as a whole number of at least 1."""
    return max(1, min(int(pixel_size / level.pixel_size + 1e-6), *level.shape))


def read_thumbnail(levels: Sequence[Level], pixel_size: float) -> tuple[np.ndarray, np.ndarray]:
    """Whole image at about `pixel_size` um per pixel, read strip by strip from the coarsest level that is fine enough.

    Returns RGB (y, x, 3), float32 in 0-255, means of the level's pixels, and the (3, 3) affine from its pixel corners to um.
    """
    level = best_level(levels, pixel_size)
    height, width = level.shape
    factor = whole_factor(level, pixel_size)
    rows, columns = height // factor, width // factor
    if rows * columns > _MAX_THUMBNAIL:
        msg = (
            f"At {pixel_size:g} um per pixel the image of {width} x {height} px would be read as {columns} x {rows} "
            f"px, more than fits in memory ({_MAX_THUMBNAIL} px). Take a coarser `resolution`."
        )
        raise ValueError(msg)
    chunk_rows = level.data.data.chunks[1][0] if hasattr(level.data.data, "chunks") else height
    strip = max(factor, max(chunk_rows, _TILE) // factor * factor)
    strips = []
    for y0 in range(0, rows * factor, strip):
        y1 = min(y0 + strip, rows * factor)
        stored = stored_pixels(level, y0, y1, 0, columns * factor)
        # As floats a strip takes several times its size, so it is reduced part by part.
        edges = range(0, columns * factor, max(1, _TILE // factor) * factor)
        parts = (stored[:, :, x0 : x0 + edges.step] for x0 in edges)
        strips.append(np.concatenate([area_means(to_rgb(part, level), factor, factor) for part in parts], axis=1))
    return np.concatenate(strips), level.to_um @ scaling(float(factor))


def area_means(image: np.ndarray, factor_y: int, factor_x: int) -> np.ndarray:
    """(y, x) or (y, x, c) reduced by whole numbers along y and x."""
    if factor_y == factor_x == 1:
        return image
    height, width = image.shape[0] // factor_y, image.shape[1] // factor_x
    return image.reshape(height, factor_y, width, factor_x, *image.shape[2:]).mean(axis=(1, 3))


PIXEL_RANGE = (0.05, 50.0)
"""Pixels of scans and overviews, um."""

_UNIT_NAMES = {
    1e-4: "angstrom angstroms Å å ångström",
    1e-6: "pm picometer picometre",
    1e-3: "nm nanometer nanometre nanometers nanometres",
    1.0: "um micron microns micrometer micrometre micrometers micrometres \\u00b5m",
    1e3: "mm millimeter millimetre millimeters millimetres",
    1e4: "cm centimeter centimetre centimeters centimetres",
    1e6: "m meter metre meters metres",
    25_400.0: "in inch inches",
}
_UM_PER_UNIT = {name: um for um, names in _UNIT_NAMES.items() for name in names.split()}
_UM_PER_TAG = {2: 25_400.0, 3: 10_000.0, 4: 1e3, 5: 1.0}  # ResolutionUnit: inch, cm, and the mm and um of ImageJ
SAME_SIZE = 1.05
"""Sizes that differ by less are the same: magnifications differ by a factor of 2, scanners state theirs to a few per cent."""
_PRINT = 2.0  # um; print and desktop scanners reach 12,700 dots per inch, coarser pixels may be theirs
_SLIDE = 130_000.0  # um; the largest slides of pathology measure 102 x 127 mm
_MOST_OBLONG = 3.0


def um_per_unit(unit: str | None) -> float | None:
    """Micrometres per unit of length; None for pixels, reference frames and unknown units."""
    # "Mm" and "Pm" are other units than "mm" and "pm", so abbreviations keep their case.
    name = (unit or "").strip().replace("µ", "u").replace("μ", "u")
    return _UM_PER_UNIT.get(name if len(name) < 3 else name.lower())


def pixel_edges(name: str, known: tuple[float, float] | None, mpp: float | None) -> tuple[float, float] | None:
    """Um per pixel (x, y) of a section: those `known` from its file, unless `mpp` is given; None without both."""
    if mpp is None:
        return known
    mpp = require_positive(mpp, name=f"mpp of section {name!r}", unit="um per pixel")
    if known is not None and max(mpp, *known) > SAME_SIZE * min(mpp, *known):
        found = " x ".join(f"{size:g}" for size in dict.fromkeys(known))
        logger.warning("Section %s: `mpp=%g` differs from %s in its file; `mpp` is used", name, mpp, found)
    return mpp, mpp


def tiff_pixel_size(tiff: tifffile.TiffFile, page: tifffile.TiffPage) -> tuple[float, float] | None:
    """Um per pixel (x, y) of a page as it is stored; None if the file does not tell, or contradicts itself.

    Sources are OME-XML, the text of the scanner or ImageJ, and the resolution tags.
    """
    text = page.description or ""
    if tiff.ome_metadata:
        own = ome_pixels(tiff.ome_metadata, page)
        said = [None if own is None else _oblong(_ome_length(own, "X"), _ome_length(own, "Y"), own)]
        if said == [None]:
            return None
    else:
        numbers = (float(n.replace(",", ".")) for n in re.findall(r"\bMPP\s*=\s*([0-9.,]+(?:[eE][+-]?\d+)?)", text))
        said = [(size, size) for size in numbers if size > 0]
    if tiff.is_philips and (
        found := re.search(r'DICOM_PIXEL_SPACING"[^>]*>\s*"?([0-9.]+)"?\s+"?([0-9.]+)', text.replace("&quot;", '"'))
    ):
        y, x = (1e3 * float(value) for value in found.groups())
        said = [(x, y)]
    sizes = [size for size in (*said, _from_tags(tiff, page)) if size is not None]
    if any(max(along) > SAME_SIZE * min(along) for along in zip(*sizes, strict=True)):
        logger.warning(
            "%s contradicts itself: its texts and resolution tags give pixels of %s um; they are not used",
            tiff.filename,
            " and ".join(f"{x:.4g} x {y:.4g}" for x, y in sizes),
        )
        return None
    return sizes[0] if sizes else None


def _from_tags(tiff: tifffile.TiffFile, page: tifffile.TiffPage) -> tuple[float, float] | None:
    """Size by the resolution tags, in the unit of ImageJ or of the tags; None for prints and screens."""
    unit = page.tags.get("ResolutionUnit")
    um = None if unit is None else _UM_PER_TAG.get(int(unit.value))
    if tiff.imagej_metadata and (named := str(tiff.imagej_metadata.get("unit", ""))):
        um = um_per_unit(named)
    tag_x = page.tags.get("XResolution")
    if um is None or tag_x is None:
        return None
    fractions = [tag.value for tag in (tag_x, page.tags.get("YResolution") or tag_x)]
    if not all(part > 0 for fraction in fractions for part in fraction):
        return None
    x, y = (um * denominator / numerator for numerator, denominator in fractions)
    extent = max(x * page.imagewidth, y * page.imagelength)
    return None if extent > _SLIDE or _is_print(max(x, y), um) else (x, y)


def _is_print(size: float, unit: float) -> bool:
    """True if pixels of `size` um are those of a print or a screen, and no sizes in tissue.

    Tags in inches, and other tags of whole hundreds of dots per inch, are set by image software.
    """
    if not PIXEL_RANGE[0] <= size <= PIXEL_RANGE[1]:
        return True
    hundreds = 25_400.0 / size / 100
    whole = abs(hundreds - round(hundreds)) < 0.002 * hundreds
    return size > _PRINT and (unit == _UM_PER_TAG[2] or (unit == _UM_PER_TAG[3] and whole))


def _ome_length(pixels: ET.Element, axis: str) -> float | None:
    value = _ome_number(pixels, axis)
    # Micrometres are the default of the format; pixels and reference frames are no lengths.
    um = um_per_unit(pixels.get(f"PhysicalSize{axis}Unit", "um"))
    return None if um is None or not value > 0 else value * um


def _ome_number(pixels: ET.Element, axis: str) -> float:
    """Size of a pixel as it is written, also with a decimal comma; NaN for what is no number."""
    try:
        return float(pixels.get(f"PhysicalSize{axis}", "nan").replace(",", "."))
    except ValueError:
        return float("nan")


def _oblong(x: float | None, y: float | None, pixels: ET.Element) -> tuple[float, float] | None:
    """Sizes along x and y; one that is missing, or whose unit was left out and does not fit, is that of the other axis."""
    if x is None or y is None:
        one = x or y
        return None if one is None or (pixels.get("PhysicalSizeX") and pixels.get("PhysicalSizeY")) else (one, one)
    if 1 / _MOST_OBLONG < x / y < _MOST_OBLONG:
        return x, y
    units = [pixels.get(f"PhysicalSize{axis}Unit") for axis in "XY"]
    if (units[0] is None) != (units[1] is None):
        ratio = _ome_number(pixels, "X") / _ome_number(pixels, "Y")
        return (x, x / ratio) if units[1] is None else (y * ratio, y)
    logger.warning("OME-XML gives pixels of %g x %g um, which no scanner makes; they are not used", x, y)
    return None


def ome_pixels(xml: str, page: tifffile.TiffPage) -> ET.Element | None:
    """Element ``Pixels`` of the image with the size of this page: labels and overviews are other images of the file."""
    try:
        pixels = ET.fromstring(xml).findall(".//{*}Pixels")
    except ET.ParseError:
        return None
    size = (str(page.imagewidth), str(page.imagelength))
    return next((p for p in pixels if (p.get("SizeX"), p.get("SizeY")) == size), None)


def zarr_pixel_size(axes: dict[str, Any], multiscale: dict[str, Any]) -> tuple[float, float] | None:
    """Um per pixel (x, y) of the finest level of an OME-Zarr: its scale, times that of the whole multiscale.

    None if the metadata do not have it, or are damaged.
    """
    try:
        return _zarr_scale(axes, multiscale)
    except (LookupError, TypeError, ValueError):
        return None


def _zarr_scale(axes: dict[str, Any], multiscale: dict[str, Any]) -> tuple[float, float] | None:
    maps = (
        t for holder in (multiscale["datasets"][0], multiscale) for t in holder.get("coordinateTransformations", ())
    )
    scales = [t["scale"] for t in maps if t.get("type") == "scale"]
    sizes = []
    for name in "xy":
        axis = axes.get(name)
        um = um_per_unit(axis.get("unit")) if isinstance(axis, dict) else None
        if um is None or not scales:
            return None
        place = list(axes).index(name)
        sizes.append(um * math.prod(float(scale[place]) for scale in scales))
    return (sizes[0], sizes[1]) if min(sizes) > 0 else None
