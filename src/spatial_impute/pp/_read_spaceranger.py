"""Output of Space Ranger (Visium, CytAssist, Visium HD): its folder, or what ``scanpy.read_visium`` makes of it."""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import io, sparse

from spatial_impute._geometry import lattice_of, linear_scale, scaling, xy_of
from spatial_impute._image.levels import SAME_SIZE, image_levels, read_thumbnail
from spatial_impute._image.reading import ImageFile, open_image
from spatial_impute._io.files import how_to_unpack, read_text
from spatial_impute._keys import Keys
from spatial_impute._settings import logger
from spatial_impute._stack.elements import element_affine, free_names, image_element, section_object
from spatial_impute._validation import require_key, require_positive
from spatial_impute.pp._spots import AS_IT_IS, COLUMNS, checked_positions, compare_pictures, read_positions

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from spatialdata import SpatialData

SCALEFACTORS = "scalefactors_json.json"
_XY = ["pxl_col_in_fullres", "pxl_row_in_fullres"]
_COUNTS = ("*filtered_feature_bc_matrix.h5", "*raw_feature_bc_matrix.h5")
_COUNT_FOLDERS = ("filtered_feature_bc_matrix", "raw_feature_bc_matrix")
_CELLS = "segmented_outputs"
_IMAGES = (("hires", "tissue_hires_image.png"), ("lowres", "tissue_lowres_image.png"))
# Spots of one row of a Visium array are 100 um apart, two steps of array_col; rows are 100 * sin(60 degrees) apart.
_COLUMN_STEP, _ROW_STEP = 50.0, 100.0 * np.sqrt(3) / 2
_SPOT_SIZES = (25.0, 100.0)  # um; 55 by the maker, and Space Ranger writes up to 70
_LATTICE_TOLERANCE = 15.0  # um; positions are whole pixels of the scan, which may be coarse
_OTHER_PICTURE = 0.3  # correlation of the scan with the small image of the folder
_BETTER = 0.1  # by which a turned scan must fit better: tissue is never so symmetric


def find_spaceranger(path: Path, bin_size: float | None) -> Path | None:
    """Folder that holds counts and ``spatial``: the given one, its ``outs``, or one of its ``binned_outputs``.

    `bin_size` is the edge of the Visium HD bins in um; 8 by default, else the smallest. None without files of Space
    Ranger; a ``KeyError`` without bins of that size.
    """
    for folder in (path, path / "outs"):
        # Beside its bins, Visium HD writes a folder `spatial` without positions.
        bins = {float(f.name[7:-2]): f for f in (folder / "binned_outputs").glob("square_[0-9]*um") if f.is_dir()}
        if bins:
            wanted = float(bin_size) if bin_size is not None else (8.0 if 8.0 in bins else min(bins))
            require_key(f"{wanted:g}", [f"{size:g}" for size in bins], where=f"bin sizes (um) of {path}")
            return bins[wanted]
        for entry in (folder, folder / _CELLS):  # without bins, the cells alone
            if (entry / "spatial" / SCALEFACTORS).exists():
                return entry
    return None


@dataclass(frozen=True)
class _Sample:
    """Files of Space Ranger about a sample."""

    where: str  # For messages
    factors: dict[str, Any]
    positions: pd.DataFrame  # One row per spot under the name of its barcode, with the columns of Space Ranger
    counts: AnnData
    images: dict[str, Any]  # Small images by kind (``"hires"``, ``"lowres"``): paths, or arrays (y, x, c)


def read_spaceranger(
    folder: Path, *, fullres_image: str | Path | None = None, bin_size: float | None = None
) -> tuple[SpatialData, float, str]:
    """Read the sample in a folder: SpatialData in pixels of the full resolution, um per pixel, and the source of these.

    All elements lie in ``"global"``. The source is ``"metadata"`` (Visium HD) or ``"spot pitch"``. Without
    `fullres_image`, the scan that Space Ranger was given, the ``hires`` or ``lowres`` image is read. A `bin_size` other
    than that of the folder raises a ``ValueError``.
    """
    spatial = folder / "spatial"
    factors = json.loads(read_text(spatial / SCALEFACTORS))
    if not isinstance(factors, dict):
        msg = f"{spatial / SCALEFACTORS} must hold names with numbers, found {type(factors).__name__}. Copy it again."
        raise ValueError(msg)
    found = factors.get("bin_size_um")
    if bin_size is not None and (found is None or float(found) != float(bin_size)):
        holds = "spots, which have no `bin_size`" if found is None else f"bins of {float(found):g} um"
        msg = (
            f"{folder} holds {holds}, found `bin_size={bin_size:g}`. Leave `bin_size` out, or give the folder that has "
            "such bins in its 'binned_outputs'."
        )
        raise ValueError(msg)
    images = {kind: spatial / name for kind, name in _IMAGES if (spatial / name).exists()}
    if next(folder.glob("*cell_segmentations.geojson"), None) is not None:
        msg = (
            f"{folder} holds the cells that Space Ranger 4 segmented, which are polygons of many sizes. Give the "
            "folder with 'binned_outputs' beside it. To use the cells, read them with `spatialdata_io.visium_hd`, "
            "replace their polygons by `spatialdata.to_circles(...)`, and give the object with `shapes_key=`."
        )
        raise ValueError(msg)
    sample = _Sample(str(folder), factors, read_positions(folder), _read_counts(folder), images)
    return _sample_object(sample, fullres_image)


def read_legacy(
    table: AnnData, where: str, *, fullres_image: str | Path | None = None
) -> tuple[SpatialData, float, str]:
    """Read what ``scanpy.read_visium`` and ``squidpy.read.visium`` return; see :func:`read_spaceranger`.

    Raises a ``ValueError`` if the table does not hold the images and the lattice of one Visium sample.
    """
    # CELLxGENE writes a flag beside the library.
    given: Any = getattr(table.uns.get(Keys.SPATIAL), "items", list)()
    libraries = {str(key): part for key, part in given if isinstance(part, Mapping)}
    faults = [f"no obs[{column!r}]" for column in COLUMNS[2:4] if column not in table.obs]
    faults += ["no obsm['spatial']"] if Keys.SPATIAL not in table.obsm else []
    if len(libraries) != 1:
        faults += [f"the samples {sorted(libraries)} in uns['spatial']" if libraries else "no uns['spatial']"]
    if faults:
        msg = (
            f"{where} is an AnnData with {', '.join(faults)}. Expected what `scanpy.read_visium` returns for one sample: "
            "image, scale factors, positions and lattice. Give the folder of Space Ranger instead, or a SpatialData "
            "object: `spatialdata_io.from_legacy_anndata(adata)` makes one; split several samples first."
        )
        raise ValueError(msg)
    library = next(iter(libraries.values()))
    xy = xy_of(table.obsm[Keys.SPATIAL])
    positions = table.obs[COLUMNS[2:4]].assign(
        in_tissue=table.obs.get(Keys.IN_TISSUE, 1), pxl_row_in_fullres=xy[:, 1], pxl_col_in_fullres=xy[:, 0]
    )
    counts = table.to_memory() if table.isbacked else table.copy()
    del counts.uns[Keys.SPATIAL], counts.obsm[Keys.SPATIAL]
    free_names(counts, where)
    images = {kind: image for kind, image in library.get("images", {}).items() if image is not None}
    scan = images.get("fullres") if fullres_image is None else fullres_image
    positions, factors = checked_positions(positions, where), library.get("scalefactors", {})
    return _sample_object(_Sample(where, factors, positions, counts, images), scan)


def _sample_object(sample: _Sample, fullres_image: str | Path | np.ndarray | None) -> tuple[SpatialData, float, str]:
    """See :func:`read_spaceranger`."""
    factors = sample.factors
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Variable names are not unique")  # they get other names later
        positions, counts = _joined_spots(sample)
        if "microns_per_pixel" in factors:
            mpp, source = _factor(sample, "microns_per_pixel"), "metadata"
            edge = _factor(sample, "bin_size_um")
            radius = edge / mpp / 2
            _warn_of_other_bins(sample.where, positions, edge, mpp)
        else:
            mpp, source = _mpp_of_array(sample.where, positions), "spot pitch"
            radius = _factor(sample, "spot_diameter_fullres") / 2
            _require_spot_size(sample.where, 2 * radius * mpp)
        image, centers, ids = _read_image(sample, fullres_image, mpp), positions[_XY].to_numpy(float), positions.index
        sdata = section_object("sample", image, centers=centers, radius=radius, ids=list(ids), table=counts)
    return sdata, mpp, source


def _factor(sample: _Sample, name: str) -> float:
    """Scale factor of the sample; an error if it is missing or no positive number."""
    require_key(name, sample.factors, where=f"scale factors of {sample.where}")
    return require_positive(sample.factors[name], name=name)


def _joined_spots(sample: _Sample) -> tuple[pd.DataFrame, AnnData]:
    """Positions of the spots under tissue or with counts, and counts of the latter with their flag of the tissue."""
    positions, counts = sample.positions, sample.counts
    if not counts.obs_names.is_unique:
        msg = (
            f"{sample.where}: the counts hold the barcode {counts.obs_names[counts.obs_names.duplicated()][0]!r} more than once; keep "
            "one of its rows, or give the counts of each sample by itself."
        )
        raise ValueError(msg)
    if not counts.obs_names.isin(positions.index).any():
        positions, counts = _without_suffix(positions, counts)
    known = counts.obs_names.isin(positions.index)
    if not known.any():
        msg = (
            f"{sample.where}: counts and positions share no barcode ({sample.counts.obs_names[0]!r} and "
            f"{sample.positions.index[0]!r}); they belong to different samples or bin sizes."
        )
        raise ValueError(msg)
    if not known.all():
        logger.warning(
            "%s: %d of %d spots with counts have no position and are left out, the first is %r; check that counts and positions "
            "are those of one sample",
            sample.where,
            int((~known).sum()),
            len(known),
            sample.counts.obs_names[~known][0],
        )
    counts = counts[known].copy()
    counts.obs[Keys.IN_TISSUE] = positions[Keys.IN_TISSUE].loc[counts.obs_names]
    return positions[positions[Keys.IN_TISSUE] | positions.index.isin(counts.obs_names)], counts


def _without_suffix(positions: pd.DataFrame, counts: AnnData) -> tuple[pd.DataFrame, AnnData]:
    """Barcodes without the "-1" of Space Ranger, which other programs drop, if they are unique then."""
    names, spots = (index.str.replace(r"-\d+$", "", regex=True) for index in (counts.obs_names, positions.index))
    if not names.is_unique or not spots.is_unique:
        return positions, counts
    counts = counts.copy()
    counts.obs_names = names
    return positions.set_index(spots), counts


def _read_counts(folder: Path) -> AnnData:
    import scanpy as sc

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of names that are not unique: they get other names later
        for pattern in _COUNTS:
            paths = sorted(folder.glob(pattern))
            if len(paths) > 1:
                msg = f"{folder} holds the counts of several samples, {[p.name for p in paths]}; keep one of them."
                raise ValueError(msg)
            if paths:
                return sc.read_10x_h5(paths[0], gex_only=False)
        for name in _COUNT_FOLDERS:
            if (folder / name).is_dir():
                return _read_mtx(folder / name)
    msg = (
        f"{folder} has no counts: expected 'filtered_feature_bc_matrix.h5' or the folder 'filtered_feature_bc_matrix', "
        f"found {sorted(entry.name for entry in folder.iterdir())[:8]}. Copy it from the output of Space Ranger, or give the image alone for an unmeasured section.{how_to_unpack(folder)}"
    )
    raise FileNotFoundError(msg)


def _read_mtx(folder: Path) -> AnnData:
    """Counts of a folder with a matrix, its genes and its barcodes, of any version, packed or not."""

    def file(*names: str) -> Path:
        there = [folder / f"{name}{packed}" for name in names for packed in ("", ".gz")]
        if (found := next((path for path in there if path.exists()), None)) is None:
            msg = f"{folder} has none of the files {[path.name for path in there]}. Copy the folder again."
            raise FileNotFoundError(msg)
        return found

    options: dict[str, Any] = {"sep": "\t", "header": None, "dtype": str, "na_filter": False, "quoting": csv.QUOTE_NONE}
    genes = pd.read_csv(file("features.tsv", "genes.tsv"), **options)
    columns = dict(zip(("gene_ids", "name", "feature_types"), (genes[k].to_numpy() for k in genes), strict=False))
    return AnnData(
        sparse.csr_matrix(io.mmread(file("matrix.mtx")).T, dtype=np.float32),
        obs=pd.DataFrame(index=pd.read_csv(file("barcodes.tsv"), **options)[0].to_numpy()),
        var=pd.DataFrame(columns, index=columns.pop("name")),
    )


@dataclass(frozen=True)
class _Lattice:
    """Affine map from the array of spots (um) to pixels, by least squares."""

    mpp: float  # um per pixel
    stretch: float  # of one direction against the other
    off: float  # um, median distance of the spots from the lattice
    mirrored: bool


def _fit_lattice(positions: pd.DataFrame, column_step: float, row_step: float) -> _Lattice | None:
    """Lattice of spots whose columns and rows lie so many um apart; None for spots in one line."""
    place = positions[["array_col", "array_row"]].to_numpy(float) * [column_step, row_step]
    pixels = positions[_XY].to_numpy(float)
    place, pixels = place - place.mean(axis=0), pixels - pixels.mean(axis=0)
    if len(place) < 3 or np.linalg.matrix_rank(place) < 2:
        return None
    matrix = np.linalg.lstsq(place, pixels, rcond=None)[0]
    mpp = float(1 / np.sqrt(max(abs(np.linalg.det(matrix)), 1e-12)))
    off = float(np.median(np.linalg.norm(pixels - place @ matrix, axis=1))) * mpp
    return _Lattice(mpp, float(np.linalg.cond(matrix)), off, bool(np.linalg.det(matrix) < 0))


def _mpp_of_array(where: str, positions: pd.DataFrame) -> float:
    """Micrometres per pixel from the known lattice of a Visium array."""
    lattice = _fit_lattice(positions, _COLUMN_STEP, _ROW_STEP)
    if lattice is None:
        msg = f"{where}: {len(positions)} spots in one line give no pixel size; pass `mpp=` (um per full-resolution pixel)."
        raise ValueError(msg)
    if lattice.stretch > SAME_SIZE or lattice.off > _LATTICE_TOLERANCE:
        msg = (
            f"{where}: the spots do not lie where a Visium array has them: pixels per um differ {lattice.stretch:.2f} times "
            f"between its directions, and spots lie {lattice.off:.0f} um off the lattice. Check that each column holds what "
            f"its name says: {COLUMNS}."
        )
        raise ValueError(msg)
    if lattice.mirrored:
        logger.warning(
            "%s: the spots are mirrored against the array, as if their x and y were exchanged; check the positions",
            where,
        )
    return lattice.mpp


def _warn_of_other_bins(where: str, positions: pd.DataFrame, edge: float, mpp: float) -> None:
    """Warn if bins of Visium HD with this `edge` (um) do not lie side by side at `mpp`; scans may be mirrored."""
    lattice = _fit_lattice(positions, edge, edge)
    if lattice is not None and not 1 / SAME_SIZE < lattice.mpp / mpp < SAME_SIZE:
        logger.warning(
            "%s contradicts itself: bins of %g um at these positions have %.4g um per pixel, `microns_per_pixel` is %.4g; the "
            "latter is used. Check the positions and scale factors",
            where,
            edge,
            lattice.mpp,
            mpp,
        )


def _require_spot_size(where: str, diameter_um: float) -> None:
    """Raise a ``ValueError`` if spots would overlap or be dots: positions and scale factors then differ in pixels."""
    low, high = _SPOT_SIZES
    if not low <= diameter_um <= high:
        msg = (
            f"{where}: the spots lie 100 um apart, so that `spot_diameter_fullres` is {diameter_um:.0f} um; expected "
            f"{low:g} to {high:g}. The positions are not in pixels of the full resolution, as those of Space Ranger "
            "are: divide them by the scale factor of the image that they are in."
        )
        raise ValueError(msg)


def mpp_from_pitch(circles: GeoDataFrame, system: str, spot_pitch: float) -> float:
    """Micrometres per unit of the coordinate system, from the distance of neighbors on the lattice."""
    pitch = require_positive(spot_pitch, name="spot_pitch", unit="um")
    found = lattice_of(np.column_stack([circles.geometry.x, circles.geometry.y]))
    if found is None:
        msg = (
            f"`spot_pitch` needs spots on a regular lattice, at least two; the {len(circles)} spots have no common "
            f"distance of neighbors (in {system!r}). Pass `mpp=` (um per unit of that coordinate system)."
        )
        raise ValueError(msg)
    return pitch / (found[0] * linear_scale(element_affine(circles, system)))


def warn_of_other_pixels(
    name: str, sdata: SpatialData, mpp: float, *, given: float | None, spot_pitch: float | None
) -> None:
    """Warn if the pixel size that the user gave contradicts the one that the array of spots has."""
    argument = "spot_pitch" if given is None else "mpp"
    if given is None and spot_pitch is not None:
        given = mpp_from_pitch(next(iter(sdata.shapes.values())), "global", spot_pitch)
    given = require_positive(given, name=f"mpp of section {name!r}", unit="um per pixel")
    if not 1 / SAME_SIZE < given / mpp < SAME_SIZE:
        logger.warning(
            "Section %s: the array of spots gives %.4g um per full-resolution pixel, your `%s` gives %.4g; the latter is used. Leave "
            "the argument out to use the array",
            name,
            mpp,
            argument,
            given,
        )


def _read_image(sample: _Sample, fullres_image: str | Path | np.ndarray | None, mpp: float) -> Any:
    """Image element in full-resolution pixels."""
    small = {}
    for kind, _ in _IMAGES:
        if (image := sample.images.get(kind)) is not None and (factor := f"tissue_{kind}_scalef") in sample.factors:
            small[kind] = _opened(image).levels, 1 / _factor(sample, factor)
    _warn_of_other_sizes(sample.where, small)
    if fullres_image is not None:
        opened = _opened(fullres_image)
        pixel = _pixel_of_scan(sample.where, opened.levels, next(iter(small.values()), None))
        if opened.mpp is not None and not 1 / SAME_SIZE < opened.mpp / (pixel * mpp) < SAME_SIZE:
            logger.warning(
                "%s: the metadata of `fullres_image` give %.3g um per pixel, the spots give %.3g; the latter is used",
                sample.where,
                opened.mpp,
                pixel * mpp,
            )
        return image_element(opened.levels, "global", pixel)
    for kind, (levels, pixel) in small.items():
        logger.warning(
            "%s: no full-resolution image, using the %s image with %.3g um per pixel; give the scan with "
            "`fullres_image=`",
            sample.where,
            kind,
            pixel * mpp,
        )
        return image_element(levels, "global", pixel)
    msg = (
        f"{sample.where} has no image: expected one of {[name for _, name in _IMAGES]} with its scale factor. Copy it, unpacked, from the output "
        "of Space Ranger, or give the scan with `fullres_image=`."
    )
    raise FileNotFoundError(msg)


def _warn_of_other_sizes(where: str, small: dict[str, tuple[list[Any], float]]) -> None:
    """Warn if the small images, by their scale factors, come from scans of other sizes."""
    sizes = {kind: np.array(levels[0].shape[:0:-1]) * pixel for kind, (levels, pixel) in small.items()}
    if any((np.ptp(along) > (SAME_SIZE - 1) * max(along)) for along in zip(*sizes.values(), strict=True)):
        logger.warning(
            "%s contradicts itself: by their scale factors, its small images show scans of %s px; spots may lie elsewhere on the "
            "image than on the tissue. Check the images and the scale factors",
            where,
            " and ".join(f"{x:.0f} x {y:.0f} ({kind})" for kind, (x, y) in sizes.items()),
        )


def _opened(image: str | Path | np.ndarray) -> ImageFile:
    """Image of a path, or of an array (y, x) or (y, x, c)."""
    if isinstance(image, str | Path):
        return open_image(image)
    levels: list[Any] = [np.moveaxis(np.atleast_3d(image), -1, 0)]
    return ImageFile(levels, None)


def _pixel_of_scan(where: str, scan: list[Any], small: tuple[list[Any], float] | None) -> float:
    """Pixel of the given scan in pixels of the scan that Space Ranger had, by the small image that it made of it.

    Raises a ``ValueError`` if the given scan is turned, mirrored, or another image.
    """
    if small is None:
        logger.warning(
            "%s: no small image of Space Ranger to compare `fullres_image` with; it is taken as it is", where
        )
        return 1.0
    levels, pixel = small
    wanted = np.array(levels[0].shape[1:]) * pixel
    size, name = np.array(scan[0].shape[1:]), f"{where}: `fullres_image` of {scan[0].shape[2]} x {scan[0].shape[1]} px"
    found = compare_pictures(*(_grey_thumbnail(image) for image in (scan, levels)))
    best = max(found, key=lambda turn: found[turn], default=None)
    expected = f"the scan that Space Ranger was given, of about {wanted[1]:.0f} x {wanted[0]:.0f} px"
    if best not in (None, AS_IT_IS) and found[best] > max(_OTHER_PICTURE, found.get(AS_IT_IS, -1.0) + _BETTER):
        msg = f"{name} does not fit {expected}, but would if it were {best}. Give it so, or that scan itself."
        raise ValueError(msg)
    if AS_IT_IS not in found:
        msg = f"{name} has other proportions than {expected}. Give that scan, or leave `fullres_image` out."
        raise ValueError(msg)
    if found[AS_IT_IS] < _OTHER_PICTURE:
        logger.warning(
            "%s shows another picture than the small image of the folder (correlation %.2f); check that it is %s",
            name,
            found[AS_IT_IS],
            expected,
        )
    if (np.abs(size - wanted) <= 2 * pixel).all():
        return 1.0
    scale = float(np.sqrt(np.prod(size / wanted)))
    logger.warning("%s is %.3g times as large as %s; spots are placed on it with this factor", name, scale, expected)
    return 1 / scale


def _grey_thumbnail(arrays: list[Any]) -> np.ndarray:
    """Grey thumbnail (y, x) of levels (c, y, x)."""
    levels = image_levels(image_element(arrays, "global", 1.0), scaling(1.0))
    return read_thumbnail(levels, max(1.0, max(arrays[0].shape[1:]) / 512))[0].mean(axis=2)
