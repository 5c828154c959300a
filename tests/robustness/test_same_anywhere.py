"""The same result whatever is beside it: frame, threads, disk, copies, other processes. And NaN where there is none."""

from __future__ import annotations

import copy
import pickle

import geopandas as gpd
import numpy as np
import pytest
import shapely
import spatialdata as sd
import torch
from hypothesis import given
from hypothesis import strategies as st
from spatialdata.models import ShapesModel
from spatialdata.transformations import Affine, Identity, Sequence, get_transformation, set_transformation

import spatial_impute as si
from spatial_impute._image.levels import stored_pixels, to_rgb
from spatial_impute._settings import logger
from spatial_impute._stack.elements import section_levels
from spatial_impute._stack.record import load_record

KEY = "s0_image_expression"


def copied(sdata, *_):
    return copy.deepcopy(sdata)


def read_back(sdata, tmp_path):
    sdata.write(tmp_path / "stack.zarr")
    return sd.read_zarr(tmp_path / "stack.zarr")


def written(sdata, tmp_path):
    sdata.write(tmp_path / "stack.zarr")
    return sdata


def pickled(sdata, *_):
    return pickle.loads(pickle.dumps(sdata))


class Colour:
    """Encoder that costs nothing."""

    name, mpp, patch_px = "colour", 4.0, 16

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        return np.concatenate([patches.mean(axis=(1, 2)), patches.std(axis=(1, 2))], axis=1)


def results(sdata, asign, pixnet) -> dict[str, bytes]:
    """What every step after registration makes of a stack."""
    si.pp.extract_features(sdata, Colour())
    si.tl.build_3d_graph(sdata)
    table = sdata.tables["stack"]
    return {
        "features": table.obsm["X_global"].tobytes(),
        "graph": table.obsp["spatial_3d_connectivities"].data.tobytes(),
        "baseline": si.tl.impute_baseline(sdata, "propagation", inplace=False).X.tobytes(),
        "asign": si.tl.impute_3d(sdata, asign, inplace=False).X.tobytes(),
        "regions": si.tl.predict_regions(sdata, "s0_spots", pixnet, inplace=False).X.tobytes(),
        "map": si.tl.predict_dense(sdata, "s0_image", pixnet, tile_size=32, inplace=False)
        .compute()
        .to_numpy()
        .tobytes(),
    }


@pytest.mark.parametrize("made", [written, read_back, pickled], ids=["backed", "read back", "pickled"])
def test_a_stack_on_disk_or_from_another_process_gives_the_same_bytes(still, asign, pixnet, tmp_path, made):
    expected = results(copied(still[0]), asign, pixnet)
    assert results(made(copied(still[0]), tmp_path), asign, pixnet) == expected


def test_threads_do_not_show(still, asign, pixnet):
    """Sums in another order differ in the last digits, no more."""
    before, found = torch.get_num_threads(), []
    for n_threads in (1, 3):
        torch.set_num_threads(n_threads)
        try:
            dense = si.tl.predict_dense(
                still[0], "s0_image", pixnet, tile_size=32, tissue_only=False, output_dtype="float32", inplace=False
            )
            imputed = si.tl.impute_3d(still[0], asign, inplace=False)
            found.append((dense.compute(scheduler="synchronous").to_numpy(), imputed.X))
        finally:
            torch.set_num_threads(before)
    for one, three in zip(*found, strict=True):
        assert abs(one - three).max() <= 1e-5 * one.std()


class Windows(torch.utils.data.Dataset):
    """Windows of the image of a section, as a training loop of somebody else would read them."""

    def __init__(self, sdata) -> None:
        self.level = section_levels(sdata, load_record(sdata)["s0"])[0]

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> np.ndarray:
        return to_rgb(stored_pixels(self.level, 20 * i, 20 * i + 32, 10 * i, 10 * i + 32), self.level)


@pytest.mark.timeout(120)  # threads of dask in a forked worker would wait for ever
def test_images_are_read_in_workers_of_a_data_loader(still, tmp_path):
    windows = Windows(read_back(copied(still[0]), tmp_path))
    expected = np.stack([windows[i] for i in range(len(windows))])
    loader = torch.utils.data.DataLoader(windows, batch_size=2, num_workers=2)
    np.testing.assert_array_equal(np.concatenate([batch.numpy() for batch in loader]), expected)


@given(seed=st.integers(0, 2**32 - 1), flip=st.booleans())
def test_regions_and_maps_follow_the_frame(still, pixnet, seed, flip):
    """Image and spots turned, mirrored, shifted and scaled together: nothing changes but where it is."""
    rng = np.random.default_rng(seed)
    angle, scale = rng.uniform(0, 2 * np.pi), np.exp(rng.uniform(-2, 2))
    c, s = np.cos(angle) * scale, np.sin(angle) * scale
    matrix = np.array([[c, -s, rng.uniform(-1e3, 1e3)], [s, c, rng.uniform(-1e3, 1e3)], [0, 0, 1]])
    matrix = matrix @ np.diag([-1.0 if flip else 1.0, 1.0, 1.0])
    sdata = copy.deepcopy(still[0])
    for element in (sdata.images["s0_image"], sdata.shapes["s0_spots"]):
        um = get_transformation(element, to_coordinate_system="s0")
        set_transformation(element, Sequence([um, Affine(matrix, ("x", "y"), ("x", "y"))]), "moved")
    there = {"coordinate_system": "moved", "mpp": 1 / scale, "inplace": False}
    expected = si.tl.predict_regions(sdata, "s0_spots", pixnet, inplace=False)
    found = si.tl.predict_regions(sdata, "s0_spots", pixnet, image_key="s0_image", **there)
    np.testing.assert_allclose(found.X, expected.X, rtol=1e-4, atol=1e-4)
    expected = si.tl.predict_dense(sdata, "s0_image", pixnet, inplace=False)
    found = si.tl.predict_dense(sdata, "s0_image", pixnet, **there)
    assert found.shape == expected.shape
    moved = get_transformation(found, to_coordinate_system="moved").to_affine_matrix(("x", "y"), ("x", "y"))
    own = get_transformation(expected, to_coordinate_system="s0").to_affine_matrix(("x", "y"), ("x", "y"))
    np.testing.assert_allclose(moved, matrix @ own, atol=1e-6 * scale * 1e3)


@given(centers=st.lists(st.tuples(st.floats(-600, 2000), st.floats(-600, 2000)), min_size=1, max_size=6))
def test_regions_without_a_pixel_are_nan_and_counted(still, pixnet, centers):
    """Never 0 and never a number: shapes anywhere, on the image, over its edge and far off."""
    sdata = still[0].subset(["s0_image"])
    sdata.attrs = still[0].attrs
    boxes = [shapely.box(x - 30, y - 30, x + 30, y + 30) for x, y in centers]
    sdata.shapes["areas"] = ShapesModel.parse(
        gpd.GeoDataFrame(geometry=boxes, index=[str(i) for i in range(len(boxes))]), transformations={"s0": Identity()}
    )
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logger, "warning", lambda text, *values: told.append(text % values))
        table = si.tl.predict_regions(sdata, "areas", pixnet, image_key="s0_image", inplace=False)
    height, width = sdata.images["s0_image"].shape[1:]
    level = section_levels(sdata, load_record(still[0])["s0"])[0]
    image = shapely.box(0, 0, width * level.pixel_size, height * level.pixel_size)
    off = np.array([box.intersection(image).area == 0 for box in boxes])
    n_pixels = table.obs["n_pixels"].to_numpy()
    np.testing.assert_array_equal(np.isnan(table.X).all(axis=1), n_pixels == 0)
    np.testing.assert_array_equal(np.isnan(table.X).any(axis=1), n_pixels == 0)
    assert (n_pixels[off] == 0).all()
    inside = np.array([image.contains(box) for box in boxes])
    assert (n_pixels[inside] > 0).all()
    n_off = int((n_pixels == 0).sum())
    expected = f"{n_off} of {len(boxes)} shapes of 'areas' hold no pixel of 's0_image': NaN"
    assert told == ([expected] if n_off else [])


def test_a_map_says_how_much_of_it_was_predicted(still, pixnet):
    """Tiles that were not are NaN as a whole, and no cell is 0 by default."""
    sdata = copy.deepcopy(still[0])
    sdata.shapes["some"] = sdata.shapes["s0_spots"].iloc[[0, 1, 7]]
    for options in ({}, {"shapes_key": "some"}, {"shapes_key": "some", "tissue_only": False}, {"tissue_only": False}):
        si.tl.predict_dense(sdata, "s0_image", pixnet, tile_size=32, output_dtype="float32", **options)
        record = sdata.attrs["spatial_impute"]["dense"][KEY]
        blocks = sdata.images[KEY].data.to_delayed().ravel()
        known = [np.isfinite(block.compute()) for block in blocks]
        assert record["n_tiles"] == len(blocks)
        assert record["n_tiles_predicted"] == sum(one.any() for one in known)
        assert all((one == one[:1]).all() for one in known)  # all genes or none
        if options == {"tissue_only": False}:
            assert all(one.all() for one in known)
