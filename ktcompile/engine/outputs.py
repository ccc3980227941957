"""What a request is answered with. Names and meanings are those of vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ktcompile.engine.generate import Sampling


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of an answer are chosen, and where it ends.

    max_tokens: at most so many. temperature: 0 takes the likeliest token. top_p: only the likeliest tokens that
    together have this probability are drawn from. seed: None draws a new one. stop: texts before which the answer
    ends; they are no part of it.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; it must be 1 or more")
        if not all(self.stop_texts):
            raise ValueError(f"stop is {self.stop!r}; an empty text would end every answer")
        assert self.sampling  # which checks the others

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The texts of `stop`."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def sampling(self) -> Sampling:
        """What the generation loop takes."""
        return Sampling(self.temperature, self.top_p, self.seed)


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """An answer. token_ids: all that were generated, that which ended it included. text: without what ended it.

    finish_reason: "stop", at a token or a text that ends it, or "length", where max_tokens or the model's positions
    do.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A request with its answers. prompt: its text; None: it was given as tokens."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
