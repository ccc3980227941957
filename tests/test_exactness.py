"""A token's logits depend on nothing but the tokens before it, bit for bit: not on batch, chunks or threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.compare import assert_exact
from helpers.moe_models import build, case_of
from transformers import DynamicCache

FAMILIES = ("mixtral", "gpt_oss", "deepseek_v3")
INDUCTOR = ("qwen3_moe", "inductor", (70,))
# What they compute shows in logits of all tokens; a second layer of the same kind takes as long to trace.
LIKE_LAYERS = ("qwen3_moe", "mixtral")
LENGTH = 110


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    # Beyond the limit Dynamo runs the stock model, without a word.
    with torch._dynamo.config.patch(recompile_limit=64):
        yield
    torch._dynamo.reset()


@torch.no_grad()
def in_chunks(run: Callable[..., Any], config: Any, ids: torch.Tensor, size: int) -> torch.Tensor:
    """Return the logits of a prompt that comes in chunks of `size` tokens."""
    cache = DynamicCache(config=config)
    # With strides of their own: for those of a view of the prompt Dynamo would trace the model once more.
    chunks = [c.clone(memory_format=torch.contiguous_format) for c in ids.split(size, dim=1)]
    return torch.cat([run(input_ids=c, past_key_values=cache, use_cache=True).logits for c in chunks], dim=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "inner", "sizes"),
    [("qwen3_moe", "program", (1, 16, 100)), *((f, "program", (16, 100)) for f in FAMILIES), INDUCTOR],
)
def test_logits_of_a_whole_model(family, inner, sizes, threads):
    model, kwargs = build(case_of(family), num_hidden_layers=1 if family in LIKE_LAYERS else 2)
    model.to(torch.bfloat16)
    run = torch.compile(model, backend="kt", options={"inner": inner}, dynamic=True)
    tokens = int(kwargs["input_ids"].max()) + 1
    ids = torch.randint(0, tokens, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    threads(2)
    whole = in_chunks(run, model.config, ids[2:3], LENGTH)
    for size in sizes:
        assert_exact(in_chunks(run, model.config, ids[2:3], size), whole, f"chunks of {size}")
    assert_exact(in_chunks(run, model.config, ids, LENGTH)[2:3], whole, "in a batch")
    threads(1)
    assert_exact(in_chunks(run, model.config, ids[2:3], LENGTH), whole, "one thread")
