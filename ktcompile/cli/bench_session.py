"""What the commands of `ktc bench` share: progress, a file that is kept up to date, and what the machine is."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ktcompile.plan.files import check_writable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from ktcompile.bench.listener import Interruptible, Report

R = TypeVar("R")
Measured = TypeVar("Measured", bound="Interruptible")
# From here on a machine is not idle.
_LOAD_TO_MENTION = 0.5
_SECONDS_OF_A_LINE = 60


@contextmanager
def session(
    turns: int, threads: int, libraries: Iterable[str], out: Path | None
) -> Iterator[tuple[dict[str, Any], Listener]]:
    """Give the description of the machine and a listener that shows a bar on stderr and keeps `out` up to date.

    libraries: whose versions are in the description.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    machine = _machine(threads, libraries)
    load = machine["load_average"]
    if load > _LOAD_TO_MENTION:
        print(f"other programs run here (load {load:.1f}); peers whose threads spin suffer most", file=sys.stderr)
    columns = (BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=1) as progress:
        yield machine, Listener(progress, progress.add_task("starting", total=turns), out)


class Listener:
    """Shows the progress, where it is not a terminal as a line a minute, and keeps the file up to date."""

    def __init__(self, progress: Progress, task: TaskID, out: Path | None) -> None:
        self._progress, self._task, self._out = progress, task, out
        self._last_line = time.monotonic()

    def note(self, text: str) -> None:
        self._progress.update(self._task, description=text)
        if time.monotonic() - self._last_line > _SECONDS_OF_A_LINE:
            self._print_line()

    def advance(self, turns: int) -> None:
        self._progress.advance(self._task, turns)

    def save(self, report: Report) -> None:
        write(report, self._out)
        self._print_line()

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        if not self._progress.console.is_terminal:
            state = self._progress.tasks[self._task]
            print(f"{state.completed:.0f} of {state.total:.0f} turns: {state.description}", file=sys.stderr)


def write(report: Report, out: Path | None) -> None:
    """Write a report as JSON, so that the file is always whole."""
    if out:
        unfinished = out.with_name(out.name + ".part")
        unfinished.write_text(json.dumps(report.to_json(), indent=1) + "\n")
        unfinished.replace(out)


def finish(
    report: Measured, out: Path | None, plot: Path | None, draw: Callable[[Measured, Path], None], *, failed: bool
) -> int:
    """Write and draw what was measured, where that is asked for, and return the exit status."""
    write(report, out)
    if out:
        print(f"wrote {out}", file=sys.stderr)
    if plot:
        draw(report, plot)
    return 130 if report.interrupted else int(failed)


def write_record(record: dict[str, Any], out: Path) -> None:
    """Write a record as JSON, so that the file is always whole, and say so on stderr."""
    from ktcompile.plan.profile import write_whole

    text = json.dumps(record, indent=1) + "\n"
    write_whole(out, lambda file: file.write(text.encode()))
    print(f"wrote {out}", file=sys.stderr)


def pairs(values: list[str], option: str, form: str) -> dict[str, str]:
    """Return what an option with values NAME=VALUE was given. ValueError: one has another form."""
    for value in values:
        if not all(value.partition("=")[::2]):
            raise ValueError(f"{option} {value!r} is none; write {form}")
    return dict(value.split("=", 1) for value in values)


def replot(args: argparse.Namespace, from_json: Callable[[Any], R], draw: Callable[[R, Path], None]) -> int:
    """Draw what --json wrote. Return the exit status. ValueError: --plot is missing, or the file cannot be drawn."""
    if not args.plot:
        raise ValueError("--replot needs --plot OUT.png")
    try:
        report = from_json(json.loads(args.replot.read_text()))
    except ValueError as error:
        raise ValueError(f"{args.replot} cannot be drawn: {error}") from error
    draw(report, args.plot)
    return 0


def _machine(threads: int, libraries: Iterable[str]) -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    import psutil

    from ktcompile.machine import machine

    def version_of(library: str) -> str | None:
        try:
            return version(library)
        except PackageNotFoundError:
            return None

    return {
        **asdict(machine()),
        "threads": threads,
        "memory_available_bytes": psutil.virtual_memory().available,
        "load_average": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), **{name: version_of(name) for name in libraries}},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def check_outputs(results: Path | None, picture: Path | None) -> None:
    """ValueError: a file that results or a plot are asked for in cannot be written, or nothing here can draw."""
    for path in (results, picture):
        if path:
            check_writable(path)
    if picture:
        from ktcompile.bench import plot

        plot.check()
