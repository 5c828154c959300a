"""Write a large image element into a SpatialData store, tile by tile: all of it appears there, or nothing does.

The element grows in a hidden folder of the store that no reader lists. Each finished tile leaves a marker, so that an
interrupted run is taken up where it stopped. The finished element is moved into place by one rename.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from spatial_impute._geometry import scaling
from spatial_impute._io.workers import run_on_workers
from spatial_impute._logging import logger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import zarr

    from spatial_impute._geometry import Frame

_STAGING = ".spatial_impute_staging"
_PLAN = "plan.json"
_DONE = "done"
_SKELETON = "skeleton.zarr"
_IMAGES = "images"
_FINGERPRINT = "spatial_impute_fingerprint"
_FILE_BYTES = 2**25  # most of a file before compression; a tile of 250 genes has 8 or 32 MiB


class TiledMap(Protocol):
    """A map of channels that is computed tile by tile, anywhere."""

    @property
    def dtype(self) -> str:
        """Type of the values."""

    @property
    def wanted(self) -> frozenset[tuple[int, int]]:
        """Tiles to compute."""

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of the map."""

    @property
    def chunk(self) -> int:
        """Cells along the edge of a tile."""

    @property
    def cell_to_um(self) -> np.ndarray:
        """(3, 3) affine from cell corners to the frame of the map in um."""

    def tiles(self) -> list[tuple[int, int]]:
        """All tiles, in the order in which they are computed."""

    def place(self, tile: tuple[int, int]) -> tuple[slice, slice]:
        """Rows and columns of a tile."""

    def compute(self, tile: tuple[int, int]) -> np.ndarray:
        """(channels, rows, columns) of one tile."""

    def fingerprint(self, names: list[str]) -> str:
        """Text that is the same for the same map."""


class DenseStore:
    """An element on its way into a store.

    Parameters
    ----------
    store
        Directory of a SpatialData object.
    key
        Name of the element.
    job
        What to write.
    names
        Channels.
    frame
        Coordinate system of the element, and its unit.
    overwrite
        Replace an element of that name once the new one is complete.

    Raises
    ------
    FileNotFoundError
        If there is no store.
    ValueError
        If the element exists, is another one, and `overwrite` is False.
    """

    def __init__(
        self, store: str | Path, key: str, job: TiledMap, names: Sequence[str], frame: Frame, *, overwrite: bool
    ) -> None:
        self.store = Path(store)
        if not (self.store / "zarr.json").is_file():
            msg = f"No SpatialData store at {str(store)!r}; write the object first with `sdata.write({str(store)!r})`."
            raise FileNotFoundError(msg)
        self.key, self.job, self.names = key, job, list(names)
        self.frame = frame
        self.fingerprint = job.fingerprint(self.names)
        self.target = self.store / _IMAGES / key
        self.staging = self.store / _STAGING / key
        if self.staging.parent.is_symlink():  # what is staged is later moved and removed
            msg = f"{str(self.staging.parent)!r} is a link to another place; remove it."
            raise ValueError(msg)
        self.complete = self._fingerprint_of(self.target) == self.fingerprint
        if self.target.exists() and not self.complete and not overwrite:
            msg = f"{str(self.store)!r} has an image {key!r} already; pass another `key_added`, or `overwrite=True`."
            raise ValueError(msg)

    @property
    def element(self) -> Path:
        """The element while it grows."""
        return self.staging / _SKELETON / _IMAGES / self.key

    def _fingerprint_of(self, element: Path) -> str | None:
        try:
            return json.loads((element / "zarr.json").read_text())["attributes"].get(_FINGERPRINT)
        except (OSError, KeyError, json.JSONDecodeError):
            return None

    def prepare(self) -> list[tuple[int, int]]:
        """Lay out the element, or find one begun earlier. Returns the tiles still to be computed."""
        if self.complete:
            return []
        plan = self.staging / _PLAN
        if not plan.is_file() or json.loads(plan.read_text()) != self.fingerprint:
            shutil.rmtree(self.staging, ignore_errors=True)
            self._lay_out()
            # Last: a plan stands for a complete layout.
            fresh = plan.with_suffix(".new")
            fresh.write_text(json.dumps(self.fingerprint))
            fresh.replace(plan)
        if not self.element.exists():  # interrupted between the two renames of a replacement
            return []
        done = {p.name for p in (self.staging / _DONE).iterdir()}
        wanted = [tile for tile in self.job.tiles() if tile in self.job.wanted]
        left = [tile for tile in wanted if _marker(tile) not in done]
        if len(left) < len(wanted):
            logger.info("%d of %d tiles were computed before", len(wanted) - len(left), len(wanted))
        return left

    def _lay_out(self) -> None:
        """Element with all metadata, and an array in which nothing is written yet: it reads as NaN."""
        import xarray as xr
        import zarr
        from spatialdata import SpatialData

        (self.staging / _DONE).mkdir(parents=True)
        one = xr.DataArray(np.zeros((len(self.names), 1, 1), self.job.dtype), dims=("c", "y", "x"))
        element = as_element(one.data, self.names, self.job, self.frame)
        SpatialData(images={self.key: element}).write(self.staging / _SKELETON)
        group = zarr.open_group(self.element, mode="r+")
        name = _array_name(group)
        old = group[name]
        rows, columns = self.job.cells
        n = self.job.chunk
        # Readers take single chunks out of a file: one gene costs a hundredth of the map, and files stay few. Of a tile they
        # hold whole stacks of chunks, so that no two tiles share one.
        per_chunk = max(1, len(self.names) // 100)
        stack = (min(n, rows), min(n, columns))
        bytes_of_chunk = per_chunk * n * n * np.dtype(self.job.dtype).itemsize
        n_chunks = min(-(-len(self.names) // per_chunk), max(1, _FILE_BYTES // bytes_of_chunk))
        dimension_names = old.metadata.dimension_names
        group.create_array(
            name,
            shape=(len(self.names), rows, columns),
            chunks=(per_chunk, *stack),
            shards=(per_chunk * n_chunks, *stack),
            dtype=self.job.dtype,
            fill_value=float("nan"),
            dimension_names=dimension_names,
            overwrite=True,
        )
        group.attrs[_FINGERPRINT] = self.fingerprint

    def array_path(self) -> Path:
        """The array while it grows."""
        import zarr

        return self.element / _array_name(zarr.open_group(self.element, mode="r"))

    def commit(self) -> None:
        """Move the element into place and tell readers of the store."""
        import zarr

        if not self.complete:
            images = zarr.open_group(self.store, mode="r+", use_consolidated=False).require_group(_IMAGES)
            del images
            if self.element.exists():
                if self.target.exists():
                    replaced = self.staging / "replaced"
                    shutil.rmtree(replaced, ignore_errors=True)
                    self.target.rename(replaced)
                self.element.rename(self.target)
        shutil.rmtree(self.staging, ignore_errors=True)
        parent = self.staging.parent
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()
        # Last: until now readers of the store see what it held before. The element knows itself by its fingerprint, so
        # that a call interrupted here is completed by the next one.
        zarr.consolidate_metadata(self.store)

    def read(self) -> Any:
        """The element of the store, lazily."""
        import dask.array as da
        import zarr

        group = zarr.open_group(self.target, mode="r")
        return as_element(da.from_zarr(group[_array_name(group)]), self.names, self.job, self.frame)


def _array_name(group: zarr.Group) -> str:
    """Path of the only resolution of an image group."""
    attrs = dict(group.attrs)
    return attrs.get("ome", attrs)["multiscales"][0]["datasets"][0]["path"]


def _marker(tile: tuple[int, int]) -> str:
    return f"{tile[0]}_{tile[1]}"


def write_tile(job: TiledMap, tile: tuple[int, int], array_path: str, done: str) -> tuple[int, int]:
    """Compute one tile, write it to its own chunks, and leave its marker. Runs in this process or in a worker."""
    import zarr

    array = zarr.open_array(array_path, mode="r+")
    y, x = job.place(tile)
    array[:, y, x] = job.compute(tile)
    (Path(done) / _marker(tile)).touch()
    return tile


def write_tiles(
    store: DenseStore, tiles: list[tuple[int, int]], client: Any | None, on_tile: Callable[[], None]
) -> None:
    """Compute and write tiles here, or on the workers of a dask client."""
    if not tiles:
        return
    array, done = str(store.array_path()), str(store.staging / _DONE)
    if client is None:
        for tile in tiles:
            write_tile(store.job, tile, array, done)
            on_tile()
        return
    # One copy of network and image per worker.
    tasks = [(store.job, tile, array, done) for tile in by_turns(tiles, len(client.nthreads()))]
    run_on_workers(client, write_tile, tasks, broadcast=True, on_done=on_tile)


def by_turns(tiles: list[tuple[int, int]], n_workers: int) -> list[tuple[int, int]]:
    """Tiles in an order in which workers that take turns each go through a part of the slide.

    Neighbouring tiles share chunks of the image, which a worker keeps.
    """
    size = -(-len(tiles) // max(n_workers, 1))
    return [tiles[i] for first in range(size) for i in range(first, len(tiles), size)]


def as_element(data: Any, names: Sequence[str], job: TiledMap, frame: Frame) -> Any:
    """Image element (gene, y, x) with its map to the frame."""
    from spatialdata.models import Image2DModel
    from spatialdata.transformations import Affine

    to_frame = Affine(scaling(1 / frame.um) @ job.cell_to_um, input_axes=("x", "y"), output_axes=("x", "y"))
    return Image2DModel.parse(data, dims=("c", "y", "x"), c_coords=list(names), transformations={frame.name: to_frame})
