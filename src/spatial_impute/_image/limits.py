"""Refuse image files that are cut off, or that announce more than a machine can hold."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import tifffile

# A scan of 10 gigapixels has 150,000 chunks of 256 px; an uncompressed TIFF in one strip is one chunk.
_MAX_CHUNKS = 2**22
_MAX_CHUNK_BYTES = 2**32


def require_whole(tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> None:
    """All pixels that the file announces lie within it: else it was cut off, or copied while it was written."""
    size = tiff.filehandle.size
    for level in series.levels:
        page: Any = level.pages[0]
        end = max((o + n for o, n in zip(page.dataoffsets, page.databytecounts, strict=True)), default=0)
        if end > size:
            msg = f"{tiff.filename!r} is truncated: its pixels reach to byte {end}, the file has {size}. Copy it again."
            raise ValueError(msg)


def require_plausible(array: Any, path: Path) -> None:
    """Refuse what would fill the memory: a few bytes of metadata can announce any size.

    Raises
    ------
    ValueError
        If a chunk, which is decoded in one piece, or the number of chunks is too large.
    """
    chunk_bytes = math.prod(array.chunks) * array.dtype.itemsize
    n_chunks = math.prod(-(-n // max(c, 1)) for n, c in zip(array.shape, array.chunks, strict=True))
    if chunk_bytes > _MAX_CHUNK_BYTES or n_chunks > _MAX_CHUNKS:
        msg = (
            f"{path.name!r} announces {tuple(array.shape)} values in {n_chunks} chunks of {chunk_bytes / 2**20:.3g} MiB each; "
            f"up to {_MAX_CHUNKS} chunks of {_MAX_CHUNK_BYTES // 2**20} MiB are read. Convert it to a tiled TIFF or OME-Zarr."
        )
        raise ValueError(msg)
