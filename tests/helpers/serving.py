"""A model of numbers that is served by the scheduler: it writes tokens into blocks and reads them from there."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

from ktcompile.kv.block_pool import BlockPool
from ktcompile.kv.layout import blocks_for
from ktcompile.scheduler.batch import Chunk, Step
from ktcompile.scheduler.policy import SchedulerOptions
from ktcompile.scheduler.scheduler import Scheduler


def next_token(token_ids: list[int]) -> int:
    """Return what the model says behind some tokens."""
    return zlib.crc32(repr(token_ids).encode())


def answer(prompt: list[int], count: int) -> list[int]:
    """Return what a request gets that runs alone."""
    token_ids = list(prompt)
    for _ in range(count):
        token_ids.append(next_token(token_ids))
    return token_ids[len(prompt) :]


@dataclass
class Client:
    """A request as its sender sees it. length: how many tokens it takes; less than max_tokens where it stops."""

    order: int
    prompt: list[int]
    length: int
    max_tokens: int
    deadline: float | None = None
    prompt_logits: bool = False
    root: bytes | None = bytes(32)
    tokens: list[int] = field(default_factory=list)
    logits: list[int] = field(default_factory=list)  # positions that it had logits of
    computed: int = 0  # of the present residency
    table: tuple[int, ...] = ()
    ended: str | None = None


class World:
    """A scheduler, its pool, the storage and the clients. Every step is checked before it is computed.

    content: which block holds what follows the other positions of some tokens, by root and all tokens up to its end:
    all that may be found, and is.
    """

    def __init__(self, options: SchedulerOptions, num_blocks: int) -> None:
        self.options = options
        self.now = 0.0
        self.pool = BlockPool(num_blocks)
        self.scheduler = Scheduler(options, self.pool, lambda: self.now)
        self.storage: list[int | None] = [None] * (num_blocks * options.block_size)
        self.clients: dict[str, Client] = {}
        self.first_tokens: list[int] = []
        self.step: Step | None = None
        self.preemptions = 0
        self.content: dict[tuple[bytes, tuple[int, ...]], int] = {}
        self.queries = self.hits = 0

    @property
    def left(self) -> dict[str, Client]:
        return {name: client for name, client in self.clients.items() if client.ended is None}

    def add(self, client: Client) -> str:
        name = f"r{client.order}"
        self.scheduler.add(
            name,
            client.prompt,
            client.max_tokens,
            deadline=client.deadline,
            prompt_logits=client.prompt_logits,
            root=client.root,
        )
        self.clients[name] = client
        return name

    def cancel(self, name: str) -> None:
        assert self.scheduler.cancel(name) == (self.clients[name].ended is None)
        self.clients[name].ended = self.clients[name].ended or "cancelled"

    def begin_step(self) -> None:
        """Expire and schedule, and check the step."""
        for name in self.scheduler.expire():
            client = self.clients[name]
            assert client.ended is None and client.deadline is not None and client.deadline <= self.now
            client.ended = "expired"
        assert not any(c.deadline is not None and c.deadline <= self.now for c in self.left.values())
        decoding = [name for name, c in self.left.items() if c.tokens and c.computed == self._known(c) - 1]
        started = {name for name, c in self.left.items() if c.computed}
        self.step = self.scheduler.schedule()
        if self.step is None:
            assert not self.left
            return
        self._check_step(self.step, decoding, started)

    def end_step(self) -> None:
        """Compute the step, and end the requests that are complete."""
        assert self.step is not None
        sampled = {}
        for chunk in self.step.chunks:
            value = self._compute(chunk)
            if value is not None:
                sampled[chunk.request_id] = value
        self.scheduler.update(sampled)
        for chunk in self.step.chunks:
            client = self.clients[chunk.request_id]
            if client.ended is None or chunk.samples:
                self._note_content(client, chunk)
            if client.ended is not None:
                continue
            client.computed = chunk.end
            client.logits += range(chunk.logits_from, chunk.end)
            if chunk.samples:
                if not client.tokens:
                    self.first_tokens.append(client.order)
                client.tokens.append(sampled[chunk.request_id])
                if len(client.tokens) == client.length:
                    client.ended = "complete"
                    self.scheduler.finish(chunk.request_id)
        self.step = None

    def finish(self) -> None:
        """Compute steps until all requests have ended; each goes on in the steps in which it is the oldest."""
        steps = sum(len(client.prompt) + 2 * client.length + 1 for client in self.left.values())
        for _ in range(steps + 2):
            if self.step is not None:
                self.end_step()
            self.check_pool()
            if not self.left:
                return
            self.begin_step()
        raise AssertionError("requests wait for ever")

    def check_pool(self) -> None:
        self.pool.check()
        self.scheduler.check()
        assert self.pool.num_free + self.pool.num_held == self.pool.num_blocks
        named = {block for block in range(self.pool.num_blocks) if self.pool.name_of(block) is not None}
        assert named == set(self.content.values())
        assert self.scheduler.prefix_cache_queries == self.queries and self.scheduler.prefix_cache_hits == self.hits
        if not self.left and self.step is None:
            assert self.pool.num_held == 0
            assert self.scheduler.num_running == self.scheduler.num_waiting == 0

    def check_client(self, client: Client) -> None:
        """Check what a request that ended was given."""
        assert client.tokens == answer(client.prompt, client.length)[: len(client.tokens)]
        if client.ended == "complete":
            first = 0 if client.prompt_logits else len(client.prompt) - 1
            assert client.logits == list(range(first, len(client.prompt) + client.length - 1))

    @staticmethod
    def _known(client: Client) -> int:
        return len(client.prompt) + len(client.tokens)

    def _check_step(self, step: Step, decoding: list[str], started: set[str]) -> None:
        options, clients = self.options, self.clients
        assert step.chunks, "nothing goes on"
        names = [chunk.request_id for chunk in step.chunks]
        orders = [clients[name].order for name in names]
        assert orders == sorted(set(orders))
        assert all(clients[name].ended is None for name in names)
        assert step.num_tokens <= options.max_num_batched_tokens
        assert len(names) <= self.scheduler.num_running <= options.max_num_seqs
        assert names[0] == min(self.left, key=lambda name: clients[name].order), "the oldest waits"
        # Preempted: the youngest of those that ran, none that is computed, and nobody begins then.
        self.preemptions += len(step.preempted)
        for name in step.preempted:
            clients[name].computed, clients[name].table = 0, ()
        if step.preempted:
            lowest = min(clients[name].order for name in step.preempted)
            assert lowest > max(orders)
            assert set(names) <= started
        prompts = [name for name in started - set(decoding) if name not in step.preempted]
        if prompts:
            assert min(prompts, key=lambda name: clients[name].order) in names, "decodes starve a prompt"
        assert set(decoding) <= {*names, *step.preempted}, "a decode waits"
        unfinished = [c for c in step.chunks if not c.samples]
        assert len(unfinished) <= 1, "a younger prompt was begun before an older one could end"
        begun = {start.request_id: start.num_cached_tokens for start in step.started}
        writers: dict[int, str] = {}
        tables = [chunk.block_table for chunk in step.chunks]
        for chunk in step.chunks:
            client = clients[chunk.request_id]
            known = client.prompt + client.tokens
            if not client.computed:
                self._check_start(client, chunk, begun.pop(chunk.request_id, None))
            assert chunk.begin == client.computed, "a token is computed twice, or not at all"
            self._hand_out(chunk.block_table[len(client.table) :])
            client.table = chunk.block_table
            assert list(chunk.token_ids) == known[chunk.begin : chunk.end] and chunk.token_ids
            assert chunk.samples == (chunk.end == len(known))
            assert chunk.samples or chunk.end % options.chunk_size == 0
            assert len(chunk.block_table) >= blocks_for(chunk.end, options.block_size)
            for block in chunk.block_table[chunk.begin // options.block_size :]:
                assert writers.setdefault(block, chunk.request_id) == chunk.request_id, "two requests write to a block"
                assert sum(block in table for table in tables) == 1, "a request writes to what another reads"
                assert self.pool.holders(block) == 1 and self.pool.name_of(block) is None
        assert not begun, "a request begins and computes nothing"

    def _check_start(self, client: Client, chunk: Chunk, num_cached_tokens: int | None) -> None:
        """Check that a request that begins has all blocks that there are for it, and no others."""
        size, known = self.options.block_size, client.prompt + client.tokens
        first = 0 if client.prompt_logits else len(client.prompt) - 1
        limit = client.logits[-1] + 1 if client.logits else first  # of positions whose logits are not wanted
        found = []
        if client.root is not None:
            for end in range(size, limit + 1, size):
                block = self.content.get((client.root, tuple(known[:end])))
                if block is None:
                    break
                found.append(block)
        assert chunk.block_table[: len(found)] == tuple(found)
        assert chunk.begin == len(found) * size, "a request computes what is there, or does not what is not"
        client.computed, client.table = chunk.begin, tuple(found)
        if num_cached_tokens is not None:
            assert num_cached_tokens == chunk.begin
            self.queries += len(client.prompt) * (client.root is not None)
            self.hits += chunk.begin

    def _hand_out(self, blocks: tuple[int, ...]) -> None:
        self.content = {key: block for key, block in self.content.items() if block not in blocks}

    def _note_content(self, client: Client, chunk: Chunk) -> None:
        size, known = self.options.block_size, client.prompt + client.tokens
        if client.root is not None:
            for end in range(chunk.begin // size * size + size, chunk.end + 1, size):
                self.content.setdefault((client.root, tuple(known[:end])), chunk.block_table[end // size - 1])

    def _compute(self, chunk: Chunk) -> int | None:
        """Write a chunk into its blocks; return the next token, of what is read from there."""
        size = self.options.block_size
        slots = [block * size + offset for block in chunk.block_table for offset in range(size)]
        for position, token in enumerate(chunk.token_ids, chunk.begin):
            self.storage[slots[position]] = token
        if not chunk.samples:
            return None
        read = [self.storage[slot] for slot in slots[: chunk.end]]
        return next_token(read)  # type: ignore[arg-type]
