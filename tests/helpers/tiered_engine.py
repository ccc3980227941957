"""Engines with tiers behind the device, and what a request has from which."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.engines import SMALL, byte_level_tokenizer, run_all, settle
from helpers.prefixes import GREEDY, PROMPT, SIZE, Watched
from ktcompile.cache.rates import Rates
from ktcompile.engine.engine import Engine
from ktcompile.engine.options import EngineOptions
from ktcompile.engine.receipt import Receipt
from ktcompile.engine.sampling_params import SamplingParams

HOST = 1 << 22
FOUND = (len(PROMPT) - 1) // SIZE * SIZE  # of PROMPT, what need not be computed


def load_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have all loaded that is there, though tiny models compute faster than anything is loaded."""
    monkeypatch.setattr(Rates, "worth_loading", lambda self, tiers, first, recompute: len(tiers))
    monkeypatch.setattr(Rates, "seconds", lambda self, count, first, recompute: 600.0)


def engine_of(model: Any, **options: Any) -> Watched:
    record = EngineOptions(**{**SMALL, **options})
    return Watched(Engine.of_model(model, byte_level_tokenizer(), record, weights="the same"))


def ask(engine: Watched, prompt: list[int], params: SamplingParams = GREEDY, salt: str = "") -> tuple[Any, Receipt]:
    """Return a request's answer and receipt."""
    engine.logits.clear()
    engine.engine.add("0", prompt, params, cache_salt=salt)
    receipts = set()
    step = engine.engine.step

    def noting() -> Any:
        deltas = step()
        receipts.update(delta.receipt for delta in deltas if delta.request_id == "0")
        return deltas

    engine.engine.step = noting  # type: ignore[method-assign]
    answer = run_all(engine.engine)["0", 0]
    engine.engine.step = step  # type: ignore[method-assign]
    (receipt,) = receipts
    assert receipt.prompt_tokens == len(prompt)
    settle(engine.engine)
    return answer, receipt


def tiers_of(receipt: Receipt) -> tuple[int, int, int]:
    return receipt.device_tokens, receipt.host_tokens, receipt.disk_tokens
