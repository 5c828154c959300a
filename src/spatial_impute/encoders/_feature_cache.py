"""Cache of features: recognise a section whose features are in the object or in a folder of earlier results."""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from spatial_impute._image.levels import image_fingerprint
from spatial_impute._settings import logger

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from spatial_impute._image.levels import Level

_FORMAT = 1  # of the files and of the keys


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
