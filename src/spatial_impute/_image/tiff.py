"""TIFF: levels as arrays that can be sliced, samples, checks of size; and pyramidal OME-TIFF, written strip by strip."""

from __future__ import annotations

import math
import re
import threading
import weakref
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tifffile
import zarr
from dask.base import tokenize

from spatial_impute._image.brightfield import Samples, names_by_color, rgb_order
from spatial_impute._image.levels import ome_pixels, tiff_pixel_size
from spatial_impute._io.files import written_whole
from spatial_impute._settings import logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# A scan of 10 gigapixels has 150,000 chunks of 256 px; an uncompressed TIFF in one strip is one chunk.
_MAX_CHUNKS = 2**22
_MAX_CHUNK_BYTES = 2**32
# PhotometricInterpretation; other values have no rule for RGB that all programs share.
_KINDS = {0: "white-is-zero grey", 1: "grey", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr", 8: "CIELab", 9: "ICCLab"}
_JPEG, _JPEG2000, _JPEG2000_YCBCR = {6, 7, 33007, 34892}, {33003, 33004, 33005, 34712}, 33003
_STRAIGHT, _PREMULTIPLIED = 2, 1  # ExtraSamples; 0 is no alpha, and is left out
_CONTIGUOUS = 1  # PlanarConfiguration
TILE = 512  # px, of files that are written
_SMALLEST = 1024  # px along the longer side of the coarsest level: a viewer reads it at once
_JPEG_QUALITY = 90


class TiffLevel:
    """One resolution of one series of a TIFF.

    A copy for another process opens the file there. The file is closed with the last use of the level.
    """

    def __init__(self, path: Path, series: int, level: int) -> None:
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
        with self._lock:
            if self._array is None:
                path, series, level = self._where
                with tifffile.TiffFile(path) as tiff:  # `imread` takes names with "?" and "*" for patterns
                    store = tiff.aszarr(series=series, level=level, fillvalue=_glass(tiff.series[series], path))
                self._array = zarr.open(store, mode="r")
                weakref.finalize(self, store.close)
            return self._array

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        try:
            return np.asarray(self._opened()[index])
        except (OSError, MemoryError):
            raise
        except Exception as error:
            msg = f"{self._where[0]!r} is damaged: {str(error).rstrip('.')}. Copy or export it again."
            raise ValueError(msg) from error

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_array", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


@dataclass(frozen=True)
class TiffImage:
    """Largest image of a TIFF."""

    levels: list[TiffLevel]  # Finest first
    axes: str
    samples: Samples
    order: list[int]  # Channels of the file in the order red, green, blue
    pixel_size: tuple[float, float] | None  # um per pixel (x, y) as it is stored, before the orientation


def open_tiff(path: Path) -> TiffImage:
    """Levels of the largest image of a TIFF, with their axes, samples, order of channels and pixel size.

    Raises a ``ValueError`` for samples that are no brightfield image, and for damaged files.
    """
    with tifffile.TiffFile(path) as tiff:
        series = max(tiff.series, key=lambda s: int(np.prod(s.shape)))
        which, n_levels = tiff.series.index(series), len(series.levels)
        page: Any = series.keyframe
        _require_one_image(tiff, series, path)
        require_whole(tiff, series)
        samples, order = _samples(tiff, series, path)
        axes, pixel_size = series.axes.replace("S", "C"), tiff_pixel_size(tiff, page)
        if tiff.is_bif and re.search(r"Overlap[XY]=.-?[1-9]", _xmp(page)):
            msg = f"{path.name!r}: the tiles of this Ventana slide overlap, and would not fit together. {how_to_convert(path)}"
            raise ValueError(msg)
    levels = [TiffLevel(path, which, level) for level in range(n_levels)]
    for level in levels:
        require_plausible(level, path)
    return TiffImage(levels, axes, samples, order, pixel_size)


def how_to_convert(path: Path) -> str:
    """Say how a file of a format that is not read becomes one that is."""
    return (
        f"Convert it to OME-TIFF with QuPath (File > Export images > OME TIFF) or `bfconvert -bigtiff -pyramid-resolutions 5 "
        f"-pyramid-scale 2 {path.name} {path.stem}.ome.tif`, or to OME-Zarr with `bioformats2raw {path.name} {path.stem}.zarr` "
        f"and give '{path.stem}.zarr/0'. Where OpenSlide reads it, `wsidata.open_wsi(path)` is taken as it is."
    )


def _glass(series: tifffile.TiffPageSeries, path: str) -> int | None:
    """Value of tiles that the file leaves out: where nothing was scanned is glass. None is black."""
    page: Any = series.keyframe
    bright = page.dtype.kind == "u" and _kind(page, Path(path)) in ("grey", "RGB")
    return int(np.iinfo(page.dtype).max) if bright else None


def _xmp(page: Any) -> str:
    value = page.tags.valueof(700, b"")
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _require_one_image(tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries, path: Path) -> None:
    if (n := sum(other.shape == series.shape for other in tiff.series)) > 1:
        msg = (
            f"{path.name!r} holds {n} images of the largest size, {series.shape} ({series.axes}), and does not say which one to "
            "take. Save one of them, e.g. with `tifffile.imwrite(new, tifffile.imread(path, series=k), photometric='rgb')`."
        )
        raise ValueError(msg)
    names = {"Z": "focal planes", "T": "points in time"}
    for axis, size in zip(series.axes, series.shape, strict=True):
        if axis not in "YXSC" and size > 1:
            what = names.get(axis, "images")
            msg = (
                f"{path.name!r} holds {size} {what}, expected a 2D color image, found axes {series.axes} of shape "
                f"{series.shape}. Save one plane of it, the one in focus, e.g. with `tifffile.imwrite(path, planes[k], "
                "photometric='rgb')`, Fiji (Image > Stacks > Make Substack) or `bfconvert -z k`."
            )
            if axis not in names and size == 3:
                msg += " If they are red, green and blue, `tifffile.imwrite(path, planes, photometric='rgb', planarconfig='separate')`."
            raise ValueError(msg)


def _samples(tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries, path: Path) -> tuple[Samples, list[int]]:
    """Meaning of the samples, and the order of channels that were stored as images of their own."""
    page: Any = series.keyframe
    sizes = dict(zip(series.axes, series.shape, strict=True))
    n_samples, n_channels = sizes.get("S", 1), sizes.get("C", 1)
    if n_samples > 1 and n_channels > 1:
        msg = f"{path.name!r} holds {n_channels} color images in one; save one of them."
        raise ValueError(msg)
    pixels = ome_pixels(tiff.ome_metadata, page) if tiff.ome_metadata else None
    bits, orientation = _bits(page, pixels), int(page.tags.valueof("Orientation", 1))
    order = list(range(n_channels)) if n_samples > 1 else rgb_order(_channel_names(tiff, pixels), n_channels)
    kind = _kind(page, path)
    if kind == "grey" and n_channels > 1:  # each color is an image of its own
        logger.info(
            "%s: its %d channels are taken as red, green, blue%s",
            path.name,
            n_channels,
            " and alpha" if n_channels == 4 else "",
        )
        return Samples("RGB", 3 if n_channels == 4 else None, bits=bits, orientation=orientation), order
    extra = [int(e) for e in page.extrasamples]
    n_colors = Samples(kind).n_colors
    if n_samples * n_channels not in (n_colors, n_colors + max(len(extra), 1)) or len(extra) > 1:
        msg = (
            f"{path.name!r} holds {n_samples * n_channels} samples per pixel, and says that they are {kind}, which has "
            f"{n_colors}. If they are red, green and blue, save them so: `tifffile.imwrite(path, pixels, photometric='rgb')`."
        )
        raise ValueError(msg)
    with_alpha = extra in ([_STRAIGHT], [_PREMULTIPLIED])
    if extra and not with_alpha:
        logger.info("%s: the extra sample is no alpha by its tag, and is left out", path.name)
    tags: dict[str, Any] = {"palette": _palette(page)} if kind == "palette" else _ycbcr_tags(page)
    return Samples(
        kind,
        alpha=n_colors if with_alpha else None,
        premultiplied=extra == [_PREMULTIPLIED],
        bits=bits,
        orientation=orientation,
        **tags,
    ), order


def _kind(page: Any, path: Path) -> str:
    """Color space of the decoded samples; a ``ValueError`` for those without a common rule for RGB."""
    kind, codec = _KINDS.get(int(page.photometric)), int(page.compression)
    if codec == _JPEG2000_YCBCR:
        return "YCbCr"
    # Decoders of images return RGB, but for JPEG 2000, and for JPEG whose samples do not stand together.
    decoded = codec in tifffile.TIFF.IMAGE_COMPRESSIONS and codec not in _JPEG2000
    decoded &= codec not in _JPEG or (int(page.planarconfig) == _CONTIGUOUS and not page.extrasamples)
    if kind == "YCbCr" and decoded:
        return "RGB"
    unknown = kind is None or page.tags.valueof("InkSet", 1) != 1
    if kind not in ("grey", "RGB"):
        unknown |= page.dtype.kind not in "ub" or (
            kind not in ("palette", "white-is-zero grey", "CMYK") and page.bitspersample not in (8, 16)
        )
    if unknown:
        name = getattr(page.photometric, "name", page.photometric)
        msg = (
            f"{path.name!r} stores its colors as {name} of {page.bitspersample} bits ({page.dtype}), for which there is no common rule; convert it to "
            f"RGB, e.g. with `magick {path.name} -colorspace sRGB {path.stem}_rgb.tif`."
        )
        raise ValueError(msg)
    return str(kind)


def _bits(page: Any, pixels: Any) -> int | None:
    """Bits in use: as stored, or as OME-XML says."""
    stored = page.bitspersample
    if pixels is not None and pixels.get("SignificantBits", "").isdigit():
        return min(int(pixels.get("SignificantBits")), stored)
    return stored if stored < 8 * page.dtype.itemsize else None


def _palette(page: Any) -> np.ndarray:
    """(n, 3) uint8; the values of the tag have 16 bits, but some programs write 8."""
    colors = np.asarray(page.colormap)
    return np.ascontiguousarray((colors >> 8 if colors.max() > 255 else colors).T.astype(np.uint8))


def _ycbcr_tags(page: Any) -> dict[str, tuple[float, ...]]:
    """Weights of the colors, black and white of YCbCr, where the file gives them."""
    found = {}
    for argument, tag in {"luma": "YCbCrCoefficients", "reference": "ReferenceBlackWhite"}.items():
        value = page.tags.valueof(tag)
        if value is not None and argument == "luma":
            found[argument] = _rationals(value)
        elif value is not None and len(value) >= 6:
            top = 2**page.bitspersample - 1  # counted in stored values
            found[argument] = tuple(v * 255 / top for v in _rationals(value))
    return found


def _rationals(value: Any) -> tuple[float, ...]:
    """Numbers of a tag of fractions, which are given as pairs or one after the other."""
    flat = [float(v) for v in np.ravel(value)]
    return tuple(flat[i] / flat[i + 1] for i in range(0, len(flat), 2))


def _channel_names(tiff: tifffile.TiffFile, pixels: Any) -> list[str] | None:
    """Names of the channels in OME-XML or ImageJ; fluorescent ones are named by their dye, or as fluorescence."""
    if pixels is not None:
        names, colors = [], []
        for channel in pixels.findall("{*}Channel"):
            light = channel.get("Fluor") or (channel.get("EmissionWavelength") and "fluorescence")
            light = light or ("fluorescence" if channel.get("ContrastMethod") == "Fluorescence" else None)
            names.append(light or channel.get("Name") or "")
            colors.append((int(channel.get("Color", -1)) >> 8) & 0xFFFFFF)  # of 0xRRGGBBAA, with a sign
        return names_by_color(names, colors)
    found = tiff.imagej_metadata or {}
    # A color image of ImageJ is stored as RGB; its channels are something else, unless their labels say so.
    n = int(found.get("channels", 1))
    return [str(label) for label in found.get("Labels", ())][:n] or (
        [f"ImageJ channel {i}" for i in range(n)] if n > 1 else None
    )


def require_whole(tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> None:
    """Raise a ``ValueError`` if pixels are missing: the file was cut off, or other files of the image are not there."""
    if tiff.is_ome and any(page is None for level in series.levels for page in level.pages):
        msg = (
            f"{tiff.filename!r} is one of several files of an OME-TIFF, and others of them are missing; their colors would be "
            "black. Put all of them into one folder, or save the image as one file."
        )
        raise ValueError(msg)
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


@dataclass(frozen=True)
class Pyramid:
    """An image to write."""

    strip: Callable[[int, int, int], np.ndarray]
    """Level, number of a strip of `TILE` rows and channel of `channels` to its pixels, (rows, x) or (rows, x, c)."""
    shape: tuple[int, ...]  # Of the finest level, (y, x) or (y, x, c)
    dtype: np.dtype
    pixel_size: float  # um
    origin: tuple[float, float]  # Place (x, y) of the corner of the image, um
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
