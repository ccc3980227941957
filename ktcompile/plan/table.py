"""Times and sizes of the experts of all layers as arrays, so that policies need no loops over experts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ktcompile.plan.facts import ModelFacts
from ktcompile.plan.hardware import Hardware

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class ExpertTable:
    """Arrays over layers [L], for a machine with a device; `exists` [L, E] is false where a layer has fewer experts.

    cpu_read, device_read: seconds to read an expert's weights there. cpu_row, device_row: seconds of the products of
    one token. link: seconds that its weights take on the link. bytes: of one expert.
    """

    exists: Mask
    bytes: Floats
    cpu_read: Floats
    cpu_row: Floats
    device_read: Floats
    device_row: Floats
    link: Floats
    top_k: Floats
    hardware: Hardware
    cpu_overhead: float
    device_overhead: float
    link_latency: float

    @classmethod
    def of(cls, facts: ModelFacts, hardware: Hardware) -> ExpertTable:
        """Return the table of a model on a machine. ValueError: the machine has no device, or the model no layers."""
        if hardware.device is None or hardware.link is None:
            raise ValueError(f"hardware {hardware.name!r} has no device")
        if not facts.layers:
            raise ValueError("the model has no MoE layers")
        size = np.array([layer.expert_bytes for layer in facts.layers], dtype=np.float64)
        flops = np.array([layer.flops_per_row for layer in facts.layers], dtype=np.float64)
        return cls(
            exists=exists(facts),
            bytes=size,
            cpu_read=size / hardware.cpu.bandwidth,
            cpu_row=flops / hardware.cpu.flops,
            device_read=size / hardware.device.bandwidth,
            device_row=flops / hardware.device.flops,
            link=size / hardware.link.bandwidth,
            top_k=np.array([layer.top_k for layer in facts.layers], dtype=np.float64),
            hardware=hardware,
            cpu_overhead=hardware.cpu.overhead,
            device_overhead=hardware.device.overhead,
            link_latency=hardware.link.latency,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and the most experts of a layer."""
        layers, experts = self.exists.shape
        return layers, experts

    @property
    def sides(self) -> tuple[tuple[Floats, Floats], tuple[Floats, Floats]]:
        """The seconds to read an expert and those of a row [L], of the CPU and of the device."""
        return (self.cpu_read, self.cpu_row), (self.device_read, self.device_row)

    def cpu_seconds(self, rows_LE: Floats) -> Floats:
        """Return the CPU's time for each expert that is used, given its rows [L, E], which may be expectations."""
        return np.maximum(self.cpu_read[:, None], rows_LE * self.cpu_row[:, None])

    def device_seconds(self, rows_LE: Floats) -> Floats:
        """Return the device's time for each expert that is used, given its rows [L, E]."""
        return np.maximum(self.device_read[:, None], rows_LE * self.device_row[:, None])


def exists(facts: ModelFacts) -> Mask:
    """Return which (layer, expert) there are [L, E], E being the most experts of a layer."""
    experts = np.array([layer.num_experts for layer in facts.layers], dtype=np.int64)
    mask: Mask = np.arange(experts.max(initial=0)) < experts[:, None]
    return mask
