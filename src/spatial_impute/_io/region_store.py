"""Tables of millions of regions, written to an AnnData in zarr while they are computed."""

from __future__ import annotations

import mmap
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from anndata import AnnData

_CHUNK_BYTES = 2**25  # of a chunk of rows in zarr


class RegionStore:
    """Table (regions, genes) on its way to a store.

    Values grow in a file beside the store, so that memory holds one tile; the store appears when all is written.

    Raises
    ------
    FileExistsError
        If there is something at `store`.
    """

    def __init__(self, store: str | Path, shape: tuple[int, int]) -> None:
        self.store = Path(store)
        if self.store.exists():
            msg = f"{str(store)!r} exists; pass another `store`, or remove it first."
            raise FileExistsError(msg)
        self.scratch = self.store.with_name(self.store.name + ".partial")
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)
        self.values: Any = np.memmap(self.scratch / "values.bin", dtype=np.float32, mode="w+", shape=shape)
        """(regions, genes) float32, to be filled."""
        self.shape, self.dtype, self.ndim = self.values.shape, self.values.dtype, self.values.ndim

    def __getitem__(self, key: tuple[slice, ...]) -> np.ndarray:
        part = np.array(self.values[key])
        self.release()
        return part

    def release(self) -> None:
        """Take what was read or written out of the memory of the process."""
        if hasattr(mmap, "MADV_DONTNEED"):  # of a shared file it drops nothing but the pages of this process
            self.values._mmap.madvise(mmap.MADV_DONTNEED)

    def commit(self, **parts: Any) -> AnnData:
        """Write the table with `parts` (arguments of AnnData), and return it with a lazy ``X``."""
        import dask.array as da
        import zarr
        from anndata import AnnData
        from anndata.io import write_elem

        n_rows = max(1, _CHUNK_BYTES // (4 * self.shape[1]))
        lazy = da.from_array(self, chunks=(n_rows, self.shape[1]), name=False, asarray=False)
        group = zarr.open_group(self.scratch / "table.zarr", mode="w")
        write_elem(group, "/", AnnData(lazy, **parts))
        zarr.consolidate_metadata(group.store)
        del lazy
        self.values = None  # the file cannot be removed on every system while it is mapped
        (self.scratch / "table.zarr").rename(self.store)
        shutil.rmtree(self.scratch)
        return AnnData(da.from_zarr(zarr.open_group(self.store, mode="r")["X"]), **parts)
