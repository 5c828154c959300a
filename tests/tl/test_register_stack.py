"""register_stack: methods, manual help, skipping, what is written and when nothing is."""

from __future__ import annotations

import copy
import json
import warnings
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from spatialdata.transformations import Affine, get_transformation, set_transformation

import spatial_impute as si
from spatial_impute._stack.elements import element_affine, load_transform, registration_state
from spatial_impute._stack.record import load_record
from spatial_impute._stack.state import require_current

# A coarse and short search: the sections are turned by 25 degrees at most and have 18 angles to be found at.
QUICK = {"n_angles": 18, "n_candidates": 2, "working_side": 160, "syn_side": 160, "search_side": 96}
# One softness less, and deformations of small tissue in one go.
SOFT = QUICK | {"syn_smoothing": ((6.0, 1.0),)}


@pytest.fixture(scope="module")
def made():
    """Three sections with elastic motion, and the true place of their spots."""
    return si.datasets.synthetic_stack(3, extent=1400.0, n_genes=9, elastic_amplitude=20.0, truth=True)


@pytest.fixture
def sdata(made):
    return copy.deepcopy(made[0])


@pytest.fixture(scope="module")
def affine(made):
    sdata = copy.deepcopy(made[0])
    si.tl.register_stack(sdata, registration_params=QUICK)
    return sdata


@pytest.fixture(scope="module")
def syn(made):
    sdata = copy.deepcopy(made[0])
    si.tl.register_stack(sdata, method="syn", registration_params=SOFT)
    return sdata


def errors(sdata, truth) -> pd.Series:
    """Median distance in um of the spots from their true place, by section."""
    table = sdata.tables["stack"]
    distance = np.linalg.norm(table.obsm["spatial_3d"] - truth[table.obs_names].obsm["spatial_3d"], axis=1)
    return pd.Series(distance).groupby(table.obs["section"].to_numpy()).median()


def rows(sdata) -> dict:
    return load_record(sdata).registration["sections"]


@pytest.fixture
def s2_known(affine) -> dict[str, np.ndarray]:
    """`transformations` for tests of section s0 alone."""
    return {"s2": np.array(rows(affine)["s2"]["matrix"])}


def test_affine_finds_the_sections(affine, made):
    found = errors(affine, made[1])
    assert found["s1"] == 0
    assert found.max() < 35  # what an elastic motion of 20 um leaves
    assert all(row["verdict"] == "ok" and not row["deformed"] for row in rows(affine).values())
    assert not [key for key in affine.images if "displacement" in key]


def test_syn_comes_closer_than_affine(syn, affine, made):
    assert any(row["deformed"] for row in rows(syn).values())
    for name, row in rows(syn).items():
        before, after = errors(affine, made[1])[name], errors(syn, made[1])[name]
        if row["deformed"]:
            assert after < 0.95 * before
            assert row["deformation"]["folds"] == 0
            assert syn.images[f"{name}_displacement"].dtype == np.float32
            assert set(get_transformation(syn.images[f"{name}_displacement"], get_all=True)) == {"aligned"}
        else:
            assert after == pytest.approx(before, abs=3)
            assert f"{name}_displacement" not in syn.images


def test_syn_elements_points_and_table_agree(syn, tmp_path):
    """The affine part is a transformation; with the displacement it gives obsm, also after a trip through zarr."""
    import spatialdata as sd

    name = next(name for name, row in rows(syn).items() if row["deformed"])
    syn.write(tmp_path / "syn.zarr")
    read = sd.read_zarr(tmp_path / "syn.zarr")
    matrix = element_affine(read.shapes[f"{name}_spots"], "aligned") @ np.linalg.inv(
        element_affine(read.shapes[f"{name}_spots"], name)
    )
    np.testing.assert_allclose(matrix, rows(read)[name]["matrix"], atol=1e-8)
    si.tl.warp_element(read, f"{name}_spots")
    table = read.tables["stack"]
    of_section = (table.obs["section"] == name).to_numpy()
    circles = read.shapes[f"{name}_spots_aligned"].loc[table.obs["instance_id"].to_numpy()[of_section]]
    np.testing.assert_allclose(
        np.column_stack([circles.geometry.x, circles.geometry.y]), table.obsm["spatial_3d"][of_section, :2], atol=1e-3
    )
    json.dumps(read.attrs)  # JSON only


def test_registering_again_takes_old_displacements_away(syn):
    sdata = copy.deepcopy(syn)
    si.tl.register_stack(sdata, method="rigid", registration_params=QUICK)
    assert not [key for key in sdata.images if "displacement" in key]
    for row in rows(sdata).values():
        np.testing.assert_allclose(np.linalg.svd(np.array(row["matrix"])[:2, :2], compute_uv=False), 1, atol=1e-6)


def test_result_without_writing(sdata, affine):
    before = {name: get_transformation(e, get_all=True).copy() for _, name, e in sdata.gen_spatial_elements()}
    result = si.tl.register_stack(sdata, registration_params=QUICK, inplace=False)
    assert {name: get_transformation(e, get_all=True) for _, name, e in sdata.gen_spatial_elements()} == before
    assert "spatial_3d" not in sdata.tables["stack"].obsm
    assert load_record(sdata).registration is None
    np.testing.assert_array_equal(result.matrices["s0"], rows(affine)["s0"]["matrix"])  # same seed, same result
    points = np.array([[500.0, 600], [700, 650]])
    np.testing.assert_allclose(result.transforms["s0"].inverse(result.transforms["s0"].points(points)), points)
    assert list(result.sections.index) == ["s0", "s1", "s2"]
    assert {"error_um", "error_p90_um", "error_patches", "margin", "runner_up", "folds"} <= set(result.quality)


def test_given_matrix_is_the_answer(sdata):
    matrix = np.array([[0.9, -0.1, 70], [0.1, 0.9, -30], [0, 0, 1]])
    si.tl.register_stack(sdata, registration_params=QUICK, transformations={"s0": matrix})
    assert rows(sdata)["s0"]["route"] == "given"
    np.testing.assert_array_equal(rows(sdata)["s0"]["matrix"], matrix)
    table = sdata.tables["stack"]
    of_section = (table.obs["section"] == "s0").to_numpy()
    expected = table.obsm["spatial"][of_section] @ matrix[:2, :2].T + matrix[:2, 2]
    np.testing.assert_allclose(table.obsm["spatial_3d"][of_section, :2], expected)
    assert {pair["moving"] for pair in load_record(sdata).registration["pairs"]} == {"s2"}


@pytest.mark.parametrize("mistake", ["pixels", "opposite direction"])
def test_given_place_beside_the_tissue_is_weak(sdata, affine, s2_known, mistake):
    place = np.array(rows(affine)["s0"]["matrix"]) @ np.array([[0.0, -1, 1500], [1, 0, 200], [0, 0, 1]])
    wrong = np.diag([0.3, 0.3, 1]) @ place if mistake == "pixels" else np.linalg.inv(place)
    with pytest.warns(
        UserWarning,
        match=r"s0: The place is given, but the tissue there overlaps that of 's1' by a Dice of 0\.\d\d only",
    ):
        si.tl.register_stack(sdata, registration_params=QUICK, transformations=s2_known | {"s0": wrong})
    assert rows(sdata)["s0"]["verdict"] == "weak"
    np.testing.assert_array_equal(rows(sdata)["s0"]["matrix"], wrong)  # used as it is


def test_landmarks_as_answer_and_as_start(sdata, affine, s2_known):
    matrix = np.array(rows(affine)["s0"]["matrix"])
    here = np.array([[300.0, 400], [900, 350], [700, 1000], [400, 900]])
    there = here @ matrix[:2, :2].T + matrix[:2, 2]
    answer = si.tl.register_stack(
        sdata, registration_params=QUICK, transformations=s2_known | {"s0": (here, there)}, inplace=False
    )
    np.testing.assert_allclose(answer.matrices["s0"], matrix, atol=1e-6)
    off = there + np.random.default_rng(0).normal(0, 40, there.shape)
    started = si.tl.register_stack(
        sdata, registration_params=QUICK, transformations=s2_known, initial={"s0": (here, off)}, inplace=False
    )
    assert np.linalg.norm(here @ started.matrices["s0"][:2, :2].T + started.matrices["s0"][:2, 2] - there) < 30
    row = started.quality.set_index("moving").loc["s0"]
    assert row["margin"] == row["score"]  # no other pose was looked at


def test_three_landmarks_say_nothing_of_their_error(sdata, caplog, monkeypatch):
    """An affine map goes through any three points: an error of 0 would look like a good placement."""
    monkeypatch.setattr("spatial_impute._settings.logger.propagate", True)
    here = np.array([[300.0, 400], [900, 350], [700, 1000], [400, 900]])
    there = here + np.array([[20, 0], [0, -30], [10, 10], [0, 50]])
    places = {"s0": (here[:3], there[:3]), "s2": (here, there)}
    with caplog.at_level("INFO", logger="spatial_impute"):
        si.tl.register_stack(sdata, registration_params=QUICK, transformations=places, inplace=False)
    assert "s0: three landmarks always fit exactly" in caplog.text
    assert "s0: the median error" not in caplog.text
    assert "s2: the median error of the landmarks is" in caplog.text


def test_start_of_a_section_behind_another_one(sdata, affine):
    """The start of s2 is in the frame of the reference s0; its neighbor s1 has to be placed first."""
    chained = si.tl.register_stack(sdata, reference="s0", registration_params=QUICK, policy="sequential", inplace=False)
    start = chained.matrices["s2"] @ np.array([[1, 0.02, 25], [-0.02, 1, -20], [0, 0, 1]])
    again = si.tl.register_stack(
        sdata, reference="s0", registration_params=QUICK, policy="sequential", initial={"s2": start}, inplace=False
    )
    corners = np.array([[300.0, 300, 1], [1100, 300, 1], [700, 1100, 1]])
    moved = corners @ (again.matrices["s2"] - chained.matrices["s2"]).T
    assert np.linalg.norm(moved, axis=1).max() < 15


def test_sections_already_aligned(sdata, affine):
    matrix = np.array(rows(affine)["s2"]["matrix"])
    for name in ("s2_image", "s2_spots"):
        own = element_affine(sdata[name], "s2")
        set_transformation(sdata[name], Affine(matrix @ own, ("x", "y"), ("x", "y")), "aligned")
    result = si.tl.register_stack(
        sdata, registration_params=QUICK, transformations={"s0": "aligned", "s2": "aligned"}, inplace=False
    )
    np.testing.assert_allclose(result.matrices["s2"], matrix, atol=1e-9)
    np.testing.assert_array_equal(result.matrices["s0"], np.eye(3))  # no transformation: its frame is the common one
    assert result.quality.empty


def blank(sdata, name: str) -> None:
    """Make a section all glass."""
    sdata.images[f"{name}_image"].data = np.full_like(np.asarray(sdata.images[f"{name}_image"].data), 240)


def test_skipped_section_needs_a_place_for_its_spots(sdata):
    with pytest.raises(ValueError, match=r"'s2' is skipped but has spots.*transformations"):
        si.tl.register_stack(sdata, registration_params=QUICK, skip="s2")
    assert "spatial_3d" not in sdata.tables["stack"].obsm
    blank(sdata, "s2")  # never read
    si.tl.register_stack(sdata, registration_params=QUICK, skip=["s2"], transformations={"s2": np.eye(3)})
    assert rows(sdata)["s2"]["route"] == "given"
    assert np.isfinite(sdata.tables["stack"].obsm["spatial_3d"]).all()


def test_skipped_section_is_bridged_and_left_out():
    inputs = si.datasets.synthetic_stack(3, measured=["s0"], extent=1400.0, n_genes=3)
    images = {name: np.asarray(inputs.images[f"{name}_image"].data) for name in ("s0", "s1", "s2")}
    images["s1"] = np.full_like(images["s1"], 240)
    stack = si.pp.assemble_stack(images, mpp=4.0, section_spacing=20.0)
    with pytest.raises(ValueError, match=r"'s1'.*No tissue found.*skip=\['s1'\]"):
        si.tl.register_stack(stack, reference="s0", registration_params=QUICK)
    assert load_record(stack).registration is None
    si.tl.register_stack(stack, reference="s0", registration_params=QUICK, skip=["s1"])
    assert list(rows(stack)) == ["s0", "s2"]
    assert rows(stack)["s2"]["path"] == ["s2", "s0"]
    assert "aligned" not in get_transformation(stack.images["s1_image"], get_all=True)
    with pytest.raises(KeyError, match=r"'s1' not found.*transformations"):
        si.tl.warp_element(stack, "s1_image")
    assert si.pl.registration(stack, return_ax=True).shape == (1, 3)


def strip(sdata) -> None:
    """Replace the tissue of section s2 by a strip of something else."""
    image = sdata.images["s2_image"]
    noise = np.random.default_rng(0).integers(90, 200, image.shape)
    y, x = np.mgrid[: image.shape[1], : image.shape[2]]
    image.data = np.where((x < 90) & (y > 60) & (y < 330), noise, 240).astype(np.uint8)


def test_failure_is_loud_and_writes_nothing(sdata):
    strip(sdata)
    with pytest.raises(ValueError, match=r"failed for 1 of 3 sections\. s2: .*pl\.registration.*skip"):
        si.tl.register_stack(sdata, method="syn", registration_params=QUICK)
    assert load_record(sdata).registration is None
    with pytest.warns(UserWarning, match="failed for 1 of 3"):
        si.tl.register_stack(sdata, method="syn", registration_params=QUICK, on_failure="warn")
    assert rows(sdata)["s2"]["verdict"] == "failed"
    assert not rows(sdata)["s2"]["deformed"]  # a deformation would only make it look better


def test_wrong_pixel_size_is_refused(sdata):
    for name in ("s2_image", "s2_spots"):
        own = element_affine(sdata[name], "s2")
        set_transformation(sdata[name], Affine(np.diag([10, 10, 1]) @ own, ("x", "y"), ("x", "y")), "s2")
    with pytest.raises(ValueError, match=r"areas of .*Check the pixel sizes"):
        si.tl.register_stack(sdata, registration_params=QUICK)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"method": "magic"}, ValueError, "method"),
        ({"transformations": {"s9": np.eye(3)}}, KeyError, "'s9' not found"),
        ({"transformations": {"s1": np.eye(3)}}, ValueError, "must not name the reference 's1'"),
        ({"transformations": {"s0": np.zeros((3, 3))}}, ValueError, r"transformations\['s0'\].*invertible"),
        ({"transformations": {"s0": "identity"}}, ValueError, "aligned"),
        ({"initial": {"s0": (np.zeros((3, 2)), np.zeros((2, 2)))}}, ValueError, "same n >= 2"),
        ({"initial": {"s0": (np.eye(3)[:, :2] * [[0, 0]] + [[1, 2]], np.ones((3, 2)))}}, ValueError, "coincide"),
        ({"initial": {"s0": np.eye(3)}, "transformations": {"s0": np.eye(3)}}, ValueError, "needs no start"),
        ({"skip": ["s1"]}, ValueError, "reference 's1' cannot be skipped"),
        ({"skip": ["s7"]}, KeyError, "'s7' not found"),
        ({"registration_params": {"syn_smoothing": ((6.0,),)}}, ValueError, "syn_smoothing"),
    ],
)
def test_bad_arguments(sdata, kwargs, error, match):
    with pytest.raises(error, match=match):
        si.tl.register_stack(sdata, **kwargs)


def test_parallel_equals_serial(sdata, affine):
    from distributed import Client

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of distributed, on ports and event loops
        with Client(n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None):
            result = si.tl.register_stack(sdata, registration_params=QUICK, inplace=False)
    for name, matrix in result.matrices.items():
        np.testing.assert_allclose(matrix, rows(affine)[name]["matrix"], atol=1e-9)


@pytest.mark.parametrize(
    ("scales", "says"),
    [
        ({"a": 1.0, "b": 2.0, "c": 2.03}, "scaled by about 2.0"),
        ({"a": 1.0, "b": 0.5, "c": 0.49, "d": 0.5}, "scaled by about 0.5"),
        ({"a": 1.0, "b": 1.2, "c": 1.22}, "scaled by about 1.2"),
        ({"a": 1.0, "b": 1.05, "c": 1.04}, None),
        ({"a": 1.0, "b": 2.0, "c": 1.0}, None),  # one section alone may have torn
        ({"a": 1.0, "b": 1.3, "c": 0.8}, None),
    ],
)
def test_sections_that_all_want_one_scale_make_the_pixel_size_suspect(scales, says, caplog, monkeypatch):
    from spatial_impute._settings import logger
    from spatial_impute.tl._register_stack import _warn_of_pixel_size

    monkeypatch.setattr(logger, "propagate", True)
    _warn_of_pixel_size(scales)
    assert (f"{says}" in caplog.text and "check the pixel size" in caplog.text) if says else not caplog.text


def place_of(sdata, **kwargs) -> np.ndarray:
    return si.tl.register_stack(sdata, registration_params=QUICK, inplace=False, **kwargs).matrices["s0"]


def test_tissue_of_the_user_counts(sdata, s2_known):
    """Labels and outlines that say what the image says give the same place; a pen on the slide does no harm with them."""
    si.pp.segment_tissue(sdata)
    expected = place_of(sdata, transformations=s2_known)
    corners = np.array([[300.0, 300, 1], [1100, 300, 1], [700, 1100, 1]]).T
    image = sdata.images["s0_image"]
    pen = np.asarray(image.data).copy()
    pen[:, :, : pen.shape[2] // 16] = np.array([40, 60, 160])[:, None, None]
    image.data = pen
    for key in ("{section}_tissue", {"s0": "s0_tissue_outline", "s1": "s1_tissue"}):
        found = place_of(sdata, tissue_key=key, on_failure="warn", transformations=s2_known)
        assert np.linalg.norm(((found - expected) @ corners)[:2], axis=0).max() < 25
    known = s2_known | {"s0": found}
    si.tl.register_stack(sdata, registration_params=QUICK, tissue_key={"s0": "s0_tissue"}, transformations=known)
    assert load_record(sdata).registration["tissue"] == {"s0": "s0_tissue"}


def test_wrong_tissue_keys(sdata):
    si.pp.segment_tissue(sdata)
    with pytest.raises(KeyError, match=r"'s9' not found.*sections"):
        place_of(sdata, tissue_key={"s9": "s0_tissue"})
    with pytest.raises(KeyError, match=r"'s0_tisue' not found.*Did you mean 's0_tissue'"):
        place_of(sdata, tissue_key="{section}_tisue")
    with pytest.raises(ValueError, match=r"coordinate system 's1', found \['s0'\]"):
        place_of(sdata, tissue_key={"s1": "s0_tissue"})
    with pytest.raises(ValueError, match=r"mapping of sections.*found 's0_tissue'"):
        place_of(sdata, tissue_key="s0_tissue")


@pytest.fixture
def decided(affine, tmp_path):
    """The registered stack, and a function that saves decisions on it."""
    sdata = copy.deepcopy(affine)

    def save(sections: dict, **change) -> str:
        content = {"registration": registration_state(load_record(sdata)), "sections": sections, **change}
        (tmp_path / "checked.json").write_text(json.dumps(content))
        return str(tmp_path / "checked.json")

    return sdata, save


def test_approved_place_beside_the_tissue_is_not_reported_again(decided):
    sdata, save = decided
    wrong = np.array(rows(sdata)["s0"]["matrix"]) @ np.diag([0.3, 0.3, 1])
    with pytest.warns(UserWarning, match="The place is given"):
        si.tl.register_stack(sdata, registration_params=QUICK, transformations={"s0": wrong})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        si.tl.register_stack(sdata, registration_params=QUICK, checked=save({"s0": "approved"}))
    np.testing.assert_array_equal(rows(sdata)["s0"]["matrix"], wrong)


def test_approved_section_stays_and_the_rejected_one_moves(decided):
    sdata, save = decided
    before = rows(sdata)
    place = np.array(before["s2"]["matrix"]) @ np.array([[1, 0, 30], [0, 1, 0], [0, 0, 1.0]])
    si.tl.register_stack(sdata, checked=save({"s0": "approved", "s2": "rejected"}), transformations={"s2": place})
    after = rows(sdata)
    assert after["s0"]["matrix"] == before["s0"]["matrix"]
    assert after["s0"]["error_um"] == before["s0"]["error_um"]
    assert after["s0"]["reasons"][0] == "Approved by a person."
    np.testing.assert_allclose(after["s2"]["matrix"], place)
    assert load_record(sdata).registration["approved"] == ["s0"]


def test_decisions_on_a_section_that_is_gone_are_left_out(decided):
    sdata, save = decided
    part = sdata.filter_by_coordinate_system(["s0", "s1"])
    path = save({"s0": "approved", "s2": "approved"})
    found = si.tl.register_stack(part, checked=path, inplace=False)
    assert sorted(found.sections.index) == ["s0", "s1"]
    assert found.sections.loc["s0", "reasons"][0] == "Approved by a person."


@pytest.mark.parametrize("replaced", ["s0", "s1"])
def test_an_approval_ends_with_its_image(decided, replaced):
    from spatialdata.models import Image2DModel
    from spatialdata.transformations import get_transformation

    sdata, save = decided
    path, image = save({"s0": "approved"}), sdata.images[f"{replaced}_image"]
    own, pixels = get_transformation(image, get_all=True), np.asarray(image.data)[:, :, ::-1].copy()
    sdata.images[f"{replaced}_image"] = Image2DModel.parse(
        pixels, dims=("c", "y", "x"), c_coords=["r", "g", "b"], transformations=own
    )
    with pytest.raises(ValueError, match=rf"images of the sections \['{replaced}'\] are not the ones"):
        si.tl.register_stack(sdata, checked=path)


def test_approved_section_keeps_its_deformation(syn, tmp_path):
    sdata = copy.deepcopy(syn)
    (name,) = [n for n, row in rows(sdata).items() if row["deformed"]][:1]
    other = next(n for n in ("s0", "s2") if n != name)
    places = sdata.tables["stack"].obsm["spatial_3d"].copy()
    content = {"registration": registration_state(load_record(sdata)), "sections": {name: "approved"}}
    (tmp_path / "checked.json").write_text(json.dumps(content))
    si.tl.register_stack(sdata, checked=tmp_path / "checked.json", transformations={other: np.eye(3)})
    own = (sdata.tables["stack"].obs["section"] == name).to_numpy()
    np.testing.assert_allclose(sdata.tables["stack"].obsm["spatial_3d"][own], places[own], atol=1e-6)
    assert rows(sdata)[name]["deformed"]


def test_neighbors_are_deformed_onto_the_approved_deformation(syn, tmp_path, monkeypatch):
    sdata = copy.deepcopy(syn)
    name = next(n for n, row in rows(sdata).items() if row["deformed"])
    content = {"registration": registration_state(load_record(sdata)), "sections": {name: "approved"}}
    (tmp_path / "checked.json").write_text(json.dumps(content))
    seen = {}

    def deform_stack(images, placed, reference, **options):
        seen.update(options["kept"])
        return {}

    monkeypatch.setattr("spatial_impute.tl._register_stack.deform_stack", deform_stack)
    other = next(n for n in ("s0", "s2") if n != name)
    si.tl.register_stack(
        sdata, checked=tmp_path / "checked.json", method="syn", transformations={other: np.eye(3)}, inplace=False
    )
    assert list(seen) == [name]
    points = np.array([[500.0, 600.0], [900.0, 800.0]])
    expected = load_transform(sdata, load_record(sdata), name).pulled(points)
    np.testing.assert_allclose(seen[name].pulled(points), expected, atol=1e-3)
    assert np.abs(expected - points).max() > 0.1


@pytest.mark.parametrize(
    ("sections", "change", "kwargs", "match"),
    [
        ({"s0": "rejected"}, {}, {}, r"Sections \['s0'\] are rejected"),
        ({"s0": "maybe"}, {}, {}, "found other content"),
        ({"s0": "approved"}, {"registration": "0"}, {}, "Make the page again"),
        ({"s0": "approved"}, {}, {"initial": {"s0": np.eye(3)}}, "Use one of them"),
        ({"s0": "approved"}, {}, {"reference": "s0"}, "Use the same one"),
    ],
)
def test_wrong_decisions(decided, sections, change, kwargs, match):
    sdata, save = decided
    before = rows(sdata)
    with pytest.raises(ValueError, match=match):
        si.tl.register_stack(sdata, checked=save(sections, **change), **kwargs)
    assert rows(sdata) == before


def test_order_of_shuffled_sections_is_inferred():
    """Five sections whose tissue changes from one to the next, given in a wrong order."""
    made = si.datasets.synthetic_stack(5, extent=1400.0, section_spacing=60.0, n_genes=9, measured=["s2"])
    shuffled = ["s3", "s0", "s2", "s4", "s1"]
    frames = {name: name for name in shuffled}
    sdata = si.pp.assemble_stack(dict.fromkeys(shuffled, made), mpp=1.0, section_spacing=60.0, coordinate_system=frames)
    si.tl.register_stack(sdata, order="infer", registration_params=QUICK)
    record = load_record(sdata)
    assert list(record.names) in ([f"s{i}" for i in range(5)], [f"s{i}" for i in range(5)][::-1])
    assert [section.z for section in record.sections] == [0.0, 60.0, 120.0, 180.0, 240.0]
    table = sdata.tables["stack"]
    assert list(table.obs["section"].cat.categories) == list(record.names)
    heights = {section.name: section.z for section in record.sections}
    assert (table.obs["z"] == table.obs["section"].map(heights).astype(float)).all()
    assert (table.obsm["spatial_3d"][:, 2] == table.obs["z"]).all()
    pairs = {frozenset((row["fixed"], row["moving"])) for row in record.registration["pairs"]}
    assert set(map(frozenset, pairwise(record.names))) <= pairs
    require_current(sdata, record, table, measured=False)


def test_order_needs_all_sections_on_the_reference(sdata):
    """A section that fails there has no place to compare it at; nothing is written."""
    strip(sdata)
    with pytest.raises(ValueError, match=r"\['s2'\] could not be placed there"):
        si.tl.register_stack(sdata, order="infer", registration_params=QUICK)
    assert load_record(sdata).registration is None
