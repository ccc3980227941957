"""`ktc cache warm`: compute the beginnings of prompts before anybody asks for them."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ktcompile.cli import prompt_files
from ktcompile.cli.progress import progress_bars
from ktcompile.cli.serve import OTHERS, check_installed
from ktcompile.cli.settings import add_setting_arguments, of_record, settings_of
from ktcompile.engine.options import EngineOptions
from ktcompile.server.options import ServerOptions

if TYPE_CHECKING:
    from rich.progress import Progress

    from ktcompile.engine.engine import Engine

_EXAMPLES = """\
examples:
  ktc cache warm --kv-disk-path ~/kv --role system assistant.txt   # a system prompt, through the model's chat template
  ktc cache warm --config server.toml requests.jsonl               # what `ktc serve --config server.toml` will find
  ktc cache warm --kv-disk-path ~/kv --model ~/models/Qwen3-30B-A3B documents/*.txt --json
  tail -n 100 requests.jsonl | ktc cache warm --kv-disk-path ~/kv --format jsonl -

A line of JSONL is a text, a list of messages, or a body of /v1/completions or /v1/chat/completions; of its settings
those count that change the prompt (tools, chat_template_kwargs) or who may share it (cache_salt). Whole blocks are
kept, 64 tokens each unless --block-size says otherwise.

A server finds them that is started with the same --kv-disk-path, model and options of how it computes (--weight-format,
--dense-format, --kv-format, --block-size, --eager, --device), by the same release on the same kind of CPU. One that
runs keeps the folder to itself. The exit status is 0, 1 if something could not be kept, 2 if nothing can be.
"""
_ROLES = ("system", "developer", "user")
_NUMBERS = ("tokens", "there", "computed", "stored", "kept", "missing")


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What became of prompts, as of `ktcompile.engine.warm.Warmed`. kept: tokens that are there at the end. missing:
    tokens of whole blocks that are not."""

    name: str
    tokens: int = 0
    there: int = 0
    computed: int = 0
    stored: int = 0
    kept: int = 0
    missing: int = 0

    @property
    def line(self) -> str:
        became = f"{self.there} were there, {self.computed} computed, {self.stored} stored"
        return f"{self.name}: {self.tokens} tokens, {became}"


def add_parser(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `warm`."""
    parser = actions.add_parser(
        "warm",
        help="compute the keys and values of prompts for the next start of a server",
        description="Compute the keys and values of prompts, so that the next start of `ktc serve` has them on disk.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a text, or JSONL with a prompt a line; - for stdin")
    parser.add_argument(
        "--format", choices=prompt_files.FORMATS, help="of all files (default: jsonl where a name ends so, else text)"
    )
    parser.add_argument(
        "--role", choices=_ROLES, help="texts are messages of this role (default: they are prompts as they are)"
    )
    parser.add_argument(
        "--model", metavar="PATH_OR_ID", help="a directory or a hub id (default: the small model of the package)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_setting_arguments(parser, EngineOptions)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Warm, and return 1 where something could not be kept."""
    from transformers.utils import logging as hf_logging

    from ktcompile.engine.engine import Engine

    check_installed()
    settings = settings_of(args, ServerOptions, EngineOptions, others=OTHERS)
    # Without a host each block goes to disk as it comes.
    options: EngineOptions = replace(of_record(EngineOptions, settings), kv_host_memory=0)
    model = settings.get("model")
    folder = _check(options, model)
    given = prompt_files.read(args.files, args.format)
    hf_logging.set_verbosity(logging.ERROR)
    with progress_bars(shown=not args.json) as progress:
        engine = Engine(model, options)
        try:
            prompts = asyncio.run(_tokenized(engine, given, args.role))
            begin = time.perf_counter()
            found = _warm(engine, prompts, progress, quiet=args.json)
            seconds = time.perf_counter() - begin
        finally:
            engine.close()
    sums = {name: sum(getattr(each, name) for each in found) for name in _NUMBERS}
    total = _Outcome(f"{len(found)} prompts", **sums)
    if args.json:
        whose = {"folder": str(folder), "model": engine.model_name, "namespace": engine.namespace.digest.hex()}
        record = {**whose, "prompts": list(map(asdict, found)), **sums, "seconds": seconds}
        print(json.dumps(record, indent=2))
    else:
        print(f"{total.line} in {seconds:.1f} s, in {folder}")
    if total.missing:
        why = "--kv-disk-size is too small, or the disk is full or failed"
        print(f"ktc: {total.missing} tokens in whole blocks are not kept: {why}", file=sys.stderr)
    return 1 if total.missing else 0


def _check(options: EngineOptions, model: str | None) -> Path:
    """Return the folder. ValueError: nothing would be kept, or another process would not let it."""
    from ktcompile.cache.folder import opened
    from ktcompile.engine.namespace import weights_of
    from ktcompile.models.load import locate

    if options.kv_disk_path is None:
        raise ValueError("there is nothing to warm without --kv-disk-path: what is not on disk ends with the process")
    if not options.enable_prefix_caching:
        raise ValueError("--no-enable-prefix-caching keeps nothing")
    if weights_of(locate(model), options) is None:
        raise ValueError("the model has no files by which another process could know that it has the same")
    folder = options.kv_disk_path.expanduser().absolute()
    if folder.is_dir():
        with opened(folder, writing=True):  # whether it can be shows before the model is loaded
            pass
    return folder


async def _tokenized(
    engine: Engine, given: Sequence[prompt_files.Given], role: str | None
) -> list[prompt_files.Prompt]:
    """Return all prompts. ValueError: the model cannot take one."""
    from ktcompile.server.prompts import Prompts

    prompts = Prompts(engine.tokenizer)
    try:
        found = [prompt for each in given for prompt in await prompt_files.tokenized(prompts, each, role)]
    finally:
        prompts.close()
    for prompt in found:
        if len(prompt.ids) >= engine.max_model_len:
            limit = f"the model has {engine.max_model_len} positions, of which an answer needs one"
            raise ValueError(f"{prompt.name} has {len(prompt.ids)} tokens; {limit}")
    return found


def _warm(engine: Engine, prompts: Sequence[prompt_files.Prompt], progress: Progress, quiet: bool) -> list[_Outcome]:
    from ktcompile.engine.warm import warm

    task = progress.add_task("Computing", total=sum(len(prompt.ids) for prompt in prompts))
    warmed = []
    for prompt in prompts:
        each = warm(engine, prompt.ids, prompt.cache_salt, partial(progress.advance, task))
        progress.advance(task, each.there)
        warmed.append(_Outcome(prompt.name, **asdict(each)))
        if not quiet:
            print(warmed[-1].line, flush=True)
    result = []
    for prompt, one in zip(prompts, warmed, strict=True):
        kept = engine.kept_tokens(prompt.ids, prompt.cache_salt)  # others may have taken its place meanwhile
        whole = len(prompt.ids) // engine.block_size * engine.block_size
        result.append(replace(one, kept=kept, missing=whole - kept))
    return result
