"""Real folders and slides of other projects: each loads, or says which file is missing and what to do."""

from __future__ import annotations

import gzip
import json
import shutil
import warnings

import anndata as ad
import geopandas as gpd
import h5py
import numpy as np
import pandas as pd
import pytest
import shapely
import tifffile
from anndata import AnnData
from PIL import Image
from scipy import sparse
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Identity, Scale

import spatial_impute as si
from spatial_impute._settings import logger
from spatial_impute._stack.elements import section_levels, spot_geometry
from spatial_impute._stack.record import load_record

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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.assign(pxl_row_in_fullres=t["pxl_row_in_fullres"] + 40), "'pxl_row_in_fullres' of .* is "),
        (lambda t: t.assign(in_tissue=0), "'in_tissue' of .* is 0 and 1"),
        (lambda t: t.iloc[1:], "1 barcodes are in one of them only"),
        (lambda t: t.sample(frac=1, random_state=0).assign(pxl_col_in_fullres=t["pxl_col_in_fullres"] + 0.2), None),
    ],
)
def test_two_files_of_positions_must_agree(data_dir, tmp_path, change, message):
    shutil.copytree(data_dir / "visium" / "tiny" / "squidpy", tmp_path / "sample", copy_function=shutil.copyfile)
    folder = tmp_path / "sample" / "spatial"
    columns = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
    table = pd.read_csv(folder / "tissue_positions_list.csv", header=None, names=columns)
    before = si.pp.assemble_stack({"m": tmp_path / "sample"}, z=[0]).tables["stack"]
    change(table).to_csv(folder / "tissue_positions.csv", index=False)
    if message is None:
        after = si.pp.assemble_stack({"m": tmp_path / "sample"}, z=[0]).tables["stack"]
        assert set(after.obs_names) == set(before.obs_names)
        return
    with pytest.raises(ValueError, match=rf"tissue_positions_list\.csv beside it contradict each other: {message}"):
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
    from spatial_impute._image.levels import stored_pixels, to_rgb

    wsi = data_dir / "wsi"
    sdata = si.pp.assemble_stack({"cmu": wsi / "CMU-1-Small-Region.svs"}, z=[0])
    assert load_record(sdata)["cmu"].mpp == pytest.approx(0.499)
    level = section_levels(sdata, load_record(sdata)["cmu"])[0]
    assert level.shape == (2967, 2220)
    assert to_rgb(stored_pixels(level, 1000, 1100, 1000, 1100), level).std() > 5
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
    table[ORDER[4:]] = table[ORDER[4:]].astype(float)
    table[columns].to_csv(folder / "spatial" / "tissue_positions.csv", **{"index": False, **options})


@pytest.mark.parametrize(
    ("columns", "options"),
    [
        (ORDER, {}),
        ([*ORDER[:4], ORDER[5], ORDER[4]], {}),
        (ORDER[::-1], {"encoding": "utf-8-sig"}),
        (sorted(ORDER), {"index": True}),
        (ORDER[::-1], {"sep": ";", "encoding": "utf-8-sig"}),
        (ORDER, {"sep": "\t", "encoding": "utf-16"}),
        (ORDER, {"sep": ";", "decimal": ",", "float_format": "%.1f"}),
    ],
    ids=["as written", "x first", "reversed with mark", "sorted with index", "semicolons", "UTF-16", "decimal commas"],
)
def test_columns_of_positions_are_those_that_the_header_names(columns, options, tmp_path, sample):
    expected = si.pp.assemble_stack({"s": sample(tmp_path / "a")}, section_spacing=10).tables["stack"].obsm["spatial"]
    folder = sample(tmp_path / "b")
    rewrite(folder, columns, **options)
    found = si.pp.assemble_stack({"s": folder}, section_spacing=10).tables["stack"].obsm["spatial"]
    np.testing.assert_array_equal(found, expected)


def test_blanks_around_the_header_of_positions_say_nothing(tmp_path, sample):
    expected = si.pp.assemble_stack({"s": sample(tmp_path / "a")}, section_spacing=10).tables["stack"].obsm["spatial"]
    folder = sample(tmp_path / "b")
    rewrite(folder, ORDER)
    path = folder / "spatial" / "tissue_positions.csv"
    path.write_text("\n" + path.read_text().replace(",".join(ORDER), " , ".join(ORDER)))
    found = si.pp.assemble_stack({"s": folder}, section_spacing=10).tables["stack"].obsm["spatial"]
    np.testing.assert_array_equal(found, expected)


def test_positions_are_in_pixels_of_the_scan_and_not_mirrored(tmp_path, sample, caplog, monkeypatch):
    """The lattice fits in any pixels and any placement: the size of the spots and the handedness of the array tell."""
    monkeypatch.setattr(logger, "propagate", True)
    for name, factor in (("small", 0.25), ("large", 4.0)):
        folder = sample(tmp_path / name)
        path = folder / "spatial" / "tissue_positions_list.csv"
        table = pd.read_csv(path, header=None).set_axis(ORDER, axis=1)
        table[ORDER[4:]] = table[ORDER[4:]] * factor
        table.to_csv(path, index=False, header=False)
        with pytest.raises(ValueError, match=r"`spot_diameter_fullres` is \d+ um; expected 25 to 100.*full resolution"):
            si.pp.assemble_stack({"s": folder}, section_spacing=10)
    si.pp.assemble_stack({"s": sample(tmp_path / "as it is")}, section_spacing=10)
    assert "mirrored" not in caplog.text
    folder = sample(tmp_path / "swapped")
    path = folder / "spatial" / "tissue_positions_list.csv"
    pd.read_csv(path, header=None)[[0, 1, 2, 3, 5, 4]].to_csv(path, index=False, header=False)
    si.pp.assemble_stack({"s": folder}, section_spacing=10)
    assert "mirrored against the array, as if their x and y were exchanged" in caplog.text


@pytest.mark.parametrize("folder", ["cytassist_2898/outs", "muscle_vis5a", "tiny/seurat/visium"])
def test_what_spatialdata_io_reads_is_the_same_section(data_dir, folder):
    io = pytest.importorskip("spatialdata_io")
    path = data_dir / "visium" / folder
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts = next(path.glob("*filtered_feature_bc_matrix.h5")).name
        source = io.visium(path, dataset_id="sample", counts_file=counts)
    with pytest.raises(ValueError, match=r"Pixel size.*is unknown. Pass `mpp=`.*`spot_pitch=` \(um, 100 for Visium\)"):
        si.pp.assemble_stack({"m": source}, z=[0])
    found = si.pp.assemble_stack({"m": source}, z=[0], spot_pitch=100)
    expected = si.pp.assemble_stack({"m": path}, z=[0])
    assert load_record(found)["m"].mpp == pytest.approx(load_record(expected)["m"].mpp, rel=0.01)
    places = [
        t.obsm["spatial"][np.lexsort(t.obsm["spatial"].T)] for t in (found.tables["stack"], expected.tables["stack"])
    ]
    assert np.abs(places[0] - places[1]).max() < 0.01 * np.ptp(places[1], axis=0).max()
    assert found.tables["m_counts"].X.sum() == expected.tables["m_counts"].X.sum()


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"array_row": "pxl_row_in_fullres", "pxl_row_in_fullres": "array_row"},
            "do not lie where a Visium array has them",
        ),
        ({"array_row": "array_col", "array_col": "array_row"}, "do not lie where a Visium array has them"),
        ({"in_tissue": "array_row", "array_row": "in_tissue"}, "column 'in_tissue' must hold 0 or 1"),
        ({"barcode": "in_tissue", "in_tissue": "barcode"}, "6 columns and no header, the first like 1"),
        ({"barcode": "array_row", "array_row": "barcode"}, "6 columns and no header, the first like 0"),
    ],
)
def test_columns_in_another_order_without_a_header_are_refused(change, message, tmp_path, sample):
    path = sample(tmp_path / "a") / "spatial" / "tissue_positions_list.csv"
    table = pd.read_csv(path, header=None).set_axis(ORDER, axis=1)
    table[[change.get(column, column) for column in ORDER]].to_csv(path, header=False, index=False)
    with pytest.raises(ValueError, match=message):
        si.pp.assemble_stack({"s": tmp_path / "a"}, section_spacing=10)


@pytest.mark.parametrize("kind", ["raw h5", "raw mtx", "words", "floats"])
def test_spots_off_the_tissue_are_not_measured(kind, tmp_path, sample, caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    folder = sample(tmp_path / "a")
    path = folder / "spatial" / "tissue_positions_list.csv"
    table = pd.read_csv(path, header=None).set_axis(ORDER, axis=1)
    inside = table["array_col"] < 12
    table["in_tissue"] = (
        inside.map({True: "True", False: "False"})
        if kind == "words"
        else inside.astype(float if kind == "floats" else int)
    )
    path.unlink()
    table.to_csv(folder / "spatial" / "tissue_positions.csv", index=False)
    counts = folder / "filtered_feature_bc_matrix.h5"
    if kind == "raw mtx":
        mtx = folder / "raw_feature_bc_matrix"
        mtx.mkdir()
        (mtx / "barcodes.tsv").write_text("\n".join(table["barcode"]))
        (mtx / "genes.tsv").write_text("E1\tA\n")
        ones = "\n".join(f"1 {i + 1} 1" for i in range(len(table)))
        (mtx / "matrix.mtx").write_text(
            f"%%MatrixMarket matrix coordinate integer general\n1 {len(table)} {len(table)}\n{ones}\n"
        )
        counts.unlink()
    else:
        counts.rename(folder / "raw_feature_bc_matrix.h5")
    obs = si.pp.assemble_stack({"s": folder}, section_spacing=10).tables["stack"].obs
    assert obs["measured"].sum() == len(obs) == inside.sum() < len(table)
    assert f"{(~inside).sum()} of {len(table)} spots with counts lie off the tissue" in caplog.text


def test_counts_without_a_position_are_reported(tmp_path, sample, caplog, monkeypatch):
    """Counts of two samples in one file: those of the other sample must not vanish in silence."""
    monkeypatch.setattr(logger, "propagate", True)
    folder = sample(tmp_path / "a")
    with h5py.File(folder / "filtered_feature_bc_matrix.h5", "r+") as file:
        file["matrix/barcodes"][:30] = [id_[:-1] + b"2" for id_ in file["matrix/barcodes"][:30]]
    si.pp.assemble_stack({"s": folder}, section_spacing=10)
    assert "30 of 80 spots with counts have no position and are left out, the first is 'A000000-2'" in caplog.text


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda m: m["barcodes"].__setitem__(1, m["barcodes"][0]),
            "counts hold the barcode 'A000000-1' more than once",
        ),
        (lambda m: m.__delitem__("indices"), "cannot be read as output of Space Ranger: .*Copy its files again"),
    ],
)
def test_damaged_counts_name_their_folder(tmp_path, sample, spoil, message):
    folder = sample(tmp_path / "a")
    with h5py.File(folder / "filtered_feature_bc_matrix.h5", "r+") as file:
        spoil(file["matrix"])
    with pytest.raises(ValueError, match=message):
        si.pp.assemble_stack({"s": folder}, section_spacing=10)


@pytest.mark.parametrize(("given", "factor"), [({"mpp": 0.5}, 0.25), ({"spot_pitch": 200.0}, 2.0), ({"mpp": 2.0}, 1.0)])
def test_a_pixel_size_that_contradicts_the_array_is_reported(tmp_path, sample, caplog, monkeypatch, given, factor):
    """That of the small image, for example: spots would lie 25 um apart."""
    monkeypatch.setattr(logger, "propagate", True)
    xy = (
        si.pp.assemble_stack({"s": sample(tmp_path / "a")}, section_spacing=10, **given).tables["stack"].obsm["spatial"]
    )
    assert xy[1, 0] - xy[0, 0] == pytest.approx(100 * factor, rel=0.01)
    assert ("the array of spots gives 2 um per full-resolution pixel, your" in caplog.text) == (factor != 1)


def test_the_file_of_counts_leads_to_its_folder(tmp_path, sample):
    with pytest.raises(ValueError, match=r"matrix\.h5': it is a table and no image. Give the folder of Space Ranger"):
        si.pp.assemble_stack({"s": sample(tmp_path / "a") / "filtered_feature_bc_matrix.h5"}, section_spacing=10)


def test_barcodes_may_have_lost_their_suffix(tmp_path, sample):
    path = sample(tmp_path / "a") / "spatial" / "tissue_positions_list.csv"
    path.write_text(path.read_text().replace("-1,", ","))
    assert si.pp.assemble_stack({"s": tmp_path / "a"}, section_spacing=10).tables["stack"].obs["measured"].all()


def test_folders_of_two_samples_and_of_cells_are_refused(tmp_path, sample):
    folder = sample(tmp_path / "a")
    shutil.copy(folder / "filtered_feature_bc_matrix.h5", folder / "B_filtered_feature_bc_matrix.h5")
    with pytest.raises(ValueError, match="counts of several samples"):
        si.pp.assemble_stack({"s": folder}, section_spacing=10)
    folder = sample(tmp_path / "b")
    (folder / "graphclust_annotated_cell_segmentations.geojson").touch()
    with pytest.raises(ValueError, match=r"holds the cells that Space Ranger 4 segmented.*binned_outputs"):
        si.pp.assemble_stack({"s": folder}, section_spacing=10)


def test_cells_alone_name_the_way_to_the_bins(sample, tmp_path):
    """A download of the cells of Space Ranger 4, whose folder has no bins beside them."""
    folder = sample(tmp_path / "outs" / "segmented_outputs")
    (folder / "cell_segmentations.geojson").touch()
    for given in (tmp_path, tmp_path / "outs", folder):
        with pytest.raises(ValueError, match=r"cells that Space Ranger 4 segmented.*to_circles"):
            si.pp.assemble_stack({"s": given}, section_spacing=10)


def test_bin_size_agrees_with_the_folder(data_dir):
    bins = data_dir / "visium/tiny/seurat/visium_hd/binned_outputs/square_008um"
    with pytest.raises(ValueError, match=r"holds bins of 8 um, found `bin_size=16`"):
        si.pp.assemble_stack({"m": bins}, z=[0], bin_size=16)
    with pytest.raises(ValueError, match=r"holds spots, which have no `bin_size`, found `bin_size=8`"):
        si.pp.assemble_stack({"m": data_dir / "visium" / "muscle_vis5a"}, z=[0], bin_size=8)
    assert load_record(si.pp.assemble_stack({"m": bins}, z=[0], bin_size=8))["m"].mpp_source == "metadata"


def test_bins_are_found_beside_a_folder_of_images(data_dir, tmp_path):
    shutil.copytree(data_dir / "visium/tiny/seurat/visium_hd", tmp_path / "hd", copy_function=shutil.copyfile)
    (tmp_path / "hd" / "spatial").mkdir()
    (tmp_path / "hd" / "spatial" / "scalefactors_json.json").write_text("{}")
    assert load_record(si.pp.assemble_stack({"m": tmp_path / "hd"}, z=[0]))["m"].mpp_source == "metadata"


@pytest.fixture
def scan(sample, tmp_path):
    """Folder whose small image shows a scan of 800 x 800 px, and that scan."""
    folder = sample(tmp_path / "outs")
    pixels = np.full((800, 800, 3), 240, np.uint8)
    pixels[150:560, 60:620] = (180, 100, 170)
    pixels[150:300, 60:200] = (90, 40, 120)
    image = Image.fromarray(pixels)
    image.resize((200, 200), Image.BOX).save(folder / "spatial" / "tissue_hires_image.png")
    return folder, image


TURNS = {
    "with x and y exchanged": Image.TRANSPOSE,
    "turned by 90 degrees clockwise": Image.ROTATE_90,  # PIL turns counterclockwise
    "turned by 90 degrees counterclockwise": Image.ROTATE_270,
    "turned by 180 degrees": Image.ROTATE_180,
    "mirrored left to right": Image.FLIP_LEFT_RIGHT,
    "mirrored top to bottom": Image.FLIP_TOP_BOTTOM,
    "with x and y exchanged, then turned by 180 degrees": Image.TRANSVERSE,
}


@pytest.mark.parametrize("turn", TURNS)
def test_a_turned_scan_is_refused_with_the_turn_that_fits(turn, scan, tmp_path):
    folder, image = scan
    image.transpose(TURNS[turn]).save(tmp_path / "scan.png")
    with pytest.raises(
        ValueError, match=rf"does not fit the scan .* of about 800 x 800 px, but would if it were {turn}\."
    ):
        si.pp.assemble_stack({"s": folder}, section_spacing=10, fullres_image={"s": tmp_path / "scan.png"})


@pytest.mark.parametrize("factor", [0.5, 0.8, 2.0])
def test_a_scan_of_another_size_is_placed_by_its_size(factor, scan, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    folder, image = scan
    image.save(tmp_path / "scan.png")
    image.resize((round(800 * factor),) * 2, Image.BOX).save(tmp_path / "other.png")
    stacks = [
        si.pp.assemble_stack({"s": folder}, section_spacing=10, fullres_image={"s": tmp_path / name})
        for name in ("scan.png", "other.png")
    ]
    assert f"is {factor:g} times as large as the scan" in caplog.text
    records = [load_record(sdata)["s"] for sdata in stacks]
    assert records[1].mpp * factor == pytest.approx(records[0].mpp)
    np.testing.assert_allclose(stacks[1].tables["stack"].obsm["spatial"], stacks[0].tables["stack"].obsm["spatial"])
    extents = [
        section_levels(s, r)[0].pixel_size * section_levels(s, r)[0].shape[1]
        for s, r in zip(stacks, records, strict=True)
    ]
    assert extents[1] == pytest.approx(extents[0])


def test_other_pictures_and_pixel_sizes_are_reported(scan, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    folder, image = scan
    noise = np.random.default_rng(0).integers(0, 255, (800, 800, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    si.pp.assemble_stack({"s": folder}, section_spacing=10, fullres_image={"s": tmp_path / "noise.png"})
    assert "shows another picture" in caplog.text
    caplog.clear()
    resolution = {"resolution": (1e4 / 0.5, 1e4 / 0.5), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(tmp_path / "scan.tif", np.asarray(image), photometric="rgb", **resolution)
    si.pp.assemble_stack({"s": folder}, section_spacing=10, fullres_image={"s": tmp_path / "scan.tif"})
    assert "the metadata of `fullres_image` give 0.5 um per pixel, the spots give 2; the latter is used" in caplog.text
    image.crop((0, 0, 800, 500)).save(tmp_path / "part.png")
    with pytest.raises(ValueError, match="of 800 x 500 px has other proportions than the scan"):
        si.pp.assemble_stack({"s": folder}, section_spacing=10, fullres_image={"s": tmp_path / "part.png"})


def legacy(folder):
    import scanpy as sc

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sc.read_visium(folder, library_id="lib")


@pytest.mark.parametrize("kind", ["AnnData", "h5ad", "lowres only", "y before x"])
def test_what_scanpy_reads_is_the_same_section(kind, scan, tmp_path):
    folder, image = scan
    factors = json.loads((folder / "spatial" / "scalefactors_json.json").read_text())
    factors |= {"tissue_lowres_scalef": 0.125, "fiducial_diameter_fullres": 45}
    (folder / "spatial" / "scalefactors_json.json").write_text(json.dumps(factors))
    image.resize((100, 100), Image.BOX).save(folder / "spatial" / "tissue_lowres_image.png")
    table = legacy(folder)
    if kind == "lowres only":
        del table.uns["spatial"][next(iter(table.uns["spatial"]))]["images"]["hires"]
    if kind == "y before x":
        names = ["pxl_row_in_fullres", "pxl_col_in_fullres"]
        table.obsm["spatial"] = pd.DataFrame(table.obsm["spatial"][:, ::-1], columns=names, index=table.obs_names)
    if kind == "h5ad":
        table.write_h5ad(tmp_path / "a.h5ad")
    found = si.pp.assemble_stack({"s": tmp_path / "a.h5ad" if kind == "h5ad" else table}, section_spacing=10)
    expected = si.pp.assemble_stack({"s": folder}, section_spacing=10)
    np.testing.assert_allclose(found.tables["stack"].obsm["spatial"], expected.tables["stack"].obsm["spatial"])
    np.testing.assert_array_equal(found.tables["s_counts"].X.toarray(), expected.tables["s_counts"].X.toarray())
    mpp = load_record(expected)["s"].mpp
    assert load_record(found)["s"].mpp == pytest.approx(2 * mpp if kind == "lowres only" else mpp)
    assert load_record(found)["s"].mpp_source == "spot pitch"
    image.save(tmp_path / "scan.png")
    fine = si.pp.assemble_stack({"s": table}, section_spacing=10, fullres_image={"s": tmp_path / "scan.png"})
    assert load_record(fine)["s"].mpp == pytest.approx(mpp / 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.uns.pop("spatial"), "no uns.'spatial'.*folder of Space Ranger.*from_legacy_anndata"),
        (lambda t: t.obsm.pop("spatial"), "no obsm.'spatial'"),
        (lambda t: t.obs.drop(columns="array_row", inplace=True), r"AnnData with no obs\['array_row'\]\. Expected"),
        (lambda t: t.uns.update(spatial=[1]), "AnnData with no uns.'spatial'.. Expected"),
        (lambda t: t.uns["spatial"].__setitem__("other", {}), "split several samples first"),
        (lambda t: next(iter(t.uns["spatial"].values()))["images"].clear(), "has no image"),
    ],
)
def test_anndata_without_a_sample_says_what_to_give(change, message, scan):
    table = legacy_with_lowres(scan)
    change(table)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        si.pp.assemble_stack({"s": table}, section_spacing=10)


def legacy_with_lowres(scan):
    folder, image = scan
    image.resize((100, 100), Image.BOX).save(folder / "spatial" / "tissue_lowres_image.png")
    return legacy(folder)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1]", "must hold names with numbers, found list"),
        (
            '{"spot_diameter_fullres": null, "tissue_hires_scalef": 0.25}',
            "`spot_diameter_fullres` must be a positive number",
        ),
        (
            '{"spot_diameter_fullres": 27.5, "tissue_hires_scalef": "x"}',
            "`tissue_hires_scalef` must be a positive number",
        ),
        ('{"microns_per_pixel": true, "bin_size_um": 8}', "`microns_per_pixel` must be a positive number"),
    ],
)
def test_scale_factors_that_are_no_numbers_are_refused_by_name(text, says, tmp_path, sample):
    folder = sample(tmp_path / "a")
    (folder / "spatial" / "scalefactors_json.json").write_text(text)
    with pytest.raises(ValueError, match=says):
        si.pp.assemble_stack({"s": folder}, section_spacing=10)


def test_backed_tables_and_a_tilde_are_taken(scan, tmp_path, monkeypatch):
    table = legacy_with_lowres(scan)
    expected = si.pp.assemble_stack({"s": table}, section_spacing=10).tables["s_counts"]
    table.write_h5ad(tmp_path / "a.h5ad")
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in (ad.read_h5ad(tmp_path / "a.h5ad", backed="r"), "~/a.h5ad"):
        found = si.pp.assemble_stack({"s": source}, section_spacing=10).tables["s_counts"]
        np.testing.assert_array_equal(found.X.toarray(), expected.X.toarray())


def test_an_anndata_of_cellxgene_brings_its_scan(scan):
    folder, image = scan
    table = legacy_with_lowres(scan)
    mpp = load_record(si.pp.assemble_stack({"s": folder}, section_spacing=10))["s"].mpp
    table.uns["spatial"]["is_single"] = True
    next(iter(table.uns["spatial"].values()))["images"]["fullres"] = np.asarray(image)
    found = si.pp.assemble_stack({"s": table}, section_spacing=10)
    assert load_record(found)["s"].mpp == pytest.approx(mpp / 4)
    assert section_levels(found, load_record(found)["s"])[0].shape == image.size[::-1]


@pytest.mark.parametrize("kind", ["h5", "AnnData"])
def test_antibodies_are_no_genes(kind, tmp_path, sample, caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    folder = sample(tmp_path / "a")
    with h5py.File(folder / "filtered_feature_bc_matrix.h5", "r+") as file:
        group = file["matrix"]
        n = group["shape"][1]
        for key in ("shape", "data", "indices", "indptr"):
            del group[key]
        group["shape"], group["data"] = np.array([2, n], np.int32), np.tile([3, 70], n).astype(np.int32)
        group["indices"], group["indptr"] = np.tile([0, 1], n), 2 * np.arange(n + 1)
        kinds = {"name": ["A", "CD3"], "id": ["E1", "CD3"], "feature_type": ["Gene Expression", "Antibody Capture"]}
        for key, values in {**kinds, "genome": ["x", ""]}.items():
            del group["features"][key]
            group["features"][key] = np.array(values, "S")
    source = folder
    if kind == "AnnData":
        image = Image.open(folder / "spatial" / "tissue_hires_image.png")
        image.resize((100, 100)).save(folder / "spatial" / "tissue_lowres_image.png")
        source = legacy(folder)
        source = (
            ad.concat([source, source], axis="var", merge="first", uns_merge="first") if source.n_vars == 1 else source
        )
        source.var["feature_types"] = kinds["feature_type"]
        source.var_names = kinds["name"]
    counts = si.pp.assemble_stack({"s": source}, section_spacing=10).tables["s_counts"]
    assert list(counts.var_names) == ["A"]
    assert counts.X.max() == 3
    assert "features that are no genes are left out: {'Antibody Capture': 1}" in caplog.text


def with_factors(folder, **changes):
    """Folder with other scale factors; None takes one out."""
    path = folder / "spatial" / "scalefactors_json.json"
    factors = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in factors.items() if value is not None}))
    return folder


def test_a_missing_scale_factor_is_named(tmp_path, sample):
    folder = with_factors(sample(tmp_path / "a"), spot_diameter_fullres=None)
    with pytest.raises(
        ValueError, match=r"'spot_diameter_fullres' not found in `scale factors of .*'tissue_hires_scalef'"
    ):
        si.pp.assemble_stack({"s": folder}, section_spacing=10)


@pytest.mark.parametrize(("factor", "says"), [(0.1, False), (0.1005, False), (0.25, True)])
def test_small_images_of_scans_of_other_sizes_are_reported(factor, says, tmp_path, sample, caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    folder = with_factors(sample(tmp_path / "a"), tissue_lowres_scalef=factor)
    Image.new("RGB", (80, 80), (240, 240, 240)).save(folder / "spatial" / "tissue_lowres_image.png")
    si.pp.assemble_stack({"s": folder}, section_spacing=10)
    assert ("its small images show scans of 800 x 800 (hires) and 320 x 320 (lowres) px" in caplog.text) is says


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        (
            {"microns_per_pixel": 1.0},
            "bins of 8 um at these positions have 0.5 um per pixel, `microns_per_pixel` is 1;",
        ),
        ({"bin_size_um": 16.0}, "bins of 16 um at these positions have 1 um per pixel, `microns_per_pixel` is 0.5;"),
    ],
)
def test_bins_that_contradict_their_scale_factors_are_reported(changes, says, tmp_path, sample, caplog, monkeypatch):
    """Scans of Visium HD may be mirrored against the array; this is no fault."""
    monkeypatch.setattr(logger, "propagate", True)
    folder = with_factors(sample(tmp_path / "a"), **({"microns_per_pixel": 0.5, "bin_size_um": 8.0} | changes))
    path = folder / "spatial" / "tissue_positions_list.csv"
    table = pd.read_csv(path, header=None).set_axis(ORDER, axis=1)
    table["pxl_row_in_fullres"], table["pxl_col_in_fullres"] = (
        300 - 16 * table["array_row"],
        90 + 16 * table["array_col"],
    )
    table.to_csv(path, header=False, index=False)
    si.pp.assemble_stack({"s": folder}, section_spacing=10)
    assert ("contradicts itself" in caplog.text) is (says is not None)
    assert (says or "") in caplog.text


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("genes", ["genes.tsv", "features.tsv"])
def test_matrix_of_any_version_is_read_packed_or_not(genes, packed, tmp_path, sample):
    folder = sample(tmp_path / "a")
    expected = si.pp.assemble_stack({"s": folder}, section_spacing=10).tables["s_counts"]
    (folder / "filtered_feature_bc_matrix.h5").unlink()
    matrix = folder / "filtered_feature_bc_matrix"
    matrix.mkdir()
    kind = "\tGene Expression" if genes == "features.tsv" else ""
    n = expected.n_obs
    files = {
        genes: f"E1\tA{kind}\n",
        "barcodes.tsv": "\n".join(expected.obs_names),
        "matrix.mtx": f"%%MatrixMarket matrix coordinate integer general\n1 {n} {n}\n"
        + "".join(f"1 {i} 1\n" for i in range(1, n + 1)),
    }
    for name, text in files.items():
        if packed:
            (matrix / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (matrix / name).write_text(text)
    found = si.pp.assemble_stack({"s": folder}, section_spacing=10).tables["s_counts"]
    np.testing.assert_array_equal(found.X.toarray(), expected.X.toarray())
    assert found.obs_names.equals(expected.obs_names)
    assert found.var_names.tolist() == ["A"]
    assert found.var["gene_ids"].tolist() == ["E1"]
    next(matrix.glob("barcodes*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"none of the files \['barcodes.tsv', 'barcodes.tsv.gz'\]"):
        si.pp.assemble_stack({"s": folder}, section_spacing=10)


@pytest.mark.parametrize(
    "name",
    ["filtered_feature_bc_matrix.h5", "spatial/tissue_positions_list.csv", "spatial/scalefactors_json.json"],
)
def test_packed_files_are_named(name, tmp_path, sample):
    path = sample(tmp_path / "a") / name
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"It holds packed files, \['{name}\.gz'\]: unpack them with `gunzip"):
        si.pp.assemble_stack({"s": tmp_path / "a"}, section_spacing=10)


def test_images_of_an_anndata_may_be_missing_grey_or_paths(scan):
    folder = scan[0]
    table = legacy_with_lowres(scan)
    library = next(iter(table.uns["spatial"].values()))
    library["scalefactors"]["tissue_lowres_scalef"] = 0.125
    images = library["images"]
    expected = si.pp.assemble_stack({"s": table}, section_spacing=10)
    grey = np.asarray(images["hires"]).mean(axis=-1)
    for hires in (grey, str(folder / "spatial" / "tissue_hires_image.png")):
        images["hires"] = hires
        found = si.pp.assemble_stack({"s": table}, section_spacing=10)
        assert found.images["s_image"].shape[1:] == expected.images["s_image"].shape[1:]
    images["hires"] = None
    found = si.pp.assemble_stack({"s": table}, section_spacing=10)
    assert found.images["s_image"].shape[1:] == (100, 100)


def test_odd_names_in_an_anndata_are_changed_with_a_word(scan, caplog, monkeypatch):
    """SpatialData refuses these columns; a table of a stack that was exported has the columns of one."""
    monkeypatch.setattr(si.settings, "verbosity", "warning")
    table = legacy_with_lowres(scan)
    expected = si.pp.assemble_stack({"s": table}, section_spacing=10).tables["s_counts"]
    table.obs[["pct (mt)", "Region", "instance_id", "section"]] = "x"
    table.obs["measured"] = True
    caplog.clear()
    found = si.pp.assemble_stack({"s": table}, section_spacing=10)
    assert found.tables["stack"].obs["measured"].all()
    np.testing.assert_array_equal(found.tables["s_counts"].X.toarray(), expected.X.toarray())
    assert "'Region': 'Region_original', 'instance_id': 'instance_id_original', 'pct (mt)': 'pct__mt_'" in caplog.text


def test_zarr_of_an_anndata_is_read_and_a_damaged_h5ad_is_named(scan, tmp_path):
    table = legacy_with_lowres(scan)
    expected = si.pp.assemble_stack({"s": table}, section_spacing=10).tables["s_counts"]
    table.write_zarr(tmp_path / "a.zarr")
    found = si.pp.assemble_stack({"s": tmp_path / "a.zarr"}, section_spacing=10).tables["s_counts"]
    np.testing.assert_array_equal(found.X.toarray(), expected.X.toarray())
    (tmp_path / "a.h5ad").write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"sections\['s'\]: '.*a.h5ad' cannot be read as AnnData"):
        si.pp.assemble_stack({"s": tmp_path / "a.h5ad"}, section_spacing=10)
    (tmp_path / "a.h5ad.gz").write_bytes(gzip.compress(b"abc"))
    with pytest.raises(ValueError, match="Unpack it, and give what is in it"):
        si.pp.assemble_stack({"s": tmp_path / "a.h5ad.gz"}, section_spacing=10)
    with pytest.raises(ValueError, match=r"expected a SpatialData.* found DataFrame"):
        si.pp.assemble_stack({"s": table.to_df()}, section_spacing=10)


def test_counts_in_raw_are_pointed_to(scan):
    table = legacy_with_lowres(scan)
    table.raw = table.copy()
    table.X = np.log1p(table.X.toarray())
    sdata = si.pp.assemble_stack({"s": table}, section_spacing=10)
    with pytest.raises(ValueError, match=r"take them: `(sdata.*) = (sdata.*)\.raw\.to_adata\(\)`"):
        si.pp.select_genes(sdata)
    sdata.tables["s_counts"] = sdata.tables["s_counts"].raw.to_adata()
    si.pp.select_genes(sdata)


def test_folders_of_the_user_beside_the_bins_do_not_count(sample, tmp_path):
    sample(tmp_path / "outs" / "binned_outputs" / "square_008um")
    (tmp_path / "outs" / "binned_outputs" / "square_oldum").mkdir()
    assert si.pp.assemble_stack({"s": tmp_path}, section_spacing=10).tables["stack"].obs["measured"].all()
