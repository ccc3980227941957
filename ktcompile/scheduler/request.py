"""A request while it is served, and what is said of one that is not taken."""

from __future__ import annotations

from dataclasses import dataclass, field

from ktcompile.kv.block_pool import BlockName


class RequestTooLongError(ValueError):
    """A request that could never be served here: the model or the pool of blocks is too small for it."""


class QueueFullError(RuntimeError):
    """Too much waits already. retry_after: seconds until some of it is likely computed."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(f"{message}; try again in about {retry_after:.0f} s")
        self.retry_after = retry_after


@dataclass(slots=True, eq=False)
class Request:
    """A sequence and how far it is.

    token_ids: the prompt, and behind it what was sampled. max_tokens: of the latter, at most. deadline: when it ends
    at the latest, by the scheduler's clock. num_computed_tokens: positions [0, num_computed_tokens) have their keys
    and values. block_table: the blocks of its positions, in order. logits_from: the logits of positions before this
    one are of no use, or were had already. root: the parent of its first block's key; None: it shares no blocks.
    block_names: of its first full blocks, those of which were asked for. num_named: so many of its blocks are found by
    their names, or others with the same content are.
    """

    request_id: str
    token_ids: list[int]
    max_tokens: int
    logits_from: int
    deadline: float | None = None
    root: bytes | None = None
    num_prompt_tokens: int = field(init=False)
    num_computed_tokens: int = 0
    block_table: tuple[int, ...] = ()
    num_preemptions: int = 0
    block_names: list[BlockName] = field(default_factory=list)
    num_named: int = 0

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        """1 while it decodes, more in its prefill and after it was preempted."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def decodes(self) -> bool:
        """Whether all is computed but the token that was sampled last."""
        known = len(self.token_ids)
        return known - self.num_computed_tokens == 1 and known > self.num_prompt_tokens
