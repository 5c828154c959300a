"""Compare methods on measured spots that are held out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spatial_impute._keys import Keys
from spatial_impute._progress import progress
from spatial_impute._validation import (
    name_list,
    require_count,
    require_device,
    require_one_of,
    require_positive,
    resolve_params,
)
from spatial_impute.tl._read import read_spots

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from spatialdata import SpatialData

    from spatial_impute.models._params import AsignParams
    from spatial_impute.models._spots import Spots


def cross_validate(
    sdata: SpatialData,
    methods: Sequence[str] | None = None,
    *,
    split: str | None = None,
    n_folds: int = 5,
    block_spacings: float = 2.0,
    by: str = "method",
    table_key: str = Keys.STACK_TABLE,
    layer: str = Keys.MEASURED,
    graph_key: str = Keys.SPATIAL_3D,
    model_params: AsignParams | Mapping[str, Any] | None = None,
    device: str | None = None,
    seed: int = 0,
    show_progress_bar: bool | None = None,
) -> pd.DataFrame:
    """Score methods on held-out measured spots: the same spots for all of them, in one table.

    Whatever a method chooses or learns, it does so without the fold that it is scored on; ASIGN is fitted anew for
    every fold. Correlations across blocks of one section tell how well expression is filled in within it. On a section
    that was not measured expect less: no held-out block shows how sections differ.

    Parameters
    ----------
    sdata
        Registered stack with features and graph.
    methods
        Names of baselines (see :func:`impute_baseline`) and ``"asign"``; by default all of them.
    split
        ``"section"``: each measured section is held out in turn. ``"block"``: square blocks of the measured sections
        are. By default sections if at least two are measured.
    n_folds, block_spacings
        For blocks: number of folds, and edge of a block in spot spacings.
    by
        ``"method"``: one row per method. ``"gene"``: Pearson correlation per gene (rows) and method (columns).
    table_key, layer, graph_key
        Stack table, layer with log-normalised expression, graph.
    model_params
        Settings of ASIGN; see :class:`~spatial_impute.models.AsignParams`.
    device
        Torch device; ``settings.device`` by default.
    seed
        Seed of the folds and of ASIGN.
    show_progress_bar
        ``settings.show_progress_bar`` by default.

    Returns
    -------
    The scores of :func:`~spatial_impute.metrics.evaluate`, mean over the sections held-out spots lie on, and for the
    mean correlation over genes ``low`` and ``high`` of its 95 % interval and those of its difference to the best
    baseline (``vs_best``, ``vs_best_low``, ``vs_best_high``), by bootstrap over genes. Nothing is written.

    Raises
    ------
    KeyError
        If features, graph or registration are missing.
    ValueError
        For unknown methods, if nothing is measured, or if ``split="section"`` finds one measured section only.

    Examples
    --------
    >>> import spatial_impute as si
    >>> si.settings.show_progress_bar = False
    >>> sdata = si.datasets.synthetic_stack()
    >>> si.tl.register_stack(sdata)
    >>> si.pp.extract_features(sdata)
    >>> si.tl.build_3d_graph(sdata)
    >>> table = si.tl.cross_validate(sdata, ["mean", "kernel", "cokriging"])
    >>> bool(table.loc["cokriging", "pearson_gene"] > table.loc["kernel", "pearson_gene"])
    True
    >>> si.settings.show_progress_bar = True
    """
    from spatial_impute.models._baselines import METHODS
    from spatial_impute.models._cross_validate import ASIGN, predict_held_out
    from spatial_impute.models._params import AsignParams

    params = resolve_params(model_params, AsignParams)
    names = [*METHODS, ASIGN] if methods is None else name_list(methods, name="methods")
    if not names:
        msg = f"`methods` is empty; choose some of {[*METHODS, ASIGN]}, or leave it out for all."
        raise ValueError(msg)
    for name in names:
        require_one_of(name, [*METHODS, ASIGN], name="methods")
    require_one_of(by, ("method", "gene"), name="by")
    n_folds, seed = require_count(n_folds, name="n_folds", least=2), require_count(seed, name="seed", least=0)
    require_positive(block_spacings, name="block_spacings")
    device = require_device(device)
    table, spots = read_spots(sdata, table_key=table_key, layer=layer, graph_key=graph_key)
    folds = _folds(spots, split, n_folds=n_folds, block_spacings=block_spacings, seed=seed)
    truth = np.full((len(spots.known), spots.expression.shape[1]), np.nan)
    truth[spots.known] = spots.expression
    bar = progress(None, "Cross-validating", show=show_progress_bar)
    bar.reset(total=len(names) * len(folds))
    found = {}
    try:
        for name in dict.fromkeys(["mean", *names]):
            found[name] = predict_held_out(
                spots,
                folds,
                name,
                var_names=list(table.var_names),
                params=params,
                seed=seed,
                device=device,
                on_fold=bar.update,
            )
    finally:
        bar.close()
    return _table(found, truth, spots.section, names, list(table.var_names), by=by, seed=seed)


def _folds(spots: Spots, split: str | None, *, n_folds: int, block_spacings: float, seed: int) -> list[np.ndarray]:
    from spatial_impute.models._spots import block_folds, spatial_folds

    if split is None:
        return spatial_folds(spots, n_folds=n_folds, block_spacings=block_spacings, seed=seed)
    require_one_of(split, ("block", "section"), name="split")
    if split == "block":
        return block_folds(spots, n_folds=n_folds, block_spacings=block_spacings, seed=seed)
    codes = np.unique(spots.section[spots.known])
    if len(codes) < 2:
        msg = '`split="section"` needs at least two measured sections, found one. Use `split="block"`.'
        raise ValueError(msg)
    return [spots.known & (spots.section == code) for code in codes]


def _table(
    found: dict[str, np.ndarray],
    truth: np.ndarray,
    section: np.ndarray,
    names: list[str],
    genes: list[str],
    *,
    by: str,
    seed: int,
) -> pd.DataFrame:
    from spatial_impute.metrics._scores import bootstrap_interval, pearson_by_gene, summarise

    scored = np.isfinite(truth).all(axis=1)
    parts = [scored & (section == code) for code in np.unique(section[scored])]
    r = {
        name: np.nanmean([pearson_by_gene(found[name][rows], truth[rows]) for rows in parts], axis=0) for name in found
    }
    if by == "gene":
        return pd.DataFrame({name: r[name] for name in names}, index=pd.Index(genes, name="gene"))
    rows = {}
    baselines = [name for name in names if name != "asign"]
    best = max(baselines, key=lambda name: np.nanmean(r[name])) if baselines else None
    for name in names:
        scores = pd.DataFrame([summarise(found[name][p], truth[p], found["mean"][p]) for p in parts]).mean()
        scores["low"], scores["high"] = bootstrap_interval(r[name], seed=seed)
        if best is not None:
            scores["vs_best"] = np.nanmean(r[name] - r[best])
            scores["vs_best_low"], scores["vs_best_high"] = bootstrap_interval(r[name] - r[best], seed=seed)
        rows[name] = scores
    return pd.DataFrame(rows).T.rename_axis("method")
