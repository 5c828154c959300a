"""Windows of feature maps, and how much context around them they need."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from spatial_impute._io.workers import suitable_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

_FIRST_PROBE, _LAST_PROBE = 8, 64  # coarsest cells along the test image


class Box(NamedTuple):
    """Cells of a map, or pixels of an image, [y0, y1) x [x0, x1)."""

    y0: int
    y1: int
    x0: int
    x1: int


def cut(maps: Tensor, cells: Box) -> Tensor:
    """Some cells of a map."""
    return maps[..., cells[0] : cells[1], cells[2] : cells[3]]


def cut_pixels(maps: Iterable[Tensor], strides: Iterable[int], pixels: Box) -> list[Tensor]:
    """Cells of maps of several strides that lie in a window in px; its edges are multiples of the strides."""
    y0, y1, x0, x1 = pixels
    return [cut(m, Box(y0 // s, y1 // s, x0 // s, x1 // s)) for m, s in zip(maps, strides, strict=True)]


def grow(cells: Box, n: int, size: Sequence[int]) -> Box:
    """The cells, and up to `n` more on each side, in a map of this size."""
    y0, y1, x0, x1 = cells
    return Box(max(y0 - n, 0), min(y1 + n, size[0]), max(x0 - n, 0), min(x1 + n, size[1]))


def coarser(cells: Box, factor: int) -> Box:
    """Cells of a map with a larger stride that hold the cells."""
    y0, y1, x0, x1 = cells
    return Box(y0 // factor, -(-y1 // factor), x0 // factor, -(-x1 // factor))


def relative(cells: Box, window: Box, factor: int = 1) -> Box:
    """Cells counted from the corner of a window, whose cells are `factor` times as large."""
    y, x = window[0] * factor, window[2] * factor
    return Box(cells[0] - y, cells[1] - y, cells[2] - x, cells[3] - x)


def measured_halo(run: Callable[[Tensor], list[Tensor]], strides: Sequence[int], multiple: int, *, name: str) -> int:
    """Pixels of context around a window on which its cells can depend; a multiple of the finest stride.

    `run` makes maps at `strides` from an image in double precision whose edges are multiples of `multiple`. The value is
    measured, so that it holds for any encoder: pixels beyond an edge are set to NaN, which spreads to all cells that read
    them. Both ends of both axes are tested. Operations over the whole image raise a ``ValueError``, which names the encoder.
    """
    n_cells = _FIRST_PROBE
    while n_cells <= _LAST_PROBE:
        length = n_cells * multiple
        found = [_reach(run, strides, multiple, (length, axis, side)) for axis in (2, 3) for side in (0, 1)]
        reach = [pixels for pixels in found if pixels is not None]
        if len(reach) == len(found):
            return max(reach)
        n_cells *= 2
    msg = (
        f"The encoder {name!r} reads the whole image (or more than {n_cells * multiple // 4} px "
        "around a pixel), so that tiles cannot equal the slide. Use a convolutional encoder without global operations, "
        "or set `model_params={'encoder_window': 224}`: the edge in px of windows that the encoder reads one by one."
    )
    raise ValueError(msg)


def _reach(
    run: Callable[[Tensor], list[Tensor]], strides: Sequence[int], multiple: int, probe: tuple[int, int, int]
) -> int | None:
    """Pixels beyond an edge in the middle of a strip on which cells depend; None if all cells of a map depend on them.

    `probe` is the length of the strip, its axis, and the side that is not a number.
    """
    length, axis, side = probe
    edge = length // 2
    shape = [1, 3, multiple, multiple]
    shape[axis] = length
    rgb = torch.full(shape, 128.0, dtype=torch.float64)
    rgb.narrow(axis, 0 if side == 0 else edge, edge).fill_(torch.nan)
    with torch.inference_mode(), suitable_threads(0, 0):
        maps = run(rgb)
    reach = 0
    for m, stride in zip(maps, strides, strict=True):
        clean = (~m.isnan().any(dim=1).any(dim=4 - axis)[0]).nonzero()[:, 0]
        if not len(clean):
            return None
        first, last = int(clean[0]) * stride, (int(clean[-1]) + 1) * stride
        reach = max(reach, first - edge if side == 0 else edge - last)
    return reach
