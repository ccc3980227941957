"""What is kept in a tier of the prefix cache and what goes: the interface of all policies."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a tier may hold.

    capacity: bytes. ttl: seconds after its last use from which a block is given up; None: it may stay. quotas: bytes
    of single tenants. quota: bytes of each tenant that is not named there; None: all of the capacity.
    """

    capacity: int
    ttl: float | None = None
    quota: int | None = None
    quotas: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ValueError(f"capacity is {self.capacity}; a tier has 1 byte or more")
        if self.ttl is not None and not self.ttl > 0:
            raise ValueError(f"ttl is {self.ttl}; it must be positive")
        named = {f"of {tenant!r}": quota for tenant, quota in self.quotas.items()}
        for whose, quota in (named if self.quota is None else named | {"of others": self.quota}).items():
            if quota < 0:
                raise ValueError(f"the quota {whose} is {quota}; it must not be negative")

    def quota_of(self, tenant: str) -> int | None:
        """Return the bytes that blocks of a tenant may take; None: only the capacity limits them."""
        return self.quotas.get(tenant, self.quota)


class Policy(Protocol[K]):
    """Knows the blocks of one tier by key and chooses which of them go; it moves no bytes.

    A block is given up after all its children that the tier has; its parent may be elsewhere. Blocks that are pinned
    stay, and so do those before them. Sizes are bytes, `position` counts the tokens before a block, `now` is seconds of
    any clock that does not run backwards.
    """

    limits: Limits

    def __len__(self) -> int: ...

    def __contains__(self, key: K) -> bool: ...

    @property
    def used(self) -> int:
        """Bytes of all blocks."""

    def used_by(self, tenant: str) -> int:
        """Return the bytes of a tenant's blocks."""

    def insert(
        self, key: K, parent: K | None, size: int, position: int, now: float, tenant: str = ""
    ) -> tuple[bool, list[K]]:
        """Return whether a block that is not here is from now on, and the blocks that went, in the order to drop them.

        False: others are worth more, or those that could go do not make enough room. Even then some may have gone.
        """

    def touch(self, key: K, now: float) -> None:
        """Say that a request asked for a block, whether it is here or not; those before it are told first."""

    def evict(self, size: int, now: float) -> list[K]:
        """Return blocks that went, at least `size` bytes of them if so many may go."""

    def expire(self, now: float) -> list[K]:
        """Return blocks that went since nobody used them for the time to live."""

    def remove(self, key: K) -> bool:
        """Forget a block that was lost, pins and all; its children stay. False: it is not here."""

    def pin(self, key: K) -> bool:
        """Keep a block until it is unpinned as often as it was pinned. False: it is not here."""

    def unpin(self, key: K) -> bool:
        """Take one pin back. False: the block was lost."""
