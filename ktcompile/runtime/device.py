"""What the runtime asks of a device: memory under a budget, copies that run beside the work, and experts' products.

`ktcompile.runtime.stand_in` has the one without a GPU.
"""

from __future__ import annotations

from typing import Protocol

import torch

from ktcompile.ops.experts import PackedExperts


class DeviceMemoryError(RuntimeError):
    """The device's budget does not hold what was asked for."""


class CopyError(RuntimeError):
    """A copy to or from the device failed; what it should have written is not there."""


class Event(Protocol):
    """The end of a copy."""

    def done(self) -> bool:
        """Return whether the copy has ended. CopyError: it failed."""
        ...

    def wait(self) -> None:
        """Return once the copy has ended. CopyError: it failed."""
        ...


class ExpertSlots(Protocol):
    """Memory of a device for some experts of one layer. A slot holds nothing until a copy into it has ended."""

    @property
    def count(self) -> int: ...

    def copy_in(self, slot: int, source: PackedExperts, expert: int) -> Event:
        """Begin to copy an expert of the CPU's into a slot."""
        ...

    def copy_out(self, slot: int, target: PackedExperts, expert: int) -> Event:
        """Begin to copy a slot to where the CPU has the expert."""
        ...

    def run(self, x_TH: torch.Tensor, slots_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum over the slots named, [T, H]; a slot of `count` is skipped."""
        ...

    def free(self) -> None:
        """Give the memory back to the budget."""
        ...


class Device(Protocol):
    """A device with a budget of bytes."""

    @property
    def name(self) -> str: ...

    @property
    def memory_bytes(self) -> int: ...

    @property
    def used_bytes(self) -> int: ...

    def expert_slots(self, like: PackedExperts, count: int) -> ExpertSlots:
        """Allocate slots for experts of a layer. DeviceMemoryError: the budget does not hold them."""
        ...
