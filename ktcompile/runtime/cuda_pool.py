"""Device memory for experts: slots, which all layers share whose experts are alike."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence

import torch

from ktcompile.log import logger
from ktcompile.ops.experts import PackedExperts
from ktcompile.ops.triton.transport import ExpertLayout, ExpertMemory
from ktcompile.runtime.device import DeviceMemoryError
from ktcompile.runtime.streams import Mark, Streams


class Pool:
    """Slots for experts of one layout. expert_bytes: what one counts in the budget."""

    def __init__(self, layout: ExpertLayout, slots: int, expert_bytes: int, streams: Streams) -> None:
        self.layout, self.expert_bytes = layout, expert_bytes
        self.memory = _allocate(layout, slots, streams.device)
        self.slots = self.memory.down.shape[0]
        for tensor in self.memory.tensors():
            streams.copy_in.keep(tensor)
            streams.copy_out.keep(tensor)
        # What had this memory before may still be in use by the stream that it was allocated on.
        mark = streams.compute.mark()
        self._free: deque[tuple[int, Mark]] = deque((slot, mark) for slot in range(self.slots))

    @property
    def used(self) -> int:
        """Slots that are taken."""
        return self.slots - len(self._free)

    @property
    def used_bytes(self) -> int:
        return self.used * self.expert_bytes

    @property
    def nbytes(self) -> int:
        return self.slots * self.expert_bytes

    def take(self) -> tuple[int, Mark]:
        """Return a slot and the point after which it may be written to. DeviceMemoryError: none is free."""
        try:
            return self._free.popleft()
        except IndexError:
            raise DeviceMemoryError(
                f"an expert of {self.expert_bytes} bytes does not fit: all {self.slots} places for such are taken"
            ) from None

    def give_back(self, slot: int, mark: Mark) -> None:
        """Let a slot be taken again, and written to after `mark`."""
        self._free.append((slot, mark))


class Pools:
    """The pools of a device with a budget of bytes. An expert counts as many as it has on the CPU."""

    def __init__(self, memory_bytes: int, streams: Streams) -> None:
        if memory_bytes < 0:
            raise ValueError(f"the device's memory is {memory_bytes} bytes; it must be 0 or more")
        self._budget, self._streams = memory_bytes, streams
        self._shared: dict[ExpertLayout, Pool] = {}
        self._alive: weakref.WeakSet[Pool] = weakref.WeakSet()  # as long as there are layers of theirs

    @property
    def used_bytes(self) -> int:
        """Bytes of the slots that are taken."""
        return sum(pool.used_bytes for pool in self._alive)

    def set_aside(self, layers: Sequence[PackedExperts], size: int) -> None:
        """Make pools with slots for so many bytes of these layers' experts, which pools without any in use make room
        for. Layouts that differ have shares by the bytes of their experts."""
        by_layout: dict[ExpertLayout, list[PackedExperts]] = {}
        for layer in layers:
            by_layout.setdefault(ExpertLayout.of(layer), []).append(layer)
        for layout, pool in list(self._shared.items()):
            if not pool.used:
                del self._shared[layout]
                self._alive.discard(pool)
        whole = sum(_bytes_of(group) for group in by_layout.values())
        for layout, group in by_layout.items():
            count = sum(layer.num_experts for layer in group)
            self._shared[layout] = self._new(layout, group[0], size * _bytes_of(group) // whole, count)

    def pool_for(self, like: PackedExperts) -> Pool:
        """Return the pool for a layer: the one set aside, or one of its own.

        ValueError: there are no kernels for its format.
        """
        layout = ExpertLayout.of(like)
        return self._shared.get(layout) or self._new(layout, like, self._budget, like.num_experts)

    def _new(self, layout: ExpertLayout, like: PackedExperts, size: int, most: int) -> Pool:
        each = like.native.expert_nbytes
        size = min(size, self._budget - sum(pool.nbytes for pool in self._alive))
        pool = Pool(layout, min(most, max(0, size) // each), each, self._streams)
        self._alive.add(pool)
        return pool


def _bytes_of(layers: Sequence[PackedExperts]) -> int:
    return sum(layer.num_experts * layer.native.expert_nbytes for layer in layers)


def _allocate(layout: ExpertLayout, slots: int, device: torch.device) -> ExpertMemory:
    """Return memory for so many experts, or for as many as the device turns out to have memory for."""
    while slots:
        try:
            return layout.memory(slots, device)
        except torch.OutOfMemoryError:
            fewer = slots * 7 // 8
            logger.warning(
                "%s has no memory for %d experts of %d bytes; trying %d", device, slots, layout.nbytes, fewer
            )
            slots = fewer
    return layout.memory(0, device)
