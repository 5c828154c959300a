from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import spatial_impute as si
from spatial_impute.models._spots import block_folds
from spatial_impute.tl._read import read_spots

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
        cell = np.floor(spots.xyz[:, :2] / (2.0 * spots.spacing)).astype(int)
        hidden = {tuple(c) for c in cell[fold]}
        assert not any(tuple(c) in hidden for c in cell[both & ~fold])
