"""Features of the H&E image in and around every spot."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spatial_impute._geometry import apply_affine
from spatial_impute._image.levels import read_thumbnail
from spatial_impute._keys import Keys
from spatial_impute._logging import log_added, logger
from spatial_impute._settings import progress
from spatial_impute._stack.elements import section_levels, spot_geometry
from spatial_impute._stack.record import load_record
from spatial_impute._stack.table import stack_table
from spatial_impute._validation import require_count, require_folder, require_one_of, require_positive
from spatial_impute.encoders._feature_cache import image_identity, load_tokens, save_tokens, section_key

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from anndata import AnnData
    from spatialdata import SpatialData

    from spatial_impute._image.color import StainMap
    from spatial_impute._image.levels import Level
    from spatial_impute._stack.record import Section, StackRecord
    from spatial_impute.encoders._encoder import Encoder
    from spatial_impute.encoders._tokens import Layout

    EncoderLike = str | torch.nn.Module | Callable[[np.ndarray], np.ndarray] | Encoder

_STAIN_RESOLUTION = 8.0  # um per px at which the colours of a section are looked at: a nucleus is then a pixel
_COARSE = 2.0  # an image coarser than the encoder's resolution by more than this shows no texture to it


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
    """Describe the tissue in and around every spot of every section.

    The encoder sees patches at its own resolution. A field of view is described by the mean of the features of all
    patches in it and by their standard deviation: what tissue there is, and how mixed it is. As in ASIGN
    :cite:p:`Zhu2025` there are three levels around each spot: the spot itself (a square as wide as its diameter), its
    region and its global surroundings; the two larger ones have several tokens, see below.

    Sections are encoded one by one. A section with the same encoder, image, spots and fields of view as before keeps its
    features, and the log says so.

    Parameters
    ----------
    sdata
        Stack with spots.
    encoder
        ``"texture"`` (stain and texture statistics, no download), ``"tellez-multitask"`` (a small pathology network
        :cite:p:`Tellez2020`, 2.4 MB), ``"ciga-resnet18"`` (pathology :cite:p:`Ciga2022`, 46 MB), ``"resnet18"``,
        ``"resnet50"`` (photographs :cite:p:`He2016`, 47 and 103 MB), ``"timm:NAME"`` or ``"transformers:NAME"`` (install
        ``spatial-impute[encoders]``). Also a ``torch.nn.Module`` that takes ImageNet-normalised
        (n, 3, `patch_px`, `patch_px`), a callable that takes (n, `patch_px`, `patch_px`, 3) in 0-255, or an object that
        follows :class:`~spatial_impute.models.Encoder`. Several in a list stand side by side: networks are trained not
        to see the stain, which ``"texture"`` adds. Features from other tools: :func:`pool_features`.
    region_scale, global_scale
        Edge lengths of the two larger fields in spot diameters.
    patch_px, mpp
        Pixels along an edge of a patch, and um per pixel; where the encoder does not fix them, 224 and 0.5.
    stain_normalization
        ``"reinhard"`` or ``"macenko"``: bring the colours of every section to those of the reference section before they
        are encoded. Models standardise features within sections anyway, which removes most of what stains differ by.
    encoder_params
        Further arguments for ``timm.create_model`` or ``transformers.AutoModel.from_pretrained``.
    batch_size
        Patches encoded at a time.
    device
        Torch device; ``settings.device`` by default.
    precision
        ``"bfloat16"`` runs modules in mixed precision: about twice as fast on recent hardware, features differ by about
        half a percent.
    cache_dir
        Folder that keeps the features of each section as soon as they are done, so that an interrupted run, or another
        session, goes on from there. Images are recognised by the pixels of their coarsest level.
    show_progress_bar
        ``settings.show_progress_bar`` by default.

    Returns
    -------
    ``None``. Writes to `sdata.tables['stack']`, with d = 2 * n_features (means first, then standard deviations):

    `.obsm['X_spot']` : :class:`numpy.ndarray` (``float32``)
        (n_spots, d), one token.
    `.obsm['X_region']` : :class:`numpy.ndarray` (``float32``)
        (n_spots, 2 d), two tokens: the region, and the field 1.4 times as wide.
    `.obsm['X_global']` : :class:`numpy.ndarray` (``float32``)
        (n_spots, 6 d), six tokens: the global field, the one twice as wide, and the quadrants of that, row by row.
    `.uns['features']` : :class:`dict`
        ``encoder``, ``n_features`` (d), ``n_tokens`` and ``field_um`` per level, ``field_tokens`` (those centred on the
        spot), ``mpp``, ``stain_normalization``, and ``sections`` (a key per section by which it is recognised).

    Raises
    ------
    ValueError
        For spots off their image, impossible arguments, or an encoder that returns something else than finite
        (n, n_features).
    ImportError
        If the library of the encoder is not installed.
    PermissionError
        If the weights of the encoder are gated.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack()
    >>> si.pp.extract_features(sdata, show_progress_bar=False)
    >>> sdata.tables["stack"].obsm["X_spot"].shape[1]
    50
    """
    from spatial_impute._image.color import METHODS
    from spatial_impute.encoders._encoder import requested_threads, resolve_encoder
    from spatial_impute.encoders._tokens import section_tokens

    record = load_record(sdata)
    table = stack_table(sdata)
    layout = _layout(region_scale, global_scale)
    if stain_normalization is not None:
        require_one_of(stain_normalization, METHODS, name="stain_normalization")
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
    sections = [section for section in record.sections if section.spots is not None]
    spots = {section.name: spot_geometry(sdata, section) for section in sections}
    levels = {section.name: section_levels(sdata, section) for section in sections}
    for section in sections:
        _require_on_image(spots[section.name][0], levels[section.name][0], spots[section.name][2], section.spots)
        _warn_if_coarse(section.name, levels[section.name][0], min(encoders, key=lambda one: one.mpp))
    rows = _require_all_spots(table, {name: index for name, (_, _, index) in spots.items()})
    recolour = _stain_maps(sdata, record, sections, stain_normalization)

    found, keys, diameters = {}, {}, {}
    folder = None if cache_dir is None else Path(cache_dir).expanduser()
    for section in progress(sections, "Extracting features", show=show_progress_bar):
        name = section.name
        centers, radius, _ = spots[name]
        diameters[name] = 2 * float(np.median(radius))
        of_encoder = [
            _key(
                encode,
                levels[name],
                centers,
                diameter=diameters[name],
                layout=layout,
                recolour=recolour.get(name),
                folder=folder,
            )
            for encode in encoders
        ]
        keys[name] = "+".join(of_encoder) if all(of_encoder) else ""
        tokens = _in_table(table, rows[name], name, keys[name])
        if tokens is None:
            parts = []
            for encode, key in zip(encoders, of_encoder, strict=True):
                part = _in_folder(folder, name, key)
                if part is None:
                    with requested_threads():
                        part = section_tokens(
                            levels[name],
                            centers,
                            diameters[name],
                            encode,
                            layout,
                            batch_size=batch_size,
                            recolour=recolour.get(name),
                        )
                    if folder is not None and key:
                        save_tokens(folder, key, part)
                parts.append(part)
            tokens = _side_by_side(parts, layout)
        found[name] = tokens
    provenance = {
        "encoder": "+".join(encode.name for encode in encoders),
        "mpp": float(min(encode.mpp for encode in encoders)),
        "stain_normalization": stain_normalization or "",
        "sections": keys,
    }
    diameter = float(np.median(list(diameters.values())))
    write_features(table, rows, found, layout=layout, diameter=diameter, provenance=provenance)


def write_features(
    table: AnnData,
    rows: Mapping[str, np.ndarray],
    found: Mapping[str, Mapping[str, np.ndarray]],
    *,
    layout: Layout,
    diameter: float,
    provenance: Mapping[str, Any],
) -> None:
    """Write the tokens of all sections to the stack table, and where they come from."""
    from spatial_impute.encoders._tokens import FIELD_TOKENS

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
    table.uns[Keys.FEATURES] = {
        **provenance,
        "version": version("spatial-impute"),
        "n_features": int(table.obsm[Keys.X_SPOT].shape[1]),
        "n_tokens": {key: len(fields) for key, fields in layout.items()},
        "field_tokens": dict(FIELD_TOKENS),
        "field_um": {key: fields[0].scale * diameter for key, fields in layout.items()},
    }


def _layout(region_scale: float, global_scale: float) -> Layout:
    from spatial_impute.encoders._tokens import token_layout

    return token_layout(
        require_positive(region_scale, name="region_scale"), require_positive(global_scale, name="global_scale")
    )


def _require_all_spots(table: AnnData, index: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Rows of the stack table for the spots of each section; joined by name, since the table may have been reordered."""
    rows = {name: table.obs_names.get_indexer([f"{name}_{i}" for i in instances]) for name, instances in index.items()}
    if any((found < 0).any() for found in rows.values()) or sum(map(len, rows.values())) != table.n_obs:
        spots = {f"{name}_{i}" for name, instances in index.items() for i in instances}
        without_row, without_spot = spots.difference(table.obs_names), set(table.obs_names).difference(spots)
        msg = (
            f"`sdata.tables['stack']` and the spots differ: {len(without_row)} spots have no row (e.g. "
            f"{sorted(without_row)[:2]}), {len(without_spot)} rows no spot (e.g. {sorted(without_spot)[:2]}). Take the same "
            "ones out of `sdata.shapes`, or build the table anew with `si.pp.assemble_stack`."
        )
        raise ValueError(msg)
    return rows


def _require_on_image(centers: np.ndarray, level: Level, index: Any, element: str | None) -> None:
    x, y = apply_affine(centers, np.linalg.inv(level.to_um)).T
    height, width = level.shape
    off = (x < 0) | (y < 0) | (x > width) | (y > height)
    if off.any():
        first = int(np.flatnonzero(off)[0])
        msg = (
            f"{int(off.sum())} of {len(off)} spots of `sdata.shapes[{element!r}]` lie off their image of {width} x "
            f"{height} px; the first is {index[first]!r} at pixel ({x[first]:.0f}, {y[first]:.0f}). "
            "Check `mpp` and the coordinate system given to `si.pp.assemble_stack`."
        )
        raise ValueError(msg)


def _warn_if_coarse(name: str, level: Level, encoder: Encoder) -> None:
    if level.pixel_size > _COARSE * encoder.mpp:
        logger.warning(
            "Section %s: its image has %.3g um per pixel, encoder %r expects %.3g: features will tell colours, hardly any "
            "texture. Give the full-resolution scan to `si.pp.assemble_stack` if there is one.",
            name,
            level.pixel_size,
            encoder.name,
            encoder.mpp,
        )


def _stain_maps(
    sdata: SpatialData, record: StackRecord, sections: list[Section], method: str | None
) -> dict[str, StainMap]:
    """Colour maps to the reference section, for the other ones."""
    if method is None:
        return {}
    from spatial_impute._image.color import fit_stain_map

    def thumbnail(section: Section) -> tuple[np.ndarray, float]:
        rgb, to_um = read_thumbnail(section_levels(sdata, section), _STAIN_RESOLUTION)
        return rgb, float(np.linalg.norm(to_um[:2, :2], axis=0).mean())

    target, target_size = thumbnail(record[record.reference])
    maps = {}
    for section in sections:
        if section.name != record.reference:
            source, size = thumbnail(section)
            maps[section.name] = fit_stain_map(source, target, (size, target_size), method=method)
    return maps


def _key(
    encoder: Encoder,
    levels: list[Level],
    centers: np.ndarray,
    *,
    diameter: float,
    layout: Layout,
    recolour: StainMap | None,
    folder: Path | None,
) -> str:
    """Key of a section; empty if it cannot be told what the encoder does."""
    identity = getattr(encoder, "identity", None)
    if identity is None:
        return ""
    geometry = {
        "diameter": diameter,
        "patch_px": encoder.patch_px,
        "mpp": encoder.mpp,
        "fields": {key: [(f.scale, *f.shift) for f in fields] for key, fields in layout.items()},
    }
    arrays = [centers] if recolour is None else [centers, recolour.matrix, recolour.offset]
    image = image_identity(levels, across_sessions=folder is not None)
    return section_key(identity, image, geometry, arrays)


def _in_table(table: AnnData, rows: np.ndarray, name: str, key: str) -> dict[str, np.ndarray] | None:
    """Features of a section that the table has already; None if it has others or none."""
    before = table.uns.get(Keys.FEATURES, {}).get("sections", {})
    if not key or before.get(name) != key or not all(level in table.obsm for level in Keys.LEVELS):
        return None
    logger.info("Section %s: features kept, encoder, image and spots are the same", name)
    return {level: np.asarray(table.obsm[level])[rows] for level in Keys.LEVELS}


def _in_folder(folder: Path | None, name: str, key: str) -> dict[str, np.ndarray] | None:
    """Features of a section and encoder that were kept before; None if there are none."""
    tokens = load_tokens(folder, key) if folder is not None and key else None
    if tokens is not None:
        logger.info("Section %s: features read from %s", name, folder)
    return tokens


def _side_by_side(parts: list[dict[str, np.ndarray]], layout: Layout) -> dict[str, np.ndarray]:
    """Each token with the features of all encoders; (n, tokens * d) per level."""
    if len(parts) == 1:
        return parts[0]
    result = {}
    for key, fields in layout.items():
        tokens = [part[key].reshape(len(part[key]), len(fields), -1) for part in parts]
        result[key] = np.concatenate(tokens, axis=2).reshape(len(tokens[0]), -1)
    return result
