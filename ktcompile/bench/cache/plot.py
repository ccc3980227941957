"""The chart of a comparison of policies: token hit rates by capacity, a panel for each trace."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ktcompile.bench.cache.compare import BELADY, Result

_COLUMNS = 3
_DPI = 150


def draw(results: Sequence[Result], path: Path) -> None:
    """Draw the token hit rate of each policy by capacity into `path`."""
    import matplotlib
    from matplotlib.figure import Figure

    traces = list(dict.fromkeys(r.trace for r in results))
    names = list(dict.fromkeys(r.policy for r in results))
    columns = min(_COLUMNS, len(traces))
    rows = math.ceil(len(traces) / columns)
    figure = Figure(figsize=(4.3 * columns, 3.4 * rows + 0.4), layout="constrained", dpi=_DPI)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    colours = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    for axes, trace in zip(panels, traces, strict=False):
        for number, name in enumerate(names):
            points = sorted(
                (100 * sum(r.share), 100 * r.token_hit_rate) for r in results if (r.trace, r.policy) == (trace, name)
            )
            style = {"color": "black", "linestyle": "--"} if name == BELADY else {"color": colours[number % 10]}
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, **style)
        axes.set_title(trace, fontsize=9)
        axes.set_xlabel("capacity, % of distinct blocks")
        axes.set_ylabel("tokens found, %")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    for axes in panels[len(traces) :]:
        axes.remove()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names), fontsize=8)
    figure.savefig(path)
