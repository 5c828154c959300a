"""The logger of the package; its level follows ``settings.verbosity``."""

from __future__ import annotations

import logging

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
