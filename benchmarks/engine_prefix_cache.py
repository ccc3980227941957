"""Time how much sooner the first token comes where a prompt's beginning was computed before, and what looking costs.

    python benchmarks/engine_prefix_cache.py --model MODEL --shared 2000

Of each prompt --shared tokens are the same and --own are not. "cold": nothing is there; "warm": the shared part is.
Both are wall times of `Engine.add` and the steps to the first token; the least of the rounds. "no reuse": CPU times of
the engine's own part of one prompt that nobody shares, and of 256 steps of its decode, with prefix caching and without.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path

import torch

import ktcompile
from ktcompile.engine.engine import Engine
from ktcompile.engine.options import EngineOptions
from ktcompile.engine.sampling_params import SamplingParams
from ktcompile.kv.block_pool import BlockPool
from ktcompile.scheduler.policy import SchedulerOptions
from ktcompile.scheduler.scheduler import Scheduler

GREEDY = SamplingParams(1, 0.0, ignore_eos=True)


class Numbers:
    """Stands for a tokenizer."""

    def decode(self, token_ids: list[int], **_: object) -> str:
        return "".join(f" {token}" for token in token_ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="PATH_OR_ID", help="default: the small model of the package")
    parser.add_argument("--shared", type=int, default=2000, metavar="TOKENS")
    parser.add_argument("--own", type=int, default=16, metavar="TOKENS")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--kv-format", default="auto", metavar="FORMAT")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    figures = {f"no reuse, caching {root is not None}, ms": no_reuse(args.shared, root) for root in (None, bytes(32))}
    figures |= first_token(args)
    for name, value in figures.items():
        print(f"{name:34} {value:10.3f}")
    if args.json:
        Path(args.json).write_text(json.dumps(vars(args) | {"torch": torch.__version__, "figures": figures}))


def first_token(args: argparse.Namespace) -> dict[str, float]:
    """Return the times to first tokens, in seconds."""
    options = EngineOptions(max_num_seqs=4, max_model_len=args.shared + args.own + 64, kv_format=args.kv_format)
    engine = Engine.of_model(ktcompile.load(args.model), Numbers(), options)
    generator, numbers = torch.Generator().manual_seed(0), itertools.count()

    def tokens(count: int) -> list[int]:
        return torch.randint(0, engine.vocab_size, (count,), generator=generator).tolist()

    def serve(prompt: list[int], found: int) -> float:
        begin = time.perf_counter()
        engine.add(str(next(numbers)), prompt, GREEDY)
        deltas = [delta for _ in iter(lambda: engine.has_requests, False) for delta in engine.step()]
        assert deltas[0].num_cached_tokens == found
        return time.perf_counter() - begin

    cold, warm = [], []
    for _ in range(args.rounds):
        shared = tokens(args.shared)
        cold.append(serve(shared + tokens(args.own), 0))
        there = args.shared // options.block_size * options.block_size
        warm += [serve(shared + tokens(args.own), there) for _ in range(3)]
    return {"cold, s": min(cold), "warm, s": min(warm), "cold / warm": min(cold) / min(warm)}


def no_reuse(prompt: int, root: bytes | None) -> float:
    """Return the CPU time of the scheduler for one prompt and 256 steps of its decode, in milliseconds."""
    options = SchedulerOptions(max_model_len=prompt + 512)
    times = []
    for round_ in range(20):
        scheduler = Scheduler(options, BlockPool(4 * options.max_model_len // options.block_size), time.monotonic)
        begin = time.process_time_ns()
        scheduler.add("a", [round_ * prompt + i for i in range(prompt)], 300, root=root)
        while (step := scheduler.schedule()) is not None and step.chunks[-1].end < prompt + 256:
            scheduler.update({chunk.request_id: 1 for chunk in step.chunks if chunk.samples})
        times.append(time.process_time_ns() - begin)
    return min(times) / 1e6


if __name__ == "__main__":
    main()
