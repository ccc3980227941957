"""How fast a GPU is at a layer's experts, and the way to it, measured on the layer itself."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from ktcompile.ops.experts import PackedExperts
from ktcompile.plan.facts import MoeLayerFacts
from ktcompile.plan.hardware import Link, Processor, preset
from ktcompile.runtime.device import CopyError, DeviceExperts
from ktcompile.runtime.streams import Streams

_CALLS = 5
# Rows of one expert for which arithmetic binds and not reading; they are also those of a long prompt.
_ROWS = 512
# What is assumed of a GPU that has no room for an expert, where it makes no difference.
_UNKNOWN = preset("4090-ddr5")


def measured(
    memory: DeviceExperts, streams: Streams, like: PackedExperts, facts: MoeLayerFacts, room: int
) -> tuple[Processor, Link]:
    """Return the GPU as calls of a layer find it, and the link as copies of its experts do, with all that takes time.

    memory: of the layer, where no expert is yet. room: for how many. It takes some 0.1 s, and compiles the kernels.
    """
    count = min(facts.top_k, room)
    assert _UNKNOWN.device is not None and _UNKNOWN.link is not None
    if not count:
        return _UNKNOWN.device, _UNKNOWN.link
    try:
        copying = _least(lambda: _copied(memory, like, 0))
        for expert in range(count):
            memory.copy_in(expert, like).wait()
    except CopyError as error:
        raise RuntimeError(f"{streams.device} does not take an expert of {like.label}: {error}") from error
    chosen = torch.arange(count, device=streams.device)[None]
    none = _least(lambda: _computed(memory, streams, like, torch.full_like(chosen, facts.num_experts), count))
    one = _least(lambda: _computed(memory, streams, like, chosen, count))
    many = _least(lambda: _computed(memory, streams, like, chosen[:, :1].expand(_ROWS, 1).contiguous(), count))
    for expert in range(count):
        memory.release(expert)
    processor = Processor(
        name=str(streams.device),
        memory_bytes=room * facts.expert_bytes,
        bandwidth=count * facts.expert_bytes / max(one - none, 1e-9),
        flops=_ROWS * facts.flops_per_row / max(many - none, 1e-9),
        overhead=none,
    )
    return processor, Link(bandwidth=facts.expert_bytes / copying, latency=0.0)


def _copied(memory: DeviceExperts, like: PackedExperts, expert: int) -> None:
    memory.copy_in(expert, like).wait()
    memory.release(expert)


def _computed(memory: DeviceExperts, streams: Streams, like: PackedExperts, ids_TK: torch.Tensor, count: int) -> None:
    dtype = like.format.storage or torch.bfloat16
    x_TH = torch.ones(len(ids_TK), like.hidden_size, dtype=dtype, device=streams.device)
    products = memory.begin(x_TH, ids_TK, torch.ones(ids_TK.shape, device=streams.device))
    products.add(memory.select(range(count)))
    products.result()
    streams.compute.mark().wait()


def _least(work: Callable[[], None]) -> float:
    """Return the least seconds of some calls; the first one may compile kernels."""
    seconds = []
    for _ in range(_CALLS):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
