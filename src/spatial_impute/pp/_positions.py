"""Positions of spots as Space Ranger writes them (``tissue_positions``)."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from spatial_impute._io.files import read_text

if TYPE_CHECKING:
    from pathlib import Path

_POSITIONS = ("tissue_positions.parquet", "tissue_positions.csv", "tissue_positions_list.csv")
COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
_SAME_PIXEL = 0.5  # versions round positions differently


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
