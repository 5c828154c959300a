from __future__ import annotations

import numpy as np
import pytest
from matplotlib import pyplot as plt
from mpl_toolkits.axes_grid1.anchored_artists import AnchoredSizeBar

import spatial_impute as si
from spatial_impute.pl._color import color_limits
from spatial_impute.pl._figure import add_scale_bar, frame_panel, nice_length


def test_pl_exports():
    plots = ["dense", "gene_overview", "gene_report", "graph_3d", "imputed", "metrics", "place_by_hand"]
    everything = [*plots, "registration", "registration_page", "stack", "training", "volume"]
    assert si.pl.__all__ == sorted(si.pl.__all__) == everything


@pytest.mark.parametrize(("span", "length"), [(800, 500), (500, 500), (499, 200), (10, 10), (1999, 1000), (0.03, 0.02)])
def test_nice_length(span, length):
    assert nice_length(span) == pytest.approx(length)


def test_scale_bar_is_as_long_as_it_says():
    _, ax = plt.subplots()
    frame_panel(ax, (0, 0, 2400, 1200))
    add_scale_bar(ax)
    (bar,) = (artist for artist in ax.artists if isinstance(artist, AnchoredSizeBar))
    assert bar.txt_label.get_text() == "500 µm"
    (line,) = bar.size_bar.get_children()
    assert line.get_width() == 500


def test_color_limits_ignore_missing_values():
    norm = color_limits(np.array([np.nan, 0.0, 1.0, 2.0, np.inf]), None, "p50")
    assert (norm.vmin, norm.vmax) == (0, 1)


def test_color_limits_of_constant_and_empty_values():
    assert color_limits(np.full(3, 2.0), None, None).vmax == 3
    norm = color_limits(np.full(3, np.nan), "p1", "p99")
    assert norm.vmin < norm.vmax


def test_plots_set_nothing_global(plot_stack):
    before = dict(plt.rcParams)
    si.pl.stack(plot_stack, sections="s1")
    assert dict(plt.rcParams) == before
