"""Place of a section from layers of napari that were dragged, or that hold landmarks."""

from __future__ import annotations

from typing import Any

import numpy as np

from spatial_impute._geometry import exchanged_axes
from spatial_impute._keys import Keys
from spatial_impute._validation import require_key


def read_placement(viewer: Any, section: str) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Read the place of a section from the window of :func:`spatial_impute.pl.place_by_hand`.

    Parameters
    ----------
    viewer
        Viewer of napari, after a section was dragged or landmarks were clicked.
    section
        Name of the section.

    Returns
    -------
    If there are landmarks: two arrays (n, 2), x and y in um, in the section and in the reference. Else the (3, 3) matrix from the
    section to the reference to which the image was dragged (or the reference under it). Both are taken by
    ``register_stack(transformations={section: place})``, and by ``initial`` as a start.

    Raises
    ------
    TypeError
        If `viewer` is no viewer.
    KeyError
        If the viewer has no layers of this section.
    ValueError
        If the section and the reference have different numbers of landmarks, or only one each, or `section` is the reference.

    Examples
    --------
    See :func:`spatial_impute.pl.place_by_hand`.
    """
    if not hasattr(viewer, "layers"):
        msg = f"`viewer` must be the viewer that `si.pl.place_by_hand` returned, found {viewer!r}."
        raise TypeError(msg)
    layers = {layer.name: layer for layer in viewer.layers}
    there = "Open the viewer with `si.pl.place_by_hand(sdata, section)`."
    require_key(section, layers, where="the layers of the viewer", then=there)
    image = layers[section]
    require_key("reference", image.metadata, where=f"the metadata of the layer {section!r}", then=there)
    reference = image.metadata["reference"]
    if section == reference:
        msg = f"`section` must not be the reference {section!r}, which does not move. Name the section that was placed on it."
        raise ValueError(msg)
    require_key(reference, layers, where="the layers of the viewer", then=there)
    points = []
    for name in (section, reference):
        require_key(Keys.landmarks(name), layers, where="the layers of the viewer", then=there)
        points.append(np.asarray(layers[Keys.landmarks(name)].data, float).reshape(-1, 2)[:, ::-1])
    in_section, in_reference = points
    if len(in_section) == len(in_reference) == 0:
        below = _affine(layers[reference])  # the eye by default; the user may have dragged the reference instead
        return np.linalg.inv(below) @ _affine(image)
    if len(in_section) != len(in_reference) or len(in_section) < 2:
        msg = (
            f"Expected the same number of landmarks, at least two, in the layers {Keys.landmarks(section)!r} and "
            f"{Keys.landmarks(reference)!r}, in the same order; found {len(in_section)} and {len(in_reference)}. "
            "Click the missing ones, or delete all of them to use the place of the image."
        )
        raise ValueError(msg)
    return in_section, in_reference


def _affine(layer: Any) -> np.ndarray:
    """(3, 3) affine of x, y of an image layer, um; the viewer may have more dimensions."""
    return exchanged_axes(np.asarray(layer.affine.affine_matrix, float)[-3:, -3:])
