"""What a folder of records has at a start: looked up in the index, and in the records where that does not know."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ktcompile.cache.index import Entry
from ktcompile.cache.names import is_bad, is_unfinished, key_of
from ktcompile.cache.record import MOST_HEADER_BYTES, Header, RecordError, parse
from ktcompile.cache.vfs import Folder, read_up_to


@dataclass(slots=True)
class Found:
    """What is in a folder.

    entries: records that can be reached, parents before children. damaged: names of files that say that they are
    records and are none. lost: names of records of another version, or whose parent is not there. unfinished, bad:
    names of what was being written, and of what is in quarantine. unknown: records that the index did not know. unread:
    names of records that could not be read now.
    """

    entries: list[Entry] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    unknown: list[Entry] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)


def scan(folder: Folder, known: Iterable[Entry], now: float) -> Found:
    """Return what a folder has. known: of the index. OSError: the folder cannot be read."""
    by_key = {entry.key: entry for entry in known}
    found = Found()
    entries: dict[bytes, tuple[str, Entry]] = {}
    for name, size in sorted(folder.files()):
        key = key_of(name)
        if key is None:
            if is_unfinished(name):
                found.unfinished.append(name)
            elif is_bad(name):
                found.bad.append(name)
            continue
        entry = by_key.get(key)
        if entry is None or entry.size != size:
            entry = _from_record(folder, name, key, size, now, found)
        if entry is not None:
            entries[key] = name, entry
    for key, (name, entry) in sorted(entries.items(), key=lambda item: item[1][1].position):
        before = entries.get(entry.parent)
        if entry.position == 0 or (before is not None and before[1].position + before[1].tokens == entry.position):
            found.entries.append(entry)
        else:
            del entries[key]
            found.lost.append(name)
    found.unknown = [entry for entry in found.unknown if entry.key in entries]
    return found


def read_header(folder: Folder, name: str) -> Header:
    """Return the header of a record, whose payload is not looked at but for its size. RecordError, OSError."""
    file = folder.open(name)
    try:
        size = folder.size(file)
        header = parse(read_up_to(folder, file, min(size, MOST_HEADER_BYTES)))
    finally:
        folder.close(file)
    if header.record_size != size:
        raise RecordError("short", f"it has {size} bytes of {header.record_size}")
    return header


def entry_of(header: Header, now: float) -> Entry:
    """Return what the index keeps of a record that was written now, or found."""
    block = header.block
    names = block.key, block.parent, block.namespace
    return Entry(*names, block.position, len(block.token_ids), header.record_size, header.raw_size, now, now)


def _from_record(folder: Folder, name: str, key: bytes, size: int, now: float, found: Found) -> Entry | None:
    try:
        header = read_header(folder, name)
        if header.block.key != key or header.record_size != size:
            raise RecordError("other", "it has the name of another")
    except RecordError as error:
        (found.lost if error.reason == "version" else found.damaged).append(name)
        return None
    except FileNotFoundError:
        return None
    except OSError:
        found.unread.append(name)
        return None
    entry = entry_of(header, now)
    found.unknown.append(entry)
    return entry
