"""Open image files lazily as pyramids and read their pixel size."""

from __future__ import annotations

import json
import math
import re
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    import dask.array as da
    import tifffile
    import zarr
    from PIL import Image

_TIFF = {".tif", ".tiff", ".svs", ".ndpi", ".btf"}
_PLAIN = {".jpg", ".jpeg", ".png"}
_UM_PER_UNIT = {2: 25_400.0, 3: 10_000.0}  # TIFF ResolutionUnit: inch, centimetre
_OME_UNITS = {"um": 1.0, "\u00b5m": 1.0, "\u03bcm": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4}
_CHUNK = 2048
# A scan of 10 gigapixels has 150,000 chunks of 256 px; an uncompressed TIFF in one strip is one chunk.
_MAX_CHUNKS = 2**22
_MAX_CHUNK_BYTES = 2**32


@dataclass(frozen=True)
class ImageFile:
    """An opened image: lazy (c, y, x) arrays, finest first, and the pixel size its metadata give."""

    levels: list[da.Array]
    mpp: float | None
    """um per pixel of the finest level; None if the file does not say."""


def open_image(path: str | Path) -> ImageFile:
    """Open TIFF, OME-TIFF, SVS, PNG, JPEG or OME-Zarr without reading its pixels.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the format is not one of these.
    """
    path = Path(path)
    if not path.exists():
        msg = f"No image at {str(path)!r}."
        raise FileNotFoundError(msg)
    suffix = path.suffix.lower()
    if suffix in _TIFF:
        return _readable(_open_tiff, path)
    if suffix in _PLAIN:
        return _readable(_open_plain, path)
    if suffix == ".zarr" or (path / "zarr.json").exists() or (path / ".zattrs").exists():
        return _readable(_open_ome_zarr, path)
    msg = f"Cannot read {path.name!r}: expected one of {sorted(_TIFF | _PLAIN | {'.zarr'})}, found {suffix!r}."
    raise ValueError(msg)


def _readable(opener: Callable[[Path], ImageFile], path: Path) -> ImageFile:
    """Open a file, or say which one is damaged: the libraries' own messages do not."""
    try:
        return opener(path)
    except Exception as error:
        if isinstance(error, PermissionError | MemoryError) or (type(error) is ValueError and path.name in str(error)):
            raise  # telling enough
        msg = f"{str(path)!r} cannot be read as an image: {error}. Is it complete, and of the format its name says?"
        raise ValueError(msg) from error


def _open_tiff(path: Path) -> ImageFile:
    import dask.array as da
    import tifffile
    import zarr

    with tifffile.TiffFile(path) as tiff:
        series = max(tiff.series, key=lambda s: int(np.prod(s.shape)))
        mpp = _tiff_mpp(tiff)
        axes = series.axes.replace("S", "C")
        _require_whole(tiff, series)
        n_levels = len(series.levels)
        which = tiff.series.index(series)
    levels = []
    for i in range(n_levels):
        # Opened by path again: the store then reopens the file in each worker process.
        store = tifffile.imread(path, series=which, level=i, aszarr=True)
        array = zarr.open(store, mode="r")
        _require_plausible(array, path)
        levels.append(_channels_first(da.from_zarr(array), axes))
    return ImageFile(levels, mpp)


def _require_whole(tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> None:
    """All pixels that the file announces lie within it: else it was cut off, or copied while it was written."""
    size = tiff.filehandle.size
    for level in series.levels:
        page = level.pages[0]
        end = max((o + n for o, n in zip(page.dataoffsets, page.databytecounts, strict=True)), default=0)
        if end > size:
            msg = f"{tiff.filename!r} is truncated: its pixels reach to byte {end}, the file has {size}. Copy it again."
            raise ValueError(msg)


def _require_plausible(array: zarr.Array, path: Path) -> None:
    """Refuse what would fill the memory: a few bytes of metadata can announce any size.

    Raises
    ------
    ValueError
        If a chunk, which is decoded in one piece, or the number of chunks is too large.
    """
    chunk_bytes = math.prod(array.chunks) * array.dtype.itemsize
    n_chunks = math.prod(-(-n // max(c, 1)) for n, c in zip(array.shape, array.chunks, strict=True))
    if chunk_bytes > _MAX_CHUNK_BYTES or n_chunks > _MAX_CHUNKS:
        msg = (
            f"{path.name!r} announces {tuple(array.shape)} values in {n_chunks} chunks of {chunk_bytes / 2**20:.3g} MiB each; "
            f"up to {_MAX_CHUNKS} chunks of {_MAX_CHUNK_BYTES // 2**20} MiB are read. Convert it to a tiled TIFF or OME-Zarr."
        )
        raise ValueError(msg)


def _channels_first(array: da.Array, axes: str) -> da.Array:
    """Reorder to (c, y, x); further axes must have length 1."""
    for axis in [a for a in axes if a not in "CYX"]:
        position = axes.index(axis)
        if array.shape[position] != 1:
            msg = f"Expected a 2D colour image, found axes {axes} of shape {array.shape}."
            raise ValueError(msg)
        array, axes = array.squeeze(position), axes.replace(axis, "")
    if "C" not in axes:
        array, axes = array[None], "C" + axes
    array = array.transpose([axes.index(a) for a in "CYX"])
    # Slivers of strips make one task per row; whole-height columns of tiles do not fit in memory.
    # Whole chunks of the file go together, so that none is decoded for two of ours.
    rows, columns = (size * max(1, _CHUNK // size) for size in array.chunksize[1:])
    return array.rechunk({0: -1, 1: rows, 2: columns})


def _tiff_mpp(tiff: object) -> float | None:
    """Pixel size from OME-XML, Aperio text or the resolution tags, in this order."""
    if tiff.ome_metadata:
        size = re.search(r'PhysicalSizeX="([0-9.eE+-]+)"', tiff.ome_metadata)
        unit = re.search(r'PhysicalSizeXUnit="([^"]+)"', tiff.ome_metadata)
        # Micrometres are the default of the format; pixels and reference frames are no lengths.
        factor = _OME_UNITS.get(unit.group(1) if unit else "um")
        return float(size.group(1)) * factor if size and factor else None
    page = tiff.pages[0]
    if found := re.search(r"MPP\s*=\s*([0-9.]+)", page.description or ""):
        return float(found.group(1))
    resolution, unit = page.tags.get("XResolution"), page.tags.get("ResolutionUnit")
    if resolution is None or unit is None or int(unit.value) not in _UM_PER_UNIT:
        return None
    numerator, denominator = resolution.value
    mpp = _UM_PER_UNIT[int(unit.value)] * denominator / numerator if numerator else np.inf
    # Screen resolutions (72-300 dpi, above 80 um a pixel) are defaults of image software, not microscopes.
    return mpp if mpp < 80 else None


def _open_plain(path: Path) -> ImageFile:
    """PNG or JPEG; a JPEG also gives halved levels at the price of a small decode."""
    import dask
    import dask.array as da

    width, height, bands, dtype, fractions = _plain_shape(path)
    levels = []
    for fraction in fractions:
        shape = (bands, -(-height // fraction), -(-width // fraction))
        decoded = dask.delayed(_decode_plain, pure=True)(str(path), fraction, path.stat().st_mtime_ns)
        # Chunks of a usual size, so that the image can be written to zarr as it is.
        levels.append(da.from_delayed(decoded, shape, dtype=dtype).rechunk((bands, _CHUNK, _CHUNK)))
    return ImageFile(levels, None)


def _pil_open(path: str | Path) -> Image.Image:
    """Open a file with PIL, whose warning above 89 Mpx means nothing for a slide; above 179 Mpx it still refuses."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            return Image.open(path)
        except Image.DecompressionBombError as error:
            msg = f"{Path(path).name} is too large to decode in one piece ({error}); convert it to a tiled TIFF."
            raise ValueError(msg) from error


def _plain_shape(path: Path) -> tuple[int, int, int, type, tuple[int, ...]]:
    """Width, height, bands, type, and the fractions of the size at which the file can be decoded."""
    with _pil_open(path) as image:
        bands = 1 if image.mode in {"1", "L", "I;16"} else 3
        dtype = np.uint16 if image.mode == "I;16" else np.uint8
        # libjpeg scales by powers of two while decoding.
        fractions = (1, 2, 4, 8) if image.format == "JPEG" and min(image.size) >= 1024 else (1,)
        return image.width, image.height, bands, dtype, fractions


@lru_cache(maxsize=2)
def _decode_plain(path: str, fraction: int, modified: int) -> np.ndarray:
    """Decode to (c, y, x) uint8, at 1 / `fraction` of the size for JPEG.

    These formats can only be decoded in one piece, so the last two images are kept while their windows are read;
    `modified` (time of change, ns) keeps the memory from going stale.
    """
    with _pil_open(path) as image:
        if fraction > 1:
            # draft() takes the smallest size not below the wanted one, and libjpeg rounds sizes up.
            image.draft("RGB", (image.width // fraction, image.height // fraction))
        mode = {"1": "L", "L": "L", "I;16": "I;16"}.get(image.mode, "RGB")
        try:
            pixels = np.asarray(image if image.mode == mode else image.convert(mode))
        except (OSError, SyntaxError) as error:
            msg = f"{path!r} is damaged: {error}. Copy or export it again."
            raise ValueError(msg) from error
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    return np.moveaxis(pixels, -1, 0)


def _open_ome_zarr(path: Path) -> ImageFile:
    import dask.array as da
    import zarr

    group = zarr.open_group(path, mode="r")
    attrs = dict(group.attrs)
    multiscales = attrs.get("ome", attrs).get("multiscales")
    if not multiscales:
        msg = f"{path.name!r} is no OME-Zarr image: its attributes hold no `multiscales` ({json.dumps(sorted(attrs))})."
        raise ValueError(msg)
    first = multiscales[0]
    axes = "".join(axis["name"].upper() if isinstance(axis, dict) else axis.upper() for axis in first["axes"])
    arrays = [group[dataset["path"]] for dataset in first["datasets"]]
    for array in arrays:
        _require_plausible(array, path)
    levels = [_channels_first(da.from_zarr(array), axes) for array in arrays]
    return ImageFile(levels, _ome_zarr_mpp(first))


def _ome_zarr_mpp(multiscale: dict) -> float | None:
    axis = next((a for a in multiscale["axes"] if isinstance(a, dict) and a["name"].lower() == "x"), {})
    factor = {"micrometer": 1.0, "nanometer": 1e-3, "millimeter": 1e3}.get(axis.get("unit"))
    if factor is None:
        return None
    position = [a["name"].lower() for a in multiscale["axes"]].index("x")
    for transformation in multiscale["datasets"][0].get("coordinateTransformations", []):
        if transformation.get("type") == "scale":
            return float(transformation["scale"][position]) * factor
    return None
