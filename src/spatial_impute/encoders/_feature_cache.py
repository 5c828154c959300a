"""Cache of features: recognise a section whose features are in the object or in a folder of earlier results."""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
import zlib
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

from spatial_impute._image.levels import image_fingerprint
from spatial_impute._settings import logger

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from spatial_impute._image.levels import Level

_FORMAT = 2  # of the files and of the keys
_KEY = "key"  # array with the key of the file
_OLD = 86_400.0  # s after which an unfinished file is the rest of a killed process


def section_key(encoder: str, image: str, geometry: Mapping[str, Any], arrays: Sequence[np.ndarray]) -> str:
    """Key of the features of a section: the same for the same encoder, image, spots and fields of view."""
    digest = hashlib.sha256(json.dumps([_FORMAT, encoder, image, geometry], sort_keys=True).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:32]


def image_identity(levels: Sequence[Level], *, across_sessions: bool) -> str:
    """Hash that identifies an image; within a session also by the name of its lazy array, or by all pixels."""
    found, data = image_fingerprint(levels), levels[0].data.data
    if across_sessions:
        return found
    if hasattr(data, "name"):
        return f"{found}{data.name}"  # changes with every operation on the lazy array
    return found + hashlib.sha256(np.ascontiguousarray(data).tobytes()).hexdigest()


def load_tokens(folder: Path, key: str, widths: Mapping[str, int], n: int) -> dict[str, np.ndarray] | None:
    """Features from a folder; None if it does not have them.

    They must be those of this key, finite, with `n` rows and a multiple of `widths` columns (number of tokens) per level.
    """
    path = folder / f"{key}.npz"
    if not path.exists():
        return None
    try:
        with np.load(path) as file:  # refuses pickles, and checks the sums of all bytes
            found = {name: file[name] for name in file.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        problem = str(error)
    else:
        problem = _problem(found, key, widths, n)
    if not problem:
        del found[_KEY]
        return found
    logger.warning("%s is damaged (%s); its section is encoded again", path, problem)
    return None


def _problem(found: Mapping[str, np.ndarray], key: str, widths: Mapping[str, int], n: int) -> str:
    """Fault in the content of a file; empty if nothing is."""
    if str(found.get(_KEY)) != key or set(found) != {_KEY, *widths}:
        return "features of something else"
    for name, width in widths.items():
        values = found[name]
        if values.ndim != 2 or len(values) != n or not values.shape[1] or values.shape[1] % width:
            return f"{name} has the shape {values.shape}, expected {n} rows"
        if values.dtype.kind != "f" or not np.isfinite(values).all():
            return f"{name} is not finite"
    return ""


def save_tokens(folder: Path, key: str, tokens: Mapping[str, np.ndarray]) -> None:
    """Write the features of a section. An interrupted write leaves no file that could be mistaken for a result.

    Several processes may write the same section: each writes a file of its own, and the last one stays as a whole.
    """
    partial = folder / f".{key}.{uuid4().hex[:8]}.partial.npz"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.savez(file, **dict[str, Any](tokens, **{_KEY: np.array(key)}))
        partial.replace(folder / f"{key}.npz")
        for rest in folder.glob(f".{key}.*.partial.npz"):
            if time.time() - rest.stat().st_mtime > _OLD:
                rest.unlink(missing_ok=True)
    except OSError as error:
        error.add_note(f"Finished sections are in {str(folder)!r}; run the same call again to continue from them.")
        raise
