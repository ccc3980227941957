"""The devices of this process, and which experts they are given at first."""

from __future__ import annotations

import functools

from ktcompile.log import logger
from ktcompile.ops.experts import PackedExperts
from ktcompile.ops.split import attach, layer_of
from ktcompile.plan.hardware import preset
from ktcompile.runtime.device import Device, DeviceMemoryError
from ktcompile.runtime.split import SplitExperts
from ktcompile.runtime.stand_in import StandInDevice

# More than any experts take.
_UNLIMITED = 1 << 60


@functools.cache
def device_for(kind: str, memory_bytes: int | None) -> Device:
    """Return the device of a kind and a budget, which all graphs share. ValueError: there is no such kind."""
    if kind != "stand-in":
        raise ValueError(f"device {kind!r} is unknown; there is stand-in")
    link = preset("4090-ddr5").link
    assert link is not None
    return StandInDevice(_UNLIMITED if memory_bytes is None else memory_bytes, link)


class Placer:
    """Puts a part of each layer's experts on a device."""

    def __init__(self, device: Device, fraction: float, *, keep_cpu_copy: bool = False) -> None:
        self._device, self._fraction, self._keep_cpu_copy = device, fraction, keep_cpu_copy

    def ensure(self, experts: PackedExperts) -> None:
        """Split a layer, unless it is split, in whatever way."""
        if layer_of(experts) is None:
            self.place(experts)

    def place(self, experts: PackedExperts) -> None:
        """Split a layer, anew if it is split. Where the budget ends, its experts stay with the CPU."""
        before = layer_of(experts)
        if isinstance(before, SplitExperts):
            before.dissolve()
        wanted = round(self._fraction * experts.num_experts)
        layer = SplitExperts(experts, self._device, keep_cpu_copy=self._keep_cpu_copy)
        attach(experts, layer)
        for expert in range(wanted):
            try:
                layer.promote(expert)
            except DeviceMemoryError as error:
                name = experts.name or "a layer"
                logger.warning(
                    "%s: %d of %d experts fit; the others stay with the CPU: %s", name, expert, wanted, error
                )
                break
        layer.settle()
