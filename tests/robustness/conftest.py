"""A small stack that is quick to make, models fitted on it, and fingerprints of whole objects."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import torch
from bad_inputs import World
from hypothesis import HealthCheck, settings
from scipy import sparse
from torch import nn

import spatial_impute as si

if TYPE_CHECKING:
    from spatialdata import SpatialData

ASIGN = {"n_steps": 2, "width": 8, "n_heads": 2, "n_folds": 2}
PIXNET = {
    "n_steps": 2,
    "n_steps_per_check": 1,
    "width": 8,
    "n_base": 8,
    "resolution": 8.0,
    "crop": 64,
    "margin": 8,
    "n_cached_crops": 4,
}


class Blur(nn.Module):
    """Colours at strides 2 and 4; no weights."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [nn.functional.avg_pool2d(x, k) for k in (2, 4)]


class Colour:
    """Encoder that costs nothing."""

    name, mpp, patch_px, identity = "colour", 4.0, 16, "colour-1"

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        return np.concatenate([patches.mean(axis=(1, 2)), patches.std(axis=(1, 2))], axis=1)


def small_still_stack(**kwargs: Any) -> SpatialData:
    """Three sections that lie over each other as they are, so that registering them takes no time."""
    still = {"max_rotation": 0.0, "max_shift": 0.0, "elastic_amplitude": 0.0}
    return si.datasets.synthetic_stack(3, extent=1400.0, n_genes=9, **still, **kwargs)


def prepare(sdata: SpatialData) -> SpatialData:
    """Registration (known), features and graph."""
    si.tl.register_stack(sdata, transformations={"s0": np.eye(3), "s2": np.eye(3)})
    si.pp.extract_features(sdata, Colour())
    si.tl.build_3d_graph(sdata)
    return sdata


@pytest.fixture(scope="session")
def still(_quiet):
    """Prepared stack and truth. Shared: never write to it."""
    sdata, truth = small_still_stack(truth=True)
    return prepare(sdata), truth


@pytest.fixture
def sdata(still) -> SpatialData:
    """Copy of the prepared stack, to write to."""
    return copy.deepcopy(still[0])


@pytest.fixture(scope="session")
def asign(still):
    """ASIGN fitted on the stack. Shared."""
    return si.tl.fit_asign(still[0], model_params=ASIGN)


@pytest.fixture(scope="session")
def pixnet(still):
    """PixNet fitted on the stack. Shared."""
    return si.tl.fit_pixnet(still[0], "s1_image", "s1_spots", encoder=Blur(), model_params=PIXNET)


@pytest.fixture
def world(sdata, still, asign, pixnet, tmp_path, monkeypatch) -> World:
    return World(sdata, still[1].copy(), asign, pixnet, tmp_path, monkeypatch)


def fingerprint(value: Any) -> str:
    """Hash of all there is in an object: values, names, order, types and transformations."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    digest.update(type(value).__name__.encode())
    if hasattr(value, "gen_elements"):
        _feed_spatialdata(digest, value)
    elif hasattr(value, "obsm"):
        for slot in ("X", "obs", "var", "layers", "obsm", "varm", "obsp", "varp", "uns"):
            _feed(digest, getattr(value, slot))
    elif isinstance(value, pd.DataFrame | pd.Series):
        digest.update(
            value.to_json(orient="split", date_format="iso", default_handler=str, double_precision=15).encode()
        )
        digest.update(str(value.dtypes.to_dict() if isinstance(value, pd.DataFrame) else value.dtype).encode())
    elif hasattr(value, "items"):
        for key, item in value.items():
            digest.update(repr(key).encode())
            _feed(digest, item)
    elif sparse.issparse(value):
        for part in (value.data, value.indices, value.indptr):
            _feed(digest, part)
    elif isinstance(value, np.ndarray) and value.dtype != object:
        digest.update(repr((value.shape, value.dtype.str)).encode() + np.ascontiguousarray(value).tobytes())
    else:
        digest.update(repr(value).encode())


def _feed_spatialdata(digest: Any, sdata: SpatialData) -> None:
    from spatialdata.transformations import get_transformation

    digest.update(json.dumps(sdata.attrs, default=repr, sort_keys=True).encode())
    for kind, name, element in sorted(sdata.gen_elements(), key=lambda entry: entry[:2]):
        digest.update(f"{kind}/{name}".encode())
        if kind == "tables":
            _feed(digest, element)
            continue
        digest.update(repr(get_transformation(element, get_all=True)).encode())
        if kind == "shapes":
            digest.update(b"".join(element.geometry.to_wkb()))
            _feed(digest, pd.DataFrame(element.drop(columns="geometry")))
        else:
            digest.update(repr(element).encode())  # lazy arrays have a name that changes with every operation


@pytest.fixture(name="fingerprint", scope="session")
def _fingerprint():
    return fingerprint


# Few and always the same examples where everybody runs the tests. `HYPOTHESIS_PROFILE=fuzz` looks for new ones.
settings.register_profile(
    "ci",
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
settings.register_profile(
    "fuzz", max_examples=400, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck)
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
