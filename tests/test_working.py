"""Images at the resolution of a model."""

from __future__ import annotations

from dataclasses import replace

import dask.array as da
import numpy as np
import pytest
import xarray as xr

from spatial_impute._raster import Level
from spatial_impute._working import survey, working_image


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
    image = working_image([level(noise, 0.5)], resolution)
    height, width = image.shape
    whole = image.window(0, height, 0, width)
    for y0, y1, x0, x1 in [(0, 20, 0, 20), (17, 51, 3, 50), (height - 9, height, width - 30, width)]:
        np.testing.assert_array_equal(image.window(y0, y1, x0, x1), whole[:, y0:y1, x0:x1])


def test_same_resolution_reads_pixels_as_they_are(noise):
    image = working_image([level(noise, 0.5)], 0.5)
    np.testing.assert_array_equal(image.window(0, 150, 0, 211), noise)


def test_whole_steps_are_means(noise):
    image = working_image([level(noise, 0.25)], 0.5)
    assert image.shape == (75, 105)
    expected = noise[:, :150, :210].reshape(3, 75, 2, 105, 2).mean(axis=(2, 4))
    np.testing.assert_allclose(image.window(0, 75, 0, 105), expected, rtol=1e-6)


@pytest.mark.parametrize("resolution", [0.5, 0.8, 1.3, 2.0])
def test_pixel_centres_lie_where_they_should(resolution):
    """A ramp in um stays the same ramp."""
    y, x = np.meshgrid(np.arange(120) + 0.5, np.arange(160) + 0.5, indexing="ij")
    ramp = np.stack([x, y, x + y]).astype(np.float32)  # 0.5 um per pixel: x / 2 um
    image = working_image([level(ramp / 280 * 255, 0.5)], resolution)
    height, width = image.shape
    found = image.window(5, height - 5, 5, width - 5) / 255 * 280 * 0.5
    wx = (np.arange(5, width - 5) + 0.5) * resolution
    wy = (np.arange(5, height - 5) + 0.5) * resolution
    np.testing.assert_allclose(found[0], np.broadcast_to(wx, found[0].shape), rtol=1e-4)
    np.testing.assert_allclose(found[1], np.broadcast_to(wy[:, None], found[1].shape), rtol=1e-4)
    np.testing.assert_allclose(image.to_um, np.diag([resolution, resolution, 1]))


def test_oblong_pixels_become_square():
    image = working_image([level(np.zeros((3, 100, 100), np.uint8), (0.5, 1.0))], 1.0)
    assert image.shape == (100, 50)


def test_beyond_the_image_it_is_white(noise):
    image = working_image([level(noise, 0.5)], 0.5)
    window = image.window(-5, 10, 200, 220)
    assert (window[:, :5] == 255).all()
    assert (window[:, :, 11:] == 255).all()
    np.testing.assert_array_equal(window[:, 5:, :11], noise[:, :10, 200:])
    assert (image.window(400, 410, 0, 5) == 255).all()


@pytest.mark.parametrize("n_columns", [99, 6])
def test_chunks_are_decoded_at_most_twice(n_columns):
    """Once where three rows of chunks fit into memory; on a wider slide, taken in stripes, twice at the borders."""
    from spatial_impute._chunks import ChunkCache
    from spatial_impute.models._tiles import Tiling

    calls = []

    def decode(block_info=None):
        calls.append(tuple(block_info[None]["chunk-location"]))
        return np.full((3, 256, 256), len(calls) % 256, np.uint8)

    meta = np.empty((0, 0, 0), np.uint8)
    array = da.map_blocks(decode, chunks=((3,), (256,) * 5, (256,) * 8), dtype=np.uint8, meta=meta)
    image = working_image([Level(xr.DataArray(array, dims=("c", "y", "x")), np.eye(3))], 1.0)
    image = replace(image, cache=ChunkCache(3 * n_columns * 3 * 256 * 256))
    calls.clear()
    tiling = Tiling(*image.shape, core=256, halo=64, stride=8, multiple=32)
    for tile in tiling.order(np.ndindex(*tiling.shape), image.stripe):
        window = tiling.window(tile)
        image.window(window.y0, window.y1, window.x0, window.x1)
    counts = np.unique(calls, axis=0, return_counts=True)[1]
    assert len(counts) == 5 * 8
    assert counts.max() == (1 if n_columns == 99 else 2)


def test_too_coarse_an_image_is_refused(noise):
    with pytest.raises(ValueError, match="has 4 um per pixel, the model works at 1"):
        working_image([level(noise, 4.0)], 1.0)


def test_survey_sees_glass_tissue_and_stain():
    rgb = np.full((3, 1200, 1200), 240, np.uint8)
    rgb[:, 300:900, 300:900] = np.array([150, 90, 160], np.uint8)[:, None, None]
    found = survey([level(rgb, 1.0, chunks=512)])
    np.testing.assert_allclose(found.background, 240, atol=1)
    np.testing.assert_allclose(found.density, np.log(240 / np.array([150, 90, 160])), rtol=0.1)
    np.testing.assert_array_equal(
        found.covers(np.array([[600.0, 600.0], [50.0, 50.0], [-9.0, 5.0]])), [True, False, False]
    )
