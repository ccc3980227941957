"""Prompts that are computed for the tiers behind the device, before anybody asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ktcompile.engine.engine import Engine
from ktcompile.engine.sampling_params import SamplingParams
from ktcompile.scheduler.behind import MOST_KEPT

# What is given to a tier is kept or refused within so many seconds, or the disk does not answer.
_PATIENCE = 60.0
# Blocks that are computed before their copies are waited for: of more at a time some would not be kept.
_PIECE = MOST_KEPT // 2
_NAME = "warm"


@dataclass(frozen=True, slots=True)
class Warmed:
    """What became of a prompt, in tokens. there: that the tiers had before. computed: by the model. stored: that they
    have beside these now. What is behind its last whole block is kept by none."""

    tokens: int
    there: int
    computed: int
    stored: int


def warm(
    engine: Engine, ids: Sequence[int], cache_salt: str = "", progress: Callable[[int], object] = lambda _: None
) -> Warmed:
    """Have a prompt's keys and values kept in the tiers behind the device of an engine that does nothing else.

    progress: is told of tokens as they are computed. ValueError: as of `Engine.add`.
    """
    size = engine.block_size
    whole = list(ids[: len(ids) // size * size])
    there = kept = engine.kept_tokens(whole, cache_salt, _PATIENCE)
    end, computed = kept, 0
    while kept == end < len(whole):  # kept is less where a block was refused, as for want of room
        end = min(len(whole), end + _PIECE * size)
        for tokens in _steps(engine, whole[:end], cache_salt):
            computed += tokens
            progress(tokens)
        kept = engine.kept_tokens(whole[:end], cache_salt, _PATIENCE)
    return Warmed(len(ids), there, computed, kept - there)


def _steps(engine: Engine, ids: list[int], cache_salt: str) -> Iterator[int]:
    """Run a prompt, and yield how many tokens each step computed."""
    engine.add(_NAME, ids, SamplingParams(max_tokens=1), cache_salt=cache_salt)
    try:
        while engine.has_requests:
            engine.step()
            if engine.last_step is not None:
                yield engine.last_step.num_tokens
    finally:
        engine.abort(_NAME)
