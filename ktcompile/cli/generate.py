"""`ktc generate`: continue a prompt, printing text as it comes."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ktcompile.cli.device_args import add_device_arguments, device_options
from ktcompile.cli.experts_reports import ExpertsReports
from ktcompile.cli.outcome import Outcome, record, speed_line
from ktcompile.cli.progress import progress_bars
from ktcompile.quant import ALIASES, FORMATS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ktcompile.config import DeviceOptions
    from ktcompile.engine.detokenizer import IncrementalText
    from ktcompile.models.load import Track
    from ktcompile.runtime.metrics import ExpertMetrics
    from ktcompile.runtime.recording import Recording

_EXAMPLES = """\
examples:
  ktc generate 'def fibonacci(n):'
  ktc generate --model ~/models/Qwen3-30B-A3B --weight-format bf16 --max-tokens 64 'Once upon a time'
  ktc generate --temperature 0.8 --top-p 0.95 --seed 1 'import '
  ktc generate --json --quiet 'class Stack:' > out.json
  ktc generate --device stand-in --device-expert-fraction 0.25 --routing-profile tiny.npz 'def fibonacci(n):'
  ktc generate --record-routing trace.npz 'import ' && ktc simulate --trace trace.npz --model-shape tiny

The prompt and its continuation go to stdout, progress and speed to stderr.
"""

_COMPILE_HELP = """compile the model with torch.compile(backend="kt"). Each token may then be faster, but the first
ones take far longer: three graphs are compiled (the prompt, one token, one token at any length), which took 50 s for
the small model of the package on two busy cores, and 8 s when it was done again, where --no-compile had its first
token in less than 0.1 s. So the default is --no-compile; it runs the same kernels for the experts"""


# Parameters; a token of such a model takes a few milliseconds on one thread.
_SMALL_MODEL = 64_000_000


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `generate`."""
    parser = subparsers.add_parser(
        "generate",
        help="continue a prompt",
        description="Continue a prompt with a Mixture-of-Experts model.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompt", metavar="PROMPT", help="the text to continue")
    parser.add_argument(
        "--model", metavar="PATH_OR_ID", help="a directory or a hub id (default: the small model of the package)"
    )
    parser.add_argument(
        "--weight-format",
        choices=("auto", *ALIASES, *FORMATS),
        default="auto",
        help="how the experts' weights are stored (default: auto, as in the model; a checkpoint that is quantised "
        "stays as it is)",
    )
    parser.add_argument(
        "--packed-cache",
        metavar="DIR",
        default="auto",
        help="where packed models are kept for the next start, or off (default: KTCOMPILE_PACKED_CACHE, or for large "
        "models the user's folder of caches; see `ktc pack`)",
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help=_COMPILE_HELP)
    parser.add_argument("--max-tokens", type=int, default=128, help="tokens at most (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: %(default)s)"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this probability together"
    )
    parser.add_argument("--seed", type=int, help="of the draws (default: another one each time)")
    parser.add_argument("--threads", type=int, help="threads (default: physical cores, or KTCOMPILE_NUM_THREADS)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    parser.add_argument("--quiet", action="store_true", help="no progress and no speed on stderr")
    add_device_arguments(parser)
    parser.add_argument(
        "--record-routing", type=Path, metavar="FILE.npz", help="write what routers chose, for `ktc simulate --trace`"
    )
    parser.add_argument(
        "--experts-report", type=Path, metavar="FILE.json", help="write where experts are and what each layer did"
    )
    parser.add_argument("--experts-plot", type=Path, metavar="FILE.png", help="draw the same; needs matplotlib")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Generate, and return 130 if Ctrl-C ended it early."""
    from transformers.utils import logging as hf_logging

    from ktcompile import compile_reports, set_num_threads
    from ktcompile.engine.detokenizer import IncrementalText
    from ktcompile.engine.generate import generate
    from ktcompile.engine.sampling_params import SamplingParams
    from ktcompile.graph.report import clear_compile_reports
    from ktcompile.machine import machine
    from ktcompile.models import hf_experts
    from ktcompile.models.load import locate
    from ktcompile.models.tokenizer import load_tokenizer, token_ids
    from ktcompile.runtime.recording import Recording

    # What cannot be used or written shows before the model is loaded.
    sampling = SamplingParams(args.max_tokens, args.temperature, args.top_p, args.seed)
    machine()
    options = device_options(args)
    reports = ExpertsReports(args.experts_report, args.experts_plot, options)
    recording = Recording(args.record_routing, options.routing_profile)
    if args.threads is not None:
        set_num_threads(args.threads)
    clear_compile_reports()

    begin = time.perf_counter()
    name = locate(args.model)
    hf_logging.set_verbosity(logging.ERROR)
    with progress_bars(shown=not args.quiet) as progress:
        tokenizer = load_tokenizer(name)
        model, forward = _load(args, name, options, partial(progress.track, description="Packing experts"))
    recording.check(hf_experts.shape(model))
    _set_torch_threads(model)
    prompt_ids = token_ids(tokenizer, args.prompt)
    outcome = Outcome(len(prompt_ids), load_seconds=time.perf_counter() - begin)
    tokens = generate(model, prompt_ids, args.max_tokens, sampling, forward)
    write = _silent if args.json else _write

    write(args.prompt)
    with recording.running():
        _stream(tokens, IncrementalText(tokenizer, prompt_ids), write, outcome)
    write("\n")
    metrics = _metrics(model, options, outcome)
    if args.json:
        compiled = [
            {"moe_found": r.moe_found, "moe_fused": r.moe_fused, "fallbacks": r.fallbacks} for r in compile_reports()
        ]
        print(json.dumps(record(args, name, outcome, compiled, metrics), indent=2))
    if not args.quiet:
        print(speed_line(outcome), *([metrics.summary()] if metrics else []), sep="\n", file=sys.stderr)
    _save(args, recording, reports, metrics, outcome)
    return 130 if outcome.interrupted else 0


def _load(
    args: argparse.Namespace, name: str, options: DeviceOptions, track: Track
) -> tuple[PreTrainedModel, Callable[..., Any]]:
    """Return the model and what runs it."""
    import torch

    from ktcompile.models.load import load, load_for_compiler
    from ktcompile.models.placed import move
    from ktcompile.runtime.placing import placer_for, without_new_profile

    options = without_new_profile(options)
    packed = {"weight_format": args.weight_format, "packed_cache": args.packed_cache}
    if not args.compile:
        model = load(name, track=track, **packed, **options.device_options())
        return model, model
    placer = placer_for(options)  # what the backend would find wrong shows now
    # About transformers' own code, and of no consequence here.
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
    backend = {"weight_format": args.weight_format, "weights": "take", **options.device_options()}
    model = load_for_compiler(name, track=track, **packed)
    if placer is not None and placer.where.type != "cpu":
        # Dynamo cannot follow stock experts whose weights are elsewhere than their inputs.
        model.set_experts_implementation("kt")
        move(model, placer.where)
    return model, torch.compile(model.forward, backend="kt", options=backend)


def _metrics(model: PreTrainedModel, options: DeviceOptions, outcome: Outcome) -> ExpertMetrics | None:
    """Return what the experts did, None if there is no device or nothing was run yet."""
    from ktcompile.models.placed import expert_metrics

    if options.device == "none" or not outcome.tokens:
        return None
    try:
        return expert_metrics(model)
    except ValueError as error:  # the compiler left all experts to the stock implementation
        print(f"ktc: {error}", file=sys.stderr)
        return None


def _save(
    args: argparse.Namespace,
    recording: Recording,
    reports: ExpertsReports,
    metrics: ExpertMetrics | None,
    outcome: Outcome,
) -> None:
    """Write what was asked for, and say so. Before the first token there is nothing: the prompt was not finished."""
    if not outcome.tokens:
        return
    written: list[Path] = []
    try:
        written += recording.save()
    finally:
        if metrics is not None:
            written += reports.write(metrics)
        if not args.quiet:
            for path in written:
                print(f"wrote {path}", file=sys.stderr)


def _set_torch_threads(model: PreTrainedModel) -> None:
    """Give torch as many threads as the kernels have, or one for a small model: torch's threads spin while they
    wait for each other, which on a machine with other work costs such a model far more than they gain it."""
    import torch

    from ktcompile import get_num_threads

    torch.set_num_threads(get_num_threads() if model.num_parameters() > _SMALL_MODEL else 1)


def _stream(tokens: Iterator[int], text: IncrementalText, write: Callable[[str], None], outcome: Outcome) -> None:
    """Write the text of the tokens as they come; fill `outcome`. Ctrl-C ends it, keeping what there is by then."""
    begin = first = time.perf_counter()
    try:
        for token in tokens:
            now = time.perf_counter()
            outcome.tokens += 1
            if outcome.tokens == 1:
                first, outcome.prefill_seconds = now, now - begin
            outcome.decode_seconds = now - first
            outcome.pieces.append(text.add(token))
            write(outcome.pieces[-1])
        if not outcome.tokens:
            outcome.prefill_seconds = time.perf_counter() - begin
    except KeyboardInterrupt:
        outcome.interrupted = True
    outcome.pieces.append(text.end())
    write(outcome.pieces[-1])


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _silent(text: str) -> None:
    """Stand in for `_write` where the text is part of a JSON object."""
