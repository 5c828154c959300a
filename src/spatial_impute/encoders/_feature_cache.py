"""Cache of features: recognise a section whose features are in the object or in a folder of earlier results."""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from spatial_impute._image.levels import read_window
from spatial_impute._settings import logger

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from spatial_impute._image.levels import Level

_FORMAT = 1  # of the files and of the keys
_STRIP = 2048  # rows hashed at a time


def section_key(encoder: str, image: str, geometry: Mapping[str, Any], arrays: Sequence[np.ndarray]) -> str:
    """Key of the features of a section: the same for the same encoder, image, spots and fields of view."""
    digest = hashlib.sha256(json.dumps([_FORMAT, encoder, image, geometry], sort_keys=True).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:32]


def image_identity(levels: Sequence[Level], *, across_sessions: bool) -> str:
    """Hash that identifies an image by its resolutions, finest first, and by its content.

    Across sessions the content is the pixels of the coarsest level, which must be read. Within a session it is the name of
    the lazy array.
    """
    digest = hashlib.sha256()
    for level in levels:
        digest.update(repr((level.shape, str(level.data.dtype), level.to_um.round(9).tolist())).encode())
    data = levels[0].data.data
    if across_sessions:
        height, width = levels[-1].shape
        for y0 in range(0, height, _STRIP):
            digest.update(read_window(levels[-1], y0, min(y0 + _STRIP, height), 0, width).tobytes())
    elif hasattr(data, "name"):
        digest.update(data.name.encode())  # changes with every operation on the lazy array
    else:
        digest.update(np.ascontiguousarray(data).tobytes())
    return digest.hexdigest()


def load_tokens(folder: Path, key: str) -> dict[str, np.ndarray] | None:
    """Features from a folder; None if the folder does not have them."""
    path = folder / f"{key}.npz"
    if not path.exists():
        return None
    try:
        with np.load(path) as file:  # refuses pickles
            return {name: file[name] for name in file.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        logger.warning("%s is damaged (%s); its section is encoded again", path, error)
        return None


def save_tokens(folder: Path, key: str, tokens: Mapping[str, np.ndarray]) -> None:
    """Write the features of a section. An interrupted write leaves no file that could be mistaken for a result."""
    partial = folder / f".{key}.partial.npz"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.savez(file, **dict[str, Any](tokens))
        partial.replace(folder / f"{key}.npz")
    except OSError as error:
        error.add_note(f"Finished sections are in {str(folder)!r}; run the same call again to continue from them.")
        raise
