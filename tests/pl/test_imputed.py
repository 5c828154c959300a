from __future__ import annotations

import numpy as np
import pytest
from matplotlib.collections import EllipseCollection

import spatial_impute as si

GENES = ["smooth_0", "texture_12"]


def spots_of(ax):
    return next(c for c in ax.collections if isinstance(c, EllipseCollection))


def test_imputed_rows_columns_and_labels(plot_stack):
    axes = si.pl.imputed(plot_stack, GENES, return_ax=True)
    assert axes.shape == (3, 3)
    assert [ax.get_title() for ax in axes[0]] == ["s0\nz = 0 µm", "s1 (measured)\nz = 20 µm", "s2\nz = 40 µm"]
    r = plot_stack.tables["stack"].var["imputation_r"]
    expected = [f"{gene}\nr = {r[gene]:.2f}" for gene in GENES]
    assert [ax.get_ylabel() for ax in axes[:, 0]] == [*expected, "imputation\nsupport"]


def test_imputed_marks_measured_sections(plot_stack):
    axes = si.pl.imputed(plot_stack, GENES, return_ax=True)
    for row in axes:
        assert [ax.spines["left"].get_visible() for ax in row] == [False, True, False]
    assert [ax.title.get_fontweight() for ax in axes[0]] == ["normal", "bold", "normal"]


def test_imputed_marks_spots_that_show_a_measurement(plot_stack):
    table = plot_stack.tables["stack"]
    axes = si.pl.imputed(plot_stack, "smooth_0", layer=["measured", "asign"], show_support=False, return_ax=True)
    widths = [[float(spots_of(ax).get_linewidths()[0]) for ax in row] for row in axes]
    assert widths[0][1] == widths[1][1] > widths[1][0] == widths[1][2]
    table.uns["asign"]["measured"] = "denoise"  # then the layer holds expected values there
    try:
        axes = si.pl.imputed(plot_stack, "smooth_0", layer=["measured", "asign"], show_support=False, return_ax=True)
    finally:
        del table.uns["asign"]["measured"]
    widths = [[float(spots_of(ax).get_linewidths()[0]) for ax in row] for row in axes]
    assert widths[0][1] > widths[1][1] == widths[1][0]


def test_imputed_images_lie_under_the_spots(plot_stack):
    axes = si.pl.imputed(plot_stack, "smooth_0", show_support=False, return_ax=True)
    table = plot_stack.tables["stack"]
    for ax, name in zip(axes[0], ["s0", "s1", "s2"], strict=True):
        (image,) = ax.images
        rgb = np.asarray(image.get_array())
        inside = (
            image.get_transform()
            .inverted()
            .transform(ax.transData.transform(table[table.obs["section"] == name].obsm["spatial_3d"][:, :2]))
        )
        x, y = inside.astype(int).T
        assert rgb[y, x].mean() < 0.98 * rgb[:5].mean()  # tissue is darker than the margin
        assert rgb.min() > 0.5  # and faint
    assert not si.pl.imputed(plot_stack, "smooth_0", img_alpha=0, show_support=False, return_ax=True)[0, 0].images


def test_imputed_support_is_drawn_only_where_it_varies(plot_stack):
    table = plot_stack.tables["stack"]
    kept = table.obs["imputation_support"].copy()
    table.obs["imputation_support"] = np.where(table.obs["measured"], 1.0, 0.6)
    try:
        assert si.pl.imputed(plot_stack, "smooth_0", return_ax=True).shape == (1, 3)
    finally:
        table.obs["imputation_support"] = kept
    assert si.pl.imputed(plot_stack, "smooth_0", return_ax=True).shape == (2, 3)


def test_imputed_spots_in_the_common_frame(plot_stack):
    table = plot_stack.tables["stack"]
    axes = si.pl.imputed(plot_stack, "smooth_0", show_support=False, return_ax=True)
    assert axes.shape == (1, 3)
    for ax, name in zip(axes[0], ["s0", "s1", "s2"], strict=True):
        rows = (table.obs["section"] == name).to_numpy()
        np.testing.assert_allclose(spots_of(ax).get_offsets(), table.obsm["spatial_3d"][rows, :2])
        np.testing.assert_allclose(spots_of(ax).get_array(), table[rows, "smooth_0"].layers["asign"].ravel())
        np.testing.assert_allclose(spots_of(ax).get_widths(), 100.0, rtol=1e-6)  # rigid: size is kept
        assert ax.get_ylim()[0] > ax.get_ylim()[1]
        assert ax.get_aspect() == 1


def test_imputed_colour_scale_is_shared_by_sections(plot_stack):
    values = np.asarray(plot_stack.tables["stack"][:, GENES].layers["asign"])
    axes = si.pl.imputed(plot_stack, GENES, return_ax=True)
    for k in range(2):
        limits = {spots_of(ax).get_clim() for ax in axes[k]}
        assert len(limits) == 1
        assert limits.pop() == pytest.approx(tuple(np.percentile(values[:, k], [1, 99])))
    assert {spots_of(ax).get_clim() for ax in axes[2]} == {(0, 1)}


def test_imputed_limits_per_gene(plot_stack):
    values = np.asarray(plot_stack.tables["stack"][:, GENES].layers["asign"])
    axes = si.pl.imputed(plot_stack, GENES, vmin=0, vmax=[5.0, None], return_ax=True)
    assert spots_of(axes[0, 0]).get_clim() == (0, 5)
    assert spots_of(axes[1, 0]).get_clim() == pytest.approx((0, values[:, 1].max()))


def test_imputed_colourbar_has_units(plot_stack):
    axes = si.pl.imputed(plot_stack, GENES, show_support=False, return_ax=True)
    bars = [ax for ax in axes[0, 0].figure.axes if ax not in axes.ravel()]
    assert len(bars) == 2
    units = plot_stack.tables["stack"].uns["normalization"]["units"]
    assert all(bar.get_ylabel().replace("\n", " ") == units for bar in bars)


def test_imputed_baseline_shows_no_r_of_another_layer(plot_stack):
    axes = si.pl.imputed(plot_stack, "smooth_0", layer="baseline_kernel", return_ax=True)
    assert axes[0, 0].get_ylabel() == "smooth_0"


def test_imputed_without_support(plot_stack, monkeypatch):
    table = plot_stack.tables["stack"]
    kept = table.obs.copy()
    table.obs = table.obs.drop(columns="imputation_support")
    try:
        assert si.pl.imputed(plot_stack, GENES, return_ax=True).shape == (2, 3)
    finally:
        table.obs = kept


def test_imputed_unmeasured_spots_are_grey(plot_stack):
    axes = si.pl.imputed(plot_stack, "smooth_0", layer="measured", show_support=False, return_ax=True)
    axes[0, 0].figure.draw_without_rendering()
    np.testing.assert_allclose(spots_of(axes[0, 0]).get_facecolor()[:, :3], 0.85)


def test_imputed_sections_size_title_and_save(plot_stack, tmp_path):
    save = tmp_path / "imputed.pdf"
    axes = si.pl.imputed(
        plot_stack, GENES, sections=["s2", "s0"], size=1.5, title=["a", "b"], save=save, return_ax=True
    )
    assert [ax.get_title() for ax in axes[0]] == ["a", "b"]
    np.testing.assert_allclose(spots_of(axes[0, 0]).get_widths(), 150.0, rtol=1e-6)
    assert save.read_bytes().startswith(b"%PDF")


def test_imputed_reads_only(plot_stack):
    table = plot_stack.tables["stack"]
    before = table.layers["asign"].copy(), list(table.obs.columns), list(table.uns), str(plot_stack)
    si.pl.imputed(plot_stack, GENES)
    np.testing.assert_array_equal(table.layers["asign"], before[0])
    assert (list(table.obs.columns), list(table.uns), str(plot_stack)) == before[1:]


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "match"),
    [
        (["TP53"], {}, KeyError, r"'TP53' not found.*smooth_0.*select_genes"),
        ([[]], {}, ValueError, "`genes` is empty"),
        (["smooth_0"], {"layer": "nope"}, KeyError, r"'nope' not found.*'asign'.*impute_3d"),
        (["smooth_0"], {"sections": "s9"}, KeyError, r"'s9' not found"),
        ([GENES], {"vmax": [1, 2, 3]}, ValueError, "`vmax` must be one limit or one per gene"),
        (["smooth_0"], {"size": 0}, ValueError, "`size` must be a positive number"),
    ],
)
def test_imputed_errors(plot_stack, args, kwargs, error, match):
    with pytest.raises(error, match=match):
        si.pl.imputed(plot_stack, *args, **kwargs)


def test_imputed_unregistered(plot_stack):
    table = plot_stack.tables["stack"]
    kept = table.obsm.pop("spatial_3d")
    try:
        with pytest.raises(KeyError, match=r"'spatial_3d' not found.*si\.tl\.register_stack"):
            si.pl.imputed(plot_stack, "smooth_0")
    finally:
        table.obsm["spatial_3d"] = kept


def test_imputed_layers_share_a_scale_and_sd_has_its_own(plot_stack):
    table = plot_stack.tables["stack"]
    table.layers["asign_sd"] = np.where(table.obs["measured"].to_numpy()[:, None], 0.0, 0.5) * np.ones(table.n_vars)
    try:
        axes = si.pl.imputed(
            plot_stack, "smooth_0", layer=["measured", "asign"], show_sd=True, show_support=False, return_ax=True
        )
    finally:
        del table.layers["asign_sd"]
    assert axes.shape == (3, 3)
    r = table.var["imputation_r"]["smooth_0"]
    labels = ["smooth_0\nmeasured", f"smooth_0\nr = {r:.2f}\nasign", "smooth_0\ndeviation"]
    assert [ax.get_ylabel() for ax in axes[:, 0]] == labels
    assert spots_of(axes[0, 0]).get_clim() == spots_of(axes[1, 0]).get_clim()
    assert np.ma.getmaskarray(spots_of(axes[0, 0]).get_array()).all()  # nothing measured there
    assert spots_of(axes[2, 0]).get_clim() == (0, 0.5)
    assert (np.asarray(spots_of(axes[2, 1]).get_array()) == 0).all()


def test_imputed_says_which_layer_has_no_deviation(plot_stack):
    with pytest.raises(KeyError, match=r"'baseline_kernel_sd' not found.*impute_3d"):
        si.pl.imputed(plot_stack, "smooth_0", layer="baseline_kernel", show_sd=True)
    with pytest.raises(ValueError, match="`layer` is empty"):
        si.pl.imputed(plot_stack, "smooth_0", layer=[])
