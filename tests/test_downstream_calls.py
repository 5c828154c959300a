"""Calls of squidpy, scanpy, spatialdata and spatialdata-plot on the imputed stack, each as their users write it.

Calls without `layer=` read ``X``, a copy of the layer that was imputed last.

Content is checked where the answer is known; beyond that, that nothing has to be converted first.
"""

from __future__ import annotations

import copy
import os
import time

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import spatialdata as sd
import squidpy as sq

import spatial_impute as si

LAYER = "asign"


@pytest.fixture(scope="module")
def model(small_prepared, quick_params):
    return si.tl.fit_asign(small_prepared, model_params=quick_params)


@pytest.fixture(scope="module")
def imputed_once(small_prepared, model):
    sdata = copy.deepcopy(small_prepared)
    si.pp.segment_tissue(sdata)
    si.tl.impute_3d(sdata, model)
    table = sdata.tables["stack"]
    gene = table[:, "smooth_0"].layers[LAYER].ravel()
    table.obs["domain"] = pd.Categorical(np.where(gene > np.median(gene), "high", "low"))
    return sdata


@pytest.fixture
def sdata(imputed_once):
    return copy.deepcopy(imputed_once)


@pytest.fixture
def table(sdata):
    return sdata.tables["stack"]


# squidpy


def test_squidpy_spatial_neighbors_stays_within_sections(table):
    sq.gr.spatial_neighbors(table, library_key="section", coord_type="generic", n_neighs=4)
    edges = table.obsp["spatial_connectivities"].tocoo()
    section = table.obs["section"].to_numpy()
    assert (section[edges.row] == section[edges.col]).all()
    assert "spatial_3d_connectivities" in table.obsp  # ours is left alone


def test_squidpy_interaction_matrix_and_its_plot(table):
    sq.gr.interaction_matrix(table, cluster_key="domain", connectivity_key="spatial_3d")
    found = table.uns["domain_interactions"]
    assert found.sum() == table.obsp["spatial_3d_connectivities"].nnz
    sq.pl.interaction_matrix(table, cluster_key="domain")
    assert plt.get_fignums()


def test_squidpy_centrality_scores(table):
    sq.gr.centrality_scores(
        table, cluster_key="domain", connectivity_key="spatial_3d", n_jobs=1, show_progress_bar=False
    )
    scores = table.uns["domain_centrality_scores"]
    assert list(scores.index) == ["high", "low"]
    assert np.isfinite(scores["degree_centrality"]).all()


def test_squidpy_nhood_enrichment_plot(table):
    sq.gr.nhood_enrichment(
        table, cluster_key="domain", connectivity_key="spatial_3d", n_perms=20, seed=0, show_progress_bar=False
    )
    assert table.uns["domain_nhood_enrichment"]["zscore"][0, 0] > 0
    sq.pl.nhood_enrichment(table, cluster_key="domain")
    assert plt.get_fignums()


def test_squidpy_ligrec_between_domains(table):
    # It has no `layer`, wants names in capitals, and takes an underscore for a complex of two genes.
    whole = table.copy()
    whole.var_names = whole.var_names.str.upper().str.replace("_", "")
    pairs = pd.DataFrame({"source": ["SMOOTH0"], "target": ["SMOOTH1"]})
    found = sq.gr.ligrec(
        whole,
        cluster_key="domain",
        interactions=pairs,
        use_raw=False,
        n_perms=10,
        threshold=0.0,
        seed=0,
        copy=True,
        show_progress_bar=False,
    )
    assert found["means"].shape == (1, 4)
    means = whole[whole.obs["domain"] == "high"].to_df().mean()
    expected = (means["SMOOTH0"] + means["SMOOTH1"]) / 2
    np.testing.assert_allclose(found["means"][("high", "high")].iloc[0], expected, rtol=1e-4)


def test_squidpy_spatial_scatter_of_a_column(table):
    axes = sq.pl.spatial_scatter(
        table, color="imputation_support", library_key="section", library_id=["s0"], shape=None, return_ax=True
    )
    assert np.ravel(axes)[0].get_title().startswith("imputation_support") or np.ravel(axes)[0].collections


# scanpy


def test_scanpy_neighbors_on_the_imputed_layer(table):
    sc.pp.pca(table, layer=LAYER, n_comps=4)
    sc.pp.neighbors(table, n_neighbors=8, use_rep="X_pca", method="gauss")  # that of umap compiles for seconds
    assert table.obsp["connectivities"].shape == (table.n_obs, table.n_obs)
    assert table.obsp["spatial_3d_connectivities"].nnz > 0  # ours is left alone


def test_scanpy_leiden_on_the_3d_graph(table):
    pytest.importorskip("igraph")
    sc.tl.leiden(
        table,
        adjacency=table.obsp["spatial_3d_connectivities"],
        flavor="igraph",
        n_iterations=2,
        directed=False,
        key_added="domains_3d",
    )
    assert table.obs["domains_3d"].nunique() > 1


def test_scanpy_rank_genes_groups_finds_the_gene_of_the_domains(table):
    sc.tl.rank_genes_groups(table, "domain", groups=["high"], layer=LAYER, use_raw=False)
    assert sc.get.rank_genes_groups_df(table, "high")["names"].iloc[0] == "smooth_0"


def test_scanpy_obs_df_and_aggregate_by_section(table):
    frame = sc.get.obs_df(table, ["smooth_0", "section"], layer=LAYER)
    means = sc.get.aggregate(table, by="section", func="mean", layer=LAYER)
    expected = frame.groupby("section", observed=True)["smooth_0"].mean()
    np.testing.assert_allclose(means[list(expected.index), "smooth_0"].layers["mean"].ravel(), expected, rtol=1e-5)


def test_scanpy_embedding_plot_in_the_common_frame(table):
    ax = sc.pl.embedding(table, basis="spatial_3d", color="smooth_0", layer=LAYER, vmax="p99", show=False)
    assert len(ax.collections[0].get_offsets()) == table.n_obs


def test_scanpy_violin_by_section(table):
    assert sc.pl.violin(table, "smooth_0", groupby="section", layer=LAYER, use_raw=False, show=False) is not None


# without `layer=`, as in every tutorial


def test_x_is_a_copy_of_the_layer_that_was_imputed_last(table, sdata):
    np.testing.assert_array_equal(table.X, table.layers[LAYER])
    assert table.uns["X_layer"] == LAYER
    before = table.layers[LAYER].copy()
    sc.pp.scale(table)  # works in place
    np.testing.assert_array_equal(table.layers[LAYER], before)
    si.tl.impute_baseline(sdata, "kernel")
    np.testing.assert_array_equal(table.X, table.layers["baseline_kernel"])
    assert table.uns["X_layer"] == "baseline_kernel"
    si.pp.select_genes(sdata, n_top_genes=4)
    assert sdata.tables["stack"].X is None
    assert "X_layer" not in sdata.tables["stack"].uns


def test_scanpy_pca_and_neighbors_without_layer(table):
    sc.pp.pca(table, n_comps=4)
    alone = table.copy()
    sc.pp.pca(alone, n_comps=4, layer=LAYER)
    np.testing.assert_allclose(table.obsm["X_pca"], alone.obsm["X_pca"], atol=1e-5)
    sc.pp.neighbors(table, n_neighbors=8, method="gauss")
    assert table.obsp["connectivities"].nnz > 0


def test_scanpy_rank_genes_groups_without_layer(table):
    sc.tl.rank_genes_groups(table, "domain", groups=["high"])
    assert sc.get.rank_genes_groups_df(table, "high")["names"].iloc[0] == "smooth_0"


def test_scanpy_score_genes_without_layer(table):
    sc.tl.score_genes(table, ["smooth_0", "smooth_1"], ctrl_size=3, use_raw=False)
    assert table.obs["score"].std() > 0


def test_scanpy_spatial_plot_of_a_gene_without_layer(table):
    one = table[table.obs["section"] == "s1"].copy()
    with pytest.warns(FutureWarning, match="squidpy"):
        axes = sc.pl.spatial(one, color="smooth_0", spot_size=100, show=False)
    assert len(axes[0].collections) > 0


def test_squidpy_spatial_autocorr_without_layer(table):
    found = sq.gr.spatial_autocorr(
        table, connectivity_key="spatial_3d_connectivities", n_perms=None, copy=True, show_progress_bar=False
    )
    assert found.index[0].startswith("smooth")


def test_squidpy_spatial_scatter_of_a_gene_without_layer(table):
    axes = sq.pl.spatial_scatter(
        table, color="smooth_0", library_key="section", library_id=["s0", "s1"], shape=None, return_ax=True
    )
    assert len(np.ravel(axes)) == 2


def test_render_shapes_without_table_layer(sdata, table):
    import spatialdata_plot  # noqa: F401

    ax = plt.figure().add_subplot()
    sdata.pl.render_shapes("s1_spots", color="smooth_0", table_name="stack").pl.show(coordinate_systems="s1", ax=ax)
    colors = np.concatenate([c.get_facecolor() for c in ax.collections])
    assert len(np.unique(colors, axis=0)) > 10


def test_anndata_of_impute_3d_keeps_graph_coordinates_and_support(model, small_prepared):
    result = si.tl.impute_3d(small_prepared, model, inplace=False)
    sq.gr.nhood_enrichment(
        result, cluster_key="section", connectivity_key="spatial_3d", n_perms=5, seed=0, show_progress_bar=False
    )
    assert result.uns["spatial_3d_neighbors"]["connectivities_key"] == "spatial_3d_connectivities"
    assert {"imputation_support", "measured", "section"} <= set(result.obs)
    given = small_prepared.tables["stack"]
    np.testing.assert_array_equal(result.obsm["spatial_3d"], given.obsm["spatial_3d"])
    result.obsp["spatial_3d_connectivities"].data[:] = 0  # a copy of its own
    assert given.obsp["spatial_3d_connectivities"].data.any()


# spatialdata


def test_spatialdata_get_values_of_a_section(sdata, table):
    found = sd.get_values("smooth_0", sdata=sdata, element_name="s0_spots", table_name="stack", table_layer=LAYER)
    rows = (table.obs["section"] == "s0").to_numpy()
    np.testing.assert_allclose(found["smooth_0"], table[rows, "smooth_0"].layers[LAYER].ravel())


def test_spatialdata_bounding_box_query_takes_the_rows_along(sdata):
    inside = sdata.query.bounding_box(
        axes=("x", "y"), min_coordinate=[300, 300], max_coordinate=[900, 900], target_coordinate_system="s0"
    )
    assert 0 < inside.tables["stack"].n_obs < len(sdata.shapes["s0_spots"])
    xy = inside.tables["stack"].obsm["spatial"]
    assert ((xy > 250) & (xy < 950)).all()


def test_spatialdata_join_table_to_spots(sdata):
    elements, joined = sd.join_spatialelement_table(
        sdata=sdata, spatial_element_names="s2_spots", table_name="stack", how="left"
    )
    assert len(elements["s2_spots"]) == joined.n_obs == len(sdata.shapes["s2_spots"])


def test_spatialdata_rasterize_the_aligned_frame(sdata):
    image = sd.rasterize(
        sdata["s0_image"],
        axes=("x", "y"),
        min_coordinate=[0, 0],
        max_coordinate=[1400, 1400],
        target_coordinate_system="aligned",
        target_width=100,
    )
    assert dict(image.sizes) == {"c": 3, "y": 100, "x": 100}


# spatialdata-plot


def test_render_labels_and_points_of_the_contract(sdata):
    import spatialdata_plot  # noqa: F401

    ax = plt.figure().add_subplot()
    sdata.pl.render_labels("s0_tissue").pl.show(coordinate_systems="s0", ax=ax)
    assert ax.images


def test_render_graph_of_the_stack(sdata):
    import spatialdata_plot  # noqa: F401

    section = sdata.filter_by_coordinate_system("s0")
    section.tables["stack"].obs["region"] = section.tables["stack"].obs["region"].cat.remove_unused_categories()
    ax = plt.figure().add_subplot()
    section.pl.render_shapes("s0_spots").pl.render_graph(
        "s0_spots", connectivity_key="spatial_3d", table_name="stack"
    ).pl.show(coordinate_systems="s0", ax=ax)
    assert len(ax.collections) >= 2


def test_render_all_sections_in_the_common_frame(sdata):
    import spatialdata_plot  # noqa: F401

    ax = plt.figure().add_subplot()
    chain = sdata
    for name in ("s0", "s1", "s2"):
        chain = chain.pl.render_shapes(f"{name}_spots", color="smooth_0", table_name="stack", table_layer=LAYER)
    chain.pl.show(coordinate_systems="aligned", ax=ax)
    assert len(ax.collections) >= 3


# napari-spatialdata


@pytest.mark.skipif(
    not os.environ.get("DISPLAY"), reason="napari needs a screen; run with xvfb-run where there is none"
)
def test_napari_spatialdata_links_the_imputed_layer_to_the_spots(sdata):
    napari_spatialdata = pytest.importorskip("napari_spatialdata", reason="napari-spatialdata is not installed")
    from napari_spatialdata._view import QtAdataViewWidget
    from qtpy.QtWidgets import QApplication

    interactive = napari_spatialdata.Interactive(sdata, headless=True)
    viewer = interactive._viewer

    def until(condition):
        end = time.monotonic() + 60
        while not condition() and time.monotonic() < end:
            QApplication.instance().processEvents()
        assert condition()

    for n_layers, element in enumerate(("s0_image", "s0_spots"), start=1):
        interactive.add_element(element, element_coordinate_system="aligned")  # in a thread of its own
        until(lambda n=n_layers: len(viewer.layers) == n)
    viewer.layers.selection.active = viewer.layers["s0_spots"]
    panel = QtAdataViewWidget(viewer)
    panel.model.adata_layer = LAYER
    panel.var_widget._onAction(["smooth_0"])
    shown = viewer.layers["s0_spots"].features
    table = sdata.tables["stack"][sdata.tables["stack"].obs["section"] == "s0"]
    expected = pd.Series(table[:, "smooth_0"].layers[LAYER].ravel(), index=table.obs["instance_id"].to_numpy())
    np.testing.assert_allclose(shown["smooth_0"], expected[shown["index"]], rtol=1e-6)
    assert len(np.unique(viewer.layers["s0_spots"].face_color, axis=0)) > len(expected) // 2
    viewer.close()
