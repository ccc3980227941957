"""`ktc bench cache`: policies of the prefix cache on traces, by replay without a model; or engines that run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktcompile.cli import bench_engines
from ktcompile.cli.bench_session import check_outputs, write_record
from ktcompile.cli.progress import tenths
from ktcompile.cli.sizes import size

if TYPE_CHECKING:
    from ktcompile.bench.cache.compare import Rates, Result
    from ktcompile.cache.recording import Recording

_EXAMPLES = """\
examples:
  ktc bench cache
  ktc bench cache --traffic chat agents --requests 10000 --seed 3 --capacities 10 25 50
  ktc bench cache --trace conversation_trace.jsonl --policies value lru --json > cache.json
  ktc bench cache --traffic documents --tiers 5 20 60 --plot tiers.png
  ktc bench cache --engines default
  ktc bench cache --engines kt kt:tiers kt:off vllm --peer-python vllm=PYTHON --model MODEL --traffic chat documents
  ktc bench cache --engines kt:off kt:tiers --model MODEL --traffic nothing --requests 20 --out loss.json
  ktc bench cache --engines kt kt:off --trace conversation_trace.jsonl --requests 30 --scale 0.03 --plot engines.png
  ktc bench cache --replot loss.json --plot loss.png

A trace is of Mooncake's format or was recorded by this package; traffic is made of a seed. Capacities are shares of the
bytes of all distinct blocks of a trace. 'belady' is the most that any policy could find, since it knows the future.
'saved' is the share of the seconds of computing prompts, less those of loading, by the rates given: no model runs.
Policies start empty and know nothing of what comes.

With --engines a model runs: kt caches on the device alone, kt:tiers on device, host and disk, kt:off not at all, vllm
as it does by itself. All have the same memory for keys and values, in blocks of 64 tokens. Prompts come one after the
other, each to every engine in turn, the others stopped; random tokens stand for texts, answers have one token, and what
an earlier answer said is in the next prompt of its chat. 'prefill' is the time to first tokens, 'wall' until nothing is
left to do, 'CPU' of all cores. Ratios are over the engine that is named first, 'paired' the median of the prompts' own.
Where nothing is shared, those of kt:tiers over kt:off are what caching costs. The exit status is 1 if kt was left out.
"""
_CAPACITIES = (10.0, 20.0, 40.0, 60.0, 80.0)
_REQUESTS = 4000


def add_parser(what: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `cache` to `ktc bench`."""
    cache = what.add_parser(
        "cache",
        help="the prefix cache on traces: its policies beside the best that knows the future; engines, beside vLLM",
        description="Replay traces of prompts through tiers of the prefix cache: tokens found, and seconds saved. "
        "Without a model, or by --engines through engines that run; Ctrl-C then keeps what was measured.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = cache.add_argument
    add(
        "--trace", nargs="+", type=Path, metavar="FILE.jsonl", default=[], help="of Mooncake's format, or recorded here"
    )
    add(
        "--traffic",
        nargs="+",
        metavar="KIND",
        help="made of a seed; 'list' shows kinds (default, without --trace: all; engines: chat documents nothing)",
    )
    add("--requests", type=int, metavar="N", help="of each traffic (default: 4000, or 24), or the first of a trace")
    add("--seed", type=int, metavar="N", default=0, help="of traffic (default: 0)")
    add("--policies", nargs="+", metavar="NAME", help="'list' shows them (default: all)")
    sizes = cache.add_mutually_exclusive_group()
    sizes.add_argument("--capacities", nargs="+", type=float, metavar="PERCENT", help="of one tier (default: 10 to 80)")
    sizes.add_argument("--tiers", nargs=3, type=float, metavar="PERCENT", help="of device, host and disk, together")
    add("--prefill-rate", type=float, metavar="R", default=130.0, help="tokens/s without attention (default: 130)")
    add(
        "--attention-doubles",
        type=float,
        metavar="P",
        default=8192,
        help="where a token takes twice that (default: 8192)",
    )
    add("--bytes-per-token", type=size, metavar="SIZE", default=98304, help="of keys and values (default: 96KiB)")
    add("--host-rate", type=size, metavar="SIZE", default=8_000_000_000, help="loaded a second (default: 8GB)")
    add("--disk-rate", type=size, metavar="SIZE", default=1_000_000_000, help="loaded a second (default: 1GB)")
    add("--weight", type=float, metavar="W", default=0.0, help="of seconds in 'value', from 0 to 1 (default: 0)")
    add("--json", action="store_true", help="print one JSON object instead of tables")
    add("--out", type=Path, metavar="FILE.json", help="write the results")
    add("--plot", type=Path, metavar="OUT.png", help="draw tokens found by capacity; needs matplotlib")
    bench_engines.add_options(cache)
    cache.set_defaults(run=run_cache)


def run_cache(args: argparse.Namespace) -> int:
    """Run `ktc bench cache`."""
    from ktcompile.bench.cache import compare, synthetic
    from ktcompile.cache import policies

    if args.traffic == ["list"] or args.policies == ["list"]:
        print("\n".join(synthetic.KINDS if args.traffic == ["list"] else policies.NAMES))
        return 0
    check_outputs(args.out, args.plot)
    if args.engines or args.replot:
        return bench_engines.run_engines(args)
    bench_engines.check_unused(args)
    names = list(dict.fromkeys(args.policies or policies.NAMES))
    shares = _shares(args)
    rates = _rates(args)
    traces = _traces(args)
    results = compare.compare(traces, names, shares, rates, tenths("replaying"))
    report = _report(args, traces, results)
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        _print(results)
    _save(args, report, results)
    return 0


def _shares(args: argparse.Namespace) -> list[tuple[float, ...]]:
    given = args.tiers or args.capacities or _CAPACITIES
    for percent in given:
        if not 0 < percent <= 100:
            raise ValueError(f"a capacity of {percent:g} % cannot be; it must be above 0 and at most 100")
    parts = [percent / 100 for percent in given]
    return [tuple(parts)] if args.tiers else [(part,) for part in dict.fromkeys(parts)]


def _rates(args: argparse.Namespace) -> Rates:
    from ktcompile.bench.cache.compare import Rates
    from ktcompile.cache.costs import Load, Recompute

    for name in ("prefill_rate", "attention_doubles", "bytes_per_token", "host_rate", "disk_rate"):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be positive")
    if not 0 <= args.weight <= 1:
        raise ValueError(f"--weight is {args.weight:g}; it must be from 0 to 1")
    per_token = 1 / args.prefill_rate
    recompute = Recompute(per_token, per_token / args.attention_doubles)
    return Rates(recompute, (Load(), Load(1e-4, args.host_rate), Load(1e-3, args.disk_rate)), args.weight)


def _traces(args: argparse.Namespace) -> dict[str, Recording]:
    from ktcompile.bench.cache import synthetic, traces

    found = {path.name: traces.read(path, args.bytes_per_token, args.requests) for path in args.trace}
    count = _REQUESTS if args.requests is None else args.requests
    for kind in dict.fromkeys(args.traffic or ([] if args.trace else synthetic.KINDS)):
        found[kind] = traces.of_requests(synthetic.generate(kind, count, args.seed), args.bytes_per_token)
    return found


def _report(args: argparse.Namespace, traces: dict[str, Recording], results: Sequence[Result]) -> dict[str, Any]:
    from ktcompile.bench.cache.traces import footprint

    return {
        "simulated": True,
        "seed": args.seed,
        "prefill_rate": args.prefill_rate,
        "attention_doubles": args.attention_doubles,
        "weight": args.weight,
        "host_rate": args.host_rate,
        "disk_rate": args.disk_rate,
        "traces": {
            name: {
                "requests": len(found.requests),
                "tokens": sum(request.tokens for request in found.requests),
                "block_size": found.block_size,
                "distinct_bytes": footprint(found),
            }
            for name, found in traces.items()
        },
        "results": [asdict(result) for result in results],
    }


def _print(results: Sequence[Result]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=160)
    tiers = max(len(r.by_tier) for r in results)
    table = Table("trace", "capacity %", "policy", box=box.SIMPLE)
    for name in (
        "tokens %",
        "of belady %",
        "bytes %",
        "saved %",
        *(("device %", "host %", "disk %") if tiers > 1 else ()),
    ):
        table.add_column(name, justify="right")
    for r, following in zip(results, (*results[1:], None), strict=True):
        values = (r.token_hit_rate, r.of_belady, r.byte_hit_rate, r.saved, *(r.by_tier if tiers > 1 else ()))
        cells = ["" if value is None else f"{100 * value:.1f}" for value in values]
        last = following is None or (following.trace, following.share) != (r.trace, r.share)
        table.add_row(r.trace, "+".join(f"{100 * part:g}" for part in r.share), r.policy, *cells, end_section=last)
    console.print("simulated: tokens found in the cache, and seconds of prefill saved by the given rates")
    console.print(table)


def _save(args: argparse.Namespace, report: dict[str, Any], results: Sequence[Result]) -> None:
    if args.out:
        write_record(report, args.out)
    if args.plot:
        from ktcompile.bench.cache import plot

        plot.draw(results, args.plot)
        print(f"wrote {args.plot}", file=sys.stderr)
