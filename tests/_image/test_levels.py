from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from spatialdata.models import Image2DModel

from spatial_impute._geometry import apply_affine, scaling
from spatial_impute._image import levels
from spatial_impute._image.levels import best_level, image_levels, read_thumbnail, stored_pixels, to_rgb


def test_level_shape_and_pixel_size(ramp):
    level = ramp.level(np.zeros((3, 5, 7)), scaling(0.5))
    assert level.shape == (5, 7)
    assert level.pixel_size == pytest.approx(0.5)


@pytest.mark.parametrize("size", [(64, 64), (101, 77), (67, 130)])
def test_image_levels_of_odd_pyramids_lie_on_each_other(size, ramp):
    """To within a pixel of the level: spatialdata trims odd sizes at the left and top and keeps no record of it."""
    element = Image2DModel.parse(ramp.image(*size), dims=("c", "y", "x"), scale_factors=[2, 2])
    levels = image_levels(element, scaling(0.5))
    assert [level.pixel_size for level in levels] == pytest.approx([0.5, 1.0, 2.0])
    for level in levels:
        height, width = level.shape
        pixels = np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), axis=-1).reshape(-1, 2)
        in_full_resolution = apply_affine(pixels, level.to_um) / 0.5
        read = to_rgb(stored_pixels(level, 0, height, 0, width), level)[..., 0].ravel()
        lost = max(0.0, level.pixel_size / 0.5 - 1) * any(n % 2 for n in size)
        np.testing.assert_allclose(read, ramp.value_at(in_full_resolution), atol=1e-3 + ramp.slope.sum() * lost)


def test_image_levels_of_levels_that_are_rounded_up():
    # libjpeg rounds sizes up: 101 -> 51 -> 26.
    arrays = {f"scale{i}": np.zeros((3, n, n), np.uint8) for i, n in enumerate((101, 51, 26))}
    tree = xr.DataTree.from_dict(
        {key: xr.Dataset({"image": (("c", "y", "x"), value)}) for key, value in arrays.items()}
    )
    assert [level.pixel_size for level in image_levels(tree, scaling(1.0))] == pytest.approx([1, 2, 4])


def test_image_levels_of_one_scale_keeps_the_affine():
    matrix = np.array([[0, -2.0, 5], [2, 0, 7], [0, 0, 1]])
    element = Image2DModel.parse(np.zeros((3, 8, 9), np.uint8), dims=("c", "y", "x"))
    (level,) = image_levels(element, matrix)
    np.testing.assert_array_equal(level.to_um, matrix)


@pytest.mark.parametrize(
    ("wanted", "expected"), [(0.1, 0.5), (0.5, 0.5), (0.99, 0.5), (1.0, 1.0), (3.9, 2.0), (50, 4.0)]
)
def test_best_level_is_the_coarsest_that_is_fine_enough(wanted, expected, ramp):
    levels = [ramp.level(np.zeros((3, 8, 8)), scaling(s)) for s in (0.5, 1.0, 2.0, 4.0)]
    assert best_level(levels, wanted).pixel_size == pytest.approx(expected)


def as_rgb(array: np.ndarray, white: float = 255.0, opaque: float = 255.0) -> np.ndarray:
    return to_rgb(array, levels.Level(xr.DataArray(array, dims=("c", "y", "x")), scaling(1.0), white, opaque))


def test_to_rgb_repeats_grey_and_lays_half_transparent_pixels_on_glass():
    grey = np.arange(6, dtype=np.uint8).reshape(1, 2, 3)
    np.testing.assert_array_equal(as_rgb(grey), np.repeat(grey[0][..., None], 3, axis=2))
    rgba = np.stack([np.full((2, 2), v, np.uint8) for v in (0, 100, 255, 102)])
    np.testing.assert_array_equal(as_rgb(rgba), np.broadcast_to([153, 193, 255], (2, 2, 3)))
    rgba[3] = 255
    np.testing.assert_array_equal(as_rgb(rgba), np.broadcast_to([0, 100, 255], (2, 2, 3)))


@pytest.mark.parametrize(
    ("dtype", "white"),
    [(np.uint8, 255), (np.uint16, 65535), (np.uint32, 2**32 - 1), (np.float32, 1.0), (np.float64, 255.0)],
)
def test_to_rgb_brings_every_depth_to_255(dtype, white):
    array = np.array([0, 0.5 * white, white], dtype=dtype).reshape(1, 1, 3)
    result = as_rgb(array, white)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result[0, :, 0], [0, 127.5, 255], atol=0.51)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_wholly_transparent_pixels_are_white(dtype):
    """Glass that was erased in an image editor is transparent, with black beneath."""
    rgba = np.full((4, 2, 2), 9, dtype)
    rgba[:, 0] = 0
    rgba[3, 1] = 255
    result = as_rgb(rgba)
    np.testing.assert_array_equal(result[0], 255)
    np.testing.assert_array_equal(result[1], 9)


def test_pixels_of_nan_are_white():
    """What lies beyond a warped image."""
    rgb = np.full((3, 2, 2), 0.5, np.float32)
    rgb[1, 0, 0] = np.nan
    result = as_rgb(rgb, 1.0)
    np.testing.assert_array_equal(result[0, 0], 255)
    np.testing.assert_array_equal(result[1], 127.5)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, np.uint32, np.float32])
@pytest.mark.parametrize("white", [255, 4095, 65535])
def test_white_is_that_of_the_bits_in_use(dtype, white):
    """8 or 12 bits kept in a wider type are no black image."""
    image = (np.linspace(0.2, 0.97, 3 * 16 * 16).reshape(3, 16, 16) * white).astype(dtype)
    (level,) = image_levels(Image2DModel.parse(image, dims=("c", "y", "x")), scaling(1.0))
    assert level.white == white


@pytest.mark.parametrize("spoilt", ["hot pixel", "padding", "alpha of 16 bits", "warm pixels below the maximum"])
@pytest.mark.parametrize("white", [255, 4095])
def test_white_is_not_that_of_padding_hot_pixels_and_alpha(white, spoilt):
    image = (np.linspace(0.2, 0.97, 3 * 64 * 64).reshape(3, 64, 64) * white).astype(np.uint16)
    match spoilt:
        case "hot pixel":
            image[1, 5, 5] = 65535
        case "padding":
            image[:, :, :20] = 65535
        case "warm pixels below the maximum":
            image[0, 7, [3, 9]] = 60000
        case _:
            image = np.concatenate([image, np.full((1, 64, 64), 65535, np.uint16)])
    (level,) = image_levels(Image2DModel.parse(image, dims=("c", "y", "x")), scaling(1.0))
    assert level.white == white
    assert to_rgb(stored_pixels(level, 0, 64, 0, 64), level).max() <= 255
    np.testing.assert_allclose(
        to_rgb(stored_pixels(level, 30, 31, 30, 31), level).ravel(), image[:3, 30, 30] * (255 / white), atol=0.01
    )


@pytest.mark.parametrize(("most", "white"), [(1.02, 1.0), (258.0, 255.0)])
def test_white_of_floats_allows_for_resampling(most, white):
    image = np.full((3, 8, 8), most, np.float32)
    (level,) = image_levels(Image2DModel.parse(image, dims=("c", "y", "x")), scaling(1.0))
    assert level.white == white


@pytest.mark.parametrize("channels", [2, 5, 16])
def test_to_rgb_rejects_other_numbers_of_channels(channels):
    with pytest.raises(ValueError, match=f"1, 3 or 4 channels, found {channels}"):
        as_rgb(np.zeros((channels, 2, 2), np.uint8))


def test_window_of_float_image_does_not_depend_on_what_else_is_read(ramp):
    """A float image in 0-255 with a black corner: the corner alone must not be taken for an image in 0-1."""
    array = np.full((3, 8, 8), 200.0, np.float32)
    array[:, :4, :4] = 0.5
    level = ramp.level(array)
    whole = to_rgb(stored_pixels(level, 0, 8, 0, 8), level)
    np.testing.assert_array_equal(to_rgb(stored_pixels(level, 0, 4, 0, 4), level), whole[:4, :4])


def test_window_holds_the_pixels_requested(ramp):
    array = np.random.default_rng(0).integers(0, 255, (3, 9, 11), dtype=np.uint8)
    for level in (ramp.level(array), ramp.level(array, chunks=4)):
        np.testing.assert_array_equal(
            to_rgb(stored_pixels(level, 2, 7, 3, 11), level), np.moveaxis(array[:, 2:7, 3:11], 0, -1)
        )


@pytest.mark.parametrize("chunks", [None, 16, 50])
def test_read_thumbnail_takes_area_means(chunks, ramp):
    array = np.random.default_rng(0).integers(0, 255, (3, 103, 77), dtype=np.uint8)
    rgb, to_um = read_thumbnail([ramp.level(array, scaling(0.5), chunks)], 2.0)
    expected = array[:, :100, :76].reshape(3, 25, 4, 19, 4).mean(axis=(2, 4))
    assert rgb.dtype == np.float32
    np.testing.assert_allclose(rgb, np.moveaxis(expected, 0, -1), rtol=1e-6)
    np.testing.assert_allclose(to_um, scaling(2.0))


def test_read_thumbnail_in_strips_equals_that_in_one_piece(monkeypatch, ramp):
    level = ramp.level(ramp.image(200, 60), scaling(0.5), chunks=32)
    whole, _ = read_thumbnail([level], 1.5)
    monkeypatch.setattr(levels, "_TILE", 16)
    strips, _ = read_thumbnail([level], 1.5)
    np.testing.assert_array_equal(strips, whole)


def test_read_thumbnail_of_ramp_is_the_ramp(ramp):
    matrix = np.array([[0, -0.5, 40], [0.5, 0, 3], [0, 0, 1]])
    rgb, to_um = read_thumbnail([ramp.level(ramp.image(90, 70), matrix)], 2.5)
    height, width = rgb.shape[:2]
    assert (height, width) == (18, 14)
    pixels = np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), axis=-1).reshape(-1, 2)
    in_full_resolution = apply_affine(apply_affine(pixels, to_um), np.linalg.inv(matrix))
    np.testing.assert_allclose(rgb[..., 0].ravel(), ramp.value_at(in_full_resolution), rtol=1e-5)


@pytest.mark.parametrize("mpp", [0.1, 0.25, 0.3, 0.344, 0.499, 0.688, 0.7])
@pytest.mark.parametrize("factor", [2, 3, 5, 6, 9, 10])
def test_read_thumbnail_averages_the_whole_factor_requested(mpp, factor, ramp):
    """Multiples of the pixel size must not fall to the next lower factor by rounding."""
    _, to_um = read_thumbnail([ramp.level(np.zeros((1, 60, 60), np.uint8), scaling(mpp))], factor * mpp)
    assert to_um[0, 0] == pytest.approx(factor * mpp)


def test_read_thumbnail_never_goes_below_one_pixel(ramp):
    rgb, _ = read_thumbnail([ramp.level(ramp.image(3, 5))], 1000.0)
    assert rgb.shape[0] >= 1
    assert rgb.shape[1] >= 1


def test_read_thumbnail_uses_the_pyramid(ramp):
    fine = ramp.level(np.zeros((3, 64, 64), np.uint8), scaling(1.0))
    coarse = ramp.level(np.full((3, 16, 16), 9, np.uint8), scaling(4.0))
    rgb, to_um = read_thumbnail([fine, coarse], 4.0)
    assert (rgb == 9).all()
    np.testing.assert_allclose(to_um, scaling(4.0))


@pytest.mark.parametrize("values", [np.float32([-1, 0.5, 1]), np.int16([-900, 20, 4000])])
def test_standardised_pixels_are_refused(values):
    """They are no colors; a little below zero is left by a sharpening resize."""
    array = np.random.default_rng(0).choice(values, (3, 40, 40)).astype(values.dtype)
    with pytest.raises(ValueError, match=r"% of the pixels of the image are negative.*65535 for white"):
        image_levels(Image2DModel.parse(array, dims=("c", "y", "x")), np.eye(3))
    ringing = np.where(np.random.default_rng(0).random(array.shape) < 0.01, -0.01, np.abs(array)).astype(np.float32)
    assert image_levels(Image2DModel.parse(ringing, dims=("c", "y", "x")), np.eye(3))[0].white > 0
