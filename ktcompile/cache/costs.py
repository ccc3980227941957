"""What a hit is worth: seconds of computing that it saves, less those of loading. Rates are measured by others."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Recompute:
    """What prefill costs: seconds for a token, and for a token and each position before it (attention)."""

    per_token: float
    per_position: float = 0.0

    def __post_init__(self) -> None:
        if not (self.per_token > 0 and self.per_position >= 0):
            raise ValueError(f"prefill cannot take {self.per_token} s a token and {self.per_position} s a position")

    def seconds(self, begin: int, end: int) -> float:
        """Return how long the tokens at positions [begin, end) take."""
        return self.per_token * (end - begin) + self.per_position * (end * (end - 1) - begin * (begin - 1)) / 2


@dataclass(frozen=True, slots=True)
class Load:
    """What it costs to bring blocks of a tier to where they are used: seconds before the first byte, bytes a second."""

    latency: float = 0.0
    bytes_per_second: float = float("inf")

    def __post_init__(self) -> None:
        if not (self.latency >= 0 and self.bytes_per_second > 0):
            raise ValueError(f"a tier cannot take {self.latency} s and give {self.bytes_per_second} bytes/s")

    def seconds(self, size: int) -> float:
        """Return how long `size` bytes take in one go."""
        return self.latency + size / self.bytes_per_second


def saved(recompute: Recompute, load: Load, begin: int, end: int, size: int) -> float:
    """Return the seconds that a load of positions [begin, end), `size` bytes, saves; negative where it is slower."""
    return recompute.seconds(begin, end) - load.seconds(size)


def worth_loading(recompute: Recompute, load: Load, begin: int, end: int, size: int) -> bool:
    """Return whether to load rather than to compute.

    Blocks that follow each other are loaded all or not at all: what is saved grows faster with each, and the latency
    is paid once.
    """
    return saved(recompute, load, begin, end, size) > 0


@dataclass(frozen=True, slots=True)
class Worth:
    """What a hit on one block of a tier is worth to the policy `value`. block_size: positions of a block.

    weight: the power of the seconds per byte that it is. At 1 late positions, which cost more, are worth as much more:
    more seconds are saved, but of fewer tokens than least recently used first saves. At 0 hits that save are alike.
    """

    recompute: Recompute = field(default_factory=lambda: Recompute(1.0))
    load: Load = field(default_factory=Load)
    block_size: int = 1
    weight: float = 0.0

    def of(self, position: int, size: int) -> float:
        """Return the worth; 0 where loading takes longer than computing, but for the latency that a load shares."""
        seconds = self.recompute.seconds(position, position + self.block_size) - size / self.load.bytes_per_second
        return (seconds / size) ** self.weight if seconds > 0 else 0.0
