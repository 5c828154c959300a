"""Progress bars that follow ``settings.show_progress_bar``."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from spatial_impute._settings import settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    Steps = Callable[[int], Callable[[], None]]


def progress(items: Iterable[Any] | None, label: str, *, show: bool | None = None, total: int | None = None) -> Any:
    """Wrap an iterable in a tqdm bar; `show` overrides the setting."""
    from tqdm.auto import tqdm

    hidden = not (settings.show_progress_bar if show is None else show)
    return tqdm(items, desc=label, total=total, disable=hidden)


@contextmanager
def progress_steps(label: str, *, show: bool | None = None) -> Iterator[Steps]:
    """Bar of a length that is known later: a function of the number of steps, which returns the function to call per step."""
    bar = progress(None, label, show=show)

    def start(total: int) -> Callable[[], None]:
        bar.reset(total=total)
        return bar.update

    try:
        yield start
    finally:
        bar.close()
