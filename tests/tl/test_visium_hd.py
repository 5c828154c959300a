"""Objects as ``spatialdata_io.visium_hd`` makes them: squares of 2, 8 and 16 um on one image, counts, frames in pixels."""

from __future__ import annotations

import anndata as ad
import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
from scipy import sparse
from scipy.ndimage import gaussian_filter
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Identity

import spatial_impute as si

MPP, SIDE = 0.5, 480  # um per pixel; edge of the capture area in um
SIZES = (16, 8, 2)
FRAME = {"coordinate_system": "hd", "mpp": MPP}
MARGIN = 64  # um of image around the bins


@pytest.fixture(scope="module")
def hd() -> SpatialData:
    """Bins of three sizes over the same molecules; the rate of the first two genes follows what the image shows."""
    rng = np.random.default_rng(0)
    n = round((SIDE + 2 * MARGIN) / MPP)
    field = gaussian_filter(rng.normal(size=(n, n)), 40, mode="wrap")
    field = (field - field.min()) / np.ptp(field)
    dots = rng.random((n, n)) < 0.02 * (0.2 + field)
    dots = gaussian_filter(dots.astype(float), 3) * 60
    rgb = 255 * np.exp(-dots.clip(0, 1.5)[..., None] * [0.65, 0.7, 0.3] - 0.1)
    image = Image2DModel.parse(
        rgb.astype(np.uint8).transpose(2, 0, 1),
        dims=("c", "y", "x"),
        c_coords=list("rgb"),
        transformations={"hd": Identity()},
    )
    sdata = SpatialData(images={"sample_full_image": image})
    # Molecules of each 2 um bin; larger bins sum them up.
    per_bin = round(2 / MPP)
    start = round(MARGIN / MPP)
    rate = field[start : start + round(SIDE / MPP), start : start + round(SIDE / MPP)]
    rate = rate.reshape(SIDE // 2, per_bin, SIDE // 2, per_bin).mean(axis=(1, 3))
    means = np.stack([0.5 * rate, 0.5 * (1 - rate), 0 * rate + 0.2], axis=-1)
    molecules = rng.poisson(means)
    for size in SIZES:
        k, m = size // 2, SIDE // size
        counts = molecules.reshape(m, k, m, k, 3).sum(axis=(1, 3)).reshape(-1, 3)
        x, y = np.meshgrid(*[(MARGIN + size * np.arange(m)) / MPP] * 2)
        boxes = shapely.box(x.ravel(), y.ravel(), x.ravel() + size / MPP, y.ravel() + size / MPP)
        key = f"sample_square_{size:03d}um"
        frame = gpd.GeoDataFrame(geometry=boxes, index=np.arange(m * m))
        sdata.shapes[key] = ShapesModel.parse(frame, transformations={"hd": Identity()})
        obs = pd.DataFrame({"region": pd.Categorical([key] * m * m), "location_id": np.arange(m * m)})
        obs.index = [f"s_{size:03d}um_{i:05d}-1" for i in range(m * m)]
        table = ad.AnnData(sparse.csr_matrix(counts.astype(np.float32)), obs=obs)
        table.var_names = ["up", "down", "flat"]
        sdata.tables[f"square_{size:03d}um"] = TableModel.parse(
            table, region=key, region_key="region", instance_key="location_id"
        )
    return sdata


PARAMS = {"resolution": 2.0, "crop": 96, "margin": 8, "n_cached_crops": 16, "width": 8, "n_base": 16}


def test_bins_of_two_sizes_train_a_map_read_at_a_third(hd, octaves):
    """Log values; judged at 2 um against the rate behind the molecules, which are far too few."""
    model = si.tl.fit_pixnet(
        hd,
        "sample_full_image",
        ["sample_square_016um", "sample_square_008um"],
        target_sum=100.0,
        encoder=octaves,
        model_params=PARAMS | {"n_steps": 10},
        **FRAME,
    )
    assert [entry["n_regions"] for entry in model.config["trained_on"]] == [900, 3600]
    fine = si.tl.predict_regions(
        hd, "sample_square_002um", model, image_key="sample_full_image", inplace=False, **FRAME
    )
    coarse = np.asarray(hd.tables["square_016um"].X.todense())
    m, k = SIDE // 16, 8
    summed = fine.X.reshape(m, k, m, k, 3).mean(axis=(1, 3)).reshape(-1, 3)
    assert np.corrcoef(summed[:, 0], coarse[:, 0])[0, 1] > 0.4
    assert np.corrcoef(summed[:, 1], coarse[:, 1])[0, 1] > 0.2
    assert abs(np.corrcoef(summed[:, 2], coarse[:, 2])[0, 1]) < 0.3
    single = np.asarray(hd.tables["square_002um"].X.todense())
    assert np.corrcoef(fine.X[:, 0], single[:, 0])[0, 1] < np.corrcoef(summed[:, 0], coarse[:, 0])[0, 1]


def test_counts_of_small_bins_add_up_to_those_of_large_ones(hd, octaves, tmp_path):
    """Trained on counts at 8 um, streamed to disk at 2 um."""
    model = si.tl.fit_pixnet(
        hd,
        "sample_full_image",
        "sample_square_008um",
        aggregate="sum",
        encoder=octaves,
        model_params=PARAMS | {"n_steps": 10, "loss": "poisson"},
        **FRAME,
    )
    arguments = {"image_key": "sample_full_image", "inplace": False, **FRAME}
    coarse = si.tl.predict_regions(hd, "sample_square_016um", model, **arguments)
    fine = si.tl.predict_regions(
        hd, "sample_square_002um", model, store=tmp_path / "bins.zarr", tile_size=96, **arguments
    )
    x = np.asarray(fine.X[:])
    assert fine.n_obs == (SIDE // 2) ** 2
    assert (tmp_path / "bins.zarr").exists()
    m, k = SIDE // 16, 8
    np.testing.assert_allclose(x.reshape(m, k, m, k, 3).sum(axis=(1, 3)).reshape(-1, 3), coarse.X, rtol=1e-4)
    true = hd.tables["square_016um"].X.sum()
    assert coarse.X.sum() == pytest.approx(true, rel=0.25)
