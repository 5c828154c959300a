"""Numbers of torch threads that suit the machine and the size of the work."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

# Below this many numbers per layer, threads wait for each other longer than they compute.
_WORTH_THREADS = 500_000


def requested_threads() -> AbstractContextManager[None]:
    """Run torch on ``OMP_NUM_THREADS`` threads. Other libraries reset this number when they are imported.

    With more threads than free cores, threads wait for each other, which can take ten times as long.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return _torch_threads(int(wanted) if wanted.isdigit() and wanted != "0" else None)


def suitable_threads(n_rows: int, width: int) -> AbstractContextManager[None]:
    """Run small networks on one thread: those with few rows (spots, cells) times channels."""
    return _torch_threads(1 if n_rows * width < _WORTH_THREADS else None)


@contextmanager
def _torch_threads(n_threads: int | None) -> Iterator[None]:
    """Set the number of torch threads, where torch is imported and a number is given; restore it afterwards."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    if n_threads is not None:
        torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
