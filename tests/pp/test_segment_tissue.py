from __future__ import annotations

import numpy as np
import pytest
import shapely
import spatialdata as sd
from shapely.affinity import affine_transform
from spatialdata.transformations import Affine, get_transformation, set_transformation

import spatial_impute as si
from spatial_impute._geometry import apply_affine
from spatial_impute._stack.elements import element_affine
from spatial_impute._stack.record import load_record

MPP = 2.0
BOX = (300, 200, 1100, 1000)  # px x0, y0, x1, y1 of the tissue in 1400 x 1200 px
VESSEL = shapely.Point(700, 600).buffer(160)  # px; a lumen far larger than what is filled (160 px = 320 um radius)


def slide(*, tissue: bool = True, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    image = np.full((1200, 1400, 3), 243.0)
    if tissue:
        x0, y0, x1, y1 = BOX
        image[y0:y1, x0:x1] = [180, 90, 150]
        y, x = np.mgrid[:1200, :1400] + 0.5
        image[(x - 700) ** 2 + (y - 600) ** 2 < 160**2] = 243
    return np.clip(image + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8)


def stack_of(**images: np.ndarray):
    return si.pp.assemble_stack(images, mpp=MPP, section_spacing=10)


def true_outline():
    return shapely.box(*BOX) - VESSEL


def labelled(sdata, name: str) -> tuple[np.ndarray, np.ndarray]:
    labels = sdata.labels[f"{name}_tissue"]
    return np.asarray(labels.data), element_affine(labels, name)


def test_segment_tissue_finds_the_tissue_in_um():
    sdata = stack_of(s=slide())
    si.pp.segment_tissue(sdata)
    mask, to_um = labelled(sdata, "s")
    assert set(np.unique(mask)) == {0, 1}
    assert to_um[0, 0] == pytest.approx(8.0)
    y, x = np.mgrid[: mask.shape[0], : mask.shape[1]] + 0.5
    truth = shapely.contains_xy(true_outline(), *(apply_affine(np.column_stack([x.ravel(), y.ravel()]), to_um) / MPP).T)
    truth = truth.reshape(mask.shape)
    assert (truth & (mask > 0)).sum() / (truth | (mask > 0)).sum() > 0.95


def test_segment_tissue_outline_lies_on_the_tissue_and_keeps_the_hole():
    sdata = stack_of(s=slide())
    si.pp.segment_tissue(sdata)
    (piece,) = sdata.shapes["s_tissue_outline"].geometry
    truth = affine_transform(true_outline(), [MPP, 0, 0, MPP, 0, 0])
    assert piece.intersection(truth).area / piece.union(truth).area > 0.95
    assert len(piece.interiors) == 1
    assert piece.interiors[0].centroid.distance(shapely.Point(700 * MPP, 600 * MPP)) < 10
    assert sdata.shapes["s_tissue_outline"]["area"].iloc[0] == pytest.approx(piece.area)


def test_segment_tissue_outline_has_the_area_of_the_mask():
    sdata = stack_of(s=slide())
    si.pp.segment_tissue(sdata)
    mask, to_um = labelled(sdata, "s")
    area = mask.sum() * abs(np.linalg.det(to_um[:2, :2]))
    assert sdata.shapes["s_tissue_outline"]["area"].sum() == pytest.approx(area, rel=0.01)


def test_segment_tissue_follows_a_rotated_section():
    sdata = stack_of(s=slide())
    turn = Affine([[0, -MPP, 2400], [MPP, 0, 0], [0, 0, 1]], input_axes=("x", "y"), output_axes=("x", "y"))
    set_transformation(sdata.images["s_image"], turn, "s")
    si.pp.segment_tissue(sdata)
    truth = affine_transform(true_outline(), [0, -MPP, MPP, 0, 2400, 0])
    (piece,) = sdata.shapes["s_tissue_outline"].geometry
    assert piece.intersection(truth).area / piece.union(truth).area > 0.95


def test_segment_tissue_works_at_the_resolution_requested():
    sdata = stack_of(s=slide())
    si.pp.segment_tissue(sdata, resolution=20.0)
    mask, to_um = labelled(sdata, "s")
    assert to_um[0, 0] == pytest.approx(20.0)
    assert mask.shape == (120, 140)
    with pytest.raises(ValueError, match="`resolution` must be a positive number"):
        si.pp.segment_tissue(sdata, resolution=0)


def test_segment_tissue_of_some_sections_only():
    sdata = stack_of(a=slide(), b=slide(seed=1))
    si.pp.segment_tissue(sdata, sections="b")
    assert set(sdata.labels) == {"b_tissue"}
    assert set(sdata.shapes) == {"b_tissue_outline"}
    with pytest.raises(KeyError, match=r"'c' not found in `the stack's sections`; available: \['a', 'b'\]"):
        si.pp.segment_tissue(sdata, sections=["c"])


def test_segment_tissue_writes_nothing_when_a_section_has_no_tissue():
    sdata = stack_of(a=slide(), blank=slide(tissue=False))
    with pytest.raises(ValueError, match=r"No tissue found on `sdata.images\['blank_image'\]` \(section 'blank'\)"):
        si.pp.segment_tissue(sdata)
    assert not list(sdata.labels)
    assert not list(sdata.shapes)


def test_segment_tissue_again_replaces_its_result():
    sdata = stack_of(s=slide())
    si.pp.segment_tissue(sdata, resolution=20.0)
    si.pp.segment_tissue(sdata, resolution=10.0)
    assert labelled(sdata, "s")[0].shape == (240, 280)


def test_segment_tissue_result_survives_disk(tmp_path):
    sdata = stack_of(s=slide())
    si.pp.segment_tissue(sdata)
    sdata.write(tmp_path / "s.zarr")
    back = sd.read_zarr(tmp_path / "s.zarr")
    np.testing.assert_array_equal(labelled(back, "s")[0], labelled(sdata, "s")[0])
    assert back.shapes["s_tissue_outline"].geometry.iloc[0].equals(sdata.shapes["s_tissue_outline"].geometry.iloc[0])
    assert set(get_transformation(back.labels["s_tissue"], get_all=True)) == {"s"}


def test_segment_tissue_covers_the_spots_of_the_synthetic_stack(stack):
    si.pp.segment_tissue(stack)
    for name in load_record(stack).names:
        outline = stack.shapes[f"{name}_tissue_outline"].union_all()
        table = stack.tables["stack"]
        centers = table.obsm["spatial"][(table.obs["section"] == name).to_numpy()]
        assert shapely.contains_xy(outline, *centers.T).mean() > 0.97


def test_segment_tissue_of_a_registered_stack_is_in_the_common_frame():
    sdata = stack_of(s=slide(), t=slide(seed=1))
    matrix = np.array([[0.0, -1.0, 900.0], [1.0, 0.0, 50.0], [0.0, 0.0, 1.0]])
    si.tl.register_stack(sdata, reference="s", transformations={"t": matrix})
    si.pp.segment_tissue(sdata)
    si.pp.tile_spots(sdata, spot_diameter=55, spacing=100)
    for element in (sdata.labels["t_tissue"], sdata.shapes["t_tissue_outline"], sdata.shapes["t_spots"]):
        np.testing.assert_allclose(element_affine(element, "aligned"), matrix @ element_affine(element, "t"))
    np.testing.assert_allclose(element_affine(sdata.shapes["s_spots"], "aligned"), np.eye(3))
