"""Open image files lazily as pyramids and read their pixel size."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from spatial_impute._image.tiff import require_plausible, tiff_levels

if TYPE_CHECKING:
    from collections.abc import Callable

    import dask.array as da
    import zarr
    from PIL import Image

    from spatial_impute._image.tiff import TiffLevel

_TIFF = {".tif", ".tiff", ".svs", ".ndpi", ".btf"}
_PLAIN = {".jpg", ".jpeg", ".png"}
_UM_PER_ZARR_UNIT = {"micrometer": 1.0, "nanometer": 1e-3, "millimeter": 1e3}
_CHUNK = 1024  # px; a chunk of three colors is 3 MiB, and readers keep a few


@dataclass(frozen=True)
class ImageFile:
    """An opened image: lazy (c, y, x) arrays, finest first, and the pixel size its metadata give."""

    levels: list[da.Array]
    pixel_size: tuple[float, float] | None
    """um per pixel (x, y) of the finest level; None if the metadata do not tell."""

    @property
    def mpp(self) -> float | None:
        """Mean edge length of a pixel in um, or None."""
        return None if self.pixel_size is None else float(np.sqrt(self.pixel_size[0] * self.pixel_size[1]))


def open_image(path: str | Path) -> ImageFile:
    """Open TIFF, OME-TIFF, SVS, PNG, JPEG or OME-Zarr without reading its pixels.

    Raises a ``FileNotFoundError`` for a missing file, a ``ValueError`` for another format or a damaged file.
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
    """Open a file, or name the file that is damaged: messages of the libraries do not."""
    try:
        return opener(path)
    except Exception as error:
        if isinstance(error, PermissionError | MemoryError) or (type(error) is ValueError and path.name in str(error)):
            raise  # the message names the file
        msg = (
            f"{str(path)!r} cannot be read as an image: {error}. Check that the file is complete and that its suffix "
            "fits its format."
        )
        raise ValueError(msg) from error


def _open_tiff(path: Path) -> ImageFile:
    levels, axes, pixel_size = tiff_levels(path)
    return ImageFile([_channels_first(_lazy(level, axes, level.token), axes) for level in levels], pixel_size)


def _lazy(array: zarr.Array | TiffLevel, axes: str, name: str | None = None) -> da.Array:
    """Dask array of an array on disk; a `name` identifies the same file in a session.

    A dask chunk holds whole chunks of the file, so that none is decoded twice. It holds about `_CHUNK` px and all
    colors: strips would make one task per row, small tiles millions of tasks on a large slide.
    """
    import dask.array as da

    chunks = tuple(
        min(n, size * max(1, _CHUNK // size)) if axis in "YX" else n
        for n, size, axis in zip(array.shape, array.chunks, axes, strict=True)
    )
    return da.from_array(array, chunks=chunks, name=name, meta=np.empty((0,) * len(chunks), dtype=array.dtype))


def _channels_first(array: da.Array, axes: str) -> da.Array:
    """Reorder to (c, y, x); further axes must have length 1."""
    for axis in [a for a in axes if a not in "CYX"]:
        position = axes.index(axis)
        if array.shape[position] != 1:
            msg = f"Expected a 2D color image, found axes {axes} of shape {array.shape}."
            raise ValueError(msg)
        array, axes = array.squeeze(position), axes.replace(axis, "")
    if "C" not in axes:
        array, axes = array[None], "C" + axes
    return array.transpose([axes.index(a) for a in "CYX"])


def _open_plain(path: Path) -> ImageFile:
    """PNG or JPEG; a JPEG also gives halved levels, which are cheap to decode."""
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
    """Open PNG or JPEG, known by the first bytes, at up to twice the pixels above which PIL warns.

    ``PIL.Image.open`` warns of each scan above 89 megapixels. A filter of warnings does not help: it belongs to the
    whole process, and several threads decode images.
    """
    from PIL import Image
    from PIL.JpegImagePlugin import JpegImageFile
    from PIL.PngImagePlugin import PngImageFile

    with Path(path).open("rb") as file:
        start = file.read(8)
    readers = {b"\x89PNG\r\n\x1a\n": PngImageFile, b"\xff\xd8\xff": JpegImageFile}
    reader = next((reader for magic, reader in readers.items() if start.startswith(magic)), None)
    if reader is None:
        msg = f"{Path(path).name} is neither PNG nor JPEG: it starts with {start!r}."
        raise ValueError(msg)
    image = reader(str(path))
    pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
    if limit is not None and pixels > 2 * limit:
        image.close()
        msg = (
            f"{Path(path).name} is too large to decode in one piece ({pixels} pixels, the limit is {2 * limit}); "
            "convert it to a tiled TIFF."
        )
        raise ValueError(msg)
    return image


def _plain_shape(path: Path) -> tuple[int, int, int, type, tuple[int, ...]]:
    """Width, height, bands, type, and the fractions of the size at which the file can be decoded."""
    with _pil_open(path) as image:
        bands = 1 if image.mode in {"1", "L", "I;16"} else 3
        dtype = np.uint16 if image.mode == "I;16" else np.uint8
        # libjpeg scales by powers of two while decoding.
        fractions = (1, 2, 4, 8) if image.format == "JPEG" and min(image.size) >= 1024 else (1,)
        return image.width, image.height, bands, dtype, fractions


@lru_cache(maxsize=2)
def _decode_plain(path: str, fraction: int, _modified: int) -> np.ndarray:
    """Decode to (c, y, x) uint8, at 1 / `fraction` of the size for JPEG.

    These formats are decoded in one piece, so the last two images stay in memory while their windows are read.
    `_modified` (time of change, ns) tells a changed file from an old one.
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
    import zarr

    group = zarr.open_group(path, mode="r")
    attrs: dict[str, Any] = dict(group.attrs)
    multiscales = attrs.get("ome", attrs).get("multiscales")
    if not multiscales:
        msg = f"{path.name!r} is no OME-Zarr image: its attributes hold no `multiscales` ({json.dumps(sorted(attrs))})."
        raise ValueError(msg)
    first = multiscales[0]
    # Version 0.3 names the axes by strings, later versions by mappings.
    axes = {(axis if isinstance(axis, str) else axis["name"]).lower(): axis for axis in first["axes"]}
    names = "".join(axes).upper()
    arrays = [cast("zarr.Array", group[dataset["path"]]) for dataset in first["datasets"]]
    for array in arrays:
        require_plausible(array, path)
    levels = [_channels_first(_lazy(array, names), names) for array in arrays]
    return ImageFile(levels, _ome_zarr_pixel_size(axes, first["datasets"][0]))


def _ome_zarr_pixel_size(axes: dict[str, Any], finest: dict[str, Any]) -> tuple[float, float] | None:
    """From the units of the axes and the scale of the finest level."""
    units = [axes[name].get("unit") for name in "xy" if isinstance(axes.get(name), dict)]
    factors = [_UM_PER_ZARR_UNIT[unit] for unit in units if unit in _UM_PER_ZARR_UNIT]
    scales = [t["scale"] for t in finest.get("coordinateTransformations", []) if t.get("type") == "scale"]
    if not scales or len(factors) < 2:
        return None
    places = list(axes)
    x, y = (float(scales[0][places.index(name)]) * factor for name, factor in zip("xy", factors, strict=True))
    return x, y
