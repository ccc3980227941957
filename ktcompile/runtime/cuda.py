"""The device "cuda": experts in a GPU's memory, which Triton kernels multiply.

Everything here runs on the CPU's tensors too, in Triton's interpreter; what it needs of a GPU is in its streams.

Shape suffixes: T tokens, K top_k, H hidden_size, E experts.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence

import torch

from ktcompile.ops import triton as kernels
from ktcompile.ops.experts import PackedExperts
from ktcompile.plan.facts import MoeLayerFacts
from ktcompile.plan.hardware import Link, Processor
from ktcompile.runtime.cuda_copies import ExpertCopies, ExpertCopy
from ktcompile.runtime.cuda_measure import measured
from ktcompile.runtime.cuda_pool import Pool, Pools
from ktcompile.runtime.streams import Mark, Streams


class CudaDevice:
    """A GPU with a budget for experts.

    memory_bytes: the budget. An expert counts as many bytes as the CPU has it in, what it takes beyond that is padding.
    """

    name = "cuda"

    def __init__(self, memory_bytes: int, streams: Streams) -> None:
        self.memory_bytes, self._streams = memory_bytes, streams
        self._pools, self._copies = Pools(memory_bytes, streams), ExpertCopies(streams)

    @property
    def used_bytes(self) -> int:
        """Bytes of the budget that experts have."""
        return self._pools.used_bytes

    def where(self) -> torch.device:
        """Return the GPU."""
        return self._streams.device

    def set_aside(self, layers: Sequence[PackedExperts], size: int) -> None:
        """Make room for so many bytes of these layers' experts, which layers that are alike share.

        ValueError: there are no kernels for the format of one.
        """
        self._pools.set_aside(layers, size)

    def experts(self, like: PackedExperts) -> CudaExperts:
        """Return room for experts of a layer, none of which it holds yet. ValueError: there are no kernels for its
        format."""
        return CudaExperts(self._pools.pool_for(like), self._copies, self._streams, like)

    def fetch(self, *tensors: torch.Tensor) -> CudaFetched:
        """Begin to copy tensors of a call to the CPU's memory, as they are now."""
        compute, stream = self._streams.compute, self._streams.fetch
        as_now = [t.clone(memory_format=torch.contiguous_format) for t in tensors]
        stream.after(compute.mark())
        copies = []
        with stream.run():
            for tensor in as_now:
                copies.append(self._streams.staging(tuple(tensor.shape), tensor.dtype).copy_(tensor, non_blocking=True))
        for tensor in as_now:
            stream.keep(tensor)
        return CudaFetched(tuple(copies), stream.mark())

    def deliver(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the CPU on the GPU, there before what the current stream computes next."""
        return _deliver(tensor, self._streams)

    def hardware(self, like: PackedExperts, facts: MoeLayerFacts) -> tuple[Processor, Link]:
        """Return how fast the GPU and the way to it are, measured with experts of a layer."""
        pool = self._pools.pool_for(like)
        experts = CudaExperts(pool, self._copies, self._streams, like)
        return measured(experts, self._streams, like, facts, pool.slots - pool.used)


class CudaFetched:
    """Tensors of a call on their way to the CPU's memory."""

    def __init__(self, copies: tuple[torch.Tensor, ...], arrived: Mark) -> None:
        self._copies, self._arrived = copies, arrived

    def wait(self) -> tuple[torch.Tensor, ...]:
        """Return them once they are there. Any thread may wait."""
        if not self._arrived.done():
            self._arrived.wait()
        return self._copies


class CudaExperts:
    """The experts of one layer that have a slot in a pool."""

    def __init__(self, pool: Pool, copies: ExpertCopies, streams: Streams, like: PackedExperts) -> None:
        self._pool, self._copies, self._streams, self._num_experts = pool, copies, streams, like.num_experts
        self._slots: dict[int, int] = {}
        memory = pool.memory
        self._experts = kernels.DeviceExperts(
            memory.gate_up, memory.down, like.spec.activation, False, memory.gate_up_bias, memory.down_bias
        )
        weakref.finalize(self, _give_back_all, pool, self._slots, streams).atexit = False

    def copy_in(self, expert: int, source: PackedExperts) -> ExpertCopy:
        """Take a slot and begin to copy an expert to it. DeviceMemoryError: none is free."""
        slot, after = self._pool.take()
        self._slots[expert] = slot
        return self._copies.send(self._pool.layout, expert, source, self._pool.memory.slot(slot), after)

    def copy_out(self, expert: int, target: PackedExperts) -> ExpertCopy:
        """Begin to copy an expert to where the CPU has it."""
        slot = self._pool.memory.slot(self._slots[expert])
        return self._copies.receive(self._pool.layout, expert, target, slot)

    def release(self, expert: int) -> None:
        """Give an expert's slot back. What is copied there next waits for what is computed with it now."""
        self._pool.give_back(self._slots.pop(expert), self._streams.compute.mark())

    def select(self, experts: Collection[int]) -> torch.Tensor:
        """Return the slot of each expert of the selection, and -1 for all others, int32 [E] on the GPU."""
        slots = [self._slots[e] if e in experts else -1 for e in range(self._num_experts)]
        return _deliver(torch.tensor(slots, dtype=torch.int32), self._streams)

    def begin(self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> CudaProducts:
        """Begin the products of a call; ids of num_experts and more are skipped."""
        return CudaProducts(self._experts, self._streams, x_TH, ids_TK, weights_TK)


class CudaProducts:
    """The GPU's part of one call. It has the same bits in however many selections the experts come."""

    def __init__(
        self,
        experts: kernels.DeviceExperts,
        streams: Streams,
        x_TH: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
    ) -> None:
        self._streams, self._began = streams, streams.compute.mark()
        self._ended: Mark | None = None
        # Kernels take plain weights of a dtype that the inputs' holds.
        storage = experts.down.format.storage
        wide = x_TH.dtype if storage is None else torch.promote_types(storage, x_TH.dtype)
        self._products: kernels.Products | None = kernels.Products(
            x_TH.to(wide).contiguous(), ids_TK, weights_TK, experts, x_TH.dtype
        )

    def add(self, selection: torch.Tensor) -> None:
        """Compute the products of a selection's experts."""
        assert self._products is not None
        self._products.add(selection)

    def result(self) -> torch.Tensor:
        """Return the weighted sum over all that were added, [T, H]. It is the end of the call."""
        assert self._products is not None
        result_TH = self._products.result()
        self._products = None  # the memory; who asks for the span has this object for longer
        self._ended = self._streams.compute.mark()
        return result_TH

    def span(self) -> tuple[float, float] | None:
        """Return when the products began and ended, by time.perf_counter; None: they have not, or it is not known."""
        ended = None if self._ended is None else self._streams.when(self._ended)
        began = None if ended is None else self._streams.when(self._began)
        return None if ended is None or began is None else (began, ended)


def _deliver(tensor: torch.Tensor, streams: Streams) -> torch.Tensor:
    staging = streams.staging(tuple(tensor.shape), tensor.dtype).copy_(tensor)
    return staging.to(streams.device, non_blocking=True)


def _give_back_all(pool: Pool, slots: dict[int, int], streams: Streams) -> None:
    if slots:
        mark = streams.compute.mark()
        for slot in slots.values():
            pool.give_back(slot, mark)
