from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict
from types import SimpleNamespace

import dask.array as da
import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
import tifffile
import xarray as xr
import zarr
from anndata import AnnData, concat, read_h5ad
from scipy import sparse
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Affine, Identity, Scale, get_transformation

import spatial_impute as si
from spatial_impute._settings import logger
from spatial_impute._stack.record import load_record

CENTERS = np.array([[20.0, 30.0], [40.0, 30.0], [60.0, 30.0], [20.0, 50.0]])


def image(height: int = 60, width: int = 80, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def visium_like(
    *, system: str = "global", ids=("a-1", "b-1", "c-1", "d-1"), with_table: bool = True, seed: int = 0
) -> SpatialData:
    """What a reader returns: everything in pixels of the full resolution; image at half of it."""
    element = Image2DModel.parse(
        np.moveaxis(image(seed=seed), -1, 0),
        dims=("c", "y", "x"),
        transformations={system: Scale([2, 2], axes=("x", "y"))},
    )
    circles = gpd.GeoDataFrame(
        {"radius": np.full(len(ids), 5.0)}, geometry=gpd.points_from_xy(*CENTERS[: len(ids)].T), index=pd.Index(ids)
    )
    sdata = SpatialData(
        images={"hires": element}, shapes={"spots": ShapesModel.parse(circles, transformations={system: Identity()})}
    )
    if with_table:
        counts = AnnData(
            X=sparse.csr_matrix(np.arange(1.0, 1 + 3 * (len(ids) - 1)).reshape(-1, 3)),
            obs=pd.DataFrame(
                {"region": pd.Categorical(["spots"] * (len(ids) - 1)), "id": list(ids[:-1])}, index=ids[:-1]
            ),
            var=pd.DataFrame(index=["g0", "g1", "g2"]),
        )
        sdata.tables["table"] = TableModel.parse(counts, region="spots", region_key="region", instance_key="id")
    return sdata


def pixels_of(element) -> np.ndarray:
    return np.asarray(element.data)


def to_um(element, section: str) -> np.ndarray:
    return get_transformation(element, section).to_affine_matrix(("x", "y"), ("x", "y"))


@pytest.mark.parametrize("kind", ["yxc", "cyx", "yx", "dask", "dataarray", "datatree", "model"])
def test_assemble_stack_takes_images_of_any_form(kind):
    array = image()
    channels_first = np.moveaxis(array, -1, 0)
    given = {
        "yxc": array,
        "cyx": channels_first,
        "yx": array[..., 0],
        "dask": da.from_array(array, chunks=20),
        "dataarray": xr.DataArray(array, dims=("y", "x", "c")),
        "datatree": Image2DModel.parse(channels_first, dims=("c", "y", "x"), scale_factors=[2]),
        "model": Image2DModel.parse(channels_first, dims=("c", "y", "x")),
    }[kind]
    sdata = si.pp.assemble_stack({"s": given}, mpp=0.5, z=[0])
    element = sdata.images["s_image"]
    if kind == "datatree":
        assert len(element.children) == 2
        element = element["scale0"]["image"]
    expected = channels_first[:1] if kind == "yx" else channels_first
    np.testing.assert_array_equal(pixels_of(element), expected)
    np.testing.assert_allclose(to_um(sdata.images["s_image"], "s"), np.diag([0.5, 0.5, 1]))


def test_assemble_stack_makes_a_coordinate_system_per_section():
    sdata = si.pp.assemble_stack({"top": image(), "low": image(seed=1)}, mpp={"top": 0.5, "low": 2.0}, z=[0, 5])
    assert set(sdata.coordinate_systems) == {"top", "low"}
    only = sdata.filter_by_coordinate_system("low")
    assert set(only.images) == {"low_image"}
    record = load_record(sdata)
    assert record.names == ("top", "low")
    assert [s.mpp for s in record.sections] == [0.5, 2.0]
    assert {s.mpp_source for s in record.sections} == {"argument"}


def test_assemble_stack_keeps_the_order_of_pairs():
    sdata = si.pp.assemble_stack([("b", image()), ("a", image(seed=1))], mpp=1.0, section_spacing=8)
    assert load_record(sdata).names == ("b", "a")


def test_assemble_stack_leaves_images_lazy():
    def explode(block):
        pytest.fail("read")

    lazy = da.zeros((3, 64, 64), dtype=np.uint8, chunks=32).map_blocks(
        explode, dtype=np.uint8, meta=np.empty((0, 0, 0))
    )
    sdata = si.pp.assemble_stack({"s": lazy}, mpp=1.0, z=[0])
    with pytest.raises(pytest.fail.Exception, match="read"):
        sdata.images["s_image"].data.compute()


def test_assemble_stack_reads_files_and_their_pixel_size(tmp_path):
    metadata = {"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeXUnit": "µm"}
    tifffile.imwrite(tmp_path / "a.ome.tif", image(), photometric="rgb", metadata=metadata)
    sdata = si.pp.assemble_stack({"a": tmp_path / "a.ome.tif", "b": image(seed=1)}, mpp={"b": 1.0}, section_spacing=10)
    record = load_record(sdata)
    assert (record["a"].mpp, record["a"].mpp_source) == (0.25, "metadata")
    np.testing.assert_allclose(to_um(sdata.images["a_image"], "a"), np.diag([0.25, 0.25, 1]))
    np.testing.assert_array_equal(pixels_of(sdata.images["a_image"]), np.moveaxis(image(), -1, 0))


def test_assemble_stack_argument_beats_metadata(tmp_path):
    metadata = {"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeXUnit": "µm"}
    tifffile.imwrite(tmp_path / "a.ome.tif", image(), photometric="rgb", metadata=metadata)
    record = load_record(si.pp.assemble_stack({"a": str(tmp_path / "a.ome.tif")}, mpp=0.4, z=[0]))
    assert (record["a"].mpp, record["a"].mpp_source) == (0.4, "argument")


@pytest.mark.parametrize(("given", "says"), [(0.4, True), (0.251, False)])
def test_assemble_stack_says_when_argument_and_metadata_differ(tmp_path, caplog, monkeypatch, given, says):
    monkeypatch.setattr(logger, "propagate", True)
    metadata = {"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeXUnit": "µm"}
    tifffile.imwrite(tmp_path / "a.ome.tif", image(), photometric="rgb", metadata=metadata)
    si.pp.assemble_stack({"a": tmp_path / "a.ome.tif"}, mpp=given, z=[0])
    assert ("`mpp=0.4` differs from 0.25 in its file" in caplog.text) == says


def test_assemble_stack_keeps_oblong_pixels(tmp_path):
    metadata = {"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.36}
    tifffile.imwrite(tmp_path / "a.ome.tif", image(), photometric="rgb", metadata=metadata)
    sdata = si.pp.assemble_stack({"a": tmp_path / "a.ome.tif"}, z=[0])
    np.testing.assert_allclose(to_um(sdata.images["a_image"], "a"), np.diag([0.25, 0.36, 1]))
    assert load_record(sdata)["a"].mpp == pytest.approx(0.3)


@pytest.mark.parametrize("mpp", [None, {"other": 0.5, "s": None}])
def test_assemble_stack_never_guesses_the_pixel_size(mpp, tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", image(), photometric="rgb")
    for given in (image(), tmp_path / "a.tif"):
        with pytest.raises(ValueError, match=r"Pixel size of section 's' is unknown.*`mpp=`"):
            si.pp.assemble_stack({"s": given}, mpp=None if mpp is None else {"s": None}, z=[0])
    with pytest.raises(ValueError, match=r"Pixel size of sections\['s'\] is unknown.*`spot_pitch=`"):
        si.pp.assemble_stack({"s": visium_like()}, z=[0])


@pytest.mark.parametrize("mpp", [0, -1.0, np.nan, "wide"])
def test_assemble_stack_rejects_impossible_pixel_sizes(mpp):
    with pytest.raises(ValueError, match="`mpp of section 's'` must be a positive number"):
        si.pp.assemble_stack({"s": image()}, mpp=mpp, z=[0])


@pytest.mark.parametrize("argument", ["mpp", "image_key", "coordinate_system"])
def test_assemble_stack_rejects_unknown_sections_in_mappings(argument):
    """A mistyped name must not leave its section with what is found otherwise."""
    options = {"mpp": 0.5} | {argument: {"s": {"mpp": 0.5, "image_key": "hires"}.get(argument, "global"), "S1": 1.0}}
    with pytest.raises((KeyError, ValueError), match="S1"):
        si.pp.assemble_stack({"s": visium_like()}, z=[0], **options)


def test_assemble_stack_refuses_an_empty_mapping():
    with pytest.raises(ValueError, match="`sections` is empty"):
        si.pp.assemble_stack({}, mpp=1, z=[])


@pytest.mark.parametrize("name", ["", "a/b", "..", ".a", "_a", "a b", "a*", 3, None, "é" * 2])
def test_assemble_stack_refuses_illegal_names(name):
    with pytest.raises(ValueError, match="Section names are letters, digits") as error:
        si.pp.assemble_stack([(name, image())], mpp=1, z=[0])
    legal = str(error.value).split("Use '")[1].split("'")[0]
    assert f"{legal}_image" in si.pp.assemble_stack([(legal, image())], mpp=1, z=[0]).images


def test_assemble_stack_refuses_the_name_of_the_common_frame():
    with pytest.raises(ValueError, match="aligned"):
        si.pp.assemble_stack({"aligned": image()}, mpp=1, z=[0])


@pytest.mark.parametrize("second", ["s", "S"])
def test_assemble_stack_refuses_duplicate_names(second):
    with pytest.raises(ValueError, match=f"Duplicate section name '{second}'"):
        si.pp.assemble_stack([("s", image()), (second, image(seed=1))], mpp=1, z=[0, 1])


def test_assemble_stack_refuses_the_same_input_twice(tmp_path):
    array = image()
    with pytest.raises(ValueError, match="Sections 'a' and 'b' are the same input"):
        si.pp.assemble_stack({"a": array, "b": array}, mpp=1, z=[0, 1])
    tifffile.imwrite(tmp_path / "x.tif", array, photometric="rgb")
    (tmp_path / "link.tif").symlink_to(tmp_path / "x.tif")
    with pytest.raises(ValueError, match="are the same input"):
        si.pp.assemble_stack({"a": tmp_path / "x.tif", "b": str(tmp_path / "link.tif")}, mpp=1, z=[0, 1])


def two_sections() -> SpatialData:
    """One object with two sections, each in a coordinate system of its own, and one table for both."""
    a, b = visium_like(system="first"), visium_like(system="second", ids=("x-1", "y-1", "z-1"), seed=1)
    tables = []
    for part, key in ((a, "spots_a"), (b, "spots_b")):
        table = part.tables["table"].copy()
        del table.uns["spatialdata_attrs"]
        table.obs["region"] = pd.Categorical([key] * table.n_obs)
        tables.append(table)
    both = concat(tables)
    both.obs["region"] = both.obs["region"].astype("category")
    return SpatialData(
        images={"a": a.images["hires"], "b": b.images["hires"]},
        shapes={"spots_a": a.shapes["spots"], "spots_b": b.shapes["spots"]},
        tables={"t": TableModel.parse(both, region=["spots_a", "spots_b"], region_key="region", instance_key="id")},
    )


@pytest.mark.parametrize("from_disk", [False, True])
def test_assemble_stack_takes_several_sections_out_of_one_object(tmp_path, from_disk):
    source = two_sections()
    if from_disk:
        source.write(tmp_path / "both.zarr")
        source = str(tmp_path / "both.zarr")
    systems = {"s": "first", "t": "second"}
    sdata = si.pp.assemble_stack({"s": source, "t": source}, mpp=0.5, z=[0, 10], coordinate_system=systems)
    np.testing.assert_array_equal(pixels_of(sdata.images["t_image"]), np.moveaxis(image(seed=1), -1, 0))
    table = sdata.tables["stack"]
    assert table.obs["section"].value_counts().to_dict() == {"s": 4, "t": 3}
    assert table.obs["measured"].groupby(table.obs["section"], observed=True).sum().to_dict() == {"s": 3, "t": 2}
    assert set(sdata.tables["t_counts"].obs_names) == {"x-1", "y-1"}
    with pytest.raises(ValueError, match=r"same input; .* with different `coordinate_system` or `image_key`"):
        si.pp.assemble_stack({"s": source, "t": source}, mpp=0.5, z=[0, 10], coordinate_system="first")


def test_assemble_stack_takes_ome_zarr(tmp_path):
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=2)
    group.create_array("0", data=np.moveaxis(image(), -1, 0))
    axes = [{"name": "c", "type": "channel"}] + [{"name": a, "type": "space", "unit": "micrometer"} for a in ("y", "x")]
    scale = [{"type": "scale", "scale": [1, 0.36, 0.25]}]
    group.attrs["multiscales"] = [
        {"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": scale}], "version": "0.4"}
    ]
    sdata = si.pp.assemble_stack({"a": tmp_path / "a.zarr"}, z=[0])
    np.testing.assert_allclose(to_um(sdata.images["a_image"], "a"), np.diag([0.25, 0.36, 1]))
    np.testing.assert_array_equal(pixels_of(sdata.images["a_image"]), np.moveaxis(image(), -1, 0))


def test_assemble_stack_takes_an_image_out_of_a_store(tmp_path):
    two_sections().write(tmp_path / "both.zarr")
    images = {key: tmp_path / "both.zarr" / "images" / key for key in ("a", "b")}
    sdata = si.pp.assemble_stack(images, mpp=0.5, z=[0, 10])
    np.testing.assert_array_equal(pixels_of(sdata.images["b_image"]), np.moveaxis(image(seed=1), -1, 0))
    np.testing.assert_allclose(to_um(sdata.images["b_image"], "b"), np.diag([0.5, 0.5, 1]))


@pytest.mark.parametrize(
    "given", [np.zeros((4, 5, 6, 3), np.uint8), np.zeros(5), "missing.tif", 3, np.zeros((9, 5, 6)), np.zeros((0, 5, 3))]
)
def test_assemble_stack_refuses_what_is_no_image(given):
    with pytest.raises((ValueError, FileNotFoundError), match=r"'s'|missing\.tif"):
        si.pp.assemble_stack({"s": given}, mpp=1, z=[0])


@pytest.mark.parametrize("z", [[0.0, 12.5], {"b": 12.5, "a": 0.0}, (0, 12.5), np.array([0, 12.5])])
def test_assemble_stack_takes_heights(z):
    record = load_record(si.pp.assemble_stack({"a": image(), "b": image(seed=1)}, mpp=1, z=z))
    assert [section.z for section in record.sections] == [0.0, 12.5]


def test_assemble_stack_takes_section_spacing():
    sections = {f"s{i}": image(seed=i) for i in range(3)}
    record = load_record(si.pp.assemble_stack(sections, mpp=1, section_spacing=7))
    assert [section.z for section in record.sections] == [0, 7, 14]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either `z`.* or `section_spacing`"),
        ({"z": [0, 1], "section_spacing": 1}, "either `z`.* or `section_spacing`"),
        ({"z": [0]}, r"one finite number per section \(2\)"),
        ({"z": [0, np.nan]}, "one finite number per section"),
        ({"section_spacing": 0}, "`section_spacing` must be a positive number"),
    ],
)
def test_assemble_stack_needs_heights(options, message):
    with pytest.raises(ValueError, match=message):
        si.pp.assemble_stack({"a": image(), "b": image(seed=1)}, mpp=1, **options)


def test_assemble_stack_needs_a_height_for_every_section():
    with pytest.raises(KeyError, match="'b' not found in `z`"):
        si.pp.assemble_stack({"a": image(), "b": image(seed=1)}, mpp=1, z={"a": 0})


def test_assemble_stack_reference_is_the_measured_then_the_middle_section():
    images = {f"s{i}": image(seed=i) for i in range(3)}
    assert load_record(si.pp.assemble_stack(images, mpp=1, section_spacing=1)).reference == "s1"
    assert load_record(si.pp.assemble_stack(images, mpp=1, section_spacing=1, reference="s0")).reference == "s0"
    mixed = images | {"s2": visium_like(seed=2)}
    assert load_record(si.pp.assemble_stack(mixed, mpp=1, section_spacing=1)).reference == "s2"
    with pytest.raises(KeyError, match=r"'s9' not found in `sections`; available: \['s0', 's1', 's2'\]"):
        si.pp.assemble_stack(images, mpp=1, section_spacing=1, reference="s9")


def test_assemble_stack_places_spots_and_image_in_um():
    sdata = si.pp.assemble_stack({"m": visium_like()}, mpp=0.5, z=[3.0])
    np.testing.assert_allclose(to_um(sdata.images["m_image"], "m"), np.diag([1.0, 1.0, 1]))
    assert load_record(sdata)["m"].mpp == pytest.approx(1.0)
    table = sdata.tables["stack"]
    np.testing.assert_allclose(table.obsm["spatial"], CENTERS * 0.5)
    circles = sd.transform(sdata.shapes["m_spots"], to_coordinate_system="m")
    np.testing.assert_allclose(circles["radius"], 2.5)
    np.testing.assert_allclose(np.column_stack([circles.geometry.x, circles.geometry.y]), CENTERS * 0.5)


def test_assemble_stack_table_has_one_row_per_spot():
    sdata = si.pp.assemble_stack({"m": visium_like(), "u": visium_like(with_table=False, seed=1)}, mpp=0.5, z=[3, 9])
    table = sdata.tables["stack"]
    assert table.X is None
    assert list(table.obs_names) == [f"{s}_{i}" for s in "mu" for i in ("a-1", "b-1", "c-1", "d-1")]
    assert table.obs["section"].cat.ordered
    assert list(table.obs["section"].cat.categories) == ["m", "u"]
    assert list(table.obs["z"]) == [3.0] * 4 + [9.0] * 4
    # d-1 has no row in the table, as spots on the rim of real sections do.
    assert list(table.obs["measured"]) == [True, True, True, False] + [False] * 4
    assert table.obs["measured"].dtype == bool
    for section in "mu":
        key = f"{section}_spots"
        spots, joined = sd.join_spatialelement_table(
            sdata=sdata, spatial_element_names=key, table_name="stack", how="inner"
        )
        assert list(spots[key].index) == list(joined.obs["instance_id"]) == ["a-1", "b-1", "c-1", "d-1"]
        assert (joined.obs["section"] == section).all()


def test_assemble_stack_copies_the_counts():
    source = visium_like()
    sdata = si.pp.assemble_stack({"m": source}, mpp=0.5, z=[0])
    counts = sdata.tables["m_counts"]
    np.testing.assert_array_equal(counts.X.toarray(), source.tables["table"].X.toarray())
    assert list(counts.obs["instance_id"]) == ["a-1", "b-1", "c-1"]
    assert counts.uns["spatialdata_attrs"]["region"] == "m_spots"
    counts.X[0, 0] = 99
    assert source.tables["table"].X[0, 0] == 1


def test_assemble_stack_leaves_the_inputs_as_they_are():
    source, array = visium_like(), image()
    before_array = array.copy()
    before = (repr(source), source.tables["table"].obs.copy(), dict(source.tables["table"].uns["spatialdata_attrs"]))
    circles = source.shapes["spots"].copy()
    sdata = si.pp.assemble_stack({"m": source, "a": array}, mpp=0.5, z=[0, 1])
    sdata.shapes["m_spots"]["radius"] = 1.0
    assert repr(source) == before[0]
    pd.testing.assert_frame_equal(source.tables["table"].obs, before[1])
    assert source.tables["table"].uns["spatialdata_attrs"] == before[2]
    pd.testing.assert_frame_equal(pd.DataFrame(source.shapes["spots"]), pd.DataFrame(circles))
    assert set(get_transformation(source.images["hires"], get_all=True)) == {"global"}
    assert set(get_transformation(source.shapes["spots"], get_all=True)) == {"global"}
    np.testing.assert_array_equal(array, before_array)


def test_assemble_stack_derives_the_pixel_size_from_the_spot_pitch():
    sdata = si.pp.assemble_stack({"m": visium_like()}, spot_pitch=100, z=[0])
    record = load_record(sdata)
    # Neighbors lie 20 px apart: 5 um per full-resolution pixel, of which the image has one in two.
    assert record["m"].mpp == pytest.approx(10.0)
    assert record["m"].mpp_source == "spot pitch"
    np.testing.assert_allclose(sdata.tables["stack"].obsm["spatial"], CENTERS * 5)


def lattice(n: int = 20, *, keep: float = 1.0) -> np.ndarray:
    """Hexagonal lattice of pitch 13.7 px in whole pixels, as Space Ranger writes positions; a share of it."""
    row, column = np.mgrid[:n, :n].reshape(2, -1)
    centers = np.round(np.column_stack([column + row % 2 / 2, row * np.sqrt(3) / 2]) * 13.7 + 20)
    return centers[np.random.default_rng(0).random(len(centers)) < keep]


def with_spots(centers: np.ndarray) -> SpatialData:
    source = visium_like(with_table=False)
    circles = gpd.GeoDataFrame({"radius": np.full(len(centers), 4.0)}, geometry=gpd.points_from_xy(*centers.T))
    source.shapes["spots"] = ShapesModel.parse(circles, transformations={"global": Identity()})
    return source


@pytest.mark.parametrize("keep", [1.0, 0.6])
def test_assemble_stack_spot_pitch_is_not_biased_by_whole_pixels(keep):
    sdata = si.pp.assemble_stack({"m": with_spots(lattice(keep=keep))}, spot_pitch=100, z=[0])
    assert load_record(sdata)["m"].mpp == pytest.approx(2 * 100 / 13.7, rel=3e-3)  # 5 % off by nearest neighbors


def test_assemble_stack_spot_pitch_needs_a_lattice():
    centers = np.random.default_rng(0).uniform(0, 300, (60, 2))
    with pytest.raises(ValueError, match=r"regular lattice, at least two; the 60 spots have no .* Pass `mpp=`"):
        si.pp.assemble_stack({"m": with_spots(centers)}, spot_pitch=100, z=[0])


def test_assemble_stack_spot_pitch_needs_two_spots():
    with pytest.raises(ValueError, match="needs spots on a regular lattice, at least two; the 1 spots"):
        si.pp.assemble_stack({"m": visium_like(ids=("a",), with_table=False)}, spot_pitch=100, z=[0])


def test_assemble_stack_follows_an_affine_of_the_input():
    source = visium_like()
    turn = Affine([[0, -1, 100], [1, 0, 5], [0, 0, 1]], input_axes=("x", "y"), output_axes=("x", "y"))
    for element in (source.images["hires"], source.shapes["spots"]):
        sd.transformations.set_transformation(element, turn, "rotated")
    sdata = si.pp.assemble_stack({"m": source}, mpp=0.5, z=[0], coordinate_system="rotated")
    expected = np.column_stack([100 - CENTERS[:, 1], CENTERS[:, 0] + 5]) * 0.5
    np.testing.assert_allclose(sdata.tables["stack"].obsm["spatial"], expected)


def test_assemble_stack_asks_which_coordinate_system():
    source = visium_like(system="one")
    sd.transformations.set_transformation(source.images["hires"], Identity(), "two")
    with pytest.raises(ValueError, match=r"coordinate systems \[.*\]; choose one with `coordinate_system=`"):
        si.pp.assemble_stack({"m": source}, mpp=0.5, z=[0])
    with pytest.raises(KeyError, match="'three' not found"):
        si.pp.assemble_stack({"m": source}, mpp=0.5, z=[0], coordinate_system="three")
    assert "m_spots" in si.pp.assemble_stack({"m": source}, mpp=0.5, z=[0], coordinate_system="one").shapes


def test_assemble_stack_asks_which_circles():
    source = visium_like()
    source.shapes["fiducials"] = source.shapes["spots"].copy()
    with pytest.raises(ValueError, match=r"several circle elements \['fiducials', 'spots'\].*`shapes_key=`"):
        si.pp.assemble_stack({"m": source}, mpp=0.5, z=[0])
    sdata = si.pp.assemble_stack({"m": source}, mpp=0.5, z=[0], shapes_key={"m": "spots"})
    assert sdata.tables["stack"].obs["measured"].sum() == 3
    assert "m_counts" not in si.pp.assemble_stack({"m": source}, mpp=0.5, z=[0], shapes_key="fiducials").tables


def test_assemble_stack_asks_which_table():
    source = visium_like()
    source.tables["other"] = source.tables["table"].copy()
    with pytest.raises(ValueError, match=r"several tables \['other', 'table'\].*`table_key=`"):
        si.pp.assemble_stack({"m": source}, mpp=0.5, z=[0])
    assert "m_counts" in si.pp.assemble_stack({"m": source}, mpp=0.5, z=[0], table_key="other").tables
    with pytest.raises(KeyError, match="'nope' not found"):
        si.pp.assemble_stack({"m": source}, mpp=0.5, z=[0], table_key="nope")


def test_assemble_stack_takes_the_finest_image():
    source = visium_like()
    source.images["lowres"] = Image2DModel.parse(
        np.zeros((3, 6, 8), np.uint8),
        dims=("c", "y", "x"),
        transformations={"global": Scale([20, 20], axes=("x", "y"))},
    )
    assert si.pp.assemble_stack({"m": source}, mpp=0.5, z=[0]).images["m_image"].shape == (3, 60, 80)
    chosen = si.pp.assemble_stack({"m": source}, mpp=0.5, z=[0], image_key="lowres")
    assert chosen.images["m_image"].shape == (3, 6, 8)
    assert load_record(chosen)["m"].mpp == pytest.approx(10)


def test_assemble_stack_says_that_there_is_no_image():
    source = visium_like()
    del source.images["hires"]
    with pytest.raises(ValueError, match="no image in the coordinate system 'global'"):
        si.pp.assemble_stack({"m": source}, mpp=0.5, z=[0])


def test_genes_that_share_a_name_are_named_by_id_whatever_their_order():
    source = visium_like()
    source.tables["table"].var_names = ["g", "g", "h"]
    with pytest.raises(
        ValueError, match=r"the gene name 'g' occurs more than once, and `var` has no column of stable ids"
    ):
        si.pp.assemble_stack({"m": source}, mpp=0.5, z=[0])
    source.tables["table"].var["gene_ids"] = ["E1", "E2", "E3"]
    sdata = si.pp.assemble_stack({"m": source}, mpp=0.5, z=[0])
    assert list(sdata.tables["m_counts"].var_names) == ["E1", "E2", "h"]
    assert list(source.tables["table"].var_names) == ["g", "g", "h"]


@pytest.mark.parametrize(("mpp", "right"), [(500.0, False), (0.0005, False), (0.25, True), (30.0, True)])
def test_assemble_stack_refuses_a_pixel_size_in_other_units(mpp, right):
    with nullcontext() if right else pytest.raises(ValueError, match=r"overviews measure 0\.05 to 50 um"):
        si.pp.assemble_stack({"s": image()}, mpp=mpp, z=[0])


@pytest.mark.parametrize("sections", [[np.zeros((9, 9, 3), np.uint8)] * 2, ["a.tif", "b.tif"], "a.tif", (1, 2, 3)])
def test_assemble_stack_wants_names(sections):
    with pytest.raises(ValueError, match="`sections` needs a name for each input"):
        si.pp.assemble_stack(sections, mpp=1.0, section_spacing=5)


def test_assemble_stack_takes_a_table_whose_index_is_named_as_a_column(tmp_path):
    source = visium_like()
    source.tables["table"].obs.index = pd.Index(["x", "y", "z"], name="instance_id")
    sdata = si.pp.assemble_stack({"m": source}, mpp=0.5, z=[0])
    sdata.write(tmp_path / "s.zarr")
    assert list(sd.read_zarr(tmp_path / "s.zarr").tables["m_counts"].obs_names) == ["x", "y", "z"]


def test_assemble_stack_takes_a_table_on_disk(tmp_path):
    source = visium_like()
    expected = source.tables["table"].X.toarray()
    source.tables["table"].write_h5ad(tmp_path / "t.h5ad")
    source.tables["table"] = read_h5ad(tmp_path / "t.h5ad", backed="r")
    sdata = si.pp.assemble_stack({"m": source}, mpp=0.5, z=[0])
    assert not sdata.tables["m_counts"].isbacked
    np.testing.assert_array_equal(sdata.tables["m_counts"].X.toarray(), expected)


def test_assemble_stack_row_names_are_unique():
    """Rows are joined by name, so names of section and spot must not run into each other."""
    first = visium_like(ids=("1_a", "b", "c", "d"), with_table=False)
    second = visium_like(ids=("a", "b", "c", "d"), with_table=False, seed=1)
    try:
        sdata = si.pp.assemble_stack({"s": first, "s_1": second}, mpp=1, z=[0, 1])
    except ValueError:
        return
    assert sdata.tables["stack"].obs_names.is_unique


def test_assemble_stack_without_spots_has_no_table():
    assert "stack" not in si.pp.assemble_stack({"s": image()}, mpp=1, z=[0]).tables


def test_stack_record_round_trips_through_json():
    sdata = si.pp.assemble_stack({"m": visium_like(), "u": image(seed=1)}, mpp=np.float32(0.5), z=np.array([0, 4]))
    record = load_record(sdata)
    sdata.attrs = json.loads(json.dumps(sdata.attrs))
    assert load_record(sdata) == record
    assert [asdict(s) for s in record.sections] == sdata.attrs["spatial_impute"]["stack"]["sections"]
    assert record.version == si.__version__


def test_load_record_has_the_sections_that_the_object_holds():
    sdata = si.pp.assemble_stack({"a": image(), "m": visium_like(), "u": image(seed=1)}, mpp=0.5, z=[0, 4, 8])
    assert load_record(sdata.filter_by_coordinate_system(["a", "m"])).names == ("a", "m")
    assert load_record(sdata.subset(["u_image"])).names == ("u",)
    assert load_record(sdata).names == ("a", "m", "u")


def test_load_record_says_how_to_make_a_stack():
    with pytest.raises(KeyError, match=r"No stack in .*si.pp.assemble_stack"):
        load_record(SpatialData())
    record = load_record(si.pp.assemble_stack({"s": image()}, mpp=1, z=[0]))
    with pytest.raises(KeyError, match=r"'S' not found in `the stack's sections`; available: \['s'\]"):
        record["S"]


def test_assemble_stack_survives_disk(tmp_path):
    pyramid = Image2DModel.parse(np.moveaxis(image(64, 96, seed=3), -1, 0), dims=("c", "y", "x"), scale_factors=[2, 2])
    sdata = si.pp.assemble_stack({"m": visium_like(), "p": pyramid}, mpp=0.5, z=[0, 10])
    sdata.write(tmp_path / "s.zarr")
    back = sd.read_zarr(tmp_path / "s.zarr")
    assert load_record(back) == load_record(sdata)
    assert set(back.coordinate_systems) == {"m", "p"}
    pd.testing.assert_frame_equal(back.tables["stack"].obs, sdata.tables["stack"].obs)
    np.testing.assert_array_equal(back.tables["stack"].obsm["spatial"], sdata.tables["stack"].obsm["spatial"])
    assert list(back.images["p_image"].children) == ["scale0", "scale1", "scale2"]
    for key in ("m", "p"):
        np.testing.assert_allclose(to_um(back.images[f"{key}_image"], key), to_um(sdata.images[f"{key}_image"], key))
    np.testing.assert_array_equal(
        pixels_of(back.images["p_image"]["scale1"]["image"]), pixels_of(pyramid["scale1"]["image"])
    )
    from spatial_impute._stack.elements import section_levels

    for which in (sdata, back):
        levels = section_levels(which, load_record(which)["p"])
        assert [level.pixel_size for level in levels] == pytest.approx([0.5, 1.0, 2.0])


def section_with_table(region="spots", system="global", column=None):
    """One measured section; its table annotates `region`, and its spots lie in `system`."""
    import geopandas as gpd
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel, ShapesModel, TableModel
    from spatialdata.transformations import Identity

    x, y = (v.ravel() for v in np.meshgrid(np.arange(40, 180, 20), np.arange(40, 180, 20)))
    ids = [f"b{i}" for i in range(len(x))]
    circles = gpd.GeoDataFrame({"radius": 8.0}, geometry=gpd.points_from_xy(x, y), index=ids)
    obs = pd.DataFrame({"library": region, "spot": ids}, index=ids)
    if column is not None:
        obs[column] = "cortex"
    table = AnnData(np.ones((len(x), 3), np.float32), obs=obs)
    annotated = {} if region is None else {"region": region, "region_key": "library", "instance_key": "spot"}
    return SpatialData(
        images={"he": Image2DModel.parse(np.full((200, 200, 3), 240, np.uint8), dims=("y", "x", "c"))},
        shapes={"spots": ShapesModel.parse(circles, transformations={system: Identity()})},
        tables={"t": TableModel.parse(table, **annotated)},
    )


@pytest.mark.parametrize(
    "options",
    [{"region": "other"}, {"region": None}, {"system": "sample1"}],
    ids=["renamed", "no region", "other system"],
)
def test_tables_that_cannot_be_joined_are_refused(options):
    """A section that carries a measurement never becomes an unmeasured one silently."""
    with pytest.raises(ValueError, match=r"holds tables, but none of them annotates its spots.*shapes_key"):
        si.pp.assemble_stack(
            {"a": section_with_table(**options)}, mpp=1.0, section_spacing=10, coordinate_system="global"
        )


def test_a_section_without_tables_is_unmeasured():
    section = section_with_table(region="other")
    del section.tables["t"]
    assert not si.pp.assemble_stack({"a": section}, mpp=1.0, z=[0]).tables["stack"].obs["measured"].any()


@pytest.mark.parametrize("column", ["Region", "REGION", "Instance_ID"])
def test_columns_with_names_of_the_stack_are_kept_under_another_name(column):
    sdata = si.pp.assemble_stack({"a": section_with_table(column=column)}, mpp=1.0, z=[0])
    counts = sdata.tables["a_counts"]
    assert (counts.obs[f"{column}_original"] == "cortex").all()
    assert sdata.tables["stack"].obs["measured"].all()


def with_tissue(turn=lambda xy: xy, names=("r", "g", "b"), n_apart=12):
    """Object with tissue in a corner of its image and measured spots on it, and a turn of the spots."""
    pixels = np.full((200, 260, 3), 240, np.uint8)
    pixels[20:120, 20:90] = (180, 100, 170)
    pixels[20:60, 90:170] = (150, 60, 150)
    y, x = (v.ravel() for v in np.mgrid[26:118:n_apart, 26:165:n_apart])
    on = pixels[y, x, 1] < 200
    ids = [f"b{i}" for i in range(on.sum())]
    place = turn(np.column_stack([x, y])[on].astype(float))
    spots = gpd.GeoDataFrame({"radius": 4.0}, geometry=gpd.points_from_xy(*place.T), index=ids)
    obs = pd.DataFrame({"region": "spots", "instance": ids}, index=ids)
    table = TableModel.parse(
        AnnData(np.ones((len(ids), 2), np.float32), obs=obs),
        region="spots",
        region_key="region",
        instance_key="instance",
    )
    image = Image2DModel.parse(np.moveaxis(pixels, -1, 0), dims=("c", "y", "x"), c_coords=list(names))
    return SpatialData(images={"he": image}, shapes={"spots": ShapesModel.parse(spots)}, tables={"t": table})


@pytest.mark.parametrize(
    ("turn", "says"),
    [
        (lambda xy: xy, None),
        (lambda xy: xy[:, ::-1], "with x and y exchanged"),
        (lambda xy: [260, 0] + xy * [-1, 1], "mirrored left to right"),
        (lambda xy: [0, 200] + xy * [1, -1], "mirrored top to bottom"),
        (lambda xy: [260, 200] - xy, "turned by 180 degrees"),
        (lambda xy: xy * 0.2, "no turn or mirror places them much better"),
        (lambda xy: xy * 5, "no turn or mirror places them much better"),
    ],
)
def test_measured_spots_off_the_tissue_are_reported_with_what_fits(turn, says, caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    si.pp.assemble_stack({"m": with_tissue(turn)}, mpp=10.0, z=[0])
    found = {record.getMessage() for record in caplog.records if "lie on tissue" in record.getMessage()}
    assert len(found) == (says is not None)
    assert says is None or says in found.pop()


def test_few_measured_spots_are_reported(caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    si.pp.assemble_stack({"m": with_tissue(n_apart=30)}, mpp=10.0, z=[0])
    assert "Section m: only 16 spots are measured" in caplog.text
    caplog.clear()
    si.pp.assemble_stack({"m": with_tissue()}, mpp=10.0, z=[0])
    assert "spots are measured" not in caplog.text


def test_channels_of_objects_and_arrays_are_read_by_name():
    expected = np.asarray(with_tissue().images["he"].data)
    for kind in ("object", "multi-scale object", "array"):
        source = with_tissue(names=("blue", "green", "red"))
        value = source
        if kind == "array":
            value = source.images["he"]
        elif kind == "multi-scale object":
            source.images["he"] = Image2DModel.parse(
                source.images["he"], c_coords=["blue", "green", "red"], scale_factors=[2]
            )
        sdata = si.pp.assemble_stack({"m": value}, mpp=10.0, z=[0])
        found = sdata.images["m_image"]
        found = found["scale0"]["image"] if hasattr(found, "children") else found
        np.testing.assert_array_equal(found.data, expected[::-1])
        assert "m" in get_transformation(sdata.images["m_image"], get_all=True)
    for value in (with_tissue(names=("DAPI", "FITC", "Cy5")), with_tissue(names=("DAPI", "FITC", "Cy5")).images["he"]):
        with pytest.raises(ValueError, match=r"Section 'm.*look like fluorescence.*Give the H&E image"):
            si.pp.assemble_stack({"m": value}, mpp=10.0, z=[0])


def test_the_color_image_is_chosen_and_not_fluorescence_of_three_channels():
    source = with_tissue()
    fine = Image2DModel.parse(
        np.zeros((3, 400, 520), np.uint8),
        c_coords=["DAPI", "CD3", "CD8"],
        transformations={"global": Scale([0.5, 0.5], axes=("x", "y"))},
    )
    source.images["if"] = fine
    sdata = si.pp.assemble_stack({"m": source}, mpp=10.0, z=[0])
    assert sdata.images["m_image"].shape == (3, 200, 260)


def test_stacks_that_were_concatenated_say_how_to_restore_them():
    one, two = (si.pp.assemble_stack({name: with_tissue()}, mpp=10.0, z=[0]) for name in "ab")
    si.pp.select_genes(one)
    merged = sd.concatenate({"p": one, "q": two})
    with pytest.raises(KeyError, match=r"spatialdata\.concatenate.*assemble it again.*coordinate_system"):
        si.pp.select_genes(merged)
    names = ["a-p", "b-q"]
    restored = si.pp.assemble_stack(
        dict.fromkeys(names, merged), coordinate_system={n: n for n in names}, mpp=1.0, z=[0, 10]
    )
    assert [s.counts is not None for s in load_record(restored).sections] == [True, True]
    assert [s.mpp for s in load_record(restored).sections] == pytest.approx([10.0, 10.0])
    np.testing.assert_allclose(
        restored.tables["stack"].obsm["spatial"][: one.tables["stack"].n_obs], one.tables["stack"].obsm["spatial"]
    )


class SlideData(SpatialData):
    """What `wsidata.open_wsi` returns: a thumbnail among the images, and a reader of the slide."""

    class properties:
        n_level, level_shape, level_downsample, mpp = 1, [[200, 260]], [1.0], 0.5

    class reader:
        @staticmethod
        def get_region(x, y, width, height, level=0):
            return np.full((height, width, 3), 200, np.uint8)


def test_slides_of_wsidata_are_sections():
    thumbnail = Image2DModel.parse(np.zeros((3, 20, 26), np.uint8))
    slides = {name: SlideData(images={"wsi_thumbnail": thumbnail}) for name in "ab"}
    sdata = si.pp.assemble_stack(slides, section_spacing=5)
    assert sdata.images["a_image"].shape == (3, 200, 260)
    assert [s.mpp for s in load_record(sdata).sections] == [0.5, 0.5]


def test_a_series_of_pandas_is_read_by_its_names():
    scans = {name: image(seed=k) for k, name in enumerate("abc")}
    names = list("cab")
    heights, mpp = pd.Series([0.0, 20.0, 10.0], names), pd.Series([4.0, 1.0, 2.0], names)
    record = load_record(si.pp.assemble_stack(pd.Series(scans), z=heights, mpp=mpp))
    assert [section.z for section in record.sections] == [20, 10, 0]
    assert [section.mpp for section in record.sections] == [1, 2, 4]
    by_place = load_record(si.pp.assemble_stack(scans, z=pd.Series([0.0, 5.0, 7.0]), mpp=1))
    assert [section.z for section in by_place.sections] == [0, 5, 7]


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.ma.masked_less(image(), 10), r"\d+ values of its array are masked"),
        (xr.DataArray(image(), dims=("y", "x", "band")), r"found \('y', 'x', 'band'\).*rename"),
        (xr.DataArray(image(), dims=("lat", "lon", "c")), r"expected the dimensions c, y and x"),
        ((image().astype(int) - 128).astype(np.int8), r"of the pixels of the image are negative"),
    ],
)
def test_arrays_that_are_no_picture_as_they_are_are_refused(array, says):
    with pytest.raises(ValueError, match=says):
        si.pp.segment_tissue(si.pp.assemble_stack({"a": array}, mpp=1, section_spacing=1))


def test_true_is_no_pixel_size():
    with pytest.raises(ValueError, match="must be a positive number"):
        si.pp.assemble_stack({"a": image()}, mpp=True, section_spacing=1)


def test_two_sections_in_one_table_are_refused():
    from spatial_impute.pp import _assemble_stack as module

    with pytest.raises(ValueError, match="its 4 spots lie at 2 places only, as those of several sections"):
        module._require_separate(SimpleNamespace(name="a"), np.repeat(CENTERS[:2], 2, axis=0), np.ones(4))
