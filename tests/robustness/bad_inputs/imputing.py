"""Inputs of imputation, of cross-validation and of the scores."""

from __future__ import annotations

import copy

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

import spatial_impute as si
from bad_inputs import answers, refuses
from bad_inputs.preparing import drop, keep, spoil

MOVED = np.array([[1.0, 0.0, 200.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
QUICK = {"n_steps": 2, "width": 8, "n_heads": 2, "n_folds": 2}


def fit(world, **kwargs):
    return si.tl.fit_asign(world.sdata, **({"model_params": QUICK} | kwargs))


def impute(world, **kwargs):
    return si.tl.impute_3d(world.sdata, world.asign, **kwargs)


def baseline(world, method="kernel", **kwargs):
    return si.tl.impute_baseline(world.sdata, method, **kwargs)


def validate(world, methods="kernel", **kwargs):
    return si.tl.cross_validate(world.sdata, methods, **kwargs)


def score(world, **kwargs):
    return si.metrics.evaluate(world.sdata, world.truth, **kwargs)


def finite(world, key="baseline_kernel") -> bool:
    return bool(np.isfinite(world.table.layers[key]).all())


def measure(values):
    """Put other expression into the measured rows."""

    def change(world):
        layer = np.array(world.table.layers["measured"])
        rows = world.table.obs["measured"].to_numpy()
        layer[rows] = values(layer[rows])
        world.table.layers["measured"] = layer

    return change


def flags(kind):
    return lambda w: w.table.obs.__setitem__("measured", w.table.obs["measured"].astype(kind))


def sparsely(world):
    world.made["expected"] = si.tl.impute_baseline(world.sdata, "kernel", inplace=False).X
    layer = np.nan_to_num(world.table.layers["measured"])
    world.table.layers["measured"] = sparse.csr_matrix(layer)


def genes(n):
    """Leave the first genes only."""
    return lambda w: w.sdata.tables.__setitem__("stack", w.table[:, :n].copy())


def few(n):
    """Only some spots measured."""

    def change(world):
        rows = np.flatnonzero(world.table.obs["measured"])
        measured = np.zeros(world.table.n_obs, bool)
        measured[rows[:n]] = True
        world.table.obs["measured"] = measured

    return change


def _column(name, place, value):
    """Another value in a column of the spots."""

    def change(world):
        values = world.table.obs[name].astype(object)
        values.iloc[place] = values.iloc[place + 1] if value is None else value
        world.table.obs[name] = values.astype("category") if name == "section" else values

    return change


def _height(world):
    record = copy.deepcopy(world.sdata.attrs)
    record["spatial_impute"]["stack"]["sections"][0]["z"] = "0"
    world.sdata.attrs = record


def _no_edge(world):
    world.table.obsp["spatial_3d_connectivities"] = sparse.csr_matrix((world.table.n_obs,) * 2)


def repeat_gene(world):
    world.table.var_names = [world.table.var_names[1], *world.table.var_names[1:]]


MEASURED = [
    refuses(
        "tl.fit_asign",
        "raw counts",
        ValueError,
        "must hold log-normalised expression, found raw counts",
        fit,
        change=measure(lambda v: np.round(np.expm1(v))),
    ),
    refuses(
        "tl.fit_asign",
        "NaN in a measured row",
        ValueError,
        "the first that is not: 's1_2'",
        fit,
        change=lambda w: w.table.layers["measured"].__setitem__((list(w.table.obs_names).index("s1_2"), 0), np.nan),
    ),
    refuses(
        "tl.fit_asign",
        "infinite values in a measured row",
        ValueError,
        "must be finite",
        fit,
        change=measure(lambda v: v + np.inf),
    ),
    refuses(
        "tl.fit_asign",
        "nothing measured",
        ValueError,
        "No measured section",
        fit,
        change=lambda w: w.table.obs.__setitem__("measured", False),
    ),
    refuses(
        "tl.fit_asign",
        '`obs["measured"]` as strings, where "False" counts as true',
        ValueError,
        "must be of type bool",
        fit,
        change=flags(str),
    ),
    refuses(
        "tl.fit_asign",
        "one measured spot",
        ValueError,
        "at least two blocks of measured spots",
        fit,
        change=few(1),
        while_working=True,
    ),
    refuses(
        "tl.fit_asign",
        "no expression layer",
        KeyError,
        "Write it with `si.pp.select_genes(sdata)`",
        fit,
        change=drop("layers", "measured"),
    ),
    refuses(
        "tl.fit_asign",
        "two genes of one name",
        ValueError,
        "`sdata.tables['stack'].var_names` must be unique",
        fit,
        change=repeat_gene,
    ),
    refuses(
        "tl.fit_asign",
        "no image features",
        KeyError,
        "Run `si.pp.extract_features(sdata)` first",
        fit,
        change=drop("obsm", "X_region"),
    ),
    refuses(
        "tl.fit_asign",
        "NaN features",
        ValueError,
        "the first in row 3 ('s0_3')",
        fit,
        change=spoil("obsm", "X_global", 3, np.nan),
    ),
    refuses(
        "tl.fit_asign",
        "no graph",
        KeyError,
        "Run `si.tl.build_3d_graph(sdata)` first",
        fit,
        change=drop("obsp", "spatial_3d_overlap"),
    ),
    refuses(
        "tl.fit_asign",
        "a graph without its record",
        KeyError,
        "Run `si.tl.build_3d_graph(sdata)` first",
        fit,
        change=drop("uns", "spatial_3d_neighbors"),
    ),
    refuses("tl.fit_asign", "a graph without an edge", ValueError, "holds no edge", fit, change=_no_edge),
    refuses(
        "tl.fit_asign",
        "a spot of a section that the stack does not have",
        ValueError,
        "are of the sections ['zz'], which the stack does not have",
        fit,
        change=_column("section", 0, "zz"),
    ),
    refuses(
        "tl.fit_asign",
        "two spots of one id",
        ValueError,
        "it is the spot 's0_1', the name of another row",
        fit,
        change=_column("instance_id", 0, None),
    ),
    refuses(
        "tl.fit_asign",
        "registered positions without height",
        ValueError,
        "must have the columns x, y and z in um, found the shape",
        fit,
        change=lambda w: w.table.obsm.__setitem__("spatial_3d", w.table.obsm["spatial_3d"][:, :2]),
    ),
    refuses(
        "tl.fit_asign",
        "a height in the record that is no number",
        ValueError,
        "must be a finite number in um, found '0'",
        fit,
        change=_height,
    ),
    refuses(
        "tl.fit_asign",
        "negative or NaN weights in the graph",
        ValueError,
        "finite weights of at least 0",
        fit,
        change=lambda w: w.table.obsp["spatial_3d_connectivities"].data.__setitem__(0, np.nan),
    ),
    refuses(
        "tl.fit_asign",
        "total counts of 0",
        ValueError,
        "must be positive at measured spots",
        fit,
        change=lambda w: w.table.obs.__setitem__("total_counts", 0.0),
    ),
    refuses(
        "tl.fit_asign",
        "an unknown parameter",
        TypeError,
        "Unknown fields ['nope'] for AsignParams",
        lambda w: fit(w, model_params={"nope": 1}),
    ),
    refuses(
        "tl.fit_asign",
        "an impossible parameter",
        ValueError,
        "`width` must be a multiple of `n_heads`",
        lambda w: fit(w, model_params={"width": 9, "n_heads": 2}),
    ),
    refuses(
        "tl.fit_asign", "no stack at all", ValueError, "`sdata` is an empty sequence", lambda w: si.tl.fit_asign([])
    ),
    refuses(
        "tl.fit_asign",
        "stacks of other genes",
        ValueError,
        "stack 1 differs from stack 0",
        lambda w: si.tl.fit_asign([w.sdata, w.made["other"]]),
        change=lambda w: _other_genes(w),
    ),
    refuses(
        "tl.fit_asign",
        "a device that is not there",
        ValueError,
        "Torch device 'cuda:99' cannot be used here",
        lambda w: fit(w, device="cuda:99"),
    ),
    refuses(
        "tl.fit_asign",
        "a seed that is no number",
        ValueError,
        "`seed` must be a whole number",
        lambda w: fit(w, seed=1.5),
    ),
    refuses(
        "tl.fit_asign",
        "a parameter that is NaN",
        ValueError,
        "`weight_decay` must be a number of at least 0",
        lambda w: fit(w, model_params=QUICK | {"weight_decay": float("nan")}),
    ),
    refuses(
        "tl.fit_asign",
        "a learning rate that leaves no network after its last step",
        ValueError,
        "error on held-out spots became",
        lambda w: fit(w, model_params=QUICK | {"learning_rate": 1e18, "n_steps": 1}),
        while_working=True,
    ),
    refuses(
        "tl.fit_asign",
        "a learning rate at which the loss explodes",
        ValueError,
        "lower `learning_rate`",
        lambda w: fit(w, model_params=QUICK | {"learning_rate": 1e18, "n_steps": 20}),
        while_working=True,
    ),
    refuses(
        "metrics.predictability",
        "more neighbors than a section has spots",
        ValueError,
        "`n_neighs` must be below the number of measured spots of a section, found 10000",
        lambda w: si.metrics.predictability(w.sdata, n_neighs=10_000),
    ),
    answers(
        "tl.fit_asign", "one gene", "is fitted", lambda w: fit(w), lambda w, m: len(m.var_names) == 1, change=genes(1)
    ),
    answers(
        "tl.fit_asign",
        "genes without variation",
        "are predicted as constants, with `imputation_r` NaN",
        lambda w: fit(w),
        lambda w, m: m.predictability.isna().all(),
        change=measure(lambda v: np.full_like(v, 0.5)),
    ),
]


def bring(world, **changes):
    """Bring in a constant prediction of all genes, with some part of it changed."""
    found = AnnData(np.ones(world.table.shape), obs=world.table.obs[[]], var=world.table.var[[]])
    for name, value in changes.items():
        setattr(found, name, value)
    return si.tl.add_prediction(world.sdata, found, key_added="mine")


OUTSIDE = [
    refuses(
        "tl.add_prediction",
        "names of spots without their section",
        KeyError,
        "Rename the rows of one section with `prediction.obs_names = [f'{section}_{i}'",
        lambda w: bring(w, obs_names=[str(i) for i in range(w.table.n_obs)]),
    ),
    refuses(
        "tl.add_prediction",
        "other genes",
        KeyError,
        "shares no gene with the stack",
        lambda w: bring(w, var_names=[f"other{i}" for i in range(w.table.n_vars)]),
    ),
    refuses(
        "tl.add_prediction",
        "repeated spots",
        ValueError,
        "`prediction.obs_names` must be unique",
        lambda w: bring(w, obs_names=["s1_0"] * w.table.n_obs),
    ),
    refuses("tl.add_prediction", "an empty `X`", ValueError, "`prediction.X` is empty", lambda w: bring(w, X=None)),
    refuses(
        "tl.add_prediction",
        "nothing but NaN",
        ValueError,
        "holds no number for the spots and genes of the stack",
        lambda w: bring(w, X=np.full(w.table.shape, np.nan)),
    ),
    refuses(
        "tl.add_prediction",
        "infinite values",
        ValueError,
        "holds infinite values, the first at spot 's0_0'",
        lambda w: bring(w, X=np.full(w.table.shape, np.inf)),
    ),
    refuses(
        "tl.fit_asign",
        "a base layer of another kind than there is",
        ValueError,
        "`base_layers['mine']` must be one of ['held_out', 'independent']",
        lambda w: fit(w, base_layers={"mine": "indep"}),
    ),
    refuses(
        "tl.fit_asign",
        "a layer of the measurement declared independent",
        ValueError,
        "was predicted from the measurement of this stack",
        lambda w: fit(w, base_layers={"mine": "independent"}),
        change=lambda w: baseline(w, key_added="mine"),
    ),
    answers(
        "tl.fit_asign",
        "an independent base layer that is constant",
        "has no weight",
        lambda w: fit(w, base_layers={"mine": "independent"}),
        lambda w, m: (m.weights["mine"] == 0).all(),
        change=bring,
    ),
]


MATCHING = [
    refuses(
        "tl.match_sections",
        "one measured section",
        ValueError,
        "needs at least two measured sections, found ['s1']",
        lambda w: si.tl.match_sections(w.sdata),
    ),
    refuses(
        "tl.match_sections",
        "the measurement as the layer to write",
        ValueError,
        "would write over data",
        lambda w: si.tl.match_sections(w.sdata, key_added="measured"),
    ),
]


def _other_genes(world):
    other = copy.deepcopy(world.sdata)
    other.tables["stack"] = other.tables["stack"][:, ::-1].copy()
    world.made["other"] = other


IMPUTING = [
    refuses("tl.impute_3d", "a model of other genes", KeyError, "2 are missing", impute, change=genes(7)),
    refuses(
        "tl.impute_3d",
        "genes in another order",
        KeyError,
        "in the same order; the order differs",
        impute,
        change=lambda w: w.sdata.tables.__setitem__("stack", w.table[:, ::-1].copy()),
    ),
    refuses(
        "tl.impute_3d",
        "features of another encoder",
        ValueError,
        "Run `si.pp.extract_features` with the same encoder",
        impute,
        change=lambda w: w.table.uns["features"].update(encoder="other"),
    ),
    refuses(
        "tl.impute_3d",
        "expression in other units",
        ValueError,
        "must have the same units, found ['log1p of counts per 100 (all genes)', 'log1p of counts per 10000 (all genes)']",
        impute,
        change=lambda w: si.pp.select_genes(w.sdata, genes=w.asign.var_names, target_sum=100),
    ),
    refuses(
        "tl.impute_3d",
        "spots that a new registration moved since the graph was built",
        ValueError,
        "run `si.tl.build_3d_graph(sdata)` again",
        impute,
        change=lambda w: si.tl.register_stack(w.sdata, transformations={"s0": MOVED, "s2": np.eye(3)}),
    ),
    refuses(
        "tl.impute_3d",
        "no model",
        TypeError,
        "found NoneType. Make one with `si.tl.fit_asign(sdata)`",
        lambda w: si.tl.impute_3d(w.sdata),
    ),
    refuses(
        "tl.impute_3d",
        "a model of another class",
        TypeError,
        "`model` must be of class AsignModel or AsignPanels, found PixNetModel",
        lambda w: si.tl.impute_3d(w.sdata, w.pixnet),
    ),
    refuses(
        "tl.impute_3d",
        "the measured layer as target",
        ValueError,
        "would write over",
        lambda w: impute(w, key_added="measured"),
    ),
    refuses(
        "tl.impute_3d", "a depth of 0", ValueError, "`depth` must be a positive number", lambda w: impute(w, depth=0)
    ),
    refuses(
        "tl.impute_3d", "a depth that is no column", KeyError, "'nope' not found", lambda w: impute(w, depth="nope")
    ),
    refuses(
        "tl.impute_3d",
        "a column of depth with gaps",
        ValueError,
        "must be positive at all unmeasured spots; it is nan at 's0_0'",
        lambda w: impute(w, depth="total_counts"),
    ),
    refuses(
        "tl.impute_3d",
        "a depth where total counts are not known",
        ValueError,
        "`depth` needs total counts of the measured spots",
        lambda w: impute(w, depth=1000),
        change=lambda w: w.table.obs.drop(columns="total_counts", inplace=True),
    ),
    refuses(
        "tl.impute_baseline", "an unknown method", ValueError, "`method` must be one of", lambda w: baseline(w, "magic")
    ),
    refuses(
        "tl.impute_baseline",
        "the measured layer as target",
        ValueError,
        "would write over",
        lambda w: baseline(w, key_added="measured"),
    ),
    refuses(
        "tl.impute_baseline",
        "an unknown table",
        KeyError,
        "not found in `sdata.tables`",
        lambda w: baseline(w, table_key="x"),
    ),
    answers(
        "tl.impute_baseline",
        "a sparse layer",
        "is read as a dense one",
        lambda w: baseline(w, inplace=False),
        lambda w, a: np.array_equal(a.X, w.made["expected"]),
        change=sparsely,
    ),
    answers(
        "tl.impute_baseline", "one or two measured spots", "are spread", baseline, lambda w, _: finite(w), change=few(2)
    ),
    answers(
        "tl.impute_baseline",
        "sections of one and two spots",
        "are imputed",
        baseline,
        lambda w, _: finite(w),
        change=keep(1, 20, 2),
    ),
    answers(
        "tl.impute_baseline",
        "spots at one place",
        "are imputed",
        baseline,
        lambda w, _: finite(w),
        change=lambda w: w.table.obsm["spatial_3d"].__setitem__((slice(0, 4), slice(0, 2)), 700.0),
    ),
    refuses(
        "tl.impute_pixnet",
        "a loss for counts",
        ValueError,
        "the loss 'poisson' of `model_params` is for counts",
        lambda w: si.tl.impute_pixnet(w.sdata, model_params={"loss": "poisson"}),
    ),
    refuses(
        "tl.impute_pixnet",
        "one fold",
        ValueError,
        "`n_folds` must be a whole number of at least 2",
        lambda w: si.tl.impute_pixnet(w.sdata, n_folds=1),
    ),
    refuses(
        "tl.impute_pixnet",
        "the measured layer as target",
        ValueError,
        "would write over",
        lambda w: si.tl.impute_pixnet(w.sdata, key_added="measured"),
    ),
    refuses("tl.cross_validate", "no method", ValueError, "`methods` is empty", lambda w: validate(w, [])),
    refuses(
        "tl.cross_validate",
        "one fold",
        ValueError,
        "`n_folds` must be a whole number of at least 2",
        lambda w: validate(w, n_folds=1),
    ),
    refuses(
        "tl.cross_validate",
        "blocks of no size",
        ValueError,
        "`block_spacings` must be a positive number",
        lambda w: validate(w, block_spacings=0),
    ),
    refuses(
        "tl.cross_validate",
        "one measured section to hold out",
        ValueError,
        'Use `split="block"`',
        lambda w: validate(w, split="section"),
    ),
    answers(
        "tl.cross_validate",
        "more folds than blocks",
        "as many folds as there are blocks",
        lambda w: validate(w, n_folds=1000),
        lambda w, t: np.isfinite(t.loc["kernel", "mse"]),
    ),
]

SCORES = [
    refuses(
        "metrics.evaluate",
        "a truth of raw counts",
        ValueError,
        "`truth.X` must hold log-normalised expression",
        score,
        change=lambda w: (_filled(w), setattr(w.truth, "X", w.truth.layers["counts"])),
    ),
    refuses(
        "metrics.evaluate",
        "a truth with NaN",
        ValueError,
        "truth.X must be finite",
        score,
        change=lambda w: (_filled(w), setattr(w.truth, "X", np.full(w.truth.shape, np.nan))),
    ),
    refuses(
        "metrics.evaluate",
        "a truth without a common gene",
        KeyError,
        "shares no gene",
        score,
        change=lambda w: (_filled(w), setattr(w.truth, "var_names", [f"x{i}" for i in range(w.truth.n_vars)])),
    ),
    refuses(
        "metrics.evaluate",
        "a truth without a common spot",
        KeyError,
        "no unmeasured spot of section 's0'",
        score,
        change=lambda w: (_filled(w), setattr(w.truth, "obs_names", [f"x{i}" for i in range(w.truth.n_obs)])),
    ),
    refuses(
        "metrics.evaluate",
        "two rows of one name in the truth",
        ValueError,
        "`truth.obs_names` must be unique",
        score,
        change=lambda w: (_filled(w), setattr(w.truth, "obs_names", ["s0_0", *w.truth.obs_names[:-1]])),
    ),
    refuses(
        "metrics.evaluate",
        "a truth that is no AnnData",
        TypeError,
        "must be an AnnData with log-normalised expression in `X`, found DataFrame",
        lambda w: si.metrics.evaluate(w.sdata, w.truth.to_df(), layers="measured"),
    ),
    refuses(
        "metrics.evaluate",
        "a truth with its values in a layer",
        ValueError,
        "`truth.X` is empty; put the layer with log-normalised expression there, one of ['log']",
        lambda w: si.metrics.evaluate(w.sdata, AnnData(layers={"log": w.truth.X}, obs=w.truth.obs), layers="measured"),
    ),
    refuses("metrics.evaluate", "nothing imputed yet", ValueError, "holds nothing but the measurement", score),
    refuses(
        "metrics.evaluate",
        "an imputed layer with NaN",
        ValueError,
        "the first in row 0 ('s0_0')",
        score,
        change=lambda w: w.table.layers.__setitem__("mine", np.full(w.table.shape, np.nan)),
    ),
    answers(
        "metrics.evaluate",
        "a truth in another order of rows and genes",
        "is joined by name",
        score,
        lambda w, t: np.allclose(t["mse"], w.made["mse"]),
        change=lambda w: _reordered(w),
    ),
]


def _filled(world):
    si.tl.impute_baseline(world.sdata, "kernel")


def _reordered(world):
    _filled(world)
    world.made["mse"] = score(world)["mse"]
    world.truth = world.truth[::-1, ::-1].copy()


CASES = [*MEASURED, *OUTSIDE, *MATCHING, *IMPUTING, *SCORES]
_ = pd
