"""Settings of the package, its logger, and its progress bars."""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    Steps = Callable[..., Callable[[], None]]  # (number of steps, name of the stage)

logger = logging.getLogger("spatial_impute")

if not logger.handlers:  # a handler of its own, so that the user's root configuration stays as it is
    _handler = logging.StreamHandler()
    _handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    logger.addHandler(_handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def log_added(slot: str) -> None:
    """Log the slot of the data object that was written, e.g. ``tables['stack'].layers['asign']``."""
    logger.info("Adding `sdata.%s`", slot)


_LOG_EVERY = 10.0  # s
_LEVELS = {"error": logging.ERROR, "warning": logging.WARNING, "info": logging.INFO, "debug": logging.DEBUG}
_LEVELS_OF_SCANPY = ("error", "warning", "info", "info", "debug")  # its 3 is for hints, which this package has not


class Settings:
    """Settings that functions use when an argument is ``None``.

    Examples
    --------
    >>> import spatial_impute as si
    >>> si.settings.verbosity = "warning"
    >>> si.settings.verbosity
    'warning'
    >>> si.settings.verbosity = "info"
    """

    def __init__(self) -> None:
        self.show_progress_bar: bool = True
        """Draw progress bars in functions that take long."""
        self._log_progress = False  # lines in the log instead of bars, for the command line
        self._device: str | None = None
        self._data_dir: Path | None = None

    @property
    def device(self) -> str:
        """Torch device; by default ``"cuda"`` or ``"mps"`` if the machine has one, else ``"cpu"``."""
        if self._device is None:
            import torch  # not at import time: torch costs over a second

            if torch.cuda.is_available():
                self._device = "cuda"
            elif torch.backends.mps.is_available():
                self._device = "mps"
            else:
                self._device = "cpu"
        return self._device

    @device.setter
    def device(self, value: str | None) -> None:
        self._device = value

    @property
    def verbosity(self) -> str:
        """One of ``"error"``, ``"warning"``, ``"info"``, ``"debug"``; 0 to 4 are taken as scanpy takes them."""
        return logging.getLevelName(logger.level).lower()

    @verbosity.setter
    def verbosity(self, value: str | int) -> None:
        level = value
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(_LEVELS_OF_SCANPY):
            level = _LEVELS_OF_SCANPY[value]
        if not isinstance(level, str) or level not in _LEVELS:
            msg = f"`verbosity` must be one of {list(_LEVELS)} or 0 to 4, found {value!r}."
            raise ValueError(msg)
        logger.setLevel(_LEVELS[level])

    @property
    def data_dir(self) -> Path:
        """Folder of downloaded data; ``SPATIAL_IMPUTE_DATA_DIR`` or the cache folder of the operating system."""
        if self._data_dir is not None:
            return self._data_dir
        if value := os.environ.get("SPATIAL_IMPUTE_DATA_DIR"):
            return Path(value).expanduser()
        import pooch

        return Path(pooch.os_cache("spatial_impute"))

    @data_dir.setter
    def data_dir(self, value: str | Path | None) -> None:
        self._data_dir = None if value is None else Path(value).expanduser()

    def __repr__(self) -> str:
        return (
            f"Settings(verbosity={self.verbosity!r}, show_progress_bar={self.show_progress_bar}, "
            f"data_dir={str(self.data_dir)!r})"
        )


settings = Settings()


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorator like ``numba.njit(**options)`` with a cache on disk; without one if no folder can be written to."""
    import numba

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # a read-only installation, and no home
            return numba.njit(**options)(function)

    return decorate


def progress(items: Iterable[Any] | None, label: str, *, show: bool | None = None, total: int | None = None) -> Any:
    """Wrap an iterable in a progress bar; `show` overrides ``settings.show_progress_bar``."""
    from tqdm.auto import tqdm

    if settings._log_progress and show is None:
        return _logged_bar()(items, desc=label, total=total, mininterval=_LOG_EVERY)
    hidden = not (settings.show_progress_bar if show is None else show)
    return tqdm(items, desc=label, total=total, disable=hidden)


def _logged_bar() -> Any:
    """Progress bar that writes a line to the log from time to time: a bar fills the log of a batch job."""
    from tqdm import tqdm

    class LoggedBar(tqdm):
        shown = 0

        def reset(self, total: float | None = None) -> None:
            self.shown = 0
            super().reset(total)

        def display(self, *_: Any, **__: Any) -> None:
            if self.n > self.shown and self.format_dict["elapsed"] >= _LOG_EVERY:
                self.shown = self.n
                total = f" of {self.total}" if self.total else ""
                logger.info("%s: %d%s after %.0f s", self.desc.rstrip(": "), self.n, total, self.format_dict["elapsed"])

    return LoggedBar


@contextmanager
def progress_steps(label: str, *, show: bool | None = None) -> Iterator[Steps]:
    """Progress bar with a length that is known later.

    Yields a function of the number of steps, and of the name of a stage if there are several. It returns the function to
    call after each step.
    """
    bar = progress(None, label, show=show)

    def start(total: int, stage: str = "") -> Callable[[], None]:
        bar.set_description(f"{label}: {stage}" if stage else label, refresh=False)
        bar.reset(total=total)
        return bar.update

    try:
        yield start
    finally:
        bar.close()
