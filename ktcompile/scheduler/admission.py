"""Which requests are taken: those that fit at all, and for which the wait is not too long, as measured."""

from __future__ import annotations

from typing import NamedTuple

from ktcompile.cache.costs import Recompute
from ktcompile.cache.rates import smoothed
from ktcompile.kv.layout import blocks_for
from ktcompile.scheduler.policy import SchedulerOptions, decayed, seconds_until, until
from ktcompile.scheduler.request import QueueFullError, RequestTooLongError


class Queue(NamedTuple):
    """Requests that wait and that run, and the tokens of each kind that have to be computed."""

    waiting: int
    waiting_tokens: int
    running: int
    running_tokens: int


class Admission:
    """Checks requests, and measures how fast others begin and prompts are computed. num_blocks: of the pool."""

    def __init__(self, options: SchedulerOptions, num_blocks: int) -> None:
        self._options = options
        self._num_blocks = num_blocks
        self._prefilled = (0.0, 0.0)  # tokens and seconds of steps with prompts, older ones counting less
        # Seconds from one request's start to the next one's while others wait, and the step of the last that left some.
        self._start_gap: float | None = None
        self._started_full: float | None = None

    @property
    def recompute(self) -> Recompute | None:
        """How long tokens of prompts take, as measured; None: nothing was."""
        tokens, seconds = self._prefilled
        return Recompute(seconds / tokens) if tokens else None

    def check_length(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """RequestTooLongError: a request fits at no time."""
        options = self._options
        asked = f"{num_prompt_tokens} tokens of the prompt and max_tokens {max_tokens} are"
        longest = num_prompt_tokens + max_tokens
        if longest > options.max_model_len:
            raise RequestTooLongError(f"{asked} {longest} positions; the model has {options.max_model_len}")
        # The last token is sampled and not computed.
        blocks = blocks_for(longest - 1, options.block_size)
        if blocks > self._num_blocks:
            size = f"{self._num_blocks} of {options.block_size} positions"
            raise RequestTooLongError(f"{asked} {blocks} blocks of keys and values; there are {size}")

    def check_queue(self, num_tokens: int, queue: Queue, now: float) -> None:
        """QueueFullError: a request of so many tokens cannot wait too."""
        options = self._options
        wait = self._expected_wait(queue, now)
        if 0 < options.max_queue_seconds < wait:
            raise QueueFullError(
                f"{queue.waiting} requests wait, and one more would for about {wait:.0f} s; it may for "
                f"{options.max_queue_seconds:g}",
                until(wait - options.max_queue_seconds),
            )
        queued = queue.waiting_tokens
        full = queue.waiting >= options.max_queued_requests
        if not full and (not queued or queued + num_tokens <= options.max_queued_tokens):
            return
        waiting = f"{queue.waiting} requests with {queued} tokens wait"
        limits = f"{options.max_queued_requests} and {options.max_queued_tokens} may"
        cost = self.recompute
        ahead = queued + queue.running_tokens
        raise QueueFullError(f"{waiting}; {limits}", seconds_until(ahead, None if cost is None else 1 / cost.per_token))

    def note_starts(self, count: int, now: float, others_wait: bool) -> None:
        """Note how fast requests begin while others wait. count: those that began in the step of `now`."""
        if self._started_full is not None:
            self._start_gap = smoothed(self._start_gap, (now - self._started_full) / count)
        self._started_full = now if others_wait else None

    def note_prefill(self, tokens: int, seconds: float) -> None:
        """Note how long a step with prompts took."""
        if seconds > 0:
            self._prefilled = decayed(self._prefilled, (tokens, seconds))

    def _expected_wait(self, queue: Queue, now: float) -> float:
        """Return the seconds until a request that came now would run, by how fast those before it began."""
        if not queue.waiting or self._started_full is None:
            return 0.0
        gap = self._start_gap
        if gap is None:  # none has followed yet: as if all that run had ended by now
            gap = (now - self._started_full) / max(1, queue.running)
        return queue.waiting * gap
