"""llama.cpp by the functions of llama-cpp-python, on a GGUF file."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import gguf_file
import llama_cpp
import numpy as np

_CHUNK = 2048  # tokens of a batch, its default
_BLOCK = 256  # of positions
_silent = llama_cpp.llama_log_callback(lambda level, text, data: None)


def load(request: dict[str, Any]) -> Llama:
    """Return the model of a request.

    gguf: the file. threads; requests, tokens: the most at a time, of all of them together.
    """
    llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p())
    return Llama(Path(request["gguf"]), request)


class Llama:
    """A model with one context. Requests are sequences that share its cells."""

    def __init__(self, file: Path, request: dict[str, Any]) -> None:
        model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        if not model:
            raise ValueError(f"llama.cpp cannot load {file}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = -(-request["tokens"] // _BLOCK) * _BLOCK
        settings.n_batch = _CHUNK
        settings.n_threads = settings.n_threads_batch = request["threads"]
        settings.n_seq_max = request["requests"]
        settings.kv_unified = True
        self._context = llama_cpp.llama_init_from_model(model, settings)
        if not self._context:
            raise ValueError(f"llama.cpp makes no context of {settings.n_ctx} tokens for {file}")
        self.vocab_size: int = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.facts = gguf_file.bytes_per_weight(file)
        self._positions: list[int] = []
        self._chosen: dict[int, int] = {}

    def start(self, prompts: list[list[int]]) -> None:
        last = len(prompts[0]) - 1
        self._positions = [len(prompt) for prompt in prompts]
        entries = [(t, at, n, at == last) for n, prompt in enumerate(prompts) for at, t in enumerate(prompt)]
        for begin in range(0, len(entries), _CHUNK):
            self._decode(entries[begin : begin + _CHUNK])

    def step(self) -> list[int]:
        chosen = [self._chosen[n] for n in range(len(self._positions))]
        self._decode([(t, at, n, True) for n, (t, at) in enumerate(zip(chosen, self._positions, strict=True))])
        self._positions = [at + 1 for at in self._positions]
        return chosen

    def finish(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def logits(self, prompt: list[int]) -> np.ndarray:
        try:
            self.start([prompt])
            return self._logits(len(prompt) - 1).copy()
        finally:
            self.finish()

    def _decode(self, entries: list[tuple[int, int, int, bool]]) -> None:
        """Run the model on (token, position, request, whether its logits are wanted), and wait for it."""
        batch = llama_cpp.llama_batch_init(len(entries), 0, 1)
        try:
            batch.n_tokens = len(entries)
            for i, (token, position, request, wanted) in enumerate(entries):
                batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, request
            status = llama_cpp.llama_decode(self._context, batch)
        finally:
            llama_cpp.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode of {len(entries)} tokens returned {status}")
        for i, (_, _, request, wanted) in enumerate(entries):
            if wanted:
                self._chosen[request] = int(self._logits(i).argmax())

    def _logits(self, entry: int) -> np.ndarray:
        """Return those of an entry of the last batch, until the next one."""
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, entry), (self.vocab_size,))
