"""Tiles equal the whole, for networks of any make, and read-out without a map equals read-out of the map."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from torch import nn

from spatial_impute.encoders._networks import build_resnet
from spatial_impute.encoders._pyramids import ModulePyramid, Pyramid, TellezPyramid, build_pyramid
from spatial_impute.models._params import PixNetParams
from spatial_impute.models.pixnet._network import PixNetNetwork, Stain, receptive_halo
from spatial_impute.models.pixnet._region_weights import Discs
from spatial_impute.models.pixnet._tiles import (
    Slide,
    Tiling,
    forward_tile,
    iter_sums,
    read_regions,
    region_sums,
    regions_by_tile,
)


@functools.cache
def last_bits() -> float:
    """How far the same sums over the same numbers may be apart: nothing on one thread, if matrix products here add in an
    order that does not depend on the width of the matrix. Those of MKL do so on some processors and not on others.
    """
    rng = torch.Generator().manual_seed(0)
    for n_rows, n_terms in ((4, 27), (64, 576), (128, 1152)):
        a, b = (torch.randn(*s, generator=rng, dtype=torch.float64) for s in ((n_rows, n_terms), (n_terms, 500)))
        if any(not torch.equal(a @ b[:, :n].contiguous(), (a @ b)[:, :n]) for n in (8, 33, 64, 97, 333)):
            return 1e-13
    return 0.0


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class SmallPyramid(nn.Module):
    """Strides 2, 4, 8 with convolution, batch norm and pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Conv2d(3 if i == 0 else 4, 4, 3, padding=1, stride=2), nn.BatchNorm2d(4), nn.LeakyReLU(0.1)
                )
                for i in range(3)
            ]
        )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class GlobalPyramid(SmallPyramid):
    """One cell knows the mean of the whole image."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        maps = super().forward(x)
        return [*maps[:2], maps[2] + maps[2].mean(dim=(2, 3), keepdim=True)]


class Pixels:
    """Stands in for a working image."""

    to_um = np.eye(3)

    def __init__(self, height: int, width: int) -> None:
        self.shape = height, width
        self.array = np.random.default_rng(0).uniform(0, 255, (3, height, width)).astype(np.float32)
        self.n_reads = 0

    def stripe(self, core: int, halo: int, beyond: int) -> int:
        return 2 * core

    def window(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        self.n_reads += 1
        out = np.full((3, y1 - y0, x1 - x0), 255, np.float32)
        bottom, right = min(y1, self.shape[0]), min(x1, self.shape[1])
        out[:, : bottom - y0, : right - x0] = self.array[:, y0:bottom, x0:right]
        return out


class Regions(Pixels):
    """Regions of different colour, as tissue has them: of noise alone, coarse cells see next to nothing but its mean."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__(height, width)
        coarse = np.random.default_rng(1).uniform(0, 255, (3, height // 60 + 1, width // 60 + 1)).astype(np.float32)
        self.array = 0.5 * self.array + 0.5 * coarse.repeat(60, axis=1).repeat(60, axis=2)[:, :height, :width]


def make_network(
    module: nn.Module | Pyramid, *, norm: str = "batch", context: tuple[float, ...] = (), finest: int = 1
) -> PixNetNetwork:
    torch.manual_seed(0)
    pyramid = module if isinstance(module, Pyramid) else ModulePyramid(module, name="test")
    params = PixNetParams(width=6, context_um=context, norm=norm, finest_stride=finest)
    network = PixNetNetwork(pyramid, params, n_genes=3, n_base=4)
    for parameter in [*network.base.parameters(), *network.head.parameters()]:
        nn.init.normal_(parameter)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
            nn.init.normal_(layer.running_mean)
    return network.eval().requires_grad_(False)


def assemble(network: PixNetNetwork, image: Pixels, core: int, halo: int) -> torch.Tensor:
    """Map of the genes from tiles."""
    slide = Slide(
        image, Stain((255.0, 255.0, 255.0)), Tiling(*image.shape, core, halo, network.stride, network.multiple)
    )
    n_y, n_x = slide.tiling.cells
    out = torch.full((3, n_y, n_x), torch.nan, dtype=network.head.weight.dtype)
    rows, columns = slide.tiling.shape
    with torch.inference_mode():
        for tile in np.ndindex(rows, columns):
            maps, grid = forward_tile(network, network.predict, slide, tile)
            out[:, grid.y0 : grid.y0 + grid.rows, grid.x0 : grid.x0 + grid.columns] = maps
    assert not out.isnan().any()
    return out


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("shape", [(200, 333), (61, 47)])
def test_tiles_equal_the_whole(norm, shape):
    """Three tile sizes, odd image sizes, and an image smaller than a tile."""
    network = make_network(SmallPyramid(), norm=norm).double()
    halo = receptive_halo(network)
    image = Pixels(*shape)
    whole = assemble(network, image, 512, 0)
    for core in (64, 96, 128):
        assert (assemble(network, image, core, halo) - whole).abs().max() <= last_bits() * whole.abs().max()
    if shape[1] > 64:
        assert (
            assemble(network, image, 64, halo // 2 // network.multiple * network.multiple) - whole
        ).abs().max() > 1e-9


@pytest.fixture(scope="module")
def shipped() -> PixNetNetwork:
    """The six levels of the default encoder and the windows of the base, random weights."""
    network = make_network(TellezPyramid(pretrained=False), norm="layer", context=PixNetParams().context_um, finest=8)
    with (
        torch.no_grad()
    ):  # as after a fit: the base has mean 0, or its level would hide in single precision what varies
        rgb = torch.from_numpy(Regions(128, 1408).window(0, 128, 0, 1408))[None]
        network.base[0].bias -= network.base_features(network.encode(rgb)).mean(dim=(0, 2, 3))
    return network


def test_tiles_of_the_shipped_pyramid_equal_the_whole(shipped):
    """A strip longer than the context of a tile, of odd size; with a quarter of the context they differ."""
    network = copy.deepcopy(shipped).double()
    halo = receptive_halo(network)
    assert halo == 512
    image = Pixels(99, 1333)
    whole = assemble(network, image, 1408, 0)
    for core in (128, 384, 640):
        assert (assemble(network, image, core, halo) - whole).abs().max() <= last_bits() * whole.abs().max()
    assert (assemble(network, image, 128, 128) - whole).abs().max() > 1e-3 * whole.std()


def test_tiles_of_the_shipped_pyramid_equal_the_whole_in_single_precision(shipped):
    image = Regions(99, 1333)
    whole = assemble(shipped, image, 1408, 0)
    tiled = assemble(shipped, image, 256, 512)
    assert ((tiled - whole).abs().amax(dim=(1, 2)) / whole.std(dim=(1, 2))).max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strips_of_the_shipped_pyramid_do_not_show(dtype, monkeypatch):
    pyramid = TellezPyramid(pretrained=False).to(dtype).eval()
    rgb = 255 * torch.rand(1, 3, 128, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.inference_mode():
        whole = pyramid(rgb)
        monkeypatch.setattr("spatial_impute.encoders._pyramids._STRIP_BYTES", 3 * 256 * 128 * rgb.element_size())
        calls = []
        pyramid.blocks[0].register_forward_hook(lambda *_: calls.append(1))
        in_strips = pyramid(rgb)
    assert len(calls) == 11 + 3 + 1 + 1  # of three rows of the 32, and of the 16, 8 and 4 of half the width and less
    for a, b in zip(in_strips, whole, strict=True):
        assert (a - b).abs().max() <= (last_bits() if dtype == torch.float64 else 1e-5) * b.abs().max()


def test_tiles_equal_the_whole_in_single_precision():
    network = make_network(SmallPyramid())
    image = Pixels(200, 333)
    whole = assemble(network, image, 512, 0)
    tiled = assemble(network, image, 64, receptive_halo(network))
    assert ((tiled - whole).abs().amax(dim=(1, 2)) / whole.std(dim=(1, 2))).max() <= 1e-5


def test_halo_of_resnet_is_that_of_its_receptive_field():
    """A cell of stride 32 sees 217 px to each side of its centre, the resize and the decoder add two cells."""
    params = PixNetParams(width=4, finest_stride=1, norm="batch")
    network = PixNetNetwork(ModulePyramid(build_resnet("resnet18"), name="resnet18"), params, n_genes=1, n_base=0)
    assert receptive_halo(network) == 288


def test_halo_does_not_change_the_network():
    network = make_network(SmallPyramid())
    before = copy.deepcopy(network.state_dict())
    receptive_halo(network)
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


def test_global_operations_are_refused():
    network = make_network(GlobalPyramid())
    with pytest.raises(ValueError, match=r"reads the whole image.*tiles cannot equal"):
        receptive_halo(network)


def test_read_out_equals_that_of_the_map_and_forwards_each_tile_once():
    network = make_network(SmallPyramid()).double()
    image = Pixels(200, 333)
    halo = receptive_halo(network)
    rng = np.random.default_rng(1)
    discs = Discs(rng.uniform(-10, [343, 210], (50, 2)), rng.uniform(0.4, 60, 50))
    genes = assemble(network, image, 512, 0)
    whole = Tiling(*image.shape, 512, 0, network.stride, network.multiple)
    expected, count = region_sums(genes, discs, whole.image, whole.grid((0, 0), 0), whole.image)
    image.n_reads = 0
    slide = Slide(image, Stain((255.0, 255.0, 255.0)), Tiling(*image.shape, 64, halo, network.stride, network.multiple))
    ticks = []
    sums, n_pixels = read_regions(network, network.combine, slide, discs, 10)
    n_reads = image.n_reads
    assert len(list(iter_sums(network, network.combine, slide, discs, on_tile=lambda: ticks.append(1))))
    np.testing.assert_allclose(n_pixels, count)
    held = n_pixels > 0
    found = network.from_pooled(torch.from_numpy(sums[held] / n_pixels[held, None]))
    np.testing.assert_allclose(found, expected[held] / count[held, None], rtol=1e-9, atol=1e-9)
    assert n_reads <= len(ticks) == len(regions_by_tile(discs, slide.tiling)) <= 4 * 6


def test_squares_are_those_of_the_cells():
    network = make_network(SmallPyramid()).double()
    image = Pixels(200, 333)
    slide = Slide(
        image, Stain((255.0,) * 3), Tiling(*image.shape, 64, receptive_halo(network), network.stride, network.multiple)
    )
    discs = Discs(np.random.default_rng(1).uniform(0, [333, 200], (20, 2)), np.linspace(0.5, 60, 20))
    sums, _ = read_regions(network, network.combine, slide, discs, 20, squares=True)
    plain, _ = read_regions(network, network.combine, slide, discs, 10)
    squared, _ = read_regions(network, lambda maps, cells: network.combine(maps, cells) ** 2, slide, discs, 10)
    np.testing.assert_allclose(sums, np.hstack([plain, squared]), rtol=1e-12, atol=1e-12)


def test_only_tiles_with_regions_are_forwarded():
    network = make_network(SmallPyramid())
    image = Pixels(256, 256)
    slide = Slide(image, Stain((255.0, 255.0, 255.0)), Tiling(256, 256, 64, 32, network.stride, network.multiple))
    discs = Discs([[32.0, 32.0], [-99.0, 0.0]], [10.0, 5.0])
    sums, n_pixels = read_regions(network, network.combine, slide, discs, 10)
    assert image.n_reads == 1
    assert n_pixels[1] == 0
    assert sums[1].tolist() == [0.0] * 10


def test_threads_are_as_many_as_requested(monkeypatch):
    """Whatever libraries that are imported in between made of them; workers of dask ask for one."""
    network = make_network(SmallPyramid())
    image = Regions(1024, 1024)  # large enough for threads
    slide = Slide(image, Stain((255.0,) * 3), Tiling(1024, 1024, 1024, 0, network.stride, network.multiple))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(2)
    found = []

    def stage(maps: list[torch.Tensor], cells: tuple[int, int, int, int]) -> torch.Tensor:
        found.append(torch.get_num_threads())
        return network.combine(maps, cells)

    with torch.inference_mode():
        forward_tile(network, stage, slide, (0, 0))
    assert (found, torch.get_num_threads()) == ([1], 2)


def counted_pixels(network: PixNetNetwork) -> list[tuple[int, int]]:
    """Sizes of the windows that the network encodes from now on: without and with their context."""
    encode, found = network.encode, []

    def counting(rgb: torch.Tensor, window: tuple[int, int, int, int]) -> list[torch.Tensor]:
        found.append(((window[1] - window[0]) * (window[3] - window[2]), rgb.shape[-2] * rgb.shape[-1]))
        return encode(rgb, window)

    network.encode = counting
    return found


@pytest.mark.parametrize(("limit", "times"), [(2**28, 1.0), (2**19, 2.0), (0, 9.0)])
def test_each_pixel_is_encoded_once(limit, times, monkeypatch):
    """Twice at the borders of stripes, if the maps of two rows of tiles are too many to keep; values are the same."""
    monkeypatch.setattr("spatial_impute.models.pixnet._tiles._LIMIT", limit)
    network = make_network(SmallPyramid()).double()
    image = Pixels(512, 700)
    whole = assemble(network, image, 704, 0)
    slide = Slide(image, Stain((255.0,) * 3), Tiling(*image.shape, 64, 32, network.stride, network.multiple))
    image.stripe = lambda *_: 10**6
    sizes = counted_pixels(network)
    out = torch.full_like(whole, torch.nan)
    with torch.inference_mode():
        for tile in slide.order(np.ndindex(*slide.tiling.shape), network):
            maps, grid = forward_tile(network, network.predict, slide, tile)
            out[:, grid.y0 : grid.y0 + grid.rows, grid.x0 : grid.x0 + grid.columns] = maps
    assert (out - whole).abs().max() <= last_bits() * whole.abs().max()
    encoded = sum(inner for inner, _ in sizes) / (512 * 704)
    assert encoded == 1.0 if times == 1.0 else 1.0 < encoded <= times


def test_context_of_the_shipped_pyramid_is_little(shipped):
    """What is encoded of the image itself reaches 16 px beyond a tile, and of its reductions as many of their pixels."""
    assert shipped.pyramid.halo == 128
    rgb = 255 * torch.rand(1, 3, 1024, 1280, generator=torch.Generator().manual_seed(0)).double()
    pyramid, sizes = copy.deepcopy(shipped.pyramid).double(), []
    with torch.inference_mode():
        whole = pyramid(rgb)
        pyramid.blocks[2].register_forward_hook(lambda _, given, found: sizes.append(found.shape[-1] * 8))
        part = pyramid.within(rgb, (384, 640, 512, 768))
    assert sorted(set(sizes), reverse=True) == [256 + 32, 128 + 32, 64 + 32, 32 + 32]
    for m, expected, stride in zip(part, whole, pyramid.strides, strict=True):
        expected = expected[..., 384 // stride : 640 // stride, 512 // stride : 768 // stride]
        assert (m - expected).abs().max() <= last_bits() * expected.abs().max()


def test_threads_share_what_they_encode():
    """Two threads give the values of one and encode no block twice; an error reaches the thread that waits, and no later call."""
    from concurrent.futures import ThreadPoolExecutor

    network = make_network(SmallPyramid()).double()
    image = Pixels(256, 256)
    whole = assemble(network, image, 256, 0)
    slide = Slide(image, Stain((255.0,) * 3), Tiling(256, 256, 64, 32, network.stride, network.multiple))
    sizes = counted_pixels(network)

    def tile(place: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.inference_mode():
            maps, grid = forward_tile(network, network.predict, slide, place)
            rows, columns = slice(grid.y0, grid.y0 + grid.rows), slice(grid.x0, grid.x0 + grid.columns)
            return maps, whole[:, rows, columns]

    with ThreadPoolExecutor(2) as threads:
        for found, expected in threads.map(tile, np.ndindex(4, 4)):
            assert (found - expected).abs().max() <= last_bits() * whole.abs().max()
    assert sum(inner for inner, _ in sizes) < 2 * 256**2
    other = Slide(image, slide.stain, slide.tiling)
    encode, network.encode = network.encode, None
    with pytest.raises(TypeError):
        forward_tile(network, network.predict, other, (0, 0))
    network.encode = encode
    with torch.inference_mode():
        forward_tile(network, network.predict, other, (0, 0))


def test_encoder_keeps_its_statistics_in_training():
    network = make_network(SmallPyramid())
    before = {k: v.clone() for k, v in network.pyramid.state_dict().items()}
    network.train()
    network.features(torch.rand(2, 3, 32, 32) * 255)
    assert all(torch.equal(before[k], v) for k, v in network.pyramid.state_dict().items())
    assert network.decoder.training


def test_subset_of_genes_gives_the_same_values():
    network = make_network(SmallPyramid())
    features = torch.randn(1, 10, 5, 5)
    torch.testing.assert_close(network.with_genes([2, 0]).genes(features), network.genes(features)[:, [2, 0]])
    torch.testing.assert_close(
        network.from_pooled(features[:, :, 0, 0]), network.genes(features)[:, :, 0, 0], rtol=1e-5, atol=1e-5
    )


def test_fine_maps_can_be_left_out():
    pyramid = ModulePyramid(SmallPyramid(), name="test")
    for finest, stride in ((1, 2), (4, 4), (99, 4)):
        params = PixNetParams(width=4, finest_stride=finest, context_um=())
        network = PixNetNetwork(pyramid, params, n_genes=1, n_base=2)
        assert network.stride == stride
        assert network.features(torch.rand(1, 3, 32, 32)).shape == (1, 6, 32 // stride, 32 // stride)


def test_modules_without_a_pyramid_are_refused():
    with pytest.raises(ValueError, match=r"must return feature maps .* it returned shapes \[\(1, 6\)\]"):
        build_pyramid(nn.Sequential(nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten()))
    with pytest.raises(ValueError, match="`encoder` must be one of"):
        build_pyramid("resnet19")
    with pytest.raises(TypeError, match="found int"):
        build_pyramid(3)


def test_stain_is_brought_to_the_reference():
    """Glass becomes white; optical density is multiplied."""
    stain = Stain((240.0, 230.0, 220.0), (2.0, 1.0, 0.5))
    rgb = torch.tensor([240.0, 230.0, 220.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(stain.apply(rgb), torch.full((1, 3, 1, 1), 255.0))
    half = stain.apply(rgb * 0.25)[0, :, 0, 0] / 255
    torch.testing.assert_close(half, torch.tensor([0.0625, 0.25, 0.5]))
