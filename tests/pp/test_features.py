from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

import spatial_impute as si
from spatial_impute._stack import load_record, section_levels, spot_geometry

LEVELS = ("X_spot", "X_region", "X_global")


@pytest.fixture(scope="module")
def small():
    """Two small sections; never written to."""
    return si.datasets.synthetic_stack(2, extent=1200.0, n_genes=3, mpp=4.0)


@pytest.fixture
def small_stack(small):
    import copy

    return copy.deepcopy(small)


def mean_colour(patches: np.ndarray) -> np.ndarray:
    return patches.mean(axis=(1, 2))


def sample_patch(image: np.ndarray, center_um: np.ndarray, side: float, n_px: int, mpp: float) -> np.ndarray:
    """Patch by SciPy's own interpolation: (n_px, n_px, 3)."""
    offset = (np.arange(n_px) + 0.5) / n_px * side - side / 2
    x, y = np.meshgrid(center_um[0] + offset, center_um[1] + offset)
    where = [y / mpp - 0.5, x / mpp - 0.5]
    return np.stack([map_coordinates(c.astype(np.float32), where, order=1, mode="nearest") for c in image], axis=-1)


def test_extract_features_equals_the_encoder_on_each_patch(prepared):
    from spatial_impute.models._encoders import TextureEncoder

    encode = TextureEncoder()
    table = prepared.tables["stack"]
    for name in ("s0", "s2"):
        image = np.asarray(prepared.images[f"{name}_image"].data)
        rows = np.flatnonzero(table.obs["section"] == name)[[0, 17, 60]]
        for row in rows:
            center = table.obsm["spatial"][row]
            fields = {"X_spot": 100.0, "X_region": 230.0, "X_global": 460.0}
            for key, side in fields.items():
                views = [(center, side)]
                if key != "X_spot":
                    quarter = side / 4
                    views += [
                        (center + np.array([dx, dy]), side / 2)
                        for dy in (-quarter, quarter)
                        for dx in (-quarter, quarter)
                    ]
                patches = np.stack([sample_patch(image, c, s, encode.patch_px, 4.0) for c, s in views])
                np.testing.assert_allclose(table.obsm[key][row], encode(patches).ravel(), rtol=2e-3, atol=2e-4)


def test_extract_features_shapes_and_record(prepared):
    table = prepared.tables["stack"]
    widths = {key: table.obsm[key].shape[1] for key in LEVELS}
    assert widths == {"X_spot": 25, "X_region": 125, "X_global": 125}
    assert all(table.obsm[key].dtype == np.float32 for key in LEVELS)
    assert all(np.isfinite(table.obsm[key]).all() for key in LEVELS)
    record = table.uns["features"]
    assert record["encoder"] == "texture"
    assert record["n_features"] == 25
    assert record["n_tokens"] == {"X_spot": 1, "X_region": 5, "X_global": 5}
    assert record["field_um"] == pytest.approx({"X_spot": 100, "X_region": 230, "X_global": 460})


def test_extract_features_takes_a_callable(small_stack):
    given = []

    def encoder(patches):
        given.append(patches)
        return mean_colour(patches)

    si.pp.extract_features(small_stack, encoder, patch_px=16, batch_size=10)
    table = small_stack.tables["stack"]
    assert table.uns["features"]["encoder"] == "encoder"
    assert {patches.shape[1:] for patches in given} == {(16, 16, 3)}
    assert max(len(patches) for patches in given) == 10
    assert all(patches.dtype == np.float32 for patches in given)
    image = np.asarray(small_stack.images["s1_image"].data)
    row = int(np.flatnonzero(table.obs["section"] == "s1")[3])
    expected = sample_patch(image, table.obsm["spatial"][row], 100.0, 16, 4.0).mean(axis=(0, 1))
    np.testing.assert_allclose(table.obsm["X_spot"][row], expected, rtol=1e-4)


def test_extract_features_does_not_depend_on_the_batch(small_stack):
    results = []
    for batch_size in (1, 7, 1000):
        si.pp.extract_features(small_stack, mean_colour, patch_px=8, batch_size=batch_size)
        results.append(small_stack.tables["stack"].obsm["X_global"].copy())
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.parametrize("pooled", [True, False])
def test_extract_features_takes_a_module(small_stack, pooled):
    """Feature maps are averaged over the patch; the input is normalised as for ImageNet."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 4, 1)]
    if pooled:
        layers += [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
    module = torch.nn.Sequential(*layers)
    si.pp.extract_features(small_stack, module, patch_px=12, device="cpu")
    found = small_stack.tables["stack"].obsm["X_spot"].copy()
    si.pp.extract_features(small_stack, mean_colour, patch_px=12)
    colour = small_stack.tables["stack"].obsm["X_spot"] / 255
    scaled = (colour - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    weight, bias = (p.detach().numpy() for p in module[0].parameters())
    np.testing.assert_allclose(found, scaled @ weight[:, :, 0, 0].T + bias, atol=1e-4)


def test_extract_features_names_a_module_by_its_weights(small_stack):
    names = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        si.pp.extract_features(small_stack, torch.nn.Conv2d(3, 2, 1), patch_px=8, device="cpu")
        names.append(small_stack.tables["stack"].uns["features"]["encoder"])
    assert names[0] == names[1] != names[2]
    assert names[0].startswith("Conv2d-")


def test_extract_features_runs_modules_in_evaluation_mode(small_stack):
    module = torch.nn.Sequential(torch.nn.Dropout(0.9), torch.nn.Conv2d(3, 2, 1)).train()
    results = []
    for _ in range(2):
        si.pp.extract_features(small_stack, module, patch_px=8, device="cpu")
        results.append(small_stack.tables["stack"].obsm["X_spot"].copy())
    np.testing.assert_array_equal(*results)


def test_extract_features_joins_by_name(small_stack):
    si.pp.extract_features(small_stack, mean_colour, patch_px=8)
    expected = {key: small_stack.tables["stack"].obsm[key].copy() for key in LEVELS}
    order = np.random.default_rng(0).permutation(small_stack.tables["stack"].n_obs)
    small_stack.tables["stack"] = small_stack.tables["stack"][order].copy()
    si.pp.extract_features(small_stack, mean_colour, patch_px=8)
    for key in LEVELS:
        np.testing.assert_array_equal(small_stack.tables["stack"].obsm[key], expected[key][order])


def test_extract_features_does_not_depend_on_other_sections(small_stack):
    si.pp.extract_features(small_stack)
    table = small_stack.tables["stack"]
    before = table.obsm["X_global"].copy()
    small_stack.images["s0_image"].data[:] = 0
    si.pp.extract_features(small_stack)
    rows = (table.obs["section"] == "s1").to_numpy()
    np.testing.assert_array_equal(table.obsm["X_global"][rows], before[rows])
    assert not np.allclose(table.obsm["X_global"][~rows], before[~rows])


def test_extract_features_sees_its_own_field_only(small_stack):
    """Painting a square of the image changes exactly the spots whose fields reach it."""
    si.pp.extract_features(small_stack, mean_colour, patch_px=32)
    table = small_stack.tables["stack"]
    before = {key: table.obsm[key].copy() for key in LEVELS}
    image = small_stack.images["s0_image"].data.compute()
    low, high = 130, 150  # px, so 520 to 600 um
    image[:, low:high, low:high] = 0
    small_stack.images["s0_image"].data = image
    si.pp.extract_features(small_stack, mean_colour, patch_px=32)
    xy = table.obsm["spatial"]
    away = np.maximum(np.maximum(low * 4.0 - xy, xy - high * 4.0), 0).max(axis=1)  # from the square, per axis
    away[(table.obs["section"] != "s0").to_numpy()] = np.inf
    for key, side in zip(LEVELS, (100.0, 230.0, 460.0), strict=True):
        changed = (np.abs(table.obsm[key] - before[key]) > 1e-5).any(axis=1)
        reach = side / 2 + 2 * max(4.0, side / 32)  # a pixel of image and patch beyond the field
        assert not changed[away > reach].any()
        assert changed[away < side / 2 - 8].all()
        assert changed.any()


def test_extract_features_quadrants_are_in_row_major_order(small_stack):
    """On a ramp in x and y the quadrants of a field differ as their places do."""
    height, width = small_stack.images["s0_image"].shape[1:]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    small_stack.images["s0_image"].data = np.stack([x / 2, y / 2, x * 0 + 50]).astype(np.uint8)
    si.pp.extract_features(small_stack, mean_colour, patch_px=32)
    table = small_stack.tables["stack"]
    inner = (table.obs["section"] == "s0").to_numpy() & (np.abs(table.obsm["spatial"] - 600) < 250).all(axis=1)
    field, *quadrants = np.split(table.obsm["X_region"][inner], 5, axis=1)
    signs = [(-1, -1), (1, -1), (-1, 1), (1, 1)]  # x, y
    for quadrant, (sx, sy) in zip(quadrants, signs, strict=True):
        shift = 230 / 4 / 4.0 / 2  # a quarter of the field in px, half a grey level each
        np.testing.assert_allclose(quadrant[:, 0] - field[:, 0], sx * shift, atol=0.6)
        np.testing.assert_allclose(quadrant[:, 1] - field[:, 1], sy * shift, atol=0.6)


def test_extract_features_scales_are_in_spot_diameters(small_stack):
    si.pp.extract_features(small_stack, mean_colour, patch_px=8, region_scale=1.0, global_scale=3.0)
    table = small_stack.tables["stack"]
    np.testing.assert_array_equal(table.obsm["X_region"][:, :3], table.obsm["X_spot"])
    assert table.uns["features"]["field_um"]["X_global"] == pytest.approx(300)
    with pytest.raises(ValueError, match="`region_scale` must be a positive number"):
        si.pp.extract_features(small_stack, mean_colour, region_scale=0)


def test_extract_features_refuses_spots_off_their_image(small_stack):
    spots = small_stack.shapes["s0_spots"]
    spots.geometry = spots.geometry.translate(0, 290)
    with pytest.raises(ValueError, match=r"spots of `sdata.shapes\['s0_spots'\]` lie off their image of 300 x 300 px"):
        si.pp.extract_features(small_stack, mean_colour)
    assert "X_spot" not in small_stack.tables["stack"].obsm


@pytest.mark.parametrize(
    ("encoder", "error", "message"),
    [
        ("vgg", ValueError, "Unknown encoder 'vgg'.*'texture'"),
        (3, TypeError, "`encoder` must be a name, a callable or an nn.Module, found int"),
        (lambda p: np.full((len(p), 2), np.nan), ValueError, "must return finite numbers of shape .* with NaN or inf"),
        (lambda p: np.zeros((len(p) + 1, 2)), ValueError, "must return finite numbers of shape"),
        (lambda p: np.zeros(len(p)), ValueError, "must return finite numbers of shape"),
    ],
)
def test_extract_features_refuses_bad_encoders(small_stack, encoder, error, message):
    with pytest.raises(error, match=message):
        si.pp.extract_features(small_stack, encoder, patch_px=8)
    assert "X_spot" not in small_stack.tables["stack"].obsm


def test_extract_features_refuses_a_table_that_lacks_spots(small_stack):
    small_stack.tables["stack"] = small_stack.tables["stack"][:-1].copy()
    with pytest.raises(ValueError, match="the spots differ"):
        si.pp.extract_features(small_stack, mean_colour, patch_px=8)


def test_extract_features_follows_the_pyramid(small_stack):
    """Large fields are read from a coarse level, and give what the full resolution gives."""
    import xarray as xr

    from spatial_impute.pp._section import image_element

    si.pp.extract_features(small_stack, mean_colour, patch_px=8)
    expected = small_stack.tables["stack"].obsm["X_global"].copy()
    fine = small_stack.images["s0_image"].data.compute()
    coarse = fine.reshape(3, 150, 2, 150, 2).mean(axis=(2, 4)).round().astype(np.uint8)
    pyramid = image_element([fine, coarse], "s0", 4.0)
    assert isinstance(pyramid, xr.DataTree)
    small_stack.images["s0_image"] = pyramid
    assert len(section_levels(small_stack, load_record(small_stack)["s0"])) == 2
    si.pp.extract_features(small_stack, mean_colour, patch_px=8)
    found = small_stack.tables["stack"].obsm["X_global"]
    rows = (small_stack.tables["stack"].obs["section"] == "s0").to_numpy()
    assert not np.array_equal(found[rows], expected[rows])
    for channel in range(3):
        assert np.corrcoef(found[rows, channel], expected[rows, channel])[0, 1] > 0.9


def test_spot_geometry_refuses_ellipses(small_stack):
    from spatialdata.transformations import Scale, set_transformation

    record = load_record(small_stack)
    set_transformation(small_stack.shapes["s0_spots"], Scale([4, 8], axes=("x", "y")), "s0")
    with pytest.raises(ValueError, match=r"stretches one axis 2\.00 times more"):
        spot_geometry(small_stack, record["s0"])
