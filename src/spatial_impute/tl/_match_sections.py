"""Measured sections of different depth and batch, brought to a common offset and scale of each gene."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse
from scipy.spatial import cKDTree

from spatial_impute._keys import Keys
from spatial_impute._settings import logger
from spatial_impute._stack.record import load_record
from spatial_impute._stack.spots import read_spots
from spatial_impute._stack.state import table_state
from spatial_impute._stack.table import measured_ids, write_slots
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
    linear trend along z is not removed, because it may be a real gradient. So with two measured sections only the scale
    can be matched. With three, a section at the end that differs from the others looks like a gradient.

    Fit and impute with the result: ``si.tl.fit_asign(sdata, layer="matched")``, ``si.tl.impute_3d(sdata, model,
    layer="matched")``.

    Parameters
    ----------
    sdata
        Registered stack with two or more measured sections.
    choose
        Match only if this predicts better. Each measured section is held out once and predicted from the others by
        co-kriging (without features by the kernel), with and without matching of the others. If matching does not give
        the higher correlation, all sections keep their values. This needs three measured sections; with three, only the
        scale is tested. False always matches.
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
        ``used`` (False if the sections keep their values), ``sections``, ``n_places`` that they share, the correlations
        ``r_as_measured`` and ``r_matched`` on held-out sections (NaN with ``choose=False``), ``layer``,
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
    >>> sdata = si.datasets.synthetic_stack(extent=1400.0, measured=["s1", "s2"])
    >>> si.tl.register_stack(sdata, show_progress_bar=False)
    >>> si.tl.match_sections(sdata, choose=False)
    >>> sdata.tables["stack"].varm["matched_shift"].shape
    (36, 2)
    """
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
    found = match_measured(spots)
    scores = (float("nan"), float("nan"))
    if choose:
        if Keys.X_SPOT in table.obsm:
            spots = read_spots(sdata, table_key=table_key, layer=layer, graph=False)[1]
        scores = _held_out_r(spots, lambda left: left), _held_out_r(spots, _matched)
        if len(measured) == 2:
            logger.warning(
                "Two measured sections cannot show whether matching helps, so they keep their values; `choose=False` "
                "matches them anyway"
            )
        else:
            logger.info("r on held-out sections: %.4f as measured, %.4f matched", *scores)
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
        Keys.MEASURED_IDS: measured_ids(table),
        Keys.STATE: table_state(table, record, layer=layer),
        "version": version("spatial-impute"),
    }
    varm = {f"{key_added}_shift": found.shift.T, f"{key_added}_ratio": found.ratio.T}
    write_slots(table, table_key, {"layers": {key_added: values}, "varm": varm, "uns": {key_added: origin}})


def _matched(spots: Spots) -> Spots:
    """Spots whose measured sections are matched; a single one is left as it is."""
    single = len(np.unique(spots.section[spots.known])) < 2
    return spots if single else replace(spots, expression=match_measured(spots).expression)


def _held_out_r(spots: Spots, prepare: Callable[[Spots], Spots]) -> float:
    """Mean correlation of the genes within sections, each predicted from the others, which are prepared without it."""
    from spatial_impute._scores import pearson_by_gene
    from spatial_impute.models.asign._baselines import METHODS

    fit = METHODS["kernel" if spots.features is None else "cokriging"]
    section, scores = spots.section[spots.known], []
    for code in np.unique(section):
        fold = spots.known & (spots.section == code)
        predicted = fit(prepare(spots.hide(fold))).expression(fold)
        scores.append(pearson_by_gene(predicted, spots.expression[section == code]))
    return float(np.nanmean(np.nanmean(scores, axis=0)))


_REACH = 1.5  # spot spacings: a section covers a place if it has a spot that near
_WIDTH = 1.0  # spot spacings; of the kernel that smooths a section, so that counting noise has less weight
_CUT = 3.0  # widths of the kernel
_BLOCK = 2.0  # spot spacings; of blocks that are left out to see how sure an estimate is
_LEAST_BLOCKS = 5
_MOST_RATIO = 4.0  # of spreads


@dataclass(frozen=True)
class Match:
    """Result of :func:`match_measured`; rows are the measured sections in ascending order."""

    expression: np.ndarray  # (n_known, g)
    shift: np.ndarray  # (s, g) offset of a section from the others, without a linear trend along z
    ratio: np.ndarray  # (s, g) spread of a section over that of the others
    n_places: int  # that all sections share


def match_measured(spots: Spots) -> Match:
    """Bring the measured sections to a common offset and scale of each gene.

    All sections are smoothed and read at the places that all of them cover. A straight line along z through their means
    is kept, so that a real gradient stays. The shift of a section is its distance from this line (Theil-Sen, so that one
    odd section does not tilt it). Estimates are shrunk by their standard error: blocks of places are left out in turn. Raises a
    ``ValueError`` if sections share too few places.
    """
    known = np.flatnonzero(spots.known)
    section, plane = spots.section[known], spots.xyz[known, :2]
    codes = np.unique(section)
    z = np.array([np.median(spots.xyz[known[section == code], 2]) for code in codes])
    trees = [cKDTree(plane[section == code]) for code in codes]
    shared = np.all([tree.query(plane)[0] <= _REACH * spots.spacing for tree in trees], axis=0)
    places = plane[shared]
    block = np.unique(
        np.floor((places - places.min(axis=0, initial=np.inf)) / (_BLOCK * spots.spacing)), axis=0, return_inverse=True
    )[1].ravel()
    n_blocks = int(block.max(initial=-1)) + 1
    if n_blocks < _LEAST_BLOCKS:
        msg = (
            f"The measured sections share only {len(places)} places ({n_blocks} blocks of {_BLOCK:g} spot spacings, at least "
            f"{_LEAST_BLOCKS} are needed), so their offsets cannot be distinguished from differences of the tissue."
        )
        raise ValueError(msg)
    fields = [
        _smooth(tree, spots.expression[section == code], places, _WIDTH * spots.spacing)
        for tree, code in zip(trees, codes, strict=True)
    ]
    # Sums by block suffice to leave out each of them: (blocks,) places, (blocks, s, g) values and squares.
    members = np.eye(n_blocks)[block]
    values = np.stack([members.T @ f for f in fields], axis=1)
    squares = np.stack([members.T @ f**2 for f in fields], axis=1)
    sums = members.sum(axis=0), values, squares
    whole = [part.sum(axis=0) for part in sums]
    everything = _estimate(*whole, z=z)
    left = [
        _estimate(*(total - part[k] for total, part in zip(whole, sums, strict=True)), z=z) for k in range(n_blocks)
    ]
    shift, log_ratio = (_shrink(whole, np.stack([part[i] for part in left])) for i, whole in enumerate(everything[:2]))
    ratio = np.exp(np.clip(log_ratio, -np.log(_MOST_RATIO), np.log(_MOST_RATIO)))
    row = np.searchsorted(codes, section)
    centre = everything[2][row]
    return Match((spots.expression - centre) / ratio[row] + centre - shift[row], shift, ratio, len(places))


def _smooth(tree: cKDTree, values: np.ndarray, places: np.ndarray, width: float) -> np.ndarray:
    """(n_places, g) mean of the spots of a section, weighted by a Gaussian of distance."""
    near = cKDTree(places).sparse_distance_matrix(tree, _CUT * width, output_type="coo_matrix")
    weight = np.exp(-0.5 * (near.data / width) ** 2)
    matrix = sparse.csr_matrix((weight, (near.row, near.col)), shape=near.shape)
    return (matrix @ values) / np.asarray(matrix.sum(axis=1))


def _estimate(
    count: np.ndarray, first: np.ndarray, second: np.ndarray, *, z: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(s, g) shift, log ratio of spreads, and mean of each section, from sums over places."""
    mean = first / count
    spread = 0.5 * np.log(np.maximum(second / count - mean**2, 1e-12))
    later, earlier = np.triu_indices(len(z), k=1)[::-1]
    slope = np.median((mean[later] - mean[earlier]) / (z[later] - z[earlier])[:, None], axis=0)
    line = mean - slope * z[:, None]
    return line - np.median(line, axis=0), spread - np.median(spread, axis=0), mean


def _shrink(whole: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Estimates times the share of their square that is not error; `left` (k, s, g) are those without a block each."""
    k = len(left)
    error = (k - 1) / k * ((left - left.mean(axis=0)) ** 2).sum(axis=0)
    return whole * np.maximum(1 - error / np.maximum(whole**2, 1e-300), 0.0)
