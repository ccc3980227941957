"""Folders of caches: the user's own, which nobody else may write to and which are reached by no link."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path


def open_folder(path: Path) -> int:
    """Return a descriptor of a folder. OSError: it is missing, a link, another's, or others may write to it."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        check_owner(os.fstat(folder), path, stat.S_ISDIR)
    except BaseException:
        os.close(folder)
        raise
    return folder


def check_owner(facts: os.stat_result, path: Path, is_kind: Callable[[int], bool]) -> None:
    """PermissionError: others than the user could have written it, or it is of another kind."""
    if not is_kind(facts.st_mode):
        raise PermissionError(errno.EPERM, "it is of another kind than the cache makes", str(path))
    if facts.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, "it belongs to another user", str(path))
    if facts.st_mode & 0o022:
        raise PermissionError(errno.EPERM, "other users may write to it", str(path))


def caches_folder() -> Path:
    """Return where ktcompile keeps its caches where nobody says otherwise."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # As its specification says, a path that is not absolute is none.
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "ktcompile"
