from __future__ import annotations

import builtins

import numpy as np
import pytest
from matplotlib import pyplot as plt

import spatial_impute as si

GENES = ["smooth_0", "texture_12"]


def test_volume_panels_share_edges_and_scale(plot_stack):
    axes = si.pl.volume(plot_stack, GENES, return_ax=True)
    assert axes.shape == (2, 3)
    for gene, (along, across_x, across_y) in zip(GENES, axes, strict=True):
        r = plot_stack.tables["stack"].var.loc[gene, "imputation_r"]
        assert along.get_title() == f"{gene}, r = {r:.2f}"
        assert along.get_xlim() == across_y.get_xlim()
        assert along.get_ylim() == across_x.get_ylim()
        assert across_x.get_xlim() == across_y.get_ylim()[::-1]  # z to the right, and down
        stretch = across_y.get_aspect()
        assert stretch == pytest.approx(1 / across_x.get_aspect())
        assert across_y.get_ylabel() == f"z, × {stretch:g}"
        assert [label.get_text() for label in across_y.get_yticklabels()] == ["s0", "s1", "s2"]
        assert [label.get_fontweight() for label in across_y.get_yticklabels()] == ["normal", "bold", "normal"]
        assert list(across_y.get_yticks()) == [0, 20, 40]
        assert len({panel.images[0].get_clim() for panel in (along, across_x, across_y)}) == 1


def test_volume_shows_the_values_of_the_section_at_its_height(plot_stack):
    table = plot_stack.tables["stack"]
    along = si.pl.volume(plot_stack, "smooth_0", position=(None, None, 0.0), return_ax=True)[0, 0]
    image = along.images[0]
    drawn = np.ma.filled(image.get_array().astype(float), np.nan)
    x0, x1, y0, y1 = image.get_extent()
    rows = (table.obs["section"] == "s0").to_numpy()
    x, y = table.obsm["spatial_3d"][rows, :2].T
    column = ((x - x0) / (x1 - x0) * drawn.shape[1]).astype(int)
    row = ((y - y0) / (y1 - y0) * drawn.shape[0]).astype(int)
    found, expected = drawn[row, column], table[rows, "smooth_0"].layers["asign"].ravel()
    assert np.isfinite(found).all()
    assert np.corrcoef(found, expected)[0, 1] > 0.95
    assert np.isnan(drawn[0]).all()  # nothing outside the tissue
    assert along.texts[0].get_text() == "z = 0 µm"


def test_volume_marks_the_slices_in_each_other(plot_stack):
    along, across_x, across_y = si.pl.volume(plot_stack, "smooth_0", position=(900, 1000, 10), return_ax=True)[0]
    assert along.lines[0].get_xdata()[0] == 900
    assert along.lines[1].get_ydata()[0] == 1000
    assert across_x.lines[0].get_xdata()[0] == across_y.lines[0].get_ydata()[0] == 10


def test_volume_limits_size_and_own_axes(plot_stack, tmp_path):
    _, panels = plt.subplots(1, 3)
    axes = si.pl.volume(
        plot_stack,
        "smooth_0",
        ax=panels,
        vmin=1,
        vmax=4,
        z_stretch=7,
        title="t",
        save=tmp_path / "v.png",
        return_ax=True,
    )
    assert list(axes[0]) == list(panels)
    assert panels[0].images[0].get_clim() == (1, 4)
    assert panels[2].get_aspect() == 7
    assert panels[0].get_title() == "t"
    assert (tmp_path / "v.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"genes": []}, ValueError, "`genes` is empty"),
        ({"genes": "TP53"}, KeyError, "'TP53' not found"),
        ({"layer": "measured"}, ValueError, r"values on at least two sections.*\['s1'\].*si.pl.imputed"),
        ({"position": (0, 0)}, ValueError, "must hold x, y and z"),
        ({"position": (None, None, 900)}, ValueError, "z = 900 um lies outside"),
        ({"resolution": 0}, ValueError, "`resolution` must be a positive number"),
        ({"z_stretch": -1}, ValueError, "`z_stretch` must be a positive number"),
        ({"vmax": [1, 2]}, ValueError, "one limit or one per gene"),
        ({"title": ["a", "b"]}, ValueError, "one entry per gene"),
        ({"ncols": 0}, ValueError, "`ncols` must be a whole number of at least 1"),
        ({"genes": GENES, "interactive": True}, ValueError, "shows one gene"),
    ],
)
def test_volume_says_what_is_wrong(plot_stack, change, error, message):
    with pytest.raises(error, match=message):
        si.pl.volume(plot_stack, **({"genes": "smooth_0"} | change))


def test_interactive_view_without_plotly_names_the_extra(plot_stack, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("plotly"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"spatial-impute\[interactive\]"):
        si.pl.volume(plot_stack, "smooth_0", interactive=True)


def test_interactive_view_has_slices_and_a_slider(plot_stack, tmp_path):
    pytest.importorskip("plotly")
    figure = si.pl.volume(plot_stack, "smooth_0", interactive=True, vmin=1, vmax=4, save=tmp_path / "view.html")
    steps = figure.layout.sliders[0].steps
    assert len(figure.data) == len(steps) + 2
    assert [trace.visible for trace in figure.data[2:]].count(True) == 1
    assert {(trace.cmin, trace.cmax) for trace in figure.data} == {(1, 4)}
    for trace in figure.data:
        np.testing.assert_array_equal(np.isnan(trace.z), np.isnan(trace.surfacecolor))
    assert list(figure.layout.scene.zaxis.ticktext) == ["s0, 0 µm", "s1, 20 µm", "s2, 40 µm"]
    assert "<html>" in (tmp_path / "view.html").read_text()
