"""Open image files lazily as pyramids and read their pixel size."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import dask
import dask.array as da
import numpy as np
import zarr
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from spatial_impute._image.brightfield import Samples, brightfield, names_by_color, rgb_order, upright
from spatial_impute._image.levels import zarr_pixel_size
from spatial_impute._image.tiff import how_to_convert, open_tiff, require_plausible
from spatial_impute._settings import logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from spatial_impute._image.tiff import TiffLevel

_TIFF = {".tif", ".tiff", ".svs", ".ndpi", ".btf"}
_PLAIN = {".jpg", ".jpeg", ".png"}
_TIFF_MAGIC, _PLAIN_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), (b"\x89PNG", b"\xff\xd8\xff")
# Of these, the file that is named holds an overview, or a format of its own.
_VENDORS = re.compile(
    r"\.(mrxs|vsi|ets|czi|dcm|dicom|isyntax|i2syntax|svslide|vms|vmu|zvi|lif|nd2|oir|oib|kfb|sdpc|mds|tron)"
)
_TABLES = {".h5", ".hdf5", ".h5seurat", ".loom", ".rds", ".csv", ".tsv", ".mtx", ".parquet"}
_PACKED = {".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z", ".rar"}
_EXIF_ORIENTATION = 0x0112
_JPEG_END = b"\xff\xd9"
_WIDE = ";16"  # of modes with 16 bits
_CHUNK = 1024  # px; a chunk of three colors is 3 MiB, and readers keep a few


@dataclass(frozen=True)
class ImageFile:
    """An opened image: lazy (c, y, x) arrays, finest first, and the pixel size its metadata give."""

    levels: list[da.Array]
    pixel_size: tuple[float, float] | None  # um per pixel (x, y) of the finest level; None if the metadata do not tell

    @property
    def mpp(self) -> float | None:
        """Mean edge length of a pixel in um, or None."""
        return None if self.pixel_size is None else float(np.sqrt(self.pixel_size[0] * self.pixel_size[1]))


def open_image(path: str | Path) -> ImageFile:
    """Open TIFF, OME-TIFF, SVS, PNG, JPEG or OME-Zarr without reading its pixels; the first bytes tell the format.

    The image is upright, and grey, RGB, or RGB with straight alpha. Raises a ``FileNotFoundError`` for a missing file, a
    ``ValueError`` for another format, for pixels that are no brightfield image, or a damaged file.
    """
    path = Path(path).expanduser()
    if not path.exists():
        msg = f"No image at {str(path)!r}."
        raise FileNotFoundError(msg)
    path = path.resolve()  # it is read later, when the working directory may be another one
    suffix = path.suffix.lower()
    if _VENDORS.fullmatch(suffix):
        msg = f"Cannot read {path.name!r}: {suffix} is a format of its own. {how_to_convert(path)}"
        raise ValueError(msg)
    if path.is_dir():
        if suffix == ".zarr" or (path / "zarr.json").exists() or (path / ".zattrs").exists():
            return _readable(_open_ome_zarr, path)
        msg = f"Cannot read {path.name!r}: it is a folder, and no OME-Zarr."
        raise ValueError(msg)
    with path.open("rb") as file:
        start = file.read(4)
    is_plain = start.startswith(_PLAIN_MAGIC)
    if start.startswith(_TIFF_MAGIC) or (suffix in _TIFF and not is_plain):
        return _readable(_open_tiff, path)
    if is_plain or suffix in _PLAIN:
        return _readable(_open_plain, path)
    if suffix in _TABLES:
        msg = (
            f"Cannot read {path.name!r}: it is a table and no image. Give the folder of Space Ranger that holds it, its h5ad, or a SpatialData "
            "object; or the image alone, for an unmeasured section."
        )
        raise ValueError(msg)
    msg = (
        f"Cannot read {path.name!r}: expected one of {sorted(_TIFF | _PLAIN | {'.zarr'})}, found {suffix!r}. "
        f"{'Unpack it, and give what is in it.' if suffix in _PACKED else how_to_convert(path)}"
    )
    raise ValueError(msg)


def open_slide(slide: Any) -> ImageFile:
    """Open the image of a ``wsidata.WSIData``, in RGB, through its reader: OpenSlide and others read more formats."""
    properties = slide.properties

    def read(level: int, block_info: dict[int, Any] | None = None) -> np.ndarray:
        (_, _), (y0, y1), (x0, x1) = block_info[None]["array-location"]  # type: ignore[index]
        factor = properties.level_downsample[level]
        region = slide.reader.get_region(round(x0 * factor), round(y0 * factor), x1 - x0, y1 - y0, level=level)
        return np.moveaxis(np.asarray(region)[..., :3], -1, 0)

    levels = []
    for level in range(properties.n_level):
        height, width = (int(n) for n in properties.level_shape[level])
        chunks = ((3,), *(da.core.normalize_chunks(_CHUNK, (n,))[0] for n in (height, width)))
        levels.append(
            da.map_blocks(read, level=level, chunks=chunks, dtype=np.uint8, meta=np.empty((0, 0, 0), np.uint8))
        )
    mpp = properties.mpp
    return ImageFile(levels, None if mpp is None else (float(mpp), float(mpp)))


def _readable(opener: Callable[[Path], ImageFile], path: Path) -> ImageFile:
    """Open a file, or name the file that is damaged: messages of the libraries do not."""
    try:
        return opener(path)
    except Exception as error:
        plain = type(error) is ValueError  # mostly ours, which says what to do
        if isinstance(error, PermissionError | MemoryError) or (plain and path.name in str(error)):
            raise  # the message names the file
        advice = "" if plain else " Check that the file is complete and that its suffix fits its format."
        msg = f"{str(path)!r} cannot be read as an image: {str(error).rstrip('.')}.{advice}"
        raise ValueError(msg) from error


def _open_tiff(path: Path) -> ImageFile:
    image = open_tiff(path)
    if image.samples.kind != "RGB" or image.samples.premultiplied or image.samples.orientation != 1:
        logger.info("%s: %s", path.name, image.samples.describe())
    levels = []
    for level in image.levels:
        array = _channels_first(_lazy(level, image.axes, level.token), image.axes)
        array = array if image.order == sorted(image.order) else array[image.order]
        levels.append(brightfield(array, image.samples))
    size = image.pixel_size
    return ImageFile(levels, size[::-1] if size is not None and image.samples.orientation >= 5 else size)


def _lazy(array: zarr.Array | TiffLevel, axes: str, name: str | None = None) -> da.Array:
    """Dask array of an array on disk; a `name` identifies the same file in a session.

    A dask chunk holds whole chunks of the file, so that none is decoded twice. It holds about `_CHUNK` px and all
    colors: strips would make one task per row, small tiles millions of tasks on a large slide.
    """
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
            msg = f"Expected a 2D color image, found axes {axes} of shape {array.shape}; save one plane of it, the one in focus."
            raise ValueError(msg)
        array, axes = array.squeeze(position), axes.replace(axis, "")
    if "C" not in axes:
        array, axes = array[None], "C" + axes
    return array.transpose([axes.index(a) for a in "CYX"])


def _open_plain(path: Path) -> ImageFile:
    """PNG or JPEG; a JPEG also gives halved levels, which are cheap to decode."""
    with _pil_open(path) as image:
        mode, size = _plain_mode(image), (image.height, image.width)
        # libjpeg scales by powers of two while decoding.
        fractions = (1, 2, 4, 8) if image.format == "JPEG" and min(size) >= 1024 else (1,)
        orientation = int(Image.Image.getexif(image).get(_EXIF_ORIENTATION, 1))  # that of PNG would decode the image
    n_channels, dtype = len(mode.removesuffix(_WIDE)), np.uint16 if mode.endswith(_WIDE) else np.uint8
    levels = []
    for fraction in fractions:
        shape = (n_channels, *(-(-n // fraction) for n in size))
        decoded = dask.delayed(_decode_plain, pure=True)(str(path), fraction, path.stat().st_mtime_ns)
        # Chunks of a usual size, so that the image can be written to zarr as it is.
        array = da.from_delayed(decoded, shape, dtype=dtype).rechunk((n_channels, _CHUNK, _CHUNK))
        levels.append(upright(array, orientation))
    return ImageFile(levels, None)


def _pil_open(path: str | Path) -> Image.Image:
    """Open PNG or JPEG, known by the first bytes, at up to twice the pixels above which PIL warns.

    ``PIL.Image.open`` warns of each scan above 89 megapixels. A filter of warnings does not help: it belongs to the
    whole process, and several threads decode images.
    """
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


def _plain_mode(image: Any) -> str:
    """Mode to convert to: alpha and 16 bits are kept, and palettes, CMYK and bits become RGB or grey."""
    wide = _WIDE if any(_WIDE in str(tile.args) for tile in image.tile) else ""
    if image.has_transparency_data:
        return f"RGBA{wide}"
    return {"1": "L", "L": "L", "I;16": "I;16"}.get(image.mode, f"RGB{wide}")


@lru_cache(maxsize=2)
def _decode_plain(path: str, fraction: int, _modified: int) -> np.ndarray:
    """Decode to (c, y, x), at 1 / `fraction` of the size for JPEG.

    These formats are decoded in one piece, so the last two images stay in memory while their windows are read.
    `_modified` (time of change, ns) tells a changed file from an old one.
    """
    with _pil_open(path) as image:
        mode = _plain_mode(image)
        pixels: np.ndarray | None = None
        if fraction > 1:
            # draft() takes the smallest size not below the wanted one, and libjpeg rounds sizes up.
            image.draft("RGB", (image.width // fraction, image.height // fraction))
        elif mode.endswith(_WIDE):
            pixels = _decode_wide_png(path)
        elif image.format == "JPEG" and image.mode == mode:
            pixels = _decode_jpeg(path)
        try:
            if pixels is None:
                pixels = np.asarray(image if image.mode == mode else image.convert(mode))
        except (OSError, SyntaxError) as error:
            msg = f"{path!r} is damaged: {error}. Copy or export it again."
            raise ValueError(msg) from error
    return np.moveaxis(pixels[..., None] if pixels.ndim == 2 else pixels, -1, 0)


def _decode_jpeg(path: str) -> np.ndarray | None:
    """Pixels ``(y, x)`` or ``(y, x, c)`` equal to those of PIL, in a quarter of its time.

    None for a file that is damaged or has no end: imagecodecs fills missing pixels with grey, and PIL says what is wrong.
    """
    import imagecodecs

    data = Path(path).read_bytes()
    try:
        return imagecodecs.jpeg8_decode(data) if data.endswith(_JPEG_END) else None
    except imagecodecs.Jpeg8Error:
        return None


def _decode_wide_png(path: str) -> np.ndarray:
    """Pixels ``(y, x)`` or ``(y, x, c)`` of a PNG of 16 bits: PIL drops 8 of them, and images of 12 bits would be black."""
    import imagecodecs

    try:
        pixels = imagecodecs.png_decode(Path(path).read_bytes())
    except imagecodecs.PngError as error:
        msg = f"{path!r} is damaged: {error}. Copy or export it again."
        raise ValueError(msg) from error
    return pixels[..., [0, 0, 0, 1]] if pixels.shape[2:] == (2,) else pixels  # grey with alpha


def _open_ome_zarr(path: Path) -> ImageFile:
    group = zarr.open(path, mode="r")
    if isinstance(group, zarr.Array):
        msg = (
            f"{path.name!r} is an array of shape {group.shape} without axes and pixel size, and no OME-Zarr image. Give the image that "
            f"holds it, or the array itself with `mpp`: `dask.array.from_zarr(path)`."
        )
        raise ValueError(msg)
    attrs: dict[str, Any] = dict(group.attrs)
    found = attrs.get("ome", attrs)
    if not found.get("multiscales"):
        raise ValueError(_no_multiscales(path, group, attrs))
    if "image-label" in found:
        msg = f"{path.name!r} holds labels of segmented objects, and no image. Give the image that they belong to."
        raise ValueError(msg)
    first = found["multiscales"][0]
    # Versions before 0.3 always have these five axes, version 0.3 names the axes by strings, later versions by mappings.
    given = first.get("axes") or list("tczyx")
    axes = {(axis if isinstance(axis, str) else axis["name"]).lower(): axis for axis in given}
    names = "".join(axes).upper()
    arrays = [cast("zarr.Array", group[dataset["path"]]) for dataset in first["datasets"]]
    for array in arrays:
        require_plausible(array, path)
    if arrays != sorted(arrays, key=lambda array: -array.shape[names.index("X")]):
        msg = f"{path.name!r} lists its resolutions {[array.shape for array in arrays]}, expected the finest one first."
        raise ValueError(msg)
    channels = found.get("omero", {}).get("channels", ())
    colors = [int(text, 16) if re.fullmatch("[0-9A-Fa-f]{6}", text := str(c.get("color"))) else None for c in channels]
    labels = names_by_color([channel.get("label") or "" for channel in channels], colors)
    levels = [_channels_first(_lazy(array, names), names) for array in arrays]
    order = rgb_order(labels, levels[0].shape[0])
    if order != sorted(order):
        levels = [level[order] for level in levels]
    samples = Samples("grey" if len(order) == 1 else "RGB", 3 if len(order) == 4 else None)
    return ImageFile([brightfield(level, samples) for level in levels], zarr_pixel_size(axes, first))


def _no_multiscales(path: Path, group: zarr.Group, attrs: dict[str, Any]) -> str:
    """Message for a zarr that is no image: exports and plates hold images below them."""
    found, inside = attrs.get("ome", attrs), sorted(name for name, _ in group.groups())
    msg = f"{path.name!r} is no OME-Zarr image: its attributes hold no `multiscales` ({json.dumps(sorted(attrs))})."
    if "bioformats2raw.layout" in found:
        msg += f" It is an export of bioformats2raw, with the images {inside}; give one of them, as '{path.name}/0'."
    elif "plate" in found or "well" in found:
        msg += f" It is a plate with several images; give one of them, below {inside}."
    return msg
