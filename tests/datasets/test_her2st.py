from __future__ import annotations

import gzip
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pandas as pd
import pytest

import spatial_impute as si
from spatial_impute._image import reading
from spatial_impute._stack.elements import section_levels, spot_geometry
from spatial_impute._stack.record import load_record
from spatial_impute.datasets import _her2st

SECTIONS = ["C2", "C3", "C4", "C5", "C6"]


@pytest.fixture(scope="module")
def her2st(data_dir):
    """Stack with C4 measured, and the truth; never written to."""
    return si.datasets.her2st("C", measured=["C4"], truth=True)


def raw_counts(data_dir, name: str) -> pd.DataFrame:
    with gzip.open(data_dir / "her2st" / "ST-cnts" / f"{name}.tsv.gz", "rt") as file:
        return pd.read_csv(file, sep="\t", index_col=0)


def selection(data_dir, name: str) -> pd.DataFrame:
    spots = pd.read_csv(data_dir / "her2st" / "ST-spotfiles" / f"{name}_selection.tsv", sep="\t")
    spots.index = spots["x"].astype(str) + "x" + spots["y"].astype(str)
    return spots


def test_her2st_is_a_stack_in_um(her2st, data_dir):
    sdata, _ = her2st
    record = load_record(sdata)
    assert list(record.names) == SECTIONS
    assert record.reference == "C4"
    assert [section.mpp for section in record.sections] == pytest.approx([0.688] * 5)
    assert np.diff([section.z for section in record.sections]) == pytest.approx([16.0] * 4)
    for section in record.sections:
        centers, radius, index = spot_geometry(sdata, section)
        np.testing.assert_allclose(radius, 50.0)
        spots = selection(data_dir, section.name)
        assert list(index) == list(spots.index)
        np.testing.assert_allclose(centers, spots[["pixel_x", "pixel_y"]].to_numpy() * 0.688)
        # The array's pitch is 200 um, in x and in y.
        for axis, column in (("new_x", 0), ("new_y", 1)):
            slope = np.polyfit(spots[axis], centers[:, column], 1)[0]
            assert slope == pytest.approx(200, rel=0.02)


def test_her2st_spots_lie_on_their_images(her2st):
    sdata, _ = her2st
    for section in load_record(sdata).sections:
        level = section_levels(sdata, section)[0]
        centers, radius, _ = spot_geometry(sdata, section)
        width, height = np.array(level.shape[::-1]) * 0.688
        assert (centers > radius[:, None]).all()
        assert (centers < [width, height] - radius[:, None]).all()


def test_her2st_images_are_lazy_pyramids(her2st, monkeypatch):
    sdata, _ = her2st
    assert [level.pixel_size for level in section_levels(sdata, load_record(sdata)["C4"])] == pytest.approx(
        [0.688, 1.376, 2.752, 5.504]
    )
    decode, decoded = reading._decode_plain, []

    def recorded(path, fraction, modified):
        decoded.append((path, fraction))
        return decode(path, fraction, modified)

    monkeypatch.setattr(reading, "_decode_plain", recorded)
    again = si.datasets.her2st("C", n_top_genes=None)
    coarse = again.images["C4_image"]["scale3"]["image"]
    assert 1100 < coarse.shape[1] < 1300
    # Only the measured section is looked at, to see that its spots lie on tissue, and at its coarsest resolution.
    assert all("C4" in path and fraction == 8 for path, fraction in decoded)
    coarse.data.compute(scheduler="synchronous")
    assert decoded


def test_her2st_thumbnail_shows_the_section(her2st):
    from spatial_impute._image.levels import read_thumbnail

    sdata, _ = her2st
    rgb, to_um = read_thumbnail(section_levels(sdata, load_record(sdata)["C3"]), 20.0)
    assert to_um[0, 0] == pytest.approx(16.5, abs=0.1)
    assert rgb.std() > 10
    assert rgb.max() > 200


def test_her2st_measures_only_what_was_requested(her2st, data_dir):
    sdata, _ = her2st
    assert set(sdata.tables) == {"C4_counts", "stack"}
    table = sdata.tables["stack"]
    counted = raw_counts(data_dir, "C4").index
    expected = table.obs["instance_id"].isin(counted) & (table.obs["section"] == "C4")
    np.testing.assert_array_equal(table.obs["measured"], expected)
    # Some spots of every selection have no row of counts.
    n_without = (table.obs["section"] == "C4").sum() - table.obs["measured"].sum()
    assert 1 <= n_without <= 4
    np.testing.assert_array_equal(np.isfinite(table.layers["measured"]).all(axis=1), table.obs["measured"])
    np.testing.assert_array_equal(np.isnan(table.layers["measured"]).all(axis=1), ~table.obs["measured"])
    assert sdata.tables["C4_counts"].n_obs == len(counted)
    assert set(table.layers) == {"measured"}
    assert "C2" not in str(sdata.tables["C4_counts"].obs.to_numpy().tolist())


def test_her2st_normalises_over_all_genes(her2st, data_dir):
    sdata, _ = her2st
    counts = raw_counts(data_dir, "C4")
    values = np.log1p(1e4 * counts.div(counts.sum(axis=1), axis=0))
    top = values.mean(axis=0).sort_values(ascending=False, kind="stable").index[:250]
    table = sdata.tables["stack"]
    assert set(table.var_names) == set(top)
    measured = table[table.obs["measured"].to_numpy()].to_df("measured")
    expected = values.loc[[name.removeprefix("C4_") for name in measured.index], measured.columns]
    np.testing.assert_allclose(measured, expected, rtol=1e-4)


def test_her2st_truth_is_aligned_to_the_stack(her2st, data_dir):
    sdata, truth = her2st
    table = sdata.tables["stack"]
    assert truth.obs_names.is_unique
    assert table.obs_names.is_unique
    for name in ("C2", "C6"):
        counts = raw_counts(data_dir, name)
        rows = truth[truth.obs["section"] == name]
        assert set(rows.obs_names) == {f"{name}_{spot}" for spot in counts.index}
        shared = table.obs_names.intersection(rows.obs_names)
        n_spots = (table.obs["section"] == name).sum()
        assert n_spots - 4 <= len(shared) <= n_spots
        some = shared[[0, 50, -1]]
        found = truth[some, table.var_names].layers["counts"].toarray()
        spots = [label.removeprefix(f"{name}_") for label in some]
        expected = counts.reindex(columns=table.var_names, fill_value=0).loc[spots].to_numpy()
        np.testing.assert_array_equal(found, expected)
        log = np.log1p(1e4 * expected / counts.loc[spots].sum(axis=1).to_numpy()[:, None])
        np.testing.assert_allclose(truth[some, table.var_names].X.toarray(), log, rtol=1e-4)


def test_her2st_unmeasured_counts_are_not_even_read(data_dir, monkeypatch):
    read = []
    original = _her2st.read_counts
    monkeypatch.setattr(_her2st, "read_counts", lambda path: read.append(path.name) or original(path))
    sdata = si.datasets.her2st("C", measured="C5", n_top_genes=None)
    assert read == ["C5.tsv.gz"]
    assert load_record(sdata).reference == "C5"
    assert "measured" not in sdata.tables["stack"].layers


def test_her2st_survives_disk_without_pixels(her2st, tmp_path):
    import json

    sdata, _ = her2st
    json.dumps(sdata.attrs)
    sdata.tables["stack"].copy().write_h5ad(tmp_path / "t.h5ad")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"patient": "Z"}, ValueError, r"`patient` must be one of \['A', 'B', .*, 'H'\], found 'Z'"),
        (
            {"patient": "A"},
            ValueError,
            r"images of patient 'A' are not downloaded, only those of \['C'\]. Pass `images=False`, or the folder",
        ),
        ({"patient": "A", "images": "nowhere"}, FileNotFoundError, "'nowhere' has no image of patient 'A': .*A/A1"),
        ({"patient": "A", "measured": ["A7"], "images": False}, KeyError, "'A7' not found in .*'A6'"),
        ({"measured": []}, ValueError, "`measured` is empty"),
        ({"measured": ["C1"]}, KeyError, r"'C1' not found in .*available: \['C2', 'C3', 'C4', 'C5', 'C6'\]"),
        ({"section_spacing": -1}, ValueError, "`section_spacing` must be a positive number"),
    ],
)
def test_her2st_rejects_impossible_arguments(options, error, message, tmp_path, monkeypatch):
    monkeypatch.setattr(si.settings, "_data_dir", tmp_path)  # nothing may be fetched before the check
    monkeypatch.setattr(_her2st, "_fetch_section", lambda *_: pytest.fail("fetched"))
    with pytest.raises(error, match=message):
        si.datasets.her2st(**options)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Local stand-in for the download: yields the folder it serves."""
    served = tmp_path / "served"
    served.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(served)))
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(_her2st, "_BASE_URL", f"http://127.0.0.1:{http.server_port}/")
    monkeypatch.setattr(si.settings, "_data_dir", tmp_path / "cache")
    monkeypatch.setattr("pooch.core.time.sleep", lambda _: None)
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    yield served
    http.shutdown()
    http.server_close()
    thread.join()


def serve(data_dir, served, files) -> None:
    for file in files:
        (served / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(data_dir / "her2st" / file, served / file)


IMAGE = "ST-imgs/C/C4/5714_HE_BT_D2.jpg"
FILES = [IMAGE, "ST-cnts/C4.tsv.gz", "ST-spotfiles/C4_selection.tsv"]


def test_her2st_downloads_into_the_cache(data_dir, server, tmp_path):
    serve(data_dir, server, FILES)
    found = _her2st._fetch_section("C4", IMAGE)
    assert {kind: path.relative_to(tmp_path / "cache").as_posix() for kind, path in found.items()} == {
        "image": f"her2st/{IMAGE}",
        "counts": "her2st/ST-cnts/C4.tsv.gz",
        "spots": "her2st/ST-spotfiles/C4_selection.tsv",
    }
    assert found["spots"].read_bytes() == (data_dir / "her2st" / FILES[2]).read_bytes()
    for file in FILES:  # a second time, nothing is there to download any more
        (server / file).unlink()
    assert _her2st._fetch_section("C4", IMAGE) == found


def test_her2st_refuses_a_tampered_download(data_dir, server, tmp_path):
    serve(data_dir, server, FILES)
    with (server / FILES[2]).open("ab") as file:
        file.write(b"\n")
    with pytest.raises(ValueError, match=r"(?i)hash"):
        _her2st._fetch_section("C4", IMAGE)
    assert not (tmp_path / "cache" / "her2st" / FILES[2]).exists()


def test_her2st_replaces_a_tampered_file_of_the_cache(data_dir, server, tmp_path):
    serve(data_dir, server, FILES)
    spoiled = tmp_path / "cache" / "her2st" / FILES[2]
    spoiled.parent.mkdir(parents=True)
    spoiled.write_text("x\ty\n")
    found = _her2st._fetch_section("C4", IMAGE)
    assert found["spots"].read_bytes() == (data_dir / "her2st" / FILES[2]).read_bytes()


def test_her2st_every_file_has_a_checksum():
    files = set(_her2st._IMAGES["C"].values())
    sections = [f"{patient}{k + 1}" for patient, n in _her2st._N_SECTIONS.items() for k in range(n)]
    assert len(sections) == 36
    files |= {f"ST-cnts/{name}.tsv.gz" for name in sections}
    files |= {f"ST-spotfiles/{name}_selection.tsv" for name in sections}
    assert set(_her2st.SHA256) == files
    assert all(len(value) == 64 for value in _her2st.SHA256.values())
    assert _her2st._BASE_URL.startswith("https://")


def test_her2st_without_images_has_the_places_of_the_array(data_dir):
    sdata, truth = si.datasets.her2st("H", images=False, n_top_genes=20, truth=True)
    record = load_record(sdata)
    assert list(record.names) == ["H1", "H2", "H3"]
    assert record.reference == "H1"
    table = sdata.tables["stack"]
    assert set(truth.obs["section"]) == {"H1", "H2", "H3"}
    for section in record.sections:
        centers, radius, index = spot_geometry(sdata, section)
        spots = selection(data_dir, section.name)
        assert list(index) == list(spots.index)
        np.testing.assert_allclose(radius, 50.0)
        np.testing.assert_allclose(np.ptp(centers, axis=0), 200 * np.ptp(spots[["new_x", "new_y"]], axis=0))
        image = np.asarray(sdata.images[section.image].data)
        drawn = image[:, (centers[:, 1] / 8).astype(int), (centers[:, 0] / 8).astype(int)]
        np.testing.assert_array_equal(drawn, np.tile([[190], [120], [170]], len(centers)))
        assert (image[:, :50] == 240).all()
    np.testing.assert_array_equal(table.obs["measured"], table.obs["section"] == "H1")


def test_her2st_takes_images_that_the_user_has(data_dir, tmp_path):
    """The pixel size is that of the array; a section without an image is left out."""
    from PIL import Image

    for name in ("H1", "H3"):
        (tmp_path / "H" / name).mkdir(parents=True)
        end = ".jpg" if name == "H1" else ".JPG"
        Image.new("RGB", (10000, 10000), "white").save(tmp_path / "H" / name / f"{name}{end}", "JPEG")
    sdata = si.datasets.her2st("H", images=tmp_path, n_top_genes=None)
    record = load_record(sdata)
    assert list(record.names) == ["H1", "H3"]
    assert [section.z for section in record.sections] == [0.0, 32.0]  # H2 lies between them
    assert record["H1"].counts is not None
    assert record["H3"].counts is None
    for section in record.sections:
        assert section.mpp == pytest.approx(0.688, rel=0.01)
        centers, radius, _ = spot_geometry(sdata, section)
        spots = selection(data_dir, section.name)
        np.testing.assert_allclose(radius, 50.0)
        np.testing.assert_allclose(centers, spots[["pixel_x", "pixel_y"]].to_numpy() * section.mpp)
        for axis, column in (("new_x", 0), ("new_y", 1)):
            assert np.polyfit(spots[axis], centers[:, column], 1)[0] == pytest.approx(200, rel=0.01)
    assert _her2st._mpp_of_array(selection(data_dir, "A1")) == pytest.approx(0.917, rel=0.01)


def test_her2st_refuses_images_that_are_not_the_published_ones(data_dir, tmp_path):
    """Places of spots are pixels of the full-resolution image."""
    from PIL import Image

    (tmp_path / "H" / "H1").mkdir(parents=True)
    Image.new("RGB", (920, 920), "white").save(tmp_path / "H" / "H1" / "b.jpg")
    with pytest.raises(ValueError, match="has 920 x 920 pixels"):
        si.datasets.her2st("H", images=tmp_path)
    Image.new("RGB", (92, 92), "white").save(tmp_path / "H" / "H1" / "a_thumbnail.jpg")
    with pytest.raises(ValueError, match=r"must hold one image, found \['a_thumbnail.jpg', 'b.jpg'\]"):
        si.datasets.her2st("H", images=tmp_path)
    with pytest.raises(TypeError, match="`images` must be True, False or the path"):
        si.datasets.her2st("H", images=None)
