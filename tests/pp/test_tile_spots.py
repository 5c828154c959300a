from __future__ import annotations

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
import spatialdata as sd
from anndata import AnnData
from scipy.spatial import cKDTree
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Affine, Identity, set_transformation

import spatial_impute as si
from spatial_impute._stack.elements import spot_geometry
from spatial_impute._stack.record import load_record

MPP = 5.0
BOX_UM = (300.0, 200.0, 1100.0, 1000.0)


def slide(seed: int = 0) -> np.ndarray:
    image = np.full((260, 300, 3), 243.0)
    x0, y0, x1, y1 = (int(v / MPP) for v in BOX_UM)
    image[y0:y1, x0:x1] = [180, 90, 150]
    return np.clip(image + np.random.default_rng(seed).normal(0, 3, image.shape), 0, 255).astype(np.uint8)


def measured(ids: list) -> SpatialData:
    """Section with a 4 x 4 grid of spots of 60 um at 110 um."""
    grid = np.stack(np.meshgrid(np.arange(4), np.arange(4)), axis=-1).reshape(-1, 2) * 110.0 / MPP + 80
    circles = gpd.GeoDataFrame({"radius": np.full(16, 30 / MPP)}, geometry=gpd.points_from_xy(*grid.T), index=ids)
    obs = pd.DataFrame({"region": pd.Categorical(["spots"] * 16), "id": ids}, index=[str(i) for i in ids])
    counts = AnnData(X=np.random.default_rng(0).poisson(5, (16, 3)) + 1.0, obs=obs, var=pd.DataFrame(index=list("abc")))
    return SpatialData(
        images={"image": Image2DModel.parse(np.moveaxis(slide(1), -1, 0), dims=("c", "y", "x"))},
        shapes={"spots": ShapesModel.parse(circles, transformations={"global": Identity()})},
        tables={"t": TableModel.parse(counts, region="spots", region_key="region", instance_key="id")},
    )


def bare(**others) -> SpatialData:
    sdata = si.pp.assemble_stack({"u": slide()} | others, mpp=MPP, section_spacing=10)
    si.pp.segment_tissue(sdata)
    return sdata


def centers_of(sdata: SpatialData, name: str) -> tuple[np.ndarray, np.ndarray]:
    return spot_geometry(sdata, load_record(sdata)[name])[:2]


@pytest.mark.parametrize(("layout", "n_neighbors", "per_area"), [("hex", 6, 2 / np.sqrt(3)), ("square", 4, 1.0)])
def test_tile_spots_lays_a_lattice_on_the_tissue(layout, n_neighbors, per_area):
    sdata = bare()
    si.pp.tile_spots(sdata, spot_diameter=55, spacing=80, layout=layout)
    centers, radius = centers_of(sdata, "u")
    np.testing.assert_allclose(radius, 27.5)
    distance = cKDTree(centers).query(centers, k=n_neighbors + 1)[0][:, 1:]
    np.testing.assert_allclose(distance[:, 0], 80)
    assert (np.abs(distance - 80) < 1e-6).all(axis=1).mean() > 0.5  # inner spots have all of them
    expected = 800 * 800 / 80**2 * per_area
    assert len(centers) == pytest.approx(expected, rel=0.2)
    x0, y0, x1, y1 = BOX_UM
    inside = (centers >= [x0 - 10, y0 - 10]).all(axis=1) & (centers <= [x1 + 10, y1 + 10]).all(axis=1)
    assert inside.all()


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.9, 1.0])
def test_tile_spots_keeps_spots_with_the_tissue_requested(fraction):
    sdata = bare()
    si.pp.tile_spots(sdata, spot_diameter=150, spacing=40, min_tissue_fraction=fraction)
    centers, radius = centers_of(sdata, "u")
    outline = sdata.shapes["u_tissue_outline"].union_all()
    share = np.array(
        [
            shapely.Point(c).buffer(r).intersection(outline).area / (np.pi * r**2)
            for c, r in zip(centers, radius, strict=True)
        ]
    )
    assert share.min() > fraction - 0.06
    if fraction < 1:
        assert share.min() < fraction + 0.4


def test_tile_spots_takes_its_sizes_from_the_measured_section():
    sdata = bare(m=measured([f"spot-{i}" for i in range(16)]))
    si.pp.tile_spots(sdata)
    centers, radius = centers_of(sdata, "u")
    np.testing.assert_allclose(radius, 30)
    np.testing.assert_allclose(cKDTree(centers).query(centers, k=2)[0][:, 1], 110)


def test_tile_spots_needs_sizes_without_a_measured_section():
    sdata = bare()
    with pytest.raises(ValueError, match="Give `spot_diameter` and `spacing`"):
        si.pp.tile_spots(sdata)
    assert "u_spots" not in sdata.shapes


def test_tile_spots_adds_its_rows_to_the_table():
    sdata = bare(m=measured([f"spot-{i}" for i in range(16)]))
    assert sdata.tables["stack"].n_obs == 16
    si.pp.tile_spots(sdata)
    table = sdata.tables["stack"]
    n = len(sdata.shapes["u_spots"])
    assert table.n_obs == n + 16
    assert table.obs_names.is_unique
    np.testing.assert_array_equal(table.obs["measured"], [False] * n + [True] * 16)
    assert list(table.obs["section"].cat.categories) == ["u", "m"]
    np.testing.assert_allclose(table.obsm["spatial"][:n], centers_of(sdata, "u")[0])
    assert load_record(sdata)["u"].spots == "u_spots"


@pytest.mark.parametrize(
    "ids",
    [[f"spot-{i}" for i in range(16)], list(range(16)), list(range(100, 116))],
    ids=["str", "int", "int from 100"],
)
def test_tile_spots_table_joins_with_the_spots_of_every_section(ids):
    """Also where the measured section names its spots by barcodes, which plots and squidpy rely on."""
    sdata = bare(m=measured(ids))
    si.pp.tile_spots(sdata)
    table = sdata.tables["stack"]
    for name in ("u", "m"):
        key = f"{name}_spots"
        _, joined = sd.join_spatialelement_table(
            sdata=sdata, spatial_element_names=key, table_name="stack", how="inner", match_rows="left"
        )
        assert joined is not None
        assert list(joined.obs_names) == list(table.obs_names[table.obs["section"] == name])


def test_tile_spots_result_survives_disk(tmp_path):
    sdata = bare(m=measured([f"spot-{i}" for i in range(16)]))
    si.pp.tile_spots(sdata)
    sdata.write(tmp_path / "s.zarr")
    back = sd.read_zarr(tmp_path / "s.zarr")
    pd.testing.assert_frame_equal(back.tables["stack"].obs, sdata.tables["stack"].obs)


def test_tile_spots_follows_a_rotated_section():
    sdata = si.pp.assemble_stack({"u": slide()}, mpp=MPP, z=[0])
    turn = Affine([[0, -MPP, 1300], [MPP, 0, 0], [0, 0, 1]], input_axes=("x", "y"), output_axes=("x", "y"))
    set_transformation(sdata.images["u_image"], turn, "u")
    si.pp.segment_tissue(sdata)
    si.pp.tile_spots(sdata, spot_diameter=50, spacing=80)
    centers, _ = centers_of(sdata, "u")
    box = shapely.box(1300 - BOX_UM[3], BOX_UM[0], 1300 - BOX_UM[1], BOX_UM[2]).buffer(10)
    assert shapely.contains_xy(box, *centers.T).all()
    assert len(centers) > 80


def test_tile_spots_needs_tissue_labels():
    sdata = si.pp.assemble_stack({"u": slide()}, mpp=MPP, z=[0])
    with pytest.raises(KeyError, match=r"'u_tissue' not found in `sdata.labels`.*si.pp.segment_tissue"):
        si.pp.tile_spots(sdata, spot_diameter=55, spacing=100)


def test_tile_spots_leaves_sections_that_have_spots():
    sdata = bare(m=measured(list(range(16))))
    with pytest.raises(ValueError, match="Section 'm' has spots already"):
        si.pp.tile_spots(sdata, sections=["u", "m"])
    assert "u_spots" not in sdata.shapes
    before = sdata.shapes["m_spots"].copy()
    si.pp.tile_spots(sdata)
    pd.testing.assert_frame_equal(pd.DataFrame(sdata.shapes["m_spots"]), pd.DataFrame(before))
    n = sdata.tables["stack"].n_obs
    si.pp.tile_spots(sdata)  # nothing left to do
    assert sdata.tables["stack"].n_obs == n


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "round"}, r"`layout` must be one of \['hex', 'square'\], found 'round'"),
        ({"min_tissue_fraction": 1.2}, "`min_tissue_fraction` must lie between 0 and 1"),
        ({"spot_diameter": -1}, "`spot_diameter` must be a positive number"),
        ({"spacing": 0}, "`spacing` must be a positive number"),
        ({"spot_diameter": 5000.0}, "No spot of diameter 5000 um lies on the tissue of section 'u'"),
    ],
)
def test_tile_spots_rejects_impossible_arguments(options, message):
    sdata = bare()
    with pytest.raises(ValueError, match=message):
        si.pp.tile_spots(sdata, **({"spot_diameter": 55, "spacing": 100} | options))
    assert "u_spots" not in sdata.shapes
    assert "stack" not in sdata.tables


def test_tile_spots_names_an_unknown_section():
    with pytest.raises(KeyError, match=r"'x' not found in `the stack's sections`; available: \['u'\]"):
        si.pp.tile_spots(bare(), sections="x", spot_diameter=55, spacing=100)


def test_tile_spots_lays_others_once_the_first_are_deleted():
    sdata = bare()
    si.pp.tile_spots(sdata, spot_diameter=55, spacing=100)
    n = sdata.tables["stack"].n_obs
    with pytest.raises(ValueError, match=r"delete them first: `del sdata.shapes\['u_spots'\]`"):
        si.pp.tile_spots(sdata, sections="u", spot_diameter=55, spacing=200)
    del sdata.shapes["u_spots"]
    si.pp.tile_spots(sdata, spot_diameter=55, spacing=200)
    assert len(sdata.shapes["u_spots"]) == sdata.tables["stack"].n_obs < n / 2


@pytest.mark.parametrize("jitter", [0.0, 4.0])
@pytest.mark.parametrize("kind", ["square", "hex", "narrow hex", "square with gaps", "turned square"])
def test_virtual_spots_copy_the_lattice_of_the_array(kind, jitter):
    """Pitch and layout; the nearest neighbor alone would give a pitch that is too small where spots are printed unevenly."""
    from spatial_impute._geometry import grid_in_box, lattice_of

    rng = np.random.default_rng(0)
    layout = "hex" if "hex" in kind else "square"
    points = grid_in_box(0, 0, 600 if "narrow" in kind else 4000, 3000, spacing=200.0, layout=layout)
    if "gaps" in kind:
        points = points[rng.random(len(points)) < 0.7]
    if "turned" in kind:
        points = points @ np.array([[0.8, -0.6], [0.6, 0.8]])
    pitch, found = lattice_of(points + rng.normal(0, jitter, points.shape))
    assert found == layout
    assert pitch == pytest.approx(200.0, rel=0.01)


def test_tile_spots_makes_as_many_spots_as_the_array_has():
    source = measured([f"b{i}" for i in range(16)])
    sdata = si.pp.assemble_stack({"m": source, "bare": slide()}, mpp=MPP, section_spacing=10)
    si.pp.segment_tissue(sdata, sections=["bare"])
    si.pp.tile_spots(sdata)
    centers = spot_geometry(sdata, load_record(sdata)["bare"])[0]
    assert len(np.unique(centers[:, 0].round(3))) * len(np.unique(centers[:, 1].round(3))) == len(centers)  # squares
    np.testing.assert_allclose(np.diff(np.unique(centers[:, 0].round(3))), 110.0, atol=0.1)
    assert len(centers) == 8 * 8  # on 800 x 800 um
