"""Compare methods on measured spots that are held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spatial_impute._keys import Keys
from spatial_impute._params import resolve_params
from spatial_impute._settings import progress
from spatial_impute._stack.elements import section_levels, spot_geometry
from spatial_impute._stack.record import load_record
from spatial_impute._validation import (
    name_list,
    require_count,
    require_device,
    require_key,
    require_one_of,
    require_positive,
)
from spatial_impute.tl._provenance import require_same_units, units
from spatial_impute.tl._read_spots import read_spots

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData
    from spatialdata import SpatialData
    from torch import nn

    from spatial_impute.models._params import AsignParams, PixNetParams
    from spatial_impute.models._spots import Spots


def cross_validate(
    sdata: SpatialData | Sequence[SpatialData],
    methods: Sequence[str] | None = None,
    *,
    split: str | None = None,
    groups: str | None = None,
    n_folds: int = 5,
    block_spacings: float = 2.0,
    by: str = "method",
    table_key: str = Keys.STACK_TABLE,
    layer: str = Keys.MEASURED,
    graph_key: str = Keys.SPATIAL_3D,
    model_params: AsignParams | Mapping[str, Any] | None = None,
    encoder: str | nn.Module = "tellez-multitask",
    pixnet_params: PixNetParams | Mapping[str, Any] | None = None,
    tile_size: int = 1024,
    device: str | None = None,
    seed: int = 0,
    show_progress_bar: bool | None = None,
) -> pd.DataFrame:
    """Score methods on held-out measured spots: the same spots for all of them, in one table.

    Whatever a method chooses or learns, it does so without the fold that it is scored on; ASIGN and PixNet are fitted
    anew for every fold. Correlations across blocks of one section tell how well expression is filled in within it. On a
    section that was not measured expect less: no held-out block shows how sections differ. On another patient expect
    less again.

    A warning is logged if folds leak: if a group is held out and learned from, if held-out spots overlap others, or if
    two sections have one and the same image.

    Parameters
    ----------
    sdata
        Registered stack with features and graph, as far as the methods need them. Several stacks (patients) with the
        same genes: only methods that look at the image alone can go from one to the other.
    methods
        Names of baselines (see :func:`impute_baseline`) and ``"asign"``; by default all of them, and for several stacks
        ``"mean"``, ``"ridge"`` and ``"image_knn"``. Further ones: ``"image_knn"`` (mean of the measured spots whose
        features are most alike), ``"colour"`` (ridge on mean and spread of the colour of a spot: what needs no
        structure), ``"pixnet"``. ASIGN takes up no base layers here.
    split
        ``"section"``: each measured section is held out in turn. ``"block"``: square blocks of the measured sections
        are. ``"group"``: each group is. By default groups if there are any, else sections if at least two are measured.
    groups
        Column of the stack table's ``obs`` that tells patients, or blocks of tissue, apart. Several stacks are a group
        each by default.
    n_folds, block_spacings
        For blocks: number of folds, and edge of a block in spot spacings.
    by
        ``"method"``: one row per method. ``"gene"``: Pearson correlation per gene (rows) and method (columns).
    table_key, layer, graph_key
        Stack table, layer with log-normalised expression, graph.
    model_params
        Settings of ASIGN; see :class:`~spatial_impute.models.AsignParams`.
    encoder, pixnet_params, tile_size
        Encoder and settings of PixNet; see :func:`fit_pixnet`.
    device
        Torch device; ``settings.device`` by default.
    seed
        Seed of the folds, of ASIGN and of PixNet.
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
        If features, graph, registration or the column of the groups are missing.
    ValueError
        For unknown methods, if nothing is measured, if there is nothing to learn from outside of a fold, or if several
        stacks have different genes or units.

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
    from spatial_impute.models._params import AsignParams, PixNetParams
    from spatial_impute.models.asign._baselines import METHODS, NEEDS_GRAPH
    from spatial_impute.models.asign._held_out import (
        ASIGN,
        COLOR,
        FROM_IMAGE,
        IMAGE_KNN,
        PIXNET,
        concatenate,
        needs_features,
        predict_held_out,
    )
    from spatial_impute.models.asign._training import FitSettings

    params = resolve_params(model_params, AsignParams)
    pixnet = resolve_params(pixnet_params, PixNetParams)
    stacks = list(sdata) if isinstance(sdata, Sequence) else [sdata]
    if not stacks:
        msg = "`sdata` is an empty sequence; pass at least one stack."
        raise ValueError(msg)
    allowed = [*METHODS, IMAGE_KNN, COLOR, PIXNET, ASIGN] if len(stacks) == 1 else list(FROM_IMAGE)
    names = [*METHODS, ASIGN] if len(stacks) == 1 else ["mean", "ridge", IMAGE_KNN]
    names = names if methods is None else name_list(methods, name="methods")
    if not names:
        msg = f"`methods` is empty; choose some of {allowed}, or leave it out for all."
        raise ValueError(msg)
    for name in names:
        require_one_of(name, allowed, name="methods")
    require_one_of(by, ("method", "gene"), name="by")
    n_folds, seed = require_count(n_folds, name="n_folds", least=2), require_count(seed, name="seed", least=0)
    block_spacings = require_positive(block_spacings, name="block_spacings")
    device = require_device(device)
    if pixnet.loss != "mse+pcc":
        msg = f"Methods are compared on log values; `pixnet_params` asks for the loss {pixnet.loss!r}, for counts."
        raise ValueError(msg)
    read = [
        read_spots(
            s,
            table_key=table_key,
            layer=layer,
            graph_key=graph_key,
            features=any(needs_features(name) for name in names),
            graph=any(name in {*NEEDS_GRAPH, ASIGN} for name in names),
        )
        for s in stacks
    ]
    tables = [table for table, _ in read]
    _require_same_genes(tables)
    require_same_units(units(table) for table in tables)
    if not all(np.isfinite(spots.expression).all() for _, spots in read):
        msg = (
            "Sections were measured with different genes. Compare methods on those that all have: "
            "`si.pp.select_genes(sdata, join='inner')`."
        )
        raise ValueError(msg)
    spots = concatenate([spots for _, spots in read])
    group = _groups(tables, groups)
    folds = _folds(spots, split, group, n_folds=n_folds, block_spacings=block_spacings, seed=seed)
    _warn_of_leaks(stacks, tables, spots, folds, group)
    truth = np.full((len(spots.known), spots.expression.shape[1]), np.nan)
    truth[spots.known] = spots.expression
    bar = progress(None, "Cross-validating", show=show_progress_bar)
    bar.reset(total=len(names) * len(folds))
    found: dict[str, np.ndarray] = {}
    common = {"seed": seed, "device": device, "on_fold": bar.update}
    color = _colour(stacks, tables, spots.section) if COLOR in names else None
    try:
        for name in dict.fromkeys(["mean", *names]):
            if name == PIXNET:
                values = _pixnet(
                    stacks,
                    tables,
                    spots,
                    folds,
                    encoder,
                    params=pixnet,
                    table_key=table_key,
                    layer=layer,
                    tile_size=tile_size,
                    **common,
                )
                found[name] = np.where(np.isnan(values), found["mean"], values)  # spots off the image
            else:
                found[name] = predict_held_out(
                    spots if name != COLOR else replace(spots, features=color),
                    folds,
                    name,
                    var_names=list(tables[0].var_names),
                    settings=FitSettings(params, seed, device),
                    on_fold=bar.update,
                )
    finally:
        bar.close()
    return _table(found, truth, spots.section, names, list(tables[0].var_names), by=by, seed=seed)


def _require_same_genes(tables: list[AnnData]) -> None:
    for i, table in enumerate(tables):
        if list(table.var_names) != list(tables[0].var_names):
            msg = (
                f"All stacks must have the same genes in the same order; stack {i} differs from stack 0. "
                "Use `si.pp.select_genes(sdata, genes=...)` on each."
            )
            raise ValueError(msg)


def _groups(tables: list[AnnData], column: str | None) -> pd.Series | None:
    """(n,) group of each spot; stacks where no column is named, nothing for a single stack."""
    if column is None:
        if len(tables) == 1:
            return None
        return pd.Series(np.repeat(np.arange(len(tables)), [t.n_obs for t in tables]), name="stack").astype(str)
    for table in tables:
        require_key(column, table.obs, where="obs of the stack table")
    group = pd.concat([table.obs[column].astype(object) for table in tables], ignore_index=True)
    measured = np.concatenate([table.obs[Keys.MEASURED].to_numpy(bool) for table in tables])
    if group[measured].isna().any():
        n_missing = int(group[measured].isna().sum())
        msg = f"`obs[{column!r}]` must name the group of every measured spot; it is missing for {n_missing}."
        raise ValueError(msg)
    return group


def _warn_of_leaks(
    stacks: list[SpatialData],
    tables: list[AnnData],
    spots: Spots,
    folds: list[np.ndarray],
    group: pd.Series | None,
) -> None:
    from spatial_impute.tl._held_out_checks import (
        warn_of_equal_images,
        warn_of_overlapping_spots,
        warn_of_shared_groups,
    )

    if group is not None:
        warn_of_shared_groups(folds, spots.known, group)
    centers, radius = np.zeros((len(spots.known), 2)), np.zeros(len(spots.known))
    sections: dict[int, tuple[int, str]] = {}
    for i, section, centre, r, rows in _geometry(stacks, tables):
        centers[rows], radius[rows] = centre, r
        sections |= dict.fromkeys(spots.section[rows[:1]], (i, section))
    warn_of_overlapping_spots(folds, spots.known, spots.section, centers, radius)
    warn_of_equal_images(stacks, sections, folds, np.where(spots.known, spots.section, -1))


def _geometry(
    stacks: list[SpatialData], tables: list[AnnData]
) -> list[tuple[int, str, np.ndarray, np.ndarray, np.ndarray]]:
    """Stack, section, centres and radii of its spots in its own frame, and their rows."""
    found, first = [], 0
    for i, (sdata, table) in enumerate(zip(stacks, tables, strict=True)):
        for section in load_record(sdata).sections:
            if section.spots is None:
                continue
            centers, radius, index = spot_geometry(sdata, section)
            rows = table.obs_names.get_indexer([f"{section.name}_{k}" for k in index])
            known = rows >= 0
            found.append((i, section.name, centers[known], radius[known], first + rows[known]))
        first += table.n_obs
    return found


def _colour(stacks: list[SpatialData], tables: list[AnnData], section: np.ndarray) -> np.ndarray:
    """(n, 6) colour statistics of spots, standardised within sections like all features."""
    from spatial_impute._graph import standardise_by_section
    from spatial_impute._image.color import color_statistics

    values = np.zeros((len(section), 6))
    for i, name, centers, radius, rows in _geometry(stacks, tables):
        levels = section_levels(stacks[i], load_record(stacks[i])[name])
        values[rows] = color_statistics(levels, centers, radius)
    return standardise_by_section(values, section)


def _pixnet(
    stacks: list[SpatialData],
    tables: list[AnnData],
    spots: Spots,
    folds: list[np.ndarray],
    encoder: str | nn.Module,
    *,
    on_fold: Any,
    **setup: Any,
) -> np.ndarray:
    from spatial_impute.encoders._pyramids import build_pyramid
    from spatial_impute.tl._pixnet_folds import PixNetSetup, predict_held_out, read_sections

    first = np.cumsum([0, *(t.n_obs for t in tables)])
    sections = [
        s for sdata, table, n in zip(stacks, tables, first, strict=False) for s in read_sections(sdata, table, n)
    ]
    return predict_held_out(sections, spots.known, folds, PixNetSetup(pyramid=build_pyramid(encoder), **setup), on_fold)


def _folds(
    spots: Spots, split: str | None, group: pd.Series | None, *, n_folds: int, block_spacings: float, seed: int
) -> list[np.ndarray]:
    from spatial_impute.models._spots import block_folds, spatial_folds

    if split is None and group is None:
        return spatial_folds(spots, n_folds=n_folds, block_spacings=block_spacings, seed=seed)
    split = "group" if split is None else split
    require_one_of(split, ("block", "section", "group"), name="split")
    if split == "block":
        return block_folds(spots, n_folds=n_folds, block_spacings=block_spacings, seed=seed)
    if split == "group" and group is None:
        msg = '`split="group"` needs `groups=`, a column of the stack table\'s `obs` (e.g. the patient).'
        raise ValueError(msg)
    names = spots.section if split == "section" else pd.factorize(group)[0]
    codes = np.unique(names[spots.known])
    if len(codes) < 2:
        what, other = ("sections", "block") if split == "section" else ("groups", "section")
        msg = f'`split="{split}"` needs at least two measured {what}, found one. Use `split="{other}"`.'
        raise ValueError(msg)
    return [spots.known & (names == code) for code in codes]


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
    from spatial_impute._scores import bootstrap_interval, pearson_by_gene, summarise

    scored = np.isfinite(truth).all(axis=1)
    parts = [scored & (section == code) for code in np.unique(section[scored])]
    r = {
        name: np.nanmean([pearson_by_gene(found[name][rows], truth[rows]) for rows in parts], axis=0) for name in found
    }
    if by == "gene":
        return pd.DataFrame({name: r[name] for name in names}, index=pd.Index(genes, name="gene"))
    rows = {}
    baselines = [name for name in names if name not in ("asign", "pixnet")]
    best = max(baselines, key=lambda name: np.nanmean(r[name])) if baselines else None
    for name in names:
        scores = pd.DataFrame([summarise(found[name][p], truth[p], found["mean"][p]) for p in parts]).mean()
        scores["low"], scores["high"] = bootstrap_interval(r[name], seed=seed)
        if best is not None:
            scores["vs_best"] = np.nanmean(r[name] - r[best])
            scores["vs_best_low"], scores["vs_best_high"] = bootstrap_interval(r[name] - r[best], seed=seed)
        rows[name] = scores
    return pd.DataFrame(rows).T.rename_axis("method")
