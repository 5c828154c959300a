from __future__ import annotations

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.collections import LineCollection
from mpl_toolkits.mplot3d.art3d import Line3DCollection, Poly3DCollection

import spatial_impute as si
from spatial_impute.pl._graph_3d import typed_edges

KEYS = [f"spatial_3d_{name}" for name in ("connectivities", "overlap", "similarity")]


@pytest.fixture(scope="module")
def edges(small_prepared):
    table = small_prepared.tables["stack"]
    section = table.obs["section"].astype(str).to_numpy()
    return typed_edges(*(table.obsp[key] for key in KEYS), section)


def counts_in_legend(ax):
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    return {text.split(" (")[0]: int(text.split("(")[1][:-1]) for text in texts}


def test_every_edge_has_one_type_that_is_true(small_prepared, edges):
    table = small_prepared.tables["stack"]
    section = table.obs["section"].astype(str).to_numpy()
    i, j = edges.pairs.T
    assert (i < j).all()
    assert 2 * len(i) == table.obsp[KEYS[0]].nnz
    np.testing.assert_array_equal(section[i] == section[j], edges.kind == "within")
    overlap = np.asarray(table.obsp[KEYS[1]][i, j]).ravel()
    np.testing.assert_array_equal(overlap > 0, edges.kind == "overlap")
    similar = np.asarray(table.obsp[KEYS[2]][i, j]).ravel() != 0
    assert similar[edges.kind == "similar"].all()
    assert not similar[edges.kind == "near"].any()
    assert set(edges.kind) == {"within", "overlap", "near", "similar"}


def test_all_edges_in_3d(small_prepared, edges):
    (ax,) = si.pl.graph_3d(small_prepared, n_spots=None, return_ax=True)
    (lines,) = (c for c in ax.collections if isinstance(c, Line3DCollection))
    reference = (small_prepared.tables["stack"].obs["section"] == "s1").to_numpy()
    touched = reference[edges.pairs].any(axis=1)
    assert len(lines._segments3d) == touched.sum()
    labels = {"same section": "within", "overlapping": "overlap", "near, no overlap": "near", "look alike": "similar"}
    for label, count in counts_in_legend(ax).items():
        assert count == (edges.kind[touched] == labels[label]).sum()
    xyz = small_prepared.tables["stack"].obsm["spatial_3d"]
    np.testing.assert_allclose(np.asarray(lines._segments3d), xyz[edges.pairs[touched]])


def test_few_spots_are_spread_and_the_same_every_time(small_prepared):
    table = small_prepared.tables["stack"]
    found = [si.pl.graph_3d(small_prepared, n_spots=4, return_ax=True)[0] for _ in range(2)]
    assert found[0].get_title() == f"edges of 4 of {table.n_obs} spots"
    assert counts_in_legend(found[0]) == counts_in_legend(found[1])
    # Four planes of spots: three sections and those chosen.
    assert len([c for c in found[0].collections if isinstance(c, Poly3DCollection)]) == 4
    texts = [text.get_text() for text in found[0].texts]
    assert texts[:3] == ["s0\nz = 0 µm", "s1 (measured)\nz = 20 µm", "s2\nz = 40 µm"]
    assert "µm, z × " in texts[3]


def test_pair_shows_crossing_edges_only(small_prepared, edges):
    (ax,) = si.pl.graph_3d(small_prepared, ["s0", "s1"], view="pair", n_spots=None, return_ax=True)
    section = small_prepared.tables["stack"].obs["section"].astype(str).to_numpy()
    names = np.sort(section[edges.pairs], axis=1)
    expected = ((names[:, 0] == "s0") & (names[:, 1] == "s1")).sum()
    (lines,) = (c for c in ax.collections if isinstance(c, LineCollection))
    assert len(lines.get_segments()) == expected == sum(counts_in_legend(ax).values())
    assert "same section" not in counts_in_legend(ax)
    assert [text.get_text() for text in ax.texts] == ["s0, z = 0 µm", "s1 (measured), z = 20 µm"]
    assert ax.get_aspect() == 1


def test_types_and_spots_can_be_chosen(small_prepared):
    spot = small_prepared.tables["stack"].obs_names[3]
    (ax,) = si.pl.graph_3d(small_prepared, edges="within", spots=[spot], return_ax=True)
    degree = small_prepared.tables["stack"].obsp[KEYS[0]][3]
    section = small_prepared.tables["stack"].obs["section"].astype(str).to_numpy()
    assert counts_in_legend(ax) == {"same section": int((section[degree.indices] == section[3]).sum())}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"view": "side"}, ValueError, "`view` must be one of"),
        ({"view": "pair"}, ValueError, "needs two `sections`"),
        ({"sections": ["s0"], "view": "pair"}, ValueError, "needs two `sections`"),
        ({"sections": "s9"}, KeyError, "'s9' not found"),
        ({"edges": "long"}, ValueError, "`edges` must be one of"),
        ({"graph_key": "nope"}, KeyError, r"si\.tl\.build_3d_graph"),
        ({"spots": ["nobody"]}, KeyError, "'nobody' not found"),
        ({"spots": ["s0_0"], "sections": ["s1", "s2"]}, ValueError, "'s0_0' does not"),
        ({"edges": "within", "view": "pair", "sections": ["s0", "s1"]}, ValueError, "No type of edge is left"),
        ({"edges": []}, ValueError, "No type of edge is left"),
        ({"n_spots": 0}, ValueError, "`n_spots` must be a whole number of at least 1"),
        ({"z_stretch": 0}, ValueError, "`z_stretch` must be a positive number"),
    ],
)
def test_graph_says_what_is_wrong(small_prepared, change, error, message):
    with pytest.raises(error, match=message):
        si.pl.graph_3d(small_prepared, **change)


def test_graph_in_3d_needs_3d_axes(small_prepared):
    with pytest.raises(ValueError, match="must be one 3D axes"):
        si.pl.graph_3d(small_prepared, ax=plt.figure().add_subplot())
