"""`ktc generate`: continue a prompt, printing text as it comes."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from ktcompile.quant import ALIASES, FORMATS

if TYPE_CHECKING:
    from rich.progress import Progress
    from transformers import PreTrainedModel

    from ktcompile.engine.detokenizer import IncrementalText

_EXAMPLES = """\
examples:
  ktc generate 'def fibonacci(n):'
  ktc generate --model ~/models/Qwen3-30B-A3B --weight-format bf16 --max-tokens 64 'Once upon a time'
  ktc generate --temperature 0.8 --top-p 0.95 --seed 1 'import '
  ktc generate --json --quiet 'class Stack:' > out.json

The prompt and its continuation go to stdout, progress and speed to stderr.
"""

_COMPILE_HELP = """compile the model with torch.compile(backend="kt"). Each token may then be faster, but the first
ones take far longer: three graphs are compiled (the prompt, one token, one token at any length), which took 50 s for
the small model of the package on two busy cores, and 8 s when it was done again, where --no-compile had its first
token in less than 0.1 s. So the default is --no-compile; it runs the same kernels for the experts"""


# Parameters; a token of such a model takes a few milliseconds on one thread.
_SMALL_MODEL = 64_000_000


@dataclass(slots=True)
class Outcome:
    """What was generated, and how long each part took, in seconds.

    prefill_seconds: until the first token. decode_seconds: from the first token to the last.
    """

    prompt_tokens: int
    tokens: int = 0
    pieces: list[str] = field(default_factory=list)
    load_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    interrupted: bool = False

    @property
    def prefill_rate(self) -> float | None:
        """Prompt tokens per second; None if the prompt was not finished."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else None

    @property
    def decode_rate(self) -> float | None:
        """Tokens per second after the first one; None if there are none."""
        return (self.tokens - 1) / self.decode_seconds if self.decode_seconds else None


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
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Generate, and return 130 if Ctrl-C ended it early."""
    from ktcompile import compile_reports, set_num_threads
    from ktcompile.engine.detokenizer import IncrementalText
    from ktcompile.engine.generate import Sampling, generate
    from ktcompile.graph.report import clear_compile_reports
    from ktcompile.machine import machine

    sampling = Sampling(args.temperature, args.top_p, args.seed)
    machine()  # settings that cannot be used show before the model is loaded
    if args.threads is not None:
        set_num_threads(args.threads)
    clear_compile_reports()

    begin = time.perf_counter()
    name, tokenizer, model = _load(args)
    _set_torch_threads(model)
    prompt_ids: list[int] = tokenizer(args.prompt)["input_ids"]
    if args.prompt and not prompt_ids:  # transformers makes an empty tokenizer where it finds no files
        raise ValueError(f"the tokenizer of {name} knows no tokens; are files such as tokenizer.json missing?")
    outcome = Outcome(len(prompt_ids), load_seconds=time.perf_counter() - begin)
    tokens = generate(model, prompt_ids, args.max_tokens, sampling, _forward(model, args))
    write = _silent if args.json else _write

    write(args.prompt)
    _stream(tokens, IncrementalText(tokenizer, prompt_ids), write, outcome)
    write("\n")
    if args.json:
        reports = [
            {"moe_found": r.moe_found, "moe_fused": r.moe_fused, "fallbacks": r.fallbacks} for r in compile_reports()
        ]
        print(json.dumps(_record(args, name, outcome, reports), indent=2))
    if not args.quiet:
        print(_speed_line(outcome), file=sys.stderr)
    return 130 if outcome.interrupted else 0


def _set_torch_threads(model: PreTrainedModel) -> None:
    """Give torch as many threads as the kernels have, or one for a small model: torch's threads spin while they
    wait for each other, which on a machine with other work costs such a model far more than they gain it."""
    import torch

    from ktcompile import get_num_threads

    torch.set_num_threads(get_num_threads() if model.num_parameters() > _SMALL_MODEL else 1)


def _load(args: argparse.Namespace) -> tuple[str, Any, PreTrainedModel]:
    """Return the model's name, its tokenizer and the model, with its experts packed unless it is to be compiled.
    Experts that are stored quantised are packed in any case."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as hf_logging

    from ktcompile.models import checkpoint, hf_experts, quantized, tiny_model

    hf_logging.set_verbosity(logging.ERROR)
    name = checkpoint.locate(args.model or tiny_model.path())
    # A model to be compiled stays as its authors wrote it: the backend finds the experts by itself.
    experts = {} if args.compile else {"experts_implementation": hf_experts.NAME}
    with _progress(shown=not args.quiet) as progress:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
            model: Any
            if quantized.reader_of(name) is None:
                model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", **experts)
            else:
                model = quantized.load(name, args.weight_format, partial(progress.track, description="Packing experts"))
        except OSError as error:
            raise FileNotFoundError(f"cannot load the model {name}: {error}") from error
        modules = hf_experts.configure(model, args.weight_format)
        packed = any(hf_experts.is_packed(module) for module in model.modules())
        if not modules and not packed and args.weight_format != "auto":
            raise ValueError(f"{name} has no experts that could be stored in {args.weight_format}")
        if modules and not args.compile:
            for module in progress.track(modules, description="Packing experts"):
                hf_experts.take(module)
    return name, tokenizer, model


def _forward(model: PreTrainedModel, args: argparse.Namespace) -> Callable[..., Any]:
    if not args.compile:
        return model
    import torch

    # About transformers' own code, and of no consequence here.
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
    options = {"weight_format": args.weight_format, "weights": "take"}
    compiled: Callable[..., Any] = torch.compile(model.forward, backend="kt", options=options)
    return compiled


@contextmanager
def _progress(shown: bool) -> Iterator[Progress]:
    """Show the bars of transformers, and one's own, on stderr if that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress
    from transformers.utils import logging as hf_logging

    silent: Callable[..., Any] = hf_logging.EmptyTqdm

    def bar(factory: Callable[..., Any], args: tuple[Any, ...], settings: dict[str, Any]) -> Any:
        # Without something to go through it is a download, which reports its own bytes.
        if not args:
            return factory(**settings)
        return silent(progress.track(list(args[0]), description=settings.get("desc") or "Loading"))

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (shown and console.is_terminal)) as progress:
        before = hf_logging.set_tqdm_hook(bar)
        try:
            yield progress
        finally:
            hf_logging.set_tqdm_hook(before)


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


def _record(
    args: argparse.Namespace, model: str, outcome: Outcome, reports: Sequence[dict[str, object]]
) -> dict[str, object]:
    from ktcompile import get_num_threads
    from ktcompile.machine import machine

    return {
        "prompt": args.prompt,
        "text": "".join(outcome.pieces),
        "prompt_tokens": outcome.prompt_tokens,
        "generated_tokens": outcome.tokens,
        "interrupted": outcome.interrupted,
        "load_seconds": outcome.load_seconds,
        "prefill_seconds": outcome.prefill_seconds,
        "prefill_tokens_per_second": outcome.prefill_rate,
        "decode_seconds": outcome.decode_seconds,
        "decode_tokens_per_second": outcome.decode_rate,
        "model": model,
        "isa": machine().isa,
        "threads": get_num_threads(),
        "weight_format": args.weight_format,
        "compiled": args.compile,
        "compile_reports": list(reports),
    }


def _speed_line(outcome: Outcome) -> str:
    def rate(tokens: int, seconds: float, per_second: float | None) -> str:
        speed = "" if per_second is None else f" ({per_second:.1f} tokens/s)"
        return f"{tokens} tokens in {seconds:.2f} s{speed}"

    prefill = rate(outcome.prompt_tokens, outcome.prefill_seconds, outcome.prefill_rate)
    decode = rate(max(0, outcome.tokens - 1), outcome.decode_seconds, outcome.decode_rate)
    return f"load {outcome.load_seconds:.2f} s | prefill {prefill} | decode {decode}"
