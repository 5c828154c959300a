from __future__ import annotations

import numpy as np
import pytest

import spatial_impute as si
from spatial_impute._settings import logger

METHODS = ["cokriging", "hest", "kernel", "knn", "mean", "nearest", "propagation", "ridge"]


def unmeasured(sdata) -> np.ndarray:
    return ~sdata.tables["stack"].obs["measured"].to_numpy()


def score(sdata, truth, layer: str, kind: str) -> float:
    """Mean Pearson r of the genes of one kind, over the unmeasured sections."""
    by_gene = si.metrics.evaluate(sdata, truth, layers=layer, by="gene")[layer]
    return float(by_gene[(truth.var.loc[by_gene.index, "kind"] == kind).to_numpy()].mean())


@pytest.mark.parametrize("method", METHODS)
def test_impute_baseline_fills_every_row_and_keeps_measurements(prepared_stack, method):
    before = set(prepared_stack.tables["stack"].layers)
    assert si.tl.impute_baseline(prepared_stack, method) is None
    table = prepared_stack.tables["stack"]
    assert set(table.layers) - before == {f"baseline_{method}"}
    values = table.layers[f"baseline_{method}"]
    assert values.dtype == np.float32
    assert values.shape == table.shape
    assert np.isfinite(values).all()
    known = table.obs["measured"].to_numpy()
    np.testing.assert_array_equal(values[known], table.layers["measured"][known])


@pytest.mark.parametrize("method", METHODS)
def test_impute_baseline_not_in_place_writes_nothing(prepared_stack, method):
    result = si.tl.impute_baseline(prepared_stack, method, inplace=False)
    table = prepared_stack.tables["stack"]
    assert set(table.layers) == {"measured"}
    assert list(result.obs_names) == list(table.obs_names)
    assert list(result.var_names) == list(table.var_names)
    np.testing.assert_array_equal(result.obsm["spatial_3d"], table.obsm["spatial_3d"])
    si.tl.impute_baseline(prepared_stack, method, key_added="mine")
    np.testing.assert_array_equal(result.X, table.layers["mine"])


def test_impute_baseline_mean_is_the_measured_mean(prepared_stack):
    si.tl.impute_baseline(prepared_stack, "mean")
    table = prepared_stack.tables["stack"]
    expected = np.nanmean(table.layers["measured"].astype(float), axis=0)
    np.testing.assert_allclose(
        table.layers["baseline_mean"][unmeasured(prepared_stack)],
        np.broadcast_to(expected, (unmeasured(prepared_stack).sum(), table.n_vars)),
        rtol=1e-5,
    )


def test_impute_baseline_mean_counts_sections_alike(prepared_stack):
    table = prepared_stack.tables["stack"]
    section = table.obs["section"].to_numpy()
    few = np.flatnonzero(section == "s0")[:5]
    table.obs.loc[table.obs_names[few], "measured"] = True
    table.layers["measured"][few] = 3.25
    si.tl.impute_baseline(prepared_stack, "mean")
    s1 = table.layers["measured"][section == "s1"].astype(float).mean(axis=0)
    np.testing.assert_allclose(table.layers["baseline_mean"][section == "s2"][0], (s1 + 3.25) / 2, rtol=1e-5)


def test_impute_baseline_nearest_copies_the_nearest_measured_spot(prepared_stack):
    si.tl.impute_baseline(prepared_stack, "nearest")
    table = prepared_stack.tables["stack"]
    known = np.flatnonzero(table.obs["measured"])
    xyz = table.obsm["spatial_3d"]
    closest = known[np.linalg.norm(xyz[:, None] - xyz[None, known], axis=2).argmin(axis=1)]
    np.testing.assert_array_equal(table.layers["baseline_nearest"], table.layers["measured"][closest])


def test_impute_baseline_knn_is_a_mean_of_the_nearest(prepared_stack):
    si.tl.impute_baseline(prepared_stack, "knn")
    table = prepared_stack.tables["stack"]
    known = np.flatnonzero(table.obs["measured"])
    xyz = table.obsm["spatial_3d"]
    order = known[np.linalg.norm(xyz[:, None] - xyz[None, known], axis=2).argsort(axis=1)]
    rows = unmeasured(prepared_stack)
    values = table.layers["measured"].astype(float)
    fits = [
        np.abs(values[order[rows, :k]].mean(axis=1) - table.layers["baseline_knn"][rows]).max()
        for k in (1, 2, 4, 8, 16, 32)
    ]
    assert min(fits) < 1e-4


@pytest.mark.parametrize("method", ["kernel", "propagation", "cokriging"])
def test_impute_baseline_reads_smooth_genes_from_the_neighbor(prepared_stack, truth, method):
    si.tl.impute_baseline(prepared_stack, method)
    layer = f"baseline_{method}"
    assert score(prepared_stack, truth, layer, "smooth") > 0.7
    assert abs(score(prepared_stack, truth, layer, "noise")) < 0.15


@pytest.mark.parametrize(
    ("method", "least"), [("ridge", 0.5), ("cokriging", 0.5), ("hest", 0.35)]
)  # its penalty is fixed
def test_impute_baseline_reads_texture_genes_from_the_image(prepared_stack, truth, method, least):
    si.tl.impute_baseline(prepared_stack, method)
    si.tl.impute_baseline(prepared_stack, "kernel")
    by_image = score(prepared_stack, truth, f"baseline_{method}", "texture")
    assert by_image > least
    assert by_image > score(prepared_stack, truth, "baseline_kernel", "texture") + 0.2


def test_impute_baseline_hest_is_the_ridge_of_the_recipe_and_no_part_of_asign(prepared_stack):
    from spatial_impute._stack.spots import read_spots
    from spatial_impute.models.asign._baselines import METHODS as BLENDED

    assert "hest" not in BLENDED
    si.tl.impute_baseline(prepared_stack, "hest")
    table, spots = read_spots(prepared_stack)
    known, features = spots.known, spots.features
    scaled = (features - features[known].mean(axis=0)) / features[known].std(axis=0)
    n = min(256, known.sum() - 1, features.shape[1])
    axes = np.linalg.svd(scaled[known], full_matrices=False)[2][:n].T
    parts, centred = scaled @ axes, spots.expression - spots.expression.mean(axis=0)
    penalty = 100 / (n * centred.shape[1])
    slope = np.linalg.solve(parts[known].T @ parts[known] + penalty * np.eye(n), parts[known].T @ centred)
    expected = (parts @ slope + spots.expression.mean(axis=0))[~known]
    np.testing.assert_allclose(table.layers["baseline_hest"][~known], expected, atol=1e-3)
    scores = si.tl.cross_validate(prepared_stack, ["mean", "hest"])
    assert scores.loc["hest", "pearson_gene"] > scores.loc["mean", "pearson_gene"]


def test_impute_baseline_mean_scores_zero(prepared_stack, truth):
    si.tl.impute_baseline(prepared_stack, "mean")
    assert score(prepared_stack, truth, "baseline_mean", "smooth") == 0


@pytest.mark.parametrize("method", METHODS)
def test_impute_baseline_finds_nothing_where_there_is_nothing(prepared_stack, truth, method):
    """Correlation of a shuffled pattern may be anything, since genes share few patterns; error over shuffles tells."""
    table = prepared_stack.tables["stack"]
    rows = np.flatnonzero(table.obs["measured"])
    measured = table.layers["measured"][rows].copy()
    skill = []
    for seed in range(5):
        table.layers["measured"][rows] = np.random.default_rng(seed).permutation(measured)
        si.tl.impute_baseline(prepared_stack, method)
        skill.append(si.metrics.evaluate(prepared_stack, truth, layers=f"baseline_{method}")["skill"].iloc[0])
    assert np.mean(skill) < 0.02


@pytest.mark.parametrize("method", METHODS)
def test_impute_baseline_follows_the_order_of_rows(prepared_stack, method):
    si.tl.impute_baseline(prepared_stack, method)
    expected = prepared_stack.tables["stack"].to_df(f"baseline_{method}")
    order = np.random.default_rng(0).permutation(len(expected))
    prepared_stack.tables["stack"] = prepared_stack.tables["stack"][order].copy()
    si.tl.impute_baseline(prepared_stack, method)
    found = prepared_stack.tables["stack"].to_df(f"baseline_{method}").loc[expected.index]
    # Equidistant spots on the lattice may be taken in another order.
    assert np.mean(np.abs(found.to_numpy() - expected.to_numpy()) > 1e-2) < 0.02


def test_impute_baseline_genes_are_independent(prepared_stack):
    si.tl.impute_baseline(prepared_stack, "propagation")
    expected = prepared_stack.tables["stack"].layers["baseline_propagation"][:, 3]
    si.pp.select_genes(prepared_stack, genes=[prepared_stack.tables["stack"].var_names[3]])
    si.tl.impute_baseline(prepared_stack, "propagation")
    np.testing.assert_allclose(prepared_stack.tables["stack"].layers["baseline_propagation"][:, 0], expected, atol=1e-4)


def test_impute_baseline_rejects_unknown_methods(prepared_stack):
    with pytest.raises(ValueError, match=r"`method` must be one of \['cokriging', .*\], found 'magic'"):
        si.tl.impute_baseline(prepared_stack, "magic")


@pytest.mark.parametrize(
    ("method", "slot", "message"),
    [
        ("kernel", ("layers", "measured"), "'measured' not found .*si.pp.select_genes"),
        ("kernel", ("obsm", "spatial_3d"), "'spatial_3d' not found .*si.tl.register_stack"),
        ("ridge", ("obsm", "X_region"), "'X_region' not found .*si.pp.extract_features"),
        ("propagation", ("obsp", "spatial_3d_connectivities"), "not found .*si.tl.build_3d_graph"),
    ],
)
def test_impute_baseline_names_the_missing_step(prepared_stack, method, slot, message):
    holder, key = slot
    del getattr(prepared_stack.tables["stack"], holder)[key]
    with pytest.raises(KeyError, match=message):
        si.tl.impute_baseline(prepared_stack, method)


def test_impute_baseline_needs_only_what_the_method_uses(prepared_stack):
    table = prepared_stack.tables["stack"]
    for key in list(table.obsp):
        del table.obsp[key]
    for key in ("X_spot", "X_region", "X_global"):
        del table.obsm[key]
    for method in ("mean", "nearest", "knn", "kernel"):
        si.tl.impute_baseline(prepared_stack, method)


def test_impute_baseline_refuses_raw_counts(prepared_stack):
    table = prepared_stack.tables["stack"]
    known = table.obs["measured"].to_numpy()
    table.layers["measured"][known] = np.random.default_rng(0).poisson(5, (known.sum(), table.n_vars))
    with pytest.raises(ValueError, match="log-normalised expression, found raw counts"):
        si.tl.impute_baseline(prepared_stack)


def test_impute_baseline_says_that_values_are_no_logarithms(prepared_stack, caplog, monkeypatch):
    """Counts per million have fractions, so that they are no raw counts."""
    monkeypatch.setattr(logger, "propagate", True)
    si.tl.impute_baseline(prepared_stack, "mean")
    assert not caplog.text
    layers = prepared_stack.tables["stack"].layers
    layers["measured"] = np.expm1(layers["measured"])
    si.tl.impute_baseline(prepared_stack, "mean")
    assert "Take the logarithm of normalised counts" in caplog.text


def test_impute_baseline_says_that_the_record_of_the_features_is_lost(prepared_stack, caplog, monkeypatch):
    """Without it, fewer columns are known to be centred on the spots."""
    monkeypatch.setattr(logger, "propagate", True)
    expected = si.tl.impute_baseline(prepared_stack, "ridge", inplace=False).X
    assert not caplog.text
    del prepared_stack.tables["stack"].uns["features"]
    found = si.tl.impute_baseline(prepared_stack, "ridge", inplace=False).X
    assert abs(found - expected).max() > 0.01
    assert "only the first token of each level is used" in caplog.text


def test_impute_baseline_refuses_a_stack_without_measurement(prepared_stack):
    table = prepared_stack.tables["stack"]
    table.obs["measured"] = False
    with pytest.raises(ValueError, match=rf"No measured section: .* False for all {table.n_obs} spots"):
        si.tl.impute_baseline(prepared_stack)


def test_impute_baseline_refuses_holes_in_the_measurement(prepared_stack):
    table = prepared_stack.tables["stack"]
    row = np.flatnonzero(table.obs["measured"])[4]
    table.layers["measured"][row, 2] = np.nan
    with pytest.raises(ValueError, match=f"must be finite; the first that is not: '{table.obs_names[row]}'"):
        si.tl.impute_baseline(prepared_stack)


@pytest.mark.parametrize("n_known", [1, 2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_impute_baseline_of_very_few_measured_spots_is_finite(prepared_stack, method, n_known):
    table = prepared_stack.tables["stack"]
    known = np.flatnonzero(table.obs["measured"])
    table.obs["measured"] = np.isin(np.arange(table.n_obs), known[:n_known])
    si.tl.impute_baseline(prepared_stack, method)
    values = table.layers[f"baseline_{method}"]
    assert np.isfinite(values).all()
    if n_known == 1:
        np.testing.assert_allclose(values, np.broadcast_to(table.layers["measured"][known[0]], values.shape), rtol=1e-5)
