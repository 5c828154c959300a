"""Masks of tissues and slides of many kinds, drawn with known outlines."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage as ndi
from scipy.spatial import cKDTree

from spatial_impute._image.tissue import tissue_mask

SIZE = 8.0  # um per pixel
SHAPE = (450, 550)
HEMATOXYLIN, EOSIN, BROWN = np.array([0.65, 0.7, 0.29]), np.array([0.07, 0.99, 0.11]), np.array([0.27, 0.57, 0.78])
Y, X = np.mgrid[: SHAPE[0], : SHAPE[1]]


def blob(y: float, x: float, height: float, width: float) -> np.ndarray:
    dy, dx = (Y - y) / height, (X - x) / width
    angle = np.arctan2(dy, dx)
    return np.hypot(dy, dx) < 1 + 0.08 * np.sin(3 * angle) + 0.04 * np.sin(7 * angle)


class Slide:
    """A slide on which tissue and other things are put."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.density = np.zeros((*SHAPE, 3))
        self.light = np.ones(SHAPE)
        self.truth = np.zeros(SHAPE, bool)
        waves = ndi.gaussian_filter(self.rng.normal(size=SHAPE), 4)
        self.waves = waves / waves.std()

    def nuclei(self, per_pixel: float) -> np.ndarray:
        field = ndi.gaussian_filter((self.rng.random(SHAPE) < per_pixel).astype(float), 0.75)
        return field / field.max()

    def tissue(self, where: np.ndarray, stain: np.ndarray) -> Slide:
        self.truth |= where
        self.density += stain * ndi.gaussian_filter(where.astype(float), 0.5)[..., None]
        return self

    def usual(self, where: np.ndarray, strength: float | np.ndarray = 1.0) -> Slide:
        pink, blue = (0.25 + 0.05 * self.waves)[..., None] * EOSIN, self.nuclei(0.05)[..., None] * HEMATOXYLIN
        return self.tissue(where, np.asarray(strength)[..., None] * (pink + blue))

    def rgb(self, noise: float = 3.0) -> np.ndarray:
        image = np.array([235, 230, 238]) * np.exp(-self.density) * self.light[..., None]
        return np.clip(image + self.rng.normal(0, noise, image.shape), 0, 255).astype(np.uint8)


WHOLE = blob(225, 275, 130, 165)


def walls(slide: Slide, n: int, width: float) -> np.ndarray:
    centres = slide.rng.random((n, 2)) * SHAPE
    distance = cKDTree(centres).query(np.c_[Y.ravel(), X.ravel()], k=2)[0]
    return np.exp(-((np.diff(distance)[:, 0] / width) ** 2)).reshape(SHAPE)


def fat(slide: Slide) -> None:
    slide.tissue(WHOLE, walls(slide, 9000, 0.6)[..., None] * 0.35 * EOSIN + slide.nuclei(2e-3)[..., None] * HEMATOXYLIN)


def fat_of_large_cells(slide: Slide) -> None:
    """Closed cells of 110 um beside stroma that is far darker."""
    slide.usual(WHOLE & (X < 275))
    rim = WHOLE & ~ndi.binary_erosion(WHOLE)
    pale = np.maximum(walls(slide, 1300, 0.5), 0.5 * rim)[..., None] * 0.45 * EOSIN
    slide.tissue(WHOLE & (X >= 275), pale + slide.nuclei(5e-4)[..., None] * HEMATOXYLIN)


def lung(slide: Slide) -> None:
    slide.tissue(WHOLE, walls(slide, 1500, 1.0)[..., None] * (0.3 * EOSIN + 0.25 * HEMATOXYLIN))


def white_matter(slide: Slide) -> None:
    pale = (0.10 + 0.015 * slide.waves)[..., None] * EOSIN
    slide.tissue(WHOLE, pale + slide.nuclei(0.02)[..., None] * 0.5 * HEMATOXYLIN)


def pale_ihc(slide: Slide) -> None:
    slide.tissue(WHOLE, (0.05 + 0.01 * slide.waves + slide.nuclei(0.05) * 0.35)[..., None] * HEMATOXYLIN)


def dark_ihc(slide: Slide) -> None:
    slide.tissue(WHOLE, (1.6 + 0.4 * slide.waves)[..., None] * BROWN)


def half_pale(slide: Slide) -> None:
    slide.usual(WHOLE, np.where(X < 275, 1, 0.3))


def cores(slide: Slide) -> None:
    centres = [(75 + 150 * i, 75 + 135 * j) for i in range(3) for j in range(4) if (i, j) != (1, 2)]
    slide.usual(np.any([np.hypot(Y - y, X - x) < 37 for y, x in centres], axis=0))


def fills_the_image(slide: Slide) -> None:
    slide.usual(np.ones(SHAPE, bool))


def pale_and_fills_the_image(slide: Slide) -> None:
    pale = (0.13 + 0.01 * slide.waves)[..., None] * EOSIN
    slide.tissue(np.ones(SHAPE, bool), pale + slide.nuclei(0.04)[..., None] * 0.5 * HEMATOXYLIN)


def touches_edges(slide: Slide) -> None:
    slide.usual(blob(150, 150, 200, 250))


def pieces(slide: Slide) -> None:
    where = blob(125, 125, 75, 85) | blob(325, 150, 60, 100) | blob(225, 400, 125, 60)
    slide.usual(where, np.where(X < 260, 1, 0.3))


def skin(slide: Slide) -> None:
    depth = Y - 225 - 30 * np.sin(X / 75)
    fibres = (0.12 + 0.04 * np.sin(X / 4.5 + slide.waves))[..., None] * EOSIN
    epidermis = (np.abs(depth + 40) < 9)[..., None] * 0.6 * HEMATOXYLIN
    slide.tissue(np.abs(depth) < 55, fibres + epidermis + slide.nuclei(0.01)[..., None] * HEMATOXYLIN)


def biopsy(slide: Slide) -> None:
    slide.usual((np.abs(Y - 225 - 60 * np.sin(X / 150)) < 37) & (X > 50) & (X < 500))


def frozen_in_medium(slide: Slide) -> None:
    slide.density += (blob(225, 275, 190, 235) * 0.06)[..., None] * EOSIN
    slide.usual(blob(225, 275, 100, 125) & ~blob(225, 300, 45, 50))


def pen(slide: Slide) -> None:
    slide.usual(WHOLE)
    slide.density += (np.abs(np.hypot(Y - 225, X - 275) - 200) < 7)[..., None] * [2.0, 1.2, 0.2]


def pen_at_the_tissue(slide: Slide) -> None:
    slide.usual(WHOLE)
    around = ndi.distance_transform_edt(~WHOLE)
    slide.density += ((around > 6) & (around < 24))[..., None] * [2.0, 1.2, 0.2]


def pigment(slide: Slide) -> None:
    slide.usual(WHOLE)
    slide.density += blob(225, 275, 55, 55)[..., None] * [2.0, 2.2, 2.4]


def letters(slide: Slide) -> None:
    slide.usual(WHOLE)
    strokes = (Y > 20) & (Y < 70) & (X > 30) & (X < 200) & ((X % 30 < 10) | (np.abs(Y - 44) < 4))
    slide.density += strokes[..., None] * 2.5


def dots_of_an_array(slide: Slide) -> None:
    slide.usual(WHOLE)
    dots = np.zeros(SHAPE, bool)
    for a in range(10, 540, 25):
        for b in (15, 37):
            for y, x in ((a, b), (a, 550 - b), (b, a), (450 - b, a)):
                dots |= np.hypot(Y - y, X - x) < 6
    slide.density += ndi.gaussian_filter(dots.astype(float), 0.5)[..., None] * 0.5


def bars_of_an_array(slide: Slide) -> None:
    """Blurred grey bars, as dense as the tissue is in the mean, one of them under pink haze."""
    slide.usual(WHOLE, 0.6)
    bars = ((np.abs(Y - 20) < 16) | (np.abs(Y - 430) < 16)) & (X % 200 < 90)
    slide.density += ndi.gaussian_filter(bars.astype(float), 5)[..., None] * 0.16
    slide.density += 0.05 * np.exp(-((Y - 430) ** 2 + (X - 250) ** 2) / (2 * 50**2))[..., None] * EOSIN


def uneven_light_and_haze(slide: Slide) -> None:
    slide.usual(WHOLE)
    slide.density += (0.25 * np.exp(-((Y - 300) ** 2 + (X - 400) ** 2) / (2 * 75**2)))[..., None] * EOSIN
    slide.light = 1 - 0.15 * ((Y - 225) ** 2 + (X - 275) ** 2) / 275**2


def light_falls_off(slide: Slide) -> None:
    slide.usual(WHOLE, 0.4)
    slide.light = 1 - 0.3 * X / X.max()


def dark_corners_and_smooth_tissue(slide: Slide) -> None:
    slide.usual(WHOLE & ~blob(225, 275, 60, 80))
    slide.tissue(blob(225, 275, 60, 80), np.full((*SHAPE, 1), 0.25) * EOSIN)
    slide.light = 1 - 0.35 * ((Y - 225) ** 2 + (X - 275) ** 2) / (225**2 + 275**2)


def printed_lattice(slide: Slide) -> None:
    slide.usual(WHOLE)
    slide.density += (((Y % 60) < 2) | ((X % 60) < 2))[..., None] * 0.04


KINDS = [
    *(
        fat,
        fat_of_large_cells,
        lung,
        white_matter,
        pale_ihc,
        dark_ihc,
        half_pale,
        cores,
        fills_the_image,
        pale_and_fills_the_image,
        touches_edges,
        pieces,
        skin,
        biopsy,
    ),
    *(frozen_in_medium, pen, pen_at_the_tissue, pigment, letters, dots_of_an_array, bars_of_an_array),
    *(uneven_light_and_haze, light_falls_off, dark_corners_and_smooth_tissue, printed_lattice),
]


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.mark.parametrize("kind", KINDS)
def test_outline_is_found(kind):
    slide = Slide()
    kind(slide)
    image = slide.rgb()
    mask = tissue_mask(image, SIZE)
    assert dice(mask, slide.truth) > 0.96
    coarse = image.reshape(SHAPE[0] // 2, 2, SHAPE[1] // 2, 2, 3).mean((1, 3))
    assert tissue_mask(coarse, 2 * SIZE).mean() == pytest.approx(mask.mean(), rel=0.03)


def test_noisy_camera():
    assert dice(tissue_mask(Slide().usual(WHOLE).rgb(noise=12), SIZE), WHOLE) > 0.97


def test_empty_slides_have_no_tissue():
    slide = Slide()
    slide.light = 1 - 0.15 * ((Y - 225) ** 2 + (X - 275) ** 2) / 275**2
    assert not tissue_mask(slide.rgb(), SIZE).any()
