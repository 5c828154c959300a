from __future__ import annotations

import copy

import numpy as np
import pytest
from matplotlib.colors import same_color
from scipy import ndimage as ndi

import spatial_impute as si
from spatial_impute._registration import SectionTransform
from spatial_impute.pl._figure import nice_length
from spatial_impute.pl._overlay import Canvas, Scan
from spatial_impute.pl._registration import _GRID_LINES


def test_registration_rows_and_their_text(plot_stack):
    axes = si.pl.registration(plot_stack, return_ax=True)
    assert axes.shape == (2, 3)
    assert [ax.get_title() for ax in axes[0]] == ["before", "after", "checkerboard, after"]
    record = plot_stack.attrs["spatial_impute"]["stack"]["registration"]["sections"]
    for ax, name in zip(axes[:, 0], ["s0", "s2"], strict=True):
        text = ax.get_ylabel()
        assert text.startswith(f"{name}: {record[name]['verdict']}\n{record[name]['route']}")
        assert text.endswith(f"score {record[name]['score']:.2f}")
        before, after = (float(part) for part in text.split("Dice ")[1].split("\n")[0].split(" → "))
        assert 0.5 < before < after <= 1


def test_registration_dice_is_that_of_the_quality_table(plot_stack):
    quality = si.metrics.registration_quality(plot_stack).loc[("s1", "s0")]
    text = si.pl.registration(plot_stack, sections="s0", return_ax=True)[0, 0].get_ylabel()
    after = float(text.split(" → ")[1].split("\n")[0])
    assert after == pytest.approx(quality["dice_after"], abs=0.02)


def test_registration_overlay_agrees_more_after_than_before(plot_stack):
    axes = si.pl.registration(plot_stack, return_ax=True)

    def disagreement(ax):
        picture = np.asarray(ax.images[0].get_array(), dtype=float)
        return np.abs(picture[..., 0] - picture[..., 1]).mean()  # green ink against magenta ink

    for row in axes:
        assert disagreement(row[1]) < 0.8 * disagreement(row[0])


def test_registration_panels_share_frame_with_y_down(plot_stack):
    axes = si.pl.registration(plot_stack, return_ax=True).ravel()
    limits = [[*ax.get_xlim(), *ax.get_ylim()] for ax in axes]
    np.testing.assert_allclose(limits, [limits[0]] * 6)
    assert limits[0][2] > limits[0][3]
    legend = axes[4].get_legend()
    assert [t.get_text() for t in legend.get_texts()] == ["s1 (reference)", "section", "both"]


def test_registration_title_sections_and_save(plot_stack, tmp_path):
    save = tmp_path / "registration.png"
    axes = si.pl.registration(plot_stack, sections=["s1", "s2"], title="mine", save=save, return_ax=True)
    assert axes.shape == (1, 3)
    assert axes[0, 0].get_ylabel() == "mine"
    assert save.stat().st_size > 10_000


def test_registration_resampling_is_exact_at_pixel_centres():
    """A section twice as coarse, moved by (40, -10) um, on a canvas of pixel 5 um: compared with the true function."""
    size = 10.0
    y, x = np.mgrid[:30, :40]
    gradient = (3.0 * (x + 0.5) + 2.0 * (y + 0.5)) * size  # linear in um, so bilinear sampling is exact
    rgb = np.repeat(gradient[..., None], 3, axis=2)
    scan = Scan(rgb, gradient, np.ones((30, 40), bool), np.diag([size, size, 1.0]))
    matrix = np.array([[1, 0, 40.0], [0, 1, -10.0], [0, 0, 1]])
    canvas = Canvas(x0=100, y0=50, width=200, height=150, pixel=5.0)
    drawn = canvas.draw(scan, SectionTransform(matrix))
    assert drawn.stain.shape == (30, 40)
    cy, cx = (np.mgrid[:30, :40] + 0.5) * 5.0
    expected = 3.0 * (cx + 100 - 40) + 2.0 * (cy + 50 + 10)
    np.testing.assert_allclose(drawn.stain, expected, rtol=1e-5)
    np.testing.assert_allclose(drawn.rgb[..., 0], expected, rtol=1e-5)


def test_registration_shows_a_deformation_by_a_grid_in_its_true_lengths(plot_stack):
    """One section is pushed by (24, 18) um throughout, that is by 30 um: every piece of its grid says so."""
    from spatial_impute._registration.transform import SectionTransform
    from spatial_impute._stack.elements import displacement_elements

    deformed = copy.deepcopy(plot_stack)
    rows = deformed.attrs["spatial_impute"]["stack"]["registration"]["sections"]
    push = np.broadcast_to(np.array([24.0, 18.0], np.float32), (120, 120, 2))
    grid = np.array([[50.0, 0, -2000], [0, 50, -2000], [0, 0, 1]])
    transform = SectionTransform(np.array(rows["s0"]["matrix"]), -push, push, grid)
    for key, element in displacement_elements(transform, "s0", "aligned").items():
        deformed.images[key] = element
    rows["s0"]["deformed"] = True
    axes = si.pl.registration(deformed, return_ax=True)
    assert axes.shape == (2, 4)
    lengths = np.concatenate([np.asarray(line.get_array()) for line in axes[0, 3].collections])
    np.testing.assert_allclose(lengths, 30.0, rtol=1e-3)
    # Upright lines stay upright, and lie beside where they were by the displacement times the factor of the title.
    factor = float(axes[0, 3].get_title().removeprefix("deformation, × "))
    (left, right), (bottom, top) = axes[0, 3].get_xlim(), axes[0, 3].get_ylim()
    spacing = nice_length(max(right - left, bottom - top) / _GRID_LINES)
    starts = [segments[0, 0] for line in axes[0, 3].collections if np.ptp((segments := _points(line))[:, 0]) < 1e-6]
    lines = (np.array(starts) - left - factor * 24.0) / spacing
    assert len(lines) > 3
    np.testing.assert_allclose(lines, lines.round(), atol=1e-4)
    assert not axes[1, 3].collections
    assert axes[1, 3].texts[0].get_text() == "affine only"
    # The picture of the section, in red, is moved as its points are.
    plain = si.pl.registration(plot_stack, return_ax=True)
    moved, before = (np.asarray(ax.images[0].get_array(), float)[..., 0] for ax in (axes[0, 1], plain[0, 1]))
    pixel = (right - left) / moved.shape[1]
    expected = ndi.shift(before, (18.0 / pixel, 24.0 / pixel), order=1, mode="nearest")
    assert np.abs(moved - expected).mean() < 0.3 * np.abs(moved - before).mean()


def _points(line) -> np.ndarray:
    """Points of a line drawn piece by piece."""
    return np.concatenate(line.get_segments())


def test_registration_says_when_a_section_is_weak_and_shortens_long_paths(plot_stack, monkeypatch):
    row = plot_stack.attrs["spatial_impute"]["stack"]["registration"]["sections"]["s2"]
    monkeypatch.setitem(row, "verdict", "weak")
    monkeypatch.setitem(row, "route", "sequential")
    monkeypatch.setitem(row, "path", ["s2", "a", "b", "c", "s1"])
    label = si.pl.registration(plot_stack, sections="s2", return_ax=True)[0, 0].yaxis.label
    assert label.get_text().startswith("s2: weak\nsequential:\ns2 → a → … → s1\n")
    assert not same_color(label.get_color(), "black")


def test_registration_unregistered(unregistered):
    with pytest.raises(KeyError, match=r"not registered.*si\.tl\.register_stack"):
        si.pl.registration(unregistered)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"sections": "s9"}, KeyError, r"'s9' not found.*\['s0', 's1', 's2'\]"),
        ({"sections": "s1"}, ValueError, "Nothing to compare with the reference 's1'"),
        ({"n_tiles": 1}, ValueError, "`n_tiles` must be a whole number of at least 2"),
        ({"title": "one"}, ValueError, "one entry per section"),
    ],
)
def test_registration_errors(plot_stack, kwargs, error, match):
    with pytest.raises(error, match=match):
        si.pl.registration(plot_stack, **kwargs)


def test_registration_table_has_a_row_per_pair(plot_stack):
    quality = si.metrics.registration_quality(plot_stack)
    axes = si.pl.registration(plot_stack, show_table=True, return_ax=True)
    assert axes.shape == (2, 3)
    (table,) = axes[0, 0].figure.axes[-1].tables
    cells = {place: cell.get_text().get_text() for place, cell in table.get_celld().items()}
    heads = [cells[0, column] for column in range(1 + max(column for _, column in cells))]
    assert heads[0] == "pair"
    assert heads[-1] == "verdict"
    assert max(row for row, _ in cells) == len(quality)
    for row, ((fixed, moving), values) in enumerate(quality.iterrows(), start=1):
        assert cells[row, 0] == f"{moving} on {fixed}"
        assert cells[row, heads.index("Dice after")] == f"{values['dice_after']:.2f}"
        assert cells[row, heads.index("verdict")] == values["verdict"]


def test_registration_table_needs_its_own_figure(plot_stack):
    with pytest.raises(ValueError, match="figure of its own"):
        si.pl.registration(plot_stack, show_table=True, ax=[None] * 6)
