"""Mouse olfactory bulb on arrays of 2,000 spots (Bergenstråhle et al. 2020): H&E and counts of four sections."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

import pandas as pd

from spatial_impute._image.reading import open_image
from spatial_impute._io.files import fetch
from spatial_impute._settings import settings
from spatial_impute._stack.elements import image_element, section_object
from spatial_impute.datasets._her2st import array_ids, read_counts, require_measured, truth_table
from spatial_impute.pp import assemble_stack, select_genes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from spatialdata import SpatialData

# The newest commit of the R package; the sha256 tells if a file changed there.
_BASE_URL = "https://raw.githubusercontent.com/jbergenstrahle/STUtility/HEAD/inst/extdata/counts/"
_FOLDER = "mob_st4"
SHA256 = {
    "MOB1.jpg": "c1c292187221bab077ac1b15e95cf665db35684c98d6193af56d2e8b7772fe20",
    "MOB2.jpg": "1079fe52f600ec212a6a59cef76b8697fcd776d0cdb10461ad3bb738eaa5c0b6",
    "MOB3.jpg": "0ac2c820ca6614e3ebc7fef3004a85c4623093b10741858e5c5328d7310606ca",
    "MOB4.jpg": "c45a4f559fb560e8b0224085c9a9ed2bf20e17a1128a7e2c1c36050b173acc0b",
    "MOB1.tsv": "82c0691f800355369fd8a72ff44ba1e3112d4e44a790f490a9fa267876a9352e",
    "MOB2.tsv": "449dcc351ede5c63f9afe313479dbb830ba32c6e86b56b258276304102d1f7e9",
    "MOB3.tsv": "f0b9601a10d627d372c412cad4a4dde2a1dee9f2433e51f07ca26d534be015ea",
    "MOB4.tsv": "bc782caf3e990468d579715139db4e9c1f682b7c625978f1073720458f98a509",
    "alignment_table_MOB1.tsv": "91ade06cf93bc0b3cd728846c34e310a8365200d1ad33498e6a0eb6951a92164",
    "alignment_table_MOB2.tsv": "6d86b226386b0a08f825b3bff4b5c359f00fd52d3f53d77db0376b0f7e0ec30d",
    "alignment_table_MOB3.tsv": "da0ce26ad12b94b6d0784ddc1c0c76e998d3bbd2579bad6aa8c4ac2c4f7f2e33",
    "alignment_table_MOB4.tsv": "243fa0518132fbc750cbf05ae17946d66c94be32b48803b27c70fde3d76fd5ff",
}

# Neighboring spots are 141 um apart, on the images 33.4 pixels.
_MPP, _SPOT_DIAMETER = 4.22, 100.0
_HEIGHTS = {"MOB1": 100.0, "MOB2": 120.0, "MOB3": 130.0, "MOB4": 140.0}  # um; the true ones are not published


@overload
def olfactory_bulb(
    *,
    measured: Sequence[str] = ...,
    n_top_genes: int | None = ...,
    data_dir: str | Path | None = ...,
    truth: Literal[False] = ...,
) -> SpatialData: ...


@overload
def olfactory_bulb(
    *,
    measured: Sequence[str] = ...,
    n_top_genes: int | None = ...,
    data_dir: str | Path | None = ...,
    truth: Literal[True],
) -> tuple[SpatialData, AnnData]: ...


def olfactory_bulb(
    *,
    measured: Sequence[str] = ("MOB2",),
    n_top_genes: int | None = 250,
    data_dir: str | Path | None = None,
    truth: bool = False,
) -> SpatialData | tuple[SpatialData, AnnData]:
    """Four sections of the mouse olfactory bulb :cite:p:`Bergenstrahle2020` as a stack.

    The sections ``"MOB1"`` to ``"MOB4"`` have 379 to 438 spots under tissue (100 um across, 141 um apart) and counts of
    1,000 genes, with Ensembl ids as names. MOB4 lies upside down. The printed frame of the array is in the images. The
    files are examples of the R package STUtility (MIT license, folder ``inst/extdata/counts``), 17 MB in all:
    ``MOB1.jpg``, ``MOB1.tsv`` and ``alignment_table_MOB1.tsv``, and the same for the other sections. Missing files are
    downloaded, and each file is checked by its sha256.

    Parameters
    ----------
    measured
        Sections whose expression is in the stack.
    n_top_genes
        Number of genes with the highest mean on the measured sections, see :func:`~spatial_impute.pp.select_genes`.
        ``None`` selects no genes.
    data_dir
        Folder with the files; by default ``settings.data_dir / "mob_st4"``. Counts may be compressed (``MOB1.tsv.gz``).
        Missing files are downloaded to it, and no file in it is replaced.
    truth
        Also return the expression of all sections, for evaluation. It never enters the stack.

    Returns
    -------
    The stack; with ``truth=True`` also an AnnData with one row per spot (``obs_names`` as in the stack table): ``X``
    log1p of counts per 10,000 over the 1,000 genes, ``layers["counts"]`` raw counts. Heights (100, 120, 130 and 140 um)
    are those of an example; the distances of the sections are not published.

    Raises
    ------
    ValueError
        If `measured` is empty, or a file is not the published one.
    KeyError
        For sections that do not exist.
    ConnectionError
        If a missing file cannot be downloaded; the message says where to put it.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata, truth = si.datasets.olfactory_bulb(truth=True)  # doctest: +SKIP
    >>> sdata = si.datasets.olfactory_bulb(data_dir="downloads/STUtility")  # doctest: +SKIP
    """
    measured = require_measured(measured, _HEIGHTS, where="sections of the olfactory bulb")
    folder = settings.data_dir / _FOLDER if data_dir is None else Path(data_dir).expanduser()
    places = {name: _read_places(folder, name) for name in _HEIGHTS}
    counts = {name: _read_counts(folder, name, places[name]) for name in _HEIGHTS if truth or name in measured}
    sections = {
        name: section_object(
            name,
            image_element(open_image(_file(folder, f"{name}.jpg")).levels, "global", 1.0),
            centers=places[name][["pixel_x", "pixel_y"]].to_numpy(float),
            radius=_SPOT_DIAMETER / 2 / _MPP,
            ids=list(places[name].index),
            table=counts[name].copy() if name in measured else None,
        )
        for name in _HEIGHTS
    }
    sdata = assemble_stack(sections, mpp=_MPP, z=list(_HEIGHTS.values()))
    if n_top_genes is not None:
        select_genes(sdata, n_top_genes=n_top_genes)
    return (sdata, truth_table(counts, join="outer")) if truth else sdata


def _file(folder: Path, name: str) -> Path:
    """Path of a file in the folder; downloaded if it is missing. A file of the user is never replaced."""
    path = folder / name
    if path.is_file() and folder != settings.data_dir / _FOLDER:
        _require_published(path, path.read_bytes())
        return path
    return fetch(path, url=_BASE_URL + name, sha256=SHA256[name])


def _read_places(folder: Path, name: str) -> pd.DataFrame:
    """Places of the spots under tissue, by id."""
    spots = pd.read_csv(_file(folder, f"alignment_table_{name}.tsv"), sep="\t").query("selected == 1")
    return spots.set_axis(array_ids(spots))


def _read_counts(folder: Path, name: str, places: pd.DataFrame) -> AnnData:
    """Counts of the spots under tissue; the file has those of the whole array."""
    packed = folder / f"{name}.tsv.gz"
    if not packed.exists():
        return read_counts(_file(folder, f"{name}.tsv"))[places.index].copy()
    try:
        content = gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        msg = f"'{packed}' cannot be unpacked: {error}. Download it again."
        raise ValueError(msg) from error
    _require_published(packed, content)
    return read_counts(packed)[places.index].copy()


def _require_published(path: Path, content: bytes) -> None:
    """Raise a ``ValueError`` unless the (unpacked) content of a file is the published one."""
    found, expected = hashlib.sha256(content).hexdigest(), SHA256[path.name.removesuffix(".gz")]
    if found != expected:
        msg = (
            f"'{path}' is not the published file: its content has the sha256 {found}, expected {expected}. Move it to "
            "another folder; then the published one is downloaded."
        )
        raise ValueError(msg)
