"""The engine gives a request the same tokens, bit for bit, whatever else it computes and however it cuts prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engines import Answer, engine_of, memory_of, prompts, serve, tiny
from helpers.processes import run_python

import ktcompile
from ktcompile.engine.engine import Engine
from ktcompile.engine.generate import generate
from ktcompile.engine.sampling_params import SamplingParams

pytestmark = pytest.mark.slow

# GQA, no groups, windows and sinks, latents that transformers expands, norms of whole rows.
FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v2", "deepseek_v3", "olmoe")
LENGTH = 24
GREEDY = SamplingParams(LENGTH, 0.0, ignore_eos=True)
DRAWN = SamplingParams(LENGTH, 1.2, 0.9, seed=7, repetition_penalty=1.1, ignore_eos=True)
PROMPT = [*prompts(1, longest=60)[0], *range(40)]


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


def check(family: str, dtype: torch.dtype, **options: Any) -> Answer:
    """Two engines of a model give PROMPT's answers alone and in any company, with any cuts, and where requests are
    preempted. Return the greedy one."""
    engine = engine_of(tiny(family, dtype), **options)
    alone = [serve(engine, [(PROMPT, params)])[0] for params in (GREEDY, DRAWN)]
    assert all(len(answer.token_ids) == LENGTH for answer in alone) and alone[0] != alone[1]
    for others in (1, 7, 31):
        for params, expected in zip((GREEDY, DRAWN), alone, strict=True):
            assert in_company(engine, others, params) == expected, f"{others} others"
    assert engine.stats().num_preemptions == 0
    # Other cuts of prompts, and memory for PROMPT with its answer and little more.
    small = {"max_num_batched_tokens": 47, "chunk_size": 8, "block_size": 4}
    narrow = engine_of(tiny(family, dtype), kv_device_memory=memory_of(engine, 160), **small, **options)
    for params, expected in zip((GREEDY, DRAWN), alone, strict=True):
        assert in_company(narrow, 7, params) == expected, "in little memory"
    assert narrow.stats().num_preemptions > 0
    return alone[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_company_and_cuts_change_no_token(family: str) -> None:
    check(family, torch.bfloat16)


def test_nor_do_they_with_keys_and_values_in_int8() -> None:
    check("qwen3_moe", torch.bfloat16, kv_format="int8")


@pytest.mark.parametrize("family", FAMILIES)
def test_nor_do_they_in_fp32_and_tokens_are_those_of_the_compiled_model(family: str) -> None:
    """That is one sequence, transformers' cache and masks, the same kernels."""
    answer = check(family, torch.float32)
    torch._dynamo.reset()
    model = tiny(family)
    model.set_attn_implementation("kt")
    run = torch.compile(model.forward, backend="kt", dynamic=True)
    assert answer.token_ids == list(generate(model, PROMPT, LENGTH, forward=run))


def of_the_embedded_model(**options: Any) -> str:
    """Return what three requests get from an engine of its own, in JSON."""
    texts = ["def fibonacci(n):", "import os\n" * 40, "class Tree:\n    def insert(self, key):\n"]
    params = [
        SamplingParams(24, 0.0, logprobs=3),
        SamplingParams(24, 0.9, seed=11, n=2, logprobs=3),
        SamplingParams(24, 1.1, 0.9, seed=-4, presence_penalty=0.5),
    ]
    with ktcompile.LLM(**options) as llm:
        return json.dumps([[repr(o) for o in record.outputs] for record in llm.generate(texts, params)])


def test_tokens_are_the_same_after_a_restart(threads: Callable[[int], None]) -> None:
    """In another process with another number of threads and other cuts of prompts."""
    program = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import ktcompile
        from test_engine_exactness import of_the_embedded_model

        ktcompile.set_num_threads(2)
        print(of_the_embedded_model(max_num_seqs=3, max_num_batched_tokens=34, chunk_size=32, block_size=16))
    """
    threads(1)
    first, second = of_the_embedded_model(), run_python(program, timeout=300).strip()
    assert first == second and len(json.loads(first)[1]) == 2
