from __future__ import annotations

import copy

import ants
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import gaussian_filter, shift

import spatial_impute as si
from spatial_impute._registration import SectionTransform

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


def test_a_file_of_the_user_is_kept(sdata, tmp_path):
    path = tmp_path / "s0.MAT"
    path.write_bytes(b"of ANTs")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        si.tl.write_transformation(sdata, "s0", path)
    assert path.read_bytes() == b"of ANTs"
    si.tl.write_transformation(sdata, "s0", path, overwrite=True)
    assert list(tmp_path.iterdir()) == [path]
    np.testing.assert_allclose(si.tl.read_transformation(path), MATRIX, atol=1e-3)


def test_the_home_folder_is_found(sdata, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    si.tl.write_transformation(sdata, "s0", "~/s0.txt")
    np.testing.assert_allclose(si.tl.read_transformation("~/s0.txt"), MATRIX, atol=1e-3)


def mirrored_image(sdata, name):
    """The stack with another image of a section."""
    from spatialdata.models import Image2DModel
    from spatialdata.transformations import get_transformation

    image = sdata.images[f"{name}_image"]
    own = get_transformation(image, get_all=True)
    pixels = np.asarray(image.data)[:, ::-1].copy()
    sdata.images[f"{name}_image"] = Image2DModel.parse(
        pixels, dims=("c", "y", "x"), c_coords=["r", "g", "b"], transformations=own
    )


def test_the_place_of_an_image_that_was_replaced_is_not_written(small_stack, tmp_path):
    mirrored_image(small_stack, "s0")
    with pytest.raises(ValueError, match="not the one that was registered"):
        si.tl.write_transformation(small_stack, "s0", tmp_path / "s0.txt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("end", [".tfm", ".txt"])
def test_matrices_come_back(sdata, tmp_path, end):
    si.tl.write_transformation(sdata, "s0", tmp_path / f"s0{end}")
    np.testing.assert_allclose(si.tl.read_transformation(tmp_path / f"s0{end}"), MATRIX, atol=1e-3)


def test_pixels_become_micrometres(tmp_path):
    (tmp_path / "m.txt").write_text("1, 0, 100,\n0, 1, 50\n")
    matrix = si.tl.read_transformation(tmp_path / "m.txt", section_unit=0.5, reference_unit=0.25)
    np.testing.assert_allclose(matrix @ [10, 20, 1], [30, 22.5, 1])  # 20, 40 px lie at 120, 90 px of 0.25 um


@pytest.mark.parametrize(
    "header",
    [
        "reference_x,reference_y,section_x,section_y",
        "fixed_x,fixed_y,moving_x,moving_y",
        "section_y,section_x,reference_y,reference_x",
        "ref_x,ref_y,sec_x,sec_y",
        "section_x,reference_x,section_y,reference_y",
        "fixed x,fixed y,mov x,mov y",
        "y,x,y,x",
        "y1,x1,y2,x2",
        "y_section,x_section,y_reference,x_reference",
        "section y (px),section x (px),reference y (px),reference x (px)",
        "section_row,section_col,reference_row,reference_col",
        "sy,sx,ry,rx",
        "fixedX,fixedY,movingX,movingY",
        "section_x,section_y,reference_x,reference_y,error",
    ],
)
def test_columns_in_another_order_are_refused(tmp_path, header):
    rows = "1,2,3,4,5\n5,6,7,9,5" if "error" in header else "1,2,3,4\n5,6,7,9"
    (tmp_path / "points.csv").write_text(f"{header}\n{rows}")
    with pytest.raises(ValueError, match="Change the order of the columns"):
        si.tl.read_transformation(tmp_path / "points.csv")


@pytest.mark.parametrize(
    "header",
    [
        "moving_x,moving_y,fixed_x,fixed_y",
        "sec_x,sec_y,ref_x,ref_y",
        "x,y,x,y",
        "x1,y1,x2,y2",
        "sx,sy,rx,ry",
        "section x (px),section y (px),reference x (px),reference y (px)",
        "section_col,section_row,reference_column,reference_row",
        "movingX,movingY,fixedX,fixedY",
        "mov x,mov y,z,fix x,fix y,z",
        "a,b,c,d",
    ],
)
def test_columns_in_order_are_read(tmp_path, header):
    with_z = "z" in header
    (tmp_path / "points.csv").write_text(f"{header}\n" + ("1,2,0,3,4,0\n5,6,0,7,9,0" if with_z else "1,2,3,4\n5,6,7,9"))
    here, there = si.tl.read_transformation(tmp_path / "points.csv")
    np.testing.assert_array_equal(here, [[1, 2], [5, 6]])
    np.testing.assert_array_equal(there, [[3, 4], [7, 9]])


def test_points_of_bigwarp(tmp_path):
    rows = ['"Pt-0","true","10.0","20.0","30.0","40.0"', '"Pt-1","false","1","2","3","4"']
    rows += ['"Pt-2","true","11","21","Infinity","Infinity"', '"Pt-3","true","12","22","0","32","42","0"']
    (tmp_path / "points.csv").write_text("\n".join(rows))
    here, there = si.tl.read_transformation(tmp_path / "points.csv", section_unit=2.0, reference_unit=1.0)
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
        ("a.txt", "1 0 0\n0 0 0", "invertible"),
        ("a.txt", "1 0.1 20\n\u22120.1 1 10", "6 numbers and '\u2212'"),
        ("a.txt", "1 0 20 0 1 10", "may stand row by row or column by column"),
        ("a.txt", "1\n0\n0\n1\n20\n10", "in lines of three"),
        ("a.txt", "1 0\n0 1\n20 10", "in lines of three"),
        ("a.txt", "0 1 0 -1 0 0 0 0 1", "in lines of three"),
        ("a.txt", "1 0 0\n0 1 0\n20 10 1", "last row 0, 0, 1"),
        ("a.csv", "1,0,20,0,1,10", "Save a matrix as `.txt`"),
        ("a.csv", "1,0,20\n0,1,10\n0,0,1", "Save a matrix as `.txt`"),
        ("a.csv", "1,2,3,4\n5,6,7,8\n,,1,2\n,,3,4\n,,5,6", "found 2 such rows, 0 that are not active and 3 others"),
        ("a.csv", "x,y\n1,2\n", "four numbers"),
        ("a.mat", "nonsense", "2D linear transform"),
    ],
)
def test_other_files_are_refused(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=says):
        si.tl.read_transformation(tmp_path / name)


@pytest.mark.parametrize(
    "text",
    [
        "2 3 20\n4 5 10",
        "[[2, 3, 20],\n [4, 5, 10], [0, 0, 1]]",
        "[\n [\n 2,\n 3,\n 20\n ],\n [\n 4,\n 5,\n 10\n ]\n]",
        "[2 3 20; 4 5 10]",
        "2 3 20 4 5 10 0 0 1",
        "matrix(2, 4, 3, 5, 20, 10)",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-8-sig"])
def test_matrices_are_read_as_they_are_laid_out(tmp_path, text, encoding):
    (tmp_path / "m.txt").write_text(text, encoding)
    np.testing.assert_array_equal(si.tl.read_transformation(tmp_path / "m.txt"), [[2, 3, 20], [4, 5, 10], [0, 0, 1]])


def test_text_of_another_encoding_and_one_unit_alone_are_refused(tmp_path):
    (tmp_path / "m.csv").write_text("é;1;2;3;4\né;1;2;3;5", "latin-1")
    with pytest.raises(ValueError, match="Save it as UTF-8"):
        si.tl.read_transformation(tmp_path / "m.csv")
    for name in ("section_unit", "reference_unit"):
        with pytest.raises(ValueError, match="Expected both `section_unit` and `reference_unit`"):
            si.tl.read_transformation(tmp_path / "m.csv", **{name: 0.5})


@pytest.mark.parametrize(
    ("header", "row", "pair"),
    [
        ("index,group,section_x,section_y,reference_x,reference_y", "{},7,1,{},3,4", [1, 0, 3, 4]),
        ("x,y,z,x,y,z", "1,{0},9,3,4,9", [1, 0, 3, 4]),
        ("id,moving_x,moving_y,fixed_x,fixed_y", "{},1,{},3,4", [1, 0, 3, 4]),
    ],
)
def test_a_header_tells_whether_there_is_z(tmp_path, header, row, pair):
    (tmp_path / "p.csv").write_text("\n".join([header, *(row.format(i, i) for i in range(3))]))
    section, reference = si.tl.read_transformation(tmp_path / "p.csv")
    np.testing.assert_array_equal(np.hstack([section, reference])[0], pair)
    np.testing.assert_array_equal(section[:, 1], [0, 1, 2])


@pytest.mark.parametrize("name", ["m.txt", "p.csv"])
def test_rows_that_are_left_out_are_counted_and_other_units_are_reported(tmp_path, caplog, monkeypatch, name):
    from spatial_impute._settings import logger

    monkeypatch.setattr(logger, "propagate", True)
    text = {"m.txt": "2 0 20\n0 2 10", "p.csv": "1,2,3,4\n5,6,11,12\n9,9,19,18\na,,,\nb,false,1,2,3,4"}[name]
    (tmp_path / name).write_text(text)
    si.tl.read_transformation(tmp_path / name)
    assert "2 times as large in um; check `section_unit`" in caplog.text
    assert ("3 pairs; 1 rows are not active and 1 hold no pair" in caplog.text) == (name == "p.csv")


@pytest.mark.parametrize("sep", [";", "\t"])
def test_decimal_commas_and_a_byte_order_mark_are_read(tmp_path, sep):
    path = tmp_path / "points.csv"
    path.write_text(
        "\n".join(sep.join(row) for row in [("100,5", "200,5", "300", "400"), ("1", "2", "3", "4,5")]), "utf-8-sig"
    )
    section, reference = si.tl.read_transformation(path)
    assert section.tolist() == [[100.5, 200.5], [1, 2]]
    assert reference.tolist() == [[300, 400], [3, 4.5]]


@pytest.fixture(scope="module")
def bent() -> SectionTransform:
    """A bend of up to 20 um on top of a matrix."""
    y, x = np.mgrid[:60, :60] * 40.0 + 20.0
    shift = np.stack([20 * np.sin(y / 400), 20 * np.cos(x / 500)], axis=-1).astype(np.float32)
    grid = np.diag([40.0, 40.0, 1.0])
    return SectionTransform(
        MATRIX, shift, -shift, grid
    )  # the way back is exact to a few um; tests use the one from the file


@pytest.mark.parametrize("end", [".nii.gz", ".nrrd"])
def test_fields_come_back_and_place_the_section(sdata, bent, tmp_path, end):
    sdata = copy.deepcopy(sdata)
    places = {"s0": bent, "s2": np.eye(3)}
    si.tl.register_stack(sdata, transformations=places, show_progress_bar=False)
    assert sdata.attrs["spatial_impute"]["stack"]["registration"]["sections"]["s0"]["deformed"]
    si.tl.write_transformation(sdata, "s0", tmp_path / f"s0{end}")
    found = si.tl.read_transformation(tmp_path / f"s0{end}")
    reference = np.random.default_rng(0).uniform(300, 2100, (50, 2))
    np.testing.assert_allclose(found.inverse(reference), bent.inverse(reference), atol=0.2)
    np.testing.assert_allclose(found.points(found.inverse(reference)), reference, atol=0.2)
    si.tl.register_stack(sdata, transformations=places | {"s0": found}, show_progress_bar=False)
    table = sdata.tables["stack"][sdata.tables["stack"].obs["section"] == "s0"]
    np.testing.assert_allclose(table.obsm["spatial_3d"][:, :2], found.points(table.obsm["spatial"][:, :2]), atol=0.2)


def test_ants_reads_the_field(sdata, bent, tmp_path):
    """antspyx itself, given the file, must sample the section where the transformation says."""
    sdata = copy.deepcopy(sdata)
    si.tl.register_stack(sdata, transformations={"s0": bent, "s2": np.eye(3)}, show_progress_bar=False)
    si.tl.write_transformation(sdata, "s0", tmp_path / "s0.nii.gz")
    ramp = np.mgrid[:600, :600].astype(np.float32) * 4.0  # x and y of each pixel, 4 um apart
    images = [ants.from_numpy(axis, spacing=(4.0, 4.0)) for axis in ramp]
    moved = np.stack([ants.apply_transforms(i, i, [str(tmp_path / "s0.nii.gz")]).numpy() for i in images], axis=-1)
    index = np.random.default_rng(0).integers(150, 450, (50, 2))
    np.testing.assert_allclose(moved[index[:, 0], index[:, 1]], bent.inverse(index * 4.0), atol=0.2)


def test_units_of_a_field(tmp_path):
    """A field in mm between images in um of half the size."""
    field = np.zeros((20, 20, 2), np.float32)
    field[..., 0] = 0.5
    ants.image_write(ants.from_numpy(field, spacing=(0.1, 0.1), has_components=True), str(tmp_path / "f.nrrd"))
    found = si.tl.read_transformation(tmp_path / "f.nrrd", section_unit=500.0, reference_unit=1000.0)
    np.testing.assert_allclose(found.inverse([[1000.0, 800.0]]), [[750.0, 400.0]], atol=0.01)
    np.testing.assert_allclose(found.points([[750.0, 400.0]]), [[1000.0, 800.0]], atol=0.01)


def test_composite_transform_is_the_matrix_and_the_field(tmp_path):
    """A composite of antspyx moves points as antspyx does with it."""
    rng = np.random.default_rng(0)
    fixed = gaussian_filter(rng.random((60, 50)), 3)
    moving = gaussian_filter(shift(fixed, (2, -3), mode="nearest") + 0.01 * rng.random(fixed.shape), 1)
    images = [ants.from_numpy(a, spacing=(10.0, 10.0), origin=(5.0, 5.0)) for a in (fixed, moving)]
    made = ants.registration(*images, "SyN", outprefix=str(tmp_path / "s"), write_composite_transform=True)
    found = si.tl.read_transformation(made["fwdtransforms"])
    points = pd.DataFrame(rng.uniform(100, 400, (50, 2)), columns=["x", "y"])
    expected = ants.apply_transforms_to_points(2, points, [made["fwdtransforms"]]).to_numpy()
    assert np.ptp(expected - points, axis=0).min() > 1  # not a shift alone
    np.testing.assert_allclose(found.inverse(points.to_numpy()), expected, atol=0.2)
    np.testing.assert_allclose(found.points(expected), points, atol=0.2)


@pytest.mark.parametrize("kinds", [None, [], ["Affine"]])
def test_file_that_is_no_composite(tmp_path, kinds):
    path = tmp_path / "s.h5"
    path.write_bytes(b"x")
    if kinds is not None:
        with h5py.File(path, "w") as file:
            for i, kind in enumerate(kinds):
                file[f"TransformGroup/{i}/TransformType"] = [f"{kind}Transform_float_2_2".encode()]
                file[f"TransformGroup/{i}/TransformFixedParameters"] = np.zeros(2)
    with pytest.raises(ValueError, match="0 displacement fields"):
        si.tl.read_transformation(path)


def test_image_that_is_no_field(tmp_path):
    ants.image_write(ants.from_numpy(np.zeros((20, 20), np.float32)), str(tmp_path / "f.nii.gz"))
    with pytest.raises(ValueError, match="1 values per pixel"):
        si.tl.read_transformation(tmp_path / "f.nii.gz")
