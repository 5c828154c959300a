"""Tokens of the spots of one section: patches to encode, pooling over fields of view, and files of earlier results."""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
from scipy import sparse
from scipy.spatial import cKDTree

from spatial_impute._geometry import apply_affine
from spatial_impute._image.levels import image_fingerprint
from spatial_impute._image.resampling import iter_patches
from spatial_impute._keys import Keys
from spatial_impute._settings import logger
from spatial_impute.encoders._pooling import FieldOfView, StreamingPooler, cell_centers, needed_cells

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from spatial_impute._image.levels import Level
    from spatial_impute.encoders._encoder import Encoder

Layout = dict[str, tuple[FieldOfView, ...]]

# Cells along a window that is encoded at once: larger windows overlap less, but do not fit in the CPU cache.
_BLOCK = 16
_FORMAT = 2  # of the files of tokens and of their keys
_KEY = "key"  # array with the key of the file
_OLD = 86_400.0  # s after which an unfinished file is the rest of a killed process


def token_layout(region_scale: float, global_scale: float) -> Layout:
    """Fields of view of the tokens of each level.

    The region has two sizes. The global level has the global field, a field twice as wide, and the quadrants of the
    wide field, which show the direction of a structure.
    """
    half = global_scale / 2
    quadrants = tuple(FieldOfView(global_scale, (dx, dy)) for dy in (-half, half) for dx in (-half, half))
    return {
        Keys.X_SPOT: (FieldOfView(1.0),),
        Keys.X_REGION: (FieldOfView(region_scale), FieldOfView(region_scale * 2**0.5)),
        Keys.X_GLOBAL: (FieldOfView(global_scale), FieldOfView(2 * global_scale), *quadrants),
    }


FIELD_TOKENS = {Keys.X_SPOT: [0], Keys.X_REGION: [0], Keys.X_GLOBAL: [0, 1]}
"""Tokens of the fields of view that are centred on the spot."""


def section_tokens(
    levels: Sequence[Level],
    centers: np.ndarray,
    diameter: float,
    encoder: Encoder,
    layout: Layout,
    *,
    batch_size: int,
    recolor: Callable[[np.ndarray], np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Encode one section, from the resolutions of its image and the (n, 2) centres and the diameter of its spots in um.

    Returns per level (n, n_tokens * 2 * n_features) float32: for each token the mean of the features of the patches in the
    field, then their standard deviation. `recolor` is applied to the patches before they are encoded.
    """
    extent = encoder.patch_px * encoder.mpp
    source = _PatchSource(encoder, levels, batch_size, recolor)
    step_px: int | None = getattr(encoder, "step_px", None)
    sliding = step_px is not None
    step = extent if step_px is None else step_px * encoder.mpp
    reach = max(field.scale + 2 * max(map(abs, field.shift)) for fields in layout.values() for field in fields)
    first, needed = needed_cells(centers, reach * diameter, step)
    known = _inside_image(levels[0], first, needed, step)
    # The spot itself has separate patches if the lattice is too coarse for it.
    pooled_keys = [key for key in layout if sliding or key != Keys.X_SPOT]
    fields = [
        (np.multiply(field.shift, diameter), field.scale * diameter) for key in pooled_keys for field in layout[key]
    ]
    pooler = StreamingPooler(step, first, known, centers, fields, block=_BLOCK if sliding else 1)
    result = {}
    if sliding:
        source.encode_blocks(first, pooler)
    else:
        per_edge = max(1, round(diameter / extent))
        patches = spot_patches(centers, diameter, per_edge)
        own = source.encode_patches(patches, cell_centers(first, known, step), pooler)
        own = own.reshape(len(centers), per_edge**2, -1).astype(np.float64)
        result[Keys.X_SPOT] = np.concatenate([own.mean(axis=1), own.std(axis=1)], axis=1, dtype=np.float32)
    pooled = iter(pooler.finish())
    for key in pooled_keys:
        result[key] = np.concatenate([part for _ in layout[key] for part in next(pooled)], axis=1)
    return {key: result[key] for key in layout}


def spot_patches(centers: np.ndarray, diameter: float, per_edge: int) -> np.ndarray:
    """(n, per_edge ** 2, 2) centres of the patches of each spot: a grid of squares over the spot, row by row."""
    offset = ((np.arange(per_edge) + 0.5) / per_edge - 0.5) * diameter
    return centers[:, None] + np.stack(np.meshgrid(offset, offset), axis=-1).reshape(-1, 2)


def _inside_image(level: Level, first: tuple[int, int], needed: np.ndarray, step: float) -> np.ndarray:
    """Needed cells with their centre on the image; all of them if no centre is (an image smaller than a cell)."""
    x, y = apply_affine(cell_centers(first, needed, step), np.linalg.inv(level.to_um)).T
    height, width = level.shape
    inside = np.zeros_like(needed)
    inside[needed] = (x >= 0) & (y >= 0) & (x <= width) & (y <= height)
    return inside if inside.any() else needed


@dataclass(frozen=True)
class _PatchSource:
    """Patches of one image, encoded; checks the output of the encoder."""

    encoder: Any  # An :class:`Encoder`, which may have the optional members `step_px` and `slide`
    levels: Sequence[Level]
    batch_size: int
    recolor: Callable[[np.ndarray], np.ndarray] | None

    def encode_patches(self, own: np.ndarray, cells: np.ndarray, pooler: StreamingPooler) -> np.ndarray:
        """(n, d) features around the points `own` (..., 2); those of all cells of the lattice go to the pooler.

        All patches are read in one pass over the image.
        """
        own = own.reshape(-1, 2)
        features = np.empty((0, 0), dtype=np.float32)
        for rows, patches in self._read(np.concatenate([own, cells]), self.encoder.patch_px, self.batch_size):
            encoded = self.encoder(patches)
            self._require_finite(encoded, (len(rows),))
            if not features.size:
                features = np.empty((len(own), encoded.shape[-1]), dtype=np.float32)
            mine = rows < len(own)
            features[rows[mine]] = encoded[mine]
            pooler.add(pooler.corners[rows[~mine] - len(own)], encoded[~mine][:, None, None])
        return features

    def encode_blocks(self, first: tuple[int, int], pooler: StreamingPooler) -> None:
        """Encode all known cells of the lattice, window by window."""
        step_px, patch_px = self.encoder.step_px, self.encoder.patch_px
        # A window begins with the patch of its first cell; patch and cell have the same centre.
        n_px = (_BLOCK - 1) * step_px + patch_px
        shift = (_BLOCK * step_px) / 2 * self.encoder.mpp
        corners = pooler.corners
        centers = (corners[:, ::-1] + [first[1], first[0]]) * (step_px * self.encoder.mpp) + shift
        at_once = max(1, self.batch_size * patch_px**2 // n_px**2)
        for rows, windows in self._read(centers, n_px, at_once):
            encoded = self.encoder.slide(windows)
            self._require_finite(encoded, (len(rows), _BLOCK, _BLOCK))
            pooler.add(corners[rows], encoded)

    def _read(self, centers: np.ndarray, n_px: int, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        side = n_px * self.encoder.mpp
        for rows, patches in iter_patches(list(self.levels), centers, side, n_px, batch_size=batch_size):
            yield rows, patches if self.recolor is None else self.recolor(patches)

    def _require_finite(self, encoded: np.ndarray, shape: tuple[int, ...]) -> None:
        finite = np.isfinite(encoded).all()
        if encoded.ndim != len(shape) + 1 or encoded.shape[:-1] != shape or not finite:
            expected = ", ".join(map(str, shape))
            msg = (
                f"Encoder {self.encoder.name!r} must return finite numbers of shape ({expected}, n_features), found "
                f"shape {encoded.shape}{'' if finite else ' with NaN or inf'}."
            )
            raise ValueError(msg)


def pool_tiles(
    positions: np.ndarray,
    features: np.ndarray,
    centers: np.ndarray,
    diameter: float,
    layout: Mapping[str, Sequence[FieldOfView]],
) -> dict[str, np.ndarray]:
    """Tokens, as :func:`section_tokens` returns them, from features that another tool computed on tiles.

    `positions` are (m, 2) centres of the tiles in um, `features` (m, d). The tiles with their centre in a field describe
    it; the nearest tile if there are none.
    """
    tree = cKDTree(positions)
    offset = features.mean(axis=0, dtype=np.float64)
    values = features.astype(np.float64) - offset
    result = {}
    for key, fields in layout.items():
        tokens = []
        for field in fields:
            middle = centers + np.multiply(field.shift, diameter)
            found = tree.query_ball_point(middle, field.scale * diameter / 2, p=np.inf, return_sorted=True)
            _, nearest = tree.query(middle)
            found = [rows or [near] for rows, near in zip(found, nearest, strict=True)]
            count = np.array([len(rows) for rows in found])
            weight = sparse.csr_matrix(
                (np.repeat(1.0 / count, count), np.concatenate(found), np.r_[0, count.cumsum()]),
                shape=(len(centers), len(positions)),
            )
            mean = weight @ values
            tokens += [mean + offset, np.sqrt(np.maximum(weight @ values**2 - mean**2, 0.0))]
        result[key] = np.concatenate(tokens, axis=1).astype(np.float32)
    return result


def section_key(encoder: str, image: str, geometry: Mapping[str, Any], arrays: Sequence[np.ndarray]) -> str:
    """Key of the features of a section: the same for the same encoder, image, spots and fields of view."""
    digest = hashlib.sha256(json.dumps([_FORMAT, encoder, image, geometry], sort_keys=True).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:32]


def image_identity(levels: Sequence[Level], *, across_sessions: bool) -> str:
    """Hash that identifies an image; within a session also by the name of its lazy array, or by all pixels."""
    found, data = image_fingerprint(levels), levels[0].data.data
    if across_sessions:
        return found
    if hasattr(data, "name"):
        return f"{found}{data.name}"  # changes with every operation on the lazy array
    return found + hashlib.sha256(np.ascontiguousarray(data).tobytes()).hexdigest()


def load_tokens(folder: Path, key: str, widths: Mapping[str, int], n: int) -> dict[str, np.ndarray] | None:
    """Features from a folder; None if it does not have them.

    They must be those of this key, finite, with `n` rows and a multiple of `widths` columns (number of tokens) per level.
    """
    path = folder / f"{key}.npz"
    if not path.exists():
        return None
    try:
        with np.load(path) as file:  # refuses pickles, and checks the sums of all bytes
            found = {name: file[name] for name in file.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        problem = str(error)
    else:
        problem = _problem(found, key, widths, n)
    if not problem:
        del found[_KEY]
        return found
    logger.warning("%s is damaged (%s); its section is encoded again", path, problem)
    return None


def _problem(found: Mapping[str, np.ndarray], key: str, widths: Mapping[str, int], n: int) -> str:
    """Fault in the content of a file; empty if nothing is."""
    if str(found.get(_KEY)) != key or set(found) != {_KEY, *widths}:
        return "features of something else"
    for name, width in widths.items():
        values = found[name]
        if values.ndim != 2 or len(values) != n or not values.shape[1] or values.shape[1] % width:
            return f"{name} has the shape {values.shape}, expected {n} rows"
        if values.dtype.kind != "f" or not np.isfinite(values).all():
            return f"{name} is not finite"
    return ""


def save_tokens(folder: Path, key: str, tokens: Mapping[str, np.ndarray]) -> None:
    """Write the features of a section. An interrupted write leaves no file that could be mistaken for a result.

    Several processes may write the same section: each writes a file of its own, and the last one stays as a whole.
    """
    partial = folder / f".{key}.{uuid4().hex[:8]}.partial.npz"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.savez(file, **dict[str, Any](tokens, **{_KEY: np.array(key)}))
        partial.replace(folder / f"{key}.npz")
        for rest in folder.glob(f".{key}.*.partial.npz"):
            if time.time() - rest.stat().st_mtime > _OLD:
                rest.unlink(missing_ok=True)
    except OSError as error:
        error.add_note(f"Finished sections are in {str(folder)!r}; run the same call again to continue from them.")
        raise
