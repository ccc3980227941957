"""A layer's experts on two sides: which are where, how they move, and one call over both.

Every expert is on at least one side at any time. It moves in three steps: a copy to the other side, the switch once
that copy has ended, the release of where it was. Switches and releases happen only while no call is under way, so
that a call sees one state from its beginning to its end.

Shape suffixes: T tokens, K top_k, H hidden_size, E experts.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from ktcompile.log import logger
from ktcompile.ops.experts import PackedExperts
from ktcompile.ops.moe import check, run
from ktcompile.runtime.device import CopyError, Device, Event

if TYPE_CHECKING:
    from ktcompile.runtime.adaptive import AdaptivePlacement


@dataclass(slots=True)
class Counts:
    """What a layer was asked for. rows: tokens of each expert [E]. touched: calls in which it had any [E]."""

    rows: NDArray[np.int64]
    touched: NDArray[np.int64]
    tokens: int

    @classmethod
    def none(cls, experts: int) -> Counts:
        return cls(np.zeros(experts, dtype=np.int64), np.zeros(experts, dtype=np.int64), 0)

    def add(self, rows: NDArray[np.int64], tokens: int) -> None:
        """Count one call."""
        self.rows += rows
        self.touched += rows > 0
        self.tokens += tokens


class _NoCopy:
    """The end of a copy that was not needed."""

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        pass


class SplitExperts:
    """The experts of one layer, some of them on a device.

    keep_cpu_copy: experts on the device stay with the CPU too, so that they can leave the device without a copy.
    """

    def __init__(self, experts: PackedExperts, device: Device, *, keep_cpu_copy: bool = False) -> None:
        self.experts, self.keep_cpu_copy = experts, keep_cpu_copy
        self._memory = device.experts(experts)
        self._resident: set[int] = set()
        self._released: set[int] = set()
        self._entering: dict[int, Event] = {}
        self._leaving: dict[int, Event] = {}
        self._under_way = 0
        # One more entry each: ids of num_experts and more are those of other machines, and skipped on both sides.
        self._cpu_id = torch.arange(experts.num_experts + 1)
        self._device_id = torch.full((experts.num_experts + 1,), experts.num_experts)
        self._counts = Counts.none(experts.num_experts)
        self.adaptive: AdaptivePlacement | None = None  # of the first layer of a model whose experts follow its routers
        self.bytes_moved = 0

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
        if expert in self._resident or expert in self._entering:
            raise ValueError(f"expert {expert} is on the device or on its way there")
        self._entering[expert] = self._memory.copy_in(expert, self.experts)

    def demote(self, expert: int) -> None:
        """Begin to move an expert back to the CPU. ValueError: it is not on the device, or on its way already."""
        self._check(expert)
        if expert not in self._resident or expert in self._leaving:
            raise ValueError(f"expert {expert} is not on the device, or is leaving it")
        copied = expert in self._released
        self._leaving[expert] = self._memory.copy_out(expert, self.experts) if copied else _NoCopy()

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
                    self._memory.release(expert)
            del self._entering[expert]
        for expert, event in list(self._leaving.items()):
            outcome = self._outcome(event, expert, "stays on the device")
            if outcome is False:
                continue
            del self._leaving[expert]
            if outcome:
                self._released.discard(expert)
                self._leave(expert)

    def submit(self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> SplitCall:
        """Begin a call: the CPU's part runs from now on. Arguments and errors as of `ktcompile.ops.moe`."""
        check(x_TH, ids_TK, weights_TK, self.experts)
        if bool((ids_TK < 0).any()):
            raise ValueError(f"topk_ids has {int(ids_TK.min())}; ids are 0 or more")
        self.poll()
        known_TK = ids_TK.long().clamp_max(self.experts.num_experts)
        self._counts.add(np.bincount(known_TK.flatten(), minlength=self.experts.num_experts + 1)[:-1], len(ids_TK))
        return SplitCall(self, x_TH, self._cpu_id[known_TK], self._device_id[known_TK], weights_TK)

    def take_counts(self) -> Counts:
        """Return what was asked for since the last time."""
        taken, self._counts = self._counts, Counts.none(self.experts.num_experts)
        return taken

    def count_under_way(self, change: int) -> None:
        self._under_way += change

    def _enter(self, expert: int) -> None:
        self._resident.add(expert)
        self._device_id[expert], self._cpu_id[expert] = expert, self.experts.num_experts
        self.bytes_moved += self.experts.native.expert_nbytes
        if not self.keep_cpu_copy:
            self._released.add(expert)
            self.experts.native.release(expert)

    def _leave(self, expert: int) -> None:
        self._resident.discard(expert)
        self._memory.release(expert)
        self._device_id[expert], self._cpu_id[expert] = self.experts.num_experts, expert

    def _outcome(self, event: Event, expert: int, consequence: str) -> bool | None:
        """Return whether a copy has ended, None if it failed."""
        try:
            return event.done()
        except CopyError as error:
            logger.warning("%s: expert %d %s: %s", self.experts.name or "a layer", expert, consequence, error)
            return None

    def fetch(self, expert: int) -> None:
        """Bring an expert's weights to the CPU, where they stay beside those of the device."""
        if expert in self._released:
            self._memory.copy_out(expert, self.experts).wait()
            self._released.discard(expert)

    def _check(self, expert: int) -> None:
        if not 0 <= expert < self.experts.num_experts:
            raise ValueError(f"expert {expert} is none of the layer's {self.experts.num_experts}")

    def run_on_device(self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """Return the device's part."""
        return self._memory.run(x_TH.contiguous(), ids_TK, weights_TK.contiguous())


class SplitCall:
    """One call of a split layer, which sees where the experts were when it began.

    The CPU's part begins with it: `weights_TK` may be overwritten from then on, `x_TH` once `finish` has returned.
    """

    def __init__(
        self,
        layer: SplitExperts,
        x_TH: torch.Tensor,
        cpu_ids_TK: torch.Tensor,
        device_ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
    ) -> None:
        self._layer, self._ids_TK = layer, device_ids_TK
        layer.count_under_way(1)
        experts = layer.experts
        self._any_resident = bool((device_ids_TK < experts.num_experts).any())
        self._cpu: Future[torch.Tensor] | None = None
        if not self._any_resident or bool((cpu_ids_TK < experts.num_experts).any()):
            self._cpu = _submitter().submit(run, x_TH, cpu_ids_TK, weights_TK.clone(), experts)

    def resident(self, x_TH: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """Return the device's part."""
        if not self._any_resident:
            return torch.zeros_like(x_TH)
        return self._layer.run_on_device(x_TH, self._ids_TK, weights_TK)

    def finish(self, resident_TH: torch.Tensor) -> torch.Tensor:
        """Return the sum of both parts once the CPU's is there. Where one has all the work, its result is the sum."""
        try:
            if self._cpu is None:
                return resident_TH.clone()
            cpu_TH = self._cpu.result()
            return cpu_TH + resident_TH if self._any_resident else cpu_TH
        finally:
            self._layer.count_under_way(-1)

    def abandon(self) -> None:
        """End the call without a result, once the CPU reads none of its arguments any more."""
        if self._cpu is not None:
            concurrent.futures.wait([self._cpu])
        self._layer.count_under_way(-1)


@functools.cache
def _submitter() -> ThreadPoolExecutor:
    """The thread that waits for the native threads, so that who submits does not."""
    return ThreadPoolExecutor(1, "ktcompile-submit")
