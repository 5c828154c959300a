from __future__ import annotations

import numpy as np
import pytest

from spatial_impute.encoders import _pooling
from spatial_impute.encoders._pooling import Lattice, StreamingPooler, cell_centers, needed_cells, pool_fields


def pooled_by_hand(lattice: Lattice, center: np.ndarray, side: float) -> tuple[np.ndarray, np.ndarray]:
    """Every cell by itself: area shared with the field, weighted mean and standard deviation."""
    weights, values = [], []
    for row, column in np.argwhere(lattice.known):
        x0, y0 = (column + lattice.first[1]) * lattice.step, (row + lattice.first[0]) * lattice.step
        width = min(x0 + lattice.step, center[0] + side / 2) - max(x0, center[0] - side / 2)
        height = min(y0 + lattice.step, center[1] + side / 2) - max(y0, center[1] - side / 2)
        weights.append(max(width, 0.0) * max(height, 0.0))
        values.append(lattice.values[row, column].astype(float))
    weights, values = np.array(weights)[:, None], np.array(values)
    mean = (weights * values).sum(axis=0) / weights.sum()
    return mean, np.sqrt((weights * (values - mean) ** 2).sum(axis=0) / weights.sum())


def pool_weight(lattice: Lattice, center: np.ndarray, side: float) -> bool:
    """Whether a known cell shares area with the field."""
    corners = (np.argwhere(lattice.known)[:, ::-1] + [lattice.first[1], lattice.first[0]]) * lattice.step
    low, high = center - side / 2, center + side / 2
    return bool(((np.minimum(corners + lattice.step, high) - np.maximum(corners, low)) > 0).all(axis=1).any())


@pytest.fixture
def lattice():
    rng = np.random.default_rng(0)
    known = rng.random((9, 12)) < 0.7
    values = np.where(known[..., None], rng.normal(size=(9, 12, 20)) + 100.0, np.nan).astype(np.float32)
    return Lattice(step=16.0, first=(3, -2), values=values, known=known)


@pytest.mark.parametrize("side", [3.0, 16.0, 40.0, 101.5, 400.0])
def test_pool_fields_is_the_weighted_mean_and_spread(lattice, side):
    """Channels beyond one block as well; unknown cells (NaN) have no part; digits survive a large offset."""
    assert lattice.values.shape[2] > _pooling._CHANNELS
    centers = np.array([[2.0, 90.0], [57.3, 101.1], [155.0, 187.0]])
    mean, spread = pool_fields(lattice, [(centers, side)])[0]
    for i, center in enumerate(centers):
        if not pool_weight(lattice, center, side):
            continue  # no cell known: the nearest, as tested below
        expected = pooled_by_hand(lattice, center, side)
        np.testing.assert_allclose(mean[i], expected[0], rtol=1e-9)
        np.testing.assert_allclose(spread[i], expected[1], atol=1e-6)


def test_pool_fields_beyond_the_lattice_takes_the_nearest_cell(lattice):
    far = np.array([[-1000.0, 100.0], [1e4, 1e4]])
    mean, spread = pool_fields(lattice, [(far, 50.0)])[0]
    cells = np.argwhere(lattice.known)
    middles = (cells[:, ::-1] + [lattice.first[1], lattice.first[0]] + np.array([0.5, 0.5])) * lattice.step
    for i, place in enumerate(far):
        row, column = cells[((middles - place) ** 2).sum(axis=1).argmin()]
        np.testing.assert_allclose(mean[i], lattice.values[row, column])
    assert (spread == 0).all()


def test_pool_fields_follows_the_field_without_steps(lattice):
    """Moving a field by a thousandth of a cell moves its features by little: no cell jumps in or out."""
    whole = Lattice(16.0, (0, 0), np.nan_to_num(lattice.values, nan=100.0), np.ones_like(lattice.known))
    x = np.linspace(60, 100, 2001)
    mean, _ = pool_fields(whole, [(np.column_stack([x, np.full(2001, 70.0)]), 40.0)])[0]
    assert np.abs(np.diff(mean, axis=0)).max() < 5 * np.abs(mean[-1] - mean[0]).max() / 2000 + 1e-2


def test_needed_cells_are_those_that_the_squares_touch():
    rng = np.random.default_rng(1)
    centers = rng.uniform(-50, 200, (15, 2))
    first, mask = needed_cells(centers, 30.0, 10.0)
    expected = np.zeros_like(mask)
    for row, column in np.ndindex(mask.shape):
        x0, y0 = (column + first[1]) * 10.0, (row + first[0]) * 10.0
        apart = np.maximum(np.maximum([x0, y0] - centers - 15, centers - 15 - [x0 + 10, y0 + 10]), 0).max(axis=1)
        expected[row, column] = (apart <= 0).any()
    np.testing.assert_array_equal(mask, expected)


def test_cell_centers_come_row_by_row():
    mask = np.array([[False, True], [True, True]])
    np.testing.assert_array_equal(cell_centers((2, -1), mask, 10.0), [[5, 25], [-5, 35], [5, 35]])


def test_pool_fields_of_several_kinds_are_those_of_each(lattice):
    centers = np.array([[57.3, 101.1], [2.0, 90.0]])
    kinds = [(centers, 30.0), (centers + 20.0, 90.0), (centers[:1], 1e4)]
    for found, kind in zip(pool_fields(lattice, kinds), kinds, strict=True):
        for a, b in zip(found, pool_fields(lattice, [kind])[0], strict=True):
            np.testing.assert_array_equal(a, b)


# Pooling during the encoding

STEP, BLOCK = 16.0, 4
FIELDS = [(np.array([0.0, 0.0]), 40.0), (np.array([-30.0, 25.0]), 90.0)]


@pytest.fixture
def case():
    """Spots over a tall section, cells that the image does not reach, features of all known cells."""
    rng = np.random.default_rng(0)
    centers = rng.uniform([0, 0], [400, 3000], (150, 2))
    first, known = needed_cells(centers, 160.0, STEP)
    known[: len(known) // 10] = False  # the fields of the first spots lie off the image
    known[:, -4:] = False
    values = np.where(known[..., None], rng.normal(size=(*known.shape, 20)) + 5, 0.0).astype(np.float32)
    return centers, Lattice(STEP, first, values, known)


def streamed(centers: np.ndarray, lattice: Lattice, order: np.ndarray | None = None) -> tuple[list, int]:
    """Pooled fields and the most rows that were in memory, blocks given a few at a time."""
    pooler = StreamingPooler(STEP, lattice.first, lattice.known, centers, FIELDS, block=BLOCK)
    corners = pooler.corners if order is None else pooler.corners[order]
    padded = np.pad(lattice.values, ((0, BLOCK), (0, BLOCK), (0, 0)))
    rows = 0
    for start in range(0, len(corners), 3):
        some = corners[start : start + 3]
        pooler.add(some, np.stack([padded[r : r + BLOCK, c : c + BLOCK] for r, c in some]))
        rows = max(rows, len(pooler._values))
    return pooler.finish(), rows


@pytest.mark.parametrize("order", ["rows", "columns", "random"])
def test_fields_are_those_of_the_whole_lattice(case, order):
    centers, lattice = case
    corners = StreamingPooler(STEP, lattice.first, lattice.known, centers, FIELDS, block=BLOCK).corners
    orders = {"columns": np.lexsort(corners.T), "random": np.random.default_rng(1).permutation(len(corners))}
    found, _ = streamed(centers, lattice, orders.get(order))
    expected = pool_fields(lattice, [(centers + shift, side) for shift, side in FIELDS])
    assert any((spread == 0).all(axis=1).any() for _, spread in expected)  # some lie off the image
    for new, old in zip(found, expected, strict=True):
        for a, b in zip(new, old, strict=True):
            assert a.dtype == np.float32
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_only_a_band_is_in_memory(case):
    """Rows of two fields and some blocks, whatever the height of the section."""
    centers, lattice = case
    _, rows = streamed(centers, lattice)
    assert len(lattice.known) > 180
    assert rows < 30


def test_every_block_with_known_cells_is_requested_once(case):
    centers, lattice = case
    corners = StreamingPooler(STEP, lattice.first, lattice.known, centers, FIELDS, block=BLOCK).corners
    covered = np.zeros(np.add(lattice.known.shape, BLOCK), dtype=int)
    for row, column in corners:
        covered[row : row + BLOCK, column : column + BLOCK] += 1
        assert lattice.known[row : row + BLOCK, column : column + BLOCK].any()
    assert covered.max() == 1
    assert covered[: lattice.known.shape[0], : lattice.known.shape[1]][lattice.known].all()
