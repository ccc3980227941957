"""The chart of engines with prefix caches: seconds to first tokens as they add up, a panel for each trace."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

from ktcompile.bench.prefix.report import EnginesReport

_DPI = 150


def draw(report: EnginesReport, path: Path) -> None:
    """Draw the sum of the seconds to first tokens by the number of prompts, a line for each engine, into `path`."""
    from matplotlib.figure import Figure

    traces = [trace for trace in report.traces if any(s.trace == trace.name for s in report.served)]
    figure = Figure(figsize=(5.2 * len(traces), 4.4), layout="constrained", dpi=_DPI)
    panels = figure.subplots(1, len(traces), squeeze=False)[0]
    for axes, trace in zip(panels, traces, strict=True):
        for number, contender in enumerate(report.contenders):
            own = [s.seconds for s in report.served if (s.trace, s.contender) == (trace.name, contender.name)]
            if own:
                line = {"linestyle": "-" if contender.ours else "--", "color": f"C{number}"}
                axes.plot(range(1, len(own) + 1), list(accumulate(own)), label=contender.name, **line)
        axes.set_title(f"{trace.name}: {trace.tokens:,} tokens, {trace.shared_tokens:,} shared", fontsize=9)
        axes.set_xlabel("prompts")
        axes.set_ylabel("seconds to first tokens, all together")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    m = report.machine
    machine = f"{m['cpu']}, {m['isa']}, {m['threads']} threads, {m['date'][:10]}"
    figure.suptitle(f"{report.model}\n{machine}", fontsize=9)
    figure.savefig(path)
