"""The chart of a whole model's report: speeds by batch and by prompt, and their fractions of the roofline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ktcompile.bench.model.report import ModelReport, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DPI = 150
_TITLES = {
    "decode": ("requests at a time", "tokens/s of decode"),
    "prefill": ("tokens of the prompt", "tokens/s of prefill"),
}


def draw(report: ModelReport, path: Path) -> None:
    """Draw tokens per second, and below it fractions of the roofline, a bar for each contender, into `path`."""
    from matplotlib.figure import Figure

    kinds = [kind for kind in _TITLES if any(r.work.kind == kind for r in report.results)]
    figure = Figure(figsize=(6.4 * len(kinds), 7.6), layout="constrained", dpi=_DPI)
    panels = figure.subplots(2, len(kinds), squeeze=False, sharex="col")
    for (above, below), kind in zip(panels.T, kinds, strict=True):
        results = [r for r in report.results if r.work.kind == kind]
        x_label, y_label = _TITLES[kind]
        _bars(above, report, results, [r.tokens_per_second for r in results])
        _bars(below, report, results, [r.fraction for r in results])
        above.set_ylabel(y_label)
        below.set_ylabel("fraction of the measured roofline")
        below.set_xlabel(x_label)
        below.axhline(1, color="black", linewidth=0.8)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    m = report.machine
    where = f"{m['cpu']}, {m['isa']}, {m['threads']} threads, {m['date'][:10]}"
    figure.suptitle(f"{report.model['name']}: {where}", fontsize=9)
    figure.savefig(path)


def _bars(axes: Axes, report: ModelReport, results: list[Result], values: list[float]) -> None:
    """Draw a group of bars for each size; a contender that was not measured there leaves a gap."""
    import matplotlib

    sizes = sorted({r.work.size for r in results})
    names = [c.name for c in report.contenders]
    width = 0.8 / len(names)
    colours = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    for index, contender in enumerate(report.contenders):
        own = [
            (sizes.index(r.work.size), v) for r, v in zip(results, values, strict=True) if r.contender == names[index]
        ]
        axes.bar(
            [at + (index - (len(names) - 1) / 2) * width for at, _ in own],
            [value for _, value in own],
            width,
            label=contender.name,
            color=colours[index % len(colours)],
            hatch=None if contender.ours else "//",
            edgecolor="white",
        )
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.grid(axis="y", alpha=0.3)
