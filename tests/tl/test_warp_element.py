"""Any element of a section in the common frame: points, shapes and rasters move together."""

from __future__ import annotations

import copy

import dask.array as da
import dask.dataframe as dd
import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
from scipy import ndimage as ndi
from spatialdata import get_extent
from spatialdata.models import Image2DModel, Labels2DModel, PointsModel, ShapesModel
from spatialdata.transformations import Affine, Scale, get_transformation, set_transformation

import spatial_impute as si
from spatial_impute._keys import Keys
from spatial_impute._registration.transform import SectionTransform
from spatial_impute._settings import logger
from spatial_impute._stack.elements import displacement_elements, element_affine, load_transform
from spatial_impute._stack.record import load_record

PIXEL = 8.0  # um, of the displacement grid: the working pixel
MATRIX = np.array([[0.95, -0.31, 320.0], [0.3, 0.96, -150.0], [0, 0, 1]])


@pytest.fixture(scope="module")
def deformed():
    """A stack whose section s0 has a known affine and a known smooth deformation (up to about 40 um)."""
    sdata = si.datasets.synthetic_stack(2, measured=["s1"], extent=1200.0, n_genes=3)
    pull, push, grid = smooth_field()
    register_as(sdata, SectionTransform(MATRIX, pull, push, grid))
    return sdata


def smooth_field() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Displacement and its inverse (fixed-point iteration) on a grid around the moved section."""
    shape, origin = (220, 220), np.array([-200.0, -250.0])
    rng = np.random.default_rng(1)
    pull = np.stack([ndi.gaussian_filter(rng.normal(size=shape), 22) for _ in range(2)], -1)
    window = np.minimum(1, ndi.distance_transform_edt(np.pad(np.ones((180, 180)), 20)) / 20)[..., None]
    pull = pull / np.abs(pull).max() * 40 * window
    grid = np.array([[PIXEL, 0, origin[0]], [0, PIXEL, origin[1]], [0, 0, 1]])
    index = np.indices(shape)[::-1].transpose(1, 2, 0).astype(float)  # x, y
    push = np.zeros_like(pull)
    for _ in range(60):  # y = x + pull(x)  <=>  x = y - pull(x)
        where = index + push / PIXEL
        sampled = [ndi.map_coordinates(pull[..., k], [where[..., 1], where[..., 0]], order=1) for k in (0, 1)]
        push = -np.stack(sampled, -1)
    return pull.astype(np.float32), push.astype(np.float32), grid


def register_as(sdata, transform: SectionTransform) -> None:
    """Make a stack look as register_stack leaves it, with a made-up placement of s0."""
    for name in ("s0_image", "s0_spots"):
        element = sdata[name]
        matrix = transform.matrix @ element_affine(element, "s0")
        set_transformation(element, Affine(matrix, input_axes=("x", "y"), output_axes=("x", "y")), "aligned")
    for key, element in displacement_elements(transform, "s0", "aligned").items():
        sdata.images[key] = element
    rows = {
        "s0": {"route": "direct", "matrix": transform.matrix.tolist(), "deformed": transform.deforms},
        "s1": {"route": "direct", "matrix": np.eye(3).tolist(), "deformed": False},
    }
    sdata.attrs[Keys.ATTRS]["stack"]["registration"] = {"coordinate_system": "aligned", "sections": rows}


@pytest.fixture
def sdata(deformed):
    return copy.deepcopy(deformed)


@pytest.fixture(scope="module")
def transform(deformed) -> SectionTransform:
    return load_transform(deformed, load_record(deformed), "s0")


def test_there_and_back_within_a_micrometre(transform):
    points = np.random.default_rng(0).uniform(100, 1100, (500, 2))
    moved = transform.points(points)
    straight = points @ MATRIX[:2, :2].T + MATRIX[:2, 2]
    assert np.linalg.norm(moved - straight, axis=1).max() > 20  # there is a deformation
    error = np.linalg.norm(transform.inverse(moved) - points, axis=1)
    assert np.median(error) < 1
    assert error.max() < PIXEL
    assert transform.points(np.zeros((0, 2))).shape == (0, 2)


def blobs(sdata, centers: np.ndarray, mpp: float = 4.0) -> None:
    """Image element with a bright blob at each centre (um in s0)."""
    y, x = (np.mgrid[:300, :300] + 0.5) * mpp
    image = sum(np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * 16.0**2)) for cx, cy in centers)
    sdata.images["blobs"] = Image2DModel.parse(
        da.from_array((image[None] * 60_000).astype(np.uint16), chunks=(1, 128, 128)),
        dims=("c", "y", "x"),
        c_coords=["blob"],
        transformations={"s0": Scale([mpp, mpp], axes=("x", "y"))},
    )


@pytest.mark.parametrize("pixel_size", [None, 6.0])
def test_points_and_image_agree(sdata, transform, pixel_size):
    centers = np.array([[300.0, 350], [600, 600], [850, 400], [420, 800], [780, 830]])
    blobs(sdata, centers)
    si.tl.warp_element(sdata, "blobs", pixel_size=pixel_size)
    element = sdata.images["blobs_aligned"]
    to_um = element_affine(element, "aligned")
    image = np.asarray(element.data)[0].astype(float)
    assert list(element.coords["c"].to_numpy()) == ["blob"]
    for expected in transform.points(centers):
        column, row = (np.linalg.inv(to_um) @ [*expected, 1])[:2]
        half = 12
        window = image[int(row) - half : int(row) + half + 1, int(column) - half : int(column) + half + 1]
        y, x = np.mgrid[: window.shape[0], : window.shape[1]]
        found = np.array([(window * x).sum(), (window * y).sum()]) / window.sum() + 0.5
        found = to_um[:2, :2] @ (found + np.array([int(column), int(row)]) - half) + to_um[:2, 2]
        assert np.linalg.norm(found - expected) < 0.25 * PIXEL


def test_image_is_lazy_and_in_chunks(sdata, monkeypatch):
    from spatial_impute.tl import _warp_element

    monkeypatch.setattr(_warp_element, "_CHUNK", 100)
    calls = []

    def source(block):
        calls.append(block.shape)
        return block

    rng = np.random.default_rng(0)
    array = rng.integers(0, 255, (3, 300, 300), dtype=np.uint8)
    lazy = da.from_array(array, chunks=(3, 100, 100)).map_blocks(source, dtype=np.uint8, meta=np.zeros((0, 0, 0), "u1"))
    sdata.images["lazy"] = Image2DModel.parse(
        lazy, dims=("c", "y", "x"), transformations={"s0": Scale([4.0, 4.0], axes=("x", "y"))}
    )
    new = si.tl.warp_element(sdata, "lazy", inplace=False)
    assert not calls
    assert new.data.chunksize == (3, 100, 100)
    whole = new.data.compute()
    calls.clear()
    block = new.data.blocks[0, 2, 2].compute()
    assert 0 < len(calls) < 9  # only the chunks under it
    monkeypatch.setattr(_warp_element, "_CHUNK", 2048)
    np.testing.assert_array_equal(si.tl.warp_element(sdata, "lazy", inplace=False).data.compute(), whole)
    np.testing.assert_array_equal(block, whole[:, 200:300, 200:300])


def test_labels_keep_their_values_and_match_polygons(sdata, transform):
    labels = np.zeros((300, 300), np.int32)
    labels[60:140, 80:200] = 7
    labels[180:220, 90:130] = 1_000_000
    scale = {"s0": Scale([4.0, 4.0], axes=("x", "y"))}
    sdata.labels["mask"] = Labels2DModel.parse(labels, dims=("y", "x"), transformations=scale)
    box = gpd.GeoDataFrame(geometry=[shapely.box(80, 60, 200, 140)])  # px
    sdata.shapes["boxes"] = ShapesModel.parse(box, transformations=scale)
    si.tl.warp_element(sdata, "mask")
    si.tl.warp_element(sdata, "boxes")
    found = sdata.labels["mask_aligned"]
    to_um = element_affine(found, "aligned")
    values = np.asarray(found.data)
    assert set(np.unique(values)) == {0, 7, 1_000_000}
    assert values.dtype == np.int32
    polygon = sdata.shapes["boxes_aligned"].geometry.iloc[0]
    assert len(polygon.exterior.coords) > 50  # edges got vertices
    y, x = np.mgrid[: values.shape[0], : values.shape[1]] + 0.5
    um = np.stack([x, y], -1) @ to_um[:2, :2].T + to_um[:2, 2]
    inside = shapely.contains_xy(polygon, um[..., 0], um[..., 1])
    union = (inside | (values == 7)).sum()
    assert (inside & (values == 7)).sum() > 0.97 * union
    # Every vertex lies where the transform takes a point of the straight edge.
    back = transform.inverse(np.array(polygon.exterior.coords)) / 4.0
    distance = shapely.distance(shapely.points(back), shapely.box(80, 60, 200, 140).exterior)
    assert np.median(distance) * 4.0 < 1


def test_points_keep_columns_and_stay_lazy(sdata, transform):
    frame = pd.DataFrame({"x": [100.0, 200, 150], "y": [50.0, 120, 210], "gene": pd.Categorical(["a", "b", "a"])})
    points = PointsModel.parse(
        dd.from_pandas(frame, npartitions=2),
        feature_key="gene",
        transformations={"s0": Scale([4.0, 4.0], axes=("x", "y"))},
    )
    sdata.points["cells"] = points
    si.tl.warp_element(sdata, "cells")
    moved = sdata.points["cells_aligned"]
    assert moved.npartitions == points.npartitions
    assert moved.attrs["spatialdata_attrs"]["feature_key"] == "gene"
    computed = moved.compute()
    np.testing.assert_allclose(
        computed[["x", "y"]].to_numpy(), transform.points(frame[["x", "y"]].to_numpy() * 4.0), atol=1e-6
    )
    assert list(computed["gene"]) == ["a", "b", "a"]
    assert set(get_transformation(moved, get_all=True)) == {"aligned"}
    assert "s0" in get_transformation(sdata.points["cells"], get_all=True)  # the original is as before


def test_circles_follow_the_spots_of_the_table(sdata, transform):
    before = sdata.shapes["s0_spots"].copy()
    si.tl.warp_element(sdata, "s0_spots")
    circles = sdata.shapes["s0_spots_aligned"]
    own = element_affine(sdata.shapes["s0_spots"], "s0")
    centers = np.column_stack([before.geometry.x, before.geometry.y]) @ own[:2, :2].T + own[:2, 2]
    np.testing.assert_allclose(np.column_stack([circles.geometry.x, circles.geometry.y]), transform.points(centers))
    area = np.abs(np.linalg.det((MATRIX @ own)[:2, :2]))
    ratio = (circles["radius"] / before["radius"]) ** 2 / area
    assert ratio.median() == pytest.approx(1, abs=0.1)
    assert ratio.std() > 0.01  # local
    assert list(circles.index) == list(before.index)


def test_everything_survives_zarr(sdata, transform, tmp_path):
    import spatialdata as sd

    si.tl.warp_element(sdata, "s0_image", pixel_size=8.0)
    si.tl.warp_element(sdata, "s0_spots", key_added="moved")
    sdata.write(tmp_path / "stack.zarr")
    read = sd.read_zarr(tmp_path / "stack.zarr")
    again = load_transform(read, load_record(read), "s0")
    points = np.random.default_rng(0).uniform(0, 1200, (50, 2))
    np.testing.assert_allclose(again.points(points), transform.points(points), atol=1e-3)
    np.testing.assert_allclose(again.inverse(points), transform.inverse(points), atol=1e-3)
    assert list(read.images["s0_displacement"].coords["c"].to_numpy()) == ["dx", "dy"]
    np.testing.assert_array_equal(read.images["s0_image_aligned"].data, sdata.images["s0_image_aligned"].data)
    assert "moved" in read.shapes
    si.tl.warp_element(read, "s0_spots")
    np.testing.assert_allclose(read.shapes["s0_spots_aligned"].geometry.x, sdata.shapes["moved"].geometry.x, atol=1e-3)


def test_own_image_is_white_outside_others_are_black(sdata):
    own = si.tl.warp_element(sdata, "s0_image", inplace=False).data.compute()
    assert (own[:, 0, 0] == 255).all()
    blobs(sdata, np.array([[600.0, 600]]))
    assert si.tl.warp_element(sdata, "blobs", inplace=False).data.compute()[0, 0, 0] == 0
    extent = get_extent(si.tl.warp_element(sdata, "s0_image", inplace=False), coordinate_system="aligned")
    assert extent["x"][1] - extent["x"][0] > 1200  # turned, so wider


def test_pyramid_stays_a_pyramid(sdata):
    rng = np.random.default_rng(0)
    sdata.images["pyramid"] = Image2DModel.parse(
        rng.integers(0, 255, (3, 600, 600), dtype=np.uint8),
        dims=("c", "y", "x"),
        scale_factors=[2],
        chunks={"c": 3, "y": 256, "x": 256},
        transformations={"s0": Scale([2.0, 2.0], axes=("x", "y"))},
    )
    new = si.tl.warp_element(sdata, "pyramid", inplace=False)
    assert len(new.children) == 2
    # A coarse wish is met from a coarse level, by means and not by every n-th pixel: noise averages out.
    coarse = si.tl.warp_element(sdata, "pyramid", pixel_size=16.0, inplace=False)
    data = np.asarray(next(iter(coarse.children.values())).ds["image"].data if hasattr(coarse, "children") else coarse)
    assert data[:, 35:45, 35:45].std() < 30  # single pixels: 74


def test_a_section_without_deformation(sdata):
    si.tl.warp_element(sdata, "s1_spots")
    own = element_affine(sdata.shapes["s1_spots"], "s1")
    x = sdata.shapes["s1_spots"].geometry.x.to_numpy() * own[0, 0] + own[0, 2]
    np.testing.assert_allclose(sdata.shapes["s1_spots_aligned"].geometry.x, x)


@pytest.mark.parametrize(
    ("key", "kwargs", "error", "match"),
    [
        ("nope", {}, KeyError, "'nope' not found"),
        ("s0_spots", {"pixel_size": 2.0}, ValueError, "for images and labels"),
        ("s0_spots", {"section": "s1"}, KeyError, "'s1' not found.*coordinate systems of 's0_spots'"),
        ("s0_spots", {"key_added": "s0_spots"}, ValueError, "must differ"),
        ("s0_image", {"pixel_size": -1.0}, ValueError, "pixel_size"),
        ("s0_image", {"pixel_size": 1e-6}, ValueError, "choose a larger one"),
        ("s0_image", {"pixel_size": 1e-300}, ValueError, "choose a larger one"),
        ("s0_image", {"pixel_size": 10**30}, ValueError, "larger than the image"),
        ("s0_displacement", {}, KeyError, "no transformation to a section"),
    ],
)
def test_bad_input_writes_nothing(sdata, key, kwargs, error, match):
    before = {name for _, name, _ in sdata.gen_spatial_elements()}
    with pytest.raises(error, match=match):
        si.tl.warp_element(sdata, key, **kwargs)
    assert {name for _, name, _ in sdata.gen_spatial_elements()} == before


def test_element_in_two_sections_needs_a_choice(sdata):
    set_transformation(sdata.shapes["s0_spots"], Scale([4.0, 4.0], axes=("x", "y")), "s1")
    with pytest.raises(ValueError, match=r"several sections; give `section`"):
        si.tl.warp_element(sdata, "s0_spots")
    si.tl.warp_element(sdata, "s0_spots", section="s1")
    assert "s0_spots_aligned" in sdata.shapes


def test_unregistered_or_incomplete(sdata):
    del sdata.images["s0_displacement_inverse"]
    with pytest.raises(KeyError, match=r"'s0_displacement_inverse' not found.*register_stack"):
        si.tl.warp_element(sdata, "s0_spots")
    sdata.attrs[Keys.ATTRS]["stack"]["registration"] = None
    with pytest.raises(KeyError, match="not registered"):
        si.tl.warp_element(sdata, "s0_spots")


def test_registering_again_says_that_warped_elements_stay(sdata, caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    si.tl.warp_element(sdata, "s0_spots")
    si.tl.transfer_shapes(sdata, "s0_spots")
    si.tl.register_stack(sdata, transformations={"s0": np.eye(3)})
    assert "['s0_spots_aligned', 's0_spots_on_s1'] keep their place. If `si.tl.warp_element`" in caplog.text


@pytest.mark.parametrize(
    ("factor", "dtype", "white"), [(16, np.uint16, 4095), (1, np.float32, 255), (1, np.uint8, 255)]
)
def test_outside_is_as_bright_as_glass(factor, dtype, white):
    """Also for 12 bits in a wider type, and for floats up to 255."""
    made = si.datasets.synthetic_stack(extent=1400.0)
    pixels = [np.asarray(made.images[f"{name}_image"].data).astype(dtype) * dtype(factor) for name in ("s0", "s1")]
    sdata = si.pp.assemble_stack(dict(zip("ab", pixels, strict=True)), mpp=4.0, section_spacing=20.0)
    turn = np.array([[0.8, -0.6, 300], [0.6, 0.8, 0], [0, 0, 1.0]])
    si.tl.register_stack(sdata, reference="a", transformations={"b": turn}, show_progress_bar=False)
    corner = si.tl.warp_element(sdata, "b_image", inplace=False).data[:, 0, 0].compute()
    assert corner.tolist() == [white] * 3
