"""What runs on dask workers in the tests and takes their process with it, once. Workers import it by this name."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import spatial_impute as si

_calls: dict[str, int] = {}


def die_once(note: str, home: int, after: int) -> None:
    """Kill the process this is called in for the `after`-th time, unless it is `home`, or another one was killed before."""
    if os.getpid() == home:
        return
    _calls[note] = _calls.get(note, 0) + 1
    if _calls[note] == after:
        try:
            Path(note).open("x").close()
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)


class DyingBlur(nn.Module):
    """Colours at strides 2 and 4. One worker dies in its second pass."""

    def __init__(self, note: str) -> None:
        super().__init__()
        self.note, self.home = note, os.getpid()

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        die_once(self.note, self.home, 2)
        return [nn.functional.avg_pool2d(x, k) for k in (2, 4)]


class DyingColour:
    """Encoder whose results may be kept. One worker dies in its second section."""

    name, mpp, patch_px, identity = "colour", 4.0, 16, "colour-1"

    def __init__(self, note: str, after: int) -> None:
        self.note, self.home, self.after = note, os.getpid(), after

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        die_once(self.note, self.home, self.after)
        return np.concatenate([patches.mean(axis=(1, 2)), patches.std(axis=(1, 2))], axis=1)


@dataclass(frozen=True)
class Load:
    """Something that is sent to the workers once."""

    value: int
    note: str
    home: int


def add(load: Load, x: int) -> int:
    """Sum. One worker dies in its second one."""
    die_once(load.note, load.home, 2)
    return load.value + x


def features_of(sdata: Any, encoder: Any, folder: str | None) -> dict[str, np.ndarray]:
    """Features of the stack, to be run as a task."""
    si.pp.extract_features(sdata, encoder, cache_dir=folder, show_progress_bar=False)
    return {key: sdata.tables["stack"].obsm[key] for key in ("X_spot", "X_region", "X_global")}


def map_of(sdata: Any, model: Any, store: str) -> np.ndarray:
    """Dense map written to a store, to be run as a task."""
    found = si.tl.predict_dense(
        sdata, "s0_image", model, tile_size=32, store=store, inplace=False, show_progress_bar=False
    )
    return found.compute(scheduler="synchronous").to_numpy()
