"""The operators in plain torch: what is right, without regard to speed.

Shape suffixes: T tokens, K top_k, H hidden_size, I intermediate_size, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from ktcompile.ops.spec import Activation, ExpertsSpec
from ktcompile.quant import WeightFormat, quantize_rows

# Weights that are in fp64 at once: they stay in a core's cache.
_SLICE = 1 << 16

Rows = Callable[[torch.Tensor], torch.Tensor]


def rows_of(weight_format: WeightFormat) -> Rows:
    """Return the function that turns rows into what a format multiplies, in fp64: dynamic formats quantise them."""
    return partial(_quantized_rows, weight_format.group_size or 0) if weight_format.dynamic else torch.Tensor.double


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x @ weight.T + bias in fp64, [..., N]. x: [..., K]. weight: [N, K]. bias: [N]."""
    x = x.double()
    step = max(1, _SLICE // weight.shape[1])
    products = torch.cat([F.linear(x, rows.double()) for rows in torch.split(weight, step)], -1)
    return products if bias is None else products + bias.double()


def gate_and_up(x: torch.Tensor, activation: Activation, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return gate and up, [..., I] each, of the first product `x` [..., 2I], within the activation's limit."""
    gate, up = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    if activation.limit:
        gate = gate.clamp(max=activation.limit)
        up = up.clamp(-activation.limit, activation.limit)
    return gate, up


def activate(x: torch.Tensor, activation: Activation, interleaved: bool = False) -> torch.Tensor:
    """Return the activation of `x` [..., 2I] (or [..., I] if not gated), of shape [..., I]."""
    if not activation.gated:
        return _act(x, activation.kind)
    gate, up = gate_and_up(x, activation, interleaved)
    if activation.kind == "swigluoai":
        return gate * torch.sigmoid(activation.alpha * gate) * (up + 1)
    return _act(gate, activation.kind) * up


def moe(
    x_TH: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    spec: ExpertsSpec,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    rows: Rows = torch.Tensor.double,
) -> torch.Tensor:
    """Return the sum over slots of `weight * expert(x)`, [T, H], in fp64 without any rounding between.

    Slots whose id is num_experts or more are skipped. Weights as for `ktcompile.ops.pack_experts`. rows: what the
    products do to their rows, from `rows_of`.
    """
    out_TH = torch.zeros(x_TH.shape, dtype=torch.float64)
    for e in range(down.shape[0]):
        token, slot = torch.where(ids_TK == e)
        if not len(token):
            continue
        w_gate_up, w_down = gate_up[e], down[e]
        if spec.transposed:
            w_gate_up, w_down = w_gate_up.T, w_down.T
        x = linear(rows(x_TH[token]), w_gate_up, None if gate_up_bias is None else gate_up_bias[e])
        x = rows(activate(x, spec.activation, spec.interleaved))
        x = linear(x, w_down, None if down_bias is None else down_bias[e])
        out_TH.index_add_(0, token, x * weights_TK[token, slot, None].double())
    return out_TH


def _act(x: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "silu":
        return F.silu(x)
    if kind == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if kind == "gelu_erf":
        return F.gelu(x)
    return F.relu(x) if kind == "relu" else F.relu(x).square()


def _quantized_rows(group: int, x: torch.Tensor) -> torch.Tensor:
    """Return what `ktcompile.quant.quantize_rows` defines, with 127 / m as a division in fp32, as in the kernels: torch
    computes a number over a tensor with the inverse of the tensor, and codes between two integers go the other way.
    group: columns that share a scale; 0: all of them."""
    if group:
        columns = x.shape[-1]
        groups = torch.unflatten(F.pad(x, (0, -columns % group)), -1, (-1, group))
        return _quantized_rows(0, groups).flatten(-2)[..., :columns]
    _, scales = quantize_rows(x)
    x, largest = x.float(), x.float().abs().amax(-1, keepdim=True)
    factors = torch.full_like(largest, 127).div_(largest).masked_fill_(scales == 0, 0)
    return (x * factors).round_().double() * scales.double()
