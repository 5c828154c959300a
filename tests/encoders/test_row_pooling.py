from __future__ import annotations

import numpy as np
import pytest

from spatial_impute.encoders._pooling import Lattice, needed_cells, pool_fields
from spatial_impute.encoders._row_pooling import RollingLattice

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


def rolled(centers: np.ndarray, lattice: Lattice, order: np.ndarray | None = None) -> tuple[list, int]:
    """Pooled fields and the most rows that were in memory, blocks given a few at a time."""
    rolling = RollingLattice(STEP, lattice.first, lattice.known, centers, FIELDS, block=BLOCK)
    corners = rolling.corners if order is None else rolling.corners[order]
    padded = np.pad(lattice.values, ((0, BLOCK), (0, BLOCK), (0, 0)))
    rows = 0
    for start in range(0, len(corners), 3):
        some = corners[start : start + 3]
        rolling.add(some, np.stack([padded[r : r + BLOCK, c : c + BLOCK] for r, c in some]))
        rows = max(rows, len(rolling._values))
    return rolling.finish(), rows


@pytest.mark.parametrize("order", ["rows", "columns", "random"])
def test_fields_are_those_of_the_whole_lattice(case, order):
    centers, lattice = case
    corners = RollingLattice(STEP, lattice.first, lattice.known, centers, FIELDS, block=BLOCK).corners
    orders = {"columns": np.lexsort(corners.T), "random": np.random.default_rng(1).permutation(len(corners))}
    found, _ = rolled(centers, lattice, orders.get(order))
    expected = pool_fields(lattice, [(centers + shift, side) for shift, side in FIELDS])
    assert any((spread == 0).all(axis=1).any() for _, spread in expected)  # some lie off the image
    for new, old in zip(found, expected, strict=True):
        for a, b in zip(new, old, strict=True):
            assert a.dtype == np.float32
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_only_a_band_is_in_memory(case):
    """Rows of two fields and some blocks, whatever the height of the section."""
    centers, lattice = case
    _, rows = rolled(centers, lattice)
    assert len(lattice.known) > 180
    assert rows < 30


def test_every_block_with_known_cells_is_asked_for_once(case):
    centers, lattice = case
    corners = RollingLattice(STEP, lattice.first, lattice.known, centers, FIELDS, block=BLOCK).corners
    covered = np.zeros(np.add(lattice.known.shape, BLOCK), dtype=int)
    for row, column in corners:
        covered[row : row + BLOCK, column : column + BLOCK] += 1
        assert lattice.known[row : row + BLOCK, column : column + BLOCK].any()
    assert covered.max() == 1
    assert covered[: lattice.known.shape[0], : lattice.known.shape[1]][lattice.known].all()
