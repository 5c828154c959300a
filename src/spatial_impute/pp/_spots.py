"""Spots of a section: virtual ones laid on tissue, and positions of measured ones, read and compared with the scan."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import geopandas as gpd
import numpy as np
import pandas as pd
from skimage.transform import resize
from spatialdata.models import ShapesModel
from spatialdata.transformations import Identity

from spatial_impute._geometry import apply_affine, grid_in_box, lattice_of, lies_on, linear_scale
from spatial_impute._graph import typical_spacing
from spatial_impute._image.levels import best_level, read_thumbnail
from spatial_impute._image.tissue import tissue_mask
from spatial_impute._io.files import how_to_unpack, read_text
from spatial_impute._keys import Keys
from spatial_impute._settings import log_added
from spatial_impute._stack.elements import element_affine, spot_geometry, to_frames
from spatial_impute._stack.record import load_record, resolve_sections, save_record
from spatial_impute._stack.state import raise_or_warn, tissue_problems
from spatial_impute._stack.table import build_stack_table
from spatial_impute._validation import require_key, require_one_of, require_positive

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from spatialdata import SpatialData

    from spatial_impute._image.levels import Level
    from spatial_impute._stack.record import StackRecord

_POINTS_AT_A_TIME = 2**18  # lattice points, each sampled 48 times: some 400 MB
_POSITIONS = ("tissue_positions.parquet", "tissue_positions.csv", "tissue_positions_list.csv")
COLUMNS = ["barcode", Keys.IN_TISSUE, "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
_SAME_PIXEL = 0.5  # versions round positions differently
AS_IT_IS = "as it is"
# Rows of the matrix on (x, y), then the shift in widths and heights of the image that is reached.
_TURNS = {
    AS_IT_IS: ((1, 0), (0, 1), (0, 0)),
    "mirrored left to right": ((-1, 0), (0, 1), (1, 0)),
    "mirrored top to bottom": ((1, 0), (0, -1), (0, 1)),
    "turned by 180 degrees": ((-1, 0), (0, -1), (1, 1)),
    "with x and y exchanged": ((0, 1), (1, 0), (0, 0)),
    "turned by 90 degrees clockwise": ((0, -1), (1, 0), (1, 0)),
    "turned by 90 degrees counterclockwise": ((0, 1), (-1, 0), (0, 1)),
    "with x and y exchanged, then turned by 180 degrees": ((0, -1), (-1, 0), (1, 1)),
}
_FINEST, _MOST_PX = 16.0, 512  # um per pixel and px along the longer side of the mask: spots are far larger
_MOST_DECODED = 2**30  # px; more of them take minutes to decode
_FEWEST = 10  # spots; fewer lie anywhere by chance
_SMALL = 96  # px along the longer side of two pictures that are compared


def tile_spots(
    sdata: SpatialData,
    *,
    sections: str | Sequence[str] | None = None,
    spot_diameter: float | None = None,
    spacing: float | None = None,
    layout: str | None = None,
    min_tissue_fraction: float = 0.5,
) -> None:
    """Lay a grid of virtual spots over the tissue of sections without spots.

    Parameters
    ----------
    sdata
        Stack with tissue masks from :func:`~spatial_impute.pp.segment_tissue`.
    sections
        Names of the sections; by default all without spots.
    spot_diameter
        Diameter of a spot in um. By default that of the first measured section.
    spacing
        Centre-to-centre distance of the spots in um. By default that of the first measured section.
    layout
        ``"hex"`` (Visium) or ``"square"`` (ST arrays, Visium HD). By default that of the first measured section.
    min_tissue_fraction
        Share of a spot's area that must be tissue.

    Returns
    -------
    ``None``. Writes:

    `sdata.shapes['{section}_spots']`
        Circles in um.
    `sdata.tables['stack']`
        Built again with rows for the new spots. Compute expression, features and graphs after this.

    Raises
    ------
    KeyError
        If a section has no tissue labels.
    ValueError
        If a section already has spots, or sizes are neither given nor known from a measured section.

    Examples
    --------
    >>> import numpy as np
    >>> import spatial_impute as si
    >>> image = np.full((400, 400, 3), 240, dtype=np.uint8)
    >>> image[100:300, 100:300] = [180, 90, 150]
    >>> sdata = si.pp.assemble_stack({"s0": image}, mpp=5.0, z=[0.0])
    >>> si.pp.segment_tissue(sdata)
    >>> si.pp.tile_spots(sdata, spot_diameter=55, spacing=100)
    >>> sdata.tables["stack"].n_obs > 80
    True
    """
    record = load_record(sdata)
    if layout is not None:
        require_one_of(layout, {"hex", "square"}, name="layout")
    if not isinstance(min_tissue_fraction, int | float | np.number) or not 0 <= min_tissue_fraction <= 1:
        msg = f"`min_tissue_fraction` must lie between 0 and 1, found {min_tissue_fraction!r}."
        raise ValueError(msg)
    wanted = _sections_without_spots(sdata, record, sections)
    if not wanted:
        return
    raise_or_warn(tissue_problems(sdata, record))
    lattice = _lattice(sdata, record, spot_diameter, spacing, layout)
    centers = {name: _grid_on_tissue(sdata, name, *lattice, min_fraction=min_tissue_fraction) for name in wanted}
    for name, points in centers.items():
        # Ids are strings like barcodes: one table cannot join both strings and numbers.
        frame = gpd.GeoDataFrame(
            {"radius": np.full(len(points), lattice[0])},
            geometry=gpd.points_from_xy(*points.T),
            index=[str(i) for i in range(len(points))],
        )
        sdata.shapes[Keys.spots(name)] = ShapesModel.parse(frame, transformations=to_frames(record, name, Identity()))
        log_added(f"shapes[{Keys.spots(name)!r}]")
        record = record.with_section(replace(record[name], spots=Keys.spots(name)))
    save_record(sdata, record)
    build_stack_table(sdata, record)


def _sections_without_spots(sdata: SpatialData, record: StackRecord, sections: str | Sequence[str] | None) -> list[str]:
    """Names of the wanted sections, all segmented and without spots."""
    bare = [s.name for s in record.sections if s.spots is None or (s.counts is None and s.spots not in sdata.shapes)]
    wanted = bare if sections is None else resolve_sections(record, sections)
    for name in wanted:
        if name not in bare:
            msg = (
                f"Section {name!r} has spots already (`sdata.shapes[{record[name].spots!r}]`). To lay other spots on a "
                f"section that was not measured, delete them first: `del sdata.shapes[{record[name].spots!r}]`."
            )
            raise ValueError(msg)
        then = "Run `si.pp.segment_tissue(sdata)` first."
        require_key(Keys.tissue(name), sdata.labels, where="sdata.labels", then=then)
    return wanted


def _lattice(
    sdata: SpatialData, record: StackRecord, diameter: float | None, spacing: float | None, layout: str | None
) -> tuple[float, float, str]:
    """Radius and spacing (um), and layout; what is None is that of the first measured section."""
    measured = [section for section in record.sections if section.counts is not None]
    if not measured and (diameter is None or spacing is None):
        msg = "Give `spot_diameter` and `spacing` (um): the stack has no measured section with known sizes."
        raise ValueError(msg)
    if measured and None in (diameter, spacing, layout):
        centers, radius, _ = spot_geometry(sdata, measured[0])
        diameter = 2 * float(np.median(radius)) if diameter is None else diameter
        found = lattice_of(centers)
        layout = found[1] if layout is None and found is not None else layout
        if spacing is None:
            if len(centers) < 2:
                msg = f"Give `spacing` (um): section {measured[0].name!r} has only one spot."
                raise ValueError(msg)
            spacing = typical_spacing(centers, np.zeros(len(centers))) if found is None else found[0]
    spacing = require_positive(spacing, name="spacing", unit="um")
    return require_positive(diameter, name="spot_diameter", unit="um") / 2, spacing, layout or "hex"


def _grid_on_tissue(
    sdata: SpatialData, name: str, radius: float, spacing: float, layout: str, *, min_fraction: float
) -> np.ndarray:
    """Lattice points in um whose discs lie on the tissue of a section by at least `min_fraction` of their area."""
    labels = sdata.labels[Keys.tissue(name)]
    mask, to_um = np.asarray(labels.data) > 0, element_affine(labels, name)
    rows, columns = np.nonzero(mask)
    corners = apply_affine(np.column_stack([columns, rows]) + 0.5, to_um)
    grid = grid_in_box(*corners.min(axis=0), *corners.max(axis=0), spacing=spacing, layout=layout)
    # Rings of equal area, sampled evenly: the mean over the points estimates the share of the disc on tissue.
    rings = np.sqrt((np.arange(4) + 0.5) / 4)
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    disc = radius * np.array([(r * np.cos(a), r * np.sin(a)) for r in rings for a in angles])
    from_um = np.linalg.inv(to_um)
    kept = [np.empty((0, 2))]
    for start in range(0, len(grid), _POINTS_AT_A_TIME):
        points = grid[start : start + _POINTS_AT_A_TIME]
        covered = lies_on(mask, apply_affine((points[:, None] + disc).reshape(-1, 2), from_um))
        kept.append(points[covered.reshape(len(points), -1).mean(axis=1) >= min_fraction])
    found = np.concatenate(kept)
    if not len(found):
        msg = (
            f"No spot of diameter {2 * radius:g} um lies on the tissue of section {name!r} "
            f"(at least {min_fraction:.0%} of its area). Lower `min_tissue_fraction` or `spot_diameter`."
        )
        raise ValueError(msg)
    return found


def read_positions(folder: Path) -> pd.DataFrame:
    """Positions of the spots. Versions of Space Ranger name the file differently; several in one folder must agree."""
    paths = [folder / "spatial" / name for name in _POSITIONS if (folder / "spatial" / name).exists()]
    if not paths:
        msg = (
            f"{folder / 'spatial'} has no positions of the spots: expected one of {list(_POSITIONS)}. Copy it from the "
            f"output of Space Ranger, or give the image alone and lay spots with `si.pp.tile_spots`.{how_to_unpack(folder)}"
        )
        raise FileNotFoundError(msg)
    found, *others = map(_read_positions_file, paths)
    for path, other in zip(paths[1:], others, strict=True):
        if (differ := _first_difference(found, other)) is not None:
            msg = (
                f"{paths[0]} and {path.name} beside it contradict each other: {differ}. They are of different samples "
                "or versions of Space Ranger; keep the one that belongs to the counts."
            )
            raise ValueError(msg)
    return found


def _first_difference(first: pd.DataFrame, second: pd.DataFrame) -> str | None:
    """First difference of two tables of positions, in words; None if they say the same."""
    only = first.index.symmetric_difference(second.index)
    if len(only):
        return f"{len(only)} barcodes are in one of them only, like {only[0]!r}"
    one, other = (table.loc[first.index, COLUMNS[1:]].astype(float) for table in (first, second))
    off = (one - other).abs() > _SAME_PIXEL
    if not off.any(axis=None):
        return None
    column = off.any().idxmax()
    name = off[column].idxmax()
    return f"{column!r} of {name!r} is {one.loc[name, column]:g} and {other.loc[name, column]:g}"


def _read_positions_file(path: Path) -> pd.DataFrame:
    table = pd.read_parquet(path) if path.suffix == ".parquet" else _read_positions_csv(path)
    if table.index.name == "barcode":
        table = table.reset_index()
    missing = [column for column in COLUMNS if column not in table]
    if missing:
        msg = (
            f"{path} has no columns {missing}; found {[str(column) for column in table.columns]}. Name the columns as "
            f"Space Ranger does: {COLUMNS}."
        )
        raise ValueError(msg)
    return checked_positions(table.set_index(table["barcode"].astype(str)), str(path))


def checked_positions(table: pd.DataFrame, where: str) -> pd.DataFrame:
    """Positions as numbers, and flags of the tissue as bool; else a ``ValueError`` that names the column."""
    table = table.assign(**{column: checked_column(table[column], where) for column in COLUMNS[1:]})
    if not table.index.is_unique:
        msg = f"{where}: the barcode {table.index[table.index.duplicated()][0]!r} stands twice; keep one of its rows."
        raise ValueError(msg)
    return table


def checked_column(values: pd.Series, where: str) -> pd.Series:
    """Numbers of a column of positions, or flags of the tissue as bool; else a ``ValueError`` that names the column."""
    is_flag = values.name == Keys.IN_TISSUE
    found = values
    if is_flag and values.dtype.kind not in "buif":
        words = {"true": 1, "false": 0}
        found = values.astype(str).str.strip().str.lower().map(lambda v: words.get(v, v))
    numbers = pd.to_numeric(found, errors="coerce").astype(float)
    bad = ~numbers.isin([0, 1]) if is_flag else ~np.isfinite(numbers)
    if bad.any():
        msg = (
            f"{where}: column {values.name!r} must hold {'0 or 1' if is_flag else 'finite numbers'}, found "
            f"{values[bad].iloc[0]!r} at {values.index[bad][0]!r}. Expected the columns {COLUMNS}."
        )
        raise ValueError(msg)
    return numbers.astype(bool) if is_flag else numbers


def _read_positions_csv(path: Path) -> pd.DataFrame:
    """Positions with the columns that the header names; Space Ranger 1 wrote no header."""
    text = read_text(path).lstrip()
    head = text.split("\n", 1)[0]
    separator = max(",;\t", key=head.count)
    # Where semicolons part the cells, a comma is the decimal point of many countries.
    options = {"sep": separator, "decimal": "," if separator == ";" else ".", "skipinitialspace": True}
    named = bool(set(COLUMNS) & {field.strip().strip('"') for field in head.split(separator)})
    table = pd.read_csv(io.StringIO(text), header=0 if named else None, **options)
    if not named and (table.shape[1] != len(COLUMNS) or table[0].dtype.kind in "iuf"):
        msg = (
            f"{path} has {table.shape[1]} columns and no header, the first like {table[0].tolist()[0]!r}; expected the "
            f"{len(COLUMNS)} columns {COLUMNS}."
        )
        raise ValueError(msg)
    return table.rename(columns=str.strip) if named else table.set_axis(COLUMNS, axis=1)


@dataclass(frozen=True)
class ShareOnTissue:
    """Share of spots on tissue as they are, and in the best of the other placements."""

    share: float
    best: str
    best_share: float

    @property
    def sentence(self) -> str | None:
        """Description of the fault, or None: most spots lie on tissue, and no other placement is much better."""
        better = self.best_share >= max(0.7, self.share + 0.2)
        if self.share >= 0.5 and not better:
            return None
        text = f"only {self.share:.0%} of the measured spots lie on tissue"
        if better:
            return f"{text}, but {self.best_share:.0%} would lie on it {self.best}"
        return f"{text}, and no turn or mirror places them much better"


def turned_points(points: np.ndarray, turn: str, size: tuple[float, float]) -> np.ndarray:
    """Points (n, 2) as x, y of a picture, after a turn of it that reaches a picture of this width and height."""
    x, y, shift = (np.array(row, float) for row in _TURNS[turn])
    return points @ np.stack([x, y], axis=1) + shift * size


def turned_picture(picture: np.ndarray, turn: str) -> np.ndarray:
    """Picture (y, x, ...) after a turn."""
    (from_x, _from_y), _, shift = _TURNS[turn]
    picture = picture if from_x else picture.swapaxes(0, 1)
    axes = [axis for axis, flip in zip((1, 0), shift, strict=True) if flip]
    return np.flip(picture, axes) if axes else picture


def place_spots(levels: Sequence[Level], centers: np.ndarray) -> ShareOnTissue | None:
    """Compare spots (um) with the tissue of their image, or with all of it if none is found; None for too few spots."""
    height, width = levels[0].shape
    resolution = max(_FINEST, levels[0].pixel_size * max(height, width) / _MOST_PX)
    if len(centers) < _FEWEST or np.prod(best_level(levels, resolution).shape, dtype=float) > _MOST_DECODED:
        return None
    rgb, to_um = read_thumbnail(levels, resolution)
    mask = tissue_mask(rgb, linear_scale(to_um))
    mask = mask if mask.any() else np.ones_like(mask)
    points, size = apply_affine(centers, np.linalg.inv(to_um)), (mask.shape[1], mask.shape[0])
    shares = {turn: float(lies_on(mask, turned_points(points, turn, size)).mean()) for turn in _TURNS}
    own = shares.pop(AS_IT_IS)
    best = max(shares, key=lambda turn: shares[turn])
    return ShareOnTissue(own, best, shares[best])


def compare_pictures(picture: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """Correlation of a grey picture (y, x) with another one, for each turn that gives it the same shape."""
    scale = min(1.0, _SMALL / max(wanted.shape))
    shape = [max(2, round(n * scale)) for n in wanted.shape]
    small = resize(wanted.astype(float), shape, anti_aliasing=True).ravel()
    found = {}
    for turn in _TURNS:
        turned = turned_picture(picture, turn)
        if abs(np.log(turned.shape[0] / turned.shape[1] * shape[1] / shape[0])) < 2.0 / min(shape):
            other = resize(turned.astype(float), shape, anti_aliasing=True).ravel()
            flat = min(small.std(), other.std()) < 1e-6
            found[turn] = 0.0 if flat else float(np.corrcoef(small, other)[0, 1])
    return found
