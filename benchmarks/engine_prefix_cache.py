"""Time how much sooner the first token comes where a prompt's beginning was computed before, and what looking costs.

    python benchmarks/engine_prefix_cache.py --model MODEL --shared 2000

Of each prompt --shared tokens are the same and --own are not. "cold": nothing is there; "warm": the shared part is.
Both are wall times of `Engine.add` and the steps to the first token; the least of the rounds. "no reuse": CPU times of
the engine's own part of one prompt that nobody shares, and of 256 steps of its decode, with prefix caching and without,
and with a host and a disk behind the device: the host is full, as it is after a while, and the tiers' threads count.
"lost" is what that takes more than no caching, by a thread's part of the CPU time of "cold", as if all of it were
waited for.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path

import torch

import ktcompile
from ktcompile.bench.model.drivers.kt_engine_driver import Numbers
from ktcompile.cache.rates import Rates
from ktcompile.cache.transfer import BlockMemory
from ktcompile.engine.engine import Engine
from ktcompile.engine.options import EngineOptions
from ktcompile.engine.sampling_params import SamplingParams
from ktcompile.engine.tiers import open_tiers
from ktcompile.kv.block_pool import BlockPool
from ktcompile.scheduler.behind import Behind
from ktcompile.scheduler.policy import SchedulerOptions
from ktcompile.scheduler.scheduler import Scheduler

GREEDY = SamplingParams(1, 0.0, ignore_eos=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="PATH_OR_ID", help="default: the small model of the package")
    parser.add_argument("--shared", type=int, default=2000, metavar="TOKENS")
    parser.add_argument("--own", type=int, default=16, metavar="TOKENS")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--kv-format", default="auto", metavar="FORMAT")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    engine = open_engine(args)
    figures = {f"no reuse, caching {root is not None}, ms": no_reuse(args.shared, root) for root in (None, bytes(32))}
    with tempfile.TemporaryDirectory() as folder:
        figures["no reuse, tiers, ms"] = no_reuse(args.shared, bytes(32), engine, Path(folder) / "kv")
    figures |= first_token(engine, args)
    more = figures["no reuse, tiers, ms"] - figures["no reuse, caching False, ms"]
    figures["lost to tiers, %"] = more / 1e3 * ktcompile.get_num_threads() / figures["cold, CPU s"] * 100
    for name, value in figures.items():
        print(f"{name:34} {value:10.3f}")
    if args.json:
        Path(args.json).write_text(json.dumps(vars(args) | {"torch": torch.__version__, "figures": figures}))


def open_engine(args: argparse.Namespace) -> Engine:
    options = EngineOptions(max_num_seqs=4, max_model_len=args.shared + args.own + 64, kv_format=args.kv_format)
    return Engine.of_model(ktcompile.load(args.model), Numbers(), options)


def first_token(engine: Engine, args: argparse.Namespace) -> dict[str, float]:
    """Return the times to first tokens, in seconds."""
    size = engine.namespace.block_size
    generator, numbers = torch.Generator().manual_seed(0), itertools.count()

    def tokens(count: int) -> list[int]:
        return torch.randint(0, engine.vocab_size, (count,), generator=generator).tolist()

    cpu = []

    def serve(prompt: list[int], found: int) -> float:
        begin, before = time.perf_counter(), time.process_time()
        engine.add(str(next(numbers)), prompt, GREEDY)
        deltas = [delta for _ in iter(lambda: engine.has_requests, False) for delta in engine.step()]
        assert deltas[0].num_cached_tokens == found
        if not found:
            cpu.append(time.process_time() - before)
        return time.perf_counter() - begin

    cold, warm = [], []
    for _ in range(args.rounds):
        shared = tokens(args.shared)
        cold.append(serve(shared + tokens(args.own), 0))
        there = args.shared // size * size
        warm += [serve(shared + tokens(args.own), there) for _ in range(3)]
    of_both = {"cold, s": min(cold), "warm, s": min(warm), "cold / warm": min(cold) / min(warm)}
    return {**of_both, "cold, CPU s": min(cpu)}


def no_reuse(prompt: int, root: bytes | None, engine: Engine | None = None, folder: Path | None = None) -> float:
    """Return the CPU time of the scheduler for one prompt and 256 steps of its decode, in milliseconds.

    engine: of whose storage blocks are kept in tiers. folder: of their disk.
    """
    options = SchedulerOptions(max_model_len=prompt + 512)
    tiers, memory = None, None if engine is None else BlockMemory(engine._runner.storage)
    if memory is not None:
        of_tiers = EngineOptions(
            kv_host_memory=2 * (prompt // options.block_size) * memory.block_bytes, kv_disk_path=folder
        )
        opened = open_tiers(of_tiers, memory, 0, time.monotonic)
        assert opened is not None
        tiers = opened.tiers
    times = []
    for round_ in range(20):
        pool = BlockPool(options.max_model_len // options.block_size)
        behind = None
        if tiers is not None and memory is not None:
            behind = Behind(tiers, pool, Rates(options.block_size, memory.block_bytes), options.block_size)
        scheduler = Scheduler(options, pool, time.monotonic, behind)
        begin = time.process_time_ns()
        scheduler.add("a", [round_ * prompt + i for i in range(prompt)], 300, root=root)
        while (step := scheduler.schedule()) is not None and step.chunks[-1].end < prompt + 256:
            scheduler.update({chunk.request_id: 1 for chunk in step.chunks if chunk.samples})
        scheduler.update({"a": 1})
        scheduler.finish("a")
        while pool.num_held:
            scheduler.give_back()
            time.sleep(0.001)
        times.append(time.process_time_ns() - begin)
    if tiers is not None:
        tiers.close()
    # Of the last rounds, in which what is kept takes the place of something else.
    return min(times[10:]) / 1e6


if __name__ == "__main__":
    main()
