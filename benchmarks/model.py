"""Time a whole model on the CPU: compiled with backend "kt", and what its users would run instead.

    python benchmarks/model.py MODEL                              a directory or a hub id
    python benchmarks/model.py MODEL --ways kt stock inductor --threads 2 --json model.json
    python benchmarks/model.py MODEL --ways kt kt:int4 --batches 1 8 --prompts 512

Ways: kt is `torch.compile(model, backend="kt")`, kt:FORMAT the same with a weight format; stock is transformers as it
comes (sdpa, grouped_mm experts), inductor is `torch.compile(model)`. All use transformers' dynamic cache, in turns.
Decode is the median step of a greedy continuation of a prompt of 64 random tokens for each request; a prompt's time is
that of the model's call, whose logits are those of the last token alone. The first call of each shape does not count.

The roofline is the larger of bytes / bandwidth and operations / peak, both measured before and after each turn: bytes
of the weights that a step reads, each once, with as many experts as its tokens choose on average if all are alike, and
operations of all products with weights (not those of attention).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory or a hub id")
    parser.add_argument("--ways", nargs="+", default=["kt", "stock"], metavar="WAY")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 4, 8], metavar="N", help="requests of decode")
    parser.add_argument("--prompts", nargs="*", type=int, default=[512, 2048], metavar="TOKENS")
    parser.add_argument("--steps", type=int, default=16, metavar="N", help="of decode, in a turn")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="turns of each way")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    unknown = [way for way in args.ways if way.partition(":")[0] not in ("kt", "stock", "inductor")]
    if unknown:
        parser.error(f"unknown way {unknown[0]}; there are kt, kt:FORMAT, stock and inductor")
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "KTCOMPILE_NUM_THREADS": str(args.threads)}
    run(args)


def run(args: argparse.Namespace) -> None:
    # Both read the number of threads when they are imported.
    import torch

    from ktcompile.bench.roofline import Probe, arithmetic_of
    from ktcompile.machine import machine

    torch.set_num_threads(args.threads)
    arithmetic = arithmetic_of("bf16", machine().isa)
    probe = Probe(args.threads, [arithmetic])
    works = [*(("decode", batch) for batch in args.batches), *(("prefill", tokens) for tokens in args.prompts)]
    models: dict[str, Any] = {}
    for way in args.ways:
        begin = time.perf_counter()
        models[way] = built(args.model, way)
        loaded = time.perf_counter() - begin
        with torch.no_grad():
            for work, size in works:
                turn(models[way], work, size, 2)
        gc.collect()
        print(
            f"{way}: loaded in {loaded:.1f} s, first calls in {time.perf_counter() - begin - loaded:.1f} s", flush=True
        )
    rows = []
    for work, size in works:
        seconds: dict[str, list[float]] = defaultdict(list)
        least: dict[str, list[float]] = defaultdict(list)
        for _ in range(args.rounds):
            for way, model in models.items():
                before = probe.measure()
                with torch.no_grad():
                    seconds[way].append(turn(model, work, size, args.steps))
                after = probe.measure()
                needed, operations = demand(model, way, work, size)
                bandwidth = (before.bandwidth + after.bandwidth) / 2
                peak = (before.flops[arithmetic] + after.flops[arithmetic]) / 2
                least[way].append(max(needed / bandwidth, operations / peak))
        for way in models:
            fraction = statistics.median(a / b for a, b in zip(least[way], seconds[way], strict=True))
            ratios = {
                other: statistics.median(a / b for a, b in zip(seconds[other], seconds[way], strict=True))
                for other in models
                if other != way
            }
            rows.append(
                {
                    "work": work,
                    "size": size,
                    "way": way,
                    "seconds": statistics.median(seconds[way]),
                    "least": min(seconds[way]),
                    "fraction": fraction,
                    "faster_than": ratios,
                }
            )
            print(line(rows[-1]), flush=True)
    if args.json:
        facts = {"cpu": machine().cpu, "isa": machine().isa, "threads": args.threads, "torch": torch.__version__}
        Path(args.json).write_text(json.dumps(facts | {"rows": rows}))


def line(row: dict[str, Any]) -> str:
    ratios = "".join(f"  {ratio:.2f}x as fast as {other}" for other, ratio in row["faster_than"].items())
    rate = row["size"] / row["seconds"]
    what = f"{row['work']} {row['size']}"
    return (
        f"{what:14} {row['way']:10} {row['seconds'] * 1e3:9.2f} ms  {rate:8.1f} tokens/s  "
        f"{row['fraction']:.2f} of the roofline{ratios}"
    )


def built(name: str, way: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval()
    kind, _, weight_format = way.partition(":")
    if kind == "kt":
        options = {"weights": "take", "weight_format": weight_format or "auto"}
        return torch.compile(model, backend="kt", dynamic=True, options=options)
    return torch.compile(model, dynamic=True) if kind == "inductor" else model


def turn(model: Any, work: str, size: int, steps: int) -> float:
    """Return the seconds of a step, or of a prompt."""
    import torch
    from transformers import DynamicCache

    requests, length = (size, 64) if work == "decode" else (1, size)
    generator = torch.Generator().manual_seed(size)
    ids = torch.randint(3, model.config.vocab_size, (requests, length), generator=generator)
    cache = DynamicCache(config=model.config)
    begin = time.perf_counter()
    chosen = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    if work == "prefill":
        return time.perf_counter() - begin
    taken = []
    for _ in range(steps):
        begin = time.perf_counter()
        logits = model(input_ids=chosen, past_key_values=cache, logits_to_keep=1).logits
        taken.append(time.perf_counter() - begin)
        chosen = logits[:, -1:].argmax(-1)
    return statistics.median(taken)


def demand(model: Any, way: str, work: str, size: int) -> tuple[float, float]:
    """Return the bytes that a turn must read and the operations that it must do."""
    from ktcompile.quant import ALIASES, FORMATS

    name = way.partition(":")[2]
    expert_bytes = FORMATS[ALIASES.get(name, name)].bytes_per_weight if name else 2
    config, tokens = model.config, size
    hidden, layers, head = config.hidden_size, config.num_hidden_layers, config.head_dim
    attention = hidden * head * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    dense = layers * (attention + hidden * config.num_experts)
    logits = hidden * config.vocab_size
    expert = 3 * hidden * config.moe_intermediate_size
    experts, top_k = config.num_experts, config.num_experts_per_tok
    touched = experts * (1 - (1 - top_k / experts) ** tokens)
    rows_of_logits = size if work == "decode" else 1
    needed = 2 * (dense + logits) + layers * touched * expert * expert_bytes
    operations = 2 * (tokens * (dense + layers * top_k * expert) + rows_of_logits * logits)
    return needed, operations


if __name__ == "__main__":
    main()
