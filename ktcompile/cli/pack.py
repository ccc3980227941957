"""`ktc pack`: keep models packed on disk, and look after those that are."""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ktcompile.cli.progress import progress_bars
from ktcompile.cli.sizes import human
from ktcompile.quant import ALIASES, FORMATS, check_format

if TYPE_CHECKING:
    from ktcompile.models.packed_cache import Entry, PackedCache

_EXAMPLES = """\
examples:
  ktc pack ~/models/Qwen3-30B-A3B --weight-format int4     # the next `ktc generate --model` of it starts in seconds
  ktc pack Qwen/Qwen3-30B-A3B --output /fast/packed        # then: ktc generate --packed-cache /fast/packed ...
  ktc pack --list
  ktc pack --verify                                        # reads every byte of all of them
  ktc pack --remove 1e6a252f                               # a key of --list, or as much of it as tells it apart

`ktcompile.load` and `ktc generate` pack a large model when they first load it, and find what is packed here. A model
whose files or configuration have changed is packed anew. The exit status is 0, 1 if a packed model is damaged or could
not be written, 2 if the question cannot be answered.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `pack`."""
    parser = subparsers.add_parser(
        "pack",
        help="pack a model on disk, so that it starts in seconds",
        description="Pack a model on disk, so that it starts in seconds, or look after packed models.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="a folder or a hub id; for --remove also a key")
    add(
        "--weight-format",
        "--format",
        choices=("auto", *ALIASES, *FORMATS),
        default="auto",
        help="how the experts' weights are stored (default: auto, as in the model)",
    )
    add("--output", type=Path, metavar="DIR", help="where packed models are (default: the user's folder of caches)")
    do = parser.add_mutually_exclusive_group()
    do.add_argument("--verify", action="store_true", help="read what is packed and compare checksums: of MODEL, or all")
    do.add_argument("--list", action="store_true", help="list packed models and their sizes")
    do.add_argument("--remove", action="store_true", help="remove what is packed of MODEL, whatever its format")
    add("--json", action="store_true", help="print one JSON object")
    add("--quiet", action="store_true", help="no progress on stderr")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Pack, verify, list or remove, and return 1 where a packed model is damaged or could not be written."""
    from transformers.utils import logging as hf_logging

    from ktcompile.models.packed_cache import PackedCache, default_folder

    hf_logging.set_verbosity(logging.ERROR)
    check_format(args.weight_format)
    cache = PackedCache(args.output.expanduser() if args.output else default_folder())
    try:
        if args.list:
            return _print(args, cache, [_record(entry) for entry in _chosen(args, cache)])
        if args.verify:
            return _verify(args, cache)
        if args.remove:
            return _remove(args, cache)
        return _pack(args, cache)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"packed models in {cache.folder} cannot be used: {error}") from error


def _pack(args: argparse.Namespace, cache: PackedCache) -> int:
    from ktcompile.models import packed_model, streaming
    from ktcompile.models.load import folder_of, locate
    from ktcompile.models.packed_cache import key_of
    from ktcompile.models.packed_file import PackedFileError

    if args.model is None:
        raise ValueError("name a model: a folder or a hub id; `ktc pack --list` shows what is packed")
    begin = time.perf_counter()
    folder = folder_of(locate(args.model))
    key = key_of(folder, args.weight_format)
    try:
        file = cache.open(key)
    except PackedFileError:
        file = None  # it is replaced
    if file is not None:
        file.close()
    done = file is not None
    if not done:
        with progress_bars(shown=not args.quiet) as progress:
            model = streaming.load(
                folder, args.weight_format, lambda layers: progress.track(layers, description="Packing experts")
            )
            done = packed_model.store(
                cache,
                key,
                folder,
                args.weight_format,
                model,
                lambda layers: progress.track(layers, description="Writing experts"),
            )
    entries = [entry for entry in cache.entries() if entry.key == key] if done else []
    records = [{**_record(entry), "was_there": file is not None} for entry in entries]
    if not args.quiet and not args.json and entries:
        what = "was packed already" if file is not None else f"packed in {time.perf_counter() - begin:.1f} s"
        print(f"{what}: {human(entries[0].size)} in {entries[0].path}")
    if args.json:
        print(json.dumps({"folder": str(cache.folder), "models": records}, indent=2))
    return 0 if done else 1


def _verify(args: argparse.Namespace, cache: PackedCache) -> int:
    records = []
    for entry in _chosen(args, cache):
        records.append({**_record(entry), "problem": entry.problem or _damage(cache, entry)})
    status = _print(args, cache, records)
    return 1 if any(record["problem"] for record in records) else status


def _damage(cache: PackedCache, entry: Entry) -> str | None:
    """Return what is wrong with a file, all of which is read."""
    from ktcompile.models.packed_file import PackedFileError, verify
    from ktcompile.models.packed_model import payloads

    try:
        file = cache.open(entry.key)
        if file is None:
            return "it was removed meanwhile"
        try:
            verify(file.map(), payloads(file.header))
        finally:
            file.close()
    except (OSError, PackedFileError) as error:
        return str(error)
    return None


def _remove(args: argparse.Namespace, cache: PackedCache) -> int:
    if args.model is None:
        raise ValueError("name what to remove: a model, or a key that `ktc pack --list` shows")
    chosen = _chosen(args, cache)
    for entry in chosen:
        cache.remove(entry.key)
    return _print(args, cache, [_record(entry) for entry in chosen], "removed ")


def _chosen(args: argparse.Namespace, cache: PackedCache) -> list[Entry]:
    """Return what is packed of a model, or all where none is named. ValueError: nothing is."""
    entries = cache.entries()
    if args.model is None:
        return entries
    # A model of the hub is known by the folder of its download.
    named = str(Path(args.model).expanduser().resolve())
    hub = f"models--{args.model.replace('/', '--')}"
    found = [e for e in entries if e.model == named or hub in Path(e.model).parts]
    found = found or [e for e in entries if len(args.model) >= 4 and e.key.startswith(args.model)]
    if not found:
        raise ValueError(f"nothing is packed of {args.model} in {cache.folder}; `ktc pack --list` shows what is")
    return found


def _record(entry: Entry) -> dict[str, object]:
    return {
        "key": entry.key,
        "path": str(entry.path),
        "model": entry.model,
        "weight_format": entry.weight_format,
        "kind": entry.kind,
        "bytes": entry.size,
        "written": entry.written,
        "problem": entry.problem,
    }


def _print(args: argparse.Namespace, cache: PackedCache, records: list[dict[str, object]], verb: str = "") -> int:
    if args.json:
        print(json.dumps({"folder": str(cache.folder), "models": records}, indent=2))
        return 0
    for r in records:
        state = f"DAMAGED: {r['problem']}" if r["problem"] else "whole" if args.verify else ""
        size = human(float(str(r["bytes"])))
        what = f"step of {r['weight_format']}" if r["kind"] == "step" else str(r["weight_format"])
        print(f"{verb}{str(r['key'])[:12]}  {size:>10}  {what:15}  {r['model']}  {state}".rstrip())
    total = sum(int(str(r["bytes"])) for r in records)
    print(f"{verb}{len(records)} packed models, {human(total)}, in {cache.folder}")
    return 0
