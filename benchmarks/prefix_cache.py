"""Time the first token behind a long shared prefix: computed, and from the device, from host memory and from disk.

    python benchmarks/prefix_cache.py --model MODEL --shared 2000 --check

Behind --shared tokens each prompt has --own. Medians of the rounds, wall times from `Engine.add` to the first token,
which is the same token each time. "host": the device's blocks were handed out to others meanwhile. "disk": the engine
was closed and another one opened on the folder, whose records are in the files' cache of the system. --check: the exit
status is 1 where a tier is less than so many times faster than computing: device 30, host 25, disk 15.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from ktcompile.engine.engine import Engine
from ktcompile.engine.options import EngineOptions
from ktcompile.engine.receipt import Receipt
from ktcompile.engine.sampling_params import SamplingParams

GREEDY = SamplingParams(1, 0.0, ignore_eos=True)
BARS = {"device": 30.0, "host": 25.0, "disk": 15.0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="PATH_OR_ID", help="default: the small model of the package")
    parser.add_argument("--shared", type=int, default=2000, metavar="TOKENS")
    parser.add_argument("--own", type=int, default=1, metavar="TOKENS")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of each; it is computed once in each")
    parser.add_argument("--weight-format", default="auto", metavar="FORMAT")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        times, receipts = measure(args, Path(folder) / "kv")
    medians = {tier: statistics.median(seconds) for tier, seconds in times.items()}
    for tier, seconds in medians.items():
        each = " ".join(f"{s:.3f}" for s in times[tier])
        print(f"{tier:10} {seconds:8.3f} s  {medians['computed'] / seconds:6.1f}x  ({each})  {receipts[tier]}")
    if args.json:
        figures = {"times": times, "receipts": {tier: str(receipt) for tier, receipt in receipts.items()}}
        Path(args.json).write_text(json.dumps({**vars(args), "torch": torch.__version__, **figures}, indent=1))
    slow = [tier for tier, bar in BARS.items() if medians["computed"] / medians[tier] < bar]
    return 1 if args.check and slow else 0


def measure(args: argparse.Namespace, folder: Path) -> tuple[dict[str, list[float]], dict[str, Receipt]]:
    """Return the seconds to the first token by where the prefix was, and a receipt of each."""
    generator = torch.Generator().manual_seed(0)
    times: dict[str, list[float]] = {"computed": [], "device": [], "host": [], "disk": []}
    receipts: dict[str, Receipt] = {}
    engine = open_engine(args, folder)
    size, vocabulary = engine.namespace.block_size, engine.vocab_size
    there = args.shared // size * size
    prefixes = [torch.randint(0, vocabulary, (args.shared,), generator=generator).tolist() for _ in range(args.rounds)]
    own = torch.randint(0, vocabulary, (args.own,), generator=generator).tolist()
    tokens: list[int] = []

    def ask(tier: str, prefix: list[int]) -> int:
        begin = time.perf_counter()
        engine.add("0", prefix + own, GREEDY)
        deltas = [delta for _ in iter(lambda: engine.has_requests, False) for delta in engine.step()]
        times[tier].append(time.perf_counter() - begin)
        receipts[tier] = receipt = deltas[0].receipt
        assert receipt is not None
        found = {"device": receipt.device_tokens, "host": receipt.host_tokens, "disk": receipt.disk_tokens}
        expected = {name: there * (name == tier) for name in found}
        assert found == expected, f"{tier}: {receipt}"
        return deltas[0].token_ids[0]

    for prefix in prefixes:
        tokens.append(ask("computed", prefix))
        assert ask("device", prefix) == tokens[-1]
        push_out(engine)
        assert ask("host", prefix) == tokens[-1]
    engine.close()
    del engine
    engine = open_engine(args, folder)
    for prefix, token in zip(prefixes, tokens, strict=True):
        assert ask("disk", prefix) == token
    engine.close()
    return times, receipts


def open_engine(args: argparse.Namespace, folder: Path) -> Engine:
    longest = args.shared + args.own + 64
    options = EngineOptions(
        max_num_seqs=3,
        max_model_len=longest,
        weight_format=args.weight_format,
        kv_host_memory=4 << 30,
        kv_disk_path=folder,
        kv_device_memory=4 << 30,
    )
    engine = Engine(args.model, options)
    engine.add("warm", list(range(1, 40)), SamplingParams(4, 0.0, ignore_eos=True))  # what is made with the first steps
    while engine.has_requests:
        engine.step()
    return engine


def settle(engine: Engine) -> None:
    """Wait until what was to be kept is."""
    while engine.stats().num_free_blocks < engine.stats().num_blocks:
        time.sleep(0.01)


def push_out(engine: Engine) -> None:
    """Have all blocks of the device handed out to others."""
    settle(engine)
    blocks = engine._pool.take(engine._pool.num_blocks)
    assert blocks is not None
    engine._pool.release(blocks)


if __name__ == "__main__":
    sys.exit(main())
