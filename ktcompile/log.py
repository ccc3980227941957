"""The one logger of ktcompile."""

from __future__ import annotations

import functools
import logging

logger = logging.getLogger("ktcompile")


@functools.lru_cache(maxsize=1024)
def warn_once(message: str) -> None:
    """Log a warning, the first time that this message comes up."""
    logger.warning(message)
