"""The smaller parts: transforms, residuals, looks, held-out blocks, manual placements, parallel runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage as ndi

from spatial_impute._io.workers import run_all
from spatial_impute._registration import (
    ChainResult,
    DisplacementField,
    PairResult,
    RegistrationParams,
    SectionImage,
    SectionTransform,
    chain_to_reference,
)
from spatial_impute._registration.deform import (
    Placed,
    _agreement,
    _blocks,
    _common_view,
    _gain,
    _without,
    fit_deformation,
)
from spatial_impute._registration.orientation import orientation_candidates, pose
from spatial_impute._registration.quality import (
    StructureScore,
    edges_inside,
    expected_error,
    mutual_information,
    pull_back,
    section_errors,
)
from spatial_impute._registration.types import Channel, contrast, deformation_channel, inside_only, shrink
from spatial_impute.tl._places import check_matrix, landmark_matrix

SIZE = 10.0


def channel(*, seed=0, shape=(160, 180), invert=False, wavelength=3.0) -> Channel:
    """An elliptic tissue of 1.2 x 1.4 mm with smooth texture."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]]
    mask = ((y - shape[0] / 2) / (0.4 * shape[0])) ** 2 + ((x - shape[1] / 2) / (0.4 * shape[1])) ** 2 < 1
    texture = ndi.gaussian_filter(rng.normal(size=shape), wavelength)
    texture = 0.5 + 0.15 * (-1 if invert else 1) * texture / texture.std()
    image = (np.clip(texture, 0.05, 1) * mask).astype(np.float32)
    return Channel(image, mask, (0.0, 0.0), SIZE, (shape[1] * SIZE, shape[0] * SIZE))


def shift(x, y=0.0):
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1.0]])


def warped(source: Channel, displacement: np.ndarray) -> Channel:
    """The channel whose pixel p shows what the source shows at p + displacement (um)."""
    field = DisplacementField(displacement.astype(np.float32), -displacement, source.origin, source.size)
    image, mask = (pull_back(a, source, source, np.eye(3), field) for a in (source.image, source.mask))
    return replace(source, image=image, mask=mask > 0.5)


def pushed(field: DisplacementField, points: np.ndarray) -> np.ndarray:
    """Points of the moving section, placed by the matrix alone, after the deformation."""
    return SectionTransform.from_field(np.eye(3), field, np.eye(3)).points(points)


# --- transforms


def test_transform_in_a_turned_common_frame():
    """A field in the frame of a thumbnail; the common frame is that one turned, stretched and shifted."""
    pull = np.zeros((40, 50, 2), np.float32)
    pull[..., 0] = 30
    field = DisplacementField(pull, -pull, (100.0, 200.0), SIZE)
    to_common = np.array([[0, -2.0, 500], [2.0, 0, -40], [0, 0, 1]])
    inner = pose(20, [0, 0], [300, 350])
    transform = SectionTransform.from_field(to_common @ inner, field, to_common)
    points = np.random.default_rng(0).uniform(-40, 40, (20, 2))
    expected = points @ inner[:2, :2].T + inner[:2, 2]
    expected = pushed(field, expected) @ to_common[:2, :2].T + to_common[:2, 2]
    np.testing.assert_allclose(transform.points(points), expected, atol=1e-4)
    np.testing.assert_allclose(transform.inverse(transform.points(points)), points, atol=1e-3)


def test_transform_without_field():
    transform = SectionTransform.from_field(shift(3, 4), None, np.eye(3))
    assert not transform.deforms
    np.testing.assert_allclose(transform.points([[1, 1]]), [[4, 5]])
    np.testing.assert_allclose(transform.inverse([[4, 5]]), [[1, 1]])


# --- quality


@pytest.mark.parametrize("wanted", [0.0, 37.0, 80.0])
def test_error_is_the_shift_that_is_left(wanted):
    fixed = channel(shape=(260, 280))
    found = expected_error(fixed, fixed, shift(wanted), None, 0.0)
    # A shift is the same everywhere; the estimate allows for more at the rim, and for half a pixel.
    assert 0.8 * wanted <= found["error_um"] <= 2 * wanted + 0.5 * SIZE
    assert found["error_p90_um"] > found["error_um"]


def test_error_counts_the_bend_within_a_patch(monkeypatch):
    """Patches of 41 pixels see the mean of a bend that turns round within 75 pixels."""
    fixed = channel(shape=(260, 280))
    y, x = np.indices(fixed.image.shape)
    bend = 3 * SIZE * np.stack([np.sin(y / 12), np.cos(x / 12)], -1)
    true = np.median(np.linalg.norm(bend[fixed.mask], axis=1))
    moving = warped(fixed, bend)
    found = expected_error(fixed, moving, np.eye(3), None, 0.0)["error_um"]
    monkeypatch.setattr("spatial_impute._registration.quality._WITHIN", 0.0)
    of_means = expected_error(fixed, moving, np.eye(3), None, 0.0)["error_um"]
    assert of_means < 0.9 * true
    assert 0.9 * true < found < 2 * true


def test_error_of_another_stain():
    pair = channel(shape=(260, 280)), channel(shape=(260, 280), invert=True)
    assert 30 <= expected_error(*pair, shift(0, 40), None, 0.0)["error_um"] <= 100


def test_error_grows_with_the_difference_of_the_halves():
    fixed = channel(shape=(260, 280))
    small, large = (expected_error(fixed, fixed, np.eye(3), None, halves)["error_um"] for halves in (0.0, 100.0))
    assert small < 0.5 * SIZE
    assert large == pytest.approx(83, abs=5)


def test_error_of_unrelated_sections_is_large_or_unknown():
    error = expected_error(channel(seed=0), channel(seed=1), np.eye(3), None, 0.0)["error_um"]
    assert error is None or error > 50.0  # patches see shifts up to their reach only


def test_errors_of_a_path_add_up():
    quality = {"error_um": 30.0, "error_p90_um": 60.0}
    pairs = {("a", "b"): PairResult(np.eye(3), "affine", quality), ("b", "c"): PairResult(np.eye(3), "affine", quality)}
    placed = {
        "a": ChainResult(np.eye(3), ("a",), "reference", 1.0, "ok"),
        "b": ChainResult(np.eye(3), ("b", "a"), "direct", 1.0, "ok"),
        "c": ChainResult(np.eye(3), ("c", "b", "a"), "sequential", 1.0, "ok"),
    }
    found = section_errors(pairs, placed, {}, {})
    assert [found[name]["error_um"] for name in "abc"] == pytest.approx([0, 30, 30 * 2**0.5])
    apart = section_errors(pairs, placed | {"c": replace(placed["c"], disagreement=200.0)}, {}, {})
    assert apart["c"]["error_um"] > 100
    deformed = section_errors(
        pairs, placed | {"c": replace(placed["c"], confirmed=True)}, {"c": {"error_um": 20.0}}, {}
    )
    assert deformed["c"] == {"error_um": 20.0, "error_p90_um": None}


def test_error_of_an_uncertain_pose_stays_unknown_in_the_stack():
    """A deformation tells how well a section lies near its place, not if the place is right."""
    unclear = PairResult(np.eye(3), "affine", {"error_um": None, "error_p90_um": None})
    placed = {
        "a": ChainResult(np.eye(3), ("a",), "reference", 1.0, "ok"),
        "b": ChainResult(np.eye(3), ("b", "a"), "direct", 1.0, "weak"),
    }
    found = section_errors({("a", "b"): unclear}, placed, {"b": {"error_um": 20.0, "error_p90_um": 40.0}}, {})
    assert found["b"] == {"error_um": None, "error_p90_um": None}


def test_error_of_a_given_place_is_that_of_its_approval():
    placed = {
        "a": ChainResult(np.eye(3), ("a",), "reference", 1.0, "ok"),
        "b": ChainResult(np.eye(3), ("b", "a"), "given", 1.0, "ok"),
    }
    assert section_errors({}, placed, {}, {})["b"]["error_um"] == 0.0
    assert section_errors({}, placed, {}, {"b": {"error_um": 33.0}})["b"]["error_um"] == 33.0


def test_edges_do_not_see_the_outline_nor_the_sign():
    plain, inverted = channel(), channel(invert=True)
    inside = ndi.binary_erosion(plain.mask, iterations=4)
    first, second = edges_inside(plain)[inside], edges_inside(inverted)[inside]
    assert np.corrcoef(first, second)[0, 1] > 0.95
    flat = replace(plain, image=plain.mask.astype(np.float32))
    np.testing.assert_allclose(edges_inside(flat), 0, atol=1e-5)


def test_looks_at_an_inverted_stain():
    plain, inverted = channel(wavelength=5.0), channel(wavelength=5.0, invert=True)
    assert StructureScore(plain, inverted, "stain")(np.eye(3)) < -0.8
    assert StructureScore(plain, inverted, "edges")(np.eye(3)) > 0.9
    here, away = (mutual_information(plain, inverted, m) for m in (np.eye(3), shift(90)))
    assert here > 3 * away
    assert mutual_information(plain, inverted, shift(5000)) == 0


def test_unrotated_starts_are_always_there():
    """However good the other candidates look: the section as it lies, and with the tissues' centres joined."""
    fixed, moving = channel(), channel(seed=7)
    moved = replace(moving, origin=(400.0, -300.0), frame=(1e4, 1e4))
    found = orientation_candidates(fixed, moved, RegistrationParams(n_candidates=1))
    assert any(np.allclose(matrix, np.eye(3)) for matrix in found)
    centred = fixed.centres().mean(0) - moved.centres().mean(0)
    assert any(np.allclose(matrix, shift(*centred), atol=5) for matrix in found)


# --- held-out blocks


def test_blocks_cover_half_the_tissue_and_cores_lie_inside():
    fixed, params = channel(shape=(300, 320)), RegistrationParams()
    black, labels = _blocks(fixed, params)
    assert 0.4 < black[fixed.mask].mean() < 0.6
    for colour in (black, ~black):
        distance = ndi.distance_transform_edt(colour) * SIZE
        assert distance[(labels > 0) & colour].min() >= 60  # no window (4 px) round them touches what a fit has seen
        assert len(np.unique(labels[colour])) > 8


def test_fit_sees_the_tissue_of_either_section_and_no_fiducials():
    fixed, moving = channel(), channel(seed=1)
    frame, piece = (slice(0, 6), slice(None)), (slice(70, 90), slice(20, 40))
    fixed.image[frame] = moving.image[frame] = 0.9  # fiducials: far from any tissue
    fixed.mask[piece] = False  # the masks do not agree on a piece of the rim, and on a pale core
    fixed.mask[75:85, 85:95] = moving.mask[75:85, 85:95] = False
    moved = replace(moving, origin=(300.0, -200.0))
    first, second = _common_view(fixed, moved, shift(-300, 200))
    for view, own in ((first, fixed), (second, moving)):
        assert view.image[frame].max() < 1e-6
        np.testing.assert_allclose(view.image[piece], own.image[piece], atol=1e-6)
        np.testing.assert_allclose(view.image[75:85, 85:95], own.image[75:85, 85:95], atol=1e-6)
        assert view.mask is own.mask


def test_light_absorbed_by_hand():
    """Half of the light in each colour, on glass: 0 outside, 1 in the darkest tissue; noise in black stays bounded."""
    rgb = np.full((120, 120, 3), 240, np.uint8)
    rgb[30:90, 30:90] = 120
    rgb[50:70, 50:70] = 2
    mask = np.zeros((120, 120), bool)
    mask[30:90, 30:90] = True
    found = deformation_channel(SectionImage(rgb, (10.0, 10.0), mask), 10.0, 200.0)
    assert found.image.shape == (100, 100)
    assert found.image[5, 5] == pytest.approx(0, abs=1e-3)
    assert found.image[50, 50] == pytest.approx(1, abs=0.01)
    assert found.image[25, 50] == pytest.approx(0.5 / (1 - 2 / 240), abs=0.01)
    assert found.mask.sum() == mask.sum()


def test_gain_by_hand():
    labels = np.array([[0, 1, 1, 2], [3, 3, 0, 2]])
    difference = np.array([[9, 1, 3, 4], [5, 7, 9, 4.0]])
    gain, error = _gain(difference, labels)
    assert gain == pytest.approx(4)  # of 2, 4, 6
    assert error == pytest.approx(2 / np.sqrt(3))
    assert _gain(difference, np.zeros_like(labels)) == (0, 0)


def test_agreement_of_two_displacements():
    rng = np.random.default_rng(0)
    mask = np.zeros((120, 140), bool)
    mask[10:110, 10:130] = True
    first, second, common = (ndi.gaussian_filter(rng.normal(size=(120, 140, 2)), (4, 4, 0)) for _ in range(3))
    assert _agreement(first, first, mask, 20) == pytest.approx((1, 0), abs=1e-9)
    assert _agreement(first, -first, mask, 20) == pytest.approx((-1, 0), abs=1e-9)
    nothing, error = _agreement(first, second, mask, 20)
    assert abs(nothing) < 2 * error
    half, error = _agreement(first + common, second + common, mask, 20)  # as much in common as each on its own
    assert half == pytest.approx(0.5, abs=0.15)
    assert half > 4 * error
    outside = np.where(mask[..., None], 0, 100.0)
    assert _agreement(first + outside, second - outside, mask, 20)[0] == nothing
    assert _agreement(0 * first, 0 * first, mask, 20) == (0, 0)


def test_trial_fits_know_nothing_of_hidden_blocks():
    """Windows and coarse levels of the fit reach beyond a mask, so what is hidden must not be in the image either."""
    fixed = channel()
    black, _ = _blocks(fixed, RegistrationParams())
    noise = np.random.default_rng(1).random(black.shape, dtype=np.float32)
    other = replace(fixed, image=np.where(black, noise, fixed.image))
    first, second = _without(fixed, black), _without(other, black)
    np.testing.assert_array_equal(first.image, second.image)
    assert first.image.dtype == np.float32
    np.testing.assert_array_equal(first.image[~black], fixed.image[~black])
    assert not (first.visible() & black).any()
    # No edges where a block begins: what fills it follows its surroundings.
    middle = ndi.binary_erosion(fixed.mask, iterations=30)
    assert np.abs(first.image[middle & black] - 0.5).max() < 0.3
    steep = [ndi.gaussian_gradient_magnitude(c.image, 2)[middle & black].mean() for c in (first, fixed)]
    assert steep[0] < 0.7 * steep[1]


def test_deformation_is_kept_if_true_and_dropped_if_made_up():
    fixed = channel(shape=(260, 280))
    y, x = np.indices(fixed.image.shape)
    bend = np.stack([35 * np.sin(y / 40), 35 * np.cos(x / 45)], -1)
    quick = RegistrationParams(syn_iterations=(40, 30, 10, 0))
    true = fit_deformation(fixed, warped(fixed, bend), np.eye(3), quick, 0)
    assert true.field is not None
    assert true.quality["heldout_gain"] > 2 * true.quality["heldout_error"]
    assert true.quality["folds"] == 0
    other = channel(shape=(260, 280), seed=3)  # same outline, nothing in common inside
    soft = RegistrationParams(syn_smoothing=((3.0, 0.0),), syn_iterations=(40, 30, 10, 0))
    made_up = fit_deformation(fixed, other, np.eye(3), soft, 0)
    assert made_up.field is None
    assert "discarded" in made_up.note
    assert fit_deformation(fixed, warped(fixed, bend), np.eye(3), quick, 0, certain=True).field is not None


def test_contrast_of_a_faint_pattern_stays_faint():
    own = channel(shape=(260, 280), wavelength=5.0)
    left = np.indices(own.image.shape)[1] < 140
    faint = replace(own, image=np.where(left, 0.5 + 0.1 * (own.image - 0.5), own.image).astype(np.float32))
    deep = ndi.binary_erosion(own.mask, iterations=20)
    spread = [contrast(faint)[deep & side].std() for side in (left, ~left)]
    assert 0.05 < spread[0] / spread[1] < 0.2, "a tenth of the contrast, not made equal"
    # Units of the contrast of the tissue: another exposure changes nothing, and is no division by zero.
    np.testing.assert_allclose(contrast(replace(own, image=0.3 * own.image)), contrast(own), atol=1e-4)
    flat = contrast(replace(own, image=np.where(own.mask, np.float32(0.5), np.float32(0))))
    np.testing.assert_allclose(flat, 0, atol=1e-3)


def test_contrast_does_not_see_the_outline():
    own = channel()
    shaded = replace(own, image=np.where(own.mask, own.image, np.float32(5)))
    np.testing.assert_array_equal(inside_only(shaded), inside_only(own))
    np.testing.assert_array_equal(contrast(shaded), contrast(own))


def test_contrast_takes_part_unless_stains_differ_in_it():
    fixed = serial_section(5, regions=5.0)
    y, x = np.indices(fixed.image.shape)
    bend = np.stack([35 * np.sin(y / 40), 35 * np.cos(x / 45)], -1)
    moving = warped(serial_section(6, regions=5.0), bend)
    quick = RegistrationParams(syn_iterations=(40, 30, 10, 0))
    assert fit_deformation(fixed, moving, np.eye(3), quick, 0).quality["syn_look"] == "contrast"
    inverse = replace(moving, image=np.where(moving.mask, 1 - moving.image, 0).astype(np.float32))
    assert fit_deformation(fixed, inverse, np.eye(3), quick, 0).quality["syn_look"] == "information"


def serial_section(seed: int, regions: float = 10.0) -> Channel:
    """A section that shares its regions with the others, and half of its contrast; its cells are its own."""
    shared = channel(shape=(260, 280), wavelength=regions)
    cells = channel(shape=(260, 280), wavelength=1.5, seed=seed)
    return replace(shared, image=0.5 * (shared.image + cells.image))


def test_sections_that_share_regions_and_no_cells():
    """That both halves ask for the same deformation tells a true one from noise."""
    first, second = serial_section(5), serial_section(6)
    quick = RegistrationParams(syn_iterations=(40, 30, 10, 0))
    y, x = np.indices(first.image.shape)
    bend = np.stack([35 * np.sin(y / 40), 35 * np.cos(x / 45)], -1)
    bent = fit_deformation(first, warped(second, bend), np.eye(3), quick, 0)
    assert bent.field is not None
    assert bent.quality["agreement"] > 4 * bent.quality["agreement_error"]
    points = np.column_stack([x[first.mask], y[first.mask]])[::97]
    true = bend[points[:, 1], points[:, 0]]
    found = pushed(bent.field, (points + 0.5) * SIZE) - (points + 0.5) * SIZE
    assert np.median(np.linalg.norm(found - true, axis=1)) < 0.7 * np.median(np.linalg.norm(true, axis=1))
    # In place, two halves may agree by chance. Most such deformations make hidden tissue fit worse.
    in_place = [(5, 6), (11, 12), (13, 14), (15, 16), (17, 18), (27, 28)]
    still = [fit_deformation(serial_section(a), serial_section(b), np.eye(3), quick, 0) for a, b in in_place]
    agree = [s for s in still if s.quality["agreement"] > 2 * s.quality["agreement_error"]]
    kept = [s.quality["displacement_median"] for s in still if s.field is not None]
    assert len(kept) <= 2
    assert len(agree) >= len(kept) + 2
    assert any("fit worse" in s.note for s in still)
    assert max(kept, default=0.0) < 0.75 * np.median(np.linalg.norm(true, axis=1))


def test_section_drawn_in_the_common_frame():
    own = channel()
    placed = Placed(own, shift(250, -70))
    drawn = placed.drawn(np.array([250.0, -70.0]), own.image.shape)
    np.testing.assert_allclose(drawn.image, own.image, atol=1e-5)
    np.testing.assert_array_equal(drawn.mask, own.mask)
    assert drawn.visible().all()
    outside = placed.drawn(np.array([0.0, -70.0]), (160, 30))
    assert not outside.visible()[:, :24].any()
    assert outside.in_frame(np.array([[270.0, 100.0], [100.0, 100.0], [9e9, 0]])).tolist() == [True, False, False]
    assert shrink(drawn, 20.0).visible().shape == (80, 90)


# --- by hand


@pytest.mark.parametrize("mirrored", [False, True])
def test_landmarks_fix_a_rigid_placement(mirrored):
    truth = pose(200, [10, 20], [300, -50], mirrored=mirrored)
    points = np.random.default_rng(0).uniform(0, 1000, (6, 2))
    np.testing.assert_allclose(landmark_matrix(points, points @ truth[:2, :2].T + truth[:2, 2], "rigid"), truth)


def test_landmarks_fix_an_affine_and_two_a_turn():
    truth = np.array([[1.1, 0.2, 5], [-0.1, 0.9, 7], [0, 0, 1]])
    points = np.random.default_rng(0).uniform(0, 1000, (5, 2))
    np.testing.assert_allclose(landmark_matrix(points, points @ truth[:2, :2].T + truth[:2, 2], "affine"), truth)
    turn = pose(-40, [0, 0], [3, 4])
    np.testing.assert_allclose(
        landmark_matrix(points[:2], points[:2] @ turn[:2, :2].T + turn[:2, 2], "affine"), turn, atol=1e-9
    )


@pytest.mark.parametrize(
    "moving", [np.zeros((1, 2)), np.zeros((3, 3)), np.zeros((4, 2)), [[0, 0], [1, 1], [2, 2]], [[0, np.nan], [1, 0]]]
)
def test_bad_landmarks(moving):
    with pytest.raises(ValueError, match="Landmarks"):
        landmark_matrix(moving, moving, "affine")


@pytest.mark.parametrize("matrix", [np.eye(2), np.zeros((3, 3)), np.full((3, 3), np.nan), np.ones((3, 3))])
def test_bad_matrix(matrix):
    with pytest.raises(ValueError, match="invertible"):
        check_matrix(matrix)


# --- chain


def pair(matrix, verdict="ok", score=0.5) -> PairResult:
    return PairResult(matrix, "affine", {"verdict": verdict, "score": score, "reasons": []}, (0.0, 0.0, 1e3, 800.0))


def test_given_sections_are_links():
    placed = chain_to_reference({("b", "c"): pair(shift(10))}, ["a", "b", "c"], "a", given={"b": shift(500)})
    assert placed["b"].route == "given"
    assert placed["c"].path == ("c", "b", "a")
    assert placed["c"].matrix[0, 2] == 510
    assert placed["c"].verdict == "ok"


def test_sound_pairs_that_contradict_make_a_section_weak():
    """One of them is upside down, and nobody can tell which."""
    pairs = {("a", "b"): pair(shift(10)), ("b", "c"): pair(pose(180, [500, 400], [500, 400]))}
    pairs["a", "c"] = pair(shift(20), score=0.6)
    placed = chain_to_reference(pairs, ["a", "b", "c"], "a")["c"]
    assert placed.verdict == "weak"
    assert placed.route == "direct"


def test_weak_neighbor_against_a_sound_bridge():
    pairs = {("a", "b"): pair(shift(10)), ("b", "c"): pair(shift(0)), ("c", "d"): pair(shift(900), "weak", 0.3)}
    pairs["b", "d"] = pair(shift(30))
    placed = chain_to_reference(pairs, ["a", "b", "c", "d"], "a")["d"]
    assert placed.path == ("d", "b", "a")
    assert placed.verdict == "ok"


# --- runs


def test_runs_in_order():
    assert run_all(divmod, [(7, 2), (9, 4)], "Dividing", show=False) == [(3, 1), (2, 1)]
    assert run_all(divmod, [], "Dividing", show=False) == []
