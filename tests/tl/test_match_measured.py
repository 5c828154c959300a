"""Offsets and scales of measured sections whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from spatial_impute.models._spots import Spots
from spatial_impute.tl._match_sections import match_measured

N_SECTIONS, SIDE, N_GENES = 5, 14, 12


def world(seed=0, noise=0.3):
    """Five sections of one smooth pattern per gene, and their spots."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE)), axis=-1).reshape(-1, 2) * 100.0
    places = [grid + rng.uniform(-40, 40, 2) for _ in range(N_SECTIONS)]
    wave, phase = rng.normal(size=(2, N_GENES)) / 400, rng.uniform(0, 6, N_GENES)
    clean = np.concatenate([np.sin(place @ wave + phase) for place in places])
    section = np.repeat(np.arange(N_SECTIONS), len(grid))
    xyz = np.column_stack([np.concatenate(places), section * 10.0])
    values = clean + 2 + noise * rng.normal(size=clean.shape)
    return Spots(xyz, section, np.ones(len(xyz), bool), values, spacing=100.0), values


def changed(spots, values):
    from dataclasses import replace

    return replace(spots, expression=values)


def means(values, section):
    return np.stack([values[section == k].mean(axis=0) for k in range(N_SECTIONS)])


def test_an_offset_and_a_scale_are_found_and_undone():
    spots, values = world()
    off = values.copy()
    own = spots.section == 1
    off[own] = (off[own] - 2) * 1.6 + 2
    off[own, :6] += 0.8
    found = match_measured(changed(spots, off))
    np.testing.assert_allclose(found.shift[1], (off - values)[own].mean(axis=0), atol=0.2)
    assert np.abs(found.shift[[0, 2, 3, 4]]).max() < 0.2
    assert np.median(found.ratio[1]) == pytest.approx(1.6, rel=0.12)
    before, after = (np.abs(v - values)[own].mean() for v in (off, found.expression))
    assert after < 0.35 * before


def test_sections_that_agree_stay_as_they_are():
    spots, values = world()
    found = match_measured(spots)
    assert np.abs(found.expression - values).mean() < 0.05


def test_a_gradient_along_z_stays():
    spots, values = world()
    slope = np.linspace(0.1, 0.4, N_GENES)
    steep = values + spots.section[:, None] * slope
    found = match_measured(changed(spots, steep))
    rise = np.diff(means(found.expression, spots.section), axis=0)
    expected = np.diff(means(steep, spots.section), axis=0)
    np.testing.assert_allclose(rise.mean(axis=0), expected.mean(axis=0), atol=0.08)


def test_units_and_order_of_sections_do_not_count():
    spots, values = world()
    off = values + (spots.section == 2)[:, None] * 1.0
    expected = match_measured(changed(spots, off)).expression
    np.testing.assert_allclose(match_measured(changed(spots, 3 * off)).expression, 3 * expected, atol=1e-9)
    order = np.random.default_rng(0).permutation(len(values))
    moved = Spots(spots.xyz[order], spots.section[order], spots.known, off[order], spacing=100.0)
    np.testing.assert_allclose(match_measured(moved).expression, expected[order], atol=1e-9)


def test_sections_side_by_side_are_refused():
    spots, values = world()
    xyz = spots.xyz + np.outer(spots.section, [5000, 0, 0])
    with pytest.raises(ValueError, match="share only 0 places"):
        match_measured(Spots(xyz, spots.section, spots.known, values, spacing=100.0))
