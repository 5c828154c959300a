"""Small images, files and SpatialData objects to be spoilt."""

from __future__ import annotations

from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Identity

CENTERS = np.array([[20.0, 20.0], [60.0, 20.0], [20.0, 60.0], [60.0, 60.0]])


def scan(*shape: int, dtype: Any = np.uint8, seed: int = 0) -> np.ndarray:
    """Image (y, x, 3), grey glass with a darker square of tissue."""
    shape = shape or (80, 90, 3)
    rng = np.random.default_rng(seed)
    image = np.full(shape, 235.0) + rng.normal(0, 2, shape)
    if len(shape) == 3 and shape[-1] == 3:
        image[15:65, 15:65] = np.array([170.0, 90.0, 150.0]) + rng.normal(0, 12, (50, 50, 3))
    return np.clip(image, 0, 255).astype(dtype)


def visium(
    *,
    ids: Any = ("a", "b", "c", "d"),
    rows: Any = None,
    values: Any = None,
    centers: np.ndarray = CENTERS,
    radius: float = 8.0,
    genes: Any = ("g0", "g1", "g2"),
    transformation: Any = None,
) -> SpatialData:
    """Image, four circles and a table, in pixels, as readers return them."""
    to_global = {"global": Identity() if transformation is None else transformation}
    image = Image2DModel.parse(np.moveaxis(scan(), -1, 0), dims=("c", "y", "x"), transformations=to_global)
    circles = gpd.GeoDataFrame(
        {"radius": np.full(len(ids), radius)}, geometry=gpd.points_from_xy(*centers[: len(ids)].T), index=pd.Index(ids)
    )
    circles = ShapesModel.parse(circles, transformations=to_global)
    rows = list(ids) if rows is None else list(rows)
    if values is None:
        values = np.arange(1.0, 1 + len(rows) * len(genes)).reshape(len(rows), -1)
    table = AnnData(
        sparse.csr_matrix(values) if isinstance(values, np.ndarray) else values,
        obs=pd.DataFrame(
            {"region": pd.Categorical(["spots"] * len(rows)), "id": rows}, index=[f"row{i}" for i in range(len(rows))]
        ),
        var=pd.DataFrame(index=list(genes)),
    )
    sdata = SpatialData(images={"he": image}, shapes={"spots": circles})
    sdata.tables["table"] = TableModel.parse(table, region="spots", region_key="region", instance_key="id")
    return sdata


def write(path: Any, content: bytes) -> Any:
    """File with these bytes."""
    path.write_bytes(content)
    return path
