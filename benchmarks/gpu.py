"""Time the Triton kernels on a GPU, beside its ceilings and beside what PyTorch has for the same work.

    python benchmarks/gpu.py --quick                        does it work here?
    python benchmarks/gpu.py --only experts --formats bf16 int4_g128 --tokens 1 64 2048
    python benchmarks/gpu.py --json gpu.json

Ceilings are measured first: a copy on the device (bytes read and written) and a product of matrices of bf16. A
fraction is the larger of bytes / bandwidth and operations / peak, over the median time. Calls are recorded in a CUDA
graph, whose replay is timed by events, so that a launch's cost on the CPU does not count; "call" is the time of a call
without a graph. Weights rotate through more memory than the caches hold.

Shape suffixes: T tokens, K top_k, H hidden_size, P intermediate_size, E experts, R requests, Q heads of queries, J
heads of keys, D head size.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ktcompile.bench.shapes import PRESETS
from ktcompile.ops.spec import Activation
from ktcompile.ops.triton import (
    BlockCache,
    DeviceExperts,
    decode_attention,
    device_experts,
    moe,
    prefill_attention,
)
from ktcompile.quant import FORMATS, QuantizedWeight

Row = dict[str, Any]


def main() -> None:
    args = parsed()
    if not torch.cuda.is_available():
        sys.exit("gpu.py needs a GPU, and PyTorch sees none")
    device = torch.device("cuda")
    ceilings = measured_ceilings(device)
    print(
        f"{torch.cuda.get_device_name()}: copies {ceilings['bandwidth'] / 1e12:.2f} TB/s (read and written), "
        f"products of bf16 {ceilings['flops'] / 1e12:.0f} TFLOP/s"
    )
    rows: list[Row] = []
    works = {"experts": experts_rows, "decode": decode_rows, "prefill": prefill_rows}
    for name, work in works.items():
        if args.only and name not in args.only:
            continue
        for row in work(args, device):
            least = max(row["bytes"] / ceilings["bandwidth"], row["operations"] / ceilings["flops"])
            row |= {"work": name, "fraction": least / row["seconds"]}
            rows.append(row)
            print(line(row), flush=True)
    if args.json:
        text = json.dumps(
            {"device": torch.cuda.get_device_name(), "torch": torch.__version__} | ceilings | {"rows": rows}
        )
        Path(args.json).write_text(text)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["experts", "decode", "prefill"], help="leave the others out")
    parser.add_argument("--preset", default="qwen3-30b-a3b", choices=sorted(PRESETS), help="shape of the layer")
    parser.add_argument("--formats", nargs="+", default=["bf16", "fp8", "int8", "int4_g128", "mxfp4"], metavar="FORMAT")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 512, 4096], metavar="T")
    parser.add_argument("--quick", action="store_true", help="few and small shapes")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    unknown = sorted(set(args.formats) - set(FORMATS))
    if unknown:
        parser.error(f"unknown formats {', '.join(unknown)}; there are {', '.join(FORMATS)}")
    if args.quick:
        args.formats, args.tokens = args.formats[:2], [1, 64]
    return args


def line(row: Row) -> str:
    parts = [f"{row['work']:8} {row['what']:28} {row['seconds'] * 1e6:9.1f} us  {row['fraction']:5.2f} of the roofline"]
    if "call" in row:
        parts.append(f"call {row['call'] * 1e6:8.1f} us")
    if "peer" in row:
        ratio = row["peer_seconds"] / row["seconds"]
        parts.append(f"{row['peer']} {row['peer_seconds'] * 1e6:8.1f} us ({ratio:.2f}x)")
    return "  ".join(parts)


def measured_ceilings(device: torch.device) -> dict[str, float]:
    """Return bytes a second of a copy, and operations a second of a product of bf16."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copying = seconds([partial(target.copy_, source)])
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=device) for _ in range(2))
    multiplying = seconds([partial(torch.mm, a, b)])
    return {"bandwidth": 2 * source.numel() / copying, "flops": 2 * 8192**3 / multiplying}


def seconds(calls: list[Callable[[], Any]], graph: bool = True) -> float:
    """Return the median time of a call, of several that take turns."""
    run: list[Callable[[], Any]] = []
    for call in calls:
        call()
        if not graph:
            run.append(call)
            continue
        torch.cuda.synchronize()
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            call()
        run.append(recorded.replay)
    rounds = max(3, 30 // len(run))
    marks = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds * len(run))
    ]
    for call in run:
        call()
    for i, (begin, end) in enumerate(marks):
        begin.record()
        run[i % len(run)]()
        end.record()
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) for begin, end in marks)[len(marks) // 2] / 1e3


def experts_rows(args: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Layers of experts, all of them on the device; beside grouped products of PyTorch, as transformers calls them."""
    shape = PRESETS[args.preset]
    E, K, H, P = shape.num_experts, shape.top_k, shape.hidden_size, shape.intermediate_size
    everything = torch.arange(E, dtype=torch.int32, device=device)
    for name in args.formats:
        up = torch.randn(E, 2 * P, H, device=device, dtype=torch.bfloat16) * H**-0.5
        down = torch.randn(E, H, P, device=device, dtype=torch.bfloat16) * P**-0.5
        experts = device_experts(*(stored(w, name) for w in (up, down)), Activation("silu"), device=device)
        bytes_per_expert = weight_bytes(experts) / E
        for T in args.tokens:
            inputs = [routed(T, K, H, E, device, seed) for seed in range(6 if T < 256 else 2)]
            touched = sum(len(ids.unique()) for _, ids, _ in inputs) / len(inputs)
            calls = [partial(moe, *each, experts, everything) for each in inputs]
            row: Row = {
                "what": f"{args.preset} {name} T={T}",
                "seconds": seconds(calls),
                "call": seconds(calls, graph=False),
                "bytes": touched * bytes_per_expert + 4 * T * H,
                "operations": 6 * T * K * H * P,
            }
            if name == "bf16":
                grouped = [partial(grouped_mm, *each, up, down) for each in inputs]
                row |= {"peer": "grouped_mm", "peer_seconds": seconds(grouped)}
            yield row


def stored(weight: Tensor, name: str) -> Tensor | QuantizedWeight:
    """Return a weight in a format. The experts of a quantised one are a few that repeat, since quantising is slow."""
    storage = FORMATS[name].storage
    if storage is not None:
        return weight.to(storage)
    few = FORMATS[name].quantize(weight[:4].cpu())
    parts = {n: getattr(few, n) for n in ("codes", "scales", "zeros") if getattr(few, n) is not None}
    return replace(few, **{n: part.repeat(-(-len(weight) // 4), 1, 1)[: len(weight)] for n, part in parts.items()})


def weight_bytes(experts: DeviceExperts) -> int:
    tensors = [t for w in (experts.gate_up, experts.down) for t in (w.codes, w.scales, w.zeros) if t is not None]
    return sum(t.nbytes for t in tensors)


def routed(T: int, K: int, H: int, E: int, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids_TK = torch.rand(T, E, generator=generator).topk(K).indices
    weights_TK = torch.rand(T, K, generator=generator).softmax(-1)
    return torch.randn(T, H, generator=generator).bfloat16().to(device), ids_TK.to(device), weights_TK.to(device)


def grouped_mm(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, up: Tensor, down: Tensor) -> Tensor:
    (T, K), E = ids_TK.shape, len(up)
    sorted_P, order_P = ids_TK.flatten().sort()
    ends_E = torch.searchsorted(sorted_P, torch.arange(E, device=x_TH.device), right=True).int()
    gate, value = torch._grouped_mm(x_TH[order_P // K], up.mT, offs=ends_E).chunk(2, -1)
    out_PH = torch._grouped_mm(F.silu(gate) * value, down.mT, offs=ends_E)
    out_PH = out_PH * weights_TK.flatten()[order_P, None].to(out_PH.dtype)
    back = torch.empty_like(out_PH).index_copy_(0, order_P, out_PH)
    return back.view(T, K, -1).sum(1)


def decode_rows(args: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """One query of each request over paged keys and values, beside PyTorch's over keys and values in one piece."""
    Q, J, D = 32, 4, 128
    for R, length in [(1, 4096)] if args.quick else [(1, 4096), (1, 32768), (16, 4096), (64, 4096)]:
        caches = [cache(R, length, J, D, device) for _ in range(4)]
        q = torch.randn(R, Q, D, device=device, dtype=torch.bfloat16)
        calls = [partial(decode_attention, q, c, D**-0.5, max_length=length) for c in caches]
        plain = [
            [torch.randn(R, J, length, D, device=device, dtype=torch.bfloat16) for _ in range(2)] for _ in range(4)
        ]
        sdpa = [partial(F.scaled_dot_product_attention, q[:, :, None], k, v, enable_gqa=True) for k, v in plain]
        yield {
            "what": f"R={R} length={length}",
            "seconds": seconds(calls),
            "call": seconds(calls, graph=False),
            "bytes": 4 * R * length * J * D,
            "operations": 4 * R * Q * length * D,
            "peer": "sdpa",
            "peer_seconds": seconds(sdpa),
        }


def prefill_rows(args: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """A whole prompt over paged keys and values, beside PyTorch's causal attention."""
    Q, J, D = 32, 4, 128
    for T in [512] if args.quick else [512, 4096, 16384]:
        kv = cache(1, T, J, D, device)
        starts = torch.tensor([0, T], dtype=torch.int32, device=device)
        q = torch.randn(T, Q, D, device=device, dtype=torch.bfloat16)
        k, v = (torch.randn(1, J, T, D, device=device, dtype=torch.bfloat16) for _ in range(2))
        sdpa = partial(F.scaled_dot_product_attention, q.transpose(0, 1)[None], k, v, is_causal=True, enable_gqa=True)
        yield {
            "what": f"T={T}",
            "seconds": seconds([partial(prefill_attention, q, kv, starts, T, D**-0.5)]),
            "bytes": 4 * T * (Q + J) * D,
            "operations": 2 * Q * T * T * D,
            "peer": "sdpa",
            "peer_seconds": seconds([sdpa]),
        }


def cache(R: int, length: int, J: int, D: int, device: torch.device, block_size: int = 64) -> BlockCache:
    per_request = -(-length // block_size)
    k, v = (torch.randn(R * per_request, block_size, J, D, device=device, dtype=torch.bfloat16) for _ in range(2))
    table = torch.randperm(R * per_request, device=device).int().view(R, per_request)
    return BlockCache(k, v, table, torch.full((R,), length, dtype=torch.int32, device=device))


if __name__ == "__main__":
    main()
