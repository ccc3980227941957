"""The engine gives a request the same tokens, bit for bit, whatever else it computes and however it cuts prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from helpers.engines import Answer, engine_of, prompts, serve, tiny

from ktcompile.engine.engine import Engine
from ktcompile.engine.sampling_params import SamplingParams

pytestmark = pytest.mark.slow

# GQA, no groups, windows and sinks, latents that transformers expands, norms of whole rows.
FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "olmoe")
LENGTH = 24
GREEDY = SamplingParams(LENGTH, 0.0, ignore_eos=True)
DRAWN = SamplingParams(LENGTH, 1.2, 0.9, seed=7, repetition_penalty=1.1, ignore_eos=True)
PROMPT = prompts(1, longest=60)[0] + list(range(40))


@pytest.fixture(autouse=True)
def fresh(threads: Callable[[int], None]) -> Iterator[None]:
    """One thread of torch: the layers are so small that threads only wait for each other."""
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def in_company(engine: Engine, others: int, params: SamplingParams) -> Answer:
    """Return the answer to PROMPT, which comes in the middle of others."""
    company = [(prompt, SamplingParams(9 + i, 0.7, seed=i)) for i, prompt in enumerate(prompts(others))]
    company.insert(others // 2, (PROMPT, params))
    return serve(engine, company)[others // 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_company_and_cuts_change_no_token(family: str, dtype: torch.dtype) -> None:
    engine = engine_of(tiny(family, dtype))
    alone = {params: serve(engine, [(PROMPT, params)])[0] for params in (GREEDY, DRAWN)}
    assert all(len(answer.token_ids) == LENGTH for answer in alone.values())
    assert alone[GREEDY] != alone[DRAWN]
    for others in (1, 7, 31):
        for params, expected in alone.items():
            assert in_company(engine, others, params) == expected, f"{others} others"
    assert engine.stats().num_preemptions == 0
    # Another engine, with other cuts of prompts and so little memory that requests are preempted.
    narrow = engine_of(tiny(family, dtype), max_num_batched_tokens=47, chunk_size=8, block_size=4)
    narrow = cut_memory(narrow)
    for params, expected in alone.items():
        assert in_company(narrow, 7, params) == expected
    assert narrow.stats().num_preemptions > 0


def cut_memory(engine: Engine) -> Engine:
    """Leave so few blocks that eight requests do not fit."""
    engine._pool.take(engine._pool.num_free - 40)
    return engine
