from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
from spatialdata.transformations import get_transformation, set_transformation

import spatial_impute as si
from spatial_impute._stack.spots import read_spots
from spatial_impute.models._spots import block_folds, blocks

SMALL = {"n_steps": 10, "width": 16, "n_heads": 2, "n_folds": 3}


def test_cross_validate_scores_all_methods_on_the_same_spots(small_prepared):
    table = si.tl.cross_validate(small_prepared, n_folds=3, model_params=SMALL)
    assert list(table.index) == [
        *("mean", "nearest", "knn", "kernel", "propagation", "ridge", "transfer_ridge", "cokriging", "asign")
    ]
    assert table["n_spots"].nunique() == 1
    assert (table["low"] <= table["pearson_gene"]).all()
    assert (table["pearson_gene"] <= table["high"]).all()
    assert table.loc["mean", "skill"] == 0
    assert table.loc["mean", "pearson_gene"] == 0  # it differs between folds only
    best = table["pearson_gene"].drop("asign").idxmax()
    assert table.loc[best, "vs_best"] == 0


def test_cross_validate_by_gene_is_what_the_table_averages(small_prepared):
    methods = ["kernel", "cokriging"]
    genes = si.tl.cross_validate(small_prepared, methods, by="gene")
    table = si.tl.cross_validate(small_prepared, methods)
    np.testing.assert_allclose(genes.mean(), table["pearson_gene"])


def test_cross_validate_leaves_the_object_alone(small_stack):
    table = small_stack.tables["stack"]
    layers, columns = list(table.layers), list(table.obs)
    si.tl.cross_validate(small_stack, ["kernel"])
    assert list(table.layers) == layers
    assert list(table.obs) == columns


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ["krige"]}, "`methods` must be one of"),
        ({"split": "spot"}, "`split` must be one of"),
        ({"split": "section"}, "at least two measured sections"),
        ({"by": "spot"}, "`by` must be one of"),
    ],
)
def test_cross_validate_refuses(small_prepared, arguments, message):
    with pytest.raises(ValueError, match=message):
        si.tl.cross_validate(small_prepared, **arguments)


def test_block_folds_hide_the_same_place_on_all_sections(small_prepared):
    _, spots = read_spots(small_prepared)
    both = spots.known | (spots.section == 0)
    two = replace(spots, known=both, expression=np.zeros((int(both.sum()), 1)), total_counts=None)
    for fold in block_folds(two, n_folds=3, block_spacings=2.0, seed=0):
        block = blocks(two, 2.0)
        assert not set(block[fold[both]]) & set(block[~fold[both]])
        assert len(np.unique(spots.section[fold])) == 2


@pytest.mark.filterwarnings("ignore")
def test_asign_is_scored_on_stacks_that_are_held_out_whole(small_prepared, quick_params):
    stacks = [copy.deepcopy(small_prepared) for _ in range(3)]
    table = si.tl.cross_validate(stacks, ["ridge", "asign"], split="stack", model_params=quick_params)
    assert table.loc["asign", "n_spots"] == small_prepared.tables["stack"].obs["measured"].sum()
    # The stacks are copies, so what two of them teach holds on the third.
    assert table.loc["asign", "pearson_gene"] > 0.3
    with pytest.raises(ValueError, match="at least two others; 1 are left"):
        si.tl.cross_validate(stacks[:2], ["asign"], split="stack", model_params=quick_params)
    with pytest.raises(ValueError, match="pass several stacks"):
        si.tl.cross_validate(small_prepared, ["mean"], split="stack")


@pytest.fixture(scope="module")
def two_measured(small_two_measured):
    """Three small sections, two of them measured, to write to."""
    return copy.deepcopy(small_two_measured)


def test_cross_validate_compares_pixnet_with_what_reads_the_image(two_measured, octaves, pixnet_params):
    """The same folds for all; texture genes are found by what looks at structure."""
    methods = ["ridge", "image_knn", "colour", "pixnet"]
    kwargs = {"encoder": octaves, "pixnet_params": pixnet_params | {"n_steps": 0}}
    table = si.tl.cross_validate(two_measured, methods, **kwargs)
    assert list(table.index) == methods
    assert table["n_spots"].nunique() == 1
    assert np.isfinite(table.to_numpy(float)).all()
    genes = si.tl.cross_validate(two_measured, ["pixnet"], by="gene", **kwargs)["pixnet"]
    assert genes.filter(like="texture").mean() > 0.4
    assert abs(genes.filter(like="noise").mean()) < 0.35


def test_pixnet_of_a_fold_is_that_fitted_without_it(two_measured, octaves, pixnet_params):
    """Against two calls of the public functions, section by section."""
    from spatial_impute._scores import pearson_by_gene

    params = pixnet_params | {"n_steps": 0}
    genes = si.tl.cross_validate(two_measured, ["pixnet"], by="gene", encoder=octaves, pixnet_params=params)["pixnet"]
    table, r = two_measured.tables["stack"], []
    for held_out, other in (("s0", "s2"), ("s2", "s0")):
        model = si.tl.fit_pixnet(two_measured, f"{other}_image", f"{other}_spots", encoder=octaves, model_params=params)
        found = si.tl.predict_regions(two_measured, f"{held_out}_spots", model, inplace=False)
        rows = [f"{held_out}_{i}" for i in found.obs["instance_id"]]
        r.append(pearson_by_gene(found.X, table[rows].layers["measured"]))
    np.testing.assert_allclose(genes, np.mean(r, axis=0), atol=1e-6)


def test_groups_are_held_out_together(two_measured, small_stack):
    patient = two_measured.tables["stack"].obs["section"].astype(str)
    two_measured.tables["stack"].obs["patient"] = patient.map({"s0": "a", "s1": "b", "s2": "b"})
    kwargs = {"methods": ["mean", "ridge"], "by": "gene"}
    by_patient = si.tl.cross_validate(two_measured, groups="patient", **kwargs)
    by_section = si.tl.cross_validate(two_measured, **kwargs)
    np.testing.assert_array_equal(by_patient, by_section)  # one measured section each
    with pytest.raises(KeyError, match="hospital"):
        si.tl.cross_validate(two_measured, groups="hospital", **kwargs)
    with pytest.raises(ValueError, match="needs `groups=`"):
        si.tl.cross_validate(two_measured, split="group", **kwargs)
    with pytest.raises(ValueError, match="at least two measured groups"):
        si.tl.cross_validate(small_stack, groups="region", **kwargs)


def test_patients_as_stacks(two_measured, small_prepared, octaves, pixnet_params):
    """Each stack is held out in turn; what needs a neighbor has none there."""
    methods = ["mean", "ridge", "colour", "pixnet"]
    table = si.tl.cross_validate(
        [two_measured, small_prepared],
        methods,
        encoder=octaves,
        pixnet_params=pixnet_params | {"n_steps": 0},
    )
    assert list(table.index) == methods
    assert np.isfinite(table["mse"]).all()
    with pytest.raises(ValueError, match="`methods` must be one of"):
        si.tl.cross_validate([two_measured, small_prepared], ["kernel"])
    other = copy.deepcopy(small_prepared)
    other.tables["stack"] = other.tables["stack"][:, :3].copy()
    with pytest.raises(ValueError, match="same genes in the same order; stack 1 differs"):
        si.tl.cross_validate([two_measured, other], ["mean"])


def test_leaks_are_reported(two_measured, quick_search, caplog):
    sdata = copy.deepcopy(two_measured)
    table = sdata.tables["stack"]
    with caplog.at_level("WARNING", "spatial_impute"):
        si.tl.cross_validate(sdata, ["mean"])
        si.tl.cross_validate(sdata, ["mean"], split="block")
    assert not caplog.records
    table.obs["patient"] = "a"
    with caplog.at_level("WARNING", "spatial_impute"):
        si.tl.cross_validate(sdata, ["mean"], split="section", groups="patient")
    assert "share 1 of the groups of 'patient', e.g. ['a']" in caplog.text
    caplog.clear()
    sdata.shapes["s0_spots"]["radius"] *= 3
    with caplog.at_level("WARNING", "spatial_impute"):
        si.tl.cross_validate(sdata, ["mean"], split="block")
    assert "held-out spots overlap spots that methods learn from" in caplog.text
    caplog.clear()
    sdata.images["s2_image"] = sdata.images["s0_image"]
    transformation = get_transformation(sdata.images["s0_image"], "s0")
    set_transformation(sdata.images["s2_image"], transformation, "s2")
    with pytest.raises(ValueError, match="image of section 's2' is not the one that was registered"):
        si.tl.cross_validate(sdata, ["mean"], split="section")
    si.tl.register_stack(sdata, method="rigid", on_failure="warn", registration_params=quick_search)
    with caplog.at_level("WARNING", "spatial_impute"):
        si.tl.cross_validate(sdata, ["mean"], split="section")
    assert "Sections 's0' and 's2' have the same image" in caplog.text


def test_pixnet_of_a_fold_cannot_see_it(two_measured, octaves, pixnet_params):
    """What stands in the rows of a fold does not change what is predicted for it, by not one bit."""
    from spatial_impute.encoders._pyramids import build_pyramid
    from spatial_impute.models._params import PixNetParams
    from spatial_impute.tl._fit_pixnet import PixNetSetup
    from spatial_impute.tl._impute_pixnet import predict_pixnet, section_spots

    def predict(sdata):
        _, spots = read_spots(sdata, features=False, graph=False)
        folds = block_folds(spots, n_folds=2, block_spacings=2.0, seed=0)
        setup = PixNetSetup(build_pyramid(octaves), PixNetParams(**pixnet_params), 256, "cpu", 0)
        sections = section_spots(sdata, sdata.tables["stack"], table_key="stack", layer="measured")
        return predict_pixnet(sections, spots.known, folds[:1], setup, lambda: None)[folds[0]], folds[0]

    expected, fold = predict(two_measured)
    assert np.isfinite(expected).all()
    other = copy.deepcopy(two_measured)
    other.tables["stack"].layers["measured"][fold] = 7.5
    np.testing.assert_array_equal(predict(other)[0], expected)
