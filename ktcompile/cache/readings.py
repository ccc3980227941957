"""Blocks of the device that are to be read by another thread, and must stay as they are until then."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count


class Readings:
    """Which blocks wait to be read, and which are. Each time that one is given it has a ticket. Any thread may call."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._tickets = count()
        self._waiting: dict[int, int] = {}  # blocks by ticket
        self._reading = 0
        self._finished: list[int] = []

    def add(self, block: int) -> int:
        """Have a block wait, and return its ticket."""
        with self._changed:
            ticket = next(self._tickets)
            self._waiting[ticket] = block
            return ticket

    def remove(self, ticket: int) -> None:
        """Have a block wait no more, which nobody will read."""
        with self._changed:
            self._waiting.pop(ticket, None)

    @contextmanager
    def reading(self, ticket: int) -> Iterator[bool]:
        """Give whether a block may be read, for the time of a block of code; it may not if it was taken back."""
        with self._changed:
            block = self._waiting.pop(ticket, None)
            self._reading += block is not None
        try:
            yield block is not None
        finally:
            if block is not None:
                with self._changed:
                    self._reading -= 1
                    self._finished.append(block)
                    self._changed.notify_all()

    def finished(self) -> list[int]:
        """Return the blocks that were read, as often as they were."""
        with self._changed:
            result, self._finished = self._finished, []
            return result

    def take_back(self) -> list[int]:
        """Return all blocks, of which none is read any more: those that wait will not be, and one that is being read is
        waited for."""
        with self._changed:
            waiting = list(self._waiting.values())
            self._waiting.clear()
            self._changed.wait_for(lambda: not self._reading)
            result, self._finished = self._finished, []
            return [*result, *waiting]
