"""Time a step of decode over keys and values in each KV format.

    python benchmarks/attention_kv.py --positions 4096 32768 --batch 1 8

Formats take turns; each figure is the least of all rounds, since what else runs on a machine only adds. "cpu" is the
process's time on all threads, which other load changes less.
"""

from __future__ import annotations

import argparse
import time

import torch

import ktcompile
from ktcompile.ops import KV_FORMATS, KVFormat, PagedKV

BLOCK_SIZE = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", nargs="+", type=int, default=[4096, 32768], metavar="N")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], metavar="N")
    parser.add_argument("--heads", type=int, default=32, metavar="N")
    parser.add_argument("--kv-heads", type=int, default=4, metavar="N")
    parser.add_argument("--head-dim", type=int, default=128, metavar="N")
    parser.add_argument("--kv", nargs="+", choices=KV_FORMATS, default=["bf16", "int8", "int8_g32"], metavar="FORMAT")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    args = parser.parse_args()
    print(f"{ktcompile.get_num_threads()} threads, {args.heads} heads of {args.head_dim}, {args.kv_heads} of keys; ms")
    for positions in args.positions:
        for batch in args.batch:
            caches = {name: filled(KV_FORMATS[name], positions, batch, args) for name in args.kv}
            best = dict.fromkeys(caches, (float("inf"), float("inf")))
            for _ in range(args.rounds):
                for name, kv in caches.items():
                    best[name] = tuple(map(min, best[name], step(kv, positions, batch, args)))
            figures = ", ".join(f"{name} {wall * 1e3:.2f} (cpu {cpu * 1e3:.2f})" for name, (wall, cpu) in best.items())
            print(f"{positions} positions, batch {batch}: {figures}", flush=True)


def filled(kv_format: KVFormat, positions: int, batch: int, args: argparse.Namespace) -> PagedKV:
    """Return the keys and values of `batch` sequences. Numbers are alike; their speed is that of any."""
    blocks = -(-positions // BLOCK_SIZE) * batch
    kv = PagedKV.empty(kv_format, blocks, BLOCK_SIZE, args.kv_heads, args.head_dim, args.head_dim)
    rows = torch.randn(BLOCK_SIZE, args.kv_heads, args.head_dim)
    for block in range(blocks):
        kv.store(rows, rows, torch.arange(BLOCK_SIZE) + block * BLOCK_SIZE)
    return kv


def step(kv: PagedKV, positions: int, batch: int, args: argparse.Namespace) -> tuple[float, float]:
    """Return the seconds of a step, by the clock and of the process."""
    query = torch.randn(batch, args.heads, args.head_dim).bfloat16()
    table = torch.randperm(len(kv.key)).view(batch, -1).int()
    lengths, starts = torch.full((batch,), positions), torch.arange(batch + 1)
    repeats = max(1, 65536 // (positions * batch))
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        kv.attention(query, table, lengths, starts)
    return (time.perf_counter() - wall) / repeats, (time.process_time() - cpu) / repeats


if __name__ == "__main__":
    main()
