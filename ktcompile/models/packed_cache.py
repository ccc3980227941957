"""The folder of packed models on disk, which processes of one user share.

A file is written under a name of its own and renamed when it is whole, so that others see all of it or nothing; of two
that pack the same model at once the later one stays. Whoever has a file open keeps it, also when it is replaced.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import xxhash

from ktcompile import _native, env
from ktcompile.log import logger
from ktcompile.models.checkpoint import weight_files
from ktcompile.models.packed_file import VERSION, PackedFile, PackedFileError, PackedFileWriter
from ktcompile.models.tensor_files import header_text
from ktcompile.owned_folder import caches_folder, check_owner, open_folder
from ktcompile.quant import full_name

AUTO, OFF = "auto", "off"
# Goes up when the same checkpoint is to be stored otherwise: other codes, or other tensors.
_CONTENT = 1
_SUFFIX, _UNFINISHED = ".ktpacked", ".tmp"
# Bytes of weights from which a model is cached unless a folder is named: smaller ones are packed in a second.
_WORTH_IT = 256 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the cache. problem: why it cannot be read, else None; then model and weight_format are "?". kind:
    "weights", of a packed model, or "step", of an engine of one."""

    key: str
    path: Path
    model: str
    weight_format: str
    size: int
    written: float
    problem: str | None
    kind: str = "weights"


class PackedCache:
    """Packed models in a folder that is the user's own.

    Errors of the methods are OSError, which includes that the folder is another's, a link, or others may write to it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """Return where the file of a key is, or would be."""
        return self.folder / f"{key}{_SUFFIX}"

    def open(self, key: str) -> PackedFile | None:
        """Return an open file, None if there is none. PackedFileError: it is damaged or of another version."""
        try:
            folder = open_folder(self.folder)
        except FileNotFoundError:
            return None
        try:
            descriptor = os.open(self.path(key).name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        except FileNotFoundError:
            return None
        finally:
            os.close(folder)
        try:
            check_owner(os.fstat(descriptor), self.path(key), stat.S_ISREG)
            return PackedFile(descriptor, self.path(key))
        except BaseException:
            os.close(descriptor)
            raise

    @contextmanager
    def writing(self, key: str, needed: int) -> Iterator[PackedFileWriter]:
        """Give what writes the file of a key, which is there once the block has ended without an error. needed: bytes
        that the disk must have."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = open_folder(self.folder)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)  # until ours is locked: nobody may take it for one that was left
            _remove_unfinished(folder)
            disk = os.fstatvfs(folder)
            if disk.f_bavail * disk.f_frsize < needed:
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} for {needed} bytes", str(self.folder))
            name = f"{key}.{secrets.token_hex(4)}{_UNFINISHED}"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(name, flags, 0o600, dir_fd=folder)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it goes with the process
                fcntl.flock(folder, fcntl.LOCK_UN)
                yield PackedFileWriter(descriptor)
                os.fsync(descriptor)
                os.rename(name, self.path(key).name, src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                _unlink(name, folder)
                raise
            finally:
                os.close(descriptor)
            os.fsync(folder)
        finally:
            os.close(folder)

    def entries(self) -> list[Entry]:
        """Return all files, the newest first."""
        try:
            folder = open_folder(self.folder)
        except FileNotFoundError:
            return []
        try:
            keys = [name.removesuffix(_SUFFIX) for name in _names(folder) if name.endswith(_SUFFIX)]
        finally:
            os.close(folder)
        found = [entry for entry in map(self._entry, keys) if entry is not None]
        return sorted(found, key=lambda entry: -entry.written)

    def remove(self, key: str) -> None:
        """Remove a file. FileNotFoundError: there is none."""
        folder = open_folder(self.folder)
        try:
            os.unlink(self.path(key).name, dir_fd=folder)
        finally:
            os.close(folder)

    def _entry(self, key: str) -> Entry | None:
        path = self.path(key)
        try:
            facts = path.lstat()
        except FileNotFoundError:
            return None
        try:
            file = self.open(key)
        except (OSError, PackedFileError) as error:
            return Entry(key, path, "?", "?", facts.st_size, facts.st_mtime, str(error))
        if file is None:
            return None
        file.close()
        header = file.header
        what = header["model"], header["weight_format"], facts.st_size, facts.st_mtime
        return Entry(key, path, *what, None, header.get("kind", "weights"))


def cache_for(option: str | Path | None, model: Path) -> PackedCache | None:
    """Return the cache for a model, None for none.

    option: a folder; "off" or None; or "auto": what KTCOMPILE_PACKED_CACHE says, or else the user's folder for caches,
    but not for small models.
    """
    if option == AUTO:
        option = env.read().packed_cache or AUTO
    if option is None or option == OFF:
        return None
    if option != AUTO:
        return PackedCache(Path(option).expanduser())
    if sum(file.stat().st_size for file in weight_files(model)) < _WORTH_IT:
        return None
    return PackedCache(default_folder())


def default_folder() -> Path:
    """Return where packed models are where nobody says otherwise."""
    named = env.read().packed_cache
    if named not in (None, OFF, AUTO):
        return Path(named).expanduser()
    return caches_folder() / "packed"


def key_of(model: Path, weight_format: str) -> str:
    """Return the name of what a checkpoint is packed to: a hash of its configuration, of the names, sizes, times and
    headers of its files, and of how they are packed.

    All instruction sets read one layout, so none of them is part of it; the number of memory nodes is.
    ValueError: a file is damaged.
    """
    import ktcompile

    identity = {
        "files": file_facts(model),
        "config": (model / "config.json").read_text(),
        "weight_format": full_name(weight_format),
        "slices": len(_native.numa_nodes()),
        "versions": [VERSION, _CONTENT, _native.LAYOUT_VERSION, ktcompile.__version__, version("transformers")],
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(identity, sort_keys=True).encode())


def file_facts(model: Path) -> list[tuple[str, int, int, str]]:
    """Return name, size, time in nanoseconds and a hash of the header of each file of a model's weights; nothing where
    they are of another kind. ValueError: a file is damaged."""
    found = []
    for file in weight_files(model):
        facts = file.stat()
        header = xxhash.xxh3_128_hexdigest(header_text(file))
        found.append((file.name, facts.st_size, facts.st_mtime_ns, header))
    return found


def _remove_unfinished(folder: int) -> None:
    """Remove what processes that are gone were writing."""
    for name in _names(folder):
        if not name.endswith(_UNFINISHED):
            continue
        try:
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _unlink(name, folder)
        except BlockingIOError:
            pass  # it is being written
        finally:
            os.close(descriptor)


def _names(folder: int) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries]


def _unlink(name: str, folder: int) -> None:
    try:
        os.unlink(name, dir_fd=folder)
    except OSError as error:
        logger.debug("%s is left: %s", name, error)
