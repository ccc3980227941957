"""What the layers of a model were asked for, and what they did.

Shape suffix: E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(slots=True)
class Counts:
    """What a layer was asked for. rows: tokens of each expert [E]. touched: calls in which it had any [E]."""

    rows: NDArray[np.int64]
    touched: NDArray[np.int64]
    tokens: int

    @classmethod
    def none(cls, experts: int) -> Counts:
        return cls(np.zeros(experts, dtype=np.int64), np.zeros(experts, dtype=np.int64), 0)

    def add(self, rows: NDArray[np.int64], tokens: int) -> None:
        """Count one call."""
        self.rows += rows
        self.touched += rows > 0
        self.tokens += tokens


@dataclass(slots=True)
class Activity:
    """What a layer did since it was split.

    calls, streamed_calls: of these, streamed_calls copied experts of the CPU's through the device. cpu_rows,
    device_rows, streamed_rows: pairs of a token and an expert that the CPU computed, the device with its own experts,
    the device with the CPU's. cpu_seconds, device_seconds, overlap_seconds: one was busy, both were, over timed_calls,
    in which the device's times are known. promoted, demoted, failed: moves of experts that ended. bytes_promoted,
    bytes_demoted, bytes_streamed: copied.
    """

    calls: int = 0
    streamed_calls: int = 0
    timed_calls: int = 0
    cpu_rows: int = 0
    device_rows: int = 0
    streamed_rows: int = 0
    cpu_seconds: float = 0.0
    device_seconds: float = 0.0
    overlap_seconds: float = 0.0
    promoted: int = 0
    demoted: int = 0
    failed: int = 0
    bytes_promoted: int = 0
    bytes_demoted: int = 0
    bytes_streamed: int = 0

    @property
    def bytes_moved(self) -> int:
        """Bytes of weights that were copied in either direction."""
        return self.bytes_promoted + self.bytes_demoted + self.bytes_streamed

    @property
    def rows(self) -> int:
        """Pairs of a token and an expert that were computed."""
        return self.cpu_rows + self.device_rows + self.streamed_rows

    @property
    def hit_rate(self) -> float | None:
        """The part of the rows whose expert was on the device; None: there were no rows."""
        return self.device_rows / self.rows if self.rows else None

    def time(self, cpu: tuple[float, float] | None, device: tuple[float, float]) -> None:
        """Count when the CPU and the device were busy in one call, by the same clock. cpu: None if it was not."""
        self.timed_calls += 1
        self.device_seconds += device[1] - device[0]
        if cpu is not None:
            self.cpu_seconds += cpu[1] - cpu[0]
            self.overlap_seconds += max(0.0, min(cpu[1], device[1]) - max(cpu[0], device[0]))
