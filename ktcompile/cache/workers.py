"""Threads that take jobs out of a queue with an end."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol

from ktcompile.log import logger

Job = Callable[[], object]


class Workers(Protocol):
    """What runs jobs, each once, beginning with the one that was given first."""

    def submit(self, job: Job) -> bool:
        """Have a job run. False: too many wait, and it never will."""

    def close(self, seconds: float) -> bool:
        """Take no more jobs, and return whether those that wait have run within a time."""


class Threads:
    """Daemon threads, so that one that waits for a disk that is gone keeps no process from its end.

    longest: jobs that may wait.
    """

    def __init__(self, name: str, count: int, longest: int) -> None:
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._longest, self._open = longest, True
        self._threads = [threading.Thread(target=self._run, name=f"{name}-{i}", daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> bool:
        if not self._open or self._jobs.qsize() >= self._longest:
            return False
        self._jobs.put(job)
        return True

    def close(self, seconds: float) -> bool:
        if self._open:
            self._open = False
            for _ in self._threads:
                self._jobs.put(None)
        until = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:
                logger.exception("a job of the prefix cache has failed")
