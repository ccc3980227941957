"""What is sent: requests, and their prompts of random tokens or words, all of which follow from one seed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ktcompile.bench.serve.arrivals import Arrivals, ClosedLoop, OpenLoop, Replay
from ktcompile.bench.serve.lengths import Lengths
from ktcompile.bench.serve.trace import BLOCK, TraceRequest

# Ordinary tokens in nearly every vocabulary: special ones are the first few or the last.
TOKEN_RANGE = (300, 4000)
# Words that are one token in most vocabularies, for servers that take texts alone.
_TEXT = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they "
    "which one you were all her she there would their we him been has when who will no more if out so up said "
    "what its about than into them can only other time new some could these two may first then do any like my "
    "now over such our man me even most made after also well did many must before back see through way where "
    "get much go good know just year people"
)
_WORDS = tuple(_TEXT.split())


@dataclass(frozen=True, slots=True)
class Request:
    """index: in the workload. arrival: seconds from the start; None in a closed loop. input_tokens: of the prompt, as
    far as they are known. blocks: ids of the prompt's blocks, where prompts share some. text: a prompt that is
    given."""

    index: int
    arrival: float | None
    input_tokens: int | None
    output_tokens: int
    blocks: tuple[int, ...] = ()
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """What is sent, and when. block: tokens of a block of `Request.blocks`. tokens: the range of ids of random
    tokens."""

    requests: tuple[Request, ...]
    arrivals: Arrivals
    seed: int
    what: str
    block: int = BLOCK
    tokens: tuple[int, int] = TOKEN_RANGE

    def __post_init__(self) -> None:
        low, high = self.tokens
        if not 0 <= low < high:
            raise ValueError(f"tokens from {low} to {high} are none; write LOW-HIGH, the end excluded")

    def prompt(self, request: Request) -> str | list[int]:
        """Return the request's prompt: a text where the request has one, else ids of random tokens."""
        return request.text if request.text is not None else self._ids(request)

    def text(self, request: Request) -> str:
        """Return the request's prompt as a text: with a word for each random token, where it has none."""
        if request.text is not None:
            return request.text
        return " ".join(_WORDS[i % len(_WORDS)] for i in self._ids(request))

    def _ids(self, request: Request) -> list[int]:
        assert request.input_tokens is not None
        count = request.input_tokens
        if not request.blocks:
            return self._random((self.seed, 1, request.index), count)
        ids = [token for block in request.blocks for token in self._random((self.seed, 2, block), self.block)]
        return ids[:count]

    def _random(self, key: tuple[int, ...], count: int) -> list[int]:
        numbers: list[int] = np.random.default_rng(key).integers(*self.tokens, size=count).tolist()
        return numbers


def random_requests(
    count: int, inputs: Lengths, outputs: Lengths, arrivals: Arrivals, seed: int
) -> tuple[Request, ...]:
    """Return requests with lengths drawn from two distributions."""
    rng = np.random.default_rng((seed, 0))
    sizes = zip(inputs.draw(rng, count), outputs.draw(rng, count), strict=True)
    times = _times(arrivals, rng, count)
    return tuple(Request(i, t, own, out) for i, (t, (own, out)) in enumerate(zip(times, sizes, strict=True)))


def trace_requests(
    trace: Sequence[TraceRequest], arrivals: Replay, scale: float = 1.0
) -> tuple[tuple[Request, ...], int]:
    """Return the requests of a trace, and the tokens of a block. scale: of all lengths, blocks included.

    ValueError: the scale leaves no token of a block, or makes prompts longer.
    """
    block = round(BLOCK * scale)
    if not (block >= 1 and scale <= 1):
        raise ValueError(f"a trace cannot be scaled by {scale}; it must be between {1 / BLOCK} and 1")
    requests = []
    for index, r in enumerate(trace):
        full, rest = divmod(r.input_length, BLOCK)
        own = full * block + (max(1, round(rest * scale)) if rest else 0)
        out = max(1, round(r.output_length * scale))
        requests.append(Request(index, r.timestamp / arrivals.speed, own, out, r.hash_ids))
    return tuple(requests), block


def file_requests(
    path: Path, count: int | None, outputs: Lengths, arrivals: Arrivals, seed: int
) -> tuple[Request, ...]:
    """Return requests with the prompts of a file: a JSON object a line with `prompt`, and `max_tokens` if its answer
    has a length of its own. They are repeated where more are wanted. ValueError names the line that cannot be used."""
    found: list[tuple[str, int | None]] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    found.append(_prompt(json.loads(line)))
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: {error}") from error
    if not found:
        raise ValueError(f"{path} has no prompts")
    rng = np.random.default_rng((seed, 0))
    count = len(found) if count is None else count
    drawn = outputs.draw(rng, count)
    times = _times(arrivals, rng, count)
    requests = []
    for index, time in enumerate(times):
        text, most = found[index % len(found)]
        requests.append(Request(index, time, None, most or drawn[index], text=text))
    return tuple(requests)


def _prompt(record: Any) -> tuple[str, int | None]:
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) or not record["prompt"]:
        raise ValueError("it is no JSON object with a text named prompt")
    most = record.get("max_tokens")
    if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
        raise ValueError(f"max_tokens is {most!r}; it must be a whole number of 1 or more")
    return record["prompt"], most


def _times(arrivals: Arrivals, rng: np.random.Generator, count: int) -> list[float | None]:
    if isinstance(arrivals, ClosedLoop):
        return [None] * count
    assert isinstance(arrivals, OpenLoop), "a trace has times of its own"
    return list(arrivals.times(rng, count))
