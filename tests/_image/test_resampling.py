"""Images at the resolution of a model."""

from __future__ import annotations

from types import SimpleNamespace

import dask.array as da
import numpy as np
import pytest
import torch
import xarray as xr

from spatial_impute._image.levels import Level
from spatial_impute._image.resampling import resampled_image, slide_overview
from spatial_impute.models.pixnet._network import Stain
from spatial_impute.models.pixnet._tiles import Slide, Tiling


def level(array: np.ndarray, mpp: float | tuple[float, float], *, chunks: int = 64) -> Level:
    size_x, size_y = (mpp, mpp) if np.isscalar(mpp) else mpp
    data = xr.DataArray(da.from_array(array, chunks=(3, chunks, chunks)), dims=("c", "y", "x"))
    return Level(data, np.diag([size_x, size_y, 1.0]))


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 150, 211)).astype(np.uint8)


@pytest.mark.parametrize("resolution", [0.5, 0.73, 1.0, 1.37])
def test_pixels_do_not_depend_on_the_window(noise, resolution):
    """Coarser and finer than the image, whole and broken steps."""
    image = resampled_image([level(noise, 0.5)], resolution)
    height, width = image.shape
    whole = image.window(0, height, 0, width)
    for y0, y1, x0, x1 in [(0, 20, 0, 20), (17, 51, 3, 50), (height - 9, height, width - 30, width)]:
        np.testing.assert_array_equal(image.window(y0, y1, x0, x1), whole[:, y0:y1, x0:x1])


def test_same_resolution_reads_pixels_as_they_are(noise):
    image = resampled_image([level(noise, 0.5)], 0.5)
    np.testing.assert_array_equal(image.window(0, 150, 0, 211), noise)


def test_whole_steps_are_means(noise):
    image = resampled_image([level(noise, 0.25)], 0.5)
    assert image.shape == (75, 105)
    expected = noise[:, :150, :210].reshape(3, 75, 2, 105, 2).mean(axis=(2, 4))
    np.testing.assert_allclose(image.window(0, 75, 0, 105), expected, rtol=1e-6)


@pytest.mark.parametrize("resolution", [0.5, 0.8, 1.3, 2.0])
def test_pixel_centres_lie_where_they_should(resolution):
    """A ramp in um stays the same ramp."""
    y, x = np.meshgrid(np.arange(120) + 0.5, np.arange(160) + 0.5, indexing="ij")
    ramp = np.stack([x, y, x + y]).astype(np.float32)  # 0.5 um per pixel: x / 2 um
    image = resampled_image([level(ramp / 280 * 255, 0.5)], resolution)
    height, width = image.shape
    found = image.window(5, height - 5, 5, width - 5) / 255 * 280 * 0.5
    wx = (np.arange(5, width - 5) + 0.5) * resolution
    wy = (np.arange(5, height - 5) + 0.5) * resolution
    np.testing.assert_allclose(found[0], np.broadcast_to(wx, found[0].shape), rtol=1e-4)
    np.testing.assert_allclose(found[1], np.broadcast_to(wy[:, None], found[1].shape), rtol=1e-4)
    np.testing.assert_allclose(image.to_um, np.diag([resolution, resolution, 1]))


def test_oblong_pixels_become_square():
    image = resampled_image([level(np.zeros((3, 100, 100), np.uint8), (0.5, 1.0))], 1.0)
    assert image.shape == (100, 50)


def test_beyond_the_image_it_is_white(noise):
    image = resampled_image([level(noise, 0.5)], 0.5)
    window = image.window(-5, 10, 200, 220)
    assert (window[:, :5] == 255).all()
    assert (window[:, :, 11:] == 255).all()
    np.testing.assert_array_equal(window[:, 5:, :11], noise[:, :10, 200:])
    assert (image.window(400, 410, 0, 5) == 255).all()


def counted(n_rows: int, n_columns: int, size: int) -> tuple[Level, list[tuple[int, ...]]]:
    """Slide in square chunks, and a list of those that were decoded."""
    calls = []

    def decode(block_info=None):
        calls.append(tuple(block_info[None]["chunk-location"]))
        return np.full((3, size, size), len(calls) % 256, np.uint8)

    meta = np.empty((0, 0, 0), np.uint8)
    chunks = ((3,), (size,) * n_rows, (size,) * n_columns)
    array = da.map_blocks(decode, chunks=chunks, dtype=np.uint8, meta=meta)
    return Level(xr.DataArray(array, dims=("c", "y", "x")), np.eye(3)), calls


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("wide", [False, True])
def test_chunks_are_decoded_at_most_twice(wide, step, monkeypatch):
    """Once where the slide is no wider than a stripe, else twice at its borders; also if a window spans many chunks."""
    monkeypatch.setattr("spatial_impute._image.resampling._STRIPE", 0 if wide else 2**26)
    n_rows = 10 * step  # so that the tiles have several rows
    found, calls = counted(n_rows, 20, 64)
    image = resampled_image([found], float(step))
    tiling = Tiling(*image.shape, core=64, halo=32, stride=8, multiple=32)
    slide = Slide(image, Stain((255.0, 255.0, 255.0)), tiling)
    network = SimpleNamespace(
        pyramid=SimpleNamespace(halo=32), channels=(1,), strides=(8,), head=SimpleNamespace(weight=torch.zeros(1))
    )
    network.encode = lambda _, window: [
        torch.zeros(1, 1, *((n // 8) for n in (window[1] - window[0], window[3] - window[2])))
    ]
    calls.clear()
    kept = 0
    for tile in slide.order(np.ndindex(*tiling.shape), network):
        window = tiling.window(tile)
        slide.encoded.read(network, slide, (window.y0, window.y1, window.x0, window.x1))
        kept = max(kept, image.cache._bytes)
    counts = np.unique(calls, axis=0, return_counts=True)[1]
    assert len(counts) == n_rows * 20
    assert counts.max() == (2 if wide else 1)
    assert not wide or kept <= image.cache.limit


def test_a_wider_slide_keeps_no_more_chunks():
    limits = set()
    for n_columns in (4, 40, 400):
        image = resampled_image([counted(4, n_columns, 1024)[0]], 1.0)
        image.stripe(1024, 128, 512)
        limits.add(image.cache.limit)
    assert len(limits) == 1
    assert limits.pop() <= 2**27


def test_too_coarse_an_image_is_refused(noise):
    with pytest.raises(ValueError, match="has 4 um per pixel, but the model works at 1"):
        resampled_image([level(noise, 4.0)], 1.0)


def test_survey_sees_glass_tissue_and_stain():
    rgb = np.full((3, 1200, 1200), 240, np.uint8)
    rgb[:, 300:900, 300:900] = np.array([150, 90, 160], np.uint8)[:, None, None]
    found = slide_overview([level(rgb, 1.0, chunks=512)])
    np.testing.assert_allclose(found.background, 240, atol=1)
    np.testing.assert_allclose(found.density, np.log(240 / np.array([150, 90, 160])), rtol=0.1)
    np.testing.assert_array_equal(
        found.covers(np.array([[600.0, 600.0], [50.0, 50.0], [-9.0, 5.0]])), [True, False, False]
    )


def test_without_glass_stain_is_measured_from_white():
    """The palest places of a slide full of tissue are not glass: twice the nuclei are not twice the stain."""
    rng = np.random.default_rng(0)
    density = []
    for share in (0.1, 0.2):
        rgb = np.tile(np.array([240, 185, 242], np.uint8)[:, None, None], (1, 1200, 1200))
        rgb[:, rng.random((1200, 1200)) < share] = np.array([110, 60, 150], np.uint8)[:, None]
        found = slide_overview([level(rgb, 1.0, chunks=512)])
        assert found.background == (255.0, 255.0, 255.0)
        density.append(found.density[1])
    assert density[1] < 1.5 * density[0]
