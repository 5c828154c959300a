"""Stacks with the answer built in, a stack where there is nothing to find, and the real data where they are."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
import pytest
import xarray as xr

import spatial_impute as si
from spatial_impute._image.levels import Level

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

os.environ.setdefault("MPLBACKEND", "agg")  # before anything draws


@pytest.fixture(scope="session", autouse=True)
def _quiet():
    si.settings.show_progress_bar = False
    si.settings.verbosity = "warning"
    si.settings.device = "cpu"
    yield
    si.settings.show_progress_bar = True
    si.settings.verbosity = "info"
    si.settings.device = None


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture(scope="session")
def synthetic(_quiet) -> tuple[SpatialData, AnnData]:
    """Default synthetic stack and its truth. Shared: never write to it, take `stack` for that."""
    return si.datasets.synthetic_stack(truth=True)


@pytest.fixture(scope="session")
def prepared(synthetic) -> SpatialData:
    """Synthetic stack with registration, features and graph. Shared: never write to it, take `prepared_stack`."""
    sdata = copy.deepcopy(synthetic[0])
    si.tl.register_stack(sdata)
    si.pp.extract_features(sdata)
    si.tl.build_3d_graph(sdata)
    return sdata


@pytest.fixture
def stack(synthetic) -> SpatialData:
    """Copy of the synthetic stack, to write to."""
    return copy.deepcopy(synthetic[0])


@pytest.fixture
def truth(synthetic) -> AnnData:
    """What is true of all spots of `stack`."""
    return synthetic[1]


@pytest.fixture
def prepared_stack(prepared) -> SpatialData:
    """Copy of the prepared stack, to write to."""
    return copy.deepcopy(prepared)


@pytest.fixture
def negative_control(prepared) -> SpatialData:
    """Prepared stack whose measured expression is shuffled between spots: nothing can be predicted from it."""
    sdata = copy.deepcopy(prepared)
    table = sdata.tables["stack"]
    rows = np.flatnonzero(table.obs["measured"])
    shuffled = np.random.default_rng(0).permutation(rows)
    table.layers["measured"][rows] = table.layers["measured"][shuffled]
    return sdata


@pytest.fixture(scope="session")
def quick_search() -> dict[str, int]:
    """`registration_params` of a coarse search, for tests of what comes after it. It takes a quarter of the time."""
    return {"n_angles": 18, "n_candidates": 2, "working_side": 160, "syn_side": 160, "search_side": 96}


@pytest.fixture(scope="session")
def small_prepared(_quiet, quick_search) -> SpatialData:
    """Three small sections with registration, features and graph, for tests that fit. Shared: never write to it."""
    return _small(quick_search)


@pytest.fixture(scope="session")
def small_two_measured(_quiet, quick_search) -> SpatialData:
    """The same with two measured sections, s0 and s2. Shared: never write to it."""
    return _small(quick_search, measured=["s0", "s2"])


def _small(quick_search: dict[str, int], **options: Any) -> SpatialData:
    sdata = si.datasets.synthetic_stack(3, extent=1400.0, n_genes=9, **options)
    si.tl.register_stack(sdata, method="rigid", registration_params=quick_search)
    si.pp.extract_features(sdata)
    si.tl.build_3d_graph(sdata)
    return sdata


@pytest.fixture
def small_stack(small_prepared) -> SpatialData:
    """Copy of the small prepared stack, to write to."""
    return copy.deepcopy(small_prepared)


@pytest.fixture(scope="session")
def quick_params() -> dict[str, int]:
    """`model_params` of the smallest and shortest fit: enough to see what reaches the output, not to be good."""
    wanted = {"n_steps": 5, "n_epochs": 5, "width": 8, "n_heads": 2, "n_folds": 2}
    return {key: value for key, value in wanted.items() if key in si.models.AsignParams.__dataclass_fields__}


class Ramp:
    """Image that is linear in the position of the pixel centres, so that any resampling can be checked exactly."""

    slope = np.array([0.5, 0.25])  # per pixel in x and y
    offset = 10.0  # at the corner of the image

    def value_at(self, pixels: np.ndarray) -> np.ndarray:
        """Of the first channel at (..., 2) positions x, y from the corner, in pixels."""
        return pixels @ self.slope + self.offset

    def image(self, height: int, width: int, dtype: type = np.float32) -> np.ndarray:
        """(3, y, x); channels are offset by 1."""
        x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
        plane = self.value_at(np.stack([x, y], axis=-1))
        return np.stack([plane, plane + 1, plane + 2]).astype(dtype)

    def level(self, array: np.ndarray, to_um: np.ndarray | None = None, chunks: int | None = None) -> Level:
        """(c, y, x) as one resolution of an image, in memory or in chunks."""
        data = array if chunks is None else da.from_array(array, chunks=(-1, chunks, chunks))
        return Level(xr.DataArray(data, dims=("c", "y", "x")), np.eye(3) if to_um is None else to_um)


@pytest.fixture(scope="session")
def ramp() -> Ramp:
    """Makes images whose every pixel is known."""
    return Ramp()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of the real data, set as ``settings.data_dir``."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SPATIAL_IMPUTE_DATA_DIR", beside)).expanduser()
    if not (folder / "her2st" / "ST-cnts").is_dir():
        pytest.skip(f"HER2ST is not cached in {folder}; set SPATIAL_IMPUTE_DATA_DIR")
    before = si.settings._data_dir
    si.settings.data_dir = folder
    yield folder
    si.settings.data_dir = before


@pytest.fixture(scope="session")
def weights_at_hand() -> bool:
    """Whether the weights of the small pathology encoder are in the data folder; tests download nothing."""
    return (si.settings.data_dir / "weights" / "encoder_multitask-4.h5").exists()
