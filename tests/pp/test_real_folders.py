"""Every folder of real data, against the numbers of its own files, or refused by name."""

from __future__ import annotations

import json

import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import sparse

import spatial_impute as si
from spatial_impute._stack.elements import section_levels
from spatial_impute._stack.record import load_record
from spatial_impute.pp._spots import place_spots

SAMPLES = [
    "cytassist_2898/outs",
    "muscle_vis5a",
    "tiny/VisiumIO/10xVisium/section1/outs",
    "tiny/VisiumIO/10xVisium/section2/outs",
    "tiny/VisiumIO/binned_outputs/square_002um",
    "tiny/seurat/visium",
    "tiny/seurat/visium_hd/binned_outputs/square_008um",
    "tiny/seurat/visium_hd/binned_outputs/square_016um",
    "tiny/squidpy",
]
COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]


def positions(folder):
    path = next((folder / "spatial").glob("tissue_positions*"))
    if path.suffix == ".parquet":
        table = pd.read_parquet(path)
    else:
        table = pd.read_csv(path, header=0 if path.read_text().startswith("barcode") else None)
    return table.set_axis(COLUMNS, axis=1).set_index("barcode")


def totals(folder):
    """Counts of each barcode."""
    with h5py.File(next(folder.glob("*_feature_bc_matrix.h5"))) as file:
        group = file["matrix"]
        parts = (group[key][()] for key in ("data", "indices", "indptr"))
        matrix = sparse.csc_matrix(tuple(parts), shape=group["shape"][()])
        return pd.Series(np.asarray(matrix.sum(axis=0)).ravel(), group["barcodes"][()].astype(str))


@pytest.mark.parametrize("name", SAMPLES)
def test_places_sizes_and_counts_are_those_of_the_files(data_dir, name):
    folder = data_dir / "visium" / name
    sdata = si.pp.assemble_stack({"m": folder}, z=[0])
    record, table = load_record(sdata)["m"], sdata.tables["stack"]
    factors = json.loads((folder / "spatial" / "scalefactors_json.json").read_text())
    kind = next(k for k in ("hires", "lowres") if (folder / "spatial" / f"tissue_{k}_image.png").exists())
    with Image.open(folder / "spatial" / f"tissue_{kind}_image.png") as picture:
        assert section_levels(sdata, record)[0].shape == picture.size[::-1]
    full = record.mpp * factors[f"tissue_{kind}_scalef"]
    if "microns_per_pixel" in factors:
        assert full == pytest.approx(factors["microns_per_pixel"])
    place = positions(folder)
    spots = place.loc[table.obs["instance_id"].astype(str)]
    assert (spots["in_tissue"] == 1).all()
    np.testing.assert_allclose(table.obsm["spatial"], spots[COLUMNS[:3:-1]].to_numpy() * full, rtol=1e-6)
    counts = totals(folder)
    measured = set(counts.index) & set(place.index[place["in_tissue"] == 1])
    assert set(table.obs["instance_id"][table.obs["measured"].to_numpy()]) == measured
    own = sdata.tables["m_counts"]
    np.testing.assert_allclose(np.asarray(own.X.sum(axis=1)).ravel(), counts[own.obs["instance_id"].astype(str)])


def test_every_folder_leads_to_a_sample_or_is_refused_by_name(data_dir):
    root = data_dir / "visium"
    for folder in sorted(path for path in root.rglob("*") if path.is_dir()):
        if not any((root / name).is_relative_to(folder) for name in SAMPLES):
            with pytest.raises(FileNotFoundError, match="is no folder of Space Ranger") as caught:
                si.pp.assemble_stack({"m": folder}, z=[0], mpp=1.0)
            assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["MOB1", "MOB2", "MOB3", "MOB4"])
def test_olfactory_bulb_lies_on_its_array(data_dir, name):
    """The pixel size is that of the array: 200 um between spots of another distance in pixels."""
    folder = data_dir / "mob_st4"
    with pytest.raises(ValueError, match=f"Pixel size of section {name!r} is unknown"):
        si.pp.assemble_stack({name: folder / f"{name}.jpg"}, z=[0])
    for suffix in (".tsv.gz", ".tsv"):
        path = next(folder.glob(f"*{name}{suffix}"))
        with pytest.raises(ValueError, match=f"Cannot read {path.name!r}"):
            si.pp.assemble_stack({name: path}, z=[0], mpp=4.22)
    sdata = si.pp.assemble_stack({name: folder / f"{name}.jpg"}, z=[0], mpp=4.22)
    levels = section_levels(sdata, load_record(sdata)[name])
    with Image.open(folder / f"{name}.jpg") as picture:
        assert levels[0].shape == picture.size[::-1] == (1905, 1905)
    spots = pd.read_csv(folder / f"alignment_table_{name}.tsv", sep="\t").query("selected == 1")
    found = place_spots(levels, spots[["pixel_x", "pixel_y"]].to_numpy() * 4.22)
    assert found.sentence is None
    assert found.share > 0.9
