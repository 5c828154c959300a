"""Compare imputed layers with the truth, section by section."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from spatial_impute._expression import require_log_values
from spatial_impute._keys import Keys
from spatial_impute._scores import bootstrap_interval, interval_coverage, pearson_by_gene, summarise
from spatial_impute._stack.table import measured_mask, stack_table
from spatial_impute._validation import name_list, require_finite, require_key, require_one_of
from spatial_impute.metrics._spatial import moran_gap, structural_similarity

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from spatialdata import SpatialData


def evaluate(
    sdata: SpatialData,
    truth: AnnData,
    *,
    layers: str | Sequence[str] | None = None,
    sections: Sequence[str] | None = None,
    by: str = "layer",
    table_key: str = Keys.STACK_TABLE,
) -> pd.DataFrame:
    """Score imputed layers on spots that were not measured.

    The headline is ``pearson_gene``: the correlation of a gene across the spots of a section, mean over genes. The
    correlation across genes within a spot (``pearson_spot``) stands beside it for comparison with publications; alone
    it says nothing, since the mean profile of the measured section already scores high on it.

    Parameters
    ----------
    sdata
        Stack with imputed layers.
    truth
        Log-normalised expression in ``X`` with ``obs_names`` and ``var_names`` as in the stack table; spots and genes
        it lacks are left out.
    layers
        Layers to score; by default all but ``"measured"`` and standard deviations.
    sections
        Sections to score; by default all on which nothing was measured.
    by
        ``"layer"``: one row per layer, the mean over sections. ``"section"``: one row per layer and section.
        ``"pooled"``: one row per layer, all spots together, so that differences between sections count as well.
        ``"gene"``: Pearson correlation per gene (rows) and layer (columns), the mean over sections.
    table_key
        Stack table.

    Returns
    -------
    Scores: ``pearson_gene`` and its ``_median``, first quartile ``_q1`` and ``_positive`` share; ``pearson_spot``;
    ``mse``; ``mae``; ``skill`` = 1 - mse / mse of the mean profile of the measured spots; ``n_spots``; ``n_genes``;
    ``low`` and ``high``, the 95 % interval of ``pearson_gene`` by bootstrap over genes; ``moran_gap``, Moran's I of the
    prediction minus that of the truth (above 0: smoother), and ``ssim``, structural similarity on the lattice of the
    spots, both within sections and not for ``"pooled"``; ``coverage``, the share of the truth within the 90 % intervals
    of layers that have them (``layers["asign_sd"]``), which are for measurements of the depth in
    ``obs["imputation_depth"]``. Genes whose truth is constant on a section cannot be scored
    there and are left out of its mean; ``n_genes`` counts the others. A constant prediction scores 0.

    Raises
    ------
    KeyError
        For layers or sections that do not exist, or if no spot or gene is shared with the truth.
    ValueError
        If the truth holds raw counts, or nothing in ``X``.
    TypeError
        If the truth is no AnnData.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata, truth = si.datasets.synthetic_stack(truth=True)
    >>> si.tl.register_stack(sdata, show_progress_bar=False)
    >>> for method in ("mean", "kernel"):
    ...     si.tl.impute_baseline(sdata, method)
    >>> scores = si.metrics.evaluate(sdata, truth)
    >>> bool(scores.loc["baseline_kernel", "pearson_gene"] > scores.loc["baseline_mean", "pearson_gene"])
    True
    """
    table = stack_table(sdata, table_key)
    require_one_of(by, ("gene", "layer", "pooled", "section"), name="by")
    wanted = name_list(layers, name="layers")
    if layers is None:
        wanted = [key for key in table.layers if key != Keys.MEASURED and not key.endswith(Keys.sd(""))]
    for key in wanted:
        require_key(key, table.layers, where=f"sdata.tables[{table_key!r}].layers")
    if not wanted:
        msg = (
            f"`sdata.tables[{table_key!r}].layers` holds nothing but the measurement. Run `si.tl.impute_baseline(sdata)` "
            "or `si.tl.impute_3d(sdata, model)` first."
        )
        raise ValueError(msg)
    measured = measured_mask(table)
    profile = _mean_profile(table, measured)
    section = table.obs[Keys.SECTION].astype(str).to_numpy()
    names = list(table.obs[Keys.SECTION].cat.categories)
    if sections is None:
        sections = [name for name in names if not measured[section == name].any() and (section == name).any()]
    sections = name_list(sections, name="sections")
    for name in sections:
        require_key(name, names, where="the stack's sections")
    if not len(sections):
        msg = "Something was measured on every section, so none is scored by default; name some with `sections=`."
        raise ValueError(msg)
    _require_values(truth)
    for slot, names_of in {"obs_names": truth.obs_names, "var_names": truth.var_names}.items():
        if not names_of.is_unique:
            msg = f"`truth.{slot}` must be unique, but {names_of[names_of.duplicated()][0]!r} is there more than once."
            raise ValueError(msg)
    genes = [gene for gene in table.var_names if gene in truth.var_names]
    if not genes:
        msg = (
            f"The truth shares no gene with the stack (e.g. {list(table.var_names[:3])}, {list(truth.var_names[:3])})."
        )
        raise KeyError(msg)
    columns = table.var_names.get_indexer(genes)
    xy = np.asarray(table.obsm[Keys.SPATIAL], dtype=float)
    rows, scores, spots_of, true_of = [], [], [], []
    by_gene: dict[str, list[np.ndarray]] = {key: [] for key in wanted}
    for name in sections:
        spots = np.flatnonzero((section == name) & ~measured & table.obs_names.isin(truth.obs_names))
        if not len(spots):
            msg = (
                f"The truth has no unmeasured spot of section {name!r}; its spots are named like {truth.obs_names[:3]}."
            )
            raise KeyError(msg)
        true = truth[table.obs_names[spots], genes].X
        true = np.asarray(true.toarray() if hasattr(true, "toarray") else true, dtype=float)
        require_finite(true, name="truth.X", row_names=table.obs_names[spots])
        require_log_values(true, where="truth.X")
        spots_of.append(spots)
        true_of.append(true)
    for key in wanted:
        values = np.asarray(table.layers[key], dtype=float)[:, columns]
        sd = np.asarray(table.layers[Keys.sd(key)], dtype=float)[:, columns] if Keys.sd(key) in table.layers else None
        for spots in spots_of:
            require_finite(
                values[spots], name=f"sdata.tables[{table_key!r}].layers[{key!r}]", row_names=table.obs_names[spots]
            )
        if by == "pooled":
            spots, true = np.concatenate(spots_of), np.concatenate(true_of)
            scores.append(_score(values, sd, spots, true, profile[columns]))
            continue
        for name, spots, true in zip(sections, spots_of, true_of, strict=True):
            if by == "gene":
                by_gene[key].append(pearson_by_gene(values[spots], true))
                continue
            rows.append((key, name))
            spatial = {
                "moran_gap": moran_gap(values[spots], true, xy[spots]),
                "ssim": structural_similarity(values[spots], true, xy[spots]),
            }
            scores.append(_score(values, sd, spots, true, profile[columns]) | spatial)
    if by == "gene":
        means = {key: pd.DataFrame(values).mean().to_numpy() for key, values in by_gene.items()}
        return pd.DataFrame(means, index=pd.Index(genes, name="gene"))
    if by == "pooled":
        return pd.DataFrame(scores, index=pd.Index(wanted, name="layer"))
    result = pd.DataFrame(scores, index=pd.MultiIndex.from_tuples(rows, names=["layer", "section"]))
    return result if by == "section" else result.groupby(level="layer", sort=False).mean()


def _require_values(truth: object) -> None:
    """Raise unless the truth is an AnnData with values in ``X``."""
    for slot in ("X", "layers", "obs_names", "var_names"):
        if not hasattr(truth, slot):
            msg = (
                f"`truth` must be an AnnData with log-normalised expression in `X`, found {type(truth).__name__}. Make one "
                "with `AnnData(values)`, whose `obs_names` and `var_names` are those of the stack table."
            )
            raise TypeError(msg)
    if truth.X is None:  # type: ignore[attr-defined]
        found = sorted(truth.layers)  # type: ignore[attr-defined]
        msg = f"`truth.X` is empty; put the layer with log-normalised expression there (one of {found})."
        raise ValueError(msg)


def _score(
    values: np.ndarray, sd: np.ndarray | None, spots: np.ndarray, true: np.ndarray, profile: np.ndarray
) -> dict[str, float]:
    """Scores of some spots; the coverage is NaN for layers without standard deviations."""
    predicted = values[spots]
    low, high = bootstrap_interval(pearson_by_gene(predicted, true))
    coverage = float("nan") if sd is None else interval_coverage(predicted, sd[spots], true)
    return summarise(predicted, true, profile) | {"low": low, "high": high, "coverage": coverage}


def _mean_profile(table: AnnData, measured: np.ndarray) -> np.ndarray:
    """(g,) mean of the spots that a gene was measured on."""
    return np.nanmean(np.asarray(table.layers[Keys.MEASURED][measured], dtype=float), axis=0)
