from __future__ import annotations

import gzip
import shutil

import numpy as np
import pandas as pd
import pytest

import spatial_impute as si
from spatial_impute._stack.elements import spot_geometry
from spatial_impute._stack.record import load_record
from spatial_impute.datasets import _olfactory_bulb

SECTIONS = ["MOB1", "MOB2", "MOB3", "MOB4"]


@pytest.fixture(scope="module")
def folder(data_dir):
    """The files as users have them."""
    if not (data_dir / "mob_st4" / "MOB1.jpg").is_file():
        pytest.skip("the olfactory bulb is missing")
    return data_dir / "mob_st4"


@pytest.fixture(scope="module")
def bulb(folder):
    """Stack with MOB2 measured, and the truth; never written to."""
    return si.datasets.olfactory_bulb(truth=True, data_dir=folder)


def test_bulb_is_a_stack_in_um(bulb, folder):
    sdata, truth = bulb
    record = load_record(sdata)
    assert list(record.names) == SECTIONS
    assert [section.z for section in record.sections] == [100, 120, 130, 140]
    for section, n_spots in zip(record.sections, [379, 407, 438, 403], strict=True):
        centers, radius, index = spot_geometry(sdata, section)
        places = pd.read_csv(folder / f"alignment_table_{section.name}.tsv", sep="\t").query("selected == 1")
        assert len(centers) == n_spots
        np.testing.assert_allclose(radius, 50)
        np.testing.assert_allclose(centers, places[["pixel_x", "pixel_y"]].to_numpy() * 4.22)
        assert list(index) == [f"{x}x{y}" for x, y in zip(places["x"], places["y"], strict=True)]
    assert truth.shape == (1627, 1000)
    assert set(truth.obs_names) == set(sdata.tables["stack"].obs_names)


def test_bulb_measures_only_what_was_requested(bulb, folder):
    sdata, truth = bulb
    table = sdata.tables["stack"]
    assert (table.obs["measured"] == (table.obs["section"] == "MOB2")).all()
    assert table.n_vars == 250
    raw = pd.read_csv(folder / "MOB2.tsv.gz", sep="\t", index_col=0)
    rows = table.obs["instance_id"][table.obs["measured"]].astype(str)
    share = raw.loc[rows].to_numpy() / raw.loc[rows].sum(axis=1).to_numpy()[:, None]
    wanted = np.log1p(1e4 * share)[:, raw.columns.get_indexer(table.var_names)]
    np.testing.assert_allclose(table.layers["measured"][table.obs["measured"]], wanted, rtol=1e-5)
    np.testing.assert_allclose(
        truth[table.obs_names[table.obs["measured"]], table.var_names].X.toarray(), wanted, rtol=1e-5
    )


def test_counts_may_be_unpacked_or_packed_again(folder, tmp_path):
    places = _olfactory_bulb._read_places(folder, "MOB1")
    wanted = _olfactory_bulb._read_counts(folder, "MOB1", places)
    content = gzip.decompress((folder / "MOB1.tsv.gz").read_bytes())
    (tmp_path / "MOB1.tsv").write_bytes(content)
    plain = _olfactory_bulb._read_counts(tmp_path, "MOB1", places)
    assert (plain.X != wanted.X).nnz == 0
    (tmp_path / "MOB1.tsv").rename(tmp_path / "kept")
    (tmp_path / "MOB1.tsv.gz").write_bytes(gzip.compress(content, compresslevel=1))  # other bytes, same counts
    packed = _olfactory_bulb._read_counts(tmp_path, "MOB1", places)
    assert (packed.X != wanted.X).nnz == 0
    (tmp_path / "MOB1.tsv.gz").write_bytes(gzip.compress(content[:-2] + b"9\n"))
    with pytest.raises(ValueError, match=r"MOB1\.tsv\.gz' is not the published file"):
        _olfactory_bulb._read_counts(tmp_path, "MOB1", places)


def test_a_missing_file_is_requested_by_address_hash_and_place(folder, tmp_path, monkeypatch):
    from requests.exceptions import ConnectionError as NoConnection

    def refuse(*args, **kwargs):
        msg = "no network"
        raise NoConnection(msg)

    monkeypatch.setattr("requests.get", refuse)
    monkeypatch.setattr("pooch.core.time.sleep", lambda seconds: None)
    for name in SECTIONS:
        shutil.copyfile(folder / f"alignment_table_{name}.tsv", tmp_path / f"alignment_table_{name}.tsv")
    with pytest.raises(ConnectionError, match=r"STUtility/.*/MOB2\.tsv could not be downloaded") as caught:
        si.datasets.olfactory_bulb(data_dir=tmp_path)
    assert str(tmp_path / "MOB2.tsv") in str(caught.value)
    assert _olfactory_bulb.SHA256["MOB2.tsv"] in str(caught.value)


def test_a_file_that_differs_is_not_used(folder, tmp_path, monkeypatch):
    """Its bytes are compared before it is read; in the cache it is replaced, and in a folder of the user it is kept."""
    cache, own = tmp_path / "mob_st4", tmp_path / "own"
    for place in (cache, own):
        place.mkdir()
        shutil.copyfile(folder / "alignment_table_MOB2.tsv", place / "alignment_table_MOB1.tsv")
    monkeypatch.setattr(si.settings, "_data_dir", tmp_path)
    asked = []

    def download(url, output_file, pooch):
        asked.append(url)
        shutil.copyfile(folder / "alignment_table_MOB1.tsv", output_file)

    monkeypatch.setattr("pooch.core.choose_downloader", lambda *args, **kwargs: download)
    places = _olfactory_bulb._read_places(cache, "MOB1")
    assert len(places) == 379
    assert len(asked) == 1
    before = (own / "alignment_table_MOB1.tsv").read_bytes()
    with pytest.raises(ValueError, match="is not the published file"):
        _olfactory_bulb._read_places(own, "MOB1")
    assert (own / "alignment_table_MOB1.tsv").read_bytes() == before
    (own / "MOB1.tsv.gz").write_bytes(b"half a download")
    with pytest.raises(ValueError, match="cannot be unpacked"):
        _olfactory_bulb._read_counts(own, "MOB1", places)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"measured": []}, ValueError, "`measured` is empty"),
        ({"measured": ["MOB5"]}, KeyError, "'MOB5' not found in `sections of the olfactory bulb`"),
    ],
)
def test_bulb_rejects_impossible_arguments(options, error, message, monkeypatch):
    monkeypatch.setattr(_olfactory_bulb, "_file", lambda *_: pytest.fail("read"))
    with pytest.raises(error, match=message):
        si.datasets.olfactory_bulb(**options)
