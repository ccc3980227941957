"""Receipts: the tokens of a prompt came from the device, the host or the disk, or were computed; always all of them."""

from __future__ import annotations

from collections import Counter

from helpers.fault_folder import Disk, Fault, FaultFolder
from helpers.serving import Client
from helpers.tiered_world import TieredWorld
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ktcompile.engine.receipt import Receipt, receipt_of
from ktcompile.scheduler.batch import Chunk, Start
from ktcompile.scheduler.policy import SchedulerOptions
from ktcompile.scheduler.request import RequestTooLongError

BLOCK, BLOCKS, LONGEST = 2, 16, 30
ROOTS = st.sampled_from([b"a" * 32, b"a" * 32, b"a" * 32, b"b" * 32, None])


class Noting(TieredWorld):
    """A world with the receipts of its requests.

    computed: by request, the positions of its prompt that were computed before its first token, in one residency.
    written: what a load wrote into blocks of the device, in bytes by request.
    """

    def __init__(self, slots: int, folder: FaultFolder | None, disk_after_hits: int) -> None:
        options = SchedulerOptions(
            max_num_seqs=4, max_num_batched_tokens=11, max_model_len=LONGEST + 8, block_size=BLOCK, chunk_size=4
        )
        super().__init__(options, BLOCKS, slots, 50, folder, disk_after_hits)
        self.receipts: dict[str, Receipt] = {}
        self.computed: dict[str, set[int]] = {}
        self.written: Counter[str] = Counter()

    def write(self, block: int, payload: memoryview) -> None:
        super().write(block, payload)
        (owner,) = [r.request_id for r in self.scheduler._running if r.loading and block in r.block_table]
        self.written[owner] += len(payload)

    def begin_step(self) -> None:
        super().begin_step()
        if self.step is None:
            return
        for name in self.step.preempted:
            self.computed.pop(name, None)
            self.written.pop(name, None)
        for start in self.step.started:
            self.note(start, next(chunk for chunk in self.step.chunks if chunk.request_id == start.request_id))

    def note(self, start: Start, chunk: Chunk) -> None:
        """Check the receipt of a request that begins with a chunk."""
        name, prompt = start.request_id, self.clients[start.request_id].prompt
        assert name not in self.receipts, "a request has two receipts"
        receipt = self.receipts[name] = receipt_of(start, len(prompt), BLOCK, self.scheduler.recompute)
        of_tiers = (receipt.device_tokens, receipt.host_tokens, receipt.disk_tokens)
        assert min(of_tiers) >= 0 and all(tokens % BLOCK == 0 for tokens in of_tiers)
        assert sum(of_tiers) + receipt.computed_tokens == receipt.prompt_tokens == len(prompt)
        assert chunk.begin == sum(of_tiers) and receipt.computed_tokens >= 1
        assert receipt.host_bytes + receipt.disk_bytes == self.written[name]
        assert receipt.host_bytes >= 8 * receipt.host_tokens and receipt.disk_bytes >= 8 * receipt.disk_tokens
        assert receipt.load_seconds >= 0 and (start.loaded is not None or receipt.load_seconds == 0)
        assert self.clients[name].root is not None or sum(of_tiers) == 0

    def _compute(self, chunk: Chunk) -> int | None:
        prompt = len(self.clients[chunk.request_id].prompt)
        places = self.computed.setdefault(chunk.request_id, set())
        new = set(range(chunk.begin, min(chunk.end, prompt)))
        assert not new & places, "a position is computed twice"
        places |= new
        return super()._compute(chunk)

    def end_step(self) -> None:
        """Where it has its first token, a prompt was computed as its receipt says."""
        assert self.step is not None
        first = [c.request_id for c in self.step.chunks if c.samples and not self.clients[c.request_id].tokens]
        super().end_step()
        for name in first:
            computed = self.computed[name]
            if self.clients[name].ended != "cancelled" and not self.preempted(name):
                prompt = len(self.clients[name].prompt)
                assert computed == set(range(prompt - self.receipts[name].computed_tokens, prompt))

    def preempted(self, name: str) -> bool:
        """Whether a request began anew after its receipt was written."""
        requests = self.scheduler._requests
        return name in requests and requests[name].num_preemptions > 0


class Receipts(RuleBasedStateMachine):
    """Requests with common beginnings, of which tiers have some; threads that do what they like; damage; aborts."""

    @initialize(
        slots=st.sampled_from([0, 3, 40]),
        fault=st.none() | st.builds(Fault, at=st.integers(8, 60), kind=st.just("flip"), of=st.just(("read",))),
        on_disk=st.booleans(),
        at_once=st.booleans(),
    )
    def begin(self, slots: int, fault: Fault | None, on_disk: bool, at_once: bool) -> None:
        self.disk = Disk()
        folder = FaultFolder(self.disk, fault) if on_disk else None
        self.world = Noting(slots, folder, 0 if at_once or not slots else 1)
        self.order = 0

    @rule(
        shared=st.sampled_from([0, 3, 6, 9, 9]),
        kind=st.integers(0, 1),
        own=st.integers(1, 5),
        length=st.sampled_from([1, 2, 7]),
        root=ROOTS,
        prompt_logits=st.sampled_from([False, False, False, True]),
        wait=st.sampled_from([None, None, None, 5.0]),
    )
    def add(
        self, shared: int, kind: int, own: int, length: int, root: bytes | None, prompt_logits: bool, wait: float | None
    ) -> None:
        prompt = [kind * 100 + i for i in range(2 * shared)] + [1000 + self.order] * own
        deadline = None if wait is None else self.world.now + wait
        self.order += 1
        try:
            self.world.add(Client(self.order, prompt, length, length, deadline, prompt_logits, root))
        except RequestTooLongError:
            return

    @precondition(lambda self: self.world.step is None and self.world.left)
    @rule(seconds=st.sampled_from([0.01, 0.5, 4.0]))
    def begin_step(self, seconds: float) -> None:
        self.world.now += seconds
        self.world.begin_step()

    @precondition(lambda self: self.world.step is not None)
    @rule(seconds=st.sampled_from([0.0, 0.3]))
    def end_step(self, seconds: float) -> None:
        self.world.now += seconds  # what prompts take is measured from the first that took any time
        self.world.end_step()

    @rule(steps=st.sampled_from([3, 20, 60]), loads=st.sampled_from([0, 1, 50, 50]))
    def go_on(self, steps: int, loads: int) -> None:
        """Let steps follow one another, each as long as a few loads take."""
        for _ in range(steps):
            if self.world.step is not None:
                self.world.end_step()
            self.world.storers.run(50)
            self.world.loaders.run(loads)
            if not self.world.left:
                return
            self.world.now += 0.1
            self.world.begin_step()

    @rule(count=st.integers(1, 10))
    def load(self, count: int) -> None:
        self.world.loaders.run(count)

    @rule(count=st.integers(1, 30))
    def store(self, count: int) -> None:
        self.world.storers.run(count)

    @precondition(lambda self: self.world.left)
    @rule(which=st.integers(0, 100))
    def abort(self, which: int) -> None:
        names = sorted(self.world.loading) or sorted(self.world.left)
        self.world.cancel(names[which % len(names)])

    @precondition(lambda self: len(self.world.arena))
    @rule(place=st.integers(0, 1 << 20))
    def damage(self, place: int) -> None:
        self.world.arena[place % len(self.world.arena)] ^= 1

    @precondition(lambda self: self.disk.data)
    @rule(which=st.integers(0, 100), place=st.integers(0, 1 << 20))
    def damage_record(self, which: int, place: int) -> None:
        content = self.disk.data[sorted(self.disk.data)[which % len(self.disk.data)]]
        if content:
            content[place % len(content)] ^= 1

    @precondition(lambda self: self.world.step is None)
    @rule()
    def push_out(self) -> None:
        """All free blocks are handed out to others."""
        self.world.scheduler.give_back()
        blocks = self.world.pool.take(self.world.pool.num_free)
        assert blocks is not None
        self.world.pool.release(blocks)

    @invariant()
    def pool_is_sound(self) -> None:
        if hasattr(self, "world"):
            self.world.check_pool()

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        for _ in range(2000):
            if self.world.step is None and not self.world.left:
                break
            self.go_on(1, 50)
        assert not self.world.left
        for name, client in self.world.clients.items():
            self.world.check_client(client)
            assert client.ended != "complete" or name in self.world.receipts
        receipts, counters = self.world.receipts.values(), self.world.tiers.counters
        for tier in ("host", "disk"):
            assert sum(getattr(r, f"{tier}_tokens") for r in receipts) <= BLOCK * counters[f"promoted_{tier}"]


TestReceipts = Receipts.TestCase
TestReceipts.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


class Story:
    """A world with three slots of host memory and a folder, and prompts that begin with the same nine blocks."""

    def __init__(self) -> None:
        self.disk = Disk()
        self.world = Noting(3, FaultFolder(self.disk), 0)

    def add(self, blocks: int = 9, length: int = 1) -> str:
        prompt = [*range(BLOCK * blocks), 1000 + len(self.world.clients)]
        return self.world.add(Client(len(self.world.clients), prompt, length, length, None, False, b"a" * 32))

    def run(self) -> None:
        while self.world.left or self.world.step is not None:
            if self.world.step is not None:
                self.world.end_step()
            self.world.storers.run(100)
            self.world.loaders.run(100)
            if self.world.left:
                self.world.begin_step()

    def ask(self, blocks: int = 9) -> tuple[int, int, int, int]:
        """Return where a prompt came from: device, host, disk, computed."""
        name = self.add(blocks)
        self.run()
        r = self.world.receipts[name]
        return r.device_tokens, r.host_tokens, r.disk_tokens, r.computed_tokens

    def push_out(self) -> None:
        self.world.scheduler.give_back()
        blocks = self.world.pool.take(BLOCKS)
        assert blocks is not None
        self.world.pool.release(blocks)


def test_each_mix_of_tiers_adds_up() -> None:
    story = Story()
    assert story.ask() == (0, 0, 0, 19)
    assert story.ask() == (18, 0, 0, 1)
    story.push_out()
    assert story.ask() == (0, 6, 12, 1)
    story.push_out()
    assert story.ask(2) == (0, 4, 0, 1)
    assert story.ask() == (4, 2, 12, 1)
    story.push_out()
    for content in story.disk.data.values():
        content[-1] ^= 1
    assert story.ask() == (0, 6, 0, 13)
    assert story.world.tiers.counters["disk_verify_failed"] > 0


def test_loads_that_are_late_or_aborted_and_preemptions_add_up() -> None:
    story = Story()
    story.ask()
    story.push_out()
    late = story.add()
    story.world.begin_step()
    assert story.world.loading == {late}
    story.world.now += 4.0
    story.run()
    receipt = story.world.receipts[late]
    assert (receipt.device_tokens, receipt.host_tokens, receipt.disk_tokens) == (0, 0, 0)
    assert receipt.computed_tokens == 19 and receipt.load_seconds == 4.0
    story.push_out()
    aborted = story.add()
    story.world.begin_step()
    story.world.cancel(aborted)
    story.world.loaders.run(100)
    assert aborted not in story.world.receipts
    counters = story.world.tiers.counters
    assert counters["load_late"] > 0 and counters["load_cancelled"] > 0
    several = [story.add(3, length=8) for _ in range(6)]
    story.run()
    assert story.world.scheduler.num_preemptions > 0 and story.world.receipts.keys() >= set(several)
