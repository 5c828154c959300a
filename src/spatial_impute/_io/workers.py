"""Threads of this process, its rank in a training, and tasks on the workers of a dask client."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from spatial_impute._settings import logger, progress, settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager

# Below this many numbers per layer, threads wait for each other longer than they compute.
_WORTH_THREADS = 500_000
_MAX_WORKERS = 5  # a fit trains five networks


def requested_threads() -> AbstractContextManager[None]:
    """Run torch on ``OMP_NUM_THREADS`` threads. Other libraries (numba, through scanpy) reset this number.

    With more threads than free cores, threads wait for each other, which can take ten times as long.
    """
    return torch_threads(_threads_of_environment())


def available_threads() -> int:
    """Number of threads for work in numpy: ``OMP_NUM_THREADS``; by default that of torch, or one per core."""
    torch = sys.modules.get("torch")
    return _threads_of_environment() or (torch.get_num_threads() if torch else os.cpu_count() or 1)


def _threads_of_environment() -> int | None:
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() and wanted != "0" else None


def suitable_threads(n_rows: int, width: int) -> AbstractContextManager[None]:
    """Run small networks on one thread: those with few rows (spots, cells) times channels. Others as requested."""
    return torch_threads(1) if n_rows * width < _WORTH_THREADS else requested_threads()


@contextmanager
def torch_threads(n_threads: int | None) -> Iterator[None]:
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


def rank_and_size() -> tuple[int, int]:
    """Number of this process among those that train together (``torchrun``), and their number; 0 and 1 if it is alone."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


_ATTEMPTS = 4  # as many as dask makes for a task whose workers die


def active_client() -> Any | None:
    """Dask client of this process; None without a client, or inside a task."""
    if "distributed" not in sys.modules:  # then no client exists
        return None
    from distributed import Client, get_worker

    try:
        get_worker()
    except ValueError:
        pass
    else:  # a task that waits for others may hold the only thread that could run them
        return None
    try:
        return Client.current()
    except ValueError:
        return None


def run_on_workers(
    client: Any,
    function: Callable,
    tasks: Sequence[tuple],
    *,
    broadcast: bool = False,
    on_done: Callable[[], Any] = lambda: None,
) -> list[Any]:
    """Results of ``function(*task)``, in the order of the tasks; `on_done` is called for each.

    The function is pure: its result does not depend on where and how often it runs. Dataclasses among the arguments are
    sent once, not with each task, to keep images and networks out of the graph; with `broadcast` to all workers at
    once. Dask gives the tasks of a dead worker to another one. It cannot make sent data again that only the dead worker
    held: these are sent once more, with the tasks that need them. If workers die in each of several attempts, a
    ``CancelledError`` is raised.
    """
    from distributed import CancelledError, as_completed

    results: dict[int, Any] = {}
    for attempt in range(_ATTEMPTS):
        left = [i for i in range(len(tasks)) if i not in results]
        shared = _send(client, (tasks[i] for i in left), broadcast=broadcast)
        futures = {
            client.submit(function, *(shared.get(id(part), part) for part in tasks[i]), pure=False): i for i in left
        }
        lost = None
        for future in as_completed(list(futures)):
            try:
                results[futures[future]] = future.result()
            except CancelledError as error:
                lost = error
                continue
            future.release()
            on_done()
        if lost is None:
            break
        if attempt + 1 == _ATTEMPTS:
            lost.add_note(f"Workers died in {_ATTEMPTS} attempts in a row; give them more memory, or start fewer.")
            raise lost
        logger.warning("A worker died: %d of %d tasks are sent again", len(tasks) - len(results), len(tasks))
    return [results[i] for i in range(len(tasks))]


def _send(client: Any, tasks: Iterable[tuple], *, broadcast: bool) -> dict[int, Any]:
    """Futures of the dataclasses among the arguments, by their id."""
    shared: dict[int, Any] = {}
    for part in (part for task in tasks for part in task):
        if hasattr(part, "__dataclass_fields__") and id(part) not in shared:
            shared[id(part)] = client.scatter(part, hash=False, broadcast=broadcast)
    return shared


def run_tasks(function: Callable, tasks: list[tuple], on_done: Callable[[], Any] = lambda: None) -> list[Any]:
    """Results of ``function(*task)``, in the order of the tasks, on the workers of a dask client if there is one.

    The functions are pure, so the result does not depend on where they run. `on_done` is called after each task.
    """
    client = active_client()
    if client is not None:
        return run_on_workers(client, function, tasks, on_done=on_done)
    results = []
    for task in tasks:
        results.append(function(*task))
        on_done()
    return results


def run_all(function: Callable, tasks: list[tuple], label: str, *, show: bool | None = None) -> list[Any]:
    """As :func:`run_tasks`, with a progress bar."""
    bar = progress(None, label, show=show, total=len(tasks))
    try:
        return run_tasks(function, tasks, bar.update)
    finally:
        bar.close()


@contextmanager
def local_workers(n_workers: int | None = None, device: str | None = None) -> Iterator[None]:
    """Start worker processes of one thread each, which share the work inside the block; one worker is this process.

    By default there is one worker per core, at most five (as many as networks of a fit), and one on a GPU.
    """
    if n_workers is None:
        from dask.system import CPU_COUNT

        n_workers = min(CPU_COUNT, _MAX_WORKERS) if (device or settings.device) == "cpu" else 1
    if n_workers < 2:
        yield
        return
    import dask
    from distributed import Client, LocalCluster

    # Workers that return memory to the system after every operation wait for it longer than they compute.
    keep_memory = {"MALLOC_ARENA_MAX": 1, "MALLOC_MMAP_THRESHOLD_": 2**30, "MALLOC_TRIM_THRESHOLD_": 2**31}
    keys = {f"distributed.nanny.pre-spawn-environ.{key}": value for key, value in keep_memory.items()}
    one: dict[str, Any] = {"threads_per_worker": 1, "memory_limit": 0, "dashboard_address": None}
    one["silence_logs"] = logging.ERROR  # workers that end late are not the user's concern
    with dask.config.set(keys), ExitStack() as opened:
        cluster = LocalCluster(n_workers=n_workers, **one)
        opened.callback(_close, cluster)
        opened.callback(_close, Client(cluster))
        yield


def _close(part: Any) -> None:
    """Close a client or a cluster. If it ends too late on a busy machine, the results of the block must not be lost."""
    try:
        part.close()
    except TimeoutError:
        logger.warning("The workers did not end in time. This does not change the results.")
