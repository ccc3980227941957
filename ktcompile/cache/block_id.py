"""Which block of a prefix is meant: by its key, and by everything that the key stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

KEY_SIZE = 32


@dataclass(frozen=True, slots=True)
class BlockId:
    """The keys and values of positions [position, position + len(token_ids)) of a sequence.

    key, parent, namespace: 32 bytes each, as `cache.key` makes them; namespace is the root, with the tenant's salt in
    it, and the parent of the first block. A key finds a block; only an equal `BlockId` proves that it is the one.
    """

    key: bytes
    parent: bytes
    namespace: bytes
    position: int
    token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if any(len(name) != KEY_SIZE for name in (self.key, self.parent, self.namespace)):
            raise ValueError(f"a key, a parent and a namespace have {KEY_SIZE} bytes each")
        if self.position < 0 or not self.token_ids:
            raise ValueError(f"a block has tokens at positions from 0 on, not {len(self.token_ids)} at {self.position}")


def chain(root: bytes, keys: Sequence[bytes], token_ids: Sequence[int], block_size: int) -> list[BlockId]:
    """Return the full blocks of a sequence, one for each of `keys`. root: the parent of the first.

    ValueError: there are more keys than full blocks of tokens.
    """
    if len(keys) * block_size > len(token_ids):
        raise ValueError(f"{len(keys)} keys are more than {len(token_ids)} tokens have blocks of {block_size}")
    starts = range(0, len(keys) * block_size, block_size)
    return [
        BlockId(key, parent, root, start, tuple(token_ids[start : start + block_size]))
        for key, parent, start in zip(keys, [root, *keys[:-1]], starts, strict=True)
    ]
