"""`ktc bench cache --engines`: traces through engines that run, ours with and without tiers, and vLLM's."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktcompile.cli.bench_session import finish, pairs, replot, session

if TYPE_CHECKING:
    from rich.console import Console

    from ktcompile.bench.prefix.contenders import EngineContender
    from ktcompile.bench.prefix.report import EnginesReport, Result
    from ktcompile.bench.prefix.run import EnginesBenchmark
    from ktcompile.bench.prefix.traffic import Sizes
    from ktcompile.bench.serve.workload import Workload
    from ktcompile.plan.architecture import Architecture

_TRAFFIC = ("chat", "documents", "nothing")
_REQUESTS, _LONGEST, _SCALE, _CROWD = 24, 1024, 0.125, 0.02
# Of the memory for keys and values, the host's part where there are tiers; times it, the disk's room.
_HOST_SHARE, _DISK_TIMES = 5, 16
_PROMPTS_OF_MEMORY = 4
_BLOCK = 64
_OPTIONS = ("model", "peer_python", "longest", "scale", "crowd", "kv_tokens", "host_tokens", "disk_tokens", "threads")
_LIBRARIES = ("ktcompile", "torch", "transformers")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what is of engines alone."""
    add = parser.add_argument_group("engines", "a model runs; all get the same prompts in turns").add_argument
    add("--engines", nargs="+", metavar="NAME", help="kt, kt:tiers, kt:off, vllm, vllm:off; 'default': the first three")
    add("--model", metavar="MODEL", help="a folder or a hub id (default: the small model of the package)")
    add("--peer-python", nargs="+", metavar="NAME=PYTHON", help="programs of engines that live elsewhere")
    add("--longest", type=int, metavar="TOKENS", help="prompts with more are left out (default: 1024)")
    add("--scale", type=float, metavar="X", help="lengths times X, at most 1 (default: 0.125)")
    add("--crowd", type=float, metavar="X", help="of traffic: chats at a time, documents; at most 1 (default: 0.02)")
    add("--kv-tokens", type=int, metavar="N", help="memory of each for keys and values (default: 4 times --longest)")
    add("--host-tokens", type=int, metavar="N", help="of them, kt:tiers' host's (default: a fifth)")
    add("--disk-tokens", type=int, metavar="N", help="kt:tiers' disk's, beside (default: 16 times --kv-tokens)")
    add("--threads", type=int, metavar="N", help="threads of every engine (default: physical cores)")
    add("--patience", type=float, metavar="SECONDS", default=900.0, help="then one is ended (default: 900)")
    add("--replot", type=Path, metavar="FILE.json", help="measure nothing; draw what --out wrote of engines")


def check_unused(args: argparse.Namespace) -> None:
    """ValueError: an option of engines was given, and no engine."""
    given = [name for name in _OPTIONS if getattr(args, name) is not None]
    if given:
        raise ValueError(f"--{given[0].replace('_', '-')} is of engines; name them with --engines")


def run_engines(args: argparse.Namespace) -> int:
    """Run `ktc bench cache --engines`."""
    if args.replot:
        from ktcompile.bench.prefix.report import EnginesReport

        return replot(args, EnginesReport.from_json, _draw)
    from ktcompile.bench.prefix import run

    benchmark = _benchmark(args)
    with session(benchmark.turns, benchmark.settings.threads, _LIBRARIES, args.out) as (machine, listener):
        report = run.run(benchmark, machine, listener)
    if args.json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        _print(report)
    failed = any(contender.ours and contender.name in report.skipped for contender in report.contenders)
    return finish(report, args.out, args.plot, _draw, failed=failed)


def _benchmark(args: argparse.Namespace) -> EnginesBenchmark:
    from ktcompile import get_num_threads
    from ktcompile.bench.prefix import contenders
    from ktcompile.bench.prefix.process import Settings
    from ktcompile.bench.prefix.run import EnginesBenchmark
    from ktcompile.models.facts import architecture
    from ktcompile.models.load import folder_of, locate
    from ktcompile.models.source import describe_source

    if args.policies or args.capacities or args.tiers:
        raise ValueError("--policies, --capacities and --tiers are simulated; they cannot be with --engines")
    names = contenders.DEFAULT if args.engines == ["default"] else args.engines
    chosen = contenders.choose(names, pairs(args.peer_python or [], "--peer-python", "NAME=PYTHON"), sys.executable)
    folder = folder_of(locate(args.model)).absolute()
    model = architecture(describe_source(folder))
    sizes = _sizes(args, model.vocab_size)
    settings = Settings(
        folder=folder,
        capacity=_capacity(args, sizes.longest, model),
        longest=sizes.longest,
        threads=get_num_threads() if args.threads is None else args.threads,
        patience=args.patience,
    )
    _check_memory(chosen, settings, model)
    method = {
        "seed": args.seed,
        "longest": sizes.longest,
        "scale": sizes.scale,
        "crowd": sizes.crowd,
        "prompts": "one after the other, random tokens, the same for all engines, each in turn at each; one token each",
    }
    return EnginesBenchmark(folder.name, settings, chosen, _workloads(args, sizes), method)


def _sizes(args: argparse.Namespace, vocab_size: int) -> Sizes:
    from ktcompile.bench.prefix.traffic import Sizes

    def given(name: str, default: Any) -> Any:
        value = getattr(args, name)
        return default if value is None else value

    return Sizes(
        requests=args.requests,
        longest=given("longest", _LONGEST),
        scale=given("scale", _SCALE),
        crowd=given("crowd", _CROWD),
        vocab_size=vocab_size,
    )


def _capacity(args: argparse.Namespace, longest: int, model: Architecture) -> Any:
    from ktcompile.bench.prefix.contenders import Capacity

    memory = _PROMPTS_OF_MEMORY * longest if args.kv_tokens is None else args.kv_tokens
    return Capacity(
        memory=memory,
        host=memory // _HOST_SHARE if args.host_tokens is None else args.host_tokens,
        disk=_DISK_TIMES * memory if args.disk_tokens is None else args.disk_tokens,
        block=_BLOCK,
        token_bytes=sum(layer.bytes_per_token for layer in model.cache),
    )


def _check_memory(chosen: tuple[EngineContender, ...], settings: Any, model: Architecture) -> None:
    from ktcompile.bench.kernels import usable_memory
    from ktcompile.bench.model.contenders import PROCESS_BYTES

    weights = model.parameters * model.dtype_bytes
    of_each = weights + settings.capacity.memory * settings.capacity.token_bytes + PROCESS_BYTES
    needed, free = len(chosen) * of_each, usable_memory()
    if needed > free:
        raise ValueError(
            f"{len(chosen)} engines take about {needed / 2**30:.1f} GiB, of which {free / 2**30:.1f} may be used; "
            "name fewer --engines"
        )


def _workloads(args: argparse.Namespace, sizes: Sizes) -> dict[str, Workload]:
    from dataclasses import replace

    from ktcompile.bench.prefix import traffic
    from ktcompile.bench.serve import trace

    found: dict[str, Workload] = {}
    for path in args.trace:
        found[path.name] = traffic.of_trace(path.name, trace.read(path), sizes, args.seed)
    of_kinds = replace(sizes, requests=_REQUESTS if args.requests is None else args.requests)
    for kind in dict.fromkeys(args.traffic or ([] if args.trace else _TRAFFIC)):
        found[kind] = traffic.of_kind(kind, of_kinds, args.seed)
    # Blocks of one trace are not found in another.
    return {name: replace(w, seed=args.seed + number) for number, (name, w) in enumerate(found.items())}


def _draw(report: EnginesReport, path: Path) -> None:
    from ktcompile.bench.prefix import plot

    if not report.served:
        print("nothing was measured, nothing is drawn", file=sys.stderr)
        return
    plot.draw(report, path)
    print(f"wrote {path}", file=sys.stderr)


def _print(report: EnginesReport) -> None:
    from rich.console import Console

    # What is not a terminal has no width, and would cut tables off.
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=180)
    for trace in report.traces:
        console.print(
            f"\n[bold]{trace.name}[/]: {trace.requests} prompts of {trace.tokens:,} tokens, of which an earlier one "
            f"had {trace.shared_tokens:,}"
        )
        _print_results(console, report, [r for r in report.results if r.trace == trace.name])
    room = ", ".join(f"{name} {start.kv_tokens:,}" for name, start in report.starts.items())
    console.print(f"tokens that devices have room for: {room}")
    for name, why in report.skipped.items():
        console.print(f"left out: {name}: {why}", markup=False)
    if report.interrupted:
        console.print("interrupted: there are fewer prompts than asked for")


def _print_results(console: Console, report: EnginesReport, results: list[Result]) -> None:
    from rich import box
    from rich.table import Table

    table = Table("engine", box=box.SIMPLE)
    beside = report.contenders[0].name
    for name in (
        *("prompts", "prefill s", "wall s", "CPU s", "found %", "device", "host", "disk", "p50 ms", "p99 ms"),
        *(f"{name} /\n{beside}" for name in ("prefill", "paired", "CPU")),
        "same\ntokens",
    ):
        table.add_column(name, justify="right")
    for r in results:
        ratios = r.ratios
        table.add_row(
            r.contender,
            str(r.requests),
            *(f"{seconds:.2f}" for seconds in (r.prefill_seconds, r.wall_seconds, r.cpu_seconds)),
            f"{100 * r.hit_rate:.1f}",
            *(str(tokens) for tokens in r.cached.values()),
            *(f"{1e3 * seconds:.1f}" for seconds in (r.ttft.p50, r.ttft.p99)),
            *([] if ratios is None else [f"{v:.3f}" for v in (ratios.prefill, ratios.paired, ratios.cpu)]),
            *([] if ratios is None else [f"{ratios.same_tokens:.2f}"]),
        )
    console.print(table)
