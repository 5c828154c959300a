"""Results that are written piece by piece: a dense map in a SpatialData store, a table of regions in a zarr store.

A store shows a whole result or none. A dense map grows in a hidden folder of the store that no reader lists, one for each
fingerprint of a map. Each finished tile leaves a marker there, so that the next run continues an interrupted one. One
rename moves the finished map into place. One process at a time writes to a place (``_io.files``).
"""

from __future__ import annotations

import json
import mmap
import shutil
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, cast

import dask.array as da
import numpy as np
import xarray as xr
import zarr
from anndata import AnnData
from anndata.io import write_elem
from spatialdata import SpatialData
from spatialdata.models import Image2DModel
from spatialdata.transformations import Affine

from spatial_impute._geometry import scaling
from spatial_impute._io.files import owned
from spatial_impute._io.workers import run_on_workers
from spatial_impute._settings import logger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from spatial_impute._geometry import Frame

_STAGING = ".spatial_impute_staging"
_PLAN = "plan.json"
_DONE = "done"
_SKELETON = "skeleton.zarr"
_IMAGES = "images"
_FINGERPRINT = "spatial_impute_fingerprint"
_FILES = "spatial_impute_files"  # number and bytes of the files of the array
_COMMIT_WAIT = 600.0  # s for which another map of the same store may update its metadata
_FILE_BYTES = 2**25  # largest file before compression; a tile of 250 genes has 8 or 32 MiB
_OWNER = "owner.json"
_OURS = "spatial_impute.partial"  # marks a folder of unfinished work that may be removed
_ROW_CHUNK_BYTES = 2**25  # chunk of rows in a table of regions


def is_zarr(path: Path) -> bool:
    """Return True for the folder of a zarr, by its name or its files."""
    return path.suffix.lower() == ".zarr" or (path / "zarr.json").exists() or (path / ".zattrs").exists()


def zarr_attributes(path: Path) -> dict[str, Any]:
    """Attributes of a zarr; none if it is damaged: what reads it then raises the error."""
    try:
        return dict(zarr.open_group(path, mode="r").attrs)
    except (OSError, ValueError):
        return {}


class TiledMap(Protocol):
    """A map of channels that is computed tile by tile, on any machine."""

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
        """All tiles, in the order of computation."""

    def place(self, tile: tuple[int, int]) -> tuple[slice, slice]:
        """Rows and columns of a tile."""

    def compute(self, tile: tuple[int, int]) -> np.ndarray:
        """(channels, rows, columns) of one tile."""

    def fingerprint(self, names: list[str]) -> str:
        """Text that is the same for the same map."""


class DenseStore:
    """Writer of the map `job` with the channels `names` as the image element `key` of a SpatialData store.

    The element lies in the coordinate system `frame`. With `overwrite` it replaces one of the same name when it is
    complete. Raises a ``FileNotFoundError`` if there is no store, a ``ValueError`` if another element has that name, and
    in its ``with`` block a ``FileExistsError`` if another process writes the same element.
    """

    def __init__(
        self, store: str | Path, key: str, job: TiledMap, names: Sequence[str], frame: Frame, *, overwrite: bool
    ) -> None:
        self.store = Path(store)
        if not (self.store / "zarr.json").is_file():
            msg = f"No SpatialData store at {str(store)!r}; write the object first with `sdata.write({str(store)!r})`."
            raise FileNotFoundError(msg)
        self.key, self.job, self.names, self.frame = key, job, list(names), frame
        self.fingerprint = job.fingerprint(self.names)
        self.target = self.store / _IMAGES / key
        self.room = self.store / _STAGING / key
        self.staging = self.room / self.fingerprint[:16]
        for folder in (self.room.parent, self.room, self.staging):
            if folder.is_symlink():  # its content is moved and removed later
                msg = f"{str(folder)!r} is a link to another place. Remove the link."
                raise ValueError(msg)
        self.overwrite = overwrite
        self.complete = False
        self._require_free()
        self._held = ExitStack()

    def __enter__(self) -> Self:
        self._held.enter_context(owned(self.room / _OWNER, what=f"The image {self.key!r} of {str(self.store)!r}"))
        self._require_free()  # it may have been written while this process waited
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()
        for folder in (self.room, self.room.parent):
            with suppress(OSError):  # unfinished work of this or of another map
                folder.rmdir()

    def _require_free(self) -> None:
        """Raise a ``ValueError`` if there is an element that must not be replaced; find out whether the map is there."""
        if not self.target.exists():
            return
        found = _attribute(self.target, _FINGERPRINT)
        where = f"{str(self.store)!r} already has an image {self.key!r}"
        if found == self.fingerprint:
            self.complete = _attribute(self.target, _FILES) == _size(self.target)
            if not self.complete:
                logger.warning("%s, but some of its files are missing or damaged; it is computed again", where)
        elif found is None and self.overwrite:
            msg = f"{where} that is no dense map of this package, and is not replaced. Pass another `key_added`."
            raise ValueError(msg)
        elif not self.overwrite:
            msg = f"{where}. Pass another `key_added`, or `overwrite=True`."
            raise ValueError(msg)

    @property
    def element(self) -> Path:
        """Path of the growing element."""
        return self.staging / _SKELETON / _IMAGES / self.key

    def prepare(self) -> list[tuple[int, int]]:
        """Lay out the element, or find an unfinished one, and return the missing tiles."""
        if self.complete:
            return []
        for other in self.room.iterdir():  # unfinished work on other maps of this name; no other process owns it now
            if other.is_dir() and other != self.staging:
                _remove_ours(other)
        plan = self.staging / _PLAN
        if not plan.is_file() or json.loads(plan.read_text()) != self.fingerprint:
            _remove_ours(self.staging)
            self._lay_out()
            # Last: a plan marks a complete layout.
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
        """Write the element with all metadata and an empty array, which reads as NaN."""
        self.staging.mkdir()
        (self.staging / _OURS).touch()
        (self.staging / _DONE).mkdir()
        one = xr.DataArray(np.zeros((len(self.names), 1, 1), self.job.dtype), dims=("c", "y", "x"))
        element = as_element(one.data, self.names, self.job, self.frame)
        SpatialData(images={self.key: element}).write(self.staging / _SKELETON)
        group = zarr.open_group(self.element, mode="r+")
        name = _array_name(group)
        rows, columns = self.job.cells
        n = self.job.chunk
        # Readers read single chunks of a file: one gene costs a hundredth of the map, and files stay few. A file holds
        # whole stacks of chunks of one tile, so that no two tiles share a file.
        per_chunk = max(1, len(self.names) // 100)
        stack = (min(n, rows), min(n, columns))
        bytes_of_chunk = per_chunk * n * n * np.dtype(self.job.dtype).itemsize
        n_chunks = min(-(-len(self.names) // per_chunk), max(1, _FILE_BYTES // bytes_of_chunk))
        group.create_array(
            name,
            shape=(len(self.names), rows, columns),
            chunks=(per_chunk, *stack),
            shards=(per_chunk * n_chunks, *stack),
            dtype=self.job.dtype,
            fill_value=float("nan"),
            dimension_names=cast("Any", group[name].metadata).dimension_names,
            overwrite=True,
        )
        group.attrs[_FINGERPRINT] = self.fingerprint

    def array_path(self) -> Path:
        """Path of the growing array."""
        return self.element / _array_name(zarr.open_group(self.element, mode="r"))

    def commit(self) -> None:
        """Move the element into place and update the metadata of the store."""
        # Two maps of one store must not list its elements at the same time: one of them would miss the other.
        with owned(self.room.parent / _OWNER, what=f"The list of elements of {str(self.store)!r}", wait=_COMMIT_WAIT):
            if not self.complete:
                zarr.open_group(self.store, mode="r+", use_consolidated=False).require_group(_IMAGES)
                self._move_into_place()
            _remove_ours(self.staging)
            # Last: until now readers of the store see its earlier content. The element carries its fingerprint, so that
            # the next call completes a call that is interrupted here.
            zarr.consolidate_metadata(self.store)

    def _move_into_place(self) -> None:
        if not self.element.exists():  # it was moved before an interruption
            return
        self._require_free()
        zarr.open_group(self.element, mode="r+").attrs[_FILES] = _size(self.element)
        if self.target.exists():
            replaced = self.staging / "replaced"
            shutil.rmtree(replaced, ignore_errors=True)
            self.target.rename(replaced)
        self.element.rename(self.target)

    def read(self) -> Any:
        """Lazy element of the store."""
        group = zarr.open_group(self.target, mode="r")
        return as_element(da.from_zarr(group[_array_name(group)]), self.names, self.job, self.frame)


def _attribute(element: Path, name: str) -> Any:
    try:
        return json.loads((element / "zarr.json").read_text())["attributes"].get(name)
    except (OSError, KeyError, json.JSONDecodeError):
        return None


def _size(element: Path) -> list[int]:
    """Number and bytes of the files below the group of an element."""
    sizes = [path.stat().st_size for path in element.rglob("*") if path.is_file() and path.parent != element]
    return [len(sizes), sum(sizes)]


def _remove_ours(folder: Path) -> None:
    """Remove a folder of unfinished work; a ``FileExistsError`` if this package did not make it."""
    if not folder.exists():
        return
    if any(folder.iterdir()) and not (folder / _OURS).is_file():
        msg = f"{str(folder)!r} is not the rest of an interrupted call. Move it away."
        raise FileExistsError(msg)
    shutil.rmtree(folder)


def _array_name(group: zarr.Group) -> str:
    """Path of the only resolution of an image group."""
    attrs: dict[str, Any] = dict(group.attrs)
    return attrs.get("ome", attrs)["multiscales"][0]["datasets"][0]["path"]


def _marker(tile: tuple[int, int]) -> str:
    return f"{tile[0]}_{tile[1]}"


def write_tile(job: TiledMap, tile: tuple[int, int], array_path: str, done: str) -> tuple[int, int]:
    """Compute one tile, write its chunks and its marker; in this process or in a worker."""
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
    tasks = [(store.job, tile, array, done) for tile in interleave(tiles, len(client.nthreads()))]
    run_on_workers(client, write_tile, tasks, broadcast=True, on_done=on_tile)


def interleave(tiles: list[tuple[int, int]], n_workers: int) -> list[tuple[int, int]]:
    """Order of tiles in which each of the workers, served in rotation, gets neighboring tiles.

    Neighboring tiles share chunks of the image, which a worker keeps.
    """
    size = -(-len(tiles) // max(n_workers, 1))
    return [tiles[i] for first in range(size) for i in range(first, len(tiles), size)]


def as_element(data: Any, names: Sequence[str], job: TiledMap, frame: Frame) -> Any:
    """Image element (gene, y, x) with its map to the frame."""
    to_frame = Affine(scaling(1 / frame.um) @ job.cell_to_um, input_axes=("x", "y"), output_axes=("x", "y"))
    return Image2DModel.parse(data, dims=("c", "y", "x"), c_coords=list(names), transformations={frame.name: to_frame})


class RegionStore:
    """Writer of a table (regions, genes) to an AnnData in zarr.

    Values grow in a file beside the store, so that memory holds one tile. The store appears when all values are
    written. Its ``with`` block raises a ``FileExistsError`` if `store` exists, or if another process writes it.
    """

    def __init__(self, store: str | Path, shape: tuple[int, int]) -> None:
        self.store, self.shape, self.ndim = Path(store), shape, 2
        self.dtype = np.dtype(np.float32)
        self._require_free()
        self.scratch = self.store.with_name(self.store.name + ".partial")
        unknown = self.scratch.exists() and not (self.scratch / _OURS).is_file()
        if self.scratch.is_symlink() or (unknown and not (self.scratch.is_dir() and not any(self.scratch.iterdir()))):
            msg = (
                f"{str(self.scratch)!r} exists and is not the rest of an interrupted call. The table grows in a folder of that "
                "name; move it away, or pass another `store`."
            )
            raise FileExistsError(msg)
        self.values: Any = None
        """(regions, genes) float32, filled by the caller."""
        self._held = ExitStack()

    def __enter__(self) -> Self:
        # The owner file also marks the folder as ours, so it stays after an interruption.
        self._held.enter_context(owned(self.scratch / _OURS, what=f"The table {str(self.store)!r}", keep=True))
        with self._held.pop_all() as held:
            self._require_free()
            for path in self.scratch.iterdir():
                if path.name != _OURS:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            self.values = np.memmap(self.scratch / "values.bin", dtype=np.float32, mode="w+", shape=self.shape)
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.values = None
        self._held.close()

    def _require_free(self) -> None:
        if self.store.exists() or self.store.is_symlink():
            msg = f"{str(self.store)!r} exists. Pass another `store`, or remove it first."
            raise FileExistsError(msg)

    def __getitem__(self, key: tuple[slice, ...]) -> np.ndarray:
        part = np.array(self.values[key])
        self.release()
        return part

    def release(self) -> None:
        """Drop the pages of the file from the memory of the process."""
        if hasattr(mmap, "MADV_DONTNEED"):  # drops no other pages of a shared file
            self.values._mmap.madvise(mmap.MADV_DONTNEED)

    def commit(self, **parts: Any) -> AnnData:
        """Write the table with `parts` (arguments of AnnData), and return it with a lazy ``X``."""
        n_rows = max(1, _ROW_CHUNK_BYTES // (4 * self.shape[1]))
        lazy = da.from_array(self, chunks=(n_rows, self.shape[1]), name=False, asarray=False)
        group = zarr.open_group(self.scratch / "table.zarr", mode="w")
        write_elem(group, "/", AnnData(lazy, **parts))
        zarr.consolidate_metadata(group.store)
        del lazy
        self.values = None  # the file cannot be removed on every system while it is mapped
        self._require_free()
        (self.scratch / "table.zarr").rename(self.store)
        shutil.rmtree(self.scratch)
        return AnnData(da.from_zarr(zarr.open_group(self.store, mode="r")["X"]), **parts)
