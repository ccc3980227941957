"""A layer's experts on two sides: which are where, and how they move.

Every expert is on at least one side at any time. It moves in three steps: a copy to the other side, the switch once
that copy has ended, the release of where it was. Switches and releases happen only while no call is under way, so
that a call sees one state from its beginning to its end.

Shape suffixes: T tokens, K top_k, H hidden_size, E experts.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from ktcompile.log import logger
from ktcompile.ops.experts import PackedExperts
from ktcompile.ops.moe import check
from ktcompile.runtime.activity import Activity, Counts
from ktcompile.runtime.call import SplitCall, State
from ktcompile.runtime.device import CopyError, Device, Event, Products
from ktcompile.runtime.streaming import Streaming

if TYPE_CHECKING:
    from ktcompile.runtime.adaptive import AdaptivePlacement

# Calls that have ended while a device still computes them; older ones are not timed.
_UNTIMED = 8


class _NoCopy:
    """The end of a copy that was not needed."""

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        pass


class SplitExperts:
    """The experts of one layer, some of them on a device.

    keep_cpu_copy: experts on the device stay with the CPU too, so that they can leave the device without a copy.
    streaming: None: no call copies the CPU's experts through the device.
    """

    def __init__(
        self,
        experts: PackedExperts,
        device: Device,
        *,
        keep_cpu_copy: bool = False,
        streaming: Streaming | None = None,
    ) -> None:
        self.experts, self.keep_cpu_copy, self.streaming = experts, keep_cpu_copy, streaming
        self.device, self.memory = device, device.experts(experts)
        self._resident: set[int] = set()
        self._released: set[int] = set()
        self._entering: dict[int, Event] = {}
        self._leaving: dict[int, Event] = {}
        self._lent: set[int] = set()
        self._under_way = 0
        self._state: State | None = None
        self._counts = Counts.none(experts.num_experts)
        self.adaptive: AdaptivePlacement | None = None  # of the first layer of a model whose experts follow its routers
        self.placed_by: object = None  # the key of the placer that chose what is where
        self.activity = Activity()
        self._untimed: deque[tuple[tuple[float, float] | None, Products]] = deque(maxlen=_UNTIMED)
        self.chosen_E = np.zeros(experts.num_experts, dtype=np.int64)  # tokens of each expert since it was split

    @property
    def resident(self) -> frozenset[int]:
        """The experts that the device computes."""
        return frozenset(self._resident)

    @property
    def moving(self) -> frozenset[int]:
        """The experts that are being copied."""
        return frozenset((*self._entering, *self._leaving))

    @property
    def cpu_bytes(self) -> int:
        """Bytes of weights that the CPU holds."""
        return (self.experts.num_experts - len(self._released)) * self.experts.native.expert_nbytes

    def promote(self, expert: int) -> None:
        """Begin to move an expert to the device.

        ValueError: it is there or on its way. DeviceMemoryError: there is no room.
        """
        self._check(expert)
        if expert in self._resident or expert in self._entering or expert in self._lent:
            raise ValueError(f"expert {expert} is on the device or on its way there")
        self._entering[expert] = self.memory.copy_in(expert, self.experts)

    def demote(self, expert: int) -> None:
        """Begin to move an expert back to the CPU. ValueError: it is not on the device, or on its way already."""
        self._check(expert)
        if expert not in self._resident or expert in self._leaving:
            raise ValueError(f"expert {expert} is not on the device, or is leaving it")
        self._leaving[expert] = self.memory.copy_out(expert, self.experts) if self._is_gone(expert) else _NoCopy()

    def dissolve(self) -> None:
        """Bring all experts back to the CPU and give the device's memory back. Nothing may be under way."""
        self.settle()
        for expert in self.resident:
            self.fetch(expert)
            self._leave(expert)
        self.experts.split = None

    def settle(self) -> None:
        """Wait for all copies, and switch. Nothing may be under way."""
        assert not self._under_way
        for event in (*self._entering.values(), *self._leaving.values()):
            with contextlib.suppress(CopyError):  # `poll` meets it again, and reports it
                event.wait()
        self.poll()

    def poll(self) -> None:
        """Switch what has been copied, unless a call is under way. An expert whose copy failed stays where it was."""
        if self._under_way:
            return
        for expert, event in list(self._entering.items()):
            match self._outcome(event, expert, "stays with the CPU"):
                case True:
                    self._enter(expert)
                case False:
                    continue
                case None:
                    self.memory.release(expert)
            del self._entering[expert]
        for expert, event in list(self._leaving.items()):
            outcome = self._outcome(event, expert, "stays on the device")
            if outcome is False:
                continue
            del self._leaving[expert]
            if outcome:
                self.activity.demoted += 1
                if self._is_gone(expert):
                    self.activity.bytes_demoted += self.experts.native.expert_nbytes
                self._released.discard(expert)
                self._leave(expert)

    def submit(self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> SplitCall:
        """Begin a call: the CPU's part runs from now on. Arguments and errors as of `ktcompile.ops.moe`, but that
        negative ids are found at its end."""
        check(x_TH, ids_TK, weights_TK, self.experts, self.device.where())
        self.poll()
        return SplitCall(self, self._state_for(len(x_TH)), x_TH, ids_TK, weights_TK)

    def count(self, rows_E: NDArray[np.int64], tokens: int) -> None:
        """Count what one call asked for."""
        self._counts.add(rows_E, tokens)
        self.chosen_E += rows_E

    def take_counts(self) -> Counts:
        """Return what was asked for since the last time."""
        taken, self._counts = self._counts, Counts.none(self.experts.num_experts)
        return taken

    def time(self, cpu: tuple[float, float] | None, products: Products) -> None:
        """Count when both sides computed a call, now or when a later one ends: a device may not be done yet.

        cpu: None if it had nothing to compute.
        """
        self._untimed.append((cpu, products))
        while self._untimed and (span := self._untimed[0][1].span()) is not None:
            self.activity.time(self._untimed.popleft()[0], span)

    def begin_call(self) -> None:
        self._under_way += 1

    def end_call(self) -> None:
        self._under_way -= 1

    @contextlib.contextmanager
    def lending(self, experts: Collection[int]) -> Iterator[list[int]]:
        """Yield those of the CPU's experts that may be on the device for a while: that are not on their way there."""
        lent = sorted(set(experts) - self._entering.keys() - self._lent)
        self._lent.update(lent)
        try:
            yield lent
        finally:
            self._lent.difference_update(lent)

    def fetch(self, expert: int) -> None:
        """Bring an expert's weights to the CPU, where they stay beside those of the device."""
        if self._is_gone(expert):
            self.memory.copy_out(expert, self.experts).wait()
        self._released.discard(expert)

    def _state_for(self, tokens: int) -> State:
        """Return where each expert is computed in a call that begins now."""
        if self._state is None:
            self._state = State.of(self.experts.num_experts, self._resident, self.memory.select(self._resident))
        streaming = self.streaming
        # What one call has on its way is no other's; an expert that is moving is the CPU's until it has arrived.
        if streaming is None or tokens < streaming.from_tokens or self._under_way:
            return self._state
        cold = set(range(self.experts.num_experts)) - self._resident - self._entering.keys()
        return self._state.streaming(sorted(cold), streaming.experts)

    def _enter(self, expert: int) -> None:
        self._resident.add(expert)
        self._state = None
        self.activity.promoted += 1
        self.activity.bytes_promoted += self.experts.native.expert_nbytes
        if not self.keep_cpu_copy:
            self._released.add(expert)
            self.experts.native.release(expert)

    def _leave(self, expert: int) -> None:
        self._resident.discard(expert)
        self._state = None
        self.memory.release(expert)

    def _is_gone(self, expert: int) -> bool:
        """Return whether the CPU has an expert's weights no more: pages of a file are read again when they are
        needed."""
        return expert in self._released and not self.experts.native.mapped

    def _outcome(self, event: Event, expert: int, consequence: str) -> bool | None:
        """Return whether a copy has ended, None if it failed."""
        try:
            return event.done()
        except CopyError as error:
            self.activity.failed += 1
            logger.warning("%s: expert %d %s: %s", self.experts.label, expert, consequence, error)
            return None

    def _check(self, expert: int) -> None:
        if not 0 <= expert < self.experts.num_experts:
            raise ValueError(f"expert {expert} is none of the layer's {self.experts.num_experts}")
