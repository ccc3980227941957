"""The Triton kernels compile for GPUs that are not there, use their matrix instructions, and do not spill."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from helpers.triton_compile import SHARED_MEMORY, TARGETS, compile_for

from ktcompile.ops import Activation
from ktcompile.ops.triton import BlockCache, Rotary, device_experts, routing_reference
from ktcompile.ops.triton.attention import decode_launches, prefill_launch
from ktcompile.ops.triton.kv import store_launch
from ktcompile.ops.triton.launch import Launch
from ktcompile.ops.triton.moe import BLOCK_ROWS, product_launches, sum_launch
from ktcompile.ops.triton.routing import CHUNK, MANY_PAIRS, route_launches
from ktcompile.quant import FORMATS

CPU = torch.device("cpu")
BF16 = torch.bfloat16
MOE_FORMATS = ("bf16", "int8", "fp8", "int4_g128_zp", "mxfp4")


def moe_launches(weight_format: str, activation: Activation, *, bias: bool = False) -> list[Launch]:
    """Return the kernels of a call, with sizes that are multiples of 16, as models have."""
    record, (experts, hidden, intermediate, tokens, top_k) = FORMATS[weight_format], (2, 256, 128, 16, 2)
    dtype = record.storage or BF16
    shapes = ((experts, 2 * intermediate, hidden), (experts, hidden, intermediate))
    weights = [torch.zeros(s, dtype=dtype) if record.storage else record.quantize(torch.zeros(s)) for s in shapes]
    biases = [torch.zeros(s[:2]) if bias else None for s in shapes]
    layer = device_experts(*weights, activation, *biases, device=CPU)
    ids = torch.zeros(tokens, top_k, dtype=torch.int64)
    routing = routing_reference.route(ids, torch.arange(experts, dtype=torch.int32), experts, BLOCK_ROWS)
    x = torch.zeros(tokens, hidden, dtype=dtype)
    products = torch.zeros(tokens * top_k, hidden)
    total = sum_launch(products, torch.zeros(tokens, top_k), routing.resident, torch.empty_like(x))
    return [*product_launches(x, products, layer, routing), total]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("weight_format", MOE_FORMATS)
def test_products_of_experts(weight_format: str, target: str) -> None:
    first, second, weighted_sum = moe_launches(weight_format, Activation("silu"))
    check(first, target)
    check(second, target)
    if weight_format == MOE_FORMATS[0]:
        check(weighted_sum, target, has_dot=False)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_activations_of_experts(target: str) -> None:
    for activation in (Activation("swigluoai", alpha=1.702, limit=7.0), Activation("gelu_erf")):
        check(moe_launches("mxfp4", activation, bias=True)[0], target)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("experts", [8, 128, 512])
def test_routing(experts: int, target: str) -> None:
    places = torch.arange(experts, dtype=torch.int32)
    for tokens, dtype, kernels in ((1, torch.int64, 1), (CHUNK, torch.int64, 2), (MANY_PAIRS, torch.int32, 2)):
        arguments = (torch.zeros(tokens, 8, dtype=dtype), places, experts, BLOCK_ROWS)
        launches = [*route_launches(*arguments, routing_reference.route(*arguments), keep=tokens > 1)]
        assert len(launches) == kernels
        for launch in launches:
            check(launch, target, has_dot=False)


ATTENTION = {  # heads of queries and keys, sizes of keys and values
    "grouped": (32, 4, 128, 128),
    "small": (64, 8, 64, 64),
    "large": (16, 8, 256, 256),
    "separate": (16, 16, 192, 128),
    "latent": (128, 1, 576, 512),
}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str, target: str) -> None:
    heads, kv_heads, size, value_size = ATTENTION[name]
    block_size = 16 if name == "separate" else 64
    k = torch.zeros(2, block_size, kv_heads, size, dtype=BF16)
    v = k[..., :value_size] if name == "latent" else torch.zeros(2, block_size, kv_heads, value_size, dtype=BF16)
    lengths = torch.zeros(2, dtype=torch.int32)
    cache = BlockCache(k, v, torch.zeros(2, 32, dtype=torch.int32), lengths)
    q = torch.zeros(2, heads, size, dtype=BF16)
    out, sinks = q.new_empty(2, heads, value_size), torch.zeros(heads, dtype=BF16)
    decode, combine = decode_launches(q, cache, out, 1.0, 128, sinks, None)
    check(decode, target)
    check(combine, target, has_dot=False)
    prefill = prefill_launch(q, cache, lengths, 2, out, 1.0, 128, sinks)
    if size == 128 and target != "sm_80":
        prefill = replace(prefill, num_warps=4)
    check(prefill, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_store_of_keys_and_values(target: str) -> None:
    q, k, v = (torch.zeros(4, heads, 128, dtype=BF16) for heads in (32, 4, 4))
    caches = [torch.zeros(2, 16, 4, 128, dtype=BF16) for _ in range(2)]
    numbers = torch.zeros(4, dtype=torch.int64)
    rotary = Rotary(torch.zeros(8, 64), torch.zeros(8, 64))
    check(store_launch(q, k, v, numbers, numbers, *caches, rotary, torch.empty_like(q)), target, has_dot=False)


def check(launch: Launch, target: str, *, has_dot: bool = True) -> None:
    """Fail unless the launch compiles as it must."""
    compiled, what = compile_for(launch, target), launch.kernel.__name__
    assert not has_dot or compiled.matrix_instructions, f"{what} has no matrix instructions"
    assert not compiled.spilled, f"{what} spills {compiled.spilled} bytes, with {compiled.registers} registers"
    assert compiled.shared <= SHARED_MEMORY[target], f"{what} needs {compiled.shared} bytes of shared memory"
