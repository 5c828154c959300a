"""Predict expression of regions with PixNet, without a map."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd
from anndata import AnnData
from spatialdata.models import TableModel

from spatial_impute._keys import Keys
from spatial_impute._settings import log_added, logger, progress_steps
from spatial_impute._stack.elements import image_state, require_element_key
from spatial_impute._stack.table import fingerprint
from spatial_impute._validation import require_count, require_device, require_key, require_model
from spatial_impute.tl._provenance import pixnet_provenance
from spatial_impute.tl._read_regions import find_frame, read_levels, read_shapes, stack_sections, warn_of_changed_slides

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy as np
    from spatialdata import SpatialData

    from spatial_impute.models import PixNetModel


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

    The value of a region is the mean (or sum) of the dense map over its pixels, exactly. Only tiles that regions touch
    are computed, each once. Regions may overlap, extend over many tiles, or extend beyond the image.

    Parameters
    ----------
    sdata
        Stack, or any object with image and shapes.
    shapes_key
        Circles or polygons.
    model
        Model of :func:`~spatial_impute.tl.fit_pixnet`.
    image_key
        Image; by default that of the section of a stack whose spots these shapes are.
    genes
        Genes; by default all of the model.
    coordinate_system
        Coordinate system that image and shapes share; by default the section of the image in a stack.
    mpp
        um per unit of the coordinate system; 1 for a stack.
    tile_size
        Edge of a tile in px at the resolution of the model.
    store
        File (AnnData in zarr) to write the result into, piece by piece. The table is then backed by this file; for
        millions of bins.
    device
        Torch device; ``settings.device`` by default.
    key_added
        Table to write; ``"{shapes_key}_expression"`` by default.
    inplace
        Add the table to `sdata`, or return it.
    show_progress_bar
        Show a progress bar; ``settings.show_progress_bar`` by default.

    Returns
    -------
    ``None``, or the table with ``inplace=False``. Writes `sdata.tables['{shapes_key}_expression']`, an
    :class:`anndata.AnnData` with:

    `.X` : (``float32``)
        (n_shapes, n_genes) in the units of the model; NaN for shapes without a pixel on the image. A warning says how
        many these are.
    `.obs['n_pixels']` : (``float64``)
        Pixels of the shape on the image at the resolution of the model; the area of a shape that is too small for a
        pixel.
    `.var['imputation_r']` : (``float64``)
        Correlation of the gene on held-out regions of the training slides.
    `.obsm['spatial']` : :class:`numpy.ndarray` (``float64``)
        (n_shapes, 2) centers, um.
    `.uns['pixnet']` : :class:`dict`
        Provenance.

    Raises
    ------
    KeyError
        If elements or genes do not exist.
    ValueError
        If the coordinate system or its unit is not clear, or if shapes are neither circles nor polygons.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack(extent=1400.0)
    >>> params = {"n_steps": 2, "width": 8, "resolution": 8.0, "crop": 64}
    >>> model = si.tl.fit_pixnet(sdata, "s1_image", "s1_spots", model_params=params, show_progress_bar=False)
    >>> si.tl.predict_regions(sdata, "s0_spots", model, show_progress_bar=False)
    >>> sdata.tables["s0_spots_expression"].shape == (len(sdata.shapes["s0_spots"]), 36)
    True
    >>> si.tl.predict_dense(sdata, "s0_image", model)
    >>> sdata.images["s0_image_expression"].dims
    ('c', 'y', 'x')
    """
    from spatial_impute._image.resampling import slide_overview
    from spatial_impute.models.pixnet._model import PixNetModel
    from spatial_impute.models.pixnet._tiles import regions_by_tile

    image_key = _image_of(sdata, shapes_key) if image_key is None else image_key
    key = Keys.expression(shapes_key) if key_added is None else key_added
    require_model(model, PixNetModel, made_by="si.tl.fit_pixnet(sdata, image_key, shapes_key)")
    tile_size, device = require_count(tile_size, name="tile_size"), require_device(device)
    frame = find_frame(sdata, image_key, shapes_key, coordinate_system, mpp)
    regions, index = read_shapes(sdata, shapes_key, frame)
    warn_of_changed_slides(sdata, model)
    state = {"image": image_state(sdata, image_key, frame.name), "shapes": fingerprint(regions.centers, regions.area)}
    origin = {"coordinate_system": frame.name, Keys.STATE: state}
    if inplace:
        ours = [name for name, table in sdata.tables.items() if Keys.PIXNET in table.uns]
        require_element_key(sdata, key, kind="tables", ours=ours)
    gene_index = model.gene_index(genes)
    levels = read_levels(sdata, image_key, frame)
    slide = model._slide(levels, slide_overview(levels), tile_size)
    model.network.to(device)
    in_px, centers = regions.moved(slide.image.from_um), regions.centers
    del regions  # millions of polygons are not kept twice
    names = [model.var_names[i] for i in gene_index]
    obs = pd.DataFrame({Keys.REGION: pd.Categorical([shapes_key] * len(index)), Keys.INSTANCE: index.to_numpy()})
    obs.index = index.astype(str)
    slots: dict[str, Any] = {
        "obs": obs,
        "var": pd.DataFrame({Keys.PREDICTABILITY: model.predictability.loc[names].to_numpy()}, index=names),
        "obsm": {Keys.SPATIAL: centers},
        "uns": {Keys.PIXNET: pixnet_provenance(model, image_key) | origin},
    }
    read = partial(model._read_regions, slide, in_px, gene_index)
    with progress_steps(f"Predicting {key}", show=show_progress_bar) as steps:
        on_tile = steps(len(regions_by_tile(in_px, slide.tiling)))
        if store is None:
            values, obs[Keys.N_PIXELS] = read(on_tile=on_tile)
            table = AnnData(values, **slots)
        else:
            table = _stored_table(read, slots, on_tile, store)
    n_off = int((table.obs[Keys.N_PIXELS] == 0).sum())
    if n_off:
        logger.warning("%d of %d shapes of %r hold no pixel of %r: NaN", n_off, len(index), shapes_key, image_key)
    if not inplace:
        return table
    sdata.tables[key] = TableModel.parse(table, region=shapes_key, region_key=Keys.REGION, instance_key=Keys.INSTANCE)
    log_added(f"tables[{key!r}]")
    return None


def _stored_table(
    read: Callable[..., tuple[np.ndarray, np.ndarray]],
    slots: dict[str, Any],
    on_tile: Callable[[], None],
    store: str | Path,
) -> AnnData:
    """Table that is written to a file piece by piece and backed by it."""
    from spatial_impute._io.stores import RegionStore

    with RegionStore(store, (len(slots["obs"]), len(slots["var"]))) as writer:

        def tile_done() -> None:
            writer.release()
            on_tile()

        _, slots["obs"][Keys.N_PIXELS] = read(on_tile=tile_done, out=writer.values)
        return writer.commit(**slots)


def _image_of(sdata: SpatialData, shapes_key: str) -> str:
    """Image of the section whose spots these are."""
    require_key(shapes_key, sdata.shapes, where="sdata.shapes")
    found = next((s.image for s in stack_sections(sdata) if s.spots == shapes_key), None)
    if found is None:
        msg = f"{shapes_key!r} are not the spots of a section of a stack; name their image with `image_key=`."
        raise ValueError(msg)
    return found
