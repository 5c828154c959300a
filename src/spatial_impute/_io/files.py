"""Files: one process at a time writes to a place, a file appears there when it is complete, and downloads are checked."""

from __future__ import annotations

import codecs
import json
import os
import socket
import tempfile
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from spatial_impute._io.workers import rank_and_size
from spatial_impute._settings import settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

_ATTEMPTS = 5  # to make a folder that an earlier owner removes in between


@contextmanager
def owned(file: Path, *, what: str, wait: float = 0.0, keep: bool = False) -> Iterator[None]:
    """Own a place while the block runs. `file` says who owns it: host, process id and time.

    The operating system holds the lock, so it ends with its process, however that ends. `wait` is how long to wait for
    another owner, in seconds. With `keep` the file stays after the block. If another call owns the place, a
    ``FileExistsError`` names `what`, the host and the process.
    """
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
            file.unlink(missing_ok=True)  # before the lock ends: a process that opened this file meanwhile tries again
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


def file_to_write(path: Any, *, ends: Sequence[str], overwrite: bool) -> Path:
    """Path of a file that can be written; else an error that says why not.

    A ``TypeError`` for what is no path, a ``ValueError`` for another ending or a folder, a ``FileNotFoundError`` without
    its folder, a ``FileExistsError`` for a file that must stay, a ``PermissionError`` if its folder is read-only.
    """
    if not isinstance(path, str | Path):
        msg = f"`path` must be the path of the file to write, found {path!r}."
        raise TypeError(msg)
    path = Path(path).expanduser()
    if not path.name.lower().endswith(tuple(ends)):
        *others, last = ends
        msg = f"`path` must end in {', '.join(others)}{' or ' if others else ''}{last}, found {str(path)!r}."
        raise ValueError(msg)
    if not path.parent.is_dir():
        msg = f"`path` must lie in a folder that exists, found {str(path)!r}. Make the folder first."
        raise FileNotFoundError(msg)
    if path.is_dir():
        msg = f"`path` must be a file, but {str(path)!r} is a folder. Choose another name."
        raise ValueError(msg)
    if path.exists() and not overwrite:
        msg = f"There is a file {str(path)!r} already. Choose another name, or pass `overwrite=True` to replace it."
        raise FileExistsError(msg)
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        msg = f"`path` must lie in a folder that can be written to, found {str(path)!r}: {error}."
        raise PermissionError(msg) from error
    return path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Path of a hidden file to write to. It becomes `path` at the end of the ``with`` block; after an error it is removed.

    The part of a process that was killed is written over. Raises a ``FileExistsError`` while another process writes.
    """
    # In lower case, because ITK does not know `.MAT`.
    part = path.with_name(f".part_{path.name.lower()}")
    with owned(part.with_name(f"{part.name}.lock"), what=f"The file {str(path)!r}"):
        try:
            yield part
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def read_text(path: Path) -> str:
    """Text in UTF-8, or in UTF-16 with its mark, as Excel and Windows write it; a ``ValueError`` for other encodings."""
    content = path.read_bytes()
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        msg = f"{str(path)!r} is no text in UTF-8: {error.reason} at byte {error.start}. Save it as UTF-8."
        raise ValueError(msg) from error


def how_to_unpack(folder: Path) -> str:
    """Advice for a folder with packed files in it or one below; empty without any."""
    packed = sorted(str(path.relative_to(folder)) for pattern in ("*.gz", "*/*.gz") for path in folder.glob(pattern))
    return f" It holds packed files, {packed[:4]}: unpack them with `gunzip -r {folder}`." if packed else ""


def fetch(path: Path, *, url: str, sha256: str) -> Path:
    """Return the path after a download, if the file is missing or its bytes differ from the published ones.

    Raises a ``ConnectionError`` without a connection, and a ``ValueError`` (from pooch) if the downloaded bytes have
    another hash; that file is not kept.
    """
    import pooch
    from requests.exceptions import RequestException

    cache = pooch.create(
        path=path.parent,
        base_url="",
        registry={path.name: f"sha256:{sha256}"},
        urls={path.name: url},
        retry_if_failed=2,
    )
    try:
        return Path(cache.fetch(path.name, progressbar=settings.show_progress_bar))
    except RequestException as error:
        msg = (
            f"{url} could not be downloaded: {error}. Check the connection, or put the file (sha256 {sha256}) at "
            f"{str(path)!r}."
        )
        raise ConnectionError(msg) from error
