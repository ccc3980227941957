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
    tokens: list[int] = field(default_factory=list)
    logits: list[int] = field(default_factory=list)  # positions that it had logits of
    computed: int = 0  # of the present residency
    ended: str | None = None


class World:
    """A scheduler, its pool, the storage and the clients. Every step is checked before it is computed."""

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

    @property
    def left(self) -> dict[str, Client]:
        return {name: client for name, client in self.clients.items() if client.ended is None}

    def add(self, client: Client) -> str:
        name = f"r{client.order}"
        self.scheduler.add(
            name, client.prompt, client.max_tokens, deadline=client.deadline, prompt_logits=client.prompt_logits
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
            clients[name].computed = 0
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
        held: dict[int, str] = {}
        for chunk in step.chunks:
            client = clients[chunk.request_id]
            known = client.prompt + client.tokens
            assert chunk.begin == client.computed, "a token is computed twice, or not at all"
            assert list(chunk.token_ids) == known[chunk.begin : chunk.end] and chunk.token_ids
            assert chunk.samples == (chunk.end == len(known))
            assert chunk.samples or chunk.end % options.chunk_size == 0
            assert len(chunk.block_table) >= blocks_for(chunk.end, options.block_size)
            for block in chunk.block_table:
                assert held.setdefault(block, chunk.request_id) == chunk.request_id, "two requests write to one block"
                assert self.pool.holders(block) == 1

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
