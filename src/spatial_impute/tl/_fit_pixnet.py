"""Fit PixNet. The network itself lives in ``spatial_impute.models``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spatial_impute._logging import logger
from spatial_impute._params import resolve_params
from spatial_impute._validation import require_count, require_device
from spatial_impute.tl._fit_asign import _steps

if TYPE_CHECKING:
    from spatialdata import SpatialData
    from torch import nn

    from spatial_impute.encoders._pyramids import Pyramid
    from spatial_impute.models import PixNetModel, PixNetParams
    from spatial_impute.models.pixnet._crops import TrainingSlide
    from spatial_impute.tl._read_regions import Measured

    Pair = tuple[SpatialData, str, str, str | None]


def fit_pixnet(
    sdata: SpatialData | Sequence[SpatialData],
    image_key: str | Sequence[str],
    shapes_key: str | Sequence[str],
    *,
    table_key: str | Sequence[str] | None = None,
    layer: str | None = None,
    genes: Sequence[str] | None = None,
    target_sum: float | None = None,
    coordinate_system: str | None = None,
    mpp: float | None = None,
    encoder: str | nn.Module = "tellez-multitask",
    aggregate: str = "mean",
    model_params: PixNetParams | Mapping[str, Any] | None = None,
    tile_size: int = 1024,
    checkpoint: str | Path | None = None,
    device: str | None = None,
    seed: int = 0,
    show_progress_bar: bool | None = None,
) -> PixNetModel:
    """Fit PixNet :cite:p:`Zhang2025`: a dense map of expression from H&E, supervised at the measured regions only.

    A pyramid encoder and a decoder give a map of expression; what it predicts for a spot is the mean (or sum) of the
    map over the pixels of the spot, so that spots of any size can be learned from together and read off later. The
    network starts from ridge regression on the encoder's maps and is trained further only as long as held-out blocks of
    the training slides gain. Expression of unmeasured spots is never read.

    Parameters
    ----------
    sdata
        Object with image, regions and table; several to train on several slides.
    image_key, shapes_key
        Image and regions (circles or polygons). Sequences of equal length train on several pairs: sections of a stack,
        or bins of several sizes on one image. With several objects, one pair each.
    table_key
        Table that annotates the regions; by default the stack table, or the only one there is.
    layer
        Layer with expression; by default ``"measured"`` of the stack table, and ``X`` of others.
    genes
        Genes to predict; by default all of the table.
    target_sum
        The table holds raw counts: divide by the total over all genes, multiply by this, take log1p.
    coordinate_system
        Frame that image and regions share; by default the section of the image in a stack.
    mpp
        um per unit of that frame; 1 for a stack.
    encoder
        ``"tellez-multitask"`` (1 um per pixel), ``"resnet18"``, ``"resnet50"``, ``"ciga-resnet18"`` (0.5 um), or a
        module that returns a pyramid of feature maps.
    aggregate
        ``"mean"`` over the pixels of a region for log values; ``"sum"`` for counts, which grow with area.
    model_params
        Advanced settings; see :class:`~spatial_impute.models.PixNetParams`.
    tile_size
        Edge of a tile in px for passes over whole slides.
    checkpoint
        Directory to save the state of training to. A call with the same arguments takes it up.
    device
        Torch device; ``settings.device`` by default.
    seed
        Seed; same seed, same model.
    show_progress_bar
        ``settings.show_progress_bar`` by default.

    Returns
    -------
    The fitted model. ``model.history`` has the losses, ``model.predictability`` the correlation per gene on held-out
    blocks. Nothing is written.

    Raises
    ------
    KeyError
        If elements, tables, layers or genes do not exist.
    ValueError
        If nothing is measured, values are counts where log values are expected or the reverse, units are unknown, or
        genes differ between slides.

    Examples
    --------
    >>> import torch
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack()
    >>> class Blur(torch.nn.Module):  # any module that returns feature maps, finest first
    ...     def forward(self, x):
    ...         return [torch.nn.functional.avg_pool2d(x, k) for k in (2, 4)]
    >>> model = si.tl.fit_pixnet(
    ...     sdata,
    ...     "s1_image",
    ...     "s1_spots",
    ...     encoder=Blur(),
    ...     model_params={"n_steps": 2, "width": 8, "resolution": 8.0, "crop": 64},
    ...     show_progress_bar=False,
    ... )
    >>> len(model.var_names)
    36
    """
    from spatial_impute.encoders._pyramids import build_pyramid
    from spatial_impute.models._params import PixNetParams

    params = resolve_params(model_params, PixNetParams)
    tile_size, seed = require_count(tile_size, name="tile_size"), require_count(seed, name="seed", least=0)
    device = require_device(device)
    counts = params.loss != "mse+pcc"
    if aggregate not in ("mean", "sum") or (counts and aggregate == "mean"):
        msg = (
            f"`aggregate` must be 'mean' or 'sum', and 'sum' for losses on counts; found {aggregate!r} with the loss "
            f"{params.loss!r}."
        )
        raise ValueError(msg)
    if aggregate == "sum" and not counts:
        msg = (
            "The sum over a region grows with its area, log values do not: `aggregate='sum'` needs counts and "
            f"`model_params={{'loss': 'poisson'}}` or 'nb'; found the loss {params.loss!r}."
        )
        raise ValueError(msg)
    pairs = _pairs(sdata, image_key, shapes_key, table_key)
    with _steps("Fitting PixNet", show=show_progress_bar) as steps:
        model = fit_pairs(
            pairs,
            build_pyramid(encoder),
            params,
            layer=layer,
            genes=genes,
            target_sum=target_sum,
            coordinate_system=coordinate_system,
            mpp=mpp,
            aggregate=aggregate,
            tile_size=tile_size,
            checkpoint=None if checkpoint is None else Path(checkpoint),
            device=device,
            seed=seed,
            steps=steps,
        )
    logger.info("Fitted %r", model)
    return model


def fit_pairs(
    pairs: list[Pair],
    pyramid: Pyramid,
    params: PixNetParams,
    *,
    layer: str | None = None,
    genes: Sequence[str] | None = None,
    target_sum: float | None = None,
    coordinate_system: str | None = None,
    mpp: float | None = None,
    aggregate: str = "mean",
    tile_size: int,
    checkpoint: Path | None = None,
    device: str,
    seed: int,
    steps: Callable[[int], Callable[[], None]],
    known: list[np.ndarray] | None = None,
) -> PixNetModel:
    """Fit on pairs of image and regions; with `known`, (n_shapes,) bool per pair, on these regions only."""
    from spatial_impute.models.pixnet._fit import fit
    from spatial_impute.models.pixnet._model import PixNetModel
    from spatial_impute.models.pixnet._training import FitSettings

    if known is not None:
        pairs, known = zip(*((p, k) for p, k in zip(pairs, known, strict=True) if k.any()), strict=True)
    resolution = params.resolution or pyramid.resolution
    slides, measured, density = _training_slides(
        pairs,
        params,
        resolution=resolution,
        layer=layer,
        genes=genes,
        target_sum=target_sum,
        coordinate_system=coordinate_system,
        mpp=mpp,
        known=known,
    )
    var_names = measured[0].var_names
    radius_um = [float(np.sqrt(np.median(s.regions.area) / np.pi) * resolution) for s in slides]
    config = {
        "encoder": pyramid.name,
        "resolution": float(resolution),
        "units": measured[0].units,
        "aggregate": aggregate,
        "stain_density": list(density),
        "trained_on": [
            {"image": image, "shapes": shapes, "n_regions": len(s.regions), "radius_um": round(r, 3)}
            for (_, image, shapes, _), s, r in zip(pairs, slides, radius_um, strict=True)
        ],
    }
    fingerprint = {**config, "var_names": var_names, "seed": seed, "params": _plain(params)}
    fitted = fit(
        slides,
        pyramid,
        var_names,
        FitSettings(
            params,
            resolution=resolution,
            tile_size=tile_size,
            seed=seed,
            device=device,
            progress=steps,
            checkpoint=checkpoint,
            fingerprint=fingerprint,
        ),
    )
    return PixNetModel(
        fitted.network,
        params=params,
        var_names=var_names,
        history=fitted.history,
        predictability=fitted.held_out,
        config={
            **config,
            "seed": seed,
            "version": version("spatial-impute"),
            "base_penalty": None if np.isnan(fitted.penalty) else fitted.penalty,
        },
    )


def _plain(params: PixNetParams) -> dict[str, Any]:
    from dataclasses import asdict

    values = asdict(params)
    values.pop("n_steps")  # training may be taken up to go on for longer
    return values


def _pairs(
    sdata: SpatialData | Sequence[SpatialData],
    image_key: str | Sequence[str],
    shapes_key: str | Sequence[str],
    table_key: str | Sequence[str] | None,
) -> list[Pair]:
    """One entry per image and regions, after checking that the arguments agree in number."""
    objects = list(sdata) if isinstance(sdata, Sequence) else [sdata]
    keys = [[k] if isinstance(k, str) or k is None else list(k) for k in (image_key, shapes_key, table_key)]
    n = max(len(objects), *map(len, keys))
    for name, values in zip(("sdata", "image_key", "shapes_key", "table_key"), (objects, *keys), strict=True):
        if len(values) not in (1, n) or not values:
            msg = f"`{name}` has {len(values)} entries where another argument has {n}; give one, or one for each."
            raise ValueError(msg)
    columns = [values * n if len(values) == 1 else values for values in (objects, *keys)]
    return list(zip(*columns, strict=True))


def _training_slides(
    pairs: Sequence[Pair],
    params: PixNetParams,
    *,
    resolution: float,
    layer: str | None,
    genes: Sequence[str] | None,
    target_sum: float | None,
    coordinate_system: str | None,
    mpp: float | None,
    known: Sequence[np.ndarray] | None,
) -> tuple[list[TrainingSlide], list[Measured], tuple[float, ...]]:
    """Read everything, checked; also the mean optical density of the slides' tissue."""
    from spatial_impute._image.resampling import resampled_image, slide_overview
    from spatial_impute.models.pixnet._crops import TrainingSlide, assign_blocks
    from spatial_impute.models.pixnet._model import match_stain
    from spatial_impute.tl._read_regions import find_frame, read_levels, read_measured, read_shapes

    read: list[Any] = []
    measured: list[Measured] = []
    for i, (sdata, image_key, shapes_key, table_key) in enumerate(pairs):
        frame = find_frame(sdata, image_key, shapes_key, coordinate_system=coordinate_system, mpp=mpp)
        regions, index = read_shapes(sdata, shapes_key, frame)
        found = read_measured(
            sdata,
            shapes_key,
            index,
            table_key=table_key,
            layer=layer,
            genes=genes,
            target_sum=target_sum,
            counts=params.loss != "mse+pcc",
        )
        if known is not None:
            found = found.take(known[i][found.rows])
        if measured and found.var_names != measured[0].var_names:
            msg = (
                f"All regions must have the same genes in the same order; {shapes_key!r} differs from {pairs[0][2]!r}. "
                "Pass `genes=` with those they share."
            )
            raise ValueError(msg)
        measured.append(found)
        read.append((frame, regions.take(found.rows)))
    overviews: dict[Any, Any] = {}
    images: dict[Any, Any] = {}
    corners: dict[Any, Any] = {}
    places = [(id(sdata), image_key) for sdata, image_key, _, _ in pairs]
    for (sdata, image_key, _, _), place, (frame, regions) in zip(pairs, places, read, strict=True):
        if place not in images:
            levels = read_levels(sdata, image_key, frame)
            images[place], overviews[place] = resampled_image(levels, resolution), slide_overview(levels)
        bounds = regions.bounds
        low, high = corners.get(place, (bounds[:, :2].min(axis=0), bounds[:, 2:].max(axis=0)))
        corners[place] = np.minimum(low, bounds[:, :2].min(axis=0)), np.maximum(high, bounds[:, 2:].max(axis=0))
    density = tuple(np.mean([s.density for s in overviews.values()], axis=0).tolist())
    slides = []
    for place, (_, regions), found in zip(places, read, measured, strict=True):
        image = images[place]
        in_px = regions.moved(image.from_um)
        inside = _inside(in_px.bounds, image.shape)
        if not inside.any():
            msg = f"No measured region lies wholly on the image {place[1]!r}; check the transformations of both."
            raise ValueError(msg)
        low, high = corners[place]
        slides.append(
            TrainingSlide(
                image=image,
                stain=match_stain(overviews[place], density if params.match_stain else None),
                regions=in_px,
                expression=found.values,
                slide=list(images).index(place),
                block=assign_blocks(regions.centers, low, high - low),
            ).take(inside)
        )
        if not inside.all():
            logger.info("%d regions reach beyond the image %r and are left out", (~inside).sum(), place[1])
    return slides, measured, density


def _inside(bounds: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    height, width = shape
    return (bounds[:, :2] >= 0).all(axis=1) & (bounds[:, 2] <= width) & (bounds[:, 3] <= height)
