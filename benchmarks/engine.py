"""Time what the engine does beside the model: sampling, scheduling, text.

    python benchmarks/engine.py
    python benchmarks/engine.py --rows 8 --vocabulary 151936 --json engine.json

Each figure is the least of many calls, in milliseconds of this process's CPU time (one thread), so that other work on
the machine counts little. Logits fall off as a language model's do (probability of rank r is about r**-1.5), and for
comparison as a normal distribution, whose likeliest tokens are many.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from ktcompile.engine.detokenizer import IncrementalText
from ktcompile.engine.engine import Engine
from ktcompile.engine.options import EngineOptions
from ktcompile.engine.sampler import SamplingState, sample
from ktcompile.engine.sampling_params import SamplingParams
from ktcompile.kv.block_pool import BlockPool
from ktcompile.models.load import locate
from ktcompile.models.tokenizer import load_tokenizer
from ktcompile.scheduler.policy import SchedulerOptions
from ktcompile.scheduler.scheduler import Scheduler

SAMPLING: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0.0},
    "greedy, 5 logprobs": {"temperature": 0.0, "logprobs": 5},
    "greedy, repetition_penalty": {"temperature": 0.0, "repetition_penalty": 1.1},
    "temperature": {},
    "top_k 50": {"top_k": 50},
    "top_p 0.95": {"top_p": 0.95},
    "top_k 50, top_p 0.95": {"top_k": 50, "top_p": 0.95},
    "min_p 0.05": {"min_p": 0.05},
    "all penalties": {"repetition_penalty": 1.1, "frequency_penalty": 0.5, "presence_penalty": 0.5},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8, help="sequences of a step")
    parser.add_argument("--vocabulary", type=int, default=32_000, metavar="TOKENS")
    parser.add_argument("--context", type=int, default=4096, metavar="TOKENS", help="of each sequence")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures = sampling(args.rows, args.vocabulary) | scheduling(args.rows, args.context) | text(args.rows)
    figures |= whole_step(args.rows, args.vocabulary)
    for name, milliseconds in figures.items():
        print(f"{name:40} {milliseconds:8.3f} ms")
    if args.json:
        facts = {"rows": args.rows, "vocabulary": args.vocabulary, "context": args.context, "torch": torch.__version__}
        Path(args.json).write_text(json.dumps(facts | {"milliseconds": figures}))


def sampling(rows: int, vocabulary: int) -> dict[str, float]:
    """Return the times of one step's choice, prompts of 500 tokens and 200 generated ones behind it."""
    generator = torch.Generator().manual_seed(0)
    ranks = torch.stack([torch.randperm(vocabulary, generator=generator) for _ in range(rows)]) + 1
    steep, flat = -1.5 * ranks.log(), 2.5 * torch.randn(rows, vocabulary, generator=generator)
    figures = {}
    for name, given in SAMPLING.items():
        states = [SamplingState(SamplingParams(seed=1, **given), range(500)) for _ in range(rows)]
        for state in states:
            for token in range(200):
                state.add(7 * token)
        for kind, logits in (("", steep), (", normal logits", flat)):
            figures[f"{name}{kind}"] = least(lambda s=states, x=logits: sample(x, s))
    return figures


def scheduling(rows: int, context: int) -> dict[str, float]:
    """Return the time of one step in which all sequences decode."""
    options = SchedulerOptions(max_num_seqs=rows, max_num_batched_tokens=rows * context + 1, max_model_len=2 * context)
    scheduler = Scheduler(options, BlockPool(2 * rows * context // options.block_size), time.monotonic)
    for row in range(rows):
        scheduler.add(str(row), range(context), context)

    def step() -> None:
        chosen = scheduler.schedule()
        assert chosen is not None
        scheduler.update({chunk.request_id: 1 for chunk in chosen.chunks})

    step()
    return {f"schedule and update, {rows} sequences": least(step)}


def text(rows: int) -> dict[str, float]:
    """Return the time of one token's text for each sequence."""
    tokenizer = load_tokenizer(locate(None))
    ids = tokenizer("def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n" * 8)[
        "input_ids"
    ]

    def all_tokens() -> None:
        pieces = IncrementalText(tokenizer, ids[:20])
        for token in ids[20:]:
            pieces.add(token)

    return {f"text, {rows} tokens": least(all_tokens) * rows / (len(ids) - 20)}


def whole_step(rows: int, vocabulary: int) -> dict[str, float]:
    """Return the time of a step in which all sequences decode greedily, of a model that takes none."""
    config = Qwen3MoeConfig(
        vocab_size=300, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2,
        eos_token_id=None,
    )  # fmt: skip
    options = EngineOptions(max_num_seqs=max(2, rows), eager=True, kv_device_memory=1 << 24)
    engine = Engine.of_model(Qwen3MoeForCausalLM(config).eval(), load_tokenizer(locate(None)), options)
    for row in range(rows):
        engine.add(str(row), range(100), SamplingParams(1000, 0.0))
    engine.step()
    logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0))
    engine._runner._forward = lambda *_: logits
    name = f"a step beside the model, {rows} sequences"
    return {name: least(engine.step, 300), f"{name}, cold": _cold(engine, logits)}


def _cold(engine: Engine, logits: torch.Tensor) -> float:
    """Return the time of a step where the model leaves nothing in the processor's caches, as one of some GB does."""
    memory = torch.ones(1 << 24)
    outside = 0

    def forward(*_: torch.Tensor) -> torch.Tensor:
        nonlocal outside
        begin = time.process_time_ns()
        memory.max()
        result = logits.clone()
        outside = time.process_time_ns() - begin
        return result

    engine._runner._forward = forward
    times = []
    for _ in range(200):
        memory.max()
        begin = time.process_time_ns()
        engine.step()
        times.append(time.process_time_ns() - begin - outside)
    return min(times) / 1e6


def least(call: Callable[[], object], calls: int = 60) -> float:
    """Return the CPU time of the fastest of some calls, in milliseconds."""
    times = []
    for _ in range(calls):
        begin = time.process_time_ns()
        call()
        times.append(time.process_time_ns() - begin)
    return min(times) / 1e6


if __name__ == "__main__":
    main()
