"""Models with experts on two sides: where those are, and what the models say."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ktcompile.runtime.split import SplitExperts

FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss", "mixtral", "qwen3_next", "glm4_moe")


def place(layers: Iterable[SplitExperts], count: int) -> None:
    """Leave the last `count` experts of each layer on the device, and no other."""
    for layer in layers:
        wanted = set(range(layer.experts.num_experts - count, layer.experts.num_experts))
        for expert in layer.resident - wanted:
            layer.demote(expert)
        layer.settle()
        for expert in wanted - layer.resident:
            layer.promote(expert)
        layer.settle()
        assert layer.resident == wanted


def greedy_logits(model: Any, kwargs: dict[str, Any], count: int = 3) -> torch.Tensor:
    """Return the last logits of a prompt and of `count` greedy steps after it, with a cache, [1 + count, B, V]."""
    with torch.no_grad():
        out = model(**{**kwargs, "use_cache": True})
        steps = [out.logits[:, -1]]
        for _ in range(count):
            chosen = steps[-1].argmax(-1, keepdim=True)
            out = model(input_ids=chosen, past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits[:, -1])
    return torch.stack(steps).cpu()
