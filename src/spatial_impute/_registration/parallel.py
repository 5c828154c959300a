"""Run independent registrations one after the other, or on the cluster of an active dask client."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spatial_impute._io.workers import active_client, run_on_workers
from spatial_impute._progress import progress

if TYPE_CHECKING:
    from collections.abc import Callable


def run_all(function: Callable, tasks: list[tuple], label: str, *, show: bool | None = None) -> list[Any]:
    """Results of ``function(*task)``, in the order of the tasks.

    The functions are pure, so the result does not depend on where they run.
    """
    client = active_client()
    if client is None:
        return [function(*task) for task in progress(tasks, label, show=show)]
    bar = progress(None, label, show=show, total=len(tasks))
    try:
        return run_on_workers(client, function, tasks, on_done=bar.update)
    finally:
        bar.close()
