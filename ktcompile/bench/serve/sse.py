"""Server-sent events, as they come."""

from __future__ import annotations


class Events:
    """Takes bytes of a stream as they come and returns the data of the events that they complete.

    Source: the section on event streams of the HTML standard; what is not data is passed over.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, received: bytes) -> list[bytes]:
        """Return the data of each event that has ended, lines joined by newlines."""
        *lines, self._rest = (self._rest + received).split(b"\n")
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data.clear()
        return events
