"""Fit PixNet. The network itself is in ``spatial_impute.models``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from spatial_impute._io.files import owned_folder
from spatial_impute._keys import Keys
from spatial_impute._settings import logger, progress_steps
from spatial_impute._validation import require_count, require_device, require_one_of, resolve_params
from spatial_impute.encoders._encoder import PRECISIONS
from spatial_impute.tl._read_regions import (
    ExpressionChoice,
    find_frame,
    read_levels,
    read_measured,
    read_shapes,
    slide_state,
)

if TYPE_CHECKING:
    from spatialdata import SpatialData
    from torch import nn

    from spatial_impute._geometry import Frame
    from spatial_impute._settings import Steps
    from spatial_impute.encoders._pyramids import Pyramid
    from spatial_impute.models import PixNetModel, PixNetParams
    from spatial_impute.models.pixnet._crops import TrainingSlide
    from spatial_impute.models.pixnet._region_weights import Regions
    from spatial_impute.tl._read_regions import Measured


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
    encoder: str | nn.Module = "texture",
    aggregate: str = "mean",
    model_params: PixNetParams | Mapping[str, Any] | None = None,
    tile_size: int = 1024,
    checkpoint: str | Path | None = None,
    device: str | None = None,
    precision: str = "float32",
    seed: int = 0,
    show_progress_bar: bool | None = None,
) -> PixNetModel:
    """Fit PixNet :cite:p:`Zhang2025`: a dense map of expression from H&E, trained on measured regions only.

    An encoder with a pyramid of feature maps and a decoder give a map of expression. The prediction for a spot is the
    mean (or sum) of the map over the pixels of the spot, so that one model learns from spots of any size and predicts
    spots of any size. The map of each gene is a weighted sum of ridge regression on the feature maps and of the trained
    decoder; held-out blocks of the training slides give the weights. The decoder is used only if these blocks confirm
    that it helps. Expression of unmeasured spots is never read.

    Parameters
    ----------
    sdata
        Object with image, regions and table; several objects to train on several slides.
    image_key
        Image. Give a sequence to train on several pairs of image and regions: sections of a stack, or bins of several
        sizes on one image. With several objects, one pair each.
    shapes_key
        Regions: circles or polygons. A sequence of the length of `image_key` for several pairs.
    table_key
        Table that annotates the regions; by default the stack table, or the only one.
    layer
        Layer with expression; by default ``"measured"`` of the stack table, and ``X`` of other tables.
    genes
        Genes to predict; by default all of the table.
    target_sum
        Set it if the table holds raw counts: they are divided by the total over all genes, multiplied by this number,
        and log1p is taken.
    coordinate_system
        Coordinate system that image and regions share; by default the section of the image in a stack.
    mpp
        um per unit of the coordinate system; 1 for a stack.
    encoder
        ``"texture"`` (stain and texture, no download) or ``"tellez-multitask"`` (a small pathology network, 2.4 MB) at
        1 um per pixel; ``"efficientnet-lite2"`` (photographs, from the extra ``efficientnet``), ``"resnet18"``,
        ``"resnet50"`` or ``"ciga-resnet18"`` at 0.5 um; or a module that returns feature maps (n, channels, y / s, x /
        s), finest first, or one map. With attention over the whole image (vision transformers) it needs
        ``model_params={"encoder_window": ...}``.
    aggregate
        ``"mean"`` over the pixels of a region for log values; ``"sum"`` for counts, which grow with area.
    model_params
        Advanced settings; see :class:`~spatial_impute.models.PixNetParams`.
    tile_size
        Edge of a tile in px, for whole slides.
    checkpoint
        Directory that keeps the state of training. A later call with the same arguments continues from it.
    device
        Torch device; ``settings.device`` by default.
    precision
        ``"float32"``, or ``"bfloat16"`` for encoder and decoder: faster on a GPU. The base, the sums over regions and
        the weights stay in single precision, and the model can be used in both precisions.
    seed
        Seed; the same seed gives the same model.
    show_progress_bar
        Show a progress bar; ``settings.show_progress_bar`` by default.

    Returns
    -------
    The fitted model. ``model.history`` has the losses, ``model.predictability`` the correlation per gene on held-out
    blocks. Nothing is written.

    Raises
    ------
    KeyError
        If elements, tables, layers or genes do not exist.
    ValueError
        If nothing is measured, values are counts where log values are needed or the reverse, units are unknown, or
        genes differ between slides.

    Examples
    --------
    >>> import torch
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack(extent=1400.0)
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
    require_one_of(precision, PRECISIONS, name="precision")
    counts = params.loss != "mse+pcc"
    if aggregate not in ("mean", "sum") or (counts and aggregate == "mean"):
        msg = f"`aggregate` must be 'mean' or 'sum', and 'sum' for losses on counts; found {aggregate!r} with the loss {params.loss!r}."
        raise ValueError(msg)
    if aggregate == "sum" and not counts:
        msg = (
            "The sum over a region grows with its area, log values do not: `aggregate='sum'` needs counts and "
            f"`model_params={{'loss': 'poisson'}}` or 'nb'; found the loss {params.loss!r}."
        )
        raise ValueError(msg)
    pairs = _training_pairs(sdata, image_key, shapes_key, table_key)
    setup = PixNetSetup(
        build_pyramid(encoder, window=params.encoder_window), params, tile_size, device, seed, aggregate, precision
    )
    expression = ExpressionChoice(layer, genes, target_sum, counts)
    read = read_pairs(pairs, expression, coordinate_system, mpp)
    folder = None if checkpoint is None else Path(checkpoint)
    with owned_folder(folder, what="The checkpoint"), progress_steps("Fitting PixNet", show=show_progress_bar) as steps:
        model = fit_on_regions(read, setup, steps, folder)
    logger.info("Fitted %r", model)
    return model


class Pair(NamedTuple):
    """Image, regions and table to learn from."""

    sdata: SpatialData
    image: str
    shapes: str
    table: str | None


@dataclass(frozen=True)
class ReadPair:
    """Measured regions of a pair, um."""

    pair: Pair
    frame: Frame
    regions: Regions
    measured: Measured
    state: dict[str, Any]  # Fingerprints of image, regions and expression, and how they were read

    @property
    def place(self) -> tuple[int, str]:
        """Identity of the image; several pairs may share one."""
        return id(self.pair.sdata), self.pair.image


@dataclass(frozen=True)
class PixNetSetup:
    """Encoder and settings of a fit."""

    pyramid: Pyramid
    params: PixNetParams
    tile_size: int
    device: str
    seed: int
    aggregate: str = "mean"
    precision: str = "float32"

    @property
    def resolution(self) -> float:
        """Um per pixel."""
        return self.params.resolution or self.pyramid.resolution


def _training_pairs(sdata: SpatialData | Sequence[SpatialData], *keys: str | Sequence[str] | None) -> list[Pair]:
    """Pairs of image and regions, or a ``ValueError`` if the arguments have different numbers of entries."""
    objects = list(sdata) if isinstance(sdata, Sequence) else [sdata]
    columns: list[list[Any]] = [objects, *([k] if isinstance(k, str) or k is None else list(k) for k in keys)]
    n = max(map(len, columns))
    for name, values in zip(("sdata", "image_key", "shapes_key", "table_key"), columns, strict=True):
        if len(values) not in (1, n) or not values:
            msg = f"`{name}` has {len(values)} entries where another argument has {n}. Give one entry, or {n}."
            raise ValueError(msg)
    return list(map(Pair, *(values * n if len(values) == 1 else values for values in columns)))


def read_pairs(
    pairs: list[Pair],
    expression: ExpressionChoice,
    coordinate_system: str | None = None,
    mpp: float | None = None,
    *,
    known: Sequence[np.ndarray] | None = None,
) -> list[ReadPair]:
    """Read measured regions; with `known`, (n_shapes,) bool per pair, only these regions."""
    read: list[ReadPair] = []
    for i, pair in enumerate(pairs):
        frame = find_frame(pair.sdata, pair.image, pair.shapes, coordinate_system, mpp)
        regions, index = read_shapes(pair.sdata, pair.shapes, frame)
        found = read_measured(pair.sdata, pair.shapes, index, pair.table, expression)
        state = slide_state(pair.sdata, pair.image, frame, regions, found)
        state["read"] = {"table_key": pair.table, **asdict(expression), "genes": None}
        if known is not None:
            found = found.take(known[i][found.rows])
        if read and found.var_names != read[0].measured.var_names:
            msg = (
                f"All regions must have the same genes in the same order; {pair.shapes!r} differs from "
                f"{pairs[0].shapes!r}. Pass `genes=` with the genes that they share."
            )
            raise ValueError(msg)
        read.append(ReadPair(pair, frame, regions.take(found.rows), found, state))
    return read


def fit_on_regions(
    read: list[ReadPair], setup: PixNetSetup, steps: Steps, checkpoint: Path | None = None
) -> PixNetModel:
    """Fit on measured regions."""
    from spatial_impute.models.pixnet._fit import fit
    from spatial_impute.models.pixnet._model import PixNetModel
    from spatial_impute.models.pixnet._training import FitSettings

    resolution, params = setup.resolution, setup.params
    slides, density = _training_slides(read, params, resolution)
    var_names = read[0].measured.var_names
    radius_um = [float(np.sqrt(np.median(s.regions.area) / np.pi) * resolution) for s in slides]
    config = {
        "encoder": setup.pyramid.name,
        "resolution": float(resolution),
        "units": read[0].measured.units,
        "aggregate": setup.aggregate,
        "stain_density": list(density),
        "trained_on": [
            {"image": r.pair.image, "shapes": r.pair.shapes, "n_regions": len(s.regions), "radius_um": round(radius, 3)}
            | {Keys.STATE: r.state}
            for r, s, radius in zip(read, slides, radius_um, strict=True)
        ],
    }
    same: dict[str, Any] = {"seed": setup.seed, "precision": setup.precision}
    plain = asdict(params)
    if params.schedule == "constant":
        del plain["n_steps"]  # a later call may train for more steps
    settings = FitSettings(
        params,
        resolution=resolution,
        tile_size=setup.tile_size,
        device=setup.device,
        progress=steps,
        checkpoint=checkpoint,
        fingerprint={**config, "var_names": var_names, "params": plain, **same},
        **same,
    )
    fitted = fit(slides, setup.pyramid, var_names, settings)
    return PixNetModel(
        fitted.network,
        params=params,
        var_names=var_names,
        history=fitted.history,
        predictability=fitted.held_out,
        config={
            **config,
            "seed": setup.seed,
            "version": version("spatial-impute"),
            "base_penalty": fitted.penalty,
        },
    )


def _training_slides(
    read: list[ReadPair], params: PixNetParams, resolution: float
) -> tuple[list[TrainingSlide], tuple[float, ...]]:
    """Slides for the network, and the mean optical density of their tissue."""
    from spatial_impute._image.resampling import resampled_image, slide_overview
    from spatial_impute.models.pixnet._crops import TrainingSlide, assign_blocks
    from spatial_impute.models.pixnet._model import match_stain

    images, overviews, corners = {}, {}, {}
    for r in read:
        if r.place not in images:
            levels = read_levels(r.pair.sdata, r.pair.image, r.frame)
            images[r.place], overviews[r.place] = resampled_image(levels, resolution), slide_overview(levels)
            bounds = np.concatenate([other.regions.bounds for other in read if other.place == r.place])
            corners[r.place] = bounds[:, :2].min(axis=0), bounds[:, 2:].max(axis=0)
    density = tuple(np.mean([s.density for s in overviews.values()], axis=0).tolist())
    slides = []
    for r in read:
        image, (low, high) = images[r.place], corners[r.place]
        in_px = r.regions.moved(image.from_um)
        height, width = image.shape
        bounds = in_px.bounds
        inside = (bounds[:, :2] >= 0).all(axis=1) & (bounds[:, 2] <= width) & (bounds[:, 3] <= height)
        _warn_of_unused_regions(bounds, inside, r.pair.image, resolution)
        slide = TrainingSlide(
            image=image,
            stain=match_stain(overviews[r.place], density if params.match_stain else None),
            regions=in_px,
            expression=r.measured.values,
            slide=list(images).index(r.place),
            block=assign_blocks(r.regions.centers, low, high - low),
        )
        slides.append(slide.take(inside))
    return slides, density


def _warn_of_unused_regions(bounds: np.ndarray, inside: np.ndarray, image_key: str, resolution: float) -> None:
    """Say how many regions (bounds in px) cannot be used as they are; a ``ValueError`` if they are most of them."""
    n, n_off = len(inside), int((~inside).sum())
    if n_off > n / 2:
        which = "No measured region lies" if n_off == n else f"Only {n - n_off} of {n} measured regions lie"
        msg = f"{which} wholly on the image {image_key!r}; check the transformations of both."
        raise ValueError(msg)
    if n_off:
        logger.warning("%d of %d regions are not wholly on the image %r and are not used", n_off, n, image_key)
    n_small = int(((bounds[:, 2:] - bounds[:, :2]).max(axis=1) < 1.0).sum())
    if n_small > n / 2:
        msg = (
            f"{n_small} of {n} measured regions on the image {image_key!r} are smaller than a pixel of {resolution:g} "
            "um; check `mpp` and the transformations, or set a finer `resolution` in `model_params`."
        )
        raise ValueError(msg)
    if n_small:
        logger.warning(
            "%d of %d regions on the image %r are smaller than a pixel of %g um", n_small, n, image_key, resolution
        )
