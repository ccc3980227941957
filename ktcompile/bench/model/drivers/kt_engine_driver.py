"""ktcompile's engine in this process, with its prefix cache."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

from ktcompile.engine.engine import Delta, Engine
from ktcompile.engine.options import EngineOptions
from ktcompile.engine.sampling_params import SamplingParams

_ONE = SamplingParams(1, 0.0, ignore_eos=True)
_MOMENT = 0.001


def load(request: dict[str, Any]) -> KtEngine:
    """Return the engine for a request. model: a folder. length: of a prompt with its answer, at most. kv: options of
    its blocks and tiers, by their names."""
    kv = dict(request["kv"])
    if "kv_disk_path" in kv:
        kv["kv_disk_path"] = Path(kv["kv_disk_path"])
    return KtEngine(Engine(request["model"], EngineOptions(max_model_len=request["length"], **kv)))


class KtEngine:
    """An engine that is stepped by hand."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.vocab_size = engine.vocab_size
        self.facts: dict[str, float] = {"kv_blocks": engine.stats().num_blocks}
        self._names = (f"{n}" for n in itertools.count())

    def first(self, prompt: list[int]) -> tuple[int, dict[str, int]]:
        self._engine.add(next(self._names), prompt, _ONE)
        deltas: list[Delta] = []
        while not deltas:
            deltas = self._engine.step()
        (token,), receipt = deltas[0].token_ids, deltas[0].receipt
        assert receipt is not None
        return token, {
            "device": receipt.device_tokens,
            "host": receipt.host_tokens,
            "disk": receipt.disk_tokens,
        }

    def settle(self) -> None:
        """Return when no block is held for a copy any more."""
        while (now := self._engine.stats()).num_free_blocks < now.num_blocks:
            time.sleep(_MOMENT)
