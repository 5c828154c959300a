"""PixNet at the spots of a stack, as a base that ASIGN may take up."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from spatial_impute._keys import Keys
from spatial_impute._logging import log_added
from spatial_impute._params import resolve_params
from spatial_impute._settings import progress
from spatial_impute._validation import (
    require_count,
    require_device,
    require_positive,
    require_slot_key,
)
from spatial_impute.tl._base_layers import measured_hash
from spatial_impute.tl._read_spots import read_spots

if TYPE_CHECKING:
    from collections.abc import Mapping

    from spatialdata import SpatialData
    from torch import nn

    from spatial_impute.models import PixNetParams


def impute_pixnet(
    sdata: SpatialData,
    *,
    table_key: str = Keys.STACK_TABLE,
    layer: str = Keys.MEASURED,
    encoder: str | nn.Module = "tellez-multitask",
    model_params: PixNetParams | Mapping[str, Any] | None = None,
    n_folds: int = 5,
    block_spacings: float = 2.0,
    tile_size: int = 1024,
    device: str | None = None,
    seed: int = 0,
    key_added: str = Keys.PIXNET,
    show_progress_bar: bool | None = None,
) -> None:
    """Predict every spot of a stack from the image with PixNet, none by a model that has seen it.

    Spots that were not measured are predicted by a model fitted on all measured ones; measured spots by models that were
    fitted without their fold, in turn. The result can be scored against the measurement, and taken up by
    :func:`fit_asign` as a further base (``base_layers=["pixnet"]``), which weighs it by what it is worth on these folds.

    Parameters
    ----------
    sdata
        Registered stack.
    table_key, layer
        Stack table, and its layer with log-normalised expression.
    encoder, model_params, tile_size
        Encoder and settings of PixNet; see :func:`fit_pixnet`.
    n_folds, block_spacings, seed
        Folds: the measured sections if there are several, else blocks of so many spot spacings. For a base of ASIGN they
        must be those of its own ``model_params`` and `seed`.
    device
        Torch device; ``settings.device`` by default.
    key_added
        Layer to write.
    show_progress_bar
        ``settings.show_progress_bar`` by default.

    Returns
    -------
    ``None``. Writes to `sdata.tables['stack']`:

    `.layers['pixnet']` : :class:`numpy.ndarray` (``float32``)
        (n_spots, n_genes) predictions, in the units of `layer`; also at measured spots. The mean profile where a spot
        has no pixel on its image.
    `.obs['pixnet_fold']` : (``int64``)
        Fold of each measured spot; -1 for the others.
    `.uns['pixnet']` : :class:`dict`
        ``encoder``, ``n_folds``, ``block_spacings``, ``seed``, ``measured`` (hash of the expression), ``version``.

    Raises
    ------
    KeyError
        If the stack is not registered, or lacks table or layer.
    ValueError
        If nothing is measured, or values are raw counts or not finite.

    Examples
    --------
    >>> import torch
    >>> import spatial_impute as si
    >>> si.settings.show_progress_bar = False
    >>> sdata = si.datasets.synthetic_stack()
    >>> si.tl.register_stack(sdata, method="rigid")
    >>> class Blur(torch.nn.Module):
    ...     def forward(self, x):
    ...         return [torch.nn.functional.avg_pool2d(x, k) for k in (2, 4)]
    >>> params = {"n_steps": 0, "resolution": 8.0, "crop": 64}
    >>> si.tl.impute_pixnet(sdata, encoder=Blur(), model_params=params, n_folds=2)
    >>> sorted(int(k) for k in sdata.tables["stack"].obs["pixnet_fold"].unique())
    [-1, 0, 1]
    >>> si.settings.show_progress_bar = True
    """
    from spatial_impute.encoders._pyramids import build_pyramid
    from spatial_impute.models._params import PixNetParams
    from spatial_impute.models._spots import spatial_folds
    from spatial_impute.tl._pixnet_folds import PixNetSetup, fit_on, predict_held_out, predict_spots, read_sections

    params = resolve_params(model_params, PixNetParams)
    if params.loss != "mse+pcc":
        msg = f"A stack holds log values; `model_params` asks for the loss {params.loss!r}, for counts."
        raise ValueError(msg)
    n_folds, seed = require_count(n_folds, name="n_folds", least=2), require_count(seed, name="seed", least=0)
    tile_size, device = require_count(tile_size, name="tile_size"), require_device(device)
    block_spacings = require_positive(block_spacings, name="block_spacings")
    require_slot_key(key_added, name="key_added", taken=(layer, Keys.MEASURED))
    table, spots = read_spots(sdata, table_key=table_key, layer=layer, features=False, graph=False)
    folds = spatial_folds(spots, n_folds=n_folds, block_spacings=block_spacings, seed=seed)
    setup = PixNetSetup(
        pyramid=build_pyramid(encoder),
        params=params,
        table_key=table_key,
        layer=layer,
        tile_size=tile_size,
        device=device,
        seed=seed,
    )
    sections = read_sections(sdata, table)
    bar = progress(None, "Imputing with PixNet", show=show_progress_bar, total=len(folds) + 1)
    try:
        values = predict_held_out(sections, spots.known, folds, setup, bar.update)
        model = fit_on(sections, spots.known, setup)
        values[~spots.known] = predict_spots(sections, ~spots.known, model, setup)[~spots.known]
        bar.update()
    finally:
        bar.close()
    lost = np.isnan(values).any(axis=1)
    values[lost] = spots.expression.mean(axis=0)
    fold = np.full(table.n_obs, -1, dtype=np.int64)
    for k, rows in enumerate(folds):
        fold[rows] = k
    table.layers[key_added] = values.astype(np.float32)
    log_added(f"tables[{table_key!r}].layers[{key_added!r}]")
    table.obs[Keys.fold(key_added)] = fold
    log_added(f"tables[{table_key!r}].obs[{Keys.fold(key_added)!r}]")
    table.uns[key_added] = {
        "encoder": model.config["encoder"],
        "n_folds": int(n_folds),
        "block_spacings": float(block_spacings),
        "seed": int(seed),
        "measured": measured_hash(spots),
        "version": version("spatial-impute"),
    }
    log_added(f"tables[{table_key!r}].uns[{key_added!r}]")
