"""Quick look at which genes can be predicted, before anything is fitted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from spatial_impute._keys import Keys
from spatial_impute._scores import pearson_by_gene
from spatial_impute._stack.spots import read_spots
from spatial_impute._validation import require_count

if TYPE_CHECKING:
    from spatialdata import SpatialData

_MAX_COMPONENTS = 50  # of the features: enough to tell spots apart, few enough to find neighbors fast


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
    >>> sdata = si.datasets.synthetic_stack()
    >>> si.tl.register_stack(sdata, method="rigid")
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
            f"`n_neighs` must be below the number of measured spots of a section, found {n_neighs} for {len(section)} "
            "spots."
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
    near = (
        NearestNeighbors(n_neighbors=n_neighs).fit(space).kneighbors(return_distance=False)
    )  # without the spot itself
    mean = sum(expression[near[:, k]] for k in range(n_neighs)) / n_neighs
    r = pearson_by_gene(mean, expression)
    return np.where(np.isfinite(expression).all(axis=0), r, np.nan)
