"""Who holds which block of the storage of keys and values: numbers of blocks alone, no memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple


class BlockName(NamedTuple):
    """What a full block contains.

    key: by which it is found. parent: the key of the block before it. token_ids: of its positions. The key is made of
    the other two, which are compared all the same when a block is found: so it is the right one, and those before it
    were too.
    """

    key: bytes
    parent: bytes
    token_ids: tuple[int, ...]


class BlockPool:
    """Hands out the blocks [0, num_blocks) and counts who holds each.

    A block is free or held, by one or several. A free block keeps its content until it is handed out again, so one
    that has a name can be found by it and held once more. Blocks without a name are handed out first, then those with
    one, the longest free first; of the blocks that are released together the last go first, since a block of a
    sequence is of no use without those before it. Nobody writes to a block that has a name.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks is {num_blocks}; a pool needs 1 block or more")
        self.num_blocks = num_blocks
        # The next to be handed out is the first.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._holders = [0] * num_blocks
        self._name_of: dict[int, BlockName] = {}
        self._with_key: dict[bytes, int] = {}
        self.num_evicted = 0  # blocks that were handed out again and had a name

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

    def name_of(self, block: int) -> BlockName | None:
        """Return the name by which a block is found; None: it is found by none."""
        return self._name_of.get(block)

    def take(self, count: int) -> list[int] | None:
        """Return `count` blocks that were free, each held once, its content and name given up; None: so many are
        not."""
        if count > self.num_free:
            return None
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self._holders[block] = 1
            self.num_evicted += block in self._name_of
            self._drop_name(block)
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
                if block not in self._name_of:
                    self._free.move_to_end(block, last=False)

    def name(self, block: int, name: BlockName) -> int:
        """Say what a held block contains, and return the block that has its key from now on.

        That is another one where its content was there already: the first that was named.
        """
        assert self._holders[block] > 0, f"block {block} is named and nobody holds it"
        assert self._name_of.get(block, name) == name, f"block {block} has another name"
        first = self._with_key.setdefault(name.key, block)
        if first == block:
            self._name_of[block] = name
        return first

    def find(self, name: BlockName) -> int | None:
        """Return the block with this content, held or free; `hold` it before the next `take`."""
        block = self._with_key.get(name.key)
        return block if block is not None and self._name_of[block] == name else None

    def forget(self, block: int) -> None:
        """Have a held block found by no name any more: what it contains may be wrong."""
        assert self._holders[block] > 0, f"block {block} is forgotten and nobody holds it"
        self._drop_name(block)

    def check(self) -> None:
        """Assert that each block is free or held, and that names and blocks belong together."""
        assert min(self._holders) >= 0
        assert set(self._free) == {block for block, count in enumerate(self._holders) if count == 0}
        assert self._with_key == {name.key: block for block, name in self._name_of.items()}
        named = [block in self._name_of for block in self._free]
        assert named == sorted(named), "a free block with a name is handed out before one without"

    def _drop_name(self, block: int) -> None:
        name = self._name_of.pop(block, None)
        if name is not None:
            del self._with_key[name.key]
