"""The operators in plain torch: what is right, without regard to speed.

Shape suffixes: T tokens, K top_k, H hidden_size, I intermediate_size, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ktcompile.ops.spec import Activation, ExpertsSpec


def activate(x: torch.Tensor, activation: Activation, interleaved: bool = False) -> torch.Tensor:
    """Return the activation of `x` [..., 2I] (or [..., I] if not gated), of shape [..., I]."""
    if not activation.gated:
        return _act(x, activation.kind)
    gate, up = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    if activation.limit:
        gate = gate.clamp(max=activation.limit)
        up = up.clamp(-activation.limit, activation.limit)
    if activation.kind == "swigluoai":
        return gate * torch.sigmoid(activation.alpha * gate) * (up + 1)
    return _act(gate, activation.kind) * up


def _act(x: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "silu":
        return F.silu(x)
    if kind == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if kind == "gelu_erf":
        return F.gelu(x)
    return F.relu(x) if kind == "relu" else F.relu(x).square()


def moe(
    x_TH: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    spec: ExpertsSpec,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the sum over slots of `weight * expert(x)`, [T, H], in fp64 without any rounding between.

    Slots whose id is num_experts or more are skipped. Weights as for `ktcompile.ops.pack_experts`.
    """
    out_TH = torch.zeros(x_TH.shape, dtype=torch.float64)
    for e in range(down.shape[0]):
        token, slot = torch.where(ids_TK == e)
        if not len(token):
            continue
        w_gate_up, w_down = gate_up[e].double(), down[e].double()
        if spec.transposed:
            w_gate_up, w_down = w_gate_up.T, w_down.T
        x = F.linear(x_TH[token].double(), w_gate_up, None if gate_up_bias is None else gate_up_bias[e].double())
        x = activate(x, spec.activation, spec.interleaved)
        x = F.linear(x, w_down, None if down_bias is None else down_bias[e].double())
        out_TH.index_add_(0, token, x * weights_TK[token, slot, None].double())
    return out_TH
