"""vLLM on the CPU, its engine in this process, so that it stops with it."""

from __future__ import annotations

import itertools
from typing import Any

from vllm import LLM, SamplingParams

# Tokens of a step at most, as many as llama.cpp takes at once.
_BATCH = 2048


def load(request: dict[str, Any]) -> Vllm:
    """Return the engine for a request.

    model: a folder. requests, length: the most at a time, of each. kv: what is said of its blocks, by the engine's own
    names; it may be missing.
    """
    # The engine begins with a step of as many tokens as there may be in one.
    batch = max(min(_BATCH, request["requests"] * request["length"]), request["requests"])
    llm = LLM(
        model=request["model"],
        dtype="auto",
        skip_tokenizer_init=True,
        max_model_len=request["length"],
        max_num_seqs=request["requests"],
        max_num_batched_tokens=batch,
        **request.get("kv", {"enable_prefix_caching": False}),
    )
    engine = Vllm(llm)
    if "kv" in request:
        engine.facts["kv_blocks"] = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    return engine


class Vllm:
    """An engine that is stepped by hand. A step has scheduling and sampling in it, as it has for its users."""

    facts: dict[str, float]

    def __init__(self, llm: Any) -> None:
        self._engine = llm.llm_engine
        self.vocab_size: int = self._engine.model_config.get_vocab_size()
        self.facts = {}
        self._names = (f"{n}" for n in itertools.count())
        self._running: list[str] = []
        self._tokens: dict[str, int] = {}

    def start(self, prompts: list[list[int]]) -> None:
        length = self._engine.model_config.max_model_len - len(prompts[0])
        greedy = SamplingParams(max_tokens=length, temperature=0, ignore_eos=True, detokenize=False)
        for prompt in prompts:
            self._running.append(next(self._names))
            self._engine.add_request(self._running[-1], {"prompt_token_ids": prompt}, greedy)
        while len(self._tokens) < len(prompts):
            self._step()

    def step(self) -> list[int]:
        chosen = [self._tokens[name] for name in self._running]
        self._step()
        return chosen

    def first(self, prompt: list[int]) -> tuple[int, dict[str, int]]:
        one = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False)
        self._engine.add_request(next(self._names), {"prompt_token_ids": prompt}, one)
        outputs: list[Any] = []
        while not outputs:
            outputs = self._engine.step()
        return outputs[0].outputs[0].token_ids[-1], {"device": outputs[0].num_cached_tokens or 0}

    def settle(self) -> None:
        pass

    def finish(self) -> None:
        self._engine.abort_request(self._running)
        while self._engine.has_unfinished_requests():
            self._engine.step()
        self._running, self._tokens = [], {}

    def _step(self) -> None:
        for output in self._engine.step():
            self._tokens[output.request_id] = output.outputs[0].token_ids[-1]
