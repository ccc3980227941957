"""The scheduler: each rule by itself, and a state machine that does anything at any time."""

from __future__ import annotations

import pytest
from helpers.serving import Client, World
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ktcompile.kv.block_pool import BlockPool
from ktcompile.scheduler.policy import SchedulerOptions, prefill_end, seconds_until
from ktcompile.scheduler.request import QueueFullError, RequestTooLongError
from ktcompile.scheduler.scheduler import Scheduler

OPTIONS = SchedulerOptions(
    max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64, block_size=4, chunk_size=8, max_queued_requests=8
)


def world(num_blocks: int = 64, **changes: int) -> World:
    options = {name: getattr(OPTIONS, name) for name in SchedulerOptions.__slots__} | changes
    return World(SchedulerOptions(**options), num_blocks)


def client(order: int, prompt: int, length: int = 4, **others) -> Client:
    return Client(order, [order * 1000 + i for i in range(prompt)], length, others.pop("max_tokens", length), **others)


def ranges(world: World) -> dict[str, tuple[int, int]]:
    """Return what one more step computes."""
    world.begin_step()
    found = {chunk.request_id: (chunk.begin, chunk.end) for chunk in world.step.chunks}
    world.end_step()
    return found


def test_a_prompt_is_cut_at_multiples_of_the_chunk_alone():
    one = world()
    one.add(client(0, 37, 2))
    assert [ranges(one)["r0"] for _ in range(4)] == [(0, 16), (16, 32), (32, 37), (37, 38)]


def test_decodes_and_a_prompt_share_a_step():
    """Museum 27."""
    one = world()
    for order in range(2):
        one.add(client(order, 3, 20))
    assert ranges(one) == {"r0": (0, 3), "r1": (0, 3)}
    one.add(client(2, 30))
    # 14 tokens are left, which reach one multiple of 8.
    assert ranges(one) == {"r0": (3, 4), "r1": (3, 4), "r2": (0, 8)}
    assert ranges(one) == {"r0": (4, 5), "r1": (4, 5), "r2": (8, 16)}


def test_a_younger_prompt_has_tokens_where_all_older_ones_end():
    one = world()
    one.add(client(0, 12))
    one.add(client(1, 6))
    one.add(client(2, 3))
    # 4 tokens are left behind the first; 6 do not fit, and 3 would be before their turn.
    assert ranges(one) == {"r0": (0, 12)}
    assert ranges(one) == {"r0": (12, 13), "r1": (0, 6), "r2": (0, 3)}


def test_no_more_run_than_may():
    one = world()
    for order in range(6):
        one.add(client(order, 2, 2))
    assert list(ranges(one)) == ["r0", "r1", "r2", "r3"]
    assert (one.scheduler.num_running, one.scheduler.num_waiting, one.scheduler.num_queued_tokens) == (4, 2, 4)
    ranges(one)
    assert list(ranges(one)) == ["r4", "r5"]


def test_the_youngest_gives_up_its_blocks_and_goes_on_later():
    one = world(num_blocks=5)
    one.add(client(0, 7, 8))
    one.add(client(1, 5, 8))
    one.add(client(2, 4, 2))
    # A block beside those of the prompt is left for each that runs, so the third waits.
    assert ranges(one) == {"r0": (0, 7), "r1": (0, 5)}
    ranges(one)
    ranges(one)  # now the first has 3 blocks and the second 2
    one.begin_step()
    assert one.step.preempted == ()
    one.end_step()
    preempted = []
    while one.left:
        one.begin_step()
        preempted += one.step.preempted
        one.end_step()
        one.check_pool()
    assert preempted == ["r1"]
    assert one.first_tokens == [0, 1, 2]
    for each in one.clients.values():
        one.check_client(each)


def test_nobody_begins_in_a_step_that_preempts():
    one = world(num_blocks=4)
    one.add(client(0, 8, 8))
    one.add(client(1, 3, 8))
    ranges(one)
    one.add(client(2, 1, 1))
    one.begin_step()
    assert (one.step.preempted, [c.request_id for c in one.step.chunks]) == ((), ["r0", "r1"])
    one.end_step()
    while not one.step or not one.step.preempted:
        if one.step:
            one.end_step()
        one.begin_step()
    assert one.step.preempted == ("r1",) and one.scheduler.num_waiting == 2


def test_what_ends_during_a_step_keeps_its_blocks_until_then():
    one = world(num_blocks=4)
    one.add(client(0, 7, 4))
    one.begin_step()
    one.cancel("r0")
    assert one.pool.num_held == 2
    with pytest.raises(ValueError, match="'r0' is served already"):
        one.add(client(0, 3))
    one.end_step()
    assert one.pool.num_held == 0
    one.add(client(0, 3, 1))
    assert ranges(one) == {"r0": (0, 3)}
    assert not one.scheduler.cancel("r0")
    with pytest.raises(KeyError):
        one.scheduler.finish("r0")


def test_logits_are_wanted_of_the_last_position_or_of_all():
    one = world()
    one.add(client(0, 12, 3))
    one.add(client(1, 12, 3, prompt_logits=True))
    one.finish()
    assert one.clients["r0"].logits == [11, 12, 13]
    assert one.clients["r1"].logits == list(range(14))


def test_a_deadline_ends_what_waits_and_what_runs():
    one = world(max_num_seqs=1)
    one.add(client(0, 3, 9, deadline=5.0))
    one.add(client(1, 3, 9, deadline=5.0))
    one.add(client(2, 3, 9, deadline=6.0))
    assert list(ranges(one)) == ["r0"]
    one.now = 4.9
    assert one.scheduler.expire() == []
    one.now = 5.0
    assert ranges(one) == {"r2": (0, 3)}
    assert [each.ended for each in one.clients.values()] == ["expired", "expired", None]


def test_a_queue_has_an_end():
    one = world(max_num_seqs=1, max_queued_tokens=20)
    one.add(client(0, 8, 9))
    ranges(one)
    one.add(client(1, 30))  # alone, whatever the limit is
    with pytest.raises(QueueFullError, match=r"1 requests with 30 tokens wait; 8 and 20 may; try again in about 1 s"):
        one.add(client(2, 1))
    other = world(max_num_seqs=1)
    for order in range(8):
        other.add(client(order, 2))
    with pytest.raises(QueueFullError, match="8 requests with 16 tokens wait"):
        other.add(client(8, 2))
    assert other.scheduler.num_waiting == 8


def test_nobody_waits_longer_than_may_be():
    one = world(max_num_seqs=1, max_queued_requests=100, max_queue_seconds=10.0)
    one.add(client(0, 4, 2))
    ranges(one)
    for order in (1, 2, 3):  # nobody waited so far: how long they would is not known
        one.add(client(order, 4, 2))
    for _ in range(2):
        one.now += 2.0  # each takes two steps of two seconds
        ranges(one)
    with pytest.raises(
        QueueFullError, match="3 requests wait, and one more would for about 12 s; it may for 10"
    ) as full:
        for order in range(4, 30):
            one.now += 2.0
            ranges(one)
            one.add(client(order, 4, 2))
            one.add(client(order + 100, 4, 2))
    assert 1 <= full.value.retry_after <= 60
    waiting = one.scheduler.num_waiting
    while waiting:  # once fewer wait there is room again
        one.now += 2.0
        ranges(one)
        waiting = one.scheduler.num_waiting
    one.add(client(1000, 4, 2))


def test_when_to_try_again_is_what_waits_by_the_speed_of_prompts():
    one = world(max_num_seqs=1, max_queued_requests=2)
    one.add(client(0, 16, 20))
    one.begin_step()
    one.now += 2.0  # 8 tokens a second
    one.end_step()
    one.begin_step()
    one.now += 50.0  # a decode says nothing about prompts
    one.end_step()
    for order in (1, 2):
        one.add(client(order, 40))
    with pytest.raises(QueueFullError) as full:
        one.add(client(3, 1))
    assert full.value.retry_after == pytest.approx((80 + 1) / 8)
    assert [seconds_until(n, 8.0) for n in (1, 80, 8000)] == [1, 10, 60]


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "words"),
    [
        (60, 5, "60 tokens of the prompt and max_tokens 5 are 65 positions; the model has 64"),
        (14, 4, "14 tokens of the prompt and max_tokens 4 are 5 blocks of keys and values; there are 4 of 4 positions"),
    ],
)
def test_what_would_never_fit_is_refused(prompt, max_tokens, words):
    one = world(num_blocks=4)
    with pytest.raises(RequestTooLongError, match=words):
        one.add(client(0, prompt, max_tokens))
    one.add(client(0, 13, 4))  # the last token has no keys
    one.finish()


@pytest.mark.parametrize(("prompt", "max_tokens", "words"), [(0, 1, "no tokens"), (1, 0, "max_tokens is 0")])
def test_requests_that_are_none(prompt, max_tokens, words):
    scheduler = Scheduler(OPTIONS, BlockPool(4), lambda: 0.0)
    with pytest.raises(ValueError, match=words):
        scheduler.add("r", [1] * prompt, max_tokens)
    assert scheduler.schedule() is None


def alike(order: int, prompt: int, length: int = 4, **others) -> Client:
    """Return a client whose prompt begins as those of all others."""
    return Client(order, list(range(prompt)), length, others.pop("max_tokens", length), **others)


def test_what_was_computed_is_not_computed_again():
    one = world()
    one.add(alike(0, 12, 1))
    assert ranges(one) == {"r0": (0, 12)}
    one.add(alike(1, 11))
    one.add(alike(2, 12))  # one position at least is computed
    one.add(alike(3, 13))
    one.add(alike(4, 13, prompt_logits=True))
    assert ranges(one) == {"r1": (8, 11), "r2": (8, 12), "r3": (12, 13), "r4": (0, 8)}
    one.finish()
    assert (one.scheduler.prefix_cache_queries, one.scheduler.prefix_cache_hits) == (12 + 11 + 12 + 13 + 13, 8 + 8 + 12)


def test_what_an_answer_added_is_found_by_the_next_turn():
    one = world()
    first = alike(0, 6, 7)
    one.add(first)
    one.finish()
    one.add(Client(1, [*first.prompt, *first.tokens, 5], 1, 1))
    assert ranges(one) == {"r1": (12, 14)}  # the last token was sampled and not computed


@pytest.mark.parametrize("root", [None, b"other"])
def test_requests_of_other_roots_share_nothing(root):
    one = world()
    one.add(alike(0, 9, 1))
    ranges(one)
    one.add(alike(1, 9, 1, root=root))
    assert ranges(one) == {"r1": (0, 9)}


def test_a_request_waits_for_the_one_that_computes_its_beginning():
    one = world()
    for order in range(3):
        one.add(alike(order, 22, 9))
    one.add(client(3, 2))
    assert ranges(one) == {"r0": (0, 16)}
    assert ranges(one) == {"r0": (16, 22)}
    assert ranges(one) == {"r0": (22, 23), "r1": (20, 22), "r2": (20, 22), "r3": (0, 2)}


def test_who_waits_goes_on_where_the_one_before_it_leaves():
    one = world()
    for order in range(2):
        one.add(alike(order, 40, 9))
    assert [ranges(one), ranges(one)] == [{"r0": (0, 16)}, {"r0": (16, 32)}]
    one.cancel("r0")
    assert ranges(one) == {"r1": (32, 40)}


def test_who_was_preempted_finds_its_blocks():
    one = world(num_blocks=9)
    one.add(client(0, 15, 8))
    one.add(client(1, 11, 12))
    begins = []
    while one.left:
        one.begin_step()
        begins += [chunk.begin for chunk in one.step.chunks if chunk.request_id == "r1" and len(chunk.token_ids) > 1]
        one.end_step()
        one.check_pool()
    assert one.preemptions == 1
    assert begins[0] == 0 and begins[1:] and begins[1] >= 8, begins


def test_nobody_finds_what_may_be_wrong():
    one = world()
    one.add(alike(0, 20, 5))
    ranges(one)
    one.begin_step()
    one.scheduler.discard("r0")
    one.clients["r0"].ended = "cancelled"
    one.scheduler.update({})
    one.step, one.content = None, {}
    one.check_pool()
    one.add(alike(1, 20, 1))
    assert ranges(one) == {"r1": (0, 16)}


def test_options_that_would_starve_prompts_are_refused():
    with pytest.raises(ValueError, match="max_num_batched_tokens is 16; it must be 17 or more"):
        world(max_num_seqs=10)
    with pytest.raises(ValueError, match="block_size is 0"):
        world(block_size=0)


def test_where_a_prefill_ends():
    assert [prefill_end(0, 20, budget, 8) for budget in (0, 7, 8, 15, 16, 19, 20)] == [0, 0, 8, 8, 16, 16, 20]
    assert [prefill_end(5, 20, budget, 8) for budget in (2, 3, 14, 15)] == [5, 8, 16, 20]


class SchedulerMachine(RuleBasedStateMachine):
    """Clients come, cancel and time out, between steps and during them. The checks are those of `World`."""

    @initialize(
        num_blocks=st.integers(2, 10),
        seqs=st.integers(1, 4),
        chunk=st.sampled_from([1, 3, 4, 8]),
        extra=st.integers(0, 9),
    )
    def begin(self, num_blocks, seqs, chunk, extra):
        self.world = world(
            num_blocks, max_num_seqs=seqs, chunk_size=chunk, max_num_batched_tokens=seqs - 1 + chunk + extra
        )
        self.orders = 0

    @rule(
        prompt=st.integers(1, 30),
        length=st.integers(1, 12),
        spare=st.integers(0, 4),
        patience=st.none() | st.integers(1, 20),
        prompt_logits=st.booleans(),
        shared=st.integers(0, 25),
        root=st.sampled_from([None, b"a", b"b"]),
    )
    def add(self, prompt, length, spare, patience, prompt_logits, shared, root):
        deadline = None if patience is None else self.world.now + patience
        tokens = [1] * min(prompt, shared) + [self.orders * 1000 + i for i in range(prompt - shared)]
        new = Client(self.orders, tokens, length, length + spare, deadline, prompt_logits, root)
        try:
            self.world.add(new)
        except RequestTooLongError:
            assert prompt + length + spare - 1 > self.world.pool.num_blocks * self.world.options.block_size
        except QueueFullError as full:
            assert self.world.scheduler.num_waiting == OPTIONS.max_queued_requests
            assert 1 <= full.retry_after <= 60
        self.orders += 1

    @precondition(lambda self: self.world.clients)
    @rule(data=st.data())
    def cancel(self, data):
        self.world.cancel(data.draw(st.sampled_from(list(self.world.clients))))

    @rule(seconds=st.integers(1, 5))
    def wait(self, seconds):
        self.world.now += seconds

    @precondition(lambda self: self.world.step is None)
    @rule()
    def begin_step(self):
        self.world.begin_step()

    @precondition(lambda self: self.world.step is not None)
    @rule()
    def end_step(self):
        self.world.end_step()

    @invariant()
    def blocks_are_conserved(self):
        self.world.check_pool()

    def teardown(self):
        if self.world.step is not None:
            self.world.end_step()
        self.world.finish()
        assert self.world.first_tokens == sorted(self.world.first_tokens)
        for each in self.world.clients.values():
            self.world.check_client(each)


TestScheduler = SchedulerMachine.TestCase
