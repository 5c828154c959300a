"""Elements of a section moved to the common frame, and shapes carried to other sections, deformations included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
from spatialdata.models import Image2DModel, Labels2DModel, PointsModel, ShapesModel
from spatialdata.transformations import Identity, get_transformation, set_transformation

from spatial_impute._geometry import apply_affine, linear_scale, polygons_of
from spatial_impute._image.levels import best_level, image_levels
from spatial_impute._keys import Keys
from spatial_impute._registration.transform import output_grid, resampled
from spatial_impute._settings import log_added, logger
from spatial_impute._stack.elements import (
    are_circles,
    element_affine,
    element_frames,
    load_transform,
    plane_affine,
    require_element_key,
    require_registration,
    to_frames,
)
from spatial_impute._stack.record import load_record, resolve_sections
from spatial_impute._stack.state import map_problems, raise_or_warn, registration_problems
from spatial_impute._validation import require_key, require_positive

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData

    from spatial_impute._registration.transform import SectionTransform
    from spatial_impute._stack.record import StackRecord

_CHUNK = 2048  # px; also for pyramids, whose levels spatialdata would otherwise cut into pieces of 256 px
_SMALLEST_LEVEL = 256  # px along the longer side of the coarsest level of a pyramid


def warp_element(
    sdata: SpatialData,
    key: str,
    *,
    section: str | None = None,
    key_added: str | None = None,
    pixel_size: float | None = None,
    inplace: bool = True,
) -> Any:
    """Move an element of a section to the common frame, with the deformation if the section has one.

    :func:`register_stack` gives every element the affine part as a transformation. This function makes a copy with
    final coordinates: of annotations, cells, transcripts, images and label masks.

    Parameters
    ----------
    sdata
        Stack registered by :func:`register_stack`.
    key
        Points, shapes, image or labels.
    section
        Section of the element; by default the one section to which it has a transformation.
    key_added
        Name of the new element; ``"{key}_aligned"`` by default.
    pixel_size
        Pixel size of a warped image or labels in um; by default that of the element.
    inplace
        Write to `sdata`, or return the element and write nothing.

    Returns
    -------
    ``None``, or the new element with ``inplace=False``. Its only coordinate system is that of the registration
    (``"aligned"``). Points and shapes have their coordinates in it (um):

    points
        Moved lazily; other columns do not change.
    circles
        Moved; the radius follows the local change of area.
    polygons
        Moved vertex by vertex. Long edges get more vertices to follow the deformation; invalid polygons are repaired.
    images, labels
        Resampled from the next finer resolution, chunk by chunk when computed: bilinear for images, nearest for labels.
        Pixels outside the image are 0, and white for the H&E image of the section.

    Raises
    ------
    KeyError
        If the stack is not registered, or if the element does not exist or belongs to no registered section.
    ValueError
        If the element belongs to several sections and `section` is not given, or if `pixel_size` does not fit.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack(extent=1400.0)
    >>> si.tl.register_stack(sdata, show_progress_bar=False)
    >>> si.tl.warp_element(sdata, "s0_spots")
    >>> "s0_spots_aligned" in sdata.shapes
    True
    """
    record = load_record(sdata)
    target = require_registration(record)["coordinate_system"]
    raise_or_warn(registration_problems(sdata, record))
    names = [name for _, name, _ in sdata.gen_spatial_elements()]
    require_key(key, names, where="the points, shapes, images and labels of sdata")
    raise_or_warn(map_problems(sdata, key))
    element = sdata[key]
    section = section_of(element, key, record, section)
    warp = Warp(element_affine(element, section), load_transform(sdata, record, section), target)
    key_added = Keys.aligned(key) if key_added is None else key_added
    if key_added == key:
        msg = f"`key_added` must differ from {key!r}: the element itself is never overwritten."
        raise ValueError(msg)
    kind = next(kind for kind in ("points", "shapes", "labels", "images") if key in getattr(sdata, kind))
    container = getattr(sdata, kind)
    if inplace:  # an earlier result lies in the common frame alone
        ours = [name for name, old in container.items() if set(get_transformation(old, get_all=True)) == {target}]
        require_element_key(sdata, key_added, kind=kind, ours=ours)
    new = _warped(element, warp, pixel_size, kind=kind, white=key == record[section].image)
    if not inplace:
        return new
    if key_added in container:  # from an earlier registration
        del container[key_added]
    container[key_added] = new
    log_added(f"{kind}[{key_added!r}]")
    return None


def section_of(element: Any, key: str, record: StackRecord, wanted: str | None) -> str:
    """Section of the element `key`: the `wanted` one, or the only one to which it has a transformation."""
    own = element_frames(element)
    if wanted is not None:
        then = "Set a transformation of the element to the frame of the section (um)."
        require_key(wanted, own, where=f"the coordinate systems of {key!r}", then=then)
        return wanted
    found = [name for name in record.names if name in own]
    if not found:
        msg = f"{key!r} has no transformation to a section of the stack {record.names}. Set one, in um."
        raise KeyError(msg)
    if len(found) > 1:
        msg = f"{key!r} belongs to several sections; give `section`, one of {found}."
        raise ValueError(msg)
    return found[0]


def _warped(element: Any, warp: Warp, pixel_size: float | None, *, kind: str, white: bool) -> Any:
    if kind in ("labels", "images"):
        return warp.raster(element, pixel_size, white=white)
    if pixel_size is not None:
        msg = f"`pixel_size` is for images and labels; the element holds {kind}."
        raise ValueError(msg)
    return warp.points(element) if kind == "points" else warp.shapes(element)


@dataclass(frozen=True)
class Warp:
    """Transformation of an element to the common frame."""

    to_section: np.ndarray  # (3, 3) affine from the element to its section, um
    transform: SectionTransform
    target: str  # Common coordinate system

    def __call__(self, xy: np.ndarray) -> np.ndarray:
        """(n, 2) coordinates of the element in the common frame."""
        return self.transform.points(apply_affine(xy, self.to_section))

    @property
    def grids(self) -> list[np.ndarray]:
        """Grids of the deformations on the way."""
        return [] if self.transform.grid is None else [self.transform.grid]

    def points(self, points: Any) -> Any:
        def move(frame: pd.DataFrame) -> pd.DataFrame:
            xy = self(frame[["x", "y"]].to_numpy(float))
            return frame.assign(x=xy[:, 0], y=xy[:, 1])

        attrs = points.attrs.get("spatialdata_attrs", {})
        moved = points.map_partitions(move, meta=move(points._meta))
        moved.attrs.pop("transform", None)  # inherited from the original, which keeps its own
        known = {key: attrs[key] for key in ("feature_key", "instance_key") if attrs.get(key) is not None}
        return PointsModel.parse(moved, transformations={self.target: Identity()}, **known)

    def shapes(self, shapes: GeoDataFrame) -> GeoDataFrame:
        moved = shapes.copy()
        moved.attrs = {}
        if are_circles(shapes):
            centers = np.column_stack([shapes.geometry.x, shapes.geometry.y])
            radius = shapes["radius"].to_numpy(float)
            moved["geometry"] = shapely.points(self(centers))
            moved["radius"] = radius * self._local_scale(centers, radius)
        else:
            geometry = shapes.geometry.to_numpy()
            if self.grids:
                # Half a grid pixel: between two such vertices the displacement is linear.
                step = 0.5 * min(map(linear_scale, self.grids)) / linear_scale(self.transform.matrix @ self.to_section)
                geometry = shapely.segmentize(geometry, step)
            geometry = shapely.transform(geometry, self)
            invalid = ~shapely.is_valid(geometry)
            geometry[invalid] = [polygons_of(g) for g in geometry[invalid]]
            moved["geometry"] = geometry
        return ShapesModel.parse(moved, transformations={self.target: Identity()})

    def _local_scale(self, centers: np.ndarray, radius: np.ndarray) -> np.ndarray:
        """Square root of the change of area over each circle."""
        x, y = ([self(centers + s * radius[:, None] * axis) for s in (1, -1)] for axis in np.eye(2))
        dx, dy = ((ahead - behind) / (2 * radius[:, None]) for ahead, behind in (x, y))
        return np.sqrt(np.abs(dx[:, 0] * dy[:, 1] - dx[:, 1] * dy[:, 0]))

    def raster(self, element: Any, pixel_size: float | None, *, white: bool) -> Any:
        levels = image_levels(element, self.to_section)
        finest, scale = levels[0], linear_scale(self.transform.matrix)
        if pixel_size is None:
            pixel_size = finest.pixel_size * scale
        pixel_size = require_positive(pixel_size, name="pixel_size", unit="um")
        level = best_level(levels, pixel_size / scale)
        is_labels = "c" not in level.data.dims
        fill = level.white if white else 0
        grid = output_grid(finest.shape, finest.to_um, self.transform, pixel_size)
        data = resampled(level, self.transform, grid, nearest=is_labels, fill=fill, chunk=_CHUNK)
        kwargs: dict[str, Any] = {"transformations": {self.target: plane_affine(grid.matrix)}}
        if not is_labels:
            kwargs["c_coords"] = list(level.data.coords["c"].to_numpy())
        if hasattr(element, "children"):
            n_levels = max(0, int(np.log2(max(grid.shape) / _SMALLEST_LEVEL)))
            if n_levels:
                chunks = {"y": _CHUNK, "x": _CHUNK} | ({} if is_labels else {"c": data.shape[0]})
                kwargs |= {"scale_factors": [2] * n_levels, "chunks": chunks}
        model: Any = Labels2DModel if is_labels else Image2DModel  # `get_model` refuses pixels that were loaded
        return model.parse(data, dims=level.data.dims if is_labels else ("c", "y", "x"), **kwargs)


def transfer_shapes(
    sdata: SpatialData,
    key: str,
    *,
    section: str | None = None,
    sections: str | Sequence[str] | None = None,
    key_added: str | None = None,
) -> None:
    """Carry shapes of one section, such as annotations of a pathologist, to other sections, deformations included.

    A place keeps its x and y in the common frame. There, the tissues of two sections can be apart by the expected error
    of the registration (:func:`spatial_impute.metrics.registration_quality`).

    Parameters
    ----------
    sdata
        Stack registered by :func:`register_stack`.
    key
        Shapes: polygons or circles.
    section
        Section of the shapes; by default the one section to which they have a transformation.
    sections
        Sections to carry them to; by default all other registered ones.
    key_added
        Names of the new shapes with the word ``{section}`` in it; ``"{key}_on_{section}"`` by default.

    Returns
    -------
    ``None``. Writes for each section `sdata.shapes['{key}_on_{section}']`: the shapes in the frame of that section
    (um), with their columns and names. Long edges get more vertices to follow a deformation. With the default names,
    shapes of an earlier call are replaced. After a new registration, call this again: the shapes keep their old places.

    Raises
    ------
    KeyError
        If the stack is not registered, the shapes do not exist or belong to no section, or a section is not registered.
    ValueError
        If the shapes belong to several sections and `section` is not given, there is no other section, or a new name is
        taken.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack(extent=1400.0)
    >>> si.tl.register_stack(sdata, show_progress_bar=False)
    >>> si.pp.segment_tissue(sdata, sections="s1")
    >>> si.tl.transfer_shapes(sdata, "s1_tissue_outline")
    >>> sorted(name for name in sdata.shapes if "_on_" in name)
    ['s1_tissue_outline_on_s0', 's1_tissue_outline_on_s2']
    """
    record = load_record(sdata)
    rows = require_registration(record)["sections"]
    raise_or_warn(registration_problems(sdata, record))
    require_key(key, sdata.shapes, where="sdata.shapes")
    section = section_of(sdata.shapes[key], key, record, section)
    names = [name for name in resolve_sections(record, sections) if name in rows or sections is not None]
    wanted = [name for name in names if name != section]
    if not wanted:
        msg = f"{key!r} lies in {section!r}, and there is no other section to carry it to. Registered: {list(rows)}."
        raise ValueError(msg)
    pattern = Keys.carried(key, "{section}") if key_added is None else key_added
    if not isinstance(pattern, str) or "{section}" not in pattern:
        msg = f"`key_added` must contain the word {{section}}, one name for each section; found {pattern!r}."
        raise ValueError(msg)
    keys = {name: pattern.replace("{section}", name) for name in wanted}
    for new in keys.values():
        ours = [new] if key_added is None else []
        require_element_key(sdata, new, kind="shapes", ours=ours)
    to_section, transform = element_affine(sdata.shapes[key], section), load_transform(sdata, record, section)
    found = {}
    for name in wanted:
        back = load_transform(sdata, record, name)
        found[name] = _Carry(to_section, transform, name, back).shapes(sdata.shapes[key])
    for name, shapes in found.items():
        for system, transformation in to_frames(record, name, Identity()).items():
            set_transformation(shapes, transformation, to_coordinate_system=system)
        sdata.shapes[keys[name]] = shapes
        log_added(f"shapes[{keys[name]!r}]")
    errors = {name: rows[name].get("error_um") for name in [*wanted, section]}
    logger.info("Expected errors of the places, um: %s", {n: e if e is None else round(e) for n, e in errors.items()})


@dataclass(frozen=True)
class _Carry(Warp):
    """From an element of one section to the frame of another one."""

    back: SectionTransform  # Of the other section

    def __call__(self, xy: np.ndarray) -> np.ndarray:
        """(n, 2) coordinates of the element in the frame of the other section, um."""
        return self.back.inverse(super().__call__(xy))

    @property
    def grids(self) -> list[np.ndarray]:
        """Grids of both deformations."""
        return [transform.grid for transform in (self.transform, self.back) if transform.grid is not None]
