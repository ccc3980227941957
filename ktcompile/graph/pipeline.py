"""Runs an ordered list of passes over a graph, with times, match counts and dumps."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import fx

from ktcompile.graph.report import CompileReport, PassReport

_graph_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Pass:
    """A pass and its name. `run(gm, example_inputs, report)` returns how many places it changed in `gm`.

    exact: it preserves numbers bit for bit.
    """

    name: str
    run: Callable[[fx.GraphModule, Sequence[object], CompileReport], int]
    exact: bool


def run_passes(
    gm: fx.GraphModule,
    example_inputs: Sequence[object],
    passes: Sequence[Pass],
    report: CompileReport,
    dump_to: Path | None,
) -> fx.GraphModule:
    """Return `gm` after all passes, which change it in place; what they did is in `report`."""
    dump = _Dump(dump_to) if dump_to else None
    if dump:
        dump.write("input", gm)
    for p in passes:
        begin = time.perf_counter()
        matches = p.run(gm, example_inputs, report)
        if matches:
            gm.graph.lint()
            gm.recompile()
        report.passes.append(PassReport(p.name, time.perf_counter() - begin, matches))
        if dump:
            dump.write(p.name, gm)
    return gm


class _Dump:
    """Numbered files in a directory: the graph as it came, then after each pass."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._graph = next(_graph_numbers)
        self._step = itertools.count()

    def write(self, name: str, gm: fx.GraphModule) -> None:
        path = self._directory / f"graph{self._graph:03}_{next(self._step):02}_{name}.py"
        path.write_text(gm.print_readable(print_output=False))
