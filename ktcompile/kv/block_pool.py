"""Who holds which block of the storage of keys and values: numbers of blocks alone, no memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class BlockPool:
    """Hands out the blocks [0, num_blocks) and counts who holds each.

    A block is free or held, by one or several. A free block keeps its content until it is handed out again, so one
    that has a key can be found by it and held once more. Blocks without a key are handed out first, then those with
    one, the longest free first; of the blocks that are released together the last go first, since a block of a
    sequence is of no use without those before it.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks is {num_blocks}; a pool needs 1 block or more")
        self.num_blocks = num_blocks
        # The next to be handed out is the first.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._holders = [0] * num_blocks
        self._key_of: dict[int, bytes] = {}
        self._with_key: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """How many blocks nobody holds."""
        return len(self._free)

    @property
    def num_held(self) -> int:
        """How many blocks are held, each counted once."""
        return self.num_blocks - self.num_free

    def holders(self, block: int) -> int:
        """Return how many hold a block."""
        return self._holders[block]

    def take(self, count: int) -> list[int] | None:
        """Return `count` blocks that were free, each held once, its content and key given up; None: so many are not."""
        if count > self.num_free:
            return None
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self._holders[block] = 1
            self._forget(block)
        return taken

    def hold(self, block: int) -> None:
        """Hold a block whose content is wanted once more, a free one or one that others hold."""
        if self._holders[block] == 0:
            del self._free[block]
        self._holders[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Give up one hold on each block of a sequence, which are given from its first position on."""
        for block in reversed(list(blocks)):
            assert self._holders[block] > 0, f"block {block} is released and nobody holds it"
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free[block] = None
                if block not in self._key_of:
                    self._free.move_to_end(block, last=False)

    def name(self, block: int, key: bytes) -> int:
        """Say what a held block contains, and return the block that is found by `key` from now on.

        That is another one where its content was there already: the first that was named.
        """
        assert self._holders[block] > 0, f"block {block} is named and nobody holds it"
        assert self._key_of.get(block, key) == key, f"block {block} has another key"
        first = self._with_key.setdefault(key, block)
        if first == block:
            self._key_of[block] = key
        return first

    def find(self, key: bytes) -> int | None:
        """Return the block with this content, held or free; `hold` it before the next `take`."""
        return self._with_key.get(key)

    def check(self) -> None:
        """Assert that each block is free or held, and that keys and blocks belong together."""
        assert min(self._holders) >= 0
        assert set(self._free) == {block for block, count in enumerate(self._holders) if count == 0}
        assert self._with_key == {key: block for block, key in self._key_of.items()}
        named = [block in self._key_of for block in self._free]
        assert named == sorted(named), "a free block with a key is handed out before one without"

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._with_key[key]
