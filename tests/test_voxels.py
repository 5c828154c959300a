"""Interpolation between spots and sections."""

from __future__ import annotations

import numpy as np
import pytest

from spatial_impute._geometry import grid_in_box, interpolate_stack

SPACING = 10.0


@pytest.fixture(scope="module")
def lattice():
    return grid_in_box(0, 0, 120, 90, spacing=SPACING, layout="hex")


def test_constant_stays_constant_and_ends_at_the_tissue(lattice):
    volume = interpolate_stack([lattice, lattice], [np.full(len(lattice), 3.0)] * 2, [0.0, 40.0], spacing=SPACING)
    inside = np.isfinite(volume.values)
    np.testing.assert_allclose(volume.values[inside], 3.0)
    x, y, _ = volume.axes
    middle = volume.values[:, (y > 20) & (y < 70)][:, :, (x > 20) & (x < 100)]
    assert np.isfinite(middle).all()  # no holes between the spots
    assert not inside[:, :, [0, -1]].any()
    assert not inside[:, [0, -1]].any()


def test_sections_keep_their_values_and_the_middle_is_the_mean(lattice):
    low, high = lattice[:, 0], 2 * lattice[:, 0] + 5
    volume = interpolate_stack([lattice, lattice], [low, high], [0.0, 40.0], spacing=SPACING)
    assert [volume.cell(2, z) for z in (0.0, 20.0, 40.0)] == [0, 2, 4]
    np.testing.assert_allclose(volume.slice(2, 20.0), (volume.slice(2, 0.0) + volume.slice(2, 40.0)) / 2)
    x = volume.axes[0]
    row = volume.slice(2, 0.0)[volume.cell(1, 45.0)]
    within = (x > 20) & (x < 100)
    np.testing.assert_allclose(row[within], x[within], atol=0.1 * SPACING)  # a plane stays a plane


def test_outline_moves_from_one_section_to_the_next(lattice):
    left = lattice[lattice[:, 0] < 60]
    volume = interpolate_stack([left, lattice], [np.ones(len(left)), np.ones(len(lattice))], [0, 40], spacing=SPACING)
    extents = [np.isfinite(layer).sum() for layer in volume.values]
    assert extents == sorted(extents)
    assert extents[0] < extents[2] < extents[4]


def test_spots_without_a_value_are_tissue_without_a_value(lattice):
    values = np.where(lattice[:, 0] < 60, 1.0, np.nan)
    volume = interpolate_stack([lattice, lattice], [values, values], [0.0, 10.0], spacing=SPACING)
    plane, x = volume.slice(2, 0.0), volume.axes[0]
    assert np.isnan(plane[:, x > 75]).all()
    assert np.nanmax(plane) == 1.0


def test_where_one_section_has_no_value_the_other_counts_between_them(lattice):
    volume = interpolate_stack(
        [lattice, lattice], [np.ones(len(lattice)), np.full(len(lattice), np.nan)], [0, 10], spacing=SPACING
    )
    assert np.nanmin(volume.values[:-1]) == np.nanmax(volume.values[:-1]) == 1.0
    assert np.isnan(volume.values[-1]).all()


def test_size_is_bounded_and_resolution_is_kept(lattice):
    wide = np.concatenate([lattice, lattice + np.array([50_000.0, 0.0])])
    volume = interpolate_stack([wide, wide], [np.ones(len(wide))] * 2, [0, 10], spacing=SPACING)
    assert max(volume.values.shape) <= 301
    fine = interpolate_stack([lattice] * 2, [np.ones(len(lattice))] * 2, [0, 10], spacing=SPACING, resolution=4.0)
    assert fine.step[:2] == (4.0, 4.0)
    assert np.isclose(fine.limits[2][0], -fine.step[2] / 2)


def test_gaps_of_an_uneven_lattice_are_filled_and_real_holes_stay():
    grid = np.stack(np.meshgrid(np.arange(12.0), np.arange(12.0)), axis=-1).reshape(-1, 2)
    far = np.linalg.norm(grid - [5.5, 5.5], axis=1) > 2.0  # a lumen of twelve spots
    uneven = grid[far] + np.where(grid[far][:, :1] >= 3, [0.2, 0.0], 0.0)  # one pair of columns is 1.2 apart
    volume = interpolate_stack([uneven, uneven], [np.ones(len(uneven))] * 2, [0.0, 1.0], spacing=1.0)
    x, y, _ = volume.axes
    inside = np.isfinite(volume.values[0])
    assert inside[np.ix_((y > 0) & (y < 11), (x > 2.1) & (x < 3.1))].all()
    assert not inside[np.argmin(abs(y - 5.5)), np.argmin(abs(x - 5.7))]
