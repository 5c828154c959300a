"""Images that the registration compares: stain of the tissue on a small isotropic grid."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage as ndi

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from spatial_impute._registration.types import RegistrationParams, SectionImage

_CLIP_PERCENTILE = 99.0  # within tissue: folds and ink must not set the scale
_BLUR = 1.0  # working pixels: takes off pixel noise, which differs between sections
SOFT_EDGE = 1.0  # working pixels: a hard edge would alias under rotation
_MIXED = 2  # working pixels at the outline that the blur mixes with glass
# Working pixels, a 40th of a section, the scale of the regions that serial sections share: their contrast is what is set
# against that of the whole tissue. Half of it found longer bends less often, twice as much moved pale cortex again.
_SURROUNDINGS = 8.0
RIM = 50.0  # um of background left round the tissue: the outline comes from the image itself, not from the mask


@dataclass(frozen=True, slots=True, eq=False)
class Channel:
    """Registration channel on an isotropic grid.

    Pixel ``(row, col)`` is centred at ``origin + (col + 0.5, row + 0.5) * size``.
    """

    image: NDArray[np.float32]
    """``(y, x)``, 0 to 1, exactly 0 far from tissue."""
    mask: NDArray[np.bool_]
    """Tissue ``(y, x)``."""
    origin: tuple[float, float]
    """Corner of the grid in the section's frame, um ``(x, y)``."""
    size: float
    """Micrometres per pixel."""
    frame: tuple[float, float]
    """Width and height of the whole image in um. Nothing is known beyond: tissue that ends there is cut."""
    seen: NDArray[np.bool_] | None = None
    """``(y, x)``: inside the image, where that is no rectangle from the origin (a section drawn in another frame)."""

    def in_frame(self, points: NDArray[np.float64]) -> NDArray[np.bool_]:
        """``(n,)`` bool: points ``(n, 2)``, um, inside the image."""
        if self.seen is None:
            inside = (points >= 0) & (points <= np.asarray(self.frame))
            return inside[:, 0] & inside[:, 1]
        col, row = np.floor((points - self.origin) / self.size).astype(int).T
        height, width = self.seen.shape
        inside = (row >= 0) & (row < height) & (col >= 0) & (col < width)
        inside[inside] = self.seen[row[inside], col[inside]]
        return inside

    def visible(self) -> NDArray[np.bool_]:
        """``(y, x)`` bool: pixels of the grid inside the image."""
        if self.seen is not None:
            return self.seen
        axes = [o + (np.arange(n) + 0.5) * self.size for o, n in zip(self.origin, self.image.shape[::-1], strict=True)]
        inside = [(axis > 0) & (axis < length) for axis, length in zip(axes, self.frame, strict=True)]
        return inside[1][:, None] & inside[0]

    def centres(self) -> NDArray[np.float64]:
        """Centres of the tissue pixels, ``(n, 2)`` as ``(x, y)`` in um."""
        rows, cols = np.nonzero(self.mask)
        return np.column_stack([cols, rows]) * self.size + (np.asarray(self.origin) + 0.5 * self.size)

    def to_index(self) -> NDArray[np.float64]:
        """``(3, 3)`` matrix from um ``(x, y, 1)`` to continuous array index ``(row, col, 1)``."""
        x0, y0 = self.origin
        step = 1 / self.size
        return np.array([[0, step, -y0 * step - 0.5], [step, 0, -x0 * step - 0.5], [0, 0, 1]])


def working_pixel(
    fixed: SectionImage, moving: SectionImage, params: RegistrationParams, *, side: int | None = None
) -> float:
    """Micrometres per working pixel of a pair, never finer than the thumbnails.

    The longer side of the larger tissue has `side` pixels, ``params.working_side`` by default.
    """
    boxes = np.array([fixed.tissue_box, moving.tissue_box])
    extent = float((boxes[:, 2:] - boxes[:, :2]).max())
    finest = max(min(fixed.pixel_size), min(moving.pixel_size), params.min_working_pixel)
    return max(extent / (side or params.working_side), finest)


def registration_channel(section: SectionImage, size: float, margin: float) -> Channel:
    """Summed optical density, from background (0) to the densest tissue (1), faded out just outside the tissue.

    Parameters
    ----------
    section
        Thumbnail with its tissue mask.
    size
        Working resolution, um per pixel.
    margin
        Width in um of the background kept around the tissue. The rest is cut off, so a small section in a large image
        costs no more than a cropped one.
    """
    channel = _on_grid(section, section.stain, size, margin)
    near = ndi.distance_transform_edt(~channel.mask, sampling=size) <= RIM
    soft = ndi.gaussian_filter(near.astype(np.float32), SOFT_EDGE)
    return replace(channel, image=channel.image * soft, mask=channel.mask & channel.visible())


def deformation_channel(section: SectionImage, size: float, margin: float) -> Channel:
    """Share of absorbed light, from background (0) to the darkest tissue (1), for the deformable fit.

    That fit uses details, and the logarithm of a density would amplify the noise of dark pixels. The fit itself fades out
    the background, because it knows the tissue of both sections.
    """
    channel = _on_grid(section, section.absorbed, size, margin)
    return replace(channel, mask=channel.mask & channel.visible())


def inside_only(channel: Channel) -> NDArray[np.float32]:
    """Image ``(y, x)`` without the outline: the tissue without its mixed rim, continued to the outside."""
    core = ndi.binary_erosion(channel.mask, iterations=_MIXED)
    core = core if core.any() else channel.mask
    nearest = ndi.distance_transform_edt(~core, return_distances=False, return_indices=True)
    return channel.image[tuple(nearest)]


def contrast(channel: Channel) -> NDArray[np.float32]:
    """Difference of each pixel ``(y, x)`` from its surroundings, divided by the local and the overall contrast together.

    The overall contrast is a floor: with the local contrast alone, a faint pattern would count as much as a strong one.
    """
    image = inside_only(channel).astype(float)
    mean = ndi.gaussian_filter(image, _SURROUNDINGS)
    variance = np.maximum(ndi.gaussian_filter(image**2, _SURROUNDINGS) - mean**2, 0.0)
    floor = max(float(image[channel.mask].var()), 1e-12)  # tissue without any contrast has none anywhere
    return ((image - mean) / np.sqrt(variance + floor)).astype(np.float32)


def shrink(channel: Channel, size: float) -> Channel:
    """Same channel on a coarser grid of about `size` um per pixel."""
    factor = max(1, round(size / channel.size))
    if factor == 1:
        return channel
    pad = [(0, -n % factor) for n in channel.image.shape]

    def mean(array: NDArray) -> NDArray:
        array = np.pad(array.astype(np.float32), pad)
        rows, cols = array.shape[0] // factor, array.shape[1] // factor
        return array.reshape(rows, factor, cols, factor).mean((1, 3))

    image, mask = mean(channel.image), mean(channel.mask) > 0.5
    seen = None if channel.seen is None else mean(channel.seen) > 0.5
    return replace(channel, image=image, mask=mask, size=channel.size * factor, seen=seen)


def _on_grid(section: SectionImage, image: NDArray[np.float32], size: float, margin: float) -> Channel:
    """Channel of an image of a section, 1 at its darkest tissue, on a grid with a margin (um) around the tissue."""
    darkest = float(np.percentile(image[section.tissue], _CLIP_PERCENTILE))
    image = np.clip(image / max(darkest, 1e-6), 0, 1)
    x0, y0, x1, y1 = section.tissue_box
    origin = (x0 - margin, y0 - margin)
    shape = tuple(int(np.ceil((length + 2 * margin) / size)) for length in (y1 - y0, x1 - x0))
    # Both are continued beyond the image: a tissue cut by the frame must not get an outline there.
    image = ndi.gaussian_filter(_resample(image, section.pixel_size, origin, shape, size), _BLUR)
    tissue = _resample(section.tissue, section.pixel_size, origin, shape, size) >= 0.5
    frame = (section.rgb.shape[1] * section.pixel_size[0], section.rgb.shape[0] * section.pixel_size[1])
    return Channel(image.astype(np.float32), tissue, origin, size, frame)


def _resample(
    image: NDArray,
    pixel_size: tuple[float, float],
    origin: tuple[float, float],
    shape: tuple[int, ...],
    size: float,
) -> NDArray[np.float32]:
    """Image on a grid of pixel `size` from `origin` (um), smoothed for the coarser grid."""
    steps = [size / s for s in (pixel_size[1], pixel_size[0])]
    image = image.astype(np.float32, copy=False)
    # A box of `step` pixels has a standard deviation of step / sqrt(12); linear interpolation smooths a little as well.
    sigma = [np.sqrt(max(step**2 - 1, 0) / 12) for step in steps]
    if max(sigma) > 0:
        image = ndi.gaussian_filter(image, sigma, mode="nearest")
    offset = [(origin[1] + 0.5 * size) / pixel_size[1] - 0.5, (origin[0] + 0.5 * size) / pixel_size[0] - 0.5]
    return ndi.affine_transform(image, np.diag(steps), offset, output_shape=shape, order=1, mode="nearest")
