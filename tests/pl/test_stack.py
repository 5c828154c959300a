from __future__ import annotations

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.collections import EllipseCollection
from mpl_toolkits.mplot3d.art3d import Poly3DCollection

import spatial_impute as si


def circles(ax):
    return [c for c in ax.collections if isinstance(c, EllipseCollection)]


def test_stack_shows_sections_in_z_with_their_spots(plot_stack):
    axes = si.pl.stack(plot_stack, return_ax=True)
    assert [ax.get_title() for ax in axes] == ["s0, z = 0 µm", "s1 (measured), z = 20 µm", "s2, z = 40 µm"]
    assert [ax.title.get_fontweight() for ax in axes] == ["normal", "bold", "normal"]
    for name, ax in zip(["s0", "s1", "s2"], axes, strict=True):
        assert len(ax.images) == 1
        (spots,) = circles(ax)
        assert len(spots.get_offsets()) == len(plot_stack.shapes[f"{name}_spots"])
        np.testing.assert_allclose(spots.get_widths(), 100.0)  # um, the true diameter
        assert spots.get_facecolor().size == 0  # outlines: the tissue stays visible


def test_stack_has_one_scale_and_y_down(plot_stack):
    axes = si.pl.stack(plot_stack, return_ax=True)
    spans = [(np.diff(ax.get_xlim())[0], np.diff(ax.get_ylim())[0]) for ax in axes]
    np.testing.assert_allclose(spans, [spans[0]] * 3)
    assert spans[0][0] > 0 > spans[0][1]
    assert all(ax.get_aspect() == 1 for ax in axes)


def test_stack_image_lies_under_the_spots(plot_stack):
    """The image is drawn in um: its middle maps to 1200 um."""
    ax = si.pl.stack(plot_stack, sections="s1", return_ax=True)[0]
    (image,) = ax.images
    x0, x1, y0, y1 = image.get_extent()
    middle = image.get_transform().transform([(x0 + x1) / 2, (y0 + y1) / 2])
    np.testing.assert_allclose(ax.transData.inverted().transform(middle), [1200, 1200], atol=1e-6)


def test_stack_crop_keeps_all_spots_in_view_and_off_shows_the_image(plot_stack):
    cropped = si.pl.stack(plot_stack, sections="s0", return_ax=True)[0]
    (spots,) = circles(cropped)
    x, y = spots.get_offsets().T
    assert cropped.get_xlim()[0] < x.min() - 50 < x.max() + 50 < cropped.get_xlim()[1]
    assert cropped.get_ylim()[1] < y.min() - 50 < y.max() + 50 < cropped.get_ylim()[0]
    whole = si.pl.stack(plot_stack, sections="s0", crop=False, return_ax=True)[0]
    np.testing.assert_allclose([*whole.get_xlim(), *whole.get_ylim()], [0, 2400, 2400, 0])


def test_stack_gene_colours_measured_spots_only(plot_stack):
    axes = si.pl.stack(plot_stack, color="smooth_0", return_ax=True)
    table = plot_stack.tables["stack"]
    expected = np.asarray(table[table.obs["section"] == "s1", "smooth_0"].layers["measured"]).ravel()
    (measured,) = circles(axes[1])
    np.testing.assert_allclose(np.asarray(measured.get_array()), expected)
    assert measured.get_clim() == pytest.approx((expected.min(), expected.max()))
    assert circles(axes[0])[0].get_array() is None
    bar = axes[0].figure.axes[-1]
    assert bar.get_ylabel().startswith("smooth_0\nlog1p of counts")


def test_stack_gene_of_layer_and_percentile(plot_stack):
    axes = si.pl.stack(plot_stack, color="smooth_0", layer="baseline_kernel", vmin=0, vmax="p90", return_ax=True)
    values = plot_stack.tables["stack"][:, "smooth_0"].layers["baseline_kernel"]
    for ax in axes:
        assert circles(ax)[0].get_clim() == pytest.approx((0, np.percentile(values, 90)))


def test_stack_categories_get_a_legend(plot_stack):
    axes = si.pl.stack(plot_stack, color="section", return_ax=True)
    legend = axes[-1].get_legend()
    assert [t.get_text() for t in legend.get_texts()] == ["s0", "s1", "s2"]
    colors = [tuple(circles(ax)[0].to_rgba(circles(ax)[0].get_array())[0]) for ax in axes]
    assert len(set(colors)) == 3


def test_stack_boolean_and_numeric_columns(plot_stack):
    axes = si.pl.stack(plot_stack, color="measured", return_ax=True)
    assert [t.get_text() for t in axes[-1].get_legend().get_texts()] == ["False", "True"]
    axes = si.pl.stack(plot_stack, color="z", return_ax=True)
    assert circles(axes[2])[0].get_clim() == (0, 40)


def test_stack_layout_title_and_given_axes(plot_stack):
    axes = si.pl.stack(plot_stack, ncols=2, title=["a", "b", "c"], figsize=(5, 4), return_ax=True)
    assert [ax.get_title() for ax in axes] == ["a", "b", "c"]
    assert tuple(axes[0].figure.get_size_inches()) == (5, 4)
    assert axes[2].get_subplotspec().rowspan.start == 1
    _, own = plt.subplots()
    assert si.pl.stack(plot_stack, sections="s1", ax=own, return_ax=True)[0] is own


def test_stack_returns_none_and_saves(plot_stack, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(1))
    assert si.pl.stack(plot_stack, sections="s1", save=tmp_path / "stack.png") is None
    assert plt.imread(tmp_path / "stack.png").shape[1] > 400
    assert not shown
    si.pl.stack(plot_stack, sections="s1", save=tmp_path / "stack.png", show=True)
    assert len(shown) == 1


def test_figures_are_shown_unless_the_user_takes_them(plot_stack, monkeypatch):
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(1))
    si.pl.stack(plot_stack, sections="s1")  # a script of three lines must show something
    assert len(shown) == 1
    si.pl.stack(plot_stack, sections="s1", show=False)
    si.pl.stack(plot_stack, sections="s1", return_ax=True)
    si.pl.stack(plot_stack, sections="s1", ax=plt.figure().add_subplot())
    assert len(shown) == 1


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"sections": "s9"}, KeyError, r"'s9' not found.*\['s0', 's1', 's2'\]"),
        ({"color": "TP53"}, KeyError, r"'TP53' is neither a column nor a gene.*select_genes"),
        ({"color": "smooth_0", "layer": "nope"}, KeyError, r"'nope' not found.*impute_baseline"),
        ({"color": "z", "vmin": "q5"}, ValueError, r"`vmin` must be a number or a percentile.*'q5'"),
        ({"color": "z", "vmax": "p101"}, ValueError, "p101"),
        ({"color": "z", "vmin": 3, "vmax": 2}, ValueError, "must not exceed"),
        ({"title": ["a"]}, ValueError, "one entry per section"),
        ({"ncols": 0}, ValueError, "`ncols` must be a whole number of at least 1"),
        ({"resolution": -1}, ValueError, "`resolution` must be a positive number"),
    ],
)
def test_stack_errors(plot_stack, kwargs, error, match):
    with pytest.raises(error, match=match):
        si.pl.stack(plot_stack, **kwargs)


def test_stack_wrong_number_of_axes(plot_stack):
    _, own = plt.subplots()
    with pytest.raises(ValueError, match="must hold 3 axes"):
        si.pl.stack(plot_stack, ax=own)


def test_stack_in_3d_places_sections_at_their_height(plot_stack):
    (ax,) = si.pl.stack(plot_stack, projection="3d", return_ax=True)
    planes = [c for c in ax.collections if isinstance(c, Poly3DCollection)]
    assert len(planes) == 3
    heights = [np.unique(np.concatenate([np.asarray(face)[:, 2] for face in plane._faces])) for plane in planes]
    np.testing.assert_allclose(np.concatenate(heights), [0, 20, 40])
    assert [text.get_text() for text in ax.texts][:3] == ["s0\nz = 0 µm", "s1 (measured)\nz = 20 µm", "s2\nz = 40 µm"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]


def test_stack_in_3d_lies_in_the_common_frame(plot_stack):
    (ax,) = si.pl.stack(plot_stack, projection="3d", color="smooth_0", layer="asign", title="t", return_ax=True)
    table = plot_stack.tables["stack"]
    spots = [c for c in ax.collections if isinstance(c, Poly3DCollection)][1::2]
    for name, discs in zip(["s0", "s1", "s2"], spots, strict=True):
        centers = np.array([np.asarray(face).mean(axis=0) for face in discs._faces])
        np.testing.assert_allclose(
            centers, table.obsm["spatial_3d"][(table.obs["section"] == name).to_numpy()], atol=1e-6
        )
    assert ax.get_title() == "t"
    assert len(ax.figure.axes) == 2  # a colour bar


def test_stack_in_3d_before_registration_says_so(unregistered):
    (ax,) = si.pl.stack(unregistered, projection="3d", z_stretch=3, return_ax=True)
    texts = [text.get_text() for text in ax.texts]
    assert "not registered" in texts
    assert any("z × 3" in text for text in texts)


def test_stack_projection_is_checked(plot_stack):
    with pytest.raises(ValueError, match="`projection` must be one of"):
        si.pl.stack(plot_stack, projection="4d")
    with pytest.raises(ValueError, match="must be one 3D axes"):
        si.pl.stack(plot_stack, projection="3d", ax=plt.figure().add_subplot())


def test_an_empty_title_stays_empty(plot_stack):
    axes = si.pl.stack(plot_stack, title=["", "middle", ""], return_ax=True)
    assert [ax.get_title() for ax in axes] == ["", "middle", ""]
