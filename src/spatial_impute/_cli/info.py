"""What is installed, which devices there are, and which data are at hand."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from spatial_impute._settings import settings

if TYPE_CHECKING:
    from pathlib import Path

_PACKAGES = (
    "anndata",
    "spatialdata",
    "scanpy",
    "squidpy",
    "torch",
    "torch-geometric",
    "antspyx",
    "dask",
    "zarr",
    "numpy",
)
_EXTRAS = {
    "plot": ("spatialdata-plot",),
    "interactive": ("plotly",),
    "encoders": ("timm", "transformers"),
}


def info() -> str:
    """Versions, devices, caches and data, for a person or for a report of a bug.

    Nothing is downloaded.
    """
    lines = [f"spatial-impute {version('spatial-impute')}", ""]
    lines += [f"python         {platform.python_version()} on {platform.platform()}"]
    lines += [f"{name:<14} {_version(name) or 'MISSING'}" for name in _PACKAGES]
    lines += ["", "extras"]
    for extra, names in _EXTRAS.items():
        found = ", ".join(f"{name} {_version(name) or 'not installed'}" for name in names)
        lines.append(f"  {extra:<12} {found}")
    return "\n".join([*lines, "", *_devices(), "", *_data(settings.data_dir)])


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> list[str]:
    import torch

    lines = [f"device         {settings.device}", f"CPU threads    {torch.get_num_threads()} of {os.cpu_count()} cores"]
    for k in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(k)
        lines.append(f"  cuda:{k}       {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    return lines


def _data(folder: Path) -> list[str]:
    lines = [f"data folder    {folder}"]
    if not folder.is_dir():
        return [*lines, "  does not exist yet; it is made by the first download"]
    for entry in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = [path for path in entry.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files) / 2**20
        lines.append(f"  {entry.name:<12} {len(files)} files, {size:.1f} MiB")
    return lines
