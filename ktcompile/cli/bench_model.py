"""`ktc bench model`: a whole model on ktcompile and on what its users would run instead."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ktcompile.cli.bench_session import check_outputs, finish, pairs, replot, session
from ktcompile.cli.sizes import human

if TYPE_CHECKING:
    from rich.console import Console

    from ktcompile.bench.model.report import ModelReport, Result
    from ktcompile.bench.model.run import ModelBenchmark

_EXAMPLES = """\
contenders:
  kt[:FORMAT[+FORMAT[+FORMAT]]]
                            torch.compile(model, backend="kt"); weight formats of experts, linear layers and the head
  kt-engine[:...]           likewise the engine of `ktc serve`, stepped by hand as vllm is, without its prefix cache
  kt-eager[:FORMAT]         ktcompile.load(model), without a compiler
  transformers[:IMPL]       as it comes; its experts implementation: grouped_mm, batched_mm, eager
  inductor                  torch.compile(model)
  zentorch                  torch.compile(model, backend="zentorch")
  vllm                      its engine on the CPU
  llama.cpp:FORMAT          bf16, q8_0 or q4_k_m, on a GGUF file that is made of a Qwen3-MoE checkpoint and kept
  all                       kt, kt:int8, kt:int4, kt:int4_dyn+int4_dyn, kt-eager, kt-engine, and all others installed

examples:
  ktc bench model MODEL
  ktc bench model MODEL --contenders kt:int4_dyn+int8_dyn+int4_dyn llama.cpp:q4_k_m --peer-python llama.cpp=PYTHON
  ktc bench model MODEL --contenders all --peer-python vllm=/opt/vllm/bin/python --json model.json --plot model.png
  ktc bench model --contenders kt-eager transformers --batches 1 --prompts 64 --rounds 1 --steps 4
  ktc bench model --replot model.json --plot model.png

Each contender has a process of its own, which is stopped while it is not its turn. In a round all of them take turns at
each batch and prompt. Their first turns, which may compile, do not count. Ratios are those of turns in the same round.
Decode is the median step of a greedy continuation of 64 random tokens for each request, prefill the time until the next
token of a prompt is known. benchmarks/README.md has more. The exit status is 1 if ktcompile was left out somewhere.
"""
_BATCHES, _PROMPTS = (1, 4, 8, 16), (512, 2048, 8192)
_LIBRARIES = ("ktcompile", "torch", "transformers")


def add_parser(what: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `model` to `ktc bench`."""
    model = what.add_parser(
        "model",
        help="a whole model beside transformers, Inductor, zentorch, vLLM and llama.cpp",
        description="Time decode and prefill of a model on ktcompile and on peers, in turns, as fractions of what this "
        "machine could reach at that moment. Wants a machine where nothing else runs. Ctrl-C keeps what was measured.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = model.add_argument
    add("model", nargs="?", metavar="MODEL", help="a folder or a hub id (default: the small model of the package)")
    add("--contenders", nargs="+", metavar="NAME", help="see below (default: kt transformers)")
    add("--peer-python", nargs="+", metavar="NAME=PYTHON", default=[], help="programs of kinds that live elsewhere")
    add("--batches", nargs="*", type=int, metavar="N", default=_BATCHES, help="requests of decode (default: 1 4 8 16)")
    add("--prompts", nargs="*", type=int, metavar="TOKENS", default=_PROMPTS, help="default: 512 2048 8192")
    add("--steps", type=int, metavar="N", default=16, help="of decode, in a turn (default: 16)")
    add("--rounds", type=int, metavar="N", default=3, help="turns of each contender at each size (default: 3)")
    add("--threads", type=int, metavar="N", help="threads of every contender (default: physical cores)")
    add("--cache", choices=("dynamic", "static"), default="dynamic", help="of transformers' models")
    add("--once-above", type=float, metavar="SECONDS", default=120.0, help="a longer call has one round (default: 120)")
    add("--patience", type=float, metavar="SECONDS", default=1800.0, help="then a contender is ended (default: 1800)")
    add("--gguf", nargs="+", metavar="FORMAT=FILE", default=[], help="files of llama.cpp that are there already")
    add("--gguf-folder", type=Path, metavar="DIR", help="for files that are made (default: the user's cache)")
    add("--json", type=Path, metavar="FILE.json", help="write the results, after each round too")
    add("--plot", type=Path, metavar="OUT.png", help="draw speeds and fractions; needs matplotlib")
    add("--replot", type=Path, metavar="FILE.json", help="measure nothing; draw what --json wrote")
    model.set_defaults(run=run_model)


def run_model(args: argparse.Namespace) -> int:
    """Run `ktc bench model`."""
    check_outputs(args.json, args.plot)
    if args.replot:
        return _replot(args)
    from ktcompile.bench.model import run

    benchmark = _benchmark(args)
    with session(benchmark.turns, benchmark.settings.threads, _LIBRARIES, args.json) as (machine, listener):
        report = run.run(benchmark, machine, listener)
    _print(report)
    failed = any(name.partition(":")[0] in ("kt", "kt-eager", "kt-engine") for name in report.skipped)
    return finish(report, args.json, args.plot, _draw, failed=failed)


def _benchmark(args: argparse.Namespace) -> ModelBenchmark:
    from ktcompile import get_num_threads
    from ktcompile.bench.kernels import usable_memory
    from ktcompile.bench.model import contenders
    from ktcompile.bench.model.demand import Work
    from ktcompile.bench.model.process import Settings
    from ktcompile.bench.model.run import ModelBenchmark
    from ktcompile.models.facts import architecture
    from ktcompile.models.load import folder_of, locate
    from ktcompile.models.packed_cache import default_folder, key_of
    from ktcompile.models.source import describe_source

    folder = folder_of(locate(args.model)).absolute()
    files = {name: Path(file) for name, file in pairs(args.gguf, "--gguf", "FORMAT=FILE").items()}
    for name, file in files.items():
        if name not in contenders.KINDS["llama.cpp"].variants or not file.is_file():
            raise ValueError(f"--gguf {name}={file}: there is no such format, or no such file")
    works = [Work("decode", n) for n in args.batches] + [Work("prefill", n) for n in args.prompts]
    settings = Settings(
        folder=folder,
        works=tuple(dict.fromkeys(works)),
        steps=args.steps,
        threads=get_num_threads() if args.threads is None else args.threads,
        cache=args.cache,
        gguf_folder=args.gguf_folder or default_folder().with_name("gguf") / key_of(folder, "auto"),
        gguf_files=files,
        patience=args.patience,
    )
    model = architecture(describe_source(folder))
    pythons = pairs(args.peer_python, "--peer-python", "NAME=PYTHON")
    chosen, absent = contenders.choose(args.contenders or contenders.DEFAULT, pythons, model, settings.threads)
    groups, too_large = contenders.groups(chosen, model, usable_memory())
    return ModelBenchmark(
        model=model,
        settings=settings,
        groups=groups,
        skipped={**absent, **too_large},
        rounds=args.rounds,
        once_above=args.once_above,
    )


def _replot(args: argparse.Namespace) -> int:
    from ktcompile.bench.model.report import ModelReport

    return replot(args, ModelReport.from_json, _draw)


def _draw(report: ModelReport, path: Path) -> None:
    from ktcompile.bench.model import plot

    if not report.results:
        print("nothing was measured, nothing is drawn", file=sys.stderr)
        return
    plot.draw(report, path)
    print(f"wrote {path}", file=sys.stderr)


def _print(report: ModelReport) -> None:
    from rich.console import Console

    # What is not a terminal has no width, and would cut tables off.
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=180)
    m = report.model
    console.print(f"\n[bold]{m['name']}[/]: {m['parameters'] / 1e9:.2f} B parameters, experts in {m['stored_format']}")
    if report.best:
        rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s {kind}" for kind, rate in report.best.flops.items())
        console.print(f"best ceilings: {report.best.bandwidth / 1e9:.1f} GB/s read, {rates}")
    if report.starts:
        _print_starts(console, report)
    if report.results:
        _print_results(console, report)
    for name, why in report.skipped.items():
        console.print(f"left out: {name}: {why}", markup=False)
    if report.interrupted:
        console.print("interrupted: there are fewer rounds or contenders than asked for")


def _print_starts(console: Console, report: ModelReport) -> None:
    from rich import box
    from rich.table import Table

    table = Table("contender", box=box.SIMPLE)
    for name in ("load s", "first turns s", "memory", "at most", "same tokens", "logit error"):
        table.add_column(name, justify="right")
    for contender in report.contenders:
        start = report.starts[contender.name]
        agreement, error = report.agreement.get(contender.name), report.logit_errors.get(contender.name)
        table.add_row(
            contender.name,
            f"{start.load_seconds:.1f}",
            f"{sum(start.first_seconds.values()):.1f}",
            "" if start.resident_bytes is None else human(start.resident_bytes),
            "" if start.peak_bytes is None else human(start.peak_bytes),
            "" if agreement is None else f"{agreement:.2f}",
            "" if error is None else f"{error:.3f}",
        )
    console.print(table)


def _print_results(console: Console, report: ModelReport) -> None:
    from rich import box
    from rich.table import Table

    table = Table("work", "contender", box=box.SIMPLE)
    ours = [c.name for c in report.contenders if c.ours]
    for name in (
        "rounds",
        "ms",
        "min ms",
        "tokens/s",
        "fraction",
        "of best",
        *(f"{name} is\nfaster by" for name in ours),
    ):
        table.add_column(name, justify="right")
    results = report.results
    for r, following in zip(results, (*results[1:], None), strict=True):
        table.add_row(
            str(r.work),
            r.contender,
            str(r.rounds),
            f"{r.seconds * 1e3:.2f}",
            f"{r.min_seconds * 1e3:.2f}",
            f"{r.tokens_per_second:.1f}",
            f"{r.fraction:.2f}",
            f"{r.of_best:.2f}",
            *(_ratio(results, name, r) for name in ours),
            end_section=following is None or following.work != r.work,
        )
    console.print(table)


def _ratio(results: tuple[Result, ...], name: str, beside: Result) -> str:
    """Return how many times as long `beside` takes as the contender `name` at the same work."""
    own = next((r for r in results if (r.contender, r.work) == (name, beside.work)), None)
    ratio = None if own is None else own.ratios.get(beside.contender)
    return "" if ratio is None else f"{ratio:.2f}x"
