"""Trained networks of an interrupted fit, one directory each, so that a second call goes on with the others."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from spatial_impute._logging import logger
from spatial_impute.models._base import load_directory, save_directory

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from spatial_impute.models._params import AsignParams
    from spatial_impute.models._spots import Spots

    NetworkRun = tuple[list[dict[str, Tensor]], list[dict[str, float]], list[list[Tensor]]]

_KIND = "AsignNetworkRun"


def fingerprint(stacks: list[Spots], params: AsignParams, *, seed: int, start: list[dict[str, Tensor]] | None) -> str:
    """Hash of all that a network depends on; a checkpoint of other data or settings is not taken up."""
    digest = hashlib.sha256(json.dumps([asdict(params), seed]).encode())
    for spots in stacks:
        arrays = [spots.xyz, spots.known, spots.expression, spots.features, *spots.tokens, spots.graph.data]
        for array in arrays:
            digest.update(np.ascontiguousarray(array).tobytes())
    for state in start or []:
        for key in sorted(state):
            digest.update(state[key].numpy().tobytes())
    return digest.hexdigest()


def save_run(path: Path, run: NetworkRun, mark: str) -> None:
    """Write beside and rename, so that what is there is whole."""
    states, history, predictions = run
    tensors = {f"state{i}.{key}": value for i, state in enumerate(states) for key, value in state.items()}
    tensors |= {f"prediction{i}.{j}": p for i, parts in enumerate(predictions) for j, p in enumerate(parts)}
    fresh = path.with_name(path.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    save_directory(
        fresh, kind=_KIND, config={"fingerprint": mark, "history": history}, tensors=tensors, overwrite=False
    )
    shutil.rmtree(path, ignore_errors=True)
    fresh.rename(path)


def load_run(path: Path, mark: str) -> NetworkRun | None:
    """Read what :func:`save_run` wrote; None if there is nothing of these data and settings."""
    if not path.is_dir():
        return None
    config, tensors = load_directory(path, kind=_KIND)
    if config["fingerprint"] != mark:
        logger.warning("The checkpoint in %s is of other data or settings and is replaced", path)
        return None
    n = len(config["history"])
    states, predictions = [{} for _ in range(n)], [{} for _ in range(n)]
    for key, value in tensors.items():
        kind, name = key.split(".", 1)
        if kind.startswith("state"):
            states[int(kind.removeprefix("state"))][name] = value
        else:
            predictions[int(kind.removeprefix("prediction"))][int(name)] = value
    return states, config["history"], [[parts[j] for j in sorted(parts)] for parts in predictions]
