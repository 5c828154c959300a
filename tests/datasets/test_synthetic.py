from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.spatial import cKDTree
from skimage.color import rgb2hed

import spatial_impute as si
from spatial_impute._geometry import anisotropy, linear_scale
from spatial_impute._stack.record import load_record

SMALL = {"n_sections": 2, "extent": 1200.0, "n_genes": 6}


def fit_affine(source: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least-squares affine (3, 3) and its residuals."""
    design = np.column_stack([source, np.ones(len(source))])
    solution = np.linalg.lstsq(design, target, rcond=None)[0]
    matrix = np.vstack([solution.T, [0, 0, 1]])
    return matrix, target - design @ solution


def rows_of(sdata, name: str) -> np.ndarray:
    return (sdata.tables["stack"].obs["section"] == name).to_numpy()


def test_synthetic_stack_is_deterministic():
    (a, truth_a), (b, truth_b) = (si.datasets.synthetic_stack(**SMALL, seed=3, truth=True) for _ in range(2))
    for key in a.images:
        np.testing.assert_array_equal(np.asarray(a.images[key].data), np.asarray(b.images[key].data))
    np.testing.assert_array_equal(a.tables["stack"].layers["measured"], b.tables["stack"].layers["measured"])
    pd.testing.assert_frame_equal(a.tables["stack"].obs, b.tables["stack"].obs)
    np.testing.assert_array_equal(truth_a.X.toarray(), truth_b.X.toarray())
    np.testing.assert_array_equal(truth_a.obsm["spatial_3d"], truth_b.obsm["spatial_3d"])


def test_synthetic_stack_follows_the_seed():
    a, b = (si.datasets.synthetic_stack(**SMALL, seed=seed) for seed in (0, 1))
    assert not np.array_equal(np.asarray(a.images["s0_image"].data), np.asarray(b.images["s0_image"].data))


def test_synthetic_stack_does_not_depend_on_the_global_generator():
    np.random.seed(0)  # noqa: NPY002
    a = si.datasets.synthetic_stack(**SMALL)
    state = np.random.random()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    assert np.random.random() == state  # noqa: NPY002
    b = si.datasets.synthetic_stack(**SMALL)
    np.testing.assert_array_equal(np.asarray(a.images["s1_image"].data), np.asarray(b.images["s1_image"].data))


def test_synthetic_stack_keeps_the_contract(synthetic):
    sdata, truth = synthetic
    record = load_record(sdata)
    assert record.names == ("s0", "s1", "s2")
    assert [section.z for section in record.sections] == [0, 20, 40]
    assert record.reference == "s1"
    assert set(sdata.coordinate_systems) == {"s0", "s1", "s2"}
    table = sdata.tables["stack"]
    assert list(table.obs_names) == list(truth.obs_names)
    # Housekeeping genes are counted, but nothing is to be told about them.
    assert list(table.var_names) == list(truth.var_names[truth.var["kind"] != "housekeeping"])
    assert list(sdata.tables["s1_counts"].var_names) == list(truth.var_names)
    assert (table.obs["measured"] == (table.obs["section"] == "s1")).all()
    assert table.X is None


def test_synthetic_stack_has_the_sizes_requested(synthetic):
    sdata, _ = synthetic
    for name in ("s0", "s1", "s2"):
        assert sdata.images[f"{name}_image"].shape == (3, 600, 600)
        xy = sdata.tables["stack"].obsm["spatial"][rows_of(sdata, name)]
        np.testing.assert_allclose(cKDTree(xy).query(xy, k=2)[0][:, 1], 160, atol=1e-6)
        circles = sdata.shapes[f"{name}_spots"]
        np.testing.assert_allclose(circles["radius"] * 4.0, 50)  # px of 4 um


def test_synthetic_stack_motion_is_rotation_shift_and_a_small_elastic_part(synthetic):
    sdata, truth = synthetic
    for i, name in enumerate(("s0", "s1", "s2")):
        rows = rows_of(sdata, name)
        own = sdata.tables["stack"].obsm["spatial"][rows]
        tissue = truth.obsm["spatial_3d"][rows]
        np.testing.assert_allclose(tissue[:, 2], 20.0 * i)
        if name == "s1":
            np.testing.assert_allclose(tissue[:, :2], own)
            continue
        matrix, residual = fit_affine(own, tissue[:, :2])
        angle = np.rad2deg(np.arctan2(matrix[1, 0], matrix[0, 0]))
        assert 0.1 < abs(angle) <= 26
        assert linear_scale(matrix) == pytest.approx(1, abs=0.05)
        assert anisotropy(matrix) < 1.1
        centre = matrix[:2] @ [1200, 1200, 1]
        assert np.abs(centre - 1200).max() <= 150 + 20
        assert 1 < np.sqrt(np.mean(residual**2)) < 12


def test_synthetic_stack_without_elastic_motion_is_affine():
    sdata, truth = si.datasets.synthetic_stack(**SMALL, elastic_amplitude=0.0, truth=True)
    rows = rows_of(sdata, "s0")
    _, residual = fit_affine(sdata.tables["stack"].obsm["spatial"][rows], truth.obsm["spatial_3d"][rows, :2])
    assert np.abs(residual).max() < 1e-6


def test_synthetic_stack_without_motion_lies_in_place():
    sdata, truth = si.datasets.synthetic_stack(**SMALL, max_rotation=0, max_shift=0, elastic_amplitude=0, truth=True)
    np.testing.assert_allclose(truth.obsm["spatial_3d"][:, :2], sdata.tables["stack"].obsm["spatial"], atol=1e-9)


def test_synthetic_stack_measured_values_are_the_truth(synthetic):
    sdata, truth = synthetic
    rows = rows_of(sdata, "s1")
    measured = sdata.tables["stack"].layers["measured"]
    chosen = truth.var_names.get_indexer(sdata.tables["stack"].var_names)
    np.testing.assert_allclose(measured[rows], truth.X[rows].toarray()[:, chosen], rtol=1e-5)
    counts = truth.layers["counts"][rows].toarray()
    np.testing.assert_array_equal(sdata.tables["s1_counts"].X.toarray(), counts)
    expected = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(measured[rows], expected[:, chosen], rtol=1e-5)


def test_synthetic_stack_keeps_the_truth_of_other_sections_out(synthetic):
    sdata, truth = synthetic
    assert set(sdata.tables) == {"s1_counts", "stack"}
    table = sdata.tables["stack"]
    assert set(table.layers) == {"measured"}
    assert np.isnan(table.layers["measured"][~rows_of(sdata, "s1")]).all()
    assert set(table.obsm) == {"spatial"}
    counts = sdata.tables["s1_counts"]
    assert counts.n_obs == rows_of(sdata, "s1").sum()
    assert not counts.layers
    assert not counts.obsm
    assert "kind" not in counts.var
    assert "kind" not in table.var
    assert set(truth.obs["section"]) == {"s0", "s1", "s2"}


def test_synthetic_stack_with_several_measured_sections():
    sdata = si.datasets.synthetic_stack(**(SMALL | {"n_sections": 3}), measured=["s2", "s0"])
    table = sdata.tables["stack"]
    assert set(table.obs["section"][table.obs["measured"]]) == {"s0", "s2"}
    np.testing.assert_array_equal(np.isfinite(table.layers["measured"]).all(axis=1), table.obs["measured"])
    assert {"s0_counts", "s2_counts"} < set(sdata.tables)


def test_synthetic_stack_without_measurement():
    sdata, truth = si.datasets.synthetic_stack(**SMALL, measured=[], truth=True)
    assert set(sdata.tables) == {"stack"}
    assert not sdata.tables["stack"].obs["measured"].any()
    assert truth.n_obs == sdata.tables["stack"].n_obs


def test_synthetic_stack_smooth_genes_are_predicted_by_the_next_section(synthetic):
    _, truth = synthetic
    expected, place = truth.layers["expected"], truth.obsm["spatial_3d"]
    one, two = (np.flatnonzero(truth.obs["section"] == name) for name in ("s1", "s2"))
    nearest = one[cKDTree(place[one, :2]).query(place[two, :2])[1]]
    r = np.array([np.corrcoef(expected[two, g], expected[nearest, g])[0, 1] for g in range(truth.n_vars)])
    kind = truth.var["kind"].to_numpy()
    assert r[kind == "smooth"].mean() > 0.75
    assert abs(r[kind == "noise"].mean()) < 0.15
    assert r[kind == "texture"].mean() < 0.5


@pytest.mark.parametrize("name", ["s0", "s1", "s2"])
def test_synthetic_stack_texture_genes_follow_the_nuclei_in_the_image(synthetic, name):
    sdata, truth = synthetic
    rows = rows_of(sdata, name)
    image = np.moveaxis(np.asarray(sdata.images[f"{name}_image"].data), 0, -1)
    hematoxylin = rgb2hed(image)[..., 0]
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    tree = cKDTree(np.column_stack([x.ravel(), y.ravel()]) * 4.0 + 2.0)
    discs = tree.query_ball_point(sdata.tables["stack"].obsm["spatial"][rows], 50)
    nuclei = np.array([hematoxylin.ravel()[disc].mean() for disc in discs])
    expected = truth.layers["expected"][rows]
    r = np.array([np.corrcoef(nuclei, expected[:, g])[0, 1] for g in range(truth.n_vars)])
    kind = truth.var["kind"].to_numpy()
    assert np.abs(r[kind == "texture"]).mean() > 0.5
    assert np.abs(r[kind == "noise"]).mean() < 0.2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_sections": 0}, ValueError, "`n_sections` >= 1"),
        ({"n_genes": 2}, ValueError, "`n_genes` >= 3"),
        ({"mpp": 0}, ValueError, "`mpp` must be a positive number"),
        ({"measured": ["s9"]}, KeyError, r"'s9' not found in `sections`; available: \['s0', 's1'\]"),
    ],
)
def test_synthetic_stack_rejects_impossible_arguments(options, error, message):
    with pytest.raises(error, match=message):
        si.datasets.synthetic_stack(**(SMALL | options))
