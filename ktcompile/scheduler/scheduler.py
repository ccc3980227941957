"""Continuous batching, first come, first served.

There are no phases: a request runs until its computed tokens catch up with its tokens, of which sampling adds one at a
time. What the rules give (tests/test_scheduler_worlds.py):

- Each request that decodes has its token in each step, and the oldest prompt has a chunk beside them.
- First tokens come in the order of arrival: a prompt has tokens of a step only where all older ones end in it.
- A request that needs a block where none is free gets one of the youngest that runs, which waits again, ahead of all
  that never ran, and computes anew what it finds in no block. So the oldest always goes on, and each request ends.
- Blocks that hold the beginning of a request are shared and not computed again (`prefixes.py`, decision 22).
- Where tiers behind the device have more of it (`behind.py`, decision 25), a request holds its blocks while they are
  loaded, and computes nothing. Meanwhile younger ones may begin, and have their first tokens before it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from math import inf

from ktcompile.cache.costs import Recompute
from ktcompile.kv.block_pool import BlockPool
from ktcompile.kv.layout import blocks_for
from ktcompile.scheduler.admission import Admission, Queue
from ktcompile.scheduler.batch import Chunk, Start, Step
from ktcompile.scheduler.behind import Behind
from ktcompile.scheduler.policy import SchedulerOptions, may_start, prefill_end
from ktcompile.scheduler.prefixes import Prefixes
from ktcompile.scheduler.request import Request


class Scheduler:
    """Decides what each step computes. One thread calls it: `schedule`, the step, `update`, and again.

    `add`, `cancel`, `finish` and `expire` may be called between any two of these; a request that ends while its step
    runs keeps its blocks until `update`. clock: seconds, from any origin. behind: the tiers behind the device, if any.
    """

    def __init__(
        self, options: SchedulerOptions, pool: BlockPool, clock: Callable[[], float], behind: Behind | None = None
    ) -> None:
        self._options = options
        self._pool = pool
        self._prefixes = Prefixes(pool, options.block_size)
        self._behind = behind
        self._clock = clock
        # Both in order of arrival; all that run arrived before all that wait.
        self._running: list[Request] = []
        self._waiting: deque[Request] = deque()
        self._requests: dict[str, Request] = {}
        self._step: Step | None = None
        self._step_begin = 0.0
        # Requests that ended during a step, whose blocks it may still write to.
        self._leaving: list[Request] = []
        self._admission = Admission(options, pool.num_blocks)
        self._next_deadline = inf  # none is earlier
        self.num_preemptions = 0
        # Tokens of prompts that were looked up when they first ran, and of these those that were found.
        self.prefix_cache_queries = self.prefix_cache_hits = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def recompute(self) -> Recompute | None:
        """How long tokens of prompts take, as measured; None: nothing was."""
        return self._admission.recompute

    @property
    def num_queued_tokens(self) -> int:
        """Tokens of waiting requests that have to be computed."""
        return sum(request.num_uncomputed_tokens for request in self._waiting)

    def add(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        max_tokens: int,
        *,
        deadline: float | None = None,
        prompt_logits: bool = False,
        root: bytes | None = None,
    ) -> None:
        """Let a request wait for its turn.

        max_tokens: it is finished when it has so many, at the latest. deadline: by the clock. prompt_logits: those of
        all positions of the prompt are wanted, so all are computed. root: requests of one root share blocks, as of
        `ktcompile.cache.key`; None: it shares none. RequestTooLongError: it would fit at no time. QueueFullError: not
        now. ValueError: no prompt, max_tokens below 1, or an id that another request has.
        """
        if request_id in self._requests or any(request_id == leaving.request_id for leaving in self._leaving):
            raise ValueError(f"request {request_id!r} is served already; give each its own id")
        if not prompt_token_ids:
            raise ValueError("the prompt has no tokens")
        if max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}; it must be 1 or more")
        self._admission.check_length(len(prompt_token_ids), max_tokens)
        computing = sum(request.num_uncomputed_tokens for request in self._running)
        queue = Queue(self.num_waiting, self.num_queued_tokens, self.num_running, computing)
        self._admission.check_queue(len(prompt_token_ids), queue, self._clock())
        first = 0 if prompt_logits else len(prompt_token_ids) - 1
        request = Request(request_id, list(prompt_token_ids), max_tokens, first, deadline, root)
        self._requests[request_id] = request
        self._waiting.append(request)
        if deadline is not None:
            self._next_deadline = min(self._next_deadline, deadline)

    def finish(self, request_id: str) -> None:
        """End a request, whatever it does. KeyError: there is none with this id, or it ended."""
        request = self._requests.pop(request_id)
        if request in self._waiting:
            self._waiting.remove(request)
            return
        self._running.remove(request)
        self._cancel_load(request)
        if self._step is None:
            self._release(request)
        else:
            self._leaving.append(request)

    def discard(self, request_id: str) -> None:
        """End a request whose keys and values may be wrong: nobody finds its blocks any more. KeyError: as `finish`."""
        request = self._requests[request_id]
        if self._behind is not None:
            self._behind.forget(request)
        for block in request.block_table:
            self._pool.forget(block)
        request.num_kept = request.num_named  # and no tier is given them
        self.finish(request_id)

    def cancel(self, request_id: str) -> bool:
        """End a request that may have ended already, and return whether it had not."""
        if request_id not in self._requests:
            return False
        self.finish(request_id)
        return True

    def expire(self) -> list[str]:
        """End all requests whose deadline is over, and return which; call it before `schedule`."""
        if self._next_deadline == inf or self._next_deadline > (now := self._clock()):
            return []
        late = [r.request_id for r in self._requests.values() if r.deadline is not None and r.deadline <= now]
        for request_id in late:
            self.finish(request_id)
        self._next_deadline = min((r.deadline for r in self._requests.values() if r.deadline is not None), default=inf)
        return late

    def schedule(self) -> Step | None:
        """Return the next step; None: no request is left, or all that could go on are being loaded, see `wait`."""
        assert self._step is None, "the last step has no update yet"
        self.give_back()
        if not self._requests:
            return None
        self._step_begin = self._clock()
        if self._behind is not None:
            self._end_loads(self._behind)
        preempted: list[str] = []
        started: list[Start] = []
        chunks, budget = self._continue_running(preempted, started)
        # Who has just given up its blocks could begin at once where others hold copies of them; it waits for its turn.
        if self._waiting and not preempted:
            self._start_waiting(budget, chunks, started)
        if not chunks:
            assert any(request.loading for request in self._running), "requests are left and none goes on"
            return None
        self._step = Step(tuple(chunks), tuple(preempted), tuple(started))
        return self._step

    def wait(self, seconds: float) -> None:
        """Return when the oldest load has ended, or after a time; at once where there is none."""
        loading = next((request for request in self._running if request.loading), None)
        if loading is not None and self._behind is not None:
            self._behind.wait(loading, seconds)

    def give_back(self) -> None:
        """Free the blocks that were held to be copied, and were."""
        if self._behind is not None:
            self._behind.give_back()
            self._behind.maintain()

    def update(self, sampled: Mapping[str, int]) -> None:
        """Take in what the step computed.

        sampled: the next token of each chunk that samples; one of a request that ended meanwhile is ignored. `finish`
        the requests that end with it before the next `schedule`, those that have max_tokens now among them.
        """
        assert self._step is not None, "there is no step to update"
        step, self._step = self._step, None
        left = {request.request_id: request for request in self._leaving}
        tokens, size, behind = 0, self._options.block_size, self._behind is not None
        for name, token_ids, begin, _, _, samples in step.chunks:
            tokens += len(token_ids)
            end = begin + len(token_ids)
            request = self._requests.get(name)
            if request is None:
                if name in sampled:  # it ended well
                    left[name].num_computed_tokens = end
                    self._note_computed(left[name])
                continue
            request.num_computed_tokens = end
            request.logits_from = max(request.logits_from, end)
            if end // size > (request.num_kept if behind else request.num_named):
                self._note_computed(request)
            if samples:
                known = request.token_ids
                assert len(known) - request.num_prompt_tokens < request.max_tokens, f"{name!r} was to be finished"
                known.append(sampled[name])
        if tokens > len(step.chunks):
            self._admission.note_prefill(tokens, self._clock() - self._step_begin)
        for request in self._leaving:
            self._release(request)
        self._leaving.clear()

    def check(self) -> None:
        """Assert that what requests wait for comes."""
        self._prefixes.check()
        assert all(request not in self._waiting for request in self._prefixes.leaders)

    def _end_loads(self, behind: Behind) -> None:
        """Have requests go on whose blocks have come, or will not."""
        for request in self._running:
            if request.loading is None:
                continue
            begin = request.loading.begin
            loaded = behind.ended(request)
            if loaded is not None:
                request.num_computed_tokens += len(loaded.tiers) * self._options.block_size
                self._note_computed(request)
                if not request.began:
                    request.loaded, request.load_seconds = loaded, self._step_begin - begin

    def _cancel_load(self, request: Request) -> None:
        if self._behind is not None:
            self._behind.cancel(request)

    def _note_computed(self, request: Request) -> None:
        self._prefixes.note_computed(request)
        if self._behind is not None:
            self._behind.keep(request)

    def _continue_running(self, preempted: list[str], started: list[Start]) -> tuple[list[Chunk], int]:
        """Return chunks of requests that run, and how many tokens prompts behind them may have; add to `preempted`, and
        to `started` those that were loaded."""
        chunks: list[Chunk] = []
        # The tokens of those that decode are set aside.
        decoding = [request.decodes for request in self._running]
        size, budget = self._options.block_size, self._options.max_num_batched_tokens - sum(decoding)
        # The list becomes shorter at its end: blocks go to the oldest first, so what is preempted has no chunk yet.
        for request, decodes in zip(self._running, decoding, strict=False):
            if request.loading is not None:
                continue
            if decodes:
                begin, table = request.num_computed_tokens, request.block_table
                if begin == len(table) * size:
                    if not self._grow(request, preempted):
                        continue
                    table = request.block_table
                chunks.append(Chunk(request.request_id, (request.token_ids[begin],), begin, table, begin, True))
            else:
                chunk, budget = self._prefill(request, budget)
                if chunk is not None:
                    self._begin(request, started)
                    chunks.append(chunk)
        return chunks, budget

    def _start_waiting(self, budget: int, chunks: list[Chunk], started: list[Start]) -> None:
        """Let waiting requests run while there is room; add to `chunks`, and to `started` those that never ran."""
        options, before = self._options, len(self._running)
        while self._waiting and self.num_running < options.max_num_seqs:
            request, total = self._waiting[0], len(self._waiting[0].token_ids)
            found = self._prefixes.find(request)
            if found is None or not self._fits(total, found):
                break
            computed, first, recompute = len(found) * options.block_size, len(found), self.recompute
            loads = 0 if self._behind is None else self._behind.find(request, first, recompute)
            if not loads and prefill_end(computed, total, budget, options.chunk_size) == computed:
                break
            for block in found:
                self._pool.hold(block)
            blocks = self._pool.take(blocks_for(total, options.block_size) - first)
            assert blocks is not None
            request.block_table, request.num_computed_tokens = (*found, *blocks), computed
            self._prefixes.start(request)
            self._running.append(self._waiting.popleft())
            if self._behind is not None and loads:
                self._behind.load(request, first, loads, recompute, self._step_begin)
                continue
            self._begin(request, started)
            chunk, budget = self._prefill(request, budget)
            assert chunk is not None
            chunks.append(chunk)
        if len(self._running) > before:
            self._admission.note_starts(len(self._running) - before, self._step_begin, bool(self._waiting))

    def _fits(self, total: int, found: Sequence[int]) -> bool:
        """Return whether a request of `total` tokens may have blocks, of which `found` are there."""

        def fits() -> bool:
            free = self._pool.num_free + sum(self._pool.holders(block) > 0 for block in found)
            return may_start(total, free, self.num_running, self._options.block_size)

        return fits() or (self._behind is not None and self._behind.take_back() and fits())

    def _begin(self, request: Request, started: list[Start]) -> None:
        """Note that a request has its first tokens, once."""
        if request.began:
            return
        request.began = True
        cached = request.num_computed_tokens
        started.append(Start(request.request_id, cached, request.loaded, request.load_seconds))
        self._count_found(request)

    def _count_found(self, request: Request) -> None:
        if request.root is not None:
            self.prefix_cache_queries += request.num_prompt_tokens
            self.prefix_cache_hits += request.num_computed_tokens

    def _prefill(self, request: Request, budget: int) -> tuple[Chunk | None, int]:
        """Return the next chunk of a prompt, and the tokens left for younger ones: none where it does not end."""
        computed, total = request.num_computed_tokens, len(request.token_ids)
        end = prefill_end(computed, total, budget, self._options.chunk_size)
        return _chunk(request, end) if end > computed else None, budget - (end - computed) if end == total else 0

    def _grow(self, request: Request, preempted: list[str]) -> bool:
        """Give a request one more block, for its last token, and return whether it still runs."""
        while (blocks := self._pool.take(1)) is None:
            if self._behind is not None and self._behind.take_back():
                continue
            youngest = self._running.pop()
            self._preempt(youngest)
            preempted.append(youngest.request_id)
            if youngest is request:
                return False
        request.block_table += tuple(blocks)
        return True

    def _release(self, request: Request) -> None:
        self._prefixes.leave(request)
        self._pool.release(request.block_table)

    def _preempt(self, request: Request) -> None:
        self._cancel_load(request)
        self._release(request)
        request.block_table, request.num_computed_tokens, request.looked_up = (), 0, None
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._waiting.appendleft(request)


def _chunk(request: Request, end: int) -> Chunk:
    begin = request.num_computed_tokens
    return Chunk(
        request.request_id,
        tuple(request.token_ids[begin:end]),
        begin,
        request.block_table,
        logits_from=min(end, max(begin, request.logits_from)),
        samples=end == len(request.token_ids),
    )
