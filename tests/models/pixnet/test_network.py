"""Network of PixNet: its window statistics against means and standard deviations of one window at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spatial_impute.encoders._pyramids import TellezPyramid
from spatial_impute.models._params import PixNetParams
from spatial_impute.models.pixnet._network import PixNetNetwork, WindowStatistics, window_cell


def test_windows_are_mean_and_spread_of_the_window():
    """Also at the edge, where windows average what there is."""
    maps = torch.from_numpy(np.random.default_rng(0).normal(3, 1, (1, 2, 18, 24)))
    windows = WindowStatistics(4, 12, (35.0, 60.0))  # cells of 3 x 3; windows of 3 and of 5 cells
    assert windows.n_cells == (3, 5)
    found = windows(maps, (0, 6, 0, 8))
    torch.testing.assert_close(windows(maps, (1, 5, 3, 4)), found[..., 1:5, 3:4])
    assert found.shape == (1, 2 * 2 * 2, 6, 8)
    for w, n in enumerate(windows.n_cells):
        for row in range(6):
            for column in range(8):
                half = n // 2
                window = maps[
                    0,
                    :,
                    3 * max(row - half, 0) : 3 * (row + half + 1),
                    3 * max(column - half, 0) : 3 * (column + half + 1),
                ].flatten(1)
                mean, spread = found[0, 4 * w : 4 * w + 4, row, column].split(2)
                torch.testing.assert_close(mean, window.mean(dim=1))
                torch.testing.assert_close(spread, (window.var(dim=1, correction=0) + 1e-3).sqrt())


def test_nothing_varies_on_glass():
    """In single precision a constant map has next to no spread, and rounding does not show."""
    maps = torch.full((1, 1, 64, 64), 7.3) + 1e-6 * torch.rand(1, 1, 64, 64)
    found = WindowStatistics(16, 64, (320.0,))(maps, (0, 16, 0, 16))
    assert (found[:, 1] - 1e-3**0.5).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("stride", "multiple", "smallest", "expected"), [(16, 128, 200.0, 64), (32, 32, 400.0, 32), (8, 8, 50.0, 8)]
)
def test_cells_are_whole_on_tiles_and_small_beside_the_windows(stride, multiple, smallest, expected):
    assert window_cell(stride, multiple, smallest) == expected


@pytest.mark.parametrize("cells", [(0, 9, 0, 64), (7, 8, 3, 40), (20, 32, 31, 64)])
def test_levels_in_part_are_cut_from_the_whole(cells):
    torch.manual_seed(0)
    params = PixNetParams(width=2, context_um=(200.0, 320.0), norm="batch")
    network = PixNetNetwork(TellezPyramid(pretrained=False), params, n_genes=1, n_base=2)
    rgb = torch.rand(1, 3, 256, 512) * 255
    with torch.inference_mode():
        y0, y1, x0, x1 = cells
        maps = network.eval().encode(rgb)
        whole, part = network.levels(maps), network.levels(maps, cells)
    torch.testing.assert_close(part, whole[..., y0:y1, x0:x1])
    assert network.extent.shape == (network.n_levels,)
    assert network.extent[::128].tolist() == [8, 16, 32, 64, 128, 192, 192, 320, 320]
