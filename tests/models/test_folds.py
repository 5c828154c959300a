from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from spatial_impute.models._spots import Spots, spatial_folds, training_rows


def spots_of(side: int = 8, n_sections: int = 2, known_sections=(0,)) -> Spots:
    x, y = np.meshgrid(np.arange(side) * 100.0, np.arange(side) * 100.0)
    plane = np.column_stack([x.ravel(), y.ravel()])
    section = np.repeat(np.arange(n_sections), side**2)
    known = np.isin(section, known_sections)
    return Spots(
        xyz=np.column_stack([np.tile(plane, (n_sections, 1)), section * 10.0]),
        section=section,
        known=known,
        expression=np.arange(known.sum(), dtype=float)[:, None],
        spacing=100.0,
    )


@pytest.mark.parametrize("n_folds", [2, 3, 5])
def test_spatial_folds_hold_out_each_known_spot_once(n_folds):
    spots = spots_of()
    folds = spatial_folds(spots, n_folds=n_folds, block_spacings=2.0, seed=0)
    assert len(folds) == n_folds
    np.testing.assert_array_equal(np.sum(folds, axis=0), spots.known)
    sizes = [fold.sum() for fold in folds]
    assert max(sizes) - min(sizes) <= 4  # a block of 2 x 2


def test_spatial_folds_hold_out_whole_blocks():
    spots = spots_of()
    folds = spatial_folds(spots, n_folds=4, block_spacings=2.0, seed=0)
    block = (spots.xyz[:, :2] // 200).astype(int) @ [100, 1]
    for fold in folds:
        held = set(block[fold])
        rest = set(block[spots.known & ~fold])
        assert not held & rest


@pytest.mark.parametrize("depth", [False, True])
@pytest.mark.parametrize("motion", ["moved", "turned", "mirrored", "reordered"])
def test_folds_belong_to_the_tissue_and_not_to_the_frame(motion, depth):
    """By the outline of the tissue, or by the depth of its spots where all ends are the same."""
    spots = spots_of()
    outline = spots.known & (spots.xyz[:, :2].sum(axis=1) <= (1e9 if depth else 900.0))
    totals = np.random.default_rng(0).gamma(2.0, size=int(outline.sum())) if depth else None
    spots = replace(spots, known=outline, expression=np.zeros((int(outline.sum()), 1)), total_counts=totals)
    before = np.stack(spatial_folds(spots, n_folds=4, block_spacings=2.0, seed=0))
    plane = spots.xyz[:, :2]
    turn = np.array([[np.cos(0.7), -np.sin(0.7)], [np.sin(0.7), np.cos(0.7)]])
    moved = {
        "moved": plane + np.array([37.0, -11.0]),
        "turned": plane @ turn,
        "mirrored": plane * np.array([-1, 1]),
        "reordered": plane,
    }
    order = np.arange(len(plane))
    if motion == "reordered":
        order = np.random.default_rng(1).permutation(len(plane))
    other = replace(
        spots,
        xyz=np.column_stack([moved[motion], spots.xyz[:, 2]])[order],
        section=spots.section[order],
        known=spots.known[order],
        total_counts=None if totals is None else totals[(np.cumsum(outline) - 1)[order[outline[order]]]],
    )
    after = np.stack(spatial_folds(other, n_folds=4, block_spacings=2.0, seed=0))
    np.testing.assert_array_equal(after, before[:, order])


def test_spatial_folds_take_known_sections_as_folds():
    spots = spots_of(n_sections=4, known_sections=(0, 2, 3))
    folds = spatial_folds(spots, n_folds=5, block_spacings=2.0, seed=0)
    assert [set(spots.section[fold]) for fold in folds] == [{0}, {2}, {3}]
    np.testing.assert_array_equal(np.sum(folds, axis=0), spots.known)


def test_spatial_folds_follow_the_seed():
    spots = spots_of()
    a, b, c = (np.stack(spatial_folds(spots, n_folds=4, block_spacings=2.0, seed=s)) for s in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


def test_spatial_folds_do_not_depend_on_where_unknown_spots_lie():
    spots = spots_of()
    moved = Spots(**(vars(spots) | {"xyz": spots.xyz + 1e4 * ~spots.known[:, None]}))
    for one, two in zip(
        *(spatial_folds(s, n_folds=4, block_spacings=2.0, seed=0) for s in (spots, moved)), strict=True
    ):
        np.testing.assert_array_equal(one, two)


def test_spatial_folds_are_as_many_as_there_are_blocks():
    folds = spatial_folds(spots_of(side=4), n_folds=9, block_spacings=2.0, seed=0)
    assert len(folds) == 4


def test_spatial_folds_say_when_there_are_too_few_spots():
    with pytest.raises(
        ValueError, match=r"at least two blocks of measured spots, found 1 \(4 spots, blocks of 200 um\)"
    ):
        spatial_folds(spots_of(side=2), n_folds=5, block_spacings=2.0, seed=0)


def test_spots_hide_makes_known_spots_unknown():
    spots = spots_of()
    rows = np.zeros(len(spots.known), bool)
    rows[[0, 3, 100]] = True  # the last one is not known
    hidden = spots.hide(rows)
    np.testing.assert_array_equal(np.flatnonzero(spots.known & ~hidden.known), [0, 3])
    np.testing.assert_array_equal(hidden.expression[:, 0], np.delete(np.arange(64.0), [0, 3]))
    assert spots.known.sum() == 64
    assert len(spots.expression) == 64


def test_training_rows_are_regions_with_all_sections():
    x, y = (a.ravel() for a in np.meshgrid(np.arange(40.0), np.arange(40.0)))
    xyz = np.concatenate([np.column_stack([x, y, np.full(1600, z)]) for z in (0.0, 1.0)])
    spots = Spots(
        xyz=xyz,
        section=np.repeat([0, 1], 1600),
        known=np.repeat([True, False], 1600),
        expression=np.arange(1600.0)[:, None],
        spacing=1.0,
    )
    rows = training_rows(spots, max_known=400, seed=0)
    part = spots.take(rows)
    assert 200 < part.known.sum() <= 400
    assert 0.8 < part.known.mean() / 0.5 < 1.2
    np.testing.assert_array_equal(part.expression[:, 0], np.flatnonzero(np.isin(np.arange(1600), rows)))
    neighbors = np.abs(part.xyz[:, None, :2] - part.xyz[None, :, :2]).sum(axis=2) == 1
    assert neighbors.sum(axis=1).mean() > 5  # four on either section, but for the edges of regions
    np.testing.assert_array_equal(training_rows(spots, max_known=1600, seed=0), np.arange(3200))


def test_taken_spots_keep_the_edges_among_them():
    n = 30
    rng = np.random.default_rng(0)
    graph = sparse.random(n, n, 0.3, format="csr", random_state=rng)
    spots = Spots(
        xyz=rng.normal(size=(n, 3)),
        section=np.zeros(n, int),
        known=rng.random(n) < 0.5,
        expression=np.empty((0, 1)),
        spacing=1.0,
        graph=graph,
        edge_features=graph.data[:, None] * [1.0, 2.0],
    )
    spots = replace(spots, expression=rng.normal(size=(int(spots.known.sum()), 2)))
    rows = np.sort(rng.choice(n, 12, replace=False))
    part = spots.take(rows)
    np.testing.assert_array_equal(part.graph.toarray(), graph.toarray()[np.ix_(rows, rows)])
    np.testing.assert_array_equal(part.edge_features, part.graph.data[:, None] * [1.0, 2.0])
