"""The image that is registered: optical density of the tissue on a small isotropic grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage as ndi

from spatial_impute._tissue import optical_density

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from spatial_impute._registration._types import RegistrationParams, SectionImage

_CLIP_PERCENTILES = (1.0, 99.0)  # within tissue: folds, ink and lumina must not set the scale
_BLUR = 1.0  # working pixels: takes off pixel noise, which differs between sections
_SOFT_EDGE = 1.0  # working pixels: a hard mask edge would alias under rotation


@dataclass(frozen=True, slots=True, eq=False)
class Channel:
    """Registration channel on an isotropic grid: pixel ``(row, col)`` is centred at ``origin + (col + 0.5, row + 0.5) * size``."""

    image: NDArray[np.float32]
    """``(y, x)``, 0 to 1, exactly 0 far from tissue."""
    mask: NDArray[np.bool_]
    """Tissue ``(y, x)``."""
    origin: tuple[float, float]
    """Corner of the grid in the section's frame, um ``(x, y)``."""
    size: float
    """Micrometres per pixel."""

    def centres(self) -> NDArray[np.float64]:
        """Centres of the tissue pixels, ``(n, 2)`` as ``(x, y)`` in um."""
        rows, cols = np.nonzero(self.mask)
        return np.column_stack([cols, rows]) * self.size + (np.asarray(self.origin) + 0.5 * self.size)

    def to_index(self) -> NDArray[np.float64]:
        """``(3, 3)`` matrix from um ``(x, y, 1)`` to continuous array index ``(row, col, 1)``."""
        x0, y0 = self.origin
        return np.array([[0, 1 / self.size, -y0 / self.size - 0.5], [1 / self.size, 0, -x0 / self.size - 0.5], [0, 0, 1]])


def working_pixel(fixed: SectionImage, moving: SectionImage, params: RegistrationParams) -> float:
    """Micrometres per working pixel for a pair: set by the larger tissue, and never finer than the thumbnails."""
    boxes = np.array([fixed.tissue_box, moving.tissue_box])
    extent = float((boxes[:, 2:] - boxes[:, :2]).max())
    finest = max(min(fixed.pixel_size), min(moving.pixel_size), params.min_working_pixel)
    return max(extent / params.working_side, finest)


def registration_channel(section: SectionImage, size: float, margin: float) -> Channel:
    """Summed optical density, scaled to the tissue's own range and faded out at the tissue's edge.

    Parameters
    ----------
    section
        Thumbnail with its tissue mask.
    size
        Working resolution, um per pixel.
    margin
        Width in um of background kept round the tissue. Everything further away is cut off, so a small section in a large
        frame costs no more than a cropped one.
    """
    density = optical_density(section.rgb).sum(-1)
    low, high = np.percentile(density[section.mask], _CLIP_PERCENTILES)
    if high - low < 1e-6:  # a flat piece of tissue still has its outline
        low, high = low - 1.0, low
    density = np.clip((density - low) / (high - low), 0, 1)

    x0, y0, x1, y1 = section.tissue_box
    origin = (x0 - margin, y0 - margin)
    shape = tuple(int(np.ceil((length + 2 * margin) / size)) for length in (y1 - y0, x1 - x0))
    density = _resample(density, section.pixel_size, origin, shape, size)
    tissue = np.clip(_resample(section.mask.astype(np.float32), section.pixel_size, origin, shape, size), 0, 1)
    soft = ndi.gaussian_filter(tissue, _SOFT_EDGE)
    soft[soft < 0.01] = 0  # exact zeros: the background must carry no gradient at all
    # Tissue starts from a pedestal, so that its outline shows even where it is as pale as the background.
    image = (0.25 + 0.75 * ndi.gaussian_filter(density, _BLUR)) * soft
    return Channel(image.astype(np.float32), tissue > 0.5, origin, size)


def shrink(channel: Channel, size: float) -> Channel:
    """The same channel on a coarser grid of about `size` um per pixel (at least the present one)."""
    factor = max(1, round(size / channel.size))
    if factor == 1:
        return channel
    pad = [(0, -n % factor) for n in channel.image.shape]

    def mean(array: NDArray) -> NDArray:
        array = np.pad(array.astype(np.float32), pad)
        rows, cols = array.shape[0] // factor, array.shape[1] // factor
        return array.reshape(rows, factor, cols, factor).mean((1, 3))

    return Channel(mean(channel.image), mean(channel.mask) > 0.5, channel.origin, channel.size * factor)


def _resample(
    image: NDArray,
    pixel_size: tuple[float, float],
    origin: tuple[float, float],
    shape: tuple[int, ...],
    size: float,
) -> NDArray[np.float32]:
    """Image on the grid of pixel `size` starting at `origin` (um), smoothed as much as the coarser grid asks for; 0 outside."""
    steps = [size / s for s in (pixel_size[1], pixel_size[0])]
    image = image.astype(np.float32, copy=False)
    # A box of `step` pixels has a standard deviation of step / sqrt(12); less is needed as linear interpolation smooths too.
    sigma = [np.sqrt(max(step**2 - 1, 0) / 12) for step in steps]
    if max(sigma) > 0:
        image = ndi.gaussian_filter(image, sigma, mode="nearest")
    offset = [(origin[1] + 0.5 * size) / pixel_size[1] - 0.5, (origin[0] + 0.5 * size) / pixel_size[0] - 0.5]
    return ndi.affine_transform(image, np.diag(steps), offset, output_shape=shape, order=1, mode="grid-constant", cval=0.0)
