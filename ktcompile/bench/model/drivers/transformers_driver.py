"""Models of transformers: as they come, compiled by a backend of torch.compile, or loaded by ktcompile."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache


def load(request: dict[str, Any]) -> Transformers:
    """Return the model of a request.

    model: a folder. kind: kt, kt-eager, transformers, inductor or zentorch. variant: weight formats of ktcompile, as
    `ktcompile.bench.model.formats` takes them, or an experts implementation of transformers. cache: dynamic or static.
    threads, steps.
    """
    torch.set_num_threads(request["threads"])
    torch.set_grad_enabled(False)
    static = request["cache"] == "static"
    model = _model(request["kind"], request["model"], request["variant"], static)
    gc.collect()
    gc.freeze()
    return Transformers(model, static, request["steps"])


def _model(kind: str, folder: str, variant: str, static: bool) -> Any:
    if kind == "kt-eager":
        import ktcompile

        return ktcompile.load(folder, weight_format=variant or "auto", packed_cache=None)
    others = {} if kind == "kt" or not variant else {"experts_implementation": variant}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **others)
    model.eval()
    if kind == "transformers":
        return model
    if kind == "inductor":
        return torch.compile(model, dynamic=True)
    if kind == "kt":
        from ktcompile.bench.model.formats import formats_of

        options: dict[str, Any] = {"weights": "take", **formats_of(variant)}
        # Each static cache of another length would be compiled anew where sizes are not dynamic from the beginning.
        return torch.compile(model, backend="kt", dynamic=True if static else None, options=options)
    assert kind == "zentorch", kind
    import zentorch  # noqa: F401  it registers the backend

    return torch.compile(model, backend="zentorch", dynamic=True)


class Transformers:
    """A causal language model. steps: the most that follow a prompt, which is room for static caches."""

    facts: dict[str, float]

    def __init__(self, model: Any, static: bool, steps: int) -> None:
        self._model, self._static, self._room = model, static, steps
        self.vocab_size: int = model.config.get_text_config().vocab_size
        self.facts = {}
        self._static_caches: dict[tuple[int, int], Any] = {}
        self._cache: Any = None
        self._chosen = torch.empty(0, dtype=torch.long)

    def start(self, prompts: list[list[int]]) -> None:
        self._cache = self._new_cache(len(prompts), len(prompts[0]) + self._room)
        self._call(torch.tensor(prompts))

    def step(self) -> list[int]:
        tokens: list[int] = self._chosen.tolist()
        self._call(self._chosen[:, None])
        return tokens

    def finish(self) -> None:
        self._cache = None

    def logits(self, prompt: list[int]) -> np.ndarray:
        cache = self._new_cache(1, len(prompt) + self._room)
        ids = torch.tensor([prompt])
        logits = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return np.asarray(logits[0, -1].float())

    def _call(self, ids: torch.Tensor) -> None:
        logits = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits
        self._chosen = logits[:, -1].float().argmax(-1)  # as generate() has them, and argmax of bf16 is slow

    def _new_cache(self, requests: int, length: int) -> Any:
        config = self._model.config
        if not self._static:
            return DynamicCache(config=config)
        # A compiled model knows the addresses of a static cache: another one would be compiled again.
        if (requests, length) not in self._static_caches:
            self._static_caches[requests, length] = StaticCache(config=config, max_cache_len=length)
        cache = self._static_caches[requests, length]
        cache.reset()
        return cache
