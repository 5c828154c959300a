"""Sections resampled on one grid for overlays and checkerboards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage as ndi

from spatial_impute._geometry import apply_affine
from spatial_impute._image.levels import read_thumbnail
from spatial_impute._image.tissue import optical_density, tissue_mask
from spatial_impute._registration.quality import dice
from spatial_impute._registration.transform import SectionTransform
from spatial_impute._stack.elements import load_transform, require_registration, section_levels
from spatial_impute.pl._figure import sections_in_z

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from spatialdata import SpatialData

    from spatial_impute._image.levels import Level
    from spatial_impute._stack.record import Section, StackRecord

    Sampler = Callable[[np.ndarray, float], np.ndarray]

_PIXELS = 600  # along the longer side of a panel: sharp at 200 dots per inch
_CLIP_PERCENTILE = 99.0  # within tissue: folds and ink must not set the scale
_BLUR = 10.0  # um, the size of a nucleus: serial sections share structure, not single nuclei
_FULL_INK = 0.85  # of the densest tissue: colors still differ where both are dense


@dataclass(frozen=True)
class Scan:
    """One section at the resolution of the plot."""

    rgb: np.ndarray  # (y, x, 3) in 0-255, white background
    stain: np.ndarray  # (y, x) 0-1, 0 outside the tissue
    mask: np.ndarray
    to_um: np.ndarray

    def tissue_corners(self, matrix: np.ndarray) -> np.ndarray:
        """(2, 2) lowest and highest x, y of the tissue after `matrix`, um; of the image if there is no tissue."""
        y, x = np.nonzero(self.mask if self.mask.any() else np.ones_like(self.mask))
        points = apply_affine(np.column_stack([x, y]) + 0.5, matrix @ self.to_um)
        return np.array([points.min(axis=0), points.max(axis=0)])


def read_picture(levels: list[Level], resolution: float | None, n_pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """RGB (y, x, 3) at `resolution` um per pixel, or with `n_pixels` along its longer side, and its affine to um."""
    return read_thumbnail(levels, resolution or max(levels[0].shape) * levels[0].pixel_size / n_pixels)


def read_scan(levels: list[Level], resolution: float | None) -> Scan:
    """Read a section, by default 600 pixels along its longer side, else at `resolution` um per pixel."""
    rgb, to_um = read_picture(levels, resolution, _PIXELS)
    size_x, size_y = np.linalg.norm(to_um[:2, :2], axis=0)
    mask = tissue_mask(rgb, (size_x, size_y))
    density = optical_density(rgb)
    stain = ndi.gaussian_filter(density.sum(axis=-1), (_BLUR / size_y, _BLUR / size_x))
    densest = np.percentile(stain[mask], _CLIP_PERCENTILE) if mask.any() else 1.0
    return Scan(_on_white(density), _FULL_INK * np.clip(stain / max(densest, 1e-6), 0, 1) * mask, mask, to_um)


def _on_white(density: np.ndarray) -> np.ndarray:
    """(y, x, 3) in 0-255. Background of any tint is white; else the tiles of a checkerboard would show outside the tissue."""
    return 255.0 * np.exp(-density)


@dataclass(frozen=True)
class Drawn:
    """A section resampled on the canvas."""

    rgb: np.ndarray
    stain: np.ndarray
    mask: np.ndarray
    seen: np.ndarray  # (y, x) bool: inside the image


@dataclass(frozen=True)
class Canvas:
    """Common grid of all panels in the frame of the reference."""

    x0: float
    y0: float
    width: float
    height: float
    pixel: float

    @classmethod
    def around(cls, points: np.ndarray) -> Canvas:
        low, high = points.min(axis=0), points.max(axis=0)
        margin = 0.03 * (high - low).max()
        width, height = high - low + 2 * margin
        return cls(low[0] - margin, low[1] - margin, width, height, max(width, height) / _PIXELS)

    @property
    def limits(self) -> tuple[float, float, float, float]:
        return self.x0, self.y0, self.x0 + self.width, self.y0 + self.height

    @property
    def shape(self) -> tuple[int, int]:
        return int(np.ceil(self.height / self.pixel)), int(np.ceil(self.width / self.pixel))

    @property
    def to_um(self) -> np.ndarray:
        return np.array([[self.pixel, 0, self.x0], [0, self.pixel, self.y0], [0, 0, 1.0]])

    def draw(self, scan: Scan, place: SectionTransform) -> Drawn:
        """Resample a section at its place in the frame of the reference."""
        sample = self.sampler(scan.to_um, place)
        mask, everywhere = scan.mask.astype(np.float32), np.ones(scan.mask.shape, dtype=np.float32)
        parts = sample(scan.stain, 0.0), sample(mask, 0.0) > 0.5, sample(everywhere, 0.0) > 0.5
        return Drawn(_sample_rgb(scan.rgb, sample), *parts)

    def sampler(self, to_um: np.ndarray, place: SectionTransform) -> Sampler:
        """Function that resamples an image, given its affine to um; its second argument is the value outside."""
        if place.deforms:
            rows, columns = np.indices(self.shape).reshape(2, -1) + 0.5
            points = place.inverse(apply_affine(np.column_stack([columns, rows]), self.to_um))
            x, y = apply_affine(points, np.linalg.inv(to_um)).T - 0.5
            return lambda image, cval: ndi.map_coordinates(image, [y, x], order=1, cval=cval).reshape(self.shape)
        half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1.0]])  # from indices to pixel corners
        to_scan = np.linalg.inv(half) @ np.linalg.inv(place.matrix @ to_um) @ self.to_um @ half
        affine = to_scan[:2, :2][::-1, ::-1], to_scan[:2, 2][::-1]  # x, y to array axes
        return lambda image, cval: ndi.affine_transform(image, *affine, output_shape=self.shape, order=1, cval=cval)

    def checkerboard(self, first: Drawn, second: Drawn, tile: float) -> np.ndarray:
        """Alternate tiles of edge `tile` (um) from both sections."""
        y, x = ((np.arange(n) + 0.5) * self.pixel // tile for n in self.shape)
        odd = (y[:, None] + x) % 2 == 1
        return np.where(odd[..., None], second.rgb, first.rgb)


def on_reference(
    sdata: SpatialData, record: StackRecord, sections: list[Section], resolution: float | None
) -> tuple[Canvas, Drawn, list[tuple[Drawn, Drawn]]]:
    """Canvas around reference and sections, the reference on it, and each section before and after registration."""
    transforms = [load_transform(sdata, record, section.name) for section in sections]
    fixed, still = read_scan(section_levels(sdata, record[record.reference]), resolution), SectionTransform(np.eye(3))
    scans = [read_scan(section_levels(sdata, section), resolution) for section in sections]
    corners = [fixed.tissue_corners(np.eye(3))]
    for scan, transform in zip(scans, transforms, strict=True):
        corners += [scan.tissue_corners(np.eye(3)), scan.tissue_corners(transform.matrix)]
    canvas = Canvas.around(np.concatenate(corners))
    drawn = [
        (canvas.draw(scan, still), canvas.draw(scan, place)) for scan, place in zip(scans, transforms, strict=True)
    ]
    return canvas, canvas.draw(fixed, still), drawn


def compared_sections(
    record: StackRecord, sections: str | Sequence[str] | None, registered: Collection[str]
) -> list[Section]:
    """Sections to compare with the reference, from the lowest to the highest; all `registered` ones by default."""
    found = [section for section in sections_in_z(record, sections) if section.name != record.reference]
    found = [section for section in found if sections is not None or section.name in registered]
    if not found:
        others = [name for name in record.names if name != record.reference]
        then = f"`sections` must name some of {others}" if others else "the stack has no other section"
        msg = f"Nothing to compare with the reference {record.reference!r}; {then}."
        raise ValueError(msg)
    return found


def images_on_canvas(
    sdata: SpatialData, record: StackRecord, sections: list[Section], canvas: Canvas
) -> list[np.ndarray]:
    """(y, x, 3) H&E of each section on the canvas; white where nothing places a section in the common frame."""
    placed = require_registration(record)["sections"]
    found = []
    for section in sections:
        if section.name in placed:
            rgb, to_um = read_thumbnail(section_levels(sdata, section), canvas.pixel)
            sample = canvas.sampler(to_um, load_transform(sdata, record, section.name))
            found.append(_sample_rgb(_on_white(optical_density(rgb)), sample))
        else:
            found.append(np.full((1, 1, 3), 255.0))
    return found


def _sample_rgb(rgb: np.ndarray, sample: Sampler) -> np.ndarray:
    return np.stack([sample(channel, 255.0) for channel in np.moveaxis(rgb, -1, 0)], axis=-1)


def overlay(reference: Drawn, moved: Drawn) -> np.ndarray:
    """Inks on white paper: magenta takes away green light, green takes away red and blue."""
    return 255.0 * (1 - np.stack([moved.stain, reference.stain, moved.stain], axis=-1))


def tissue_dice(first: Drawn, second: Drawn) -> float:
    """Dice coefficient of the two tissues inside both images."""
    seen = first.seen & second.seen
    first_mask, second_mask = first.mask & seen, second.mask & seen
    return dice(float((first_mask & second_mask).sum()), float(first_mask.sum()), float(second_mask.sum()))
