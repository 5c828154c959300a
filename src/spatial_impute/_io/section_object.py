"""One section as the SpatialData object that a reader of raw files returns: everything in full-resolution pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from spatial_impute._keys import Keys

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from spatialdata import SpatialData
    from xarray import DataArray, DataTree


def section_object(
    name: str,
    image: DataArray | DataTree,
    *,
    centers: np.ndarray,
    radius: float,
    ids: Sequence[str],
    table: AnnData | None,
) -> SpatialData:
    """Image, circles and (for a measured section) table in the coordinate system ``"global"``.

    Parameters
    ----------
    name
        Name of the section.
    image
        Image element in ``"global"``.
    centers, radius
        (n, 2) centres and common radius of the spots in px.
    ids
        (n,) names of the spots.
    table
        Counts whose ``obs_names`` are among `ids`; None if the section is not measured.
    """
    import geopandas as gpd
    from spatialdata import SpatialData
    from spatialdata.models import ShapesModel, TableModel
    from spatialdata.transformations import Identity

    circles = gpd.GeoDataFrame(
        {"radius": np.full(len(centers), radius)},
        geometry=gpd.points_from_xy(centers[:, 0], centers[:, 1]),
        index=pd.Index(ids),
    )
    sdata = SpatialData(
        images={Keys.image(name): image},
        shapes={Keys.spots(name): ShapesModel.parse(circles, transformations={"global": Identity()})},
    )
    if table is not None:
        table.obs[Keys.REGION] = pd.Categorical([Keys.spots(name)] * table.n_obs)
        table.obs[Keys.INSTANCE] = table.obs_names.to_numpy()
        sdata.tables[Keys.counts(name)] = TableModel.parse(
            table, region=Keys.spots(name), region_key=Keys.REGION, instance_key=Keys.INSTANCE
        )
    return sdata
