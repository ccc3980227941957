"""What a step of a model must read and compute at least, whoever runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ktcompile.plan.architecture import Architecture
from ktcompile.plan.cost import distinct_experts

WorkKind = Literal["prefill", "decode"]
# Tokens of each request before decode is timed, as in drivers/model_worker.py.
CONTEXT = 64


@dataclass(frozen=True, slots=True)
class Work:
    """kind: "prefill" (a prompt of `size` tokens until the next one is known) or "decode" (a token of each of `size`
    requests)."""

    kind: WorkKind
    size: int

    @property
    def requests(self) -> int:
        return self.size if self.kind == "decode" else 1

    def __str__(self) -> str:
        return f"{self.kind} {self.size}"


@dataclass(frozen=True, slots=True)
class Demand:
    """bytes: to read. flops: to do."""

    bytes: float
    flops: float

    def seconds(self, bandwidth: float, peak: float) -> float:
        """Return the least time that it can take. bandwidth: bytes per second. peak: operations per second."""
        return max(self.bytes / bandwidth, self.flops / peak)


def demand(model: Architecture, work: Work, expert_bytes: float, dense_bytes: float, steps: int) -> Demand:
    """Return what a piece of work takes, each weight read once.

    Experts are taken to be chosen at random: as many are touched as on average if all are alike. Of a prompt only the
    last token has logits. Attention's products count in the layers that keep all tokens. expert_bytes, dense_bytes: of
    a weight. steps: of decode, of which the median one counts.
    """
    layers = model.facts(lambda _: 1).layers  # no bytes of experts are needed of them
    touched = sum(
        distinct_experts(layer, work.size) * of.parameters / of.num_experts
        for layer, of in zip(layers, model.experts, strict=True)
    )
    head = 2 * model.hidden_size * model.vocab_size
    rows = work.requests * head
    if work.kind == "decode":
        context = CONTEXT + (steps + 1) / 2
        kept = work.size * model.cache_bytes(round(context))
        pairs = work.size * context
    else:
        kept, pairs = 0, work.size * (work.size + 1) / 2
    products = sum(layer.flops_per_row * layer.top_k for layer in layers)
    return Demand(
        bytes=model.dense_read_bytes / model.dtype_bytes * dense_bytes + touched * expert_bytes + kept,
        flops=work.size * (model.dense_flops_per_token - head + products) + rows + pairs * model.attention_flops,
    )
