"""The one logger of ktcompile."""

from __future__ import annotations

import functools
import logging
import sys

logger = logging.getLogger("ktcompile")


@functools.lru_cache(maxsize=1024)
def warn_once(message: str) -> None:
    """Log a warning, the first time that this message comes up."""
    logger.warning(message)


def tell(text: str) -> None:
    """Say what goes on: in a line of the log or, where nobody reads that, of stderr if it is a terminal."""
    if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
        logger.info(text)
    elif sys.stderr.isatty():
        print(f"ktcompile: {text}", file=sys.stderr, flush=True)
