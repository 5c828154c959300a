"""Dense maps of a whole slide: of genes, or of features from which genes are computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
from spatialdata.models import Image2DModel
from spatialdata.transformations import get_transformation

from spatial_impute._keys import Keys
from spatial_impute._settings import log_added, progress_steps
from spatial_impute._stack.elements import image_state, require_element_key
from spatial_impute._stack.record import attrs_record
from spatial_impute._stack.state import map_problems, raise_or_warn
from spatial_impute._validation import require_count, require_device, require_key, require_model, require_one_of
from spatial_impute.encoders._encoder import PRECISIONS
from spatial_impute.tl._provenance import pixnet_provenance
from spatial_impute.tl._read_regions import dense_maps, find_frame, read_levels, read_shapes, warn_of_changed_slides

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from spatialdata import SpatialData
    from xarray import DataArray

    from spatial_impute._io.stores import DenseStore
    from spatial_impute.models import PixNetModel
    from spatial_impute.models.pixnet._network import PixNetNetwork
    from spatial_impute.models.pixnet._tiles import DenseJob

_MAX_CHANNELS = 2000  # a larger map is too large to store; features, or values of regions, remain possible


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
    precision: str = "float32",
    key_added: str | None = None,
    inplace: bool = True,
    show_progress_bar: bool | None = None,
) -> DataArray | None:
    """Predict a dense map of expression from an H&E image.

    The map is computed tile by tile. Each tile is read with all the surrounding pixels that the network needs, so the
    values do not depend on the tiles. By default the map is lazy: a tile is computed when its values are needed, also
    by ``sdata.write``. With `store` the map is computed now and written into the store of a SpatialData object. If a
    :class:`dask.distributed.Client` is active, its workers compute the tiles, and the values are the same.

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
        Set cells outside the tissue to NaN, and skip tiles without tissue.
    features
        Store the features from which genes are computed, not genes; see :func:`~spatial_impute.tl.genes_from_features`.
    coordinate_system
        Coordinate system of the map; by default the section of the image in a stack.
    mpp
        um per unit of the coordinate system; 1 for a stack.
    tile_size
        Edge of a tile in px at the resolution of the model.
    output_dtype
        Type of the stored values: ``"float16"``, ``"float32"`` or ``"float64"``. The model computes in its own
        precision.
    store
        Directory of a SpatialData object to write the map into. An interrupted call leaves no element there; a later
        call with the same arguments continues from it.
    overwrite
        Replace an element of that name in the store, when the new one is complete.
    device
        Torch device; ``settings.device`` by default.
    precision
        ``"float32"``, or ``"bfloat16"`` for encoder and decoder: faster on a GPU, with rounding errors of about 1 %,
        also between tiles.
    key_added
        Image to write; ``"{image_key}_expression"`` by default.
    inplace
        Add the map to `sdata`, or return it.
    show_progress_bar
        Show a progress bar; ``settings.show_progress_bar`` by default.

    Returns
    -------
    ``None``, or the map with ``inplace=False``. Writes:

    `sdata.images['{image_key}_expression']` : :class:`xarray.DataArray`
        (gene, y, x), one cell per ``model.cell_size`` um, with its transformation to the coordinate system. Values are
        log1p counts, or counts per um^2 for a model of counts; NaN where nothing was predicted.
    `sdata.attrs['spatial_impute']['dense']['{image_key}_expression']` : :class:`dict`
        Units, genes, coverage and provenance.

    Raises
    ------
    KeyError
        If image, shapes or genes do not exist.
    ValueError
        If the coordinate system or its unit is not clear, or if the element exists in the store.
    FileNotFoundError
        If there is no object at `store`.

    Examples
    --------
    See :func:`~spatial_impute.tl.predict_regions`.
    """
    from spatial_impute._image.levels import image_fingerprint
    from spatial_impute._image.resampling import slide_overview
    from spatial_impute._io.stores import DenseStore, as_element
    from spatial_impute.models.pixnet._model import PixNetModel
    from spatial_impute.models.pixnet._tiles import DenseJob, regions_by_tile, tissue_tiles

    key = Keys.expression(image_key) if key_added is None else key_added
    require_one_of(output_dtype, ("float16", "float32", "float64"), name="output_dtype")
    require_model(model, PixNetModel, made_by="si.tl.fit_pixnet(sdata, image_key, shapes_key)")
    require_one_of(precision, PRECISIONS, name="precision")
    tile_size, device = require_count(tile_size, name="tile_size"), require_device(device)
    frame = find_frame(sdata, image_key, shapes_key, coordinate_system, mpp)
    warn_of_changed_slides(sdata, model)
    index, n_features = model.gene_index(genes), model.network.head.in_channels
    names = [f"feature_{i}" for i in range(n_features)] if features else [model.var_names[i] for i in index]
    if len(names) > _MAX_CHANNELS:
        msg = (
            f"A map of {len(names)} genes is too large to store. Choose `genes=`, or store `features=True` "
            f"({n_features} channels, from which any gene can be computed)."
        )
        raise ValueError(msg)
    levels = read_levels(sdata, image_key, frame)
    overview = slide_overview(levels)
    slide = model._slide(levels, overview, tile_size)
    rows, columns = slide.tiling.shape
    wanted = frozenset((i, j) for i in range(rows) for j in range(columns))
    if tissue_only:
        wanted = tissue_tiles(slide, overview)
    if shapes_key is not None:
        regions, _ = read_shapes(sdata, shapes_key, frame)
        wanted &= frozenset(regions_by_tile(regions.moved(slide.image.from_um), slide.tiling))
    network = model.network.with_genes(index).to(device)
    network.precision = precision
    job = DenseJob(
        network, slide, output_dtype, features, overview if tissue_only else None, wanted, image_fingerprint(levels)
    )
    if inplace:
        require_element_key(sdata, key, kind="images", ours=dense_maps(sdata))
    if store is None:
        element = as_element(_lazy_array(job), names, job, frame)
    else:
        writer = DenseStore(store, key, job, names, frame, overwrite=overwrite)
        element = _write(writer, show=show_progress_bar)
    if not inplace:
        return element
    sdata.images[key] = element
    log_added(f"images[{key!r}]")
    entry = pixnet_provenance(model, image_key) | {
        "coordinate_system": frame.name,
        Keys.STATE: {"image": image_state(sdata, image_key, frame.name)},
        "features": job.features,
        "genes": names,
        "cell_um": float(model.cell_size),
        "n_tiles": rows * columns,
        "n_tiles_predicted": len(job.wanted),
        "tissue_only": job.tissue is not None,
    }
    # In `sdata.attrs`, because attributes of elements are not written to disk. A part of an object shares its attrs.
    ours = {**attrs_record(sdata), Keys.DENSE: {**dense_maps(sdata), key: entry}}
    sdata.attrs = {**sdata.attrs, Keys.ATTRS: ours}
    log_added(f"attrs[{Keys.ATTRS!r}][{Keys.DENSE!r}][{key!r}]")
    return None


def _write(writer: DenseStore, *, show: bool | None) -> DataArray:
    """Compute the map into a store, on the workers of a client if one is active, and read it back lazily."""
    from spatial_impute._io.stores import write_tiles
    from spatial_impute._io.workers import active_client

    try:
        with writer, progress_steps(f"Predicting {writer.key}", show=show) as steps:
            tiles = writer.prepare()
            write_tiles(writer, tiles, active_client(), steps(len(tiles)))
            writer.commit()
    except FileExistsError:  # of another process, or not ours
        raise
    except OSError as error:
        error.add_note(
            "The store shows no part of the map. When it can be written to, the same call continues from here."
        )
        raise
    return writer.read()


def _lazy_array(job: DenseJob) -> Any:
    """Dask array of the map: one chunk per tile, computed when its values are needed."""
    import dask

    shared = dask.delayed(job, pure=False, traverse=False)
    rows, columns = job.tiling.shape

    def block(tile: tuple[int, int]) -> Any:
        y, x = job.place(tile)
        shape = (job.n_channels, y.stop - y.start, x.stop - x.start)
        if tile not in job.wanted:
            return da.full(shape, np.nan, dtype=job.dtype, chunks=shape)
        values = dask.delayed(type(job).compute)(shared, tile)
        return da.from_delayed(values, shape, dtype=job.dtype, meta=np.empty((0, 0, 0), job.dtype))

    return da.block([[block((i, j)) for j in range(columns)] for i in range(rows)])


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
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack(extent=1400.0)
    >>> params = {"n_steps": 2, "width": 8, "resolution": 8.0, "crop": 64}
    >>> model = si.tl.fit_pixnet(sdata, "s1_image", "s1_spots", model_params=params, show_progress_bar=False)
    >>> si.tl.predict_dense(sdata, "s0_image", model, features=True, key_added="s0_features")
    >>> genes = si.tl.genes_from_features(sdata, "s0_features", model, genes=["smooth_0"], inplace=False)
    >>> genes.sizes["c"]
    1
    """
    from spatial_impute.models.pixnet._model import PixNetModel

    require_model(model, PixNetModel, made_by="si.tl.fit_pixnet(sdata, image_key, shapes_key)")
    require_key(features_key, sdata.images, where="sdata.images")
    key = Keys.expression(features_key) if key_added is None else key_added
    if inplace:
        ours = {*dense_maps(sdata), Keys.expression(features_key)} - {features_key}
        require_element_key(sdata, key, kind="images", ours=ours)
    raise_or_warn(map_problems(sdata, features_key))
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
    features = da.asarray(element.data).rechunk({0: -1})
    data = features.map_blocks(
        _apply_head, network=network, dtype=np.float32, chunks=((len(index),), *features.chunks[1:])
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
