"""The chart of a report: latencies by the time of the request, and their distributions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ktcompile.bench.serve.outcome import OK, Outcome
from ktcompile.bench.serve.report import ServeReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DPI = 150


def draw(report: ServeReport, path: Path) -> None:
    """Draw the time to the first token and between tokens, over the run and as distributions, into `path`."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.8, 7.6), layout="constrained", dpi=_DPI)
    panels = figure.subplots(2, 2)
    colours = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    for number, run in enumerate(report.runs):
        good = [o for o in run.outcomes if o.status == OK]
        style = {"color": colours[number % len(colours)], "label": run.name}
        _latency(panels[0][0], good, [1e3 * o.ttft for o in good], style)
        _distribution(panels[0][1], [1e3 * o.ttft for o in good], style)
        several = [o for o in good if o.tokens > 1]
        _latency(panels[1][0], several, [1e3 * float(np.median(o.gaps())) for o in several], style)
        _distribution(panels[1][1], [1e3 * gap for o in good for gap in o.gaps()], style)
        failed = [o.sent for o in run.outcomes if o.status != OK]
        if failed:
            panels[0][0].plot(failed, [0.0] * len(failed), "x", color=style["color"])
    for row, (name, objective) in enumerate((("time to first token", "ttft"), ("time between tokens", "itl"))):
        over_time, distribution = panels[row]
        over_time.set_ylabel(f"{name}, ms")
        distribution.set_xlabel(f"{name}, ms")
        distribution.set_ylabel("share")
        if objective in report.slo:
            most = 1e3 * report.slo[objective]
            over_time.axhline(most, color="black", linewidth=0.8, linestyle="--")
            distribution.axvline(most, color="black", linewidth=0.8, linestyle="--")
        over_time.set_ylim(bottom=0)
    panels[0][0].set_title("by the time of the request (x: failed)", fontsize=9)
    panels[1][0].set_title("median of each request", fontsize=9)
    panels[1][0].set_xlabel("seconds since the start")
    for axes in panels.flat:
        axes.grid(alpha=0.3)
    handles, labels = panels[0][1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    m, how = report.machine, report.method
    figure.suptitle(
        f"{how['requests']} requests, {how['arrivals']}, {how['lengths']}: "
        f"{m['cpu']}, {m['isa']}, {m['threads']} threads, {m['date'][:10]}",
        fontsize=9,
    )
    figure.savefig(path)


def _latency(axes: Axes, outcomes: Sequence[Outcome], values: Sequence[float], style: dict[str, Any]) -> None:
    axes.plot([o.sent for o in outcomes], values, ".", markersize=4, **style)


def _distribution(axes: Axes, values: Sequence[float], style: dict[str, Any]) -> None:
    if values:
        axes.plot(np.sort(values), np.arange(1, len(values) + 1) / len(values), **style)
        if max(values) > 20 * max(1e-3, float(np.median(values))):
            axes.set_xscale("log")
