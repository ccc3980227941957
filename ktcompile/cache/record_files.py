"""The files of records: how one is published, read, put aside and removed."""

from __future__ import annotations

from contextlib import suppress

from ktcompile.cache.names import bad_name, is_bad, key_of, record_name, unfinished_name
from ktcompile.cache.record import RecordError
from ktcompile.cache.vfs import Folder, read_up_to, write_all

# Records in quarantine that are kept for somebody to look at, beside the budget.
MOST_BAD = 4


class RecordFiles:
    """Records in a folder, by the keys of their blocks. Methods raise OSError.

    A file that should go and could not be removed is removed by a later call: each that changes the folder fails while
    there is one, so that there are never many.
    """

    def __init__(self, folder: Folder, sync: bool) -> None:
        self._folder, self._sync = folder, sync
        self._left: set[str] = set()

    def publish(self, key: bytes, parts: tuple[bytes | memoryview, ...]) -> None:
        """Write a record that is seen whole or not at all; after an error it is not there."""
        self.unlink(())
        name, final = unfinished_name(key), record_name(key)
        try:
            file = self._folder.create(name)
            try:
                for part in parts:
                    write_all(self._folder, file, part)
                if self._sync:
                    self._folder.sync(file)
            finally:
                self._folder.close(file)
            self._folder.rename(name, final)
            if self._sync:
                self._folder.sync_names()
        except OSError:
            with suppress(OSError):
                self.unlink((name, final))  # a call that fails may have done its work
            raise

    def contents(self, key: bytes, size: int) -> bytes:
        """Return a record, which has `size` bytes. RecordError: it has not. FileNotFoundError."""
        file = self._folder.open(record_name(key))
        try:
            found = self._folder.size(file)
            if found != size:
                raise RecordError("short" if found < size else "long", f"it has {found} bytes of {size}")
            record = read_up_to(self._folder, file, size)
        finally:
            self._folder.close(file)
        if len(record) != size:
            raise RecordError("short", f"{len(record)} bytes of {size} could be read")
        return record

    def set_aside(self, name: str) -> None:
        """Rename a record so that nobody reads it; where there are enough of these it is removed."""
        self._left.add(name)
        key = key_of(name)
        if key is not None and sum(is_bad(other) for other, _ in self._folder.files()) < MOST_BAD:
            with suppress(OSError):
                self._folder.rename(name, bad_name(key))
        self.unlink(())

    def remove(self, keys: list[bytes]) -> None:
        """Remove records."""
        self.unlink(tuple(map(record_name, keys)))

    def unlink(self, names: tuple[str, ...]) -> None:
        """Remove files, and those that could not be removed before."""
        failure = None
        self._left.update(names)
        for name in sorted(self._left):
            try:
                self._folder.unlink(name)
            except FileNotFoundError:
                pass
            except OSError as error:
                failure = failure or error
                continue
            self._left.discard(name)
        if failure is not None:
            raise failure
