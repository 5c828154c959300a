"""Write an image of a section in the common frame as a file for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spatial_impute._geometry import linear_scale, scaling
from spatial_impute._image.levels import best_level, image_levels
from spatial_impute._image.pyramid_files import TILE, Pyramid, write_pyramid
from spatial_impute._registration.transform import SectionTransform
from spatial_impute._registration.warp_image import PixelGrid, output_grid, resampled
from spatial_impute._settings import logger, progress
from spatial_impute._stack import (
    answer,
    element_affine,
    load_record,
    load_transform,
    registration_problems,
    section_levels,
)
from spatial_impute._validation import require_key, require_one_of, require_positive
from spatial_impute.tl._warp_element import SET_TRANSFORMATION, fill_value, section_of

if TYPE_CHECKING:
    from spatialdata import SpatialData

    from spatial_impute._image.levels import Level

_BLOCK = 2048  # px along a strip that one task computes


def write_ome_tiff(
    sdata: SpatialData,
    key: str,
    path: str | Path,
    *,
    section: str | None = None,
    canvas: str = "reference",
    pixel_size: float | None = None,
    compression: str | None = None,
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
        Image or labels.
    path
        File to write (``.ome.tif`` or ``.ome.tiff``). A file that is there is replaced once the new one is complete.
    section
        Section of the element; by default the one section to which it has a transformation.
    canvas
        ``"reference"``: the frame of the image of the reference, so that all files of a stack have the same pixels; what
        lies outside is cut off. ``"section"``: the whole registered image.
    pixel_size
        Pixel size in um; by default that of the image of the reference (``canvas="reference"``) or of the element.
    compression
        ``"jpeg"``, ``"deflate"``, ``"zstd"`` or ``"none"``; by default JPEG for images of 8 bits with one or three channels,
        and deflate (without loss) for others and for labels.
    show_progress_bar
        Show a progress bar; ``settings.show_progress_bar`` by default.

    Returns
    -------
    ``None``. Writes the file. Its OME-XML has the pixel size, and the place of its corner in the common frame (um).

    Raises
    ------
    KeyError
        If the stack is not registered, or the element does not exist or belongs to no registered section.
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
    from spatialdata.transformations import get_transformation

    record, path = load_record(sdata), Path(path).expanduser()
    require_one_of(canvas, {"reference", "section"}, name="canvas")
    if pixel_size is not None:
        pixel_size = require_positive(pixel_size, name="pixel_size", unit="um")
    if not path.name.lower().endswith((".ome.tif", ".ome.tiff")):
        msg = f"`path` must end in .ome.tif, found {str(path)!r}."
        raise ValueError(msg)
    if not path.parent.is_dir():
        msg = f"`path` must lie in a folder that exists, found {str(path)!r}. Make the folder first."
        raise FileNotFoundError(msg)
    answer(registration_problems(sdata, record))
    require_key(key, [*sdata.images, *sdata.labels], where="the images and labels of sdata")
    own = get_transformation(sdata[key], get_all=True)
    section = section_of(own, key, record) if section is None else section
    require_key(section, own, where=f"the coordinate systems of {key!r}", then=SET_TRANSFORMATION)
    transform = load_transform(sdata, record, section)
    levels = image_levels(sdata[key], element_affine(sdata[key], section))
    grid = _grid(levels[0], transform, section_levels(sdata, record[record.reference])[0], canvas, pixel_size)
    fill = fill_value(levels[0], white=key == record[section].image)
    image = _Slide(levels, transform, grid, fill, nearest=key in sdata.labels).pyramid(key)
    bar = progress(None, f"Writing {path.name}", show=show_progress_bar, total=image.n_strips)
    try:
        write_pyramid(path, image, _compression(compression, image, labels=key in sdata.labels), bar.update)
    finally:
        bar.close()
    logger.info(
        "Wrote %s: %d x %d px at %.4g um, %d levels", path, *image.shape[1::-1], image.pixel_size, image.n_levels
    )


def _grid(
    finest: Level, transform: SectionTransform, reference: Level, canvas: str, pixel_size: float | None
) -> PixelGrid:
    """Pixels to write."""
    if canvas == "reference":
        size = pixel_size or reference.pixel_size
        return output_grid(reference.shape, reference.to_um, SectionTransform(np.eye(3)), size)
    size = pixel_size or finest.pixel_size * linear_scale(transform.matrix)
    return output_grid(finest.shape, finest.to_um, transform, size)


def _compression(wanted: str | None, image: Pyramid, *, labels: bool) -> str:
    jpeg = image.dtype == np.uint8 and image.shape[2:] in ((), (3,)) and not labels
    if wanted is None:
        return "jpeg" if jpeg else "deflate"
    require_one_of(wanted, {"jpeg", "deflate", "zstd", "none"}, name="compression")
    if wanted == "jpeg" and not jpeg:
        msg = (
            f"JPEG holds images of 8 bits with one or three channels, found {image.dtype} of shape {image.shape}"
            f"{' (labels)' if labels else ''}. Use `compression='deflate'`."
        )
        raise ValueError(msg)
    return wanted


class _Slide:
    """Element on a grid of the common frame, level by level."""

    def __init__(
        self, levels: list[Level], transform: SectionTransform, grid: PixelGrid, fill: float, *, nearest: bool
    ) -> None:
        self._levels, self._transform, self._grid, self._fill, self._nearest = levels, transform, grid, fill, nearest

    def pyramid(self, name: str) -> Pyramid:
        """Image to write; a single channel has no axis of its own."""
        data, grid = self._levels[0].data, self._grid
        n_channels = data.sizes.get("c", 1)
        shape = grid.shape if n_channels == 1 else (*grid.shape, n_channels)
        (x, y), size = grid.matrix[:2, 2], linear_scale(grid.matrix)
        return Pyramid(self._strip, shape, np.dtype(data.dtype), size, (float(x), float(y)), name)

    def _strip(self, level: int, number: int) -> np.ndarray:
        factor, row = 2**level, TILE * number
        height, width = (-(-n // factor) for n in self._grid.shape)
        matrix = self._grid.matrix @ scaling(factor)
        matrix[:2, 2] += matrix[:2, :2] @ [0, row]
        grid = PixelGrid(matrix, (min(TILE, height - row), width))
        size = linear_scale(matrix) / linear_scale(self._transform.matrix)
        source = best_level(self._levels, size)
        options: dict[str, Any] = {"nearest": self._nearest, "fill": self._fill, "chunk": _BLOCK}
        data = resampled(source, self._transform, grid, **options).compute()
        if data.ndim == 2:
            return data
        return data[0] if len(data) == 1 else np.moveaxis(data, 0, -1)
