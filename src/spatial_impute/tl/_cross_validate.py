"""Compare methods on measured spots that are held out."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spatial_impute._keys import Keys
from spatial_impute._scores import bootstrap_interval, pearson_by_gene, summarise
from spatial_impute._settings import progress_steps
from spatial_impute._stack.elements import section_levels
from spatial_impute._stack.spots import read_stacks, stack_list
from spatial_impute._validation import (
    name_list,
    require_count,
    require_device,
    require_key,
    require_one_of,
    require_positive,
    resolve_params,
)
from spatial_impute.tl._base_layers import INDEPENDENT, kinds_of_bases, with_bases
from spatial_impute.tl._fit_pixnet import PixNetSetup
from spatial_impute.tl._impute_pixnet import (
    HeldOut,
    predict_pixnet,
    warn_of_equal_images,
    warn_of_overlapping_spots,
    warn_of_shared_groups,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from anndata import AnnData
    from spatialdata import SpatialData
    from torch import nn

    from spatial_impute.models._params import AsignParams, PixNetParams
    from spatial_impute.models._spots import Spots
    from spatial_impute.models.asign._ensemble import FitSettings


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
    base_layers: Mapping[str, str] | None = None,
    model_params: AsignParams | Mapping[str, Any] | None = None,
    encoder: str | nn.Module = "texture",
    pixnet_params: PixNetParams | Mapping[str, Any] | None = None,
    tile_size: int = 1024,
    device: str | None = None,
    seed: int = 0,
    show_progress_bar: bool | None = None,
) -> pd.DataFrame:
    """Score methods on held-out measured spots: the same spots for all methods, in one table.

    Each method chooses its settings and learns without the fold on which it is scored; ASIGN and PixNet are fitted
    again for every fold. Correlations are computed within folds. Across folds, even a constant would seem to predict
    the opposite: if a fold is high, the mean of the other folds is low. Correlations across blocks of one section show
    how well a method fills gaps in that section. Expect less on a section that was not measured: no held-out block
    shows how sections differ. Expect even less on another patient.

    A warning is logged if a score may be too high: if a method learns from the group that is held out, if held-out
    spots overlap other spots, or if two sections have the same image.

    Parameters
    ----------
    sdata
        Registered stack, with features and graph if the methods need them. Also several stacks (patients) with the same
        genes; then only methods that use the image alone are allowed, and ``"asign"``. It learns from the other stacks
        (at least two), and predicts the held-out stack without any measured spot.
    methods
        Names of baselines (see :func:`impute_baseline`) and ``"asign"``; by default all of these, and for several
        stacks ``"mean"``, ``"ridge"`` and ``"image_knn"``. Also possible: ``"image_knn"`` (mean of the measured spots
        with the most similar features), ``"hest"`` (see :func:`impute_baseline`), ``"colour"`` (ridge regression on
        mean and spread of the color of a spot, which needs no structure) and ``"pixnet"``.
    split
        ``"section"``: each measured section is held out once. ``"block"``: square blocks of the measured sections.
        ``"group"``: each group. ``"stack"``: each of several stacks. By default groups if there are any, else sections
        if at least two are measured, else blocks.
    groups
        Column of the stack table's ``obs`` with the patient, or the block of tissue. By default each of several stacks
        is a group.
    n_folds
        Number of folds, for blocks.
    block_spacings
        Edge of a block in spot spacings.
    by
        ``"method"``: one row per method. ``"gene"``: Pearson correlation per gene (rows) and method (columns).
    table_key
        Name of the stack table.
    layer
        Layer with log-normalised expression.
    graph_key
        Key of the 3D graph: the `key_added` of :func:`build_3d_graph`.
    base_layers
        Layers with independent predictions, ``{"mine": "independent"}``, as for :func:`fit_asign`: each is compared as
        a method of its own, and ASIGN blends them in.
    model_params
        Settings of ASIGN; see :class:`~spatial_impute.models.AsignParams`.
    encoder
        Encoder of PixNet; see :func:`fit_pixnet`.
    pixnet_params
        Settings of PixNet; see :class:`~spatial_impute.models.PixNetParams`.
    tile_size
        Edge of a tile of PixNet in px.
    device
        Torch device; ``settings.device`` by default.
    seed
        Seed of the folds, of ASIGN and of PixNet.
    show_progress_bar
        Show a progress bar; ``settings.show_progress_bar`` by default.

    Returns
    -------
    The scores of :func:`~spatial_impute.metrics.evaluate`, mean over the sections with held-out spots. ``low`` and
    ``high`` are the 95 % interval of the mean correlation over genes; ``vs_best``, ``vs_best_low`` and ``vs_best_high``
    are its difference to the best baseline with the 95 % interval, both by bootstrap over genes. Nothing is written.

    Raises
    ------
    KeyError
        If features, graph, registration or the column of the groups are missing.
    ValueError
        If a method is unknown, nothing is measured, no spots remain to learn from, or several stacks have different
        genes or units.

    Examples
    --------
    >>> import spatial_impute as si
    >>> si.settings.show_progress_bar = False
    >>> sdata = si.datasets.synthetic_stack(extent=1400.0)
    >>> si.tl.register_stack(sdata)
    >>> si.pp.extract_features(sdata)
    >>> si.tl.build_3d_graph(sdata)
    >>> table = si.tl.cross_validate(sdata, ["mean", "kernel", "cokriging"])
    >>> bool(table.loc["cokriging", "pearson_gene"] > table.loc["kernel", "pearson_gene"])
    True
    >>> si.settings.show_progress_bar = True
    """
    from spatial_impute.encoders._pyramids import build_pyramid
    from spatial_impute.models._params import AsignParams, PixNetParams
    from spatial_impute.models._spots import concatenate
    from spatial_impute.models.asign._baselines import NEEDS_GRAPH
    from spatial_impute.models.asign._ensemble import FitSettings
    from spatial_impute.models.asign._fit import ASIGN, PIXNET, needs_features

    params, pixnet = resolve_params(model_params, AsignParams), resolve_params(pixnet_params, PixNetParams)
    stacks = stack_list(sdata)
    names = _method_names(methods, len(stacks))
    require_one_of(by, ("method", "gene"), name="by")
    n_folds, seed = require_count(n_folds, name="n_folds", least=2), require_count(seed, name="seed", least=0)
    block_spacings = require_positive(block_spacings, name="block_spacings")
    device = require_device(device)
    if pixnet.loss != "mse+pcc":
        msg = f"Methods are compared on log values; the loss {pixnet.loss!r} of `pixnet_params` is for counts. Use 'mse+pcc'."
        raise ValueError(msg)
    tables, read = read_stacks(
        stacks,
        table_key=table_key,
        layer=layer,
        graph_key=graph_key,
        features=any(needs_features(name) for name in names),
        graph=any(name in {*NEEDS_GRAPH, ASIGN} for name in names),
    )
    if not all(np.isfinite(found.expression).all() for found in read):
        msg = (
            "Sections were measured with different genes. Compare methods on those that all have: "
            "`si.pp.select_genes(sdata, join='inner')`."
        )
        raise ValueError(msg)
    bases = _independent(base_layers or {})
    read = [
        with_bases(sdata, replace(found, device=device), table, bases)
        for sdata, found, table in zip(stacks, read, tables, strict=True)
    ]
    names += [name for name in bases if name not in names]
    spots, group = concatenate(read), _groups(tables, groups)
    folds = _folds(spots, split, group, n_folds=n_folds, block_spacings=block_spacings, seed=seed)
    data = HeldOut(stacks, tables, read, spots, folds, table_key, layer)
    if ASIGN in names and len(stacks) > 1:
        _require_stacks_to_learn_from(data)
    if group is not None:
        warn_of_shared_groups(data, group)
    warn_of_overlapping_spots(data)
    warn_of_equal_images(data)
    settings, setup = FitSettings(params, seed, device), None
    if PIXNET in names:
        setup = PixNetSetup(build_pyramid(encoder, window=pixnet.encoder_window), pixnet, tile_size, device, seed)
    with progress_steps("Cross-validating", show=show_progress_bar) as steps:
        found = _predict(data, names, settings, setup, steps(len(names) * len(folds)))
    truth, parts, fold = data.truth, data.parts(), data.fold_of_spot
    r = {n: np.nanmean([pearson_by_gene(found[n][p], truth[p], fold[p]) for p in parts], axis=0) for n in names}
    if by == "gene":
        return pd.DataFrame(r, index=pd.Index(data.genes, name="gene"))
    return _method_table(data, found, r, seed)


def _method_names(methods: Sequence[str] | None, n_stacks: int) -> list[str]:
    from spatial_impute.models.asign._baselines import METHODS, RECIPES
    from spatial_impute.models.asign._fit import ASIGN, COLOR, FROM_IMAGE, IMAGE_KNN, PIXNET

    allowed = [*METHODS, *RECIPES, IMAGE_KNN, COLOR, PIXNET, ASIGN] if n_stacks == 1 else [*FROM_IMAGE, ASIGN]
    if methods is None:
        return [*METHODS, ASIGN] if n_stacks == 1 else ["mean", "ridge", IMAGE_KNN]
    names = name_list(methods, name="methods", empty=f"choose some of {allowed}, or leave it out for all.")
    for name in names:
        require_one_of(name, allowed, name="methods")
    return names


def _independent(base_layers: Mapping[str, str]) -> dict[str, str]:
    """Kinds of the base layers, or a ``ValueError`` if one was held out by folds, which are others here."""
    kinds = kinds_of_bases(base_layers)
    held_out = [name for name, kind in kinds.items() if kind != INDEPENDENT]
    if held_out:
        msg = (
            f"`base_layers` names {held_out}, which are not declared {INDEPENDENT!r}: they have seen spots that are "
            f"hidden here. Leave them out; for PixNet use the method {Keys.PIXNET!r}, fitted again in each fold."
        )
        raise ValueError(msg)
    return kinds


def _groups(tables: list[AnnData], column: str | None) -> pd.Series | None:
    """(n,) group of each spot; by default the stack, and None for a single stack."""
    if column is None:
        if len(tables) == 1:
            return None
        return pd.Series(np.repeat(np.arange(len(tables)), [t.n_obs for t in tables]), name="stack").astype(str)
    for table in tables:
        require_key(column, table.obs, where="obs of the stack table")
    group = pd.concat([table.obs[column].astype(object) for table in tables], ignore_index=True)
    measured = np.concatenate([table.obs[Keys.MEASURED].to_numpy(bool) for table in tables])
    n_missing = int(group[measured].isna().sum())
    if n_missing:
        msg = f"`obs[{column!r}]` must have the group of every measured spot; it is missing for {n_missing} spots."
        raise ValueError(msg)
    return group


def _folds(
    spots: Spots, split: str | None, group: pd.Series | None, *, n_folds: int, block_spacings: float, seed: int
) -> list[np.ndarray]:
    from spatial_impute.models._spots import block_folds, spatial_folds

    if split is None and group is None:
        return spatial_folds(spots, n_folds=n_folds, block_spacings=block_spacings, seed=seed)
    split = "group" if split is None else split
    require_one_of(split, ("block", "section", "group", "stack"), name="split")
    if split == "block":
        return block_folds(spots, n_folds=n_folds, block_spacings=block_spacings, seed=seed)
    if split == "stack" and (group is None or group.name != "stack"):
        msg = '`split="stack"` holds out one stack at a time: pass several stacks, and no `groups`.'
        raise ValueError(msg)
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


def _predict(
    data: HeldOut, names: list[str], settings: FitSettings, setup: PixNetSetup | None, on_fold: Callable[[], None]
) -> dict[str, np.ndarray]:
    """(n, n_genes) held-out predictions of each method, and of the mean profile; NaN for spots in no fold."""
    from spatial_impute.models.asign._fit import ASIGN, COLOR, PIXNET, predict_held_out

    found: dict[str, np.ndarray] = {}
    for name in dict.fromkeys(["mean", *names]):
        if name == PIXNET and setup is not None:
            values = predict_pixnet(data.pixnet_sections(), data.spots.known, data.folds, setup, on_fold)
            found[name] = np.where(np.isnan(values), found["mean"], values)  # spots off the image
        elif name == ASIGN and len(data.stacks) > 1:
            found[name] = _predict_stacks(data, settings, on_fold)
        else:
            spots = replace(data.spots, features=_color_features(data)) if name == COLOR else data.spots
            found[name] = predict_held_out(
                spots, data.folds, name, var_names=data.genes, settings=settings, on_fold=on_fold
            )
    return found


def _require_stacks_to_learn_from(data: HeldOut) -> None:
    """Raise unless ASIGN learns from two stacks or more wherever it predicts one without a measured spot."""
    for fold in data.folds:
        measured = [bool(spots.known.any()) for spots in data.without(fold)]
        if not all(measured) and sum(measured) < 2:
            msg = (
                "ASIGN predicts a stack without a measured spot only if it learned from at least two others; "
                f"{sum(measured)} are left while {len(measured) - sum(measured)} are held out. Pass more stacks, or leave "
                'out "asign".'
            )
            raise ValueError(msg)


def _predict_stacks(data: HeldOut, settings: FitSettings, on_fold: Callable[[], None]) -> np.ndarray:
    """(n, n_genes) predictions by ASIGN, fitted on all stacks that have measured spots outside of a fold."""
    from spatial_impute.models.asign._fit import fit

    result = np.full((len(data.spots.known), data.spots.expression.shape[1]), np.nan)
    for fold in data.folds:
        stacks = data.without(fold)
        model = fit([spots for spots in stacks if spots.known.any()], data.genes, settings)
        found = [model._impute(spots, device=settings.device).expression for spots in stacks]
        result[fold] = np.concatenate(found)[fold]
        on_fold()
    return result


def _color_features(data: HeldOut) -> np.ndarray:
    """(n, 6) color statistics of spots, standardised within sections like all features."""
    from spatial_impute._graph import standardise_by_section
    from spatial_impute._image.color import color_statistics

    values = np.zeros((len(data.spots.section), 6))
    for sdata, section, centers, radius, rows in data.sections():
        values[rows] = color_statistics(section_levels(sdata, section), centers, radius)
    return standardise_by_section(values, data.spots.section)


def _method_table(data: HeldOut, found: dict[str, np.ndarray], r: dict[str, np.ndarray], seed: int) -> pd.DataFrame:
    """Scores of the methods from their predictions and their correlations `r`."""
    truth, parts, folds = data.truth, data.parts(), data.fold_of_spot
    baselines = [name for name in r if name not in ("asign", "pixnet")]
    best = max(baselines, key=lambda name: np.nanmean(r[name])) if baselines else None
    rows = {}
    for name in r:
        scores = pd.DataFrame([summarise(found[name][p], truth[p], found["mean"][p], folds[p]) for p in parts]).mean()
        scores["low"], scores["high"] = bootstrap_interval(r[name], seed=seed)
        if best is not None:
            scores["vs_best"] = np.nanmean(r[name] - r[best])
            scores["vs_best_low"], scores["vs_best_high"] = bootstrap_interval(r[name] - r[best], seed=seed)
        rows[name] = scores
    return pd.DataFrame(rows).T.rename_axis("method")
