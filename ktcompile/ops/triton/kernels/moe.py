"""The two products of experts, and the sum over the slots of a token.

A program of a product takes one block of rows that are of one expert, and some columns of the output. Rows are (token,
slot) pairs, sorted by expert; `routing.py` says which.

Shape suffixes: M rows of a block, N columns of the output.
"""

import triton
import triton.language as tl

from ktcompile.ops.triton.kernels.weights import add_chunk, load_inputs, scale_sum


@triton.jit
def activate(gate, up, KIND: tl.constexpr, GATED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """Return the activation of `ktcompile.ops.spec.Activation` in fp32. NaN stays NaN."""
    if LIMIT > 0:
        gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.minimum(up, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.maximum(up, -LIMIT, propagate_nan=tl.PropagateNan.ALL)
    if KIND == "swigluoai":
        return gate * tl.sigmoid(ALPHA * gate) * (up + 1)
    if KIND == "silu":
        value = gate * tl.sigmoid(gate)
    elif KIND == "gelu_tanh":
        # (1 + tanh(z)) / 2 is sigmoid(2z).
        value = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    elif KIND == "gelu_erf":
        value = 0.5 * gate * (1 + tl.erf(0.7071067811865476 * gate))
    else:
        value = tl.maximum(gate, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if KIND == "relu2":
            value *= value
    return value * up if GATED else value


@triton.jit
def _add_bias(acc, bias_ptr, rows, row_mask, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rows, mask=row_mask, other=0).to(tl.float32)[None, :]
    return acc


@triton.jit
def first_product_kernel(
    x_ptr, out_ptr, codes_ptr, scales_ptr, zeros_ptr, bias_ptr, order_ptr, blocks_ptr,
    top_k, columns, outputs, stride_x, stride_slot, stride_row, stride_column, stride_scales,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr,
    KIND: tl.constexpr, GATED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Write act(x @ gate.T, x @ up.T) [pairs, outputs], in sorted order, for one block of pairs."""
    blocks_ptr += 3 * tl.program_id(0)
    slot = tl.load(blocks_ptr).to(tl.int64)
    if slot < 0:
        return
    num_rows = 2 * outputs if GATED else outputs
    codes_ptr += slot * stride_slot
    scales_ptr += slot * stride_scales
    zeros_ptr += slot * stride_scales
    bias_ptr += slot * num_rows

    m = tl.load(blocks_ptr + 1) + tl.arange(0, BLOCK_M)
    mask_M = m < tl.load(blocks_ptr + 2)
    pairs = tl.load(order_ptr + m, mask=mask_M, other=0)
    x_ptrs = x_ptr + (pairs // top_k).to(tl.int64) * stride_x

    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_N = n < outputs
    gate_rows = 2 * n if GATED and INTERLEAVED else n
    up_rows = 2 * n + 1 if INTERLEAVED else n + outputs

    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for chunk in range(tl.cdiv(columns, 64)):
        low, high = load_inputs(x_ptrs, mask_M, chunk, columns, FORMAT)
        gate = add_chunk(
            gate, low, high, codes_ptr, scales_ptr, zeros_ptr, gate_rows, mask_N, chunk, num_rows, columns,
            stride_row, stride_column, FORMAT, GROUP, HAS_ZEROS, INTERPRET,
        )  # fmt: skip
        if GATED:
            up = add_chunk(
                up, low, high, codes_ptr, scales_ptr, zeros_ptr, up_rows, mask_N, chunk, num_rows, columns,
                stride_row, stride_column, FORMAT, GROUP, HAS_ZEROS, INTERPRET,
            )  # fmt: skip
    gate = _add_bias(
        scale_sum(gate, scales_ptr, gate_rows, mask_N, num_rows, FORMAT, GROUP), bias_ptr, gate_rows, mask_N, HAS_BIAS
    )
    if GATED:
        up = _add_bias(
            scale_sum(up, scales_ptr, up_rows, mask_N, num_rows, FORMAT, GROUP), bias_ptr, up_rows, mask_N, HAS_BIAS
        )
    value = activate(gate, up, KIND, GATED, ALPHA, LIMIT)
    at = m.to(tl.int64)[:, None] * outputs + n[None, :]
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=mask_M[:, None] & mask_N[None, :])


@triton.jit
def second_product_kernel(
    x_ptr, out_ptr, codes_ptr, scales_ptr, zeros_ptr, bias_ptr, order_ptr, blocks_ptr,
    columns, outputs, stride_slot, stride_row, stride_column, stride_scales,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Write x @ down.T [pairs, outputs] in fp32, each row at its pair, for one block of rows of x in sorted order."""
    blocks_ptr += 3 * tl.program_id(0)
    slot = tl.load(blocks_ptr).to(tl.int64)
    if slot < 0:
        return
    codes_ptr += slot * stride_slot
    scales_ptr += slot * stride_scales
    zeros_ptr += slot * stride_scales
    bias_ptr += slot * outputs

    m = tl.load(blocks_ptr + 1) + tl.arange(0, BLOCK_M)
    mask_M = m < tl.load(blocks_ptr + 2)
    x_ptrs = x_ptr + m.to(tl.int64) * columns
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_N = n < outputs

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for chunk in range(tl.cdiv(columns, 64)):
        low, high = load_inputs(x_ptrs, mask_M, chunk, columns, FORMAT)
        acc = add_chunk(
            acc, low, high, codes_ptr, scales_ptr, zeros_ptr, n, mask_N, chunk, outputs, columns,
            stride_row, stride_column, FORMAT, GROUP, HAS_ZEROS, INTERPRET,
        )  # fmt: skip
    acc = _add_bias(scale_sum(acc, scales_ptr, n, mask_N, outputs, FORMAT, GROUP), bias_ptr, n, mask_N, HAS_BIAS)
    pairs = tl.load(order_ptr + m, mask=mask_M, other=0).to(tl.int64)
    at = pairs[:, None] * outputs + n[None, :]
    tl.store(out_ptr + at, acc, mask=mask_M[:, None] & mask_N[None, :])


@triton.jit
def weighted_sum_kernel(products_ptr, weights_ptr, resident_ptr, out_ptr, top_k, columns, BLOCK_N: tl.constexpr):
    """Write the sum of a token's products by their weights, in ascending order of its slots, without those that have
    no resident expert, which nobody wrote."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_N], tl.float32)
    for k in range(top_k):
        pair = token * top_k + k
        if tl.load(resident_ptr + pair) >= 0:
            weight = tl.load(weights_ptr + pair).to(tl.float32)
            acc += weight * tl.load(products_ptr + pair * columns + n, mask=n < columns, other=0)
    tl.store(out_ptr + token * columns + n, acc.to(out_ptr.dtype.element_ty), mask=n < columns)
