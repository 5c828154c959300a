"""3D imputation of spatial transcriptomics from serial H&E sections.

``pp`` assembles, segments, lays spots, chooses genes and extracts features; ``tl`` registers sections, builds the 3D
graph, fits models and imputes; ``pl`` draws; ``metrics``, ``datasets`` and ``models``. Namespaces are imported on first
use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from spatial_impute._settings import settings

if TYPE_CHECKING:
    from spatial_impute import datasets, metrics, models, pl, pp, tl

__all__ = ["datasets", "metrics", "models", "pl", "pp", "settings", "tl"]

_NAMESPACES = frozenset({"datasets", "metrics", "models", "pl", "pp", "tl"})


def __getattr__(name: str) -> object:
    if name in _NAMESPACES:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "__version__":
        from importlib.metadata import version

        return version("spatial-impute")
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
