from __future__ import annotations

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from anndata import AnnData
from scipy import sparse
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Identity

import spatial_impute as si
from spatial_impute._expression import log_normalize
from spatial_impute._settings import logger

N = 6
GENES = ["low", "high", "mid", "none", "top"]


def counts_matrix(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.poisson([1.0, 20.0, 5.0, 0.0, 60.0], size=(N, 5)).astype(float) + np.array([0, 1, 0, 0, 0])


def section(matrix: np.ndarray | None, *, genes=GENES, ids=None, seed: int = 0, **layers) -> SpatialData:
    ids = [str(i) for i in range(N)] if ids is None else ids
    pixels = np.random.default_rng(seed).integers(0, 255, (3, 20, 80), dtype=np.uint8)
    circles = gpd.GeoDataFrame(
        {"radius": np.full(N, 3.0)}, geometry=gpd.points_from_xy(10 * np.arange(N) + 5, np.full(N, 8)), index=ids
    )
    sdata = SpatialData(
        images={"image": Image2DModel.parse(pixels, dims=("c", "y", "x"))},
        shapes={"spots": ShapesModel.parse(circles, transformations={"global": Identity()})},
    )
    if matrix is not None:
        obs = pd.DataFrame({"region": pd.Categorical(["spots"] * matrix.shape[0]), "id": ids[: matrix.shape[0]]})
        obs.index = [f"spot{i}" for i in range(matrix.shape[0])]
        table = AnnData(X=matrix, obs=obs, var=pd.DataFrame(index=genes), layers=layers)
        sdata.tables["t"] = TableModel.parse(table, region="spots", region_key="region", instance_key="id")
    return sdata


def stack_of(**sections: SpatialData) -> SpatialData:
    return si.pp.assemble_stack(sections, mpp=1.0, section_spacing=10)


def expected_values(matrix: np.ndarray, target_sum: float = 1e4) -> np.ndarray:
    values = AnnData(np.array(matrix, dtype=float))
    sc.pp.normalize_total(values, target_sum=target_sum)
    sc.pp.log1p(values)
    return values.X


@pytest.mark.parametrize("make", [np.asarray, sparse.csr_matrix, sparse.csc_matrix, lambda m: m.astype(np.int64)])
def test_select_genes_normalises_over_all_genes_before_choosing(make):
    matrix = counts_matrix()
    sdata = stack_of(m=section(make(matrix)), u=section(None, seed=1))
    si.pp.select_genes(sdata, n_top_genes=2)
    table = sdata.tables["stack"]
    assert list(table.var_names) == ["top", "high"]
    expected = expected_values(matrix)[:, [4, 1]]
    np.testing.assert_allclose(table.layers["measured"][:N], expected, rtol=1e-6)
    # By hand for one value: counts per 10,000 of all genes.
    assert table.layers["measured"][0, 0] == pytest.approx(np.log1p(1e4 * matrix[0, 4] / matrix[0].sum()), rel=1e-6)


def test_select_genes_leaves_the_counts_as_they_are():
    matrix = counts_matrix()
    sdata = stack_of(m=section(sparse.csr_matrix(matrix)))
    si.pp.select_genes(sdata)
    np.testing.assert_array_equal(sdata.tables["m_counts"].X.toarray(), matrix)


def test_select_genes_does_not_depend_on_the_panel():
    matrix = counts_matrix()
    results = []
    for options in ({"n_top_genes": 4}, {"genes": ["mid", "top"]}):
        sdata = stack_of(m=section(matrix))
        si.pp.select_genes(sdata, **options)
        results.append(sdata.tables["stack"][:, ["mid", "top"]].layers["measured"])
    np.testing.assert_array_equal(*results)


def test_select_genes_target_sum():
    sdata = stack_of(m=section(counts_matrix()))
    si.pp.select_genes(sdata, target_sum=100, genes=["mid"])
    expected = expected_values(counts_matrix(), 100)[:, [2]]
    np.testing.assert_allclose(sdata.tables["stack"].layers["measured"], expected, rtol=1e-6)
    assert sdata.tables["stack"].uns["normalization"]["target_sum"] == 100
    with pytest.raises(ValueError, match="`target_sum` must be a positive number"):
        si.pp.select_genes(sdata, target_sum=0)


def test_select_genes_gives_only_measured_rows_values():
    sdata = stack_of(u=section(None), m=section(counts_matrix()[:4], seed=1))
    si.pp.select_genes(sdata)
    table = sdata.tables["stack"]
    finite = np.isfinite(table.layers["measured"])
    np.testing.assert_array_equal(finite.all(axis=1), finite.any(axis=1))
    np.testing.assert_array_equal(finite.all(axis=1), table.obs["measured"])
    assert finite.all(axis=1).sum() == 4
    assert table.layers["measured"].dtype == np.float32


def test_select_genes_keeps_given_genes_in_their_order_and_once():
    sdata = stack_of(m=section(counts_matrix()))
    si.pp.select_genes(sdata, genes=["mid", "low", "mid"])
    assert list(sdata.tables["stack"].var_names) == ["mid", "low"]


def test_select_genes_takes_all_when_more_are_requested():
    sdata = stack_of(m=section(counts_matrix()))
    si.pp.select_genes(sdata, n_top_genes=99)
    assert set(sdata.tables["stack"].var_names) == set(GENES)


def test_select_genes_ties_go_to_the_first():
    matrix = np.full((N, 5), 3.0)
    sdata = stack_of(m=section(matrix))
    si.pp.select_genes(sdata, n_top_genes=3)
    assert list(sdata.tables["stack"].var_names) == GENES[:3]


def test_select_genes_joins_several_sections_by_gene_and_spot():
    first, second = counts_matrix(0), counts_matrix(1)
    turned = section(second[::-1, ::-1], genes=GENES[::-1], seed=1)
    turned.tables["t"].obs["id"] = [str(i) for i in range(N)][::-1]
    sdata = stack_of(a=section(first), b=turned)
    si.pp.select_genes(sdata, n_top_genes=2)
    table = sdata.tables["stack"]
    means = expected_values(first).mean(axis=0) + expected_values(second).mean(axis=0)
    order = np.argsort(-means)[:2]
    assert list(table.var_names) == [GENES[i] for i in order]
    expected = np.concatenate([expected_values(first), expected_values(second)])[:, order]
    np.testing.assert_allclose(table.layers["measured"], expected, rtol=1e-6)
    assert list(table.uns["normalization"]["sections"]) == ["a", "b"]


def test_select_genes_takes_only_genes_that_all_sections_measured():
    other = section(counts_matrix(1), genes=["low", "high", "mid", "none", "extra"], seed=1)
    sdata = stack_of(a=section(counts_matrix()), b=other)
    si.pp.select_genes(sdata)
    assert set(sdata.tables["stack"].var_names) == {"low", "high", "mid", "none"}
    with pytest.raises(KeyError, match=r"1 of `genes` are not measured on section 'b', e.g. \['top'\]"):
        si.pp.select_genes(sdata, genes=["top", "low"])
    with pytest.raises(KeyError, match="Did you mean 'low'"):
        si.pp.select_genes(sdata, genes=["LOW"])


def test_select_genes_of_sections_without_a_common_gene_raises():
    other = section(counts_matrix(1), genes=list("vwxyz"), seed=1)
    sdata = stack_of(a=section(counts_matrix()), b=other)
    with pytest.raises((KeyError, ValueError), match="gene"):
        si.pp.select_genes(sdata)


def test_select_genes_is_independent_of_the_order_of_rows():
    sdata = stack_of(m=section(counts_matrix()), u=section(None, seed=1))
    si.pp.select_genes(sdata)
    expected = sdata.tables["stack"].to_df("measured")
    order = np.random.default_rng(0).permutation(2 * N)
    sdata.tables["stack"] = sdata.tables["stack"][order].copy()
    si.pp.select_genes(sdata)
    found = sdata.tables["stack"].to_df("measured")
    assert list(found.index) == list(expected.index[order])
    pd.testing.assert_frame_equal(found.loc[expected.index], expected)


def test_select_genes_keeps_what_hangs_on_spots_and_drops_other_layers():
    sdata = stack_of(m=section(counts_matrix()))
    si.pp.select_genes(sdata)
    table = sdata.tables["stack"]
    table.layers["asign"] = table.layers["measured"].copy()
    table.obsm["X_spot"] = np.arange(N)[:, None]
    table.obsp["w"] = sparse.eye(N, format="csr")
    si.pp.select_genes(sdata, n_top_genes=1)
    table = sdata.tables["stack"]
    assert set(table.layers) == {"measured"}
    np.testing.assert_array_equal(table.obsm["X_spot"][:, 0], np.arange(N))
    assert table.obsp["w"].nnz == N
    assert table.uns["spatialdata_attrs"]["instance_key"] == "instance_id"


def test_select_genes_refuses_log_values():
    sdata = stack_of(m=section(np.log1p(counts_matrix())))
    with pytest.raises(ValueError, match=r"m_counts.*must hold raw counts.*`layer=`.*`log_normalized=True`"):
        si.pp.select_genes(sdata)
    assert "measured" not in sdata.tables["stack"].layers


def test_select_genes_takes_log_values_on_request():
    values = np.log1p(counts_matrix())
    sdata = stack_of(m=section(sparse.csr_matrix(values)))
    si.pp.select_genes(sdata, log_normalized=True, genes=GENES)
    np.testing.assert_allclose(sdata.tables["stack"].layers["measured"], values, rtol=1e-6)
    assert "as given" in sdata.tables["stack"].uns["normalization"]["units"]


def test_select_genes_refuses_counts_that_are_marked_as_logs():
    sdata = stack_of(m=section(counts_matrix()))
    with pytest.raises(ValueError, match=r"m_counts.*holds raw counts.*`log_normalized=True` was given"):
        si.pp.select_genes(sdata, log_normalized=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_select_genes_refuses_impossible_counts(bad):
    matrix = counts_matrix()
    matrix[2, 1] = bad
    with pytest.raises(ValueError, match="m_counts"):
        si.pp.select_genes(stack_of(m=section(matrix)))


def test_select_genes_reads_a_layer():
    sdata = stack_of(m=section(np.log1p(counts_matrix()), raw=counts_matrix()))
    si.pp.select_genes(sdata, layer="raw", genes=["top"])
    np.testing.assert_allclose(
        sdata.tables["stack"].layers["measured"], expected_values(counts_matrix())[:, [4]], rtol=1e-6
    )
    with pytest.raises(KeyError, match=r"'nope' not found in .*available.*raw"):
        si.pp.select_genes(sdata, layer="nope")


def test_select_genes_without_x_says_to_name_a_layer():
    source = section(counts_matrix(), raw=counts_matrix())
    source.tables["t"].X = None
    sdata = stack_of(m=source)
    with pytest.raises((KeyError, ValueError), match="layer="):
        si.pp.select_genes(sdata)


def test_select_genes_refuses_spots_without_counts():
    matrix = counts_matrix()
    matrix[3] = 0
    sdata = stack_of(m=section(sparse.csr_matrix(matrix)))
    with pytest.raises(ValueError, match="1 spots without a single count, the first is '3'") as caught:
        si.pp.select_genes(sdata)
    exec(str(caught.value).split("`")[3], {"sdata": sdata, "np": np})  # what the message says to do
    si.pp.select_genes(sdata)
    assert list(sdata.tables["stack"].obs["measured"]) == [True, True, True, False, True, True]


@pytest.mark.parametrize("n", [0, -3])
def test_select_genes_needs_a_gene(n):
    with pytest.raises(ValueError, match="`n_top_genes` must be a whole number of at least 1"):
        si.pp.select_genes(stack_of(m=section(counts_matrix())), n_top_genes=n)


def test_select_genes_needs_a_measured_section():
    with pytest.raises(ValueError, match="No measured section"):
        si.pp.select_genes(stack_of(u=section(None)))


def test_select_genes_needs_spots():
    sdata = si.pp.assemble_stack({"s": np.zeros((9, 9, 3), np.uint8)}, mpp=1, z=[0])
    with pytest.raises(KeyError, match=r"'stack' not found in `sdata.tables`.*si.pp.tile_spots"):
        si.pp.select_genes(sdata)


def test_log_normalize_keeps_sparse_sparse_and_its_input():
    matrix = sparse.csr_matrix(counts_matrix())
    result = log_normalize(matrix, 1e4)
    assert sparse.issparse(result)
    np.testing.assert_allclose(result.toarray(), expected_values(counts_matrix()))
    np.testing.assert_array_equal(matrix.toarray(), counts_matrix())


def test_select_genes_follows_counts_that_lost_spots():
    """A spot taken out of the counts after assembly is no longer measured, and no NaN among measured rows."""
    sdata = stack_of(m=section(counts_matrix()))
    sdata.tables["m_counts"] = sdata.tables["m_counts"][2:].copy()
    si.pp.select_genes(sdata)
    table = sdata.tables["stack"]
    assert table.obs["measured"].dtype == bool
    assert list(table.obs["measured"]) == [False, False, True, True, True, True]
    np.testing.assert_array_equal(np.isfinite(table.layers["measured"]).all(axis=1), table.obs["measured"])


def test_select_genes_measures_nothing_that_was_held_out():
    sdata = stack_of(m=section(counts_matrix()))
    sdata.tables["stack"].obs["measured"] = [False, True] * 3
    si.pp.select_genes(sdata)
    assert list(sdata.tables["stack"].obs["measured"]) == [False, True] * 3


def test_select_genes_says_how_sections_name_their_genes():
    ensembl = [f"ENSG{i}" for i in range(5)]
    sdata = stack_of(a=section(counts_matrix()), b=section(counts_matrix(1), genes=ensembl, seed=1))
    with pytest.raises(ValueError, match=r"'a': \['low', 'high'\], 'b': \['ENSG0', 'ENSG1'\]"):
        si.pp.select_genes(sdata)


def test_select_genes_says_that_few_genes_are_common(caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    other = [*GENES[:2], "x", "y", "z"]
    si.pp.select_genes(stack_of(a=section(counts_matrix()), b=section(counts_matrix(1), genes=other, seed=1)))
    assert "2 genes are on all measured sections, of {'a': 5, 'b': 5}" in caplog.text


@pytest.mark.parametrize(("kinds", "says"), [(["Antibody Capture"], True), (["Gene Expression"], False)])
def test_select_genes_says_that_some_features_are_no_genes(kinds, says, caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    sdata = stack_of(m=section(counts_matrix()))
    sdata.tables["m_counts"].var["feature_types"] = ["Gene Expression"] * 4 + kinds
    si.pp.select_genes(sdata)
    assert ("'Antibody Capture': 1" in caplog.text) is says


def two_panels(first: dict, second: dict, *, column: str = "gene_ids"):
    """Two measured sections whose genes have these names and ids."""
    from bad_inputs._make import visium

    sources = {}
    for name, genes in {"a": first, "b": second}.items():
        sources[name] = visium(genes=list(genes))
        if column:
            sources[name].tables["table"].var[column] = list(genes.values())
    return si.pp.assemble_stack(sources, mpp=1.0, section_spacing=5)


@pytest.mark.parametrize(
    ("first", "second", "genes"),
    [
        ({"A": "E1", "B": "E2"}, {"A2": "E1", "B": "E2"}, {"A", "B"}),  # renamed
        ({"A": "E1", "B": "E2"}, {"B": "E1", "A": "E2"}, {"A", "B"}),  # names exchanged
        ({"A": "E1", "B": "E2"}, {"E1": "E1", "E2": "E2"}, {"A", "B"}),  # ids as names
        ({"A": "ENSG1.4", "B": "ENSG2.1"}, {"A": "ENSG1.7", "B": "ENSG2.2"}, {"A", "B"}),  # versions
        ({"A": "E1", "B": "E2"}, {"A": "E3", "B": "E2"}, {"B"}),  # one name, two genes
    ],
)
def test_genes_are_joined_by_id(first, second, genes):
    sdata = two_panels(first, second)
    si.pp.select_genes(sdata)
    table = sdata.tables["stack"]
    assert set(table.var_names) == genes
    counts = sdata.tables["b_counts"]
    for name in genes:
        column = list(second.values()).index(first[name]) if first[name] in second.values() else None
        if column is None:  # the same gene in another version
            column = [i.split(".")[0] for i in second.values()].index(first[name].split(".")[0])
        raw = counts.X.toarray()
        expected = np.log1p(raw[:, column] / raw.sum(axis=1) * 1e4)
        np.testing.assert_allclose(
            table[table.obs["section"] == "b", name].layers["measured"].ravel(), expected, rtol=1e-5
        )


def test_genes_without_ids_are_joined_by_name():
    sdata = two_panels({"A": "", "B": ""}, {"B": "", "C": ""}, column="")
    si.pp.select_genes(sdata)
    assert list(sdata.tables["stack"].var_names) == ["B"]


@pytest.mark.parametrize("kind", ["counts", "rounded CPM", "rounded counts per 10,000", "z-scores", "log values"])
def test_values_that_were_changed_are_reported(kind, caplog, monkeypatch, small_stack):
    monkeypatch.setattr(logger, "propagate", True)
    table = small_stack.tables[next(key for key in small_stack.tables if key.endswith("_counts"))]
    rng = np.random.default_rng(0)
    rate = rng.gamma(2.0, 20.0, (table.n_obs, table.n_vars))
    raw = rng.poisson(rate).astype(float)
    share = raw / raw.sum(axis=1, keepdims=True)
    log = np.log1p(1e4 * share)
    table.X = {
        "counts": raw,
        "rounded CPM": np.round(1e6 * share),
        "rounded counts per 10,000": np.round(1e4 * share),
        "z-scores": (log - log.mean(axis=0)) / log.std(axis=0),
        "log values": log,
    }[kind]
    si.pp.select_genes(small_stack, log_normalized=kind in ("z-scores", "log values"))
    assert ("rounded CPM and no counts" in caplog.text) is kind.startswith("rounded")
    assert ("z-scores or residuals" in caplog.text) is (kind == "z-scores")


def _measured_counts(sdata) -> AnnData:
    table = sdata.tables[next(key for key in sdata.tables if key.endswith("_counts"))].copy()
    rows = sdata.tables["stack"].obs_names.get_indexer(
        [f"{table.obs['region'].iloc[0].removesuffix('_spots')}_{i}" for i in table.obs["instance_id"]]
    )
    table.obsm["spatial"] = sdata.tables["stack"].obsm["spatial"][rows]
    sc.pp.normalize_total(table, target_sum=1e4)
    sc.pp.log1p(table)
    return table


def test_flavor_svg_ranks_genes_as_squidpy_does(stack):
    sq = pytest.importorskip("squidpy")
    table = _measured_counts(stack)
    # On an exact lattice neighbors at the same distance are chosen by chance; squidpy and this package choose others.
    table.obsm["spatial"] = table.obsm["spatial"] + np.random.default_rng(0).normal(0, 5, (table.n_obs, 2))
    stack.tables["stack"].obsm["spatial"][stack.tables["stack"].obs["measured"]] = table.obsm["spatial"]
    sq.gr.spatial_neighbors(table, coord_type="generic", n_neighs=6)
    expected = sq.gr.spatial_autocorr(table, copy=True, n_perms=None, show_progress_bar=False)["I"]
    si.pp.select_genes(stack, n_top_genes=6, flavor="svg")
    assert list(stack.tables["stack"].var_names) == list(expected.sort_values(ascending=False).index[:6])
    si.pp.select_genes(stack, n_top_genes=6)
    assert list(stack.tables["stack"].var_names) != list(expected.index[:6])


def test_flavor_hvg_ranks_genes_as_scanpy_does(stack):
    expected = sc.pp.highly_variable_genes(_measured_counts(stack), flavor="seurat", inplace=False)
    si.pp.select_genes(stack, n_top_genes=6, flavor="hvg")
    ranked = expected["dispersions_norm"].sort_values(ascending=False, kind="stable", na_position="last")
    assert list(stack.tables["stack"].var_names) == list(ranked.index[:6])


def test_mitochondrial_and_ribosomal_genes_are_named_and_marked(caplog, monkeypatch):
    genes = ["MT-CO1", "RPL13A", "RPS6KA1", "ACTB", "rare"]
    sdata = stack_of(m=section(counts_matrix()[:, [4, 1, 2, 0, 3]] + 1, genes=genes), u=section(None, seed=1))
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level("INFO", logger=logger.name):
        si.pp.select_genes(sdata, n_top_genes=3)
    assert "2 of the 3 chosen genes are mitochondrial or ribosomal (MT-CO1, RPL13A)" in caplog.text
    var = sdata.tables["stack"].var
    assert list(var.index[var["mt"]]) == ["MT-CO1"]
    assert list(var.index[var["ribo"]]) == ["RPL13A"]
    caplog.clear()
    si.pp.select_genes(sdata, genes=list(var.index[~(var["mt"] | var["ribo"])]))  # as the how-to says
    assert not caplog.text.count("ribosomal")
    assert list(sdata.tables["stack"].var_names) == ["RPS6KA1"]


def test_unknown_flavor_is_refused_before_anything_is_read():
    sdata = stack_of(m=section(counts_matrix()), u=section(None, seed=1))
    with pytest.raises(ValueError, match=r"`flavor` must be one of .*'hvg'.* found 'cell_ranger'"):
        si.pp.select_genes(sdata, flavor="cell_ranger")


def test_counts_that_were_added_later_are_reported(caplog, monkeypatch):
    """Before, they were imputed without a word."""
    monkeypatch.setattr(si.settings, "verbosity", "warning")
    sdata = stack_of(a=section(counts_matrix()), b=section(None, seed=1))
    table = sdata.tables["a_counts"].copy()
    table.obs["region"] = pd.Categorical(["b_spots"] * table.n_obs)
    table.uns["spatialdata_attrs"] = {**table.uns["spatialdata_attrs"], "region": "b_spots"}
    caplog.clear()
    si.pp.select_genes(sdata)
    assert "was added" not in caplog.text
    sdata.tables["b_counts"] = table
    si.pp.select_genes(sdata)
    assert "`sdata.tables['b_counts']` was added after the stack was assembled" in caplog.text


def test_values_without_a_logarithm_are_reported(caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    rng = np.random.default_rng(0)
    ids = [str(i) for i in range(12)]
    obs = pd.DataFrame({"region": pd.Categorical(["spots"] * 12), "id": ids}, index=ids)
    values = rng.gamma(2.0, size=(12, 5))
    values *= 20 / values.sum(axis=1, keepdims=True)
    circles = gpd.GeoDataFrame(
        {"radius": np.full(12, 3.0)}, geometry=gpd.points_from_xy(6 * np.arange(12) + 5, np.full(12, 8)), index=ids
    )
    pixels = rng.integers(0, 255, (3, 20, 80), dtype=np.uint8)
    source = SpatialData(
        images={"image": Image2DModel.parse(pixels, dims=("c", "y", "x"))},
        shapes={"spots": ShapesModel.parse(circles, transformations={"global": Identity()})},
    )
    for take, said in ((np.asarray, True), (np.log1p, False)):
        table = AnnData(take(values), obs=obs.copy(), var=pd.DataFrame(index=GENES))
        source.tables["table"] = TableModel.parse(table, region="spots", region_key="region", instance_key="id")
        sdata = si.pp.assemble_stack({"s": source}, mpp=1.0, z=[0.0])
        caplog.clear()
        si.pp.select_genes(sdata, n_top_genes=2, log_normalized=True)
        assert ("have the same sum (20)" in caplog.text) == said
