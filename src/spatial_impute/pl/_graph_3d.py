"""Edges of the 3D graph by type, in 3D or between two sections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D
from mpl_toolkits.mplot3d.art3d import Line3DCollection
from scipy import sparse

from spatial_impute._keys import Keys
from spatial_impute._stack.elements import registered_radius
from spatial_impute._stack.record import load_record
from spatial_impute._stack.state import warn_if_old
from spatial_impute._stack.table import registered_spots, stack_table
from spatial_impute._validation import name_list, require_count, require_key, require_one_of
from spatial_impute.pl._figure import (
    INK,
    MISSING,
    add_scale_bar,
    document_figure,
    draw_circles,
    draw_discs,
    finish,
    frame_panel,
    frame_space,
    legend_below,
    make_panels,
    make_space,
    resolve_stretch,
    rows_by_section,
    section_title,
    sections_in_z,
    stack_share,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from mpl_toolkits.mplot3d import Axes3D
    from spatialdata import SpatialData

    from spatial_impute._stack.record import Section

# Okabe and Ito: readers with any kind of color blindness can tell them apart.
_KINDS = {
    "within": ("same section", "#0072B2"),
    "overlap": ("overlapping", "#D55E00"),
    "near": ("near, no overlap", "#E69F00"),
    "similar": ("look alike", "#009E73"),
}
_GAP = 0.12  # of the width of a section, between two side by side


@dataclass(frozen=True)
class _Scene:
    """Spots and edges to draw, in the common frame."""

    sections: list[Section]
    members: list[np.ndarray]  # Rows of the spots of each section
    measured: list[bool]
    xyz: np.ndarray
    radius: np.ndarray
    chosen: np.ndarray  # Rows of the spots whose edges are drawn
    edges: Edges

    def box(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest x, y of the centers, um."""
        points = self.xyz[np.concatenate(self.members), :2]
        return points.min(axis=0), points.max(axis=0)


@dataclass(frozen=True)
class Edges:
    """Undirected edges of a graph, each once."""

    pairs: np.ndarray  # (n_edges, 2) rows of the table
    kind: np.ndarray  # (n_edges,) one of ``"within"``, ``"overlap"``, ``"near"``, ``"similar"``
    weight: np.ndarray  # (n_edges,) strength


def typed_edges(
    weights: sparse.csr_matrix, overlap: sparse.csr_matrix, similarity: sparse.csr_matrix, section: np.ndarray
) -> Edges:
    """Edges with their type: within a section, else overlap, else similar image features, else near.

    All matrices are (n, n) and symmetric. Each edge has a weight; some have an overlap (IoU) or a similarity (cosine).
    `section` is the (n,) section of each spot.

    Examples
    --------
    >>> from scipy import sparse
    >>> link = lambda *ij: sparse.csr_matrix(([1.0] * 2 * len(ij), np.array([*ij, *(e[::-1] for e in ij)]).T), (4, 4))
    >>> edges = typed_edges(link((0, 1), (0, 2), (1, 2), (1, 3)), link((0, 2)), link((1, 3)), np.array([0, 0, 1, 1]))
    >>> edges.kind.tolist()
    ['within', 'overlap', 'near', 'similar']
    """
    upper = sparse.triu(weights, k=1).tocoo()
    pairs = np.column_stack([upper.row, upper.col])
    kind, n = np.full(len(pairs), "near", dtype="<U8"), weights.shape[0]
    for matrix, name in ((similarity, "similar"), (overlap, "overlap")):
        stored = matrix.tocoo()  # entries count, zero or not
        entries = stored.row.astype(np.int64) * n + stored.col
        kind[np.isin(pairs[:, 0].astype(np.int64) * n + pairs[:, 1], entries)] = name
    kind[section[pairs[:, 0]] == section[pairs[:, 1]]] = "within"
    return Edges(pairs, kind, np.asarray(upper.data, dtype=float))


@document_figure
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
    show: bool | None = None,
    return_ax: bool = False,
) -> np.ndarray | None:
    """Edges of the 3D graph by type in the common frame, in 3D or between two sections side by side.

    All edges at once would hide each other. So the figure shows the edges of a few spots, spread over the tissue of the
    reference (of the first section with ``view="pair"``). A strong edge is thick. The legend counts the edges shown:
    within a section, between overlapping spots of two sections, between spots with similar image features that do not
    overlap, and between other near spots of two sections.

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
        Number of spots whose edges are drawn; ``None`` for all.
    spots
        Names of these spots in the stack table, instead of `n_spots`.
    graph_key
        Name of the graph, the ``key_added`` of :func:`~spatial_impute.tl.build_3d_graph`.
    table_key
        Name of the stack table in ``sdata.tables``.
    z_stretch
        Factor on z in 3D. The default separates the sections. The figure states the factor.
    ax
        Axes to draw on instead of a new figure: 3D axes for ``view="3d"``.
    title
        Title instead of the default.

    Returns
    -------
    ``None``, or with ``return_ax=True`` an array with the one :class:`~matplotlib.axes.Axes`.

    Raises
    ------
    KeyError
        If a graph, section or spot does not exist, or the stack is not registered.
    ValueError
        For unknown types, for ``view="pair"`` without two sections, or axes that do not fit the view.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack(extent=1400.0)
    >>> si.tl.register_stack(sdata, show_progress_bar=False)
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
    found = _read_edges(table, graph_key, table_key)
    warn_if_old(sdata, table, graphs=[graph_key])
    xyz = registered_spots(table, table_key)
    kinds = _wanted_kinds(edges, view)
    section = table.obs[Keys.SECTION].astype(str).to_numpy()
    names = [s.name for s in wanted]
    shown = np.isin(section, names)
    start = record.reference if view == "3d" and record.reference in names else names[0]
    if spots is None:
        chosen = _spread(xyz, np.flatnonzero(shown & (section == start)), n_spots)
    else:
        chosen = _named(table, name_list(spots, name="spots"), shown, names)
    drawn = shown[found.pairs].all(axis=1) & np.isin(found.pairs, chosen).any(axis=1) & np.isin(found.kind, kinds)
    found = Edges(found.pairs[drawn], found.kind[drawn], found.weight[drawn])
    scene = _Scene(wanted, *rows_by_section(table, wanted), xyz, registered_radius(sdata, record, table), chosen, found)
    axis = _draw_in_space(scene, make_space(ax, figsize), z_stretch) if view == "3d" else _draw_pair(scene, ax, figsize)
    text = f"edges of {len(chosen)} of {int(shown.sum())} spots" if title is None else title
    axis.set_title(text, fontsize="medium", pad=6 if view == "3d" else 20)
    texts = {kind: f"{_KINDS[kind][0]} ({int((found.kind == kind).sum())})" for kind in kinds}
    handles: list[Artist] = [Line2D([], [], color=_KINDS[k][1], linewidth=2, label=text) for k, text in texts.items()]
    legend_below(axis, handles, y=0.0 if view == "3d" else -0.08, n_columns=min(len(handles), 4), handlelength=1.2)
    return finish(np.array([axis], dtype=object), ax=ax, save=save, show=show, return_ax=return_ax)


def _read_edges(table: AnnData, graph_key: str, table_key: str) -> Edges:
    """Edges of a graph with their types."""
    keys = (Keys.connectivities(graph_key), Keys.graph_overlap(graph_key), Keys.graph_similarity(graph_key))
    for key in keys:
        where = f"sdata.tables[{table_key!r}].obsp"
        require_key(key, table.obsp, where=where, then="Run `si.tl.build_3d_graph(sdata)` first.")
    weights, overlap, similarity = (table.obsp[key] for key in keys)
    return typed_edges(weights, overlap, similarity, table.obs[Keys.SECTION].astype(str).to_numpy())


def _wanted_kinds(edges: str | Sequence[str] | None, view: str) -> list[str]:
    """Types of edges to draw."""
    kinds = list(_KINDS) if edges is None else name_list(edges, name="edges")
    for kind in kinds:
        require_one_of(kind, _KINDS, name="edges")
    kinds = [kind for kind in kinds if view == "3d" or kind != "within"]
    if not kinds:
        msg = f"No type of edge is left to draw with `edges={edges!r}` and `view={view!r}`; types are {list(_KINDS)}."
        raise ValueError(msg)
    return kinds


def _named(table: AnnData, spots: list[str], shown: np.ndarray, sections: list[str]) -> np.ndarray:
    """Rows of the spots with these names."""
    for spot in spots:
        require_key(spot, table.obs_names, where="obs_names of the stack table")
    rows = table.obs_names.get_indexer(spots)
    if not shown[rows].all():
        off = table.obs_names[rows[~shown[rows]]][0]
        msg = f"`spots` must lie on the sections shown ({sections}); {off!r} does not."
        raise ValueError(msg)
    return rows


def _spread(xyz: np.ndarray, rows: np.ndarray, n_spots: int | None) -> np.ndarray:
    """Rows of `n_spots` spots spread over the tissue: farthest points, starting in the middle."""
    if n_spots is None or require_count(n_spots, name="n_spots") >= len(rows):
        return rows
    points = xyz[rows, :2]
    taken = [int(np.argmin(np.linalg.norm(points - points.mean(axis=0), axis=1)))]
    distance = np.full(len(rows), np.inf)
    while len(taken) < n_spots:
        distance = np.minimum(distance, np.linalg.norm(points - points[taken[-1]], axis=1))
        taken.append(int(np.argmax(distance)))
    return rows[taken]


def _line_style(edges: Edges) -> dict[str, Any]:
    strongest = edges.weight.max(initial=0.0)
    widths = 0.5 + 1.5 * edges.weight / strongest if strongest > 0 else np.full(len(edges.weight), 0.5)
    return {"colors": [_KINDS[kind][1] for kind in edges.kind], "linewidths": widths}


def _draw_in_space(scene: _Scene, ax: Axes3D, z_stretch: float | None) -> Axes3D:
    xyz, radius = scene.xyz, scene.radius
    for index in scene.members:
        draw_discs(ax, xyz[index], 0.6 * radius[index], facecolors=MISSING, edgecolors="none", alpha=0.9)
    if len(scene.edges.pairs):
        ax.add_collection3d(Line3DCollection(xyz[scene.edges.pairs], **_line_style(scene.edges)), autolim=False)
    draw_discs(ax, xyz[scene.chosen], radius[scene.chosen], facecolors=INK, edgecolors="none")
    low, high = scene.box()
    height = float(np.ptp([s.z for s in scene.sections]))
    stretch = resolve_stretch(z_stretch, (high - low).max(), height, share=stack_share(len(scene.sections)))
    names = [s.name for s, flag in zip(scene.sections, scene.measured, strict=True) if flag]
    frame_space(ax, np.array([low, high]), scene.sections, measured=names, stretch=stretch)
    return ax


def _draw_pair(scene: _Scene, ax: Axes | None, figsize: tuple[float, float] | None) -> Axes:
    radius, edges, chosen = scene.radius, scene.edges, scene.chosen
    margin = radius[np.concatenate(scene.members)].max()
    low, high = scene.box()
    low, high = low - margin, high + margin
    width = high[0] - low[0]
    shift = (1 + _GAP) * width
    place = scene.xyz[:, :2].copy()
    place[scene.members[1], 0] += shift
    aspect = (high - low)[1] / (width + shift)
    axis = make_panels(1, 1, aspect=aspect, ax=ax, figsize=figsize or (9.0, 9.0 * aspect + 0.8))[0]
    frame_panel(axis, (low[0], low[1], high[0] + shift, high[1]))
    for index in scene.members:
        draw_circles(axis, place[index], radius[index], facecolors=MISSING, edgecolors="none")
    if len(edges.pairs):
        axis.add_collection(LineCollection(place[edges.pairs], **_line_style(edges)), autolim=False)
        other = np.setdiff1d(np.unique(edges.pairs), chosen)
        draw_circles(axis, place[other], 0.6 * radius[other], facecolors="0.5", edgecolors="none", zorder=3)
    draw_circles(axis, place[chosen], radius[chosen], facecolors=INK, edgecolors="none", zorder=3)
    for k, (section, flag) in enumerate(zip(scene.sections, scene.measured, strict=True)):
        head = section_title(section, measured=flag)
        axis.text(low[0] + k * shift + width / 2, low[1], head, ha="center", va="bottom", fontsize="small")
    add_scale_bar(axis)
    return axis
