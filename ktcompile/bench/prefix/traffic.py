"""Traces as prompts that a small machine computes: shorter ones, and the long ones left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ktcompile.bench.cache import synthetic
from ktcompile.bench.serve.arrivals import Replay
from ktcompile.bench.serve.trace import TraceRequest
from ktcompile.bench.serve.workload import TOKEN_RANGE, Request, Workload, trace_requests

# Generators are asked for so many times the requests that are wanted, if not fewer, until enough are short enough.
_MOST_DRAWN = 64


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is made of traces. requests: the first of each; None: all of a file. longest: tokens of a prompt; those with
    more are left out. scale: of all lengths, blocks included. crowd: of generators. vocab_size: of the model."""

    requests: int | None
    longest: int
    scale: float
    crowd: float
    vocab_size: int

    def __post_init__(self) -> None:
        if (self.requests is not None and self.requests < 1) or self.longest < 1:
            raise ValueError(f"{self.requests} requests of at most {self.longest} tokens cannot be")


def of_kind(kind: str, sizes: Sizes, seed: int) -> Workload:
    """Return the prompts of a kind of traffic. ValueError: there is no such kind, or none is short enough."""
    assert sizes.requests is not None
    drawn, workload = sizes.requests, None
    while workload is None or (len(workload.requests) < sizes.requests and drawn < _MOST_DRAWN * sizes.requests):
        drawn *= 2
        workload = _workload(kind, synthetic.generate(kind, drawn, seed, sizes.crowd), sizes, seed)
    return _some(workload)


def of_trace(name: str, trace: Sequence[TraceRequest], sizes: Sizes, seed: int) -> Workload:
    """Return the prompts of a trace. ValueError: none is short enough."""
    return _some(_workload(name, trace, sizes, seed))


def prompts(workload: Workload) -> Iterator[list[int]]:
    """Give the ids of each prompt."""
    for request in workload.requests:
        prompt = workload.prompt(request)
        assert isinstance(prompt, list)
        yield prompt


def shared_tokens(workload: Workload) -> int:
    """Return the tokens of full blocks that an earlier prompt began with too: the most that any cache could find."""
    seen: set[tuple[int, ...]] = set()
    shared = 0
    for request in workload.requests:
        full = request.blocks[: _tokens(request) // workload.block]
        for end in range(len(full), 0, -1):
            if full[:end] in seen:
                shared += end * workload.block
                break
        seen.update(full[:end] for end in range(1, len(full) + 1))
    return shared


def _workload(what: str, trace: Sequence[TraceRequest], sizes: Sizes, seed: int) -> Workload:
    requests, block = trace_requests(trace, Replay(), sizes.scale)
    short = [request for request in requests if _tokens(request) <= sizes.longest]
    low, high = TOKEN_RANGE
    tokens = (min(low, sizes.vocab_size // 8), min(high, sizes.vocab_size))
    return Workload(tuple(short[: sizes.requests]), Replay(), seed, what, block, tokens)


def _some(workload: Workload) -> Workload:
    if not workload.requests:
        raise ValueError(f"{workload.what} has no prompt that is short enough; raise --longest, or lower --scale")
    return workload


def _tokens(request: Request) -> int:
    assert request.input_tokens is not None
    return request.input_tokens
