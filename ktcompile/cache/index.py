"""What is known of records without opening them: a SQLite file that may be deleted at any time.

It spares reading each header at a start, and keeps what records do not say: when a block was last used and until when
it is pinned. Nothing that is served depends on it; whatever goes wrong with it is a warning, and it is made anew.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable
from contextlib import closing
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from ktcompile.cache.block_id import KEY_SIZE
from ktcompile.log import logger

FILE = "index.sqlite3"
_VERSION = 1


@dataclass(slots=True)
class Entry:
    """A record that is on disk.

    position: tokens before the block. tokens: in it. size: bytes of the file. raw_size: of keys and values. written,
    used: seconds since 1970. pinned: until when, in the same; 0: it is not; inf: for good.
    """

    key: bytes
    parent: bytes
    namespace: bytes
    position: int
    tokens: int
    size: int
    raw_size: int
    written: float
    used: float
    pinned: float = 0.0


_COLUMNS = tuple(field.name for field in fields(Entry))


class Index:
    """The index of a folder. read_only: of one that another process writes to."""

    def __init__(self, folder: Path, read_only: bool = False) -> None:
        self._path, self._read_only = folder / FILE, read_only
        self._lock = threading.Lock()
        self._database: sqlite3.Connection | None = None
        try:
            self._database = self._opened()
        except (sqlite3.Error, OSError) as error:
            self._give_up(error)
            if not read_only:
                self._start_anew()

    def entries(self) -> list[Entry]:
        """Return what it has of records, which may be wrong; nothing where it cannot be read."""
        with self._lock:
            if self._database is None:
                return []
            try:
                rows = self._database.execute(f"SELECT {', '.join(_COLUMNS)} FROM records").fetchall()
            except sqlite3.Error as error:
                self._give_up(error)
                if not self._read_only:
                    self._start_anew()
                return []
        return [Entry(*row) for row in rows if _is_sound(row)]

    def put(self, entries: Iterable[Entry]) -> None:
        """Add records, or say anew what is known of them."""
        places = ", ".join("?" * len(_COLUMNS))
        self._change(f"INSERT OR REPLACE INTO records VALUES ({places})", [astuple(entry) for entry in entries])

    def remove(self, keys: Iterable[bytes]) -> None:
        """Forget records."""
        self._change("DELETE FROM records WHERE key = ?", [(key,) for key in keys])

    def close(self) -> None:
        """Give up the file."""
        with self._lock:
            if self._database is not None:
                self._database.close()
            self._database = None

    def _change(self, statement: str, rows: list[tuple[object, ...]]) -> None:
        with self._lock:
            if self._database is None or self._read_only or not rows:
                return
            try:
                with self._database:
                    self._database.executemany(statement, rows)
            except sqlite3.Error as error:
                self._give_up(error)

    def _opened(self) -> sqlite3.Connection:
        if self._path.is_symlink():
            raise OSError(f"{self._path} is a link")
        where = f"{self._path.absolute().as_uri()}?mode={'ro' if self._read_only else 'rwc'}"
        database = sqlite3.connect(where, uri=True, check_same_thread=False, timeout=1.0)
        try:
            if self._read_only:
                return database
            with closing(database.execute("PRAGMA journal_mode = WAL")) as cursor:
                cursor.fetchall()
            database.execute("PRAGMA synchronous = NORMAL")
            if database.execute("PRAGMA user_version").fetchone() != (_VERSION,):
                database.execute("DROP TABLE IF EXISTS records")
                rest = ", ".join(_COLUMNS[1:])
                database.execute(f"CREATE TABLE records (key BLOB PRIMARY KEY, {rest}) WITHOUT ROWID")
                database.execute(f"PRAGMA user_version = {_VERSION}")
                database.commit()
        except BaseException:
            database.close()
            raise
        return database

    def _start_anew(self) -> None:
        try:
            for suffix in ("", "-wal", "-shm"):
                self._path.with_name(FILE + suffix).unlink(missing_ok=True)
            self._database = self._opened()
        except (sqlite3.Error, OSError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        logger.warning("The index %s is not used: %s", self._path, error)
        if self._database is not None:
            self._database.close()
        self._database = None


def _is_sound(row: tuple[object, ...]) -> bool:
    names, numbers, times = row[:3], row[3:7], row[7:]
    return (
        all(isinstance(name, bytes) and len(name) == KEY_SIZE for name in names)
        and all(isinstance(number, int) and number >= 0 for number in numbers)
        and all(isinstance(time, float) for time in times)
    )
