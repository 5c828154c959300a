"""Surroundings as a dense field: mean and spread of a feature map over square windows around every cell."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Added to variances before the root, for features of variance 1: the root of next to nothing would turn rounding, which
# differs between a tile and the slide, into features.
_NO_VARIANCE = 1e-3


class ContextFields(nn.Module):
    """Mean and standard deviation of the features in windows of several sizes around each cell of a coarse grid.

    What lies within a few hundred um of a spot, and how mixed it is, says more about it than any convolution of the encoder can
    see. As fields on a grid they are part of the map: read out over regions of any shape, computed tile by tile. Windows
    are cut at the edge of the image, where they average what there is.

    Parameters
    ----------
    stride
        Pixels along a cell of the feature map.
    cell
        Pixels along a cell of the coarse grid, a multiple of `stride`.
    windows
        Edges of the windows in px; rounded to odd numbers of cells.

    Shapes
    ------
    (n, c, y / stride, x / stride) -> (n, 2 * len(windows) * c, y / cell, x / cell): for each window the means, then the
    standard deviations.
    """

    def __init__(self, stride: int, cell: int, windows: tuple[float, ...]) -> None:
        super().__init__()
        self.factor = cell // stride
        self.n_cells = tuple(2 * max(0, round((window / cell - 1) / 2)) + 1 for window in windows)

    def forward(self, maps: Tensor) -> Tensor:
        """Fields."""
        mean = F.avg_pool2d(maps, self.factor)
        square = F.avg_pool2d(maps**2, self.factor)
        parts = []
        for n in self.n_cells:
            centre = _window_mean(mean, n)
            variance = (_window_mean(square, n) - centre**2).clamp(min=0)
            parts += [centre, (variance + _NO_VARIANCE).sqrt()]
        return torch.cat(parts, dim=1)


def context_cell(stride: int, multiple: int, smallest: float) -> int:
    """Edge of a context cell in px: the largest that tiles keep whole and of which three fit into the smallest window."""
    cell = stride
    while multiple % (2 * cell) == 0 and 2 * cell * 3 <= smallest:
        cell *= 2
    return cell


def _window_mean(maps: Tensor, n: int) -> Tensor:
    """Mean over `n` x `n` cells around each; rows and columns one after the other, which costs 2 n sums in place of n^2."""
    for kernel in ((n, 1), (1, n)):
        maps = F.avg_pool2d(maps, kernel, stride=1, padding=(kernel[0] // 2, kernel[1] // 2), count_include_pad=False)
    return maps
