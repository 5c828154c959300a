"""Calls that two processes make at the same place at once. Processes import them by this name."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import spatial_impute as si

if TYPE_CHECKING:
    from pathlib import Path


class Color:
    """Encoder that costs nothing and may be cached."""

    name, mpp, patch_px, identity = "color", 4.0, 16, "color-1"

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        return np.concatenate([patches.mean(axis=(1, 2)), patches.std(axis=(1, 2))], axis=1)


def write_map(sdata: Any, model: Any, place: Path, seed: int) -> None:
    """Dense map of one of two models, into one store."""
    si.tl.predict_dense(sdata, "s0_image", model, tile_size=32, store=place / "map.zarr", inplace=False)


def write_regions(sdata: Any, model: Any, place: Path, seed: int) -> None:
    """Table of one of two models, in one store."""
    si.tl.predict_regions(sdata, "s0_spots", model, store=place / "regions.zarr", inplace=False)


def write_features(sdata: Any, model: Any, place: Path, seed: int) -> None:
    """Features of all sections, in one folder."""
    sdata.tables["stack"].uns.pop("features", None)  # of an earlier pair
    si.pp.extract_features(sdata, Color(), cache_dir=place / "cache")


def write_checkpoint(sdata: Any, model: Any, place: Path, seed: int) -> None:
    """Networks of one of two trainings, in one folder."""
    params = {"n_steps": 2, "width": 8, "n_heads": 2, "n_folds": 2}
    si.tl.fit_asign(sdata, model_params=params, checkpoint=place / "checkpoint", seed=seed)


WORK = {"map": write_map, "regions": write_regions, "cache": write_features, "checkpoint": write_checkpoint}


def kill_after(folder: Path, last: int) -> None:
    """Kill this process before its `last`-th change of a folder."""
    count = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal count
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (writes or event in ("os.rename", "os.mkdir", "os.remove")) and str(args[0]).startswith(str(folder)):
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def run(kind: str, sdata: Any, model: Any, place: Path, seed: int, last: int, start: float) -> None:
    """One process of a pair. It writes how it ended."""
    stack = (place.parent / f"{place.name}_{seed}.stack").open("w")
    faulthandler.register(signal.SIGUSR1, stack)  # where it is, if it hangs
    torch.set_num_threads(1)
    si.settings.verbosity, si.settings.show_progress_bar, si.settings.device = "error", False, "cpu"
    if last:
        kill_after(place, last)
    time.sleep(max(0.0, start - time.time()))
    try:
        WORK[kind](sdata, model, place, seed)
        end = "ok"
    except (FileExistsError, ValueError) as error:
        end = f"{type(error).__name__}: {error}"
    (place.parent / f"{place.name}_{seed}.txt").write_text(end)
