"""Real folders and slides of other projects: each loads, or says which file is missing and what to do."""

from __future__ import annotations

import json
import shutil

import geopandas as gpd
import h5py
import numpy as np
import pandas as pd
import pytest
import shapely
from anndata import AnnData
from PIL import Image
from scipy import sparse
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Identity, Scale

import spatial_impute as si
from spatial_impute._settings import logger
from spatial_impute._stack import load_record, section_levels, spot_geometry

# folder, spots, measured spots, um per pixel of the image, width of the image
LOADS = [
    ("cytassist_2898/outs", 2898, 2898, 600),
    ("cytassist_2898", 2898, 2898, 600),
    ("muscle_vis5a", None, None, 600),
    ("tiny/seurat/visium", None, None, 2000),
    ("tiny/seurat/visium_hd", None, None, 6000),
    ("tiny/VisiumIO/10xVisium/section1", None, None, 576),
    ("tiny/VisiumIO/10xVisium/section2/outs", None, None, 576),
    ("tiny/VisiumIO", None, None, 473),
    ("tiny/squidpy", 100, 100, 2000),
]
LACKS = ["tiny/xfuse/files/visium", "tiny/xfuse/files/st", "tiny/xfuse/files/image", "tiny/VisiumIO/10xVisium"]


@pytest.mark.parametrize(("folder", "n_spots", "n_measured", "width"), LOADS)
def test_folders_of_space_ranger_load(data_dir, folder, n_spots, n_measured, width):
    sdata = si.pp.assemble_stack({"m": data_dir / "visium" / folder}, z=[0])
    section = load_record(sdata)["m"]
    level = section_levels(sdata, section)[0]
    assert level.shape[1] == width
    centers, radius, _ = spot_geometry(sdata, section)
    height_um, width_um = (n * level.pixel_size for n in level.shape)
    on_image = ((centers >= 0) & (centers <= [width_um, height_um])).all(axis=1)
    # The barcodes of that fixture were dealt to bins at random, on and off the image.
    assert on_image.mean() > (0.5 if "visium_hd" in folder else 0.999)
    assert section.mpp == pytest.approx(level.pixel_size)
    # A capture area is 6.5 or 11 mm wide; scans show somewhat more than it, fixtures are cut out of one.
    assert 3_000 < width_um < 30_000
    assert radius.min() == pytest.approx(radius.max())
    assert 0.5 <= radius[0] < 40
    table = sdata.tables["stack"]
    assert table.n_obs == (n_spots or table.n_obs)
    assert table.obs["measured"].sum() == (n_measured or table.obs["measured"].sum()) > 0
    counts = sdata.tables["m_counts"]
    assert counts.var_names.is_unique
    assert counts.n_obs == table.obs["measured"].sum()


def test_visium_lattice_gives_the_pixel_size(data_dir):
    """Spots of a row are 100 um apart, whatever the scan."""
    from scipy.spatial import cKDTree

    for folder in ("cytassist_2898", "muscle_vis5a"):
        sdata = si.pp.assemble_stack({"m": data_dir / "visium" / folder}, z=[0])
        centers = sdata.tables["stack"].obsm["spatial"]
        assert np.median(cKDTree(centers).query(centers, k=2)[0][:, 1]) == pytest.approx(100, rel=0.01)
        assert load_record(sdata)["m"].mpp_source == "spot pitch"


def test_visium_hd_bins_come_in_their_size(data_dir):
    folder = data_dir / "visium" / "tiny" / "seurat" / "visium_hd"
    for size, options in ((8, {}), (16, {"bin_size": {"m": 16}})):
        sdata = si.pp.assemble_stack({"m": folder}, z=[0], **options)
        assert spot_geometry(sdata, load_record(sdata)["m"])[1][0] == pytest.approx(size / 2)
        assert load_record(sdata)["m"].mpp_source == "metadata"
    with pytest.raises(KeyError, match=r"'2' not found in `bin sizes \(um\).*\['16', '8'\]"):
        si.pp.assemble_stack({"m": folder}, z=[0], bin_size=2)


@pytest.mark.parametrize("folder", LACKS)
def test_other_folders_say_what_is_missing(data_dir, folder):
    with pytest.raises(
        FileNotFoundError, match=r"no folder of Space Ranger, 'spatial/scalefactors_json.json' is missing"
    ):
        si.pp.assemble_stack({"m": data_dir / "visium" / folder}, z=[0], mpp=1.0)


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("spatial/tissue_positions_list.csv", "no positions of the spots: expected one of .*si.pp.tile_spots"),
        ("filtered_feature_bc_matrix.h5", "has no counts: expected 'filtered_feature_bc_matrix.h5'"),
        ("spatial/tissue_*_image.png", "has no image: expected one of .*`fullres_image=`"),
    ],
)
def test_incomplete_folders_say_what_is_missing(data_dir, tmp_path, remove, message):
    shutil.copytree(data_dir / "visium" / "tiny" / "squidpy", tmp_path / "sample", copy_function=shutil.copyfile)
    for path in (tmp_path / "sample").glob(remove):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=message):
        si.pp.assemble_stack({"m": tmp_path / "sample"}, z=[0])


def test_folders_take_the_scan_and_say_when_there_is_none(data_dir, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    folder = data_dir / "visium" / "cytassist_2898"
    coarse = si.pp.assemble_stack({"m": folder}, z=[0])
    assert "using the lowres image with" in caplog.text
    caplog.clear()
    Image.fromarray(np.full((3000, 3000, 3), 200, np.uint8)).save(tmp_path / "scan.png")
    fine = si.pp.assemble_stack({"m": folder}, z=[0], fullres_image={"m": tmp_path / "scan.png"})
    assert "no full-resolution image" not in caplog.text
    np.testing.assert_allclose(fine.tables["stack"].obsm["spatial"], coarse.tables["stack"].obsm["spatial"])
    assert load_record(coarse)["m"].mpp == pytest.approx(5 * load_record(fine)["m"].mpp)
    with pytest.raises(ValueError, match="`fullres_image` of section 'm' belongs to a folder of Space Ranger"):
        si.pp.assemble_stack({"m": np.zeros((9, 9, 3), np.uint8)}, mpp=1, z=[0], fullres_image={"m": "scan.png"})


def test_folders_of_mixed_samples_are_refused(data_dir, tmp_path):
    shutil.copytree(data_dir / "visium" / "tiny" / "squidpy", tmp_path / "sample", copy_function=shutil.copyfile)
    path = tmp_path / "sample" / "spatial" / "tissue_positions_list.csv"
    table = pd.read_csv(path, header=None)
    table[0] = "x" + table[0]
    table.to_csv(path, header=False, index=False)
    with pytest.raises(ValueError, match="counts and positions share no barcode"):
        si.pp.assemble_stack({"m": tmp_path / "sample"}, z=[0])


def test_whole_slide_images_load(data_dir):
    """A region of an Aperio slide with its pixel size; a plain TIFF, which carries none."""
    from spatial_impute._image.levels import read_window

    wsi = data_dir / "wsi"
    sdata = si.pp.assemble_stack({"cmu": wsi / "CMU-1-Small-Region.svs"}, z=[0])
    assert load_record(sdata)["cmu"].mpp == pytest.approx(0.499)
    level = section_levels(sdata, load_record(sdata)["cmu"])[0]
    assert level.shape == (2967, 2220)
    assert read_window(level, 1000, 1100, 1000, 1100).std() > 5
    kidney = wsi / "kidney-48-5.tif"
    with pytest.raises(ValueError, match=r"Pixel size of section 'k' is unknown.*`mpp="):
        si.pp.assemble_stack({"k": kidney}, z=[0])
    sdata = si.pp.assemble_stack({"k": kidney}, mpp=0.5, z=[0])
    assert section_levels(sdata, load_record(sdata)["k"])[0].shape == (901, 1493)


def hd_like() -> SpatialData:
    """What a reader of Visium HD returns: square bins as polygons, frames for the small images, several bin sizes."""
    angle = np.deg2rad(0.4)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    systems = {"id": Identity(), "id_downscaled_hires": Scale([0.25, 0.25], axes=("x", "y"))}
    sdata = SpatialData()
    image = np.random.default_rng(0).integers(0, 255, (3, 100, 100), dtype=np.uint8)
    sdata.images["id_hires_image"] = Image2DModel.parse(
        image, dims=("c", "y", "x"), transformations={"id": Scale([4, 4], axes=("x", "y"))}
    )
    for size, n in ((8, 9), (16, 4)):
        edge = size * 3.0
        corners = np.array([[0, 0], [edge, 0], [edge, edge], [0, edge]])
        squares = [
            shapely.Polygon((corners + np.array([60 + i * edge, 60 + j * edge])) @ turn.T)
            for i in range(n)
            for j in range(n)
        ]
        key = f"id_square_{size:03d}um"
        frame = gpd.GeoDataFrame(geometry=squares, index=[f"s_{i}" for i in range(n * n)])
        sdata.shapes[key] = ShapesModel.parse(frame, transformations=systems)
        obs = pd.DataFrame({"region": pd.Categorical([key] * (n * n)), "bin": frame.index}, index=frame.index)
        counts = AnnData(sparse.csr_matrix(np.ones((n * n, 3))), obs=obs)
        sdata.tables[f"square_{size:03d}um"] = TableModel.parse(
            counts, region=key, region_key="region", instance_key="bin"
        )
    return sdata


def test_assemble_stack_takes_bins_of_visium_hd():
    source = hd_like()
    with pytest.raises(
        ValueError, match=r"several bin elements \['id_square_008um', 'id_square_016um'\].*`shapes_key=`"
    ):
        si.pp.assemble_stack({"m": source}, mpp=1 / 3, z=[0])
    sdata = si.pp.assemble_stack({"m": source}, mpp=1 / 3, z=[0], shapes_key="id_square_008um")
    centers, radius, _ = spot_geometry(sdata, load_record(sdata)["m"])
    np.testing.assert_allclose(radius, 4.0, rtol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(np.diff(centers[:9], axis=0), axis=1), 8.0, rtol=1e-3)
    assert sdata.tables["stack"].obs["measured"].all()
    assert load_record(si.pp.assemble_stack({"m": source}, spot_pitch=16, z=[0], shapes_key="id_square_016um"))[
        "m"
    ].mpp == pytest.approx(4 / 3, rel=1e-3)


def xenium_like() -> SpatialData:
    """What a reader of Xenium returns, with an H&E added: circles and outlines of cells, fluorescence in five channels."""
    rng = np.random.default_rng(0)
    sdata = SpatialData()
    sdata.images["morphology_focus"] = Image2DModel.parse(rng.integers(0, 9, (5, 80, 80)).astype(np.uint16))
    sdata.images["he_image"] = Image2DModel.parse(
        rng.integers(0, 255, (3, 40, 40), dtype=np.uint8), transformations={"global": Scale([2, 2], axes=("x", "y"))}
    )
    place, ids = rng.uniform(10, 70, (12, 2)), [f"c{i}" for i in range(12)]
    points = gpd.GeoDataFrame({"radius": rng.uniform(2, 4, 12)}, geometry=gpd.points_from_xy(*place.T), index=ids)
    sdata.shapes["cell_circles"] = ShapesModel.parse(points)
    outlines = gpd.GeoDataFrame(geometry=points.geometry.buffer(3), index=ids)
    sdata.shapes["cell_boundaries"] = ShapesModel.parse(outlines)
    obs = pd.DataFrame({"region": pd.Categorical(["cell_circles"] * 12), "cell_id": ids}, index=ids)
    sdata.tables["table"] = TableModel.parse(
        AnnData(sparse.csr_matrix(np.ones((12, 2))), obs=obs),
        region="cell_circles",
        region_key="region",
        instance_key="cell_id",
    )
    return sdata


def test_assemble_stack_takes_xenium():
    sdata = si.pp.assemble_stack({"x": xenium_like()}, mpp=0.2125, z=[0])
    assert section_levels(sdata, load_record(sdata)["x"])[0].shape == (40, 40)  # the colour image, though coarser
    assert sdata.tables["stack"].obs["measured"].sum() == 12
    with pytest.raises(ValueError, match=r"shapes\['cell_boundaries'\] holds neither circles nor squares"):
        si.pp.assemble_stack({"x": xenium_like()}, mpp=0.2125, z=[0], shapes_key="cell_boundaries")


def test_hd_metadata_win_over_the_lattice(data_dir):
    folder = data_dir / "visium" / "tiny" / "seurat" / "visium_hd" / "binned_outputs" / "square_016um"
    factors = json.loads((folder / "spatial" / "scalefactors_json.json").read_text())
    sdata = si.pp.assemble_stack({"m": folder}, z=[0])
    expected = factors["microns_per_pixel"] / factors["tissue_hires_scalef"]
    assert load_record(sdata)["m"].mpp == pytest.approx(expected)


ORDER = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]


@pytest.fixture
def sample():
    """Writer of a small Visium folder without header in its positions, as Space Ranger 1 wrote it."""

    def write(folder):
        (folder / "spatial").mkdir(parents=True)
        place = np.array([(r, c) for r in range(8) for c in range(r % 2, 20, 2)])
        ids = [f"{'ACGT'[i % 4]}{i:06d}-1" for i in range(len(place))]
        table = pd.DataFrame({"barcode": ids, "in_tissue": 1, "array_row": place[:, 0], "array_col": place[:, 1]})
        table["pxl_row_in_fullres"] = (200 + 43.3 * place[:, 0]).round().astype(int)
        table["pxl_col_in_fullres"] = (100 + 25 * place[:, 1]).round().astype(int)
        table.to_csv(folder / "spatial" / "tissue_positions_list.csv", index=False, header=False)
        Image.new("RGB", (200, 200), (240, 240, 240)).save(folder / "spatial" / "tissue_hires_image.png")
        factors = {"spot_diameter_fullres": 27.5, "tissue_hires_scalef": 0.25}
        (folder / "spatial" / "scalefactors_json.json").write_text(json.dumps(factors))
        with h5py.File(folder / "filtered_feature_bc_matrix.h5", "w") as file:
            group = file.create_group("matrix")
            group["barcodes"], group["data"] = np.array(ids, "S"), np.ones(len(ids), np.int32)
            group["indices"], group["indptr"] = np.zeros(len(ids), int), np.arange(len(ids) + 1)
            group["shape"] = np.array([1, len(ids)], np.int32)
            features = group.create_group("features")
            for key, value in {"name": "A", "id": "E1", "feature_type": "Gene Expression", "genome": "x"}.items():
                features[key] = np.array([value], "S")
        return folder

    return write


def rewrite(folder, columns, **options):
    """Positions with these columns, in a file with a header."""
    path = folder / "spatial" / "tissue_positions_list.csv"
    table = pd.read_csv(path, header=None).set_axis(ORDER, axis=1)
    path.unlink()
    table[columns].to_csv(folder / "spatial" / "tissue_positions.csv", **{"index": False, **options})


@pytest.mark.parametrize(
    ("columns", "options"),
    [
        (ORDER, {}),
        ([*ORDER[:4], ORDER[5], ORDER[4]], {}),
        (ORDER[::-1], {"encoding": "utf-8-sig"}),
        (sorted(ORDER), {"index": True}),
    ],
    ids=["as written", "x first", "reversed with byte-order mark", "sorted with index"],
)
def test_columns_of_positions_are_those_that_the_header_names(columns, options, tmp_path, sample):
    expected = si.pp.assemble_stack({"s": sample(tmp_path / "a")}, section_spacing=10).tables["stack"].obsm["spatial"]
    folder = sample(tmp_path / "b")
    rewrite(folder, columns, **options)
    found = si.pp.assemble_stack({"s": folder}, section_spacing=10).tables["stack"].obsm["spatial"]
    np.testing.assert_array_equal(found, expected)


def test_positions_without_a_column_are_refused_by_name(tmp_path, sample):
    folder = sample(tmp_path / "a")
    rewrite(folder, ORDER[:5])
    with pytest.raises(ValueError, match=r"has no columns \['pxl_col_in_fullres'\]"):
        si.pp.assemble_stack({"s": folder}, section_spacing=10)


def test_barcode_may_be_the_index_of_a_parquet_file(tmp_path, sample):
    expected = si.pp.assemble_stack({"s": sample(tmp_path / "a")}, section_spacing=10).tables["stack"].obsm["spatial"]
    path = sample(tmp_path / "b") / "spatial" / "tissue_positions_list.csv"
    table = pd.read_csv(path, header=None).set_axis(ORDER, axis=1)[ORDER[::-1]].set_index("barcode")
    table.to_parquet(path.with_name("tissue_positions.parquet"))
    found = si.pp.assemble_stack({"s": tmp_path / "b"}, section_spacing=10).tables["stack"].obsm["spatial"]
    np.testing.assert_array_equal(found, expected)
