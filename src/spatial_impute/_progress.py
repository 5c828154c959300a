"""Progress bars that follow ``settings.show_progress_bar``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spatial_impute._settings import settings

if TYPE_CHECKING:
    from collections.abc import Iterable


def progress(items: Iterable[Any] | None, label: str, *, show: bool | None = None, total: int | None = None) -> Any:
    """Wrap an iterable in a tqdm bar; `show` overrides the setting."""
    from tqdm.auto import tqdm

    hidden = not (settings.show_progress_bar if show is None else show)
    return tqdm(items, desc=label, total=total, disable=hidden)
