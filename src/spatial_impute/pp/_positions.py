"""Positions of spots as Space Ranger writes them, and the eight ways in which they can lie on a scan."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from skimage.transform import resize

from spatial_impute._geometry import apply_affine, lies_on, linear_scale
from spatial_impute._image.levels import best_level, read_thumbnail
from spatial_impute._image.tissue import tissue_mask
from spatial_impute._io.files import read_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from spatial_impute._image.levels import Level

_POSITIONS = ("tissue_positions.parquet", "tissue_positions.csv", "tissue_positions_list.csv")
COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
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


def read_positions(folder: Path) -> pd.DataFrame:
    """Positions of the spots. Versions of Space Ranger name the file differently; several in one folder must agree."""
    paths = [folder / "spatial" / name for name in _POSITIONS if (folder / "spatial" / name).exists()]
    if not paths:
        msg = (
            f"{folder / 'spatial'} has no positions of the spots: expected one of {list(_POSITIONS)}. Copy it from the "
            "output of Space Ranger, or give the image alone and lay spots with `si.pp.tile_spots`."
        )
        raise FileNotFoundError(msg)
    found, *others = map(_read_file, paths)
    for path, other in zip(paths[1:], others, strict=True):
        if (differ := _difference(found, other)) is not None:
            msg = (
                f"{paths[0]} and {path.name} beside it contradict each other: {differ}. They are of different samples "
                "or versions of Space Ranger; keep the one that belongs to the counts."
            )
            raise ValueError(msg)
    return found


def _difference(first: pd.DataFrame, second: pd.DataFrame) -> str | None:
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


def _read_file(path: Path) -> pd.DataFrame:
    table = pd.read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
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
    table = table.copy()
    words = {"true": 1, "false": 0}
    for column in COLUMNS[1:]:
        values = table[column]
        if column == "in_tissue" and values.dtype.kind not in "buif":
            values = values.astype(str).str.strip().str.lower().map(lambda v: words.get(v, v))
        numbers = pd.to_numeric(values, errors="coerce").astype(float)
        bad = ~np.isfinite(numbers) if column != "in_tissue" else ~numbers.isin([0, 1])
        if bad.any():
            msg = (
                f"{where}: column {column!r} must hold {'0 or 1' if column == 'in_tissue' else 'finite numbers'}, "
                f"found {table[column][bad].iloc[0]!r} at {table.index[bad][0]!r}. Expected the columns {COLUMNS}."
            )
            raise ValueError(msg)
        table[column] = numbers.astype(bool) if column == "in_tissue" else numbers
    if not table.index.is_unique:
        msg = f"{where}: the barcode {table.index[table.index.duplicated()][0]!r} stands twice; keep one of its rows."
        raise ValueError(msg)
    return table


def _read_csv(path: Path) -> pd.DataFrame:
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
class Placement:
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


def place_spots(levels: Sequence[Level], centers: np.ndarray) -> Placement | None:
    """Compare spots (um) with the tissue of their own image, or with all of it if none is seen; None for too few spots."""
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
    return Placement(own, best, shares[best])


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
