"""Killed, interrupted or out of disk: a store shows nothing or all of it, the object is as before, a second call ends it."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import spatialdata as sd
import torch

import spatial_impute as si
from spatial_impute.models.pixnet._tiles import DenseJob

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has threads")

KEY = "s0_image_expression"
N_INSTANTS = 4  # of a write at which the process is killed; HYPOTHESIS_PROFILE=fuzz takes all of them
ALL_INSTANTS = os.environ.get("HYPOTHESIS_PROFILE") == "fuzz"


def in_child(work: Callable[[], Any], *, before: Callable[[], Any] = lambda: None, patience: float = 240.0) -> int:
    """Run in a process of its own; its exit code, or minus the signal that ended it."""
    import dask

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the threads of the parent do not exist in the child
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(2)
            os.open(os.devnull, os.O_WRONLY)
            with dask.config.set(scheduler="synchronous"):
                before()
                work()
            code = 0
        except KeyboardInterrupt:
            code = 130
        except OSError as error:
            code = 28 if error.errno in (27, 28) and error.__notes__ else 2
        finally:
            os._exit(code)
    torch.set_num_threads(threads)
    end = time.monotonic() + patience
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("hangs")


def watch(folder: Path, on_change: Callable[[int], None]) -> None:
    """Call `on_change` before every change of the folder, with its number. There is no way back: for children only."""
    count = 0
    prefix = str(folder)

    def hook(event: str, args: tuple) -> None:
        nonlocal count
        if event == "open":
            changes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            changes = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.utime")
        if changes and str(args[0]).startswith(prefix):
            count += 1
            on_change(count)

    sys.addaudithook(hook)


def count_changes(work: Callable[[], Any], folder: Path, note: Path) -> int:
    """How often a call changes a folder."""
    assert in_child(work, before=lambda: watch(folder, lambda n: note.write_text(str(n)))) == 0
    return int(note.read_text())


def kill_at(work: Callable[[], Any], folder: Path, instant: int) -> None:
    """Run in a child that is killed, without a chance to clean up, right before a change of the folder."""

    def kill(n: int) -> None:
        if n == instant:
            os.kill(os.getpid(), signal.SIGKILL)

    # The number of changes differs a little between runs; the last ones may not come.
    assert in_child(work, before=lambda: watch(folder, kill)) in (-signal.SIGKILL, 0)


def instants(total: int) -> list[int]:
    """Instants to try, the first and the last changes among them."""
    if ALL_INSTANTS:
        return list(range(1, total + 1))
    return sorted({1, total, total - 1, total - 2, *np.linspace(1, total, N_INSTANTS).astype(int).tolist()})


@pytest.fixture
def stored(sdata, tmp_path):
    """A section on disk, and a copy of it for every attempt."""
    import shutil

    small = sdata.subset(["s0_image", "s0_spots"])
    small.attrs = sdata.attrs
    small.write(tmp_path / "origin.zarr")

    def fresh(name: str) -> Path:
        shutil.copytree(tmp_path / "origin.zarr", tmp_path / name)
        return tmp_path / name

    return small, fresh


def dense(sdata, model, store, **kwargs):
    si.tl.predict_dense(sdata, "s0_image", model, tile_size=32, store=store, **kwargs)


@pytest.fixture
def expected(stored, pixnet):
    return si.tl.predict_dense(stored[0], "s0_image", pixnet, tile_size=32, inplace=False).compute().to_numpy()


def complete(store: Path, expected: np.ndarray) -> bool:
    """Whether the store shows the map. What it shows must be whole."""
    found = sd.read_zarr(store)
    assert set(found.images) <= {"s0_image", KEY}
    if KEY not in found.images:
        return False
    assert found.images[KEY].compute(scheduler="synchronous").to_numpy().tobytes() == expected.tobytes()
    return True


def test_dense_map_killed_at_any_instant_is_shown_whole_or_not_at_all(stored, pixnet, expected, tmp_path):
    sdata, fresh = stored
    total = count_changes(lambda: dense(sdata, pixnet, tmp_path / "count.zarr"), fresh("count.zarr"), tmp_path / "n")
    assert total > 50
    for instant in instants(total):
        store = fresh(f"{instant}.zarr")
        kill_at(lambda store=store: dense(sdata, pixnet, store), store, instant)
        complete(store, expected)
        dense(sdata, pixnet, store)
        assert complete(store, expected), instant
        assert not [p.name for p in store.iterdir() if "staging" in p.name]
        del sdata.images[KEY]


def test_tiles_finished_before_a_kill_are_not_computed_again(stored, pixnet, tmp_path, monkeypatch):
    sdata, fresh = stored
    store = fresh("a.zarr")
    total = count_changes(lambda: dense(sdata, pixnet, tmp_path / "count.zarr"), fresh("count.zarr"), tmp_path / "n")
    kill_at(lambda: dense(sdata, pixnet, store), store, int(0.8 * total))
    done = len(list((store / ".spatial_impute_staging" / KEY).glob("*/done/*")))
    calls, compute = [], DenseJob.compute
    monkeypatch.setattr(DenseJob, "compute", lambda self, tile: calls.append(tile) or compute(self, tile))
    dense(sdata, pixnet, store)
    n_tiles = sdata.attrs["spatial_impute"]["dense"][KEY]["n_tiles_predicted"]
    assert done > 2
    assert len(calls) == n_tiles - done


def test_replacing_a_map_leaves_the_old_one_or_the_new_one(stored, pixnet, expected, tmp_path):
    """The window in which neither is in place ends with the next call."""
    sdata, fresh = stored
    gene = pixnet.var_names[:1]
    origin = fresh("count.zarr")
    dense(sdata, pixnet, origin, genes=gene)

    def replace(store):
        dense(sdata, pixnet, store, overwrite=True)

    import shutil

    for name in ("0.zarr", "1.zarr"):
        shutil.copytree(origin, tmp_path / name)
    total = count_changes(lambda: replace(tmp_path / "0.zarr"), tmp_path / "0.zarr", tmp_path / "n")
    for instant in instants(total)[-4:]:
        store = tmp_path / f"r{instant}.zarr"
        shutil.copytree(origin, store)
        kill_at(lambda store=store: replace(store), store, instant)
        replace(store)
        assert complete(store, expected)


def test_disk_full_while_a_map_is_written(stored, pixnet, expected):
    """Files may not grow beyond 2 kB: as if the disk were full; then there is room again."""
    sdata, fresh = stored
    store = fresh("a.zarr")
    code = in_child(
        lambda: dense(sdata, pixnet, store), before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    )
    assert code == 28
    assert not complete(store, expected)
    dense(sdata, pixnet, store)
    assert complete(store, expected)


def test_ctrl_c_while_a_map_is_written(stored, pixnet, expected):
    """A real SIGINT: the process ends at once, the next call goes on."""
    sdata, fresh = stored
    store = fresh("a.zarr")

    def interrupt(n: int) -> None:
        # Again if the first is lost: what is raised while an object is finalised goes nowhere.
        if n in {8, 14, 20, 26}:
            os.kill(os.getpid(), signal.SIGINT)

    def before() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        watch(store, interrupt)

    assert in_child(lambda: dense(sdata, pixnet, store), before=before) == 130
    assert not complete(store, expected)
    dense(sdata, pixnet, store)
    assert complete(store, expected)


class Killed(BaseException):
    """No code cleans up after it."""


def test_regions_interrupted_at_any_instant(stored, pixnet, tmp_path):
    """Here in this process: threads that write tables do not survive a fork."""
    from anndata.io import read_elem
    from zarr import open_group

    sdata, _ = stored
    expected = si.tl.predict_regions(sdata, "s0_spots", pixnet, inplace=False).X
    seen, last = [0], [0]

    def stop(n: int) -> None:
        seen[0] += 1
        if seen[0] == last[0]:
            raise Killed

    def work(store):
        si.tl.predict_regions(sdata, "s0_spots", pixnet, store=store, inplace=False)

    watch(tmp_path, stop)
    work(tmp_path / "count.zarr")
    for instant in instants(seen[0]):
        store = tmp_path / f"{instant}.zarr"
        seen[0], last[0] = 0, instant
        with contextlib.suppress(Killed):
            work(store)
        last[0] = 0
        if not store.exists():
            work(store)
        np.testing.assert_array_equal(read_elem(open_group(store, mode="r")).X, expected)


class Slow:
    """Encoder whose results may be kept."""

    name, mpp, patch_px, identity = "slow", 4.0, 16, "slow-1"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, patches):
        self.calls += 1
        return patches.mean(axis=(1, 2))


def test_features_killed_at_any_instant_are_taken_up(sdata, tmp_path):
    import copy

    expected = copy.deepcopy(sdata)
    si.pp.extract_features(expected, Slow())
    total = count_changes(
        lambda: si.pp.extract_features(sdata, Slow(), cache_dir=tmp_path / "c"), tmp_path / "c", tmp_path / "n"
    )
    for instant in instants(total):
        folder = tmp_path / str(instant)
        kill_at(lambda folder=folder: si.pp.extract_features(sdata, Slow(), cache_dir=folder), folder, instant)
        finished = len(list(folder.glob("[!.]*.npz"))) if folder.exists() else 0
        attempt, encoder = copy.deepcopy(sdata), Slow()
        si.pp.extract_features(attempt, encoder, cache_dir=folder)
        assert (encoder.calls == 0) == (finished == 3)
        for key in ("X_spot", "X_region", "X_global"):
            np.testing.assert_array_equal(attempt.tables["stack"].obsm[key], expected.tables["stack"].obsm[key])


def test_training_of_pixnet_killed_at_any_instant_is_taken_up(sdata, pixnet, tmp_path):
    params = {
        "n_steps": 3,
        "n_steps_per_check": 1,
        "width": 8,
        "n_base": 8,
        "resolution": 8.0,
        "crop": 128,
        "margin": 8,
    }
    params["n_cached_crops"] = 4

    def fit(checkpoint=None):
        encoder = type(pixnet.network.pyramid.module)()
        return si.tl.fit_pixnet(
            sdata, "s1_image", "s1_spots", encoder=encoder, model_params=params, checkpoint=checkpoint
        )

    expected = fit().identity
    (tmp_path / "c").mkdir()
    total = count_changes(lambda: fit(tmp_path / "c" / "state"), tmp_path / "c", tmp_path / "n")
    for instant in instants(total)[1:]:
        folder = tmp_path / str(instant)
        folder.mkdir()
        kill_at(lambda folder=folder: fit(folder / "state"), folder, instant)
        assert fit(folder / "state").identity == expected


def test_training_of_asign_killed_at_any_instant_is_taken_up(sdata, asign, tmp_path, monkeypatch):
    from spatial_impute.models.asign import _ensemble

    params = {"n_steps": 2, "width": 8, "n_heads": 2, "n_folds": 2}

    def fit(folder):
        return si.tl.fit_asign(sdata, model_params=params, checkpoint=folder)

    total = count_changes(lambda: fit(tmp_path / "c"), tmp_path / "c", tmp_path / "n")
    train, n_files = _ensemble.train, None
    for instant in instants(total):
        folder = tmp_path / str(instant)
        kill_at(lambda folder=folder: fit(folder), folder, instant)
        finished = len(list(folder.glob("*.safetensors")))
        calls = []
        monkeypatch.setattr(_ensemble, "train", lambda *a, calls=calls, **k: calls.append(0) or train(*a, **k))
        model = fit(folder)
        n_files = n_files or len(list(folder.glob("*.safetensors")))
        assert len(calls) == n_files - finished
        assert model.identity == asign.identity
        assert model.history.to_json() == asign.history.to_json()
    with pytest.raises(ValueError, match="belongs to another training"):
        si.tl.fit_asign(sdata, model_params=params, checkpoint=folder, seed=1)
    sdata.tables["stack"].layers["measured"] *= 1.01
    with pytest.raises(ValueError, match="belongs to another training"):
        fit(folder)


def test_saving_a_model_killed_at_any_instant(asign, still, tmp_path):
    """The old model, the new one, or a message that says so; never weights of the one with genes of the other."""
    import copy

    other = copy.copy(asign)
    other._tensors = {key: value * 2 if value.is_floating_point() else value for key, value in asign._tensors.items()}
    (tmp_path / "c").mkdir()
    asign.save(tmp_path / "c" / "m")
    total = count_changes(lambda: other.save(tmp_path / "c" / "m", overwrite=True), tmp_path / "c", tmp_path / "n")
    for instant in range(1, total + 1):
        path = tmp_path / f"m{instant}"
        asign.save(path)
        kill_at(lambda path=path: other.save(path, overwrite=True), path, instant)
        try:
            found = si.models.AsignModel.load(path)
        except ValueError as error:
            assert "was interrupted" in str(error)  # noqa: PT017
        else:
            either = [model._tensors["centre"] for model in (asign, other)]  # the new one while its lock is released
            assert any(torch.equal(found._tensors["centre"], centre) for centre in either)
            assert found.var_names == asign.var_names
        other.save(path, overwrite=True)
        assert torch.equal(si.models.AsignModel.load(path)._tensors["centre"], other._tensors["centre"])


def test_disk_full_while_a_model_is_saved(asign, tmp_path):
    asign.save(tmp_path / "m")

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    for path in (tmp_path / "m", tmp_path / "new"):
        assert in_child(lambda path=path: asign.save(path, overwrite=True), before=full) == 28
    assert not (tmp_path / "new").exists()
    assert si.models.AsignModel.load(tmp_path / "m").var_names == asign.var_names
    asign.save(tmp_path / "new")


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError])
@pytest.mark.parametrize(
    ("place", "call"),
    [
        ("spatial_impute.tl._register_stack.register_chain", lambda s, a, p: si.tl.register_stack(s)),
        ("spatial_impute.tl._build_3d_graph.build_graph", lambda s, a, p: si.tl.build_3d_graph(s)),
        (
            "spatial_impute.models.asign._training.training_step",
            lambda s, a, p: si.tl.fit_asign(s, model_params={"n_steps": 2, "width": 8, "n_heads": 2, "n_folds": 2}),
        ),
        ("spatial_impute.models.asign._model.graph_inputs", lambda s, a, p: si.tl.impute_3d(s, a)),
        ("spatial_impute.models.pixnet._tiles.forward_tile", lambda s, a, p: si.tl.predict_regions(s, "s0_spots", p)),
    ],
    ids=["register", "graph", "fit", "impute", "regions"],
)
def test_what_is_interrupted_leaves_the_object_as_it_was(
    sdata, asign, pixnet, fingerprint, monkeypatch, place, call, error
):
    before = fingerprint(sdata)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(place, fail)
    with pytest.raises(error):
        call(sdata, asign, pixnet)
    assert fingerprint(sdata) == before
