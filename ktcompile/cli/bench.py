"""`ktc bench`: kernels and models against the machine's ceilings and against peers."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ktcompile.bench.moe import MoeReport

_MOE_EXAMPLES = """\
examples:
  ktc bench moe --preset qwen3-30b-a3b --experts 64
  ktc bench moe --preset deepseek-v3 --experts 16 --tokens 1 16 256 --plot out.png
  ktc bench moe --hidden 2048 --intermediate 768 --num-experts 32 --top-k 8 --json > out.json

Fractions are of the measured roofline: max(weights read / bandwidth, flops / peak) over the time taken.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `bench` and what it can measure."""
    bench = subparsers.add_parser("bench", help="measure kernels beside the roofline and beside peers")
    what = bench.add_subparsers(dest="what", required=True, metavar="WHAT")
    moe = what.add_parser(
        "moe",
        help="one MoE layer, by token count",
        description="Time one MoE layer of bf16 experts on ktcompile, on transformers and, where it is "
        "installed, on kt-kernel, in one interleaved run. Wants a machine where nothing else runs.",
        epilog=_MOE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    moe.add_argument("--preset", default=None, help="a real model's shape (default: qwen3-30b-a3b); 'list' shows them")
    moe.add_argument("--experts", "--num-experts", dest="num_experts", type=int, help="number of experts")
    moe.add_argument("--top-k", type=int, help="experts per token")
    moe.add_argument("--hidden", dest="hidden_size", type=int, help="hidden size")
    moe.add_argument("--intermediate", dest="intermediate_size", type=int, help="intermediate size of an expert")
    moe.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 512, 2048], help="token counts")
    moe.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    moe.add_argument("--weight-format", default="auto", help="weight format of ktcompile (default: as --dtype)")
    moe.add_argument("--isa", help="instruction set of ktcompile (default: the machine's best)")
    moe.add_argument("--threads", type=int, help="threads of every contender (default: physical cores)")
    moe.add_argument("--rounds", type=int, default=5, help="turns of each contender at each token count")
    moe.add_argument("--only", nargs="+", metavar="NAME", help="peers to run beside ktcompile (default: all installed)")
    moe.add_argument("--no-peers", action="store_true", help="run ktcompile alone")
    moe.add_argument("--json", action="store_true", help="print one JSON object")
    moe.add_argument("--plot", type=Path, metavar="OUT.PNG", help="draw the fractions; needs matplotlib")
    moe.set_defaults(run=run_moe)


def run_moe(args: argparse.Namespace) -> int:
    """Run `ktc bench moe`."""
    from rich.console import Console

    from ktcompile.bench import moe
    from ktcompile.bench.shapes import PRESETS

    if args.preset == "list":
        for name, shape in PRESETS.items():
            print(f"{name:20} {shape}")
        return 0
    name = args.preset or "qwen3-30b-a3b"
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown; there are {', '.join(PRESETS)}")
    given = {k: v for k in ("num_experts", "top_k", "hidden_size", "intermediate_size") if (v := getattr(args, k))}
    benchmark = moe.MoeBenchmark(
        shape=replace(PRESETS[name], **given),
        tokens=tuple(args.tokens),
        contenders=_contenders(args),
        threads=args.threads or _default_threads(),
        dtype=args.dtype,
        weight_format=args.weight_format,
        isa=args.isa,
        rounds=args.rounds,
    )
    console = Console(stderr=True)
    with console.status("starting") as status:
        report = moe.run(benchmark, status.update)
    if args.json:
        print(json.dumps({"machine": _machine(), "preset": name, **report.to_json()}, indent=2))
    else:
        _print(report, name)
    if args.plot:
        from ktcompile.bench.plot import plot_moe

        plot_moe(report, name, args.plot)
        print(f"wrote {args.plot}", file=sys.stderr)
    return 0


def _contenders(args: argparse.Namespace) -> tuple[str, ...]:
    from ktcompile.bench import moe

    if args.no_peers:
        return (moe.OURS,)
    available = moe.available_contenders()
    for peer in args.only or ():
        if peer not in available:
            raise ValueError(f"peer {peer!r} is not installed or unknown; there are {', '.join(available[1:])}")
    return (moe.OURS, *args.only) if args.only else available


def _default_threads() -> int:
    from ktcompile import get_num_threads

    return get_num_threads()


def _machine() -> dict[str, object]:
    from dataclasses import asdict

    from ktcompile.machine import machine

    return asdict(machine())


def _print(report: MoeReport, preset: str) -> None:
    from rich.console import Console
    from rich.table import Table

    b, roof = report.benchmark, report.roofline
    print(f"{preset}: {b.shape}, {b.dtype}, {b.threads} threads")
    print(f"ceilings: {roof.bandwidth / 1e9:.1f} GB/s read, {roof.flops / 1e9:.0f} GFLOP/s")
    table = Table("T", "contender", "ms", "min ms", "GB/s", "GFLOP/s", "roofline", "at best", "ratio")
    for tokens in b.tokens:
        rows = [r for r in report.results if r.tokens == tokens]
        ours = rows[0].seconds
        for r in rows:
            table.add_row(
                str(tokens),
                r.contender,
                f"{r.seconds * 1e3:.2f}",
                f"{r.min_seconds * 1e3:.2f}",
                f"{r.bytes_per_second / 1e9:.1f}",
                f"{r.flops_per_second / 1e9:.0f}",
                f"{r.fraction:.2f}",
                f"{r.best_fraction:.2f}",
                f"{r.seconds / ours:.2f}",
                end_section=r is rows[-1],
            )
    Console().print(table)
    for name, error in report.errors.items():
        print(f"relative error against fp64: {error:.2g}  {name}")
    for name, why in report.skipped.items():
        print(f"left out: {name}: {why}")
