"""Files for the user: refused before the work, and at their place only when they are complete."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spatial_impute._io.owner import owned

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def file_to_write(path: Any, *, ends: Sequence[str], overwrite: bool) -> Path:
    """Path of a file that can be written.

    Raises
    ------
    TypeError
        If `path` is no path.
    ValueError
        If its name ends otherwise, or if it is a folder.
    FileNotFoundError
        If its folder does not exist.
    FileExistsError
        If there is a file and `overwrite` is False.
    PermissionError
        If nothing can be written to its folder.
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
    """Path of a hidden file to write to, which becomes `path` at the end of the ``with`` block, or goes after an error.

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
