"""When requests arrive."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """So many requests are under way at any time: when one ends, the next is sent."""

    concurrency: int

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ValueError(f"a concurrency of {self.concurrency} cannot be; it must be 1 or more")

    def __str__(self) -> str:
        return f"closed loop of {self.concurrency}"


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """Requests arrive when they do, whether earlier ones have ended or not.

    rate: requests per second. burstiness: shape of the gamma distribution of the gaps: 1 is a Poisson process, less
    comes in bursts, more comes evenly.
    """

    rate: float
    burstiness: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("rate", self.rate), ("burstiness", self.burstiness)):
            if not 0 < value < float("inf"):
                raise ValueError(f"a {name} of {value} cannot be; it must be positive")

    def times(self, rng: np.random.Generator, count: int) -> list[float]:
        """Return seconds from the start at which requests arrive, the first at its own gap."""
        gaps = rng.gamma(self.burstiness, 1 / (self.rate * self.burstiness), count)
        return [float(t) for t in np.cumsum(gaps)]

    def __str__(self) -> str:
        kind = "Poisson" if self.burstiness == 1 else f"gamma, burstiness {self.burstiness:g}"
        return f"open loop of {self.rate:g}/s ({kind})"


@dataclass(frozen=True, slots=True)
class Replay:
    """Requests arrive as the workload says. speed: times as fast."""

    speed: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.speed < float("inf"):
            raise ValueError(f"a speed of {self.speed} cannot be; it must be positive")

    def __str__(self) -> str:
        return f"trace at {self.speed:g} times its speed"


Arrivals = ClosedLoop | OpenLoop | Replay
