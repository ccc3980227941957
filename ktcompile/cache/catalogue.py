"""What is known of the records of a disk tier, in memory: which there are, which go first, which are pinned."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from ktcompile.cache.index import Entry
from ktcompile.cache.policy import Policy
from ktcompile.cache.tree import Node, Tree


class Catalogue:
    """Records by key, each behind its parent, chosen by `policy`. Any thread may call; nothing here waits for a file.

    clock: seconds since 1970. Where methods return records, these are known no more, and are the caller's to remove.
    """

    def __init__(self, policy: Policy[bytes], clock: Callable[[], float]) -> None:
        self._policy, self._clock = policy, clock
        self._lock = threading.Lock()
        self._tree: Tree[Entry] = Tree()
        self._used: set[bytes] = set()  # since `used` was asked
        self._last = 0.0

    def __len__(self) -> int:
        return len(self._tree)

    def now(self) -> float:
        """Return the time, which never goes back."""
        with self._lock:
            return self._now()

    def get(self, key: bytes) -> Entry | None:
        """Return a record; None: there is none."""
        with self._lock:
            return self._tree.get(key)

    def entries(self) -> list[Entry]:
        """Return all records, parents before children."""
        with self._lock:
            return self._tree.nodes()

    def ask(self, key: bytes) -> bool:
        """Return whether there is a record, and say that it was asked for."""
        with self._lock:
            self._policy.touch(key, self._now())
            return key in self._tree

    def use(self, key: bytes) -> bool:
        """Note that a record is used now. False: there is none."""
        with self._lock:
            entry = self._tree.get(key)
            if entry is None:
                return False
            entry.used = self._now()
            self._used.add(key)
            return True

    def used(self) -> list[Entry]:
        """Return the records that were used since this was asked last; they stay."""
        with self._lock:
            used = [entry for key in self._used if (entry := self._tree.get(key)) is not None]
            self._used.clear()
            return used

    def takes(self, node: Node) -> bool:
        """Return whether a block may come: it is not there, and what it continues is."""
        with self._lock:
            return self._tree.takes(node)

    def reserve(self, entry: Entry) -> tuple[bool, list[Entry]]:
        """Have the policy know a record that is to come, and return whether it fits, and those that went for it.
        `add` or `refuse` it then."""
        with self._lock:
            return self._insert(entry, entry.used)

    def evict(self, size: int, entry: Entry) -> list[Entry]:
        """Return records of so many bytes that go, as far as there are any; not one that is to come."""
        with self._lock:
            self._policy.pin(entry.key)
            gone = [removed for key in self._policy.evict(size, entry.used) for removed in self._cut(key)]
            self._policy.unpin(entry.key)
            return gone

    def add(self, entry: Entry) -> bool:
        """Have a record found that was reserved. False: what it continues has gone, and it is refused."""
        with self._lock:
            if self._tree.takes(entry):
                self._tree.add(entry)
                return True
            self._policy.remove(entry.key)
            return False

    def refuse(self, entry: Entry) -> None:
        """Forget a record that was reserved and will not come."""
        with self._lock:
            self._policy.remove(entry.key)

    def cut(self, key: bytes) -> list[Entry]:
        """Return a record and those behind it, children before parents."""
        with self._lock:
            return self._cut(key)

    def pin(self, key: bytes, until: float) -> Entry | None:
        """Keep a record, and those before it, until a time; 0: no longer. Return it, None: there is none."""
        with self._lock:
            entry = self._tree.get(key)
            if entry is not None:
                self._set_pin(entry, until)
            return entry

    def expire(self) -> list[Entry]:
        """End pins whose time is over, and return records that nobody used for the policy's time to live."""
        with self._lock:
            now = self._now()
            for entry in self._tree.nodes():
                if 0 < entry.pinned <= now:
                    self._set_pin(entry, 0.0)
            return [entry for key in self._policy.expire(now) for entry in self._cut(key)]

    def replace(self, entries: Sequence[Entry]) -> list[Entry]:
        """Have these be the records, parents before children, and return those of them that the policy gives up."""
        with self._lock:
            for entry in self._tree.nodes():
                self._cut(entry.key)
            for entry in entries:
                self._tree.add(entry)
            gone: list[Entry] = []
            kept = self._kept(entries)
            first = min((entry.used for entry in entries), default=0.0)
            # What is pinned comes before all else. A block is used no later than what it continues, so those before it
            # come later, or with it.
            for entry in sorted(entries, key=lambda e: (e.key not in kept, e.used, e.position)):
                if entry.key in self._tree:
                    until, entry.pinned = entry.pinned, 0.0
                    gone += self._insert(entry, first if entry.key in kept else entry.used)[1]
                    if entry.key in self._policy and until > self._last:
                        self._set_pin(entry, until)
            return gone

    def check(self) -> None:
        """Assert that the policy and the tree know the same records."""
        with self._lock:
            entries = self._tree.nodes()
            assert len(self._policy) == len(entries), "the policy knows other records"
            assert all(entry.key in self._policy for entry in entries)
            assert self._policy.used == sum(entry.size for entry in entries)

    def _now(self) -> float:
        self._last = max(self._last, self._clock())
        return self._last

    def _kept(self, entries: Sequence[Entry]) -> set[bytes]:
        """Return the keys of records that are pinned, and of those before them. entries: parents before children."""
        kept: set[bytes] = set()
        for entry in reversed(entries):
            if entry.pinned > self._last or entry.key in kept:
                kept |= {entry.key, entry.parent}
        return kept

    def _insert(self, entry: Entry, now: float) -> tuple[bool, list[Entry]]:
        tenant = entry.namespace.hex()
        fits, keys = self._policy.insert(entry.key, entry.parent, entry.size, entry.position, now, tenant)
        gone = [removed for key in keys for removed in self._cut(key)]
        if not fits and entry.key in self._tree:
            gone += self._cut(entry.key)
        return fits, gone

    def _cut(self, key: bytes) -> list[Entry]:
        gone = self._tree.cut(key)
        for entry in gone:
            self._policy.remove(entry.key)
        return gone

    def _set_pin(self, entry: Entry, until: float) -> None:
        if entry.pinned:
            self._policy.unpin(entry.key)
        if until:
            self._policy.pin(entry.key)
        entry.pinned = until
