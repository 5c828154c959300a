from __future__ import annotations

import copy

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
from anndata import AnnData
from scipy import sparse
from spatialdata import SpatialData
from spatialdata.models import ShapesModel, TableModel

import spatial_impute as si

LEVELS = ("X_spot", "X_region", "X_global")


@pytest.fixture(scope="module")
def small():
    return si.datasets.synthetic_stack(2, extent=1200.0, n_genes=3, mpp=4.0)


@pytest.fixture
def stack(small):
    return copy.deepcopy(small)


def tiles(seed: int = 0, n: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Middles in px of the scan, features."""
    rng = np.random.default_rng(seed)
    return rng.uniform(0, 300, (n, 2)), rng.normal(size=(n, 5))


def slide_of(positions: np.ndarray, features: np.ndarray, *, seed: int = 0) -> SpatialData:
    """As LazySlide writes it: square tiles in px, a table whose rows come in an order of their own."""
    squares = gpd.GeoDataFrame(
        geometry=[shapely.box(x - 8, y - 8, x + 8, y + 8) for x, y in positions], index=np.arange(len(positions))
    )
    order = np.random.default_rng(seed).permutation(len(positions))
    obs = pd.DataFrame({"region": pd.Categorical(["tiles"] * len(order)), "tile_id": order}, index=order.astype(str))
    table = TableModel.parse(
        AnnData(features[order], obs=obs), region="tiles", region_key="region", instance_key="tile_id"
    )
    return SpatialData(shapes={"tiles": ShapesModel.parse(squares)}, tables={"uni_tiles": table})


def test_pool_features_is_the_mean_and_spread_of_the_tiles_in_the_field(stack):
    given = {s: tiles(i) for i, s in enumerate(("s0", "s1"))}
    anndata = {s: AnnData(sparse.csr_matrix(f), obsm={"spatial": p}) for s, (p, f) in given.items()}
    si.pp.pool_features(stack, anndata, name="uni")
    table = stack.tables["stack"]
    assert {key: table.obsm[key].shape[1] for key in LEVELS} == {"X_spot": 10, "X_region": 20, "X_global": 60}
    assert table.uns["features"]["encoder"] == "uni"
    for row in (0, 40, table.n_obs - 1):
        positions, features = given[table.obs["section"].iloc[row]]
        away = np.abs(positions * 4.0 - table.obsm["spatial"][row]).max(axis=1)
        for key, side in {"X_spot": 100.0, "X_region": 230.0, "X_global": 460.0}.items():
            inside = away <= side / 2
            inside = inside if inside.any() else away == away.min()
            expected = np.concatenate([features[inside].mean(axis=0), features[inside].std(axis=0)])
            if inside.sum() > 1:  # else the nearest, by Euclidean distance
                np.testing.assert_allclose(table.obsm[key][row, :10], expected, atol=1e-5)


def test_pool_features_takes_slides_of_lazyslide(stack):
    given = {s: tiles(i) for i, s in enumerate(("s0", "s1"))}
    si.pp.pool_features(stack, {s: AnnData(f, obsm={"spatial": p}) for s, (p, f) in given.items()})
    expected = {key: stack.tables["stack"].obsm[key].copy() for key in LEVELS}
    slides = {s: slide_of(p, f) for s, (p, f) in given.items()}
    si.pp.pool_features(stack, slides)
    for key in LEVELS:
        np.testing.assert_allclose(stack.tables["stack"].obsm[key], expected[key], atol=1e-5)
    slides["s0"].tables["other"] = slides["s0"].tables["uni_tiles"].copy()
    with pytest.raises(ValueError, match=r"tables \['other', 'uni_tiles'\].*`features_key=`"):
        si.pp.pool_features(stack, slides)
    si.pp.pool_features(stack, slides, features_key="uni_tiles")
    slides["s0"].shapes["tiles"] = slides["s0"].shapes["tiles"].iloc[1:]
    with pytest.raises(ValueError, match=r"tile '0' of table 'uni_tiles' is not in `shapes\['tiles'\]`"):
        si.pp.pool_features(stack, slides, features_key="uni_tiles")


def test_pool_features_takes_an_array_per_spot(stack):
    """Rows are those of the spots, however the stack table is ordered."""
    rng = np.random.default_rng(0)
    given = {s: rng.normal(size=(len(stack.shapes[f"{s}_spots"]), 4)) for s in ("s0", "s1")}
    table = stack.tables["stack"]
    stack.tables["stack"] = table[rng.permutation(table.n_obs)].copy()
    si.pp.pool_features(stack, given)
    table = stack.tables["stack"]
    for section, values in given.items():
        names = [f"{section}_{i}" for i in stack.shapes[f"{section}_spots"].index]
        np.testing.assert_allclose(table[names].obsm["X_spot"][:, :4], values, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda g: g.pop("s1"), KeyError, "'s1' not found in `features`.*Every section with spots needs features"),
        (lambda g: g.update(s1=g["s1"][:-1]), ValueError, r"features\['s1'\] must have the shape .*a row per spot"),
        (lambda g: g["s1"].__setitem__((3, 0), np.nan), ValueError, r"features\['s1'\] must be finite.* row 3"),
        (lambda g: g.update(s1=g["s1"][:, :2]), ValueError, "Sections must have equally many features"),
        (lambda g: g.update(s1=AnnData(g["s1"])), KeyError, "'spatial' not found in .*`spatial_key=`"),
    ],
)
def test_pool_features_refuses_what_does_not_fit(stack, change, error, message):
    given = {s: np.ones((len(stack.shapes[f"{s}_spots"]), 4)) for s in ("s0", "s1")}
    change(given)
    with pytest.raises(error, match=message):
        si.pp.pool_features(stack, given)
    assert "X_spot" not in stack.tables["stack"].obsm
