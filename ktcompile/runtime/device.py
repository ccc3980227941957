"""What the runtime asks of a device: memory under a budget, copies that run beside the work, and experts' products.

`ktcompile.runtime.cuda` is a GPU, `ktcompile.runtime.stand_in` has the one without.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

import torch

from ktcompile.ops.experts import PackedExperts
from ktcompile.plan.facts import MoeLayerFacts
from ktcompile.plan.hardware import Link, Processor


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


class Fetched(Protocol):
    """Tensors of a call on their way to the CPU's memory."""

    def wait(self) -> tuple[torch.Tensor, ...]:
        """Return them once they are there. Any thread may wait."""
        ...


class Products(Protocol):
    """The device's part of one call, made up of its experts' products."""

    def add(self, selection: Any) -> None:
        """Compute the products of a selection's experts. No expert is in two selections of one call."""
        ...

    def result(self) -> torch.Tensor:
        """Return the weighted sum over all that were added, [T, H]."""
        ...

    def span(self) -> tuple[float, float] | None:
        """Return when the products began and ended, by time.perf_counter; None: it is not known, or not yet."""
        ...


class DeviceExperts(Protocol):
    """The experts of one layer as a device sees them: it holds those that were copied to it, by their numbers."""

    def copy_in(self, expert: int, source: PackedExperts) -> Event:
        """Take memory for an expert and begin to copy it, behind what the device still computes with that memory.

        DeviceMemoryError: the budget has no room.
        """
        ...

    def copy_out(self, expert: int, target: PackedExperts) -> Event:
        """Begin to copy an expert to where the CPU has it."""
        ...

    def release(self, expert: int) -> None:
        """Give an expert's memory back to the budget."""
        ...

    def select(self, experts: Collection[int]) -> Any:
        """Return what names some of the experts that it holds to `Products.add`. It stays as it is when others come."""
        ...

    def begin(self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> Products:
        """Begin the products of a call with tensors on the device; ids of num_experts and more are skipped."""
        ...


class Device(Protocol):
    """A device with a budget of bytes."""

    @property
    def name(self) -> str: ...

    @property
    def memory_bytes(self) -> int: ...

    @property
    def used_bytes(self) -> int: ...

    def where(self) -> torch.device:
        """Return where the tensors of a call are."""
        ...

    def set_aside(self, layers: Sequence[PackedExperts], size: int) -> None:
        """Prepare memory for so many bytes of these layers' experts, before any is copied."""
        ...

    def experts(self, like: PackedExperts) -> DeviceExperts:
        """Return room for experts of a layer, none of which it holds yet."""
        ...

    def fetch(self, *tensors: torch.Tensor) -> Fetched:
        """Begin to copy tensors of a call to the CPU's memory, which does not wait for the device.

        What is fetched stays as it is when the tensors are overwritten.
        """
        ...

    def hardware(self, like: PackedExperts, facts: MoeLayerFacts) -> tuple[Processor, Link]:
        """Return how fast the device and the way to it are at a layer's experts. Memory has been set aside for them."""
        ...

    def deliver(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the CPU on the device, there before what is computed next."""
        ...
