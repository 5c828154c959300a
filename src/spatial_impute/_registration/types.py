"""Inputs, settings and results of a registration, and the images that it compares.

Lengths are micrometres. Matrices are 3x3 and act on columns ``(x, y, 1)``.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, cast

import numpy as np
from pydantic import Field, field_validator
from scipy import ndimage as ndi

from spatial_impute._geometry import lies_on
from spatial_impute._image.levels import area_means
from spatial_impute._image.tissue import optical_density, tissue_mask
from spatial_impute._validation import Count, Flag, Natural, Number, Positive, Share, Whole, settings_class

if TYPE_CHECKING:
    from numpy.typing import NDArray


Iterations = Annotated[
    tuple[Natural, Natural, Natural, Natural], Field(description="four whole numbers of at least 0, not all zero")
]
_Sigma = Annotated[Number, Field(ge=0)]
Smoothing = Annotated[
    tuple[tuple[_Sigma, _Sigma], ...], Field(min_length=1, description="pairs of numbers of at least 0")
]
AreaLimits = Annotated[
    tuple[Annotated[Number, Field(gt=0, lt=1)], Annotated[Number, Field(gt=1)]],
    Field(description="a number between 0 and 1 and a number above 1"),
]


@settings_class
class RegistrationParams:
    """Advanced settings of the registration of a pair of sections."""

    working_side: Annotated[Whole, Field(ge=64)] = 320
    """Longer side, in pixels, of the tissue at the working resolution. Finer brings no measurable gain."""
    min_working_pixel: Positive = 2.0
    """Finest working resolution in um per pixel. Below a nucleus, serial sections do not show the same objects."""
    search_side: Annotated[Whole, Field(ge=32)] = 160
    """Longer side, in pixels, of the tissue in the search for the orientation."""
    n_angles: Annotated[Whole, Field(ge=4)] = 36
    """Number of rotations to try, evenly spread over 360 degrees."""
    allow_mirror: Flag = True
    """Also try mirror images: a section may lie upside down on its slide."""
    n_candidates: Count = 6
    """Number of distinct orientations refined before the best one is chosen."""
    linear_iterations: Iterations = (200, 200, 100, 50)
    """Iterations of the linear fits at 8, 4, 2 and 1 times the working pixel; candidates are compared after two."""
    syn_iterations: Iterations = (100, 70, 50, 0)
    """Iterations of the deformable fit at 8, 4, 2 and 1 times the working pixel."""
    syn_radius: Positive = 50.0
    """Half side in um of the window in which the deformable fit correlates (4 pixels at most): above a cell, below a
    region."""
    syn_side: Annotated[Whole, Field(ge=64)] = 320
    """Longer side, in pixels, of the tissue in the deformable fit. On HER2ST a finer grid follows structures that two
    sections do not share. 640 is more exact for sections with the same structures (two stains of neighboring thin
    sections), and takes at least four times as long."""
    syn_smoothing: Smoothing = ((6.0, 3.0), (6.0, 1.0))
    """Smoothing of the update and of the total field in the deformable fit, working pixels, from stiff to soft.

    The first fit uses the first pair and mutual information alone; with contrast it is two or four times as stiff. The
    next fits add local correlation. They are used only if they are better on tissue that was held out of the fit.
    """
    jacobian_limits: AreaLimits = (0.5, 2.0)
    """Local change of area in tissue beyond which a deformable fit is discarded."""
    max_displacement: Positive = 250.0
    """Largest displacement in um to be expected. The deformable fit includes a rim of background of this width, so that
    outlines can match."""
    max_scale: Annotated[Number, Field(gt=1)] = 1.18
    """Largest stretch of an accepted affine fit, and the inverse of its largest shrinkage."""
    mask_margin: Positive = 100.0
    """Width in um of the rim of background around the tissue that the fit includes, so that outlines count."""
    min_score: Share = 0.35
    """Structure score below which the verdict is "weak". Wrong orientations of real sections reach 0.37."""
    min_margin: Share = 0.08
    """Lead of the chosen pose over the best other one, below which the verdict is "weak"."""
    min_dice: Share = 0.9
    """Overlap of the tissue masks (Dice) below which the verdict is "weak"."""
    failed_dice: Share = 0.8
    """Overlap of the tissue masks below which the verdict is "failed", unless `partial_tissue`."""
    max_error: Positive = 120.0
    """Expected error in um above which the verdict is "weak": the size of a spot of an ST array (100 um) and a fifth, because
    the expected error is an upper bound."""
    partial_tissue: Flag = False
    """Accept sections without a large part of their tissue. A low overlap is then "weak", never "failed"."""
    max_chain_disagreement: Positive = 50.0
    """Largest distance in um between chained and direct registration for which the chain is used."""

    @field_validator("linear_iterations", "syn_iterations")
    @classmethod
    def _require_iterations(cls, found: tuple[int, ...]) -> tuple[int, ...]:
        if not any(found):
            msg = f"must not be zero at all four resolutions, found {found}."
            raise ValueError(msg)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class SectionImage:
    """Thumbnail of one section.

    The frame of a section has its origin at the corner of the image: the centre of pixel ``i`` lies at
    ``(i + 0.5) * size``.
    """

    rgb: NDArray
    """Image ``(y, x)``, ``(y, x, 3)`` or ``(y, x, 4)``, any numeric type."""
    pixel_size: tuple[float, float]
    """Micrometres per thumbnail pixel, ``(x, y)``."""
    mask: NDArray[np.bool_] | None = None
    """Tissue mask ``(y, x)``. None: found by :func:`~spatial_impute._image.tissue.tissue_mask`."""
    stain: NDArray[np.float32] = dataclasses.field(init=False)
    """Optical density ``(y, x)``, summed over the colors. Every pair of the section uses it."""
    absorbed: NDArray[np.float32] = dataclasses.field(init=False)
    """Share of the light ``(y, x)`` that is absorbed."""

    def __post_init__(self) -> None:
        rgb = np.asarray(self.rgb)
        if rgb.ndim not in (2, 3) or min(rgb.shape[:2]) < _MIN_PIXELS:
            msg = (
                f"Expected a thumbnail of shape (y, x, 3) with at least {_MIN_PIXELS} pixels a side, found shape "
                f"{rgb.shape}. Give a finer pyramid level of the image."
            )
            raise ValueError(msg)
        if not np.issubdtype(rgb.dtype, np.number) or not np.isfinite(rgb).all():
            msg = (
                f"Expected a numeric image without NaN or infinity, found non-finite values or a non-numeric "
                f"type (dtype {rgb.dtype}). Fill missing pixels with the background color."
            )
            raise ValueError(msg)
        x, y = (float(s) for s in np.broadcast_to(np.asarray(self.pixel_size, float), 2))
        size = (x, y)
        if not all(math.isfinite(s) and s > 0 for s in size):
            msg = f"`pixel_size` must be two positive numbers (um per pixel in x and y), found {self.pixel_size!r}."
            raise ValueError(msg)
        mask = tissue_mask(rgb, size) if self.mask is None else np.asarray(self.mask, bool)
        if mask.shape != rgb.shape[:2]:
            msg = f"The tissue mask has shape {mask.shape}, the image {rgb.shape[:2]}; they must be equal."
            raise ValueError(msg)
        if not mask.any():
            msg = (
                "No tissue found: the image is blank, the mask is empty, or pale tissue fills the image, so that there is no "
                "glass to compare it with. Check that this is the right image, leave the section out, or give its tissue as a mask."
            )
            raise ValueError(msg)
        density = optical_density(rgb)
        stain, absorbed = density.sum(-1), 1 - np.exp(-density).mean(-1)
        found = {"rgb": rgb, "pixel_size": size, "mask": mask, "stain": stain, "absorbed": absorbed}
        for name, value in found.items():
            object.__setattr__(self, name, value)

    @property
    def tissue(self) -> NDArray[np.bool_]:
        """Tissue mask ``(y, x)``, given or found."""
        return cast("NDArray[np.bool_]", self.mask)

    @property
    def tissue_area(self) -> float:
        """Area of the tissue mask in square um."""
        return float(np.count_nonzero(self.tissue)) * self.pixel_size[0] * self.pixel_size[1]

    @property
    def tissue_box(self) -> tuple[float, float, float, float]:
        """Bounding box of the tissue in um: ``(x0, y0, x1, y1)``."""
        rows, cols = np.flatnonzero(self.tissue.any(1)), np.flatnonzero(self.tissue.any(0))
        size_x, size_y = self.pixel_size
        right, bottom = float((cols[-1] + 1) * size_x), float((rows[-1] + 1) * size_y)
        return float(cols[0] * size_x), float(rows[0] * size_y), right, bottom


_MIN_PIXELS = 16  # a section of fewer pixels a side shows no structure to register


@dataclass(frozen=True, slots=True, eq=False)
class PairResult:
    """Registration of one section (moving) to another (fixed)."""

    matrix: NDArray[np.float64]
    """``(3, 3)``: points of the moving frame to the fixed frame, um."""
    method: str
    """Method of the result. It may be simpler than the requested one; `quality` says why."""
    quality: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Plain floats, booleans, strings and lists of strings; ready for JSON."""
    moving_box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    """Bounding box of the moving tissue in its own frame, um: ``(x0, y0, x1, y1)``."""

    @property
    def verdict(self) -> str:
        """``"ok"``, ``"weak"`` or ``"failed"``."""
        return self.quality.get("verdict", "failed")


@dataclass(frozen=True, slots=True, eq=False)
class ChainResult:
    """Placement of one section in the frame of the reference."""

    matrix: NDArray[np.float64]
    """``(3, 3)``: points of the section's frame to the reference frame, um."""
    path: tuple[str, ...]
    """Sections from this one to the reference, both included; each step is one pair."""
    route: str
    """``"reference"``, ``"sequential"`` (through the neighbors), ``"direct"`` or ``"given"`` (not registered)."""
    score: float
    """Structure score of the weakest pair on the path."""
    verdict: str
    """``"ok"``, ``"weak"`` or ``"failed"``: the worst pair on the path."""
    disagreement: float | None = None
    """Distance in um to the best other placement, mostly the direct one (root mean square); None without another."""
    confirmed: bool = False
    """True if a sound registration to the reference itself agrees."""
    reasons: list[str] = dataclasses.field(default_factory=list)
    """Remarks on this section, one sentence each."""


_CLIP_PERCENTILE = 99.0  # within tissue: folds and ink must not set the scale
_BLUR = 1.0  # working pixels: removes pixel noise, which differs between sections
SOFT_EDGE = 1.0  # working pixels: a hard edge would alias under rotation
_MIXED = 2  # working pixels at the outline that the blur mixes with glass
# Working pixels, a 40th of a section, the scale of the regions that serial sections share: their contrast is what is set
# against that of the whole tissue. Half of it found longer bends less often, twice as much moved pale cortex again.
_SURROUNDINGS = 8.0
RIM = 50.0  # um of background that is kept around the tissue: the outline comes from the image, not from the mask


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
        return lies_on(self.seen, (points - self.origin) / self.size)

    def visible(self) -> NDArray[np.bool_]:
        """``(y, x)`` bool: pixels of the grid inside the image."""
        if self.seen is not None:
            return self.seen
        axes = [o + (np.arange(n) + 0.5) * self.size for o, n in zip(self.origin, self.image.shape[::-1], strict=True)]
        inside = [(axis > 0) & (axis < length) for axis, length in zip(axes, self.frame, strict=True)]
        return inside[1][:, None] & inside[0]

    def centres(self, pixels: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
        """Centres of the tissue, or of other `pixels` ``(y, x)``, row by row, ``(n, 2)`` as ``(x, y)`` in um."""
        rows, cols = np.nonzero(self.mask if pixels is None else pixels)
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

    `size` is in um per pixel, `margin` the width in um of the background around the tissue. The rest is cut off, so a
    small section in a large image costs no more than a cropped one.
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
        return area_means(np.pad(array.astype(np.float32), pad), factor, factor)

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
