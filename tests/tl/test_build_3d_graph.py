from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest

import spatial_impute as si
from spatial_impute._geometry import disc_iou
from spatial_impute._graph import EdgeRules, build_graph, standardise_by_section, typical_spacing

if TYPE_CHECKING:
    from scipy import sparse

OPTIONS = {
    "n_neighs": 4,
    "n_cross_neighs": 3,
    "max_section_gap": 2,
    "max_distance": 3.0,
    "n_similar": 2,
    "similarity_threshold": 0.5,
    "similarity_weight": 1.0,
    "bandwidth": 1.0,
}


def lattice(n: int, *, z: float = 0.0, shift: float = 0.0) -> np.ndarray:
    x, y = np.meshgrid(np.arange(n, dtype=float), np.arange(n, dtype=float))
    return np.column_stack([x.ravel() + shift, y.ravel(), np.full(n * n, z)])


def sections(n: int = 5, n_sections: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lattices over each other, each shifted by 0.3: coordinates, section, radii."""
    xyz = np.concatenate([lattice(n, z=0.1 * i, shift=0.3 * i) for i in range(n_sections)])
    return xyz, np.repeat(np.arange(n_sections), n * n), np.full(len(xyz), 0.5)


def build(xyz, section, radius, features=None, **changes):
    misplaced = changes.pop("misplaced", None)
    return build_graph(xyz, section, radius, features, EdgeRules(**(OPTIONS | changes)), misplaced=misplaced)


def dense(matrix: sparse.csr_matrix) -> np.ndarray:
    return matrix.toarray()


def same_pattern(a: sparse.csr_matrix, b: sparse.csr_matrix) -> bool:
    return np.array_equal(a.indptr, b.indptr) and np.array_equal(a.indices, b.indices)


def test_build_graph_links_the_twelve_neighbors_of_a_lattice():
    xyz = lattice(5)
    graph = build(xyz, np.zeros(25, int), np.full(25, 0.1), n_neighs=12)
    centre = 12
    row = dense(graph.weights)[centre]
    length = dense(graph.distances)[centre]
    near = np.linalg.norm(xyz - xyz[centre], axis=1)
    wanted = (near > 0) & (near < 2.1)
    assert wanted.sum() == 12
    assert (row[wanted] > 0).all()
    np.testing.assert_allclose(length[wanted], near[wanted], rtol=1e-6)
    np.testing.assert_allclose(row[wanted], np.exp(-0.5 * near[wanted] ** 2), rtol=1e-5)


def test_build_graph_symmetrises_nearest_neighbors():
    graph = build(lattice(3), np.zeros(9, int), np.full(9, 0.1), n_neighs=4)
    weights = dense(graph.weights)
    np.testing.assert_array_equal(weights, weights.T)
    degree = (weights > 0).sum(axis=1)
    assert degree.min() >= 4
    assert degree.max() > 4  # k nearest neighbors alone would not be symmetric


def test_build_graph_is_symmetric_with_one_pattern_and_no_diagonal():
    xyz, section, radius = sections()
    features = np.random.default_rng(0).normal(size=(len(xyz), 4))
    graph = build(xyz, section, radius, features)
    for matrix in (graph.weights, graph.distances, graph.overlap, graph.similarity):
        assert (abs(matrix - matrix.T)).max() == 0
        assert (matrix.diagonal() == 0).all()
        assert matrix.dtype == np.float32
    assert same_pattern(graph.weights, graph.distances)
    assert (graph.weights.data > 0).all()
    coo = graph.distances.tocoo()
    np.testing.assert_allclose(coo.data, np.linalg.norm(xyz[coo.row] - xyz[coo.col], axis=1), rtol=1e-5)
    # Overlap and similarity sit on edges of the graph.
    for matrix in (graph.overlap, graph.similarity):
        rows, columns = matrix.nonzero()
        assert (dense(graph.weights)[rows, columns] > 0).all()


def test_build_graph_cross_section_edges_join_different_sections():
    xyz, section, radius = sections()
    graph = build(xyz, section, radius, np.random.default_rng(0).normal(size=(len(xyz), 4)))
    for matrix in (graph.overlap, graph.similarity):
        rows, columns = matrix.nonzero()
        assert len(rows) > 0
        assert (section[rows] != section[columns]).all()


def test_build_graph_overlap_holds_all_overlapping_pairs():
    xyz, section, radius = sections()
    radius = np.random.default_rng(0).uniform(0.3, 0.9, len(xyz))
    graph = build(xyz, section, radius, n_cross_neighs=1)
    distance = np.linalg.norm(xyz[:, None, :2] - xyz[None, :, :2], axis=2)
    expected = disc_iou(distance, radius[:, None], radius[None, :])
    expected[section[:, None] == section[None, :]] = 0
    np.testing.assert_allclose(dense(graph.overlap), expected, atol=1e-6)


def test_build_graph_weight_is_gaussian_plus_overlap():
    xyz = np.array([[0, 0, 0], [0.6, 0, 0.5]])
    graph = build(xyz, np.array([0, 1]), np.array([0.5, 0.5]), bandwidth=2.0)
    expected = np.exp(-0.5 * (0.36 + 0.25) / 4) + disc_iou(0.6, 0.5, 0.5)
    assert graph.weights[0, 1] == pytest.approx(expected, rel=1e-6)
    assert graph.overlap[0, 1] == pytest.approx(disc_iou(0.6, 0.5, 0.5), rel=1e-6)


def test_build_graph_coinciding_spots_overlap_fully():
    xyz = np.concatenate([lattice(3), lattice(3, z=0.0)])
    graph = build(xyz, np.repeat([0, 1], 9), np.full(18, 0.4))
    partner = np.arange(9) + 9
    np.testing.assert_allclose(dense(graph.overlap)[np.arange(9), partner], 1.0)
    np.testing.assert_allclose(dense(graph.weights)[np.arange(9), partner], 2.0)
    assert same_pattern(graph.weights, graph.distances)
    assert (dense(graph.distances)[np.arange(9), partner] == 0).all()


def test_build_graph_coinciding_spots_of_one_section_have_no_edge_to_themselves():
    xyz = np.concatenate([np.repeat(lattice(1), 4, axis=0), lattice(3)[1:]])
    graph = build(xyz, np.zeros(len(xyz), int), np.full(len(xyz), 0.4), n_neighs=2)
    assert (graph.weights.diagonal() == 0).all()
    rows, columns = graph.weights.nonzero()
    assert (rows != columns).all()


def test_build_graph_similarity_links_look_alikes_wherever_they_are():
    xyz = np.concatenate([lattice(4), lattice(4, z=1.0, shift=100.0)])  # far beyond any spatial edge
    section = np.repeat([0, 1], 16)
    features = np.tile(np.random.default_rng(0).normal(size=(16, 8)), (2, 1))
    graph = build(xyz, section, np.full(32, 0.4), features, n_similar=1)
    similarity = dense(graph.similarity)
    np.testing.assert_allclose(similarity[np.arange(16), np.arange(16) + 16], 1.0, atol=1e-6)
    assert (similarity > 0).sum() == 32
    np.testing.assert_allclose(dense(graph.weights)[np.arange(16), np.arange(16) + 16], 1.0, atol=1e-5)
    half = build(xyz, section, np.full(32, 0.4), features, n_similar=1, similarity_weight=0.5)
    np.testing.assert_allclose(dense(half.weights)[np.arange(16), np.arange(16) + 16], 0.5, atol=1e-5)


def test_build_graph_similarity_is_mutual_and_above_the_threshold():
    xyz, section, radius = sections()
    features = np.random.default_rng(1).normal(size=(len(xyz), 3))
    graph = build(xyz, section, radius, features, n_similar=2, similarity_threshold=0.7)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosine = unit @ unit.T
    expected = np.zeros_like(cosine, dtype=bool)
    for a in range(3):
        for b in range(3):
            if a != b:
                rows, columns = np.flatnonzero(section == a), np.flatnonzero(section == b)
                block = cosine[np.ix_(rows, columns)]
                top = np.zeros_like(block, dtype=bool)
                np.put_along_axis(top, np.argsort(-block, axis=1)[:, :2], values=True, axis=1)
                expected[np.ix_(rows, columns)] = top
    expected &= expected.T & (cosine > 0.7)
    np.testing.assert_array_equal(dense(graph.similarity) > 0, expected)
    np.testing.assert_allclose(dense(graph.similarity)[expected], cosine[expected], rtol=1e-5)


def test_build_graph_section_gap_and_distance_bound_the_spatial_edges():
    xyz, section, radius = sections(n_sections=4)
    graph = build(xyz, section, radius, max_section_gap=1, max_distance=0.5)
    rows, columns = graph.weights.nonzero()
    apart = np.abs(section[rows] - section[columns])
    assert set(apart) == {0, 1}
    crossing = apart > 0
    in_plane = np.linalg.norm(xyz[rows, :2] - xyz[columns, :2], axis=1)[crossing]
    # Overlapping discs stay linked, whatever the limit of distance.
    assert in_plane.max() < 2 * 0.5
    assert (build(xyz, section, radius, max_section_gap=3).weights[section == 0][:, section == 3]).nnz > 0


def test_build_graph_is_equivariant_to_permutation():
    rng = np.random.default_rng(0)
    xyz, section, radius = sections()
    xyz[:, :2] += rng.uniform(-0.1, 0.1, (len(xyz), 2))  # no ties
    features = rng.normal(size=(len(xyz), 4))
    order = rng.permutation(len(xyz))
    whole = build(xyz, section, radius, features)
    turned = build(xyz[order], section[order], radius[order], features[order])
    for name in ("weights", "distances", "overlap", "similarity"):
        np.testing.assert_allclose(
            dense(getattr(turned, name)), dense(getattr(whole, name))[np.ix_(order, order)], atol=1e-6
        )


def test_build_graph_of_a_lattice_does_not_depend_on_the_order_of_rows():
    """Which of several spots at one distance are linked is decided by place."""
    xyz, section, radius = sections(n_sections=2)
    order = np.random.default_rng(0).permutation(len(xyz))
    whole = build(xyz, section, radius, n_neighs=3, n_cross_neighs=2)
    turned = build(xyz[order], section[order], radius[order], n_neighs=3, n_cross_neighs=2)
    np.testing.assert_allclose(dense(turned.weights), dense(whole.weights)[np.ix_(order, order)], atol=1e-6)


def test_build_graph_isolated_spot_has_no_edge():
    xyz = np.concatenate([lattice(3), [[50.0, 50.0, 1.0]]])
    graph = build(xyz, np.array([0] * 9 + [1]), np.full(10, 0.4))
    assert graph.weights[9].nnz == 0
    assert graph.weights.shape == (10, 10)


def test_build_graph_of_one_spot_is_empty():
    graph = build(np.zeros((1, 3)), np.zeros(1, int), np.ones(1))
    assert graph.weights.shape == (1, 1)
    assert graph.weights.nnz == 0


def test_typical_spacing_is_that_within_sections():
    xyz, section, _ = sections()
    assert typical_spacing(xyz * 7, section) == pytest.approx(7.0)
    with pytest.raises(ValueError, match="No section has more than one spot"):
        typical_spacing(np.zeros((2, 3)), np.array([0, 1]))


def test_typical_spacing_leaves_out_sections_of_one_spot():
    xyz, section, _ = sections(n=2)
    xyz, section = np.concatenate([xyz, [[9.0, 9.0, 1.0]], [[5.0, 5.0, 1.0]]]), np.concatenate([section, [7, 8]])
    assert typical_spacing(xyz, section) == pytest.approx(1.0)


def test_build_graph_links_all_spots_of_a_section_of_few():
    xyz = np.array([[0.0, 0, 0], [1, 0, 0], [0, 5, 0]])
    graph = build(xyz, np.zeros(3, int), np.full(3, 0.1), n_neighs=4)
    np.testing.assert_array_equal(dense(graph.weights) > 0, ~np.eye(3, dtype=bool))


def test_build_graph_neighbors_far_away_stay_linked():
    """Where the Gaussian is 0 in floating point, the edge is not."""
    graph = build(np.array([[0.0, 0, 0], [1e3, 0, 0]]), np.zeros(2, int), np.full(2, 0.1))
    assert 0 < graph.weights[0, 1] < 1e-9
    assert graph.distances[0, 1] == pytest.approx(1e3)


def test_build_graph_links_at_the_very_limit_of_distance_but_not_discs_that_touch():
    xyz, radius = np.array([[0.0, 0, 0], [1, 0, 0]]), np.full(2, 0.5)
    at_limit = build(xyz, np.array([0, 1]), radius, max_distance=1.0)
    assert at_limit.weights[0, 1] == pytest.approx(np.exp(-0.5))
    assert at_limit.overlap.nnz == 0
    beyond = build(xyz, np.array([0, 1]), radius, max_distance=0.999)
    assert beyond.weights.nnz == 0
    assert beyond.overlap.nnz == 0


def test_build_graph_takes_as_many_neighbors_as_requested_on_each_section():
    """One spot between the two sections' lattices: its nearest ones there, and it for each of theirs."""
    xyz = np.concatenate([[[0.1, 0.2, 0.0]], lattice(4, z=1.0)])
    section, radius = np.array([0] + [1] * 16), np.full(17, 0.01)
    for k in (1, 2, 3):
        graph = build(xyz, section, radius, n_cross_neighs=k, max_distance=2.0)
        linked = np.flatnonzero(dense(graph.weights)[0])
        length = np.linalg.norm(xyz[1:, :2] - xyz[0, :2], axis=1)
        # Of the sixteen, those nearer than the limit have it as their only spot on the other section.
        np.testing.assert_array_equal(linked, 1 + np.flatnonzero(length <= 2.0))
    far = build(xyz[::-1], section[::-1] * -1 + 1, radius, n_cross_neighs=0, max_distance=2.0)
    assert far.weights[16].nnz == 0


@pytest.mark.parametrize("k", [1, 2, 5])
def test_build_graph_links_the_nearest_spots_of_the_other_section_and_no_more(k):
    rng = np.random.default_rng(0)
    xyz = np.column_stack([rng.uniform(0, 10, (60, 2)), np.repeat([0.0, 1.0], 30)])
    section = np.repeat([0, 1], 30)
    graph = build(xyz, section, np.full(60, 1e-3), n_cross_neighs=k, max_distance=100.0)
    length = np.linalg.norm(xyz[:30, None, :2] - xyz[None, 30:, :2], axis=2)
    rank_there, rank_here = (length.argsort(axis=a, kind="stable").argsort(axis=a, kind="stable") for a in (1, 0))
    np.testing.assert_array_equal(dense(graph.weights)[:30, 30:] > 0, (rank_there < k) | (rank_here < k))


def test_standardise_by_section_removes_stain_differences():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(40, 3))
    section = np.repeat([0, 1], 20)
    shifted = values.copy()
    shifted[section == 1] = shifted[section == 1] * [2, 5, 0.1] + [100, -3, 7]
    result = standardise_by_section(shifted, section)
    np.testing.assert_allclose(result, standardise_by_section(values, section), atol=1e-5)
    for code in (0, 1):
        np.testing.assert_allclose(result[section == code].mean(axis=0), 0, atol=1e-6)
        np.testing.assert_allclose(result[section == code].std(axis=0), 1, atol=1e-6)


def test_standardise_by_section_gives_zeros_for_constants():
    result = standardise_by_section(np.full((5, 2), 1e6), np.zeros(5, int))
    np.testing.assert_array_equal(result, 0)


def test_build_3d_graph_writes_the_slots_of_squidpy(prepared_stack):
    table = prepared_stack.tables["stack"]
    record = table.uns["spatial_3d_neighbors"]
    assert record["connectivities_key"] == "spatial_3d_connectivities"
    assert record["distances_key"] == "spatial_3d_distances"
    weights = table.obsp[record["connectivities_key"]]
    distances = table.obsp[record["distances_key"]]
    assert same_pattern(weights, distances)
    assert record["params"]["n_neighs"] == 6
    assert record["params"]["bandwidth_um"] == pytest.approx(160, rel=0.1)
    degree = np.diff(weights.indptr)
    assert 12 <= np.median(degree) <= 40
    assert degree.min() >= 6
    coo = distances.tocoo()
    section = table.obs["section"].cat.codes.to_numpy()
    crossing = section[coo.row] != section[coo.col]
    assert crossing.any()
    assert coo.data[~crossing].max() < 1000


def test_build_3d_graph_key_added_and_inplace(prepared_stack):
    table = prepared_stack.tables["stack"]
    before = set(table.obsp)
    result = si.tl.build_3d_graph(prepared_stack, inplace=False)
    assert set(table.obsp) == before
    np.testing.assert_array_equal(result.connectivities.data, table.obsp["spatial_3d_connectivities"].data)
    np.testing.assert_array_equal(result.distances.data, table.obsp["spatial_3d_distances"].data)
    assert si.tl.build_3d_graph(prepared_stack, key_added="g", n_neighs=3) is None
    assert set(table.obsp) - before == {"g_connectivities", "g_distances", "g_overlap", "g_similarity"}
    assert table.uns["g_neighbors"]["connectivities_key"] == "g_connectivities"
    assert table.obsp["g_connectivities"].nnz < result.connectivities.nnz


def test_build_3d_graph_without_features_is_made_of_distances(prepared_stack):
    si.tl.build_3d_graph(prepared_stack, use_rep=None)
    table = prepared_stack.tables["stack"]
    assert table.obsp["spatial_3d_similarity"].nnz == 0
    assert table.uns["spatial_3d_neighbors"]["params"]["use_rep"] == ""
    assert table.obsp["spatial_3d_distances"].max() < 1000


def test_build_3d_graph_is_independent_of_expression(prepared_stack):
    before = prepared_stack.tables["stack"].obsp["spatial_3d_connectivities"].copy()
    prepared_stack.tables["stack"].layers["measured"][:] = np.nan
    si.tl.build_3d_graph(prepared_stack)
    after = prepared_stack.tables["stack"].obsp["spatial_3d_connectivities"]
    assert same_pattern(before, after)
    np.testing.assert_array_equal(before.data, after.data)


def test_build_3d_graph_follows_the_order_of_rows(prepared_stack):
    before = prepared_stack.tables["stack"].obsp["spatial_3d_connectivities"].toarray()
    order = np.random.default_rng(0).permutation(len(before))
    prepared_stack.tables["stack"] = prepared_stack.tables["stack"][order].copy()
    si.tl.build_3d_graph(prepared_stack)
    after = prepared_stack.tables["stack"].obsp["spatial_3d_connectivities"].toarray()
    # Ties of a regular lattice may fall otherwise, but weights hold.
    both = (after > 0) & (before[np.ix_(order, order)] > 0)
    assert both.sum() > 0.95 * (before > 0).sum()
    np.testing.assert_allclose(after[both], before[np.ix_(order, order)][both], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_neighs": 0}, "`n_neighs` must be a whole number of at least 1, found 0"),
        ({"max_section_gap": 0}, "`max_section_gap` must be a whole number of at least 1"),
        ({"similarity_threshold": 1.0}, r"must lie in \[-1, 1\), found 1.0"),
        ({"max_distance": -1}, "`max_distance` must be a positive number"),
        ({"n_cross_neighs": -1}, "n_cross_neighs"),
        ({"n_similar": -1}, "n_similar"),
        ({"similarity_weight": -1.0}, "similarity_weight"),
    ],
)
def test_build_3d_graph_rejects_impossible_parameters(prepared_stack, options, message):
    with pytest.raises(ValueError, match=message):
        si.tl.build_3d_graph(prepared_stack, key_added="bad", **options)
    assert "bad_connectivities" not in prepared_stack.tables["stack"].obsp


def test_build_3d_graph_without_cross_neighbors_keeps_overlaps(prepared_stack):
    si.tl.build_3d_graph(prepared_stack, n_cross_neighs=0, use_rep=None)
    table = prepared_stack.tables["stack"]
    coo = table.obsp["spatial_3d_connectivities"].tocoo()
    section = table.obs["section"].cat.codes.to_numpy()
    crossing = section[coo.row] != section[coo.col]
    assert crossing.sum() == table.obsp["spatial_3d_overlap"].nnz


def test_build_3d_graph_names_the_missing_step(stack):
    with pytest.raises(KeyError, match=r"'spatial_3d' not found .*Run `si.tl.register_stack\(sdata\)` first"):
        si.tl.build_3d_graph(stack)
    stack.tables["stack"].obsm["spatial_3d"] = np.zeros((stack.tables["stack"].n_obs, 3))
    with pytest.raises(KeyError, match=r"'X_spot' not found .*si.pp.extract_features.*`use_rep=None`"):
        si.tl.build_3d_graph(stack)


def test_build_3d_graph_refuses_missing_coordinates(prepared_stack):
    table = prepared_stack.tables["stack"]
    table.obsm["spatial_3d"][5, 0] = np.nan
    with pytest.raises(ValueError, match=f"must be finite; .* row 5 .*{table.obs_names[5]}"):
        si.tl.build_3d_graph(prepared_stack)


def test_sections_in_another_order_than_the_stack_are_refused(prepared_stack):
    """Round trips over strings sort the categories; neighboring sections would then be others."""
    table = prepared_stack.tables["stack"]
    table.obs["section"] = pd.Categorical(table.obs["section"].astype(str), categories=["s2", "s0", "s1"])
    with pytest.raises(
        ValueError, match=r"in the order of the stack, \['s0', 's1', 's2'\]; found \['s2', 's0', 's1'\]"
    ):
        si.tl.build_3d_graph(prepared_stack, use_rep=None)


def test_build_graph_weights_are_means_over_the_error_of_the_place():
    rng, spread = np.random.default_rng(0), 0.4
    place, radius, bandwidth = np.array([[0, 0, 0], [0.5, 0, 0.2]]), np.array([0.5, 0.5]), 0.8
    misplaced = np.array([[0, spread], [spread, 0]])
    options = {"max_distance": 10.0, "bandwidth": bandwidth}
    weight = build(place, np.array([0, 1]), radius, misplaced=misplaced, **options).weights[0, 1]
    moved = place[1, :2] + rng.normal(0, spread, (20_000, 2))
    length = np.linalg.norm(moved, axis=1)
    gaussian = np.exp(-0.5 * (length**2 + 0.04) / bandwidth**2).mean()
    assert weight == pytest.approx(gaussian + disc_iou(length, 0.5, 0.5).mean(), rel=0.05)
    far = build(place, np.array([0, 1]), radius, misplaced=10 * misplaced, **options).weights[0, 1]
    assert far < 0.1 * weight


def test_build_3d_graph_trusts_a_badly_placed_section_less(prepared_stack):
    sdata = prepared_stack
    section = sdata.tables["stack"].obs["section"].astype(str).to_numpy()
    rows = sdata.attrs["spatial_impute"]["stack"]["registration"]["sections"]
    reference = next(name for name, row in rows.items() if row["route"] == "reference")
    bad = next(name for name, row in rows.items() if row["path"] == [name, reference])

    def links(error: float | None, a: str, b: str) -> float:
        rows[bad]["error_um"] = error
        weights = si.tl.build_3d_graph(sdata, use_rep=None, inplace=False).connectivities
        return float(weights[section == a][:, section == b].sum())

    assert links(500.0, bad, reference) < 0.5 * links(0.0, bad, reference)
    assert links(500.0, bad, bad) == links(0.0, bad, bad)
    others = [row["error_um"] for name, row in rows.items() if name != bad and row["error_um"] is not None]
    assert links(None, bad, reference) == pytest.approx(links(max(others), bad, reference))
