"""Two processes at one place, also killed: what is stored is that of one of them, whole or absent."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest
import racing
import spatialdata as sd
import torch
import zarr
from anndata.io import read_elem

import spatial_impute as si
from spatial_impute._io.files import owned

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="uses a fork server")

KEY = "s0_image_expression"
_HANGS = 300  # seconds
N_PAIRS = int(os.environ.get("RACES", "2"))  # per kind of place; every second one with a kill


@pytest.fixture(scope="module")
def context():
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["racing", "zarr", "anndata", "spatialdata", "torch_geometric", "scanpy"])
    return found


@pytest.fixture
def models(pixnet):
    """Two models that give other values."""
    import copy

    other = copy.deepcopy(pixnet)
    with torch.no_grad():
        other.network.head_bias.add_(1.0)
    other.__dict__.pop("identity", None)
    assert other.identity != pixnet.identity
    return pixnet, other


def pair(context, kind: str, sdata, models, place: Path, last: int, delay: float) -> list[str]:
    """Run both processes, the first killed before its change number `last` (0: not at all). How each ended."""
    start = time.time() + 1.5
    processes = [
        context.Process(
            target=racing.run, args=(kind, sdata, models[i], place, i, last if i == 0 else 0, start + i * delay)
        )
        for i in range(2)
    ]
    for process in processes:
        process.start()
    for i, process in enumerate(processes):
        wait_for(process, place.parent / f"{place.name}_{i}.stack")
    notes = [place.parent / f"{place.name}_{i}.txt" for i in range(2)]
    return [note.read_text() if note.exists() else "killed" for note in notes]


def wait_for(process, stack: Path) -> None:
    """Wait for the end of a process. One that does nothing for five minutes hangs; one that waits for a processor does not."""
    used, since = -1.0, time.monotonic()
    while process.exitcode is None:
        process.join(5)
        try:  # it may have ended by now
            watched = psutil.Process(process.pid)
            now, waits = sum(watched.cpu_times()[:2]), watched.status() == psutil.STATUS_RUNNING
        except psutil.NoSuchProcess:
            continue
        if now > used or waits:
            used, since = now, time.monotonic()
        if time.monotonic() - since > _HANGS or used > _HANGS:
            os.kill(process.pid, signal.SIGUSR1)
            process.join(5)
            pytest.fail(f"a process hangs after {used:.0f} s of the processor:\n{stack.read_text()}")


def stored(kind: str, sdata, place: Path) -> Any:
    """What a reader of the place sees; None if nothing."""
    if kind == "map":
        found = sd.read_zarr(place / "map.zarr")
        return found.images[KEY].compute(scheduler="synchronous").to_numpy() if KEY in found.images else None
    if kind == "regions":
        path = place / "regions.zarr"
        return np.asarray(read_elem(zarr.open_group(path, mode="r")).X) if path.exists() else None
    if kind == "cache":
        files = sorted((place / "cache").glob("[!.]*.npz"))
        return [dict(np.load(file)) for file in files] or None
    from safetensors import safe_open

    files = sorted((place / "checkpoint").glob("*.safetensors"))
    return [safe_open(file, framework="pt").metadata()["record"] for file in files] or None


def expected(kind: str, sdata, model) -> Any:
    if kind == "map":
        found = si.tl.predict_dense(sdata, "s0_image", model, tile_size=32, inplace=False)
        return found.compute(scheduler="synchronous").to_numpy()
    return si.tl.predict_regions(sdata, "s0_spots", model, inplace=False).X


@pytest.mark.parametrize("kind", list(racing.WORK))
def test_two_processes_at_one_place(sdata, models, context, kind, tmp_path):
    """The loser ends with a message; a process that comes after a kill takes over."""
    import json

    rng = np.random.default_rng(0)
    small = sdata.subset(["s0_image", "s0_spots"])
    small.attrs = sdata.attrs
    values = [expected(kind, sdata, model) for model in models] if kind in ("map", "regions") else []
    for number in range(N_PAIRS):
        place = tmp_path / f"p{number}"
        place.mkdir()
        if kind == "map":
            small.write(place / "map.zarr")
        last = int(rng.integers(1, 60)) if number % 2 else 0
        ends = pair(context, kind, sdata, models, place, last, float(rng.choice([0.0, 0.02, 0.2])))
        for end in ends:
            known = (
                "being written by process",
                "being written by another",
                "exists",
                "already has",
                "belongs to another",
            )
            assert end in ("ok", "killed") or any(text in end for text in known), end
            assert last or end != "killed"
        if kind != "cache":
            assert ends.count("ok") <= 1 or kind == "checkpoint", ends
        assert "ok" in ends or "killed" in ends, ends

        found = stored(kind, sdata, place)
        if found is not None and kind in ("map", "regions"):
            whole = [found.tobytes() == value.tobytes() for value in values]
            assert any(whole), f"pair {number}: neither of the two, {ends}"
            assert all(ok for ok, end in zip(whole, ends, strict=True) if end == "ok")
        elif kind == "checkpoint" and found is not None:
            seeds = {json.dumps(json.loads(record)["fingerprint"], sort_keys=True) for record in found}
            assert len(seeds) == 1, f"pair {number}: networks of two trainings, {ends}"
        if "ok" not in ends:  # the killed one held the place: it is free now
            who = 0
            racing.WORK[kind](sdata, models[who], place, who)
            if kind in ("map", "regions"):
                assert stored(kind, sdata, place).tobytes() == values[who].tobytes()
        if kind == "cache":
            racing.write_features(sdata, None, place, 0)
            assert len(stored(kind, sdata, place)) == 3
        shutil.rmtree(place)


def test_owner_is_named_and_its_end_frees_the_place(tmp_path):
    file = tmp_path / "new" / "owner.json"
    with owned(file, what="The map"):
        with (
            pytest.raises(FileExistsError, match=rf"The map is being written by process {os.getpid()} on host"),
            owned(file, what="The map"),
        ):
            pass
        assert file.exists()  # the loser touched nothing
    assert not file.exists()
    file.write_text("{}")  # of a process that was killed
    with owned(file, what="The map"):
        pass


def test_second_model_leaves_the_map_of_the_first_alone(sdata, models, tmp_path, monkeypatch):
    """The second call comes when the first has written some tiles."""
    from spatial_impute._io import stores

    small = sdata.subset(["s0_image"])
    small.attrs = sdata.attrs
    small.write(tmp_path / "map.zarr")
    expect = expected("map", sdata, models[0])
    write, count = stores.write_tile, []

    def intruded(*args):
        count.append(0)
        if len(count) == 3:
            monkeypatch.setattr(stores, "write_tile", write)
            with pytest.raises(FileExistsError, match=r"image .* is being written by process \d+ on host"):
                racing.write_map(sdata, models[1], tmp_path, 1)
        return write(*args)

    monkeypatch.setattr(stores, "write_tile", intruded)
    racing.write_map(sdata, models[0], tmp_path, 0)
    assert len(count) == 3
    assert stored("map", sdata, tmp_path).tobytes() == expect.tobytes()
    with pytest.raises(ValueError, match="already has an image"):
        racing.write_map(sdata, models[1], tmp_path, 1)
    assert not (tmp_path / "map.zarr" / ".spatial_impute_staging").exists()


def test_a_map_that_lost_files_is_computed_again(sdata, pixnet, tmp_path, caplog):
    small = sdata.subset(["s0_image"])
    small.attrs = sdata.attrs
    small.write(tmp_path / "map.zarr")
    expect = expected("map", sdata, pixnet)
    racing.write_map(sdata, pixnet, tmp_path, 0)
    chunk = next(p for p in (tmp_path / "map.zarr" / "images" / KEY).rglob("c/*/*/*") if p.is_file())
    chunk.unlink()
    assert np.isnan(stored("map", sdata, tmp_path)).sum() > np.isnan(expect).sum()
    with caplog.at_level("WARNING", "spatial_impute"):
        racing.write_map(sdata, pixnet, tmp_path, 0)
    assert "missing or damaged" in caplog.text
    assert stored("map", sdata, tmp_path).tobytes() == expect.tobytes()


def test_an_image_of_the_user_is_never_replaced(sdata, pixnet, tmp_path):
    small = sdata.subset(["s0_image"])
    small.attrs = sdata.attrs
    small.write(tmp_path / "map.zarr")
    with pytest.raises(ValueError, match="no dense map of this package"):
        si.tl.predict_dense(
            sdata, "s0_image", pixnet, store=tmp_path / "map.zarr", key_added="s0_image", overwrite=True, inplace=False
        )


@pytest.mark.parametrize("damage", ["other", "rows", "nan"])
def test_cached_features_are_checked_when_they_are_read(sdata, tmp_path, caplog, damage):
    racing.write_features(sdata, None, tmp_path, 0)
    table = sdata.tables["stack"]
    expect = table.obsm["X_region"].copy()
    first, second, _ = sorted((tmp_path / "cache").glob("*.npz"))
    content = dict(np.load(first))
    if damage == "other":
        shutil.copy(second, first)
    else:
        content["X_spot"] = content["X_spot"][1:] if damage == "rows" else content["X_spot"] * np.nan
        np.savez(first, **content)
    with caplog.at_level("WARNING", "spatial_impute"):
        racing.write_features(sdata, None, tmp_path, 0)
    assert "is damaged" in caplog.text
    np.testing.assert_array_equal(table.obsm["X_region"], expect)


def test_a_checkpoint_whose_numbers_were_changed_is_refused(sdata, tmp_path):
    racing.write_checkpoint(sdata, None, tmp_path, 0)
    file = next((tmp_path / "checkpoint").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 64
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged: .*numbers were changed"):
        racing.write_checkpoint(sdata, None, tmp_path, 0)
