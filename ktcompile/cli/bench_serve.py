"""`ktc bench serve`: servers with OpenAI's interface under load."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ktcompile.cli.bench_session import check_outputs, pairs, replot, session, write

if TYPE_CHECKING:
    from ktcompile.bench.serve.arrivals import Arrivals
    from ktcompile.bench.serve.report import ServeReport
    from ktcompile.bench.serve.run import Contender, ServeBenchmark
    from ktcompile.bench.serve.servers import Server
    from ktcompile.bench.serve.workload import Workload

_EXAMPLES = """\
examples:
  ktc bench serve --url http://127.0.0.1:8000 --concurrency 16
  ktc bench serve MODEL --servers kt vllm transformers --peer-python vllm=PYTHON --json a.json --plot a.png
  ktc bench serve MODEL --rate 2 --burstiness 0.5 --input sharegpt --output sharegpt --slo ttft=2s,itl=200ms
  ktc bench serve MODEL --trace mooncake.jsonl --speed 0.1 --trace-scale 0.125 --requests 100
  ktc bench serve MODEL --concurrency 8 --soak 600 --json soak.json
  ktc bench serve --replot a.json --plot a.png

Without --url servers are started here, one after the other, on a port that the kernel chooses; all get the same
requests. Prompts are random tokens, sent as token ids to /v1/completions with ignore_eos where the server takes that,
else texts with a word for each token; what it takes is found out by short requests first. Latencies count from when a
request was sent. The time between tokens is that between chunks over the tokens of the later one: their number comes
from the usage in each chunk (continuous_usage_stats), token_ids or logprobs; where there is none of these, the
answer's tokens are spread over its chunks. The 'itl' of --slo is the 99th percentile within a request, tpot the mean;
goodput counts requests within all objectives.

--soak measures the capacity, then sends twice as many requests for so many seconds, or --rate of them a second without
measuring; a fifth are from clients that leave, read slowly, or send prompts that are too long or no JSON. The exit
status is 1 if the server did what it must not.

sharegpt: log-normal lengths with ShareGPT's means from the vLLM paper, 161 tokens of a prompt and 338 of an answer.
The exit status is 1 if ktcompile was left out, or no request of a server ended well.
"""
_REQUESTS, _CONCURRENCY = 100, 8
_LIBRARIES = ("ktcompile", "torch", "transformers", "aiohttp")


def add_parser(what: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `serve` to `ktc bench`."""
    serve = what.add_parser(
        "serve",
        help="servers under load: time to the first token, between tokens, goodput; ours, vLLM's, any at a URL",
        description="Put servers with OpenAI's interface under load. Ctrl-C keeps what was measured.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = serve.add_argument
    add(
        "model",
        nargs="?",
        metavar="MODEL",
        help="for servers that are started (default: the package's)",
    )
    add("--url", help="a server that runs already, such as http://127.0.0.1:8000")
    add("--servers", nargs="+", metavar="NAME", help="to start: kt, vllm, transformers (default: kt)")
    add("--peer-python", nargs="+", metavar="NAME=PYTHON", default=[], help="programs of servers that live elsewhere")
    add("--model-name", metavar="NAME", help="in requests to --url (default: the first that it lists)")
    add("--api", choices=("completions", "chat"), default="completions", help="chat sends texts (default: completions)")
    add("--api-key", metavar="KEY", help="default: OPENAI_API_KEY")
    add("--extra", metavar="JSON", default="{}", help="fields of every request, such as '{\"temperature\": 1}'")
    when = serve.add_argument_group("when requests are sent (default: --concurrency 8)").add_mutually_exclusive_group()
    when.add_argument("--concurrency", type=int, metavar="N", help="a closed loop: N at any time")
    when.add_argument("--rate", type=float, metavar="R", help="an open loop: R requests per second arrive")
    when.add_argument("--trace", type=Path, metavar="FILE.jsonl", help="as in a trace of Mooncake's format")
    add("--burstiness", type=float, metavar="B", help="of --rate: 1 is Poisson, less comes in bursts (default: 1)")
    add("--speed", type=float, metavar="X", default=1.0, help="of --trace: times as fast (default: 1)")
    add("--trace-scale", type=float, metavar="X", default=1.0, help="of --trace: lengths times X, at most 1")
    add("--requests", type=int, metavar="N", help="default: 100, or all of the trace or of --prompts")
    add("--input", metavar="LENGTH", default="128", help="tokens of prompts: 128, sharegpt or lognormal:MEAN,SIGMA")
    add("--output", metavar="LENGTH", default="64", help="tokens of answers, likewise (default: 64)")
    add("--max-length", type=int, metavar="N", default=2048, help="longer ones are cut to it (default: 2048)")
    add("--prompts", type=Path, metavar="FILE.jsonl", help='texts instead: {"prompt": "...", "max_tokens": 64} a line')
    add("--token-range", metavar="LOW-HIGH", help="ids of random tokens, the end excluded (default: 300-4000)")
    add("--seed", type=int, metavar="N", default=0, help="of lengths, prompts and arrivals (default: 0)")
    add("--warm-up", type=int, metavar="N", default=4, help="requests before those that count (default: 4)")
    add("--timeout", type=float, metavar="SECONDS", default=600.0, help="then a request is given up (default: 600)")
    add("--patience", type=float, metavar="SECONDS", default=900.0, help="until a server answers (default: 900)")
    add("--threads", type=int, metavar="N", help="of servers that are started (default: physical cores)")
    add("--slo", metavar="LIST", help="objectives for goodput: ttft=500ms,itl=80ms,tpot=...,e2e=...")
    add(
        "--soak", type=float, metavar="SECONDS", help="of twice the capacity, or of --rate, with clients that misbehave"
    )
    add("--json", type=Path, metavar="FILE.json", help="write the results, after each server too")
    add("--plot", type=Path, metavar="OUT.png", help="draw latencies over time and as distributions; needs matplotlib")
    add("--replot", type=Path, metavar="FILE.json", help="measure nothing; draw what --json wrote")
    serve.set_defaults(run=run_serve)


def run_serve(args: argparse.Namespace) -> int:
    """Run `ktc bench serve`."""
    check_outputs(args.json, args.plot)
    if args.replot:
        from ktcompile.bench.serve.report import ServeReport

        return replot(args, ServeReport.from_json, _draw)
    _check_client()
    benchmark = _benchmark(args)
    if args.soak is not None:
        return _soak(args, benchmark)
    from ktcompile.bench.serve import run
    from ktcompile.cli.serve_tables import print_report

    with session(benchmark.turns, benchmark.threads, _LIBRARIES, args.json) as (machine, listener):
        report = run.run(benchmark, machine, listener, _start)
    print_report(report)
    write(report, args.json)
    if args.json:
        print(f"wrote {args.json}", file=sys.stderr)
    if args.plot:
        _draw(report, args.plot)
    if report.interrupted:
        return 130
    return int("kt" in report.skipped or not all(report.summary(r).request_rate for r in report.runs))


def _check_client() -> None:
    import importlib.util

    if not importlib.util.find_spec("aiohttp"):
        raise ValueError("ktc bench serve needs aiohttp: pip install 'ktcompile[bench]'")


def _benchmark(args: argparse.Namespace) -> ServeBenchmark:
    from ktcompile import get_num_threads
    from ktcompile.bench.serve import slo
    from ktcompile.bench.serve.run import ServeBenchmark

    try:
        extra = json.loads(args.extra)
    except ValueError as error:
        raise ValueError(f"--extra is no JSON: {error}") from error
    if not isinstance(extra, dict):
        raise ValueError("--extra must be a JSON object")
    return ServeBenchmark(
        contenders=_contenders(args),
        workload=_workload(args),
        api=args.api,
        warm_up=args.warm_up,
        timeout=args.timeout,
        patience=args.patience,
        threads=get_num_threads() if args.threads is None else args.threads,
        slo=slo.parse(args.slo) if args.slo else {},
        api_key=args.api_key or os.environ.get("OPENAI_API_KEY"),
        extra=extra,
    )


def _contenders(args: argparse.Namespace) -> tuple[Contender, ...]:
    from ktcompile.bench.model.contenders import is_installed
    from ktcompile.bench.serve.run import Contender
    from ktcompile.bench.serve.servers import KINDS
    from ktcompile.models.load import folder_of, locate

    if args.url:
        from ktcompile.bench.serve.probe import base_url

        if args.model or args.servers:
            raise ValueError("--url is a server that runs already; MODEL and --servers are for those that are started")
        url = base_url(args.url)
        return (Contender(name=url.partition("://")[2], url=url, model_name=args.model_name),)
    pythons = pairs(args.peer_python, "--peer-python", "NAME=PYTHON")
    names = list(dict.fromkeys(args.servers or ["kt"]))
    for name in (*names, *pythons):
        if name not in KINDS:
            raise ValueError(f"server {name!r} is unknown; there are {', '.join(KINDS)}")
    for name in names:
        python = pythons.get(name, sys.executable)
        if not is_installed(python, KINDS[name].package):
            raise ValueError(f"{name} is not installed in {python}; --peer-python {name}=PYTHON names another")
    folder = folder_of(locate(args.model)).absolute()
    return tuple(
        Contender(
            name=name,
            kind=name,
            python=pythons.get(name, sys.executable),
            model=folder,
            # Ours names a model as it likes; the others by what they were given.
            model_name=None if name == "kt" else str(folder),
        )
        for name in names
    )


def _workload(args: argparse.Namespace) -> Workload:
    from ktcompile.bench.serve import lengths, trace, workload
    from ktcompile.bench.serve.arrivals import Replay

    if args.requests is not None and args.requests < 1:
        raise ValueError(f"--requests of {args.requests} cannot be; it must be 1 or more")
    arrivals = _arrivals(args)
    outputs = lengths.parse(args.output, lengths.SHAREGPT_ANSWER, args.max_length)
    block = trace.BLOCK
    if isinstance(arrivals, Replay):
        traced = trace.read(args.trace, args.requests)
        requests, block = workload.trace_requests(traced, arrivals, args.trace_scale)
        what = f"of {args.trace.name}" + (f" times {args.trace_scale:g}" if args.trace_scale != 1 else "")
    elif args.prompts:
        requests = workload.file_requests(args.prompts, args.requests, outputs, arrivals, args.seed)
        what = f"prompts of {args.prompts.name}, answers {outputs}"
    else:
        inputs = lengths.parse(args.input, lengths.SHAREGPT_PROMPT, args.max_length)
        requests = workload.random_requests(args.requests or _REQUESTS, inputs, outputs, arrivals, args.seed)
        what = f"prompts {inputs}, answers {outputs}"
    return workload.Workload(requests, arrivals, args.seed, what, block, _token_range(args.token_range))


def _arrivals(args: argparse.Namespace) -> Arrivals:
    from ktcompile.bench.serve.arrivals import ClosedLoop, OpenLoop, Replay

    if args.burstiness is not None and args.rate is None:
        raise ValueError("--burstiness is of --rate, which is missing")
    if args.rate is not None:
        return OpenLoop(args.rate, 1.0 if args.burstiness is None else args.burstiness)
    if args.trace is not None:
        if args.prompts:
            raise ValueError("--trace has prompts of its own; --prompts cannot be given too")
        return Replay(args.speed)
    return ClosedLoop(_CONCURRENCY if args.concurrency is None else args.concurrency)


def _token_range(text: str | None) -> tuple[int, int]:
    from ktcompile.bench.serve.workload import TOKEN_RANGE

    if text is None:
        return TOKEN_RANGE
    low, _, high = text.partition("-")
    if not (low.isdecimal() and high.isdecimal()):
        raise ValueError(f"--token-range {text!r} is none; write 300-4000")
    return int(low), int(high)


def _start(contender: Contender, threads: int) -> Server:
    from ktcompile.bench.serve import servers

    assert contender.kind is not None and contender.model is not None
    return servers.start(contender.kind, contender.python, contender.model, threads)


def _soak(args: argparse.Namespace, benchmark: ServeBenchmark) -> int:
    from ktcompile.bench.serve.arrivals import Replay
    from ktcompile.bench.serve.run import soak
    from ktcompile.cli.serve_tables import print_soak

    if not args.soak > 0:
        raise ValueError(f"--soak of {args.soak:g} s cannot be; it must be positive")
    if len(benchmark.contenders) > 1 or isinstance(benchmark.workload.arrivals, Replay) or args.plot:
        raise ValueError("--soak takes one server, no --trace and no --plot")
    with session(benchmark.turns, benchmark.threads, _LIBRARIES, args.json) as (machine, listener):
        report = soak(benchmark, args.soak, machine, listener, _start)
    print_soak(report)
    write(report, args.json)
    return int(bool(report.problems()))


def _draw(report: ServeReport, path: Path) -> None:
    from ktcompile.bench.serve import plot

    if not report.runs:
        print("nothing was measured, nothing is drawn", file=sys.stderr)
        return
    plot.draw(report, path)
    print(f"wrote {path}", file=sys.stderr)
