"""Spots against the tissue of their own image, and pictures against each other, in eight placements."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from spatial_impute._geometry import scaling
from spatial_impute._image.levels import Level
from spatial_impute.pp._spots import _TURNS, AS_IT_IS, compare_pictures, place_spots, turned_picture, turned_points

OTHERS = [turn for turn in _TURNS if turn != AS_IT_IS]


def tissue(height: int = 100, width: int = 130) -> np.ndarray:
    """Mask of tissue in one corner, which no turn or mirror puts onto itself."""
    y, x = np.mgrid[:height, :width]
    return ((y - 30) ** 2 / 20**2 + (x - 45) ** 2 / 38**2 < 1) | ((y < 85) & (y > 30) & (x > 15) & (x < 30))


def levels(mask: np.ndarray, um: float = 20.0) -> list[Level]:
    noise = np.random.default_rng(0).normal(0, 4, (3, *mask.shape))
    rgb = np.where(mask, np.array([180, 100, 170])[:, None, None], 240) + noise
    return [Level(xr.DataArray(rgb.clip(0, 255).astype(np.uint8), dims=("c", "y", "x")), scaling(um))]


def spots_on(mask: np.ndarray, step: int = 5) -> np.ndarray:
    y, x = (v.ravel() for v in np.mgrid[2 : mask.shape[0] : step, 2 : mask.shape[1] : step])
    keep = mask[y, x]
    return np.column_stack([x, y])[keep] + 0.5


@pytest.mark.parametrize("turn", _TURNS)
def test_points_and_pictures_turn_alike(turn):
    picture = np.random.default_rng(0).random((5, 7))
    points = np.array([(x + 0.5, y + 0.5) for y in range(5) for x in range(7)])
    turned = turned_picture(picture, turn)
    moved = turned_points(points, turn, turned.shape[::-1])
    assert [turned[int(y), int(x)] for x, y in moved] == picture.ravel().tolist()


@pytest.mark.parametrize("turn", OTHERS)
def test_spots_of_a_turned_image_are_reported_with_the_turn(turn):
    """The image was turned, the spots were not: they fit after the same turn."""
    mask = tissue()
    turned = turned_picture(mask, turn)
    found = place_spots(levels(turned), spots_on(mask) * 20.0)
    assert found.share < 0.8
    assert found.best == turn
    assert found.best_share > 0.95
    assert f"would lie on it {turn}" in found.sentence


def test_spots_on_tissue_are_in_order():
    found = place_spots(levels(tissue()), spots_on(tissue()) * 20.0)
    assert found.share > 0.95
    assert found.sentence is None


def test_spots_of_a_whole_array_and_of_another_scale_are_reported():
    everywhere = place_spots(levels(tissue()), spots_on(np.ones((100, 130), bool)) * 20.0)
    assert "only 2" in everywhere.sentence
    assert "no turn or mirror" in everywhere.sentence
    assert place_spots(levels(tissue()), spots_on(tissue()) * 200.0).share < 0.1


@pytest.mark.parametrize("mask", [np.zeros((100, 130), bool), np.ones((100, 130), bool)])
def test_images_without_glass_or_tissue_say_only_if_spots_lie_on_them(mask):
    spots = spots_on(tissue()) * 20.0
    assert place_spots(levels(mask), spots).sentence is None
    beside = place_spots(levels(mask), spots + np.array([3000.0, 0.0]))
    assert beside.share == 0
    assert "only 0% of the measured spots" in beside.sentence


@pytest.mark.parametrize("turn", _TURNS)
@pytest.mark.parametrize("size", [(100, 130), (101, 100), (90, 90)])
def test_pictures_are_compared_in_all_turns(turn, size):
    """The best turn is the one that undoes what was done; of oblong pictures only half of the turns fit."""
    picture = np.random.default_rng(1).random((10, 13)).repeat(12, 0).repeat(12, 1)[: size[0], : size[1]]
    undone = next(t for t in _TURNS if np.array_equal(turned_picture(turned_picture(picture, turn), t), picture))
    found = compare_pictures(turned_picture(picture, turn), picture[::2, ::2])
    assert max(found, key=lambda t: found[t]) == undone
    assert len(found) == (8 if abs(size[0] - size[1]) <= 1 else 4)
