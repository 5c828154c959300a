"""Window of napari to place a section on the reference by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from spatial_impute._geometry import apply_affine, exchanged_axes
from spatial_impute._keys import Keys
from spatial_impute._stack import load_record, section_levels
from spatial_impute._validation import require_key, require_positive
from spatial_impute.pl._overlay import read_picture

if TYPE_CHECKING:
    from spatialdata import SpatialData

    from spatial_impute._stack import StackRecord

_PIXELS = 1500  # along the longer side of an image
_SHARE = 0.01  # of the longer side: size of a landmark
_COLORS = ("blue", "orange")  # landmarks of the reference and of the section, to be seen on H&E
_SEEN = 0.6  # opacity of the section, so that the reference shows below


def place_by_hand(sdata: SpatialData, section: str, *, resolution: float | None = None, viewer: Any = None) -> Any:
    """Open napari with a section over the reference, to drag it to its place or to click landmarks.

    Drag: choose the layer of the section, then the mode "transform" (key 2); the corners scale it, the handle above
    turns it. Landmarks: click the same places in the layers "... landmarks" of the section and of the reference, in the
    same order. Landmarks of the section move with its image. :func:`spatial_impute.tl.read_placement` reads either.

    Parameters
    ----------
    sdata
        Stack. If it is registered, the section begins at its present place, without the deformation; else in the middle
        of the reference.
    section
        Section to place.
    resolution
        Pixel size in um at which the images are read; by default 1500 pixels along the longer side.
    viewer
        Viewer to add the layers to; a new one by default. It must not have layers of these names: one viewer for each
        section.

    Returns
    -------
    The viewer, with the layers ``"{reference}"``, ``"{section}"``, ``"{reference} landmarks"`` and ``"{section}
    landmarks"``, in um of the reference. Nothing is written to `sdata`.

    Raises
    ------
    ImportError
        If napari is not installed.
    KeyError
        If the section does not exist.
    ValueError
        If `section` is the reference, or `viewer` has a layer of the same name.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack()
    >>> viewer = si.pl.place_by_hand(sdata, "s0")  # doctest: +SKIP
    >>> si.tl.register_stack(sdata, initial={"s0": si.tl.read_placement(viewer, "s0")})  # doctest: +SKIP
    """
    record = load_record(sdata)
    require_key(section, record.names, where="the stack's sections")
    if section == record.reference:
        msg = f"`section` must not be the reference {section!r}, which does not move."
        raise ValueError(msg)
    if resolution is not None:
        resolution = require_positive(resolution, name="resolution", unit="um per pixel")
    _require_new_layers(viewer, (record.reference, section))
    try:
        import napari
    except ImportError as error:
        msg = "Placing by hand needs napari: `pip install 'napari[all]'`."
        raise ImportError(msg) from error
    pictures = {name: _picture(sdata, record, name, resolution) for name in (record.reference, section)}
    start = _start(record, section, pictures)
    viewer = napari.Viewer() if viewer is None else viewer
    layers = []
    for name, place, opacity in ((record.reference, np.eye(3), 1.0), (section, start, _SEEN)):
        rgb, to_um = pictures[name]
        common = {"affine": exchanged_axes(place), "units": ("um", "um")}
        shown = {"rgb": True, "opacity": opacity, "metadata": {"reference": record.reference}}
        layers.append(viewer.add_image(rgb, name=name, **common, **shown, **_pixels_to_um(to_um)))
    for image, color in zip(layers, _COLORS, strict=True):
        common = {"affine": image.affine.affine_matrix, "units": ("um", "um")}
        size = _SHARE * max(image.data.shape) * float(np.prod(image.scale)) ** 0.5
        points = viewer.add_points(
            np.empty((0, 2)), name=Keys.landmarks(image.name), size=size, face_color=color, ndim=2, **common
        )
        viewer.layers.link_layers([image, points], ["affine"])
    viewer.scale_bar.visible = True
    viewer.reset_view()
    viewer.layers.selection.active = viewer.layers[section]
    return viewer


def _require_new_layers(viewer: Any, names: tuple[str, str]) -> None:
    """Raise a ``ValueError`` if the viewer has such layers: napari would give the new ones other names."""
    wanted = {*names, *map(Keys.landmarks, names)}
    taken = [] if viewer is None else sorted(wanted & {layer.name for layer in viewer.layers})
    if taken:
        msg = (
            f"The viewer has layers {taken} already. Open another viewer for this section, or remove these layers "
            "first."
        )
        raise ValueError(msg)


def _picture(
    sdata: SpatialData, record: StackRecord, name: str, resolution: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """(y, x, 3) uint8 of a section, and its map from pixel corners to um."""
    rgb, to_um = read_picture(section_levels(sdata, record[name]), resolution, _PIXELS)
    return np.clip(rgb, 0, 255).astype(np.uint8), to_um


def _pixels_to_um(to_um: np.ndarray) -> dict[str, Any]:
    """Map from pixels to um as napari takes it; its pixels are counted from their centers."""
    from napari.utils.transforms import Affine

    centers = to_um @ np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1.0]])
    found = Affine(affine_matrix=exchanged_axes(centers), ndim=2)
    return {"scale": found.scale, "rotate": found.rotate, "shear": found.shear[:1], "translate": found.translate}


def _start(record: StackRecord, section: str, pictures: dict[str, tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Present place of the section; without one, its middle on that of the reference."""
    rows = (record.registration or {"sections": {}})["sections"]
    if section in rows:
        return np.asarray(rows[section]["matrix"], float)
    middle = {
        name: apply_affine(np.array([[rgb.shape[1] / 2, rgb.shape[0] / 2]]), to_um)[0]
        for name, (rgb, to_um) in pictures.items()
    }
    matrix = np.eye(3)
    matrix[:2, 2] = middle[record.reference] - middle[section]
    return matrix
