from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

import spatial_impute as si
from spatial_impute._scores import noise_ceiling, pearson_by_gene, summarise


@pytest.fixture
def scored(stack, truth):
    """Stack with a layer of known quality: truth plus noise, and one of the mean."""
    table = stack.tables["stack"]
    true = truth[table.obs_names, table.var_names].X.toarray().astype(np.float64)
    noise = np.random.default_rng(0).normal(size=true.shape)
    table.layers["close"] = (true + 0.5 * noise).astype(np.float32)
    table.layers["flat"] = np.tile(np.nanmean(table.layers["measured"], axis=0), (len(true), 1)).astype(np.float32)
    return stack


def arrays(sdata, truth, layer: str, section: str) -> tuple[np.ndarray, np.ndarray]:
    table = sdata.tables["stack"]
    rows = (table.obs["section"] == section).to_numpy()
    return table.layers[layer][rows].astype(float), truth[table.obs_names[rows], table.var_names].X.toarray().astype(
        float
    )


def test_evaluate_scores_each_section_by_itself(scored, truth):
    scores = si.metrics.evaluate(scored, truth, by="section")
    assert list(scores.index.names) == ["layer", "section"]
    assert set(scores.index) == {(layer, section) for layer in ("close", "flat") for section in ("s0", "s2")}
    profile = np.nanmean(scored.tables["stack"].layers["measured"].astype(float), axis=0)
    for layer, section in scores.index:
        expected = summarise(*arrays(scored, truth, layer, section), profile)
        for key, value in expected.items():
            assert scores.loc[(layer, section), key] == pytest.approx(value, nan_ok=True), key


def test_evaluate_by_layer_is_the_mean_over_sections(scored, truth):
    by_section = si.metrics.evaluate(scored, truth, by="section")
    by_layer = si.metrics.evaluate(scored, truth)
    assert list(by_layer.index) == ["close", "flat"]
    for layer in by_layer.index:
        np.testing.assert_allclose(by_layer.loc[layer, "pearson_gene"], by_section.loc[layer, "pearson_gene"].mean())
    assert by_layer.loc["close", "pearson_gene"] > 0.5
    assert by_layer.loc["flat", "pearson_gene"] == 0
    assert by_layer.loc["flat", "pearson_spot"] > 0.5
    assert by_layer.loc["flat", "skill"] == pytest.approx(0, abs=1e-6)


def test_coverage_is_the_share_of_the_truth_in_the_intervals(scored, truth):
    table = scored.tables["stack"]
    table.layers["close_sd"] = np.where(np.arange(table.n_vars) % 2, 0.5, 0.25) * np.ones((table.n_obs, 1))
    sections = si.metrics.evaluate(scored, truth, by="section")["coverage"]
    inside = {}
    for section in ("s0", "s2"):
        predicted, true = arrays(scored, truth, "close", section)
        inside[section] = np.abs(predicted - true) <= 1.6448536 * table.layers["close_sd"][: len(true)]
        assert sections["close", section] == pytest.approx(inside[section].mean())
    even, odd = (np.concatenate([x[:, k::2] for x in inside.values()]).mean() for k in (0, 1))
    assert even == pytest.approx(0.59, abs=0.05)  # noise of 0.5: 0.82 standard deviations
    assert odd == pytest.approx(0.9, abs=0.05)
    assert sections["flat"].isna().all()
    pooled = si.metrics.evaluate(scored, truth, by="pooled")["coverage"]
    assert pooled["close"] == pytest.approx(np.concatenate(list(inside.values())).mean())


def test_evaluate_by_gene_is_the_mean_over_sections(scored, truth):
    table = si.metrics.evaluate(scored, truth, layers=["flat", "close"], by="gene")
    assert list(table.columns) == ["flat", "close"]
    assert list(table.index) == list(scored.tables["stack"].var_names)
    expected = np.mean([pearson_by_gene(*arrays(scored, truth, "close", s)) for s in ("s0", "s2")], axis=0)
    np.testing.assert_allclose(table["close"], expected)


def test_evaluate_never_scores_measured_spots(scored, truth):
    before = si.metrics.evaluate(scored, truth)
    table = scored.tables["stack"]
    table.layers["close"][table.obs["measured"].to_numpy()] = 99.0
    pd.testing.assert_frame_equal(si.metrics.evaluate(scored, truth), before)


def test_evaluate_of_a_measured_section_takes_its_unmeasured_spots(scored, truth):
    table = scored.tables["stack"]
    names = table.obs_names[table.obs["section"] == "s1"][:20]
    table.obs.loc[names, "measured"] = False
    scores = si.metrics.evaluate(scored, truth, sections=["s1"], by="section")
    assert (scores["n_spots"] == 20).all()
    assert set(si.metrics.evaluate(scored, truth, by="section").index.get_level_values("section")) == {"s0", "s2"}


def test_evaluate_joins_by_name(scored, truth):
    before = si.metrics.evaluate(scored, truth)
    rng = np.random.default_rng(0)
    turned = truth[rng.permutation(truth.n_obs), rng.permutation(truth.n_vars)].copy()
    after = si.metrics.evaluate(scored, turned)
    np.testing.assert_allclose(after, before, rtol=1e-9)


def test_evaluate_leaves_out_what_the_truth_lacks(scored, truth):
    names = scored.tables["stack"].obs_names
    part = truth[[n for n in names if n != "s0_3"], :20].copy()
    scores = si.metrics.evaluate(scored, part, by="section", layers="close")
    n_s0 = (scored.tables["stack"].obs["section"] == "s0").sum()
    assert scores.loc[("close", "s0"), "n_spots"] == n_s0 - 1
    assert scores.loc[("close", "s0"), "n_genes"] == 20


@pytest.mark.parametrize("make", [lambda x: x.toarray(), sparse.csc_matrix, lambda x: sparse.csr_array(x)])
def test_evaluate_takes_truth_of_any_form(scored, truth, make):
    other = truth.copy()
    other.X = make(truth.X)
    pd.testing.assert_frame_equal(si.metrics.evaluate(scored, other), si.metrics.evaluate(scored, truth))


def test_evaluate_refuses_raw_counts_as_truth(scored, truth):
    counts = truth.copy()
    counts.X = counts.layers["counts"]
    with pytest.raises(ValueError, match=r"`truth.X` must hold log-normalised expression, found raw counts"):
        si.metrics.evaluate(scored, counts)


def test_evaluate_names_what_does_not_exist(scored, truth):
    with pytest.raises(KeyError, match=r"'asign' not found in .*layers`; available: \['close', 'flat', 'measured'\]"):
        si.metrics.evaluate(scored, truth, layers="asign")
    with pytest.raises(KeyError, match=r"'s9' not found in `the stack's sections`; available: \['s0', 's1', 's2'\]"):
        si.metrics.evaluate(scored, truth, sections=["s9"])
    with pytest.raises(ValueError, match=r"`by` must be one of \['gene', 'layer', 'pooled', 'section'\], found 'spot'"):
        si.metrics.evaluate(scored, truth, by="spot")


def test_evaluate_says_when_nothing_is_shared(scored, truth):
    genes = truth.copy()
    genes.var_names = [f"x{i}" for i in range(genes.n_vars)]
    with pytest.raises(KeyError, match="shares no gene with the stack"):
        si.metrics.evaluate(scored, genes)
    spots = truth.copy()
    spots.obs_names = [f"x{i}" for i in range(spots.n_obs)]
    with pytest.raises(KeyError, match="no unmeasured spot of section 's0'"):
        si.metrics.evaluate(scored, spots)


def test_evaluate_says_when_nothing_is_to_score(scored, truth):
    table = scored.tables["stack"]
    table.layers["measured"] = np.nan_to_num(table.layers["measured"])
    table.obs["measured"] = True
    with pytest.raises((KeyError, ValueError), match="measured"):
        si.metrics.evaluate(scored, truth)


def test_evaluate_says_when_there_is_no_layer_to_score(stack, truth):
    with pytest.raises((KeyError, ValueError), match="impute"):
        si.metrics.evaluate(stack, truth)


def test_evaluate_refuses_predictions_that_are_not_finite(scored, truth):
    scored.tables["stack"].layers["close"][0, 0] = np.nan
    with pytest.raises(ValueError, match="close"):
        si.metrics.evaluate(scored, truth)


def test_evaluate_writes_nothing(scored, truth):
    before = repr(scored.tables["stack"])
    si.metrics.evaluate(scored, truth)
    assert repr(scored.tables["stack"]) == before


def test_registration_quality_has_a_row_per_pair(prepared, stack):
    quality = si.metrics.registration_quality(prepared)
    assert list(quality.index.names) == ["fixed", "moving"]
    assert {frozenset(pair) for pair in quality.index} == {frozenset({"s1", "s0"}), frozenset({"s1", "s2"})}
    assert (quality["verdict"] == "ok").all()
    with pytest.raises(KeyError, match=r"not registered.*si.tl.register_stack"):
        si.metrics.registration_quality(stack)


def test_evaluate_pooled_takes_all_spots_together(scored, truth):
    pooled = si.metrics.evaluate(scored, truth, by="pooled")
    parts = [arrays(scored, truth, "close", section) for section in ("s0", "s2")]
    predicted, true = (np.concatenate(values) for values in zip(*parts, strict=True))
    r = pearson_by_gene(predicted, true)
    assert pooled.loc["close", "pearson_gene"] == pytest.approx(np.nanmean(r))
    assert pooled.loc["close", "n_spots"] == len(true)
    assert pooled.loc["close", "low"] < pooled.loc["close", "pearson_gene"] < pooled.loc["close", "high"]


def test_evaluate_says_how_smooth_a_prediction_is(scored, truth):
    scores = si.metrics.evaluate(scored, truth)
    assert scores.loc["close", "ssim"] > scores.loc["flat", "ssim"]
    assert scores.loc["close", "moran_gap"] < 0  # noise was added


def test_evaluate_refuses_a_layer_that_holds_the_measurement_of_a_scored_section(prepared_stack, truth):
    """A section that is un-measured after imputing would be scored against its own measurement."""
    table = prepared_stack.tables["stack"]
    si.tl.impute_baseline(prepared_stack, "knn")
    before = si.metrics.evaluate(prepared_stack, truth, layers="baseline_knn", sections="s0")
    first, second = ((table.obs["section"] == name).to_numpy() for name in ("s1", "s0"))
    table.obs["measured"] = second
    table.layers["measured"][second] = truth[table.obs_names[second], table.var_names].X.toarray()
    with pytest.raises(ValueError, match=r"other spots of section 's1' were measured than now.*Impute the layer again"):
        si.metrics.evaluate(prepared_stack, truth, layers="baseline_knn", sections="s1")
    table.obs["measured"] = first
    pd.testing.assert_frame_equal(
        si.metrics.evaluate(prepared_stack, truth, layers="baseline_knn", sections="s0"), before
    )


@pytest.mark.parametrize("index", ["ids", "numbers"])
def test_a_truth_with_other_names_of_spots_says_how_they_are_named(scored, truth, index):
    table = scored.tables["stack"]
    truth = truth[table.obs_names].copy()
    truth.obs_names = table.obs["instance_id"] + "" if index == "ids" else [f"row{i}" for i in range(truth.n_obs)]
    truth = truth[~truth.obs_names.duplicated()].copy()
    with pytest.raises(KeyError, match=r"named `\{section\}_\{id\}`, like \['s0_") as error:
        si.metrics.evaluate(scored, truth)
    assert ("These are the ids: set `truth.obs_names = [f's0_{i}'" in str(error.value)) is (index == "ids")


def test_pooled_correlation_stands_beside_the_mean_over_sections(scored, truth):
    """A layer that knows nothing but the level of each section: no pattern, and yet a pooled correlation."""
    table = scored.tables["stack"]
    other = truth.copy()
    second = (other[table.obs_names].obs["section"] == "s2").to_numpy()
    values = other[table.obs_names, table.var_names].X.toarray().astype(float) + 5.0 * second[:, None]
    other = other[table.obs_names, table.var_names].copy()
    other.X = values
    table.layers["level"] = np.where(second[:, None], 5.0, 0.0) * np.ones(table.shape, np.float32)
    scores = si.metrics.evaluate(scored, other, layers=["level"]).loc["level"]
    assert scores["pearson_gene"] == 0
    assert scores["pearson_gene_pooled"] > 0.8
    pooled = si.metrics.evaluate(scored, other, layers=["level"], by="pooled").loc["level", "pearson_gene"]
    assert scores["pearson_gene_pooled"] == pytest.approx(pooled)


def test_noise_ceiling_is_what_the_truth_reaches():
    """Poisson counts of known rates: the correlation of the rates with a measurement of them."""
    rng = np.random.default_rng(0)
    rates = rng.gamma(4.0, 1.0, (400, 12)) * np.linspace(0.3, 6.0, 12)
    rates = np.column_stack([rates, np.full(400, 3000.0)])  # many other counts: totals tell nothing
    counts = rng.poisson(rates)
    measured = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 3000)[:, :12]
    reached = pearson_by_gene(np.log1p(rates)[:, :12], measured)
    found = noise_ceiling(sparse.csr_matrix(counts), np.arange(12), target_sum=3000)
    np.testing.assert_allclose(found, reached, atol=0.12)
    assert abs(found.mean() - reached.mean()) < 0.03
    assert found[0] < 0.75 < found[-1]


def test_evaluate_with_counts_has_the_noise_ceiling(scored, truth):
    scores = si.metrics.evaluate(scored, truth, counts_layer="counts")
    by_gene = si.metrics.evaluate(scored, truth, counts_layer="counts", by="gene")
    assert ((by_gene["ceiling"] > 0) & (by_gene["ceiling"] <= 1)).all()
    sections = si.metrics.evaluate(scored, truth, counts_layer="counts", by="section")
    np.testing.assert_allclose(sections["of_ceiling"], sections["pearson_gene"] / sections["ceiling"], rtol=1e-6)
    assert scores.loc["flat", "of_ceiling"] == 0
    with pytest.raises(ValueError, match="must hold raw counts"):
        si.metrics.evaluate(scored, truth, counts_layer="expected")
    with pytest.raises(KeyError, match=r"truth\.layers"):
        si.metrics.evaluate(scored, truth, counts_layer="raw")


def test_scores_of_a_section_that_the_model_has_seen_are_announced(small_stack, truth, quick_params, caplog):
    table = small_stack.tables["stack"]
    model = si.tl.fit_asign(small_stack, model_params=quick_params)
    table.obs["measured"] = table.obs["measured"] & (np.arange(table.n_obs) % 2 == 0)  # half of a section is hidden
    with caplog.at_level("WARNING", "spatial_impute"):
        si.tl.impute_3d(small_stack, model)
    assert "fitted on measured spots of the sections ['s1'], which are not measured now" in caplog.text
    caplog.clear()
    own = AnnData(
        np.asarray(table.layers["asign"]) + 0.1, obs=table.obs[["section"]], var=pd.DataFrame(index=table.var_names)
    )
    with caplog.at_level("WARNING", "spatial_impute"):
        si.metrics.evaluate(small_stack, own, sections=["s1"])
    assert "so their scores are too high" in caplog.text


def held_out(sdata) -> None:
    """The measured section counts as unmeasured from now on, and another one as measured."""
    table = sdata.tables["stack"]
    table.obs["measured"] = (table.obs["section"] == "s0").to_numpy()
    table.layers["measured"][table.obs["measured"]] = table.layers["close"][table.obs["measured"]]


@pytest.mark.parametrize("name", ["measured", "copy", "float16", "part"])
def test_a_layer_that_holds_the_truth_itself_is_refused(scored, truth, name):
    """Copies, renamed layers, and tables after `anndata.concat` have no record of what was measured then."""
    table = scored.tables["stack"]
    layer = table.layers["measured"].copy()
    held_out(scored)
    if name == "part":  # most spots of the section were predicted
        rows = np.flatnonzero((table.obs["section"] == "s1").to_numpy())[8:]
        layer[rows] = table.layers["close"][rows]
    if name != "measured":
        table.layers[name] = layer.astype(np.float16) if name == "float16" else layer
    with pytest.raises(ValueError, match=r"equals `truth` at \d+ of \d+ scored spots of section 's1'"):
        si.metrics.evaluate(scored, truth, layers=name, sections=["s1"])


def test_the_nearest_spot_of_noisy_counts_is_a_prediction(scored, truth):
    """Copied spots are predictions of others, also where many genes are zero."""
    table = scored.tables["stack"]
    table.layers["nearest"] = np.roll(truth[table.obs_names, table.var_names].X.toarray(), 1, axis=0)
    assert np.isfinite(si.metrics.evaluate(scored, truth, layers="nearest").loc["nearest", "pearson_gene"])
