"""Traces that follow from a seed: chats, documents, agents, shared system prompts, and prompts that share nothing."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator

import numpy as np

from ktcompile.bench.serve.lengths import SHAREGPT_ANSWER, SHAREGPT_PROMPT, Lengths
from ktcompile.bench.serve.trace import BLOCK, TraceRequest

# A piece of a prompt: which text it is, and how many tokens of it there are. Equal ids are equal texts.
Piece = tuple[int, int]
# A request before it has ids of blocks: when it comes, what its prompt is made of, the tokens of its answer.
Draft = tuple[float, list[Piece], int]

_MOST_TOKENS = 128_000
_QUESTION, _ANSWER = Lengths(*SHAREGPT_PROMPT, 8192), Lengths(*SHAREGPT_ANSWER, 8192)


def generate(kind: str, requests: int, seed: int, crowd: float = 1.0) -> list[TraceRequest]:
    """Return requests of a kind of traffic in order of time. ValueError: there is no such kind.

    crowd: of conversations and sessions that begin in a time, and of documents and system prompts that there are; in a
    small one few requests are enough for some to be of the same.
    """
    if kind not in KINDS:
        raise ValueError(f"traffic {kind!r} is unknown; there are {', '.join(KINDS)}")
    if requests < 1 or seed < 0 or not 0 < crowd <= 1:
        raise ValueError(f"{requests} requests of seed {seed} cannot be, or not of a crowd of {crowd:g}")
    rng = np.random.default_rng((seed, list(KINDS).index(kind)))
    drafts = itertools.islice(_in_order(KINDS[kind](rng, crowd)), requests)
    numbers: dict[tuple[int, tuple[Piece, ...]], int] = {}
    return [_numbered(draft, numbers) for draft in drafts]


def _chat(rng: np.random.Generator, crowd: float) -> Iterator[Iterator[Draft]]:
    """Conversations of a few turns, after one of three system prompts; one in five begins with a long text."""
    texts = itertools.count()
    systems = [(next(texts), tokens) for tokens in (700, 2200, 5200)]
    long = Lengths(6000, 1.0, 60_000)

    def conversation(start: float) -> Iterator[Draft]:
        pieces = [systems[rng.choice(3, p=(0.5, 0.3, 0.2))]]
        if rng.random() < 0.2:
            pieces.append((next(texts), _one(long, rng)))
        time, turns = start, rng.geometric(1 / 5)
        for _ in range(turns):
            pieces = [*pieces, (next(texts), _one(_QUESTION, rng))]
            answer = _one(_ANSWER, rng)
            yield time, pieces, answer
            pieces = [*pieces, (next(texts), answer)]
            # Reading the answer and writing the next question.
            time += 0.03 * answer + rng.lognormal(np.log(45), 1.2)

    return map(conversation, _arrivals(rng, 0.5 * crowd))


def _documents(rng: np.random.Generator, crowd: float) -> Iterator[Iterator[Draft]]:
    """Questions about one to three of 3,000 documents, in a full crowd. A few are popular, and others become so."""
    texts = itertools.count()
    system = (next(texts), 600)
    count = max(3, round(3000 * crowd))
    library = [(next(texts), tokens) for tokens in Lengths(3000, 0.7, 20_000).draw(rng, count)]
    popularity = 1 / np.arange(1, count + 1) ** 0.9
    popularity /= popularity.sum()

    def question(start: float) -> Iterator[Draft]:
        if rng.random() < 0.02:
            first, second = rng.integers(count, size=2)
            library[first], library[second] = library[second], library[first]
        found = rng.choice(count, size=rng.integers(1, 4), replace=False, p=popularity)
        pieces = [system, *(library[i] for i in sorted(found)), (next(texts), _one(_QUESTION, rng))]
        yield start, pieces, _one(_ANSWER, rng)

    return map(question, _arrivals(rng, 2.0))


def _agents(rng: np.random.Generator, crowd: float) -> Iterator[Iterator[Draft]]:
    """Agents of eight kinds with long instructions, which call tools in loops and append what these say."""
    texts = itertools.count()
    kinds = [(next(texts), tokens) for tokens in Lengths(7000, 0.5, 30_000).draw(rng, 8)]
    task, result, call = Lengths(600, 1.0, 20_000), Lengths(900, 1.2, 20_000), Lengths(150, 0.8, 4000)

    def session(start: float) -> Iterator[Draft]:
        pieces = [kinds[int(8 * rng.random() ** 2)], (next(texts), _one(task, rng))]
        time, steps = start, rng.geometric(1 / 12)
        for _ in range(steps):
            answer = _one(call, rng)
            yield time, pieces, answer
            pieces = [*pieces, (next(texts), answer), (next(texts), _one(result, rng))]
            # Most tools answer within seconds; some wait for a person.
            wait = rng.lognormal(np.log(4), 1.0) if rng.random() < 0.95 else rng.lognormal(np.log(300), 1.0)
            time += 0.03 * answer + wait

    return map(session, _arrivals(rng, 0.15 * crowd))


def _system_prompts(rng: np.random.Generator, crowd: float) -> Iterator[Iterator[Draft]]:
    """Single questions after one of 400 system prompts, some of which are far more popular than others."""
    texts = itertools.count()
    count = max(1, round(400 * crowd))
    systems = [(next(texts), tokens) for tokens in Lengths(3000, 0.8, 30_000).draw(rng, count)]
    popularity = 1 / np.arange(1, count + 1)
    popularity /= popularity.sum()
    own = Lengths(1500, 1.0, 30_000)

    def question(start: float) -> Iterator[Draft]:
        yield start, [systems[rng.choice(count, p=popularity)], (next(texts), _one(own, rng))], _one(_ANSWER, rng)

    return map(question, _arrivals(rng, 4.0))


def _nothing(rng: np.random.Generator, crowd: float) -> Iterator[Iterator[Draft]]:
    """Prompts that share nothing."""
    texts = itertools.count()
    own = Lengths(4000, 1.0, 60_000)

    def question(start: float) -> Iterator[Draft]:
        yield start, [(next(texts), _one(own, rng))], _one(_ANSWER, rng)

    return map(question, _arrivals(rng, 2.0))


KINDS: dict[str, Callable[[np.random.Generator, float], Iterator[Iterator[Draft]]]] = {
    "chat": _chat,
    "documents": _documents,
    "agents": _agents,
    "system-prompts": _system_prompts,
    "nothing": _nothing,
}


def _one(lengths: Lengths, rng: np.random.Generator) -> int:
    return lengths.draw(rng, 1)[0]


def _arrivals(rng: np.random.Generator, rate: float) -> Iterator[float]:
    time = 0.0
    while True:
        time += rng.exponential(1 / rate)
        yield time


def _in_order(sessions: Iterator[Iterator[Draft]]) -> Iterator[Draft]:
    """Give the requests of sessions, which begin in order of time, in order of time."""
    waiting: list[tuple[float, int, Draft, Iterator[Draft]]] = []
    numbers = itertools.count()
    for session in sessions:
        first = next(session)
        while waiting and waiting[0][0] <= first[0]:
            _, _, draft, rest = heapq.heappop(waiting)
            yield draft
            following = next(rest, None)
            if following is not None:
                heapq.heappush(waiting, (following[0], next(numbers), following, rest))
        heapq.heappush(waiting, (first[0], next(numbers), first, session))


def _numbered(draft: Draft, numbers: dict[tuple[int, tuple[Piece, ...]], int]) -> TraceRequest:
    """Return a request with an id for each block; a block's id follows from the one before and what is in it."""
    time, pieces, answer = draft
    ids: list[int] = []
    content: list[Piece] = []
    room, total = BLOCK, 0

    def close() -> None:
        nonlocal content, room
        ids.append(numbers.setdefault((ids[-1] if ids else -1, tuple(content)), len(numbers)))
        content, room = [], BLOCK

    for text, tokens in pieces:
        left = min(tokens, _MOST_TOKENS - total)
        total += left
        while left:
            part = min(left, room)
            content.append((text, part))
            left, room = left - part, room - part
            if not room:
                close()
    if content:
        close()
    return TraceRequest(time, total, answer, tuple(ids))
