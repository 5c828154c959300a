"""A section placed by hand in napari, under a virtual screen: ``xvfb-run pytest tests/pl/test_place_by_hand.py``."""

from __future__ import annotations

import importlib.util
import os
from types import SimpleNamespace

import numpy as np
import pytest

import spatial_impute as si
from spatial_impute._geometry import apply_affine, exchanged_axes
from spatial_impute._keys import Keys

PLACE = np.array([[0.0, -1.0, 1400.0], [1.0, 0.0, 30.0], [0.0, 0.0, 1.0]])  # a quarter, um
IN_SECTION = np.array([[400.0, 500.0], [900.0, 450.0], [800.0, 900.0]])  # um
needs_napari = pytest.mark.skipif(
    not os.environ.get("DISPLAY") or importlib.util.find_spec("napari") is None,
    reason="needs napari and a screen; run with xvfb-run where there is none",
)


@pytest.fixture(scope="module")
def stack():
    return si.datasets.synthetic_stack(extent=1400.0)


@pytest.fixture
def viewer():
    import napari

    window = napari.Viewer(show=False)
    yield window
    window.close()


def placed(stack, place):
    result = si.tl.register_stack(
        stack, transformations={"s0": place, "s2": "aligned"}, inplace=False, show_progress_bar=False
    )
    return result.matrices["s0"]


@needs_napari
def test_landmarks_become_a_place(stack, viewer):
    si.pl.place_by_hand(stack, "s0", viewer=viewer)
    clicks = {"s0": IN_SECTION, "s1": apply_affine(IN_SECTION, PLACE)}
    for name, points in clicks.items():
        layer = viewer.layers[Keys.landmarks(name)]
        for x, y in points:  # where the pointer is, in the world
            layer.add(layer.world_to_data(to_world(viewer, name, x, y)))
    place = si.tl.read_placement(viewer, "s0")
    np.testing.assert_allclose(place[0], IN_SECTION)
    np.testing.assert_allclose(placed(stack, place), PLACE, atol=1e-6)


def to_world(viewer, name, x, y):
    """Place in the world, (y, x), of a point in um of a section."""
    matrix = exchanged_axes(np.asarray(viewer.layers[name].affine.affine_matrix)[-3:, -3:])
    return apply_affine(np.array([[x, y]]), matrix)[0, ::-1]


@needs_napari
def test_a_dragged_image_becomes_a_place(stack, viewer):
    si.pl.place_by_hand(stack, "s0", viewer=viewer)
    image = viewer.layers["s0"]
    image.affine = exchanged_axes(PLACE)  # as the handles in the mode "transform" do
    np.testing.assert_allclose(si.tl.read_placement(viewer, "s0"), PLACE)
    np.testing.assert_allclose(placed(stack, si.tl.read_placement(viewer, "s0")), PLACE)
    # Landmarks of the section move with it.
    np.testing.assert_allclose(viewer.layers[Keys.landmarks("s0")].affine.affine_matrix, image.affine.affine_matrix)


@needs_napari
def test_drag_by_the_mouse(stack, viewer):
    """The pointer takes the image in the mode "transform" and moves it by 100 um to the right and 40 um down."""
    from napari.utils._test_utils import read_only_mouse_event as event  # what napari's own tests send
    from napari.utils.interactions import mouse_move_callbacks, mouse_press_callbacks, mouse_release_callbacks

    si.pl.place_by_hand(stack, "s0", viewer=viewer)
    image = viewer.layers["s0"]
    viewer.layers.selection.active = image
    image.mode = "transform"
    before = si.tl.read_placement(viewer, "s0")
    start = to_world(viewer, "s0", 600.0, 600.0)
    common = {"pos": np.array([0, 0]), "modifiers": [], "dims_displayed": [0, 1]}
    mouse_press_callbacks(image, event(type="mouse_press", is_dragging=False, position=tuple(start), **common))
    moved = {"is_dragging": True, "position": tuple(np.add(start, [40.0, 100.0]))}
    mouse_move_callbacks(image, event(type="mouse_move", **moved, **common))
    mouse_release_callbacks(image, event(type="mouse_release", **moved, **common))
    shift = si.tl.read_placement(viewer, "s0") - before
    np.testing.assert_allclose(shift, [[0, 0, 100], [0, 0, 40], [0, 0, 0]], atol=1e-6)


@needs_napari
def test_a_section_begins_where_it_is_registered(stack, viewer):
    import copy

    sdata = copy.deepcopy(stack)
    si.tl.register_stack(sdata, transformations={"s0": PLACE, "s2": "aligned"}, show_progress_bar=False)
    si.pl.place_by_hand(sdata, "s0", viewer=viewer)
    np.testing.assert_allclose(si.tl.read_placement(viewer, "s0"), PLACE)
    # The corner of the image lies where the place puts it: pixels of napari are counted from their centers.
    corner = viewer.layers["s0"].data_to_world((-0.5, -0.5))[::-1]
    np.testing.assert_allclose(corner, PLACE[:2, 2], atol=1e-6)


def layer(name, **attributes):
    return SimpleNamespace(name=name, **attributes)


def window(n_section, n_reference, affine=None, below=None):
    """What `read_placement` reads of a viewer."""
    place, ground = (SimpleNamespace(affine_matrix=np.eye(3) if a is None else a) for a in (affine, below))
    return SimpleNamespace(
        layers=[
            layer("s0", affine=place, metadata={"reference": "s1"}),
            layer(Keys.landmarks("s0"), data=np.random.default_rng(0).random((n_section, 2))),
            layer(Keys.landmarks("s1"), data=np.zeros((n_reference, 2))),
            layer("s1", affine=ground, metadata={"reference": "s1"}),
        ]
    )


def test_a_reference_that_was_dragged_counts():
    """The same picture: the section 100 um to the right, or the reference 100 um to the left."""
    left = np.array([[1.0, 0, -100], [0, 1, 0], [0, 0, 1]])
    found = si.tl.read_placement(window(0, 0, exchanged_axes(PLACE), exchanged_axes(left)), "s0")
    np.testing.assert_allclose(found, np.linalg.inv(left) @ PLACE)
    with pytest.raises(ValueError, match="must not be the reference 's1'"):
        si.tl.read_placement(window(0, 0), "s1")


@pytest.mark.parametrize("section", ["s0", "s2"])
def test_layers_of_another_section_are_not_mixed(stack, section):
    """Both would have a layer "s1 landmarks", and napari would rename the second one."""
    with pytest.raises(ValueError, match=r"has layers .*'s1'.* already. Open another viewer"):
        si.pl.place_by_hand(stack, section, viewer=window(0, 0))


def test_axes_are_exchanged():
    np.testing.assert_array_equal(si.tl.read_placement(window(0, 0, exchanged_axes(PLACE)), "s0"), PLACE)
    shown = window(3, 3)
    np.testing.assert_array_equal(si.tl.read_placement(shown, "s0")[0], shown.layers[1].data[:, ::-1])


@pytest.mark.parametrize("numbers", [(3, 2), (1, 1), (0, 4)])
def test_landmarks_without_partners(numbers):
    with pytest.raises(ValueError, match="same number of landmarks"):
        si.tl.read_placement(window(*numbers), "s0")


def test_a_viewer_of_something_else():
    with pytest.raises(TypeError, match="must be the viewer that"):
        si.tl.read_placement(None, "s0")
    with pytest.raises(KeyError, match="the layers of the viewer"):
        si.tl.read_placement(window(0, 0), "s2")


def test_wrong_sections(stack):
    with pytest.raises(ValueError, match="must not be the reference"):
        si.pl.place_by_hand(stack, "s1")
    with pytest.raises(KeyError, match="the stack's sections"):
        si.pl.place_by_hand(stack, "x")
