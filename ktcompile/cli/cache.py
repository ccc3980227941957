"""`ktc cache`: look after the keys and values of prefixes on disk."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ktcompile.cli import cache_warm
from ktcompile.cli.sizes import human

if TYPE_CHECKING:
    from ktcompile.cache.disk import DiskStore
    from ktcompile.cache.folder import Problem
    from ktcompile.cache.index import Entry

_EXAMPLES = """\
examples:
  ktc cache stat                                 # how much there is, by namespace (a model as it is computed, a tenant)
  ktc cache ls --json
  ktc cache fsck                                 # headers, parents, what is left of unfinished records; changes nothing
  ktc cache fsck --repair
  ktc cache scrub                                # reads every byte; damaged records are put aside
  ktc cache warm --kv-disk-path ~/kv --role system assistant.txt   # computed now, for the next start of `ktc serve`
  ktc cache pin 1e6a252f --ttl 86400             # a key of `ls`, or enough of it; keeps its prefix too
  ktc cache pin 1e6a252f --undo
  ktc cache export warm.ktkv --namespace 9f31    # for another machine of the same model and numerics
  ktc cache import warm.ktkv
  ktc cache clear --namespace 9f31

The folder is --dir, or ktcompile/kv in the user's folder of caches. Commands that change it are refused while a server
uses it. The exit status is 0, 1 if something is damaged, 2 if the question cannot be answered.
"""
_DAY = 86400.0


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `cache`."""
    parser = subparsers.add_parser(
        "cache",
        help="look after the prefix cache on disk",
        description="Look after the keys and values of prefixes on disk.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _action(actions, "ls", "list records", _ls, namespace=True)
    _action(actions, "stat", "sum up records by namespace", _stat)
    fsck = _action(actions, "fsck", "check headers, parents and leftovers", _fsck)
    fsck.add_argument("--repair", action="store_true", help="remove or put aside what is not whole")
    scrub = _action(actions, "scrub", "read all bytes and compare checksums", _scrub)
    scrub.add_argument("--dry-run", action="store_true", help="leave damaged records where they are")
    cache_warm.add_parser(actions)
    pin = _action(actions, "pin", "keep a record and those before it", _pin)
    pin.add_argument("key", metavar="KEY")
    pin.add_argument("--ttl", type=float, default=math.inf, metavar="SECONDS", help="for how long (default: for good)")
    pin.add_argument("--undo", action="store_true", help="take the pin back")
    export = _action(actions, "export", "write records to one file", _export, namespace=True)
    export.add_argument("file", type=Path, metavar="FILE")
    import_ = _action(actions, "import", "put the records of a file in", _import)
    import_.add_argument("file", type=Path, metavar="FILE")
    _action(actions, "clear", "remove records, and what is in quarantine", _clear, namespace=True)


def _action(
    actions: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    text: str,
    do: Callable[[argparse.Namespace, Path], int],
    namespace: bool = False,
) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.add_argument("--dir", type=Path, metavar="DIR", help="the folder (default: in the user's folder of caches)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    if namespace:
        parser.add_argument("--namespace", default="", metavar="DIGITS", help="only of namespaces that begin so")
    parser.set_defaults(run=run, do=do)
    return parser


def run(args: argparse.Namespace) -> int:
    """Do what was asked for, and return 1 where something is damaged."""
    from ktcompile.cache.folder import default_folder

    folder = args.dir.expanduser() if args.dir else default_folder()
    try:
        status: int = args.do(args, folder)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"the cache in {folder} cannot be used: {error}") from error
    return status


def _ls(args: argparse.Namespace, folder: Path) -> int:
    from ktcompile.cache.folder import opened

    with opened(folder, writing=False) as store:
        entries = [entry for entry in store.entries() if _chosen(args, entry)]
    records = [_record(entry) for entry in sorted(entries, key=lambda entry: -entry.used)]
    lines = []
    for entry in sorted(entries, key=lambda entry: -entry.used):
        place = f"{entry.position}..{entry.position + entry.tokens}"
        days = (time.time() - entry.used) / _DAY
        pinned = "  pinned" if entry.pinned else ""
        lines.append(
            f"{entry.key.hex()[:12]}  {entry.namespace.hex()[:8]}  {place:>15}  {human(entry.size):>10}  "
            f"used {days:.1f} days ago{pinned}"
        )
    total = sum(entry.size for entry in entries)
    lines.append(f"{len(entries)} records, {human(total)}, in {folder}")
    return _print(args, {"folder": str(folder), "records": records}, lines)


def _stat(args: argparse.Namespace, folder: Path) -> int:
    from ktcompile.cache.folder import opened

    with opened(folder, writing=False) as store:
        entries = store.entries()
    spaces = []
    for name in sorted({entry.namespace for entry in entries}):
        own = [entry for entry in entries if entry.namespace == name]
        spaces.append(
            {
                "namespace": name.hex(),
                "records": len(own),
                "tokens": sum(entry.tokens for entry in own),
                "bytes": sum(entry.size for entry in own),
                "raw_bytes": sum(entry.raw_size for entry in own),
                "pinned": sum(entry.pinned > 0 for entry in own),
            }
        )
    lines = []
    for s in spaces:
        size = human(float(str(s["bytes"])))
        lines.append(f"{str(s['namespace'])[:12]}  {s['records']:>7} records  {s['tokens']:>9} tokens  {size}")
    total, raw = sum(entry.size for entry in entries), sum(entry.raw_size for entry in entries)
    lines.append(f"{len(entries)} records, {human(total)} for {human(raw)} of keys and values, in {folder}")
    return _print(args, {"folder": str(folder), "bytes": total, "raw_bytes": raw, "namespaces": spaces}, lines)


def _fsck(args: argparse.Namespace, folder: Path) -> int:
    from ktcompile.cache.folder import opened, problems

    found = problems(folder, payloads=False)
    if args.repair:
        with opened(folder, writing=True):  # it tidies up as it opens
            pass
    return _report(args, folder, found, repaired=args.repair)


def _scrub(args: argparse.Namespace, folder: Path) -> int:
    from ktcompile.cache.folder import opened, problems
    from ktcompile.cache.names import key_of

    found = problems(folder, payloads=True)
    if not args.dry_run:
        with opened(folder, writing=True) as store:
            for problem in found:
                key = key_of(problem.name)
                if key is not None:
                    store.quarantine(key)
    return _report(args, folder, found, repaired=not args.dry_run)


def _pin(args: argparse.Namespace, folder: Path) -> int:
    from ktcompile.cache.folder import opened

    with opened(folder, writing=True) as store:
        entry = _entry(store, args.key)
        until = 0.0 if args.undo else time.time() + args.ttl
        store.pin(entry.key, until)
    verb = "no longer pinned" if args.undo else "pinned"
    record: dict[str, object] = {"key": entry.key.hex(), "pinned_until": _time(until)}
    return _print(args, record, [f"{entry.key.hex()[:12]} is {verb}"])


def _export(args: argparse.Namespace, folder: Path) -> int:
    from ktcompile.cache.folder import export

    count = export(folder, args.file, lambda entry: _chosen(args, entry))
    return _print(args, {"file": str(args.file), "records": count}, [f"{count} records are in {args.file}"])


def _import(args: argparse.Namespace, folder: Path) -> int:
    from ktcompile.cache.folder import import_

    stored, count = import_(folder, args.file)
    return _print(args, {"records": count, "stored": stored}, [f"{stored} of {count} records are in {folder}"])


def _clear(args: argparse.Namespace, folder: Path) -> int:
    from ktcompile.cache.folder import opened

    with opened(folder, writing=True) as store:
        chosen = [entry for entry in store.entries() if _chosen(args, entry)]
        for entry in chosen:
            store.remove(entry.key)
        store.forget_quarantine()
    total = sum(entry.size for entry in chosen)
    record = {"folder": str(folder), "removed": len(chosen), "bytes": total}
    return _print(args, record, [f"removed {len(chosen)} records, {human(total)}"])


def _chosen(args: argparse.Namespace, entry: Entry) -> bool:
    return entry.namespace.hex().startswith(args.namespace)


def _entry(store: DiskStore, digits: str) -> Entry:
    found = [entry for entry in store.entries() if len(digits) >= 4 and entry.key.hex().startswith(digits)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} records have a key that begins with {digits!r}; `ktc cache ls` lists keys")
    return found[0]


def _record(entry: Entry) -> dict[str, object]:
    record = {name: value.hex() if isinstance(value, bytes) else value for name, value in asdict(entry).items()}
    return {**record, "pinned": _time(entry.pinned)}


def _time(seconds: float) -> float | str | None:
    """Return a time as JSON has it, which knows no infinity."""
    if not seconds:
        return None
    return "for good" if math.isinf(seconds) else seconds


def _report(args: argparse.Namespace, folder: Path, found: list[Problem], repaired: bool) -> int:
    records = [asdict(problem) for problem in found]
    lines = [f"{record['kind']}: {record['name']}: {record['what']}" for record in records]
    damaged = sum(record["kind"] != "in quarantine" for record in records)
    lines.append(f"{damaged} files of {folder} are not whole" + (" and were put aside or removed" if repaired else ""))
    _print(args, {"folder": str(folder), "problems": records, "repaired": repaired}, lines)
    return 1 if damaged else 0


def _print(args: argparse.Namespace, record: dict[str, object], lines: list[str]) -> int:
    print(json.dumps(record, indent=2) if args.json else "\n".join(lines))
    return 0
