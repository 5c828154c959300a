"""The whole way of one section into the common frame: a matrix and, on top of it, perhaps a deformation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage as ndi

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from spatial_impute._registration.displacement import DisplacementField


@dataclass(frozen=True, slots=True, eq=False)
class SectionTransform:
    """Where every point of a section lies in the common frame, and back. Lengths are um.

    Points and images use the same object, so that they cannot part.
    """

    matrix: NDArray[np.float64]
    """``(3, 3)``: points of the section to the common frame; with a deformation, to where that takes over."""
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
        """Matrix and field of a registration whose fixed frame `to_common` ``(3, 3)`` carries to the common one."""
        if field is None:
            return cls(np.asarray(matrix, float))
        (x0, y0), size = field.origin, field.size
        grid = to_common @ np.array([[size, 0, x0], [0, size, y0], [0, 0, 1.0]])
        turn = to_common[:2, :2].T.astype(np.float32)
        return cls(np.asarray(matrix, float), field.pull @ turn, field.push @ turn, grid)

    @property
    def deforms(self) -> bool:
        """Whether there is a deformation."""
        return self.grid is not None

    def points(self, points: ArrayLike) -> NDArray[np.float64]:
        """Points ``(n, 2)`` of the section in the common frame."""
        points = np.asarray(points, float).reshape(-1, 2)
        return self._moved(points @ self.matrix[:2, :2].T + self.matrix[:2, 2], self.push)

    def inverse(self, points: ArrayLike) -> NDArray[np.float64]:
        """Points ``(n, 2)`` of the common frame in the section: where an image has to be sampled."""
        points = self._moved(np.asarray(points, float).reshape(-1, 2), self.pull)
        back = np.linalg.inv(self.matrix)
        return points @ back[:2, :2].T + back[:2, 2]

    def _moved(self, points: NDArray[np.float64], displacement: NDArray | None) -> NDArray[np.float64]:
        if displacement is None:
            return points
        back = np.linalg.inv(self.grid)
        x, y = (points @ back[:2, :2].T + back[:2, 2]).T
        # Outside the grid there is no deformation; at its edge the fields have come down to 0.
        shift = [
            ndi.map_coordinates(displacement[..., k], [y - 0.5, x - 0.5], order=1, mode="constant", output=float)
            for k in (0, 1)
        ]
        return points + np.column_stack(shift)
