"""What `ktc bench serve` prints."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ktcompile.bench.serve.outcome import OK
from ktcompile.bench.serve.stats import Spread
from ktcompile.cli.sizes import human

if TYPE_CHECKING:
    from rich.console import Console

    from ktcompile.bench.serve.report import ServeReport
    from ktcompile.bench.serve.soak_report import SoakReport

# Requests that were sent later than this were not sent as the arrivals say.
_LATE_TO_MENTION = 5e-3


def print_report(report: ServeReport) -> None:
    """Print servers and latencies as tables."""
    console = _console()
    how = report.method
    console.print(f"\n{how['requests']} requests, {how['arrivals']}, {how['lengths']}, seed {how['seed']}")
    if report.runs:
        _print_rates(console, report)
        _print_latencies(console, report)
    for run in report.runs:
        summary = report.summary(run)
        console.print(f"{run.name}: {run.dialect}; tokens counted by {run.counting}", markup=False)
        if summary.short:
            console.print(f"{run.name}: {summary.short} answers were shorter than asked for", markup=False)
        for status, count in summary.statuses.items():
            if status != OK:
                words = next((o.detail for o in run.outcomes if o.status == status), "")
                console.print(f"{run.name}: {count} ended by {status}: {words}", markup=False)
        _print_late(console, run.name, summary.late)
    for name, why in report.skipped.items():
        console.print(f"left out: {name}: {why}", markup=False)
    if report.interrupted:
        console.print("interrupted: there are fewer requests or servers than asked for")


def print_soak(report: SoakReport) -> None:
    """Print what a soak showed."""
    from rich import box
    from rich.table import Table

    console = _console()
    s = report.soaked
    console.print(f"\n{report.name}: {report.model}, {report.dialect}", markup=False)
    sent = f"{s.rate:.2f} a second for {s.seconds:.0f} s, {len(s.ends)} requests"
    if report.capacity is not None:
        sent = f"capacity {report.capacity:.2f} requests/s in a {report.method['arrivals']}; then {sent}"
    console.print(sent)
    table = Table("requests", "how they ended", box=box.SIMPLE)
    for kind, statuses in report.statuses().items():
        table.add_row(kind, ", ".join(f"{status}: {count}" for status, count in statuses.items()))
    console.print(table)
    refused, polite = report.refusals()
    console.print(f"refused with 429: {refused}, of which {polite} had Retry-After; stuck: {s.unended}")
    for name, thirds in report.thirds().items():
        line = f"{_ms(thirds.first)} ms in the first third, {_ms(thirds.last)} in the last ({thirds.drift:.2f}x)"
        console.print(f"p99 of {name}: {line}")
    memory = report.memory()
    if memory:
        console.print(
            f"memory: {human(memory[0])} in the first third, {human(memory[1])} in the last, at most {human(memory[2])}"
        )
    if s.idle:
        now = f"running {s.idle.running}, waiting {s.idle.waiting}, KV {s.idle.kv_usage}"
        console.print(f"when all was over: {now}", markup=False)
    _print_late(console, report.name, Spread.of([o.late for o in s.ordinary]))
    for problem in report.problems():
        console.print(f"problem: {problem}", markup=False)
    if not report.problems():
        console.print("no problem was found")


def _print_late(console: Console, name: str, late: Spread | None) -> None:
    if late and late.p99 > _LATE_TO_MENTION:
        what = f"one request in a hundred was sent {late.p99 * 1e3:.1f} ms late or more"
        console.print(f"{name}: {what}: this client had too little of the machine", markup=False)


def _console() -> Console:
    from rich.console import Console

    # What is not a terminal has no width, and would cut tables off.
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=160)


def _print_rates(console: Console, report: ServeReport) -> None:
    from rich import box
    from rich.table import Table

    table = Table("server", box=box.SIMPLE)
    names = ("seconds", "requests/s", "tokens/s", "goodput/s", "prompt tokens", "tokens", "ok", "failed")
    ours = any(run.start_seconds is not None for run in report.runs)
    for name in (*names, *(("start s", "memory", "after") if ours else ())):
        table.add_column(name, justify="right")
    for run in report.runs:
        s = report.summary(run)
        good = s.statuses.get(OK, 0)
        cells = [
            f"{s.seconds:.1f}",
            f"{s.request_rate:.2f}",
            f"{s.output_rate:.1f}",
            "" if s.goodput is None else f"{s.goodput:.2f}",
            str(s.input_tokens),
            str(s.output_tokens),
            str(good),
            str(len(run.outcomes) - good),
        ]
        if ours:
            cells.append("" if run.start_seconds is None else f"{run.start_seconds:.1f}")
            cells += ["" if size is None else human(size) for size in (run.idle_bytes, run.loaded_bytes)]
        table.add_row(run.name, *cells)
    console.print(table)


def _print_latencies(console: Console, report: ServeReport) -> None:
    from rich import box
    from rich.table import Table

    table = Table("ms", "server", box=box.SIMPLE)
    for name in ("mean", "p50", "p90", "p99", "max"):
        table.add_column(name, justify="right")
    for name in ("ttft", "itl", "tpot", "e2e"):
        for run in report.runs:
            spread: Spread | None = getattr(report.summary(run), name)
            if spread is not None:
                values = (spread.mean, spread.p50, spread.p90, spread.p99, spread.max)
                table.add_row(name, run.name, *map(_ms, values), end_section=run is report.runs[-1])
    console.print(table)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"
