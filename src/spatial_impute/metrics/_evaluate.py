"""Scores of imputed layers against the truth, and a quick look at which genes can be predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spatial_impute._expression import looks_like_counts, require_log_values
from spatial_impute._keys import Keys
from spatial_impute._scores import (
    bootstrap_interval,
    interval_coverage,
    moran_gap,
    noise_ceiling,
    pearson_by_gene,
    structural_similarity,
    summarise,
)
from spatial_impute._settings import logger
from spatial_impute._stack.spots import read_spots
from spatial_impute._stack.state import require_not_measured, warn_if_old
from spatial_impute._stack.table import dense_rows, measured_mask, section_ranks, stack_table, target_sum_of, uns_record
from spatial_impute._validation import (
    name_list,
    require_count,
    require_finite,
    require_key,
    require_one_of,
    require_unique,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from spatialdata import SpatialData

_SAME_VALUE = 1e-3  # relative: float16 rounds to half of it
_LEAST_SEEN = 3  # genes above zero; two may agree by chance
_MOST_COPIED = 0.05  # of the spots
_MAX_COMPONENTS = 50  # of the features: enough to tell spots apart, few enough to find neighbors fast


def evaluate(
    sdata: SpatialData,
    truth: AnnData,
    *,
    layers: str | Sequence[str] | None = None,
    sections: Sequence[str] | None = None,
    by: str = "layer",
    counts_layer: str | None = None,
    table_key: str = Keys.STACK_TABLE,
) -> pd.DataFrame:
    """Score imputed layers on spots that were not measured.

    The main score is ``pearson_gene``: the correlation of a gene across the spots of a section, mean over genes. The
    correlation across genes within a spot (``pearson_spot``) is there for comparison with publications. Alone it shows
    nothing, because the mean profile of the measured section already gets a high value.

    Parameters
    ----------
    sdata
        Stack with imputed layers.
    truth
        Log-normalised expression in ``X``, with ``obs_names`` and ``var_names`` as in the stack table. Spots and genes
        that are not in `truth` are not scored.
    layers
        Layers to score; by default all except ``"measured"`` and standard deviations. Genes that a layer does not have
        at all (NaN everywhere) count as the mean profile.
    sections
        Sections to score; by default all sections without measured spots.
    by
        ``"layer"``: one row per layer, the mean over sections. ``"section"``: one row per layer and section.
        ``"pooled"``: one row per layer, all spots together, so that differences between sections count as well.
        ``"gene"``: Pearson correlation per gene (rows) and layer (columns), the mean over sections.
    counts_layer
        Layer of `truth` with its raw counts, of all genes that were counted. With it the scores have the noise ceiling.
    table_key
        Name of the stack table.

    Returns
    -------
    Table of scores. Nothing is written. Its columns, except for ``by="gene"``:

    ``pearson_gene``, ``pearson_gene_median``, ``pearson_gene_q1``, ``pearson_gene_positive``
        Pearson correlation of a gene across spots: mean, median and first quartile over genes, and the share of genes
        above 0. A constant prediction scores 0. A gene whose truth is constant on a section is not scored there.
    ``pearson_gene_pooled``
        Mean correlation over genes if the spots of all sections are taken together. Differences between sections raise
        it, also without any pattern within a section. Only for ``by="layer"``.
    ``ceiling``, ``of_ceiling``
        With `counts_layer`. The truth is a measurement with counting noise, so that even perfect values do not
        correlate with it by 1: ``ceiling`` is the highest correlation that can be expected, mean over genes (from
        counts that are split into halves), and ``of_ceiling`` is ``pearson_gene`` divided by it. ``by="gene"`` has a
        column ``ceiling``, to divide the others by.
    ``pearson_spot``
        Pearson correlation across the genes of a spot, mean over spots.
    ``mse``, ``mae``
        Mean squared and mean absolute error.
    ``skill``
        1 - mse / mse of the mean profile of the measured spots.
    ``n_spots``, ``n_genes``
        Number of spots, and of genes that could be scored.
    ``low``, ``high``
        95 % interval of ``pearson_gene``, by bootstrap over genes.
    ``coverage``
        Share of the truth inside the 90 % intervals, for layers with standard deviations (``layers["asign_sd"]``). The
        intervals are for measurements with the depth in ``obs["imputation_depth"]``.
    ``moran_gap``
        Moran's I of the prediction minus that of the truth, within sections; above 0 the prediction is smoother. Not
        for ``by="pooled"``.
    ``ssim``
        Structural similarity on the lattice of the spots, within sections. Not for ``by="pooled"``.

    Raises
    ------
    KeyError
        If a layer or section does not exist, or if `truth` shares no spot or no gene with the stack.
    ValueError
        If `truth` holds raw counts, if ``truth.X`` is empty, if ``truth.layers[counts_layer]`` does not hold counts, or
        if a layer was imputed when other spots were measured than now, or equals the truth.
    TypeError
        If `truth` is not an AnnData.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata, truth = si.datasets.synthetic_stack(extent=1400.0, truth=True)
    >>> si.tl.register_stack(sdata, show_progress_bar=False)
    >>> for method in ("mean", "kernel"):
    ...     si.tl.impute_baseline(sdata, method)
    >>> scores = si.metrics.evaluate(sdata, truth)
    >>> bool(scores.loc["baseline_kernel", "pearson_gene"] > scores.loc["baseline_mean", "pearson_gene"])
    True
    """
    table = stack_table(sdata, table_key)
    require_one_of(by, ("gene", "layer", "pooled", "section"), name="by")
    keys = _layers_to_score(table, layers, f"sdata.tables[{table_key!r}].layers")
    measured = measured_mask(table)
    names = _sections_to_score(table, measured, sections)
    _require_truth(truth)
    genes = [gene for gene in table.var_names if gene in truth.var_names]
    if not genes:
        msg = (
            f"`truth` shares no gene with the stack (e.g. {list(table.var_names[:3])}, {list(truth.var_names[:3])}). "
            "Use the same gene names in both."
        )
        raise KeyError(msg)
    columns = table.var_names.get_indexer(genes)
    parts = {name: _read_truth(table, truth, genes, name, measured) for name in names}
    ceilings = _ceilings(table, truth, genes, parts, counts_layer)
    profile = np.nanmean(dense_rows(table.layers[Keys.MEASURED], measured), axis=0)[columns]
    for key in keys:
        require_not_measured(sdata, table, key, names)
    warn_if_old(sdata, table, keys)
    where = f"sdata.tables[{table_key!r}].layers"
    read = {key: _read_layer(table, key, columns, parts, where, profile=profile) for key in keys}
    if by == "gene":
        each = {k: [pearson_by_gene(v.values[p.rows], p.true) for p in parts.values()] for k, v in read.items()}
        each |= {"ceiling": list(ceilings.values())} if ceilings else {}
        means = {name: pd.DataFrame(by_section).mean().to_numpy() for name, by_section in each.items()}
        return pd.DataFrame(means, index=pd.Index(genes, name="gene"))
    pooled = _Part(*map(np.concatenate, zip(*((p.rows, p.true, p.xy) for p in parts.values()), strict=True)))
    if by == "pooled":
        mean = {"all": np.mean(list(ceilings.values()), axis=0)} if ceilings else {}
        scores = [_score(v, pooled, profile) | _ceiling_scores(v, pooled, mean.get("all")) for v in read.values()]
        return pd.DataFrame(scores, index=pd.Index(keys, name="layer"))
    scores = []
    for layer in read.values():
        for name, part in parts.items():
            data = layer.values[part.rows], part.true, part.xy
            spatial = {"moran_gap": moran_gap(*data), "ssim": structural_similarity(*data)}
            scores.append(_score(layer, part, profile) | _ceiling_scores(layer, part, ceilings.get(name)) | spatial)
    result = pd.DataFrame(scores, index=pd.MultiIndex.from_product([keys, names], names=["layer", "section"]))
    if by == "section":
        return result
    result = result.groupby(level="layer", sort=False).mean()
    all_spots = [float(np.nanmean(pearson_by_gene(layer.values[pooled.rows], pooled.true))) for layer in read.values()]
    result.insert(1, "pearson_gene_pooled", all_spots)
    return result


@dataclass(frozen=True)
class _Part:
    """Scored spots of a section."""

    rows: np.ndarray  # (n,) rows of the stack table
    true: np.ndarray  # (n, n_genes) truth
    xy: np.ndarray  # (n, 2) position in the section, um


@dataclass(frozen=True)
class _Layer:
    """A layer at all spots, with standard deviations if it has them."""

    values: np.ndarray
    sd: np.ndarray | None


def _layers_to_score(table: AnnData, layers: str | Sequence[str] | None, where: str) -> list[str]:
    keys = name_list(layers, name="layers")
    if layers is None:
        keys = [key for key in table.layers if key != Keys.MEASURED and not key.endswith(Keys.sd(""))]
        keys = [key for key in keys if Keys.MATCHED_FROM not in uns_record(table, key)]  # measurements, too
    for key in keys:
        require_key(key, table.layers, where=where)
    if not keys:
        msg = (
            f"`{where}` holds nothing but the measurement. Run `si.tl.impute_baseline(sdata)` or "
            "`si.tl.impute_3d(sdata, model)` first."
        )
        raise ValueError(msg)
    return keys


def _sections_to_score(table: AnnData, measured: np.ndarray, sections: Sequence[str] | None) -> list[str]:
    section_ranks(table, ())  # must be categorical
    names = list(table.obs[Keys.SECTION].cat.categories)
    if sections is None:
        section = table.obs[Keys.SECTION].astype(str).to_numpy()
        sections = [name for name in names if not measured[section == name].any() and (section == name).any()]
    sections = name_list(sections, name="sections")
    for name in sections:
        require_key(name, names, where="the stack's sections")
    if not sections:
        msg = "Every section has measured spots, so no section is scored by default. Name some with `sections=`."
        raise ValueError(msg)
    return sections


def _require_truth(truth: Any) -> None:
    """Raise unless the truth is an AnnData with values in ``X`` and unique names."""
    if not all(hasattr(truth, slot) for slot in ("X", "layers", "obs_names", "var_names")):
        msg = (
            f"`truth` must be an AnnData with log-normalised expression in `X`, found {type(truth).__name__}. Make one "
            "with `AnnData(values)` and the `obs_names` and `var_names` of the stack table."
        )
        raise TypeError(msg)
    if truth.X is None:
        msg = f"`truth.X` is empty; put the layer with log-normalised expression there, one of {sorted(truth.layers)}."
        raise ValueError(msg)
    require_unique(truth.obs_names, name="`truth.obs_names`")
    require_unique(truth.var_names, name="`truth.var_names`")


def _read_truth(table: AnnData, truth: AnnData, genes: list[str], section: str, measured: np.ndarray) -> _Part:
    in_section = (table.obs[Keys.SECTION] == section).to_numpy()
    rows = np.flatnonzero(in_section & ~measured & table.obs_names.isin(truth.obs_names))
    if not len(rows):
        msg = (
            f"`truth` has no unmeasured spot of section {section!r}: `truth.obs_names` are like "
            f"{list(truth.obs_names[:3])}, spots of the stack are named `{{section}}_{{id}}`, like "
            f"{list(table.obs_names[in_section & ~measured][:3])}."
        )
        ids = table.obs[Keys.INSTANCE].astype(str)[in_section & ~measured]
        if ids.isin(truth.obs_names).any():
            msg += f" These are the ids: set `truth.obs_names = [f'{section}_{{i}}' for i in truth.obs_names]`."
        raise KeyError(msg)
    names = table.obs_names[rows]
    true = dense_rows(truth[names, genes].X, np.ones(len(rows), dtype=bool))
    require_finite(true, name="truth.X", row_names=names)
    require_log_values(true, where="truth.X")
    return _Part(rows, true, np.asarray(table.obsm[Keys.SPATIAL], dtype=float)[rows])


def _read_layer(
    table: AnnData, key: str, columns: np.ndarray, parts: dict[str, _Part], where: str, *, profile: np.ndarray
) -> _Layer:
    values = dense_rows(table.layers[key])[:, columns]
    missing = np.isnan(values).all(axis=0)
    if missing.any() and not missing.all():
        logger.warning(
            "%d of %d genes of layer %r are NaN; they count as the mean profile", missing.sum(), len(missing), key
        )
        values = np.where(missing, profile, values)
    sd = dense_rows(table.layers[Keys.sd(key)])[:, columns] if Keys.sd(key) in table.layers else None
    for name, part in parts.items():
        require_finite(values[part.rows], name=f"{where}[{key!r}]", row_names=table.obs_names[part.rows])
        _require_prediction(values[part.rows], part.true, f"`{where}[{key!r}]`", name)
    return _Layer(values, sd)


def _require_prediction(values: np.ndarray, true: np.ndarray, where: str, section: str) -> None:
    """Raise a ``ValueError`` if a layer holds the truth itself: copies and renamed layers have no record that tells."""
    seen = true != 0  # zeros may be predicted by chance
    same = (np.abs(values - true) <= _SAME_VALUE * np.abs(true)) | ~seen
    copied = same.all(axis=1) & (seen.sum(axis=1) >= _LEAST_SEEN)
    if copied.mean() > _MOST_COPIED:
        msg = (
            f"{where} equals `truth` at {int(copied.sum())} of {len(copied)} scored spots of section {section!r}, so it holds their "
            "measurement: it was made when they counted as measured, or is a copy. Impute the layer again, or leave it out."
        )
        raise ValueError(msg)


def _ceilings(
    table: AnnData, truth: AnnData, genes: list[str], parts: dict[str, _Part], layer: str | None
) -> dict[str, np.ndarray]:
    """(n_genes,) noise ceiling on each section; none without counts."""
    if layer is None:
        return {}
    require_key(layer, truth.layers, where="truth.layers")
    columns = truth.var_names.get_indexer(genes)
    found = {}
    for name, part in parts.items():
        counts = dense_rows(truth[table.obs_names[part.rows]].layers[layer], np.ones(len(part.rows), bool))
        if not looks_like_counts(counts) or not np.isfinite(counts).all():
            msg = f"`truth.layers[{layer!r}]` must hold raw counts (whole numbers from 0), found other values."
            raise ValueError(msg)
        found[name] = noise_ceiling(counts, columns, target_sum=target_sum_of(table))
    return found


def _ceiling_scores(layer: _Layer, part: _Part, ceiling: np.ndarray | None) -> dict[str, float]:
    """Mean noise ceiling, and the mean correlation of the same genes divided by it."""
    if ceiling is None:
        return {}
    r = pearson_by_gene(layer.values[part.rows], part.true)
    scored = np.isfinite(r) & np.isfinite(ceiling)
    mean = float(ceiling[scored].mean()) if scored.any() else float("nan")
    return {"ceiling": mean, "of_ceiling": float(r[scored].mean()) / mean if mean > 0 else float("nan")}


def _score(layer: _Layer, part: _Part, profile: np.ndarray) -> dict[str, float]:
    """Scores of some spots; the coverage is NaN for layers without standard deviations."""
    predicted = layer.values[part.rows]
    low, high = bootstrap_interval(pearson_by_gene(predicted, part.true))
    coverage = float("nan") if layer.sd is None else interval_coverage(predicted, layer.sd[part.rows], part.true)
    return summarise(predicted, part.true, profile) | {"low": low, "high": high, "coverage": coverage}


def predictability(
    sdata: SpatialData, *, n_neighs: int = 8, layer: str = Keys.MEASURED, table_key: str = Keys.STACK_TABLE
) -> pd.DataFrame:
    """Agreement of each gene between similar measured spots: a quick look before fitting.

    If spots with a similar image also have similar expression of a gene, the image can predict the gene. If neighboring
    spots have similar expression, the position can predict it. This function only compares each measured spot with its
    nearest neighbors in the same section, and takes about a second. The idea is that of the expression predictability
    score (EPS) of Expression Copilot, but the score is computed differently.

    It is optimistic, because the neighbors of a spot are known here and not on another section.
    ``var["imputation_r"]``, which :func:`~spatial_impute.tl.impute_3d` writes, comes from held-out blocks, and ranks
    genes better. Use this function to choose genes and encoders before a long fit.

    Parameters
    ----------
    sdata
        Registered stack with image features.
    n_neighs
        Number of similar spots to compare a spot with.
    layer
        Layer with log-normalised expression.
    table_key
        Name of the stack table.

    Returns
    -------
    Table with one row per gene, sorted by the higher of both: ``image`` and ``position``, the Pearson correlation of
    the gene with its mean over the spots that are most similar in image features, and over the nearest spots; mean over
    the measured sections. Nothing is written.

    Raises
    ------
    KeyError
        If registration or features are missing.
    ValueError
        If nothing is measured, or no measured section has more than `n_neighs` spots.

    Examples
    --------
    >>> import spatial_impute as si
    >>> si.settings.show_progress_bar = False
    >>> sdata = si.datasets.synthetic_stack(extent=1400.0)
    >>> si.tl.register_stack(sdata)
    >>> si.pp.extract_features(sdata)
    >>> found = si.metrics.predictability(sdata)
    >>> bool(found.loc["smooth_0", "position"] > found.loc["noise_24", "position"])
    True
    >>> si.settings.show_progress_bar = True
    """
    n_neighs = require_count(n_neighs, name="n_neighs")
    table, spots = read_spots(sdata, layer=layer, table_key=table_key, graph=False)
    section = spots.section[spots.known]
    spaces = {"image": spots.features[spots.known], "position": spots.xyz[spots.known, :2]}  # type: ignore[index]
    parts = [section == code for code in np.unique(section) if (section == code).sum() > n_neighs]
    if not parts:
        msg = (
            f"`n_neighs` must be below the number of measured spots of a section, found {n_neighs} for {len(section)}."
        )
        raise ValueError(msg)
    found = {
        name: pd.DataFrame(
            [_agreement(values[part], spots.expression[part], n_neighs) for part in parts], columns=table.var_names
        ).mean()
        for name, values in spaces.items()
    }
    result = pd.DataFrame(found).rename_axis("gene")
    return result.loc[result.max(axis=1).sort_values(ascending=False, kind="stable").index]


def _agreement(space: np.ndarray, expression: np.ndarray, n_neighs: int) -> np.ndarray:
    """(g,) correlation of each gene with its mean over the nearest other spots in a (n, d) space."""
    from sklearn.decomposition import PCA
    from sklearn.neighbors import NearestNeighbors

    if space.shape[1] > _MAX_COMPONENTS and len(space) > _MAX_COMPONENTS:
        space = PCA(_MAX_COMPONENTS, random_state=0).fit_transform(space)
    # Without the spot itself.
    near = NearestNeighbors(n_neighbors=n_neighs).fit(space).kneighbors(return_distance=False)
    mean = sum(expression[near[:, k]] for k in range(n_neighs)) / n_neighs
    r = pearson_by_gene(mean, expression)
    return np.where(np.isfinite(expression).all(axis=0), r, np.nan)
