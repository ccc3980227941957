"""Synthetic routing traces: requests of a prompt and an answer, whose experts are skewed by layer and by subject.

Parameters are taken from published figures where there are any, before any strategy was run on the traces:

- Popularity follows Zipf's law with an exponent that differs by layer. KTransformers' table of tokens per second by the
  share of experts on the device (Qwen3-Next, ShareGPT) gives the exponents: with half of the experts chosen by a
  profile of all conversations, 57 % of the expert time goes (an exponent of 0.2 over all subjects); with a tenth chosen
  by the conversation's own prompt, 46 % goes (0.75 within one). What changes with the subject is hence 0.7 in spread.
- Prompts are log-normal around 1,024 tokens (a chat that resends its history, code with its context), answers around
  256, as in public chat logs.
- `drift`: the subject's popularities are a random walk back to the mean that is forgotten over eight requests.
  `topics`: a subject lasts four requests on average, and the next differs at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ktcompile.plan.table import Floats
from ktcompile.plan.trace import Trace

KINDS = ("stationary", "drift", "topics")


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a synthetic trace is drawn from.

    kind: one of `KINDS`. model_seed: of the popularities that are the model's own; traces of one model share it.
    lasting, changing: spread of the logarithm of popularity, of the model and of the subject; a spread s alone is
    Zipf's law with exponent s. rare: spread of a tail of experts that no subject uses much. layer_spread: by how much
    the first two vary between layers. prompt, answer: median tokens; prompt_spread, answer_spread: of their logarithms.
    batch: requests that decode at once.
    forgets: requests until a drifting subject is forgotten. lasts: requests that a topic lasts on average.
    """

    kind: str
    num_layers: int
    num_experts: int
    top_k: int
    requests: int = 24
    batch: int = 1
    model_seed: int = 0
    lasting: float = 0.2
    changing: float = 0.7
    rare: float = 0.0
    layer_spread: float = 0.2
    prompt: int = 1024
    prompt_spread: float = 0.8
    longest_prompt: int = 4096
    answer: int = 256
    answer_spread: float = 0.6
    longest_answer: int = 1024
    forgets: float = 8.0
    lasts: float = 4.0
    subjects: int = 64

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind of trace {self.kind!r} is unknown; there are {', '.join(KINDS)}")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k is {self.top_k}; it must be 1 to the {self.num_experts} experts")
        for name in ("num_layers", "requests", "batch", "prompt", "answer", "subjects"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("lasting", "changing", "rare"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; a spread must not be negative")
        if self.forgets <= 0 or self.lasts < 1:
            raise ValueError("a subject lasts one request at least, and is forgotten after some")


def generate(traffic: Traffic, seed: int) -> Trace:
    """Return a trace of all requests of some traffic; the same seed gives the same trace."""
    rng = np.random.default_rng([seed, 1])
    popularity = _popularities(traffic, rng)
    sizes = _sizes(traffic, rng)
    parts = _Parts(traffic)
    slots: list[tuple[Floats, int]] = []  # popularity and tokens that are still to come
    for (prompt, answer), own in zip(sizes, popularity, strict=False):
        parts.prefill(prompt, own, rng)
        slots.append((own, answer))
        if len(slots) == traffic.batch:
            slots = _decode_until_one_ends(slots, parts, rng)
    while slots:
        slots = _decode_until_one_ends(slots, parts, rng)
    return parts.trace()


def _decode_until_one_ends(
    slots: list[tuple[Floats, int]], parts: _Parts, rng: np.random.Generator
) -> list[tuple[Floats, int]]:
    steps = min(left for _, left in slots)
    parts.decode(steps, [own for own, _ in slots], rng)
    return [(own, left - steps) for own, left in slots if left > steps]


class _Parts:
    """Steps of a trace as they are drawn."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self._parts: list[Trace] = []

    def prefill(self, tokens: int, popularity_LE: Floats, rng: np.random.Generator) -> None:
        t = self._traffic
        # Choices of a rate that a token's top_k different experts have, but independent of each other: over a prompt
        # the counts hardly differ.
        share = inclusion(popularity_LE, t.top_k) / t.top_k
        rows = np.minimum(rng.multinomial(tokens * t.top_k, share), tokens)
        self._parts.append(Trace.of_counts(rows[None], [tokens], [True]))

    def decode(self, steps: int, popularities: list[Floats], rng: np.random.Generator) -> None:
        t = self._traffic
        for begin in range(0, steps, 64):
            count = min(64, steps - begin)
            rows = np.zeros((count, t.num_layers, t.num_experts), dtype=np.int64)
            for popularity_LE in popularities:
                # The top_k first arrivals of a race at these rates are top_k different experts in proportion to them.
                arrival = rng.standard_exponential(rows.shape, dtype=np.float32)
                arrival /= popularity_LE.astype(np.float32)
                ids = np.argpartition(arrival, t.top_k - 1, axis=2)[:, :, : t.top_k]
                np.put_along_axis(rows, ids, np.take_along_axis(rows, ids, axis=2) + 1, axis=2)
            self._parts.append(Trace.of_counts(rows, [len(popularities)] * count, [False] * count))

    def trace(self) -> Trace:
        starts = np.cumsum([0] + [len(p.experts) for p in self._parts[:-1]])
        offsets = [p.offsets[:-1] + start for p, start in zip(self._parts, starts, strict=True)]
        experts = np.concatenate([p.experts for p in self._parts])
        return Trace(
            self._traffic.num_layers,
            self._traffic.num_experts,
            np.concatenate([*offsets, [len(experts)]]),
            experts,
            np.concatenate([p.rows for p in self._parts]),
            np.concatenate([p.tokens for p in self._parts]),
            np.concatenate([p.prefill for p in self._parts]),
        )


def inclusion(popularity_LE: Floats, top_k: int) -> Floats:
    """Return how likely each expert is among a token's top_k, which add up to top_k in each layer.

    In a race at these rates an expert has arrived by some moment with probability 1 - exp(-rate * moment). The moment
    taken is when top_k have arrived on average.
    """
    rate = popularity_LE / popularity_LE.sum(axis=1, keepdims=True)
    low, high = np.zeros((len(rate), 1)), np.full((len(rate), 1), 1e9)
    for _ in range(100):
        middle = np.sqrt(np.maximum(low, 1e-3) * high)
        more = (1 - np.exp(-rate * middle)).sum(axis=1, keepdims=True) < top_k
        low, high = np.where(more, middle, low), np.where(more, high, middle)
    likely: Floats = 1 - np.exp(-rate * high)
    likely *= top_k / likely.sum(axis=1, keepdims=True)
    return likely


def _sizes(traffic: Traffic, rng: np.random.Generator) -> list[tuple[int, int]]:
    t = traffic

    def draw(median: int, spread: float, longest: int) -> np.ndarray:
        drawn: np.ndarray = np.clip(median * np.exp(spread * rng.standard_normal(t.requests)), 8, longest).astype(int)
        return drawn

    prompts = draw(t.prompt, t.prompt_spread, t.longest_prompt)
    return list(zip(prompts.tolist(), draw(t.answer, t.answer_spread, t.longest_answer).tolist(), strict=True))


def _popularities(traffic: Traffic, rng: np.random.Generator) -> Iterator[Floats]:
    """Give the popularity of each request's experts [L, E] in turn."""
    t = traffic
    model = np.random.default_rng([t.model_seed, 0])
    shape = (t.num_layers, t.num_experts)
    scale = np.exp(t.layer_spread * model.standard_normal((t.num_layers, 1)))
    lasting = t.lasting * scale * _zipf_logs(shape, model)
    if t.rare:
        # Zipf's law upside down: most experts are used alike, and a few hardly ever.
        lasting -= t.rare * _zipf_logs(shape, np.random.default_rng([t.model_seed, 4]))
    subjects_rng = np.random.default_rng([t.model_seed, 2])
    stationary = _zipf_logs(shape, subjects_rng)
    walk = rng.standard_normal(shape)
    keep = float(np.exp(-1.0 / t.forgets))
    left, subject = 0, stationary
    while True:
        if t.kind == "topics":
            if not left:
                left = int(rng.geometric(1.0 / t.lasts))
                which = int(rng.integers(t.subjects))
                subject = _zipf_logs(shape, np.random.default_rng([t.model_seed, 3, which]))
            left -= 1
        elif t.kind == "drift":
            subject = _of_normal(walk)
            walk = keep * walk + np.sqrt(1 - keep * keep) * rng.standard_normal(shape)
        yield np.exp(lasting + t.changing * scale * subject)


def _zipf_logs(shape: tuple[int, int], rng: np.random.Generator) -> Floats:
    """Return logarithms of popularity that follow Zipf's law with exponent 1 in each layer, in random order."""
    logs = -np.log((1.0 + np.arange(shape[1])) / shape[1])
    return rng.permuted(np.broadcast_to(logs, shape), axis=1)


def _of_normal(normal_LE: Floats) -> Floats:
    """Return the same logarithms in the order of the given values of each layer."""
    rank = np.argsort(np.argsort(-normal_LE, axis=1), axis=1)
    result: Floats = -np.log((1.0 + rank) / normal_LE.shape[1])
    return result
