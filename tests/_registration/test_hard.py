"""Damaged, dirty and impossible sections: found, or refused with a message that says what to do."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage as ndi

from spatial_impute._geometry import apply_affine
from spatial_impute._registration import RegistrationParams, SectionImage, register_pair
from spatial_impute._registration.orientation import pose

SIZE = 16.0  # um per pixel
SHAPE = (200, 240)
GLASS = 240.0
PARAMS = RegistrationParams(working_side=160, syn_side=160, search_side=80, n_angles=24)
MIDDLE = np.array([SHAPE[1], SHAPE[0]]) * SIZE / 2
# Turned, mirrored and shifted: a start from which nothing comes right by itself.
TRUTH = pose(130, MIDDLE, MIDDLE + np.array([80, -60]), mirrored=True)


def tissue() -> np.ndarray:
    rng = np.random.default_rng(5)
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    y, x = (y - SHAPE[0] / 2) / (0.33 * SHAPE[0]), (x - SHAPE[1] / 2) / (0.33 * SHAPE[1])
    angle = np.arctan2(y, x)
    outline = 1 + 0.2 * np.cos(angle) + 0.15 * np.sin(2 * angle)
    inside = ndi.gaussian_filter((x**2 + y**2 < outline**2).astype(float), 1)
    texture = sum(ndi.gaussian_filter(rng.normal(size=SHAPE), s) * s for s in (2, 6))
    density = np.clip(0.7 + 0.25 * texture / texture.std(), 0.1, 1.6) * inside
    return GLASS * np.exp(-density[..., None] * np.array([0.8, 1.0, 0.5]))


def sampled(image: np.ndarray, source: np.ndarray) -> np.ndarray:
    """`image` at the points ``(y, x, 2)``, um; glass outside."""
    where = [source[..., 1] / SIZE - 0.5, source[..., 0] / SIZE - 0.5]
    channels = [ndi.map_coordinates(c, where, order=1, cval=GLASS) for c in np.moveaxis(image, -1, 0)]
    return np.stack(channels, -1)


def grid() -> np.ndarray:
    """Centres of the pixels ``(y, x, 2)``, um."""
    rows, columns = np.indices(SHAPE) + 0.5
    return np.stack([columns, rows], -1) * SIZE


def moved(image: np.ndarray) -> np.ndarray:
    return sampled(image, grid() @ TRUTH[:2, :2].T + TRUTH[:2, 2])


def tear(image):
    """The right part has come off and lies 250 um further away, turned by 6 degrees."""
    points = grid()
    right = pose(6, MIDDLE, MIDDLE + np.array([250, 60]))
    back = np.linalg.inv(right)
    source = points @ back[:2, :2].T + back[:2, 2]
    left_part = np.where((points[..., 0] < MIDDLE[0] + 550)[..., None], image, GLASS)
    piece = sampled(np.where((points[..., 0] >= MIDDLE[0] + 550)[..., None], image, GLASS), source)
    return np.minimum(left_part, piece)


def fold(image):
    """A strip of 300 um lies double: dark, and the tissue beyond is drawn in."""
    points = grid()
    beyond = points[..., 0] > MIDDLE[0] + 250
    source = points.copy()
    source[..., 0] += np.where(beyond, 300.0, 0.0)
    folded = sampled(image, source)
    strip = np.abs(points[..., 0] - MIDDLE[0] - 250) < 150
    return np.where(strip[..., None], folded * sampled(image, source - [150.0, 0]) / GLASS, folded)


def bubble(image):
    """An air bubble of 1 mm: washed out inside, a dark ring."""
    distance = np.linalg.norm(grid() - MIDDLE - [200, -100], axis=-1)[..., None]
    washed = np.where(distance < 450, GLASS - 0.25 * (GLASS - image), image)
    return np.where(np.abs(distance - 480) < 30, 60.0, washed)


def missing_third(image):
    columns = np.flatnonzero((image < 200).any((0, 2)))
    cut = columns[0] + (columns[-1] - columns[0]) // 3
    return np.where(np.arange(SHAPE[1])[:, None] < cut, GLASS, image)


def pen(image):
    """A green arrow beside the tissue and a blue circle drawn around half of it."""
    points = grid()
    ring = np.abs(np.linalg.norm((points - MIDDLE - [350, 0]) / [1.0, 1.3], axis=-1) - 700) < 35
    arrow = (np.abs(points[..., 1] - 300) < 50) & (points[..., 0] < 900)
    marked = np.where(ring[..., None], image * np.array([0.15, 0.25, 0.75]), image)
    return np.where(arrow[..., None], image * np.array([0.1, 0.55, 0.3]), marked)


def uneven(image):
    """Light falls off to 70 % from one corner to the other, and one stain is pale."""
    shade = np.linspace(1, 0.7, SHAPE[1])[None, :, None] * np.linspace(1, 0.95, SHAPE[0])[:, None, None]
    return GLASS * (image / GLASS) ** 0.7 * shade


@pytest.fixture(scope="module")
def fixed() -> SectionImage:
    return SectionImage(tissue(), (SIZE, SIZE))


@pytest.mark.parametrize(
    ("damage", "limit"),
    [(tear, 60.0), (fold, 60.0), (bubble, 30.0), (missing_third, 30.0), (pen, 30.0), (uneven, 20.0)],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_damaged_sections_are_found(fixed, damage, limit):
    moving = SectionImage(np.clip(moved(damage(fixed.rgb)), 0, 255).astype(np.uint8), (SIZE, SIZE))
    result = register_pair(fixed, moving, method="affine", params=PARAMS)
    # Points of the part that stays where it was in all damages: the left of the tissue, but not its outermost third.
    points = MIDDLE + np.array([[x, y] for x in (-350, -200, 0) for y in (-300, 0, 300)])
    there = points @ np.linalg.inv(TRUTH)[:2, :2].T + np.linalg.inv(TRUTH)[:2, 2]
    error = np.linalg.norm(apply_affine(there, result.matrix) - points, axis=1)
    assert np.median(error) < limit, (np.median(error), result.quality)
    assert result.quality["start_mirrored"]
    if damage is missing_third:
        assert result.verdict != "ok", "what is gone has to be said"


def test_damaged_section_is_not_deformed_into_nonsense(fixed, deformed_pair):
    moving = SectionImage(np.clip(moved(missing_third(fixed.rgb)), 0, 255).astype(np.uint8), (SIZE, SIZE))
    params = RegistrationParams(working_side=160, syn_side=160, search_side=80, n_angles=24, partial_tissue=True)
    transform, quality = deformed_pair(fixed, moving, params)
    if transform.deforms:
        assert quality["folds"] == 0
        assert quality["displacement_median"] < 30  # nothing is deformed; tissue is not pulled over the gap


@pytest.mark.parametrize(
    ("image", "match"),
    [
        (np.full((120, 120, 3), 255, np.uint8), "No tissue found.*leave the section out"),  # all white
        (np.random.default_rng(0).normal(238, 1.5, (120, 120, 3)).clip(0, 255), "No tissue found"),  # blank glass
        (np.full((120, 120, 3), 131.0), "No tissue found"),  # constant
        (np.zeros((1, 1, 3), np.uint8), "at least 16 pixels a side.*finer pyramid level"),
    ],
    ids=["white", "blank", "constant", "1x1"],
)
def test_images_without_a_section_are_refused(image, match):
    with pytest.raises(ValueError, match=match):
        SectionImage(image, (SIZE, SIZE))


def test_wrong_pixel_size_is_refused(fixed):
    wrong = SectionImage(fixed.rgb, (10 * SIZE, 10 * SIZE), fixed.mask)
    with pytest.raises(ValueError, match=r"areas of .* square mm.*Check the pixel sizes"):
        register_pair(fixed, wrong, params=PARAMS)


def test_inverted_stain_is_found(fixed):
    """Another stain: what was dark inside the tissue is pale and the other way round."""
    density = -np.log(fixed.rgb / GLASS).mean(-1)
    inverted = np.where(density > 0.03, np.clip(1.1 - density, 0.15, None), 0.0)
    other = GLASS * np.exp(-inverted[..., None] * np.array([0.5, 0.7, 1.0]))
    moving = SectionImage(np.clip(moved(other), 0, 255).astype(np.uint8), (SIZE, SIZE))
    result = register_pair(fixed, moving, method="affine", params=PARAMS)
    points = MIDDLE + np.array([[x, y] for x in (-350, 0, 350) for y in (-300, 0, 300)])
    there = points @ np.linalg.inv(TRUTH)[:2, :2].T + np.linalg.inv(TRUTH)[:2, 2]
    assert np.median(np.linalg.norm(apply_affine(there, result.matrix) - points, axis=1)) < 20
    assert result.quality["look"] == "edges"
