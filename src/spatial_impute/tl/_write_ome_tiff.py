"""Write an image of a section in the common frame as a file for other programs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from spatial_impute._geometry import linear_scale, scaling
from spatial_impute._image.brightfield import names_alpha
from spatial_impute._image.levels import best_level, image_levels
from spatial_impute._image.tiff import TILE, Pyramid, write_pyramid
from spatial_impute._io.files import file_to_write
from spatial_impute._registration.transform import PixelGrid, output_grid, resampled
from spatial_impute._settings import logger, progress
from spatial_impute._stack import (
    answer,
    element_affine,
    in_rgb_order,
    load_record,
    load_transform,
    registration_problems,
    section_levels,
)
from spatial_impute._validation import require_key, require_one_of, require_positive
from spatial_impute.tl._warp_element import section_of

if TYPE_CHECKING:
    from pathlib import Path

    from spatialdata import SpatialData

    from spatial_impute._image.levels import Level
    from spatial_impute._registration.transform import SectionTransform
    from spatial_impute._stack import StackRecord

_BLOCK = 2048  # px along a strip that one task computes
# Types that OME does not have.
_WRITTEN_AS = {"bool": "uint8", "float16": "float32", "int64": "int32", "uint64": "uint32"}


def write_ome_tiff(
    sdata: SpatialData,
    key: str,
    path: str | Path,
    *,
    section: str | None = None,
    canvas: str = "reference",
    pixel_size: float | None = None,
    compression: str | None = None,
    overwrite: bool = False,
    show_progress_bar: bool | None = None,
) -> None:
    """Write a registered image or labels as a pyramidal OME-TIFF, deformation included, for QuPath, Fiji or napari.

    Pixels are computed and written strip by strip, so memory does not grow with the height of the slide. With a
    :class:`dask.distributed.Client`, its workers compute the strips.

    Parameters
    ----------
    sdata
        Stack registered by :func:`register_stack`.
    key
        Image or labels. Channels that are no colors, such as dyes, are written one by one with their names.
    path
        File to write (``.ome.tif`` or ``.ome.tiff``).
    section
        Section of the element; by default the one section to which it has a transformation.
    canvas
        ``"reference"``: the pixels of the image of the reference, so that all files of a stack, and files of
        :func:`write_geojson`, lie over each other; what lies outside is cut off. ``"section"``: the whole registered image.
    pixel_size
        Pixel size in um; by default that of the image of the reference (``canvas="reference"``) or of the element.
    compression
        ``"jpeg"``, ``"deflate"``, ``"zstd"`` or ``"none"``; by default JPEG for images of 8 bits in grey or in red,
        green and blue, and deflate (without loss) for others and for labels.
    overwrite
        Replace a file that is there, once the new one is complete. Never name the file that an image of `sdata` is read
        from.
    show_progress_bar
        Show a progress bar; ``settings.show_progress_bar`` by default.

    Returns
    -------
    ``None``. Writes the file. Its OME-XML has the pixel size, and the place of its corner in the common frame (um).

    Raises
    ------
    KeyError
        If the stack is not registered, or the element does not exist or belongs to no registered section.
    FileExistsError
        If there is a file at `path` and `overwrite` is False.
    FileNotFoundError
        If the folder of `path` does not exist.
    ValueError
        If `path` has another end, JPEG does not suit the pixels, or `pixel_size` does not fit.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack()
    >>> si.tl.register_stack(sdata, method="rigid", show_progress_bar=False)
    >>> si.tl.write_ome_tiff(sdata, "s0_image", "s0.ome.tif")
    """
    record = load_record(sdata)
    path = file_to_write(path, ends=(".ome.tif", ".ome.tiff"), overwrite=overwrite)
    require_one_of(canvas, {"reference", "section"}, name="canvas")
    if pixel_size is not None:
        pixel_size = require_positive(pixel_size, name="pixel_size", unit="um")
    answer(registration_problems(sdata, record))
    require_key(key, [*sdata.images, *sdata.labels], where="the images and labels of sdata")
    section = section_of(sdata[key], key, record, section)
    transform = load_transform(sdata, record, section)
    is_slide = key == record[section].image
    element, channels = (sdata[key], ()) if key in sdata.labels else _colors_or_channels(sdata[key], is_slide=is_slide)
    levels = image_levels(element, element_affine(sdata[key], section))
    grid = _grid(levels[0], transform, _reference(sdata, record) if canvas == "reference" else None, pixel_size)
    fill = levels[0].white if is_slide else 0
    image = _Slide(levels, transform, grid, channels, fill, key in sdata.labels).pyramid(key)
    bar = progress(None, f"Writing {path.name}", show=show_progress_bar, total=image.n_strips)
    try:
        write_pyramid(path, image, _compression(compression, image, labels=key in sdata.labels), bar.update)
    finally:
        bar.close()
    logger.info(
        "Wrote %s: %d x %d px at %.4g um, %d levels", path, *image.shape[1::-1], image.pixel_size, image.n_levels
    )


def _reference(sdata: SpatialData, record: StackRecord) -> Level:
    """Full resolution of the image of the reference."""
    then = "The file gets its frame from the reference. Without it, pass `canvas='section'`."
    require_key(record.reference, record.names, where="the stack's sections", then=then)
    return section_levels(sdata, record[record.reference])[0]


def _colors_or_channels(element: Any, *, is_slide: bool) -> tuple[Any, tuple[str, ...]]:
    """Image with its channels as grey or red, green, blue (and alpha), or as it is with the names of its channels."""
    array = next(iter(element["scale0"].ds.data_vars.values())) if hasattr(element, "children") else element
    names = tuple(map(str, array.coords["c"].to_numpy())) if "c" in array.coords else ()
    # Four channels without names are dyes, except on the slide: as alpha, the last one would hide the others.
    if is_slide or len(names) != 4 or names_alpha(names):
        try:
            return in_rgb_order(element), ()
        except ValueError:
            pass
    return element, names


def _grid(finest: Level, transform: SectionTransform, reference: Level | None, pixel_size: float | None) -> PixelGrid:
    """Pixels to write: in the frame of the reference, or of the element."""
    if reference is not None:
        # The pixels of the image itself, also if it is turned in its section: GeoJSON files have these pixels too.
        sizes = np.linalg.norm(reference.to_um[:2, :2], axis=0)
        size = pixel_size or reference.pixel_size
        height, width = (int(np.ceil(n)) for n in reference.shape * sizes[::-1] / size - 1e-6)
        return PixelGrid(reference.to_um @ scaling(*(size / sizes)), (height, width))
    size = pixel_size or finest.pixel_size * linear_scale(transform.matrix)
    return output_grid(finest.shape, finest.to_um, transform, size)


def _compression(wanted: str | None, image: Pyramid, *, labels: bool) -> str:
    jpeg = image.dtype == np.uint8 and image.shape[2:] in ((), (3,)) and not image.channels and not labels
    if wanted is None:
        return "jpeg" if jpeg else "deflate"
    require_one_of(wanted, {"jpeg", "deflate", "zstd", "none"}, name="compression")
    if wanted == "jpeg" and not jpeg:
        kind = " (labels)" if labels else f" with the channels {list(image.channels)}" if image.channels else ""
        msg = (
            f"JPEG holds images of 8 bits in grey or in red, green and blue, found {image.dtype} of shape "
            f"{image.shape}{kind}. Use `compression='deflate'`."
        )
        raise ValueError(msg)
    return wanted


@dataclass(frozen=True)
class _Slide:
    """Element on a grid of the common frame, level by level."""

    levels: list[Level]
    transform: SectionTransform
    grid: PixelGrid
    channels: tuple[str, ...]
    """Names of channels that are written one by one."""
    fill: float
    nearest: bool

    @property
    def dtype(self) -> np.dtype:
        """Type of the values in the file."""
        found = self.levels[0].data.dtype
        return np.dtype(_WRITTEN_AS.get(found.name, found))

    def pyramid(self, name: str) -> Pyramid:
        """Image to write; a single channel has no axis of its own."""
        n_colors = 1 if self.channels else self.levels[0].data.sizes.get("c", 1)
        shape = self.grid.shape if n_colors == 1 else (*self.grid.shape, n_colors)
        (x, y), size = self.grid.matrix[:2, 2], linear_scale(self.grid.matrix)
        return Pyramid(self._strip, shape, self.dtype, size, (float(x), float(y)), name, self.channels)

    def _strip(self, level: int, number: int, channel: int) -> np.ndarray:
        factor, row = 2**level, TILE * number
        height, width = (-(-n // factor) for n in self.grid.shape)
        matrix = self.grid.matrix @ scaling(factor)
        matrix[:2, 2] += matrix[:2, :2] @ [0, row]
        grid = PixelGrid(matrix, (min(TILE, height - row), width))
        source = best_level(self.levels, linear_scale(matrix) / linear_scale(self.transform.matrix))
        if self.channels:
            source = replace(source, data=source.data.isel(c=[channel]))
        found = resampled(source, self.transform, grid, nearest=self.nearest, fill=self.fill, chunk=_BLOCK)
        data = self._as_written(found.compute())
        if data.ndim == 2:
            return data
        return data[0] if len(data) == 1 else np.moveaxis(data, 0, -1)

    def _as_written(self, data: np.ndarray) -> np.ndarray:
        """Values in the type of the file."""
        if data.dtype.kind in "iu" and self.dtype.itemsize < data.dtype.itemsize:
            limits = np.iinfo(self.dtype)
            if data.size and (data.max() > limits.max or data.min() < limits.min):
                msg = (
                    f"OME-TIFF holds whole numbers up to {limits.max}, found {data.min()} to {data.max()}. Number the "
                    "labels anew."
                )
                raise ValueError(msg)
        return data.astype(self.dtype, copy=False)
