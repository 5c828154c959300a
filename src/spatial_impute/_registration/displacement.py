"""Displacement fields: the non-linear part of a registration, on top of a matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage as ndi

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


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
        shift = [ndi.map_coordinates(field[..., k], [row, col], order=1, mode="constant", output=float) for k in (0, 1)]
        return points + np.column_stack(shift)
