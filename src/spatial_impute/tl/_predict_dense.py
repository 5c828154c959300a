"""Predict with PixNet: a dense map, or values at regions without a map."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spatial_impute._keys import Keys
from spatial_impute._logging import log_added, logger
from spatial_impute._settings import progress
from spatial_impute._stack.elements import require_element_key
from spatial_impute._validation import (
    require_count,
    require_device,
    require_key,
    require_model,
    require_one_of,
)
from spatial_impute.tl._read_regions import find_frame, read_levels, read_shapes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from spatialdata import SpatialData
    from xarray import DataArray

    from spatial_impute.models import PixNetModel

_NAME_OF_FEATURE = "feature_{}"
_MAX_CHANNELS = 2000  # a map of more is larger than what anyone stores; features and direct read-out remain


def predict_dense(
    sdata: SpatialData,
    image_key: str,
    model: PixNetModel,
    *,
    genes: Sequence[str] | None = None,
    shapes_key: str | None = None,
    tissue_only: bool = True,
    features: bool = False,
    coordinate_system: str | None = None,
    mpp: float | None = None,
    tile_size: int = 1024,
    output_dtype: str = "float16",
    store: str | Path | None = None,
    overwrite: bool = False,
    device: str | None = None,
    key_added: str | None = None,
    inplace: bool = True,
    show_progress_bar: bool | None = None,
) -> DataArray | None:
    """Predict a dense map of expression from an H&E image.

    The map is computed tile by tile, each with as much context as the network reads, so that it does not depend on the
    tiles. By default it is lazy: a tile is computed when its values are asked for, also by ``sdata.write``. With
    `store` it is computed now and written into the store of a SpatialData object; with an active
    :class:`dask.distributed.Client` its workers do that, and the values are the same.

    Parameters
    ----------
    sdata
        Stack, or any object with the image.
    image_key
        Image.
    model
        Model of :func:`~spatial_impute.tl.fit_pixnet`.
    genes
        Genes; by default all of the model.
    shapes_key
        Compute only tiles that these circles or polygons touch.
    tissue_only
        Leave cells off the tissue NaN, and skip tiles without any.
    features
        Store what the genes are linear in instead of genes, for :func:`~spatial_impute.tl.genes_from_features`.
    coordinate_system
        Frame of the map; by default the section of the image in a stack.
    mpp
        um per unit of that frame; 1 for a stack.
    tile_size
        Edge of a tile in px of the model's resolution.
    output_dtype
        ``"float16"``, ``"float32"`` or ``"float64"``; what is stored. Computed is in the precision of the model.
    store
        Directory of a SpatialData object to write the map into. An interrupted call leaves no element there; the same
        call takes it up.
    overwrite
        Replace an element of that name in the store, once the new one is complete.
    device
        Torch device; ``settings.device`` by default.
    key_added
        Image to write, ``"{image_key}_expression"`` by default.
    inplace
        Add the map to `sdata`, or return it.
    show_progress_bar
        ``settings.show_progress_bar`` by default.

    Returns
    -------
    ``None``, or the map with ``inplace=False``. Writes:

    `sdata.images['{image_key}_expression']` : :class:`xarray.DataArray`
        (gene, y, x), one cell per ``model.cell_size`` um, with its transformation to the frame. Values are log expression,
        or counts per um^2 for a model of counts; NaN where nothing was predicted.
    `sdata.attrs['spatial_impute']['dense']['{image_key}_expression']` : :class:`dict`
        Units, genes, coverage and provenance.

    Raises
    ------
    KeyError
        If image, shapes or genes do not exist.
    ValueError
        If frame or unit are not clear, or the element exists in the store.
    FileNotFoundError
        If there is no object at `store`.

    Examples
    --------
    See :func:`~spatial_impute.tl.predict_regions`.
    """
    from spatial_impute._io.stores import DenseStore, as_element, write_tiles
    from spatial_impute._io.workers import active_client

    key = Keys.expression(image_key) if key_added is None else key_added
    require_one_of(output_dtype, ("float16", "float32", "float64"), name="output_dtype")
    tile_size = _check_call(model, tile_size)
    device = require_device(device)
    frame = find_frame(sdata, image_key, shapes_key, coordinate_system=coordinate_system, mpp=mpp)
    names, job = _make_job(
        sdata,
        image_key,
        model,
        frame,
        genes=genes,
        shapes_key=shapes_key,
        tissue_only=tissue_only,
        features=features,
        tile_size=tile_size,
        output_dtype=output_dtype,
        device=device,
    )
    if inplace:
        require_element_key(sdata, key, name="key_added", kind="images", ours=_maps(sdata))
    if store is None:
        element = as_element(_lazy_array(job), names, job, frame)
    else:
        writer = DenseStore(store, key, job, names, frame, overwrite=overwrite)
        bar = progress(None, f"Predicting {key}", show=show_progress_bar)
        try:
            left = writer.prepare()
            bar.reset(total=len(left))
            write_tiles(writer, left, active_client(), bar.update)
            writer.commit()
        except OSError as error:
            error.add_note(
                "The store shows no part of the map; once it can be written to, the same call goes on from here."
            )
            raise
        finally:
            bar.close()
        element = writer.read()
    if not inplace:
        return element
    sdata.images[key] = element
    log_added(f"images[{key!r}]")
    _record(sdata, key, model, job, image_key, names=names)
    return None


def predict_regions(
    sdata: SpatialData,
    shapes_key: str,
    model: PixNetModel,
    *,
    image_key: str | None = None,
    genes: Sequence[str] | None = None,
    coordinate_system: str | None = None,
    mpp: float | None = None,
    tile_size: int = 1024,
    store: str | Path | None = None,
    device: str | None = None,
    key_added: str | None = None,
    inplace: bool = True,
    show_progress_bar: bool | None = None,
) -> AnnData | None:
    """Predict expression of circles or polygons of any size, without computing a map.

    The value of a region is the mean (or sum) of the dense map over its pixels, exactly; only tiles that regions touch
    are computed, each once. Regions may overlap, reach over many tiles, or over the image.

    Parameters
    ----------
    sdata
        Stack, or any object with image and shapes.
    shapes_key
        Circles or polygons.
    model
        Model of :func:`~spatial_impute.tl.fit_pixnet`.
    image_key
        Image; by default that of the section of a stack whose spots these are.
    genes
        Genes; by default all of the model.
    coordinate_system
        Frame that image and shapes share; by default the section of the image in a stack.
    mpp
        um per unit of that frame; 1 for a stack.
    tile_size
        Edge of a tile in px of the model's resolution.
    store
        Write the result here (AnnData in zarr) piece by piece, and return it backed by that file: for millions of bins.
    device
        Torch device; ``settings.device`` by default.
    key_added
        Table to write, ``"{shapes_key}_expression"`` by default.
    inplace
        Add the table to `sdata`, or return it.
    show_progress_bar
        ``settings.show_progress_bar`` by default.

    Returns
    -------
    ``None``, or the table with ``inplace=False``. Writes:

    `sdata.tables['{shapes_key}_expression']` : :class:`anndata.AnnData`
        ``X`` (n_shapes, n_genes) ``float32`` in the units of the model, NaN for shapes without a pixel on the image (a
        warning says how many);
        ``obs["n_pixels"]`` pixels of the shape on the image at the model's resolution (the area of a shape too small to
        hold one); ``var["imputation_r"]`` correlation of the gene on held-out regions of the training slides;
        ``obsm["spatial"]`` centres in um; ``uns["pixnet"]`` provenance.

    Raises
    ------
    KeyError
        If elements or genes do not exist.
    ValueError
        If frame or unit are not clear, or shapes are neither circles nor polygons.

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
    >>> si.tl.predict_regions(sdata, "s0_spots", model, show_progress_bar=False)
    >>> sdata.tables["s0_spots_expression"].shape == (len(sdata.shapes["s0_spots"]), 36)
    True
    >>> si.tl.predict_dense(sdata, "s0_image", model)
    >>> sdata.images["s0_image_expression"].dims
    ('c', 'y', 'x')
    """
    if image_key is None:
        image_key = _image_of(sdata, shapes_key)
    key = Keys.expression(shapes_key) if key_added is None else key_added
    tile_size, device = _check_call(model, tile_size), require_device(device)
    frame = find_frame(sdata, image_key, shapes_key, coordinate_system=coordinate_system, mpp=mpp)
    regions, index = read_shapes(sdata, shapes_key, frame)
    if inplace:
        ours = [name for name, table in sdata.tables.items() if Keys.PIXNET in table.uns]
        require_element_key(sdata, key, name="key_added", kind="tables", ours=ours)
    genes_index = model.gene_index(genes)
    from spatial_impute._image.resampling import slide_overview

    levels = read_levels(sdata, image_key, frame)
    image, stain = model._image(levels), model._stain(slide_overview(levels))
    model.network.to(device)
    in_px, centers = regions.moved(image.from_um), regions.centers
    del regions  # millions of polygons are not kept twice
    bar = progress(None, f"Predicting {key}", show=show_progress_bar, total=model._n_tiles(image, in_px, tile_size))
    obs = pd.DataFrame({Keys.REGION: pd.Categorical([shapes_key] * len(index)), Keys.INSTANCE: index.to_numpy()})
    obs.index = index.astype(str)
    names = [model.var_names[i] for i in genes_index]
    var = pd.DataFrame({Keys.PREDICTABILITY: model.predictability.loc[names].to_numpy()}, index=names)
    uns = {Keys.PIXNET: _provenance(model, image_key)}
    obsm = {Keys.SPATIAL: centers}
    if store is not None:
        from spatial_impute._io.stores import RegionStore

        writer = RegionStore(store, (len(in_px), len(genes_index)))

        def tile_done() -> None:
            writer.release()
            bar.update()

        found = model._read_regions(
            image, stain, in_px, genes_index, core=tile_size, on_tile=tile_done, out=writer.values
        )
        obs[Keys.N_PIXELS] = found.n_pixels
        table = writer.commit(obs=obs, var=var, obsm=obsm, uns=uns)
    else:
        from anndata import AnnData

        found = model._read_regions(image, stain, in_px, genes_index, core=tile_size, on_tile=bar.update)
        obs[Keys.N_PIXELS] = found.n_pixels
        table = AnnData(found.expression, obs=obs, var=var, obsm=obsm, uns=uns)
    bar.close()
    n_off = int((table.obs[Keys.N_PIXELS] == 0).sum())
    if n_off:
        logger.warning("%d of %d shapes of %r hold no pixel of %r: NaN", n_off, len(index), shapes_key, image_key)
    if not inplace:
        return table
    from spatialdata.models import TableModel

    sdata.tables[key] = TableModel.parse(table, region=shapes_key, region_key=Keys.REGION, instance_key=Keys.INSTANCE)
    log_added(f"tables[{key!r}]")
    return None


def genes_from_features(
    sdata: SpatialData,
    features_key: str,
    model: PixNetModel,
    *,
    genes: Sequence[str] | None = None,
    key_added: str | None = None,
    inplace: bool = True,
) -> DataArray | None:
    """Genes from a stored map of features, computed when they are asked for.

    The head of the model is linear, so that a map of some hundred features holds that of any number of genes.

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
        Image to write, ``"{features_key}_expression"`` by default.
    inplace
        Add the map to `sdata`, or return it.

    Returns
    -------
    ``None``, or the map with ``inplace=False``. Writes:

    `sdata.images['{features_key}_expression']` : :class:`xarray.DataArray`
        (gene, y, x), lazy.

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

    _check_call(model, 1)
    require_key(features_key, sdata.images, where="sdata.images")
    key = Keys.expression(features_key) if key_added is None else key_added
    if inplace:
        ours = {*_maps(sdata), Keys.expression(features_key)} - {features_key}
        require_element_key(sdata, key, name="key_added", kind="images", ours=ours)
    element = sdata.images[features_key]
    index = model.gene_index(genes)
    found = sdata.attrs.get(Keys.ATTRS, {}).get(Keys.DENSE, {}).get(features_key, {})
    n_features = model.network.head.in_channels
    if element.sizes["c"] != n_features or found.get("model", model.identity) != model.identity:
        msg = (
            f"`sdata.images[{features_key!r}]` holds {element.sizes['c']} channels of model {found.get('model')!r}; this "
            f"model ({model.identity!r}) has {n_features} features. Run `si.tl.predict_dense(..., features=True)` with it."
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


def _check_call(model: PixNetModel, tile_size: int) -> int:
    """Tile size, after checking that this is a model of dense maps."""
    from spatial_impute.models.pixnet._model import PixNetModel

    require_model(model, PixNetModel, made_by="si.tl.fit_pixnet(sdata, image_key, shapes_key)")
    return require_count(tile_size, name="tile_size")


def _maps(sdata: SpatialData) -> dict[str, Any]:
    """Records of the dense maps that were made in this object."""
    return sdata.attrs.get(Keys.ATTRS, {}).get(Keys.DENSE, {})


def _apply_head(block: np.ndarray, network: Any) -> np.ndarray:
    import torch

    with torch.inference_mode():
        features = torch.from_numpy(np.ascontiguousarray(block, dtype=np.float32))[None]
        return network.genes(features.to(network.head.weight.device))[0].cpu().numpy()


def _make_job(
    sdata: SpatialData,
    image_key: str,
    model: PixNetModel,
    frame: Any,
    *,
    genes: Sequence[str] | None,
    shapes_key: str | None,
    tissue_only: bool,
    features: bool,
    tile_size: int,
    output_dtype: str,
    device: str,
) -> tuple[list[str], Any]:
    """Names of the channels, and the job, after all checks."""
    from spatial_impute._image.resampling import slide_overview
    from spatial_impute.models.pixnet._tiles import DenseJob, TileIndex, tissue_tiles

    index = model.gene_index(genes)
    n_features = model.network.head.in_channels
    names = [_NAME_OF_FEATURE.format(i) for i in range(n_features)] if features else [model.var_names[i] for i in index]
    if len(names) > _MAX_CHANNELS:
        msg = (
            f"A map of {len(names)} genes is too large to be of use. Choose `genes=`, or store `features=True` "
            f"({n_features} channels, from which any gene follows)."
        )
        raise ValueError(msg)
    levels = read_levels(sdata, image_key, frame)
    found = slide_overview(levels)
    image, stain = model._image(levels), model._stain(found)
    tiling = model._tiling(image.shape, tile_size)
    network = model.network.with_genes(index).to(device)
    wanted = tissue_tiles(tiling, image, found) if tissue_only else None
    if shapes_key is not None:
        regions, _ = read_shapes(sdata, shapes_key, frame)
        touched = frozenset(tile for tile, _ in TileIndex(regions.moved(image.from_um), tiling))
        wanted = touched if wanted is None else wanted & touched
    if wanted is None:
        rows, columns = tiling.shape
        wanted = frozenset((i, j) for i in range(rows) for j in range(columns))
    job = DenseJob(network, image, stain, tiling, output_dtype, features, found if tissue_only else None, wanted)
    return names, job


def _lazy_array(job: Any) -> Any:
    """Dask array of the map: a chunk per tile, computed when it is asked for."""
    import dask
    import dask.array as da

    shared = dask.delayed(job, pure=False, traverse=False)
    rows, columns = job.tiling.shape
    blocks = []
    for i in range(rows):
        row = []
        for j in range(columns):
            y, x = job.place((i, j))
            shape = (job.n_channels, y.stop - y.start, x.stop - x.start)
            if (i, j) in job.wanted:
                tile = dask.delayed(type(job).compute)(shared, (i, j))
                row.append(da.from_delayed(tile, shape, dtype=job.dtype, meta=np.empty((0, 0, 0), job.dtype)))
            else:
                row.append(da.full(shape, np.nan, dtype=job.dtype, chunks=shape))
        blocks.append(row)
    return da.block(blocks)


def _record(
    sdata: SpatialData, key: str, model: PixNetModel, job: Any, image_key: str, *, names: Sequence[str]
) -> None:
    """Provenance in ``sdata.attrs``: attributes of elements are not written to disk."""
    rows, columns = job.tiling.shape
    entry = _provenance(model, image_key) | {
        "features": job.features,
        "genes": list(names),
        "cell_um": float(model.cell_size),
        "n_tiles": rows * columns,
        "n_tiles_predicted": len(job.wanted),
        "tissue_only": job.tissue is not None,
    }
    ours = dict(sdata.attrs.get(Keys.ATTRS, {}))
    ours[Keys.DENSE] = {**ours.get(Keys.DENSE, {}), key: entry}
    sdata.attrs[Keys.ATTRS] = ours
    log_added(f"attrs[{Keys.ATTRS!r}][{Keys.DENSE!r}][{key!r}]")


def _provenance(model: PixNetModel, image_key: str) -> dict[str, Any]:
    return {
        "model": model.identity,
        "image": image_key,
        "encoder": model.config["encoder"],
        "units": model.config["units"],
        "aggregate": model.config["aggregate"],
        "resolution_um": float(model.config["resolution"]),
        "trained_on": [entry["image"] for entry in model.config["trained_on"]],
        "seed": int(model.config.get("seed", -1)),  # models of 0.1.0.dev had none
        "version": version("spatial-impute"),
    }


def _image_of(sdata: SpatialData, shapes_key: str) -> str:
    """Image of the section whose spots these are."""
    from spatial_impute._stack.record import load_record

    require_key(shapes_key, sdata.shapes, where="sdata.shapes")
    sections = load_record(sdata).sections if Keys.STACK in sdata.attrs.get(Keys.ATTRS, {}) else ()
    found = next((s.image for s in sections if s.spots == shapes_key), None)
    if found is None:
        msg = f"{shapes_key!r} are not the spots of a section of a stack; name their image with `image_key=`."
        raise ValueError(msg)
    return found
