"""Run independent registrations one after the other, or on the cluster of an active dask client."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from spatial_impute._progress import progress

if TYPE_CHECKING:
    from collections.abc import Callable


def run_all(function: Callable, tasks: list[tuple], label: str, *, show: bool | None = None) -> list[Any]:
    """Results of ``function(*task)``, in the order of the tasks.

    The functions are pure, so the result does not depend on where they run.
    """
    client = _active_client()
    if client is None:
        return [function(*task) for task in progress(tasks, label, show=show)]
    # Sections occur in several tasks, and graphs are no place for images.
    shared: dict[int, Any] = {}
    for argument in (argument for task in tasks for argument in task):
        if hasattr(argument, "__dataclass_fields__") and id(argument) not in shared:
            shared[id(argument)] = client.scatter(argument, hash=False)
    futures = [
        client.submit(function, *(shared.get(id(argument), argument) for argument in task), pure=False)
        for task in tasks
    ]
    return [future.result() for future in progress(futures, label, show=show)]


def _active_client() -> Any:
    """Client of dask.distributed, if there is one."""
    if "distributed" not in sys.modules:
        return None
    from distributed import default_client

    try:
        return default_client()
    except ValueError:
        return None
