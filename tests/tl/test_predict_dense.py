"""Dense maps: lazy, stored, taken up after interruptions, and computed by workers."""

from __future__ import annotations

import contextlib
import copy

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
import torch
from shapely.geometry import MultiPolygon, Point, Polygon
from spatialdata.models import Image2DModel, ShapesModel
from spatialdata.transformations import get_transformation
from torch.nn import functional as F

import spatial_impute as si
from spatial_impute._io.stores import interleave
from spatial_impute.models.pixnet._tiles import DenseJob

KEY = "s0_image_expression"


def same_with_nan(a, b) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def tile_of(sdata, model, **kwargs):
    return si.tl.predict_dense(sdata, "s0_image", model, inplace=False, tile_size=64, **kwargs)


@pytest.fixture
def stored(small_stack, tmp_path):
    """The small stack on disk."""
    sdata = small_stack.subset(["s0_image", "s0_spots"])
    sdata.attrs = small_stack.attrs
    sdata.write(tmp_path / "store.zarr")
    return sdata, tmp_path / "store.zarr"


def test_map_is_lazy_and_in_um(small_stack, small_pixnet, monkeypatch):
    calls = []
    compute = DenseJob.compute
    monkeypatch.setattr(DenseJob, "compute", lambda self, tile: calls.append(tile) or compute(self, tile))
    si.tl.predict_dense(small_stack, "s0_image", small_pixnet, tile_size=64)
    element = small_stack.images[KEY]
    assert not calls
    assert element.dims == ("c", "y", "x")
    assert element.coords["c"].to_numpy().tolist() == small_pixnet.var_names
    assert element.dtype == np.float16
    matrix = get_transformation(element, to_coordinate_system="s0").to_affine_matrix(("x", "y"), ("x", "y"))
    np.testing.assert_allclose(matrix, np.diag([small_pixnet.cell_size, small_pixnet.cell_size, 1]))
    element.isel(y=slice(0, 4), x=slice(0, 4)).compute()
    assert len(calls) <= 1
    calls.clear()
    element.compute()
    assert len(calls) == len(set(calls))
    record = small_stack.attrs["spatial_impute"]["dense"][KEY]
    assert record["model"] == small_pixnet.identity
    assert record["n_tiles_predicted"] == len(calls)


def test_what_was_not_predicted_is_nan(small_prepared, small_pixnet):
    everywhere = tile_of(small_prepared, small_pixnet, tissue_only=False, output_dtype="float32").compute()
    tissue = tile_of(small_prepared, small_pixnet, output_dtype="float32").compute()
    assert np.isfinite(everywhere).all()
    missing = np.isnan(tissue).to_numpy()
    assert 0.1 < missing.mean() < 0.9
    assert (missing == missing[:1]).all()
    np.testing.assert_array_equal(tissue.to_numpy()[~missing], everywhere.to_numpy()[~missing])
    assert missing[0, 0, 0]  # a corner of the slide is glass
    some = small_prepared.shapes["s0_spots"].iloc[:1]
    small = small_prepared.subset(["s0_image"])
    small.attrs = small_prepared.attrs
    small.shapes["one"] = some
    one = tile_of(small, small_pixnet, shapes_key="one", tissue_only=False).compute()
    assert 0 < np.isfinite(one).to_numpy().mean() < 0.5


def test_tiles_do_not_show(small_prepared, small_pixnet):
    whole = si.tl.predict_dense(
        small_prepared,
        "s0_image",
        small_pixnet,
        tile_size=4096,
        output_dtype="float32",
        tissue_only=False,
        inplace=False,
    ).compute()
    tiled = tile_of(small_prepared, small_pixnet, output_dtype="float32", tissue_only=False).compute()
    assert float(abs(tiled - whole).max() / whole.std()) <= 1e-5


def test_map_and_read_out_agree(small_prepared, small_pixnet):
    """Mean of the resized map over the pixels of a spot, written out."""
    dense = tile_of(small_prepared, small_pixnet, output_dtype="float64", tissue_only=False).compute().to_numpy()
    table = si.tl.predict_regions(small_prepared, "s0_spots", small_pixnet, inplace=False)
    stride, resolution = small_pixnet.network.stride, small_pixnet.config["resolution"]
    # Beyond the last cell of the image, which the resize repeats, lie cells that the map leaves out.
    pixels = F.interpolate(torch.from_numpy(dense)[None], scale_factor=stride, mode="bilinear", align_corners=False)[0]
    y, x = np.meshgrid(*(np.arange(n) + 0.5 for n in pixels.shape[1:]), indexing="ij")
    radius = small_prepared.shapes["s0_spots"]["radius"].iloc[0] * 4.0 / resolution
    for spot in (0, 10, len(table) - 1):
        cx, cy = table.obsm["spatial"][spot] / resolution
        inside = (x - cx) ** 2 + (y - cy) ** 2 <= radius**2
        assert table.obs["n_pixels"].iloc[spot] == inside.sum()
        np.testing.assert_allclose(table.X[spot], pixels[:, inside].mean(dim=1), rtol=1e-4, atol=1e-4)


def test_genes_follow_from_features(small_stack, small_pixnet):
    genes = small_pixnet.var_names[:2]
    si.tl.predict_dense(
        small_stack, "s0_image", small_pixnet, features=True, key_added="f", output_dtype="float32", tile_size=64
    )
    found = si.tl.genes_from_features(small_stack, "f", small_pixnet, genes=genes, inplace=False)
    expected = tile_of(small_stack, small_pixnet, genes=genes, output_dtype="float32")
    np.testing.assert_allclose(found.compute(), expected.compute(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"has 22 features|has 24 features"):
        si.tl.genes_from_features(small_stack, "s0_image", small_pixnet)


def test_stored_map_equals_the_lazy_one(stored, small_pixnet):
    sdata, store = stored
    lazy = tile_of(sdata, small_pixnet)
    si.tl.predict_dense(sdata, "s0_image", small_pixnet, tile_size=64, store=store)
    assert same_with_nan(sdata.images[KEY].compute(), lazy.compute())
    found = sd.read_zarr(store)
    assert sorted(found.images) == ["s0_image", KEY]
    assert same_with_nan(found.images[KEY].compute(), lazy.compute())
    assert found.images[KEY].coords["c"].to_numpy().tolist() == small_pixnet.var_names
    assert get_transformation(found.images[KEY], get_all=True).keys() == {"s0"}
    assert not [p.name for p in store.iterdir() if "staging" in p.name]


def test_interrupted_write_shows_nothing_and_is_taken_up(stored, small_pixnet, monkeypatch):
    sdata, store = stored
    expected = tile_of(sdata, small_pixnet).compute()
    compute, calls = DenseJob.compute, []

    def failing(self, tile):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(tile)
        return compute(self, tile)

    monkeypatch.setattr(DenseJob, "compute", failing)
    with pytest.raises(KeyboardInterrupt):
        si.tl.predict_dense(sdata, "s0_image", small_pixnet, tile_size=64, store=store)
    assert sorted(sd.read_zarr(store).images) == ["s0_image"]
    assert KEY not in sdata.images
    rest = []
    monkeypatch.setattr(DenseJob, "compute", lambda self, tile: rest.append(tile) or compute(self, tile))
    si.tl.predict_dense(sdata, "s0_image", small_pixnet, tile_size=64, store=store)
    assert not set(calls) & set(rest)
    assert same_with_nan(sd.read_zarr(store).images[KEY].compute(), expected)


@pytest.mark.parametrize("whole", [False, True])
def test_tiles_of_an_image_that_was_corrected_are_not_kept(stored, small_pixnet, monkeypatch, whole):
    sdata, store = stored
    compute, calls = DenseJob.compute, []

    def failing(self, tile):
        if len(calls) == 3 and not whole:
            raise KeyboardInterrupt
        calls.append(tile)
        return compute(self, tile)

    def predict(**options):
        si.tl.predict_dense(
            sdata,
            "s0_image",
            small_pixnet,
            tile_size=64,
            store=store,
            tissue_only=False,
            show_progress_bar=False,
            **options,
        )

    monkeypatch.setattr(DenseJob, "compute", failing)
    with contextlib.suppress(KeyboardInterrupt):
        predict()
    monkeypatch.setattr(DenseJob, "compute", compute)
    image = sdata.images["s0_image"]
    pixels = image.data.compute() if hasattr(image.data, "compute") else np.array(image.data)
    turned = np.concatenate([pixels[:, :32, :32][:, ::-1], pixels[:, :32, 32:64]], axis=2)  # the same colors elsewhere
    pixels[:, :32, :64] = turned
    pixels[:, 0, 0] += 1
    sdata.images["s0_image"] = Image2DModel.parse(
        pixels, dims=("c", "y", "x"), transformations=get_transformation(image, get_all=True)
    )
    expected = tile_of(sdata, small_pixnet, tissue_only=False).compute()
    if whole:
        with pytest.raises(ValueError, match="Pass another `key_added`, or `overwrite=True`"):
            predict()
    predict(overwrite=True)
    assert same_with_nan(sd.read_zarr(store).images[KEY].compute(), expected)


def test_crash_between_rename_and_metadata_is_repaired(stored, small_pixnet, monkeypatch):
    import zarr

    sdata, store = stored
    consolidate = zarr.consolidate_metadata

    def failing(where, *args, **kwargs):
        if where == store:  # not the staged element
            raise KeyboardInterrupt
        return consolidate(where, *args, **kwargs)

    monkeypatch.setattr(zarr, "consolidate_metadata", failing)
    with pytest.raises(KeyboardInterrupt):
        si.tl.predict_dense(sdata, "s0_image", small_pixnet, tile_size=64, store=store)
    assert sorted(sd.read_zarr(store).images) == ["s0_image"]
    monkeypatch.setattr(zarr, "consolidate_metadata", consolidate)
    calls = []
    monkeypatch.setattr(DenseJob, "compute", lambda self, tile: calls.append(tile))
    si.tl.predict_dense(sdata, "s0_image", small_pixnet, tile_size=64, store=store)
    assert not calls
    assert KEY in sd.read_zarr(store).images


def test_element_of_that_name_is_not_overwritten_unasked(stored, small_pixnet):
    sdata, store = stored
    si.tl.predict_dense(sdata, "s0_image", small_pixnet, tile_size=64, store=store, genes=small_pixnet.var_names[:1])
    with pytest.raises(ValueError, match="Pass another `key_added`, or `overwrite=True`"):
        si.tl.predict_dense(sdata, "s0_image", small_pixnet, tile_size=64, store=store)
    si.tl.predict_dense(sdata, "s0_image", small_pixnet, tile_size=64, store=store, overwrite=True)
    assert sd.read_zarr(store).images[KEY].sizes["c"] == len(small_pixnet.var_names)
    with pytest.raises(FileNotFoundError, match="write the object first"):
        si.tl.predict_dense(sdata, "s0_image", small_pixnet, store=store / "nope")


def test_workers_write_the_same_bytes(stored, small_pixnet):
    from distributed import Client, LocalCluster

    sdata, store = stored
    expected = tile_of(sdata, small_pixnet).compute()
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        Client(cluster),
    ):
        si.tl.predict_dense(sdata, "s0_image", small_pixnet, tile_size=64, store=store)
    assert same_with_nan(sd.read_zarr(store).images[KEY].compute(scheduler="synchronous"), expected)


@pytest.mark.parametrize(("n_tiles", "n_workers"), [(1, 2), (10, 2), (11, 3), (3, 5), (4, 0)])
def test_interleaved_workers_go_through_neighboring_tiles(n_tiles, n_workers):
    tiles = [(i // 4, i % 4) for i in range(n_tiles)]
    dealt = interleave(tiles, n_workers)
    assert sorted(dealt) == tiles
    size = -(-n_tiles // max(n_workers, 1))
    for first in range(0, n_tiles, size):
        own = [tile for tile in dealt if tile in tiles[first : first + size]]
        assert own == tiles[first : first + size]
    if n_tiles == n_workers * size:
        assert all(dealt[k::n_workers] == tiles[k * size : (k + 1) * size] for k in range(n_workers))


def test_one_gene_of_many_is_read_without_the_others(stored, small_pixnet, monkeypatch):
    """Drawing one of 250 genes reads at most 2 % of what is stored, which lies in at most one file per MiB."""
    from zarr.storage import LocalStore

    sdata, store = stored
    network = copy.copy(small_pixnet.network).with_genes([i % len(small_pixnet.var_names) for i in range(250)])
    model = copy.copy(small_pixnet)
    model.network, model.var_names = network, [f"g{i}" for i in range(250)]
    model.predictability = pd.Series(0.5, index=model.var_names)
    si.tl.predict_dense(sdata, "s0_image", model, tile_size=256, tissue_only=False, store=store, output_dtype="float32")
    files = [p for p in (store / "images" / KEY).rglob("*") if p.is_file() and p.name != "zarr.json"]
    size = sum(p.stat().st_size for p in files)
    assert size > 2**21
    assert len(files) <= size / 2**20
    found = sd.read_zarr(store)
    found.attrs = sdata.attrs
    read, get = [], LocalStore.get

    async def counting(self, key, *args, **kwargs):
        value = await get(self, key, *args, **kwargs)
        if value is not None and f"images/{KEY}/" in f"{self.root}/{key}":
            read.append(len(value))
        return value

    monkeypatch.setattr(LocalStore, "get", counting)
    si.pl.dense(found, KEY, "g7")
    assert 0 < sum(read) <= 0.02 * size
    assert np.isnan(found.images[KEY].data.compute()).sum() == 0


def test_predict_dense_says_what_is_wrong(small_prepared, small_pixnet):
    with pytest.raises(KeyError, match=r"'nope' not found in `sdata.images`"):
        si.tl.predict_dense(small_prepared, "nope", small_pixnet)
    with pytest.raises(KeyError, match=r"model.var_names"):
        si.tl.predict_dense(small_prepared, "s0_image", small_pixnet, genes=["nope"])
    with pytest.raises(ValueError, match="`output_dtype` must be one of"):
        si.tl.predict_dense(small_prepared, "s0_image", small_pixnet, output_dtype="int8")
    bare = small_prepared.subset(["s0_image"])
    bare.attrs = {}
    with pytest.raises(ValueError, match=r"unit of coordinate system 's0'|share the coordinate systems"):
        si.tl.predict_dense(bare, "s0_image", small_pixnet)


def test_predict_regions_leaves_a_folder_of_the_user_alone(small_prepared, small_pixnet, tmp_path):
    mine = tmp_path / "out.zarr.partial"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"not the rest of an interrupted call.*move it away"):
        si.tl.predict_regions(small_prepared, "s0_spots", small_pixnet, store=tmp_path / "out.zarr", inplace=False)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "link.zarr.partial").symlink_to(elsewhere)
    with pytest.raises(FileExistsError, match="not the rest of an interrupted call"):
        si.tl.predict_regions(small_prepared, "s0_spots", small_pixnet, store=tmp_path / "link.zarr", inplace=False)
    assert (mine / "notes.txt").read_text() == "mine"
    assert elsewhere.is_dir()


def test_cells_become_rows_with_values_of_the_map(small_stack, small_pixnet):
    si.pp.add_cells(
        small_stack, "s1", gpd.GeoDataFrame(geometry=[Point(150, 150).buffer(4), Point(180, 150).buffer(4)])
    )
    si.tl.predict_regions(small_stack, "s1_cells", small_pixnet, image_key="s1_image")
    table = small_stack.tables["s1_cells_expression"]
    assert table.n_obs == 2
    assert np.isfinite(table.X).all()
    assert (table.obs["n_pixels"] > 0).all()


def test_outline_that_crosses_itself_counts_both_loops(small_stack, small_pixnet):
    loops = [Polygon([(140, 140), (180, 140), (160, 160)]), Polygon([(160, 160), (180, 180), (140, 180)])]
    crossing = Polygon([(140, 140), (180, 140), (140, 180), (180, 180)])
    um = {"s1": get_transformation(small_stack.shapes["s1_spots"], to_coordinate_system="s1")}
    both = gpd.GeoDataFrame(geometry=[crossing, MultiPolygon(loops)], index=["crossing", "two loops"])
    small_stack.shapes["areas"] = ShapesModel.parse(both, transformations=um)
    table = si.tl.predict_regions(small_stack, "areas", small_pixnet, image_key="s1_image", inplace=False)
    np.testing.assert_allclose(table.X[0], table.X[1], rtol=1e-5)
    assert table.obs["n_pixels"].nunique() == 1
