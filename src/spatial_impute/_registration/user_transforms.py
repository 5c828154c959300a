"""Matrices and landmarks that the user gives for a section."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_MIN_SPREAD = 1e-3  # of the longer extent of the landmarks: thinner clouds fix no second direction


def landmark_matrix(moving: ArrayLike, fixed: ArrayLike, kind: str) -> NDArray[np.float64]:
    """Least-squares matrix ``(3, 3)`` that carries landmarks ``(n, 2)``, um, of one section to those of another.

    Parameters
    ----------
    moving, fixed
        The same landmarks in both sections, in the same order.
    kind
        ``"rigid"``: rotation, shift, and mirror where that fits better. ``"affine"``: needs three landmarks or more.
        Two landmarks give a rotation and a shift in any case.

    Raises
    ------
    ValueError
        If there are fewer than two, numbers differ, or they lie on one point or (three or more) on one line.
    """
    moving, fixed = _checked(moving, fixed)
    matrix = np.eye(3)
    centres = moving.mean(axis=0), fixed.mean(axis=0)
    centred = moving - centres[0], fixed - centres[1]
    if kind == "affine" and len(moving) > 2:
        linear = np.linalg.lstsq(centred[0], centred[1], rcond=None)[0].T
    else:
        u, _, vt = np.linalg.svd(centred[0].T @ centred[1])
        linear = (u @ vt).T
        if len(moving) == 2 and np.linalg.det(linear) < 0:  # two points fit both faces; the section lies face up
            linear = (u @ np.diag([1.0, -1.0]) @ vt).T
    matrix[:2, :2] = linear
    matrix[:2, 2] = centres[1] - linear @ centres[0]
    return matrix


def _checked(moving: ArrayLike, fixed: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Landmarks as two arrays (n, 2) that fix a transform."""
    moving, fixed = np.asarray(moving, float), np.asarray(fixed, float)
    if moving.ndim != 2 or moving.shape[-1] != 2 or moving.shape != fixed.shape or len(moving) < 2:
        msg = (
            "Landmarks must be two arrays (n, 2) of x, y in um with the same n >= 2, first in the section, then in the "
            f"reference; found shapes {moving.shape} and {fixed.shape}."
        )
        raise ValueError(msg)
    if not (np.isfinite(moving).all() and np.isfinite(fixed).all()):
        msg = "Landmarks must be finite."
        raise ValueError(msg)
    for points in (moving, fixed):
        spread = np.linalg.svd(points - points.mean(axis=0), compute_uv=False)
        if spread[0] == 0 or (len(points) > 2 and spread[1] < _MIN_SPREAD * spread[0]):
            msg = "Landmarks must not coincide or lie on one line: such landmarks do not determine the placement."
            raise ValueError(msg)
    return moving, fixed


def check_matrix(matrix: ArrayLike) -> NDArray[np.float64]:
    """Invertible affine matrix ``(3, 3)``.

    Raises
    ------
    ValueError
        If it is none.
    """
    found = np.asarray(matrix, float)
    if (
        found.shape != (3, 3)
        or not np.isfinite(found).all()
        or not np.allclose(found[2], [0, 0, 1])
        or abs(np.linalg.det(found[:2, :2])) < 1e-6
    ):
        msg = f"Expected an invertible (3, 3) affine matrix of x, y in um with last row 0, 0, 1; found {matrix!r}."
        raise ValueError(msg)
    return found
