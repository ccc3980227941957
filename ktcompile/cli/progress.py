"""Progress on stderr."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress


@contextmanager
def progress_bars(shown: bool) -> Iterator[Progress]:
    """Show the bars of transformers, and one's own, on stderr if that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress
    from transformers.utils import logging as hf_logging

    silent: Callable[..., Any] = hf_logging.EmptyTqdm

    def bar(factory: Callable[..., Any], args: tuple[Any, ...], settings: dict[str, Any]) -> Any:
        # Without something to go through it is a download, which reports its own bytes.
        if not args:
            return factory(**settings)
        return silent(progress.track(list(args[0]), description=settings.get("desc") or "Loading"))

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (shown and console.is_terminal)) as progress:
        before = hf_logging.set_tqdm_hook(bar)
        try:
            yield progress
        finally:
            hf_logging.set_tqdm_hook(before)


def tenths(what: str) -> Callable[[float], None]:
    """Return what takes the share that is done and prints each tenth once."""
    shown = 0

    def show(share: float) -> None:
        nonlocal shown
        now = math.floor(share * 10 + 1e-9)
        if now > shown:
            shown = now
            print(f"{what}: {10 * now} %", file=sys.stderr)

    return show
