"""State of a training that can be taken up again: tensors as safetensors, the rest as JSON; replaced as a whole."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spatial_impute._logging import logger

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_TENSORS = "state.safetensors"
_RECORD = "state.json"


@dataclass
class Checkpoint:
    """What was read."""

    network: dict[str, Tensor]
    best: dict[str, Tensor]
    loss: dict[str, Tensor]
    history: list[dict[str, Any]]
    _optimizer: dict[str, Tensor]

    def restore_optimizer(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """State dict for `optimizer`."""
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in self._optimizer.items():
            index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
        return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


def save_checkpoint(
    path: str | Path,
    fingerprint: dict[str, Any],
    network: nn.Module,
    *,
    optimizer: torch.optim.Optimizer,
    loss: nn.Module,
    history: list[dict[str, Any]],
    best: dict[str, Tensor],
) -> None:
    """Write beside the old state, then swap: an interruption leaves the one or the other."""
    from safetensors.torch import save

    path = Path(path)
    fresh, old = path.with_name(path.name + ".new"), path.with_name(path.name + ".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    tensors = {f"network.{k}": v for k, v in network.state_dict().items()}
    tensors |= {f"best.{k}": v for k, v in best.items()}
    tensors |= {f"loss.{k}": v for k, v in loss.state_dict().items()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
    rows = [{k: None if v != v else v for k, v in row.items()} for row in history]  # NaN is no JSON
    try:
        fresh.mkdir(parents=True)
        (fresh / _TENSORS).write_bytes(save({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}))
        (fresh / _RECORD).write_text(json.dumps({"fingerprint": fingerprint, "history": rows}))
    except OSError as error:
        error.add_note(f"The last state in {str(path)!r} is unchanged; the same call takes it up once there is room.")
        raise
    if path.exists():
        path.rename(old)
    fresh.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(path: str | Path, fingerprint: dict[str, Any]) -> Checkpoint | None:
    """Read a state; None if there is none.

    Raises
    ------
    ValueError
        If it belongs to another training.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    for place in (path, path.with_name(path.name + ".old")):
        if (place / _RECORD).is_file() and (place / _TENSORS).is_file():
            break
    else:
        return None
    try:
        record = json.loads((place / _RECORD).read_text())
        tensors = load_file(place / _TENSORS)
    except (json.JSONDecodeError, SafetensorError) as error:
        msg = f"The checkpoint in {str(place)!r} is damaged: {error}. Remove the directory to start anew."
        raise ValueError(msg) from error
    wanted = json.loads(json.dumps(fingerprint))
    if record["fingerprint"] != wanted:
        differ = sorted(k for k in {*wanted, *record["fingerprint"]} if wanted.get(k) != record["fingerprint"].get(k))
        msg = (
            f"The checkpoint in {str(path)!r} belongs to another training: {differ} differ. "
            "Remove the directory, or pass another `checkpoint`."
        )
        raise ValueError(msg)

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    history = [{k: float("nan") if v is None else v for k, v in row.items()} for row in record["history"]]
    logger.info("Read checkpoint %s", place)
    return Checkpoint(part("network."), part("best."), part("loss."), history, part("optimizer."))
