"""Features of the H&E image at three fields of view around every spot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from spatial_impute._keys import Keys
from spatial_impute._logging import log_added
from spatial_impute._progress import progress
from spatial_impute._raster import iter_patches
from spatial_impute._stack import load_record, section_levels, spot_geometry, stack_table
from spatial_impute._validation import require_positive

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from spatialdata import SpatialData

    from spatial_impute._raster import Level
    from spatial_impute.models._encoders import Encoder


def extract_features(
    sdata: SpatialData,
    encoder: str | torch.nn.Module | Callable[[np.ndarray], np.ndarray] = "texture",
    *,
    region_scale: float = 2.3,
    global_scale: float = 4.6,
    patch_px: int = 224,
    batch_size: int = 128,
    device: str | None = None,
    show_progress_bar: bool | None = None,
) -> None:
    """Describe the tissue in and around every spot of every section.

    Three square fields of view are centred on each spot, as in ASIGN :cite:p:`Zhu2025`: the spot itself (edge = its
    diameter), its region and its global surroundings. Region and global field give several tokens each: the field as
    a whole and its four quadrants, which tell where around the spot something lies.

    Parameters
    ----------
    sdata
        Stack with spots.
    encoder
        ``"texture"`` (stain and texture statistics, no download), ``"tellez-multitask"`` (a small pathology network
        :cite:p:`Tellez2020`, 2.4 MB download), a ``torch.nn.Module`` that takes ImageNet-normalised
        (n, 3, `patch_px`, `patch_px`), or a callable that takes (n, `patch_px`, `patch_px`, 3) in 0-255.
    region_scale, global_scale
        Edge lengths of the two larger fields in spot diameters.
    patch_px
        Pixels along an edge of what a module or callable is given.
    batch_size
        Patches encoded at a time.
    device
        Torch device for modules; ``settings.device`` by default.
    show_progress_bar
        ``settings.show_progress_bar`` by default.

    Returns
    -------
    ``None``. Writes to `sdata.tables['stack']`:

    `.obsm['X_spot']` : :class:`numpy.ndarray` (``float32``)
        (n_spots, n_features).
    `.obsm['X_region']`, `.obsm['X_global']` : :class:`numpy.ndarray` (``float32``)
        (n_spots, 5 * n_features): the whole field first, then its quadrants in row-major order.
    `.uns['features']` : :class:`dict`
        Encoder, fields of view in um, tokens per level.

    Raises
    ------
    ValueError
        For spots off their image, or an encoder that returns something else than finite (n, n_features).

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack()
    >>> si.pp.extract_features(sdata, show_progress_bar=False)
    >>> sdata.tables["stack"].obsm["X_spot"].shape[1]
    25
    """
    from spatial_impute.models._encoders import resolve_encoder

    record = load_record(sdata)
    table = stack_table(sdata)
    scales = {
        Keys.X_SPOT: 1.0,
        Keys.X_REGION: require_positive(region_scale, name="region_scale"),
        Keys.X_GLOBAL: require_positive(global_scale, name="global_scale"),
    }
    encode = resolve_encoder(encoder, patch_px=patch_px, device=device)
    sections = [section for section in record.sections if section.spots is not None]
    geometry = {section.name: spot_geometry(sdata, section) for section in sections}
    levels = {section.name: section_levels(sdata, section) for section in sections}
    for section in sections:
        centers, _, index = geometry[section.name]
        _require_on_image(centers, levels[section.name][0], index, section.spots)

    found: dict[str, list[np.ndarray]] = {key: [] for key in scales}
    fields = {key: [] for key in scales}
    names = []
    for section in progress(sections, "Extracting features", show=show_progress_bar):
        centers, radius, index = geometry[section.name]
        diameter = 2 * float(np.median(radius))
        for key, scale in scales.items():
            tokens = _encode_field(
                levels[section.name], centers, diameter * scale, encode, batch_size, quadrants=key != Keys.X_SPOT
            )
            found[key].append(tokens)
            fields[key].append(diameter * scale)
        names.extend(f"{section.name}_{i}" for i in index)
    # Rows are joined by name: the table may have been reordered since it was built.
    order = table.obs_names.get_indexer(names)
    if (order < 0).any() or len(order) != table.n_obs:
        msg = "`sdata.tables['stack']` and the spots differ; build the table anew with `si.pp.assemble_stack`."
        raise ValueError(msg)
    for key, blocks in found.items():
        values = np.empty((table.n_obs, blocks[0].shape[1]), dtype=np.float32)
        values[order] = np.concatenate(blocks)
        table.obsm[key] = values
        log_added(f"tables[{Keys.STACK_TABLE!r}].obsm[{key!r}]")
    table.uns[Keys.FEATURES] = {
        "encoder": encode.name,
        "n_features": int(found[Keys.X_SPOT][0].shape[1]),
        "n_tokens": {key: 1 if key == Keys.X_SPOT else 5 for key in scales},
        "field_um": {key: float(np.median(values)) for key, values in fields.items()},
    }


def _require_on_image(centers: np.ndarray, level: Level, index: object, element: str) -> None:
    from spatial_impute._geometry import apply_affine

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


def _encode_field(
    levels: list[Level], centers: np.ndarray, side: float, encode: Encoder, batch_size: int, *, quadrants: bool
) -> np.ndarray:
    """(n, n_tokens * n_features) of one field of view: the whole, then its four quadrants if wanted."""
    tokens = [_encode_patches(levels, centers, side, encode, batch_size)]
    if quadrants:
        for dy in (-side / 4, side / 4):
            for dx in (-side / 4, side / 4):
                tokens.append(_encode_patches(levels, centers + np.array([dx, dy]), side / 2, encode, batch_size))
    return np.concatenate(tokens, axis=1)


def _encode_patches(
    levels: list[Level], centers: np.ndarray, side: float, encode: Encoder, batch_size: int
) -> np.ndarray:
    features: np.ndarray | None = None
    for rows, patches in iter_patches(levels, centers, side, encode.patch_px, batch_size=batch_size):
        encoded = encode(patches)
        if encoded.ndim != 2 or len(encoded) != len(rows) or not np.isfinite(encoded).all():
            msg = (
                f"Encoder {encode.name!r} must return finite numbers of shape ({len(rows)}, n_features), found "
                f"shape {encoded.shape}{'' if np.isfinite(encoded).all() else ' with NaN or inf'}."
            )
            raise ValueError(msg)
        if features is None:
            features = np.empty((len(centers), encoded.shape[1]), dtype=np.float32)
        features[rows] = encoded
    return features
