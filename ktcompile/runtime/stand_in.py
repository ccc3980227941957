"""A device that is none: its own pool of memory under a budget, and copies that take their time.

Everything that a GPU's memory and streams may do to the runtime happens here, with real numbers and at no speed: what a
copy has not yet brought is no number, a copy may be late, and it may fail. In tests time is virtual.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from ktcompile import _native
from ktcompile.ops.experts import PackedExperts
from ktcompile.ops.moe import launch
from ktcompile.plan.facts import MoeLayerFacts
from ktcompile.plan.hardware import Link, Processor, preset
from ktcompile.runtime.call import only
from ktcompile.runtime.device import CopyError, DeviceMemoryError

_NO_NUMBER = 0xFF  # NaN in floats and in scales
_MACHINE = preset("4090-ddr5")
assert _MACHINE.device is not None
_STANDS_FOR = _MACHINE.device


class Clock(Protocol):
    """What time it is, and how to wait."""

    @property
    def now(self) -> float: ...

    def wait_until(self, at: float) -> None: ...


class VirtualClock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def advance(self, seconds: float) -> None:
        """Let time pass. ValueError: it would run backwards."""
        if seconds < 0:
            raise ValueError(f"a clock cannot advance by {seconds} seconds")
        self.now += seconds

    def wait_until(self, at: float) -> None:
        """Let time pass up to a moment, unless that has been."""
        self.now = max(self.now, at)


class WallClock:
    """The time of this machine."""

    @property
    def now(self) -> float:
        return time.perf_counter()

    def wait_until(self, at: float) -> None:
        """Sleep up to a moment, unless that has been."""
        while (left := at - self.now) > 0:
            time.sleep(left)


class Stream:
    """Copies that end one after the other, in the order in which they were begun."""

    def __init__(self, device: StandInDevice) -> None:
        self._device = device
        self._free_at = 0.0

    def copy(self, size: int, action: Callable[[], None]) -> SimulatedEvent:
        """Begin a copy; `action` is what it does once it has ended."""
        begin = max(self._device.clock.now, self._free_at)
        self._free_at = begin + self._device.link.seconds(size) + self._device.delay
        failure = self._device.next_failure()
        return SimulatedEvent(self._device.clock, self._free_at, action, failure)


class SimulatedEvent:
    """The end of a copy, at a time that is known when it begins."""

    def __init__(self, clock: Clock, at: float, action: Callable[[], None], failure: str | None) -> None:
        self._clock, self._at, self._failure = clock, at, failure
        self._action: Callable[[], None] | None = action

    def done(self) -> bool:
        """Return whether the copy has ended. CopyError: it failed."""
        if self._clock.now < self._at:
            return False
        if self._failure:
            raise CopyError(self._failure)
        if self._action is not None:
            self._action()
            self._action = None
        return True

    def wait(self) -> None:
        """Let time pass to the end of the copy. CopyError: it failed."""
        self._clock.wait_until(self._at)
        self.done()


class StandInDevice:
    """A device in the CPU's memory.

    memory_bytes: its budget. link: how fast copies are, by its clock. delay: seconds that every copy takes longer, for
    tests.
    """

    name = "stand-in"

    def __init__(self, memory_bytes: int, link: Link, clock: Clock) -> None:
        if memory_bytes < 0:
            raise ValueError(f"the device's memory is {memory_bytes} bytes; it must be 0 or more")
        self.memory_bytes, self.link, self.clock, self.delay = memory_bytes, link, clock, 0.0
        self.used_bytes = 0
        self._stream = Stream(self)
        self._failures: Iterator[str] = iter(())

    def where(self) -> torch.device:
        """Return the CPU, in whose memory the stand-in is."""
        return torch.device("cpu")

    def set_aside(self, layers: Sequence[PackedExperts], size: int) -> None:
        """Do nothing: memory is taken by the expert."""

    def fetch(self, *tensors: torch.Tensor) -> Copies:
        """Return copies of the tensors."""
        return Copies(tuple(t.clone() for t in tensors))

    def deliver(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor, which is where it should be."""
        return tensor

    def hardware(self, like: PackedExperts, facts: MoeLayerFacts) -> tuple[Processor, Link]:
        """Return the GPU that it stands for, and its link."""
        return _STANDS_FOR, self.link

    def experts(self, like: PackedExperts) -> StandInExperts:
        """Return room for experts of a layer, none of which it holds yet."""
        return StandInExperts(self, self._stream, like)

    def take(self, size: int) -> None:
        """Take memory. DeviceMemoryError: the budget has no room."""
        if self.used_bytes + size > self.memory_bytes:
            raise DeviceMemoryError(
                f"an expert of {size} bytes does not fit: the device has {self.memory_bytes} bytes, "
                f"{self.used_bytes} of them in use"
            )
        self.used_bytes += size

    def give_back(self, size: int) -> None:
        self.used_bytes -= size

    @contextmanager
    def failing(self, reasons: Iterator[str]) -> Iterator[None]:
        """Let the next copies fail, each with a reason; "" is a copy that succeeds. For tests."""
        self._failures = reasons
        try:
            yield
        finally:
            self._failures = iter(())

    def next_failure(self) -> str | None:
        return next(self._failures, "") or None


@dataclass(frozen=True, slots=True)
class Copies:
    """Tensors that are there."""

    tensors: tuple[torch.Tensor, ...]

    def wait(self) -> tuple[torch.Tensor, ...]:
        return self.tensors


class StandInExperts:
    """Experts of a native layer of its own, which the CPU's kernels multiply. What it does not hold is no number."""

    def __init__(self, device: StandInDevice, stream: Stream, like: PackedExperts) -> None:
        self._device, self._stream, self._size = device, stream, like.native.expert_nbytes
        self._experts = like.empty()
        self._held: set[int] = set()
        weakref.finalize(self, _give_back_all, device, self._held, self._size)
        for expert in range(like.num_experts):
            self._experts.native.fill(expert, _NO_NUMBER)

    def copy_in(self, expert: int, source: PackedExperts) -> SimulatedEvent:
        """Take memory for an expert and begin to copy it. DeviceMemoryError: the budget has no room."""
        self._device.take(self._size)
        self._held.add(expert)
        return self._copy(self._experts.native, source.native, expert)

    def copy_out(self, expert: int, target: PackedExperts) -> SimulatedEvent:
        """Begin to copy an expert to where the CPU has it."""
        return self._copy(target.native, self._experts.native, expert)

    def release(self, expert: int) -> None:
        """Give an expert's memory back to the budget."""
        self._experts.native.fill(expert, _NO_NUMBER)
        self._held.discard(expert)
        self._device.give_back(self._size)

    def select(self, experts: Collection[int]) -> torch.Tensor:
        """Return the number of each expert of the selection, and num_experts for all others [num_experts + 1]."""
        return only(experts, self._experts.num_experts)

    def begin(self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> StandInProducts:
        """Begin the products of a call; ids of num_experts and more are skipped."""
        known_TK = ids_TK.long().clamp_max(self._experts.num_experts)
        return StandInProducts(self._experts, x_TH.contiguous(), known_TK, weights_TK.contiguous())

    def _copy(self, to: _native.Experts, source: _native.Experts, expert: int) -> SimulatedEvent:
        return self._stream.copy(self._size, lambda: to.copy(expert, source, expert))


class StandInProducts:
    """The CPU's kernels, once for each selection: the first one's part is rounded to the dtype of the call, so that it
    has their bits if it is the only one; the others are added to it in fp32, in the order in which they come."""

    def __init__(
        self, experts: PackedExperts, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> None:
        self._experts, self._x_TH, self._ids_TK, self._weights_TK = experts, x_TH, ids_TK, weights_TK
        self._sum_TH: torch.Tensor | None = None
        self._began = self._ended = time.perf_counter()

    def add(self, selection: torch.Tensor) -> None:
        """Compute the products of a selection's experts."""
        if self._sum_TH is None:
            self._sum_TH = launch(self._x_TH, selection[self._ids_TK], self._weights_TK, self._experts)
        else:
            part_TH = launch(self._x_TH.float(), selection[self._ids_TK], self._weights_TK, self._experts)
            self._sum_TH = self._sum_TH.float().add_(part_TH)
        self._ended = time.perf_counter()

    def result(self) -> torch.Tensor:
        """Return the weighted sum over all that were added, [T, H]."""
        return torch.zeros_like(self._x_TH) if self._sum_TH is None else self._sum_TH.to(self._x_TH.dtype)

    def span(self) -> tuple[float, float]:
        """Return when the products began and ended, by time.perf_counter."""
        return self._began, self._ended


def _give_back_all(device: StandInDevice, held: set[int], size: int) -> None:
    device.give_back(len(held) * size)
