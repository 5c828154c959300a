from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage as ndi

from spatial_impute._image.tissue import optical_density, tissue_mask

SIZE = 10.0  # um per pixel
SHAPE = (160, 200)


@pytest.fixture
def truth() -> np.ndarray:
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    return (((y - 80) / 45) ** 2 + ((x - 95) / 60) ** 2) < 1


@pytest.fixture
def slide(truth) -> np.ndarray:
    """Textured tissue on glass of level 230 with noise, uint8."""
    rng = np.random.default_rng(0)
    texture = ndi.gaussian_filter(rng.normal(size=SHAPE), 3)
    density = (0.6 + 0.15 * texture / texture.std()) * ndi.gaussian_filter(truth.astype(float), 0.7)
    rgb = 230 * np.exp(-density[..., None] * [0.8, 1.0, 0.5]) + rng.normal(scale=2, size=(*SHAPE, 3))
    return np.clip(rgb, 0, 255).astype(np.uint8)


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_finds_the_tissue(slide, truth):
    assert dice(tissue_mask(slide, SIZE), truth) > 0.97


@pytest.mark.parametrize("convert", [
    lambda a: a / 255.0,
    lambda a: a.astype(np.uint16) * 16,
    lambda a: a.astype(np.float32),
    lambda a: a.mean(-1),
    lambda a: a.mean(-1, keepdims=True).astype(np.uint8),
    lambda a: np.concatenate([a, np.full((*SHAPE, 1), 255, np.uint8)], -1),
])  # fmt: skip
def test_type_range_and_channels_do_not_matter(slide, truth, convert):
    assert dice(tissue_mask(convert(slide), SIZE), truth) > 0.97


@pytest.mark.parametrize("level", [0, 8])
def test_black_padding_is_not_tissue(slide, truth, level):
    padded = np.full((SHAPE[0] + 60, SHAPE[1] + 80, 3), level, np.uint8)
    padded[30:-30, 40:-40] = slide
    mask = tissue_mask(padded, SIZE)
    assert dice(mask[30:-30, 40:-40], truth) > 0.97
    assert not mask[:30].any()
    assert not mask[:, :40].any()
    assert optical_density(padded)[:20].max() == 0


def test_black_corners_of_a_turned_scan(slide, truth):
    turned = ndi.rotate(slide, 25, axes=(0, 1), order=1, cval=0)
    expected = ndi.rotate(truth.astype(float), 25, order=1) > 0.5
    assert dice(tissue_mask(turned, SIZE), expected) > 0.96


def test_transparent_padding_is_not_tissue(slide, truth):
    padded = np.zeros((SHAPE[0] + 40, SHAPE[1], 4), np.uint8)
    padded[40:, :, :3], padded[40:, :, 3] = slide, 255
    mask = tissue_mask(padded, SIZE)
    assert not mask[:40].any()
    assert dice(mask[40:], truth) > 0.97


def test_tissue_at_a_black_edge(slide, truth):
    cut = slide.copy()
    cut[:, :70] = 0  # the black frame borders on tissue as well as on glass
    mask = tissue_mask(cut, SIZE)
    assert not mask[:, :68].any()
    assert dice(mask[:, 80:], truth[:, 80:]) > 0.96


def test_dark_background(truth):
    rng = np.random.default_rng(1)
    nuclei = np.exp(ndi.gaussian_filter(rng.normal(size=SHAPE), 1) * 3)  # few bright ones, most of them dim
    signal = ndi.gaussian_filter(truth * nuclei, 1) * 40 + rng.normal(4, 1.5, SHAPE)
    assert dice(tissue_mask(np.clip(signal, 0, 255), SIZE), truth) > 0.9


def test_pink_haze_is_not_tissue(slide, truth):
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    haze = np.exp(-((y - 130) ** 2 + (x - 150) ** 2) / (2 * 25**2))
    hazy = slide * np.exp(-haze[..., None] * [0.03, 0.3, 0.1])
    assert dice(tissue_mask(hazy, SIZE), truth) > 0.96


def test_tissue_stained_by_eosin_alone(truth):
    rng = np.random.default_rng(2)
    density = ndi.gaussian_filter(truth.astype(float), 1)[..., None] * [0.01, 0.9, 0.3]
    rgb = 240 * np.exp(-density) + rng.normal(scale=1.5, size=(*SHAPE, 3))
    assert dice(tissue_mask(rgb, SIZE), truth) > 0.96


def test_pale_part_beside_a_dark_one(truth):
    rng = np.random.default_rng(3)
    part = np.where(np.arange(SHAPE[1]) < 80, 0.9, 0.15) * truth
    rgb = 230 * np.exp(-ndi.gaussian_filter(part, 0.7))[..., None] + rng.normal(scale=2, size=(*SHAPE, 3))
    assert dice(tissue_mask(rgb, SIZE), truth) > 0.95


def test_specks_and_fiducials_go_and_holes_fill(slide, truth):
    marked = slide.copy()
    for row in range(5, 160, 18):
        marked[row : row + 8, 4:12] = 90  # a column of dots of 80 um
    marked[78:88, 90:100] = 230  # a lumen of 100 um
    mask = tissue_mask(marked, SIZE)
    assert not mask[:, :20].any()
    assert mask[78:88, 90:100].all()


def test_large_hole_stays(slide):
    torn = slide.copy()
    torn[50:110, 60:130] = 230
    assert not tissue_mask(torn, SIZE)[75:85, 90:100].any()


def test_two_pieces_stay_and_crumbs_go(slide, truth):
    wide = np.concatenate([slide, slide[:, ::-1]], 1)
    wide[4:10, 4:10] = 80
    expected = np.concatenate([truth, truth[:, ::-1]], 1)
    mask = tissue_mask(wide, SIZE)
    assert ndi.label(mask)[1] == 2
    assert dice(mask, expected) > 0.97


@pytest.mark.parametrize("value", [0, 1, 128, 255])
def test_constant_image_has_no_tissue(value):
    image = np.full((50, 60, 3), value, np.uint8)
    assert not tissue_mask(image, SIZE).any()
    np.testing.assert_array_equal(optical_density(image), 0)


def test_noise_has_no_tissue():
    noise = np.random.default_rng(0).normal(230, 2, (100, 120, 3))
    assert not tissue_mask(noise, SIZE).any()


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (2, 2, 3)])
def test_tiny_image(shape):
    assert tissue_mask(np.full(shape, 200.0), SIZE).shape == shape[:2]


def test_non_finite_pixels_are_not_tissue(slide, truth):
    image = slide.astype(float)
    image[:10, :10] = np.nan
    mask = tissue_mask(image, SIZE)
    assert dice(mask, truth) > 0.97
    assert np.isfinite(optical_density(image)).all()


def test_lengths_are_micrometres(slide, truth):
    """The same slide at twice the resolution gives the same mask."""
    fine = np.repeat(np.repeat(slide, 2, 0), 2, 1)
    assert dice(tissue_mask(fine, SIZE / 2)[::2, ::2], tissue_mask(slide, SIZE)) > 0.98
    tall = np.repeat(slide, 2, 0)
    assert dice(tissue_mask(tall, (SIZE, SIZE / 2))[::2], truth) > 0.97


def test_optical_density_by_hand():
    image = np.full((20, 20, 3), 200.0)
    image[:5, :5] = 200 * np.exp(-np.array([0.5, 1.0, 0.25]))
    density = optical_density(image)
    np.testing.assert_allclose(density[0, 0], [0.5, 1.0, 0.25], rtol=1e-5)
    assert density[10:].max() == 0


@pytest.mark.parametrize("image", [np.zeros((4, 4, 2)), np.zeros(5), np.zeros((0, 4, 3))])
def test_bad_shape(image):
    with pytest.raises(ValueError, match="shape"):
        tissue_mask(image, SIZE)


@pytest.mark.parametrize("size", [0, -1.0, (1.0, np.nan)])
def test_bad_pixel_size(slide, size):
    with pytest.raises(ValueError, match="pixel_size"):
        tissue_mask(slide, size)
