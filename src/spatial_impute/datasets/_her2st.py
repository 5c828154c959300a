"""HER2-positive breast tumours (Andersson et al. 2021): serial sections with H&E and spatial transcriptomics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import pandas as pd
from scipy import sparse

from spatial_impute._expression import log_normalize
from spatial_impute._image.reading import open_image
from spatial_impute._io.download import fetch
from spatial_impute._keys import Keys
from spatial_impute._settings import settings
from spatial_impute._stack import image_element, section_object
from spatial_impute._validation import name_list, require_key, require_positive
from spatial_impute.pp import assemble_stack, select_genes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from anndata import AnnData
    from spatialdata import SpatialData

# Public files of the study at one commit; the folder structure below data/ is kept in the cache.
_BASE_URL = "https://raw.githubusercontent.com/almaan/her2st/85df7411b987a7dec3feff9718b869a7a82091ec/data/"
_FOLDER = "her2st"

# Array pitch 200 um; the spot files place one array unit at 290.7 px (mean over x and y of all sections).
_MPP = 0.688
_SPOT_DIAMETER = 100.0

# patient -> section -> image file. C1 has no image in the repository.
_IMAGES = {
    "C": {
        "C2": "ST-imgs/C/C2/5714_HE_BT_C2.jpg",
        "C3": "ST-imgs/C/C3/5714_HE_BT_D1.jpg",
        "C4": "ST-imgs/C/C4/5714_HE_BT_D2.jpg",
        "C5": "ST-imgs/C/C5/5714_HE_BT_E1.jpg",
        "C6": "ST-imgs/C/C6/5714_HE_BT_E2.jpg",
    }
}
_SHA256 = {
    "ST-cnts/C2.tsv.gz": "c1c59ea6cffae36b9ecb561b8e2a97e3aa5f4085f748e991a0e330ed9d09773d",
    "ST-cnts/C3.tsv.gz": "e00c55a3eb9caac5d9c71b8906aae8be8b38f93e23938f4a0ebee17683ef6a2a",
    "ST-cnts/C4.tsv.gz": "33201f76d41d7131dc600a0f87d9a70383af3503e81698b4d11e6f2e8d73e9da",
    "ST-cnts/C5.tsv.gz": "c0f310315ca6110d74dbdf7011e5b42432ba0b8eb5f001824764911988f39338",
    "ST-cnts/C6.tsv.gz": "60478b0d2411501866685f41312c65c6591e499d64d5b719be8ee9bab25c9bc8",
    "ST-imgs/C/C2/5714_HE_BT_C2.jpg": "26e2f73ae840cdd46c5bba405aae181f13a56a376b9848dff23f7a9c5de7f19e",
    "ST-imgs/C/C3/5714_HE_BT_D1.jpg": "0005a92674014d473040a28f0afca89ce5fa5c44019b479b638ceb3272ceb568",
    "ST-imgs/C/C4/5714_HE_BT_D2.jpg": "f40607eb1d5f0d125decd71c48b0c5d29cf6776ad92297fd185631208c82d6f2",
    "ST-imgs/C/C5/5714_HE_BT_E1.jpg": "34028ea41e376396b50c42b0a11a7e689c85be4a8022e668d0a09cc128c04c65",
    "ST-imgs/C/C6/5714_HE_BT_E2.jpg": "dddd87232589648861a9b6776dc1749be8306213f6589aeef0e805fb2b1ee263",
    "ST-spotfiles/C2_selection.tsv": "235b5f4306b3b57c628ffc82c98c7109602474fbcc79a917b9c50517f99b6b1c",
    "ST-spotfiles/C3_selection.tsv": "7fd76c13370b7804ac3bb377b846d22485cf9223f9dd8dfc25be06e5aaf65755",
    "ST-spotfiles/C4_selection.tsv": "47e79f3b9dbfa3a8c18af9e948ba7ba4bf0a75ea1b4c292bc714ced7d0917d4c",
    "ST-spotfiles/C5_selection.tsv": "2114cc3b4da759772112897f1e247d5443c9f8c808e6a9a952eb4fda379a194c",
    "ST-spotfiles/C6_selection.tsv": "efdbbc6759c6af43baa966505c31705f09c087c1dccf1ea3e0d1db7b55717117",
}


@overload
def her2st(
    patient: str = ...,
    *,
    measured: Sequence[str] = ...,
    section_spacing: float = ...,
    n_top_genes: int | None = ...,
    truth: Literal[False] = ...,
) -> SpatialData: ...


@overload
def her2st(
    patient: str = ...,
    *,
    measured: Sequence[str] = ...,
    section_spacing: float = ...,
    n_top_genes: int | None = ...,
    truth: Literal[True],
) -> tuple[SpatialData, AnnData]: ...


def her2st(
    patient: str = "C",
    *,
    measured: Sequence[str] = ("C4",),
    section_spacing: float = 16.0,
    n_top_genes: int | None = 250,
    truth: bool = False,
) -> SpatialData | tuple[SpatialData, AnnData]:
    """Five serial sections of a HER2-positive breast tumour :cite:p:`Andersson2021` as a stack.

    All sections have H&E and spots (100 um across, 200 um apart). The stack holds the expression of the sections in
    `measured`. Files are downloaded once (about 23 MB), checked by sha256, and kept in ``settings.data_dir``.

    Parameters
    ----------
    patient
        Only ``"C"``, the patient with five images in a row.
    measured
        Sections whose expression is in the stack.
    section_spacing
        Distance of consecutive sections in um. The study does not publish it; 16 um is a common thickness of
        cryosections.
    n_top_genes
        Number of genes with the highest mean on the measured sections, see :func:`~spatial_impute.pp.select_genes`.
        ``None`` selects no genes.
    truth
        Also return the expression of all sections, for evaluation. It never enters the stack.

    Returns
    -------
    The stack; with ``truth=True`` also an AnnData with one row per counted spot (``obs_names`` as in the stack table):
    ``X`` log1p of counts per 10,000 over all genes, ``layers["counts"]`` raw counts.

    Raises
    ------
    ValueError
        For other patients or an empty `measured`.
    KeyError
        For sections that do not exist.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.her2st("C", measured=["C4"])  # doctest: +SKIP
    >>> sdata, truth = si.datasets.her2st("C", measured=["C4"], truth=True)  # doctest: +SKIP
    """
    if patient not in _IMAGES:
        msg = f"`patient` must be one of {sorted(_IMAGES)}, found {patient!r}."
        raise ValueError(msg)
    images = _IMAGES[patient]
    measured = name_list(measured, name="measured")
    if not measured:
        msg = f"`measured` is empty; name at least one of {sorted(images)}."
        raise ValueError(msg)
    for name in measured:
        require_key(name, images, where=f"sections of patient {patient!r}")
    section_spacing = require_positive(section_spacing, name="section_spacing", unit="um")

    files = {name: _fetch_section(name, image) for name, image in images.items()}
    counts = {name: _read_counts(files[name]["counts"]) for name in images if truth or name in measured}
    sdata = assemble_stack(
        {name: _section(name, files[name], counts[name] if name in measured else None) for name in images},
        mpp=_MPP,
        section_spacing=section_spacing,
    )
    if n_top_genes is not None:
        select_genes(sdata, n_top_genes=n_top_genes)
    return (sdata, truth_table(counts, join="outer")) if truth else sdata


def truth_table(counts: Mapping[str, AnnData], **options: Any) -> AnnData:
    """One table with the expression of all sections; rows are named as in the stack table."""
    from anndata import concat

    for name, table in counts.items():
        table.layers["counts"] = table.X.copy()
        table.X = log_normalize(table.X, 1e4).astype(np.float32)
        table.obs[Keys.SECTION] = name
        table.obs_names = [f"{name}_{i}" for i in table.obs_names]
    return concat(
        list(counts.values()), fill_value=0, **options
    )  # a gene that a section does not list was not seen there


def _fetch_section(name: str, image: str) -> dict[str, Path]:
    """Paths of the three files of a section in the cache; missing ones are downloaded."""
    wanted = {"image": image, "counts": f"ST-cnts/{name}.tsv.gz", "spots": f"ST-spotfiles/{name}_selection.tsv"}
    urls = {file: _BASE_URL + file for file in _SHA256}
    return {
        kind: fetch(file, folder=settings.data_dir / _FOLDER, sha256=_SHA256, urls=urls)
        for kind, file in wanted.items()
    }


def _read_counts(path: Path) -> AnnData:
    """Counts of one section: rows are spots "XxY", columns genes."""
    from anndata import AnnData

    frame = pd.read_csv(path, sep="\t", index_col=0)
    return AnnData(
        X=sparse.csr_matrix(frame.to_numpy(np.float32)),
        obs=pd.DataFrame(index=frame.index.astype(str)),
        var=pd.DataFrame(index=frame.columns.astype(str)),
    )


def _section(name: str, files: dict[str, Path], counts: AnnData | None) -> SpatialData:
    """Image, spots and counts of one section."""
    spots = pd.read_csv(files["spots"], sep="\t")
    return section_object(
        name,
        image_element(open_image(files["image"]).levels, "global", 1.0),
        centers=spots[["pixel_x", "pixel_y"]].to_numpy(float),
        radius=_SPOT_DIAMETER / 2 / _MPP,
        ids=list(spots["x"].astype(str) + "x" + spots["y"].astype(str)),
        table=None if counts is None else counts.copy(),
    )
