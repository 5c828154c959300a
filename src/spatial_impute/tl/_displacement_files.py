"""Displacement fields of ITK and ANTs as places of sections, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from spatial_impute._geometry import apply_affine
from spatial_impute._registration import SectionTransform
from spatial_impute.tl._given_transforms import landmark_matrix

if TYPE_CHECKING:
    from pathlib import Path

    from spatial_impute._image.levels import Level

FIELDS = (".nii", ".nii.gz", ".nrrd")
_COARSE = 16  # pixels along the image for a place without deformation: between them it is linear
_ROUNDS = 30  # of the inversion; a deformation without folds needs fewer


def read_field(path: Path, units: tuple[float, float]) -> SectionTransform:
    """Place from a field that leads from points of the reference all the way to the section; `units` are um per unit.

    The matrix that fits the whole field best becomes the affine part, and the rest the deformation.
    """
    import ants

    image = ants.image_read(str(path))
    if image.dimension != 2 or image.components != 2 or not np.allclose(image.direction, np.eye(2)):
        msg = f"it has {image.dimension} dimensions, {image.components} values per pixel and the direction {image.direction.tolist()}."
        raise ValueError(msg)
    size, first = np.array(image.spacing), np.array(image.origin)
    shape = np.array(image.shape)
    index = np.stack(np.meshgrid(*map(np.arange, shape)), axis=-1).reshape(-1, 2)
    reference = first + index * size
    section = (reference + image.numpy()[index[:, 0], index[:, 1]]) * units[0]
    reference = reference * units[1]
    matrix = landmark_matrix(section, reference, "affine")
    pull = (apply_affine(section, matrix) - reference).reshape(*shape[::-1], 2).astype(np.float32)
    corner = (first - 0.5 * size) * units[1]
    grid = np.array([[size[0] * units[1], 0, corner[0]], [0, size[1] * units[1], corner[1]], [0, 0, 1.0]])
    push = np.zeros_like(pull)
    for _ in range(_ROUNDS):  # a point that was pushed is pulled to its old place
        back = SectionTransform(np.eye(3), pull, push, grid).inverse(reference + push.reshape(-1, 2))
        push -= (back - reference).reshape(push.shape).astype(np.float32)
    return SectionTransform(matrix, pull, push, grid)


def write_field(path: Path, transform: SectionTransform, reference: Level) -> None:
    """Write the way from points of the reference image to the section, in um, affine part included."""
    import ants

    height, width = reference.shape
    corners = apply_affine(np.array([[0, 0], [width, 0], [0, height], [width, height]], float), reference.to_um)
    low, extent = corners.min(axis=0), np.ptp(corners, axis=0)
    step = extent.max() / _COARSE
    if transform.grid is not None:
        step = min(step, float(np.linalg.norm(transform.grid[:2, 0])))
    shape = np.ceil(extent / step).astype(int)
    first = low + 0.5 * step
    points = first + np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1).reshape(-1, 2) * step
    field = (transform.inverse(points) - points).reshape(*shape, 2).astype(np.float32)
    image = ants.from_numpy(field, origin=tuple(first), spacing=(step, step), has_components=True)
    ants.image_write(image, str(path))
