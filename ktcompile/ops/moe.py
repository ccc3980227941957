"""The MoE operators.

`kt::moe(x, ids, weights, handle)` runs packed experts. `kt::experts(x, ids, weights, gate_up, down, ...)` names the
plain weights and finds their packed form at run time; the compiler turns it into `kt::moe`.

Shape suffixes: T tokens, K top_k, H hidden_size.
"""

from __future__ import annotations

import torch

from ktcompile.ops.experts import PackedExperts, from_handle
from ktcompile.ops.library import BETWEEN_CUDA_GRAPHS, LIBRARY, register_without_backward
from ktcompile.ops.observer import observe
from ktcompile.ops.spec import ExpertsSpec
from ktcompile.ops.store import expert_store
from ktcompile.ops.threads import native_threads
from ktcompile.quant import native_dtype

_CPU = torch.device("cpu")

for _schema in (
    "moe(Tensor hidden_states, Tensor topk_ids, Tensor topk_weights, Tensor experts) -> Tensor",
    "experts(Tensor hidden_states, Tensor topk_ids, Tensor topk_weights, Tensor gate_up_proj, Tensor down_proj,"
    " Tensor? gate_up_bias, Tensor? down_bias, str spec) -> Tensor",
):
    LIBRARY.define(_schema, tags=BETWEEN_CUDA_GRAPHS)


def moe(
    hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, experts: PackedExperts
) -> torch.Tensor:
    """Return the weighted sum of the chosen experts' outputs, [T, H] in the dtype of `hidden_states`.

    hidden_states: [T, H], fp32, fp16 or bf16, T may be 0. topk_ids: [T, K] int64 or int32; ids of num_experts
    or more are skipped. topk_weights: [T, K], fp32, fp16 or bf16, finite.
    Row t depends on row t of the arguments alone, bit for bit, whatever the other rows and the number of threads.
    ValueError: a shape, dtype or value cannot be used. SelfCheckError: the first call found the kernels wrong.
    """
    result: torch.Tensor = torch.ops.kt.moe(hidden_states, topk_ids, topk_weights, experts.handle)
    return result


def run(x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, experts: PackedExperts) -> torch.Tensor:
    """Run the native kernels. As `moe`, which goes through torch's dispatcher."""
    check(x_TH, ids_TK, weights_TK, experts, _CPU)
    if x_TH.stride(1) != 1:
        x_TH = x_TH.contiguous()
    ids_TK, weights_TK = ids_TK.contiguous(), weights_TK.contiguous()
    if experts.first_call is not None:
        experts.first_call.check(experts, x_TH, ids_TK, launch)
    return launch(x_TH, ids_TK, weights_TK, experts)


def launch(x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, experts: PackedExperts) -> torch.Tensor:
    """Run the native kernels on arguments that `run` would take, contiguous, without any check."""
    tokens, top_k = ids_TK.shape
    out_TH = torch.empty_like(x_TH, memory_format=torch.contiguous_format)
    native_threads().context().moe(
        experts.native,
        experts.isa,
        tokens,
        top_k,
        x_TH.data_ptr(),
        native_dtype(x_TH.dtype, "hidden_states"),
        x_TH.stride(0),
        ids_TK.data_ptr(),
        ids_TK.dtype == torch.int64,
        weights_TK.data_ptr(),
        native_dtype(weights_TK.dtype, "topk_weights"),
        out_TH.data_ptr(),
        out_TH.stride(0),
    )
    return out_TH


def check(
    x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, experts: PackedExperts, where: torch.device
) -> None:
    """ValueError: a shape or a dtype cannot be used, or a tensor is not where it should be."""
    if x_TH.dim() != 2 or x_TH.shape[1] != experts.hidden_size:
        raise ValueError(f"hidden_states is {list(x_TH.shape)}; it must be [tokens, {experts.hidden_size}]")
    if ids_TK.dim() != 2 or ids_TK.shape[0] != x_TH.shape[0]:
        raise ValueError(f"topk_ids is {list(ids_TK.shape)}; it must be [{x_TH.shape[0]}, top_k]")
    if weights_TK.shape != ids_TK.shape:
        raise ValueError(f"topk_weights is {list(weights_TK.shape)}; it must be {list(ids_TK.shape)}, as topk_ids")
    if ids_TK.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"topk_ids has dtype {ids_TK.dtype}; it must be torch.int64 or torch.int32")
    if ids_TK.shape[1] == 0:
        raise ValueError(f"topk_ids is {list(ids_TK.shape)}; every token needs at least one expert")
    native_dtype(x_TH.dtype, "hidden_states")
    native_dtype(weights_TK.dtype, "topk_weights")
    for name, tensor in (("hidden_states", x_TH), ("topk_ids", ids_TK), ("topk_weights", weights_TK)):
        if tensor.device != where:
            raise ValueError(f"{name} is on {tensor.device}; it must be on {_place(where)}")


def _place(where: torch.device) -> str:
    return "the CPU" if where == _CPU else str(where)


def _moe(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, handle: torch.Tensor) -> torch.Tensor:
    return anywhere(x, ids, weights, from_handle(handle))


def _experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    spec: str,
) -> torch.Tensor:
    plain = (gate_up_proj, down_proj, gate_up_bias, down_bias)
    return anywhere(x, ids, weights, expert_store().get(plain, ExpertsSpec.decode(spec)))


def anywhere(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: PackedExperts) -> torch.Tensor:
    """Run experts that may lie on two sides, and tell who observes. As `moe`, which goes through torch's dispatcher."""
    if experts.split is None:
        if x.device != _CPU:
            raise ValueError(
                f"hidden_states is on {x.device}, but {experts.label} is the CPU's alone; compile the model with "
                'options={"device": "cuda"}, or move it to the CPU'
            )
        result = run(x, ids, weights, experts)  # it refuses ids that none can count
        observe(experts, ids)
        return result
    call = experts.split.submit(x, ids, weights)
    return call.finish(call.resident(x, weights))


@torch.library.register_fake("kt::moe", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _moe_fake(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, handle: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("kt::experts", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _experts_fake(x: torch.Tensor, *others: object) -> torch.Tensor:
    return x.new_empty(x.shape)


for _name, _function in (("moe", _moe), ("experts", _experts)):
    for _key in ("CPU", "CUDA"):
        LIBRARY.impl(_name, _function, _key)
    register_without_backward(_name)
