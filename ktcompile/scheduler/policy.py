"""The rules by which the scheduler chooses, as functions of plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

from ktcompile.kv.layout import blocks_for

# How much the newest value counts in an average of the last.
_WEIGHT_OF_NEWEST = 0.2


@dataclass(frozen=True, slots=True)
class SchedulerOptions:
    """Limits of what is served at a time.

    max_num_seqs: sequences that are computed. max_num_batched_tokens: tokens of a step. max_model_len: positions of a
    sequence. block_size: positions of a block of keys and values. chunk_size: a prefill is cut at multiples of it
    alone, counted from position 0, whatever else runs. max_queued_requests, max_queued_tokens: what may wait, in
    number and in tokens to compute. max_queue_seconds: how long one that comes would likely wait; 0: any time.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_model_len: int = 32768
    block_size: int = 64
    chunk_size: int = 256
    max_queued_requests: int = 1024
    max_queued_tokens: int = 1 << 20
    max_queue_seconds: float = 0.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value, least = getattr(self, name), 0 if name == "max_queue_seconds" else 1
            if not value >= least:
                raise ValueError(f"{name} is {value}; it must be {least} or more")
        least = self.max_num_seqs - 1 + self.chunk_size
        if self.max_num_batched_tokens < least:
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}; it must be {least} or more, so that each of "
                f"{self.max_num_seqs} sequences has its token and a prompt still has a chunk of {self.chunk_size}"
            )


def prefill_end(computed: int, total: int, budget: int, chunk_size: int) -> int:
    """Return the position before which a prefill ends in this step: `total`, or a multiple of `chunk_size`.

    It is `computed`, nothing, where the budget does not reach to the next of these.
    """
    if total - computed <= budget:
        return total
    return max(computed, (computed + budget) // chunk_size * chunk_size)


def may_start(num_tokens: int, num_free: int, num_running: int, block_size: int) -> bool:
    """Return whether a request of `num_tokens` may have blocks now. num_free: blocks that are free, and those of its
    own that others hold.

    It gets the blocks of all its tokens. One block for each request that runs is left over, since it would otherwise
    be preempted as soon as one of these comes to the end of its last block.
    """
    return blocks_for(num_tokens, block_size) + num_running <= num_free


def seconds_until(tokens: int, tokens_per_second: float | None) -> float:
    """Return how long `tokens` take, from 1 to 60 s; 1 s where nothing was measured yet."""
    return 1.0 if tokens_per_second is None else until(tokens / tokens_per_second)


def decayed(before: tuple[float, float], newest: tuple[float, float]) -> tuple[float, float]:
    """Return sums of which older parts count less; their ratio is an average in which large parts count more."""
    kept = 1 - _WEIGHT_OF_NEWEST
    return before[0] * kept + newest[0], before[1] * kept + newest[1]


def until(seconds: float) -> float:
    """Return a time that a client may be told to wait, from 1 to 60 s."""
    return min(60.0, max(1.0, seconds))
