"""The two ceilings of a machine: how fast it reads memory and how fast it multiplies."""

from __future__ import annotations

from dataclasses import dataclass

from ktcompile import _native
from ktcompile.machine import machine


@dataclass(frozen=True, slots=True)
class Roofline:
    """bandwidth: bytes read per second. flops: floating-point operations per second. Both with all threads."""

    bandwidth: float
    flops: float

    def seconds(self, bytes_read: float, flops: float) -> float:
        """Return the least time that this much work can take."""
        return max(bytes_read / self.bandwidth, flops / self.flops)


def measure(threads: int, bytes_read: int = 1 << 30, repeats: int = 4) -> Roofline:
    """Return the ceilings with `threads` threads, each the best of `repeats` runs over the ISAs of this machine."""
    context = _native.Context(threads)
    isas = [isa for isa in machine().isas if isa != "scalar"] or ["scalar"]
    return Roofline(
        bandwidth=context.read_bandwidth(isas[-1] if len(isas) == 1 else machine().isa, bytes_read, repeats),
        flops=max(context.arithmetic(isa, repeats) for isa in isas),
    )
