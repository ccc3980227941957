"""Time the engine on a whole model: tokens per second by how many requests run at a time, and what a step takes beside
the model.

    python benchmarks/engine_throughput.py --model MODEL
    python benchmarks/engine_throughput.py --model MODEL --concurrent 1 8 16 --prompt 128 --tokens 64 --rounds 3

All requests of a run come at once. Runs of the numbers of requests take turns; each figure is the best of all rounds,
since what else runs on a machine only adds. "cpu" is the process's time on all threads. Of the steps in which all
requests decode: their wall time, and "beside the model" that less the time of the model's call; the least of a run, and
"median" in its middle. Tokens are random, and their text is their number, so that a model without a tokenizer serves.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import ktcompile
from ktcompile.bench.model.drivers.kt_engine_driver import Numbers
from ktcompile.engine.engine import Engine
from ktcompile.engine.options import EngineOptions
from ktcompile.engine.sampling_params import SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="PATH_OR_ID", help="default: the small model of the package")
    parser.add_argument("--concurrent", nargs="+", type=int, default=[1, 8, 16], metavar="N")
    parser.add_argument("--prompt", type=int, default=128, metavar="TOKENS")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="of each answer")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--kv-format", default="auto", metavar="FORMAT")
    parser.add_argument("--weight-format", default="auto", metavar="FORMAT")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    begin = time.perf_counter()
    model = ktcompile.load(args.model, weight_format=args.weight_format)
    options = EngineOptions(max_num_seqs=max(2, *args.concurrent), max_model_len=2048, kv_format=args.kv_format)
    engine = Engine.of_model(model, Numbers(), options)
    print(f"ready after {time.perf_counter() - begin:.0f} s; {ktcompile.get_num_threads()} threads")
    timed = Timed(engine._runner._forward)
    engine._runner._forward = timed
    best: dict[int, dict[str, float]] = {}
    for _ in range(args.rounds):
        for count in args.concurrent:
            found = run(engine, timed, count, args.prompt, args.tokens)
            before = best.setdefault(count, found)
            pick: dict[str, Callable[..., float]] = {"tokens per second": max}
            best[count] = {name: pick.get(name, min)(value, before[name]) for name, value in found.items()}
    one = best[args.concurrent[0]]["tokens per second"]
    for count, figures in best.items():
        rows = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
        print(f"{count:3} requests: {figures['tokens per second'] / one:.2f} x; {rows}")
    if args.json:
        facts = vars(args) | {"torch": torch.__version__, "threads": ktcompile.get_num_threads()}
        Path(args.json).write_text(json.dumps(facts | {"figures": best}))


class Timed:
    """Adds up how long calls take, in seconds."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call
        self.seconds = 0.0

    def __call__(self, *args: Any) -> Any:
        begin = time.perf_counter()
        result = self._call(*args)
        self.seconds += time.perf_counter() - begin
        return result


def run(engine: Engine, timed: Timed, count: int, prompt: int, tokens: int) -> dict[str, float]:
    """Serve `count` requests that come at once, and return figures of it."""
    generator = torch.Generator().manual_seed(count)
    params = SamplingParams(tokens, 0.0, ignore_eos=True)
    for i in range(count):
        ids = torch.randint(0, engine.vocab_size, (prompt,), generator=generator).tolist()
        engine.add(str(i), ids, params)
    decode_steps: list[tuple[float, float]] = []
    first: list[float] = []
    begin, cpu = time.perf_counter(), time.process_time()
    while engine.has_requests:
        step_begin, timed.seconds = time.perf_counter(), 0.0
        deltas = engine.step()
        now = time.perf_counter()
        if len(first) == count and len(deltas) == count:
            decode_steps.append((now - step_begin, timed.seconds))
        first += [now - begin] * (min(count, len(first) + len(deltas)) - len(first))
    seconds = time.perf_counter() - begin
    return {
        "tokens per second": count * tokens / seconds,
        "cpu s": time.process_time() - cpu,
        "last first token s": first[-1],
        "decode step ms": 1e3 * min(whole for whole, _ in decode_steps),
        "median": 1e3 * statistics.median(whole for whole, _ in decode_steps),
        "beside the model ms": 1e3 * min(whole - model for whole, model in decode_steps),
    }


if __name__ == "__main__":
    main()
