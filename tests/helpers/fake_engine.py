"""An engine without a model: what it says is a function of the prompt and the position."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ktcompile.engine.engine import Delta, EngineStats
from ktcompile.engine.outputs import FinishReason, Logprob
from ktcompile.engine.sampling_params import SamplingParams
from ktcompile.scheduler.batch import Chunk, Step
from ktcompile.scheduler.request import QueueFullError


@dataclass
class FakeRequest:
    prompt: list[int]
    params: SamplingParams
    deadline: float | None
    sent: int = 0


@dataclass
class FakeEngine:
    """Serves `width` requests at a time and lets `queue` wait. before_step: is called in each, and may raise. script:
    the texts of the tokens of each answer, which stops behind them; None: texts follow from the tokens."""

    tokenizer: Any = None
    model_name: str = "fake"
    max_model_len: int = 2048
    vocab_size: int = 4096
    width: int = 4
    queue: int = 1_000_000
    before_step: Callable[[], None] = lambda: None
    script: Sequence[str] | None = None
    requests: dict[str, FakeRequest] = field(default_factory=dict)
    aborted: list[str] = field(default_factory=list)
    steps: int = 0
    closed: bool = False
    last_step: Step | None = None

    @property
    def has_requests(self) -> bool:
        return bool(self.requests)

    def add(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        deadline: float | None = None,
        cache_salt: str = "",
    ) -> None:
        if len(self.requests) >= self.width + self.queue:
            raise QueueFullError("too much waits", retry_after=3)
        if not prompt_token_ids:
            raise ValueError("the prompt has no tokens")
        assert request_id not in self.requests
        self.requests[request_id] = FakeRequest(list(prompt_token_ids), params, deadline)

    def abort(self, request_id: str) -> None:
        if self.requests.pop(request_id, None) is not None:
            self.aborted.append(request_id)

    def step(self) -> list[Delta]:
        self.steps += 1
        self.before_step()
        deltas, chunks = [], []
        for name, request in list(self.requests.items())[: self.width]:
            place = len(request.prompt) + request.sent
            begin = 0 if request.sent == 0 else place - 1
            chunks.append(Chunk(f"{name}/0", (0,) * (place - begin), begin, (), place - 1, True))
            token = fake_token(request.prompt, request.sent)
            request.sent += 1
            late = request.deadline is not None and time.monotonic() >= request.deadline
            stops = self.script is not None and request.sent == len(self.script)
            done = late or stops or request.sent == (request.params.max_tokens or 16)
            reason: FinishReason | None = ("timeout" if late else "stop" if stops else "length") if done else None
            text = f"{token} " if self.script is None else self.script[request.sent - 1]
            logprobs = None if request.params.logprobs is None else [{token: Logprob(-1.0, 1, f"{token} ")}]
            for index in range(request.params.n):
                deltas.append(Delta(name, index, text, (token,), logprobs, reason, None, len(request.prompt)))
            if done:
                del self.requests[name]
        self.last_step = Step(tuple(chunks), ())
        return deltas

    def tier_counters(self) -> dict[str, int]:
        return {}

    def watch_tiers(self, watch: Callable[[str, int], None]) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def stats(self) -> EngineStats:
        running = min(self.width, len(self.requests))
        return EngineStats(running, len(self.requests) - running, 8, 8 - running, running / 8, 0, 0, 0, self.steps)


def fake_token(prompt: list[int], position: int) -> int:
    return zlib.crc32(repr((prompt, position)).encode()) % 4096


def fake_tokens(prompt: list[int], count: int) -> list[int]:
    """What a request gets."""
    return [fake_token(prompt, i) for i in range(count)]
