"""Transforms of sections: a matrix and, on top of it, a displacement field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
from scipy import ndimage as ndi

from spatial_impute._geometry import apply_affine

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


class PullBack(Protocol):
    """Deformation, as images are sampled through it."""

    def pulled(self, points: ArrayLike) -> NDArray[np.float64]:
        """Points ``(n, 2)`` of the fixed frame, um, moved to where the aligned image is sampled."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class DisplacementField:
    """Displacements in um on a grid in the frame of the fixed section; 0 outside the grid.

    Pixel ``(row, col)`` is centred at ``origin + (col + 0.5, row + 0.5) * size``.
    """

    pull: NDArray[np.float32]
    """``(y, x, 2)`` as ``(dx, dy)``: from a point of the fixed section to the aligned moving one: for images."""
    push: NDArray[np.float32]
    """``(y, x, 2)``: from a point of the moving section, aligned by the matrix, to the fixed one. For points."""
    origin: tuple[float, float]
    """Corner of the grid, um ``(x, y)``."""
    size: float
    """Micrometres per pixel."""

    def pulled(self, points: ArrayLike) -> NDArray[np.float64]:
        """Points ``(n, 2)`` of the fixed frame, um, moved by :attr:`pull`."""
        return self._moved(points, self.pull)

    def pushed(self, points: ArrayLike) -> NDArray[np.float64]:
        """Matrix-aligned points ``(n, 2)``, um, moved by :attr:`push`."""
        return self._moved(points, self.push)

    def jacobian(self) -> NDArray[np.float64]:
        """Local change of area ``(y, x)`` of the pull-back; 0 or below where the map folds."""
        (xx, xy), (yx, yy) = (
            [np.gradient(self.pull[..., k].astype(float), self.size, axis=axis) for axis in (1, 0)] for k in (0, 1)
        )
        return (1 + xx) * (1 + yy) - xy * yx

    def _moved(self, points: ArrayLike, field: NDArray) -> NDArray[np.float64]:
        points = np.asarray(points, float).reshape(-1, 2)
        col, row = ((points - self.origin) / self.size - 0.5).T
        return points + _sample(field, row, col)


def _sample(field: NDArray, row: NDArray, column: NDArray) -> NDArray[np.float64]:
    """Displacements ``(n, 2)`` at array positions; 0 outside the grid."""
    where = [row, column]
    return np.column_stack(
        [ndi.map_coordinates(field[..., k], where, order=1, mode="constant", output=float) for k in (0, 1)]
    )


@dataclass(frozen=True, slots=True, eq=False)
class SectionTransform:
    """Map of a section to the common frame and back, in um, for points and for images."""

    matrix: NDArray[np.float64]
    """``(3, 3)``: points of the section to the common frame, before the deformation."""
    pull: NDArray[np.float32] | None = None
    """``(y, x, 2)`` as ``(dx, dy)``: from a point of the common frame to the one before the deformation: for images."""
    push: NDArray[np.float32] | None = None
    """``(y, x, 2)``: from a point placed by the matrix to the deformed one: for points."""
    grid: NDArray[np.float64] | None = None
    """``(3, 3)``: from pixel corners ``(x, y)`` of the displacements to the common frame."""

    @classmethod
    def from_field(
        cls, matrix: NDArray[np.float64], field: DisplacementField | None, to_common: NDArray[np.float64]
    ) -> SectionTransform:
        """Transform from a matrix and a field in the fixed frame; `to_common` ``(3, 3)`` maps that frame to the common one."""
        if field is None:
            return cls(np.asarray(matrix, float))
        (x0, y0), size = field.origin, field.size
        grid = to_common @ np.array([[size, 0, x0], [0, size, y0], [0, 0, 1.0]])
        turn = to_common[:2, :2].T.astype(np.float32)
        return cls(np.asarray(matrix, float), field.pull @ turn, field.push @ turn, grid)

    @property
    def deforms(self) -> bool:
        """True if the transform has a deformation."""
        return self.grid is not None

    def points(self, points: ArrayLike) -> NDArray[np.float64]:
        """Points ``(n, 2)`` of the section in the common frame."""
        points = np.asarray(points, float).reshape(-1, 2)
        return self._moved(apply_affine(points, self.matrix), self.push)

    def inverse(self, points: ArrayLike) -> NDArray[np.float64]:
        """Points ``(n, 2)`` of the common frame in the section, where its image is sampled."""
        return apply_affine(self.pulled(points), np.linalg.inv(self.matrix))

    def pulled(self, points: ArrayLike) -> NDArray[np.float64]:
        """Points ``(n, 2)`` of the common frame, before the deformation."""
        return self._moved(np.asarray(points, float).reshape(-1, 2), self.pull)

    def _moved(self, points: NDArray[np.float64], displacement: NDArray | None) -> NDArray[np.float64]:
        if displacement is None:
            return points
        x, y = apply_affine(points, np.linalg.inv(cast("NDArray", self.grid))).T
        return points + _sample(displacement, y - 0.5, x - 0.5)


@dataclass(frozen=True, slots=True, eq=False)
class KeptDeformation:
    """Deformation of a section whose place is given, in another frame than the common one."""

    transform: SectionTransform
    to_common: NDArray[np.float64]
    """``(3, 3)``: from that frame to the common one."""

    def pulled(self, points: ArrayLike) -> NDArray[np.float64]:
        """Points ``(n, 2)`` of that frame, before the deformation."""
        points = apply_affine(np.asarray(points, float).reshape(-1, 2), self.to_common)
        return apply_affine(self.transform.pulled(points), np.linalg.inv(self.to_common))
