"""Features of the H&E image in and around every spot."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spatial_impute._geometry import apply_affine
from spatial_impute._image.color import METHODS, fit_stain_map
from spatial_impute._image.levels import read_thumbnail
from spatial_impute._keys import Keys
from spatial_impute._settings import log_added, logger, progress
from spatial_impute._stack.elements import rows_of_spots, section_images, section_levels, spot_geometry
from spatial_impute._stack.record import load_record
from spatial_impute._stack.table import spot_names, stack_table, uns_record
from spatial_impute._validation import require_count, require_folder, require_one_of, require_positive
from spatial_impute.encoders._tokens import (
    FIELD_TOKENS,
    image_identity,
    load_tokens,
    save_tokens,
    section_key,
    section_tokens,
    token_layout,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import pandas as pd
    import torch
    from anndata import AnnData
    from spatialdata import SpatialData

    from spatial_impute._image.color import StainMap
    from spatial_impute._image.levels import Level
    from spatial_impute._stack.record import StackRecord
    from spatial_impute.encoders._encoder import Encoder
    from spatial_impute.encoders._tokens import Layout

    EncoderLike = str | torch.nn.Module | Callable[[np.ndarray], np.ndarray] | Encoder

_STAIN_RESOLUTION = 8.0  # um per px of the thumbnails for stain normalization: a nucleus is a pixel
_COARSE = 2.0  # an image this much coarser than the resolution of the encoder shows no texture


def extract_features(
    sdata: SpatialData,
    encoder: EncoderLike | Sequence[EncoderLike] = "texture",
    *,
    region_scale: float = 2.3,
    global_scale: float = 4.6,
    patch_px: int | None = None,
    mpp: float | None = None,
    stain_normalization: str | None = None,
    encoder_params: Mapping[str, Any] | None = None,
    batch_size: int = 128,
    device: str | None = None,
    precision: str = "float32",
    cache_dir: str | Path | None = None,
    show_progress_bar: bool | None = None,
) -> None:
    """Describe the tissue in and around each spot of each section.

    The encoder sees patches at its own resolution. A field of view is described by the mean and the standard deviation
    of the features of all patches in it. As in ASIGN :cite:p:`Zhu2025` there are three levels around each spot: the
    spot (a square as wide as its diameter), its region and its global surroundings. The two larger levels have several
    tokens, see below.

    A section keeps its features if encoder, image, spots and fields of view have not changed since they were computed;
    the log says so.

    Parameters
    ----------
    sdata
        Stack with spots.
    encoder
        ``"texture"`` (stain and texture statistics, no download), ``"tellez-multitask"`` (a small pathology network
        :cite:p:`Tellez2020`, 2.4 MB), ``"ciga-resnet18"`` (pathology :cite:p:`Ciga2022`, 46 MB), ``"resnet18"``,
        ``"resnet50"`` (photographs :cite:p:`He2016`, 47 and 103 MB), ``"efficientnet-lite2"`` (photographs
        :cite:p:`Tan2019`, install ``spatial-impute[efficientnet]``), ``"timm:NAME"`` or ``"transformers:NAME"``
        (install ``spatial-impute[encoders]``). Also a ``torch.nn.Module`` for ImageNet-normalised arrays (n, 3,
        `patch_px`, `patch_px`), a callable for arrays (n, `patch_px`, `patch_px`, 3) in 0-255, or an object that
        follows :class:`~spatial_impute.models.Encoder`. A list of encoders gives the features of all of them: most
        networks are trained to ignore the stain, and ``"texture"`` adds it. For features of other tools see
        :func:`pool_features`.
    region_scale
        Edge length of the region in spot diameters.
    global_scale
        Edge length of the global surroundings in spot diameters.
    patch_px
        Pixels along an edge of a patch, for encoders that do not fix it; 224 by default.
    mpp
        Micrometres per pixel of a patch, for encoders that do not fix it; 0.5 um by default.
    stain_normalization
        ``"reinhard"`` or ``"macenko"``: give all sections the colors of the reference section before encoding. Without
        it, models still standardise features within sections, which removes most differences of stain.
    encoder_params
        Further arguments for ``timm.create_model`` or ``transformers.AutoModel.from_pretrained``.
    batch_size
        Number of patches that are encoded at a time.
    device
        Torch device; ``settings.device`` by default.
    precision
        ``"float32"``, or ``"bfloat16"`` for mixed precision in modules: about twice as fast on recent hardware, with
        differences of about half a percent.
    cache_dir
        Folder in which the features of each finished section are kept, so that an interrupted run or another session
        continues from there. An image is identified by the pixels of its coarsest level.
    show_progress_bar
        Show a progress bar; ``settings.show_progress_bar`` by default.

    Returns
    -------
    ``None``. Writes to `sdata.tables['stack']`, with d = 2 * n_features (means first, then standard deviations):

    `.obsm['X_spot']` : :class:`numpy.ndarray` (``float32``)
        (n_spots, d), one token.
    `.obsm['X_region']` : :class:`numpy.ndarray` (``float32``)
        (n_spots, 2 d), two tokens: the region, and the field 1.4 times as wide.
    `.obsm['X_global']` : :class:`numpy.ndarray` (``float32``)
        (n_spots, 6 d), six tokens: the global field, the field twice as wide, and the four quadrants of this wider
        field, row by row.
    `.obsm['features_spatial']` : :class:`numpy.ndarray` (``float64``)
        (n_spots, 3) x and y (um, in the section) and diameter of the spots when the features were computed.
    `.uns['features']` : :class:`dict`
        ``encoder``, ``n_features`` (d), ``n_tokens`` and ``field_um`` per level, ``field_tokens`` (tokens centred on
        the spot), ``mpp``, ``stain_normalization``, ``sections`` (per section a key of encoder, image and spots), and
        ``state`` (fingerprints of the images).

    Raises
    ------
    ValueError
        For spots outside their image, arguments out of range, or an encoder that does not return finite arrays
        (n, n_features).
    ImportError
        If the library of the encoder is not installed.
    PermissionError
        If the weights of the encoder need a login.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack(extent=1400.0)
    >>> si.pp.extract_features(sdata, show_progress_bar=False)
    >>> sdata.tables["stack"].obsm["X_spot"].shape[1]
    50
    """
    from spatial_impute.encoders._encoder import resolve_encoder

    record = load_record(sdata)
    table = stack_table(sdata)
    layout = fields_layout(region_scale, global_scale)
    batch_size = require_count(batch_size, name="batch_size")
    if cache_dir is not None:
        require_folder(cache_dir, name="cache_dir")
    given = list(encoder) if isinstance(encoder, list | tuple) else [encoder]
    if not given:
        msg = '`encoder` is an empty list; name at least one, for example "texture".'
        raise ValueError(msg)
    encoders = [
        resolve_encoder(one, patch_px=patch_px, mpp=mpp, device=device, precision=precision, params=encoder_params)
        for one in given
    ]
    views = _section_views(sdata, record, min(encoders, key=lambda one: one.mpp))
    rows = rows_of_sections(table, {name: view.index for name, view in views.items()})
    stain_maps = _stain_maps(sdata, record, views, stain_normalization)

    run = _Extraction(encoders, layout, batch_size, None if cache_dir is None else Path(cache_dir).expanduser())
    found, keys = {}, {}
    for name, view in progress(views.items(), "Extracting features", show=show_progress_bar):
        of_encoder = [_cache_key(run, encode, view, stain_maps.get(name)) for encode in encoders]
        keys[name] = "+".join(of_encoder) if all(of_encoder) else ""
        tokens = _tokens_in_table(table, rows[name], name, keys[name])
        found[name] = _encode(run, name, view, of_encoder, stain_maps.get(name)) if tokens is None else tokens
    provenance = {
        "encoder": "+".join(encode.name for encode in encoders),
        "mpp": float(min(encode.mpp for encode in encoders)),
        "stain_normalization": stain_normalization or "",
        "sections": keys,
        Keys.STATE: section_images(sdata, record, views),
    }
    places = {name: (view.centers, view.diameter) for name, view in views.items()}
    write_features(table, rows, found, layout=layout, places=places, provenance=provenance)


@dataclass(frozen=True)
class _SectionView:
    """Image and spots of a section."""

    levels: list[Level]
    centers: np.ndarray
    diameter: float
    index: pd.Index


@dataclass(frozen=True)
class _Extraction:
    """Settings that are the same for all sections."""

    encoders: list[Encoder]
    layout: Layout
    batch_size: int
    folder: Path | None


def _section_views(sdata: SpatialData, record: StackRecord, finest: Encoder) -> dict[str, _SectionView]:
    views = {}
    for section in record.sections:
        if section.spots is not None:
            centers, radius, index = spot_geometry(sdata, section)
            levels = section_levels(sdata, section)
            views[section.name] = _SectionView(levels, centers, 2 * float(np.median(radius)), index)
            _require_on_image(views[section.name], section.spots)
            if levels[0].pixel_size > _COARSE * finest.mpp:
                logger.warning(
                    "Section %s: its image has %.3g um per pixel, encoder %r expects %.3g: features will show color but "
                    "little texture. Give this section its full-resolution scan.",
                    section.name,
                    levels[0].pixel_size,
                    finest.name,
                    finest.mpp,
                )
    return views


def _encode(
    run: _Extraction, name: str, view: _SectionView, keys: list[str], stain_map: StainMap | None
) -> dict[str, np.ndarray]:
    """Tokens of a section by all encoders, from the folder if they are there."""
    from spatial_impute._io.workers import requested_threads

    parts, widths = [], {level: len(fields) for level, fields in run.layout.items()}
    for encode, key in zip(run.encoders, keys, strict=True):
        folder = run.folder if key else None
        part = None if folder is None else load_tokens(folder, key, widths, len(view.centers))
        if part is not None:
            logger.info("Section %s: features read from %s", name, folder)
        else:
            spots, n = (view.levels, view.centers, view.diameter), run.batch_size
            with requested_threads():
                part = section_tokens(*spots, encode, run.layout, batch_size=n, recolor=stain_map)
            if folder is not None:
                save_tokens(folder, key, part)
        parts.append(part)
    return _side_by_side(parts, run.layout)


def write_features(
    table: AnnData,
    rows: Mapping[str, np.ndarray],
    found: Mapping[str, Mapping[str, np.ndarray]],
    *,
    layout: Layout,
    places: Mapping[str, tuple[np.ndarray, float]],
    provenance: Mapping[str, Any],
) -> None:
    """Write the tokens of all sections, place and diameter of their spots, and provenance to the stack table."""
    for key in layout:
        widths = {name: tokens[key].shape[1] for name, tokens in found.items()}
        if len(set(widths.values())) > 1:
            msg = f"Sections must have equally many features, found {widths} columns of {key!r}."
            raise ValueError(msg)
    for key in layout:
        values = np.empty((table.n_obs, next(iter(found.values()))[key].shape[1]), dtype=np.float32)
        for name, tokens in found.items():
            values[rows[name]] = tokens[key]
        table.obsm[key] = values
        log_added(f"tables[{Keys.STACK_TABLE!r}].obsm[{key!r}]")
    at = np.full((table.n_obs, 3), np.nan)
    for name, (centers, own) in places.items():
        at[rows[name]] = np.column_stack([centers, np.full(len(centers), own)])
    table.obsm[Keys.FEATURES_AT] = at
    diameter = float(np.median([own for _, own in places.values()]))
    table.uns[Keys.FEATURES] = {
        **provenance,
        "version": version("spatial-impute"),
        "n_features": int(table.obsm[Keys.X_SPOT].shape[1]),
        "n_tokens": {key: len(fields) for key, fields in layout.items()},
        "field_tokens": dict(FIELD_TOKENS),
        "field_um": {key: fields[0].scale * diameter for key, fields in layout.items()},
    }


def fields_layout(region_scale: float, global_scale: float) -> Layout:
    """Fields of view of all tokens, in spot diameters."""
    return token_layout(
        require_positive(region_scale, name="region_scale"), require_positive(global_scale, name="global_scale")
    )


def rows_of_sections(table: AnnData, index: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Rows of the stack table for the spots of each section; joined by id, since rows may have any order."""
    rows = {name: rows_of_spots(table, name, instances) for name, instances in index.items()}
    if any((found < 0).any() for found in rows.values()) or sum(map(len, rows.values())) != table.n_obs:
        spots, there = {f"{name}_{i}" for name, instances in index.items() for i in instances}, set(spot_names(table))
        without_row, without_spot = spots - there, there - spots
        msg = (
            f"`sdata.tables['stack']` and the spots differ: {len(without_row)} spots have no row (e.g. "
            f"{sorted(without_row)[:2]}), {len(without_spot)} rows no spot (e.g. {sorted(without_spot)[:2]}). Remove "
            "the same spots from `sdata.shapes`, or build the table again with `si.pp.assemble_stack`."
        )
        raise ValueError(msg)
    return rows


def _require_on_image(view: _SectionView, element: str) -> None:
    level, index = view.levels[0], view.index
    x, y = apply_affine(view.centers, np.linalg.inv(level.to_um)).T
    height, width = level.shape
    off = (x < 0) | (y < 0) | (x > width) | (y > height)
    if off.any():
        first = int(np.flatnonzero(off)[0])
        msg = (
            f"{int(off.sum())} of {len(off)} spots of `sdata.shapes[{element!r}]` lie outside their image of {width} x "
            f"{height} px; the first is {index[first]!r} at pixel ({x[first]:.0f}, {y[first]:.0f}). "
            "Check `mpp` and the coordinate system given to `si.pp.assemble_stack`."
        )
        raise ValueError(msg)


def _stain_maps(
    sdata: SpatialData, record: StackRecord, views: Mapping[str, _SectionView], method: str | None
) -> dict[str, StainMap]:
    """Maps of the colors of the other sections to those of the reference."""
    if method is None:
        return {}
    require_one_of(method, METHODS, name="stain_normalization")

    def thumbnail(levels: list[Level]) -> tuple[np.ndarray, float]:
        rgb, to_um = read_thumbnail(levels, _STAIN_RESOLUTION)
        return rgb, float(np.linalg.norm(to_um[:2, :2], axis=0).mean())

    target, target_size = thumbnail(section_levels(sdata, record[record.reference]))
    maps = {}
    for name, view in views.items():
        if name != record.reference:
            source, size = thumbnail(view.levels)
            maps[name] = fit_stain_map(source, target, (size, target_size), method=method)
    return maps


def _cache_key(run: _Extraction, encoder: Encoder, view: _SectionView, stain_map: StainMap | None) -> str:
    """Key of the features of a section; empty for an encoder without identity."""
    identity = getattr(encoder, "identity", None)
    if identity is None:
        return ""
    geometry = {
        "diameter": view.diameter,
        "patch_px": encoder.patch_px,
        "mpp": encoder.mpp,
        "fields": {key: [(f.scale, *f.shift) for f in fields] for key, fields in run.layout.items()},
    }
    arrays = [view.centers] if stain_map is None else [view.centers, stain_map.matrix, stain_map.offset]
    image = image_identity(view.levels, across_sessions=run.folder is not None)
    return section_key(identity, image, geometry, arrays)


def _tokens_in_table(table: AnnData, rows: np.ndarray, name: str, key: str) -> dict[str, np.ndarray] | None:
    """Features of a section that the table already holds under this key, or None."""
    before = uns_record(table, Keys.FEATURES, "sections")
    if not key or before.get(name) != key or not all(level in table.obsm for level in Keys.LEVELS):
        return None
    logger.info("Section %s: features kept, encoder, image and spots are the same", name)
    return {level: np.asarray(table.obsm[level])[rows] for level in Keys.LEVELS}


def _side_by_side(parts: list[dict[str, np.ndarray]], layout: Layout) -> dict[str, np.ndarray]:
    """Tokens with the features of all encoders, (n, tokens * d) per level."""
    if len(parts) == 1:
        return parts[0]
    result = {}
    for key, fields in layout.items():
        tokens = [part[key].reshape(len(part[key]), len(fields), -1) for part in parts]
        result[key] = np.concatenate(tokens, axis=2).reshape(len(tokens[0]), -1)
    return result
