"""Predictions at millions of regions, written to an AnnData in zarr while they are made."""

from __future__ import annotations

import mmap
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spatial_impute._keys import Keys

if TYPE_CHECKING:
    from collections.abc import Callable

    import pandas as pd
    from anndata import AnnData

    from spatial_impute._image.resampling import WorkingImage
    from spatial_impute.models import PixNetModel
    from spatial_impute.models.pixnet._network import Stain
    from spatial_impute.models.pixnet._region_weights import Regions

_CHUNK_BYTES = 2**25  # of a chunk of rows in zarr


def write_regions(
    store: str | Path,
    model: PixNetModel,
    *,
    image: WorkingImage,
    stain: Stain,
    regions: Regions,
    index: list[int],
    obs: pd.DataFrame,
    var: pd.DataFrame,
    obsm: dict[str, np.ndarray],
    uns: dict[str, Any],
    core: int,
    on_tile: Callable[[], None],
) -> AnnData:
    """Predict, write, and return the table with a lazy ``X``.

    Values grow in a file beside the store, so that memory holds one tile; the store appears when all is written.

    Raises
    ------
    FileExistsError
        If there is something at `store`.
    """
    import dask.array as da
    import zarr
    from anndata import AnnData
    from anndata.io import write_elem

    store = Path(store)
    if store.exists():
        msg = f"{str(store)!r} exists; pass another `store`, or remove it first."
        raise FileExistsError(msg)
    scratch = store.with_name(store.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    values = _MappedTable(scratch / "values.bin", (len(regions), len(index)))

    def tile_done() -> None:
        values.release()
        on_tile()

    found = model._read_regions(image, stain, regions, index, core=core, on_tile=tile_done, out=values.mapped)
    obs[Keys.N_PIXELS] = found.n_pixels
    n_rows = max(1, _CHUNK_BYTES // (4 * len(index)))
    lazy = da.from_array(values, chunks=(n_rows, len(index)), name=False, asarray=False)
    group = zarr.open_group(scratch / "table.zarr", mode="w")
    write_elem(group, "/", AnnData(lazy, obs=obs, var=var, obsm=obsm, uns=uns))
    zarr.consolidate_metadata(group.store)
    del lazy
    values.close()
    (scratch / "table.zarr").rename(store)
    shutil.rmtree(scratch)
    matrix = da.from_zarr(zarr.open_group(store, mode="r")["X"])
    return AnnData(matrix, obs=obs, var=var, obsm=obsm, uns=uns)


class _MappedTable:
    """Table in a file on disk. What was read or written of it does not stay in the memory of the process."""

    def __init__(self, path: Path, shape: tuple[int, int]) -> None:
        self.mapped: Any = np.memmap(path, dtype=np.float32, mode="w+", shape=shape)
        self.shape, self.dtype, self.ndim = self.mapped.shape, self.mapped.dtype, self.mapped.ndim

    def __getitem__(self, key: tuple[slice, ...]) -> np.ndarray:
        part = np.array(self.mapped[key])
        self.release()
        return part

    def release(self) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):  # of a shared file it drops nothing but the pages of this process
            self.mapped._mmap.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        self.mapped = None  # the file cannot be removed on every system while it is mapped
