"""How fast this machine's CPU is at a layer's experts, measured on the layer itself."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from ktcompile.ops.experts import PackedExperts
from ktcompile.ops.moe import launch
from ktcompile.plan.facts import MoeLayerFacts
from ktcompile.plan.hardware import Processor

_CALLS = 8
# Rows of one expert for which arithmetic binds and not reading; they are also those of a long prompt.
_ROWS = 128


def measured_cpu(experts: PackedExperts, facts: MoeLayerFacts) -> Processor:
    """Return the CPU as calls of a layer find it: of one token, and of many for one expert. It takes some 0.1 s."""
    none = torch.full((1, facts.top_k), facts.num_experts)
    overhead = _least(lambda call: _launch(experts, none))
    offsets = torch.arange(facts.top_k)[None]
    one = _least(lambda call: _launch(experts, (offsets + call * facts.top_k) % facts.num_experts))
    many = _least(lambda call: _launch(experts, torch.full((_ROWS, 1), call % facts.num_experts)))
    return Processor(
        name="this CPU",
        memory_bytes=experts.nbytes,
        bandwidth=facts.top_k * facts.expert_bytes / max(one - overhead, 1e-9),
        flops=_ROWS * facts.flops_per_row / max(many - overhead, 1e-9),
        overhead=overhead,
    )


def _launch(experts: PackedExperts, ids_TK: torch.Tensor) -> None:
    x_TH = torch.ones(len(ids_TK), experts.hidden_size, dtype=experts.format.storage or torch.bfloat16)
    launch(x_TH, ids_TK, torch.ones(ids_TK.shape), experts)


def _least(work: Callable[[int], None]) -> float:
    """Return the least seconds of some calls, which other work on the machine did not lengthen."""
    seconds = []
    for call in range(_CALLS):
        begin = time.perf_counter()
        work(call)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
