"""When a part that fails is left alone, and when it is tried again."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Breaker:
    """Opens after failures in a row; then one trial is let through after a pause, which doubles while trials fail.

    threshold: failures that open it. pause, longest: seconds.
    """

    def __init__(
        self, clock: Callable[[], float], threshold: int = 1, pause: float = 1.0, longest: float = 300.0
    ) -> None:
        self._clock, self._threshold, self._first, self._longest = clock, threshold, pause, longest
        self._lock = threading.Lock()
        self._failures, self._pause, self._until = 0, pause, 0.0

    @property
    def is_open(self) -> bool:
        """Whether failures have opened it, and no trial has succeeded since."""
        return self._failures >= self._threshold

    def allows(self) -> bool:
        """Return whether to go on; where it is open this is a trial, and the next is a pause away."""
        with self._lock:
            if not self.is_open:
                return True
            if self._clock() < self._until:
                return False
            self._until = self._clock() + self._pause
            return True

    def failed(self) -> bool:
        """Note a failure, and return whether it opened the breaker."""
        with self._lock:
            was_open = self.is_open
            self._failures += 1
            if not self.is_open:
                return False
            self._pause = min(self._longest, 2 * self._pause) if was_open else self._first
            self._until = self._clock() + self._pause
            return not was_open

    def succeeded(self) -> None:
        """Note a success, which closes it."""
        with self._lock:
            self._failures = 0
