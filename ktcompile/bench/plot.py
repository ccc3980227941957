"""Charts of benchmark reports: a panel for each shape."""

from __future__ import annotations

import importlib.util
import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktcompile.bench.contenders import Contender
from ktcompile.bench.report import KernelsReport, Result, ShapeReport

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANEL = (6.2, 4.6)  # inches
_LEGEND_ROW = 0.24
_COLUMNS = 2
_DPI = 150
_MARKERS = "osD^vP*X"
# Where a label may be, in points from its place, the preferred first.
_LABEL_OFFSETS = tuple(
    (x * scale, y * scale) for scale in (1, 1.4, 1.9) for x, y in ((7, -7), (-7, 7), (0, -9), (0, 9))
)


def check(option: str = "--plot") -> None:
    """Raise ValueError if charts cannot be drawn. option: what asked for one."""
    if not importlib.util.find_spec("matplotlib"):
        raise ValueError(f"{option} needs matplotlib: pip install 'ktcompile[plot]'")


def draw_fractions(report: KernelsReport, path: Path) -> None:
    """Draw the fraction of the roofline by token count, a line for each contender, into `path`."""
    figure, panels = _panels(report)
    styles = _styles(report)
    for axes, shape in panels:
        for contender, results in _by_contender(shape):
            values = [r.tokens for r in results], [r.fraction for r in results]
            axes.plot(*values, **styles[contender.name], label=contender.name)
        tokens = sorted({r.tokens for r in shape.results})
        axes.set_xscale("log", base=2)
        axes.set_xticks(tokens, [str(t) for t in tokens])
        axes.minorticks_off()
        axes.set_ylim(0, max(1.05, 1.05 * max(r.fraction for r in shape.results)))
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xlabel("tokens")
        axes.set_ylabel("fraction of the measured roofline")
        axes.grid(alpha=0.3)
    _finish(figure, report, path)


def draw_rooflines(report: KernelsReport, path: Path) -> None:
    """Draw operations per second over operations per byte, below the ceilings, into `path`.

    Points are labelled with their token count where there is room.
    """
    figure, panels = _panels(report)
    styles = _styles(report)
    for axes, shape in panels:
        for contender, results in _by_contender(shape):
            values = [r.flops / r.bytes for r in results], [r.flops_per_second / 1e9 for r in results]
            axes.plot(*values, **styles[contender.name], label=contender.name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        _draw_ceilings(axes, shape)
        axes.set_xlabel("flops per byte")
        axes.set_ylabel("GFLOP/s")
        axes.grid(alpha=0.3)
    _finish(figure, report, path, labelled=panels)


def _panels(report: KernelsReport) -> tuple[Figure, list[tuple[Axes, ShapeReport]]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shapes = [s for s in report.shapes if s.results]
    columns = min(_COLUMNS, len(shapes))
    rows = math.ceil(len(shapes) / columns)
    legend = _LEGEND_ROW * math.ceil(len(_styles(report)) / (2 * columns))
    figure = Figure(figsize=(_PANEL[0] * columns, _PANEL[1] * rows + legend + 0.4), layout="constrained", dpi=_DPI)
    FigureCanvasAgg(figure)  # it can tell how large texts are
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for unused in axes[len(shapes) :]:
        unused.remove()
    for panel, shape in zip(axes, shapes, strict=False):
        s = shape.shape
        title = f"{shape.name}: {s.num_experts} experts, {s.top_k} per token, {s.hidden_size} x {s.intermediate_size}"
        panel.set_title(title, fontsize=10)
    return figure, list(zip(axes, shapes, strict=False))


def _styles(report: KernelsReport) -> dict[str, dict[str, Any]]:
    """Return how to draw each contender: a colour for each of ours by format and each peer, a marker for each ISA."""
    import matplotlib

    contenders = {r: c for s in report.shapes for c, rs in _by_contender(s) for r in {x.contender for x in rs}}
    formats = list(dict.fromkeys(c.weight_format for c in contenders.values() if c.ours))
    isas = list(dict.fromkeys(c.isa for c in contenders.values() if c.ours))
    peers = [name for name, c in contenders.items() if not c.ours]
    vivid, dark = matplotlib.colormaps["tab10"].colors, matplotlib.colormaps["Dark2"].colors  # type: ignore[attr-defined]
    styles = {}
    for name, c in contenders.items():
        if c.ours:
            colour, marker = vivid[formats.index(c.weight_format) % len(vivid)], _MARKERS[isas.index(c.isa) % 8]
            styles[name] = {"color": colour, "marker": marker, "linewidth": 1.8, "markersize": 4.5}
        else:
            colour, marker = dark[peers.index(name) % len(dark)], "x"
            styles[name] = {"color": colour, "marker": marker, "linestyle": "--", "linewidth": 1.2, "markersize": 4.5}
    return styles


def _by_contender(shape: ShapeReport) -> list[tuple[Contender, list[Result]]]:
    results = shape.results
    pairs = ((c, [r for r in results if r.contender == c.name]) for c in shape.contenders)
    return [(c, own) for c, own in pairs if own]


def _draw_ceilings(axes: Axes, shape: ShapeReport) -> None:
    """Draw the bandwidth and the peak of each arithmetic that contenders use."""
    assert shape.best is not None
    left, right = axes.get_xlim()
    used = {c.arithmetic for c, _ in _by_contender(shape)}
    peaks = {kind: rate / 1e9 for kind, rate in shape.best.flops.items() if kind in used}
    bandwidth = shape.best.bandwidth / 1e9
    ridge = max(peaks.values()) / bandwidth
    right = max(right, 2 * ridge)
    axes.set_xlim(left, right)
    axes.plot([left, ridge], [left * bandwidth, ridge * bandwidth], color="black", linewidth=1.2)
    for kind, peak in peaks.items():
        axes.plot([peak / bandwidth, right], [peak, peak], color="black", linewidth=1.2)
        axes.annotate(
            f"{peak:.0f} GFLOP/s {kind}",
            (right, peak),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            fontsize=7,
        )
    middle = math.sqrt(left * ridge)
    axes.annotate(
        f"{bandwidth:.1f} GB/s",
        (middle, middle * bandwidth),
        xytext=(-8, 6),
        textcoords="offset points",
        ha="right",
        fontsize=7,
    )
    axes.set_ylim(top=2 * max(peaks.values()))


def _finish(
    figure: Figure, report: KernelsReport, path: Path, labelled: list[tuple[Axes, ShapeReport]] | None = None
) -> None:
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    columns = 2 * min(_COLUMNS, len(figure.axes))
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns, fontsize=7.5)
    m = report.machine
    figure.suptitle(f"{m['cpu']}, {m['isa']}, {m['threads']} threads, {m['date'][:10]}", fontsize=9)
    if labelled:
        figure.draw_without_rendering()
        for axes, shape in labelled:
            _label_points(axes, shape)
    figure.savefig(path)


def _label_points(axes: Axes, shape: ShapeReport) -> None:
    """Write token counts beside points, in the colour of their line, where they cover neither lines nor other text."""
    panel = axes.get_window_extent()
    taken = [text.get_window_extent() for text in axes.texts]
    obstacles = [point for line in axes.lines for point in _along(axes.transData.transform(line.get_xydata()))]
    lines = {line.get_label(): line for line in axes.lines}
    for r in shape.results:
        place = (r.flops / r.bytes, r.flops_per_second / 1e9)
        for offset in _LABEL_OFFSETS:
            text = axes.annotate(
                str(r.tokens),
                place,
                xytext=offset,
                textcoords="offset points",
                ha="center",
                va="center",
                fontsize=6,
                color=lines[r.contender].get_color(),
            )
            box = text.get_window_extent().padded(1.5)
            covered = box.count_overlaps(taken) or box.count_contains(obstacles)
            if not covered and panel.contains(box.x0, box.y0) and panel.contains(box.x1, box.y1):
                taken.append(box)
                break
            text.remove()


def _along(corners: Any) -> list[tuple[float, float]]:
    """Return points on the line through `corners`, a few pixels apart."""
    points = [tuple(corners[0])]
    for (x0, y0), (x1, y1) in itertools.pairwise(corners):
        steps = max(1, int(math.hypot(x1 - x0, y1 - y0) / 3))
        points += [(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(1, steps + 1)]
    return points
