"""One contender in a process of its own: reads jobs as JSON lines, answers with the times of each call.

The first line is the set-up: contender, shape, layers, dtype, threads, seed. It answers with what it is and its
error against fp32. Two layers or more take turns, so that weights come from memory and not from a cache.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

Run = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def main() -> None:
    setup = json.loads(sys.stdin.readline())
    torch.set_num_threads(setup["threads"])
    torch.set_grad_enabled(False)
    run = _CONTENDERS[setup["contender"]](setup)
    _reply({"contender": setup["contender"], "error": _error(setup, run), **_ceilings(setup)})
    for line in sys.stdin:
        job = json.loads(line)
        _reply(_ceilings(setup) if job.get("ceilings") else _time(setup, run, **job))


def make_routing(setup: dict[str, Any], tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (hidden_states, topk_ids, topk_weights), uniform routing, the same for every contender."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, setup["hidden_size"], generator=generator).to(_dtype(setup))
    ids = torch.rand(tokens, setup["num_experts"], generator=generator).argsort(-1)[:, : setup["top_k"]]
    weights = torch.softmax(torch.rand(tokens, setup["top_k"], generator=generator), -1)
    return x, ids.contiguous(), weights.to(_dtype(setup))


def _time(setup: dict[str, Any], run: Run, tokens: int, repeats: int, seed: int) -> dict[str, list[float]]:
    """Return the seconds of each call, and how many distinct experts its tokens touch."""
    inputs = [make_routing(setup, tokens, seed + i) for i in range(repeats)]
    for i in range(min(repeats, 4)):  # wakes threads up, sizes buffers
        run(i % setup["layers"], *inputs[0])
    seconds = []
    for i, (x, ids, weights) in enumerate(inputs):
        begin = time.perf_counter()
        run(i % setup["layers"], x, ids, weights)
        seconds.append(time.perf_counter() - begin)
    return {"seconds": seconds, "distinct": [float(len(set(ids.flatten().tolist()))) for _, ids, _ in inputs]}


def _weights(setup: dict[str, Any], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(setup["seed"] + layer)
    e, h, i = setup["num_experts"], setup["hidden_size"], setup["intermediate_size"]
    gate_up, down = torch.empty(e, 2 * i, h, dtype=_dtype(setup)), torch.empty(e, h, i, dtype=_dtype(setup))
    for tensor in (gate_up, down):
        for expert in tensor:
            expert.copy_(torch.randn(expert.shape) * 0.02)
    return gate_up, down


def _error(setup: dict[str, Any], run: Run) -> float:
    """Relative error of the first layer on three tokens, against fp64."""
    from ktcompile.ops import ExpertsSpec, reference

    x, ids, weights = make_routing(setup, 3, setup["seed"])
    wanted = reference.moe(x, ids, weights, *_weights(setup, 0), ExpertsSpec())
    return float((run(0, x, ids, weights).double() - wanted).norm() / wanted.norm())


def _ktcompile(setup: dict[str, Any]) -> Run:
    import ktcompile

    ktcompile.set_num_threads(setup["threads"])
    layers = [
        ktcompile.ops.pack_experts(*_weights(setup, layer), weight_format=setup["weight_format"], isa=setup["isa"])
        for layer in range(setup["layers"])
    ]
    return lambda layer, x, ids, weights: ktcompile.ops.moe(x, ids, weights, layers[layer])


def _transformers(implementation: str) -> Callable[[dict[str, Any]], Run]:
    def make(setup: dict[str, Any]) -> Run:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        config = Qwen3MoeConfig(
            hidden_size=setup["hidden_size"],
            moe_intermediate_size=setup["intermediate_size"],
            num_experts=setup["num_experts"],
            num_experts_per_tok=setup["top_k"],
        )
        config._experts_implementation = implementation
        layers = []
        for layer in range(setup["layers"]):
            with torch.device("meta"):
                experts = Qwen3MoeExperts(config)  # type: ignore[no-untyped-call]
            gate_up, down = _weights(setup, layer)
            experts.gate_up_proj = torch.nn.Parameter(gate_up, requires_grad=False)
            experts.down_proj = torch.nn.Parameter(down, requires_grad=False)
            layers.append(experts)
        return lambda layer, x, ids, weights: layers[layer](x, ids, weights)

    return make


def _kt_kernel(setup: dict[str, Any]) -> Run:
    """kt-kernel, KTransformers' CPU kernels, in the class for bf16 weights."""
    from kt_kernel import kt_kernel_ext as ext

    pool = ext.WorkerPoolConfig()
    pool.subpool_count, pool.subpool_numa_map = 1, [0]
    pool.subpool_thread_count = [setup["threads"]]
    cpu = ext.CPUInfer(pool)
    shape = [setup[k] for k in ("num_experts", "top_k", "hidden_size", "intermediate_size")]
    identity = torch.arange(shape[0], dtype=torch.int64)
    layers = []
    for layer in range(setup["layers"]):
        gate_up, down = _weights(setup, layer)
        gate, up = (t.contiguous() for t in gate_up.chunk(2, dim=1))
        config = ext.moe.MOEConfig(*shape, 0)
        config.max_len = 4096
        config.gate_proj, config.up_proj, config.down_proj = gate.data_ptr(), up.data_ptr(), down.data_ptr()
        config.gate_scale = config.up_scale = config.down_scale = 0
        config.pool = cpu.backend_
        moe = ext.moe.AMXBF16_MOE(config)
        cpu.submit(moe.load_weights_task(identity.data_ptr()))
        cpu.sync()
        layers.append(moe)

    def run(layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out, floats = torch.empty_like(x), weights.float()
        count = torch.tensor([len(x)], dtype=torch.int32)
        pointers = (t.data_ptr() for t in (ids, floats, x, out))
        cpu.submit(layers[layer].forward_task(count.data_ptr(), setup["top_k"], *pointers, False))
        cpu.sync()
        return out

    return run


def _ceilings(setup: dict[str, Any]) -> dict[str, float]:
    """The machine's ceilings as ktcompile measures them; nothing for other contenders."""
    if setup["contender"] != "ktcompile":
        return {}
    from ktcompile.bench.roofline import measure

    ceilings = measure(setup["threads"])
    return {"bandwidth": ceilings.bandwidth, "flops": ceilings.flops}


def _dtype(setup: dict[str, Any]) -> torch.dtype:
    result: torch.dtype = getattr(torch, setup["dtype"])
    return result


def _reply(message: dict[str, Any]) -> None:
    print("\n@" + json.dumps(message), flush=True)  # libraries print to the same stream


_CONTENDERS: dict[str, Callable[[dict[str, Any]], Run]] = {
    "ktcompile": _ktcompile,
    "transformers eager": _transformers("eager"),
    "transformers grouped_mm": _transformers("grouped_mm"),
    "kt-kernel": _kt_kernel,
}

if __name__ == "__main__":
    main()
