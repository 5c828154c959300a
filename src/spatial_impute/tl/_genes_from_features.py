"""Compute genes from a stored map of features of PixNet."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from spatial_impute._keys import Keys
from spatial_impute._settings import log_added
from spatial_impute._stack import answer, map_problems, require_element_key
from spatial_impute._validation import require_key, require_model
from spatial_impute.tl._read_regions import dense_maps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spatialdata import SpatialData
    from xarray import DataArray

    from spatial_impute.models import PixNetModel
    from spatial_impute.models.pixnet._network import PixNetNetwork


def genes_from_features(
    sdata: SpatialData,
    features_key: str,
    model: PixNetModel,
    *,
    genes: Sequence[str] | None = None,
    key_added: str | None = None,
    inplace: bool = True,
) -> DataArray | None:
    """Compute a map of genes from a stored map of features. The map is lazy.

    The last layer of the model is linear, so a map of some hundred features is enough to compute any number of genes.

    Parameters
    ----------
    sdata
        Object with the map.
    features_key
        Map of ``predict_dense(..., features=True)`` by the same model.
    model
        The model.
    genes
        Genes; by default all of the model.
    key_added
        Image to write; ``"{features_key}_expression"`` by default.
    inplace
        Add the map to `sdata`, or return it.

    Returns
    -------
    ``None``, or the map with ``inplace=False``. Writes:

    `sdata.images['{features_key}_expression']` : :class:`xarray.DataArray` (``float32``)
        (gene, y, x) in the units of the model; a chunk is computed when its values are needed.

    Raises
    ------
    KeyError
        If map or genes do not exist.
    ValueError
        If the map does not hold the features of this model.

    Examples
    --------
    >>> import torch
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack()
    >>> class Blur(torch.nn.Module):
    ...     def forward(self, x):
    ...         return [torch.nn.functional.avg_pool2d(x, k) for k in (2, 4)]
    >>> params = {"n_steps": 2, "width": 8, "resolution": 8.0, "crop": 64}
    >>> model = si.tl.fit_pixnet(
    ...     sdata, "s1_image", "s1_spots", encoder=Blur(), model_params=params, show_progress_bar=False
    ... )
    >>> si.tl.predict_dense(sdata, "s0_image", model, features=True, key_added="s0_features")
    >>> genes = si.tl.genes_from_features(sdata, "s0_features", model, genes=["smooth_0"], inplace=False)
    >>> genes.sizes["c"]
    1
    """
    from spatialdata.models import Image2DModel
    from spatialdata.transformations import get_transformation

    from spatial_impute.models.pixnet._model import PixNetModel

    require_model(model, PixNetModel, made_by="si.tl.fit_pixnet(sdata, image_key, shapes_key)")
    require_key(features_key, sdata.images, where="sdata.images")
    key = Keys.expression(features_key) if key_added is None else key_added
    if inplace:
        ours = {*dense_maps(sdata), Keys.expression(features_key)} - {features_key}
        require_element_key(sdata, key, name="key_added", kind="images", ours=ours)
    answer(map_problems(sdata, features_key))
    element = sdata.images[features_key]
    index = model.gene_index(genes)
    found = dense_maps(sdata).get(features_key, {})
    n_features = model.network.head.in_channels
    if element.sizes["c"] != n_features or found.get("model", model.identity) != model.identity:
        msg = (
            f"`sdata.images[{features_key!r}]` holds {element.sizes['c']} channels of model {found.get('model')!r}; "
            f"this model ({model.identity!r}) has {n_features} features. Run `si.tl.predict_dense(..., features=True)` "
            "with it."
        )
        raise ValueError(msg)
    network = model.network.with_genes(index)
    data = element.data.rechunk({0: -1}).map_blocks(
        _apply_head, network=network, dtype=np.float32, chunks=((len(index),), *element.data.chunks[1:])
    )
    result = Image2DModel.parse(
        data,
        dims=("c", "y", "x"),
        c_coords=[model.var_names[i] for i in index],
        transformations=get_transformation(element, get_all=True),
    )
    if not inplace:
        return result
    sdata.images[key] = result
    log_added(f"images[{key!r}]")
    return None


def _apply_head(block: np.ndarray, network: PixNetNetwork) -> np.ndarray:
    import torch

    with torch.inference_mode():
        features = torch.from_numpy(np.ascontiguousarray(block, dtype=np.float32))[None]
        return network.genes(features.to(network.head.weight.device))[0].cpu().numpy()
