"""The ceilings of a machine: how fast it reads memory and how fast it multiplies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ktcompile import _native
from ktcompile.machine import machine
from ktcompile.quant import FORMATS, full_name

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNKNOWN_CACHE = 32 << 20
_LEAST_PROBE = 512 << 20
# A core that waited for memory takes some milliseconds to reach its full clock.
_ARITHMETIC_SECONDS, _ARITHMETIC_PASSES = 0.002, 5


@dataclass(frozen=True, slots=True)
class Ceilings:
    """bandwidth: bytes read per second. flops: operations per second of each arithmetic. Both on all threads."""

    bandwidth: float
    flops: dict[str, float]

    def highest(self, other: Ceilings | None) -> Ceilings:
        """Return the higher of each of these and those of another moment."""
        if other is None:
            return self
        flops = {kind: max(rate, other.flops[kind]) for kind, rate in self.flops.items()}
        return Ceilings(max(self.bandwidth, other.bandwidth), flops)


class Probe:
    """Measures the ceilings in some 50 ms, often enough to follow a machine whose memory others use too."""

    def __init__(self, threads: int, arithmetics: Iterable[str]) -> None:
        self._context = _native.Context(threads)
        self._arithmetics = tuple(dict.fromkeys(arithmetics))
        self._bytes = probe_bytes()
        self.measure()  # the first one wakes threads up and finds no memory mapped

    def measure(self) -> Ceilings:
        """Return the ceilings of this moment."""
        return Ceilings(
            _read_bandwidth(self._context, self._bytes),
            {a: _arithmetic_rate(self._context, a) for a in self._arithmetics},
        )


def arithmetic_of(weight_format: str, isa: str) -> str:
    """Return the name of the arithmetic whose ceiling bounds this format on `isa`: kind/isa."""
    return f"{'int8' if FORMATS[full_name(weight_format)].dynamic else 'float'}/{isa}"


def fastest_arithmetic(kind: str, threads: int) -> str:
    """Return the arithmetic of a kind with the highest rate here, which bounds what does not say what it uses."""
    context = _native.Context(threads)
    return max((f"{kind}/{isa}" for isa in machine().isas), key=lambda a: _arithmetic_rate(context, a))


def cache_bytes() -> int:
    """Return the size of the largest cache, or a guess where the system does not tell."""
    sizes = []
    for path in _CACHES.glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KM")) * {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1))
    return max(sizes, default=_UNKNOWN_CACHE)


def probe_bytes() -> int:
    """Return how much memory a probe of the bandwidth reads: far more than the caches hold."""
    return max(_LEAST_PROBE, 4 * cache_bytes())


def _read_bandwidth(context: _native.Context, size: int) -> float:
    return context.read_bandwidth(machine().isa, size, 2)  # a pass may be interrupted


def _arithmetic_rate(context: _native.Context, arithmetic: str) -> float:
    kind, _, isa = arithmetic.partition("/")
    return max(context.arithmetic(isa, kind == "int8", _ARITHMETIC_SECONDS) for _ in range(_ARITHMETIC_PASSES))
