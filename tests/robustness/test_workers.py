"""Workers of a dask cluster: the same bytes as without, also if one of them is killed in the middle."""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import sys
import threading
import time
import warnings

import pytest
import spatialdata as sd
import torch
from dying import DyingBlur, DyingColour, Load, add, features_of, map_of

import spatial_impute as si
from spatial_impute._io.workers import active_client, local_workers, run_on_workers

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="kills processes"),
    pytest.mark.timeout(300),  # a worker that waits for itself would wait for ever
]

KEY = "s0_image_expression"
LEVELS = ("X_spot", "X_region", "X_global")
QUICK = {"n_angles": 18, "n_candidates": 2, "working_side": 160, "search_side": 96}
PIXNET = {"n_steps": 2, "width": 8, "n_base": 8, "resolution": 8.0, "crop": 64, "margin": 8, "n_cached_crops": 4}


@contextlib.contextmanager
def cluster(n_workers: int):
    """Client of worker processes of one thread each."""
    from distributed import Client, LocalCluster

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of distributed, on ports, event loops and workers that end
        with (
            LocalCluster(n_workers=n_workers, threads_per_worker=1, processes=True, dashboard_address=None) as local,
            Client(local) as client,
        ):
            yield client


@pytest.fixture
def pair():
    with cluster(2) as client:
        yield client


@pytest.fixture
def one_thread():
    """As the workers have: sums in another order differ in the last digit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def note(tmp_path) -> str:
    """File that tells that a worker was killed."""
    return str(tmp_path / "killed")


@pytest.fixture
def dying_pixnet(still, note):
    return si.tl.fit_pixnet(still[0], "s1_image", "s1_spots", encoder=DyingBlur(note), model_params=PIXNET)


@pytest.fixture
def stored(sdata, tmp_path):
    """A section on disk."""
    small = sdata.subset(["s0_image", "s0_spots"])
    small.attrs = sdata.attrs
    small.write(tmp_path / "store.zarr")
    return small, tmp_path / "store.zarr"


def dense(sdata, model, **kwargs):
    return si.tl.predict_dense(sdata, "s0_image", model, tile_size=32, inplace=False, **kwargs)


def values(element) -> bytes:
    return element.compute(scheduler="synchronous").to_numpy().tobytes()


def kill_a_busy_worker(client, killed: list[int]) -> None:
    """SIGKILL of the first worker process that has a task."""
    pids = client.run(os.getpid)
    end = time.monotonic() + 120
    while time.monotonic() < end:
        busy = [address for address, tasks in client.processing().items() if tasks]
        if busy:
            os.kill(pids[busy[0]], signal.SIGKILL)
            killed.append(pids[busy[0]])
            return
        time.sleep(0.01)


def test_features_beside_workers_are_the_same_bytes(sdata, pair):
    """They are computed in this process; no part of that may go to the workers by accident."""
    expected = {key: sdata.tables["stack"].obsm[key].tobytes() for key in LEVELS}
    del sdata.tables["stack"].uns["features"]
    before = pair.run(lambda dask_worker: dask_worker.state.executed_count)
    si.pp.extract_features(sdata, DyingColour("", -1))
    assert {key: sdata.tables["stack"].obsm[key].tobytes() for key in LEVELS} == expected
    assert pair.run(lambda dask_worker: dask_worker.state.executed_count) == before


def test_features_as_a_task_survive_the_death_of_their_worker(sdata, pair, note, tmp_path):
    """Dask gives the task to the other worker, and the folder has what was finished."""
    expected = {key: sdata.tables["stack"].obsm[key].tobytes() for key in LEVELS}
    del sdata.tables["stack"].uns["features"]
    calls = DyingColour(note, 2)
    found = pair.submit(features_of, sdata, calls, str(tmp_path / "cache"), pure=False).result()
    assert os.path.exists(note)  # noqa: PTH110
    assert {key: value.tobytes() for key, value in found.items()} == expected
    assert len(list((tmp_path / "cache").glob("[!.]*.npz"))) == 3


@pytest.mark.parametrize("kills", [False, True], ids=["quiet", "one killed"])
def test_registration_on_two_workers_is_the_same_bytes(kills):
    made = si.datasets.synthetic_stack(3, extent=1400.0, n_genes=9)
    expected = si.tl.register_stack(copy.deepcopy(made), registration_params=QUICK, inplace=False)
    killed: list[int] = []
    with cluster(2) as client:
        if kills:
            thread = threading.Thread(target=kill_a_busy_worker, args=(client, killed))
            thread.start()
        found = si.tl.register_stack(made, registration_params=QUICK, inplace=False)
        if kills:
            thread.join()
    assert len(killed) == kills
    assert found.matrices.keys() == expected.matrices.keys()
    for name, matrix in expected.matrices.items():
        assert found.matrices[name].tobytes() == matrix.tobytes()


def test_fit_on_two_workers_is_the_same_model(still, one_thread, tmp_path):
    sdata = copy.deepcopy(still[0])
    params = {"base": "mean", "n_steps": 4, "width": 8, "n_heads": 2, "n_folds": 3}
    expected = si.tl.fit_asign(sdata, model_params=params)
    with local_workers(2):
        found = si.tl.fit_asign(sdata, model_params=params, checkpoint=tmp_path)
        tasks = active_client().run(lambda dask_worker: dask_worker.state.executed_count)
    assert sum(tasks.values()) == 6  # a co-kriging and a network of each fold
    assert found.identity == expected.identity
    assert found.cross_validation.equals(expected.cross_validation)
    assert len(list(tmp_path.glob("mean-network*"))) == 3


def test_fit_on_workers_that_are_threads_is_the_same_model(still, one_thread):
    """Threads share the random state of torch."""
    from distributed import Client

    sdata = copy.deepcopy(still[0])
    params = {"base": "mean", "n_steps": 20, "width": 8, "n_heads": 2, "n_folds": 3}
    expected = si.tl.fit_asign(sdata, model_params=params)
    with Client(processes=False, n_workers=1, threads_per_worker=3, dashboard_address=None):
        found = si.tl.fit_asign(sdata, model_params=params)
    assert found.identity == expected.identity


def test_map_of_two_workers_is_the_same_bytes_also_if_one_is_killed(stored, dying_pixnet, pair, note, one_thread):
    sdata, store = stored
    expected = values(dense(sdata, dying_pixnet))
    assert not os.path.exists(note)  # noqa: PTH110
    dense(sdata, dying_pixnet, store=store)
    assert os.path.exists(note)  # noqa: PTH110
    assert values(sd.read_zarr(store).images[KEY]) == expected
    assert not [path.name for path in store.iterdir() if "staging" in path.name]


def test_lazy_map_computed_by_workers_survives_a_death(sdata, dying_pixnet, pair, note, one_thread):
    element = dense(sdata, dying_pixnet)
    expected = values(element)
    assert element.compute().to_numpy().tobytes() == expected
    assert os.path.exists(note)  # noqa: PTH110


def test_map_as_a_task_needs_no_second_worker(stored, pixnet_on_workers, one_thread):
    """Within a task the tiles are computed in place: their turn would never come."""
    sdata, store = stored
    expected = values(dense(sdata, pixnet_on_workers))
    with cluster(1) as client:
        found = client.submit(map_of, sdata, pixnet_on_workers, str(store), pure=False).result(timeout=240)
    assert found.tobytes() == expected


@pytest.fixture
def pixnet_on_workers(still, tmp_path):
    """Model whose encoder the workers can import, and which kills none: the file is there already."""
    (tmp_path / "before").touch()
    encoder = DyingBlur(str(tmp_path / "before"))
    return si.tl.fit_pixnet(still[0], "s1_image", "s1_spots", encoder=encoder, model_params=PIXNET)


def test_what_only_the_dead_worker_had_is_sent_again(note):
    """One worker: with it goes all that was sent to it, which dask alone cannot replace."""
    load, done = Load(100, note, os.getpid()), []
    with cluster(1) as client:
        found = run_on_workers(client, add, [(load, i) for i in range(8)], on_done=lambda: done.append(0))
    assert os.path.exists(note)  # noqa: PTH110
    assert found == [100 + i for i in range(8)]
    assert len(done) == 8


def test_errors_of_tasks_come_through(pair):
    with pytest.raises(ZeroDivisionError, match=r"modulo|division"):
        run_on_workers(pair, divmod, [(7, 2), (1, 0)])


def test_workers_that_end_too_late_do_not_take_the_results_with_them(monkeypatch, caplog):
    from distributed import LocalCluster

    close = LocalCluster.close

    def late(cluster, *args, **kwargs):
        close(cluster, *args, **kwargs)
        raise TimeoutError

    monkeypatch.setattr(LocalCluster, "close", late)
    monkeypatch.setattr("spatial_impute._settings.logger.propagate", True)
    with local_workers(2):
        found = sum(range(4))
    assert found == 6
    assert "The workers did not end in time" in caplog.text
