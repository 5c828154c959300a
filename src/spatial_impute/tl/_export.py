"""Results for other programs: points with a height for viewers, GeoJSON for QuPath, OME-TIFF."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import shapely
from spatialdata.models import PointsModel
from spatialdata.transformations import Identity

from spatial_impute._geometry import apply_affine, linear_scale, scaling
from spatial_impute._image.brightfield import names_alpha
from spatial_impute._image.levels import best_level, image_levels
from spatial_impute._image.tiff import TILE, Pyramid, write_pyramid
from spatial_impute._io.files import file_to_write, written_whole
from spatial_impute._keys import Keys
from spatial_impute._registration.transform import PixelGrid, output_grid, resampled
from spatial_impute._settings import log_added, logger, progress
from spatial_impute._stack.elements import (
    are_circles,
    element_affine,
    in_rgb_order,
    load_transform,
    require_element_key,
    require_registration,
    section_levels,
)
from spatial_impute._stack.record import load_record
from spatial_impute._stack.state import map_problems, raise_or_warn, registration_problems, require_current, warn_if_old
from spatial_impute._stack.table import dense_rows, registered_spots, stack_table
from spatial_impute._validation import name_list, require_key, require_one_of, require_positive
from spatial_impute.tl._warp_element import section_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData

    from spatial_impute._image.levels import Level
    from spatial_impute._registration.transform import SectionTransform

_CORNERS = 8  # of a quarter of a circle: its area is right to 0.6 %
_DECIMALS = 2  # of a pixel
_BLOCK = 2048  # px along a strip that one task computes
# Types that OME does not have.
_WRITTEN_AS = {"bool": "uint8", "float16": "float32", "int64": "int32", "uint64": "uint32"}


def points_3d(
    sdata: SpatialData,
    columns: str | Sequence[str] = (),
    *,
    layer: str = Keys.ASIGN,
    key_added: str = Keys.STACK_POINTS,
    inplace: bool = True,
) -> Any:
    """Make points with x, y and z of the spots of all registered sections, for the 3D view of napari and other viewers.

    In SpatialData the height of a section is a column (``obs["z"]``) and no coordinate, so a viewer shows each section
    as a separate plane. Points can have three coordinates.

    Parameters
    ----------
    sdata
        Stack registered by :func:`register_stack`.
    columns
        Genes, or columns of ``obs`` of the stack table, that become columns of the points, in addition to ``section``
        and ``measured``.
    layer
        Layer of the genes.
    key_added
        Name of the new points.
    inplace
        Write to `sdata`, or return the points and write nothing.

    Returns
    -------
    ``None``, or the points with ``inplace=False``. Writes:

    `sdata.points['stack_points']`
        x, y, z in um in the coordinate system of the registration (``"aligned"``), one point per spot in the order of
        the table, with ``spot`` (its name in the table), ``section``, ``measured`` and `columns`.

    Raises
    ------
    KeyError
        If the stack is not registered, or a gene, column or layer does not exist.
    ValueError
        If `key_added` is the name of another element, `columns` names ``x``, ``y`` or ``spot``, or spots or images were
        changed after the registration.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack(extent=1400.0)
    >>> si.tl.register_stack(sdata, show_progress_bar=False)
    >>> si.tl.points_3d(sdata, ["smooth_0"], layer="measured")
    >>> sdata.points["stack_points"].compute()["z"].nunique()
    3
    """
    record = load_record(sdata)
    target = require_registration(record)["coordinate_system"]
    table = stack_table(sdata)
    xyz = registered_spots(table, Keys.STACK_TABLE)
    require_current(sdata, record, table, measured=False)
    frame = pd.DataFrame({"x": xyz[:, 0], "y": xyz[:, 1], "z": xyz[:, 2], "spot": table.obs_names.to_numpy(str)})
    for name in (Keys.SECTION, Keys.MEASURED):
        frame[name] = table.obs[name].to_numpy()
    columns = name_list(columns, name="columns")
    if taken := [name for name in columns if name in {"x", "y", "spot"} & {*table.obs, *table.var_names}]:
        msg = f"`columns` names {taken}, which the points have already. Rename them in the stack table."
        raise ValueError(msg)
    if any(name in table.var_names for name in columns):
        warn_if_old(sdata, table, [layer])
    for name in columns:
        if name not in {Keys.Z, Keys.SECTION, Keys.MEASURED}:  # which are there
            frame[name] = _column_values(table, name, layer)
    if inplace:
        require_element_key(sdata, key_added, kind="points", ours=[Keys.STACK_POINTS])
    points = PointsModel.parse(frame, coordinates={axis: axis for axis in "xyz"}, transformations={target: Identity()})
    if not inplace:
        return points
    sdata.points[key_added] = points
    log_added(f"points[{key_added!r}]")
    return None


def _column_values(table: AnnData, name: str, layer: str) -> np.ndarray | pd.Categorical:
    if name in table.var_names:
        require_key(layer, table.layers, where=f"sdata.tables[{Keys.STACK_TABLE!r}].layers")
        column = table.layers[layer][:, [table.var_names.get_loc(name)]]
        return dense_rows(column, np.ones(table.n_obs, bool)).ravel()
    require_key(name, table.obs, where="the genes and the columns of obs of the stack table")
    return table.obs[name].to_numpy()


def write_geojson(
    sdata: SpatialData, key: str, path: str | Path, *, section: str | None = None, overwrite: bool = False
) -> None:
    """Write polygons or circles of a section as GeoJSON for QuPath, in pixels of its full-resolution image.

    Parameters
    ----------
    sdata
        Stack.
    key
        Shapes. The columns ``class``, ``name`` and ``objectType`` become class, name and type of the objects of QuPath,
        columns of numbers their measurements (1 and 0 for True and False). Other columns are left out, as are empty
        polygons.
    path
        File to write (``.geojson`` or ``.json``).
    section
        Section of the shapes; by default the one section to which they have a transformation.
    overwrite
        Replace an existing file.

    Returns
    -------
    ``None``. Writes the file. :func:`~spatial_impute.pp.add_cells` reads it.

    Raises
    ------
    KeyError
        If the shapes do not exist or belong to no section.
    FileExistsError
        If there is a file at `path` and `overwrite` is False.
    FileNotFoundError
        If the folder of `path` does not exist.
    ValueError
        If the shapes belong to several sections and `section` is not given, or `path` has another ending.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack(extent=1400.0)
    >>> si.pp.segment_tissue(sdata, sections="s1")
    >>> si.tl.write_geojson(sdata, "s1_tissue_outline", "s1.geojson")
    >>> si.pp.add_cells(sdata, "s1", "s1.geojson", key_added="s1_again")
    """
    record = load_record(sdata)
    path = file_to_write(path, ends=(".geojson", ".json"), overwrite=overwrite)
    require_key(key, sdata.shapes, where="sdata.shapes")
    shapes = sdata.shapes[key]
    section = section_of(shapes, key, record, section)
    image = record[section].image
    require_key(image, sdata.images, where="sdata.images", then="The file has pixels of the image of the section.")
    to_pixels = np.linalg.inv(element_affine(sdata.images[image], section))
    features = _features(shapes, to_pixels @ element_affine(shapes, section))
    with written_whole(path) as part:
        part.write_text(json.dumps({"type": "FeatureCollection", "features": features}), encoding="utf-8")
    logger.info("Wrote %d objects in pixels of %r to %s", len(features), image, path)


def _features(shapes: GeoDataFrame, to_pixels: np.ndarray) -> list[dict[str, Any]]:
    shapes = shapes[~(shapes.geometry.is_empty | shapes.geometry.isna())]
    geometry = shapes.geometry.to_numpy()
    columns = pd.DataFrame(shapes.drop(columns=shapes.geometry.name))
    if are_circles(shapes):
        geometry = shapely.buffer(geometry, columns.pop("radius").to_numpy(float), quad_segs=_CORNERS)
    geometry = shapely.transform(geometry, lambda xy: apply_affine(xy, to_pixels).round(_DECIMALS))
    rows = columns.to_dict("records") if columns.columns.size else [{}] * len(columns)
    return [
        {"type": "Feature", "id": str(name), "geometry": shapely.geometry.mapping(one), "properties": _properties(row)}
        for name, one, row in zip(shapes.index, geometry, rows, strict=True)
    ]


def _properties(row: dict[Any, Any]) -> dict[str, Any]:
    """Properties as QuPath names them."""
    known = {key: "" if pd.isna(row.get(key, "")) else str(row.get(key, "")) for key in ("class", "name", "objectType")}
    numbers = {
        str(key): float(value)
        for key, value in row.items()
        if key not in known and isinstance(value, int | float | np.number) and np.isfinite(value)
    }
    found: dict[str, Any] = {"objectType": known["objectType"] or "annotation"}
    found |= {"classification": {"name": known["class"]}} if known["class"] else {}
    found |= {"name": known["name"]} if known["name"] else {}
    return found | ({"measurements": numbers} if numbers else {})


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
        Replace an existing file when the new one is complete. Never name the file that an image of `sdata` is read
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
        If `path` has another ending, JPEG does not suit the pixels, or `pixel_size` does not fit.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack(extent=1400.0)
    >>> si.tl.register_stack(sdata, show_progress_bar=False)
    >>> si.tl.write_ome_tiff(sdata, "s0_image", "s0.ome.tif")
    """
    record = load_record(sdata)
    path = file_to_write(path, ends=(".ome.tif", ".ome.tiff"), overwrite=overwrite)
    require_one_of(canvas, {"reference", "section"}, name="canvas")
    if pixel_size is not None:
        pixel_size = require_positive(pixel_size, name="pixel_size", unit="um")
    raise_or_warn(registration_problems(sdata, record))
    require_key(key, [*sdata.images, *sdata.labels], where="the images and labels of sdata")
    raise_or_warn(map_problems(sdata, key))
    section = section_of(sdata[key], key, record, section)
    transform = load_transform(sdata, record, section)
    is_slide = key == record[section].image
    element, channels = (sdata[key], ()) if key in sdata.labels else _colors_or_channels(sdata[key], is_slide=is_slide)
    levels = image_levels(element, element_affine(sdata[key], section))
    reference = None
    if canvas == "reference":
        then = "The file gets its frame from the reference. Without it, pass `canvas='section'`."
        require_key(record.reference, record.names, where="the stack's sections", then=then)
        reference = section_levels(sdata, record[record.reference])[0]
    grid = _grid(levels[0], transform, reference, pixel_size)
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
    channels: tuple[str, ...]  # Names of channels that are written one by one
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
                found = f"{data.min()} to {data.max()}"
                msg = f"OME-TIFF holds whole numbers up to {limits.max}, found {found}. Number the labels anew."
                raise ValueError(msg)
        return data.astype(self.dtype, copy=False)
