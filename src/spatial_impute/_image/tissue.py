"""Tissue against background on a brightfield thumbnail: optical density and tissue mask.

Arrays in, arrays out; lengths are micrometres, images are indexed ``(y, x)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage as ndi

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

# All levels are relative to the image's own white level, so uint8, uint16 and float images need no flag.
_BLACK_LEVEL = 0.2  # darker than stained tissue in all channels: fill value, slide holder, background of fluorescence
_BLACK_SMOOTHING = 2.0  # pixels; a slide holder is rough, and must come out as one piece
_GLASS_LEVEL = 0.5  # next to padding comes glass or tissue, both brighter than this; a fluorescent signal fades out
_DARKEST_RATIO = 1 / 255  # floor of transmitted light, keeps the logarithm finite
_RED_MISSES = 0.67  # share of the green-channel tissue below which red is taken to be blind (eosin-only tissue)
_CLEAR_VALLEY = 0.6  # real slides without pale tissue dip by at most 0.35 at that place, one with it by 0.83
_MIN_PALE_SHARE = 0.05  # of the pixels: fewer are an edge, not a kind of tissue
_N_BINS = 60
_MIN_OD = 0.02  # a threshold below 2 % absorption separates noise from noise: there is no tissue


def optical_density(rgb: ArrayLike) -> NDArray[np.float32]:
    """Optical density of a brightfield image, ``-ln(I / I0)``, against the background of the image.

    ``I0`` is the median color of the bright pixels. Padding (transparent pixels, a black frame around the scan) does
    not count for it and gets density 0. An image on a dark background (fluorescence) is inverted first, so that signal
    is always positive.

    Parameters
    ----------
    rgb
        Image ``(y, x)``, ``(y, x, 1)``, ``(y, x, 3)`` or ``(y, x, 4)`` (alpha last); any numeric type and range.

    Returns
    -------
    Optical density ``(y, x, 3)``, ``float32``, not below 0 and finite. A constant image gives zeros.
    """
    image, visible = _split_alpha(np.asarray(rgb))
    density = np.zeros(image.shape, np.float32)
    visible, dark_background = _find_padding(image, visible)
    if not visible.any():
        return density
    if dark_background:
        image = np.maximum(_white_level(image, visible) - image, 0)
    if np.ptp(image[visible]) <= 1e-6 * abs(float(image[visible].max())):
        return density
    background = _background_level(image, visible)
    transmitted = np.maximum(image / background, _DARKEST_RATIO)
    np.log(transmitted, out=transmitted)
    density[visible] = np.maximum(-transmitted[visible], 0)
    return density


def tissue_mask(
    rgb: ArrayLike,
    pixel_size: float | Sequence[float],
    *,
    smoothing: float = 15.0,
    threshold_scale: float = 0.6,
    min_island_area: float = 30_000.0,
    closing_radius: float = 60.0,
    opening_radius: float = 45.0,
    max_hole_area: float = 250_000.0,
    min_component_fraction: float = 0.05,
) -> NDArray[np.bool_]:
    """Tissue mask of a brightfield thumbnail.

    Threshold of the red-channel optical density: stained tissue absorbs red, the pink eosin haze that often surrounds a
    section does not. Tissue stained by eosin alone is invisible in red; then the green channel is used.

    Parameters
    ----------
    rgb
        Image ``(y, x)``, ``(y, x, 1)``, ``(y, x, 3)`` or ``(y, x, 4)`` (alpha last); any numeric type and range.
    pixel_size
        Micrometres per pixel, one number or ``(x, y)``.
    smoothing
        Standard deviation in um of the blur before thresholding: about one cell, so that a mask follows tissue.
    threshold_scale
        Factor on Otsu's threshold. Below 1 because pale tissue lies between the two classes that Otsu finds.
    min_island_area
        Isolated specks up to this area in square um are dropped before closing can join them: dust, fiducial dots
        (about 100 um across). They stay if the tissue itself is of that size.
    closing_radius
        Gaps narrower than twice this length in um (cracks, sinusoids) are closed.
    opening_radius
        Structures narrower than twice this length in um (hair, debris at the edge) are removed.
    max_hole_area
        Holes up to this area in square um are filled; larger ones (vessels, lumina, torn tissue) stay open.
    min_component_fraction
        Components smaller than this fraction of the largest one are dropped.

    Returns
    -------
    Boolean mask ``(y, x)``; all false if the image is blank.
    """
    size_x, size_y = (float(size) for size in np.broadcast_to(pixel_size, 2))
    if not (np.isfinite([size_x, size_y]).all() and size_x > 0 and size_y > 0):
        msg = f"`pixel_size` must be positive micrometres per pixel, found {pixel_size!r}."
        raise ValueError(msg)
    sampling = (size_y, size_x)
    pixel_area = sampling[0] * sampling[1]
    density = optical_density(rgb)
    mask, separation = _threshold(density[..., 0], smoothing, sampling, threshold_scale)
    green, green_separation = _threshold(density[..., 1], smoothing, sampling, threshold_scale)
    if green_separation > separation and np.count_nonzero(mask) < _RED_MISSES * np.count_nonzero(green):
        mask = green
    if not mask.any():
        return mask
    mask = _keep_large_components(mask, min_component_fraction, min_island_area / pixel_area)
    mask = _erode(_dilate(mask, closing_radius, sampling), closing_radius, sampling)
    mask = _fill_holes(mask, max_hole_area / pixel_area)
    opened = _dilate(_erode(mask, opening_radius, sampling), opening_radius, sampling)
    # A sample smaller than the opening would vanish; it is still the only tissue there is.
    mask = opened if opened.any() else mask
    return _keep_large_components(mask, min_component_fraction)


def _threshold(
    density: NDArray, smoothing: float, sampling: tuple[float, float], scale: float
) -> tuple[NDArray[np.bool_], float]:
    """Smoothed channel above its scaled Otsu threshold, and the share of the variance that this split explains."""
    channel = ndi.gaussian_filter(density, [smoothing / s for s in sampling])
    threshold = scale * _otsu(channel)
    below = channel[channel <= threshold]
    if below.size:
        # Dark and pale tissue on one slide: Otsu splits those two. Then what lies below still has two clear peaks.
        second = _otsu(below)
        if _valley_depth(below, second) > _CLEAR_VALLEY:
            threshold = second
    mask = channel > threshold
    if threshold < _MIN_OD or not mask.any() or mask.all():
        return np.zeros(mask.shape, bool), 0.0
    contrast = float(channel[mask].mean() - channel[~mask].mean())
    return mask, float(mask.mean() * (1 - mask.mean()) * contrast**2 / channel.var())


def _valley_depth(values: NDArray, threshold: float) -> float:
    """Depth of the dip of the histogram near `threshold`, relative to the smaller of its two peaks."""
    counts, edges = np.histogram(values, bins=_N_BINS)
    split = int(np.clip(np.searchsorted(edges, threshold), 1, _N_BINS - 1))
    peak = min(counts[:split].max(), counts[split:].max())
    if counts[split:].sum() < _MIN_PALE_SHARE * values.size or peak == 0:
        return 0.0
    return 1.0 - float(counts[split - 1 : split + _N_BINS // 12].min()) / float(peak)


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
    from skimage.filters import threshold_otsu

    low, high = float(values.min()), float(values.max())
    return low if high - low < 1e-6 * max(abs(high), 1e-6) else float(threshold_otsu(values))


# Discs of a given radius in um by the distance transform: exact for any pixel size, and as fast for large radii.
def _dilate(mask: NDArray[np.bool_], radius: float, sampling: tuple[float, float]) -> NDArray[np.bool_]:
    if not mask.any():
        return mask
    return ndi.distance_transform_edt(~mask, sampling=sampling) <= radius


def _erode(mask: NDArray[np.bool_], radius: float, sampling: tuple[float, float]) -> NDArray[np.bool_]:
    if mask.all():  # nothing is known beyond the frame: tissue cut by it is not eroded from there
        return mask
    return ndi.distance_transform_edt(mask, sampling=sampling) > radius


def _fill_holes(mask: NDArray[np.bool_], max_pixels: float) -> NDArray[np.bool_]:
    labels, n_holes = ndi.label(~mask)
    if n_holes == 0:
        return mask
    size = np.bincount(labels.ravel())
    fill = size <= max_pixels
    fill[np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))] = False  # open to the border
    fill[0] = False  # label 0 is the tissue itself
    return mask | fill[labels]


def _keep_large_components(
    mask: NDArray[np.bool_], min_fraction: float, max_pixels: float = np.inf
) -> NDArray[np.bool_]:
    """Drop components below `min_fraction` of the largest one, unless they have more than `max_pixels`."""
    labels, n_components = ndi.label(mask)
    if n_components == 0:
        return mask
    size = np.bincount(labels.ravel())
    size[0] = 0
    return (size >= min(min_fraction * size.max(), max_pixels))[labels] & mask
