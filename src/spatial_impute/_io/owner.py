"""One process at a time writes to a place. The others end with a message, and the place is free when its owner is gone."""

from __future__ import annotations

import json
import os
import socket
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from spatial_impute._io.workers import rank_and_size

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

_ATTEMPTS = 5  # to make a folder that the process before us removes


@contextmanager
def owned(file: Path, *, what: str, wait: float = 0.0, keep: bool = False) -> Iterator[None]:
    """Own a place while the block runs. `file` says who owns it: host, process id and time.

    The operating system holds the lock, so it ends with its process, however that ends. `wait` is how long to wait for
    another owner, in seconds. With `keep` the file stays after the block.

    Raises
    ------
    FileExistsError
        If another call owns the place; the message names `what`, the host and the process.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(file, timeout=wait)
    for attempt in range(_ATTEMPTS):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
            break
        except Timeout:
            msg = f"{what} is being written by {_owner(file)}. Wait until that call ends, or choose another place."
            raise FileExistsError(msg) from None
        except FileNotFoundError:  # its folder was removed in between
            if attempt == _ATTEMPTS - 1:
                raise
    try:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        file.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "time": now}))
        yield
    finally:
        if not keep:
            file.unlink(missing_ok=True)  # before the lock ends: who opened this file meanwhile looks again
        lock.release()


def owned_folder(folder: Path | None, *, what: str) -> AbstractContextManager[None]:
    """Own a folder while the block runs; nothing for None. Of processes that train together the first one owns it for all."""
    if folder is None or rank_and_size()[0]:
        return nullcontext()
    return owned(folder / ".owner.json", what=f"{what} {str(folder)!r}")


def _owner(file: Path) -> str:
    try:
        found: dict[str, Any] = json.loads(file.read_text())
        return f"process {found['pid']} on host {found['host']!r} since {found['time']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has not written its name yet
        return "another process"
