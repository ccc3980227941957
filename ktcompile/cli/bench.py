"""`ktc bench`, and `ktc bench kernels`: kernels against the machine's ceilings and against peers."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ktcompile.cli import bench_cache, bench_model, bench_serve
from ktcompile.cli.bench_session import check_outputs, finish, replot, session

if TYPE_CHECKING:
    from rich.console import Console

    from ktcompile.bench.kernels import KernelsBenchmark
    from ktcompile.bench.report import KernelsReport, ShapeReport
    from ktcompile.bench.shapes import MoeShape

_EXAMPLES = """\
examples:
  ktc bench kernels --quick
  ktc bench kernels --preset qwen3-30b-a3b mixtral-8x7b --formats bf16 int8 int4 --out kernels.json
  ktc bench kernels --isas best avx2 --peers none --tokens 1 16 256
  ktc bench kernels --hidden 2048 --intermediate 768 --experts 32 --top-k 8 --json > kernels.json
  ktc bench kernels --replot kernels.json --plot kernels.png

The roofline of a call is max(bytes / bandwidth, flops / peak): bytes of the experts that its tokens touch, of its
input and of its output. Both ceilings are measured before and after each turn of each contender. 'fraction' is of
the roofline by the ceilings around the turn, 'of best' by the best of the whole run. benchmarks/README.md has more.
The exit status is 1 if ktcompile was left out somewhere, since that is a mistake in it.
"""

_TOKENS, _QUICK_TOKENS = (1, 4, 16, 64, 256, 1024), (1, 8, 64)
_ROUNDS, _QUICK_ROUNDS = 5, 2
_TURN_SECONDS, _QUICK_TURN_SECONDS = 0.15, 0.02
_LIBRARIES = ("ktcompile", "torch", "transformers", "kt-kernel", "numpy")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `bench` and what it can measure."""
    bench = subparsers.add_parser(
        "bench", help="measure kernels, whole models and servers, beside peers; replay traces through the prefix cache"
    )
    what = bench.add_subparsers(dest="what", required=True, metavar="WHAT")
    kernels = what.add_parser(
        "kernels",
        help="MoE layers by format, instruction set, token count and shape",
        description="Time MoE layers on ktcompile and on installed peers, in turns, as fractions of what this machine "
        "could reach at that moment. Wants a machine where nothing else runs. Ctrl-C keeps what was measured.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = kernels.add_argument
    add("--preset", nargs="+", metavar="NAME", help="shapes (default: qwen3-30b-a3b); 'list' shows them")
    add("--experts", type=int, metavar="N", help="experts (default: as many as are useful and fit into memory)")
    add("--top-k", type=int, metavar="K", help="experts per token, instead of the preset's")
    add("--hidden", type=int, dest="hidden_size", metavar="H", help="hidden size, instead of the preset's")
    add("--intermediate", type=int, dest="intermediate_size", metavar="I", help="intermediate size of an expert")
    add("--formats", nargs="+", metavar="NAME", help="weight formats of ktcompile (default: bf16 int8 int4)")
    add("--isas", nargs="+", metavar="NAME", default=["best"], help="instruction sets of ktcompile (default: best)")
    add("--tokens", nargs="+", type=int, metavar="T", help="token counts (default: 1 4 16 64 256 1024)")
    add("--rounds", type=int, metavar="N", help="turns of each contender at each token count (default: 5)")
    add("--threads", type=int, metavar="N", help="threads of every contender (default: physical cores)")
    add("--kt-kernel-threads", type=int, nargs="+", metavar="N", help="thread counts of kt-kernel, if fewer serve it")
    add("--peers", nargs="+", metavar="NAME", default=["all"], help="all, none, or names (default: all installed)")
    add("--json", action="store_true", help="print one JSON object instead of tables")
    add("--out", type=Path, metavar="FILE.json", help="write the results, after each round too")
    add("--plot", type=Path, metavar="OUT.png", help="draw the fractions, and OUT-roofline.png; needs matplotlib")
    add("--quick", action="store_true", help="a tiny shape, few tokens and rounds: seconds, to see whether it works")
    add("--replot", type=Path, metavar="FILE.json", help="measure nothing; draw what --out wrote")
    kernels.set_defaults(run=run_kernels)
    bench_model.add_parser(what)
    bench_serve.add_parser(what)
    bench_cache.add_parser(what)


def run_kernels(args: argparse.Namespace) -> int:
    """Run `ktc bench kernels`."""
    from ktcompile.bench.shapes import PRESETS

    if args.preset == ["list"]:
        for name, shape in PRESETS.items():
            print(f"{name:20} {shape}")
        return 0
    check_outputs(args.out, args.plot)
    if args.replot:
        return _replot(args)
    report = _measure(_benchmark(args), args.out)
    if args.json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        _print(report)
    failed = any(name.startswith("ktcompile-") for s in report.shapes for name in s.skipped)
    return finish(report, args.out, args.plot, _draw, failed=failed)


def _benchmark(args: argparse.Namespace) -> KernelsBenchmark:
    from ktcompile import get_num_threads
    from ktcompile.bench import contenders, kernels
    from ktcompile.machine import check_isa, machine

    for name in ("threads", "kt_kernel_threads", "rounds"):
        given = getattr(args, name)
        for number in given if isinstance(given, list) else [given]:
            if number is not None and number < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {number}; it must be 1 or more")
    threads = args.threads or get_num_threads()
    isas = [machine().isa if isa == "best" else check_isa(isa, machine().isas) for isa in args.isas]
    ours = contenders.our_contenders(args.formats or contenders.DEFAULT_FORMATS, isas, threads)
    peers, absent = contenders.choose_peers(args.peers)
    return kernels.KernelsBenchmark(
        shapes=_shapes(args),
        cut_experts=args.experts is None,
        contenders=(*ours, *contenders.peer_contenders(peers, threads, args.kt_kernel_threads or [threads])),
        tokens=tuple(dict.fromkeys(args.tokens or (_QUICK_TOKENS if args.quick else _TOKENS))),
        absent=absent,
        threads=threads,
        rounds=args.rounds or (_QUICK_ROUNDS if args.quick else _ROUNDS),
        budget=_QUICK_TURN_SECONDS if args.quick else _TURN_SECONDS,
    )


def _shapes(args: argparse.Namespace) -> dict[str, MoeShape]:
    from ktcompile.bench.shapes import PRESETS

    names = args.preset or (["tiny"] if args.quick else ["qwen3-30b-a3b"])
    for name in names:
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is unknown; there are {', '.join(PRESETS)}")
    given = {k: v for k in ("top_k", "hidden_size", "intermediate_size") if (v := getattr(args, k)) is not None}
    if given and len(names) > 1:
        raise ValueError("--top-k, --hidden and --intermediate change one preset; there are several")
    experts = {} if args.experts is None else {"num_experts": args.experts}
    return {"custom" if given else name: replace(PRESETS[name], **given, **experts) for name in names}


def _measure(benchmark: KernelsBenchmark, out: Path | None) -> KernelsReport:
    from ktcompile.bench import kernels

    with session(benchmark.turns, benchmark.threads, _LIBRARIES, out) as (machine, listener):
        return kernels.run(benchmark, machine, listener)


def _replot(args: argparse.Namespace) -> int:
    from ktcompile.bench.report import KernelsReport

    return replot(args, KernelsReport.from_json, _draw)


def _draw(report: KernelsReport, path: Path) -> None:
    from ktcompile.bench import plot

    if not any(shape.results for shape in report.shapes):
        print("nothing was measured, nothing is drawn", file=sys.stderr)
        return
    roofline = path.with_name(f"{path.stem}-roofline{path.suffix}")
    plot.draw_fractions(report, path)
    plot.draw_rooflines(report, roofline)
    print(f"wrote {path} and {roofline}", file=sys.stderr)


def _print(report: KernelsReport) -> None:
    from rich.console import Console

    # What is not a terminal has no width, and would cut tables off.
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=160)
    for shape in report.shapes:
        _print_shape(console, shape)
    if report.interrupted:
        console.print("interrupted: there are fewer rounds, token counts or shapes than asked for")


def _print_shape(console: Console, report: ShapeReport) -> None:
    s = report.shape
    console.print(
        f"\n[bold]{report.name}[/]: {s.num_experts} experts, {s.top_k} per token, "
        f"hidden {s.hidden_size}, intermediate {s.intermediate_size}"
    )
    if report.best:
        rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s {kind}" for kind, rate in report.best.flops.items())
        console.print(f"best ceilings: {report.best.bandwidth / 1e9:.1f} GB/s read, {rates}")
    for note in report.notes:
        console.print(f"note: {note}")
    if report.results:
        _print_results(console, report)
    for name, why in report.skipped.items():
        console.print(f"left out: {name}: {why}", markup=False)


def _print_results(console: Console, report: ShapeReport) -> None:
    from rich import box
    from rich.table import Table

    contenders = {c.name: c for c in report.contenders}
    table = Table("T", box=box.SIMPLE)
    table.add_column("contender", no_wrap=True)
    for name in ("ms", "min ms", "GB/s", "GFLOP/s", "fraction", "of best", "error"):
        table.add_column(name, justify="right")
    peers = list(dict.fromkeys(name for r in report.results for name in r.ratios))
    faster = Table("T", box=box.SIMPLE)
    faster.add_column("faster than", no_wrap=True)
    for name in peers:
        library = contenders[name].library
        faster.add_column(f"{library}\n{name.removeprefix(library + '-')}", justify="right")
    for r, following in zip(report.results, (*report.results[1:], None), strict=True):
        last = following is None or following.tokens != r.tokens
        table.add_row(
            str(r.tokens),
            r.contender,
            f"{r.seconds * 1e3:.2f}",
            f"{r.min_seconds * 1e3:.2f}",
            f"{r.bytes_per_second / 1e9:.1f}",
            f"{r.flops_per_second / 1e9:.0f}",
            f"{r.fraction:.2f}",
            f"{r.of_best:.2f}",
            f"{contenders[r.contender].error:.2g}",
            end_section=last,
        )
        if r.ratios:
            ratios = (f"{r.ratios[p]:.2f}x" if p in r.ratios else "" for p in peers)
            faster.add_row(str(r.tokens), r.contender, *ratios)
    console.print(table)
    if peers:
        console.print(faster)
