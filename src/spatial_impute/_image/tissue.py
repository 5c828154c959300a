"""Tissue against background on a brightfield thumbnail: optical density and tissue mask.

Arrays in, arrays out; lengths are micrometres, images are indexed ``(y, x)``.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage as ndi
from skimage.filters import threshold_otsu
from skimage.morphology import isotropic_dilation, isotropic_erosion

from spatial_impute._image.levels import area_means

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

# All levels are relative to the image's own white level, so uint8, uint16 and float images need no flag.
_BLACK_LEVEL = 0.2  # darker than stained tissue in all channels: fill value, slide holder, background of fluorescence
_BLACK_SMOOTHING = 2.0  # pixels; a slide holder is rough, and must come out as one piece
_GLASS_LEVEL = 0.5  # next to padding comes glass or tissue, both brighter than this; a fluorescent signal fades out
_DARKEST_RATIO = 1 / 255  # floor of transmitted light, keeps the logarithm finite
# Masks are made at about this pixel size in um, whatever the resolution of the image: then they are the same at all of
# them. A cell still shows.
_GRID = 16.0
_FEWEST_PIXELS = 64  # along the shorter side; a smaller image keeps its own grid
_CELL, _NEIGHBORHOOD = 12.0, 48.0  # um: structure of this size is texture; haze and uneven light are smoother
_STILL = 0.002  # optical density: less texture is that of empty glass, whatever the camera
_LEAST_TEXTURE = 0.01  # 1 % of the light; an image without any glass has at least this texture, or it shows nothing
_TWO_KINDS = 3.0  # ratio of the textures of tissue and glass; within tissue alone it is below 2
_MIN_SHARE = 0.01  # of the pixels: fewer are specks, not a kind of texture
_NEAR_GLASS, _NEAR_TISSUE = 500.0, 150.0  # um: glass changes slowly (haze), tissue within a region
_MIN_DENSITY = 0.02  # 2 % absorption: less is no stain
# Fat: walls of this density and hue (range of the channels over their mean; dirt and print are grey), gaps in them of at
# most this half width in um, and pieces of at least this half width: narrower ones are the rim of other tissue.
_WALL_DENSITY, _WALL_HUE, _WALL_GAP, _FAT_WIDTH = 0.01, 0.25, 20.0, 100.0
_EVEN = 0.05  # optical density: light that differs by less than 5 % across the glass counts as even
_LIGHT_PIXELS, _LEAST_GLASS, _LIGHT_FITS = 20_000, 0.05, 10  # pixels used at most, share of glass at least, rounds
_LESS, _MUCH_LESS = 2 / 3, 1 / 3  # print against the main tissue: shares of texture, hue and density
_NARROW = 400.0  # um: half width of the frame of an array
_DARK = 4.0  # times the median of the tissue
_SMOOTHING = 15.0  # um, sd of the blur before thresholding: about one cell, so that a mask follows tissue
# um^2. Isolated specks up to this area are dropped before closing can join them: dust, fiducial dots (about 100 um
# across). They stay if the tissue itself is of that size.
_LEAST_ISLAND = 30_000.0
_NARROW_GAP = 60.0  # um, half width: narrower gaps (cracks, sinusoids) are closed
_NARROW_PIECE = 45.0  # um, half width: narrower structures (hair, debris at the edge) are removed
_LARGEST_HOLE = 250_000.0  # um^2; larger ones (vessels, lumina, torn tissue) stay open
_LEAST_SHARE = 0.05  # of the largest component: smaller ones are dropped
_KEPT_MASKS = 64
_MASKS: dict[tuple, NDArray[np.bool_]] = {}  # by the hash of the image


def optical_density(rgb: ArrayLike) -> NDArray[np.float32]:
    """Optical density of a brightfield image, ``-ln(I / I0)``, against the background of the image.

    ``I0`` is the median color of the bright pixels. Padding (transparent pixels, a black frame around the scan) does
    not count for it and gets density 0. An image on a dark background (fluorescence) is inverted first, so that signal
    is always positive.

    `rgb` is ``(y, x)``, ``(y, x, 1)``, ``(y, x, 3)`` or ``(y, x, 4)`` (alpha last), of any numeric type and range. The
    result is ``(y, x, 3)``, ``float32``, not below 0 and finite; a constant image gives zeros.
    """
    density, _ = _signed_density(*_split_alpha(np.asarray(rgb)))
    return np.maximum(density, 0)


def _signed_density(
    image: NDArray[np.float32], visible: NDArray[np.bool_]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Optical density, negative where the image is brighter than its background, and the pixels without padding."""
    density = np.zeros(image.shape, np.float32)
    visible, dark_background = _find_padding(image, visible)
    if not visible.any():
        return density, visible
    if dark_background:
        image = np.maximum(_white_level(image, visible) - image, 0)
    if np.ptp(image[visible]) <= 1e-6 * abs(float(image[visible].max())):
        return density, visible
    background = _background_level(image, visible)
    transmitted = np.maximum(image / background, _DARKEST_RATIO)
    np.log(transmitted, out=transmitted)
    density[visible] = -transmitted[visible]
    return density, visible


def tissue_mask(rgb: ArrayLike, pixel_size: float | Sequence[float]) -> NDArray[np.bool_]:
    """Tissue mask ``(y, x)`` of a brightfield thumbnail; all false if the image is blank.

    Tissue has texture on the scale of cells; glass, haze and uneven light have none. So texture finds where there is
    glass and where there is tissue. The outline is where the density is halfway between the glass and the tissue nearby:
    pale tissue gets a lower threshold than dark tissue, and haze a higher one than clean glass. Uneven light is removed
    before. Fat has little stain: it is found by the thin walls of its cells. Pieces that
    are smoother and greyer than the main tissue (a printed frame), or narrow and far darker (a pen), are dropped. An
    image that has texture everywhere is all tissue.

    `rgb` is as in :func:`optical_density`; `pixel_size` is in um, one number or ``(x, y)``. The last masks are
    kept, because every plot of a section needs its mask again.
    """
    size_x, size_y = (float(size) for size in np.broadcast_to(pixel_size, 2))
    if not (np.isfinite([size_x, size_y]).all() and size_x > 0 and size_y > 0):
        msg = f"`pixel_size` must be positive micrometres per pixel, found {pixel_size!r}."
        raise ValueError(msg)
    image = np.asarray(rgb)
    key = hashlib.sha256(image.tobytes()).digest(), image.shape, image.dtype.str, size_x, size_y
    if key not in _MASKS:
        _MASKS[key] = _find_tissue(image, (size_y, size_x))
        if len(_MASKS) > _KEPT_MASKS:
            del _MASKS[next(iter(_MASKS))]
    return _MASKS[key].copy()


def _find_tissue(rgb: NDArray, pixel_size: tuple[float, float]) -> NDArray[np.bool_]:
    """Tissue mask of an image with pixels of this size ``(y, x)``."""
    image, visible = _split_alpha(rgb)
    shape, factors = visible.shape, _factors(visible.shape, pixel_size)
    sampling = (pixel_size[0] * factors[0], pixel_size[1] * factors[1])
    pixel_area = sampling[0] * sampling[1]
    signed, visible = _signed_density(*_coarser(image, visible, factors))
    texture = _texture(np.maximum(signed, 0), sampling)
    density = np.maximum(signed - _uneven_light(signed, visible & ~_rough(texture)), 0) * visible[..., None]
    mask = _stained(density, texture, sampling)
    if not mask.any():
        return np.zeros(shape, bool)
    mask |= _fat(density, mask, sampling)
    mask = _keep_large_components(mask, _LEAST_ISLAND / pixel_area)
    mask = _drop_print(mask, density, texture, sampling)  # before closing can join a line of a pen to the tissue
    mask = _fill_holes(_closed(mask, _NARROW_GAP, sampling), _LARGEST_HOLE / pixel_area)
    opened = _opened(mask, _NARROW_PIECE, sampling)
    # A sample smaller than the opening would vanish; it is still the only tissue there is.
    mask = _drop_print(opened if opened.any() else mask, density, texture, sampling)
    return _finer(_keep_large_components(mask), shape, factors)


def _factors(shape: tuple[int, ...], sampling: tuple[float, float]) -> tuple[int, int]:
    """Pixels ``(y, x)`` that are averaged to one of the grid of the mask."""
    most = max(1, min(shape) // _FEWEST_PIXELS)
    rows, columns = (min(most, max(1, int(_GRID / size + 1e-6))) for size in sampling)
    return rows, columns


def _coarser(
    image: NDArray[np.float32], visible: NDArray[np.bool_], factors: tuple[int, int]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Mean of the visible pixels of each block, and the blocks of which half is visible."""
    if factors == (1, 1):
        return image, visible
    pad = [(0, -n % k) for n, k in zip(visible.shape, factors, strict=True)]

    def mean(array: NDArray) -> NDArray[np.float32]:
        return area_means(np.pad(array, pad).astype(np.float32), *factors)

    share = mean(visible)
    channels = [mean(image[..., k] * visible) / np.maximum(share, 1e-6) for k in range(3)]
    inside = mean(np.ones_like(visible))  # blocks at the rim are not full
    return np.stack(channels, axis=-1), share >= 0.5 * inside


def _finer(mask: NDArray[np.bool_], shape: tuple[int, ...], factors: tuple[int, int]) -> NDArray[np.bool_]:
    """Mask on the grid of the image, its outline between the pixels of the coarser grid."""
    if factors == (1, 1):
        return mask
    scale = np.diag([1 / k for k in factors])
    offset = [0.5 / k - 0.5 for k in factors]
    fine = ndi.affine_transform(mask.astype(np.float32), scale, offset, output_shape=shape, order=1, mode="nearest")
    return fine > 0.5


def _texture(density: NDArray[np.float32], sampling: tuple[float, float]) -> NDArray[np.float32]:
    """Local standard deviation ``(y, x)`` of the density on the scale of cells."""
    fine, coarse = ([*(length / s for s in sampling), 0] for length in (_CELL, _NEIGHBORHOOD))
    square = (ndi.gaussian_filter(density, fine) - ndi.gaussian_filter(density, coarse)) ** 2
    return np.sqrt(ndi.gaussian_filter(square.mean(-1), coarse[:2]))


def _uneven_light(density: NDArray[np.float32], still: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Density of the glass ``(y, x, channel)`` where the light falls off across the image; 0 if the light is even.

    A quadratic surface through pixels without texture: first through the brighter half of the glass, then also through
    the pixels that continue it. Smooth tissue and haze are denser than the surface, and stay out.
    """
    rows, columns = (np.linspace(-1, 1, n, dtype=np.float32) for n in still.shape)
    y, x = np.meshgrid(rows, columns, indexing="ij")
    terms = np.stack([np.ones_like(x), x, y, x * y, x * x, y * y], axis=-1)
    step = max(1, int(np.sqrt(still.size / _LIGHT_PIXELS)))
    part = still[::step, ::step]
    known_terms, known = terms[::step, ::step][part], density[::step, ::step][part]
    glass = known.mean(-1) <= 0
    if np.count_nonzero(glass) < _LEAST_GLASS * part.size:
        return np.zeros_like(density)
    for _ in range(_LIGHT_FITS):
        surface, *_ = np.linalg.lstsq(known_terms[glass], known[glass], rcond=None)
        distance = np.abs((known - known_terms @ surface).mean(-1))
        glass = distance < _MIN_DENSITY + 2 * float(np.median(distance[glass]))
    light = np.clip(terms @ surface, *(np.percentile(known[glass], q, axis=0) for q in (1, 99)))
    return light if np.ptp(light.mean(-1)) > _EVEN else np.zeros_like(light)


def _stained(
    density: NDArray[np.float32], texture: NDArray[np.float32], sampling: tuple[float, float]
) -> NDArray[np.bool_]:
    """Pixels that are denser than halfway between the glass and the tissue near them."""
    total = density.mean(-1)
    rough = _rough(texture)
    if rough.all() or not rough.any():
        return rough
    core = _erode(rough, _NEIGHBORHOOD, sampling)
    core = core if core.any() else rough
    tissue_level = float(np.median(total[core]))
    glass = ~rough & (total < 0.5 * tissue_level)
    # Pigment and ink do not decide about the tissue around them.
    dense = core & (total > _MIN_DENSITY)
    usual = np.minimum(total, _DARK * float(np.median(total[dense]))) if dense.any() else total
    tissue = _level(usual, core, _NEAR_TISSUE, sampling, tissue_level)
    empty = _level(total, glass, _NEAR_GLASS, sampling, 0.0)
    halfway = empty + np.maximum(0.5 * (tissue - empty), _MIN_DENSITY)
    return ndi.gaussian_filter(total, [_SMOOTHING / s for s in sampling]) > halfway


def _fat(density: NDArray[np.float32], stained: NDArray[np.bool_], sampling: tuple[float, float]) -> NDArray[np.bool_]:
    """Pixels of fat: thin walls around empty cells, which are too pale on average for the outline by density."""
    fine = density - ndi.gaussian_filter(density, [*(_NEIGHBORHOOD / s for s in sampling), 0])
    strength, hue = fine.mean(-1), np.ptp(fine, axis=-1)
    noise = 1.48 * float(np.median(np.abs(strength)))
    walls = (strength > max(_WALL_DENSITY, 4 * noise)) & (hue > _WALL_HUE * strength)
    walls = _closed(walls | stained, _WALL_GAP, sampling)
    mesh = _fill_holes(walls, _LARGEST_HOLE / (sampling[0] * sampling[1])) & ~_opened(stained, _NARROW_PIECE, sampling)
    return mesh & _dilate(_opened(mesh, _FAT_WIDTH, sampling), _NEIGHBORHOOD, sampling)


def _rough(texture: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Pixels with the texture of tissue: all or none if there is only one kind of texture."""
    values = np.log(np.maximum(texture, _STILL))
    threshold = _between(values)
    if threshold is None:
        return np.full(texture.shape, np.median(texture) > _LEAST_TEXTURE)
    below = values[values <= threshold]
    # Dark and pale tissue on one slide: the first threshold may lie between those two.
    second = _between(below)
    if second is not None and below[below > second].mean() > np.log(_LEAST_TEXTURE):
        threshold = second
    return values > threshold


def _between(values: NDArray) -> float | None:
    """Threshold between two kinds of texture, None if there is one kind only."""
    threshold = _otsu(values)
    high = values > threshold
    if not high.any() or high.mean() < _MIN_SHARE or values[high].mean() - values[~high].mean() < np.log(_TWO_KINDS):
        return None
    return threshold


def _level(
    total: NDArray, where: NDArray[np.bool_], distance: float, sampling: tuple[float, float], overall: float
) -> NDArray[np.float32]:
    """Mean density of the pixels `where` near each pixel; `overall` far from all of them."""
    sigma = [distance / s for s in sampling]
    weight = ndi.gaussian_filter(where.astype(np.float32), sigma, mode="constant")
    value = ndi.gaussian_filter(np.where(where, total, 0).astype(np.float32), sigma, mode="constant")
    few = 1e-3  # of the weight of a full neighborhood: then the overall level takes over
    return (value + few * overall) / (weight + few)


def _drop_print(
    mask: NDArray[np.bool_], density: NDArray[np.float32], texture: NDArray[np.float32], sampling: tuple[float, float]
) -> NDArray[np.bool_]:
    """Mask without the pieces that are print, and not like the main tissue.

    Bars are smooth, and grey or without the texture of tissue. Rows of dots are narrow, grey and mostly glass. Lines of a
    pen and letters are narrow, and several times as dark.
    """
    labels, n_pieces = ndi.label(mask)
    if n_pieces < 2:
        return mask
    pieces = np.arange(1, n_pieces + 1)
    total = np.maximum(density.mean(-1), _MIN_DENSITY)
    # Beyond the border is background here, so that a frame cut by it is not twice as wide.
    depth = ndi.distance_transform_edt(np.pad(mask, 1), sampling=sampling)[1:-1, 1:-1]
    width = np.asarray(ndi.maximum(depth, labels, pieces))
    main = int(np.argmax(width * ndi.mean(_rough(texture), labels, pieces)))  # the thickest piece of tissue

    def share(values: NDArray) -> NDArray:
        """Median of each piece over that of the main tissue."""
        medians = np.asarray(ndi.median(values, labels, pieces))
        return medians / max(float(medians[main]), 1e-6)

    grey = share((density.max(-1) - density.min(-1)) / total) < _LESS
    smooth, still = share(texture / total) < _LESS, share(texture) < _MUCH_LESS
    dots = grey & (share(total) < _LESS) & (width < _NARROW)
    ink = (share(total) > 1 / _MUCH_LESS) & (width < _NARROW)
    printed = (smooth & (grey | still)) | dots | ink
    printed = np.concatenate([[False], printed])[labels]
    return mask & ~(printed & ~ndi.binary_fill_holes(mask & ~printed))  # pigment within the tissue is no ink


def _split_alpha(image: NDArray) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """RGB as ``float32 (y, x, 3)`` and the mask of opaque, finite pixels."""
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[-1] not in (1, 3, 4) or min(image.shape[:2]) == 0:
        msg = (
            f"Expected an image of shape (y, x), (y, x, 1), (y, x, 3) or (y, x, 4), found {image.shape}. "
            "Move the channels last and choose the color channels."
        )
        raise ValueError(msg)
    visible = np.ones(image.shape[:2], bool)
    if image.shape[-1] == 4:
        alpha = image[..., 3]
        opaque = np.iinfo(alpha.dtype).max if np.issubdtype(alpha.dtype, np.integer) else max(1.0, np.nanmax(alpha))
        visible = alpha > 0.5 * opaque
        image = image[..., :3]
    image = image.astype(np.float32)
    finite = np.isfinite(image).all(-1)
    image[~finite] = 0
    return np.broadcast_to(image, (*image.shape[:2], 3)), visible & finite


def _white_level(image: NDArray, visible: NDArray[np.bool_]) -> float:
    return float(np.percentile(image[visible], 99.9))


def _find_padding(image: NDArray, visible: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], bool]:
    """Pixels of `visible` without black frames, and True if the whole image lies on a dark background.

    Both are black at the border. Further in, a black frame ends in a jump to glass or tissue, while the signal on a
    dark background begins dark.
    """
    if not visible.any():
        return visible, False
    white = _white_level(image, visible)
    brightness = image.max(-1)
    black = visible & (ndi.gaussian_filter(brightness, _BLACK_SMOOTHING) < _BLACK_LEVEL * white)
    border = np.zeros(black.shape, bool)
    border[[0, -1]] = border[:, [0, -1]] = True
    labels, _ = ndi.label(black)
    padding, dark = np.zeros_like(black), np.zeros_like(black)
    for label in np.setdiff1d(np.unique(labels[border]), [0]):
        component = labels == label
        near = ndi.binary_dilation(component, iterations=4)  # the edge, blurred by the scan and by the smoothing above
        ring = ndi.binary_dilation(near, iterations=2) & ~near & visible
        if ring.any() and np.median(brightness[ring]) > _GLASS_LEVEL * white:
            padding |= near
        else:
            dark |= component
    dark_background = bool(2 * np.count_nonzero(dark & border) > np.count_nonzero(border & visible & ~padding))
    return visible & ~padding, dark_background


def _background_level(image: NDArray, visible: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Median color ``(3,)`` of the bright class; at least one grey level above zero."""
    values = image[visible]
    brightness = values.mean(-1)
    bright = brightness >= _otsu(brightness)
    level = np.median(values[bright], axis=0)
    brightest = max(float(values.max()), float(np.finfo(np.float32).tiny))
    return np.maximum(level, brightest * _DARKEST_RATIO)


def _otsu(values: NDArray) -> float:
    low, high = float(values.min()), float(values.max())
    return low if high - low < 1e-6 * max(abs(high), 1e-6) else float(threshold_otsu(values))


# Discs of a given radius in um by the distance transform: exact for any pixel size, and as fast for large radii.
def _dilate(mask: NDArray[np.bool_], radius: float, sampling: tuple[float, float]) -> NDArray[np.bool_]:
    return isotropic_dilation(mask, radius, spacing=sampling) if mask.any() else mask


def _erode(mask: NDArray[np.bool_], radius: float, sampling: tuple[float, float]) -> NDArray[np.bool_]:
    # Nothing is known beyond the frame: tissue cut by it is not eroded from there.
    return mask if mask.all() else isotropic_erosion(mask, radius, spacing=sampling)


def _closed(mask: NDArray[np.bool_], radius: float, sampling: tuple[float, float]) -> NDArray[np.bool_]:
    return _erode(_dilate(mask, radius, sampling), radius, sampling)


def _opened(mask: NDArray[np.bool_], radius: float, sampling: tuple[float, float]) -> NDArray[np.bool_]:
    return _dilate(_erode(mask, radius, sampling), radius, sampling)


def _fill_holes(mask: NDArray[np.bool_], max_pixels: float) -> NDArray[np.bool_]:
    labels, n_holes = ndi.label(~mask)
    if n_holes == 0:
        return mask
    size = np.bincount(labels.ravel())
    fill = size <= max_pixels
    fill[np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))] = False  # open to the border
    fill[0] = False  # label 0 is the tissue itself
    return mask | fill[labels]


def _keep_large_components(mask: NDArray[np.bool_], enough: float = np.inf) -> NDArray[np.bool_]:
    """Drop components that are small compared with the largest one, unless they have `enough` pixels."""
    labels, n_components = ndi.label(mask)
    if n_components == 0:
        return mask
    size = np.bincount(labels.ravel())
    size[0] = 0
    return (size >= min(_LEAST_SHARE * size.max(), enough))[labels] & mask
