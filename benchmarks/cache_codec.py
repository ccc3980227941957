"""How small and how fast blocks of real keys and values are stored: the codec of the disk tier against none.

    python benchmarks/cache_codec.py                        # the embedded model: fp32, bf16, int8
    python benchmarks/cache_codec.py --model DIR --kv-format bf16

A prompt is computed by the engine and its full blocks are encoded and decoded, on one thread; best of 5, in time of the
process's CPU. What it shows is right by tests/test_cache_record.py. "read" is a record in the files' cache of the
system, verified and decoded by `DiskStore.read`, in time on the wall.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ktcompile
from ktcompile.cache import codec
from ktcompile.cache.block_id import BlockId
from ktcompile.cache.counters import Counters
from ktcompile.cache.disk import DiskOptions, DiskStore
from ktcompile.cache.policies import make
from ktcompile.cache.policy import Limits
from ktcompile.cache.record import checksum
from ktcompile.cache.transfer import BlockMemory
from ktcompile.cache.vfs import RealFolder


def payloads(model: str | None, kv_format: str, tokens: int) -> tuple[BlockMemory, list[memoryview]]:
    """Return the full blocks of a prompt: the source of a module of the standard library, or of any tokens."""
    llm = ktcompile.LLM(model, kv_format=kv_format, max_num_seqs=2, kv_device_memory=1 << 28, max_model_len=tokens + 64)
    if model is None:
        ids = list(llm.tokenizer.encode(Path(textwrap.__file__).read_text() * 4))[:tokens]
    else:
        ids = [(i * 7919 + 13) % 31000 for i in range(tokens)]
    llm.generate([{"prompt_token_ids": ids}], ktcompile.SamplingParams(max_tokens=1))
    memory = BlockMemory(llm._engine._runner._layers)
    blocks = []
    for number in range(memory.num_blocks):
        block = memoryview(bytearray(memory.block_bytes))
        memory.read(number, block)
        if any(block[-4096:]) and any(block[:4096]):  # the last one has positions that were never written
            blocks.append(block)
    return memory, blocks[: tokens // 64]


def best(work: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> float:
    """Return the seconds of the fastest of 5 runs."""
    times = []
    for _ in range(5):
        begin = clock()
        work()
        times.append(clock() - begin)
    return min(times)


def read_seconds(memory: BlockMemory, blocks: list[memoryview], width: int) -> float:
    """Return the seconds to read all blocks from a folder whose files are in the system's cache."""
    with tempfile.TemporaryDirectory() as folder:
        policy = make("lru", Limits(1 << 40))
        options = DiskOptions(width, min_free=0)
        store = DiskStore(RealFolder(Path(folder) / "kv"), None, policy, time.time, Counters(), options)
        names = [i.to_bytes(32, "little") for i in range(len(blocks))]
        ids = [BlockId(name, bytes(32), bytes(32), 0, tuple(range(64))) for name in names]
        for block, payload in zip(ids, blocks, strict=True):
            if not store.put(block, memory.layout, payload, checksum(payload)):
                sys.exit("a record could not be written")
        out = memoryview(bytearray(memory.block_bytes))
        seconds = best(lambda: [store.read(block, memory.layout, out) for block in ids], time.perf_counter)
        store.close()
    return seconds


def measure(name: str, memory: BlockMemory, blocks: list[memoryview]) -> dict[str, Any]:
    """Return the sizes and rates of a model's blocks; rates are of raw bytes, in GB/s."""
    raw = sum(map(len, blocks))
    stored = [codec.encode(block, memory.width) for block in blocks]
    out = memoryview(bytearray(memory.block_bytes))
    gigabytes = raw / 1e9
    return {
        "blocks": name,
        "layout": memory.layout,
        "raw_bytes": raw,
        "ratio": raw / sum(len(payload) for _, payload in stored),
        "encode": gigabytes / best(lambda: [codec.encode(block, memory.width) for block in blocks]),
        "decode": gigabytes / best(lambda: [codec.decode(n, memoryview(p), out) for n, p in stored]),
        "checksum": gigabytes / best(lambda: [checksum(block) for block in blocks]),
        "read": gigabytes / read_seconds(memory, blocks, memory.width),
        "read_as_it_is": gigabytes / read_seconds(memory, blocks, 0),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a hub id (default: the embedded model)")
    parser.add_argument("--kv-format", action="append", help="may be given several times (default: fp32, bf16, int8)")
    parser.add_argument("--tokens", type=int, default=1024, help="of the prompt (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON array")
    args = parser.parse_args()
    rows = []
    for kv_format in args.kv_format or ("fp32", "bf16", "int8"):
        rows.append(measure(kv_format, *payloads(args.model, kv_format, args.tokens)))
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    print("blocks   MB    ratio  encode  decode  checksum  read    read as it is   (GB/s)")
    for r in rows:
        rates = "  ".join(f"{r[n]:6.2f}" for n in ("encode", "decode", "checksum", "read", "read_as_it_is"))
        print(f"{r['blocks']:6}  {r['raw_bytes'] / 1e6:5.1f}  {r['ratio']:5.2f}  {rates}")


if __name__ == "__main__":
    main()
