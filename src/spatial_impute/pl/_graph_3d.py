"""The 3D graph: edges of a few spots by type, in 3D or between two sections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D
from mpl_toolkits.mplot3d.art3d import Line3DCollection

from spatial_impute._keys import Keys
from spatial_impute._stack.record import load_record
from spatial_impute._stack.table import stack_table
from spatial_impute._validation import require_finite, require_key, require_one_of
from spatial_impute.pl._imputed import registered_radius
from spatial_impute.pl._space import draw_discs, frame_space, make_space, resolve_stretch, stack_share
from spatial_impute.pl._utils import (
    INK,
    MISSING,
    add_scale_bar,
    draw_circles,
    finish,
    frame_panel,
    make_panels,
    section_title,
    sections_in_z,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes
    from mpl_toolkits.mplot3d import Axes3D
    from scipy import sparse
    from spatialdata import SpatialData

    from spatial_impute._stack.record import Section

# Okabe and Ito: told apart with every kind of colour blindness.
_KINDS = {
    "within": ("same section", "#0072B2"),
    "overlap": ("overlapping", "#D55E00"),
    "near": ("near, no overlap", "#E69F00"),
    "similar": ("look alike", "#009E73"),
}
_GAP = 0.12  # of the width of a section, between two side by side


@dataclass(frozen=True)
class Edges:
    """Undirected edges of a graph, each once."""

    pairs: np.ndarray
    """(n_edges, 2) rows of the table."""
    kind: np.ndarray
    """(n_edges,) one of ``"within"``, ``"overlap"``, ``"near"``, ``"similar"``."""
    weight: np.ndarray
    """(n_edges,) strength."""

    def where(self, rows: np.ndarray) -> Edges:
        return Edges(self.pairs[rows], self.kind[rows], self.weight[rows])


def typed_edges(
    weights: sparse.csr_matrix, overlap: sparse.csr_matrix, similarity: sparse.csr_matrix, section: np.ndarray
) -> Edges:
    """Edges with their type: within a section; else overlapping; else linked because they look alike; else near.

    Parameters
    ----------
    weights, overlap, similarity
        (n, n) symmetric: strength of every edge; overlap (IoU) and cosine of those that have one.
    section
        (n,) section of every spot.

    Examples
    --------
    >>> from scipy import sparse
    >>> link = lambda *ij: sparse.csr_matrix(([1.0] * 2 * len(ij), np.array([*ij, *(e[::-1] for e in ij)]).T), (4, 4))
    >>> edges = typed_edges(link((0, 1), (0, 2), (1, 2), (1, 3)), link((0, 2)), link((1, 3)), np.array([0, 0, 1, 1]))
    >>> edges.kind.tolist()
    ['within', 'overlap', 'near', 'similar']
    """
    from scipy import sparse

    upper = sparse.triu(weights, k=1).tocoo()
    pairs = np.column_stack([upper.row, upper.col])
    kind = np.full(len(pairs), "near", dtype="<U8")
    for matrix, name in ((similarity, "similar"), (overlap, "overlap")):
        kind[_stored(matrix, pairs)] = name
    kind[section[pairs[:, 0]] == section[pairs[:, 1]]] = "within"
    return Edges(pairs, kind, np.asarray(upper.data, dtype=float))


def _stored(matrix: sparse.csr_matrix, pairs: np.ndarray) -> np.ndarray:
    """(n_edges,) bool: pairs that have an entry, zero or not."""
    coo = matrix.tocoo()
    n = matrix.shape[0]
    return np.isin(pairs[:, 0].astype(np.int64) * n + pairs[:, 1], coo.row.astype(np.int64) * n + coo.col)


def graph_3d(
    sdata: SpatialData,
    sections: str | Sequence[str] | None = None,
    *,
    view: str = "3d",
    edges: str | Sequence[str] | None = None,
    n_spots: int | None = 8,
    spots: Sequence[str] | None = None,
    graph_key: str = Keys.SPATIAL_3D,
    table_key: str = Keys.STACK_TABLE,
    z_stretch: float | None = None,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    title: str | None = None,
    save: str | Path | None = None,
    show: bool = False,
    return_ax: bool = False,
) -> np.ndarray | None:
    """Edges of the 3D graph by type, in the common frame: of a few spots in 3D, or between two sections side by side.

    All edges at once hide each other, so those of a few spots are drawn, spread over the tissue of the reference (of
    the first section with ``view="pair"``). Edges are as thick as they are strong. The legend counts those drawn, by
    type: in the same section; between overlapping spots of two sections; between spots that were linked because they
    look alike and do not overlap; between other near spots of two sections.

    Parameters
    ----------
    sdata
        Stack with the graph of :func:`~spatial_impute.tl.build_3d_graph`.
    sections
        Sections to show; all by default, with ``view="pair"`` exactly two.
    view
        ``"3d"``, or ``"pair"``: two sections side by side with the edges that cross from one to the other.
    edges
        Types to draw, of ``"within"``, ``"overlap"``, ``"near"``, ``"similar"``; all by default.
    n_spots
        How many spots to draw the edges of; ``None`` for all.
    spots
        Their names in the stack table instead.
    graph_key, table_key
        Graph and stack table.
    z_stretch
        Factor on z in 3D; by default such that sections stand clear of each other. It is written into the figure.
    ax
        Axes to draw on instead of a new figure: 3D axes for ``view="3d"``.
    figsize
        Size of the figure in inches.
    title
        Title, in place of the default.
    save
        File to save the figure to.
    show
        Call :func:`matplotlib.pyplot.show`.
    return_ax
        Return the axes.

    Returns
    -------
    ``None``, or with ``return_ax=True`` an array with the one :class:`~matplotlib.axes.Axes`.

    Raises
    ------
    KeyError
        If there is no such graph, section or spot, or the stack is not registered.
    ValueError
        For unknown types, for ``view="pair"`` without two sections, or axes that do not fit the view.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack(extent=1400.0, n_genes=9)
    >>> si.tl.register_stack(sdata, method="rigid", show_progress_bar=False)
    >>> si.tl.build_3d_graph(sdata, use_rep=None)
    >>> axes = si.pl.graph_3d(sdata, n_spots=3, return_ax=True)
    >>> len(axes[0].get_legend().get_texts())
    4
    """
    require_one_of(view, ("3d", "pair"), name="view")
    record = load_record(sdata)
    wanted = sections_in_z(record, sections)
    if view == "pair" and (sections is None or len(wanted) != 2):
        msg = f'`view="pair"` needs two `sections` of {list(record.names)}, found {[s.name for s in wanted]}.'
        raise ValueError(msg)
    table = stack_table(sdata, table_key)
    where = f"sdata.tables[{table_key!r}]"
    for name in (Keys.connectivities(graph_key), Keys.graph_overlap(graph_key), Keys.graph_similarity(graph_key)):
        require_key(name, table.obsp, where=f"{where}.obsp", then="Run `si.tl.build_3d_graph(sdata)` first.")
    require_key(Keys.SPATIAL_3D, table.obsm, where=f"{where}.obsm", then="Run `si.tl.register_stack(sdata)` first.")
    xyz = np.asarray(table.obsm[Keys.SPATIAL_3D], dtype=float)
    require_finite(xyz, name=f"{where}.obsm[{Keys.SPATIAL_3D!r}]", row_names=table.obs_names)
    kinds = list(_KINDS) if edges is None else ([edges] if isinstance(edges, str) else list(edges))
    for kind in kinds:
        require_one_of(kind, _KINDS, name="edges")
    if view == "pair":
        kinds = [kind for kind in kinds if kind != "within"]
    if not kinds:
        msg = f"No type of edge is left to draw with `edges={edges!r}` and `view={view!r}`; there are {list(_KINDS)}."
        raise ValueError(msg)

    section = table.obs[Keys.SECTION].astype(str).to_numpy()
    names = [s.name for s in wanted]
    shown = np.isin(section, names)
    start = record.reference if view == "3d" and record.reference in names else names[0]
    chosen = _chosen(table, xyz, shown & (section == start), n_spots, spots)
    if not shown[chosen].all():
        msg = f"`spots` must lie on the sections shown ({names}); {table.obs_names[chosen[~shown[chosen]]][0]!r} does not."
        raise ValueError(msg)
    found = typed_edges(
        table.obsp[Keys.connectivities(graph_key)],
        table.obsp[Keys.graph_overlap(graph_key)],
        table.obsp[Keys.graph_similarity(graph_key)],
        section,
    )
    keep = shown[found.pairs].all(axis=1) & np.isin(found.pairs, chosen).any(axis=1) & np.isin(found.kind, kinds)
    if view == "pair":
        keep &= found.kind != "within"
    found = found.where(keep)
    radius = registered_radius(sdata, record, table)
    axis: Axes
    drawing: dict[str, Any] = {"xyz": xyz, "radius": radius, "chosen": chosen, "edges": found}
    if view == "3d":
        axis = space = make_space(ax, figsize)
        _draw_in_space(space, wanted, table, z_stretch=z_stretch, **drawing)
    else:
        axis = _draw_pair(wanted, table, ax=ax, figsize=figsize, **drawing)
    text = f"edges of {len(chosen)} of {int(shown.sum())} spots" if title is None else title
    axis.set_title(text, fontsize="medium", pad=6 if view == "3d" else 20)
    handles = []
    for kind in kinds:
        label, color = _KINDS[kind]
        handles.append(Line2D([], [], color=color, linewidth=2, label=f"{label} ({int((found.kind == kind).sum())})"))
    axis.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0 if view == "3d" else -0.08),
        ncols=min(len(handles), 4),
        frameon=False,
        fontsize="small",
        handlelength=1.2,
    )
    return finish(np.array([axis], dtype=object), save=save, show=show, return_ax=return_ax)


def _chosen(
    table: AnnData, xyz: np.ndarray, candidates: np.ndarray, n_spots: int | None, spots: Sequence[str] | None
) -> np.ndarray:
    """Rows of the spots whose edges are drawn."""
    if spots is not None:
        for spot in [spots] if isinstance(spots, str) else spots:
            require_key(spot, table.obs_names, where="obs_names of the stack table")
        return table.obs_names.get_indexer([spots] if isinstance(spots, str) else list(spots))
    rows = np.flatnonzero(candidates)
    if n_spots is None or n_spots >= len(rows):
        return rows
    if int(n_spots) < 1:
        msg = f"`n_spots` must be at least 1, found {n_spots!r}."
        raise ValueError(msg)
    # Farthest points, from the one in the middle on: spread over the tissue, and the same every time.
    points = xyz[rows, :2]
    taken = [int(np.argmin(np.linalg.norm(points - points.mean(axis=0), axis=1)))]
    distance = np.full(len(rows), np.inf)
    while len(taken) < int(n_spots):
        distance = np.minimum(distance, np.linalg.norm(points - points[taken[-1]], axis=1))
        taken.append(int(np.argmax(distance)))
    return rows[taken]


def _widths(weight: np.ndarray) -> np.ndarray:
    strongest = weight.max(initial=0.0)
    return 0.5 + 1.5 * weight / strongest if strongest > 0 else np.full(len(weight), 0.5)


def _draw_in_space(
    ax: Axes3D,
    sections: list[Section],
    table: AnnData,
    *,
    xyz: np.ndarray,
    radius: np.ndarray,
    chosen: np.ndarray,
    edges: Edges,
    z_stretch: float | None,
) -> None:
    section = table.obs[Keys.SECTION].astype(str).to_numpy()
    members = {s.name: np.flatnonzero(section == s.name) for s in sections}
    rows = np.concatenate(list(members.values()))
    low, high = xyz[rows, :2].min(axis=0), xyz[rows, :2].max(axis=0)
    for index in members.values():
        draw_discs(ax, xyz[index], 0.6 * radius[index], facecolors=MISSING, edgecolors="none", alpha=0.9)
    if len(edges.pairs):
        colors = [_KINDS[kind][1] for kind in edges.kind]
        lines = Line3DCollection(xyz[edges.pairs], colors=colors, linewidths=_widths(edges.weight))
        ax.add_collection3d(lines, autolim=False)
    draw_discs(ax, xyz[chosen], radius[chosen], facecolors=INK, edgecolors="none")
    flags = table.obs[Keys.MEASURED].to_numpy(dtype=bool)
    measured = [name for name, index in members.items() if flags[index].any()]
    stretch = resolve_stretch(
        z_stretch, (high - low).max(), np.ptp([s.z for s in sections]), share=stack_share(len(sections))
    )
    frame_space(ax, np.array([low, high]), sections, measured=measured, stretch=stretch)


def _draw_pair(
    sections: list[Section],
    table: AnnData,
    *,
    xyz: np.ndarray,
    radius: np.ndarray,
    chosen: np.ndarray,
    edges: Edges,
    ax: Axes | None,
    figsize: tuple[float, float] | None,
) -> Axes:
    section = table.obs[Keys.SECTION].astype(str).to_numpy()
    members = [np.flatnonzero(section == s.name) for s in sections]
    rows = np.concatenate(members)
    margin = radius[rows].max()
    low, high = xyz[rows, :2].min(axis=0) - margin, xyz[rows, :2].max(axis=0) + margin
    width = high[0] - low[0]
    shift = (1 + _GAP) * width
    place = xyz[:, :2].copy()
    place[members[1], 0] += shift
    axis = make_panels(
        1,
        1,
        aspect=(high - low)[1] / (width + shift),
        ax=ax,
        figsize=figsize or (9.0, 9.0 * (high - low)[1] / (width + shift) + 0.8),
    )[0]
    frame_panel(axis, (low[0], low[1], high[0] + shift, high[1]))
    linked = np.unique(edges.pairs)
    for index in members:
        draw_circles(axis, place[index], radius[index], facecolors=MISSING, edgecolors="none")
    if len(edges.pairs):
        colors = [_KINDS[kind][1] for kind in edges.kind]
        lines = LineCollection(place[edges.pairs], colors=colors, linewidths=_widths(edges.weight))
        axis.add_collection(lines, autolim=False)
        other = np.setdiff1d(linked, chosen)
        draw_circles(axis, place[other], 0.6 * radius[other], facecolors="0.5", edgecolors="none", zorder=3)
    draw_circles(axis, place[chosen], radius[chosen], facecolors=INK, edgecolors="none", zorder=3)
    flags = table.obs[Keys.MEASURED].to_numpy(dtype=bool)
    for k, (s, index) in enumerate(zip(sections, members, strict=True)):
        head = section_title(s, measured=bool(flags[index].any()))
        axis.text(low[0] + k * shift + width / 2, low[1], head, ha="center", va="bottom", fontsize="small")
    add_scale_bar(axis)
    return axis
