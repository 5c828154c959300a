"""Tokens of the spots of one section: the patches to encode, and how they are summed up over fields of view."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from spatial_impute._geometry import apply_affine
from spatial_impute._image.patches import iter_patches
from spatial_impute._keys import Keys
from spatial_impute.encoders._pooling import Field, cell_centers, needed_cells
from spatial_impute.encoders._row_pooling import RollingLattice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from spatial_impute._image.levels import Level
    from spatial_impute.encoders._encoder import Encoder

Layout = dict[str, tuple[Field, ...]]

_BLOCK = 16  # cells along a window that is encoded at once: larger ones overlap less, but fall out of the CPU's cache


def token_layout(region_scale: float, global_scale: float) -> Layout:
    """Fields of view behind the tokens of each level.

    The region is seen in two sizes. The global level has the global field, the one twice as wide, and the quadrants of
    that: they say on which side something lies.
    """
    half = global_scale / 2
    quadrants = tuple(Field(global_scale, (dx, dy)) for dy in (-half, half) for dx in (-half, half))
    return {
        Keys.X_SPOT: (Field(1.0),),
        Keys.X_REGION: (Field(region_scale), Field(region_scale * 2**0.5)),
        Keys.X_GLOBAL: (Field(global_scale), Field(2 * global_scale), *quadrants),
    }


FIELD_TOKENS = {Keys.X_SPOT: [0], Keys.X_REGION: [0], Keys.X_GLOBAL: [0, 1]}
"""Tokens that describe the surroundings without saying on which side: one field of view after the other."""


def section_tokens(
    levels: Sequence[Level],
    centers: np.ndarray,
    diameter: float,
    encoder: Encoder,
    layout: Layout,
    *,
    batch_size: int,
    recolour: Callable[[np.ndarray], np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Encode one section.

    Parameters
    ----------
    levels
        Resolutions of its image.
    centers
        (n, 2) middles of its spots, um.
    diameter
        Diameter of a spot, um.
    encoder
        What encodes.
    layout
        Fields of view per level.
    batch_size
        Patches encoded at a time.
    recolour
        Applied to the patches before they are encoded.

    Returns
    -------
    Per level (n, n_tokens * 2 * n_features) float32: for each token the mean of the features of the patches in the field,
    then their standard deviation.

    Raises
    ------
    ValueError
        If the encoder returns something else than finite numbers of shape (n, n_features).
    """
    extent = encoder.patch_px * encoder.mpp
    sliding = getattr(encoder, "step_px", None) is not None
    step = encoder.step_px * encoder.mpp if sliding else extent
    reach = max(field.scale + 2 * max(map(abs, field.shift)) for fields in layout.values() for field in fields)
    first, needed = needed_cells(centers, reach * diameter, step)
    known = _inside_image(levels[0], first, needed, step)
    encode = _Checked(encoder, levels, batch_size, recolour)
    # The spot itself gets patches of its own where the lattice is too coarse for it.
    pooled_keys = [key for key in layout if sliding or key != Keys.X_SPOT]
    fields = [
        (np.multiply(field.shift, diameter), field.scale * diameter) for key in pooled_keys for field in layout[key]
    ]
    lattice = RollingLattice(step, first, known, centers, fields, block=_BLOCK if sliding else 1)
    result = {}
    if sliding:
        encode.blocks(first, lattice)
    else:
        per_edge = max(1, round(diameter / extent))
        own = encode.patches(spot_patches(centers, diameter, per_edge), cell_centers(first, known, step), lattice)
        own = own.reshape(len(centers), per_edge**2, -1).astype(np.float64)
        result[Keys.X_SPOT] = np.concatenate([own.mean(axis=1), own.std(axis=1)], axis=1, dtype=np.float32)
    pooled = iter(lattice.finish())
    for key in pooled_keys:
        result[key] = np.concatenate([part for _ in layout[key] for part in next(pooled)], axis=1)
    return {key: result[key] for key in layout}


def spot_patches(centers: np.ndarray, diameter: float, per_edge: int) -> np.ndarray:
    """(n, per_edge ** 2, 2) middles of the patches of each spot: those of a grid of squares over it, row by row."""
    offset = ((np.arange(per_edge) + 0.5) / per_edge - 0.5) * diameter
    return centers[:, None] + np.stack(np.meshgrid(offset, offset), axis=-1).reshape(-1, 2)


def _inside_image(level: Level, first: tuple[int, int], needed: np.ndarray, step: float) -> np.ndarray:
    """Needed cells whose middle lies on the image; all of them if none does (an image smaller than a cell)."""
    x, y = apply_affine(cell_centers(first, needed, step), np.linalg.inv(level.to_um)).T
    height, width = level.shape
    inside = np.zeros_like(needed)
    inside[needed] = (x >= 0) & (y >= 0) & (x <= width) & (y <= height)
    return inside if inside.any() else needed


class _Checked:
    """An encoder on one image, its answers checked."""

    def __init__(
        self,
        encoder: Encoder,
        levels: Sequence[Level],
        batch_size: int,
        recolour: Callable[[np.ndarray], np.ndarray] | None,
    ) -> None:
        self._encoder = encoder
        self._levels = list(levels)
        self._batch_size = batch_size
        self._recolour = recolour

    def patches(self, own: np.ndarray, cells: np.ndarray, lattice: RollingLattice) -> np.ndarray:
        """Encode patches around points, read together with those of all cells of a lattice, which takes the latter.

        Returns
        -------
        (n, d) features around the points `own` (..., 2).
        """
        encoder = self._encoder
        own = own.reshape(-1, 2)
        features: np.ndarray | None = None
        for rows, patches in self._read(np.concatenate([own, cells]), encoder.patch_px, self._batch_size):
            encoded = encoder(patches)
            self._require_finite(encoded, (len(rows),))
            if features is None:
                features = np.empty((len(own), encoded.shape[-1]), dtype=np.float32)
            mine = rows < len(own)
            features[rows[mine]] = encoded[mine]
            lattice.add(lattice.corners[rows[~mine] - len(own)], encoded[~mine][:, None, None])
        return features

    def blocks(self, first: tuple[int, int], lattice: RollingLattice) -> None:
        """Encode all known cells of a lattice, window by window."""
        encoder = self._encoder
        # A window begins with the patch of its first cell, whose middle is that of the cell.
        n_px = (_BLOCK - 1) * encoder.step_px + encoder.patch_px
        shift = (_BLOCK * encoder.step_px) / 2 * encoder.mpp
        corners = lattice.corners
        centers = (corners[:, ::-1] + [first[1], first[0]]) * (encoder.step_px * encoder.mpp) + shift
        at_once = max(1, self._batch_size * encoder.patch_px**2 // n_px**2)
        for rows, windows in self._read(centers, n_px, at_once):
            encoded = encoder.slide(windows)
            self._require_finite(encoded, (len(rows), _BLOCK, _BLOCK))
            lattice.add(corners[rows], encoded)

    def _read(self, centers: np.ndarray, n_px: int, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        side = n_px * self._encoder.mpp
        for rows, patches in iter_patches(self._levels, centers, side, n_px, batch_size=batch_size):
            yield rows, patches if self._recolour is None else self._recolour(patches)

    def _require_finite(self, encoded: np.ndarray, shape: tuple[int, ...]) -> None:
        finite = np.isfinite(encoded).all()
        if encoded.ndim != len(shape) + 1 or encoded.shape[:-1] != shape or not finite:
            expected = ", ".join(map(str, shape))
            msg = (
                f"Encoder {self._encoder.name!r} must return finite numbers of shape ({expected}, n_features), found "
                f"shape {encoded.shape}{'' if finite else ' with NaN or inf'}."
            )
            raise ValueError(msg)


def pool_tiles(
    positions: np.ndarray,
    features: np.ndarray,
    centers: np.ndarray,
    diameter: float,
    layout: Mapping[str, Sequence[Field]],
) -> dict[str, np.ndarray]:
    """Tokens from features that another tool computed on tiles.

    A field is described by the tiles whose middle lies in it, or by the nearest one.

    Parameters
    ----------
    positions, features
        (m, 2) middles of the tiles in um; (m, d) their features.
    centers, diameter, layout
        As in :func:`section_tokens`.

    Returns
    -------
    As :func:`section_tokens`.
    """
    from scipy import sparse
    from scipy.spatial import cKDTree

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
