"""Who is told how a benchmark goes."""

from __future__ import annotations

from typing import Any, Protocol


class Report(Protocol):
    """What a benchmark measured."""

    def to_json(self) -> dict[str, Any]: ...


class Interruptible(Report, Protocol):
    """What was measured until its end, or until Ctrl-C."""

    @property
    def interrupted(self) -> bool: ...


class Listener(Protocol):
    """Is told what goes on. advance: turns that are over, or will not be. save: the report so far, after a round."""

    def note(self, text: str) -> None: ...

    def advance(self, turns: int) -> None: ...

    def save(self, report: Report) -> None: ...
