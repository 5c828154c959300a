from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import shapely

from spatial_impute._geometry import anisotropy, apply_affine, disc_iou, grid_in_box, linear_scale, scaling, xy_of


def rotation(degrees: float) -> np.ndarray:
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])


def test_apply_affine_maps_points_as_column_vectors():
    matrix = np.array([[0, -1, 10], [1, 0, 0], [0, 0, 1.0]])
    np.testing.assert_allclose(apply_affine([[1, 2]], matrix), [[8, 1]])
    np.testing.assert_allclose(apply_affine(apply_affine([[1, 2]], matrix), np.linalg.inv(matrix)), [[1, 2]])


def test_apply_affine_composes_like_matrices():
    rng = np.random.default_rng(0)
    a, b = (np.vstack([rng.normal(size=(2, 3)), [0, 0, 1]]) for _ in range(2))
    points = rng.normal(size=(7, 2))
    np.testing.assert_allclose(apply_affine(apply_affine(points, a), b), apply_affine(points, b @ a), atol=1e-12)


def test_apply_affine_leaves_its_input():
    points = np.ones((2, 2))
    apply_affine(points, scaling(3.0))
    assert (points == 1).all()


@pytest.mark.parametrize(
    ("columns", "order"),
    [
        (["x", "y"], (0, 1)),
        (["y", "x"], (1, 0)),
        (["Y_px", "X_px"], (1, 0)),
        (["spatial1", "spatial2"], (0, 1)),
        (["id", "x_um", "y_um"], (1, 2)),
        (["x_raw", "y_raw", "x", "y"], (2, 3)),
        (["imagerow", "imagecol"], (1, 0)),
        (["pxl_row_in_fullres", "pxl_col_in_fullres"], (1, 0)),
        (["array_row", "array_col"], (1, 0)),
        (["max", "yes"], (0, 1)),
    ],
)
def test_positions_in_a_table_are_found_by_name(columns, order):
    values = np.arange(2.0 * len(columns)).reshape(2, -1)
    np.testing.assert_array_equal(xy_of(pd.DataFrame(values, columns=columns)), values[:, list(order)])
    np.testing.assert_array_equal(xy_of(values), values[:, :2])


@pytest.mark.parametrize("columns", [["row", "col", "array_row", "array_col"], ["row", "z"], ["x", "x_raw"]])
def test_positions_in_a_table_of_unclear_names_are_refused(columns):
    with pytest.raises(ValueError, match=r"must tell x from y, found \['.*Give an array with x and y"):
        xy_of(pd.DataFrame(np.zeros((2, len(columns))), columns=columns))


def test_scaling_of_one_and_two_factors():
    np.testing.assert_array_equal(apply_affine([[1, 1]], scaling(2.0)), [[2, 2]])
    np.testing.assert_array_equal(apply_affine([[1, 1]], scaling(2.0, 3.0)), [[2, 3]])


def test_linear_scale_ignores_rotation_and_flip():
    flip = np.diag([-1.0, 1, 1])
    assert linear_scale(rotation(33) @ flip @ scaling(0.5)) == pytest.approx(0.5)
    assert linear_scale(scaling(2, 8)) == pytest.approx(4)


def test_anisotropy_of_similarity_stretch_and_collapse():
    assert anisotropy(rotation(70) @ scaling(3)) == pytest.approx(1)
    assert anisotropy(rotation(70) @ scaling(1, 4)) == pytest.approx(4)
    assert anisotropy(np.diag([1.0, 0, 1])) == np.inf


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(0, 1), (0.25, 0.726013), (0.5, 0.520956), (1, 0.243010), (1.5, 0.077757), (2, 0), (3, 0)],
)
@pytest.mark.parametrize("radius", [1.0, 27.5, 112.0])
def test_disc_iou_of_equal_discs(ratio, expected, radius):
    assert disc_iou(ratio * radius, radius, radius) == pytest.approx(expected, abs=1e-6)


def test_disc_iou_matches_published_offset():
    assert disc_iou(np.hypot(60, 30), 112, 112) == pytest.approx(0.453993, abs=1e-6)


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (1.0, 2.5), (4.0, 0.3)])
def test_disc_iou_matches_polygons(a, b):
    distances = np.linspace(0, (a + b) * 1.1, 23)
    found = disc_iou(distances, a, b)
    for distance, value in zip(distances, found, strict=True):
        one = shapely.Point(0, 0).buffer(a, quad_segs=256)
        two = shapely.Point(distance, 0).buffer(b, quad_segs=256)
        assert value == pytest.approx(one.intersection(two).area / one.union(two).area, abs=2e-4)


def test_disc_iou_is_symmetric_bounded_and_scale_invariant():
    rng = np.random.default_rng(0)
    d, a, b = rng.uniform(0, 3, 500), rng.uniform(0.1, 2, 500), rng.uniform(0.1, 2, 500)
    value = disc_iou(d, a, b)
    np.testing.assert_allclose(value, disc_iou(d, b, a), atol=1e-12)
    np.testing.assert_allclose(value, disc_iou(1e3 * d, 1e3 * a, 1e3 * b), atol=1e-9)
    assert ((value >= 0) & (value <= 1)).all()
    assert (value[d >= a + b] == 0).all()


def test_disc_iou_of_disc_within_disc_is_area_ratio():
    assert disc_iou(0.2, 1.0, 3.0) == pytest.approx(1 / 9)
    assert disc_iou(0.0, 2.0, 1.0) == pytest.approx(1 / 4)


@pytest.mark.parametrize(("layout", "n_neighbors"), [("square", 4), ("hex", 6)])
def test_grid_in_box_has_the_spacing_everywhere(layout, n_neighbors):
    from scipy.spatial import cKDTree

    grid = grid_in_box(-50, 20, 950, 820, spacing=100, layout=layout)
    tree = cKDTree(grid)
    np.testing.assert_allclose(tree.query(grid, k=2)[0][:, 1], 100, atol=1e-9)
    counts = np.array([len(found) - 1 for found in tree.query_ball_point(grid, 100 + 1e-6)])
    assert counts.max() == n_neighbors
    assert (counts == n_neighbors).mean() > 0.5


@pytest.mark.parametrize("layout", ["square", "hex"])
def test_grid_in_box_is_centred(layout):
    grid = grid_in_box(0, 0, 1000, 600, spacing=70, layout=layout)
    middle = (grid.min(axis=0) + grid.max(axis=0)) / 2
    np.testing.assert_allclose(middle, [500, 300], atol=1e-9)
    assert (grid[:, 1] >= 0).all()
    assert (grid[:, 1] <= 600).all()


def test_grid_in_box_stays_in_the_box():
    grid = grid_in_box(0, 0, 1000, 600, spacing=100, layout="hex")
    assert grid[:, 0].min() >= 0
    assert grid[:, 0].max() <= 1000


def test_grid_in_box_smaller_than_spacing_gives_the_centre():
    np.testing.assert_allclose(grid_in_box(0, 0, 10, 20, spacing=100, layout="square"), [[5, 10]])
