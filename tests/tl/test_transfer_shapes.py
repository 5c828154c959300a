"""Annotations carried from one section to the others, in and out of files of QuPath; points with a height."""

from __future__ import annotations

import copy
import json

import geopandas as gpd
import numpy as np
import pytest
import shapely
from shapely.geometry import Polygon, mapping
from spatialdata.models import ShapesModel
from spatialdata.transformations import Identity

import spatial_impute as si
from spatial_impute._keys import Keys
from spatial_impute._stack.elements import displacement_elements, element_affine, load_transform
from spatial_impute._stack.record import load_record

TURN = np.array([[0.0, -1.0, 1400.0], [1.0, 0.0, 30.0], [0.0, 0.0, 1.0]])  # a quarter, um
CORNERS = np.array([[400.0, 500.0], [900.0, 450.0], [800.0, 900.0]])  # um, in s1


@pytest.fixture(scope="module")
def registered():
    """Stack with known places: s0 is turned, s2 is bent, s1 is the reference."""
    sdata = si.datasets.synthetic_stack(extent=1400.0)
    si.tl.register_stack(sdata, transformations={"s0": TURN, "s2": "aligned"}, show_progress_bar=False)
    record = load_record(sdata)
    bend = bent(load_transform(sdata, record, "s2").matrix)
    for key, element in displacement_elements(bend, "s2", "aligned").items():
        sdata.images[key] = element
    sdata.attrs["spatial_impute"]["stack"]["registration"]["sections"]["s2"]["deformed"] = True
    return sdata


def bent(matrix):
    """Place with a shift that grows with x, up to 70 um."""
    from spatial_impute._registration import DisplacementField, SectionTransform

    x = (np.arange(90) + 0.5) * 20 - 200
    push = np.zeros((90, 90, 2), np.float32)
    push[..., 1] = 0.05 * x
    field = DisplacementField(-push, push, (-200.0, -200.0), 20.0)
    return SectionTransform.from_field(matrix, field, np.eye(3))


@pytest.fixture
def sdata(registered):
    made = copy.copy(registered)
    shapes = gpd.GeoDataFrame({"class": ["Tumor"]}, geometry=[Polygon(CORNERS)], index=["a"])
    made.shapes["mine"] = ShapesModel.parse(shapes, transformations={"s1": Identity()})
    yield made
    for key in [key for key in made.shapes if key.startswith("mine")]:
        del made.shapes[key]


def test_shapes_lie_where_the_transforms_put_them(sdata):
    si.tl.transfer_shapes(sdata, "mine")
    assert {key for key in sdata.shapes if key.startswith("mine_")} == {"mine_on_s0", "mine_on_s2"}
    turned = sdata.shapes["mine_on_s0"]
    expected = CORNERS @ np.linalg.inv(TURN)[:2, :2].T + np.linalg.inv(TURN)[:2, 2]
    np.testing.assert_allclose(shapely.get_coordinates(turned.geometry.iloc[0])[:3], expected)
    assert list(turned["class"]) == ["Tumor"]
    assert list(turned.index) == ["a"]
    # Through the common frame, bent: y falls by 5 % of x, also between the corners.
    found = shapely.get_coordinates(sdata.shapes["mine_on_s2"].geometry.iloc[0])
    assert len(found) > 50
    straight = shapely.transform(sdata.shapes["mine_on_s2"].geometry.iloc[0], lambda xy: xy + [[0, 0.05]] * xy[:, :1])
    assert straight.symmetric_difference(Polygon(CORNERS)).area < 1.0
    np.testing.assert_allclose(element_affine(turned, "aligned"), TURN)


def test_there_and_back_is_the_same_place(sdata):
    si.tl.transfer_shapes(sdata, "mine", sections="s2", key_added="mine_in_{section}")
    si.tl.transfer_shapes(sdata, "mine_in_s2", sections="s1", key_added="mine_again_{section}")
    again = sdata.shapes["mine_again_s1"].geometry.iloc[0]
    assert again.symmetric_difference(Polygon(CORNERS)).area < 0.01 * again.area


def test_geojson_of_qupath_in_carried_and_out(sdata, tmp_path):
    per_px = element_affine(sdata.images["s1_image"], "s1")[0, 0]
    feature = {
        "type": "Feature",
        "id": "7d9b7a8e-0000-4000-8000-000000000001",
        "geometry": mapping(Polygon(CORNERS / per_px)),
        "properties": {
            "objectType": "annotation",
            "name": "left",
            "classification": {"name": "Tumor", "color": [200, 0, 0]},
        },
    }
    (tmp_path / "s1.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    si.pp.add_cells(sdata, "s1", tmp_path / "s1.geojson", key_added="mine_q")
    si.tl.transfer_shapes(sdata, "mine_q")
    si.tl.write_geojson(sdata, "mine_q_on_s0", tmp_path / "s0.geojson")
    out = json.loads((tmp_path / "s0.geojson").read_text())["features"][0]
    assert out["id"] == feature["id"]
    assert out["properties"] == {
        "objectType": "annotation",
        "classification": {"name": "Tumor"},
        "name": "left",
    }
    per_px = element_affine(sdata.images["s0_image"], "s0")[0, 0]
    back = np.linalg.inv(TURN)
    expected = (CORNERS @ back[:2, :2].T + back[:2, 2]) / per_px
    np.testing.assert_allclose(np.array(out["geometry"]["coordinates"][0])[:3], expected, atol=0.006)
    si.pp.add_cells(sdata, "s0", tmp_path / "s0.geojson", key_added="mine_back")
    again = sdata.shapes["mine_back"]
    assert list(again["name"]) == ["left"]
    assert list(again["objectType"]) == ["annotation"]


def test_circles_become_polygons_and_numbers_measurements(sdata, tmp_path):
    circles = gpd.GeoDataFrame(
        {"radius": [50.0], "ERBB2": [2.5], "n": [np.nan]}, geometry=gpd.points_from_xy([500], [600])
    )
    sdata.shapes["mine_c"] = ShapesModel.parse(circles, transformations={"s1": Identity()})
    si.tl.transfer_shapes(sdata, "mine_c", sections=["s0"])
    assert sdata.shapes["mine_c_on_s0"]["radius"].iloc[0] == pytest.approx(50.0)
    si.tl.write_geojson(sdata, "mine_c", tmp_path / "c.json")
    out = json.loads((tmp_path / "c.json").read_text())["features"][0]
    per_px = element_affine(sdata.images["s1_image"], "s1")[0, 0]
    assert shapely.geometry.shape(out["geometry"]).area * per_px**2 == pytest.approx(np.pi * 50**2, rel=0.01)
    assert out["properties"] == {"objectType": "annotation", "measurements": {"ERBB2": 2.5}}


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda s, _: si.tl.transfer_shapes(s, "mine", key_added="x"), ValueError, "must contain the word {section}"),
        (lambda s, _: si.tl.transfer_shapes(s, "mine", key_added="{section}_spots"), ValueError, "would write over"),
        (lambda s, _: si.tl.transfer_shapes(s, "no"), KeyError, "sdata.shapes"),
        (lambda s, _: si.tl.transfer_shapes(s, "mine", sections="s1"), ValueError, "there is no other section"),
        (lambda s, p: si.tl.write_geojson(s, "mine", p / "x.csv"), ValueError, "must end in .geojson"),
        (lambda s, p: si.tl.write_geojson(s, "mine", p / "no" / "x.json"), FileNotFoundError, "folder"),
        (lambda s, _: si.tl.write_geojson(s, "mine", 5), TypeError, "must be the path of the file to write"),
    ],
)
def test_wrong_calls(sdata, tmp_path, call, error, match):
    with pytest.raises(error, match=match):
        call(sdata, tmp_path)


def test_shapes_without_columns_and_empty_ones(sdata, tmp_path):
    bare = gpd.GeoDataFrame(geometry=[Polygon(CORNERS), Polygon()], index=["a", "b"])
    sdata.shapes["mine_bare"] = ShapesModel.parse(bare, transformations={"s1": Identity()})
    si.tl.write_geojson(sdata, "mine_bare", tmp_path / "bare.json")
    features = json.loads((tmp_path / "bare.json").read_text())["features"]
    assert [feature["id"] for feature in features] == ["a"]
    si.tl.write_geojson(sdata, "s1_spots", tmp_path / "spots.json")
    assert len(json.loads((tmp_path / "spots.json").read_text())["features"]) == len(sdata.shapes["s1_spots"])


def test_polygons_with_a_radius_stay_polygons(sdata, tmp_path):
    """A radius among the measurements of cells does not make circles of them."""
    cells = gpd.GeoDataFrame({"radius": [40.0]}, geometry=[Polygon(CORNERS)])
    sdata.shapes["mine_r"] = ShapesModel.parse(cells, transformations={"s1": Identity()})
    si.tl.write_geojson(sdata, "mine_r", tmp_path / "r.json")
    out = json.loads((tmp_path / "r.json").read_text())["features"][0]
    per_px = element_affine(sdata.images["s1_image"], "s1")[0, 0]
    np.testing.assert_allclose(np.array(out["geometry"]["coordinates"][0])[:3], CORNERS / per_px, atol=0.006)
    assert out["properties"]["measurements"] == {"radius": 40.0}
    si.tl.transfer_shapes(sdata, "mine_r", sections="s0")
    assert sdata.shapes["mine_r_on_s0"].area.iloc[0] == pytest.approx(Polygon(CORNERS).area)
    moved = si.tl.warp_element(sdata, "mine_r", inplace=False)
    assert moved.area.iloc[0] == pytest.approx(Polygon(CORNERS).area)


def test_a_file_of_the_user_is_kept(sdata, tmp_path, monkeypatch):
    path = tmp_path / "s1.geojson"
    path.write_text("the annotations of a day")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        si.tl.write_geojson(sdata, "mine", path)
    assert path.read_text() == "the annotations of a day"

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(path), "write_text", stop)
        with pytest.raises(KeyboardInterrupt):
            si.tl.write_geojson(sdata, "mine", path, overwrite=True)
    assert path.read_text() == "the annotations of a day"
    si.tl.write_geojson(sdata, "mine", path, overwrite=True)
    assert len(json.loads(path.read_text())["features"]) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_written_over_and_a_living_one_is_left_alone(sdata, tmp_path):
    from spatial_impute._io.files import written_whole

    path = tmp_path / "s1.geojson"
    for name in (".part_s1.geojson", ".part_s1.geojson.lock"):
        (tmp_path / name).write_text("half")
    si.tl.write_geojson(sdata, "mine", path)
    assert list(tmp_path.iterdir()) == [path]
    with written_whole(path) as part:
        part.write_text("of another process")
        with pytest.raises(FileExistsError, match=r"s1.geojson' is being written by process"):
            si.tl.write_geojson(sdata, "mine", path, overwrite=True)
    assert path.read_text() == "of another process"


@pytest.mark.parametrize("what", ["circles", "z"])
def test_points_are_not_made_at_old_places(what):
    sdata = si.datasets.synthetic_stack(extent=1400.0)
    si.tl.register_stack(sdata, transformations={"s0": TURN, "s2": "aligned"}, show_progress_bar=False)
    if what == "circles":
        circles = sdata.shapes["s0_spots"]
        sdata.shapes["s0_spots"] = circles.set_geometry(circles.geometry.translate(100, 0))
    else:
        sdata.tables["stack"].obs["z"] = 2 * sdata.tables["stack"].obs["z"].to_numpy()
    with pytest.raises(ValueError, match=r"Run `si.tl.register_stack\(sdata\)` again"):
        si.tl.points_3d(sdata, inplace=False)


def test_columns_do_not_replace_coordinates(registered):
    sdata = copy.copy(registered)
    table = sdata.tables["stack"].copy()
    table.obs["x"] = 5.0
    sdata.tables["stack"] = table
    with pytest.raises(ValueError, match="the points have already"):
        si.tl.points_3d(sdata, ["x"], inplace=False)
    points = si.tl.points_3d(sdata, ["z", "section"], inplace=False).compute()
    np.testing.assert_array_equal(points["z"], table.obsm["spatial_3d"][:, 2])


def test_points_have_a_height(registered, tmp_path):
    sdata = copy.copy(registered)
    si.tl.impute_baseline(sdata, "mean")
    si.tl.points_3d(sdata, ["smooth_0", "total_counts"], layer="baseline_mean")
    table, points = sdata.tables["stack"], sdata.points["stack_points"].compute()
    np.testing.assert_array_equal(points[["x", "y", "z"]], table.obsm["spatial_3d"])
    np.testing.assert_array_equal(points["smooth_0"], np.ravel(table[:, "smooth_0"].layers["baseline_mean"]))
    assert list(points["section"].astype(str)) == list(table.obs["section"].astype(str))
    assert list(points["spot"]) == list(table.obs_names)
    sdata.write(tmp_path / "s.zarr")
    import spatialdata as sd

    again = sd.read_zarr(tmp_path / "s.zarr").points[Keys.STACK_POINTS].compute()
    np.testing.assert_array_equal(again[["x", "y", "z"]], table.obsm["spatial_3d"])
    si.tl.points_3d(sdata, "section")  # an earlier result is replaced
    with pytest.raises(ValueError, match="would write over"):
        si.tl.points_3d(sdata, key_added="s0_spots")
    with pytest.raises(KeyError, match="the genes and the columns of obs"):
        si.tl.points_3d(sdata, "no", inplace=False)
