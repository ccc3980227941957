"""`ktc simulate`: strategies of expert placement on routing traces."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktcompile.cli.bench_session import check_outputs, write_record
from ktcompile.cli.progress import tenths

if TYPE_CHECKING:
    from ktcompile.plan.facts import ModelFacts
    from ktcompile.plan.profile import RoutingProfile
    from ktcompile.plan.simulate import Result, Setting
    from ktcompile.plan.trace import Trace

_EXAMPLES = """\
examples:
  ktc simulate --synthetic drift
  ktc simulate --synthetic topics --hardware h100-xeon-amx --model-shape deepseek-v3 --fractions 10 20 50
  ktc simulate --trace trace.npz --profile profile.npz --model-shape qwen3-30b-a3b --json > results.json
  ktc simulate --synthetic drift --strategies frequency adaptive kt-dynamic clairvoyant --plot placement.png

All times are simulated: rooflines of published bandwidths and peaks, with the routing of the trace. 'kt-' strategies
follow KTransformers' rules. 'oracle' knows the experts of each interval in advance and copies for free; 'clairvoyant'
is a bound that no placement passes. Synthetic traces take the profile from traffic of another seed.
"""

_FRACTIONS = (0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100)
_FIELDS = (
    *("strategy", "fraction", "tokens_per_second", "decode_tokens_per_second", "seconds", "decode_seconds"),
    *("hit_rate", "swaps", "moved_bytes", "streamed_bytes", "cpu_busy", "device_busy", "overlap"),
)
_NEED_PROFILE = ("frequency", "kt-frequency")
_DEFAULT = ("uniform", "frequency", "adaptive", "kt-frequency", "kt-dynamic", "clairvoyant")
# How much longer than the trace the traffic is from which a synthetic profile is recorded.
_PROFILE_REQUESTS = 3


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `simulate`."""
    parser = subparsers.add_parser(
        "simulate",
        help="compare strategies of expert placement on routing traces, by simulation",
        description="Replay a routing trace through strategies of placing experts on a GPU; print simulated speeds.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--trace", type=Path, metavar="FILE.npz", help="a recorded routing trace")
    source.add_argument("--synthetic", metavar="KIND", help="stationary, drift or topics")
    add("--hardware", metavar="NAME", default="4090-ddr5", help="4090-ddr5 (default), h100-xeon-amx or laptop")
    add("--model-shape", metavar="NAME", default="qwen3-30b-a3b", help="'list' shows them (default: qwen3-30b-a3b)")
    add("--weight-bytes", type=float, metavar="B", default=1.0, help="bytes of each weight (default: 1)")
    add("--strategies", nargs="+", metavar="NAME", help=f"'list' shows them (default: {' '.join(_DEFAULT)})")
    add("--fractions", nargs="+", type=float, metavar="PERCENT", default=_FRACTIONS, help="of experts on the device")
    add("--profile", type=Path, metavar="FILE", help="a recorded routing profile, npz or JSON")
    add("--requests", type=int, metavar="N", default=12, help="requests of a synthetic trace (default: 12)")
    add("--batch", type=int, metavar="N", default=1, help="requests at once in a synthetic trace (default: 1)")
    add("--seed", type=int, metavar="N", default=0, help="of the synthetic trace and of random placement (default: 0)")
    add("--interval", type=int, metavar="STEPS", help="decode steps between plans (default: 256)")
    add("--kt-threshold", type=int, metavar="T", default=512, help="prompt tokens from which KTransformers streams")
    add("--json", action="store_true", help="print one JSON object instead of tables")
    add("--out", type=Path, metavar="FILE.json", help="write the results")
    add("--plot", type=Path, metavar="OUT.png", help="draw speeds by fraction and a map of hits; needs matplotlib")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run `ktc simulate`."""
    from ktcompile.bench.models import MODELS, model_facts
    from ktcompile.plan import simulate

    if args.model_shape == "list" or args.strategies == ["list"]:
        print("\n".join(MODELS if args.model_shape == "list" else simulate.STRATEGIES))
        return 0
    _check(args)
    facts = model_facts(args.model_shape, args.weight_bytes)
    trace, profile = _traffic(args, facts)
    setting = _setting(args, facts, profile)
    strategies = _strategies(args.strategies, profile)
    fractions = list(dict.fromkeys(percent / 100 for percent in args.fractions))
    results = simulate.simulate(trace, setting, strategies, fractions, tenths("simulating"))
    report = _report(args, trace, results)
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        _print(report)
    _save(args, report, results)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raise ValueError for what would fail only after the simulation, or fail unclearly."""
    for name in ("requests", "batch", "kt_threshold"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be 1 or more")
    if args.seed < 0:
        raise ValueError(f"--seed is {args.seed}; it must not be negative")
    for percent in args.fractions:
        if not 0 <= percent <= 100:
            raise ValueError(f"--fractions has {percent:g}; it must be from 0 to 100 percent")
    check_outputs(args.out, args.plot)


def _traffic(args: argparse.Namespace, facts: ModelFacts) -> tuple[Trace, RoutingProfile | None]:
    """Return the trace, and the profile if there is one."""
    from ktcompile.plan.profile import RoutingProfile
    from ktcompile.plan.synthetic import Traffic, generate
    from ktcompile.plan.trace import Trace

    layer = facts.layers[0]
    shape = len(facts.layers), layer.num_experts
    profile = RoutingProfile.load(args.profile, shape) if args.profile else None
    if args.trace:
        return Trace.load(args.trace), profile

    def traffic(requests: int) -> Traffic:
        return Traffic(args.synthetic, *shape, layer.top_k, requests=requests, batch=args.batch)

    print("drawing a synthetic trace", file=sys.stderr)
    if profile is None:
        # Seeds of traces and of the profiles beside them never meet.
        profile = generate(traffic(_PROFILE_REQUESTS * args.requests), 2 * args.seed + 1).profile()
    return generate(traffic(args.requests), 2 * args.seed), profile


def _setting(args: argparse.Namespace, facts: ModelFacts, profile: RoutingProfile | None) -> Setting:
    from ktcompile.plan.hardware import preset
    from ktcompile.plan.replan import ReplanConfig
    from ktcompile.plan.simulate import Setting

    config = ReplanConfig() if args.interval is None else ReplanConfig(interval=args.interval)
    return Setting(facts, preset(args.hardware), profile, config, kt_threshold=args.kt_threshold, seed=args.seed)


def _strategies(asked: Sequence[str] | None, profile: RoutingProfile | None) -> list[str]:
    if asked is None:
        return [name for name in _DEFAULT if profile is not None or name not in _NEED_PROFILE]
    for name in asked:
        if name in _NEED_PROFILE and profile is None:
            raise ValueError(f"strategy {name!r} needs --profile FILE beside --trace")
    return list(dict.fromkeys(asked))


def _report(args: argparse.Namespace, trace: Trace, results: Sequence[Result]) -> dict[str, Any]:
    prompts = int(trace.tokens[trace.prefill].sum())
    return {
        "simulated": True,
        "hardware": args.hardware,
        "model_shape": args.model_shape,
        "weight_bytes": args.weight_bytes,
        "trace": str(args.trace) if args.trace else f"synthetic {args.synthetic}, seed {args.seed}",
        "batch": args.batch,
        "steps": trace.num_steps,
        "prompt_tokens": prompts,
        "generated_tokens": int(trace.tokens.sum()) - prompts,
        "results": [{name: getattr(r, name) for name in _FIELDS} for r in results],
    }


def _title(report: dict[str, Any]) -> str:
    return f"{report['model_shape']} on {report['hardware']}, {report['trace']}"


def _print(report: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=160)
    console.print(f"simulated: {_title(report)}", markup=False)
    console.print(f"{report['prompt_tokens']} prompt tokens, {report['generated_tokens']} generated")
    results = report["results"]
    names = list(dict.fromkeys(r["strategy"] for r in results))
    for key, caption in (
        ("tokens_per_second", "simulated tokens generated per second, prompts included"),
        ("decode_tokens_per_second", "simulated tokens generated per second of decode"),
        ("hit_rate", "simulated share of experts' tokens on the device"),
    ):
        table = Table("% on device", *names, title=caption, title_justify="left", box=box.SIMPLE)
        for fraction in dict.fromkeys(r["fraction"] for r in results):
            cells = {r["strategy"]: r[key] for r in results if r["fraction"] == fraction}
            shown = ["-" if key == "hit_rate" and n == "clairvoyant" else f"{cells[n]:.4g}" for n in names]
            table.add_row(f"{100 * fraction:g}", *shown)
        console.print(table)


def _save(args: argparse.Namespace, report: dict[str, Any], results: Sequence[Result]) -> None:
    if args.out:
        write_record(report, args.out)
    if args.plot:
        from ktcompile.bench import simulation_plot

        simulation_plot.draw(results, _title(report), args.plot)
        print(f"wrote {args.plot}", file=sys.stderr)
