"""Experts of the CPU's that the device computes in one call: copied there, used, and dropped.

For long prompts copying them is faster than computing them on the CPU. Two buffers: while the experts of one are
computed, those of the other are on their way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ktcompile.log import logger
from ktcompile.ops.experts import PackedExperts
from ktcompile.runtime.device import CopyError, DeviceExperts, DeviceMemoryError, Event, Products


@dataclass(frozen=True, slots=True)
class Streaming:
    """When and how a layer's experts are streamed.

    from_tokens: calls with so many tokens and more do it. experts: of one of the two buffers, 1 or more.
    """

    from_tokens: int
    experts: int


def stream(
    memory: DeviceExperts, source: PackedExperts, products: Products, experts: Sequence[int], buffer: int
) -> list[int]:
    """Add the products of `experts`, which the CPU has, and return those that could not be copied.

    buffer: how many experts one of the two buffers has room for; less is used where the device has less.
    """
    waiting, failed = deque(experts), list[int]()
    ahead = _begin(memory, source, waiting, buffer)
    while ahead:
        following = _begin(memory, source, waiting, buffer)
        arrived = [expert for expert, event in ahead.items() if _arrived(source, expert, event)]
        failed += ahead.keys() - arrived
        if arrived:
            products.add(memory.select(arrived))
        for expert in ahead:
            memory.release(expert)
        ahead = following or _begin(memory, source, waiting, buffer)
    return [*failed, *waiting]


def _begin(memory: DeviceExperts, source: PackedExperts, waiting: deque[int], most: int) -> dict[int, Event]:
    """Begin to copy experts, as many as there is room for."""
    begun: dict[int, Event] = {}
    while waiting and len(begun) < most:
        try:
            begun[waiting[0]] = memory.copy_in(waiting[0], source)
        except DeviceMemoryError:
            break
        waiting.popleft()
    return begun


def _arrived(source: PackedExperts, expert: int, event: Event) -> bool:
    """Wait for a copy, and return whether it succeeded."""
    try:
        event.wait()
    except CopyError as error:
        logger.warning("%s: expert %d is computed by the CPU: %s", source.label, expert, error)
        return False
    return True
