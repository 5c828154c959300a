from __future__ import annotations

import ants
import numpy as np
import pytest

import spatial_impute as si

MATRIX = np.array([[0.9, -0.3, 40.0], [0.28, 0.95, -25.0], [0, 0, 1]])


@pytest.fixture(scope="module")
def sdata():
    sdata = si.datasets.synthetic_stack()
    si.tl.register_stack(sdata, transformations={"s0": MATRIX, "s2": np.eye(3)}, show_progress_bar=False)
    return sdata


def test_matrix_of_ants_resamples_the_image_to_the_place(sdata, tmp_path):
    """antspyx itself, given the file, must find the blob of the section at its place in the reference."""
    si.tl.write_transformation(sdata, "s0", tmp_path / "s0.mat")
    blob = np.array([300.0, 200.0])  # x, y in the section, um
    y, x = np.mgrid[:600, :600]
    image = ants.from_numpy(np.exp(-((x - blob[0]) ** 2 + (y - blob[1]) ** 2) / 200).T.astype(np.float32))
    moved = ants.apply_transforms(image, image, [str(tmp_path / "s0.mat")]).numpy()
    found = np.array(np.unravel_index(np.argmax(moved), moved.shape))
    np.testing.assert_allclose(found, MATRIX[:2, :2] @ blob + MATRIX[:2, 2], atol=1)
    np.testing.assert_allclose(si.tl.read_transformation(tmp_path / "s0.mat"), MATRIX, atol=1e-3)


@pytest.mark.parametrize("end", [".tfm", ".txt"])
def test_matrices_come_back(sdata, tmp_path, end):
    si.tl.write_transformation(sdata, "s0", tmp_path / f"s0{end}")
    np.testing.assert_allclose(si.tl.read_transformation(tmp_path / f"s0{end}"), MATRIX, atol=1e-3)


def test_pixels_become_micrometres(tmp_path):
    (tmp_path / "m.txt").write_text("1, 0, 100,\n0, 1, 50\n")
    matrix = si.tl.read_transformation(tmp_path / "m.txt", section_unit=0.5, reference_unit=0.25)
    np.testing.assert_allclose(matrix @ [10, 20, 1], [30, 22.5, 1])  # 20, 40 px lie at 120, 90 px of 0.25 um


def test_points_of_bigwarp(tmp_path):
    rows = ['"Pt-0","true","10.0","20.0","30.0","40.0"', '"Pt-1","false","1","2","3","4"']
    rows += ['"Pt-2","true","11","21","Infinity","Infinity"', '"Pt-3","true","12","22","0","32","42","0"']
    (tmp_path / "points.csv").write_text("\n".join(rows))
    here, there = si.tl.read_transformation(tmp_path / "points.csv", section_unit=2.0)
    np.testing.assert_allclose(here, [[20, 40], [24, 44]])
    np.testing.assert_allclose(there, [[30, 40], [32, 42]])


def test_pairs_of_points_place_a_section(sdata, tmp_path):
    si.tl.write_transformation(sdata, "s0", tmp_path / "s0.csv")
    pairs = si.tl.read_transformation(tmp_path / "s0.csv")
    again = si.tl.register_stack(
        sdata, transformations={"s0": pairs, "s2": np.eye(3)}, inplace=False, show_progress_bar=False
    )
    np.testing.assert_allclose(again.matrices["s0"], MATRIX, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.txt", "1 2 3 4", "4 numbers"),
        ("a.txt", "1 0 0 0 0 0", "invertible"),
        ("a.csv", "x,y\n1,2\n", "four numbers"),
        ("a.mat", "nonsense", "2D linear transform"),
    ],
)
def test_other_files_are_refused(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=says):
        si.tl.read_transformation(tmp_path / name)


@pytest.mark.parametrize("sep", [";", "\t"])
def test_decimal_commas_and_a_byte_order_mark_are_read(tmp_path, sep):
    path = tmp_path / "points.csv"
    path.write_text(
        "\n".join(sep.join(row) for row in [("100,5", "200,5", "300", "400"), ("1", "2", "3", "4,5")]), "utf-8-sig"
    )
    section, reference = si.tl.read_transformation(path)
    assert section.tolist() == [[100.5, 200.5], [1, 2]]
    assert reference.tolist() == [[300, 400], [3, 4.5]]


@pytest.mark.parametrize(
    "header",
    [
        "reference_x,reference_y,section_x,section_y",
        "fixed_x,fixed_y,moving_x,moving_y",
        "section_y,section_x,reference_y,reference_x",
    ],
)
def test_columns_in_another_order_are_refused(tmp_path, header):
    (tmp_path / "pairs.csv").write_text(f"{header}\n1,2,3,4\n5,6,7,8\n9,1,2,3\n")
    with pytest.raises(ValueError, match="Change the order of the columns"):
        si.tl.read_transformation(tmp_path / "pairs.csv")


def test_columns_in_the_expected_order_are_read(tmp_path):
    (tmp_path / "pairs.csv").write_text("moving_x,moving_y,fixed_x,fixed_y\n1,2,3,4\n5,6,7,8\n")
    section, reference = si.tl.read_transformation(tmp_path / "pairs.csv")
    np.testing.assert_array_equal(section, [[1, 2], [5, 6]])
    np.testing.assert_array_equal(reference, [[3, 4], [7, 8]])
