"""Engines of tiny models, and what requests get from them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from helpers.moe_models import build, case_of
from helpers.text_model import byte_level_tokenizer
from ktcompile.engine.engine import Engine
from ktcompile.engine.options import EngineOptions
from ktcompile.engine.outputs import FinishReason
from ktcompile.engine.sampling_params import SamplingParams

# Small blocks and chunks, so that short prompts have several.
SMALL: dict[str, Any] = {
    "max_num_seqs": 40,
    "max_num_batched_tokens": 256,
    "block_size": 8,
    "chunk_size": 16,
    "kv_device_memory": 1 << 24,
}
_FEW_POSITIONS = {"max_position_embeddings": 256}


def tiny(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a tiny random model of a family of transformers."""
    return build(case_of(family), dtype, **_FEW_POSITIONS)[0]


def engine_of(model: Any, **options: Any) -> Engine:
    """Return an engine with small blocks. options: of `EngineOptions`."""
    return Engine.of_model(model, byte_level_tokenizer(), EngineOptions(**{**SMALL, **options}))


@dataclass
class Answer:
    """What came of one answer of a request."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None


def prompts(count: int, vocabulary: int = 97, longest: int = 50) -> list[list[int]]:
    """Return prompts of different lengths."""
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def run_all(engine: Engine, limit: int = 2000) -> dict[tuple[str, int], Answer]:
    """Run steps until nothing is left; return what answers became, by request and index."""
    answers: dict[tuple[str, int], Answer] = {}
    for _ in range(limit):
        if not engine.has_requests:
            return answers
        for delta in engine.step():
            answer = answers.setdefault((delta.request_id, delta.index), Answer())
            assert answer.finish_reason is None, "a delta comes behind the last"
            answer.token_ids += delta.token_ids
            answer.text += delta.text
            answer.finish_reason = delta.finish_reason
    raise AssertionError("requests do not end")


def serve(engine: Engine, given: Sequence[tuple[list[int], SamplingParams]]) -> list[Answer]:
    """Return the first answers of requests that come together."""
    for number, (prompt, params) in enumerate(given):
        engine.add(str(number), prompt, params)
    answers = run_all(engine)
    check_empty(engine)
    return [answers[str(number), 0] for number in range(len(given))]


def settle(engine: Engine) -> None:
    """Wait until nothing is held for copies to other tiers."""
    for _ in range(6000):
        if (now := engine.stats()).num_free_blocks == now.num_blocks:
            return
        time.sleep(0.01)
    raise AssertionError("blocks are held for ever")


def check_empty(engine: Engine) -> None:
    """Assert that nobody holds anything any more."""
    settle(engine)
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.num_free_blocks == stats.num_blocks and stats.kv_usage == 0
    engine._pool.check()


def memory_of(engine: Engine, positions: int) -> int:
    """Return the bytes of keys and values of so many positions."""
    return engine._runner.kv_bytes * positions // (engine.stats().num_blocks * SMALL["block_size"])


def push_out(engine: Engine) -> None:
    """Have all blocks of the device handed out to others, of which no tier is given anything."""
    blocks = engine._pool.take(engine._pool.num_blocks)
    assert blocks is not None
    engine._pool.release(blocks)
