"""Measured sections of different depth and batch, brought to a common offset and scale."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np

from spatial_impute._keys import Keys
from spatial_impute._settings import logger
from spatial_impute._stack import load_record, table_state, write_slots
from spatial_impute._stack.spots import read_spots
from spatial_impute._validation import require_slot_key

if TYPE_CHECKING:
    from collections.abc import Callable

    from spatialdata import SpatialData

    from spatial_impute.models._spots import Spots


def match_sections(
    sdata: SpatialData,
    *,
    choose: bool = True,
    table_key: str = Keys.STACK_TABLE,
    layer: str = Keys.MEASURED,
    key_added: str = Keys.MATCHED,
) -> None:
    """Bring several measured sections to a common offset and scale of each gene.

    Sections of different depth or batch differ even where the tissue is the same. Each gene of each section gets an
    offset and a scale, estimated at the places that all measured sections cover, and shrunk by their standard error. A
    straight line along z through the sections is kept, so that a real gradient stays. So with two measured sections
    only the scale can be matched, and with three an odd one at the end looks like a gradient.

    Fit and impute with the result: ``si.tl.fit_asign(sdata, layer="matched")``, ``si.tl.impute_3d(sdata, model,
    layer="matched")``.

    Parameters
    ----------
    sdata
        Registered stack with two or more measured sections.
    choose
        Hold out each measured section, predict it by co-kriging (or the kernel, without features) from the others as
        they are and as they are matched among themselves, and keep them as they are unless matching gives the higher
        correlation. This needs three measured sections; of three only the scale is judged. False always matches.
    table_key
        Name of the stack table.
    layer
        Layer with log-normalised expression.
    key_added
        Layer to write.

    Returns
    -------
    ``None``. Writes to `sdata.tables['stack']`:

    `.layers['matched']` : :class:`numpy.ndarray` (``float32``)
        (n_spots, n_genes) matched expression; NaN for unmeasured spots.
    `.varm['matched_shift']`, `.varm['matched_ratio']` : (``float64``)
        (n_genes, n_sections) shift and ratio of spreads of each measured section, in the order of the stack.
    `.uns['matched']` : :class:`dict`
        ``used`` (False if the sections were left as they are), ``sections``, ``n_places`` that they share, the
        correlations ``r_as_measured`` and ``r_matched`` on held-out sections (NaN with ``choose=False``), ``layer``,
        ``version``.

    Raises
    ------
    KeyError
        If the stack is not registered.
    TypeError
        If `choose` is neither True nor False.
    ValueError
        If `key_added` names other data, fewer than two sections are measured, they have different genes, or they share
        too few places.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack(4, measured=["s0", "s1", "s3"])
    >>> si.tl.register_stack(sdata, show_progress_bar=False)
    >>> si.tl.match_sections(sdata, choose=False)
    >>> sdata.tables["stack"].varm["matched_shift"].shape
    (36, 3)
    """
    from spatial_impute.models._match import match_sections as match

    require_slot_key(key_added, name="key_added", taken=(layer, *Keys.NO_RESULT, Keys.ASIGN, Keys.PIXNET))
    if not isinstance(choose, bool):
        msg = f"`choose` must be True or False, found {choose!r}."
        raise TypeError(msg)
    record = load_record(sdata)
    table, spots = read_spots(sdata, table_key=table_key, layer=layer, features=False, graph=False)
    measured = [name for k, name in enumerate(record.names) if (spots.section[spots.known] == k).any()]
    if len(measured) < 2:
        msg = f"Matching needs at least two measured sections, found {measured}. Use `layers[{layer!r}]` as it is."
        raise ValueError(msg)
    if not np.isfinite(spots.expression).all():
        msg = (
            "The sections were measured with different genes. Match those that all have: "
            "`si.pp.select_genes(sdata, join='inner')`."
        )
        raise ValueError(msg)
    found = match(spots)
    scores = (float("nan"), float("nan"))
    if choose:
        if Keys.X_SPOT in table.obsm:
            spots = read_spots(sdata, table_key=table_key, layer=layer, graph=False)[1]
        scores = _held_out_r(spots, lambda left: left), _held_out_r(spots, _matched)
        logger.info("r on held-out sections: %.4f as measured, %.4f matched", *scores)
        if len(measured) == 2:
            logger.warning(
                "Two measured sections cannot show whether matching helps; `choose=False` matches them anyway"
            )
    used = not choose or scores[1] > scores[0]
    values = np.full(table.shape, np.nan, dtype=np.float32)
    values[spots.known] = found.expression if used else spots.expression
    origin = {
        "used": used,
        "sections": measured,
        "n_places": found.n_places,
        "r_as_measured": scores[0],
        "r_matched": scores[1],
        Keys.MATCHED_FROM: layer,
        Keys.STATE: table_state(table, record, layer=layer),
        "version": version("spatial-impute"),
    }
    varm = {f"{key_added}_shift": found.shift.T, f"{key_added}_ratio": found.ratio.T}
    write_slots(table, table_key, {"layers": {key_added: values}, "varm": varm, "uns": {key_added: origin}})


def _matched(spots: Spots) -> Spots:
    """Spots whose measured sections are matched; a single one is left as it is."""
    from spatial_impute.models._match import match_sections as match

    if len(np.unique(spots.section[spots.known])) < 2:
        return spots
    return replace(spots, expression=match(spots).expression)


def _held_out_r(spots: Spots, prepare: Callable[[Spots], Spots]) -> float:
    """Mean correlation of the genes within sections, each predicted from the others, which are prepared without it."""
    from spatial_impute._scores import pearson_by_gene
    from spatial_impute.models.asign._baselines import cokriging, kernel

    method = kernel if spots.features is None else cokriging
    section, scores = spots.section[spots.known], []
    for code in np.unique(section):
        fold = spots.known & (spots.section == code)
        scores.append(pearson_by_gene(method(prepare(spots.hide(fold)))[fold], spots.expression[section == code]))
    return float(np.nanmean(np.nanmean(scores, axis=0)))
