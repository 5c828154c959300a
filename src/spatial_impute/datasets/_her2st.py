"""HER2-positive breast tumors (Andersson et al. 2021): serial sections with H&E and spatial transcriptomics."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import dask.array as da
import numpy as np
import pandas as pd
from anndata import AnnData, concat
from scipy import sparse
from scipy.spatial import cKDTree

from spatial_impute._expression import log_normalize
from spatial_impute._image.reading import open_image
from spatial_impute._io.files import fetch
from spatial_impute._keys import Keys
from spatial_impute._settings import logger, settings
from spatial_impute._stack.elements import image_element, section_object
from spatial_impute._validation import name_list, require_key, require_one_of, require_positive
from spatial_impute.pp import assemble_stack, select_genes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from spatialdata import SpatialData

# Public files of the study at one commit; the folder structure below data/ is kept in the cache.
_BASE_URL = "https://raw.githubusercontent.com/almaan/her2st/85df7411b987a7dec3feff9718b869a7a82091ec/data/"
_FOLDER = "her2st"
_HASHES = Path(__file__).with_suffix(".sha256")  # as `sha256sum` writes them
SHA256 = {file: digest for digest, file in map(str.split, _HASHES.read_text(encoding="utf-8").splitlines())}

# Array pitch 200 um; the spot files place one array unit at 290.7 px (mean over x and y of all sections).
_MPP = 0.688
_PITCH, _SPOT_DIAMETER = 200.0, 100.0
_DRAWN_MPP = 8.0  # of images that are drawn, um per pixel
_MARGIN = 800.0  # um of glass around drawn tissue
_GLASS, _TISSUE = (240, 240, 240), (190, 120, 170)
_N_SECTIONS = {**dict.fromkeys("ABCD", 6), **dict.fromkeys("EFGH", 3)}

# patient -> section -> image file. C1 has no image in the repository, and images of other patients are too large.
_IMAGES = {
    "C": {
        "C2": "ST-imgs/C/C2/5714_HE_BT_C2.jpg",
        "C3": "ST-imgs/C/C3/5714_HE_BT_D1.jpg",
        "C4": "ST-imgs/C/C4/5714_HE_BT_D2.jpg",
        "C5": "ST-imgs/C/C5/5714_HE_BT_E1.jpg",
        "C6": "ST-imgs/C/C6/5714_HE_BT_E2.jpg",
    }
}


@overload
def her2st(
    patient: str = ...,
    *,
    measured: Sequence[str] | None = ...,
    section_spacing: float = ...,
    n_top_genes: int | None = ...,
    images: bool | str | Path = ...,
    truth: Literal[False] = ...,
) -> SpatialData: ...


@overload
def her2st(
    patient: str = ...,
    *,
    measured: Sequence[str] | None = ...,
    section_spacing: float = ...,
    n_top_genes: int | None = ...,
    images: bool | str | Path = ...,
    truth: Literal[True],
) -> tuple[SpatialData, AnnData]: ...


def her2st(
    patient: str = "C",
    *,
    measured: Sequence[str] | None = None,
    section_spacing: float = 16.0,
    n_top_genes: int | None = 250,
    images: bool | str | Path = True,
    truth: bool = False,
) -> SpatialData | tuple[SpatialData, AnnData]:
    """Three to six serial sections of a HER2-positive breast tumor :cite:p:`Andersson2021` as a stack.

    All sections have spots (100 um across, 200 um apart). The stack holds the expression of the sections in
    `measured`. Files are downloaded once (patient C: about 23 MB), checked by sha256, and kept in
    ``settings.data_dir``.

    Parameters
    ----------
    patient
        ``"A"`` to ``"H"``. The H&E images of ``"C"`` (C2 to C6) are downloaded; for the others see `images`.
    measured
        Sections whose expression is in the stack; by default C4 with images, and the first section without.
    section_spacing
        Distance of consecutive sections in um. The study does not publish it; 16 um is a common thickness of
        cryosections.
    n_top_genes
        Number of genes with the highest mean on the measured sections, see :func:`~spatial_impute.pp.select_genes`.
        ``None`` selects no genes.
    images
        A folder: its images, as the repository of the study has them (``folder/A/A1/*.jpg``, in ``data/ST-imgs``),
        which you have downloaded yourself, one for each section. Sections without an image are left out, with a
        warning. False: all sections of the patient without their H&E. Tissue is drawn where spots are, so that sections
        can be registered by their shape. Such images do not show expression: use methods without features.
    truth
        Also return the expression of all sections, for evaluation. It never enters the stack.

    Returns
    -------
    The stack; with ``truth=True`` also an AnnData with one row per counted spot (``obs_names`` as in the stack table):
    ``X`` log1p of counts per 10,000 over all genes, ``layers["counts"]`` raw counts.

    Raises
    ------
    ValueError
        For unknown patients, patients without images, an empty `measured`, several images of a section, or an image
        that is smaller than the published one.
    TypeError
        If `images` is neither True, False nor a path.
    KeyError
        For sections that do not exist.
    FileNotFoundError
        If the folder of images has none of the patient.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.her2st("C", measured=["C4"])  # doctest: +SKIP
    >>> sdata, truth = si.datasets.her2st("C", measured=["C4"], truth=True)  # doctest: +SKIP
    """
    paths = _image_files(patient, images=images)
    if measured is None:
        measured = ["C4" if images is True else next(iter(paths))]
    measured = require_measured(measured, paths, where=f"sections of patient {patient!r}")
    section_spacing = require_positive(section_spacing, name="section_spacing", unit="um")

    files = {name: _fetch_section(name, image) for name, image in paths.items()}
    counts = {name: read_counts(files[name]["counts"]) for name in paths if truth or name in measured}
    sections, mpp = {}, {}
    for name, own in files.items():
        spots = pd.read_csv(own["spots"], sep="\t")
        if images is False:
            mpp[name], (centers, levels) = _DRAWN_MPP, _drawn(spots)
        else:
            mpp[name] = _MPP if images is True else _mpp_of_array(spots)
            centers, levels = _scanned(name, spots, own["image"])
        sections[name] = section_object(
            name,
            image_element(levels, "global", 1.0),
            centers=centers,
            radius=_SPOT_DIAMETER / 2 / mpp[name],
            ids=array_ids(spots),
            table=counts[name].copy() if name in measured else None,
        )
    number = {name: int(name[1:]) for name in paths}  # sections that are left out leave a gap
    heights = [section_spacing * (n - min(number.values())) for n in number.values()]
    sdata = assemble_stack(sections, mpp=mpp, z=heights)
    if n_top_genes is not None:
        select_genes(sdata, n_top_genes=n_top_genes)
    return (sdata, truth_table(counts, join="outer")) if truth else sdata


def require_measured(measured: Sequence[str] | None, sections: Iterable[str], *, where: str) -> list[str]:
    """Names of measured sections as a list; an error if there are none, or unknown ones."""
    names = name_list(measured, name="measured")
    if not names:
        msg = f"`measured` is empty; name at least one of {sorted(sections)}."
        raise ValueError(msg)
    for name in names:
        require_key(name, sections, where=where)
    return names


def truth_table(counts: Mapping[str, AnnData], **options: Any) -> AnnData:
    """One table with the expression of all sections; rows are named as in the stack table."""
    for name, table in counts.items():
        table.layers["counts"] = table.X.copy()
        table.X = log_normalize(table.X, 1e4).astype(np.float32)
        table.obs[Keys.SECTION] = name
        table.obs_names = [f"{name}_{i}" for i in table.obs_names]
    # A gene that a section does not list was not seen there.
    return concat(list(counts.values()), fill_value=0, **options)


def _image_files(patient: str, *, images: bool | str | Path) -> Mapping[str, str | Path | None]:
    """Image file of each section of a patient, a name below the folder of downloads or a path; None without images."""
    require_one_of(patient, _N_SECTIONS, name="patient")
    sections = [f"{patient}{k + 1}" for k in range(_N_SECTIONS[patient])]
    if not isinstance(images, bool | str | Path):
        msg = f"`images` must be True, False or the path of a folder with images, found {images!r}."
        raise TypeError(msg)
    if not isinstance(images, bool):
        return _images_in(Path(images).expanduser(), patient, sections)
    if not images:
        return dict.fromkeys(sections)
    if patient not in _IMAGES:
        msg = (
            f"The images of patient {patient!r} are not downloaded, only those of {sorted(_IMAGES)}. Pass "
            "`images=False`, or the folder 'ST-imgs' of the repository of the study: `images='her2st/data/ST-imgs'`."
        )
        raise ValueError(msg)
    return dict(_IMAGES[patient])


def _images_in(folder: Path, patient: str, sections: list[str]) -> dict[str, Path]:
    """The one image of each section in a folder of the user; sections without are left out."""
    found = {}
    for name in sections:
        here = sorted(path for path in (folder / patient / name).glob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
        if len(here) > 1:
            msg = (
                f"'{folder / patient / name}' must hold one image, found {[path.name for path in here]}. Leave only "
                "the full-resolution image of the study."
            )
            raise ValueError(msg)
        if here:
            found[name] = here[0]
    if not found:
        msg = (
            f"'{folder}' has no image of patient {patient!r}: expected '{patient}/{sections[0]}/*.jpg' and so on in it."
        )
        raise FileNotFoundError(msg)
    if left_out := [name for name in sections if name not in found]:
        logger.warning("'%s' has no image of the sections %s, which are left out", folder, left_out)
    return found


def _mpp_of_array(spots: pd.DataFrame) -> float:
    """Um per pixel of an image, from its spots, which lie 200 um apart on the array."""
    return _PITCH / float(np.mean([np.polyfit(spots[f"new_{axis}"], spots[f"pixel_{axis}"], 1)[0] for axis in "xy"]))


def _fetch_section(name: str, image: str | Path | None) -> dict[str, Path]:
    """Paths of the files of a section: in the cache, where missing ones are downloaded, or of the user."""
    wanted = {"counts": f"ST-cnts/{name}.tsv.gz", "spots": f"ST-spotfiles/{name}_selection.tsv"}
    if isinstance(image, str):
        wanted["image"] = image
    folder = settings.data_dir / _FOLDER
    found = {kind: fetch(folder / file, url=_BASE_URL + file, sha256=SHA256[file]) for kind, file in wanted.items()}
    return found | ({"image": image} if isinstance(image, Path) else {})


def read_counts(path: Path) -> AnnData:
    """Counts of one section: rows are spots "XxY", columns genes."""
    frame = pd.read_csv(path, sep="\t", index_col=0)
    return AnnData(
        X=sparse.csr_matrix(frame.to_numpy(np.float32)),
        obs=pd.DataFrame(index=frame.index.astype(str)),
        var=pd.DataFrame(index=frame.columns.astype(str)),
    )


def array_ids(spots: pd.DataFrame) -> list[str]:
    """Names of spots by their place on the array, "XxY"."""
    return list(spots["x"].astype(str) + "x" + spots["y"].astype(str))


def _scanned(name: str, spots: pd.DataFrame, image: Path) -> tuple[np.ndarray, list[da.Array]]:
    """Centres of the spots (x, y) in pixels, and the levels of the scan."""
    centers, levels = spots[["pixel_x", "pixel_y"]].to_numpy(float), open_image(image).levels
    height, width = levels[0].shape[-2:]
    if (centers > [width, height]).any():
        msg = (
            f"The spots of section {name!r} reach pixel {centers.max(axis=0).round().astype(int).tolist()} (x, y), but "
            f"'{image}' has {width} x {height} pixels. Use the full-resolution image of the study."
        )
        raise ValueError(msg)
    return centers, levels


def _drawn(spots: pd.DataFrame) -> tuple[np.ndarray, list[da.Array]]:
    """Centres of the spots (x, y) in pixels by their places on the array, and an image on which they are tissue."""
    array = spots[["new_x", "new_y"]].to_numpy(float)
    centers = ((array - array.min(axis=0)) * _PITCH + _MARGIN) / _DRAWN_MPP
    width, height = (np.ceil(centers.max(axis=0) + _MARGIN / _DRAWN_MPP)).astype(int)
    grid = np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), axis=-1)
    # Discs of 0.8 pitches close the gaps of the lattice, also across a diagonal.
    inside = cKDTree(centers).query(grid.reshape(-1, 2))[0].reshape(height, width) < 0.8 * _PITCH / _DRAWN_MPP
    pixels = np.where(inside, np.reshape(_TISSUE, (3, 1, 1)), np.reshape(_GLASS, (3, 1, 1))).astype(np.uint8)
    return centers, [da.from_array(pixels)]
