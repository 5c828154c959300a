"""The one logger of the package; its level follows ``settings.verbosity``."""

from __future__ import annotations

import logging

logger = logging.getLogger("spatial_impute")


def _set_up() -> None:
    """Give the logger its own handler, so that no root configuration of the user's is touched."""
    if logger.handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


_set_up()


def log_added(slot: str) -> None:
    """Say which slot of the data object was written, e.g. ``tables['stack'].layers['asign']``."""
    logger.info("Adding `sdata.%s`", slot)
