"""What placement must know of a machine. Presets are published figures, not measurements."""

from __future__ import annotations

from dataclasses import dataclass

_GB = 10**9


@dataclass(frozen=True, slots=True)
class Processor:
    """A CPU or a device. bandwidth: bytes read per second. flops: of its matrix products in bf16, per second.
    overhead: seconds that a layer's experts take beside their work (threads woken, kernels launched)."""

    name: str
    memory_bytes: int
    bandwidth: float
    flops: float
    overhead: float

    def seconds(self, read_bytes: float, flops: float) -> float:
        """Return the roofline time of a piece of work, without the overhead."""
        return max(read_bytes / self.bandwidth, flops / self.flops)


@dataclass(frozen=True, slots=True)
class Link:
    """Between the CPU's memory and the device's. latency: seconds before a copy's first byte."""

    bandwidth: float
    latency: float

    def seconds(self, size: float) -> float:
        """Return how long a copy takes on an idle link."""
        return self.latency + size / self.bandwidth if size else 0.0


@dataclass(frozen=True, slots=True)
class Hardware:
    """A machine. device: None where there is no GPU; then there is no link either."""

    name: str
    cpu: Processor
    device: Processor | None = None
    link: Link | None = None

    def __post_init__(self) -> None:
        if (self.device is None) != (self.link is None):
            raise ValueError(f"hardware {self.name!r} must have both a device and a link, or neither")


# Bandwidths and peaks are four fifths of the published ones, which is what good kernels reach.
PRESETS = {
    h.name: h
    for h in (
        Hardware(
            "4090-ddr5",
            Processor("16 cores, AVX-512, two channels of DDR5-5600", 128 * _GB, 70 * _GB, 2e12, 20e-6),
            Processor("RTX 4090", 24 * _GB, 800 * _GB, 130e12, 30e-6),
            Link(25 * _GB, 10e-6),
        ),
        Hardware(
            "h100-xeon-amx",
            Processor("Xeon with AMX, eight channels of DDR5-4800", 512 * _GB, 245 * _GB, 21e12, 20e-6),
            Processor("H100 80 GB", 80 * _GB, 2680 * _GB, 790e12, 30e-6),
            Link(50 * _GB, 10e-6),
        ),
        Hardware(
            "laptop",
            Processor("8 cores, AVX2, two channels of LPDDR5X-7500", 32 * _GB, 75 * _GB, 0.8e12, 20e-6),
            Processor("RTX 4060 Laptop", 8 * _GB, 205 * _GB, 48e12, 30e-6),
            Link(12 * _GB, 10e-6),
        ),
    )
}


def preset(name: str) -> Hardware:
    """Return a machine by name. ValueError: there is none."""
    if name not in PRESETS:
        raise ValueError(f"hardware {name!r} is unknown; presets are {', '.join(PRESETS)}")
    return PRESETS[name]
