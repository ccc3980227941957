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


class DeviceExperts(Protocol):
    """The experts of one layer as a device sees them: it holds those that were copied to it, by their numbers."""

    def copy_in(self, expert: int, source: PackedExperts) -> Event:
        """Take memory for an expert and begin to copy it. DeviceMemoryError: the budget has no room."""
        ...

    def copy_out(self, expert: int, target: PackedExperts) -> Event:
        """Begin to copy an expert to where the CPU has it."""
        ...

    def release(self, expert: int) -> None:
        """Give an expert's memory back to the budget."""
        ...

    def run(self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum over the experts named, [T, H]; ids of num_experts are skipped."""
        ...


class Device(Protocol):
    """A device with a budget of bytes."""

    @property
    def name(self) -> str: ...

    @property
    def memory_bytes(self) -> int: ...

    @property
    def used_bytes(self) -> int: ...

    def experts(self, like: PackedExperts) -> DeviceExperts:
        """Return room for experts of a layer, none of which it holds yet."""
        ...
