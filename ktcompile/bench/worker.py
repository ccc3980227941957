"""The contenders of one library, in a process of their own: reads requests as JSON lines and answers each with one.

    set up   library, shape, threads, contenders  ->  problems: why a contender cannot run, by name
    check    contender, tokens                    ->  rows: what it returns for inputs that anyone can make
    time     contender, tokens, turn, budget      ->  seconds and distinct experts of each call

An answer may instead be a problem. This runs as a script, not as a part of ktcompile, which it imports for contenders
of ktcompile alone: a peer's process holds the peer and nothing else.

Shape suffixes: T tokens, K top_k, H hidden_size, I intermediate_size, E experts.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

Run = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# Calls of a turn: as many as fit into its budget, within these bounds; a call of more than half a second is alone.
_FEWEST_CALLS, _MOST_CALLS, _LONG_CALL = 3, 40, 0.5
# Each turn begins with calls that are not counted, which wake up threads.
_WARM_UP_SECONDS, _MOST_WARM_UPS = 0.02, 4
# Experts are windows on one stream of random numbers, this far apart.
_WINDOW_STEP = 1184


class Dimensions(NamedTuple):
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int


@dataclass(frozen=True, slots=True)
class Ready:
    """A contender that can run. layers: copies of its weights. weights_dtype: of topk_weights, as it takes them."""

    run: Run
    layers: int
    weights_dtype: torch.dtype = torch.bfloat16


# Contenders by name, or why one cannot run.
Made = dict[str, Ready | str]


class Routing:
    """Deals experts to the calls of a turn.

    How many experts a call's tokens share is as in uniform random routing. Which ones these are goes round: a call
    touches those that were touched longest ago, and calls go round the layers. So what a call reads was last
    read after (nearly) all other weights were, and comes from memory. Independent draws would find a part of the
    previous call's experts in the cache, an eighth of them at one token with 8 of 64.
    """

    def __init__(self, shape: Dimensions, layers: int, seed: tuple[int, ...]) -> None:
        self._shape = shape
        self._random = np.random.default_rng(seed)
        self._longest_ago = [self._random.permutation(shape.num_experts) for _ in range(layers)]
        self._calls = 0

    def deal(self, tokens: int) -> tuple[int, np.ndarray, int]:
        """Return the layer, ids [T, K] and the number of distinct experts of the next call."""
        experts, top_k = self._shape.num_experts, self._shape.top_k
        layer = self._calls % len(self._longest_ago)
        self._calls += 1
        drawn_TK = self._random.random((tokens, experts)).argsort(axis=1)[:, :top_k]
        touched = np.unique(drawn_TK)
        order = self._longest_ago[layer]
        chosen, others = order[: len(touched)], order[len(touched) :]
        self._longest_ago[layer] = np.concatenate((others, chosen))
        name = np.zeros(experts, dtype=np.int64)
        name[touched] = self._random.permutation(chosen)
        return layer, name[drawn_TK], len(touched)


def make_source(shape: Dimensions) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (gate_up [E, 2I, H], down [E, H, I]) in bf16, the same in every process.

    The experts overlap in memory, so that the unquantised weights of a large layer take the room of one expert.
    """
    e, h, i = shape.num_experts, shape.hidden_size, shape.intermediate_size
    generator = torch.Generator().manual_seed(0)

    def windows(rows: int, columns: int) -> torch.Tensor:
        stream = torch.randn(rows * columns + e * _WINDOW_STEP, generator=generator).mul_(0.02).bfloat16()
        return stream.as_strided((e, rows, columns), (_WINDOW_STEP, columns, 1))

    return windows(2 * i, h), windows(h, i)


def make_inputs(shape: Dimensions, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (hidden_states [T, H], topk_weights [T, K]) in bf16, the same in every process."""
    generator = torch.Generator().manual_seed(tokens)
    x_TH = torch.randn(tokens, shape.hidden_size, generator=generator).bfloat16()
    weights_TK = torch.softmax(torch.rand(tokens, shape.top_k, generator=generator), -1).bfloat16()
    return x_TH, weights_TK


def make_checked_ids(shape: Dimensions, tokens: int) -> torch.Tensor:
    """Return the ids [T, K] with which contenders are checked."""
    return torch.from_numpy(Routing(shape, 1, (0, tokens)).deal(tokens)[1])


def main() -> None:
    # A stopped process outlives its parent, and these hold gigabytes.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    torch.set_grad_enabled(False)
    process = _Process()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = process.answer(request.pop("do"), request)
        except Exception as error:  # of any library; who asked decides what to do without it
            answer = {"problem": _reason(error)}
        print("\n@" + json.dumps(answer), flush=True)  # libraries print to the same stream


class _Process:
    """The contenders, and what is known of them so far."""

    def __init__(self) -> None:
        self._contenders: dict[str, Ready] = {}
        self._call_seconds: dict[tuple[str, int], float] = {}
        self._inputs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def answer(self, what: str, request: dict[str, Any]) -> dict[str, Any]:
        if what == "set up":
            return self._set_up(**request)
        if what == "check":
            return self._check(**request)
        assert what == "time", what
        return self._time(**request)

    def _set_up(self, library: str, shape: list[int], threads: int, contenders: list[dict[str, Any]]) -> dict[str, Any]:
        torch.set_num_threads(threads)
        self._shape = Dimensions(*shape)
        made = _LIBRARIES[library](self._shape, threads, contenders)
        self._contenders = {name: c for name, c in made.items() if isinstance(c, Ready)}
        gc.collect()
        gc.freeze()
        return {"problems": {name: why for name, why in made.items() if isinstance(why, str)}}

    def _check(self, contender: str, tokens: int) -> dict[str, Any]:
        ready = self._contenders[contender]
        x_TH, weights_TK = make_inputs(self._shape, tokens)
        ids_TK = make_checked_ids(self._shape, tokens)
        return {"rows": ready.run(0, x_TH, ids_TK, weights_TK.to(ready.weights_dtype)).float().tolist()}

    def _time(self, contender: str, tokens: int, turn: int, budget: float) -> dict[str, Any]:
        ready = self._contenders[contender]
        if tokens not in self._inputs:
            self._inputs[tokens] = make_inputs(self._shape, tokens)
        x_TH, weights_TK = self._inputs[tokens]
        weights_TK = weights_TK.to(ready.weights_dtype)
        routing = Routing(self._shape, ready.layers, (1 + turn, tokens))

        def call(layer: int, ids_TK: torch.Tensor) -> float:
            begin = time.perf_counter()
            ready.run(layer, x_TH, ids_TK, weights_TK)
            return time.perf_counter() - begin

        def deal(calls: int) -> list[tuple[int, torch.Tensor, int]]:
            dealt = (routing.deal(tokens) for _ in range(calls))
            return [(layer, torch.from_numpy(ids), distinct) for layer, ids, distinct in dealt]

        known = self._call_seconds.get((contender, tokens))
        if known is None:  # the first call at this size allocates
            (layer, ids, _), (again, other_ids, _) = deal(2)
            known = call(layer, ids)
            if known < _LONG_CALL:
                known = call(again, other_ids)
        warm_ups = min(_MOST_WARM_UPS, math.ceil(_WARM_UP_SECONDS / known)) if known < _LONG_CALL else 0
        fewest = _FEWEST_CALLS if known < _LONG_CALL else 1
        dealt = deal(warm_ups + max(fewest, min(_MOST_CALLS, int(budget / known))))
        seconds = [call(layer, ids) for layer, ids, _ in dealt][warm_ups:]
        self._call_seconds[contender, tokens] = statistics.median(seconds)
        return {"seconds": seconds, "distinct": [distinct for _, _, distinct in dealt[warm_ups:]]}


def _ktcompile(shape: Dimensions, threads: int, contenders: list[dict[str, Any]]) -> Made:
    """One layout serves every instruction set, so contenders that differ in that alone share their weights."""
    import copy

    import ktcompile
    from ktcompile.ops.moe import run

    ktcompile.set_num_threads(threads)
    torch.set_num_threads(1)  # experts are packed side by side; threads of torch's own would be in the way
    source = make_source(shape)
    packed: dict[str, list[ktcompile.ops.PackedExperts]] = {}
    made: Made = {}

    def make(weight_format: str, isa: str, layers: int) -> Ready:
        if weight_format not in packed:
            packed[weight_format] = [
                ktcompile.ops.pack_experts(*source, weight_format=weight_format, isa=isa) for _ in range(layers)
            ]
        own = [copy.copy(experts) for experts in packed[weight_format]]
        for experts in own:
            experts.isa = isa
        return Ready(lambda layer, x, ids, weights: run(x, ids, weights, own[layer]), layers)

    for c in contenders:
        try:
            made[c["name"]] = make(c["weight_format"], c["isa"], c["layers"])
        except (ValueError, RuntimeError, MemoryError) as error:
            made[c["name"]] = _reason(error)
    return made


def _transformers(shape: Dimensions, threads: int, contenders: list[dict[str, Any]]) -> Made:
    """The implementations of one experts class, on the same weights."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    source = make_source(shape)
    layers = max(c["layers"] for c in contenders)
    weights = [[torch.nn.Parameter(t.contiguous(), requires_grad=False) for t in source] for _ in range(layers)]

    def make(implementation: str) -> Ready:
        config = Qwen3MoeConfig(
            hidden_size=shape.hidden_size,
            moe_intermediate_size=shape.intermediate_size,
            num_experts=shape.num_experts,
            num_experts_per_tok=shape.top_k,
        )
        config._experts_implementation = implementation
        own = []
        for gate_up, down in weights:
            with torch.device("meta"):
                experts = Qwen3MoeExperts(config)  # type: ignore[no-untyped-call]
            experts.gate_up_proj, experts.down_proj = gate_up, down
            own.append(experts)
        return Ready(lambda layer, x, ids, w: own[layer](x, ids, w), layers)

    return {c["name"]: make(c["variant"]) for c in contenders}


def _kt_kernel(shape: Dimensions, threads: int, contenders: list[dict[str, Any]]) -> Made:
    """kt-kernel, KTransformers' CPU kernels."""
    from kt_kernel import kt_kernel_ext as ext

    pool = ext.WorkerPoolConfig()
    pool.subpool_count, pool.subpool_numa_map = 1, [0]
    pool.subpool_thread_count = [threads]
    cpu = ext.CPUInfer(pool)
    identity = torch.arange(shape.num_experts, dtype=torch.int64)

    def make_layer(variant: str, max_tokens: int) -> Any:
        gate_up, down = make_source(shape)
        sources = [
            t.contiguous() for t in (gate_up[:, : shape.intermediate_size], gate_up[:, shape.intermediate_size :])
        ]
        sources.append(down.contiguous())
        config = ext.moe.MOEConfig(*shape, 0)
        config.max_len = -(-max_tokens // 128) * 128
        config.gate_proj, config.up_proj, config.down_proj = (t.data_ptr() for t in sources)
        if "BF16" in variant:
            config.gate_scale = config.up_scale = config.down_scale = 0
        config.pool = cpu.backend_
        moe = getattr(ext.moe, variant)(config)
        cpu.submit(moe.load_weights_task(identity.data_ptr()))
        cpu.sync()  # the weights have been copied
        return moe

    def make(variant: str, layers: int, max_tokens: int) -> Ready:
        own = [make_layer(variant, max_tokens) for _ in range(layers)]

        def run(layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            out = torch.empty_like(x)
            count = torch.tensor([len(x)], dtype=torch.int32)
            pointers = (t.data_ptr() for t in (ids, weights, x, out))
            cpu.submit(own[layer].forward_task(count.data_ptr(), shape.top_k, *pointers, False))
            cpu.sync()
            return out

        return Ready(run, layers, torch.float32)

    made: Made = {}
    for c in contenders:
        if not hasattr(ext.moe, c["variant"]):
            made[c["name"]] = f"kt-kernel has no {c['variant']} for this CPU"
            continue
        try:
            made[c["name"]] = make(c["variant"], c["layers"], c["max_tokens"])
        except (AttributeError, RuntimeError, TypeError) as error:
            made[c["name"]] = _reason(error)
    return made


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


_LIBRARIES: dict[str, Callable[[Dimensions, int, list[dict[str, Any]]], Made]] = {
    "ktcompile": _ktcompile,
    "transformers": _transformers,
    "kt-kernel": _kt_kernel,
}

if __name__ == "__main__":
    main()
