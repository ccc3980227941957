"""ktcompile's engine in this process."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import torch

import ktcompile
from ktcompile.bench.model.formats import formats_of
from ktcompile.engine.engine import Delta, Engine
from ktcompile.engine.options import EngineOptions
from ktcompile.engine.sampling_params import SamplingParams

_ONE = SamplingParams(1, 0.0, ignore_eos=True)
_MOMENT = 0.001


def load(request: dict[str, Any]) -> KtEngine:
    """Return the engine for a request.

    model: a folder. length: of a prompt with its answer, at most. kv: options of its blocks and tiers, by their names.
    Without them it has no prefix cache. variant: as `formats_of` takes it. requests: the most at a time. threads.
    """
    if "kv" not in request:
        return KtEngine(_without_cache(**request))
    kv = dict(request["kv"])
    if "kv_disk_path" in kv:
        kv["kv_disk_path"] = Path(kv["kv_disk_path"])
    return KtEngine(Engine(request["model"], EngineOptions(max_model_len=request["length"], **kv)))


def _without_cache(model: str, variant: str, threads: int, requests: int, length: int, **rest: Any) -> Engine:
    torch.set_num_threads(threads)
    formats = formats_of(variant)
    loaded = ktcompile.load(model, weight_format=formats["weight_format"], packed_cache=None)
    options = EngineOptions(
        max_num_seqs=requests,
        max_model_len=length,
        enable_prefix_caching=False,
        **formats,
    )
    return Engine.of_model(loaded, Numbers(), options)


class Numbers:
    """Stands for a tokenizer, which a folder may lack."""

    def decode(self, token_ids: list[int], **_: Any) -> str:
        return "".join(f" {token}" for token in token_ids)


class KtEngine:
    """An engine that is stepped by hand. A step has scheduling and sampling in it, as it has for its users."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.vocab_size = engine.vocab_size
        self.facts: dict[str, float] = {"kv_blocks": engine.stats().num_blocks}
        self._names = (f"{n}" for n in itertools.count())
        self._running: list[str] = []
        self._tokens: dict[str, int] = {}

    def start(self, prompts: list[list[int]]) -> None:
        greedy = SamplingParams(self._engine.max_model_len - len(prompts[0]), 0.0, ignore_eos=True)
        for prompt in prompts:
            self._running.append(next(self._names))
            self._engine.add(self._running[-1], prompt, greedy)
        while len(self._tokens) < len(prompts):
            self._step()

    def step(self) -> list[int]:
        chosen = [self._tokens[name] for name in self._running]
        self._step()
        return chosen

    def finish(self) -> None:
        for name in self._running:
            self._engine.abort(name)
        while self._engine.has_requests:
            self._engine.step()
        self._running, self._tokens = [], {}

    def _step(self) -> None:
        for delta in self._engine.step():
            self._tokens[delta.request_id] = delta.token_ids[-1]

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
