"""What one step of the engine computes."""

from __future__ import annotations

from typing import NamedTuple

from ktcompile.cache.promotion import Loaded


class Chunk(NamedTuple):
    """Positions [begin, end) of one request.

    token_ids: of these positions. block_table: the blocks of positions [0, end) and perhaps of some behind.
    logits_from: the logits of [logits_from, end) are wanted; `end` where none are. samples: the last of them gives
    the next token.
    """

    request_id: str
    token_ids: tuple[int, ...]
    begin: int
    block_table: tuple[int, ...]
    logits_from: int
    samples: bool

    @property
    def end(self) -> int:
        return self.begin + len(self.token_ids)


class Start(NamedTuple):
    """A request that begins. num_cached_tokens: of its prompt, which others had computed before. loaded: what of them
    came from behind the device; None: nothing was to. load_seconds: how long that was waited for."""

    request_id: str
    num_cached_tokens: int
    loaded: Loaded | None = None
    load_seconds: float = 0.0


class Step(NamedTuple):
    """What is computed together, the oldest request first.

    preempted: requests that gave up their blocks for it. started: those that never ran before.
    """

    chunks: tuple[Chunk, ...]
    preempted: tuple[str, ...] = ()
    started: tuple[Start, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.chunks)
