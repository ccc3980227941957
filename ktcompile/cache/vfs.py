"""The few operations on files that the disk tier needs, all of them in one folder."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import Protocol

from ktcompile.owned_folder import check_owner, open_folder

_LOCK = "lock"


class Folder(Protocol):
    """Files of one folder, by their names. Methods raise OSError; `read` and `write` may do less than asked."""

    def files(self) -> list[tuple[str, int]]:
        """Return names and sizes."""

    def create(self, name: str) -> int:
        """Return a descriptor of a new, empty file that can be written. FileExistsError: there is one, or a link."""

    def open(self, name: str) -> int:
        """Return a descriptor of a file that can be read. OSError: it is a link, or others could have written it."""

    def size(self, file: int) -> int:
        """Return the bytes of an open file."""

    def read(self, file: int, size: int, offset: int) -> bytes:
        """Return up to `size` bytes; none at the end of the file."""

    def write(self, file: int, data: memoryview) -> int:
        """Append bytes and return how many."""

    def sync(self, file: int) -> None:
        """Return once a file's bytes would outlast a loss of power."""

    def close(self, file: int) -> None: ...

    def rename(self, name: str, to: str) -> None:
        """Give a file another name, atomically, in place of what had it."""

    def unlink(self, name: str) -> None: ...

    def sync_names(self) -> None:
        """Return once the names of files would outlast a loss of power."""

    def free_bytes(self) -> int:
        """Return what the disk has left for us."""

    def lock(self) -> bool:
        """Become the one process that may change the folder, as long as it lives; False: another is."""

    def shut(self) -> None:
        """Give up the folder and its lock."""


class RealFolder:
    """A folder of the disk, which is made where it is missing. OSError: it is a link, another's, or others may write
    to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = open_folder(path)
        self._lock: int | None = None

    def files(self) -> list[tuple[str, int]]:
        found = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                try:
                    facts = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue  # it was there a moment ago
                if stat.S_ISREG(facts.st_mode):
                    found.append((entry.name, facts.st_size))
        return found

    def create(self, name: str) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(name, flags, 0o600, dir_fd=self._folder)

    def open(self, name: str) -> int:
        # Not blocked by a pipe that has the name of a file.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        file = os.open(name, flags, dir_fd=self._folder)
        try:
            check_owner(os.fstat(file), self.path / name, stat.S_ISREG)
        except BaseException:
            os.close(file)
            raise
        return file

    def size(self, file: int) -> int:
        return os.fstat(file).st_size

    def read(self, file: int, size: int, offset: int) -> bytes:
        return os.pread(file, size, offset)

    def write(self, file: int, data: memoryview) -> int:
        return os.write(file, data)

    def sync(self, file: int) -> None:
        os.fdatasync(file)

    def close(self, file: int) -> None:
        os.close(file)

    def rename(self, name: str, to: str) -> None:
        os.rename(name, to, src_dir_fd=self._folder, dst_dir_fd=self._folder)

    def unlink(self, name: str) -> None:
        os.unlink(name, dir_fd=self._folder)

    def sync_names(self) -> None:
        os.fsync(self._folder)

    def free_bytes(self) -> int:
        disk = os.fstatvfs(self._folder)
        return disk.f_bavail * disk.f_frsize

    def lock(self) -> bool:
        if self._lock is None:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.open(_LOCK, flags, 0o600, dir_fd=self._folder)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(file)
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    return False
                raise
            self._lock = file
        return True

    def shut(self) -> None:
        for file in (self._lock, self._folder):
            if file is not None:
                os.close(file)
        self._lock, self._folder = None, -1  # no number that another file may get


def read_up_to(folder: Folder, file: int, size: int) -> bytes:
    """Return the first `size` bytes of an open file, fewer where it has no more."""
    parts, done = [], 0
    while done < size and (part := folder.read(file, size - done, done)):
        parts.append(part)
        done += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def write_all(folder: Folder, file: int, data: bytes | memoryview) -> None:
    """Append all of `data`."""
    view, done = memoryview(data), 0
    while done < len(view):
        written = folder.write(file, view[done:])
        if written <= 0:
            raise OSError(errno.EIO, "nothing was written")
        done += written
