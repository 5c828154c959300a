from __future__ import annotations

import tracemalloc

import dask.array as da
import numpy as np
import pytest
import xarray as xr

from spatial_impute._geometry import apply_affine, scaling
from spatial_impute._image import resampling
from spatial_impute._image.levels import Level
from spatial_impute._image.resampling import iter_patches


def patch_positions(centers: np.ndarray, side: float, n_px: int) -> np.ndarray:
    """(n, n_px, n_px, 2) um: middle of every pixel of every patch."""
    offset = (np.arange(n_px) + 0.5) / n_px * side - side / 2
    x, y = np.meshgrid(offset, offset)
    return centers[:, None, None] + np.stack([x, y], axis=-1)


def read_patches(levels: list[Level], centers: np.ndarray, side: float, n_px: int) -> np.ndarray:
    result = np.full((len(centers), n_px, n_px, 3), np.nan, dtype=np.float32)
    for index, found in iter_patches(levels, centers, side, n_px):
        assert np.isnan(result[index]).all()  # each patch comes once
        result[index] = found
    return result


@pytest.mark.parametrize("side", [8.0, 11.0])
@pytest.mark.parametrize("n_px", [8, 5])
def test_iter_patches_reads_a_ramp_exactly(side, n_px, ramp):
    centers = np.array([[30.0, 20.0], [31.3, 22.7], [50.25, 40.5]])
    found = read_patches([ramp.level(ramp.image(80, 90))], centers, side, n_px)
    expected = ramp.value_at(patch_positions(centers, side, n_px))
    for channel in range(3):
        np.testing.assert_allclose(found[..., channel], expected + channel, rtol=1e-5)


def test_iter_patches_of_whole_pixels_are_the_pixels(ramp):
    array = np.random.default_rng(0).integers(0, 255, (3, 40, 50), dtype=np.uint8)
    found = read_patches([ramp.level(array)], np.array([[20.0, 12.0]]), 8.0, 8)
    np.testing.assert_array_equal(found[0], np.moveaxis(array[:, 8:16, 16:24], 0, -1))


def test_iter_patches_shows_transparent_pixels_as_glass(ramp):
    """And averages them as such where the level is far too fine."""
    array = np.zeros((4, 40, 50), dtype=np.uint8)
    array[:, :, 20:] = np.array([100, 100, 100, 255])[:, None, None]
    for n_px in (8, 2):
        found = read_patches([ramp.level(array)], np.array([[20.0, 12.0]]), 8.0, n_px)
        np.testing.assert_array_equal(found[0, :, : n_px // 2], 255)
        np.testing.assert_array_equal(found[0, :, n_px // 2 :], 100)


@pytest.mark.parametrize("flip", [1.0, -1.0])
@pytest.mark.parametrize("degrees", [0, 30, 90, 200])
def test_iter_patches_follow_the_axes_of_a_rotated_or_flipped_section(degrees, flip, ramp):
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    matrix = np.array([[c, -s, 3], [s, c, -8], [0, 0, 1.0]]) @ np.diag([0.5 * flip, 0.5, 1])
    centers = apply_affine(np.array([[60.0, 50.0], [48.0, 61.0]]), matrix)
    found = read_patches([ramp.level(ramp.image(110, 120), matrix)], centers, 12.0, 6)
    pixels = apply_affine(patch_positions(centers, 12.0, 6).reshape(-1, 2), np.linalg.inv(matrix))
    np.testing.assert_allclose(found[..., 0].ravel(), ramp.value_at(pixels), rtol=1e-4)


@pytest.mark.parametrize("chunks", [None, 24])
def test_iter_patches_by_tile_equal_those_in_one_read(monkeypatch, chunks, ramp):
    level = ramp.level(np.random.default_rng(1).integers(0, 255, (3, 150, 170), dtype=np.uint8), chunks=chunks)
    centers = np.random.default_rng(2).uniform(-3, 170, (60, 2))
    whole = read_patches([level], centers, 20.0, 7)
    monkeypatch.setattr(resampling, "_TILE", 32)
    np.testing.assert_array_equal(read_patches([level], centers, 20.0, 7), whole)
    if chunks is not None:
        assert len(list(iter_patches([level], centers, 20.0, 7))) > 10


def test_iter_patches_repeats_the_rim_beyond_the_image(ramp):
    array = ramp.image(30, 30)
    centers = np.array([[0.0, 15.0], [30.0, 30.0]])
    found = read_patches([ramp.level(array)], centers, 10.0, 10)
    np.testing.assert_allclose(found[0, :, :5], np.repeat(found[0, :, 5:6], 5, axis=1))
    np.testing.assert_allclose(found[0, :, 5:, 0], array[0, 10:20, :5])
    assert (found[1, 5:, 5:] == array[:, -1, -1]).all()


def test_iter_patches_of_image_smaller_than_the_patch(ramp):
    found = read_patches([ramp.level(np.full((3, 1, 2), 7, np.uint8))], np.array([[1.0, 0.5]]), 40.0, 9)
    assert (found == 7).all()


def test_iter_patches_reads_the_coarse_level_for_large_fields(ramp):
    fine = ramp.level(np.zeros((3, 64, 64), np.uint8))
    coarse = ramp.level(np.full((3, 16, 16), 9, np.uint8), scaling(4.0))
    centers = np.array([[32.0, 32.0]])
    assert (read_patches([fine, coarse], centers, 40.0, 10) == 9).all()
    assert (read_patches([fine, coarse], centers, 10.0, 10) == 0).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("tile", [12, 2048])
def test_iter_patches_averages_pixels_that_are_far_too_fine(dtype, tile, monkeypatch, ramp):
    """A patch of 2 um per px from pixels of 0.6 um takes means of 3 x 3, not every third pixel; sizes need not divide."""
    monkeypatch.setattr(resampling, "_TILE", tile)
    image = np.random.default_rng(0).integers(0, 255, (3, 50, 65)).astype(dtype)
    centers = np.array([[18.0, 15.0], [20.1, 12.3], [0.0, 29.0]])
    level = Level(xr.DataArray(da.from_array(image, chunks=(-1, 8, 8)), dims=("c", "y", "x")), scaling(0.6))
    found = read_patches([level], centers, 16.0, 8)
    means = image[:, :48, :63].reshape(3, 16, 3, 21, 3).astype(float).mean(axis=(2, 4))
    expected = read_patches([ramp.level(means.astype(np.float32), scaling(1.8))], centers, 16.0, 8)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_iter_patches_of_no_center_yields_nothing(ramp):
    assert list(iter_patches([ramp.level(ramp.image(9, 9))], np.empty((0, 2)), 4.0, 4)) == []


def test_iter_patches_memory_does_not_grow_with_the_spots_of_a_tile(ramp):
    """Millions of bins: a tile of 1 mm holds 15,000 bins of 8 um, whose patches must not all be made at once."""
    level = ramp.level(np.zeros((3, 256, 256), np.uint8))
    centers = np.random.default_rng(0).uniform(0, 256, (16_000, 2))
    tracemalloc.start()
    n_seen = sum(len(index) for index, _ in iter_patches([level], centers, 8.0, 16))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n_seen == len(centers)
    assert peak < 200e6
