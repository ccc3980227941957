"""The pool of blocks against a plain model of it, and the sizes of blocks."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ktcompile.kv.block_pool import BlockName, BlockPool
from ktcompile.kv.layout import LayerKV, block_bytes, blocks_for, num_blocks


def called(number):
    """Return the name of some content."""
    return BlockName(b"%d" % number, b"parent", (number, number + 1))


class PoolMachine(RuleBasedStateMachine):
    """Sequences take, share, name and release blocks; a list says in which order free blocks have to go."""

    @initialize(size=st.integers(1, 12))
    def begin(self, size):
        self.pool = BlockPool(size)
        self.size = size
        self.tables: list[list[int]] = []
        self.content: dict[int, BlockName | None] = dict.fromkeys(range(size))  # name that finds the block
        self.free = list(range(size))  # the next to go is the first
        self.keys = 0

    @rule(count=st.integers(0, 6))
    def take(self, count):
        taken = self.pool.take(count)
        if count > len(self.free):
            assert taken is None
            return
        assert taken == self.free[:count]
        del self.free[:count]
        self.content |= dict.fromkeys(taken)
        self.tables.append(taken)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data):
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)
        held = {block for other in self.tables for block in other}
        for block in reversed(table):
            if block not in held:
                self.free.insert(len(self.free) if self.content[block] else 0, block)

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data())
    def name_a_new_content(self, data):
        block = data.draw(st.sampled_from([b for table in self.tables for b in table]))
        if self.content[block] is None:
            self.keys += 1
            self.content[block] = called(self.keys)
        assert self.pool.name(block, self.content[block]) == block

    @precondition(lambda self: any(self.tables) and any(self.content.values()))
    @rule(data=st.data())
    def name_a_known_content(self, data):
        """Of two blocks with one content the first is found."""
        block = data.draw(st.sampled_from([b for table in self.tables for b in table]))
        first = data.draw(st.sampled_from([b for b, name in self.content.items() if name]))
        if self.content[block] is None:
            assert self.pool.name(block, self.content[first]) == first

    @precondition(lambda self: any(self.content.values()))
    @rule(data=st.data())
    def find_and_hold(self, data):
        block = data.draw(st.sampled_from([b for b, name in self.content.items() if name]))
        assert self.pool.find(self.content[block]) == block
        self.pool.hold(block)
        self.tables.append([block])
        if block in self.free:
            self.free.remove(block)

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data())
    def forget(self, data):
        block = data.draw(st.sampled_from([b for table in self.tables for b in table]))
        self.pool.forget(block)
        self.content[block] = None

    @invariant()
    def each_block_is_free_or_held(self):
        self.pool.check()
        held = [block for table in self.tables for block in table]
        assert [self.pool.holders(block) for block in range(self.size)] == [held.count(b) for b in range(self.size)]
        assert self.pool.num_held == len(set(held))
        assert self.pool.num_free == len(self.free)
        assert self.pool.num_free + self.pool.num_held == self.size

    @invariant()
    def a_name_finds_a_block_until_it_is_handed_out(self):
        assert [self.pool.name_of(block) for block in range(self.size)] == list(self.content.values())
        for number in range(1, self.keys + 1):
            name = called(number)
            assert self.pool.find(name) == next((b for b, content in self.content.items() if content == name), None)

    def teardown(self):
        for table in self.tables:
            self.pool.release(table)
        self.pool.check()
        assert self.pool.num_held == 0


TestPool = PoolMachine.TestCase


def test_the_end_of_a_sequence_is_given_up_before_its_beginning():
    pool = BlockPool(3)
    table = pool.take(3)
    for position, block in enumerate(table):
        pool.name(block, called(position))
    pool.release(table)
    pool.take(2)
    assert [pool.find(called(position)) for position in range(3)] == [table[0], None, None]


@pytest.mark.parametrize("other", [{"parent": b"other"}, {"token_ids": (1, 3)}, {"token_ids": (1,)}])
def test_a_key_alone_finds_nothing(other):
    """Museum 1 and 2. Two contents with one key, as if the hash had failed: the first is found by its tokens, the
    second never."""
    pool, name = BlockPool(2), called(1)
    first, second = pool.take(2)
    pool.name(first, name)
    collision = name._replace(**other)
    assert pool.find(collision) is None
    assert pool.name(second, collision) == first
    assert (pool.find(name), pool.find(collision), pool.name_of(second)) == (first, None, None)
    pool.check()


@pytest.mark.parametrize("wrong", ["release", "name", "forget"])
def test_blocks_that_nobody_holds(wrong):
    pool = BlockPool(2)
    calls = {"release": lambda: pool.release([1]), "name": lambda: pool.name(1, called(1))}
    with pytest.raises(AssertionError, match="nobody holds it"):
        calls.get(wrong, lambda: pool.forget(1))()


def test_a_pool_has_a_block():
    with pytest.raises(ValueError, match="num_blocks is 0"):
        BlockPool(0)


def test_bytes_of_blocks():
    qwen3_30b = [LayerKV(num_heads=4, key_dim=128, value_dim=128, element_bytes=2)] * 48
    assert block_bytes(qwen3_30b, 1) == 96 * 1024
    deepseek_v3 = [LayerKV(num_heads=1, key_dim=512 + 64, value_dim=0, element_bytes=2)] * 61
    assert block_bytes(deepseek_v3, 64) == 64 * 70_272
    int8 = LayerKV(num_heads=4, key_dim=128, value_dim=128, element_bytes=1, scale_bytes=4)
    assert block_bytes([int8], 16) == 16 * 4 * (2 * 128 + 2 * 4)
    assert block_bytes([qwen3_30b[0], int8], 1) == 2048 + 1056
    assert num_blocks(10**9, qwen3_30b, 64) == 10**9 // (64 * 96 * 1024)
    with pytest.raises(ValueError, match="one block of 64 positions takes 6,291,456"):
        num_blocks(6_291_455, qwen3_30b, 64)
    with pytest.raises(ValueError, match="no layer keeps"):
        num_blocks(1, [], 64)
    with pytest.raises(ValueError, match="sizes that cannot be"):
        LayerKV(0, 128, 128, 2)


def test_blocks_of_positions():
    assert [blocks_for(positions, 4) for positions in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]
