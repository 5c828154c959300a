"""Registered slides as files for other programs."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import tifffile

import spatial_impute as si
from spatial_impute._image import tiff

TURN = np.array([[0.0, -1.0, 1400.0], [1.0, 0.0, 30.0], [0.0, 0.0, 1.0]])  # a quarter, um


@pytest.fixture(scope="module")
def placed():
    """Stack with known places."""
    sdata = si.datasets.synthetic_stack(extent=1400.0)
    si.tl.register_stack(sdata, transformations={"s0": TURN, "s2": "aligned"}, show_progress_bar=False)
    return sdata


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Several strips, tiles and levels of a small image."""
    monkeypatch.setattr(tiff, "TILE", 128)
    monkeypatch.setattr(tiff, "_SMALLEST", 100)
    monkeypatch.setattr("spatial_impute.tl._export.TILE", 128)


def test_every_level_shows_what_warp_element_shows(placed, tmp_path):
    si.tl.write_ome_tiff(placed, "s0_image", tmp_path / "s0.ome.tif", canvas="section", compression="deflate")
    whole = np.moveaxis(np.asarray(si.tl.warp_element(placed, "s0_image", inplace=False)), 0, -1)
    with tifffile.TiffFile(tmp_path / "s0.ome.tif") as file:
        levels = [level.asarray() for level in file.series[0].levels]
        assert file.pages[0].is_tiled
    assert len(levels) > 2
    assert max(levels[-1].shape) <= 100
    np.testing.assert_array_equal(levels[0], whole)
    for k, level in enumerate(levels):
        factor = 2**k
        height, width = (n // factor for n in whole.shape[:2])
        means = whole[: height * factor, : width * factor].reshape(height, factor, width, factor, 3).mean((1, 3))
        error = np.abs(level[:height, :width].astype(float) - means)
        assert np.median(error) < 6  # a level of the source that is as coarse is read between its pixels


def test_files_of_a_stack_have_the_pixels_of_the_reference(placed, tmp_path):
    from spatial_impute._stack.elements import element_affine

    for name in ("s0", "s1"):
        si.tl.write_ome_tiff(placed, f"{name}_image", tmp_path / f"{name}.ome.tif", compression="deflate")
    images = [tifffile.imread(tmp_path / f"{name}.ome.tif") for name in ("s0", "s1")]
    own = np.moveaxis(np.asarray(placed.images["s1_image"].data), 0, -1)
    np.testing.assert_array_equal(images[1], own)  # the reference is not resampled
    # A quarter turn of pixels of the same size, up to 30 um along y.
    turned = np.rot90(np.moveaxis(np.asarray(placed.images["s0_image"].data), 0, -1), -1)
    mpp = element_affine(placed.images["s1_image"], "s1")[0, 0]
    shift = 30 / mpp
    assert images[0].shape == images[1].shape
    assert shift == pytest.approx(round(shift), abs=0.51)
    down = round(shift)
    difference = np.abs(images[0][down:].astype(int) - turned[: len(turned) - down])
    assert np.median(difference) <= 12


def test_files_lie_over_annotations_of_a_turned_reference(tmp_path):
    from spatialdata.transformations import Affine, get_transformation, set_transformation

    sdata = si.datasets.synthetic_stack(extent=1400.0)
    own = get_transformation(sdata.images["s1_image"], "s1").to_affine_matrix(("x", "y"), ("x", "y"))
    turned = Affine(TURN @ own, input_axes=("x", "y"), output_axes=("x", "y"))
    set_transformation(sdata.images["s1_image"], turned, "s1")
    si.tl.register_stack(sdata, transformations=dict.fromkeys(["s0", "s2"], "aligned"), show_progress_bar=False)
    pixels = np.moveaxis(np.asarray(sdata.images["s1_image"].data), 0, -1)
    si.tl.write_ome_tiff(sdata, "s1_image", tmp_path / "s1.ome.tif", compression="deflate")
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "s1.ome.tif"), pixels)
    si.tl.write_ome_tiff(sdata, "s1_image", tmp_path / "half.ome.tif", compression="deflate", pixel_size=2 * own[0, 0])
    assert tifffile.imread(tmp_path / "half.ome.tif").shape[:2] == tuple(-(-n // 2) for n in pixels.shape[:2])


def test_metadata_are_read_by_this_package(placed, tmp_path):
    path = tmp_path / "s0.ome.tif"
    si.tl.write_ome_tiff(placed, "s0_image", path, canvas="section", pixel_size=4.0)
    again = si.pp.assemble_stack({"a": path}, section_spacing=1.0)
    section = again.attrs["spatial_impute"]["stack"]["sections"][0]
    assert section["mpp"] == pytest.approx(4.0)
    with tifffile.TiffFile(path) as file:
        plane = tifffile.xml2dict(file.ome_metadata)["OME"]["Image"]["Pixels"]["Plane"]
        assert file.pages[0].compression == tifffile.COMPRESSION.JPEG
    low = si.tl.warp_element(placed, "s0_image", pixel_size=4.0, inplace=False)
    from spatial_impute._stack.elements import element_affine

    np.testing.assert_allclose([plane["PositionX"], plane["PositionY"]], element_affine(low, "aligned")[:2, 2])


def test_labels_keep_their_numbers(placed, tmp_path):
    sdata = copy.copy(placed)
    si.pp.segment_tissue(sdata, sections="s0")
    si.tl.write_ome_tiff(sdata, "s0_tissue", tmp_path / "t.ome.tif", canvas="section")
    found = tifffile.imread(tmp_path / "t.ome.tif")
    expected = np.asarray(si.tl.warp_element(sdata, "s0_tissue", inplace=False))
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match="JPEG holds images of 8 bits"):
        si.tl.write_ome_tiff(sdata, "s0_tissue", tmp_path / "j.ome.tif", compression="jpeg")


def test_a_broken_run_leaves_the_old_file(placed, tmp_path, monkeypatch):
    path = tmp_path / "s0.ome.tif"
    path.write_bytes(b"old")

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("spatial_impute.tl._export.resampled", stop)
    with pytest.raises(KeyboardInterrupt):
        si.tl.write_ome_tiff(placed, "s0_image", path, overwrite=True)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["s0.ome.tif"]


def test_a_file_is_replaced_on_demand_only(placed, tmp_path):
    path = tmp_path / "s0.ome.tif"
    path.write_bytes(b"the raw scan")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        si.tl.write_ome_tiff(placed, "s0_image", path)
    assert path.read_bytes() == b"the raw scan"
    si.tl.write_ome_tiff(placed, "s0_image", path, overwrite=True)
    assert tifffile.imread(path).ndim == 3


def test_dyes_are_channels_and_keep_their_names(placed, tmp_path):
    from spatialdata.models import Image2DModel
    from spatialdata.transformations import get_transformation

    sdata, place = copy.copy(placed), get_transformation(placed.images["s1_image"], "s1")
    pixels = np.random.default_rng(0).integers(0, 2**12, (4, *placed.images["s1_image"].shape[1:])).astype(np.uint16)
    names = ["DAPI", "CD3", "CD8", "PanCK"]
    for key, c_coords in (("dyes", names), ("unnamed", None)):
        sdata.images[key] = Image2DModel.parse(
            pixels, dims=("c", "y", "x"), c_coords=c_coords, transformations={"s1": place}
        )
        try:
            si.tl.write_ome_tiff(sdata, key, tmp_path / f"{key}.ome.tif")
        finally:
            del sdata.images[key]
        with tifffile.TiffFile(tmp_path / f"{key}.ome.tif") as file:
            series = file.series[0]
            np.testing.assert_array_equal(series.asarray(), pixels)
            assert series.axes == "CYX"
            assert len(series.levels) > 2
            assert series.levels[1].shape == (4, *(-(-n // 2) for n in pixels.shape[1:]))
            # A mean of four pixels of the same channel.
            small = series.levels[1].asarray()[:, :100, :100].astype(float)
            means = pixels[:, :200, :200].reshape(4, 100, 2, 100, 2).mean((2, 4))
            assert np.abs(small - means).max() <= 1
            channels = tifffile.xml2dict(file.ome_metadata)["OME"]["Image"]["Pixels"]["Channel"]
        assert [str(channel["Name"]) for channel in channels] == (c_coords or ["0", "1", "2", "3"])


@pytest.mark.parametrize(("dtype", "written"), [("int64", "int32"), ("bool", "uint8")])
def test_labels_of_types_that_ome_does_not_have(placed, tmp_path, dtype, written):
    from spatialdata.models import Labels2DModel
    from spatialdata.transformations import get_transformation

    sdata, place = copy.copy(placed), get_transformation(placed.images["s1_image"], "s1")
    values = (np.indices(placed.images["s1_image"].shape[1:]).sum(0) // 50 % 2).astype(dtype)
    sdata.labels["mine"] = Labels2DModel.parse(values, dims=("y", "x"), transformations={"s1": place})
    try:
        si.tl.write_ome_tiff(sdata, "mine", tmp_path / "mine.ome.tif")
    finally:
        del sdata.labels["mine"]
    found = tifffile.imread(tmp_path / "mine.ome.tif")
    assert found.dtype == written
    np.testing.assert_array_equal(found, values)


def test_a_section_without_its_reference(placed, tmp_path):
    alone = placed.filter_by_coordinate_system("s0")
    with pytest.raises(KeyError, match="pass `canvas='section'`"):
        si.tl.write_ome_tiff(alone, "s0_image", tmp_path / "s0.ome.tif")
    si.tl.write_ome_tiff(alone, "s0_image", tmp_path / "s0.ome.tif", canvas="section", compression="deflate")
    si.tl.write_ome_tiff(placed, "s0_image", tmp_path / "all.ome.tif", canvas="section", compression="deflate")
    expected = tifffile.imread(tmp_path / "all.ome.tif")
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "s0.ome.tif"), expected)


@pytest.mark.parametrize(
    ("path", "error", "match"),
    [
        ("s0.tif", ValueError, "must end in .ome.tif"),
        ("no/s0.ome.tif", FileNotFoundError, "folder"),
        ("folder.ome.tif", ValueError, "is a folder"),
    ],
)
def test_wrong_paths(placed, tmp_path, path, error, match):
    (tmp_path / "folder.ome.tif").mkdir()
    with pytest.raises(error, match=match):
        si.tl.write_ome_tiff(placed, "s0_image", tmp_path / path)
