"""How long the experts of one layer take, split between CPU and device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ktcompile.plan.facts import MoeLayerFacts
from ktcompile.plan.hardware import Hardware

Rows = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class LayerCost:
    """Seconds of one layer's experts. cpu, device: busy. copy: weights on the link. total: until the sum is there.
    streamed: whether cold experts were copied to the device instead of computed on the CPU."""

    cpu: float
    device: float
    copy: float
    total: float
    streamed: bool


class CostModel:
    """Roofline times of expert work on one machine."""

    def __init__(self, hardware: Hardware) -> None:
        self.hardware = hardware

    def cpu_seconds(self, layer: MoeLayerFacts, rows: Rows) -> NDArray[np.float64]:
        """Return the CPU's time for each expert, given the tokens of each [E]; experts without tokens take none."""
        cpu = self.hardware.cpu
        return _seconds(layer, rows, cpu.bandwidth, cpu.flops)

    def device_seconds(self, layer: MoeLayerFacts, rows: Rows) -> NDArray[np.float64]:
        """Return the device's time for each expert. ValueError: there is no device."""
        device = self.hardware.device
        if device is None:
            raise ValueError(f"hardware {self.hardware.name!r} has no device")
        return _seconds(layer, rows, device.bandwidth, device.flops)

    def layer(self, layer: MoeLayerFacts, rows: Rows, resident: Mask) -> LayerCost:
        """Return the cost of a layer with the better of both ways for its cold experts.

        rows: tokens of each expert [E]. resident: which experts are on the device [E]. CPU and device work side by
        side; streamed weights go through two buffers, so that copies run beside the device's products.
        """
        split = self.split(layer, rows, resident)
        if self.hardware.device is None:
            return split
        stream = self.streamed(layer, rows, resident)
        return stream if stream.total < split.total else split

    def split(self, layer: MoeLayerFacts, rows: Rows, resident: Mask) -> LayerCost:
        """Return the cost with cold experts on the CPU."""
        cold, hot = (rows > 0) & ~resident, (rows > 0) & resident
        cpu = self._busy(self.cpu_seconds(layer, rows)[cold], self.hardware.cpu.overhead)
        if self.hardware.device is None:
            assert not hot.any(), "no device has experts"
            return LayerCost(cpu, 0.0, 0.0, cpu, streamed=False)
        device = self._busy(self.device_seconds(layer, rows)[hot], self.hardware.device.overhead)
        return LayerCost(cpu, device, 0.0, max(cpu, device), streamed=False)

    def streamed(self, layer: MoeLayerFacts, rows: Rows, resident: Mask) -> LayerCost:
        """Return the cost with cold experts copied to the device. ValueError: there is no device."""
        times = self.device_seconds(layer, rows)
        assert self.hardware.device is not None and self.hardware.link is not None
        device = self._busy(times[rows > 0], self.hardware.device.overhead)
        cold = int(((rows > 0) & ~resident).sum())
        copy = self.hardware.link.seconds(cold * layer.expert_bytes)
        # The last expert's products begin when its copy ends.
        last = float(times.max()) if cold else 0.0
        return LayerCost(0.0, device, copy, max(device, copy + last), streamed=cold > 0)

    @staticmethod
    def _busy(seconds: NDArray[np.float64], overhead: float) -> float:
        return float(seconds.sum()) + overhead if len(seconds) else 0.0


def _seconds(layer: MoeLayerFacts, rows: Rows, bandwidth: float, flops: float) -> NDArray[np.float64]:
    seconds: NDArray[np.float64] = np.maximum(layer.expert_bytes / bandwidth, rows * (layer.flops_per_row / flops))
    return np.where(rows > 0, seconds, 0.0)
