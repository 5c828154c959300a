"""The result goes unchanged through the tools that people use next."""

from __future__ import annotations

import copy

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import spatialdata as sd
import squidpy as sq

import spatial_impute as si
from spatial_impute._stack.record import load_record, save_record


@pytest.fixture(scope="module")
def model(small_prepared, quick_params):
    return si.tl.fit_asign(small_prepared, model_params=quick_params)


@pytest.fixture(scope="module")
def imputed_once(small_prepared, model):
    sdata = copy.deepcopy(small_prepared)
    si.pp.segment_tissue(sdata)
    si.tl.impute_baseline(sdata, "kernel")
    si.tl.impute_3d(sdata, model)
    return sdata


@pytest.fixture
def imputed(imputed_once):
    return copy.deepcopy(imputed_once)


@pytest.fixture
def table(imputed):
    return imputed.tables["stack"]


def plain(value):
    """The same with lists for arrays and Python numbers for NumPy's: what a file may change and nobody minds."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(v) for v in np.asarray(value).tolist()]
    return value.item() if isinstance(value, np.generic) else value


def test_impute_3d_writes_the_slots_of_the_contract(table):
    assert {"measured", "baseline_kernel", "asign"} <= set(table.layers)
    assert table.layers["asign"].dtype == np.float32
    assert np.isfinite(table.layers["asign"]).all()
    known = table.obs["measured"].to_numpy()
    np.testing.assert_array_equal(table.layers["asign"][known], table.layers["measured"][known])
    support = table.obs["imputation_support"].to_numpy()
    assert ((support >= 0) & (support <= 1)).all()
    assert (support[known] == 1).all()
    assert (support[~known] < 1).all()
    assert table.var["imputation_r"].between(-1, 1).all()
    assert np.isnan(table.layers["measured"][~known]).all()


def test_nhood_enrichment_runs_on_the_3d_graph(table):
    sq.gr.nhood_enrichment(
        table, cluster_key="section", connectivity_key="spatial_3d", n_perms=50, show_progress_bar=False, seed=0
    )
    found = table.uns["section_nhood_enrichment"]
    assert found["zscore"].shape == (3, 3)
    assert np.isfinite(found["zscore"]).all()
    # It counted the edges of our graph.
    coo = table.obsp["spatial_3d_connectivities"].tocoo()
    code = table.obs["section"].cat.codes.to_numpy()
    expected = np.zeros((3, 3))
    np.add.at(expected, (code[coo.row], code[coo.col]), 1)
    np.testing.assert_array_equal(found["count"], expected)


def test_spatial_autocorr_finds_the_smooth_genes(table):
    found = sq.gr.spatial_autocorr(
        table,
        layer="asign",
        connectivity_key="spatial_3d_connectivities",
        genes=list(table.var_names),
        n_perms=None,
        copy=True,
        show_progress_bar=False,
    )
    smooth = found["I"][[name.startswith("smooth") for name in found.index]]
    noise = found["I"][[name.startswith("noise") for name in found.index]]
    assert len(found) == table.n_vars
    assert smooth.min() > 0.3
    assert smooth.mean() > noise.mean()


def test_pca_of_the_imputed_layer(table):
    sc.pp.pca(table, layer="asign", n_comps=3)
    assert table.obsm["X_pca"].shape == (table.n_obs, 3)
    values = table.layers["asign"].astype(float)
    centred = values - values.mean(axis=0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(table.obsm["X_pca"]), np.abs(u[:, :3] * s[:3]), atol=1e-2 * s[0])


def test_spatial_scatter_draws_a_gene_per_section(table):
    axes = sq.pl.spatial_scatter(
        table,
        color=["smooth_0"],
        layer="asign",
        library_key="section",
        library_id=["s0", "s1", "s2"],
        shape=None,
        return_ax=True,
    )
    axes = np.ravel(axes)
    assert len(axes) == 3
    for ax, name in zip(axes, ["s0", "s1", "s2"], strict=True):
        rows = (table.obs["section"] == name).to_numpy()
        drawn = [c for c in ax.collections if len(c.get_offsets()) == rows.sum()]
        assert drawn
        np.testing.assert_allclose(
            np.sort(np.asarray(drawn[0].get_offsets()), axis=0), np.sort(table.obsm["spatial"][rows], axis=0), rtol=1e-6
        )
        drawn_values = np.asarray(drawn[0].get_array(), dtype=float)
        if drawn_values.ndim == 1:
            np.testing.assert_allclose(np.sort(drawn_values), np.sort(table[rows, "smooth_0"].layers["asign"].ravel()))


def test_render_shapes_colours_the_spots_of_a_section(imputed):
    import spatialdata_plot  # noqa: F401

    ax = plt.figure().add_subplot()
    imputed.pl.render_shapes("s0_spots", color="smooth_0", table_name="stack", table_layer="asign").pl.show(
        coordinate_systems="s0", ax=ax
    )
    n = len(imputed.shapes["s0_spots"])
    drawn = [c for c in ax.collections if len(c.get_paths()) == n]
    assert len(drawn) == 1
    colours = drawn[0].get_facecolor()
    assert len(np.unique(colours, axis=0)) > n / 2
    table = imputed.tables["stack"]
    values = table[(table.obs["section"] == "s0").to_numpy(), "smooth_0"].layers["asign"].ravel()
    # The lowest and the highest value have the ends of the colour map (viridis: dark to bright).
    brightness = colours[:, :3].sum(axis=1)
    assert brightness[values.argmax()] > brightness[values.argmin()] + 0.5


def test_render_images_and_tissue_of_a_section(imputed):
    import spatialdata_plot  # noqa: F401

    ax = plt.figure().add_subplot()
    imputed.pl.render_images("s0_image").pl.render_shapes("s0_tissue_outline", fill_alpha=0.2).pl.show(
        coordinate_systems="s0", ax=ax
    )
    assert ax.images
    assert ax.collections


def test_filter_by_coordinate_system_gives_one_section(imputed):
    only = imputed.filter_by_coordinate_system("s2")
    assert set(only.images) == {"s2_image"}
    assert set(only.shapes) == {"s2_spots", "s2_tissue_outline"}
    assert set(only.tables["stack"].obs["section"]) == {"s2"}
    assert only.tables["stack"].n_obs == len(imputed.shapes["s2_spots"])


def test_aligned_coordinate_system_places_the_spots_of_all_sections(imputed):
    table = imputed.tables["stack"]
    for name in ("s0", "s1", "s2"):
        circles = sd.transform(imputed.shapes[f"{name}_spots"], to_coordinate_system="aligned")
        rows = (table.obs["section"] == name).to_numpy()
        np.testing.assert_allclose(
            np.column_stack([circles.geometry.x, circles.geometry.y]), table.obsm["spatial_3d"][rows, :2], atol=1e-6
        )
        np.testing.assert_allclose(table.obsm["spatial_3d"][rows, 2], table.obs["z"][rows])


def test_result_survives_zarr(imputed, tmp_path):
    imputed.write(tmp_path / "s.zarr")
    back = sd.read_zarr(tmp_path / "s.zarr")
    one, two = imputed.tables["stack"], back.tables["stack"]
    np.testing.assert_array_equal(two.X, one.X)
    pd.testing.assert_frame_equal(two.obs, one.obs)
    pd.testing.assert_frame_equal(two.var, one.var)
    for name in ("layers", "obsm"):
        assert set(getattr(two, name)) == set(getattr(one, name))
        for key, value in getattr(one, name).items():
            np.testing.assert_array_equal(getattr(two, name)[key], value)
    assert set(two.obsp) == set(one.obsp)
    for key, value in one.obsp.items():
        np.testing.assert_array_equal(two.obsp[key].toarray(), value.toarray())
        np.testing.assert_array_equal(two.obsp[key].indices, value.indices)  # explicit zeros are kept
    assert plain(two.uns["asign"]) == plain(one.uns["asign"])
    assert plain(two.uns["spatial_3d_neighbors"]) == plain(one.uns["spatial_3d_neighbors"])
    assert back.attrs == imputed.attrs
    # And work goes on from there.
    si.tl.impute_baseline(back, "propagation")
    si.tl.impute_baseline(imputed, "propagation")
    np.testing.assert_array_equal(two.layers["baseline_propagation"], one.layers["baseline_propagation"])


def test_result_survives_h5ad(table, tmp_path):
    table.write_h5ad(tmp_path / "t.h5ad")
    back = ad.read_h5ad(tmp_path / "t.h5ad")
    np.testing.assert_array_equal(back.layers["asign"], table.layers["asign"])
    np.testing.assert_array_equal(back.layers["measured"], table.layers["measured"])
    pd.testing.assert_frame_equal(back.obs, table.obs)
    assert plain(back.uns["asign"]) == plain(table.uns["asign"])
    assert back.uns["spatial_3d_neighbors"]["connectivities_key"] == "spatial_3d_connectivities"


def test_impute_3d_not_in_place_gives_an_anndata_that_stands_alone(small_stack, model, tmp_path):
    result = si.tl.impute_3d(small_stack, model, inplace=False)
    assert set(small_stack.tables["stack"].layers) == {"measured"}
    assert "imputation_support" not in small_stack.tables["stack"].obs
    si.tl.impute_3d(small_stack, model)
    np.testing.assert_array_equal(result.X, small_stack.tables["stack"].layers["asign"])
    result.write_h5ad(tmp_path / "r.h5ad")
    np.testing.assert_array_equal(ad.read_h5ad(tmp_path / "r.h5ad").X, result.X)
    sc.pp.pca(result, n_comps=2)
    assert result.obsm["X_pca"].shape == (result.n_obs, 2)


def test_model_survives_disk(small_stack, model, tmp_path):
    model.save(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    back = si.models.AsignModel.load(tmp_path / "model")
    one, two = (si.tl.impute_3d(small_stack, m, inplace=False) for m in (model, back))
    np.testing.assert_array_equal(one.X, two.X)
    pd.testing.assert_frame_equal(one.obs, two.obs)
    pd.testing.assert_frame_equal(one.var, two.var)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        model.save(tmp_path / "model")


def test_work_on_a_part_of_the_stack_leaves_the_whole_as_it_was(small_stack):
    part = small_stack.filter_by_coordinate_system(["s0", "s1"])
    names = load_record(small_stack).names
    assert load_record(part).names == ("s0", "s1") != names
    save_record(part, load_record(part))
    assert load_record(small_stack).names == names
    assert load_record(part).names == ("s0", "s1")
