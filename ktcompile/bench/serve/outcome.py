"""What came back of a request, and when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# How the tokens of a chunk are known: the server's count so far, ids, log-probabilities; or the answer's tokens by its
# last count, spread evenly over its chunks; or a chunk counts as one.
Counting = Literal["usage", "token_ids", "logprobs", "spread", "chunks"]
OK = "ok"


@dataclass(frozen=True, slots=True)
class Outcome:
    """A request's end.

    index: of the request. sent: seconds from the start of the run. late: how much later that was than planned. end:
    when its end was known. status: "ok", a HTTP status, or what went wrong ("timeout", "connection", "stream", "cut
    off"). chunks: time since `sent`, and tokens, of each chunk that has some. finish: the server's reason.
    retry_after: seconds that a refusal names. detail: the server's words where it went wrong."""

    index: int
    sent: float
    late: float
    end: float
    status: str
    prompt_tokens: int | None = None
    chunks: tuple[tuple[float, int], ...] = ()
    counting: Counting = "chunks"
    finish: str | None = None
    retry_after: float | None = None
    detail: str = ""

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.chunks)

    @property
    def ttft(self) -> float:
        """Seconds until the first token. Without one there is none: IndexError."""
        return self.chunks[0][0]

    @property
    def e2e(self) -> float:
        """Seconds until the last token."""
        return self.chunks[-1][0]

    @property
    def tpot(self) -> float | None:
        """Mean seconds of a token after the first; None if there is one alone."""
        return (self.e2e - self.ttft) / (self.tokens - 1) if self.tokens > 1 else None

    def gaps(self) -> list[float]:
        """Return the seconds between each token and the one before it.

        Tokens of one chunk came in even steps since the chunk before, as far as anybody can tell; those of the first at
        once. So there are `tokens - 1`, and their sum is the time from the first token to the last.
        """
        gaps = [0.0] * (self.chunks[0][1] - 1)
        for (before, _), (time, count) in zip(self.chunks, self.chunks[1:], strict=False):
            gaps += [(time - before) / count] * count
        return gaps


def spread(tokens: int, chunks: int) -> list[int]:
    """Return how many tokens each chunk has if they are spread evenly and none is empty, fewer tokens than chunks being
    as many; the first chunk has one."""
    if chunks < 2:
        return [max(tokens, chunks)] * chunks
    rest, others = max(tokens, chunks) - 1, chunks - 1
    return [1, *((i + 1) * rest // others - i * rest // others for i in range(others))]
