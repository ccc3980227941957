"""What a thread that runs an engine needs of it, and of who watches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ktcompile.engine.outputs import FinishReason
from ktcompile.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from ktcompile.engine.engine import Delta, EngineStats
    from ktcompile.scheduler.batch import Step


class EngineLike(Protocol):
    """What is used of `ktcompile.engine.engine.Engine`. What changes is called by one thread. last_step: what `step`
    computed, where names of requests have "/" and the number of the answer behind them."""

    model_name: str
    tokenizer: Any
    max_model_len: int
    vocab_size: int
    last_step: Step | None

    @property
    def has_requests(self) -> bool: ...
    def add(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        deadline: float | None = None,
        cache_salt: str = "",
    ) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def step(self) -> Sequence[Delta]: ...
    def stats(self) -> EngineStats: ...
    def tier_counters(self) -> dict[str, int]: ...
    def watch_tiers(self, watch: Callable[[str, int], None]) -> None: ...
    def close(self) -> None: ...


class Observer(Protocol):
    """Is told what happens, on the thread of the engine, and must be quick. Times are those of time.monotonic.

    added: a request that was taken; arrival: when it was asked for. stepped: a step that took `seconds` ended;
    step: what it computed.
    dropped: a request will have no more deltas, since it was aborted or its step failed.
    """

    def added(self, request_id: str, num_prompt_tokens: int, params: SamplingParams, arrival: float) -> None: ...
    def stepped(self, deltas: Sequence[Delta], stats: EngineStats, step: Step | None, seconds: float) -> None: ...
    def dropped(self, request_id: str, reason: FinishReason) -> None: ...
