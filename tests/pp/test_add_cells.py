"""Outlines of other tools on a section."""

from __future__ import annotations

import json

import geopandas as gpd
import numpy as np
import pytest
from shapely.geometry import LineString, Point, Polygon, mapping
from spatialdata.models import ShapesModel
from spatialdata.transformations import Affine, Identity

import spatial_impute as si
from spatial_impute._stack.elements import element_affine

SQUARES = [Polygon([(x, 50), (x + 10, 50), (x + 10, 70), (x, 70)]) for x in (100, 150, 200)]


def centers(sdata, key="s1_cells"):
    """In um of the section."""
    matrix = element_affine(sdata.shapes[key], "s1")
    points = sdata.shapes[key].geometry.centroid
    return np.column_stack([points.x, points.y]) @ matrix[:2, :2].T + matrix[:2, 2]


@pytest.fixture
def mpp(small_stack):
    return small_stack.attrs["spatial_impute"]["stack"]["sections"][1]["mpp"]


def as_labels(sdata):
    height, width = sdata.images["s1_image"].shape[1:] if hasattr(sdata.images["s1_image"], "shape") else (0, 0)
    labels = np.zeros((height, width), np.int32)
    for k, square in enumerate(SQUARES):
        x0, y0, x1, y1 = map(int, square.bounds)
        labels[y0:y1, x0:x1] = k + 7
    return labels


@pytest.mark.parametrize("kind", ["frame", "qupath list", "collection", "labels"])
def test_outlines_lie_where_their_pixels_are(small_stack, mpp, tmp_path, kind):
    features = [
        {"type": "Feature", "id": f"c{k}", "geometry": mapping(square), "properties": {"classification": {"name": "T"}}}
        for k, square in enumerate(SQUARES)
    ]
    path = tmp_path / "cells.geojson"
    path.write_text(
        json.dumps(features if kind == "qupath list" else {"type": "FeatureCollection", "features": features})
    )
    given = {"frame": gpd.GeoDataFrame({"n": [1, 2, 3]}, geometry=SQUARES), "labels": as_labels(small_stack)}
    si.pp.add_cells(small_stack, "s1", given.get(kind, path))
    expected = np.array([[105, 60], [155, 60], [205, 60]]) * mpp
    np.testing.assert_allclose(centers(small_stack), expected, atol=0.01 * mpp)
    shapes = small_stack.shapes["s1_cells"]
    np.testing.assert_allclose(shapes.geometry.area, 200, rtol=1e-6)
    names = {"frame": [0, 1, 2], "labels": ["7", "8", "9"]}.get(kind, ["c0", "c1", "c2"])
    assert list(shapes.index) == names
    if kind == "frame":
        assert list(shapes["n"]) == [1, 2, 3]
    elif kind != "labels":
        assert list(shapes["class"]) == ["T"] * 3


@pytest.mark.parametrize("kind", ["feature", "geometry", "null ids", "in a collection"])
def test_other_forms_of_geojson(small_stack, mpp, tmp_path, kind):
    geometry = mapping(SQUARES[0])
    feature = {"type": "Feature", "geometry": geometry, "properties": {"classification": {"name": "T"}}}
    together = {"type": "GeometryCollection", "geometries": [geometry, mapping(Point(3, 3))]}
    content = {
        "feature": feature,
        "geometry": geometry,
        "null ids": [feature | {"id": None}, {"id": None, "geometry": mapping(SQUARES[1])}],
        "in a collection": [feature | {"geometry": together}],
    }[kind]
    (tmp_path / "cells.json").write_text(json.dumps(content))
    si.pp.add_cells(small_stack, "s1", tmp_path / "cells.json")
    np.testing.assert_allclose(centers(small_stack)[0], np.array([105, 60]) * mpp, atol=0.01 * mpp)
    assert list(small_stack.shapes["s1_cells"].index) == ["0", "1"][: len(small_stack.shapes["s1_cells"])]


def test_a_cell_with_a_spike_is_kept(small_stack):
    """The repair gives the polygon and the line of the spike."""
    spike = Polygon([(100, 50), (110, 50), (110, 60), (110, 90), (110, 60), (110, 70), (100, 70)])
    assert not spike.is_valid
    si.pp.add_cells(small_stack, "s1", [spike, *SQUARES[1:]])
    assert list(small_stack.shapes["s1_cells"].geometry.area) == pytest.approx([200, 200, 200])


def test_shapes_of_another_section_are_not_replaced(small_stack):
    si.pp.add_cells(small_stack, "s0", SQUARES[:1])
    with pytest.raises(ValueError, match=r"would write over `sdata.shapes\['s0_cells'\]`, which lies in"):
        si.pp.add_cells(small_stack, "s1", SQUARES, key_added="s0_cells")
    assert len(small_stack.shapes["s0_cells"]) == 1
    si.pp.add_cells(small_stack, "s0", SQUARES)  # an earlier result is
    assert len(small_stack.shapes["s0_cells"]) == 3


def test_no_objects_and_no_file(small_stack, tmp_path):
    with pytest.raises(ValueError, match="`cells` holds no object"):
        si.pp.add_cells(small_stack, "s1", [])
    with pytest.raises(FileNotFoundError, match="`cells` must be a GeoJSON file, found none at"):
        si.pp.add_cells(small_stack, "s1", tmp_path)


def test_objects_without_area_are_left_out_and_crossed_ones_repaired(small_stack, caplog, monkeypatch):
    from spatial_impute._settings import logger

    monkeypatch.setattr(logger, "propagate", True)
    bow = Polygon([(100, 100), (110, 110), (110, 100), (100, 110)])
    given = gpd.GeoDataFrame(
        geometry=[Point(50, 50), LineString([(0, 0), (9, 9)]), bow, *SQUARES], index=list("abcdef")
    )
    si.pp.add_cells(small_stack, "s1", given, key_added="nuclei")
    assert list(small_stack.shapes["nuclei"].index) == list("cdef")
    assert small_stack.shapes["nuclei"].geometry.is_valid.all()
    assert "2 of 6 objects have no area" in caplog.text


def test_empty_objects_are_counted_and_most_of_them_refused(small_stack, tmp_path, caplog, monkeypatch):
    from spatial_impute._settings import logger

    monkeypatch.setattr(logger, "propagate", True)
    features = [{"geometry": None}] + [{"geometry": mapping(square)} for square in SQUARES]
    (tmp_path / "cells.json").write_text(json.dumps(features))
    si.pp.add_cells(small_stack, "s1", tmp_path / "cells.json")
    assert list(small_stack.shapes["s1_cells"].index) == ["1", "2", "3"]
    assert "1 of 4 objects have no area" in caplog.text
    with pytest.raises(ValueError, match=r"2 of 3 objects in `cells` .* by type {'none': 1, 'Point': 1}"):
        si.pp.add_cells(small_stack, "s1", [None, Point(1, 1), SQUARES[0]])


@pytest.mark.parametrize("kind", ["list", "series", "array"])
def test_plain_outlines_are_taken(small_stack, mpp, kind):
    series = gpd.GeoSeries(SQUARES, index=list("abc")).force_3d(5)
    si.pp.add_cells(small_stack, "s1", {"list": SQUARES, "series": series, "array": series.to_numpy()}[kind])
    np.testing.assert_allclose(centers(small_stack)[0], np.array([105, 60]) * mpp)
    assert list(small_stack.shapes["s1_cells"].index) == (list("abc") if kind == "series" else [0, 1, 2])
    assert not small_stack.shapes["s1_cells"].has_z.any()


@pytest.mark.parametrize("system", ["s1", "global"])
def test_shapes_of_another_object_lie_where_they_say(small_stack, mpp, system):
    """In um of the section, by their own transformation, or in pixels without one."""
    place = Affine([[0, 2, 7], [3, 0, 5], [0, 0, 1]], ("x", "y"), ("x", "y")) if system == "s1" else Identity()
    shapes = ShapesModel.parse(gpd.GeoDataFrame(geometry=SQUARES), transformations={system: place})
    si.pp.add_cells(small_stack, "s1", shapes)
    expected = [2 * 60 + 7, 3 * 105 + 5] if system == "s1" else np.array([105, 60]) * mpp
    np.testing.assert_allclose(centers(small_stack)[0], expected)


@pytest.mark.parametrize("dtype", [bool, float])
def test_masks_and_labels_of_other_types_are_refused_with_the_way_out(small_stack, dtype):
    with pytest.raises(TypeError, match=rf"found ndarray of {np.dtype(dtype)} .*skimage\.measure\.label"):
        si.pp.add_cells(small_stack, "s1", as_labels(small_stack).astype(dtype))


@pytest.mark.parametrize("found", ["a: b", {"name": "a: b"}, {"names": ["a", "b"]}])
def test_classes_of_other_tools_are_read(found):
    from spatial_impute.pp._add_cells import _class_name

    assert _class_name(found) == "a: b"


@pytest.mark.parametrize("key", ["s1_image", "s1_tissue", "s1_tissue_outline", "stack"])
def test_cells_do_not_take_the_name_of_another_element(small_stack, key):
    si.pp.segment_tissue(small_stack)
    before = small_stack[key]
    with pytest.raises(ValueError, match="would write over data"):
        si.pp.add_cells(small_stack, "s1", gpd.GeoDataFrame(geometry=SQUARES), key_added=key)
    assert small_stack[key] is before
