"""Folders of Space Ranger (Visium, CytAssist, Visium HD), with or without the full-resolution image."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spatial_impute._image.reading import open_image
from spatial_impute._settings import logger
from spatial_impute._stack import image_element, section_object
from spatial_impute._validation import require_key

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData
    from spatialdata import SpatialData

SCALEFACTORS = "scalefactors_json.json"
_POSITIONS = ("tissue_positions.parquet", "tissue_positions.csv", "tissue_positions_list.csv")
_COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
_COUNTS = ("*filtered_feature_bc_matrix.h5", "*raw_feature_bc_matrix.h5")
_COUNT_FOLDERS = ("filtered_feature_bc_matrix", "raw_feature_bc_matrix")
_IMAGES = (("hires", "tissue_hires_image.png"), ("lowres", "tissue_lowres_image.png"))
# Spots of one row of a Visium array are 100 um apart, two steps of array_col; rows are 100 * sin(60 degrees) apart.
_COLUMN_STEP, _ROW_STEP = 50.0, 100.0 * np.sqrt(3) / 2


def find_spaceranger(path: Path, bin_size: float | None) -> Path | None:
    """Folder that holds counts and ``spatial``: the given one, its ``outs``, or one of its ``binned_outputs``.

    `bin_size` is the edge of the Visium HD bins in um; 8 by default, else the smallest. None without files of Space
    Ranger; a ``KeyError`` without bins of that size.
    """
    for folder in (path, path / "outs"):
        if (folder / "spatial" / SCALEFACTORS).exists():
            return folder
        bins = {float(f.name[7:-2]): f for f in (folder / "binned_outputs").glob("square_*um") if f.is_dir()}
        if bins:
            wanted = float(bin_size) if bin_size is not None else (8.0 if 8.0 in bins else min(bins))
            require_key(f"{wanted:g}", [f"{size:g}" for size in bins], where=f"bin sizes (um) of {path}")
            return bins[wanted]
    return None


def read_spaceranger(folder: Path, *, fullres_image: str | Path | None = None) -> tuple[SpatialData, float, str]:
    """Read the sample in a folder: SpatialData in pixels of the full resolution, um per pixel, and the source of these.

    All elements lie in ``"global"``. The source is ``"metadata"`` (Visium HD) or ``"spot pitch"``. Without
    `fullres_image`, the scan that Space Ranger was given, the ``hires`` or ``lowres`` image is read.
    """
    factors = json.loads((folder / "spatial" / SCALEFACTORS).read_text())
    positions = _read_positions(folder)
    counts = _read_counts(folder)
    shared = counts.obs_names.intersection(positions.index)
    if not len(shared):
        msg = (
            f"{folder}: counts and positions share no barcode ({counts.obs_names[0]!r} and {positions.index[0]!r}); "
            "they belong to different samples or bin sizes."
        )
        raise ValueError(msg)
    positions = positions[positions["in_tissue"].astype(bool) | positions.index.isin(shared)]
    if "microns_per_pixel" in factors:
        mpp, source = float(factors["microns_per_pixel"]), "metadata"
        radius = float(factors["bin_size_um"]) / mpp / 2
    else:
        mpp, source = _mpp_of_array(folder, positions), "spot pitch"
        radius = float(factors["spot_diameter_fullres"]) / 2
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Variable names are not unique")  # they are numbered later
        sdata = section_object(
            "sample",
            _read_image(folder, factors, fullres_image, mpp),
            centers=positions[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(float),
            radius=radius,
            ids=list(positions.index),
            table=counts[shared].copy(),
        )
    return sdata, mpp, source


def _read_positions(folder: Path) -> pd.DataFrame:
    for name in _POSITIONS:
        path = folder / "spatial" / name
        if path.exists():
            break
    else:
        msg = (
            f"{folder / 'spatial'} has no positions of the spots: expected one of {list(_POSITIONS)}. Copy it from the "
            "output of Space Ranger, or give the image alone and lay spots with `si.pp.tile_spots`."
        )
        raise FileNotFoundError(msg)
    table = pd.read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
    if table.index.name == "barcode":
        table = table.reset_index()
    missing = [column for column in _COLUMNS if column not in table]
    if missing:
        msg = (
            f"{path} has no columns {missing}; found {[str(column) for column in table.columns]}. Name the columns as Space "
            f"Ranger does: {_COLUMNS}."
        )
        raise ValueError(msg)
    return table.set_index(table["barcode"].astype(str))


def _read_csv(path: Path) -> pd.DataFrame:
    """Positions with the columns that the header names; Space Ranger 1 wrote no header."""
    with path.open(encoding="utf-8-sig") as file:
        first = file.readline()
    if set(_COLUMNS) & {field.strip().strip('"') for field in first.split(",")}:
        return pd.read_csv(path, encoding="utf-8-sig", skipinitialspace=True)
    table = pd.read_csv(path, encoding="utf-8-sig", header=None)
    if table.shape[1] != len(_COLUMNS):
        msg = f"{path} has {table.shape[1]} columns and no header; expected the {len(_COLUMNS)} columns {_COLUMNS}."
        raise ValueError(msg)
    return table.set_axis(_COLUMNS, axis=1)


def _read_counts(folder: Path) -> AnnData:
    import scanpy as sc

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of names that are not unique: they are numbered later
        for pattern in _COUNTS:
            for path in sorted(folder.glob(pattern)):
                return sc.read_10x_h5(path)
        for name in _COUNT_FOLDERS:
            if (folder / name).is_dir():
                return sc.read_10x_mtx(folder / name, make_unique=False)
    msg = (
        f"{folder} has no counts: expected 'filtered_feature_bc_matrix.h5' or the folder 'filtered_feature_bc_matrix'. "
        "Copy it from the output of Space Ranger, or give the image alone for an unmeasured section."
    )
    raise FileNotFoundError(msg)


def _mpp_of_array(folder: Path, positions: pd.DataFrame) -> float:
    """Micrometres per pixel from the known lattice of the array, by least squares over all spots."""
    place = positions[["array_col", "array_row"]].to_numpy(float) * [_COLUMN_STEP, _ROW_STEP]
    pixels = positions[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(float)
    place, pixels = place - place.mean(axis=0), pixels - pixels.mean(axis=0)
    if len(place) < 3 or np.linalg.matrix_rank(place) < 2:
        msg = (
            f"{folder}: {len(place)} spots in one line give no pixel size; pass `mpp=` (um per full-resolution pixel)."
        )
        raise ValueError(msg)
    matrix = np.linalg.lstsq(place, pixels, rcond=None)[0]
    return float(1 / np.sqrt(abs(np.linalg.det(matrix))))


def _read_image(folder: Path, factors: dict, fullres_image: str | Path | None, mpp: float) -> Any:
    """Image element in full-resolution pixels."""
    if fullres_image is not None:
        return image_element(open_image(fullres_image).levels, "global", 1.0)
    for kind, name in _IMAGES:
        path = folder / "spatial" / name
        if path.exists() and f"tissue_{kind}_scalef" in factors:
            pixel = 1 / float(factors[f"tissue_{kind}_scalef"])
            logger.warning(
                "%s: no full-resolution image, using the %s image with %.3g um per pixel; give the scan with "
                "`fullres_image=`",
                folder,
                kind,
                pixel * mpp,
            )
            return image_element(open_image(path).levels, "global", pixel)
    names = [name for _, name in _IMAGES]
    msg = (
        f"{folder / 'spatial'} has no image: expected one of {names}. Copy it from the output of Space Ranger, or give "
        "the scan with `fullres_image=`."
    )
    raise FileNotFoundError(msg)
