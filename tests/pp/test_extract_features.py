from __future__ import annotations

import dask.array as da
import geopandas as gpd
import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from spatialdata.models import Image2DModel
from spatialdata.transformations import Scale

import spatial_impute as si
from spatial_impute._settings import logger
from spatial_impute._stack.elements import section_levels, spot_geometry
from spatial_impute._stack.record import load_record
from spatial_impute._stack.state import section_images
from spatial_impute.encoders._encoder import TextureEncoder

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


def by_hand(image, center, field: float, encode, mpp: float) -> np.ndarray:
    """Token of one field: every patch of the section's lattice cut and encoded by itself, weighted by shared area."""
    extent = encode.patch_px * encode.mpp
    step_px = getattr(encode, "step_px", None)
    step = extent if step_px is None else step_px * encode.mpp
    size = np.array(image.shape[:0:-1]) * mpp
    first, last = np.floor((center - field / 2) / step), np.floor((center + field / 2) / step)
    weights, patches = [], []
    for i in range(int(first[1]), int(last[1]) + 1):
        for j in range(int(first[0]), int(last[0]) + 1):
            corner = np.array([j, i]) * step
            shared = np.minimum(corner + step, center + field / 2) - np.maximum(corner, center - field / 2)
            middle = corner + step / 2
            if (shared > 0).all() and (middle >= 0).all() and (middle <= size).all():
                weights.append(shared.prod())
                patches.append(sample_patch(image, middle, extent, encode.patch_px, mpp))
    weights = np.array(weights)[:, None] / np.sum(weights)
    features = encode(np.stack(patches)).astype(float)
    mean = (weights * features).sum(axis=0)
    return np.concatenate([mean, np.sqrt((weights * (features - mean) ** 2).sum(axis=0))])


@pytest.mark.parametrize("name", ["texture", "tellez-multitask"])
def test_extract_features_equals_the_encoder_on_each_patch(small_stack, name, weights_at_hand):
    """To 1e-5 of the features, inside the section, at the border of the image and in its corner."""
    from spatial_impute.encoders._encoder import resolve_encoder

    if name == "tellez-multitask" and not weights_at_hand:
        pytest.skip("needs the weights")
    encode = resolve_encoder(name, device="cpu")
    spots = small_stack.shapes["s1_spots"]
    places = np.array([[600.0, 600.0], [3.0, 611.0], [1198.0, 1.0]])
    spots = spots.iloc[: len(places)].copy()
    spots.geometry = gpd.points_from_xy(*(places / 4.0).T)
    spots["radius"] = 12.5
    small_stack.shapes["s1_spots"] = spots
    keep = [f"s1_{i}" for i in spots.index]
    table = small_stack.tables["stack"]
    small_stack.tables["stack"] = table[(table.obs["section"] == "s0").to_numpy() | table.obs_names.isin(keep)].copy()
    si.pp.extract_features(small_stack, name, device="cpu")
    table = small_stack.tables["stack"]
    image = np.asarray(small_stack.images["s1_image"].data)
    fields = {
        "X_region": [(230.0, (0, 0)), (230 * 2**0.5, (0, 0))],
        "X_global": [(460.0, (0, 0)), (920.0, (0, 0))]
        + [(460.0, (dx, dy)) for dy in (-230.0, 230.0) for dx in (-230.0, 230.0)],
    }
    for place, row in zip(places, keep, strict=True):
        found = table[row]
        for key, tokens in fields.items():
            if name == "tellez-multitask" and key == "X_global":
                continue  # thousands of patches by hand; its windows are long since past in the region
            width = found.obsm[key].shape[1] // len(tokens)
            for k, (side, shift) in enumerate(tokens):
                inside = (np.abs(place + shift - 600) < 600 + side / 2).all()
                if not inside:
                    continue  # a quadrant beyond the image takes the nearest cell
                expected = by_hand(image, place + shift, side, encode, 4.0)
                token = found.obsm[key][0, k * width : (k + 1) * width]
                np.testing.assert_allclose(token, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
        if hasattr(encode, "step_px"):
            expected = by_hand(image, place, 100.0, encode, 4.0)
        else:
            middles = [place + np.array([dx, dy]) for dy in (-25, 25) for dx in (-25, 25)]
            extent = encode.patch_px * encode.mpp
            own = encode(np.stack([sample_patch(image, m, extent, encode.patch_px, 4.0) for m in middles])).astype(
                float
            )
            expected = np.concatenate([own.mean(axis=0), own.std(axis=0)])
        np.testing.assert_allclose(found.obsm["X_spot"][0], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_extract_features_shapes_and_record(prepared):
    table = prepared.tables["stack"]
    widths = {key: table.obsm[key].shape[1] for key in LEVELS}
    assert widths == {"X_spot": 50, "X_region": 100, "X_global": 300}
    assert all(table.obsm[key].dtype == np.float32 for key in LEVELS)
    assert all(np.isfinite(table.obsm[key]).all() for key in LEVELS)
    record = table.uns["features"]
    assert record["encoder"] == "texture"
    assert record["mpp"] == 2.0
    assert record["n_features"] == 50
    assert record["n_tokens"] == {"X_spot": 1, "X_region": 2, "X_global": 6}
    assert record["field_tokens"] == {"X_spot": [0], "X_region": [0], "X_global": [0, 1]}
    assert record["field_um"] == pytest.approx({"X_spot": 100, "X_region": 230, "X_global": 460})


def test_extract_features_takes_a_callable(small_stack):
    given = []

    def encoder(patches):
        given.append(patches)
        return mean_colour(patches)

    si.pp.extract_features(small_stack, encoder, patch_px=16, mpp=6.25, batch_size=10)
    table = small_stack.tables["stack"]
    assert table.uns["features"]["encoder"] == "encoder"
    assert {patches.shape[1:] for patches in given} == {(16, 16, 3)}
    assert max(len(patches) for patches in given) == 10
    assert all(patches.dtype == np.float32 for patches in given)
    image = np.asarray(small_stack.images["s1_image"].data)
    row = int(np.flatnonzero(table.obs["section"] == "s1")[3])
    expected = sample_patch(image, table.obsm["spatial"][row], 100.0, 16, 4.0).mean(axis=(0, 1))
    np.testing.assert_allclose(table.obsm["X_spot"][row], [*expected, 0, 0, 0], rtol=1e-4)  # one patch has no spread


def test_extract_features_does_not_depend_on_the_batch(small_stack):
    results = []
    for batch_size in (1, 7, 1000):
        si.pp.extract_features(small_stack, mean_colour, patch_px=8, mpp=8.0, batch_size=batch_size)
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
    si.pp.extract_features(small_stack, module, patch_px=12, mpp=8.0, device="cpu")
    found = small_stack.tables["stack"].obsm["X_spot"][:, :4].copy()
    si.pp.extract_features(small_stack, mean_colour, patch_px=12, mpp=8.0)
    colour = small_stack.tables["stack"].obsm["X_spot"][:, :3] / 255
    scaled = (colour - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    weight, bias = (p.detach().numpy() for p in module[0].parameters())
    np.testing.assert_allclose(found, scaled @ weight[:, :, 0, 0].T + bias, atol=1e-4)


def test_extract_features_names_a_module_by_its_weights(small_stack):
    names = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        si.pp.extract_features(small_stack, torch.nn.Conv2d(3, 2, 1), patch_px=8, mpp=8.0, device="cpu")
        names.append(small_stack.tables["stack"].uns["features"]["encoder"])
    assert names[0] == names[1] != names[2]
    assert names[0].startswith("Conv2d-")


def test_extract_features_runs_modules_in_evaluation_mode(small_stack):
    module = torch.nn.Sequential(torch.nn.Dropout(0.9), torch.nn.Conv2d(3, 2, 1)).train()
    results = []
    for _ in range(2):
        si.pp.extract_features(small_stack, module, patch_px=8, mpp=8.0, device="cpu")
        results.append(small_stack.tables["stack"].obsm["X_spot"].copy())
    np.testing.assert_array_equal(*results)


def test_extract_features_joins_by_name(small_stack):
    si.pp.extract_features(small_stack, mean_colour, patch_px=8, mpp=8.0)
    expected = {key: small_stack.tables["stack"].obsm[key].copy() for key in LEVELS}
    order = np.random.default_rng(0).permutation(small_stack.tables["stack"].n_obs)
    small_stack.tables["stack"] = small_stack.tables["stack"][order].copy()
    si.pp.extract_features(small_stack, mean_colour, patch_px=8, mpp=8.0)
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
    si.pp.extract_features(small_stack, mean_colour, patch_px=32, mpp=2.0)
    table = small_stack.tables["stack"]
    before = {key: table.obsm[key].copy() for key in LEVELS}
    image = small_stack.images["s0_image"].data.compute()
    low, high = 130, 150  # px, so 520 to 600 um
    image[:, low:high, low:high] = 0
    small_stack.images["s0_image"].data = image
    si.pp.extract_features(small_stack, mean_colour, patch_px=32, mpp=2.0)
    xy = table.obsm["spatial"]
    away = np.maximum(np.maximum(low * 4.0 - xy, xy - high * 4.0), 0).max(axis=1)  # from the square, per axis
    away[(table.obs["section"] != "s0").to_numpy()] = np.inf
    extent, pixel = 64.0, 4.0
    fields = {"X_spot": 100.0, "X_region": 230.0 * 2**0.5, "X_global": 920.0}
    for key, side in fields.items():
        changed = (np.abs(table.obsm[key] - before[key]) > 1e-5).any(axis=1)
        # Patches in the field reach beyond it by half of themselves; a cell is in it as soon as it touches it.
        assert not changed[away > side / 2 + extent + 2 * pixel].any()
        assert changed[away < side / 2 - extent / 2].all()
        assert changed.any()


def test_extract_features_quadrants_are_in_row_major_order(small_stack):
    """On a ramp in x and y the quadrants of a field differ as their places do."""
    height, width = small_stack.images["s0_image"].shape[1:]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    small_stack.images["s0_image"].data = np.stack([x / 2, y / 2, x * 0 + 50]).astype(np.uint8)
    si.pp.extract_features(small_stack, mean_colour, patch_px=8, mpp=8.0, global_scale=3.0)
    table = small_stack.tables["stack"]
    inner = (table.obs["section"] == "s0").to_numpy() & (np.abs(table.obsm["spatial"] - 600) < 250).all(axis=1)
    assert inner.any()
    tokens = np.split(table.obsm["X_global"][inner], 6, axis=1)
    signs = [(-1, -1), (1, -1), (-1, 1), (1, 1)]  # x, y
    shift = 150 / 4.0 / 2  # half a global field in px, half a grey level each
    for quadrant, (sx, sy) in zip(tokens[2:], signs, strict=True):
        np.testing.assert_allclose(quadrant[:, 0] - tokens[1][:, 0], sx * shift, atol=1.0)
        np.testing.assert_allclose(quadrant[:, 1] - tokens[1][:, 1], sy * shift, atol=1.0)
    # A field twice as wide shows twice the spread of a ramp.
    np.testing.assert_allclose(tokens[1][:, 3] / tokens[0][:, 3], 2.0, rtol=0.1)


def test_extract_features_scales_are_in_spot_diameters(small_stack):
    options = {"patch_px": 8, "mpp": 4.0}
    si.pp.extract_features(small_stack, mean_colour, region_scale=4.0, global_scale=2.0, **options)
    table = small_stack.tables["stack"]
    region = table.obsm["X_region"][:, :6]
    assert table.uns["features"]["field_um"] == pytest.approx({"X_spot": 100, "X_region": 400, "X_global": 200})
    np.testing.assert_allclose(region, table.obsm["X_global"][:, 6:12], rtol=1e-5)  # twice the global field
    with pytest.raises(ValueError, match="`region_scale` must be a positive number"):
        si.pp.extract_features(small_stack, mean_colour, region_scale=0, **options)


def counting(image: np.ndarray, chunk: int) -> tuple[da.Array, dict]:
    """The image in chunks, and how often each of them was made."""
    made: dict = {}

    def make(block, block_info=None):
        place = tuple(block_info[0]["chunk-location"][1:])
        made[place] = made.get(place, 0) + 1
        return block

    lazy = da.from_array(image, chunks=(-1, chunk, chunk))
    return lazy.map_blocks(make, dtype=image.dtype, meta=np.empty((0, 0, 0), image.dtype)), made


@pytest.mark.parametrize("name", ["texture", "tellez-multitask", "callable"])
def test_extract_features_decodes_every_chunk_at_most_twice(small_stack, name, monkeypatch, weights_at_hand):
    """All levels and their overlapping fields together; tiles far smaller than the image."""
    from spatial_impute._image import resampling

    if name == "tellez-multitask" and not weights_at_hand:
        pytest.skip("needs the weights")
    monkeypatch.setattr(resampling, "_TILE", 64)
    rng = np.random.default_rng(0)
    lazy, made = counting(rng.integers(0, 255, (3, 600, 600), dtype=np.uint8), 32)
    small_stack.images["s0_image"] = Image2DModel.parse(
        lazy, dims=("c", "y", "x"), transformations={"s0": Scale([2, 2], axes=("x", "y"))}
    )
    section_images(small_stack, load_record(small_stack))  # fingerprints read a small image once per session
    made.clear()
    encoder, options = (mean_colour, {"patch_px": 16, "mpp": 4.0}) if name == "callable" else (name, {"device": "cpu"})
    if name == "tellez-multitask":
        monkeypatch.setattr(resampling, "_TILE", 320)  # its windows are 304 px wide
    si.pp.extract_features(small_stack, encoder, **options)
    assert max(made.values()) <= 2
    assert len(made) > 300
    assert not np.isnan(small_stack.tables["stack"].obsm["X_global"]).any()


def test_extract_features_keeps_what_is_the_same(small_stack, caplog, monkeypatch):
    """Nothing is computed twice, nor is it silent about that; a change of anything is computed."""
    calls = []

    class Counting(TextureEncoder):
        def __call__(self, patches):
            calls.append(len(patches))
            return super().__call__(patches)

    def run(**options):
        calls.clear()
        si.pp.extract_features(small_stack, Counting(), **options)
        return sum(calls), {key: small_stack.tables["stack"].obsm[key].copy() for key in LEVELS}

    first, expected = run()
    assert first > 0
    order = np.random.default_rng(0).permutation(small_stack.tables["stack"].n_obs)
    small_stack.tables["stack"] = small_stack.tables["stack"][order].copy()
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level("INFO", logger="spatial_impute"):
        again, found = run()
    assert again == 0
    assert "Section s0: features kept" in caplog.text
    for key in LEVELS:
        np.testing.assert_array_equal(found[key], expected[key][order])
    other = run(global_scale=4.0)[0]
    assert other > 0.8 * first
    small_stack.images["s0_image"].data[:, :5, :5] = 0
    assert 0 < run(global_scale=4.0)[0] < 0.7 * other
    assert run(global_scale=4.0, stain_normalization="reinhard")[0] > 0
    del small_stack.tables["stack"].obsm["X_spot"]
    assert run(global_scale=4.0, stain_normalization="reinhard")[0] == other


def test_extract_features_goes_on_after_an_interruption(small_stack, tmp_path):
    """The sections that were done are read from the folder, in another object and after a write to disk as well."""
    import spatialdata as sd

    done = []

    class Failing(TextureEncoder):
        fail = True

        def __call__(self, patches):
            if self.fail and len(done) > 40:
                raise KeyboardInterrupt
            done.append(len(patches))
            return super().__call__(patches)

    small_stack.write(tmp_path / "stack.zarr")
    with pytest.raises(KeyboardInterrupt):
        si.pp.extract_features(small_stack, Failing(), cache_dir=tmp_path / "cache", batch_size=20)
    assert "X_spot" not in small_stack.tables["stack"].obsm
    assert len(list((tmp_path / "cache").glob("*.npz"))) == 1
    done.clear()
    back = sd.read_zarr(tmp_path / "stack.zarr")
    encoder = Failing()
    encoder.fail = False
    si.pp.extract_features(back, encoder, cache_dir=tmp_path / "cache", batch_size=20)
    one_section = sum(done)
    found = back.tables["stack"].obsm["X_global"].copy()
    done.clear()
    si.pp.extract_features(small_stack, encoder, batch_size=20)
    assert one_section < 0.6 * sum(done)
    expected = small_stack.tables["stack"].obsm["X_global"]
    np.testing.assert_array_equal(found, expected)


def test_extract_features_does_not_reuse_callables(small_stack):
    """Two functions of one name are not the same function."""
    results = []
    for factor in (1.0, 2.0):

        def encoder(patches, factor=factor):
            return factor * mean_colour(patches)

        si.pp.extract_features(small_stack, encoder, patch_px=8, mpp=8.0)
        results.append(small_stack.tables["stack"].obsm["X_spot"].copy())
    np.testing.assert_allclose(results[1], 2 * results[0], rtol=1e-4)


@pytest.mark.parametrize("method", ["reinhard", "macenko"])
def test_extract_features_normalises_stains(small_stack, method):
    """A section stained twice as strongly has the colours of the reference again."""
    options = {"patch_px": 8, "mpp": 8.0}
    name = "s1" if load_record(small_stack).reference == "s0" else "s0"
    rows = (small_stack.tables["stack"].obs["section"] == name).to_numpy()

    def colours(**more):
        si.pp.extract_features(small_stack, mean_colour, **options, **more)
        return small_stack.tables["stack"].obsm["X_spot"][rows, :3].copy()

    plain = colours(stain_normalization=method)
    before = colours()
    image = small_stack.images[f"{name}_image"].data.compute().astype(float)
    small_stack.images[f"{name}_image"].data = np.clip(255 * (image / 255) ** 1.6, 0, 255).astype(np.uint8)
    strong = colours()
    corrected = colours(stain_normalization=method)
    assert np.abs(strong - before).mean() > 10
    # Macenko leaves alone what is neither stain, of which synthetic tissue has much.
    share = {"reinhard": 0.2, "macenko": 0.6}[method]
    assert np.abs(corrected - plain).mean() < share * np.abs(strong - before).mean()


def test_extract_features_warns_of_coarse_images(caplog, monkeypatch):
    """The pixels of a low-resolution image are larger than nuclei: features must not look as if they saw any."""
    sdata = si.datasets.synthetic_stack(1, extent=800.0, n_genes=3, mpp=10.0)
    monkeypatch.setattr(logger, "propagate", True)
    si.pp.extract_features(sdata, mean_colour, patch_px=8, mpp=8.0)
    assert "hardly any texture" not in caplog.text
    si.pp.extract_features(sdata, "texture")
    assert "10 um per pixel, encoder 'texture' expects 2" in caplog.text


def test_extract_features_refuses_spots_off_their_image(small_stack):
    spots = small_stack.shapes["s0_spots"]
    spots.geometry = spots.geometry.translate(0, 290)
    with pytest.raises(
        ValueError, match=r"spots of `sdata.shapes\['s0_spots'\]` lie outside their image of 300 x 300 px"
    ):
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
        si.pp.extract_features(small_stack, encoder, patch_px=8, mpp=8.0)
    assert "X_spot" not in small_stack.tables["stack"].obsm


def test_extract_features_refuses_a_table_that_lacks_spots(small_stack):
    small_stack.tables["stack"] = small_stack.tables["stack"][:-1].copy()
    with pytest.raises(ValueError, match="the spots differ"):
        si.pp.extract_features(small_stack, mean_colour, patch_px=8, mpp=8.0)


def test_extract_features_follows_the_pyramid(small_stack):
    """Large fields are read from a coarse level, and give what the full resolution gives."""
    import xarray as xr

    from spatial_impute._stack.elements import image_element

    si.pp.extract_features(small_stack, mean_colour, patch_px=8, mpp=8.0)
    expected = small_stack.tables["stack"].obsm["X_global"].copy()
    fine = small_stack.images["s0_image"].data.compute()
    coarse = fine.reshape(3, 150, 2, 150, 2).mean(axis=(2, 4)).round().astype(np.uint8)
    pyramid = image_element([fine, coarse], "s0", 4.0)
    assert isinstance(pyramid, xr.DataTree)
    small_stack.images["s0_image"] = pyramid
    assert len(section_levels(small_stack, load_record(small_stack)["s0"])) == 2
    si.pp.extract_features(small_stack, mean_colour, patch_px=8, mpp=8.0)
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


class Bright:
    """Mean of each colour, at its own resolution."""

    name, mpp, patch_px, identity = "bright", 4.0, 32, "bright"

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        return patches.mean(axis=(1, 2))


def test_several_encoders_stand_side_by_side(stack, tmp_path):
    found = {}
    for name, encoder in {"bright": Bright(), "texture": "texture", "both": ["texture", Bright()]}.items():
        si.pp.extract_features(stack, encoder, cache_dir=tmp_path)
        found[name] = {key: stack.tables["stack"].obsm[key].copy() for key in LEVELS}
    table = stack.tables["stack"]
    for key, n_tokens in table.uns["features"]["n_tokens"].items():
        tokens = {name: values[key].reshape(table.n_obs, n_tokens, -1) for name, values in found.items()}
        np.testing.assert_array_equal(tokens["both"], np.concatenate([tokens["texture"], tokens["bright"]], axis=2))
    assert table.uns["features"]["encoder"] == "texture+bright"
    assert len(list(tmp_path.glob("*.npz"))) == 6  # three sections, two encoders: nothing was computed twice
    with pytest.raises(ValueError, match="`encoder` is an empty list"):
        si.pp.extract_features(stack, [])
