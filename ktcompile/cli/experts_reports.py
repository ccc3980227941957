"""The files of `ktc generate` about experts on a device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ktcompile.plan.files import check_writable
from ktcompile.plan.profile import write_whole

if TYPE_CHECKING:
    from ktcompile.config import DeviceOptions
    from ktcompile.runtime.metrics import ExpertMetrics


class ExpertsReports:
    """Files that are written at the end; None: not asked for. ValueError: they cannot be, or there is no device."""

    def __init__(self, report: Path | None, plot: Path | None, options: DeviceOptions) -> None:
        self._report, self._plot = report, plot
        for option, path in (("--experts-report", report), ("--experts-plot", plot)):
            if path is None:
                continue
            if options.device == "none":
                raise ValueError(f"{option} is about experts on a device; name one with --device")
            check_writable(path)
        if plot is not None:
            from ktcompile.bench.plot import check

            check("--experts-plot")

    def write(self, metrics: ExpertMetrics) -> list[Path]:
        """Write the files, each whole or not at all, and return them. ValueError: one cannot be written."""
        written = []
        if self._report is not None:
            text = json.dumps(metrics.as_dict(), indent=1) + "\n"
            write_whole(self._report, lambda file: file.write(text.encode()))
            written.append(self._report)
        if self._plot is not None:
            from ktcompile.bench import experts_plot

            write_whole(self._plot, lambda file: experts_plot.draw(metrics, "ktc generate", file))
            written.append(self._plot)
        return written
