"""Sums over regions from decoder cells against the literal sums over pixels of the resized map."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import shapely
import torch
from torch.nn import functional as F

from spatial_impute.encoders._pyramids import Box
from spatial_impute.models.pixnet import _region_weights
from spatial_impute.models.pixnet._region_weights import CellGrid, Discs, Polygons, build_stencil
from spatial_impute.models.pixnet._tiles import Tiling, region_sums, regions_by_tile

STRIDE = 4
HEIGHT, WIDTH = 258, 307  # no multiples of the stride
GRID = CellGrid.whole(STRIDE, 65, 77)
IMAGE = Box(0, HEIGHT, 0, WIDTH)
PIXELS = np.stack(np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5), axis=-1)


@pytest.fixture(scope="module")
def cells() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, GRID.n_y, GRID.n_x, generator=generator, dtype=torch.float64, requires_grad=True)


def resized(cells: torch.Tensor) -> torch.Tensor:
    """The map at pixels, as the paper writes it."""
    size = (GRID.n_y * STRIDE, GRID.n_x * STRIDE)
    return F.interpolate(cells[None], size=size, mode="bilinear", align_corners=False)[0, :, :HEIGHT, :WIDTH]


def random_discs(*, half_steps: bool) -> Discs:
    rng = np.random.default_rng(1)
    centers = rng.uniform([-20, -20], [WIDTH + 20, HEIGHT + 20], (60, 2))
    radius = np.exp(rng.uniform(np.log(0.5), np.log(200), 60))
    # Centres and radii on half pixels put pixel centres exactly on the rim.
    return Discs(np.round(centers * 2) / 2, np.round(radius * 2) / 2) if half_steps else Discs(centers, radius)


def disc_masks(discs: Discs) -> list[np.ndarray]:
    return [((PIXELS - c) ** 2).sum(axis=-1) <= r * r for c, r in zip(discs.centers, discs.radius, strict=True)]


def random_polygons(kind: str) -> list[shapely.Geometry]:
    rng = np.random.default_rng(2)
    shapes = []
    for _ in range(40):
        x, y = rng.uniform([-10, -10], [WIDTH + 10, HEIGHT + 10])
        size = np.exp(rng.uniform(np.log(1.5), np.log(150)))
        if kind == "square":
            square = shapely.box(x - size / 2, y - size / 2, x + size / 2, y + size / 2)
            shapes.append(shapely.affinity.rotate(square, rng.uniform(0, 90)))
        else:
            star = shapely.Point(x, y).buffer(size, quad_segs=3)
            star = star.difference(shapely.Point(x, y).buffer(size / 3, quad_segs=2))
            shapes.append(star.union(shapely.box(x + 2 * size, y, x + 2.5 * size, y + size)))
    return shapes


def compare(cells: torch.Tensor, regions: Discs | Polygons, masks: list[np.ndarray]) -> None:
    found, n_pixels = region_sums(cells, regions, IMAGE, GRID, IMAGE)
    expected = torch.stack([(resized(cells) * torch.from_numpy(m)).sum(dim=(1, 2)) for m in masks])
    count = np.array([m.sum() for m in masks])
    held = count > 0
    assert held.sum() > 30
    np.testing.assert_array_equal(n_pixels.numpy()[held], count[held])
    assert (found - expected)[torch.from_numpy(held)].abs().max() < 1e-10
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    upstream[torch.from_numpy(~held)] = 0
    gradients = [torch.autograd.grad((v * upstream).sum(), cells)[0] for v in (found, expected)]
    assert (gradients[0] - gradients[1]).abs().max() < 1e-10


@pytest.mark.parametrize("half_steps", [False, True])
def test_discs_equal_brute_force(cells, half_steps):
    discs = random_discs(half_steps=half_steps)
    compare(cells, discs, disc_masks(discs))


@pytest.mark.parametrize("kind", ["square", "ring and box"])
def test_polygons_equal_brute_force(cells, kind):
    shapes = random_polygons(kind)
    points = shapely.points(PIXELS)
    masks = []
    for shape in shapes:
        shapely.prepare(shape)
        masks.append(shapely.contains(shape, points))
    compare(cells, Polygons.from_shapely(np.array(shapes)), masks)


def test_sums_over_a_partition_add_up(cells):
    """Squares that share edges, some through pixel centres: no pixel is lost or counted twice."""
    edges = np.array([0, 12.5, 40, 99.5, 180, WIDTH])
    squares = [shapely.box(a, 0, b, HEIGHT) for a, b in pairwise(edges)]
    sums, n_pixels = region_sums(cells, Polygons.from_shapely(np.array(squares)), IMAGE, GRID, IMAGE)
    assert n_pixels.sum() == HEIGHT * WIDTH
    torch.testing.assert_close(sums.sum(dim=0), resized(cells).sum(dim=(1, 2)), rtol=0, atol=1e-9)


def test_triangles_that_share_slanted_edges_partition_their_square(cells):
    rng = np.random.default_rng(5)
    corners = np.array([[20.5, 20.5], [220.5, 20.5], [220.5, 200.5], [20.5, 200.5]])
    inner = rng.uniform(60, 160, 2)
    triangles = [shapely.Polygon([corners[i], corners[(i + 1) % 4], inner]) for i in range(4)]
    regions = Polygons.from_shapely(np.array([*triangles, shapely.Polygon(corners)]))
    sums, n_pixels = region_sums(cells, regions, IMAGE, GRID, IMAGE)
    assert n_pixels[:4].sum() == n_pixels[4]
    torch.testing.assert_close(sums[:4].sum(dim=0), sums[4], rtol=0, atol=1e-9)


def test_mean_of_a_constant_map_does_not_depend_on_the_radius():
    constant = torch.full((1, GRID.n_y, GRID.n_x), 2.5, dtype=torch.float64)
    discs = random_discs(half_steps=False)
    sums, n_pixels = region_sums(constant, discs, IMAGE, GRID, IMAGE)
    held = n_pixels > 0
    torch.testing.assert_close(sums[held, 0] / n_pixels[held], torch.full((int(held.sum()),), 2.5).double())


@pytest.mark.parametrize(("x", "y"), [(11, 21), (1, 1), (WIDTH - 2, HEIGHT - 1)])
def test_region_without_a_pixel_centre_is_sampled_at_its_centre(cells, x, y):
    """Two discs between pixel centres; between these four the map is bilinear."""
    discs = Discs(np.array([[x, y], [WIDTH + 5.0, 20.0]], dtype=float), np.array([0.3, 0.3]))
    sums, n_pixels = region_sums(cells, discs, IMAGE, GRID, IMAGE)
    around = resized(cells)[:, y - 1 : y + 1, x - 1 : x + 1].mean(dim=(1, 2))
    torch.testing.assert_close(sums[0] / n_pixels[0], around)
    assert n_pixels[0] == pytest.approx(np.pi * 0.09)
    assert n_pixels[1] == 0


def test_disc_on_a_ramp_is_that_of_the_plane():
    """Its mean is the value at its centre and its pixels are its area: half a pixel of error would be 0.5 of the slope."""
    x, y = ((np.arange(n) + 0.5) * STRIDE for n in (GRID.n_x, GRID.n_y))
    ramps = torch.from_numpy(np.stack(np.broadcast_arrays(x[None, :], y[:, None])))
    rng = np.random.default_rng(4)
    radius = rng.uniform(12, 60, 40)
    reach = radius[:, None] + STRIDE  # beyond the middle of the outermost cells the map is flat
    centers = rng.uniform(reach, np.array([WIDTH, HEIGHT]) - reach - STRIDE)
    sums, n_pixels = region_sums(ramps, Discs(centers, radius), IMAGE, GRID, IMAGE)
    # Discs made of pixels miss their centre by some hundredths of a pixel.
    np.testing.assert_allclose((sums / n_pixels[:, None]).numpy(), centers, atol=0.1)
    np.testing.assert_allclose(n_pixels.numpy(), np.pi * radius**2, rtol=0.02)


def test_small_region_on_the_border_of_two_tiles_counts_once(cells):
    """Its centre belongs to the core that begins there."""
    left, right = Box(0, HEIGHT, 0, 64), Box(0, HEIGHT, 64, WIDTH)
    upper, lower = Box(0, 64, 0, WIDTH), Box(64, HEIGHT, 0, WIDTH)
    for center, parts in (((64.0, 21.0), (left, right)), ((21.0, 64.0), (upper, lower))):
        discs = Discs(np.array([center] * 3), np.array([0.3, 0.9, 40.0]))
        whole, n_whole = region_sums(cells, discs, IMAGE, GRID, IMAGE)
        (a, n_a), (b, n_b) = (region_sums(cells, discs, part, GRID, IMAGE) for part in parts)
        torch.testing.assert_close(a + b, whole)
        torch.testing.assert_close(n_a + n_b, n_whole)
        np.testing.assert_array_equal(n_a.numpy() == 0, [True, False, False])
        assert (n_b > 0).all()
    beyond = Discs(np.array([[WIDTH, 20.0], [20.0, HEIGHT], [0.0, 20.0], [20.0, 0.0]]), np.full(4, 0.3))
    _, n_pixels = region_sums(cells, beyond, IMAGE, GRID, IMAGE)
    np.testing.assert_array_equal(n_pixels.numpy() > 0, [False, False, True, True])


def test_small_region_is_not_sampled_where_another_tile_has_its_pixel(cells):
    """A sliver with a pixel centre left of the border and its own centre right of it, beside a large region."""
    sliver = shapely.Polygon([(63.35, 21.3), (63.35, 21.7), (65.34, 22.8)])
    assert sliver.centroid.x > 64
    polygons = Polygons.from_shapely(np.array([sliver, shapely.box(20, 20, 90, 90)]))
    _, left = region_sums(cells, polygons, Box(0, HEIGHT, 0, 64), GRID, IMAGE)
    _, right = region_sums(cells, polygons, Box(0, HEIGHT, 64, WIDTH), GRID, IMAGE)
    np.testing.assert_array_equal(left.numpy(), [1, 44 * 70])
    np.testing.assert_array_equal(right.numpy(), [0, 26 * 70])


def test_no_regions_have_no_sums(cells):
    for regions in (Discs(np.zeros((0, 2)), np.zeros(0)), Polygons.from_shapely(np.array([], dtype=object))):
        assert regions.bounds.shape == (0, 4)
        sums, n_pixels = region_sums(cells, regions, IMAGE, GRID, IMAGE)
        assert sums.shape == (0, 3)
        assert n_pixels.shape == (0,)


def test_compiled_code_stays_within_its_arrays(monkeypatch):
    """Run as Python the same numbers come out, and an index beyond an array, which compiled code would use, is an error."""
    rng = np.random.default_rng(6)
    centers = rng.uniform(-5, 40, (12, 2))
    boxes = [shapely.box(x, y, x + w, y + w) for (x, y), w in zip(centers, rng.uniform(0.2, 20, 12), strict=True)]
    rings = [shapely.Point(*c).buffer(9, quad_segs=2).difference(shapely.Point(*c).buffer(4)) for c in centers[:4]]
    core, grid, image = Box(8, 32, 4, 36), CellGrid.whole(STRIDE, 9, 10), Box(0, 35, 0, 38)
    both = (Discs(centers, rng.uniform(0.2, 20, 12)), Polygons.from_shapely(np.array(boxes + rings)))
    compiled = [build_stencil(regions, core, grid, image) for regions in both]
    for name, function in list(vars(_region_weights).items()):
        if hasattr(function, "py_func"):
            monkeypatch.setattr(_region_weights, name, function.py_func)
    for regions, expected in zip(both, compiled, strict=True):
        found = build_stencil(regions, core, grid, image)
        np.testing.assert_array_equal(found.start, expected.start)
        np.testing.assert_array_equal(found.cells, expected.cells)
        np.testing.assert_allclose(found.weights, expected.weights, rtol=1e-12)
        np.testing.assert_array_equal(found.n_pixels, expected.n_pixels)


def test_flat_region_between_pixel_centres_has_no_pixels(cells):
    """Long and thin: it is no spot that a tile was too coarse for, and a number for its middle would not be its mean."""
    thin = [shapely.box(10, 20.6, 60, 20.9), shapely.box(30.6, 10, 30.9, 60), shapely.box(40.6, 40.6, 40.9, 40.9)]
    _, n_pixels = region_sums(cells, Polygons.from_shapely(np.array(thin)), IMAGE, GRID, IMAGE)
    np.testing.assert_allclose(n_pixels.numpy(), [0, 0, 0.09])


def test_regions_off_the_image_have_no_pixels(cells):
    discs = Discs(np.array([[-50.0, -50.0], [WIDTH + 100.0, 10.0], [150.0, 100.0]]), np.full(3, 20.0))
    _, n_pixels = region_sums(cells, discs, IMAGE, GRID, IMAGE)
    np.testing.assert_array_equal(n_pixels.numpy() > 0, [False, False, True])


def test_tiles_add_up_to_the_whole(cells):
    """Each pixel belongs to one core; regions may reach over many."""
    tiling = Tiling(HEIGHT, WIDTH, core=64, halo=0, stride=STRIDE, multiple=STRIDE)
    for regions in (random_discs(half_steps=True), Polygons.from_shapely(np.array(random_polygons("square")))):
        whole, count = region_sums(cells, regions, IMAGE, GRID, IMAGE)
        sums, n_pixels = torch.zeros_like(whole), torch.zeros_like(count)
        for tile, index in regions_by_tile(regions, tiling).items():
            grid = tiling.grid(tile, 1)
            y, x = slice(grid.y0, grid.y0 + grid.rows), slice(grid.x0, grid.x0 + grid.columns)
            found, n = region_sums(cells[:, y, x], regions.take(index), tiling.pixels(tile), grid, IMAGE)
            sums[index] += found
            n_pixels[index] += n
        np.testing.assert_allclose(n_pixels, count, rtol=1e-12)
        assert (sums - whole).abs().max() < 1e-9


def test_window_too_small_is_an_error_not_a_wrong_number():
    tiling = Tiling(HEIGHT, WIDTH, core=64, halo=0, stride=STRIDE, multiple=STRIDE)
    with pytest.raises(IndexError, match="outside the window"):
        build_stencil(Discs([[96.0, 96.0]], [32.0]), tiling.pixels((1, 1)), tiling.grid((1, 1), 0), IMAGE)


@pytest.mark.parametrize(("y0", "x0", "rows", "columns"), [(5, 4, 8, 9), (4, 5, 9, 8), (4, 4, 8, 9), (4, 4, 9, 8)])
def test_window_that_lacks_a_line_of_cells_on_any_side_is_an_error(y0, x0, rows, columns):
    """The disc reads cells 4 to 12 in either direction."""
    disc, core = Discs([[34.0, 34.0]], [15.9]), Box(16, 52, 16, 52)
    whole = build_stencil(disc, core, CellGrid(STRIDE, 65, 77, 4, 4, 9, 9), IMAGE)
    assert whole.n_pixels[0] > 700
    with pytest.raises(IndexError, match="outside the window"):
        build_stencil(disc, core, CellGrid(STRIDE, 65, 77, y0, x0, rows, columns), IMAGE)


def test_take_and_move_keep_geometry():
    shapes = np.array(random_polygons("ring and box"))
    polygons = Polygons.from_shapely(shapes)
    some = np.array([5, 0, 17])
    expected = Polygons.from_shapely(shapes[some])
    found = polygons.take(some)
    np.testing.assert_array_equal(found.edges, expected.edges)
    np.testing.assert_array_equal(found.start, expected.start)
    matrix = np.array([[0.0, 2.0, 3.0], [-2.0, 0.0, 5.0], [0, 0, 1]])
    moved = polygons.moved(matrix)
    expected = Polygons.from_shapely(shapely.transform(shapes, lambda xy: xy @ matrix[:2, :2].T + matrix[:2, 2]))
    np.testing.assert_allclose(moved.edges, expected.edges)
    np.testing.assert_allclose(moved.area, expected.area)
    np.testing.assert_allclose(Discs([[1.0, 2.0]], [3.0]).moved(matrix).radius, [6.0])


def test_polygons_taken_apart_in_batches_are_the_same(monkeypatch):
    """Of one ring, with a hole, of several parts, and none at all."""
    square, frame = shapely.box(0, 0, 3, 3), shapely.box(5, 5, 9, 9).difference(shapely.box(6, 6, 7, 8))
    shapes = [square, frame, shapely.MultiPolygon([square, shapely.box(20, 2, 22, 9)]), shapely.box(1, 1, 2, 9), frame]
    whole = Polygons.from_shapely(shapes)
    monkeypatch.setattr(_region_weights, "_BATCH", 2)
    for found, expected in (
        (Polygons.from_shapely(shapes), whole),
        (Polygons.from_shapely([]), whole.take(np.arange(0))),
    ):
        for name in ("edges", "start", "centers", "area"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
