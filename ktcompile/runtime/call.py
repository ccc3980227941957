"""One call of a layer whose experts are on two sides.

Shape suffixes: T tokens, K top_k, H hidden_size, E experts.
"""

from __future__ import annotations

import concurrent.futures
import functools
import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ktcompile import _native
from ktcompile.ops.moe import run
from ktcompile.ops.observer import observe
from ktcompile.runtime.device import Fetched, Products
from ktcompile.runtime.streaming import stream

if TYPE_CHECKING:
    from ktcompile.runtime.split import SplitExperts


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """Where each expert of a layer is computed.

    cpu_id: the number of each expert that the CPU computes, and num_experts for all others [E + 1]. One more entry:
    ids of num_experts and more are those of other machines, and skipped on both sides. resident, selection: those of
    the device. streamed: those that it is sent for the call, `buffer` at a time.
    """

    cpu_id: torch.Tensor
    resident: frozenset[int]
    selection: Any
    streamed: tuple[int, ...] = ()
    buffer: int = 0

    @classmethod
    def of(cls, num_experts: int, resident: Collection[int], selection: Any) -> State:
        """Return the state in which all experts that are not resident are the CPU's."""
        return cls(only(set(range(num_experts)) - set(resident), num_experts), frozenset(resident), selection)

    def streaming(self, experts: Sequence[int], buffer: int) -> State:
        """Return the state in which some of the CPU's experts are sent to the device."""
        cpu_id = self.cpu_id.clone()
        cpu_id[list(experts)] = len(cpu_id) - 1
        return replace(self, cpu_id=cpu_id, streamed=tuple(experts), buffer=buffer)


class SplitCall:
    """One call of a split layer, which sees where the experts were when it began.

    The CPU's part begins with it. Its tensors may be overwritten from then on.
    """

    def __init__(
        self,
        layer: SplitExperts,
        state: State,
        x_TH: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
    ) -> None:
        self._layer, self._state, self._ids_TK = layer, state, ids_TK.clone()
        layer.begin_call()
        self._fetched = layer.device.fetch(x_TH, ids_TK, weights_TK)
        self._cpu_span: tuple[float, float] | None = None
        self._products: Products | None = None
        self._cpu: Future[torch.Tensor | None] = _submitter().submit(self._compute)
        self._left: list[int] = []

    def resident(self, x_TH: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """Return the device's part."""
        state, memory = self._state, self._layer.memory
        if not state.resident and not state.streamed:
            return torch.zeros_like(x_TH)
        products = self._products = memory.begin(x_TH, self._ids_TK, weights_TK)
        if state.resident:
            products.add(state.selection)
        if state.streamed:
            self._stream(products)
        return products.result()

    def finish(self, resident_TH: torch.Tensor) -> torch.Tensor:
        """Return the sum of both parts once the CPU's is there. Where one has all the work, its result is the sum."""
        try:
            cpu_TH = self._cpu.result()
            if self._products is not None:
                self._layer.time(self._cpu_span, self._products)
            if self._left:
                num_experts = len(self._state.cpu_id) - 1
                left_TH = self._run(only(self._left, num_experts), known_ids(self._fetched, num_experts))
                cpu_TH = left_TH if cpu_TH is None else cpu_TH + left_TH
            if cpu_TH is None:
                return resident_TH.clone()
            delivered_TH = self._layer.device.deliver(cpu_TH)
            return delivered_TH + resident_TH if self._state.resident or self._state.streamed else delivered_TH
        finally:
            self._layer.end_call()

    def abandon(self) -> None:
        """End the call without a result, once the CPU computes nothing for it any more."""
        concurrent.futures.wait([self._cpu])
        self._layer.end_call()

    def _stream(self, products: Products) -> None:
        """Add the products of the experts that are sent to the device; those that could not be are `_left`."""
        layer, state = self._layer, self._state
        used = set(known_ids(self._fetched, len(state.cpu_id) - 1).flatten().tolist())
        asked = [expert for expert in state.streamed if expert in used]
        with layer.lending(asked) as lent:
            failed = stream(layer.memory, layer.experts, products, lent, state.buffer)
        self._left = [*failed, *(set(asked) - set(lent))]
        layer.activity.streamed_calls += 1
        layer.activity.bytes_streamed += (len(lent) - len(failed)) * layer.experts.native.expert_nbytes

    def _compute(self) -> torch.Tensor | None:
        """Count, and return the CPU's part; None: it has none."""
        layer, state = self._layer, self._state
        num_experts = len(state.cpu_id) - 1
        known_TK = known_ids(self._fetched, num_experts)
        rows_E = np.bincount(known_TK.flatten().numpy(), minlength=num_experts + 1)[:-1]
        layer.count(rows_E, len(known_TK))
        observe(layer.experts, known_TK)
        on_device, streamed = (int(rows_E[list(e)].sum()) for e in (state.resident, state.streamed))
        on_cpu = int(rows_E.sum()) - on_device - streamed
        activity = layer.activity
        activity.calls += 1
        activity.cpu_rows += on_cpu
        activity.device_rows += on_device
        activity.streamed_rows += streamed
        if not on_cpu:
            return None
        begin = time.perf_counter()
        result = self._run(state.cpu_id, known_TK)
        self._cpu_span = begin, time.perf_counter()
        return result

    def _run(self, cpu_id: torch.Tensor, known_TK: torch.Tensor) -> torch.Tensor:
        """Return the CPU's product of the experts that `cpu_id` does not leave out."""
        x_TH, _, weights_TK = self._fetched.wait()
        return run(x_TH, cpu_id[known_TK], weights_TK, self._layer.experts)


def known_ids(fetched: Fetched, num_experts: int) -> torch.Tensor:
    """Return the ids of a call, int64 [T, K], those of other machines as num_experts. ValueError: one is negative."""
    _, ids_TK, _ = fetched.wait()
    if bool((ids_TK < 0).any()):
        raise ValueError(f"topk_ids has {int(ids_TK.min())}; ids are 0 or more")
    return ids_TK.long().clamp_max(num_experts)


def only(experts: Collection[int], num_experts: int) -> torch.Tensor:
    """Return the number of each of `experts`, and num_experts for all others [E + 1]."""
    table = torch.full((num_experts + 1,), num_experts)
    chosen = sorted(experts)
    table[chosen] = torch.tensor(chosen, dtype=torch.int64)
    return table


@functools.cache
def _submitter() -> ThreadPoolExecutor:
    """The thread that waits for the native threads, so that who submits does not, and that leaves torch's to it."""
    return ThreadPoolExecutor(1, "ktcompile-submit", _native.use_openmp_here, (False,))
