"""Networks of an ASIGN fit that are finished: one file each, so that an interrupted fit goes on with the others."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from spatial_impute._logging import logger

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from spatial_impute.models._spots import Spots

    Run = tuple[list[dict[str, Tensor]], list[dict[str, float]], list[list[Tensor]]]


def fit_fingerprint(stacks: Sequence[Spots], settings: dict[str, Any]) -> str:
    """Hash of all that a fit depends on: what the spots carry, and the settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for spots in stacks:
        arrays = [spots.xyz, spots.section, spots.known, spots.expression, spots.features, spots.counting_noise]
        arrays += [*spots.tokens, spots.graph.data, spots.graph.indices, spots.graph.indptr, spots.edge_features]
        for array in arrays:
            digest.update(repr((array.shape, array.dtype.str)).encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


class FinishedNetworks:
    """Results of :func:`~spatial_impute.models.asign._training.train` in a folder.

    Parameters
    ----------
    folder
        Where they are kept.
    fingerprint
        What tells this fit from others.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self.fingerprint = folder, fingerprint

    def load(self, k: int) -> Run | None:
        """Result of network `k`; None if it is not finished.

        Raises
        ------
        ValueError
            If the file belongs to another fit, or is damaged.
        """
        from safetensors import SafetensorError, safe_open

        path = self._path(k)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                record = json.loads((file.metadata() or {}).get("record", "{}"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 -- no mapping
        except (SafetensorError, json.JSONDecodeError) as error:
            msg = f"The checkpoint {str(path)!r} is damaged: {error}. Remove it to fit this network anew."
            raise ValueError(msg) from error
        if record.get("fingerprint") != self.fingerprint:
            msg = (
                f"The checkpoint in {str(self.folder)!r} belongs to another training: data, settings or seed differ. "
                "Remove the directory, or pass another `checkpoint`."
            )
            raise ValueError(msg)
        logger.info("Network %d: read from %s", k, path)
        rows = [{key: float("nan") if v is None else v for key, v in row.items()} for row in record["rows"]]
        states: list[dict[str, Tensor]] = [{} for _ in rows]
        predictions: list[list[Tensor]] = [[] for _ in rows]
        for j in range(len(rows)):
            prefix = f"state{j}."
            states[j] = {key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)}
            predictions[j] = [tensors[f"predicted{j}.{i}"] for i in range(record["n_stacks"])]
        return states, rows, predictions

    def save(self, k: int, run: Run) -> None:
        """Keep the result of network `k`; an interruption leaves the whole file or none."""
        from safetensors.torch import save

        states, rows, predictions = run
        tensors = {f"state{j}.{key}": v.contiguous() for j, state in enumerate(states) for key, v in state.items()}
        tensors |= {
            f"predicted{j}.{i}": p.contiguous() for j, found in enumerate(predictions) for i, p in enumerate(found)
        }
        plain = [{key: None if v != v else v for key, v in row.items()} for row in rows]  # NaN is no JSON
        record = {"fingerprint": self.fingerprint, "rows": plain, "n_stacks": len(predictions[0])}
        path = self._path(k)
        fresh = path.with_suffix(".new")
        try:
            fresh.write_bytes(save(tensors, {"record": json.dumps(record)}))
            fresh.replace(path)
        except OSError as error:
            error.add_note(f"Networks finished before are in {str(self.folder)!r}; the same call goes on from them.")
            raise

    def _path(self, k: int) -> Path:
        return self.folder / f"network{k}.safetensors"
